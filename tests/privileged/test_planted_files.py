"""Links that another user plants, and directories that he exchanges, where root makes, replaces or
removes files: results, the state of --tune, Unix sockets."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from kecho import ListenError, ServerConfig
from kecho.bench.output.files import check_writable, write_whole
from kecho.bench.tuning.state_file import State, StateFile
from kecho.errors import TuningError
from kecho.server.sockets.listen import open_listeners
from support.clients import DEADLINE_S
from support.privileges import needs_root

pytestmark = [pytest.mark.privileged, needs_root]

NOBODY = 65534
ATTEMPTS = 200


@pytest.fixture
def top() -> Iterator[Path]:
    """`his` belongs to another user, `ours` to root; everybody may look into both."""
    directory = Path(tempfile.mkdtemp(prefix="kecho-test-"))
    for name in ("", "his", "his/place", "his/other", "ours"):
        (directory / name).mkdir(exist_ok=True)
        (directory / name).chmod(0o755)
    for name in ("his", "his/place", "his/other"):
        os.chown(directory / name, NOBODY, NOBODY)
    yield directory
    shutil.rmtree(directory)


def plant(link: Path, target: Path) -> None:
    link.symlink_to(target)
    os.chown(link, NOBODY, NOBODY, follow_symlinks=False)


@contextmanager
def exchanging(one: Path, other: Path) -> Iterator[None]:
    """Meanwhile another user exchanges them as fast as he can, by renameat2(2)."""
    script = f"""
import ctypes, os
libc = ctypes.CDLL(None)
names = [os.fsencode(one) for one in {(str(one), str(other))!r}]
os.setgroups([]), os.setgid({NOBODY}), os.setuid({NOBODY})
print(flush=True)
while libc.renameat2(-100, names[0], -100, names[1], 2) == 0:
    pass
"""
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"\n"
        yield
        assert process.poll() is None, "nobody could exchange them"
    finally:
        process.kill()
        process.wait(DEADLINE_S)
        process.stdout.close()


# ---- results ------------------------------------------------------------------------------------


def test_a_result_does_not_go_through_a_planted_directory(top: Path) -> None:
    plant(top / "his/results", top / "ours")
    (top / "ours/a.json").write_text("precious")
    for call in (check_writable, lambda path: write_whole(path, "x")):
        with pytest.raises(OSError, match="'results' on the way is a link of another user"):
            call(str(top / "his/results/a.json"))
    assert (top / "ours/a.json").read_text() == "precious"
    assert os.listdir(top / "ours") == ["a.json"]


def test_a_planted_link_in_dev_shm_leads_to_no_open_descriptor(tmp_path: Path) -> None:
    """Everybody may write there, as in /tmp; it is none of the names of descriptors."""
    link = Path(tempfile.mktemp(prefix="kecho-test-", dir="/dev/shm"))
    with (tmp_path / "log").open("w+") as log:
        plant(link, Path(f"/proc/self/fd/{log.fileno()}"))
        try:
            for call in (check_writable, lambda path: write_whole(path, "x")):
                with pytest.raises(OSError, match="a link of another user"):
                    call(str(link))
        finally:
            link.unlink()
        assert log.read() == ""


def test_a_result_goes_through_a_link_of_roots_own(top: Path) -> None:
    (top / "ours/results").symlink_to(top / "his/place")
    (top / "ours/relative").symlink_to("../ours/results/.")
    write_whole(str(top / "ours/relative/a.json"), "x")
    assert (top / "his/place/a.json").read_text() == "x"


def test_in_a_user_namespace_links_of_the_root_outside_are_followed(top: Path) -> None:
    """There root shows as the overflow user, as "/" does: unlike a link of the caller's, and no
    stranger's."""
    (top / "ours/link").symlink_to("../his")
    script = f"""
import ctypes, os
from kecho.system.directories import open_directory
os.setgroups([]), os.setgid(1234), os.setuid(1234)
libc = ctypes.CDLL(None)
assert libc.prctl(4, 1, 0, 0, 0) == 0  # PR_SET_DUMPABLE: its files in /proc are its own again
if libc.unshare(0x10000000):
    print("his")
else:
    open("/proc/self/uid_map", "w").write("0 1234 1")
    fd = open_directory({str(top / "ours/link")!r}).fd
    print(os.path.basename(os.readlink(f"/proc/self/fd/{{fd}}")))
"""
    finished = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60
    )
    assert (finished.stderr, finished.stdout) == ("", "his\n")


def test_a_result_stays_out_of_a_directory_that_is_exchanged_meanwhile(top: Path) -> None:
    plant(top / "his/link", top / "ours")
    path = str(top / "his/place/a.json")
    before = (top / "ours").stat().st_mtime_ns
    written = 0
    with exchanging(top / "his/place", top / "his/link"):
        for _ in range(ATTEMPTS):
            with suppress(OSError):
                write_whole(path, "x")
                written += 1
    assert (top / "ours").stat().st_mtime_ns == before
    assert written


def test_a_result_is_not_given_to_a_planted_pipe(top: Path) -> None:
    place = top / "shared"
    place.mkdir()
    place.chmod(0o1777)
    os.mkfifo(place / "a.json", 0o666)
    os.chown(place / "a.json", NOBODY, NOBODY)
    for call in (check_writable, lambda path: write_whole(path, "x")):
        with pytest.raises(PermissionError, match="belongs to another user"):
            call(str(place / "a.json"))


# ---- the state of --tune ------------------------------------------------------------------------


@pytest.mark.parametrize("level", ["directory", "above"])
def test_the_state_of_tune_does_not_go_through_a_planted_link(top: Path, level: str) -> None:
    if level == "directory":
        plant(top / "his/kecho", top / "ours")
    else:
        plant(top / "his/run", top)
    file = StateFile(top / ("his/kecho/s.json" if level == "directory" else "his/run/ours/s.json"))
    with pytest.raises(TuningError, match="which is not followed"):
        file.open(create=True)
    assert os.listdir(top / "ours") == []


def test_the_state_of_tune_stays_where_it_was_begun(top: Path) -> None:
    """As root's own directory would be moved by nobody, somebody with its parent moves it."""
    (top / "his/kecho").mkdir(mode=0o700)
    file = StateFile(top / "his/kecho/s.json")
    file.open(create=True)
    try:
        plant(top / "his/link", top / "ours")
        (top / "his/kecho").rename(top / "his/moved")
        (top / "his/link").rename(top / "his/kecho")
        file.write(State({}))
        assert os.listdir(top / "ours") == []
        assert os.listdir(top / "his/moved") == ["s.json"]
        file.remove()
        assert os.listdir(top / "his/moved") == []
    finally:
        file.close()


# ---- Unix sockets -------------------------------------------------------------------------------


def listen_and_close(path: Path) -> str:
    """What became of it: an empty text, or why it was refused."""
    try:
        listeners = open_listeners(ServerConfig.from_options({"uds": str(path)}), 1)
    except ListenError as error:
        return error.reason
    for listener in listeners:
        listener.close()
    return ""


def stale(path: Path) -> os.stat_result:
    with socket.socket(socket.AF_UNIX) as gone:
        gone.bind(str(path))
    return path.lstat()


def test_a_stale_socket_is_not_removed_through_a_planted_directory(top: Path) -> None:
    plant(top / "his/run", top / "ours")
    before = stale(top / "ours/s")
    assert "'run' on the way is a link of another user" in listen_and_close(top / "his/run/s")
    assert os.path.samestat((top / "ours/s").lstat(), before)


def test_no_socket_is_made_in_a_directory_that_is_exchanged_meanwhile(top: Path) -> None:
    plant(top / "his/link", top / "ours")
    before = (top / "ours").stat().st_mtime_ns
    served = 0
    with exchanging(top / "his/place", top / "his/link"):
        for _ in range(ATTEMPTS):
            served += not listen_and_close(top / "his/place/s")
    assert (top / "ours").stat().st_mtime_ns == before
    assert served


def test_a_stale_file_is_removed_where_it_was_found_and_no_live_one_elsewhere(top: Path) -> None:
    """Two directories are exchanged; in one the file is stale, in the other it is another daemon's,
    which has bound it and does not listen yet."""
    served = 0
    with socket.socket(socket.AF_UNIX) as live:
        live.bind(str(top / "his/other/s"))
        facts = (top / "his/other/s").lstat()
        homes = [os.open(top / "his" / name, os.O_PATH) for name in ("place", "other")]
        try:
            with exchanging(top / "his/place", top / "his/other"):
                for _ in range(ATTEMPTS):
                    if not os.path.lexists(f"/proc/self/fd/{homes[0]}/s"):
                        stale(Path(f"/proc/self/fd/{homes[0]}/s"))
                    served += not listen_and_close(top / "his/place/s")
                    now = os.stat("s", dir_fd=homes[1], follow_symlinks=False)
                    assert os.path.samestat(now, facts)
        finally:
            for home in homes:
                os.close(home)
    assert served


def test_a_server_removes_its_file_where_its_directory_has_gone(top: Path) -> None:
    (listener,) = open_listeners(ServerConfig.from_options({"uds": str(top / "his/place/s")}), 1)
    (top / "his/place").rename(top / "his/moved")
    plant(top / "his/place", top / "ours")
    before = stale(top / "ours/s")
    listener.close()
    assert os.path.samestat((top / "ours/s").lstat(), before)
    assert os.listdir(top / "his/moved") == []


def test_a_file_in_use_in_another_network_namespace_is_not_taken_for_stale(
    top: Path, new_namespace: Callable[[], object]
) -> None:
    with socket.socket(socket.AF_UNIX) as live:
        live.bind(str(top / "ours/s"))
        with new_namespace():  # type: ignore[attr-defined]
            assert "in use" in listen_and_close(top / "ours/s")


@pytest.mark.slow_under_sanitizers  # whose runtime is loaded into what mounts, which then fails
@pytest.mark.parametrize(("where", "is_served"), [("his/place", False), ("ours", True)])
def test_without_proc_a_directory_that_others_could_exchange_is_refused(
    top: Path, where: str, is_served: bool
) -> None:
    script = f"""
import socket
from kecho import ListenError, ServerConfig
from kecho.server.sockets.listen import open_listeners
with socket.socket(socket.AF_UNIX) as gone:
    gone.bind({str(top / where / "s")!r})
import subprocess
subprocess.run(["mount", "-t", "tmpfs", "none", "/proc"], check=True)
try:
    for one in open_listeners(ServerConfig.from_options({{"uds": {str(top / where / "s")!r}}}), 1):
        one.close()
except ListenError as error:
    print(error.reason)
"""
    finished = subprocess.run(
        ["unshare", "-m", "--propagation", "private", sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert finished.stderr == ""
    assert ("/proc is not mounted" in finished.stdout) is not is_served
    assert (top / where / "s").exists() is not is_served
