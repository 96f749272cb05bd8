"""The dropper and what the kernel tells beyond addresses: how long it is idle, MPTCP."""

from __future__ import annotations

import json
import socket
from contextlib import ExitStack

import pytest

from kecho import drop
from kecho.drop import Diag, Result
from kecho.drop.filters import make_filter
from support.clients import DEADLINE_S, wait_for
from support.connections_to_drop import Ends, assert_alive, make_time_wait, pair_of, run_drop
from support.namespaces import Namespace

pytestmark = pytest.mark.privileged

HOUR_S = 3600
IPPROTO_MPTCP = 262  # <linux/in.h>


@pytest.fixture
def ends(inside: Namespace, stack: ExitStack) -> Ends:
    return Ends("127.0.0.1", stack)


# ---- idle ---------------------------------------------------------------------------------------


def test_connection_that_is_idle_for_so_long_is_dropped(ends: Ends) -> None:
    make_time_wait(ends, 2)
    client, _ = ends.connect()
    mine = [f":{client.getsockname()[1]}"]
    wait_for(lambda: drop.find(local=mine, idle=0.2), "idle")
    (found,) = drop.find(local=mine)
    assert found.idle_ms is not None
    assert 200 <= found.idle_ms < HOUR_S * 1000
    assert run_drop("--idle", str(HOUR_S)).returncode == 1
    finished = run_drop("--idle", "0.2", "--local", mine[0])
    assert finished.returncode == 0, finished.stderr
    with pytest.raises(ConnectionAbortedError):
        client.recv(1)


def test_what_tells_no_time_is_never_idle(ends: Ends) -> None:
    make_time_wait(ends, 2)
    assert [one.idle_ms for one in drop.find(states=["time-wait"])] == [None, None]
    assert drop.find(states=["time-wait"], idle=0.001) == []
    assert drop.find(states=["listen"], idle=0.001, listeners=True) == []


def test_connection_that_talks_after_the_look_is_left(ends: Ends) -> None:
    connection = ends.connect()
    wanted = make_filter(states=["established"])
    with Diag() as diag:
        found = diag.find(wanted)
        assert_alive(connection)
        (outcomes,) = diag.drop_sockets(found, wanted.states, HOUR_S * 1000)
    assert {one.result for one in outcomes} == {Result.PROTECTED}
    assert {one.reason for one in outcomes} == {"no longer idle: that was not asked for"}
    assert_alive(connection)


# ---- MPTCP --------------------------------------------------------------------------------------


def connect_by_mptcp(stack: ExitStack) -> tuple[socket.socket, socket.socket]:
    try:
        listener = stack.enter_context(socket.socket(socket.AF_INET, proto=IPPROTO_MPTCP))
    except OSError as error:
        pytest.skip(f"this kernel has no MPTCP: {error}")
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    client = stack.enter_context(socket.socket(socket.AF_INET, proto=IPPROTO_MPTCP))
    client.settimeout(DEADLINE_S)
    client.connect(listener.getsockname())
    server = stack.enter_context(listener.accept()[0])
    assert_alive((client, server))
    return client, server


def test_subflow_of_mptcp_is_marked_and_said_not_to_be_the_connection(
    ends: Ends, stack: ExitStack
) -> None:
    plain, _ = ends.connect()
    client, _ = connect_by_mptcp(stack)
    pairs = [pair_of(plain), pair_of(client)]
    assert [one.is_mptcp for one in drop.find(pairs)] == [False, True]
    listed = run_drop("--list", *pairs).stdout.splitlines()[1:]
    assert [line.endswith("  mptcp") for line in listed] == [False, True]
    for form in (["--dry-run"], []):
        out = run_drop(*form, *pairs).stdout.splitlines()
        assert ["MPTCP" in line for line in out] == [False, True]
        assert "goes on over the others" in out[1]


def test_subflow_of_mptcp_is_told_in_json(inside: Namespace, stack: ExitStack) -> None:
    client, _ = connect_by_mptcp(stack)
    listed = json.loads(run_drop("--list", "--json", pair_of(client)).stdout)
    assert listed["sockets"][0]["is_mptcp"] is True
    told = json.loads(run_drop("--json", pair_of(client)).stdout)["outcomes"]
    assert (told[0]["result"], "MPTCP" in told[0]["reason"]) == ("dropped", True)
