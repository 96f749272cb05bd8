"""The native client: ext/loadgen."""

from typing import Any

ERROR_KINDS: tuple[str, ...]
LATENCIES: tuple[str, ...]
MODES: tuple[str, ...]

class Client:
    """One thread's share of a workload.

    open, run, burst and close block without the GIL and are called one after the other; stop,
    counters and histogram by any thread at any time. Times are CLOCK_MONOTONIC in ns. Raises
    ValueError for arguments out of range, OSError when a system call fails that the client cannot
    do without; what happens to a connection is counted, never raised.
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
        seed: int,
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
        """mode: index into MODES. address: packed, or a path for AF_UNIX (abstract: a
        zero byte and a name). sources: packed
        addresses one after the other; empty: the kernel's choice. scope: of link-local addresses
        among all of them. datagrams: UDP, in the modes closed and open."""
    def adopt(self, fd: int, connect_ns: int) -> None:
        """Take over an established, non-blocking socket as connection 0, on which the first message
        has been echoed; before open(). connect_ns: how long its connect took."""
    def open(self) -> None:
        """Establish every connection; return when each is open or has failed."""
    def run(self, start_ns: int, measure_ns: int, end_ns: int) -> None:
        """The workload; what is sent or due from measure_ns to end_ns is in the figures."""
    def burst(self, start_ns: int, measured: bool) -> None:
        """Connect, echo and close every connection, all beginning at start_ns."""
    def close(self) -> None: ...
    def stop(self) -> None:
        """Makes open, run or burst return soon: at most a second for what is under way."""
    def counters(self) -> dict[str, Any]:
        """Name -> count; `errors` is a dict of its own, by kind."""
    def histogram(self, name: str) -> dict[int, int]:
        """Counter index -> count of one of LATENCIES."""
    def samples(self) -> bytes:
        """The last burst: uint64 triples of connect, first echo and response time, ns."""
    def take_ends(self) -> bytes:
        """Local ends of connections closed with FIN since the last call, with keep_ends: 16 bytes
        of address (IPv4: the first four), 2 of port, big-endian, and 8 of cookie, in host byte
        order, each. One thread."""
    def first_error(self) -> dict[str, str | int] | None: ...

def histogram_index(value_ns: int) -> int:
    """The counter that a value is recorded in."""

def payload(seed: int, connection: int, sequence: int, length: int, line: bool = False) -> bytes:
    """The bytes of one message. line: printable, and ending in a newline."""
