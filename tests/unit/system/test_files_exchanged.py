"""Files that somebody exchanges for a link while they are opened: nothing else is opened."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.clients import DEADLINE_S

pytestmark = pytest.mark.python_only

# A link to a FIFO is put in the file's place right before the first or the second call of open(2),
# which an audit hook hears of; inotify(7) tells whether the FIFO is opened.
SCRIPT = """
import ctypes, os, sys
from kecho.bench.output.files import read_bounded
from kecho.drop.netns import open_namespace
reader, calls, file, link, fifo = sys.argv[1], int(sys.argv[2]), *sys.argv[3:]
libc = ctypes.CDLL(None, use_errno=True)
events = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
assert libc.inotify_add_watch(events, os.fsencode(fifo), 0x20) > 0  # IN_OPEN

def opened():
    try:
        return os.read(events, 4096) != b""
    except BlockingIOError:
        return False

os.close(os.open(fifo, os.O_PATH))
if opened():
    sys.exit(77)

def exchange(event, arguments):
    global calls
    if event == "open" and str(arguments[0]).startswith((file, "/proc/self/fd/")):
        calls -= 1
        if calls == 0:
            os.replace(link, file)

sys.addaudithook(exchange)
try:
    found = read_bounded(file, 99) if reader == "read_bounded" else open_namespace(file)
except (OSError, ValueError) as error:
    found = error
print(repr(found), opened())
"""


def open_while_exchanged(tmp_path: Path, reader: str, call: int) -> tuple[str, str]:
    """What was found, and whether the FIFO was opened."""
    file, link, fifo = tmp_path / "file", tmp_path / "link", tmp_path / "fifo"
    file.write_text("what is looked at")
    os.mkfifo(fifo)
    link.symlink_to(fifo)
    finished = subprocess.run(
        [sys.executable, "-c", SCRIPT, reader, str(call), str(file), str(link), str(fifo)],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )
    if finished.returncode == 77:
        pytest.skip("this kernel calls O_PATH opening: inotify cannot tell")
    assert finished.returncode == 0, finished.stderr
    assert file.is_symlink() or call == 2
    found, _, is_opened = finished.stdout.strip().rpartition(" ")
    return found, is_opened


@pytest.mark.parametrize("call", [1, 2])
@pytest.mark.parametrize("reader", ["read_bounded", "open_namespace"])
def test_what_is_put_in_the_place_of_a_file_is_not_opened(
    tmp_path: Path, reader: str, call: int
) -> None:
    found, is_opened = open_while_exchanged(tmp_path, reader, call)
    assert is_opened == "False"
    if call == 1:
        assert "is not a regular file" in found or "is a FIFO" in found
    else:
        assert "what is looked at" in found or "is a file, not a network namespace" in found
