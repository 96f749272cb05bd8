"""Files of results: what is replaced, what is written to, and what is refused."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import threading
from pathlib import Path
from typing import IO

import pytest

from kecho.bench import delivery
from kecho.bench.output.files import check_writable, write_whole
from kecho.system import directories
from support.faultless_run import result
from support.server_process import run_python

pytestmark = pytest.mark.python_only


@pytest.fixture
def own(tmp_path: Path) -> Path:
    tmp_path.chmod(0o755)
    return tmp_path


def test_a_new_file_is_as_the_umask_has_it(own: Path) -> None:
    before = os.umask(0o027)
    try:
        write_whole(str(own / "new"), "µ")
    finally:
        os.umask(before)
    assert (own / "new").read_bytes() == "µ".encode()
    assert stat.S_IMODE((own / "new").stat().st_mode) == 0o640


def test_a_file_that_is_replaced_keeps_its_mode(own: Path) -> None:
    path = own / "old"
    path.write_text("old")
    path.chmod(0o600)
    check_writable(str(path))
    assert path.read_text() == "old"
    write_whole(str(path), "new")
    assert path.read_text() == "new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [*own.iterdir()] == [path]


def test_what_cannot_be_written_to_its_end_leaves_the_file_as_it_was(
    own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = own / "old"
    path.write_text("old")
    script = """if True:
        import resource, signal, sys
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        from kecho.bench.output.files import write_whole
        write_whole(sys.argv[1], "x" * 100_000)
    """
    finished = run_python("-c", script, str(path))
    assert "File too large" in finished.stderr
    assert path.read_text() == "old"
    assert [*own.iterdir()] == [path]


@pytest.mark.parametrize("target", ["real", "sub/real", "missing"])
def test_a_link_is_followed_and_stays(own: Path, target: str) -> None:
    (own / "sub").mkdir()
    if target != "missing":
        (own / target).write_text("old")
    link = own / "latest.json"
    link.symlink_to(target)
    write_whole(str(link), "new")
    assert link.is_symlink()
    assert (own / target).read_text() == "new"


def test_a_link_to_a_link_is_refused(own: Path) -> None:
    (own / "one").symlink_to("two")
    (own / "two").symlink_to("three")
    for call in (check_writable, lambda path: write_whole(path, "")):
        with pytest.raises(OSError, match="a link to a link"):
            call(str(own / "one"))
    assert not (own / "three").exists()


def test_a_link_where_others_may_make_links_is_refused(own: Path) -> None:
    shared = own / "shared"
    shared.mkdir()
    (shared / "link").symlink_to(own / "victim")
    shared.chmod(0o1777)
    for call in (check_writable, lambda path: write_whole(path, "")):
        with pytest.raises(OSError, match="in a directory that others may write"):
            call(str(shared / "link"))
    assert not (own / "victim").exists()
    write_whole(str(shared / "file"), "this is no link")


def test_a_pipe_is_written_to(own: Path) -> None:
    path = own / "pipe"
    os.mkfifo(path)
    check_writable(str(path))
    read: list[bytes] = []
    reader = threading.Thread(target=lambda: read.append(path.read_bytes()))
    reader.start()
    write_whole(str(path), "x" * 100_000)
    reader.join(30)
    assert read == [b"x" * 100_000]
    assert path.is_fifo()


@pytest.mark.parametrize("name", ["-", "/dev/fd/1", "/proc/self/fd/1"])
def test_stdout_is_written_to_behind_what_is_there(own: Path, name: str) -> None:
    path = own / "out"
    path.write_text("before\n")
    script = (
        "import sys; from kecho.bench.output.files import write_whole as w; w(sys.argv[1], 'x\\n')"
    )
    with path.open("a") as out:
        subprocess.run([sys.executable, "-c", script, name], stdout=out, timeout=60, check=True)
    assert path.read_text() == "before\nx\n"


def test_a_descriptor_that_cannot_be_written_is_refused_before_the_run() -> None:
    reader, writer = os.pipe()
    try:
        check_writable(f"/dev/fd/{writer}")
        with pytest.raises(OSError, match="Bad file descriptor"):
            check_writable(f"/dev/fd/{reader}")
    finally:
        os.close(reader)
        os.close(writer)
    with pytest.raises(OSError, match="Bad file descriptor"):
        check_writable(f"/dev/fd/{writer}")


@pytest.mark.parametrize("name", ["", ".", "sub", "sub/", "sub/.", "sub/.."])
def test_a_directory_is_no_file(own: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (own / "sub").mkdir()
    with pytest.raises(IsADirectoryError):
        check_writable(f"{own}/{name}")


def test_a_name_as_long_as_the_kernel_allows_can_be_written(own: Path) -> None:
    write_whole(str(own / ("x" * 255)), "")


def test_a_temporary_file_that_is_there_already_is_not_followed(
    own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(directories.secrets, "token_hex", lambda size: "known")
    (own / ".kecho-known.tmp").symlink_to(own / "victim")
    with pytest.raises(FileExistsError):
        write_whole(str(own / "file"), "")
    assert not (own / "victim").exists()


@pytest.mark.parametrize("command", [["compare", "{}", "{}"], ["report", "{}", "-o", "x.html"]])
@pytest.mark.parametrize("kind", ["/dev/zero", "/dev/null", "pipe", "socket", "directory"])
def test_what_may_never_end_is_not_read(own: Path, command: list[str], kind: str) -> None:
    path = own / kind
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        os.mknod(path, 0o600 | stat.S_IFSOCK)
    elif kind == "directory":
        path.mkdir()
    finished = run_bench(*(one.format(path) for one in command))
    assert finished.returncode == 1
    assert finished.stderr.startswith(f"kecho.bench: error: {path}: ")
    assert finished.stderr.count("\n") == 1


def test_standard_input_is_read_as_far_as_a_file_may_go(own: Path) -> None:
    with open("/dev/zero", "rb") as zeros:
        finished = run_bench("compare", "-", "/dev/stdin", stdin=zeros)
    assert finished.stderr == "kecho.bench: error: -: larger than 16 MiB\n"
    saved = own / "result.json"
    saved.write_text(result().to_json())
    with saved.open("rb") as file:
        assert "A is one run" in run_bench("compare", "/dev/stdin", str(saved), stdin=file).stdout


def test_a_file_that_will_not_be_read_again_is_told(
    own: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = dict.fromkeys(delivery.FILES) | {"json": str(own / "x"), "percentiles": (50,)}
    assert delivery.deliver([result()], None, options, None) == 0
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(delivery, "MOST_BYTES", 1 << 10)
    assert delivery.deliver([result()], None, options, None) == 0
    assert "warning: --json" in capsys.readouterr().err


def run_bench(*arguments: str, stdin: IO[bytes] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "kecho.bench", *arguments],
        stdin=stdin,
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize(("command", "name"), [("plot", "x.png"), ("report", "x.html")])
def test_a_picture_or_page_that_finds_no_room_leaves_the_one_before(
    own: Path, command: str, name: str
) -> None:
    pytest.importorskip("matplotlib")
    saved, path = own / "result.json", own / name
    saved.write_text(result().to_json())
    path.write_text("old")
    script = """if True:
        import io, resource, signal, sys
        from kecho.bench import cli
        from kecho.bench.output.plot import plot
        from kecho.bench.results.result import load
        plot(load(open(sys.argv[1]).read()), io.BytesIO(), "png")  # what is cached is a file, too
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        sys.exit(cli.main([sys.argv[2], sys.argv[1], "-o", sys.argv[3]]))
    """
    finished = run_python("-c", script, str(saved), command, str(path))
    assert finished.returncode == 1
    assert finished.stderr == f"kecho.bench: error: --output {path}: File too large\n"
    assert path.read_text() == "old"
    assert {*own.iterdir()} == {saved, path}
