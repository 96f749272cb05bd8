"""Which clients are served: allow and deny by prefix, then the limits per address (peers.pxd).

Clients of a Unix socket count by user, so that one local user cannot take all descriptors.
"""
from common.counted cimport counted_as
from common.rules cimport Address, address_of, rules_allow
from engine.accepting.peers cimport peer_comes, peers_are_counted
from engine.layout cimport KECHO_NO_PEER, REFUSED_DENIED, Access
from kernel.inet cimport AF_INET, AF_INET6
from kernel.socket cimport (
    SOL_SOCKET, SO_PEERCRED, getsockopt, sockaddr, socklen_t, ucred,
)
from libc.stdint cimport uint32_t, uint64_t


cdef enum:
    ADMITTED = -1
    MULTICAST = 0xFF  # RFC 4291, 2.7: the first byte of an address that is no source


cdef inline bint access_is_restricted(Access* access) noexcept nogil:
    """Check whether any client may be refused."""
    return (
        access.rules.count != 0 or not access.rules.is_allowed_otherwise
        or peers_are_counted(access))


cdef inline bint _read_user(int fd, Address* address) noexcept nogil:
    """Set an address that no client has, for the user that has connected: unix(7) SO_PEERCRED.
    Return False if the kernel does not tell."""
    cdef ucred user
    cdef socklen_t size = sizeof(user)
    if getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &user, &size) < 0:
        return False
    address.high = <uint64_t>MULTICAST << 56
    address.low = user.uid
    return True


cdef inline int access_admit(
    Access* access, int fd, const sockaddr* client, uint32_t now_ms, uint32_t* peer,
) noexcept nogil:
    """Return ADMITTED or a kecho_refusal. `peer`: see peer_comes()."""
    cdef Address address
    cdef bint is_unix = client.sa_family != AF_INET and client.sa_family != AF_INET6
    peer[0] = KECHO_NO_PEER
    if not is_unix:
        address = address_of(client)
        if not rules_allow(&access.rules, &address):
            return REFUSED_DENIED
    if not peers_are_counted(access):
        return ADMITTED
    if not is_unix:
        address = counted_as(client)
    elif not _read_user(fd, &address):
        return ADMITTED
    return peer_comes(access, &address, now_ms, peer)
