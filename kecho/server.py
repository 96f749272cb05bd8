"""Server: the threads, what they are given, and their orderly end."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
import warnings
import weakref
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING

from . import tuning
from ._engine import Engine, attach_cpu_steering
from .config import ServerConfig, check_timeout
from .cpus import usable_cpu_count, usable_cpus
from .listen import Address, Listener, describe_addresses, open_listeners
from .stats import Stats

if TYPE_CHECKING:
    from typing import Self

__all__ = ["Server"]

log = logging.getLogger("kecho")

# Left to a worker thread: a fault has to be reported where it happens.
_SYNCHRONOUS_SIGNALS = {
    signal.SIGABRT,
    signal.SIGBUS,
    signal.SIGFPE,
    signal.SIGILL,
    signal.SIGSEGV,
    signal.SIGTRAP,
}


class Server:
    """An echo server on threads of its own.

    Takes the options of kecho.ServerConfig as keyword arguments, and ``bench`` (0: shared,
    1: percpu). Raises OptionError (a ValueError) for a value that cannot be used and TypeError
    for an option that does not exist; nothing is opened before start().

    >>> with kecho.Server(port=0) as server:
    ...     client = socket.create_connection(server.addresses[0])

    It may be started again after it has stopped. Its methods may be called from any thread.
    A server that is forgotten while it runs is stopped when it is collected or the interpreter
    exits, with a ResourceWarning. After os.fork() the child has no part in it.
    """

    def __init__(self, **options: object) -> None:
        self.config = ServerConfig.from_options(options)
        self._lock = threading.Lock()
        self._run: _Run | None = None
        self._finalizer: weakref.finalize[[_Run, str], Server] | None = None

    @classmethod
    def from_config(cls, config: ServerConfig) -> Self:
        """A server with these very options."""
        server = cls()
        server.config = config
        return server

    def __repr__(self) -> str:
        state = "running" if self.is_running else "stopped"
        return f"<kecho.Server {describe_addresses(self.addresses)} {state}>"

    # ---- life ------------------------------------------------------------------------------

    def start(self) -> None:
        """Opens the listeners and starts the workers. Clients can connect when it returns.

        Raises ListenError (an OSError) when the system refuses a listener, OSError when it
        refuses anything else, RuntimeError when the server is running already.
        """
        with self._lock:
            if self.is_running:
                raise RuntimeError("the server is running already")
            run = self._run = _Run(self.config)
            self._finalizer = weakref.finalize(self, _stop_forgotten, run, repr(self))

    def stop(self, graceful_timeout: float | None = None) -> Stats:
        """Stops accepting, echoes what has been received, closes, and returns the final counters.

        graceful_timeout: seconds until connections that are still not done are reset; by default
        the option of that name. A connection is done when everything that it received has been
        handed back to the kernel; an idle one is, at once. Calling it again while another thread
        waits in it can bring the end forward. Raises what wait() raises; RuntimeError when the
        server was never started.
        """
        run = self._started()
        if graceful_timeout is None:
            graceful_timeout = self.config.graceful_timeout
        run.request_stop(check_timeout("graceful_timeout", graceful_timeout))
        self.wait()
        return run.stats()

    def abort(self) -> None:
        """Tells the server to stop at once, connections being reset. Does not wait for it."""
        self._started().abort()

    def request_stop(self) -> None:
        """Tells the server to stop, as stop() does, but does not wait for it."""
        self._started().request_stop(self.config.graceful_timeout)

    def wait(self, timeout: float | None = None) -> bool:
        """Waits until the server has stopped, or for `timeout` seconds; says whether it has.

        Raises, once, the OSError of a worker that had to give up; its text names the system call.
        """
        run = self._started()
        if not run.join(timeout):
            return False
        with self._lock:
            if self._finalizer is not None and run is self._run:
                self._finalizer.detach()
        failure = run.take_failure()
        if failure is not None:
            raise failure
        return True

    @property
    def is_running(self) -> bool:
        return self._run is not None and self._run.is_running

    def on_end(self, callback: Callable[[], object]) -> None:
        """Has `callback` called, on a worker's thread, when the last worker of this run ends."""
        self._started().on_end(callback)

    def _started(self) -> _Run:
        if self._run is None:
            raise RuntimeError("the server has not been started")
        return self._run

    # ---- what it is doing -------------------------------------------------------------------

    @property
    def addresses(self) -> tuple[Address, ...]:
        """Where it listens, or last listened, as getsockname() gives it: (host, port), for IPv6
        (host, port, flow, scope), the path for a Unix socket. Empty before the first start."""
        return self._run.addresses if self._run is not None else ()

    @property
    def port(self) -> int:
        """The first TCP port. Raises RuntimeError when there is none, or before the start."""
        for address in self.addresses:
            if not isinstance(address, str):
                return address[1]
        raise RuntimeError("the server has no TCP port" if self._run else "it was never started")

    @property
    def threads(self) -> int:
        """How many workers serve, or would by the present affinity and quota."""
        return self._run.thread_count if self._run is not None else _thread_count(self.config)

    def stats(self) -> Stats:
        """The counters now, or as they were in the end. Raises RuntimeError before the start."""
        return self._started().stats()

    # ---- context managers -------------------------------------------------------------------

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    async def __aenter__(self) -> Self:
        import asyncio

        # In a thread: resolving a host name may take its time.
        await asyncio.to_thread(self.start)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        import asyncio

        # Shielded: a task that is cancelled here still leaves a server that stops.
        await asyncio.shield(asyncio.to_thread(self.stop))


class _Run:
    """One run of a server, from its listeners to the last thread's end.

    The threads know this object and not the Server, so that a forgotten Server is collected.
    """

    def __init__(self, config: ServerConfig) -> None:
        self.thread_count = _thread_count(config)
        cpus = _cpus_of_workers(config, self.thread_count)
        listeners = open_listeners(config, self.thread_count)
        self._files = [listener.file for listener in listeners if listener.file is not None]
        self.addresses = tuple(dict.fromkeys(listener.address for listener in listeners))
        try:
            if config.dispatch == "percpu" and self.thread_count > 1:
                _steer(config, listeners, cpus)
            self._engine: Engine | None = Engine(
                [(one.socket.detach(), one.queue, one.is_unix) for one in listeners],
                percpu=config.dispatch == "percpu",
                worker_count=self.thread_count,
                max_connections=config.max_connections or 0,
                idle_timeout_ms=_milliseconds(config.idle_timeout or 0),
            )
        except BaseException:
            for listener in listeners:
                listener.close()
            raise
        if config.backlog > tuning.somaxconn():
            log.warning(
                "backlog: the kernel truncates %d to net.core.somaxconn = %d; to raise it: "
                "sysctl -w net.core.somaxconn=%d",
                config.backlog,
                tuning.somaxconn(),
                config.backlog,
            )
        self._pid = os.getpid()
        self._started_at = time.monotonic()
        self._final: Stats | None = None
        self._lock = threading.Lock()
        self._remaining = self.thread_count
        self._ended = threading.Event()
        self._callbacks: list[Callable[[], object]] = []
        self._failures: list[BaseException] = []
        self._threads = [
            threading.Thread(
                target=self._work,
                args=(index, cpus[index]),
                name=f"kecho-{index}",
                # At exit the interpreter would wait for other threads before it calls the
                # finalizer that ends these.
                daemon=True,
            )
            for index in range(self.thread_count)
        ]
        self._start_threads()

    def _start_threads(self) -> None:
        for index, thread in enumerate(self._threads):
            try:
                thread.start()
            except BaseException:
                # Out of threads, or interrupted. Every worker has to pass through its end for
                # the others to reach theirs: those without a thread do it on this one.
                self.abort()
                for missing in range(index, self.thread_count):
                    if self._threads[missing].ident is None:
                        self._work(missing, None)
                self.join(None)
                raise

    def _work(self, index: int, cpu: int | None) -> None:
        """A worker thread, from its first step to its last."""
        own_thread = threading.current_thread() is self._threads[index]
        try:
            if own_thread:
                # Signals are for the thread that waits for them.
                signal.pthread_sigmask(
                    signal.SIG_BLOCK, signal.valid_signals() - _SYNCHRONOUS_SIGNALS
                )
            if cpu is not None:
                try:
                    os.sched_setaffinity(0, {cpu})
                except OSError as error:
                    self.abort()
                    self._failures.append(
                        OSError(error.errno, f"sched_setaffinity: {error.strerror}, CPU {cpu}")
                    )
            assert self._engine is not None  # until the last worker has ended
            self._engine.run_worker(index)
        except BaseException as error:
            self._failures.append(error)
        finally:
            self._end_worker()

    def _end_worker(self) -> None:
        with self._lock:
            self._remaining -= 1
            if self._remaining:
                return
            self._final = self._stats_now()
            self._engine = None  # and with it its descriptors and buffers
            self._remove_files()
            callbacks, self._callbacks = self._callbacks, []
            self._ended.set()
        for callback in callbacks:
            callback()

    def _remove_files(self) -> None:
        if os.getpid() == self._pid:
            for file in self._files:
                file.remove()

    @property
    def is_running(self) -> bool:
        return self._pid == os.getpid() and not self._ended.is_set()

    def on_end(self, callback: Callable[[], object]) -> None:
        with self._lock:
            if not self._ended.is_set():
                self._callbacks.append(callback)
                return
        callback()

    def request_stop(self, graceful_timeout: float) -> None:
        with self._lock:
            if self._engine is not None:
                self._engine.stop(_milliseconds(graceful_timeout))

    def abort(self) -> None:
        with self._lock:
            if self._engine is not None:
                self._engine.abort()

    def join(self, timeout: float | None) -> bool:
        if os.getpid() != self._pid:
            return True
        if not self._ended.wait(timeout):
            return False
        for thread in self._threads:
            if thread.ident is not None and thread is not threading.current_thread():
                thread.join()
        return True

    def take_failure(self) -> BaseException | None:
        with self._lock:
            failure = self._failures[0] if self._failures else None
            self._failures.clear()
        return failure

    def stats(self) -> Stats:
        with self._lock:
            return self._final or self._stats_now()

    def _stats_now(self) -> Stats:
        assert self._engine is not None
        return Stats.of_workers(self._engine.counters(), time.monotonic() - self._started_at)


def _stop_forgotten(run: _Run, description: str) -> None:
    if run.is_running:
        warnings.warn(f"{description} was never stopped", ResourceWarning, stacklevel=2)
        run.request_stop(0)
        run.join(None)


def _milliseconds(seconds: float) -> int:
    return round(seconds * 1000)


def _thread_count(config: ServerConfig) -> int:
    return usable_cpu_count() if config.threads is None else config.threads


def _cpus_of_workers(config: ServerConfig, thread_count: int) -> list[int | None]:
    """The CPU that each worker is pinned to; None: not pinned."""
    if config.dispatch == "shared":
        return [None] * thread_count
    cpus = usable_cpus()
    return [cpus[index % len(cpus)] for index in range(thread_count)]


def _steer(config: ServerConfig, listeners: list[Listener], cpus: list[int | None]) -> None:
    """Has each CPU's connections go to the worker pinned there.

    Not with --reuse-port: other processes' sockets are in the same group, and the program would
    give them nothing. Nor with several workers on one CPU, of which only one would get anything.
    The kernel's hash spreads the connections then.
    """
    if config.reuse_port or len(set(cpus)) < len(cpus):
        log.warning(
            "dispatch: percpu spreads connections by hash and not by CPU %s",
            "with --reuse-port" if config.reuse_port else "with more threads than CPUs",
        )
        return
    for listener in listeners:
        if listener.queue == 0 and not listener.is_unix:
            attach_cpu_steering(listener.socket.fileno(), [cpu for cpu in cpus if cpu is not None])
