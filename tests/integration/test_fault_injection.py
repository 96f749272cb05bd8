"""Every call of the engine fails in every way that its manual page lists.

Whatever fails: no crash, no spin, never a wrong byte, a cut stream ends with a reset, the counters
say what happened, and once it is over everybody is served. The shim is not for sanitized servers,
whose runtime has to be the first library.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import re
import shutil
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from support import injected_faults
from support.clients import (
    connect,
    connected,
    echo,
    receive_exactly,
    wait_for,
    wait_until_delivered,
)
from support.injected_faults import Faults, errnos, short
from support.server_process import ServerProcess
from support.streams import exchange

pytestmark = [pytest.mark.e2e, pytest.mark.slow_under_sanitizers]

EPOLL_CTL_ADD, EPOLL_CTL_DEL, EPOLL_CTL_MOD = 1, 2, 3

# accept(2), with the network errors that it passes on.
ACCEPT_RETRIED = errnos(
    "ECONNABORTED EINTR EPROTO ENETDOWN ENOPROTOOPT EHOSTDOWN ENONET EHOSTUNREACH EOPNOTSUPP "
    "ENETUNREACH ETIMEDOUT EFAULT ENOSR ESOCKTNOSUPPORT EPROTONOSUPPORT"
)
ACCEPT_PAUSES = errnos("EMFILE ENFILE ENOBUFS ENOMEM EPERM EACCES")
LISTENER_GONE = errnos("EBADF EINVAL ENOTSOCK")
# recv(2), tcp(7), ip(7)
RECV = errnos(
    "EBADF ECONNREFUSED EFAULT EINVAL ENOMEM ENOTCONN ENOTSOCK ECONNRESET ETIMEDOUT ECONNABORTED "
    "EPIPE ENOBUFS EIO EHOSTUNREACH ENETUNREACH ENETDOWN EPROTO EACCES EPERM"
)
SEND = errnos(
    "EACCES EALREADY EBADF ECONNRESET EDESTADDRREQ EFAULT EINVAL EISCONN EMSGSIZE ENOBUFS ENOMEM "
    "ENOTCONN ENOTSOCK EOPNOTSUPP EPIPE ETIMEDOUT ECONNABORTED EIO EHOSTUNREACH ENETUNREACH "
    "ENETDOWN EPERM"
)
EPOLL_CTL = errnos("EBADF EEXIST EINVAL ELOOP ENOENT ENOMEM ENOSPC EPERM")
SETSOCKOPT = errnos("EBADF EFAULT EINVAL ENOPROTOOPT ENOTSOCK ENOMEM ENOBUFS EPERM")
CLOSE = errnos("EBADF EINTR EIO ENOSPC EDQUOT")
EPOLL_WAIT_FATAL = errnos("EBADF EFAULT EINVAL")
CLOSED_AS = {
    errno.ECONNRESET: "reset",
    errno.EPIPE: "reset",
    errno.ECONNABORTED: "reset",
    errno.ETIMEDOUT: "timed_out",
}
NO_MEMORY = (errno.ENOMEM, errno.ENOBUFS)


@pytest.fixture(scope="session")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("gcc")
    if compiler is None:
        pytest.skip("needs gcc, which compiles the shim")
    return injected_faults.build(compiler, tmp_path_factory.mktemp("build"))


class FaultyServer:
    """A server process with two workers, and the faults it meets."""

    def __init__(self, process: ServerProcess, injected: Faults) -> None:
        self.process = process
        self.faults = injected

    @property
    def port(self) -> int:
        return self.process.port

    def serves(self) -> None:
        """Fails unless it serves as if nothing had been."""
        assert exchange(self.port, 4, size_most=20_000) == Counter(whole=4)

    def calls_within(self, seconds: float) -> int:
        before = self.faults.calls()
        time.sleep(seconds)
        return self.faults.calls() - before

    def stop(self) -> dict[str, Any]:
        """Its last counters, which add up."""
        assert self.process.stop() == 0, self.process.stderr
        return self.final()

    def final(self) -> dict[str, Any]:
        stats: dict[str, Any] = json.loads(self.process.stderr.splitlines()[-1])["stats"]
        assert stats["active"] == 0
        assert stats["accepted"] == sum(stats["closed"].values())
        assert stats["bytes_sent"] <= stats["bytes_received"]
        return stats


StartFaulty = Callable[..., FaultyServer]


@pytest.fixture
def start_faulty(shim: Path, tmp_path: Path, dispatch: str) -> Iterator[StartFaulty]:
    """start_faulty(*arguments, before=None): before(faults) may have the start meet faults, and
    the server need not listen then."""
    started: list[FaultyServer] = []

    def start(
        *arguments: str, before: Callable[[Faults], object] | None = None, threads: int = 2
    ) -> FaultyServer:
        injected = Faults(shim, tmp_path / f"faults-{len(started)}")
        if before is not None:
            before(injected)
        arguments = ("--dispatch", dispatch, f"--threads={threads}", *arguments)
        process = ServerProcess(
            # In the sandbox connect() is refused, which stands in for SO_LINGER where that fails.
            [*arguments, "--no-sandbox", "--log-format=json", "--backlog=1000"],
            injected.environment,
        )
        started.append(FaultyServer(process, injected))
        if before is None:
            process.wait_until_listening()
            wait_for(lambda: injected.calls("epoll_wait"), "the shim sees the engine's calls")
        return started[-1]

    yield start
    for server in started:
        server.process.kill()
        server.faults.close()


@pytest.fixture
def faulty(start_faulty: StartFaulty) -> FaultyServer:
    return start_faulty()


def connect_from_each_cpu(port: int, count: int) -> list[socket.socket]:
    """Under percpu every queue gets some: on loopback the SYN is handled where it is sent."""
    cpus = sorted(os.sched_getaffinity(0))
    clients = []
    try:
        for number in range(count):
            os.sched_setaffinity(0, {cpus[number % len(cpus)]})
            clients.append(connect(port))
    finally:
        os.sched_setaffinity(0, cpus)
    return clients


# ---- accept ---------------------------------------------------------------------------------


def test_accept_goes_on_after_each_errno(faulty: FaultyServer) -> None:
    for error in ACCEPT_RETRIED + ACCEPT_PAUSES + [errno.EAGAIN]:
        faulty.faults.inject("accept4", [error], most=3)
        with connected(faulty.port, 3) as clients:
            assert [echo(client, b"hello") for client in clients] == [b"hello"] * 3
        assert faulty.faults.injected("accept4") >= 1, errno.errorcode[error]
        faulty.faults.clear()
    faulty.serves()
    stats = faulty.stop()
    assert stats["errors"]["descriptors"] > 0
    assert stats["errors"]["memory"] > 0
    assert stats["errors"]["accept"] > 0
    assert stats["closed"]["error"] == stats["errors"]["listener"] == 0


@pytest.mark.parametrize("error", [*ACCEPT_RETRIED, *ACCEPT_PAUSES], ids=errno.errorcode.get)
def test_an_accept_that_fails_for_ever_does_not_spin(faulty: FaultyServer, error: int) -> None:
    with connect(faulty.port) as inside:
        assert echo(inside, b"inside") == b"inside"
        faulty.faults.inject("accept4", [error])
        with connect(faulty.port) as waiting:
            waiting.sendall(b"waiting")
            wait_for(lambda: faulty.faults.injected("accept4"), "a fault")
            used_s = faulty.process.processor_time_s()
            # At most a turn of 64, and what belongs to it, for each listener every 100 ms.
            assert faulty.calls_within(0.5) < 5 * 2 * 3 * 80
            assert faulty.process.processor_time_s() - used_s < 0.25
            assert echo(inside, b"still here") == b"still here"
            faulty.faults.clear()
            assert receive_exactly(waiting, 7) == b"waiting"
    assert faulty.stop()["closed"]["eof"] == 2


def test_queues_without_descriptors_do_not_wake_each_other(faulty: FaultyServer) -> None:
    faulty.faults.inject("accept4", [errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM])
    clients = connect_from_each_cpu(faulty.port, 20)
    for client in clients:
        client.sendall(b"hello")
    wait_for(lambda: faulty.faults.injected("accept4") >= 2, "faults")
    assert faulty.calls_within(1) < 10 * 2 * 8
    faulty.faults.clear()
    for client in clients:
        with client:
            assert receive_exactly(client, 5) == b"hello"
    assert faulty.stop()["closed"]["eof"] == 20


@pytest.mark.parametrize("error", LISTENER_GONE, ids=errno.errorcode.get)
def test_a_listener_that_is_called_gone_and_is_not_is_tried_again(
    faulty: FaultyServer, error: int
) -> None:
    with connect(faulty.port) as inside:
        assert echo(inside, b"inside") == b"inside"
        faulty.faults.inject("accept4", [error], most=1)
        with connect(faulty.port) as waiting:
            wait_for(lambda: faulty.faults.injected("accept4"), "a fault")
            assert faulty.calls_within(0.3) < 200
            assert echo(inside, b"still here") == b"still here"
            assert echo(waiting, b"served") == b"served"
        errors = faulty.stop()["errors"]
        assert (errors["listener"], errors["accept"]) == (0, 1)


# ---- recv and send ----------------------------------------------------------------------------


def expected(broken: list[int], each: int, kind: str) -> tuple[Counter[str], Counter[str]]:
    """What so many faults by each errno make of `closed` and `errors`."""
    closed: Counter[str] = Counter()
    counted: Counter[str] = Counter()
    for error in broken:
        closed[CLOSED_AS.get(error, "error")] += each
        if error not in CLOSED_AS:
            counted["memory" if error in NO_MEMORY else kind] += each
    return closed, counted


@pytest.mark.parametrize(("call", "broken"), [("recv", RECV), ("send", SEND)])
def test_a_failed_call_ends_one_connection_with_a_reset(
    faulty: FaultyServer, call: str, broken: list[int]
) -> None:
    whole = 0
    for number, error in enumerate(broken):
        # Five streams may be no more than five calls; two of them are to fail.
        faulty.faults.inject(call, [error], skip=number % 4, most=2)
        ends = exchange(faulty.port, 5, seed=error)
        assert faulty.faults.injected(call) == 2
        faulty.faults.clear()
        assert ends == Counter(whole=3, reset=2), errno.errorcode[error]
        whole += ends["whole"]
    stats = faulty.stop()
    closed, counted = expected(broken, 2, call)
    assert Counter(stats["closed"]) == closed + Counter(eof=whole)
    assert Counter(stats["errors"]) == counted


@pytest.mark.parametrize("call", ["recv", "send"])
@pytest.mark.parametrize(
    "actions",
    [[errno.EAGAIN], [errno.EINTR], [short(1), short(7)], [short(1000), short(65535)]],
    ids=["EAGAIN", "EINTR", "short", "shorter"],
)
def test_a_call_that_does_less_loses_nothing(
    faulty: FaultyServer, call: str, actions: list[int]
) -> None:
    faulty.faults.inject(call, actions, every=2)
    size_most = 2_000 if actions[0] == short(1) else 300_000
    assert exchange(faulty.port, 20, size_most=size_most) == Counter(whole=20)
    assert faulty.faults.injected(call) >= 10
    faulty.faults.clear()
    stats = faulty.stop()
    assert stats["closed"]["eof"] == 20
    assert stats["bytes_received"] == stats["bytes_sent"]
    assert not sum(stats["errors"].values())


def test_interrupts_without_pause_are_lived_through(faulty: FaultyServer) -> None:
    for call in ("recv", "send", "accept4", "epoll_wait"):
        faulty.faults.inject(call, [errno.EINTR], chance=0.8, seed=1)
    assert exchange(faulty.port, 20) == Counter(whole=20)
    faulty.faults.clear()
    faulty.serves()
    assert faulty.stop()["closed"]["eof"] == 24


def test_a_unix_client_whose_urgent_bytes_would_be_lost_is_turned_away(
    start_faulty: StartFaulty, tmp_path: Path
) -> None:
    path = str(tmp_path / "socket")
    faulty = start_faulty("--port=0", f"--uds={path}")
    for error in SETSOCKOPT:
        faulty.faults.inject("setsockopt", [error], detail=socket.SO_OOBINLINE, most=1)
        with connect(path) as client:
            assert client.recv(1) == b""
        with connect(path) as client:
            client.sendall(b"or")
            client.send(b"d", socket.MSG_OOB)
            assert receive_exactly(client, 3) == b"ord"
        faulty.faults.clear()
    faulty.serves()
    assert faulty.stop()["errors"]["accept"] == len(SETSOCKOPT)


# ---- memory -------------------------------------------------------------------------------------


def test_backpressure_without_memory_is_a_reset(faulty: FaultyServer) -> None:
    faulty.faults.inject("send", [short(100)], every=4)
    faulty.faults.inject("malloc", [errno.ENOMEM], every=3)
    ends = exchange(faulty.port, 20)
    lost = faulty.faults.injected("malloc")
    faulty.faults.clear()
    assert ends["reset"] == lost > 0
    assert ends["whole"] == 20 - lost
    faulty.serves()
    stats = faulty.stop()
    assert stats["errors"]["memory"] == stats["closed"]["error"] == lost


def test_a_connection_without_a_record_is_reset(faulty: FaultyServer) -> None:
    faulty.faults.inject("aligned_alloc", [errno.ENOMEM])
    assert exchange(faulty.port, 5)["whole"] == 0
    refused = faulty.faults.injected("aligned_alloc")
    assert refused == 5
    faulty.faults.clear()
    faulty.serves()
    stats = faulty.stop()
    assert stats["errors"]["memory"] == refused
    assert stats["accepted"] == 4


# ---- epoll --------------------------------------------------------------------------------------


@pytest.mark.parametrize("operation", [EPOLL_CTL_ADD, EPOLL_CTL_MOD], ids=["add", "modify"])
def test_a_connection_that_epoll_refuses_is_reset(faulty: FaultyServer, operation: int) -> None:
    ends: Counter[str] = Counter()
    refused: Counter[str] = Counter()
    for error in EPOLL_CTL:
        if operation == EPOLL_CTL_MOD:
            faulty.faults.inject("send", [short(50)], every=2)  # backpressure
        faulty.faults.inject("epoll_ctl", [error], detail=operation, whose="other", most=2)
        now: Counter[str] = Counter()
        for _ in range(200):
            now += exchange(faulty.port, 10, seed=error)
            # Not always both, nor always one: what is over within a turn is not registered.
            if faulty.faults.injected("epoll_ctl"):
                break
        assert 1 <= now["reset"] == faulty.faults.injected("epoll_ctl"), errno.errorcode[error]
        refused["memory" if error in NO_MEMORY else "epoll"] += now["reset"]
        faulty.faults.clear()
        ends += now
    assert (ends["whole"] + ends["reset"]) % 10 == 0
    stats = faulty.stop()
    assert Counter(stats["closed"]) == Counter(eof=ends["whole"], error=ends["reset"])
    assert Counter(stats["errors"]) == refused


def test_a_listener_that_epoll_refuses_is_tried_again(faulty: FaultyServer) -> None:
    for operation, errors in ((EPOLL_CTL_ADD, EPOLL_CTL), (EPOLL_CTL_DEL, [errno.ENOENT])):
        for error in errors:
            faulty.faults.inject("epoll_ctl", [error], detail=operation, whose="listener", most=3)
            with faulty.process.paused():  # a listener with so many waiting is armed again
                clients = [connect(faulty.port) for _ in range(300)]
            for client in clients:
                with client:
                    assert echo(client, b"hello") == b"hello"
            assert faulty.faults.injected("epoll_ctl") >= 1, errno.errorcode[error]
            faulty.faults.clear()
    faulty.serves()
    assert not sum(faulty.stop()["errors"].values())


@pytest.mark.parametrize("error", EPOLL_WAIT_FATAL, ids=errno.errorcode.get)
def test_a_wait_that_fails_is_one_line_and_status_1(faulty: FaultyServer, error: int) -> None:
    with connected(faulty.port, 3) as clients:
        assert [echo(client, b"hello") for client in clients] == [b"hello"] * 3
        faulty.faults.inject("epoll_wait", [error], most=1)
        for client in clients:
            with pytest.raises((ConnectionResetError, BrokenPipeError)):
                assert all(iter(lambda client=client: echo(client, b"hello"), b"")), "end of file"
        assert faulty.process.wait() == 1
    said = [json.loads(line) for line in faulty.process.stderr.splitlines()]
    assert len(said) == 2
    assert said[1]["level"] == "error"
    assert "epoll_wait" in said[1]["message"]


def test_clients_whom_a_failed_worker_leaves_in_the_queues_are_told_apart_from_a_stop(
    start_faulty: StartFaulty,
) -> None:
    faulty = start_faulty("--max-connections=1")
    with contextlib.ExitStack() as stack:
        inside = stack.enter_context(connect(faulty.port))
        assert echo(inside, b"hello") == b"hello"
        for client in connect_from_each_cpu(faulty.port, 4):
            stack.enter_context(client)
        faulty.faults.inject("epoll_wait", [errno.EBADF], most=1)
        inside.sendall(b"hello")
        assert faulty.process.wait() == 1
    said = [json.loads(line)["message"] for line in faulty.process.stderr.splitlines()]
    # Once the one inside is closed, the other worker may still accept one of the four.
    wanted = "[34] clients that waited .*: a thread of the server failed"
    assert sum(re.match(wanted, one) is not None for one in said) == 1, said
    assert "told to stop" not in faulty.process.stderr


def test_a_wait_that_fails_in_a_drain_is_one_line_and_status_1(faulty: FaultyServer) -> None:
    with connect(faulty.port, receive_buffer=16_384) as silent:
        faulty.faults.inject("send", [short(1)])  # it is never done
        silent.sendall(bytes(60_000))
        wait_for(lambda: faulty.faults.injected("send"), "backpressure")
        faulty.faults.inject("epoll_wait", [errno.EBADF], skip=2)
        assert faulty.process.stop() == 1
    assert "epoll_wait" in faulty.process.stderr.splitlines()[-1]
    assert "Traceback" not in faulty.process.stderr


# ---- ending -------------------------------------------------------------------------------------


def test_close_closes_whatever_it_returns(faulty: FaultyServer) -> None:
    faulty.serves()
    before = len(os.listdir(f"/proc/{faulty.process.pid}/fd"))
    faulty.faults.inject("close", CLOSE)
    assert exchange(faulty.port, 20) == Counter(whole=20)
    wait_for(lambda: faulty.faults.injected("close") == 20, "all are closed")
    assert len(os.listdir(f"/proc/{faulty.process.pid}/fd")) == before
    assert faulty.stop()["closed"]["eof"] == 24  # its listeners are closed by then, too


def test_a_cut_stream_is_reset_though_linger_cannot_be_set(faulty: FaultyServer) -> None:
    cut = 0
    for error in SETSOCKOPT:
        faulty.faults.inject("setsockopt", [error], detail=socket.SO_LINGER)
        faulty.faults.inject("send", [errno.EIO], skip=5, every=7, most=3)
        ends = exchange(faulty.port, 8, seed=error, size_most=600_000)
        assert 0 < ends["reset"] == faulty.faults.injected("setsockopt")
        assert ends["reset"] == faulty.faults.injected("send")
        cut += ends["reset"]
    faulty.faults.clear()
    faulty.serves()
    assert faulty.stop()["closed"]["error"] == cut


@pytest.mark.parametrize("error", [errno.EINTR, errno.EAGAIN], ids=errno.errorcode.get)
def test_a_stop_reaches_everybody_though_waking_fails(faulty: FaultyServer, error: int) -> None:
    faulty.serves()
    faulty.faults.inject("eventfd_write", [error], most=5)
    faulty.faults.inject("sched_yield", [errno.ENOSYS])
    with connected(faulty.port, 4) as idle:
        assert [echo(client, b"hello") for client in idle] == [b"hello"] * 4
        assert faulty.stop()["closed"]["drained"] == 4
    assert faulty.faults.injected("eventfd_write") > 0


def test_a_drain_amid_faults_echoes_what_was_received(faulty: FaultyServer) -> None:
    with connected(faulty.port, 10) as clients:
        with faulty.process.paused():
            for number, client in enumerate(clients):
                client.sendall(b"%d" % number * 5_000)
            wait_until_delivered(*clients)
            faulty.faults.inject("recv", [errno.EINTR, short(999)], every=2)
            faulty.faults.inject("send", [errno.EINTR, errno.EAGAIN, short(999)], every=2)
            faulty.faults.inject("epoll_wait", [errno.EINTR], every=2)
            faulty.faults.inject("close", CLOSE)
            faulty.process.process.terminate()
        for number, client in enumerate(clients):
            assert receive_exactly(client, 5_001) == b"%d" % number * 5_000
    assert faulty.process.wait() == 0
    assert faulty.final()["closed"]["drained"] == 10


# ---- the start ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "errors"),
    [
        ("epoll_create1", errnos("EMFILE ENFILE ENOMEM")),
        ("eventfd", errnos("EMFILE ENFILE ENODEV ENOMEM")),
        ("epoll_ctl", errnos("ENOMEM ENOSPC EPERM")),
        ("aligned_alloc", errnos("ENOMEM ENOMEM ENOMEM ENOMEM ENOMEM")),
    ],
)
def test_a_start_that_fails_is_one_line_and_status_1(
    start_faulty: StartFaulty, dispatch: str, call: str, errors: list[int]
) -> None:
    # Not always the first call; under shared some are made once only.
    once = dispatch == "shared" and call in ("epoll_create1", "eventfd")
    for number, error in enumerate(errors):
        server = start_faulty(
            before=lambda injected, error=error, skip=0 if once else number: injected.inject(
                call,
                [error],
                skip=skip % (5 if call == "aligned_alloc" else 2),
                detail=EPOLL_CTL_ADD if call == "epoll_ctl" else 0,
            )
        )
        assert server.process.wait() == 1, server.process.stderr
        said = [json.loads(line) for line in server.process.stderr.splitlines()]
        assert len(said) == 1, server.process.stderr
        assert said[0]["message"] == f"{call}: {os.strerror(error)}"


# ---- everything at once -------------------------------------------------------------------------

PASSING = {
    "accept4": [*ACCEPT_RETRIED, *ACCEPT_PAUSES, errno.EAGAIN],
    "recv": [*RECV, errno.EAGAIN, errno.EINTR, *map(short, (1, 2, 100, 5_000, 65_535))],
    "send": [*SEND, errno.EAGAIN, errno.EINTR, *map(short, (1, 2, 100, 5_000, 65_535))],
    "epoll_wait": [errno.EINTR],
    "close": CLOSE,
    "malloc": [errno.ENOMEM],
    "aligned_alloc": [errno.ENOMEM],
    "setsockopt": SETSOCKOPT,
    "sched_yield": [errno.ENOSYS],
    "eventfd_write": [errno.EINTR, errno.EAGAIN],
}


def test_any_mix_of_faults_gives_no_wrong_byte(faulty: FaultyServer) -> None:
    """FAULT_MIXES=500 tries so many mixes; FAULT_SEED=N begins with that one."""
    mixes = int(os.environ.get("FAULT_MIXES", "10"))
    first = int(os.environ.get("FAULT_SEED", random.randrange(1 << 30)))
    for seed in range(first, first + mixes):
        print(f"FAULT_SEED={seed}")
        chance = random.Random(seed)
        for call in chance.sample(sorted(PASSING), chance.randint(1, len(PASSING))):
            actions = chance.sample(PASSING[call], chance.randint(1, len(PASSING[call])))
            rate = chance.choice([0.002, 0.02, 0.2])
            faulty.faults.inject(call, actions, chance=rate, seed=seed)
        for operation in chance.sample([EPOLL_CTL_ADD, EPOLL_CTL_MOD], chance.randint(0, 1)):
            faulty.faults.inject(
                "epoll_ctl", EPOLL_CTL, detail=operation, whose="other", chance=0.05, seed=seed
            )
        exchange(faulty.port, 20, seed=seed, size_most=100_000)
        faulty.faults.clear()
        faulty.serves()
    stats = faulty.stop()
    assert stats["closed"]["eof"] >= 4 * mixes
    assert faulty.faults.calls("accept4", "recv", "send", "epoll_wait") > 0
