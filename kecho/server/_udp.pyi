"""The native UDP echo: ext/udp/udp.pyx."""

REFUSALS: dict[str, int]
ERROR_KINDS: dict[str, int]

class Echo:
    """The UDP workers of one run of a server, and their sockets.

    sockets: (fd, worker) each; bound, with IP_PKTINFO or IPV6_RECVPKTINFO. They are taken over
    when this returns, and closed when their worker ends. A rate of 0 is no limit.
    rules: as _engine.Engine's.
    """

    def __init__(
        self,
        sockets: list[tuple[int, int]],
        *,
        worker_count: int,
        own_port: int,
        source_port_least: int,
        rate_per_source: int,
        rate_total: int,
        rate_repeated: int,
        rules: list[tuple[int, int, bool]],
        is_allowed_otherwise: bool,
    ) -> None: ...
    def run_worker(self, index: int) -> None:
        """The life of one worker: returns when the echo has been stopped. Raises OSError."""
    def stop(self, graceful_timeout_ms: int) -> None:
        """Starts the drain, or brings its deadline forward. Returns at once; any thread."""
    def abort(self) -> None:
        """Stops at once: what has been received and not answered is lost. Any thread."""
    def forget(self) -> None:
        """In the child after fork(2): closes its copies of every descriptor, quietly."""
    def counters(self) -> list[dict[str, int | dict[str, int]]]:
        """What each worker has counted so far, at any time, from any thread."""
