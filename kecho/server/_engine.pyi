"""The native engine: ext/engine/engine.pyx."""

from typing import Any

ENGINES: list[str]
CLOSE_REASONS: dict[str, int]
ERROR_KINDS: dict[str, int]
REFUSALS: dict[str, int]

class Engine:
    """The workers of one run of a server, with their queues and connections.

    listeners: (fd, queue, is_unix, is_inherited) each; they listen and are non-blocking. queue is
    the index of the worker that accepts from it under percpu, or -1 for every worker; shared
    ignores it. is_inherited: another process may have the socket as well. The engine takes the
    descriptors over when this returns, and closes them in the end.

    0 means no limit. buffer_bytes: for all backpressured connections; each queue has an equal
    share. rules: (prefix as an integer of 128 bits, its length, whether it is allowed), sorted by
    falling length, then by prefix. is_allowed_otherwise: for clients that match no rule.
    per_address, rate_per_s: connections of one client address, at once and per second.
    busy_poll_ns: how long a worker polls after its last event before it sleeps; 2**64 - 1: without
    limit. busy_poll_by_gaps: only while events come that close together on average.
    engine: one of ENGINES. given: what that engine needs. sockmap: what _bpf.open_echo() returned;
    it is taken over like the listeners. io_uring: the size of each worker's ring, a power of two.
    """

    def __init__(
        self,
        listeners: list[tuple[int, int, bool, bool]],
        *,
        percpu: bool,
        worker_count: int,
        max_connections: int,
        idle_timeout_ms: int,
        write_timeout_ms: int,
        finish_timeout_ms: int,
        buffer_bytes: int,
        rules: list[tuple[int, int, bool]],
        is_allowed_otherwise: bool,
        per_address: int,
        rate_per_s: int,
        busy_poll_ns: int,
        busy_poll_by_gaps: bool,
        engine: str = "epoll",
        given: tuple[int, ...] = (),
    ) -> None: ...
    def run_worker(self, index: int) -> None:
        """Run one worker, until the engine has been stopped. Raise OSError."""
    def stop(self, graceful_timeout_ms: int) -> None:
        """Start the drain, or bring its deadline forward. Return at once. Any thread may."""
    def abort(self) -> None:
        """Stop at once: reset every connection. Return at once. Any thread may call it."""
    def forget(self) -> None:
        """Close the child's copies of every descriptor after fork(2)."""
    def listener_figures(self) -> list[tuple[int, int, int, bool]]:
        """Of each listener: SYNs that it dropped, connections that wait in its accept queue, how
        many may, and whether it is dead, which it is not for a stop. Any thread."""
    def unaccepted(self) -> tuple[int, int, int]:
        """Once every worker has ended: how many clients were left in accept queues and reset, the
        errno of the accept4 that left them there (0: there was no time to try), and how many were
        left to the other holders of inherited listeners."""
    def counters(self) -> list[dict[str, Any]]:
        """Return what each worker has counted so far. Any thread may call it."""

def try_io_uring(entries: int) -> None:
    """Opens a ring as the workers have it, and closes it again. Raises OSError, which names the
    call: the kernel is older than Linux 6.1, or nobody may (kernel.io_uring_disabled)."""

def attach_cpu_steering(fd: int, cpus: list[int]) -> None:
    """Has the SO_REUSEPORT group of `fd` give a SYN to the socket of the CPU that handles it.

    cpus[i] is the CPU of the i-th socket bound to the group. socket(7), Linux 4.5.
    Raises OSError.
    """
