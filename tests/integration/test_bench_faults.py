"""What the benchmark client says of servers that are not what they should be."""

from __future__ import annotations

import signal
import socket
import textwrap
import time

import pytest

from kecho import bench
from kecho.bench import Result, TargetError, Workload
from support import faulty_servers
from support.server_process import run_python

LENGTH = 64
BURSTS: dict[str, dict[str, object]] = {"burst": {"rounds": 2}}


def measure(peer: faulty_servers.Peer, **options: object) -> Result:
    defaults = {"mode": "closed", "connections": 4, "threads": 2, "duration": 0.5, "timeout": 1.0}
    return bench.run(Workload(**{**defaults, "port": peer.port, "length": LENGTH, **options}))


def test_a_delay_of_5_ms_is_measured_as_5_ms() -> None:
    with faulty_servers.delays(0.005) as peer:
        result = measure(peer, connections=5)
    service = result.latency["service"]
    assert service.min >= 5_000_000
    assert service.percentile(50) < 10_000_000
    assert not result.errors
    assert service.count == result.echoes > 100


@pytest.mark.alone
@pytest.mark.slow_under_sanitizers  # counts what comes in time
def test_an_open_loop_shows_the_stall_that_a_closed_loop_hides() -> None:
    stall_s, duration = 1.0, 3.0
    with faulty_servers.stalls(1.0, stall_s) as peer:
        opened = measure(
            peer, mode="open", rate=1000.0, connections=10, duration=duration, timeout=10.0
        )
    with faulty_servers.stalls(1.0, stall_s) as peer:
        closed = measure(peer, connections=10, duration=duration, timeout=10.0)

    def share_of_slow(result: Result, name: str) -> float:
        return result.latency[name].count_above(50_000_000) / result.latency[name].count

    assert opened.latency["response"].percentile(99.9) >= 0.9e9
    assert opened.echoes == duration * 1000
    assert 0.25 < share_of_slow(opened, "response") < 0.6  # about 1 s of 3
    # One message of each connection is slow, whatever the others would have met.
    assert 10 <= closed.latency["service"].count_above(500_000_000) < 50
    assert share_of_slow(closed, "service") < share_of_slow(opened, "response") / 4


def test_an_open_loops_response_counts_from_when_a_message_was_due() -> None:
    """One may be outstanding, and 1000 a second are due: a server that takes 5 ms falls behind."""
    with faulty_servers.delays(0.005) as peer:
        result = measure(peer, mode="open", rate=1000.0, connections=1, depth=1, timeout=10.0)
    assert result.echoes == 500
    assert result.latency["response"].mean > 10 * result.latency["service"].mean
    assert any("the server did not keep up" in reason for reason in result.verdict.reasons)


@pytest.mark.parametrize("mode", ["closed", "stream"])
def test_one_wrong_byte_in_a_million_is_found(mode: str) -> None:
    with faulty_servers.corrupts(1_000_000) as peer:
        result = measure(peer, mode=mode, length=4096, duration=1.0)
    assert result.errors["corrupt"] >= 1
    assert not result.verdict.valid
    assert result.first_error is not None
    assert "came instead of" in result.first_error


def test_a_wrong_byte_is_not_looked_for_without_verification() -> None:
    with faulty_servers.corrupts(10_000) as peer:
        result = measure(peer, verify=False)
    assert not result.errors
    assert any("not compared" in note for note in result.verdict.notes)


def test_a_byte_that_is_missing_is_found_while_more_follows() -> None:
    with faulty_servers.drops_a_byte(LENGTH * 10 + 5) as peer:
        result = measure(peer, depth=2)
    assert result.errors.keys() <= {"corrupt", "short"}
    assert result.errors
    assert result.partial


def test_a_byte_that_is_missing_at_the_end_is_found_by_the_timeout() -> None:
    with faulty_servers.drops_a_byte(LENGTH * 10 + LENGTH - 1) as peer:
        result = measure(peer)
    assert result.errors == {"short": 4}
    assert "after 63 of 64 bytes" in str(result.first_error)


def test_a_byte_that_is_repeated_is_found() -> None:
    with faulty_servers.repeats_a_byte(LENGTH * 10 + 5) as peer:
        result = measure(peer)
    assert result.errors == {"corrupt": 4}


@pytest.mark.parametrize("mode", ["closed", "open", "stream", "connect", "burst", "idle"])
@pytest.mark.parametrize("length", [1, 64, 70_001])
def test_a_server_that_reads_lines_is_measured_by_lines(mode: str, length: int) -> None:
    more = {"open": {"rate": 100.0}, **BURSTS}.get(mode, {})
    with faulty_servers.echoes_lines() as peer:
        result = measure(peer, mode=mode, line=True, length=length, timeout=10.0, **more)
    assert not result.errors
    assert result.echoes > 0


def test_a_wrong_byte_of_a_line_is_found() -> None:
    for at in (0, LENGTH - 1):  # the newline is one of them
        with faulty_servers.corrupts(LENGTH * 10 + at) as peer:
            result = measure(peer, line=True, connections=1)
        assert result.errors == {"corrupt": 1}


def test_replies_in_the_wrong_order_are_found() -> None:
    with faulty_servers.swaps(LENGTH, LENGTH * 4) as peer:
        result = measure(peer, depth=2)
    assert result.errors == {"reordered": 4}


def test_the_reply_of_another_connection_is_found() -> None:
    with faulty_servers.crosses(LENGTH * 4) as peer:
        result = measure(peer, connections=2)
    assert result.errors.get("foreign", 0) >= 1


@pytest.mark.parametrize("length", [1, 2, 7, 8, 15])
def test_messages_too_short_for_a_header_are_compared_as_well(length: int) -> None:
    with faulty_servers.swaps(length, length * 4) as peer:
        result = measure(peer, depth=2, length=length)
    assert result.errors == {"corrupt": 4}


def test_a_reply_that_comes_twice_is_found() -> None:
    with faulty_servers.answers_twice(LENGTH * 4) as peer:
        result = measure(peer)
    assert sum(result.errors.values()) == 4
    assert result.errors.keys() <= {"extra", "repeated"}


@pytest.mark.parametrize("mode", ["burst", "connect"])
@pytest.mark.parametrize("after_s", [0.0003, 0.05])
def test_what_comes_after_the_last_reply_is_found(mode: str, after_s: float) -> None:
    with faulty_servers.adds_later(b"x", after_s) as peer:
        result = measure(peer, mode=mode, duration=0.2, **BURSTS.get(mode, {}))
    assert result.errors.get("extra", 0) >= 4
    assert not result.verdict.valid


@pytest.mark.parametrize("mode", ["burst", "connect"])
def test_waiting_for_the_servers_end_is_not_in_the_figures(mode: str) -> None:
    with faulty_servers.ends_late(0.7) as peer:
        result = measure(peer, mode=mode, duration=0.2, timeout=10.0, **BURSTS.get(mode, {}))
    assert not result.errors
    assert result.latency["response"].max < 0.7e9
    assert result.duration_s < 1.2


@pytest.mark.parametrize("mode", ["burst", "connect"])
def test_a_server_that_never_ends_is_waited_for_no_longer_than_the_timeout(mode: str) -> None:
    with faulty_servers.ends_late(3600) as peer:
        begun = time.monotonic()
        result = measure(peer, mode=mode, duration=0.2, timeout=0.5, **BURSTS.get(mode, {}))
    assert time.monotonic() - begun < 20
    assert not result.errors
    assert any("not ended by the server" in note for note in result.verdict.notes)


@pytest.mark.parametrize(("by_reset", "kinds"), [(False, {"short"}), (True, {"short", "reset"})])
def test_a_server_that_closes_half_way_ends_the_run_with_what_there_is(
    by_reset: bool, kinds: set[str]
) -> None:
    with faulty_servers.closes_after(LENGTH * 10, by_reset=by_reset) as peer:
        result = measure(peer, duration=30.0)
    assert sum(result.errors.values()) == 4
    assert result.errors.keys() <= kinds
    assert result.partial
    assert result.echoes == 39  # and the probe, which is in no figure


def test_a_server_that_hangs_is_told_by_the_timeout() -> None:
    with faulty_servers.silent_after(LENGTH * 10) as peer:
        begun = time.monotonic()
        result = measure(peer, duration=30.0)
    assert time.monotonic() - begun < 10
    assert result.errors == {"timeout": 4}
    assert result.partial


@pytest.mark.slow_under_sanitizers  # counts what comes in time
def test_an_overloaded_server_is_not_waited_for_without_end() -> None:
    with faulty_servers.delays(0.005) as peer:  # some 200 messages/s on one connection
        begun = time.monotonic()
        result = measure(
            peer, mode="open", rate=20_000.0, connections=1, duration=1.0, timeout=1.5, length=4096
        )
    assert time.monotonic() - begun < 10
    assert not result.verdict.valid
    assert result.observed["unanswered"] > 0
    assert any("messages/s were asked for" in reason for reason in result.verdict.reasons)
    # What waits for the server is the server's: it is not counted as the client's lateness.
    assert result.latency["lateness"].percentile(99) < result.latency["response"].percentile(50)


def test_an_interruption_does_not_wait_for_a_server_that_dribbles() -> None:
    with faulty_servers.dribbles(0.2, after=64) as peer:
        # Seconds after which it is interrupted: on a busy machine the run begins late.
        for delay_s in (1.0, 5.0, 20.0):
            script = f"""
                import os, signal, threading
                from kecho import bench
                threading.Timer({delay_s}, os.kill, (os.getpid(), signal.SIGINT)).start()
                result = bench.run(bench.Workload(
                    port={peer.port}, mode="closed", connections=1, duration=60.0))
                print(result.partial, result.observed["interrupted"])
            """
            begun = time.monotonic()
            finished = run_python("-c", textwrap.dedent(script))
            if finished.returncode != -signal.SIGINT:
                break
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout == "True True\n"
    assert time.monotonic() - begun < delay_s + 14


def test_idle_connections_that_died_in_silence_are_lost() -> None:
    with faulty_servers.dead_but_for_the_first() as peer:
        result = measure(peer, mode="idle", duration=0.2, connections=6)
    assert result.connections == 6
    assert result.errors == {"timeout": 5}
    assert result.observed["lost"] == 5


def test_a_peer_that_echoes_nothing_is_named() -> None:
    with (
        faulty_servers.greets(b"SSH-2.0-OpenSSH_9\r\n") as peer,
        pytest.raises(TargetError, match=r"not an echo server: it answered 'SSH-2\.0"),
    ):
        measure(peer)


@pytest.mark.parametrize("after", [0, 10 * LENGTH])
def test_an_urgent_byte_that_nobody_has_asked_for_is_found(after: int) -> None:
    """In the probe, and later."""
    with faulty_servers.hurries(after) as peer:
        if after == 0:
            with pytest.raises(TargetError, match="not an echo server"):
                measure(peer)
            return
        result = measure(peer, mode="closed", connections=1)
    assert sum(result.errors.values()) > 0
    assert not result.verdict.valid


def test_a_peer_that_says_nothing_is_named() -> None:
    with (
        faulty_servers.silent_after(0) as peer,
        pytest.raises(TargetError, match=r"did not echo a message within 0\.2 s"),
    ):
        measure(peer, timeout=0.2)


def test_a_peer_that_closes_at_once_is_named() -> None:
    with (
        faulty_servers.closes_after(0) as peer,
        pytest.raises(TargetError, match="closed the connection after 32 of 64 bytes"),
    ):
        measure(peer)


def test_nothing_listening_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        with pytest.raises(TargetError, match="nothing listens at tcp 127"):
            bench.run(Workload(port=port))


def test_an_unknown_host_is_named() -> None:
    with pytest.raises(TargetError, match=r"unknown host 'no\.such"):
        bench.run(Workload(host="no.such.host.invalid"))
