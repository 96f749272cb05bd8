"""A TCP socket as a look found it."""

from __future__ import annotations

from typing import NamedTuple

from .pairs import Endpoint, Pair

__all__ = ["Socket"]


class Socket(NamedTuple):
    """A TCP socket as a look found it; a tuple, since there may be a million.

    Addresses are canonical: IPv4 also where the socket is an IPv6 one (is_mapped). interface: the
    name of the device it is bound to ("if3" if index 3 has none any more), or empty, with the
    index 0. expires_ms: until `timer` fires. Queues are bytes, of a listener the connections that
    wait and the most that may. uid and inode are 0 where nobody owns it. idle_ms: since it last
    sent or received data, or was connected; None where the kernel does not say, as in time-wait.
    is_mptcp: a subflow of MPTCP, which is not the whole connection; an older kernel says so only
    with CAP_NET_ADMIN. identity, with the cookie in it, tells it from a later one with the same
    addresses.
    """

    state: str
    local_address: str
    local_port: int
    peer_address: str
    peer_port: int
    interface: str
    interface_index: int
    is_mapped: bool
    timer: str
    expires_ms: int
    retransmissions: int
    receive_queue: int
    send_queue: int
    uid: int
    inode: int
    cookie: int
    idle_ms: int | None
    is_mptcp: bool
    identity: bytes

    @property
    def pair(self) -> Pair:
        return Pair(
            Endpoint(self.local_address, self.local_port, self.interface),
            Endpoint(self.peer_address, self.peer_port),
        )

    @property
    def is_listener(self) -> bool:
        return self.state == "listen"

    @property
    def owner(self) -> int | None:
        """The user's id; None without an inode: the kernel then shows 0, which is not root."""
        return self.uid if self.inode else None
