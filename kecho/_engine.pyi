"""The native engine: ext/engine/engine.pyx."""

CLOSE_REASONS: dict[str, int]
ERROR_KINDS: dict[str, int]

class Engine:
    """The workers of one run of a server, their queues and connections.

    listeners: (fd, queue, is_unix, is_inherited) each; listening, non-blocking. queue is the index
    of the worker that accepts from it under percpu, or -1 for every worker's; ignored under
    shared. is_inherited: another process may have the socket, too.
    The engine takes the descriptors over when this returns, and closes them in the end.
    """

    def __init__(
        self,
        listeners: list[tuple[int, int, bool, bool]],
        *,
        percpu: bool,
        worker_count: int,
        max_connections: int,
        idle_timeout_ms: int,
    ) -> None: ...
    def run_worker(self, index: int) -> None:
        """The life of one worker: returns when the engine has been stopped. Raises OSError."""
    def stop(self, graceful_timeout_ms: int) -> None:
        """Starts the drain, or brings its deadline forward. Returns at once; any thread."""
    def abort(self) -> None:
        """Stops at once: every connection is reset. Returns at once; any thread."""
    def forget(self) -> None:
        """In the child after fork(2): closes its copies of every descriptor, quietly."""
    def counters(self) -> list[dict[str, int | dict[str, int]]]:
        """What each worker has counted so far, at any time, from any thread."""

def attach_cpu_steering(fd: int, cpus: list[int]) -> None:
    """Has the SO_REUSEPORT group of `fd` give a SYN to the socket of the CPU that handles it.

    cpus[i] is the CPU of the i-th socket bound to the group. socket(7), Linux 4.5.
    Raises OSError.
    """
