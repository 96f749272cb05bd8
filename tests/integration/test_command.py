"""`python -m kecho`: what it says, what it refuses, and where its options come from."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import fields
from pathlib import Path

import pytest

import kecho
from clients import DEADLINE_S, connect, echo, wait_for
from kecho.cli import OPTIONS, CommandConfig, main
from kecho.config import environment_variable
from kecho.options import flag
from kecho.tuning import read_sysctl, somaxconn
from processes import ServerProcess, after, run_command

# What the command says; what it does under the sanitizers is in test_process_life.py and others.
pytestmark = [pytest.mark.e2e, pytest.mark.slow_under_sanitizers]

StartProcess = Callable[..., ServerProcess]
StartServer = Callable[..., kecho.Server]

# For each option: a flag's text and its value, a variable's text and its value, a text that
# cannot be read.
SAMPLES: dict[str, tuple[str, object, str, object, str]] = {
    "bench": ("1", "percpu", "0", "shared", "2"),
    "host": ("127.0.0.2", ["127.0.0.2"], "127.0.0.3,::1", ["127.0.0.3", "::1"], ","),
    "port": ("0", 0, "65535", 65535, "65536"),
    "uds": ("flag.sock", "flag.sock", "variable.sock", "variable.sock", "x" * 108),
    "fd": ("9", [9], "7,8", [7, 8], "0,-1"),
    "backlog": ("7", 7, "0", 0, "2147483648"),
    "dispatch": ("percpu", "percpu", "shared", "shared", "Shared"),
    "engine": ("sockmap", "sockmap", "auto", "auto", "bpf"),
    "threads": ("3", 3, "1024", 1024, "1025"),
    "busy_poll": ("auto", "auto", "200", 200, "-1"),
    "reuse_port": ("1", True, "no", False, "maybe"),
    "max_connections": ("5", 5, "1", 1, "0"),
    "idle_timeout": ("2.5", 2.5, "1e3", 1000.0, "0"),
    "write_timeout": ("1.5", 1.5, "30", 30.0, "-1"),
    "max_buffer_memory": ("1M", 1 << 20, "65536", 65536, "1T"),
    "allow": ("127.0.0.0/8", ["127.0.0.0/8"], "127.0.0.1,::1", ["127.0.0.1/32", "::1/128"], "x"),
    "deny": ("10.0.0.0/8", ["10.0.0.0/8"], "::/0", ["::/0"], "10.0.0.1/8"),
    "max_connections_per_ip": ("5", 5, "1", 1, "0"),
    "rate_limit": ("5", 5, "1000000", 1_000_000, "1000001"),
    "graceful_timeout": ("0", 0.0, "9", 9.0, "-0.5"),
    "udp": ("1", True, "off", False, "perhaps"),
    "udp_rate": ("500", 500, "0", 0, "-1"),
    "udp_rate_total": ("500", 500, "0", 0, "x"),
    "udp_min_source_port": ("1", 1, "65535", 65535, "0"),
    "user": ("65534:65533", "65534:65533", "65534:1", "65534:1", "65534:none"),
    "sandbox": ("1", True, "no", False, "maybe"),
    "stats_interval": ("0.25", 0.25, "60", 60.0, "soon"),
    "log_level": ("debug", "debug", "error", "error", "loud"),
    "log_format": ("json", "json", "text", "text", "xml"),
}


def as_flag(name: str, text: str) -> str:
    return flag(name) if OPTIONS[name].metavar is None else f"{flag(name)}={text}"


def assert_refused(finished: subprocess.CompletedProcess[str], status: int, *words: str) -> None:
    """One line, which has these words, on stderr and nothing else."""
    assert finished.returncode == status, finished.stderr
    assert finished.stdout == ""
    assert re.fullmatch(r"kecho: error: .*\n", finished.stderr), finished.stderr
    for word in words:
        assert word in finished.stderr


RunHere = Callable[..., "subprocess.CompletedProcess[str]"]
Rows = dict[str, dict[str, object]]
ConfigOf = Callable[..., Rows]


@pytest.fixture
def run_here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> RunHere:
    """run_command() without a process for each of many cases; --print-config keeps it short."""

    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        for name in list(os.environ):
            if name.startswith("KECHO_"):
                monkeypatch.delenv(name)
        for name, text in environment.items():
            monkeypatch.setenv(name, text)
        try:
            status: object = main(["--print-config", *arguments])
        except SystemExit as ended:
            status = ended.code
        assert isinstance(status, int)
        return subprocess.CompletedProcess(arguments, status, *capsys.readouterr())

    return run


@pytest.fixture
def config_of(run_here: RunHere) -> ConfigOf:
    def read(*arguments: str, **environment: str) -> Rows:
        finished = run_here("--log-format=json", *arguments, **environment)
        assert finished.returncode == 0, finished.stderr
        rows: Rows = json.loads(finished.stdout)
        return rows

    return read


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


def test_the_descriptor_limit_is_raised_to_the_hard_one() -> None:
    limit = after("resource.setrlimit(resource.RLIMIT_NOFILE, (100, 200))")
    with ServerProcess(["--threads=1"], before=limit) as process:
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


def test_help_names_every_flag_and_variable() -> None:
    finished = run_command("--help")
    assert (finished.returncode, finished.stderr) == (0, "")
    for name, spec in OPTIONS.items():
        assert f"{flag(name)} " in finished.stdout
        assert environment_variable(name) in finished.stdout
        assert spec.help.split()[0] in finished.stdout


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


# ---- flag over environment over default ---------------------------------------------------------

# In JSON, which --print-config prints only if --log-format says so.
PRINTED = [name for name in OPTIONS if name != "log_format"]


def test_without_flags_and_variables_every_option_has_its_default(config_of: ConfigOf) -> None:
    rows = config_of()
    for described in fields(CommandConfig):
        if described.name != "log_format":
            default = described.default
            shown = list(default) if isinstance(default, tuple) else default
            assert rows[described.name] == {"value": shown, "source": "default"}


@pytest.mark.parametrize("name", PRINTED)
def test_a_variable_wins_over_the_default(config_of: ConfigOf, name: str) -> None:
    _, _, text, value, _ = SAMPLES[name]
    row = config_of(**{environment_variable(name): text})["dispatch" if name == "bench" else name]
    assert row == {"value": value, "source": environment_variable(name)}


@pytest.mark.parametrize("name", PRINTED)
def test_a_flag_wins_over_the_variable(config_of: ConfigOf, name: str) -> None:
    text, value, other, other_value, _ = SAMPLES[name]
    assert value != other_value
    row = config_of(as_flag(name, text), **{environment_variable(name): other})
    assert row["dispatch" if name == "bench" else name] == {"value": value, "source": flag(name)}


def test_a_process_takes_flags_variables_and_defaults_in_this_order() -> None:
    finished = run_command(
        "--print-config", "--log-format=json", "--port=1", KECHO_PORT="2", KECHO_BACKLOG="3"
    )
    rows = json.loads(finished.stdout)
    assert rows["port"] == {"value": 1, "source": "--port"}
    assert rows["backlog"] == {"value": 3, "source": "KECHO_BACKLOG"}
    assert rows["threads"] == {"value": None, "source": "default"}


def test_a_variable_that_cannot_be_read_ends_the_process() -> None:
    assert_refused(run_command(KECHO_PORT="abc"), 2, "KECHO_PORT")


def test_the_log_format_follows_the_same_order() -> None:
    default = run_command("--print-config").stdout
    assert re.search(r"^log-format +text +default$", default, re.MULTILINE)
    variable = run_command("--print-config", KECHO_LOG_FORMAT="json").stdout
    assert json.loads(variable)["log_format"]["source"] == "KECHO_LOG_FORMAT"
    by_flag = run_command("--print-config", "--log-format=text", KECHO_LOG_FORMAT="json").stdout
    assert re.search(r"^log-format +text +--log-format$", by_flag, re.MULTILINE)


def test_an_empty_variable_counts_as_not_set(config_of: ConfigOf) -> None:
    empty = {environment_variable(name): "" for name in OPTIONS}
    assert {row["source"] for name, row in config_of(**empty).items() if name != "log_format"} == {
        "default"
    }


def test_a_switch_can_be_switched_off_by_flag(config_of: ConfigOf) -> None:
    row = config_of("--no-reuse-port", KECHO_REUSE_PORT="1")["reuse_port"]
    assert row["value"] is False


@pytest.mark.parametrize(
    ("arguments", "environment", "expected"),
    [
        (["--bench=1"], {"KECHO_DISPATCH": "shared"}, ("percpu", "--bench")),
        (["--bench"], {}, ("percpu", "--bench")),
        (["--bench=0"], {"KECHO_DISPATCH": "percpu"}, ("shared", "--bench")),
        (["--dispatch=shared"], {"KECHO_BENCH": "1"}, ("shared", "--dispatch")),
        (["--dispatch=percpu"], {"KECHO_BENCH": "0"}, ("percpu", "--dispatch")),
    ],
)
def test_bench_and_dispatch_are_one_option(
    config_of: ConfigOf,
    arguments: list[str],
    environment: dict[str, str],
    expected: tuple[str, str],
) -> None:
    row = config_of(*arguments, **environment)["dispatch"]
    assert (row["value"], row["source"]) == expected


# ---- wrong usage --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--port", "70000"], "--port"),
        (["--port", "abc"], "--port"),
        (["--port", "-1"], "--port"),
        (["--port", "1_0"], "--port"),
        (["--port", "9" * 5000], "--port"),
        (["--port"], "--port"),
        (["--prot", "1"], "--prot"),
        (["--thread", "1"], "--thread"),
        (["surplus"], "surplus"),
        (["--bench", "2"], "--bench"),
        (["--bench", "1", "--dispatch", "shared"], "--bench"),
        (["--dispatch", "other"], "--dispatch"),
        (["--threads", "0"], "--threads"),
        (["--backlog", "-1"], "--backlog"),
        (["--host", ""], "--host"),
        (["--uds", ""], "--uds"),
        (["--uds", "\udcff" * 108], "--uds"),
        (["--idle-timeout", "nan"], "--idle-timeout"),
        (["--idle-timeout", "inf"], "--idle-timeout"),
        (["--idle-timeout=-1"], "--idle-timeout"),
        (["--graceful-timeout", "-inf"], "--graceful-timeout"),
        (["--graceful-timeout=-0.001"], "--graceful-timeout"),
        (["--stats-interval", "1e400"], "--stats-interval"),
        (["--host", "two\nlines", "--port", "\n"], "--port"),
    ],
    ids=lambda value: (
        " ".join(value)[:30].encode("ascii", "replace").decode().replace("\n", "_")
        if isinstance(value, list)
        else ""
    ),
)
def test_wrong_usage_is_one_line_that_names_the_flag(arguments: list[str], word: str) -> None:
    assert_refused(run_command(*arguments), 2, word)


# A flag for a host takes any text that is not empty: see above.
@pytest.mark.parametrize("name", [name for name in OPTIONS if name != "host"])
def test_a_flag_that_cannot_be_read_is_named(run_here: RunHere, name: str) -> None:
    assert_refused(run_here(f"{flag(name)}={SAMPLES[name][-1]}"), 2, flag(name))


@pytest.mark.parametrize("name", OPTIONS)
def test_a_variable_that_cannot_be_read_is_named(run_here: RunHere, name: str) -> None:
    variable = environment_variable(name)
    assert_refused(run_here(**{variable: SAMPLES[name][-1]}), 2, variable)


def test_variables_that_contradict_each_other_are_refused() -> None:
    finished = run_command(KECHO_BENCH="1", KECHO_DISPATCH="shared")
    assert_refused(finished, 2, "KECHO_BENCH")


def test_wrong_usage_keeps_off_stdout_when_stderr_is_closed() -> None:
    process = ServerProcess(["--port", "abc"], before=after("os.close(2)"))
    with process:
        stdout, _ = process.process.communicate(timeout=DEADLINE_S)
        assert process.process.returncode == 2
        assert stdout == b""


# ---- what the system refuses --------------------------------------------------------------------


@pytest.mark.parametrize("holder", ["shared", "percpu"])
@pytest.mark.parametrize("threads", ["1", "2"])
def test_a_port_that_another_server_holds_is_refused(
    start_server: StartServer, dispatch: str, holder: str, threads: str
) -> None:
    held = start_server(dispatch=holder)
    finished = run_command("--port", str(held.port), "--dispatch", dispatch, "--threads", threads)
    assert_refused(finished, 1, "--port", f"{held.port} is in use")
    with connect(held) as client:
        assert echo(client, b"hello") == b"hello"


@pytest.mark.parametrize("option", ["SO_REUSEADDR", "SO_REUSEPORT"])
def test_a_port_that_a_foreign_socket_holds_is_refused(dispatch: str, option: str) -> None:
    with socket.socket() as foreign:
        foreign.setsockopt(socket.SOL_SOCKET, getattr(socket, option), 1)
        foreign.bind(("127.0.0.1", 0))
        foreign.listen()
        port = foreign.getsockname()[1]
        finished = run_command("--dispatch", dispatch, "--threads=2", KECHO_PORT=str(port))
    assert_refused(finished, 1, "KECHO_PORT", f"{port} is in use")


def test_a_port_held_on_the_second_host_is_refused(
    start_server: StartServer, dispatch: str
) -> None:
    held = start_server(host="127.0.0.2")
    finished = run_command(
        "--host=127.0.0.1", "--host=127.0.0.2", f"--port={held.port}", "--dispatch", dispatch
    )
    assert_refused(finished, 1, "--port", f"127.0.0.2:{held.port}")


def test_reuse_port_lets_two_processes_share_a_port(
    start_process: StartProcess, dispatch: str
) -> None:
    arguments = ("--reuse-port", "--dispatch", dispatch, "--threads", "2")
    first = start_process(*arguments)
    second = start_process(*arguments, "--port", str(first.port))
    assert second.port == first.port
    # Which of the two gets a client is up to a hash; each has had one, sooner or later.
    for _ in range(200):
        with connect(first.port) as client:
            assert echo(client, b"hello") == b"hello"
    counts = []
    for process in (first, second):
        assert process.stop() == 0
        accepted = re.search(r"(\d+) connections? accepted", process.stderr)
        assert accepted, process.stderr
        counts.append(int(accepted[1]))
    assert sum(counts) == 200
    assert min(counts) > 0


def test_a_server_without_reuse_port_is_refused_beside_one_with_it(
    start_process: StartProcess, dispatch: str
) -> None:
    first = start_process("--reuse-port", "--dispatch", dispatch)
    finished = run_command("--port", str(first.port), "--dispatch", dispatch)
    assert_refused(finished, 1, "--port", "in use")


@pytest.mark.parametrize("host", ["no-such-host.invalid", "two..dots", "x" * 64])
def test_an_unknown_host_is_refused(host: str) -> None:
    # One query and no waiting, where a name server is configured that does not answer.
    finished = run_command("--host", host, RES_OPTIONS="timeout:1 attempts:1")
    assert_refused(finished, 1, "--host", host)


def test_an_address_of_another_host_is_refused(dispatch: str) -> None:
    finished = run_command("--host=192.0.2.1", "--port=0", "--dispatch", dispatch)
    assert_refused(finished, 1, "--host", "192.0.2.1")


def test_a_privileged_port_is_refused_without_the_capability(dispatch: str) -> None:
    if (read_sysctl("net.ipv4.ip_unprivileged_port_start") or 0) <= 80:
        pytest.skip("net.ipv4.ip_unprivileged_port_start lets anybody listen on port 80")
    # root exec'ed without CAP_NET_BIND_SERVICE (10) in its bounding set, prctl(2).
    drop = "import ctypes; ctypes.CDLL(None).prctl(24, 10, 0, 0, 0)"
    before = after(drop) if os.geteuid() == 0 else []
    with ServerProcess(["--port", "80", "--dispatch", dispatch], before=before) as process:
        assert process.wait() == 1
    assert re.fullmatch(r"kecho: error: --port: .*permission.*80.*\n", process.stderr)


@pytest.mark.parametrize("descriptors", [20, 150], ids=["listeners", "queues"])
def test_too_few_descriptors_to_start_are_one_line(descriptors: int) -> None:
    limit = after(f"resource.setrlimit(resource.RLIMIT_NOFILE, ({descriptors}, {descriptors}))")
    arguments = ["--dispatch=percpu", "--threads=100", "--log-level=error"]
    with ServerProcess(arguments, before=limit) as process:
        assert process.wait() == 1
    assert re.fullmatch(r"kecho: error: .*Too many open files\n", process.stderr)


@pytest.mark.slow_under_sanitizers  # their shadow memory is more address space than the limit
def test_too_few_threads_to_start_are_one_line(dispatch: str) -> None:
    # Stacks of 1 GiB each in 4 GiB of addresses: RLIMIT_NPROC does not bind root.
    limits = (
        "resource.setrlimit(resource.RLIMIT_STACK, (1 << 30, 1 << 30));"
        "resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))"
    )
    arguments = ["--threads=8", "--log-level=error", "--dispatch", dispatch]
    with ServerProcess(arguments, before=after(limits)) as process:
        assert process.wait() == 1
    assert re.fullmatch(r"kecho: error: .*thread.*\n", process.stderr), process.stderr


def test_a_port_is_free_again_once_its_server_has_ended(
    start_process: StartProcess, dispatch: str
) -> None:
    first = start_process("--dispatch", dispatch)
    with connect(first.port) as client:
        assert echo(client, b"hello") == b"hello"
        assert first.stop() == 0
        with closing(connect(start_process(f"--port={first.port}").port)) as other:
            assert echo(other, b"hello") == b"hello"
