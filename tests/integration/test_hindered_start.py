"""The command where something that is usually there is refused or missing: it goes on if it can;
if not, one line names the call, and nothing has been announced."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from kecho.system import cpus
from support.clients import DEADLINE_S, connect, echo
from support.server_process import ServerProcess, after

# strace does not get along with a sanitizer, and none of it runs in native code.
pytestmark = [pytest.mark.e2e, pytest.mark.slow_under_sanitizers]

WITHOUT_CAPABILITIES = (
    "from kecho.server import _sandbox; _sandbox.drop_bounding_set(); _sandbox.drop_capabilities()"
)


def refusing(strace: list[str], call: str, error: str = "EPERM") -> list[str]:
    """For `before`: the call fails, whoever makes it."""
    inject = f"inject={call}:error={error}"
    return [*strace, "-o", "/dev/null", "-e", f"trace={call}", "-e", inject]


def without_dev_null(strace: list[str]) -> list[str]:
    return [*refusing(strace, "openat", "ENOENT"), "-P", "/dev/null"]


@pytest.mark.parametrize("call", ["uname", "sched_getaffinity", "prlimit64"])
def test_a_start_goes_on_without_a_call_that_it_can_do_without(
    strace: list[str], call: str
) -> None:
    with ServerProcess([], before=refusing(strace, call)) as process:
        process.wait_until_listening()
        with connect(process.port) as client:
            assert echo(client, b"hello") == b"hello"
        assert process.stop() == 0
        assert "Traceback" not in process.stderr


@pytest.mark.parametrize("call", ["pipe2", "getsockname", "rt_sigaction", "rt_sigprocmask"])
def test_a_start_that_cannot_go_on_is_one_line_that_names_the_call(
    strace: list[str], call: str
) -> None:
    with ServerProcess([], before=refusing(strace, call)) as process:
        assert process.wait() == 1
    name = call.removeprefix("rt_")
    assert process.stderr == f"kecho: error: {name}: Operation not permitted\n"


def test_capabilities_need_not_be_given_up_by_who_has_none(strace: list[str]) -> None:
    before = refusing(strace, "capset", "EPERM:when=2+")
    with ServerProcess([], before=[*before, *after(WITHOUT_CAPABILITIES)]) as process:
        process.wait_until_listening()
        assert process.stop() == 0


def test_nothing_is_announced_before_a_worker_could_be_pinned(
    strace: list[str], tmp_path: Path
) -> None:
    if len(cpus.usable_cpus()) < 2:
        pytest.skip("needs two CPUs")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.settimeout(DEADLINE_S)
        manager.bind(str(tmp_path / "notify"))
        environment = {"NOTIFY_SOCKET": str(tmp_path / "notify")}
        before = refusing(strace, "sched_setaffinity")
        with ServerProcess(["--dispatch=percpu"], environment, before=before) as process:
            assert process.wait() == 1
        assert manager.recv(100) == b"STOPPING=1"
    assert process.stderr.startswith("kecho: error: sched_setaffinity: Operation not permitted")
    assert process.stderr.count("\n") == 1


@pytest.mark.parametrize("module", ["kecho", "kecho.bench", "kecho.drop"])
@pytest.mark.parametrize("closed", ["", "<&-", "2>&-"])
def test_commands_run_where_there_is_no_dev_null(
    strace: list[str], module: str, closed: str
) -> None:
    command = [*without_dev_null(strace), sys.executable, "-m", module, "--version"]
    finished = subprocess.run(
        ["sh", "-c", f'exec "$@" {closed}', "sh", *command],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )
    assert (finished.returncode, finished.stderr) == (0, "")
    assert finished.stdout.startswith("kecho")


def test_a_server_with_a_socket_for_its_stdin_serves_where_there_is_no_dev_null(
    strace: list[str], tcp: socket.socket
) -> None:
    to_stdin = after(f"os.dup2({tcp.fileno()}, 0)")
    before = [*without_dev_null(strace), *to_stdin]
    with ServerProcess(["--fd=0"], before=before, pass_fds=[tcp.fileno()]) as process:
        process.wait_until_listening()
        with connect(tcp.getsockname()[1]) as client:
            assert echo(client, b"hello") == b"hello"
        assert process.stop() == 0
