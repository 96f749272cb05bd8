"""The benchmark client over UDP: what is lost, late, twice, out of order, and what is wrong."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from kecho import bench
from kecho.bench import Result, TargetError, Workload
from kecho.errors import OptionError
from support import faulty_udp_servers
from support.clients import DEADLINE_S
from support.fixture_types import StartServer
from support.server_process import run_python

LENGTH = 64
NO_RATES = {"udp_rate": 0, "udp_rate_total": 0}


def measure(port: int, **options: object) -> Result:
    defaults = {"mode": "closed", "connections": 4, "threads": 2, "duration": 0.5, "timeout": 0.1}
    return bench.run(
        Workload(**{**defaults, "port": port, "udp": True, "length": LENGTH, **options})
    )


def _dropped_packets() -> int:
    """The second column of /proc/net/softnet_stat: softnet_seq_show() in net/core/net-procfs.c."""
    lines = Path("/proc/net/softnet_stat").read_text().splitlines()
    return sum(int(line.split()[1], 16) for line in lines)


@pytest.fixture
def dropped() -> Callable[[], int]:
    """How many packets the kernel has thrown away since the test began, for the queue of a CPU was
    full (net.core.netdev_max_backlog). All network namespaces share the queue: other tests that
    send much may fill it."""
    before = _dropped_packets()
    return lambda: _dropped_packets() - before


# ---- against a server that does it right ------------------------------------------------------


@pytest.mark.parametrize("length", [16, 17, 1400, 65507])
def test_closed_loop_against_kecho(
    start_server: StartServer, dispatch: str, length: int, dropped: Callable[[], int]
) -> None:
    server = start_server(dispatch=dispatch, udp=True, **NO_RATES)
    # On a busy machine half a second may be too short for one of 64 KB.
    for duration in (0.5, 4.0):
        result = measure(server.port, length=length, timeout=DEADLINE_S, duration=duration)
        assert result.errors == {}
        assert result.observed["lost"] <= dropped()
        assert result.connections == 4
        if result.echoes:
            break
    assert result.echoes == result.latency["service"].count > 0
    udp = server.stats().udp
    assert udp is not None
    assert udp.sent >= result.echoes


def test_depth_keeps_so_many_outstanding(
    start_server: StartServer, dispatch: str, dropped: Callable[[], int]
) -> None:
    server = start_server(dispatch=dispatch, udp=True, **NO_RATES)
    result = measure(server.port, depth=8, timeout=DEADLINE_S)
    assert result.errors == {}
    assert result.observed["lost"] <= dropped()
    assert result.echoes > 32


def test_open_loop_against_kecho(
    start_server: StartServer, dispatch: str, dropped: Callable[[], int]
) -> None:
    server = start_server(dispatch=dispatch, udp=True, **NO_RATES)
    result = measure(server.port, mode="open", rate=1000.0, duration=1.0, timeout=DEADLINE_S)
    assert result.errors == {}
    assert result.echoes == result.latency["response"].count
    lost = result.observed["lost"]
    assert result.echoes + lost == 1000
    assert lost <= dropped()


def test_ipv6_and_several_processes(start_server: StartServer) -> None:
    server = start_server(host="::1", udp=True, **NO_RATES)
    result = measure(server.port, host="::1", processes=2, timeout=DEADLINE_S)
    assert result.errors == {}
    assert result.echoes > 0


def test_source_addresses_rotate(start_server: StartServer) -> None:
    server = start_server(udp=True, udp_rate=1)  # a burst of 128 for each of them
    result = measure(
        server.port, mode="open", rate=600.0, connections=4, duration=0.5, source="127.1.0.0/30"
    )
    assert result.errors == {}
    assert 128 < result.echoes <= 300


def test_what_a_rate_limit_refuses_is_lost(start_server: StartServer, dispatch: str) -> None:
    server = start_server(dispatch=dispatch, udp=True, udp_rate=1)
    result = measure(server.port, mode="open", rate=1000.0, duration=0.5, timeout=0.2)
    assert result.errors == {}
    assert result.echoes + result.observed["lost"] == 500
    assert result.observed["lost"] >= 300
    assert any("datagrams were lost" in why for why in result.verdict.reasons)


# ---- against one fault each -------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["closed", "open"])
def test_loss_is_counted_and_is_no_error(mode: str) -> None:
    rate = {"rate": 500.0} if mode == "open" else {}
    with faulty_udp_servers.peer(faulty_udp_servers.loses(50)) as port:
        result = measure(port, mode=mode, duration=1.0, timeout=0.3, **rate)
    assert result.errors == {}
    assert result.observed["lost"] > 0
    assert result.echoes > 10 * result.observed["lost"]
    if mode == "open":
        assert result.echoes + result.observed["lost"] == 500
    assert result.observed["unanswered"] == 0
    assert not result.partial
    assert not result.verdict.valid


def test_closed_loop_goes_on_after_a_loss() -> None:
    with faulty_udp_servers.peer(faulty_udp_servers.loses(3)) as port:
        result = measure(port, connections=2, duration=1.0, timeout=0.02)
    assert result.observed["lost"] > 10
    assert result.echoes > 10


def test_when_all_is_lost_nothing_was_measured() -> None:
    with faulty_udp_servers.peer(faulty_udp_servers.loses_all) as port:
        result = measure(port)
    assert result.echoes == 0
    assert result.observed["lost"] >= 4
    assert "not one reply was measured" in result.verdict.reasons


@pytest.mark.parametrize("depth", [1, 4])
def test_duplicates_are_counted_and_are_no_error(depth: int, dropped: Callable[[], int]) -> None:
    with faulty_udp_servers.peer(faulty_udp_servers.answers_twice) as port:
        result = measure(port, depth=depth, connections=2, timeout=DEADLINE_S)
    assert result.errors == {}
    assert result.observed["lost"] <= dropped()
    assert result.observed["duplicates"] > 0.9 * result.echoes
    assert any("came twice" in note for note in result.verdict.notes)


def test_reordering_is_a_note() -> None:
    with faulty_udp_servers.peer(faulty_udp_servers.swaps()) as port:
        result = measure(port, depth=2, timeout=1.0)
    assert result.errors == {}
    assert result.observed["reordered"] > 0.4 * result.echoes
    assert result.observed["duplicates"] == 0
    assert any("overtaken" in note for note in result.verdict.notes)


def test_a_late_reply_is_lost_and_told_from_a_duplicate() -> None:
    with faulty_udp_servers.peer(faulty_udp_servers.is_late_with_the_second()) as port:
        result = measure(port, timeout=0.5, duration=1.0)
    assert result.errors == {}
    assert (result.observed["lost"], result.observed["late"]) == (4, 4)
    assert result.observed["duplicates"] == 0


@pytest.mark.parametrize("position", [0, 9, 13, 40, 63])
def test_a_wrong_byte_is_an_error_and_the_message_lost(position: int) -> None:
    with faulty_udp_servers.peer(faulty_udp_servers.corrupts(100, position)) as port:
        result = measure(port, duration=1.0)
    assert result.errors.keys() == {"corrupt"}
    assert result.observed["lost"] > 0
    assert result.echoes > result.errors["corrupt"]
    assert result.first_error is not None
    assert f"byte {position} of {LENGTH}" in result.first_error


def test_a_wrong_byte_is_not_looked_for_without_verification(dropped: Callable[[], int]) -> None:
    with faulty_udp_servers.peer(faulty_udp_servers.corrupts(10)) as port:
        result = measure(port, verify=False, timeout=DEADLINE_S)
    assert result.errors == {}
    assert result.observed["lost"] <= dropped()


@pytest.mark.parametrize(("by", "kind"), [(1, "short"), (64, "short"), (-1, "extra")])
def test_another_length_is_an_error(by: int, kind: str) -> None:
    with faulty_udp_servers.peer(faulty_udp_servers.cuts(100, by)) as port:
        result = measure(port)
    assert result.errors.keys() == {kind}


def test_a_reply_of_another_connection_is_an_error(dropped: Callable[[], int]) -> None:
    with faulty_udp_servers.peer(faulty_udp_servers.crosses(10)) as port:
        result = measure(port, timeout=DEADLINE_S)
    assert result.errors.keys() == {"foreign"}
    assert result.observed["lost"] <= dropped()


def test_a_server_that_goes_away_is_an_error(start_server: StartServer) -> None:
    server = start_server(udp=True)
    threading.Timer(0.3, server.stop).start()
    result = measure(server.port, duration=20.0, timeout=1.0)
    server.wait(DEADLINE_S)
    assert result.errors == {"refused": 4}
    assert result.partial


# ---- the probe, the options, the command ------------------------------------------------------


def test_nothing_listens() -> None:
    with faulty_udp_servers.peer(faulty_udp_servers.honest) as port:
        pass
    with pytest.raises(TargetError, match=rf"nothing listens at udp 127\.0\.0\.1:{port}"):
        measure(port)


def test_no_echo_server() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
        one.bind(("127.0.0.1", 0))
        one.settimeout(DEADLINE_S)

        def answer() -> None:
            one.sendto(b"hello", one.recvfrom(100)[1])

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(TargetError, match="is not an echo server: it answered 'hello'"):
            measure(one.getsockname()[1], timeout=DEADLINE_S)
        thread.join(DEADLINE_S)


def test_a_server_without_udp_is_silent_or_refuses(start_server: StartServer) -> None:
    with pytest.raises(TargetError, match="nothing listens at udp"):
        measure(start_server().port)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"mode": "burst"}, "udp"),
        ({"mode": "stream"}, "udp"),
        ({"mode": "connect"}, "udp"),
        ({"mode": "idle"}, "udp"),
        ({"mode": "closed", "uds": "/run/x"}, "udp"),
        ({"mode": "closed", "length": 15}, "length"),
        ({"mode": "closed", "length": 65508}, "length"),
        ({"mode": "closed", "close": "rst"}, "close"),
        ({"mode": "closed", "line": True}, "line"),
        ({"mode": "closed", "reconnect": True}, "reconnect"),
    ],
)
def test_what_udp_cannot_do_is_refused(options: dict[str, object], named: str) -> None:
    with pytest.raises(OptionError) as caught:
        Workload(**{"udp": True, **options})
    assert caught.value.option == named


def test_datagrams_are_waited_for_a_second_by_default() -> None:
    assert Workload(mode="closed", udp=True).timeout_s == 1.0
    assert Workload(mode="closed").timeout_s == 10.0
    assert Workload(mode="closed", udp=True, timeout=3.0).timeout_s == 3.0


@pytest.mark.e2e
@pytest.mark.parametrize("options", ["", "--dispatch percpu", "--udp-rate 100000000"])
def test_spawn_starts_a_server_with_udp(options: str, dropped: Callable[[], int]) -> None:
    finished = run_python(
        *("-m", "kecho.bench", "--udp", "--mode", "closed", "-d", "0.5", "-c", "5"),
        *(f"--spawn={options}", "--json", "-"),
    )
    assert finished.returncode == 0, finished.stderr
    result = json.loads(finished.stdout)
    assert result["errors"] == {}
    assert result["observed"]["lost"] <= dropped()
    assert "closed: udp 127.0.0.1:" in finished.stderr
    assert f"lost        {result['observed']['lost']} datagram" in finished.stderr


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("answer", "status"),
    [(faulty_udp_servers.loses(20), 0), (faulty_udp_servers.loses_all, 1)],
    ids=["some", "nothing"],
)
def test_exit_status_says_whether_something_was_measured(
    answer: faulty_udp_servers.Answer, status: int
) -> None:
    with faulty_udp_servers.peer(answer) as port:
        finished = run_python(
            *("-m", "kecho.bench", "--udp", "--mode", "closed", "-d", "0.5", "-c", "5"),
            *("--port", str(port), "--timeout", "0.1"),
        )
    assert finished.returncode == status, finished.stdout + finished.stderr
    assert "datagrams were lost" in finished.stdout
