from __future__ import annotations

import dataclasses
import errno
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from kecho import Counters, ServerConfig
from kecho.server._engine import CLOSE_REASONS, ERROR_KINDS, REFUSALS, Engine
from kecho.server.sockets.listen import open_listeners
from support.bare_engine import OPTIONS, Workers, described, engine_on, open_tcp, running
from support.clients import (
    connect,
    echo,
    receive_until_end,
    receive_until_reset,
    wait_for,
)


def total(engine: Engine, name: str, reason: str | None = None) -> int:
    counts: list[Any] = [worker[name] for worker in engine.counters()]
    return sum(count if reason is None else count[reason] for count in counts)


def refuses(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == errno.ECONNREFUSED


# ---- counters ---------------------------------------------------------------------------------


@pytest.mark.parametrize("worker_count", [1, 3])
def test_counters_have_every_name_and_begin_at_zero(dispatch: str, worker_count: int) -> None:
    listeners, _ = open_tcp(dispatch, worker_count)
    workers = engine_on(listeners, dispatch, worker_count).counters()
    assert len(workers) == worker_count
    for counters in workers:
        assert counters.keys() == {field.name for field in dataclasses.fields(Counters)}
        assert counters.pop("closed") == dict.fromkeys(CLOSE_REASONS, 0)
        assert counters.pop("errors") == dict.fromkeys(ERROR_KINDS, 0)
        assert counters.pop("refused") == dict.fromkeys(REFUSALS, 0)
        assert set(counters.values()) == {0}


@pytest.mark.parametrize(
    ("names", "what"), [(CLOSE_REASONS, "closed"), (ERROR_KINDS, "errors"), (REFUSALS, "refused")]
)
def test_names_are_numbered_without_gaps_and_explained(names: dict[str, int], what: str) -> None:
    assert sorted(names.values()) == list(range(len(names)))
    explained = re.search(rf"^ *{what}: (.*?)^ *(\w+:|\Z)", f"{Counters.__doc__}", re.M | re.S)
    assert explained
    assert re.findall(r"``(\w+)``", explained[1]) == list(names)


def test_counters_hold_what_happened(dispatch: str) -> None:
    listeners, port = open_tcp(dispatch)
    engine = engine_on(listeners, dispatch)
    with running(engine):
        with connect(port) as client:
            assert echo(client, b"abc") == b"abc"
            assert (total(engine, "accepted"), total(engine, "active")) == (1, 1)
        wait_for(lambda: total(engine, "active") == 0, "the end of the connection")
    assert total(engine, "closed", "eof") == 1
    assert total(engine, "bytes_received") == total(engine, "bytes_sent") == 3


# ---- constructor ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"worker_count": -1}, OverflowError),
        ({"worker_count": 2**32}, OverflowError),
        ({"worker_count": "2"}, TypeError),
        ({"worker_count": None}, TypeError),
        ({"max_connections": -1}, OverflowError),
        ({"max_connections": 2**32}, OverflowError),
        ({"idle_timeout_ms": -1}, OverflowError),
        ({"idle_timeout_ms": 2**32}, OverflowError),
        ({"colour": 1}, TypeError),
    ],
)
def test_options_that_make_no_sense_are_refused(
    change: dict[str, object], error: type[Exception]
) -> None:
    with pytest.raises(error):
        Engine([], **(OPTIONS | change))


@pytest.mark.parametrize("missing", sorted(OPTIONS))
def test_every_option_is_needed(missing: str) -> None:
    options = {name: value for name, value in OPTIONS.items() if name != missing}
    with pytest.raises(TypeError, match=missing):
        Engine([], **options)


@pytest.mark.parametrize("listeners", [None, (), 5, [5], [(0,)], [(None, 0, False)], [("0", 0, 0)]])
def test_listeners_that_make_no_sense_are_refused(listeners: Any) -> None:
    with pytest.raises((TypeError, ValueError)):
        Engine(listeners, **OPTIONS)


def test_more_listeners_than_there_are_numbers_for_are_refused() -> None:
    with pytest.raises(ValueError, match="listeners"):
        Engine([(-1, 0, False, False)] * 100_000, **OPTIONS)


def test_descriptors_are_left_alone_when_epoll_refuses_one(dispatch: str) -> None:
    listeners, port = open_tcp(dispatch)
    options = OPTIONS | {"percpu": dispatch == "percpu", "worker_count": 2}
    with tempfile.TemporaryFile() as file:
        before = os.listdir("/proc/self/fd")
        given = [*described(listeners), (file.fileno(), 0, False, False)]
        with pytest.raises(OSError, match="epoll_ctl") as refused:
            Engine(given, **options)
        assert refused.value.errno == errno.EPERM
        assert os.listdir("/proc/self/fd") == before
    with running(engine_on(listeners, dispatch)), connect(port) as client:
        assert echo(client, b"still here") == b"still here"


WITHOUT_DESCRIPTORS = """
import json, os, resource, socket, sys
from kecho.server._engine import Engine
spare, options = int(sys.argv[1]), json.loads(sys.argv[2])
listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
given = [(one.fileno(), queue, False, False) for queue, one in enumerate(listeners)]
before = os.listdir("/proc/self/fd")
most = given[-1][0] + 1 + spare
resource.setrlimit(resource.RLIMIT_NOFILE, (most, 1024))
try:
    Engine(given, **options)
except OSError as error:
    print(error.errno)
resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024))
print(before == os.listdir("/proc/self/fd"))
"""


@pytest.mark.parametrize("spare", [0, 1])
def test_descriptors_are_left_alone_when_there_are_not_enough(dispatch: str, spare: int) -> None:
    options = OPTIONS | {"percpu": dispatch == "percpu", "worker_count": 2}
    command = [sys.executable, "-c", WITHOUT_DESCRIPTORS, str(spare), json.dumps(options)]
    child = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    assert child.stdout.split() == [str(errno.EMFILE), "True"]


# ---- life -------------------------------------------------------------------------------------


def test_dropped_engine_that_never_ran_closes_its_listeners(dispatch: str, tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    listeners, port = open_tcp(dispatch)
    (unix,) = open_listeners(ServerConfig(uds=path, host=()), 2)
    engine = engine_on([*listeners, unix], dispatch)
    with connect(port) as waiting, connect(path):
        del engine
        with pytest.raises(ConnectionResetError):
            waiting.recv(1)
    assert refuses(port)
    with pytest.raises(ConnectionRefusedError):
        connect(path)
    unix.close()  # its file; the engine had the socket


def test_forgotten_engine_has_closed_all_and_is_no_trouble_afterwards(dispatch: str) -> None:
    before = os.listdir("/proc/self/fd")
    listeners, port = open_tcp(dispatch)
    engine = engine_on(listeners, dispatch)
    engine.forget()
    assert os.listdir("/proc/self/fd") == before
    assert refuses(port)
    # The numbers are free now, and what has them next is not the engine's to close.
    with ExitStack() as others:
        for _ in range(16):
            others.enter_context(socket.socket())
        opened = os.listdir("/proc/self/fd")
        del engine
        assert os.listdir("/proc/self/fd") == opened


@pytest.mark.parametrize("how", ["stop", "abort"])
def test_engine_without_connections_ends_when_told(dispatch: str, how: str) -> None:
    listeners, port = open_tcp(dispatch)
    engine = engine_on(listeners, dispatch)
    workers = Workers(engine)
    if how == "stop":
        engine.stop(60_000)
    else:
        engine.abort()
    assert workers.have_ended()
    assert not workers.failures
    assert refuses(port)


def test_engine_without_listeners_runs_and_stops(dispatch: str) -> None:
    engine = engine_on([], dispatch)
    with running(engine) as workers:
        engine.stop(0)
        assert workers.have_ended()


def test_stop_before_the_workers_run_still_serves_who_has_come(dispatch: str) -> None:
    listeners, port = open_tcp(dispatch)
    engine = engine_on(listeners, dispatch)
    with connect(port) as client:
        client.sendall(b"early")
        engine.stop(60_000)
        with running(engine) as workers:
            assert receive_until_end(client) == b"early"
            assert workers.have_ended()
    assert total(engine, "accepted") == total(engine, "closed", "drained") == 1
    assert refuses(port)


@pytest.mark.parametrize("early", [b"", b"early"])
def test_abort_before_the_workers_run_resets_who_has_come(dispatch: str, early: bytes) -> None:
    listeners, port = open_tcp(dispatch)
    engine = engine_on(listeners, dispatch)
    with connect(port) as client:
        client.sendall(early)
        engine.abort()
        with running(engine) as workers:
            assert workers.have_ended()
        receive_until_reset(client)
    assert total(engine, "active") == 0
    assert total(engine, "accepted") == total(engine, "closed", "aborted")
    assert refuses(port)


@pytest.mark.parametrize("sent", [b"", b"before"])
def test_abort_resets_open_connections(dispatch: str, sent: bytes) -> None:
    listeners, port = open_tcp(dispatch)
    engine = engine_on(listeners, dispatch)
    with connect(port) as client, running(engine) as workers:
        assert echo(client, sent) == sent
        wait_for(lambda: total(engine, "active") == 1, "the connection")
        engine.abort()
        assert workers.have_ended()
        assert receive_until_reset(client) == b""
    assert total(engine, "closed", "aborted") == 1


def test_commands_after_the_end_do_nothing(dispatch: str) -> None:
    listeners, _ = open_tcp(dispatch)
    engine = engine_on(listeners, dispatch)
    with running(engine) as workers:
        engine.stop(0)
        assert workers.have_ended()
    before = engine.counters()
    engine.stop(1000)
    engine.abort()
    assert engine.counters() == before


@contextmanager
def stuck(dispatch: str) -> Iterator[tuple[Engine, Workers]]:
    """An engine with a client that does not read, so that no drain comes to an end."""
    listeners, port = open_tcp(dispatch)
    for listener in listeners:
        listener.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    engine = engine_on(listeners, dispatch)
    with connect(port, receive_buffer=4096) as client, running(engine) as workers:
        client.setblocking(False)

        def has_backpressure() -> bool:
            with suppress(BlockingIOError):
                client.send(bytes(65536))
            return total(engine, "backpressure") > 0

        wait_for(has_backpressure, "backpressure")
        yield engine, workers


@pytest.mark.parametrize("how", ["stop", "abort"])
def test_second_command_ends_a_drain_that_waits_for_a_client(dispatch: str, how: str) -> None:
    with stuck(dispatch) as (engine, workers):
        engine.stop(600_000)
        assert not workers.have_ended(0.2)
        if how == "stop":
            engine.stop(0)
        else:
            engine.abort()
        assert workers.have_ended()
        assert total(engine, "closed", "aborted") == 1


def test_second_stop_does_not_put_the_deadline_off(dispatch: str) -> None:
    with stuck(dispatch) as (engine, workers):
        engine.stop(200)
        engine.stop(600_000)
        assert workers.have_ended()
        assert total(engine, "closed", "aborted") == 1
