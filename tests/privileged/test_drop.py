"""The dropper on real sockets, each test in a network namespace of its own."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import shutil
import socket
import subprocess
import threading
from collections.abc import Callable
from contextlib import ExitStack
from itertools import chain

import pytest

import kecho
from kecho import drop
from kecho.drop import Result, Socket
from kecho.drop.filters import Filter
from support.clients import DEADLINE_S, echo, wait_for
from support.connections_to_drop import Ends, make_time_wait
from support.namespaces import Namespace

pytestmark = pytest.mark.privileged

FAMILIES = ("127.0.0.1", "::1", "mapped")


@pytest.fixture(params=FAMILIES)
def ends(inside: Namespace, stack: ExitStack, request: pytest.FixtureRequest) -> Ends:
    return Ends(request.param, stack)


def assert_dropped(pair: tuple[str, int, str, int], state: str) -> None:
    """It is there in this state, is dropped, and is gone."""
    wait_for(lambda: [one.state for one in drop.find([pair])] == [state], state)
    (outcome,) = drop.drop([pair])
    assert (outcome.result, outcome.errno, outcome.reason) == (Result.DROPPED, None, "")
    assert outcome.socket
    assert outcome.socket.state == state
    assert drop.find([pair]) == []


# ---- 1: every state -----------------------------------------------------------------------------


def test_established_is_reset(ends: Ends) -> None:
    client, server = ends.connect()
    server.sendall(b"queued")
    select.select([client], [], [], DEADLINE_S)
    assert_dropped(ends.pair(client), "established")
    assert client.recv(100) == b"queued"
    with pytest.raises(ConnectionAbortedError):
        client.recv(1)
    with pytest.raises(BrokenPipeError):
        client.send(b"x")
    with pytest.raises(ConnectionResetError):
        server.recv(1)


def test_close_wait_is_reset(ends: Ends) -> None:
    client, server = ends.connect()
    client.shutdown(socket.SHUT_WR)
    assert_dropped(ends.pair(server), "close-wait")
    assert server.recv(1) == b""
    with pytest.raises(ConnectionAbortedError):
        server.send(b"x")
    with pytest.raises(ConnectionResetError):
        client.recv(1)


def test_fin_wait_2_with_an_owner_is_aborted(ends: Ends) -> None:
    client, server = ends.connect()
    client.shutdown(socket.SHUT_WR)
    assert_dropped(ends.pair(client), "fin-wait-2")
    with pytest.raises(ConnectionAbortedError):
        client.recv(1)
    assert server.recv(1) == b""
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        server.send(b"x")
    with pytest.raises((BrokenPipeError, ConnectionResetError)):
        server.send(b"x")


def test_fin_wait_2_without_an_owner_vanishes(ends: Ends) -> None:
    client, server = ends.connect()
    pair = ends.pair(client)
    client.close()
    assert_dropped(pair, "fin-wait-2")
    assert server.recv(1) == b""


def test_fin_wait_1_without_an_owner_vanishes(ends: Ends) -> None:
    client, server = ends.connect()
    pair = ends.pair(client)
    client.setblocking(False)
    sent = 0
    with contextlib.suppress(BlockingIOError):
        while True:
            sent += client.send(bytes(1 << 16))
    client.close()  # the FIN waits behind what the server does not read
    assert_dropped(pair, "fin-wait-1")
    assert 0 < len(server.recv(1 << 16)) <= sent


def test_time_wait_vanishes(ends: Ends) -> None:
    client, server = ends.connect()
    pair = ends.pair(client)
    client.close()
    assert server.recv(1) == b""
    server.close()
    assert_dropped(pair, "time-wait")
    ends.assert_accepts()


def test_last_ack_vanishes(ends: Ends) -> None:
    client, server = ends.connect()
    client.shutdown(socket.SHUT_WR)
    assert server.recv(1) == b""
    pair = ends.pair(server)
    server.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            server.send(bytes(1 << 16))
    server.close()
    assert_dropped(pair, "last-ack")


def drop_packets(namespace: Namespace, *rule: str) -> None:
    if shutil.which("nft") is None:
        pytest.skip("needs nft, which nftables has")
    try:
        namespace.run("nft", "add", "table", "inet", "kecho")
        chain = "{ type filter hook input priority 0; }"
        namespace.run("nft", "add", "chain", "inet", "kecho", "input", chain)
        namespace.run("nft", "add", "rule", "inet", "kecho", "input", *rule, "drop")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"nft cannot do it here: {error.stderr.strip()}")


@pytest.fixture
def half_open(inside: Namespace, ends: Ends, stack: ExitStack) -> socket.socket:
    """A client whose SYN-ACK never arrives: SYN_SENT, and SYN_RECV at the server."""
    drop_packets(inside, "tcp", "flags", "syn", "/", "fin,syn,rst", "tcp", "sport", str(ends.port))
    client = stack.enter_context(socket.socket(ends.family))
    client.setblocking(False)
    client.connect_ex((ends.address, ends.port))
    wait_for(lambda: drop.find(states=["syn-recv"]), "syn-recv")
    return client


def test_syn_sent_is_aborted(ends: Ends, half_open: socket.socket) -> None:
    pair = (*half_open.getsockname()[:2], ends.address, ends.port)
    assert_dropped(pair, "syn-sent")
    assert half_open.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == errno.ECONNABORTED


def test_syn_recv_vanishes(ends: Ends, half_open: socket.socket) -> None:
    pair = (ends.address, ends.port, *half_open.getsockname()[:2])
    assert_dropped(pair, "syn-recv")
    assert drop.find(listeners=True, states=["listen"])


def test_listener_is_dropped_only_when_asked_for(ends: Ends) -> None:
    (listener,) = drop.find(states=["listen"], listeners=True)
    for what in (listener, listener.pair):
        (outcome,) = drop.drop([what])
        assert outcome.result is Result.PROTECTED
        ends.assert_accepts()
    (outcome,) = drop.drop([listener], listeners=True)
    assert outcome.result is Result.DROPPED
    with pytest.raises(OSError, match="Invalid argument"):
        ends.listener.accept()


# ---- 2: listeners -------------------------------------------------------------------------------


def test_pair_dropped_twice_leaves_the_listener(ends: Ends) -> None:
    client, server = ends.connect()
    for pair in (ends.pair(server), ends.pair(client)):
        results = [drop.drop([pair])[0].result for _ in range(3)]
        assert results[1:] == [Result.GONE, Result.GONE]
    ends.assert_accepts()


def test_socket_dropped_twice_leaves_the_listener(ends: Ends) -> None:
    _, server = ends.connect()
    (found,) = drop.find([ends.pair(server)])
    assert [drop.drop([found])[0].result for _ in range(2)] == [Result.DROPPED, Result.GONE]
    ends.assert_accepts()


def test_time_wait_dropped_twice_leaves_the_listener(ends: Ends) -> None:
    """Nothing is looked up again for it: the kernel goes by the cookie, or else by the ports."""
    client, server = ends.connect()
    server.close()
    assert client.recv(1) == b""
    client.close()
    wait_for(lambda: len(drop.find(states=["time-wait"])) == 1, "time-wait")
    (found,) = drop.find(states=["time-wait"])
    assert found.pair.local.port == ends.port
    assert [drop.drop([found])[0].result for _ in range(2)] == [Result.DROPPED, Result.GONE]
    ends.assert_accepts()


def test_pair_that_never_existed_leaves_the_listener(ends: Ends) -> None:
    for pair in ((ends.address, ends.port, ends.address, 9), (ends.address, 9, ends.address, 10)):
        (outcome,) = drop.drop([pair])
        assert outcome.result is Result.GONE
        assert outcome.errno is None
    ends.assert_accepts()


def test_three_listeners_on_one_port_still_accept(inside: Namespace, stack: ExitStack) -> None:
    listeners, port = [], 0
    for _ in range(3):
        one = stack.enter_context(socket.socket())
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        one.bind(("127.0.0.1", port))
        one.listen()
        one.setblocking(False)
        port = one.getsockname()[1]
        listeners.append(one)
    client = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
    pair = ("127.0.0.1", port, *client.getsockname())
    assert [drop.drop([pair])[0].result for _ in range(4)] == [Result.DROPPED] + 3 * [Result.GONE]
    for peer_port in range(1, 60):
        assert drop.drop([("127.0.0.1", port, "127.0.0.1", peer_port)])[0].result is Result.GONE
    accepted = set()
    for _ in range(200):
        stack.enter_context(socket.create_connection(("127.0.0.1", port)))
        for one in select.select(listeners, [], [], DEADLINE_S)[0]:
            with contextlib.suppress(BlockingIOError):
                stack.enter_context(one.accept()[0])
                accepted.add(one)
    assert len(accepted) == 3


# ---- 3: a tuple that is another's by now --------------------------------------------------------


def test_reused_tuple_is_not_dropped(inside: Namespace, stack: ExitStack) -> None:
    ends = Ends("127.0.0.1", stack)
    client, server = ends.connect()
    local = client.getsockname()
    old = drop.find([ends.pair(client), ends.pair(server)])
    assert len(old) == 2
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    client.close()
    server.close()
    again = stack.enter_context(socket.socket())
    again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    again.bind(local)
    again.connect((ends.address, ends.port))
    server = stack.enter_context(ends.listener.accept()[0])
    assert [one.pair for one in drop.find([ends.pair(again)])] == [old[0].pair]
    outcomes = drop.drop(old)
    assert [(one.result, one.errno) for one in outcomes] == 2 * [(Result.GONE, errno.ENOENT)]
    again.sendall(b"alive")
    assert server.recv(5) == b"alive"


# ---- exact matches ------------------------------------------------------------------------------


def test_only_the_pair_is_dropped(ends: Ends) -> None:
    connections = [ends.connect() for _ in range(5)]
    (outcome,) = drop.drop([ends.pair(connections[2][0])])
    assert outcome.result is Result.DROPPED
    for index, (client, server) in enumerate(connections):
        if index != 2:
            client.sendall(b"x")
            assert server.recv(1) == b"x"


def test_interface_of_a_pair_must_match(inside: Namespace, stack: ExitStack) -> None:
    ends = Ends("127.0.0.1", stack)
    client = stack.enter_context(socket.socket())
    client.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"lo")
    client.connect((ends.address, ends.port))
    local, peer = client.getsockname(), client.getpeername()
    text = f"127.0.0.1%{{}}:{local[1]} 127.0.0.1:{peer[1]}"
    assert drop.drop(drop.parse_pairs(text.format("eth9")))[0].result is Result.GONE
    (found,) = drop.find(drop.parse_pairs(text.format("lo")))
    assert str(found.pair) == text.format("lo")
    assert drop.drop(drop.parse_pairs(text.format("1")))[0].result is Result.DROPPED


def test_translated_address_is_no_v4_mapped_one(inside: Namespace, stack: ExitStack) -> None:
    address = "::ffff:0:102:304"
    inside.run("ip", "-6", "address", "add", f"{address}/128", "dev", "lo", "nodad")
    ends = Ends(address, stack)
    client, _ = ends.connect()
    assert [one.local_address for one in drop.find(not_peer=["10.0.0.0/8"])] == [address] * 2
    assert_dropped(ends.pair(client), "established")


def test_queues_owner_and_process_are_told(ends: Ends) -> None:
    client, server = ends.connect()
    client.sendall(b"12345")
    select.select([server], [], [], DEADLINE_S)
    (found,) = drop.find([ends.pair(server)], pid=os.getpid(), uid=os.getuid())
    assert (found.receive_queue, found.owner) == (5, os.getuid())
    assert found.inode == os.fstat(server.fileno()).st_ino
    assert found.is_mapped == (ends.kind == "mapped")
    with subprocess.Popen(["sleep", "60"]) as another:
        try:
            assert drop.find([ends.pair(server)], pid=another.pid) == []
        finally:
            another.kill()


def test_time_wait_belongs_to_nobody_not_to_root(inside: Namespace, stack: ExitStack) -> None:
    make_time_wait(Ends("127.0.0.1", stack), 3)
    assert len(drop.find(states=["time-wait"])) == 3
    assert drop.find(states=["time-wait"], uid=0) == []
    assert drop.find(states=["time-wait"], pid=os.getpid()) == []


# ---- 8: the server ------------------------------------------------------------------------------


def test_server_loses_no_client_while_its_time_wait_is_dropped(
    inside: Namespace, stack: ExitStack, start_server: Callable[..., kecho.Server]
) -> None:
    server = start_server()
    lost: list[BaseException] = []
    stop = threading.Event()
    clients = [
        stack.enter_context(socket.create_connection(("127.0.0.1", server.port), DEADLINE_S))
        for _ in range(50)
    ]

    def talk() -> None:
        try:
            while not stop.is_set():
                for client in clients:
                    assert echo(client, b"ping") == b"ping"
        except BaseException as error:
            lost.append(error)

    talker = threading.Thread(target=talk)
    talker.start()
    dropped = 0
    try:
        while dropped < 4_000 and not lost:
            for _ in range(2_000):
                socket.create_connection(("127.0.0.1", server.port), DEADLINE_S).close()
            ours = drop.find(states=["time-wait"], peer=[f":{server.port}"])
            dropped += sum(one.result is Result.DROPPED for one in drop.drop(ours))
    finally:
        stop.set()
        talker.join(DEADLINE_S)
    assert lost == []
    assert dropped >= 4_000
    for client in clients:
        assert echo(client, b"still") == b"still"
    assert server.stats().active == 50


# ---- the native handle --------------------------------------------------------------------------


def test_handle_serves_many_looks_and_drops(inside: Namespace, stack: ExitStack) -> None:
    ends = Ends("127.0.0.1", stack)
    with drop.Diag() as diag:
        for _ in range(20):
            make_time_wait(ends, 10)
            found: list[Socket] = diag.find(Filter(states=frozenset({"time-wait"})))
            outcomes = chain(*diag.drop_sockets(found))
            assert {one.result for one in outcomes} == {Result.DROPPED}
            assert diag.find(Filter(states=frozenset({"time-wait"}))) == []
