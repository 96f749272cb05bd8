"""percpu: which worker a connection comes to, by the CPU of its SYN."""

from __future__ import annotations

import errno
import os
import socket
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

import kecho
from kecho.server._engine import attach_cpu_steering
from kecho.system.cpus import usable_cpus
from support.bare_engine import engine_on, open_tcp, running
from support.clients import (
    DEADLINE_S,
    connect,
    echo,
)

CLIENTS_PER_CPU = 20


@pytest.mark.parametrize(
    ("cpus", "error"),
    [
        ([], ValueError),
        ([0] * 1025, ValueError),
        (None, TypeError),
        ((0, 1), TypeError),
        ([-1], OverflowError),
        ([2**32], OverflowError),
        (["0"], TypeError),
        ([None], TypeError),
    ],
)
def test_cpu_lists_that_make_no_sense_are_refused(cpus: Any, error: type[Exception]) -> None:
    listeners, _ = open_tcp("percpu")
    try:
        with pytest.raises(error):
            attach_cpu_steering(listeners[0].socket.fileno(), cpus)
    finally:
        for listener in listeners:
            listener.close()


def test_steering_takes_as_many_cpus_as_there_can_be_threads() -> None:
    listeners, _ = open_tcp("percpu")
    try:
        attach_cpu_steering(listeners[0].socket.fileno(), list(range(1024)))
    finally:
        for listener in listeners:
            listener.close()


def test_steering_is_refused_where_there_is_no_group() -> None:
    with pytest.raises(OSError, match="SO_ATTACH_REUSEPORT_CBPF") as refused:
        attach_cpu_steering(-1, [0])
    assert refused.value.errno == errno.EBADF
    with (
        socket.create_server(("127.0.0.1", 0)) as alone,
        pytest.raises(OSError, match="SO_ATTACH_REUSEPORT_CBPF"),
    ):
        attach_cpu_steering(alone.fileno(), [0])


@pytest.fixture
def two_cpus() -> list[int]:
    cpus = usable_cpus()[:2]
    if len(cpus) < 2:
        pytest.skip("this process may use one CPU only")
    for mask in Path("/sys/class/net/lo/queues").glob("rx-*/rps_cpus"):
        if mask.read_text().strip("0,\n"):
            pytest.skip("packets of the loopback change their CPU here: rps_cpus")
    return cpus


def connect_from(cpu: int, port: int, count: int = CLIENTS_PER_CPU) -> list[socket.socket]:
    """Clients whose packets this CPU handles, each of which has been served."""
    clients: list[socket.socket] = []
    failures: list[BaseException] = []

    def run() -> None:
        try:
            os.sched_setaffinity(0, {cpu})  # of this thread
            for _ in range(count):
                clients.append(connect(port))
                assert echo(clients[-1], b"x") == b"x"
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(DEADLINE_S)
    if failures:
        for client in clients:
            client.close()
        raise failures[0]
    assert not thread.is_alive()
    return clients


def test_percpu_server_gives_clients_to_the_worker_of_their_cpu(
    start_server: Callable[..., kecho.Server], two_cpus: list[int]
) -> None:
    server = start_server(dispatch="percpu", threads=2)
    expected = [0, 0]
    with ExitStack() as clients:
        for turn in (0, 1, 1, 0, 1):
            for client in connect_from(two_cpus[turn], server.port):
                clients.enter_context(client)
            expected[turn] += CLIENTS_PER_CPU
            assert [worker.accepted for worker in server.stats().workers] == expected


def test_steering_follows_the_list_and_not_the_number_of_the_cpu(two_cpus: list[int]) -> None:
    for cpus in (two_cpus, two_cpus[::-1]):
        listeners, port = open_tcp("percpu")
        attach_cpu_steering(listeners[0].socket.fileno(), cpus)
        engine = engine_on(listeners, "percpu")
        with running(engine), ExitStack() as clients:
            for client in connect_from(cpus[0], port):
                clients.enter_context(client)
            assert [worker["accepted"] for worker in engine.counters()] == [CLIENTS_PER_CPU, 0]
            for client in connect_from(cpus[1], port, 3):
                clients.enter_context(client)
            assert [worker["accepted"] for worker in engine.counters()] == [CLIENTS_PER_CPU, 3]


def test_steering_spreads_cpus_that_are_not_in_the_list_by_number(two_cpus: list[int]) -> None:
    listeners, port = open_tcp("percpu")
    attach_cpu_steering(listeners[0].socket.fileno(), [100_000, 100_001])
    engine = engine_on(listeners, "percpu")
    expected = [0, 0]
    with running(engine), ExitStack() as clients:
        for cpu in two_cpus:
            for client in connect_from(cpu, port):
                clients.enter_context(client)
            expected[cpu % 2] += CLIENTS_PER_CPU
            assert [worker["accepted"] for worker in engine.counters()] == expected
