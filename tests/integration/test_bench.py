"""The benchmark client against a server that is what it should be."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import kecho
from clients import wait_for
from kecho import OptionError, bench
from kecho.bench import Result, Workload
from processes import ServerProcess, run_python


@pytest.fixture
def measure(start_server: Callable[..., kecho.Server]) -> Callable[..., Result]:
    server = start_server()

    def run(**options: object) -> Result:
        defaults = {"port": server.port, "threads": 2, "duration": 0.3, "connections": 10}
        return bench.run(Workload(**{**defaults, **options}))

    return run


@pytest.mark.parametrize("spin", [False, True])
@pytest.mark.parametrize("processes", [1, 2])
def test_a_closed_loop_counts_what_it_measures(
    measure: Callable[..., Result], spin: bool, processes: int
) -> None:
    result = measure(mode="closed", spin=spin, processes=processes)
    assert not result.errors
    assert not result.partial
    assert result.connections == 10
    assert result.echoes == result.latency["service"].count > 0
    assert result.latency["connect"].count == 10
    assert result.duration_s == pytest.approx(0.3, abs=0.25)
    assert result.rate_per_s == pytest.approx(result.echoes / result.duration_s)


def test_a_closed_loop_has_as_many_messages_outstanding_as_it_may(
    measure: Callable[..., Result],
) -> None:
    result = measure(mode="closed", depth=16, length=1000)
    outstanding = result.rate_per_s * result.latency["service"].mean / 1e9
    assert outstanding == pytest.approx(160, rel=0.2)


@pytest.mark.parametrize("processes", [1, 2])
def test_an_open_loop_sends_every_message_that_is_due(
    measure: Callable[..., Result], processes: int
) -> None:
    result = measure(mode="open", rate=2000.0, processes=processes, duration=0.5)
    assert result.echoes == 1000
    for name in ("response", "service", "lateness"):
        assert result.latency[name].count == 1000
    assert result.latency["response"].mean >= result.latency["service"].mean
    assert not result.errors


def test_warm_up_stays_out_of_the_figures(measure: Callable[..., Result]) -> None:
    result = measure(mode="open", rate=1000.0, duration=0.3, warmup=0.5)
    assert result.echoes == 300
    assert result.duration_s < 0.45


def test_a_stream_comes_back_byte_for_byte(measure: Callable[..., Result]) -> None:
    result = measure(mode="stream", connections=3, length=100_001)
    assert not result.errors
    assert result.bytes_received > 1_000_000
    assert result.echoes > 0


def test_connections_come_and_go(measure: Callable[..., Result]) -> None:
    result = measure(mode="connect", close="rst")  # thousands, none of them left in TIME_WAIT
    assert not result.errors
    assert result.connections == result.echoes == result.latency["connect"].count
    assert result.latency["response"].count == result.echoes


@pytest.mark.parametrize("close", ["fin", "rst"])
def test_a_burst_has_a_time_for_each_connection_of_each_round(
    measure: Callable[..., Result], close: str
) -> None:
    result = measure(mode="burst", connections=50, rounds=3, close=close)
    assert not result.errors
    assert result.echoes == 150
    assert len(result.rounds) == 3
    for one in result.rounds:
        assert len(one.response_ns) == 50
        for connect, echo, response in zip(
            one.connect_ns, one.first_echo_ns, one.response_ns, strict=True
        ):
            assert 0 < connect <= response
            assert 0 < echo <= response


def test_a_burst_may_give_each_connection_a_thread(measure: Callable[..., Result]) -> None:
    result = measure(mode="burst", connections=50, rounds=2, threads=50)
    assert result.echoes == 100
    assert not result.errors


def test_idle_connections_are_held_and_asked(measure: Callable[..., Result]) -> None:
    result = measure(mode="idle", connections=300)
    assert result.connections == result.echoes == 300
    assert result.observed["lost"] == 0


def test_connections_come_from_the_sources_in_turn(
    start_server: Callable[..., kecho.Server],
) -> None:
    server = start_server()
    result = bench.run(
        Workload(
            port=server.port,
            mode="burst",
            connections=40,
            rounds=2,
            source=("127.0.1.0/29", "127.0.2.1"),
        )
    )
    assert result.echoes == 80
    assert not result.errors


@pytest.mark.e2e
@pytest.mark.parametrize("host", ["0.0.0.0", "::ffff:127.0.0.1", "127.0.0.5"])
def test_a_server_here_is_found_by_whatever_address(
    start_process: Callable[..., ServerProcess], host: str
) -> None:
    server = start_process("--host", "0.0.0.0", "--port", "0")
    result = bench.run(Workload(host=host, port=server.port, connections=5, rounds=1))
    assert result.observed["server_cpu_s"] is not None
    assert result.observed["others_cpu_share"] is not None


@pytest.mark.e2e
def test_the_server_behind_a_unix_socket_is_found(
    start_process: Callable[..., ServerProcess], tmp_path: Path
) -> None:
    path = str(tmp_path / "socket")
    start_process("--uds", path)
    result = bench.run(Workload(uds=path, connections=5, rounds=1))
    assert result.observed["server_cpu_s"] is not None
    assert not any("not known" in note for note in result.verdict.notes)


def test_a_server_in_the_same_process_is_not_told_from_the_client(
    measure: Callable[..., Result],
) -> None:
    result = measure(connections=5, rounds=1, mode="burst")
    assert result.observed["server_cpu_s"] is None
    assert any("in the client's own process" in note for note in result.verdict.notes)


def test_a_server_process_that_is_none_is_refused() -> None:
    with pytest.raises(OptionError, match="there is no process 4194304"):
        bench.run(Workload(port=9), server_pid=4_194_304)


def test_client_threads_stay_on_their_cpus_and_leave_the_process_where_it_was(
    measure: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    pinned: list[tuple[int, set[int]]] = []
    pin = os.sched_setaffinity

    def note(thread: int, cpus: set[int]) -> None:
        pin(thread, cpus)
        pinned.append((threading.get_native_id(), os.sched_getaffinity(0)))

    monkeypatch.setattr(os, "sched_setaffinity", note)
    before = os.sched_getaffinity(0)
    first, last = min(before), max(before)
    result = measure(mode="closed", cpus=(first, last), threads=3)
    assert not result.errors
    # Opening and running, a thread each.
    assert [cpus for _, cpus in pinned].count({first}) == (4 if first != last else 6)
    assert threading.get_native_id() not in dict(pinned)
    assert os.sched_getaffinity(0) == before


def test_client_processes_pin_their_threads(measure: Callable[..., Result]) -> None:
    cpu = max(os.sched_getaffinity(0))
    assert not measure(mode="closed", cpus=(cpu,), processes=2).errors


def test_a_cpu_that_may_not_be_used_is_refused_before_the_run(
    measure: Callable[..., Result],
) -> None:
    with pytest.raises(OptionError, match="may not use CPU 8191"):
        measure(cpus=(0, 8191))


@pytest.mark.parametrize("mode", ["burst", "closed", "open", "stream", "connect", "idle"])
def test_unix_sockets_are_measured_as_well(
    start_server: Callable[..., kecho.Server], tmp_path: Path, mode: str
) -> None:
    path = str(tmp_path / "socket")
    start_server(uds=path, backlog=16)
    more = {"open": {"rate": 1000.0}, "burst": {"rounds": 2}}.get(mode, {})
    result = bench.run(Workload(uds=path, mode=mode, connections=100, duration=0.3, **more))
    assert not result.errors
    assert result.echoes > 0


def test_more_connections_than_descriptors_are_refused_before_the_run(
    start_server: Callable[..., kecho.Server],
) -> None:
    server = start_server()
    with pytest.raises(OptionError, match=r"RLIMIT_NOFILE is \d+, this run needs \d+"):
        bench.run(Workload(port=server.port, connections=4_000_000, source=("127.0.0.0/8",)))


def test_a_server_that_stops_meanwhile_leaves_a_partial_result(
    start_server: Callable[..., kecho.Server],
) -> None:
    server = start_server()
    seen: list[int] = []

    def stop_server(progress: object) -> None:
        seen.append(1)
        if len(seen) == 3:
            server.stop(graceful_timeout=0)

    result = bench.run(
        Workload(port=server.port, mode="closed", connections=5, duration=20.0),
        on_progress=stop_server,
    )
    assert result.partial
    assert not result.verdict.valid
    assert sum(result.errors.values()) == 5
    assert result.echoes > 0


# ---- the command --------------------------------------------------------------------------------


def bench_command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return run_python("-m", "kecho.bench", *arguments)


@pytest.mark.e2e
def test_the_command_measures_a_server_of_its_own(tmp_path: Path) -> None:
    paths = {name: tmp_path / name for name in ("json", "csv", "hgrm", "hlog", "txt")}
    finished = bench_command(
        "--spawn=--dispatch percpu",
        *("-c", "50", "--rounds", "2", "--threads", "2"),
        *(word for name, path in paths.items() for word in (f"--{name}", str(path))),
    )
    assert finished.returncode == 0, finished.stderr
    assert "50 connections, 64 B, 2 rounds" in finished.stdout
    assert re.search(r"^response .* 100$", finished.stdout, re.M)
    result = Result.from_json(paths["json"].read_text())
    assert result.echoes == 100
    lines = paths["txt"].read_text().splitlines()
    assert [int(line.split()[0]) for line in lines] == list(range(50))
    assert paths["csv"].read_text().startswith("mode,connections")
    assert paths["hgrm"].read_text().splitlines()[-2].startswith("#[Max")
    assert paths["hlog"].read_text().count("Tag=") == len(result.latency)


@pytest.mark.e2e
def test_an_interrupted_run_still_prints_and_saves(tmp_path: Path) -> None:
    saved = tmp_path / "result.json"
    with subprocess.Popen(
        [
            *(sys.executable, "-m", "kecho.bench", "--spawn", "--mode", "closed", "-d", "60"),
            *("-c", "5", "--json", str(saved)),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
            wait_for(lambda: children.read_text().strip(), "the server has been spawned")
            server = int(children.read_text().split()[0])
            sockets = Path(f"/proc/{process.pid}/fd")
            wait_for(lambda: len(list(sockets.iterdir())) > 8, "the connections are open")
            time.sleep(0.3)
            process.send_signal(signal.SIGINT)
            stdout, stderr = process.communicate(timeout=30)
        finally:
            process.kill()
    assert process.returncode == 130, stderr
    assert "(partial)" in stdout
    assert "Traceback" not in stderr
    assert Result.from_json(saved.read_text()).partial
    assert not Path(f"/proc/{server}").exists()


def interrupt_after(
    seconds: float,
    server: kecho.Server,
    *arguments: str,
    times: int = 1,
    between_s: float = 0.005,
    number: signal.Signals = signal.SIGINT,
) -> tuple[int, str, str]:
    """Runs the command, sends a signal so long after its first echoes; status, stdout, stderr."""
    before = server.stats().echoes
    with subprocess.Popen(
        [sys.executable, "-m", "kecho.bench", "--port", str(server.port), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            wait_for(lambda: server.stats().echoes > before + 200, "the run is under way")
            time.sleep(seconds)
            for _ in range(times):
                process.send_signal(number)
                time.sleep(between_s)
            stdout, stderr = process.communicate(timeout=30)
        finally:
            process.kill()
    return process.returncode, stdout, stderr


@pytest.mark.e2e
@pytest.mark.parametrize("between_s", [0.0, 0.01, 0.1])
def test_a_second_interruption_at_once_costs_nothing(
    start_server: Callable[..., kecho.Server], tmp_path: Path, between_s: float
) -> None:
    saved = tmp_path / "result.json"
    status, stdout, stderr = interrupt_after(
        0.5,
        start_server(),
        *("--mode", "closed", "-c", "5", "-d", "30", "--json", str(saved)),
        times=3,
        between_s=between_s,
    )
    assert status == 130
    assert stderr == ""
    assert "(partial)" in stdout
    assert Result.from_json(saved.read_text()).partial


@pytest.mark.e2e
@pytest.mark.parametrize(("number", "expected"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_other_endings_keep_what_was_measured_as_well(
    start_server: Callable[..., kecho.Server],
    tmp_path: Path,
    number: signal.Signals,
    expected: int,
) -> None:
    saved = tmp_path / "result.json"
    status, stdout, stderr = interrupt_after(
        0.5,
        start_server(),
        *("--mode", "closed", "-c", "5", "-d", "30", "--json", str(saved)),
        number=number,
    )
    assert status == expected, stderr
    assert "(partial)" in stdout
    assert Result.from_json(saved.read_text()).partial


@pytest.mark.e2e
@pytest.mark.parametrize(
    "arguments",
    [
        ["--mode", "burst", "-c", "100", "--threads", "100", "--rounds", "5000"],
        ["--mode", "closed", "-c", "5", "-d", "0.02", "--repeat", "2000"],
        ["--mode", "closed", "-c", "6", "-d", "30", "--processes", "2"],
    ],
    ids=["many threads", "many repeats", "two processes"],
)
def test_an_interruption_at_any_moment_keeps_what_was_measured(
    start_server: Callable[..., kecho.Server], arguments: list[str]
) -> None:
    server = start_server()
    for moment in (0.5, 0.61, 0.73):
        status, stdout, stderr = interrupt_after(moment, server, *arguments)
        assert status == 130, stderr
        assert "echoes " in stdout
        assert "Traceback" not in stderr


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--mode", "closed"], "did not look at its sockets for"),
        (["--mode", "open", "-R", "500"], "sends were late"),
    ],
)
def test_a_client_that_stood_still_says_so(
    start_server: Callable[..., kecho.Server], tmp_path: Path, arguments: list[str], said: str
) -> None:
    server, saved = start_server(), tmp_path / "result.json"
    command = [
        *(sys.executable, "-m", "kecho.bench", "--port", str(server.port), *arguments),
        *("-c", "4", "-d", "3", "--json", str(saved)),
    ]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        try:
            wait_for(lambda: server.stats().echoes > 200, "the run is under way")
            process.send_signal(signal.SIGSTOP)
            time.sleep(1)
            process.send_signal(signal.SIGCONT)
            process.wait(60)
        finally:
            process.kill()
    reasons = Result.from_json(saved.read_text()).verdict.reasons
    assert any(said in reason for reason in reasons), reasons


@pytest.mark.e2e
def test_a_file_that_cannot_be_written_costs_no_other_result(
    start_server: Callable[..., kecho.Server], tmp_path: Path
) -> None:
    port, other = str(start_server().port), tmp_path / "ok.csv"
    finished = bench_command(
        *("--port", port, "-c", "5", "--rounds", "1"),
        *("--json", "/dev/full", "--csv", str(other)),
    )
    assert finished.returncode == 1
    assert "--json /dev/full: No space left on device" in finished.stderr
    assert "5 connections" in finished.stdout
    assert other.exists()


@pytest.mark.e2e
def test_a_server_that_ends_between_repeats_costs_no_earlier_one(
    start_server: Callable[..., kecho.Server], tmp_path: Path
) -> None:
    server, saved = start_server(), tmp_path / "result.json"
    with subprocess.Popen(
        [
            *(sys.executable, "-m", "kecho.bench", "--port", str(server.port), "--repeat", "100"),
            *("--mode", "closed", "-c", "2", "-d", "0.3", "--json", str(saved)),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        wait_for(lambda: server.stats().echoes > 1000, "the first repeat is under way")
        time.sleep(1)
        server.stop(graceful_timeout=0)
        stdout, stderr = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "echoes " in stdout
    assert Result.from_json(saved.read_text()).echoes > 1000
    assert "Traceback" not in stderr


@pytest.mark.e2e
@pytest.mark.parametrize("mode", ["burst", "closed"])
def test_a_client_process_that_is_killed_costs_no_results_of_the_others(
    start_server: Callable[..., kecho.Server], tmp_path: Path, mode: str
) -> None:
    server, saved = start_server(), tmp_path / "result.json"
    more = {"burst": ["--rounds", "10000"], "closed": ["-d", "30"]}[mode]
    with subprocess.Popen(
        [
            *(sys.executable, "-m", "kecho.bench", "--port", str(server.port), "--processes", "3"),
            *("--mode", mode, "-c", "9", *more, "--json", str(saved)),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        wait_for(lambda: server.stats().echoes > 1000, "the run is under way")
        time.sleep(1.5)  # there is an interval with its samples in it
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(children[0]), signal.SIGKILL)
        stdout, stderr = process.communicate(timeout=30)
    assert process.returncode == 1, stderr
    assert "(partial)" in stdout
    assert f"client process {children[0]} has ended: SIGKILL" in stdout
    assert "Traceback" not in stderr
    result = Result.from_json(saved.read_text())
    assert result.partial
    assert result.echoes > 500
    assert all(len(one.response_ns) == 9 for one in result.rounds)


@pytest.mark.e2e
def test_when_every_client_process_is_killed_it_is_said(
    start_server: Callable[..., kecho.Server],
) -> None:
    server = start_server()
    with subprocess.Popen(
        [
            *(sys.executable, "-m", "kecho.bench", "--port", str(server.port), "--processes", "2"),
            *("--mode", "closed", "-c", "4", "-d", "30"),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        wait_for(lambda: server.stats().echoes > 1000, "the run is under way")
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        for child in children:
            os.kill(int(child), signal.SIGKILL)
        _, stderr = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "has ended: SIGKILL" in stderr
    assert "Traceback" not in stderr


@pytest.mark.e2e
def test_every_step_of_a_sweep_is_checked_before_the_first() -> None:
    finished = bench_command("--spawn", "--mode", "closed", "-d", "0.1", "--sweep", "1,4000000")
    assert finished.returncode == 1
    assert finished.stdout == ""
    assert "--connections: RLIMIT_NOFILE is" in finished.stderr


@pytest.mark.e2e
def test_json_on_stdout_is_nothing_but_json() -> None:
    finished = bench_command("--spawn", "-c", "5", "--rounds", "1", "--json", "-")
    assert finished.returncode == 0, finished.stderr
    assert json.loads(finished.stdout)["schema"] == "kecho.bench/1"
    assert "5 connections" in finished.stderr


@pytest.mark.e2e
def test_a_sweep_is_several_results_and_a_picture(tmp_path: Path) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        pytest.skip("matplotlib is not installed")
    saved, picture = tmp_path / "sweep.json", tmp_path / "sweep.svg"
    finished = bench_command(
        *("--spawn", "--mode", "closed", "-d", "0.2", "--sweep", "1,4", "--json", str(saved))
    )
    assert finished.returncode == 0, finished.stderr
    assert len(json.loads(saved.read_text())["results"]) == 2
    drawn = bench_command("plot", str(saved), "-o", str(picture))
    assert drawn.returncode == 0, drawn.stderr
    assert "<svg" in picture.read_text()


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--mode", "open"], "--rate: mode open needs a rate"),
        (["-R", "5"], "--rate: is for mode open, not burst"),
        (["--sweep", "1,x"], "--sweep: 'x' is not a whole number"),
        (["--source", "nowhere"], "--source: 'nowhere' is neither an address nor a prefix"),
        (["--mode", "closed", "--txt", "x"], "--txt: is for mode burst"),
        (["--mode", "stream", "--hgrm", "x"], "--hgrm: is not for mode stream"),
        (["--sweep", "1,2", "--txt", "x"], "--txt: is for one result, and --sweep has several"),
        (["--find-rate", "p99<1ms", "--hgrm", "x"], "--hgrm: is for one result, and --find-rate"),
        (["--find-rate", "p99>1ms"], "--find-rate: 'p99>1ms' is no limit of a latency"),
        (["--find-rate", "p99<1ms", "-d", "0.1"], "--find-rate: p99<1ms takes 10,000 messages/s"),
        (["--spawn", "--port", "5"], "--spawn: starts a server of its own"),
        (["--length", "0"], "--length: 0 is not between 1 and"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
        (["plot", "x.json", "-o", "x.bmp"], "does not end in .png or .svg"),
    ],
)
def test_wrong_usage_is_one_line_and_status_2(arguments: list[str], said: str) -> None:
    finished = bench_command(*arguments)
    assert finished.returncode == 2
    assert said in finished.stderr
    assert finished.stderr.count("\n") == 1
    assert finished.stdout == ""


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--host", "no.such.host.invalid"], "unknown host"),
        (["--uds", "/nonexistent/socket"], "nothing listens at unix /nonexistent/socket"),
        (["--spawn=--port 99999"], "the server did not start"),
        (["--spawn=--help"], "the server did not start"),
        (["--spawn", "--source", "192.0.2.1", "-c", "5"], "--source: 192.0.2.1: Cannot assign"),
        (["--spawn", "--json", "/nonexistent/a.json"], "/nonexistent/a.json: No such file"),
        (["--spawn", "--csv", "/"], "--csv: /: Is a directory"),
        (
            ["--spawn", "--source", "::1", "-c", "5"],
            "--source: the source addresses are of another",
        ),
        (["plot", "/nonexistent.json", "-o", "x.png"], "/nonexistent.json: No such file"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_status_1(arguments: list[str], said: str) -> None:
    finished = bench_command(*arguments)
    assert finished.returncode == 1
    assert said in finished.stderr
    assert finished.stderr.count("\n") == 1
    assert finished.stdout == ""
