"""TCP sockets over netlink: ext/sockdiag/sockdiag.pyx."""

MOST_AT_ONCE: int
IDENTITY_BYTES: int
UNANSWERED: int
AWAKE: int

# family, state, local address and port, peer address and port, interface index, cookie, timer,
# expires (ms), retransmissions, receive queue, send queue, uid, inode, ms since it last sent or
# received data, whether it is a subflow of MPTCP, identity
Row = tuple[
    int, int, str, int, str, int, int, int, int, int, int, int, int, int, int,
    int | None, bool, bytes,
]  # fmt: skip

class Handle:
    """Two netlink sockets: one to look, one to destroy. Any thread may use it, one at a time.

    namespace_fd: a network namespace to work in, or -1 for the thread's own.
    patience_ms: how long the kernel may be silent.
    Raises OSError that names the system call.
    """

    def __init__(self, *, namespace_fd: int = -1, patience_ms: int = 10000) -> None: ...
    def close(self) -> None: ...
    def fileno(self) -> int: ...
    def dump(self, family: int, states: int, local_port: int = 0, peer_port: int = 0) -> list[Row]:
        """Every TCP socket of a family whose state is in the mask 1 << state; port 0 is any."""
    def states(self, identities: list[bytes], idle_ms: int = 0) -> list[int]:
        """Of at most MOST_AT_ONCE sockets: the state, with AWAKE added if it has sent or received
        data within idle_ms, -errno or UNANSWERED for each."""
    def destroy(self, identities: list[bytes]) -> list[int]:
        """Destroys at most MOST_AT_ONCE sockets; 0, the kernel's errno or UNANSWERED for each."""

def receive_from_kernel(fd: int, patience_ms: int = 0) -> bytes: ...
def parse_dump(datagram: bytes, sequence: int, port_id: int = 0) -> tuple[bool, list[Row]]: ...
def parse_answers(
    datagram: bytes, first: int, count: int, idle_ms: int = 0, port_id: int = 0
) -> list[int]: ...
