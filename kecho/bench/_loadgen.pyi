"""The native client: ext/loadgen."""

from typing import Any

LATENCIES: tuple[str, ...]
MODES: tuple[str, ...]
SEED_BYTES: int

class Client:
    """One thread's share of a workload.

    open, run, burst and close block without the GIL, and are called one after the other. Any thread
    may call stop, counters and histogram at any time. Times are CLOCK_MONOTONIC in ns. Raises
    ValueError for arguments out of range, OSError when the client cannot go on. What happens to a
    connection is counted, not raised.
    """

    def __init__(
        self,
        *,
        mode: int,
        family: int,
        address: bytes,
        port: int,
        scope: int,
        sources: bytes,
        first_number: int,
        connections: int,
        connects_at_once: int,
        seed: bytes,
        length: int,
        depth: int,
        timeout_ns: int,
        interval_ns: float,
        schedule_first: int,
        schedule_step: int,
        datagrams: bool,
        line: bool,
        verify: bool,
        spin: bool,
        close_by_reset: bool,
        reconnect: bool,
        keep_ends: bool,
    ) -> None:
        """Make a client.

        mode: index into MODES.
        address: packed; for AF_UNIX a path, or a zero byte and an abstract name.
        scope: the index of the device of link-local addresses; otherwise 0.
        sources: packed addresses one after the other; empty: the kernel chooses.
        seed: SEED_BYTES random bytes, of which four are sent; the same for all clients of a run.
        datagrams: UDP, in modes closed and open.
        """
    def adopt(self, fd: int, connect_ns: int) -> None:
        """Take over an established, non-blocking socket as connection 0, before open().

        The first message has been echoed on it. connect_ns: how long its connect took.
        """
    def open(self) -> None:
        """Establish every connection. Return when each is open or has failed."""
    def run(self, start_ns: int, measure_ns: int, end_ns: int) -> None:
        """Run the workload. Messages sent or due from measure_ns to end_ns are in the figures."""
    def burst(self, start_ns: int, measured: bool) -> None:
        """Connect, echo and close every connection, all beginning at start_ns."""
    def close(self) -> None:
        """Close every connection."""
    def stop(self) -> None:
        """Make open, run and burst return soon, within about a second."""
    def counters(self) -> dict[str, Any]:
        """Return the counters by name. `errors` is a dict by kind."""
    def histogram(self, name: str) -> dict[int, int]:
        """Return the counts of one of LATENCIES by the index of the bucket."""
    def samples(self) -> bytes:
        """Return the times of the last burst by connection, as triples of uint64 in ns.

        They are connect, first echo and response time; 0 for a step that was not reached.
        """
    def take_ends(self) -> bytes:
        """Return the local ends of connections closed with FIN since the last call (keep_ends).

        Each has 16 bytes of address (IPv4: the first four), 2 of port, big-endian, and 8 of cookie,
        in host byte order. One thread at a time.
        """
    def first_error(self) -> dict[str, str | int] | None:
        """Return the first error in full, or None. Not while the client runs."""

def histogram_index(value_ns: int) -> int:
    """Return the index of the bucket that a value is recorded in."""

def payload(seed: bytes, connection: int, sequence: int, length: int, line: bool = False) -> bytes:
    """Return the bytes of one message. line: printable, with a newline at the end."""
