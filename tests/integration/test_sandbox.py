"""--sandbox: what is refused within, what works all the same, and kernels that lack it."""

from __future__ import annotations

import errno
import os
import platform
import signal
from pathlib import Path

import pytest

from kecho.server import _sandbox
from support.attacked_server import ALLOWED, attackable, attacked, what_worked
from support.clients import (
    DEADLINE_S,
    connect,
    echo,
    plenty,
    send_until_blocked,
    wait_for,
)
from support.privileges import is_root
from support.server_process import ServerProcess, after, refusing, run_command

pytestmark = [
    pytest.mark.e2e,
    # Their runtimes need more than the sandbox gives, so their builds have none.
    pytest.mark.slow_under_sanitizers,
]


@pytest.fixture(scope="module")
def landlock_abi() -> int:
    try:
        return _sandbox.landlock_abi()
    except OSError as error:
        pytest.skip(f"this kernel has no Landlock: {error.strerror}")


def fields_of_every_thread(pid: int) -> dict[str, set[str]]:
    """Field of /proc/PID/task/*/status -> its values."""
    found: dict[str, set[str]] = {}
    for status in Path(f"/proc/{pid}/task").glob("*/status"):
        for line in status.read_text().splitlines():
            name, _, value = line.partition(":")
            found.setdefault(name, set()).add(value.strip())
    return found


@pytest.mark.skipif(platform.machine() != "x86_64", reason="x32 is of x86-64")
def test_the_other_numbers_of_the_same_calls_are_refused(tmp_path: Path) -> None:
    first = "NUMBERS[:] = [0x40000000 + 39, 0x40000000 + 0]"  # getpid, read
    with attackable(tmp_path, "--port=0", "--sandbox", first=first) as process:
        for found in attacked(process):
            assert found["no call that is not on the list"] == {
                f"call {0x40000000 + 39}": errno.EPERM,
                f"call {0x40000000}": errno.EPERM,
            }
        assert process.stop() == 0


def test_without_the_filter_landlock_still_refuses_files_and_connections(
    tmp_path: Path, landlock_abi: int
) -> None:
    """Each is tried alone, so that one does not hide what the other lets through."""
    tried = ["open to read", "open to write", "open a directory", "execve", "unlink", "mkdir"]
    tried += ["symlink", *(["truncate"] if landlock_abi >= 3 else [])]
    tried += ["bind", "connect 2"] * (landlock_abi >= 4)
    tried += ["kill the parent"] * (landlock_abi >= 6)
    first = f"_sandbox.filter_calls = lambda **_: None; chosen = of_names(*{tried})"
    with attackable(tmp_path, "--port=0", first=first) as process:
        for found in attacked(process):
            errors = {name: number for each in found.values() for name, number in each.items()}
            assert sorted(errors) == sorted(tried)
            assert set(errors.values()) <= {errno.EACCES, errno.EPERM}
        assert process.stop() == 0


def test_without_landlock_the_filter_still_refuses_files_programs_and_connections(
    tmp_path: Path,
) -> None:
    first = "_sandbox.restrict_access = lambda *_: None; NUMBERS.clear()"
    with attackable(tmp_path, "--port=0", "--sandbox", first=first) as process:
        for found in attacked(process):
            assert {effect for effect, _ in what_worked(found)} == {ALLOWED}
        assert process.stop() == 0


def test_it_is_in_force_in_every_thread(dispatch: str) -> None:
    arguments = ["--sandbox", "--threads=3", "--dispatch", dispatch]
    with ServerProcess(arguments) as process:
        process.wait_until_listening()
        assert len(os.listdir(f"/proc/{process.pid}/task")) >= 4
        fields = fields_of_every_thread(process.pid)
        assert fields["Seccomp"] == {"2"}
        assert fields["NoNewPrivs"] == {"1"}
        names = ["CapInh", "CapPrm", "CapEff", "CapAmb"]
        names += ["CapBnd"] * is_root()  # reducing it takes CAP_SETPCAP
        for name in names:
            assert fields[name] == {"0" * 16}, name
        assert process.stop() == 0


def test_it_is_the_default_and_can_be_left_out() -> None:
    for arguments, mode in (([], "2"), (["--no-sandbox"], "0")):
        with ServerProcess(arguments) as process:
            process.wait_until_listening()
            outside = Path("/proc/self/status").read_text()
            expected = {mode} if "Seccomp:\t0" in outside else {"2"}
            assert fields_of_every_thread(process.pid)["Seccomp"] == expected
            assert process.stop() == 0


@pytest.mark.parametrize("form", ["text", "json"])
def test_counters_logs_and_both_signals_work_within(dispatch: str, form: str) -> None:
    arguments = ["--sandbox", "--dispatch", dispatch, "--log-format", form, "--log-level=debug"]
    with ServerProcess([*arguments, "--stats-interval=0.1", "--graceful-timeout=60"]) as process:
        process.wait_until_said("listening on ")
        with connect(process.port) as client:
            assert echo(client, b"hello") == b"hello"
            process.wait_until_said(r"1 connection accepted")
            process.send(signal.SIGUSR1)
            # Backpressure: this one is not done when the drain begins.
            send_until_blocked(client, plenty())
            process.send(signal.SIGTERM)
            process.wait_until_said("draining")
            process.send(signal.SIGTERM)
            assert process.wait() == 0
    assert "stopping at once" in process.stderr
    assert "Traceback" not in process.stderr


def test_a_defect_is_reported_with_its_traceback_within(tmp_path: Path) -> None:
    first = "cli.announce.say_counters = lambda: lambda server: cli.log.exception('x') or [][1]"
    with attackable(tmp_path, "--port=0", "--sandbox", first=first) as process:
        process.send(signal.SIGUSR1)
        assert process.wait() == 1
    assert "IndexError: list index out of range" in process.stderr
    assert "ModuleNotFoundError" not in process.stderr
    assert "Permission" not in process.stderr


def test_threads_that_outlive_the_interpreter_end_quietly(tmp_path: Path) -> None:
    """glibc's pthread_exit() loads a library when it is first called, and aborts without it."""
    first = (
        "spin = lambda: [None for _ in iter(int, 1)];"
        "old = cli.announce.say_where;"
        "cli.announce.say_where = lambda *a: (old(*a),"
        " threading.Thread(target=spin, daemon=True).start())"
    )
    with attackable(tmp_path, "--port=0", "--sandbox", first=first) as process:
        assert process.stop() == 0
    assert "libgcc_s" not in process.stderr


def test_the_unix_sockets_file_is_removed_and_no_other(dispatch: str, tmp_path: Path) -> None:
    path = tmp_path / "inside" / "socket"
    path.parent.mkdir()
    arguments = ["--uds", str(path), "--sandbox", "--dispatch", dispatch]
    first = "chosen = of_names('unlink', 'unlinkat')"
    with attackable(tmp_path, *arguments, first=first) as process:
        with connect(str(path)) as client:
            assert echo(client, b"hello") == b"hello"
        if _has_landlock():
            for found in attacked(process):
                refused = found["a file opened, made or changed"]
                assert refused == {"unlink": errno.EPERM, "unlinkat": errno.EACCES}
        assert process.stop() == 0
    assert not path.exists()
    assert (tmp_path / "kept").exists()


def _has_landlock() -> bool:
    try:
        return _sandbox.landlock_abi() > 0
    except OSError:
        return False


def test_output_whose_reader_is_gone_changes_no_exit_status() -> None:
    with ServerProcess(["--sandbox"]) as process:
        process.wait_until_listening()
        assert process.process.stderr is not None
        process.process.stderr.close()
        process.send(signal.SIGTERM)
        assert process.process.wait(DEADLINE_S) == 0
        process.process.stderr = None


# ---- kernels that lack it ----------------------------------------------------------------------

SECCOMP = {"x86_64": 317, "aarch64": 277}[platform.machine()]
LANDLOCK_CREATE_RULESET = 444


LACKS = [
    (SECCOMP, errno.ENOSYS, "no seccomp"),
    (SECCOMP, errno.EPERM, "no seccomp"),
    (SECCOMP, errno.EINVAL, "no seccomp"),
    (LANDLOCK_CREATE_RULESET, errno.ENOSYS, "no Landlock"),
    (LANDLOCK_CREATE_RULESET, errno.EOPNOTSUPP, "no Landlock"),
]


@pytest.mark.parametrize(("number", "error", "said"), LACKS)
def test_what_the_kernel_lacks_is_said_in_one_line_and_left_out(
    number: int, error: int, said: str
) -> None:
    with ServerProcess([], before=refusing(number, error)) as process:
        process.wait_until_listening()
        with connect(process.port) as client:
            assert echo(client, b"hello") == b"hello"
        assert process.stop() == 0
    lines = [line for line in process.stderr.splitlines() if "warning" in line]
    assert len(lines) == 1
    assert said in lines[0]
    assert "Traceback" not in process.stderr


@pytest.mark.parametrize(("number", "error", "said"), LACKS)
def test_what_the_kernel_lacks_is_an_error_if_it_was_asked_for(
    number: int, error: int, said: str
) -> None:
    with ServerProcess(["--sandbox"], before=refusing(number, error)) as process:
        assert process.wait() == 1
    lines = process.stderr.splitlines()
    assert len(lines) == 1
    assert "--sandbox" in lines[0]
    assert said in lines[0]


def test_a_process_with_other_threads_is_not_confined_by_halves() -> None:
    first = "import threading; threading.Thread(target=threading.Event().wait, daemon=True).start()"
    script = f"{first}; import sys; from kecho.server import cli; sys.exit(cli.main(sys.argv[1:]))"
    given = ["-c", script, "--port=0", "--sandbox"]
    with ServerProcess(["--port=0"], before=after(f"sys.argv[2:] = {given!r}")) as process:
        assert process.wait() == 1
    assert "other threads" in process.stderr


def test_values_that_are_no_switch_are_wrong_usage() -> None:
    finished = run_command("--port=0", KECHO_SANDBOX="maybe")
    assert finished.returncode == 2
    assert "KECHO_SANDBOX" in finished.stderr


def test_many_threads_start_within(dispatch: str) -> None:
    with ServerProcess(["--sandbox", "--threads=64", "--dispatch", dispatch]) as process:
        process.wait_until_listening()
        wait_for(lambda: len(os.listdir(f"/proc/{process.pid}/task")) == 66, "64 workers, two more")
        for _ in range(20):
            with connect(process.port) as client:
                assert echo(client, b"hello") == b"hello"
        assert process.stop() == 0
