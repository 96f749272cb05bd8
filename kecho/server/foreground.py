"""Run a server in the foreground: the calling thread waits for signals until it stops."""

from __future__ import annotations

import math
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TYPE_CHECKING

from ..errors import naming
from ..system import names
from .server import Server
from .stats import Stats

if TYPE_CHECKING:
    from typing import Unpack

    from .keywords import ServerOptions

__all__ = ["run", "serve"]

_STOPS = (signal.SIGINT, signal.SIGTERM)


def serve(
    *, on_start: Callable[[Server], object] | None = None, **options: Unpack[ServerOptions]
) -> Stats:
    """Run an echo server until SIGINT, SIGTERM or SIGHUP. Return the final counters.

    >>> kecho.serve(port=12345)

    The keyword arguments are those of kecho.Server. on_start is called with the Server when clients
    can connect.

    The first signal drains (see Server.stop()); a second SIGINT or SIGTERM stops at once. SIGHUP is
    left alone if the caller ignores it, as nohup(1) does, or handles it. A signal during the lookup
    of a host name ends serve() with empty counters. On a thread other than the main one, serve()
    leaves all signals alone: stop the Server that on_start receives. Raises what Server(), start()
    and wait() raise.
    """
    return run(Server(**options), on_start=on_start)


def run(
    server: Server,
    *,
    on_listening: Callable[[], object] | None = None,
    on_start: Callable[[Server], object] | None = None,
    on_stop_signal: Callable[[int], object] | None = None,
    report: Callable[[Server], object] | None = None,
    report_interval: float | None = None,
    is_last: bool = False,
    heartbeat: Callable[[], object] | None = None,
    heartbeat_interval: float | None = None,
) -> Stats:
    """Run a server until a signal: what serve() and the command share.

    on_listening: see Server.start().
    on_start: called when clients can connect. Signals are handled after it has returned.
    on_stop_signal: called with the signal's number after the server was told to stop.
    report: called every `report_interval` seconds, and for SIGUSR1.
    is_last: the process ends afterwards; a late signal does not change its exit status.
    heartbeat: called every `heartbeat_interval` seconds while the workers run.
    """
    if threading.current_thread() is not threading.main_thread():
        server.start(on_listening)
        if on_start is not None:
            _call_or_stop(server, on_start)
        server.wait()
        return server.stats()

    signals = [*_STOPS]
    if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:
        signals.append(signal.SIGHUP)
    if report is not None:
        signals.append(signal.SIGUSR1)
    with _signals_in_a_pipe(signals, is_last) as pipe:
        pipe.is_starting = True
        try:
            server.start(on_listening)
        except _AskedToStop:
            return Stats()
        finally:
            pipe.is_starting = False
            names.go_on()
        try:
            server.on_end(pipe.wake)
            if on_start is not None:
                on_start(server)
            timers = [
                _Timer(interval, callback)
                for interval, callback in (
                    (report_interval, lambda: report(server) if report is not None else None),
                    (heartbeat_interval, heartbeat),
                )
                if interval is not None and callback is not None
            ]
            _wait_for_signals(server, pipe, on_stop_signal, report, timers)
        except KeyboardInterrupt:
            server.stop()
        except BaseException:
            _stop_quietly(server)
            raise
        server.wait()
        return server.stats()


class _AskedToStop(BaseException):
    """A signal came while a host name was looked up."""


def _call_or_stop(server: Server, on_start: Callable[[Server], object]) -> None:
    try:
        on_start(server)
    except BaseException:
        _stop_quietly(server)
        raise


def _stop_quietly(server: Server) -> None:
    """Stop while an exception propagates, which says more than the server's own would."""
    with suppress(OSError):
        server.stop()


class _Timer:
    """Calls `callback` every `interval_s` seconds. It skips the times that it missed."""

    def __init__(self, interval_s: float, callback: Callable[[], object]) -> None:
        self._interval_s = interval_s
        self._callback = callback
        self._due = time.monotonic() + interval_s

    def until_due_s(self) -> float:
        return max(0.0, self._due - time.monotonic())

    def run_if_due(self) -> None:
        now = time.monotonic()
        if now >= self._due:
            self._callback()
            self._due = max(self._due + self._interval_s, now)


def _wait_for_signals(
    server: Server,
    pipe: _SignalPipe,
    on_stop_signal: Callable[[int], object] | None,
    report: Callable[[Server], object] | None,
    timers: list[_Timer],
) -> None:
    """Handle signals and timers until the server has ended."""
    asked_to_stop = False
    while server.is_running:
        timeout = min((timer.until_due_s() for timer in timers), default=None)
        for number in pipe.read(timeout):
            if number == signal.SIGUSR1:
                if report is not None:
                    report(server)
                continue
            if not asked_to_stop and number in (*_STOPS, signal.SIGHUP):
                server.request_stop()
            elif number in _STOPS:
                server.abort()
            else:
                # A terminal that closes sends SIGHUP twice, by the kernel and by its shell; so do
                # managers right after SIGTERM (SendSIGHUP= of systemd.kill(5)).
                continue
            asked_to_stop = True
            if on_stop_signal is not None:
                on_stop_signal(number)
        for timer in timers:
            timer.run_if_due()


class _SignalPipe:
    """Delivers the numbers of signals, and a zero for any other reason to wake up."""

    def __init__(self) -> None:
        with naming("pipe2"):
            self._read_fd, self.write_fd = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._lock = threading.Lock()
        self._poll = select.poll()
        self._poll.register(self._read_fd, select.POLLIN)
        self.is_starting = False

    def handle(self, number: int, frame: FrameType | None) -> None:
        """End the lookup of a host name. Otherwise the wake-up descriptor delivers the number."""
        if self.is_starting and number != signal.SIGUSR1:
            names.give_up(_AskedToStop())

    def read(self, timeout: float | None) -> bytes:
        """Return what has arrived. Wait for at most `timeout` seconds."""
        # Round up: a thread that wakes too early spins until the time has come.
        timeout_ms = None if timeout is None else math.ceil(timeout * 1000)
        return os.read(self._read_fd, 512) if self._poll.poll(timeout_ms) else b""

    def wake(self) -> None:
        """Wake the reader, from any thread at any time."""
        with self._lock:
            if self.write_fd >= 0:
                # A full pipe wakes its reader anyway.
                with suppress(BlockingIOError):
                    os.write(self.write_fd, b"\0")

    def close(self) -> None:
        with self._lock:
            os.close(self._read_fd)
            os.close(self.write_fd)
            self.write_fd = -1


@contextmanager
def _signals_in_a_pipe(signals: list[signal.Signals], is_last: bool) -> Iterator[_SignalPipe]:
    """Write the numbers of `signals` to a pipe and handle them in no other way.

    They are unblocked: a blocked signal survives exec, see signal(7). The pipe also reports the
    server's end, so that one wait is enough and no code runs inside a signal handler. Afterwards
    the previous handlers are restored. With is_last, the signals are ignored instead.
    """
    pipe = _SignalPipe()
    previous_fd = signal.set_wakeup_fd(pipe.write_fd, warn_on_full_buffer=False)
    with naming("sigaction"):
        previous = {number: signal.signal(number, pipe.handle) for number in signals}
    with naming("sigprocmask"):
        previous_mask = signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
    try:
        yield pipe
    finally:
        if is_last:
            previous = dict.fromkeys(previous, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_SETMASK, previous_mask)
        for number, handler in previous.items():
            # None: it was not set from Python, and cannot be put back from here.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        try:
            signal.set_wakeup_fd(previous_fd)
        except (OSError, ValueError):  # it was closed meanwhile
            signal.set_wakeup_fd(-1)
        pipe.close()
