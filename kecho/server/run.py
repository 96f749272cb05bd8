"""One run of a server: its threads and what they are given, from the listeners to the last
thread's end."""

from __future__ import annotations

import errno
import logging
import math
import os
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ListenerLostError
from ..system import sysctl
from ..system.cgroups import cgroup_memory_limit
from ..system.cpus import usable_cpu_count
from ._engine import Engine, attach_cpu_steering, try_io_uring
from .access import rules_of
from .busy_poll import busy_poll_of
from .config import ServerConfig
from .engines.io_uring import ring_entries
from .engines.sockmap import open_flows
from .sockets.addresses import Address, describe_addresses
from .sockets.memory import memory_in_force
from .sockets.steering import cpus_of_workers, steer
from .sockets.udp import Datagrams, open_everything, udp_worker_count
from .sockets.unix import SocketFile
from .stats import AcceptQueue, Stats
from .watch import INTERVAL_S, Place, Watch

if TYPE_CHECKING:
    from ._udp import Echo

__all__ = ["Run", "buffer_bytes", "thread_count"]

_BUFFER_BYTES = 256 << 20
_BUFFER_SHARE = 4  # of a cgroup's memory: the process takes some 20 MiB, and sockets are in it, too
_BUFFER_GRAIN = 1 << 20

_LOG_BLOCKED_S = 5.0  # how long an end waits for a line that nobody reads
_FINISH_TIMEOUT_S = 60.0  # without write_timeout: for one that takes nothing after its half-close

log = logging.getLogger("kecho")

# All but those that a fault raises, which have to be reported where it happens.
_ASYNCHRONOUS_SIGNALS = signal.valid_signals() - {
    signal.SIGABRT,
    signal.SIGBUS,
    signal.SIGFPE,
    signal.SIGILL,
    signal.SIGSEGV,
    signal.SIGTRAP,
}


class Run:
    """Opens everything when it is made, runs from start() until it is told to stop, and is over
    then: the next run is another object.

    The threads know this object and not the Server, so that a forgotten Server is collected.
    """

    def __init__(self, config: ServerConfig) -> None:
        self.thread_count = thread_count(config)
        self.buffer_bytes = buffer_bytes(config)
        self._cpus = cpus_of_workers(config, self.thread_count)
        udp_count = udp_worker_count(config, self.thread_count)
        self._final: Stats | None = None
        self._lock = threading.RLock()
        self._taken: set[int] = set()  # indices of the workers that somebody runs, or has run
        self._remaining = self.thread_count + udp_count
        self._prepared = threading.Semaphore(0)  # a worker has done what may fail on its thread
        self._ended = threading.Event()
        self._callbacks: list[Callable[[], object]] = []
        self._failures: list[BaseException] = []
        self._unaccepted = (0, 0, 0)  # clients, errno, clients left to other holders
        # Daemons: at exit the interpreter would wait for other threads before it calls the
        # finalizer that ends these.
        self._threads = [
            threading.Thread(target=self._work, args=(index,), name=name, daemon=True)
            for index, name in enumerate(
                [f"kecho-{index}" for index in range(self.thread_count)]
                + [f"kecho-udp-{index}" for index in range(udp_count)]
            )
        ]
        self._watcher = threading.Thread(target=self._look_after, name="kecho-watch", daemon=True)
        self._watch: Watch | None = None
        self._places: list[Place] = []
        self._graceful_timeout = config.graceful_timeout
        self._started_at = time.monotonic()
        self._files: list[SocketFile] = []
        self.engine = "epoll"
        self.socket_memory: int | None = None
        self.addresses: tuple[Address, ...] = ()
        self.udp_addresses: tuple[Address, ...] = ()
        self.backlogs: tuple[int, ...] = ()
        self._engine: Engine | None = None
        self._udp: Echo | None = None
        self._shares_ports = config.reuse_port and bool(config.host)
        # Where nothing can be opened any more (the sandbox), what it is now has to do.
        self._migrates = sysctl.migrates_requests() if self._shares_ports else None
        if config.host or config.uds is not None:
            _warn_of_truncation(config.backlog)
        self._busy_poll = busy_poll_of(config, self.thread_count)
        self._open(config)
        _runs.add(self)

    def _open(self, config: ServerConfig) -> None:
        """The sockets, and the engine and the UDP echo that take them over."""
        listeners, datagrams = open_everything(config, self.thread_count)
        flows: tuple[int, ...] = ()
        try:
            self._files = [listener.file for listener in listeners if listener.file is not None]
            self.addresses = tuple(dict.fromkeys(listener.address for listener in listeners))
            backlogs = (one.backlog(config) for one in listeners)
            self.backlogs = tuple(backlog for backlog in backlogs if backlog is not None)
            self.socket_memory = memory_in_force(config, [one.socket for one in listeners])
            self.udp_addresses = tuple(dict.fromkeys(one.address for one in datagrams))
            steer(config, listeners, datagrams, self._cpus, attach_cpu_steering)
            self._places = [Place(one.address, one.is_unix, one.before) for one in listeners]
            self._watch = Watch(config, self._places)
            flows = open_flows(config, has_unix=any(one.is_unix for one in listeners))
            entries = ring_entries(config, try_io_uring)
            self.engine = "sockmap" if flows else "io_uring" if entries else "epoll"
            with _signals_wait():  # or a descriptor would have two owners, or none
                self._engine = Engine(
                    [
                        (one.socket.fileno(), one.queue, one.is_unix, one.inherited)
                        for one in listeners
                    ],
                    percpu=config.dispatch == "percpu",
                    worker_count=self.thread_count,
                    max_connections=config.max_connections or 0,
                    idle_timeout_ms=_milliseconds(config.idle_timeout or 0),
                    write_timeout_ms=_milliseconds(config.write_timeout or 0),
                    finish_timeout_ms=_milliseconds(config.write_timeout or _FINISH_TIMEOUT_S),
                    buffer_bytes=self.buffer_bytes,
                    rules=rules_of(config.allow, config.deny),
                    is_allowed_otherwise=not config.allow,
                    per_address=config.max_connections_per_ip or 0,
                    rate_per_s=config.rate_limit or 0,
                    busy_poll_ns=self._busy_poll[0],
                    busy_poll_by_gaps=self._busy_poll[1],
                    engine=self.engine,
                    given=flows or ((entries,) if entries else ()),
                )
                flows = ()
                for listener in listeners:
                    listener.socket.detach()
                if config.udp:
                    self._udp = _udp_echo(config, datagrams, self.udp_addresses)
        except BaseException:
            self._engine = self._udp = None
            if self._watch is not None:
                self._watch.close()
            for listener in listeners:
                listener.close()
            for one in datagrams:
                one.socket.close()
            for fd in flows:
                os.close(fd)
            raise

    def start(self) -> None:
        """Starts the workers, and returns when each is about to serve. Raises OSError when there
        is no thread to be had, or one cannot be pinned; whatever it raises, cancel() is due."""
        try:
            with _signals_wait():  # threading itself does not survive an interrupt everywhere
                for thread in (*self._threads, self._watcher):
                    thread.start()
        except RuntimeError as error:
            raise OSError(errno.EAGAIN, f"pthread_create: {error}") from None
        for _ in self._threads:
            self._prepared.acquire()
        failure = self.take_failure()
        if failure is not None:
            raise failure

    def cancel(self) -> None:
        """Undoes a start that did not get to its end.

        Every worker has to pass through its end for the others to reach theirs: those that no
        thread has taken do it on this one.
        """
        self._shares_ports = False  # nobody has been served who could be told of
        self.abort()
        for index in range(len(self._threads)):
            self._work(index)
        self.join(None)

    # ---- on the worker's thread ---------------------------------------------------------------

    def _work(self, index: int) -> None:
        """A worker's life; whoever comes second for an index has nothing to do."""
        with self._lock:
            if index in self._taken:
                return
            self._taken.add(index)
            is_udp = index >= self.thread_count
            engine = self._udp if is_udp else self._engine
        try:
            try:
                if engine is not None:
                    self._prepare_thread(index)
            finally:
                self._prepared.release()
            if engine is not None:
                engine.run_worker(index - self.thread_count if is_udp else index)
        except BaseException as error:
            self._failures.append(error)
            self.abort()  # the engine stops its own workers, and knows nothing of UDP's
        finally:
            del engine  # the last worker's _end_worker() frees it
            self._end_worker()

    def _prepare_thread(self, index: int) -> None:
        if threading.current_thread() is not self._threads[index]:
            return
        # Signals are for the thread that waits for them.
        signal.pthread_sigmask(signal.SIG_BLOCK, _ASYNCHRONOUS_SIGNALS)
        cpu = self._cpus[index % self.thread_count]
        if cpu is not None:
            try:
                os.sched_setaffinity(0, {cpu})
            except OSError as error:
                reason = f"sched_setaffinity: {error.strerror}, CPU {cpu}"
                self._failures.append(OSError(error.errno, reason))
                self.abort()  # and then on, to this worker's end

    def _look_after(self) -> None:
        """The watching thread's life."""
        signal.pthread_sigmask(signal.SIG_BLOCK, _ASYNCHRONOUS_SIGNALS)
        watch = self._watch
        assert watch is not None
        while not self._ended.wait(INTERVAL_S):
            # Not under the lock: what is logged may block, and a signal handler may want it.
            engine, udp = self._engine, self._udp
            try:
                if engine is not None and (dead := watch.look(engine, udp)):
                    self._end_without(dead)
            except Exception:
                log.exception("looking after the server failed")
            del engine, udp
        watch.close()

    def _end_without(self, addresses: tuple[Address, ...]) -> None:
        """Ends, in order: whoever supervises the program can open the listeners again, and it may
        not be able to. (Behind the sandbox no socket can be made.)"""
        where = describe_addresses(addresses)
        reason = f"{where} was closed from outside (ss -K, or shutdown(2) by another holder)"
        failure = ListenerLostError(addresses, reason)
        with self._lock:
            self._failures.append(failure)
        self.request_stop(self._graceful_timeout)
        log.error(
            "%s: draining for at most %g s, then it has to be started again",
            reason,
            self._graceful_timeout,
        )

    def _end_worker(self) -> None:
        with self._lock:
            self._remaining -= 1
            if self._remaining:
                return
            try:
                self._final = self._stats_now(self._accept_queues())
                assert self._engine is not None
                self._unaccepted = self._engine.unaccepted()
                # Before somebody takes them.
                has_failed = any(not isinstance(one, ListenerLostError) for one in self._failures)
                self._engine = self._udp = None  # and with them their descriptors and buffers
                if self._watch is not None and self._watcher.ident is None:
                    self._watch.close()
                for file in self._files:
                    file.remove()
            finally:
                callbacks, self._callbacks = self._callbacks, []
                self._ended.set()
        self._warn_of_resets(has_failed)
        for callback in callbacks:
            _call(callback)

    def _warn_of_resets(self, has_failed: bool) -> None:
        count, error, left = self._unaccepted
        if count:
            why = "the server was told to stop at once"
            if has_failed:
                why = "a thread of the server failed"
            elif error in (errno.EMFILE, errno.ENFILE):
                why = (
                    "there was no descriptor for them until the graceful timeout "
                    f"(RLIMIT_NOFILE {sysctl.descriptor_limit()}, or fs.file-max)"
                )
            elif error:
                why = f"until the graceful timeout, accept4: {os.strerror(error)}"
            log.warning(
                "%d clients that waited to be accepted when the server stopped are reset: %s",
                count,
                why,
            )
        if left:
            log.warning(
                "%d clients wait to be accepted at inherited sockets: whoever else has those may "
                "serve them; if nobody has, they are reset",
                left,
            )
        if not self._shares_ports:
            return
        migrates = sysctl.migrates_requests()
        if (self._migrates if migrates is None else migrates) is not True:
            log.warning(
                "reuse-port: clients whose handshake was under way at the stop may have been reset "
                "instead of going on to another server of the port; to have them go on: "
                "sysctl -w net.ipv4.tcp_migrate_req=1"
            )

    # ---- from any thread ----------------------------------------------------------------------

    @property
    def is_running(self) -> bool:
        return not self._ended.is_set()

    def on_end(self, callback: Callable[[], object]) -> None:
        with self._lock:
            if not self._ended.is_set():
                self._callbacks.append(callback)
                return
        _call(callback)

    def request_stop(self, graceful_timeout: float) -> None:
        with self._lock:
            for one in (self._engine, self._udp):
                if one is not None:
                    one.stop(_milliseconds(graceful_timeout))

    def abort(self) -> None:
        with self._lock:
            for one in (self._engine, self._udp):
                if one is not None:
                    one.abort()

    def join(self, timeout: float | None) -> bool:
        if not self._ended.wait(timeout):
            return False
        for thread in self._threads:
            if thread.ident is not None and thread is not threading.current_thread():
                thread.join()
        if self._watcher.ident is not None and self._watcher is not threading.current_thread():
            self._watcher.join(_LOG_BLOCKED_S)
        return True

    def take_failure(self) -> BaseException | None:
        with self._lock:
            failure = self._failures[0] if self._failures else None
            self._failures.clear()
        return failure

    def stats(self) -> Stats:
        with self._lock:
            return self._final or self._stats_now(self._accept_queues())

    def _stats_now(self, queues: tuple[AcceptQueue, ...]) -> Stats:
        assert self._engine is not None
        seconds = time.monotonic() - self._started_at
        udp = None if self._udp is None else self._udp.counters()
        return Stats.of_workers(self._engine.counters(), seconds, queues, udp)

    def _accept_queues(self) -> tuple[AcceptQueue, ...]:
        assert self._engine is not None
        overflows = self._watch.overflows() if self._watch is not None else None
        most = math.inf if overflows is None else overflows
        return tuple(
            AcceptQueue(
                place.address, int(min(figures[0] - place.dropped_before, most)), *figures[1:3]
            )
            for place, figures in zip(self._places, self._engine.listener_figures(), strict=True)
        )

    def stop_forgotten(self) -> None:
        self.request_stop(0)
        # The one collecting may be a thread of ours.
        if threading.current_thread() not in (*self._threads, self._watcher):
            self.join(None)

    def forget(self) -> None:
        """In the child after fork(2): the threads are the parent's, and so is the server."""
        self._lock = threading.RLock()  # the old one may be held by a thread that is not here
        self._ended = threading.Event()
        if self._engine is not None:
            # Asking the listeners takes a lock that a thread which is not here may hold.
            self._final = self._stats_now(())
            self._engine.forget()
            if self._udp is not None:
                self._udp.forget()
            self._engine = self._udp = None
        if self._watch is not None:
            self._watch.close()
        for file in self._files:
            file.forget()
        self._threads.clear()
        self._ended.set()


_runs: weakref.WeakSet[Run] = weakref.WeakSet()


def _forget_runs() -> None:
    for run in list(_runs):
        run.forget()


os.register_at_fork(after_in_child=_forget_runs)


def _call(callback: Callable[[], object]) -> None:
    try:
        callback()
    except Exception:
        log.exception("a callback for the end of the server failed")


@contextmanager
def _signals_wait() -> Iterator[None]:
    """Puts off signals, and with them KeyboardInterrupt, for a moment."""
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, _ASYNCHRONOUS_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


def _milliseconds(seconds: float) -> int:
    return round(seconds * 1000)


def thread_count(config: ServerConfig) -> int:
    return usable_cpu_count() if config.threads is None else config.threads


def buffer_bytes(config: ServerConfig) -> int:
    """The option max_buffer_memory, or what stands for it."""
    if config.max_buffer_memory is not None:
        return config.max_buffer_memory
    limit = cgroup_memory_limit(Path("/proc/self"))
    if limit is None:
        return _BUFFER_BYTES
    share = limit // _BUFFER_SHARE
    return min(_BUFFER_BYTES, max(_BUFFER_GRAIN, share - share % _BUFFER_GRAIN))


def _warn_of_truncation(backlog: int) -> None:
    limit = sysctl.somaxconn()
    if backlog > limit:
        log.warning(
            "backlog: the kernel truncates %d to net.core.somaxconn = %d; to raise it: "
            "sysctl -w net.core.somaxconn=%d",
            backlog,
            limit,
            backlog,
        )


def _udp_echo(
    config: ServerConfig, datagrams: list[Datagrams], addresses: tuple[Address, ...]
) -> Echo:
    """Takes the sockets over. They have one port, TCP's."""
    from ._udp import Echo

    echo = Echo(
        [(one.socket.fileno(), one.worker) for one in datagrams],
        worker_count=max(one.worker for one in datagrams) + 1,
        own_port=int(addresses[0][1]),
        source_port_least=config.udp_min_source_port,
        rate_per_source=config.udp_rate,
        rate_total=config.udp_rate_total,
        rate_repeated=config.udp_rate_repeated,
        rules=rules_of(config.allow, config.deny),
        is_allowed_otherwise=not config.allow,
    )
    for one in datagrams:
        one.socket.detach()
    return echo
