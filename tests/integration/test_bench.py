"""The benchmark client against a server that is what it should be."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

import kecho
from kecho import OptionError, bench
from kecho.bench import Result, Workload
from kecho.server.confinement.sandbox import IS_SANITIZED
from support.server_process import ServerProcess


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


def test_a_bursts_response_counts_from_the_instant_of_the_burst(
    measure: Callable[..., Result],
) -> None:
    """Not from the connection's own connect, which the client calls for one after the other."""
    result = measure(mode="burst", connections=500, rounds=1, threads=1)
    (one,) = result.rounds
    lateness = result.latency["lateness"]
    waited_ns = lateness.mean * lateness.count
    assert waited_ns > 0
    took_ns = sum(one.connect_ns) + sum(one.first_echo_ns)
    assert sum(one.response_ns) >= took_ns + 0.99 * waited_ns  # a bucket is 1 % wide at most


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
    # 100 connections that take turns: all of a short run may pass before the first has its echo.
    duration_s = 1.0 if IS_SANITIZED else 0.3
    result = bench.run(Workload(uds=path, mode=mode, connections=100, duration=duration_s, **more))
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
