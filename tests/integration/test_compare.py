"""The peers echo, and `make compare` measures them in turn."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.compare.contestants import PEERS, ROOT, Contestant, available
from benchmarks.compare.measure import Measured, Placement, Run, measure
from benchmarks.compare.serving import Serving, StartError, cpu_ns, kernel_threads_ns, serving
from benchmarks.compare.table import to_dict
from benchmarks.compare.workloads import Goal, Scenario
from kecho.bench import Result
from support.clients import (
    DEADLINE_S,
    connect,
    echo,
    receive_exactly,
    receive_until_end,
    reset,
    wait_for,
)

# The peers are not ours to look into, and a sanitizer's preload would be in them.
pytestmark = [pytest.mark.e2e, pytest.mark.slow_under_sanitizers]

needs_two_cpus = pytest.mark.skipif(
    len(os.sched_getaffinity(0)) < 2, reason="client and server need a CPU each"
)
IN_PYTHON_AND_C = ("epoll_echo", "user_echo_server", "asyncio")
IF_IT_CAN_BE_BUILT = ("uring_echo",)


@pytest.fixture(params=[*IN_PYTHON_AND_C, *IF_IT_CAN_BE_BUILT])
def peer(request: pytest.FixtureRequest) -> Iterator[Serving]:
    yield from _started(request.param)


@pytest.fixture
def epoll_echo() -> Iterator[Serving]:
    yield from _started("epoll_echo")


def _started(name: str) -> Iterator[Serving]:
    with serving(contestant(name).command_line(128, 1), os.sched_getaffinity(0)) as running:
        yield running


def contestant(name: str) -> Contestant:
    found, absent = available([name])
    if absent and name in IF_IT_CAN_BE_BUILT:
        pytest.skip(f"{name}: {absent[name]}")
    assert not absent
    return found[0]


def test_a_peer_echoes_messages_on_many_connections(peer: Serving) -> None:
    clients = [connect(peer.port) for _ in range(20)]
    try:
        for number in range(60):
            message = bytes([number]) + os.urandom(63)
            assert echo(clients[number % 20], message) == message
    finally:
        for client in clients:
            client.close()


def test_a_peer_lives_on_after_a_reset_and_closes_when_the_client_does(peer: Serving) -> None:
    gone = connect(peer.port)
    assert echo(gone, b"hello") == b"hello"
    gone.sendall(b"more")
    reset(gone)
    with connect(peer.port) as client:
        assert echo(client, b"\0" * 64) == b"\0" * 64
        client.shutdown(socket.SHUT_WR)
        assert receive_until_end(client) == b""


@pytest.mark.parametrize("name", ["epoll_echo", "asyncio", "uring_echo"])
def test_a_peer_keeps_what_a_slow_reader_has_not_taken(name: str) -> None:
    data = os.urandom(1 << 20)
    with (
        serving(contestant(name).command_line(128, 1), os.sched_getaffinity(0)) as running,
        connect(running.port, receive_buffer=4096, send_buffer=4096) as slow,
        connect(running.port) as other,
    ):
        slow.setblocking(False)
        sent = received = 0
        back = bytearray()
        deadline = time.monotonic() + DEADLINE_S
        stuck_at = None
        while sent < len(data) and stuck_at != sent:  # until nothing goes any more
            stuck_at = sent
            end = time.monotonic() + 0.05
            while time.monotonic() < end and sent < len(data):
                try:
                    sent += slow.send(data[sent : sent + 65536])
                except BlockingIOError:
                    time.sleep(0.005)
            assert time.monotonic() < deadline
        assert echo(other, b"x" * 64) == b"x" * 64  # others are served meanwhile
        while received < len(data):
            assert time.monotonic() < deadline
            try:
                if sent < len(data):
                    sent += slow.send(data[sent : sent + 1000])
            except BlockingIOError:
                pass
            try:
                back += slow.recv(2000)
            except BlockingIOError:
                time.sleep(0.001)
            received = len(back)
        assert back == data


def test_the_minimal_server_echoes_what_came_before_an_end(epoll_echo: Serving) -> None:
    with connect(epoll_echo.port) as client:
        client.sendall(b"y" * 100_000)
        client.shutdown(socket.SHUT_WR)
        assert receive_exactly(client, 100_001) == b"y" * 100_000


# ---- servers and their CPU time -----------------------------------------------------------------


def test_a_server_is_on_its_cpu_and_ends_with_the_context() -> None:
    (one,), _ = available(["epoll_echo"])
    cpu = max(os.sched_getaffinity(0))
    with serving(one.command_line(128, 1), {cpu}) as running:
        assert os.sched_getaffinity(running.pid) == {cpu}
        before = cpu_ns(running.pid)
        with connect(running.port) as client:
            echo(client, b"x" * 1000)
        wait_for(lambda: cpu_ns(running.pid) > before, "CPU time")
    assert running.has_ended


def test_a_server_that_does_not_start_is_told_in_its_own_words() -> None:
    command = [sys.executable, "-m", "kecho", "--port", "0", "--threads", "none"]
    with (
        pytest.raises(StartError, match=r"^[^\n]*--threads[^\n]*none"),
        serving(command, os.sched_getaffinity(0)),
    ):
        pass
    with pytest.raises(StartError, match="it said nothing"), serving(["/bin/true"], {0}):
        pass


def test_a_server_does_not_outlive_who_started_it() -> None:
    script = (
        "import os, signal\n"
        "from benchmarks.compare.contestants import PEERS\n"
        "from benchmarks.compare.serving import serving\n"
        "command = PEERS['epoll_echo'].command_line(128, 1)\n"
        "with serving(command, os.sched_getaffinity(0)) as running:\n"
        "    print(running.port, flush=True)\n"
        "    signal.pause()\n"
    )
    assert available(["epoll_echo"])[0]
    with subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        port = int(process.stdout.readline())
        connect(port).close()
        process.kill()

    def is_refused() -> bool:
        try:
            connect(port).close()
        except ConnectionRefusedError:
            return True
        except ConnectionResetError:
            pass  # its end was between the handshake and the return of connect(2)
        return False

    wait_for(is_refused, "the server's end")


def test_the_time_of_kernel_threads_is_seen_where_they_are() -> None:
    if not Path("/proc/2/stat").read_text().startswith("2 (kthreadd)"):
        pytest.skip("kernel threads are in another PID namespace")
    assert kernel_threads_ns() > 0


# ---- measuring ----------------------------------------------------------------------------------

SMALL = Scenario(
    "small",
    "small",
    ("kecho", "epoll_echo", "kecho sockmap"),
    "epoll_echo",
    ("rate", "cpu", "p50", "p99"),
    {"mode": "closed", "connections": 4},
)


def measure_small(of: Scenario = SMALL, **changes: object) -> Measured:
    options = {"rounds": 2, "seconds": 0.2, "seed": 1, **changes}
    placement = Placement.of(sorted(os.sched_getaffinity(0)))
    return measure(of, placement, **options)  # type: ignore[arg-type]


@needs_two_cpus
def test_contestants_are_measured_in_turn_and_each_in_every_round() -> None:
    found = measure_small()
    present = [name for name in SMALL.contestants if name not in found.absent]
    assert {"kecho", "epoll_echo"} <= set(present)
    rounds = [[run.contestant for run in found.runs if run.round == number] for number in (0, 1)]
    assert [sorted(one) for one in rounds] == [sorted(present)] * 2
    assert [run.turn for run in found.runs] == [*range(len(present))] * 2
    for run in found.runs:
        assert run.failure is None
        assert run.result is not None
        assert run.result.echoes > 0
        assert not run.result.errors
        assert run.server_ns > 0
        # Of the measured time, or a little more or less.
        assert 0 < run.echoes <= 2 * run.result.echoes
    assert json.loads(json.dumps(to_dict([found], {})))["workloads"][0]["runs"]


@needs_two_cpus
def test_who_has_too_few_valid_runs_is_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    scenario = replace(SMALL, goals=(Goal("kecho", "epoll_echo", "rate", 1.0),))
    judged = {("kecho", 0): ["spoilt"], ("epoll_echo", 2): ["spoilt"]}
    monkeypatch.setattr(
        Run, "invalid_because", lambda self, _: judged.get((self.contestant, self.round), [])
    )
    found = measure_small(of=scenario, rounds=2, more_rounds=5)
    turns = {name: [run.round for run in found.of(name)] for name in scenario.contestants}
    # One of two, two of three, three of four are not enough.
    assert turns["kecho"] == turns["epoll_echo"] == [0, 1, 2, 3, 4]
    assert turns["kecho sockmap"] in ([0, 1], [])
    assert len(measure_small(of=scenario, rounds=2, more_rounds=1).of("kecho")) == 3
    judged[("kecho", 1)] = ["spoilt"]  # nothing but that: not by chance
    assert len(measure_small(of=scenario, rounds=2, more_rounds=5).of("kecho")) == 2


@needs_two_cpus
def test_a_server_that_dies_is_a_failed_run_and_the_others_go_on() -> None:
    heard: list[str] = []
    victims: list[int] = []

    def kill_the_peer(text: str) -> None:
        heard.append(text)
        if text == "small: round 2, epoll_echo":
            victims.extend(children_called("build/peers/epoll_echo"))
            for pid in victims:
                os.kill(pid, signal.SIGKILL)
                wait_for(lambda pid=pid: state_of(pid) in "ZX", "its end")

    found = measure_small(say=kill_the_peer)
    assert len(victims) == 1
    assert [run.failure for run in found.of("epoll_echo")] == [None, "the server has ended"]
    assert [run.failure for run in found.of("kecho")] == [None, None]


def children_called(text: str) -> list[int]:
    found = []
    for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
        if text.encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
            found.append(int(pid))
    return found


def state_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


# ---- the command --------------------------------------------------------------------------------


def compare(*arguments: str, results: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "benchmarks.compare", "--results", str(results), *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@needs_two_cpus
def test_the_command_writes_its_results(tmp_path: Path) -> None:
    arguments = ("--only", "two", "--rounds", "1", "--seconds", "0.2", "--peers", "none")
    with compare(*arguments, results=tmp_path / "new") as process:
        out, err = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0, err
    data = json.loads((tmp_path / "new" / "compare.json").read_text())
    assert not data["partial"]
    for run in data["workloads"][0]["runs"]:
        assert Result.from_dict(run["result"]).echoes > 0
    assert (tmp_path / "new" / "compare.md").read_text() == out
    assert "p50 of kecho percpu / kecho shared" in err


@needs_two_cpus
def test_an_interrupted_command_writes_what_it_has(tmp_path: Path) -> None:
    readme = (ROOT / "benchmarks" / "README.md").read_text()
    arguments = ("--only", "two", "--rounds", "99", "--seconds", "0.5", "--write-readme")
    with compare(*arguments, results=tmp_path) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("two: round 1"):
                break
        time.sleep(0.2)  # somewhere within a run
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 130, err
    assert "benchmarks/README.md is left as it was" in err
    data = json.loads((tmp_path / "compare.json").read_text())
    assert data["partial"]
    assert len(data["workloads"][0]["runs"]) <= 4
    assert (ROOT / "benchmarks" / "README.md").read_text() == readme


@pytest.mark.parametrize(
    "arguments",
    [
        ["--only", "nothing"],
        ["--rounds", "0"],
        ["--more-rounds", "-1"],
        ["--seconds", "nan"],
        ["--peers", "epoll_echo,nobody"],
    ],
)
def test_wrong_usage_is_named_before_anything_is_measured(
    arguments: list[str], tmp_path: Path
) -> None:
    with compare(*arguments, results=tmp_path / "new") as process:
        _, err = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 2
    assert arguments[1].rpartition(",")[2] in err
    assert not (tmp_path / "new").exists()


def test_every_peer_is_known_by_its_name() -> None:
    assert {name: one.name for name, one in PEERS.items()} == {name: name for name in PEERS}
