"""Run an echo server beside the program's own work: the class that programs use."""

from __future__ import annotations

import _thread
import sys
import threading
import warnings
import weakref
from collections.abc import Callable
from contextlib import suppress
from textwrap import indent
from types import TracebackType
from typing import TYPE_CHECKING, Any

from .config import ServerConfig, check_timeout
from .manual import OPTIONS
from .run import Run, buffer_bytes, thread_count
from .sockets.addresses import Address, describe_addresses
from .stats import Stats

if TYPE_CHECKING:
    from typing import Self, Unpack

    from .keywords import ServerOptions

__all__ = ["Server"]


class Server:
    """An echo server that runs on threads of its own, beside the program's work.

    >>> with kecho.Server(port=0) as server:
    ...     client = socket.create_connection(server.addresses[0])

    The keyword arguments are the options of the command line: --idle-timeout is idle_timeout. They
    are listed at the end. Server() opens nothing. It raises OptionError (a ValueError) for a wrong
    value and TypeError for an unknown option.

    start() opens the listeners. Clients can connect when it returns. stop() drains the connections
    and returns the final counters. `with` and `async with` (asyncio, trio) call both. A server that
    has stopped can be started again.

    addresses and port say where it listens. stats() returns the counters at any time. wait() blocks
    until the server has stopped.

    All methods may be called from any thread. A server that is forgotten while it runs is stopped
    when it is collected or when the interpreter exits, with a ResourceWarning. After os.fork(), the
    child has no part in it.
    """

    def __init__(self, **options: Unpack[ServerOptions]) -> None:
        self.config: ServerConfig = ServerConfig.from_options(options)
        # Reentrant: request_stop() and abort() may be called by a signal handler.
        self._lock = threading.RLock()
        self._run: Run | None = None
        self._finalizer: weakref.finalize[[Run, str], Server] | None = None

    @classmethod
    def from_config(cls, config: ServerConfig) -> Self:
        """Return a server with this configuration."""
        server = cls()
        server.config = config
        return server

    def __repr__(self) -> str:
        state = "running" if self.is_running else "stopped"
        return f"<kecho.Server {describe_addresses(self.addresses)} {state}>"

    # ---- life ------------------------------------------------------------------------------

    def start(self, on_listening: Callable[[], object] | None = None) -> None:
        """Open the listeners and start the workers. Clients can connect when it returns.

        on_listening: called between the two, when `addresses` are known. The workers inherit what
        it does to the calling thread (privileges, a sandbox). If it raises, so does start().

        Raises ListenError (an OSError) when the system refuses a listener, and OSError when it
        refuses anything else. Raises RuntimeError when the server is running already, or when
        gevent or eventlet has replaced the system's threads.
        """
        _check_threads()
        with self._lock:
            if self.is_running:
                raise RuntimeError("the server is running already")
            run = Run(self.config)
            try:
                self._run = run
                self._finalizer = weakref.finalize(self, _stop_forgotten, run, repr(self))
                if on_listening is not None:
                    on_listening()
                run.start()
            except BaseException:
                run.cancel()
                raise

    def stop(self, graceful_timeout: float | None = None) -> Stats:
        """Stop accepting, echo what has been received, close, and return the final counters.

        graceful_timeout: seconds until unfinished connections are reset. The default is the option
        of that name. A connection is finished when everything that it received has been sent back
        and acknowledged; an idle connection is finished. Another thread may call stop() meanwhile
        with a shorter timeout. Raises what wait() raises, and RuntimeError when the server was
        never started.
        """
        run = self._started()
        if graceful_timeout is None:
            graceful_timeout = self.config.graceful_timeout
        run.request_stop(check_timeout("graceful_timeout", graceful_timeout))
        self.wait()
        return run.stats()

    def abort(self) -> None:
        """Tell the server to reset its connections and stop. Return at once.

        A signal handler may call abort() and request_stop(), but not the methods that wait. Raises
        RuntimeError when the server was never started.
        """
        self._started().abort()

    def request_stop(self) -> None:
        """Tell the server to stop as stop() does. Return at once. Raises RuntimeError when the
        server was never started."""
        self._started().request_stop(self.config.graceful_timeout)

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the server has stopped, for at most `timeout` seconds. Tell whether it has.

        If the server has stopped by itself, this raises the reason, once: ListenerLostError (an
        OSError) when a listener was closed from outside, after which the server drained as for
        stop(); or the OSError of a worker that failed, whose text names the system call.
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
        """Whether a worker is still running."""
        return self._run is not None and self._run.is_running

    def on_end(self, callback: Callable[[], object]) -> None:
        """Call `callback` on a worker's thread when the last worker of this run ends; at once if
        it has ended. What `callback` raises is logged."""
        self._started().on_end(callback)

    def _started(self) -> Run:
        if self._run is None:
            raise RuntimeError("the server has not been started")
        return self._run

    # ---- what it is doing -------------------------------------------------------------------

    @property
    def addresses(self) -> tuple[Address, ...]:
        """Where the server listens or last listened, as getsockname() returns it: (host, port), for
        IPv6 (host, port, flow, scope), for a Unix socket its path. Empty before the first start."""
        return self._run.addresses if self._run is not None else ()

    @property
    def udp_addresses(self) -> tuple[Address, ...]:
        """Where the server receives datagrams, in the same form. Empty without the option udp."""
        return self._run.udp_addresses if self._run is not None else ()

    @property
    def port(self) -> int:
        """The first TCP port. Raises RuntimeError when there is none or before the start."""
        for address in self.addresses:
            if not isinstance(address, str):
                return address[1]
        raise RuntimeError("the server has no TCP port" if self._run else "it was never started")

    @property
    def engine(self) -> str:
        """The engine in use: epoll, io_uring or sockmap; auto before the start, if that is the
        option."""
        return self._run.engine if self._run is not None else self.config.engine

    @property
    def threads(self) -> int:
        """The number of workers. Before the start, what affinity and quota would make it now."""
        return self._run.thread_count if self._run is not None else thread_count(self.config)

    @property
    def backlogs(self) -> tuple[int, ...]:
        """The length of each listener's accept queue, as the kernel has set it. That of an
        inherited Unix socket is unknown and left out. Empty before the start."""
        return self._run.backlogs if self._run is not None else ()

    @property
    def max_buffer_memory(self) -> int:
        """The most bytes that may wait for clients that do not read: the option, or its default,
        which depends on the cgroup's memory."""
        return self._run.buffer_bytes if self._run is not None else buffer_bytes(self.config)

    @property
    def socket_memory(self) -> int | None:
        """The most bytes that the kernel holds for one TCP connection. None if the kernel sizes the
        buffers itself, or before the start."""
        return self._run.socket_memory if self._run is not None else None

    def stats(self) -> Stats:
        """Return the counters: of now, or the final ones. Raises RuntimeError before the start."""
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
        if (trio := _running_trio()) is not None:
            # It waits for the thread when it is cancelled: __aexit__ is called then, too.
            await trio.to_thread.run_sync(self.start)
            return self
        import asyncio

        _check_loop(asyncio)
        # In a thread: resolving a host name may take its time.
        starting = asyncio.ensure_future(asyncio.to_thread(self.start))
        try:
            await asyncio.shield(starting)
        except asyncio.CancelledError:
            # __aexit__ will not be called, and the thread cannot be called back.
            await asyncio.wait([starting])
            if not starting.cancelled() and starting.exception() is None:
                await asyncio.to_thread(self.stop, 0)
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if (trio := _running_trio()) is not None:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(self.stop)
            return
        import asyncio

        # Shielded: a task that is cancelled here still leaves a server that stops.
        await asyncio.shield(asyncio.to_thread(self.stop))


Server.__doc__ = f"""{Server.__doc__}
    Options:

{indent(OPTIONS, "    ")}

    host, fd, allow and deny also take a single value. With uds or fd, TCP is left out unless host
    or port is given.
    """


def _check_threads() -> None:
    """Raises RuntimeError if a thread of Python's would run on the caller's, where a worker, which
    waits in the kernel, would never give way. Debuggers replace the function, too, by one that
    starts a thread of the system's."""
    module = getattr(_thread.start_new_thread, "__module__", None) or ""
    if module.partition(".")[0] in ("gevent", "eventlet"):
        raise RuntimeError(
            "threads are replaced (gevent's or eventlet's monkey patching), and a server needs the "
            "system's: leave them out, as patch_all(thread=False), or run it as a process"
        )


def _running_trio() -> Any:
    """The module, if this is a task of trio's (anyio's trio backend is the same); else None."""
    trio = sys.modules.get("trio")
    if trio is not None:
        with suppress(RuntimeError):  # within asyncio, say
            trio.lowlevel.current_task()
            return trio
    return None


def _check_loop(asyncio: Any) -> None:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        raise RuntimeError(
            "`async with` works under asyncio and trio; elsewhere, call start() and stop()"
        ) from None


def _stop_forgotten(run: Run, description: str) -> None:
    if run.is_running:
        try:
            run.stop_forgotten()
        finally:  # where warnings are errors, this raises
            warnings.warn(f"{description} was never stopped", ResourceWarning, stacklevel=2)
