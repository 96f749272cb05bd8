"""Files of results where root writes them: whose they stay, and whose links are not followed."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from kecho.bench.output.files import check_writable, write_whole
from support.privileges import needs_root

pytestmark = [pytest.mark.privileged, needs_root]

NOBODY = 65534


@pytest.fixture
def own(tmp_path: Path) -> Path:
    tmp_path.chmod(0o755)
    return tmp_path


def test_a_file_of_another_user_stays_his(own: Path) -> None:
    path = own / "result.json"
    path.write_text("old")
    path.chmod(0o600)
    os.chown(path, NOBODY, NOBODY)
    write_whole(str(path), "new")
    status = path.stat()
    assert path.read_text() == "new"
    assert (status.st_uid, status.st_gid) == (NOBODY, NOBODY)
    assert stat.S_IMODE(status.st_mode) == 0o600


@pytest.mark.parametrize("whose", ["link", "directory"])
def test_a_link_that_another_user_could_have_made_is_refused(own: Path, whose: str) -> None:
    directory = own / "directory"
    directory.mkdir()
    link = directory / "latest.json"
    link.symlink_to(own / "victim")
    os.chown({"link": link, "directory": directory}[whose], NOBODY, -1, follow_symlinks=False)
    for call in (check_writable, lambda path: write_whole(path, "")):
        with pytest.raises(OSError, match="which is not followed"):
            call(str(link))
    assert not (own / "victim").exists()


@pytest.mark.slow_under_sanitizers  # whose runtime is loaded into what mounts, which then fails
def test_files_are_read_without_proc(own: Path) -> None:
    (own / "results").write_text("all of it")
    os.mkfifo(own / "fifo")
    script = f"""
        umount -l /proc && '{sys.executable}' -c 'if True:
            from kecho.bench.output.files import read_bounded
            print(read_bounded("{own}/results", 99))
            try:
                read_bounded("{own}/fifo", 99)
            except ValueError as error:
                print(error)'
    """
    finished = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script], capture_output=True, text=True, timeout=60
    )
    assert finished.stdout.splitlines() == [
        "b'all of it'",
        "is not a regular file; a pipe is read as standard input, -",
    ], finished.stderr


@pytest.mark.slow_under_sanitizers  # whose runtime is loaded into what mounts, which then fails
def test_stdout_by_its_name_stays_a_link(own: Path) -> None:
    """In a /dev of its own: were it replaced, then for the whole machine."""
    script = f"""
        mount -t tmpfs none /dev && ln -s /proc/self/fd/1 /dev/stdout && mknod /dev/null c 1 3 &&
        '{sys.executable}' -c 'from kecho.bench.output.files import write_whole as w
w("/dev/stdout", "x")' && readlink /dev/stdout >&2
    """
    with (own / "out").open("w") as out:
        finished = subprocess.run(
            ["unshare", "-m", "--propagation", "private", "sh", "-c", script],
            stdout=out,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
        )
    assert finished.stderr == "/proc/self/fd/1\n"
    assert (own / "out").read_text() == "x"
