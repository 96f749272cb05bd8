"""What clients that send and never read cost the machine, where the kernel echoes and where not.

MemAvailable is everybody's: on a busy machine it moves by tens of MiB a second. So what one
client costs is the least of several rounds, and a bound has to be broken in each of them.
"""

from __future__ import annotations

import contextlib
import re
import resource
import selectors
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from clients import connect, reset, wait_for
from engines import needs_sockmap
from processes import ServerProcess

pytestmark = [pytest.mark.e2e, pytest.mark.slow_under_sanitizers]

StartProcess = Callable[..., ServerProcess]

MIB = 1 << 20
BOUND_BYTES = 4 * MIB  # beyond socket buffers, for one connection
MOST_BYTES = 256 * MIB  # --max-buffer-memory
NOISE_BYTES = 48 * MIB
PIECE = bytes(1 << 16)
SEND_BUFFER_BYTES = 512 << 10  # with a small one the client waits for delayed acknowledgements
ROUNDS = {1: 3, 1000: 2}


def available_bytes() -> int:
    found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    assert found
    return int(found[1]) << 10


@pytest.fixture
def _descriptors() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def push(clients: list[socket.socket], seconds: float) -> None:
    """Sends whatever is taken; who is reset is left alone."""
    with selectors.DefaultSelector() as selector:
        for client in clients:
            client.setblocking(False)
            selector.register(client, selectors.EVENT_WRITE)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for key, _ in selector.select(0.1):
                try:
                    key.fileobj.send(PIECE)  # type: ignore[union-attr]
                except BlockingIOError:
                    pass
                except ConnectionError:
                    selector.unregister(key.fileobj)


def cost(port: int, count: int) -> int:
    """By how much MemAvailable has fallen when it falls no more; and that it rises again."""
    clients: list[socket.socket] = []
    with contextlib.ExitStack() as stack:
        before = available_bytes()
        for _ in range(count):
            clients.append(connect(port, receive_buffer=4096, send_buffer=SEND_BUFFER_BYTES))
            stack.callback(reset, clients[-1])
        push(clients, 1)
        fell = before - available_bytes()
        for _ in range(10):
            before_this = fell
            push(clients, 1)
            fell = before - available_bytes()
            if fell - before_this < NOISE_BYTES // 2:
                break
        else:
            pytest.fail(f"it grows on: {fell // MIB} MiB")
    left = max(NOISE_BYTES, fell // 4)  # others take some meanwhile
    wait_for(lambda: before - available_bytes() < left, "the memory is given back")
    return fell


@pytest.mark.usefixtures("_descriptors")
@needs_sockmap
@pytest.mark.parametrize("count", [1, 1000])
def test_clients_that_never_read_cost_no_more_than_the_bound_beyond_what_epoll_costs(
    start_process: StartProcess, count: int
) -> None:
    options = ["--backlog=4096", f"--max-buffer-memory={MOST_BYTES}"]
    servers = {name: start_process("--engine", name, *options) for name in ("epoll", "sockmap")}
    costs: dict[str, list[int]] = {name: [] for name in servers}
    for _ in range(ROUNDS[count]):
        for name, server in servers.items():
            costs[name].append(cost(server.port, count))
    more = min(costs["sockmap"]) - min(costs["epoll"])
    print({name: [one // MIB for one in each] for name, each in costs.items()})
    assert more < min(count * BOUND_BYTES, MOST_BYTES) + NOISE_BYTES, costs
