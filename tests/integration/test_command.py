"""`python -m kecho`: what it says at its start, later, and when asked for help."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

import kecho
from kecho.options import flag
from kecho.server.settings import OPTIONS, CommandConfig
from kecho.system.sysctl import somaxconn
from support.clients import DEADLINE_S, connect, echo, wait_for
from support.fixture_types import StartProcess
from support.server_process import ServerProcess, after, run_command

# What the command says; what it does under the sanitizers is in test_process_life.py and others.
pytestmark = [pytest.mark.e2e, pytest.mark.slow_under_sanitizers]


# ---- what it says when it starts ----------------------------------------------------------------


def test_the_start_line_names_address_backlog_dispatch_and_threads(
    start_process: StartProcess, dispatch: str
) -> None:
    process = start_process("--dispatch", dispatch, "--threads", "2", "--backlog", "77")
    words = (f"tcp 127.0.0.1:{process.port}", "backlog 77", f"dispatch {dispatch}", "2 threads")
    assert process.stderr.count("\n") == 1
    for word in words:
        assert word in process.stderr
    assert "other hosts" not in process.stderr


def test_port_0_prints_a_port_that_clients_can_use(
    start_process: StartProcess, dispatch: str
) -> None:
    process = start_process("--port", "0", "--dispatch", dispatch)
    assert process.port != 0
    with connect(process.port) as client:
        assert echo(client, b"hello") == b"hello"
    assert process.stop() == 0


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


needs_ipv6 = pytest.mark.skipif(not has_ipv6(), reason="this host has no ::1")


@pytest.mark.parametrize(
    "hosts",
    [
        ["127.0.0.1", "127.0.0.2"],
        pytest.param(["::1"], marks=needs_ipv6),
        pytest.param(["127.0.0.1", "::1"], marks=needs_ipv6),
    ],
    ids="+".join,
)
def test_every_host_is_served_on_the_same_port(
    start_process: StartProcess, dispatch: str, hosts: list[str]
) -> None:
    arguments = [word for host in hosts for word in ("--host", host)]
    process = start_process(*arguments, "--dispatch", dispatch)
    for host in hosts:
        shown = f"[{host}]" if ":" in host else host
        assert f"tcp {shown}:{process.port}" in process.stderr
        with socket.create_connection((host, process.port), DEADLINE_S) as client:
            assert echo(client, host.encode()) == host.encode()


def test_localhost_is_resolved(start_process: StartProcess, dispatch: str) -> None:
    process = start_process("--host", "localhost", "--dispatch", dispatch)
    with socket.create_connection(("localhost", process.port), DEADLINE_S) as client:
        assert echo(client, b"hello") == b"hello"


@pytest.mark.parametrize("host", ["0.0.0.0", pytest.param("::", marks=needs_ipv6)])
def test_an_address_for_everybody_is_said_to_be_reachable_from_other_hosts(
    start_process: StartProcess, host: str
) -> None:
    assert "reachable from other hosts" in start_process("--host", host).stderr


def backlogs(port: int) -> set[int]:
    """The backlog of every listener on this port, as the kernel has it."""
    if shutil.which("ss") is None:
        pytest.skip("ss is not installed")
    environment = {name: text for name, text in os.environ.items() if name != "LD_PRELOAD"}
    listed = subprocess.check_output(
        ["ss", "-Hltn", f"sport = :{port}"], env=environment, text=True, timeout=DEADLINE_S
    )
    return {int(line.split()[2]) for line in listed.splitlines()}


def test_the_backlog_is_given_to_every_listener(start_process: StartProcess, dispatch: str) -> None:
    process = start_process("--backlog", "77", "--dispatch", dispatch, "--threads", "2")
    assert backlogs(process.port) == {77}


def test_a_backlog_above_somaxconn_is_warned_about_and_shown_as_truncated(
    start_process: StartProcess, dispatch: str
) -> None:
    process = start_process("--backlog", str(somaxconn() + 1), "--dispatch", dispatch)
    warning, start_line = process.stderr.splitlines()
    assert "warning" in warning
    assert f"net.core.somaxconn = {somaxconn()}" in warning
    assert f"backlog {somaxconn()}" in start_line
    assert backlogs(process.port) == {somaxconn()}


def allowed_cpus(status: Path) -> str:
    found = re.search(r"^Cpus_allowed_list:\s*(\S+)$", status.read_text(), re.MULTILINE)
    assert found
    return found[1]


def cpus_of_other_threads(pid: int) -> list[str]:
    """The CPUs that each thread may run on, without the main thread."""
    threads = Path(f"/proc/{pid}/task")
    return sorted(
        allowed_cpus(thread / "status") for thread in threads.iterdir() if thread.name != str(pid)
    )


def pinned_threads(pid: int) -> list[str]:
    """The CPU of each thread that has one of its own."""
    return [cpus for cpus in cpus_of_other_threads(pid) if cpus.isdigit()]


def test_bench_1_pins_a_worker_to_each_cpu(start_process: StartProcess) -> None:
    cpus = sorted(map(str, os.sched_getaffinity(0)))
    process = start_process("--bench", "1", "--threads", str(len(cpus)))
    assert "dispatch percpu" in process.stderr
    wait_for(lambda: pinned_threads(process.pid) == cpus, "one worker a CPU")
    assert allowed_cpus(Path(f"/proc/{process.pid}/status")) == allowed_cpus(
        Path("/proc/self/status")
    )


def test_the_shared_dispatch_pins_nobody(start_process: StartProcess) -> None:
    process = start_process("--bench", "0", "--threads", "2")
    assert "dispatch shared" in process.stderr
    mine = allowed_cpus(Path("/proc/self/status"))
    assert set(cpus_of_other_threads(process.pid)) == {mine}


def test_more_workers_than_cpus_are_spread_and_warned_about(start_process: StartProcess) -> None:
    cpus = sorted(map(str, os.sched_getaffinity(0)))
    process = start_process("--bench", "1", "--threads", str(len(cpus) + 1))
    assert "more threads than CPUs" in process.stderr
    expected = sorted([*cpus, str(min(os.sched_getaffinity(0)))])
    wait_for(lambda: pinned_threads(process.pid) == expected, "every CPU has one, the first two")


def test_threads_are_as_many_as_the_cpus_that_may_be_used(dispatch: str) -> None:
    one_cpu = after("os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})")
    with ServerProcess(["--dispatch", dispatch], before=one_cpu) as process:
        process.wait_until_listening()
        assert "1 thread)" in process.stderr


def test_the_descriptor_limit_is_raised_to_the_hard_one(dispatch: str) -> None:
    limit = after("resource.setrlimit(resource.RLIMIT_NOFILE, (100, 200))")
    with ServerProcess(["--threads=1", "--dispatch", dispatch], before=limit) as process:
        process.wait_until_listening()
        limits = Path(f"/proc/{process.pid}/limits").read_text()
        assert re.search(r"^Max open files +200 +200 ", limits, re.MULTILINE)


# ---- what it says later -------------------------------------------------------------------------


def test_log_level_warning_says_nothing(tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    with ServerProcess(["--uds", path, "--log-level", "warning"]) as process:
        wait_until_served(path)
        assert process.stop() == 0
        assert process.stderr == ""


def wait_until_served(path: str) -> None:
    """For a server that cannot say when it listens."""

    def is_served() -> bool:
        try:
            with connect(path) as client:
                return echo(client, b"hello") == b"hello"
        except (FileNotFoundError, ConnectionRefusedError):
            return False

    wait_for(is_served, f"{path} is served")


def test_log_level_debug_says_the_descriptor_limit(start_process: StartProcess) -> None:
    assert "descriptors" in start_process("--log-level", "debug").stderr


def test_variables_of_a_kubernetes_service_of_this_name_do_not_keep_it_from_serving() -> None:
    service = {
        "KECHO_SERVICE_HOST": "10.0.0.7",
        "KECHO_SERVICE_PORT": "12345",
        "KECHO_PORT": "tcp://10.0.0.7:12345",
        "KECHO_PORT_12345_TCP": "tcp://10.0.0.7:12345",
        "KECHO_PORT_12345_TCP_ADDR": "10.0.0.7",
    }
    with ServerProcess(["--log-level", "debug"], service) as process:
        process.wait_until_listening()
        assert "debug: KECHO_PORT: 'tcp://10.0.0.7:12345' is a URL" in process.stderr
        with connect(process.port) as client:
            assert echo(client, b"hello") == b"hello"
        assert process.stop() == 0
    shown = run_command("--print-config", **service)
    assert re.search(r"^port +12345 +default$", shown.stdout, re.MULTILINE)


def test_stats_interval_prints_a_line_again_and_again(start_process: StartProcess) -> None:
    process = start_process("--stats-interval", "0.02")
    process.wait_until_said(r"(?:.* echoes/s .*\n){3}")


def test_sigusr1_prints_the_counters(start_process: StartProcess, dispatch: str) -> None:
    process = start_process("--dispatch", dispatch)
    with connect(process.port) as client:
        for sent in (1, 2):
            assert echo(client, b"five!") == b"five!"

            def is_counted(sent: int = sent) -> bool:
                # The client has its echo a moment before the server has counted it.
                seen = len(process.stderr)
                process.send(signal.SIGUSR1)
                line = process.wait_until_said(rf"(?s).{{{seen}}}.*echoes/s")[0][seen:]
                assert "1 active" in line
                return f"{5 * sent} bytes in, {5 * sent} bytes out" in line

            wait_for(is_counted, f"{sent} echoes are counted")


def test_json_lines_all_parse_and_carry_their_fields(
    start_process: StartProcess, dispatch: str
) -> None:
    process = start_process(
        "--log-format=json", "--log-level=debug", "--dispatch", dispatch, "--threads=2",
        "--stats-interval=0.02", f"--backlog={somaxconn() + 1}",
    )  # fmt: skip
    process.wait_until_said('"event": "stats"')
    listening = next(
        line for line in map(json.loads, process.stderr.splitlines()) if "addresses" in line
    )
    with connect(listening["addresses"][0][1]) as client:
        assert echo(client, b"hello") == b"hello"
    assert process.stop() == 0

    lines = [json.loads(line) for line in process.stderr.splitlines()]
    for line in lines:
        assert {"time", "level", "message"} <= line.keys()
    assert {line["level"] for line in lines} == {"debug", "info", "warning"}
    assert {"listening", "stats", "draining", "stopped"} <= {line.get("event") for line in lines}
    assert listening["pid"] == process.pid
    assert listening["dispatch"] == dispatch
    assert listening["threads"] == 2
    assert listening["backlog"] == somaxconn()
    assert listening["exposed"] is False
    stopped = lines[-1]["stats"]
    assert (stopped["accepted"], stopped["bytes_sent"], stopped["active"]) == (1, 5, 0)
    assert len(stopped["workers"]) == 2


def test_a_refusal_is_a_json_line_too() -> None:
    finished = run_command("--host=192.0.2.1", "--log-format=json")
    assert finished.returncode == 1
    (line,) = map(json.loads, finished.stderr.splitlines())
    assert line["level"] == "error"
    assert "--host" in line["message"]


@pytest.mark.parametrize("closed", ["os.close(2)", "os.close(0); os.close(1); os.close(2)"])
def test_closed_standard_streams_do_not_end_the_server(tmp_path: Path, closed: str) -> None:
    path = str(tmp_path / "socket")
    with ServerProcess(["--uds", path, "--stats-interval=0.01"], before=after(closed)) as process:
        wait_until_served(path)
        process.send(signal.SIGUSR1)
        wait_until_served(path)
        # What is written there by mistake must not reach a client.
        for fd in (1, 2):
            assert "socket:" not in os.readlink(f"/proc/{process.pid}/fd/{fd}")
        assert process.stop() == 0


@pytest.mark.parametrize("unbuffered", ["", "1"], ids=["buffered", "unbuffered"])
def test_a_reader_of_stderr_that_went_away_does_not_end_the_server(
    start_process: StartProcess, unbuffered: str
) -> None:
    process = start_process("--stats-interval=0.01", PYTHONUNBUFFERED=unbuffered)
    assert process.process.stderr is not None
    process.process.stderr.close()
    with connect(process.port) as client:
        for number in range(20):
            process.send(signal.SIGUSR1)
            assert echo(client, b"%d" % number) == b"%d" % number
    assert process.stop() == 0


# ---- help, version, configuration ---------------------------------------------------------------


def test_help_names_every_flag_and_the_variables() -> None:
    finished = run_command("--help")
    assert (finished.returncode, finished.stderr) == (0, "")
    for name, spec in OPTIONS.items():
        assert re.search(rf"{flag(name)}[ ,\n]", finished.stdout)
        assert spec.help.split()[0] in finished.stdout
    assert "an environment variable, such as KECHO_" in " ".join(finished.stdout.split())


def test_version_is_the_packages() -> None:
    finished = run_command("--version")
    assert (finished.returncode, finished.stdout) == (0, f"kecho {kecho.__version__}\n")


@pytest.mark.parametrize("unbuffered", ["", "1"], ids=["buffered", "unbuffered"])
@pytest.mark.parametrize("argument", ["--help", "--version", "--print-config"])
def test_a_reader_of_stdout_that_went_away_gives_no_traceback(
    argument: str, unbuffered: str
) -> None:
    read_fd, write_fd = os.pipe()
    os.close(read_fd)
    with open(write_fd, "wb") as broken:
        finished = subprocess.run(
            [sys.executable, "-m", "kecho", argument],
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
            stdout=broken,
            stderr=subprocess.PIPE,
            timeout=DEADLINE_S,
        )
    assert finished.stderr == b""
    assert finished.returncode in (0, 1)


@pytest.mark.parametrize("argument", ["--help", "--version", "--print-config"])
def test_a_closed_stdout_gives_no_traceback(argument: str) -> None:
    process = ServerProcess([argument], before=after("os.close(1)"))
    with process:
        assert process.wait() == 0
        assert "Traceback" not in process.stderr


def test_print_config_shows_every_value_and_where_it_comes_from() -> None:
    finished = run_command("--print-config", "--port=1", "--reuse-port", KECHO_BACKLOG="0")
    assert (finished.returncode, finished.stderr) == (0, "")
    rows = {line.split()[0]: line.split()[1:] for line in finished.stdout.splitlines()}
    assert rows.keys() == {described.name.replace("_", "-") for described in fields(CommandConfig)}
    assert rows["port"] == ["1", "--port"]
    assert rows["backlog"] == ["0", "KECHO_BACKLOG"]
    assert rows["reuse-port"] == ["on", "--reuse-port"]
    assert rows["max-connections"] == ["-", "default"]
    assert rows["dispatch"] == ["shared", "default"]
