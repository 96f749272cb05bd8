"""`python -m kecho.bench`: what it prints, saves and refuses, and how it ends."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import kecho
from kecho.bench import Result
from support.clients import wait_for
from support.server_process import after, processor_time_s, run_python

# What is compiled runs in these as it does in test_bench.py and in the other tests here.
about_python = pytest.mark.slow_under_sanitizers


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
@about_python
def test_with_stderr_closed_stdout_is_the_file_that_was_asked_for_and_no_table() -> None:
    finished = subprocess.run(
        ["/bin/sh", "-c", 'exec "$@" 2>&-', "sh", *(sys.executable, "-m", "kecho.bench")]
        + ["--spawn", "-c", "3", "--rounds", "1", "--json", "-"],
        stdout=subprocess.PIPE,
        text=True,
        timeout=60,
    )
    assert finished.returncode == 0
    assert Result.from_json(finished.stdout).echoes == 3


@pytest.mark.e2e
@about_python
@pytest.mark.parametrize("crew", ["crew.Crew", "processes.ProcessCrew"])
def test_a_signal_that_comes_when_all_is_measured_loses_nothing(tmp_path: Path, crew: str) -> None:
    saved = tmp_path / "result.json"
    processes = "2" if crew == "processes.ProcessCrew" else "1"
    script = f"""
        import os, signal, sys
        from kecho.bench import cli, crew, processes
        close = {crew}.close
        def close_at_a_signal(self):
            os.kill(os.getpid(), signal.SIGINT)
            close(self)
        {crew}.close = close_at_a_signal
        sys.exit(cli.main(["--spawn", "-c", "4", "--mode", "closed", "-d", "0.2", "--repeat", "2",
            "--processes", "{processes}", "--json", {str(saved)!r}]))
    """
    finished = run_python("-c", textwrap.dedent(script))
    assert finished.returncode == 130, finished.stderr
    assert Result.from_json(saved.read_text()).echoes > 0


def socket_count(pid: int) -> int:
    files = Path(f"/proc/{pid}/fd")
    found = 0
    for name in os.listdir(files):
        with contextlib.suppress(FileNotFoundError):  # closed a moment ago
            found += os.readlink(files / name).startswith("socket:")
    return found


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
            wait_for(lambda: socket_count(process.pid) == 5, "the connections are open")
            before_s = processor_time_s(server)
            wait_for(lambda: processor_time_s(server) > before_s + 0.1, "the run is under way")
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
    to_children: bool = False,
    before_exec: str = "pass",
) -> tuple[int, str, str]:
    """Runs the command, sends a signal so long after its first echoes; status, stdout, stderr.

    to_children: they get it first. before_exec: what the process does before it is the command.
    """
    before = server.stats().echoes
    with subprocess.Popen(
        [
            *(*after(before_exec), sys.executable, "-m", "kecho.bench"),
            *("--port", str(server.port), *arguments),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            wait_for(lambda: server.stats().echoes > before + 200, "the run is under way")
            time.sleep(seconds)
            if to_children:
                children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
                for child in map(int, children.split()):
                    os.kill(child, number)
                time.sleep(0.3)
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
@about_python
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_every_process_costs_nothing(
    start_server: Callable[..., kecho.Server], tmp_path: Path, number: signal.Signals
) -> None:
    """As an init sends it to a cgroup: the client's processes are not ended before the client."""
    saved = tmp_path / "result.json"
    status, stdout, stderr = interrupt_after(
        0.5,
        start_server(),
        *("--mode", "closed", "-c", "6", "-d", "30", "--processes", "2", "--json", str(saved)),
        number=number,
        to_children=True,
    )
    assert status == 128 + number, stderr
    assert "(partial)" in stdout
    assert "has ended" not in stdout
    result = Result.from_json(saved.read_text())
    assert result.connections == 6
    assert not result.errors


@pytest.mark.e2e
@about_python
@pytest.mark.parametrize(
    "left_behind",
    [
        "signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})",
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)",
    ],
    ids=["blocked", "ignored"],
)
def test_a_run_can_be_ended_whatever_its_parent_has_left_behind(
    start_server: Callable[..., kecho.Server], left_behind: str
) -> None:
    status, stdout, stderr = interrupt_after(
        0.2,
        start_server(),
        *("--mode", "closed", "-c", "5", "-d", "25"),
        number=signal.SIGTERM,
        before_exec=left_behind,
    )
    assert status == 143, stderr
    assert "(partial)" in stdout


@pytest.mark.e2e
@about_python
@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
def test_a_signal_that_was_ignored_at_the_start_stays_ignored(
    start_server: Callable[..., kecho.Server], number: signal.Signals
) -> None:
    """SIGHUP under nohup, SIGINT of what a shell runs in its background."""
    status, stdout, stderr = interrupt_after(
        0.1,
        start_server(),
        *("--mode", "closed", "-c", "5", "-d", "1"),
        number=number,
        before_exec=f"signal.signal({int(number)}, signal.SIG_IGN)",
    )
    assert status == 0, stderr
    assert "(partial)" not in stdout


@pytest.mark.e2e
@about_python
@pytest.mark.parametrize("processes", ["1", "2"])
def test_threads_that_cannot_be_started_are_one_line(
    start_server: Callable[..., kecho.Server], processes: str
) -> None:
    """By a limit of address space, which thread stacks take."""
    finished = subprocess.run(
        [
            *after("resource.setrlimit(resource.RLIMIT_AS, (1_200_000_000, 1_200_000_000))"),
            *(sys.executable, "-m", "kecho.bench", "--port", str(start_server().port)),
            *("--mode", "closed", "-c", "400", "--threads", "400", "--processes", processes),
        ],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert finished.returncode == 1
    assert "a thread cannot be started: a limit on processes or memory" in finished.stderr
    assert finished.stderr.count("\n") == 1


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
@about_python
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
@about_python
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
@about_python
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
@about_python
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
@about_python
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
@about_python
def test_every_step_of_a_sweep_is_checked_before_the_first() -> None:
    finished = bench_command("--spawn", "--mode", "closed", "-d", "0.1", "--sweep", "1,4000000")
    assert finished.returncode == 1
    assert finished.stdout == ""
    assert "--connections: RLIMIT_NOFILE is" in finished.stderr


@pytest.mark.e2e
@about_python
def test_json_on_stdout_is_nothing_but_json() -> None:
    finished = bench_command("--spawn", "-c", "5", "--rounds", "1", "--json", "-")
    assert finished.returncode == 0, finished.stderr
    assert json.loads(finished.stdout)["schema"] == "kecho.bench/1"
    assert "5 connections" in finished.stderr


@pytest.mark.e2e
@about_python
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
@about_python
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--mode", "open"], "--rate: mode open needs a rate"),
        (["-R", "5"], "--rate: is for mode open, not burst"),
        (["--sweep", "1,x"], "--sweep: must be a whole number (got 'x')"),
        (["--source", "nowhere"], "--source: must be an address or a prefix (got"),
        (["--mode", "closed", "--txt", "x"], "--txt: is for mode burst"),
        (["--mode", "stream", "--hgrm", "x"], "--hgrm: is not for mode stream"),
        (["--sweep", "1,2", "--txt", "x"], "--txt: is for one result, and --sweep has several"),
        (["--find-rate", "p99<1ms", "--hgrm", "x"], "--hgrm: is for one result, and --find-rate"),
        (["--find-rate", "p99>1ms"], "--find-rate: must be a limit of a latency"),
        (["--find-rate", "p99<1ms", "-d", "0.1"], "--find-rate: p99<1ms needs 10,000 messages/s"),
        (["--spawn", "--port", "5"], "--spawn: cannot be combined with TARGET"),
        (["--percentiles", "50,100"], "--percentiles: must be percentiles such as 95"),
        (["--length", "0"], "--length: must be between 1 and"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
        (["plot", "x.json", "-o", "x.bmp"], "must end in .png or .svg"),
    ],
)
def test_wrong_usage_is_one_line_and_status_2(arguments: list[str], said: str) -> None:
    finished = bench_command(*arguments)
    assert finished.returncode == 2
    assert said in finished.stderr
    assert finished.stderr.count("\n") == 1
    assert finished.stdout == ""


@pytest.mark.e2e
@about_python
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
        (["--spawn", "--csv", "/a\nb/c"], r"--csv: /a\nb/c: No such file"),
        (["plot", "/a\nb", "-o", "x.png"], r"/a\nb: No such file"),
        (
            ["--spawn", "--source", "::1", "-c", "5"],
            "--source: the source addresses are not of the family of",
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
