"""Which socket of a SO_REUSEPORT group the kernel gives a connection to."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Iterator

import pytest

from kecho import steering
from kecho._engine import attach_cpu_steering
from kecho.cpus import usable_cpus
from kecho.steering import Group, steer_without_order
from support.clients import DEADLINE_S
from support.namespaces import Namespace

pytestmark = pytest.mark.privileged

ABSENT_CPUS = [4000, 4001, 4002]


@contextlib.contextmanager
def group_of(count: int) -> Iterator[list[socket.socket]]:
    with contextlib.ExitStack() as stack:
        port = 0
        sockets = []
        for _ in range(count):
            one = stack.enter_context(member(port))
            port = one.getsockname()[1]
            sockets.append(one)
        yield sockets


def member(port: int) -> socket.socket:
    one = socket.create_server(("127.0.0.1", port), reuse_port=True)
    one.settimeout(0)
    return one


def chosen(sockets: list[socket.socket], cpu: int) -> set[int]:
    """Which of them get connections whose SYN this CPU handles."""

    def visit() -> None:
        os.sched_setaffinity(0, {cpu})  # of this thread
        for _ in range(20):
            socket.create_connection(sockets[0].getsockname(), DEADLINE_S).close()

    thread = threading.Thread(target=visit)
    thread.start()
    thread.join(DEADLINE_S)
    found = set()
    for number, one in enumerate(sockets):
        with contextlib.suppress(BlockingIOError):
            while True:
                one.accept()[0].close()
                found.add(number)
    return found


def test_a_group_whose_order_is_lost_still_goes_by_cpu(inside: Namespace) -> None:
    cpus = usable_cpus()
    if len(cpus) < 2:
        pytest.skip("steering by CPU needs two CPUs")
    if not steering._CHOOSES_BY_INCOMING_CPU:
        pytest.skip("Linux 6.2 is the first that chooses by SO_INCOMING_CPU")
    of = [*cpus[:2], *ABSENT_CPUS]
    with group_of(len(of)) as sockets, contextlib.ExitStack() as stack:
        group = Group(list(range(len(of))), dict(enumerate(of)))
        attach_cpu_steering(sockets[0].fileno(), of)
        assert chosen(sockets, cpus[0]) == {0}
        assert chosen(sockets, cpus[1]) == {1}
        port = sockets[0].getsockname()[1]
        lost = [3, 0, 2]  # in an order that nobody is told
        for number in lost:
            sockets[number].close()
        for number in sorted(lost):
            sockets[number] = stack.enter_context(member(port))
        assert group.lost(sorted(lost))
        assert group.order is None
        steer_without_order(group, {n: one.fileno() for n, one in enumerate(sockets)})
        assert chosen(sockets, cpus[0]) == {0}
        assert chosen(sockets, cpus[1]) == {1}
        # And once more, of a group whose order was lost before.
        sockets[1].close()
        sockets[1] = stack.enter_context(member(port))
        assert group.lost([1])
        steer_without_order(group, {n: one.fileno() for n, one in enumerate(sockets)})
        assert chosen(sockets, cpus[1]) == {1}
