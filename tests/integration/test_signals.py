"""Signals: to `python -m kecho`, and to a program that calls kecho.serve()."""

from __future__ import annotations

import json
import os
import queue
import random
import re
import signal
import socket
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import kecho
from support.clients import (
    DEADLINE_S,
    connect,
    echo,
    plenty,
    random_bytes,
    receive_until_end,
    receive_until_reset,
    send_until_blocked,
    transfer,
    undelivered,
    wait_for,
)
from support.fixture_types import StartProcess
from support.server_process import ServerProcess, after, run_python

pytestmark = pytest.mark.e2e


STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
BLOCKED = "signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())"


@contextmanager
def reader_that_never_reads(port: int) -> Iterator[tuple[socket.socket, int]]:
    """A client, and how many bytes it has sent: as many as would go."""
    with connect(port, receive_buffer=4096, send_buffer=65536) as client:
        yield client, send_until_blocked(client, plenty())


# ---- the command --------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [*STOP_SIGNALS, signal.SIGHUP], ids=lambda number: number.name)
def test_a_signal_drains_and_exits_with_0(
    start_process: StartProcess, dispatch: str, number: signal.Signals
) -> None:
    process = start_process("--dispatch", dispatch, "--graceful-timeout=1000000")
    with (
        connect(process.port) as idle,
        reader_that_never_reads(process.port) as (client, sent),
    ):
        assert echo(idle, b"hello") == b"hello"
        # Until the server's side has every byte: what it has received is what a drain is about.
        head = b""
        while undelivered(client):
            head += client.recv(65536)
        process.send(number)
        process.wait_until_said(f"{number.name}: draining")
        assert receive_until_end(idle) == b""
        assert head + receive_until_end(client) == plenty()[:sent]
        assert process.wait() == 0
    summary = process.stderr.splitlines()[-1]
    assert "stopped after" in summary
    assert "2 connections accepted, 0 active" in summary
    assert f"{sent + 5:,} bytes in, {sent + 5:,} bytes out" in summary
    assert "drained=2" in summary


def test_clients_that_wait_to_be_accepted_are_part_of_the_drain(
    start_process: StartProcess, dispatch: str
) -> None:
    process = start_process("--dispatch", dispatch)
    with process.paused():
        clients = [connect(process.port) for _ in range(20)]
        for client in clients:
            client.sendall(b"hello")
        process.send(signal.SIGTERM)
    for client in clients:
        with client:
            assert receive_until_end(client) == b"hello"
    assert process.wait() == 0
    assert "drained=20" in process.stderr


@pytest.mark.parametrize("number", STOP_SIGNALS, ids=lambda number: number.name)
def test_a_second_signal_stops_at_once(
    start_process: StartProcess, dispatch: str, number: signal.Signals
) -> None:
    process = start_process("--dispatch", dispatch, "--graceful-timeout=1000000")
    with reader_that_never_reads(process.port) as (client, sent):
        process.send(number)
        process.wait_until_said("draining")
        assert process.process.poll() is None
        process.send(number)
        assert process.wait() == 0
        assert len(receive_until_reset(client)) < sent
    assert "at once" in process.stderr
    assert "aborted=1" in process.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    "number", [*STOP_SIGNALS, signal.SIGHUP, signal.SIGUSR1], ids=lambda number: number.name
)
def test_signals_until_the_very_end_do_not_change_the_status(
    start_process: StartProcess, dispatch: str, number: signal.Signals
) -> None:
    for _ in range(3):
        process = start_process("--dispatch", dispatch)
        process.send(signal.SIGTERM)
        while process.process.poll() is None:
            process.send(number)
            time.sleep(0.0005)
        assert process.wait() == 0
        assert "stopped after" in process.stderr


def test_a_signal_after_a_failure_does_not_change_the_status() -> None:
    script = """
        import os, signal, sys
        from kecho.server import cli, foreground

        def fail(*_):
            raise OSError(5, "it has failed")

        foreground._wait_for_signals = fail
        status = cli.main(["--port=0", "--no-sandbox"])
        os.kill(os.getpid(), signal.SIGTERM)
        sys.exit(status)
    """
    finished = run_python("-c", textwrap.dedent(script))
    assert finished.returncode == 1
    assert "it has failed" in finished.stderr


def test_a_drain_ends_at_its_timeout(start_process: StartProcess, dispatch: str) -> None:
    process = start_process("--dispatch", dispatch, "--graceful-timeout=0.2")
    with reader_that_never_reads(process.port) as (client, sent):
        assert process.stop() == 0
        assert len(receive_until_reset(client)) < sent
    assert "aborted=1" in process.stderr.splitlines()[-1]


def test_no_connection_is_accepted_during_the_drain(
    start_process: StartProcess, dispatch: str
) -> None:
    process = start_process("--dispatch", dispatch, "--graceful-timeout=1000000")
    with reader_that_never_reads(process.port):
        process.send(signal.SIGTERM)

        def is_refused() -> bool:
            try:
                connect(process.port).close()
            except ConnectionRefusedError:
                return True
            return False

        wait_for(is_refused, "new clients are refused")
        assert process.process.poll() is None
        process.send(signal.SIGTERM)
        assert process.wait() == 0


def test_a_storm_of_sigusr1_costs_no_byte(start_process: StartProcess, dispatch: str) -> None:
    process = start_process("--dispatch", dispatch)
    data = random_bytes(16 << 20)

    def storm() -> None:
        for _ in range(100):
            process.send(signal.SIGUSR1)
            time.sleep(0.001)  # otherwise several become one: signal(7)

    sender = threading.Thread(target=storm)
    with connect(process.port) as client:
        sender.start()
        try:
            assert transfer(client, data) == data
        finally:
            sender.join(DEADLINE_S)
    assert process.stop() == 0
    assert "echoes/s" in process.stderr
    assert f"{len(data):,} bytes in, {len(data):,} bytes out" in process.stderr.splitlines()[-1]


@pytest.mark.slow_under_sanitizers  # with one, Python itself takes longer to start than that
def test_sigterm_right_after_exec_ends_the_process(dispatch: str) -> None:
    delays = random.Random(0)
    for _ in range(16):
        with ServerProcess(["--dispatch", dispatch, "--threads=2"]) as process:
            time.sleep(delays.uniform(0, 0.150))
            process.send(signal.SIGTERM)
            status = process.wait()
        assert "Traceback" not in process.stderr
        if "listening" in process.stderr:
            assert status == 0
            assert "stopped after" in process.stderr
        else:
            assert status in (0, -signal.SIGTERM)


@pytest.mark.parametrize("first", [signal.SIGHUP, signal.SIGTERM], ids=lambda number: number.name)
def test_a_sighup_after_another_signal_does_not_cut_the_drain_short(
    start_process: StartProcess, first: signal.Signals
) -> None:
    process = start_process("--graceful-timeout=1000000")
    with reader_that_never_reads(process.port) as (client, sent):
        process.send(first)
        process.wait_until_said("draining")
        process.send(signal.SIGHUP)
        process.send(signal.SIGUSR1)  # which comes after it, and is told
        process.wait_until_said("echoes/s")
        assert "at once" not in process.stderr.replace("to stop at once", "")
        process.send(signal.SIGTERM)
        assert process.wait() == 0
        assert len(receive_until_reset(client)) < sent


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM], ids=lambda number: number.name)
def test_of_signals_that_the_parent_ignored_only_sighup_stays_ignored(
    number: signal.Signals,
) -> None:
    ignored = after(f"signal.signal({number:d}, signal.SIG_IGN)")
    with ServerProcess([], before=ignored) as process:
        process.wait_until_listening()
        process.send(number)
        if number == signal.SIGHUP:
            process.send(signal.SIGUSR1)  # handled after it
            process.wait_until_said("echoes/s")
            assert "draining" not in process.stderr
            process.send(signal.SIGTERM)
        assert process.wait() == 0


@pytest.mark.parametrize("number", [*STOP_SIGNALS, signal.SIGHUP], ids=lambda number: number.name)
def test_signals_that_the_parent_had_blocked_are_heard(
    dispatch: str, number: signal.Signals
) -> None:
    with ServerProcess(["--dispatch", dispatch], before=after(BLOCKED)) as process:
        process.wait_until_listening()
        process.send(signal.SIGUSR1)
        process.wait_until_said("echoes/s")
        process.send(number)
        assert process.wait() == 0


@pytest.mark.parametrize("module", ["kecho.bench", "kecho.drop"])
def test_every_command_hears_signals_that_its_parent_had_blocked(module: str) -> None:
    script = f"""
        import signal
        {BLOCKED}
        import {module}.cli as cli
        assert signal.pthread_sigmask(signal.SIG_BLOCK, ())
        try:
            cli.main(["--version"])
        except SystemExit:
            pass
        print(signal.pthread_sigmask(signal.SIG_BLOCK, ()))
    """
    finished = run_python("-c", textwrap.dedent(script))
    assert finished.stdout.splitlines()[-1] == "set()", finished.stderr


def test_sigstop_and_sigcont_lose_no_byte(start_process: StartProcess, dispatch: str) -> None:
    process = start_process("--dispatch", dispatch)
    data = random_bytes(32 << 20)
    received: list[bytes] = []
    with connect(process.port) as client:
        client.settimeout(2 * DEADLINE_S)
        transferring = threading.Thread(target=lambda: received.append(transfer(client, data)))
        with process.paused():
            transferring.start()  # so that the first stop at least is amid the traffic
        stops = 1
        while transferring.is_alive():
            with process.paused():
                stops += 1
        transferring.join(DEADLINE_S)
    assert received == [data]
    assert stops > 1
    assert process.stop() == 0


@pytest.mark.parametrize("disposition", ["SIG_DFL", "SIG_IGN"])
def test_the_disposition_of_sigpipe_is_irrelevant(
    tmp_path: Path, dispatch: str, disposition: str
) -> None:
    path = tmp_path / "socket"
    script = f"""
        import signal, socket, sys, kecho
        signal.signal(signal.SIGPIPE, signal.{disposition})
        with kecho.Server(uds=sys.argv[1], dispatch=sys.argv[2]) as server:
            def connected():
                client = socket.socket(socket.AF_UNIX)
                client.connect(sys.argv[1])
                return client
            # Gone before the server sends: EPIPE, at once and every time, on a Unix socket.
            for _ in range(100):
                with connected() as client:
                    client.send(b"x")
            with connected() as client:
                client.send(b"hello")
                assert client.recv(5) == b"hello"
            stats = server.stop()
            print(stats.accepted, stats.closed["reset"] > 0, stats.closed.total)
    """
    finished = run_python("-c", textwrap.dedent(script), str(path), dispatch)
    assert (finished.returncode, finished.stderr) == (0, "")
    assert finished.stdout == "101 True 101\n"


# ---- kecho.serve() ------------------------------------------------------------------------------

SERVE = """
    import json, signal, sys, kecho
    stats = kecho.serve(port=0, threads=2, dispatch=sys.argv[1],
                        on_start=lambda server: print("tcp x:%d listening on " % server.port,
                                                      file=sys.stderr, flush=True))
    assert isinstance(stats, kecho.Stats)
    print(json.dumps(stats.to_dict()))
"""


@pytest.mark.parametrize("number", [*STOP_SIGNALS, signal.SIGHUP], ids=lambda number: number.name)
@pytest.mark.parametrize("mask", ["", f"{BLOCKED}; "], ids=["", "blocked"])
def test_serve_returns_the_final_counters_upon_a_signal(
    dispatch: str, number: signal.Signals, mask: str
) -> None:
    before = after(f"{mask}sys.argv[2:] = ['-c', {textwrap.dedent(SERVE)!r}, {dispatch!r}]")
    with ServerProcess([], before=before) as process:
        process.wait_until_listening()
        with connect(process.port) as client:
            assert echo(client, b"hello") == b"hello"
        process.send(number)
        stdout, stderr = process.process.communicate(timeout=DEADLINE_S)
    assert (process.process.returncode, stderr) == (0, b"")
    stats = json.loads(stdout)
    assert (stats["accepted"], stats["bytes_sent"], stats["active"]) == (1, 5, 0)


class Interrupted(BaseException):
    """Not an Exception, as KeyboardInterrupt and SystemExit are not."""


def is_refused(port: int) -> bool:
    try:
        connect(port).close()
    except ConnectionRefusedError:
        return True
    return False


def test_serve_stops_the_server_when_on_start_raises(dispatch: str) -> None:
    ports = []

    def on_start(server: kecho.Server) -> None:
        ports.append(server.port)
        raise Interrupted

    with pytest.raises(Interrupted):
        kecho.serve(port=0, threads=2, dispatch=dispatch, on_start=on_start)
    assert is_refused(ports[0])


def test_serve_takes_a_keyboard_interrupt_for_a_stop(dispatch: str) -> None:
    def on_start(server: kecho.Server) -> None:
        with connect(server) as client:
            assert echo(client, b"hello") == b"hello"
        raise KeyboardInterrupt

    stats = kecho.serve(port=0, threads=2, dispatch=dispatch, on_start=on_start)
    assert stats.bytes_sent == 5
    assert stats.active == 0


def test_serve_in_the_main_thread_ends_when_another_thread_stops_the_server(
    dispatch: str,
) -> None:
    stoppers = []

    def on_start(server: kecho.Server) -> None:
        stoppers.append(threading.Thread(target=server.stop))
        stoppers[0].start()

    stats = kecho.serve(port=0, threads=2, dispatch=dispatch, on_start=on_start)
    stoppers[0].join(DEADLINE_S)
    assert stats.accepted == 0


@pytest.fixture
def own_signals() -> Iterator[Callable[[], dict[str, object]]]:
    """Handlers and a wake-up descriptor of the caller's own; gives what is set now."""
    read_fd, write_fd = os.pipe2(os.O_NONBLOCK)
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
    before = {number: signal.getsignal(number) for number in numbers}
    for number in numbers:
        signal.signal(number, lambda *_: None)
    before_fd = signal.set_wakeup_fd(write_fd)

    def state() -> dict[str, object]:
        fd = signal.set_wakeup_fd(-1)
        signal.set_wakeup_fd(fd)
        return {"fd": fd, **{number.name: signal.getsignal(number) for number in numbers}}

    yield state
    signal.set_wakeup_fd(before_fd)
    for number, handler in before.items():
        signal.signal(number, handler)
    os.close(read_fd)
    os.close(write_fd)


@pytest.mark.parametrize("number", STOP_SIGNALS, ids=lambda number: number.name)
def test_serve_puts_handlers_and_wakeup_descriptor_back(
    own_signals: Callable[[], dict[str, object]], number: signal.Signals
) -> None:
    before = own_signals()
    during = []

    def on_start(server: kecho.Server) -> None:
        during.append(own_signals())
        os.kill(os.getpid(), number)

    kecho.serve(port=0, threads=2, on_start=on_start)
    assert own_signals() == before
    assert during[0]["SIGINT"] != before["SIGINT"]
    assert during[0]["SIGTERM"] != before["SIGTERM"]
    assert during[0]["SIGUSR1"] == before["SIGUSR1"]
    assert during[0]["SIGHUP"] == before["SIGHUP"]  # the caller's own


def test_serve_puts_handlers_back_when_it_cannot_start(
    own_signals: Callable[[], dict[str, object]], start_server: Callable[..., kecho.Server]
) -> None:
    before = own_signals()
    with pytest.raises(kecho.ListenError):
        kecho.serve(port=start_server().port)
    assert own_signals() == before


def test_serve_in_another_thread_leaves_signals_alone(
    own_signals: Callable[[], dict[str, object]], dispatch: str
) -> None:
    before = own_signals()
    started: queue.Queue[kecho.Server] = queue.Queue()
    finished: queue.Queue[kecho.Stats] = queue.Queue()
    thread = threading.Thread(
        target=lambda: finished.put(
            kecho.serve(port=0, threads=2, dispatch=dispatch, on_start=started.put)
        )
    )
    thread.start()
    server = started.get(timeout=DEADLINE_S)
    assert own_signals() == before
    with connect(server) as client:
        assert echo(client, b"hello") == b"hello"
    server.stop()
    assert finished.get(timeout=DEADLINE_S).bytes_sent == 5
    thread.join(DEADLINE_S)
    assert own_signals() == before


def test_serve_in_another_thread_stops_when_on_start_raises(dispatch: str) -> None:
    ports: list[int] = []
    raised: queue.Queue[BaseException] = queue.Queue()

    def on_start(server: kecho.Server) -> None:
        ports.append(server.port)
        raise Interrupted

    def serve() -> None:
        try:
            kecho.serve(port=0, threads=2, dispatch=dispatch, on_start=on_start)
        except Interrupted as error:
            raised.put(error)

    thread = threading.Thread(target=serve)
    thread.start()
    assert raised.get(timeout=DEADLINE_S)
    thread.join(DEADLINE_S)
    assert is_refused(ports[0])


def test_a_signal_reaches_the_main_thread_and_no_worker(
    start_process: StartProcess, dispatch: str
) -> None:
    process = start_process("--dispatch", dispatch, "--threads=2")
    for status in Path(f"/proc/{process.pid}/task").glob("*/status"):
        found = re.search(r"^SigBlk:\s*(\w+)$", status.read_text(), re.MULTILINE)
        assert found
        is_worker = int(status.parent.name) != process.pid
        for number in (*STOP_SIGNALS, signal.SIGUSR1, signal.SIGHUP):
            assert bool(int(found[1], 16) >> (number - 1) & 1) == is_worker
