"""Which clients are served: allow and deny by prefix, then what peers.pxd counts by address."""
from common.counted cimport counted_as
from common.rules cimport Address, address_of, rules_allow
from engine.layout cimport KECHO_NO_PEER, REFUSED_DENIED, Access
from engine.peers cimport peer_comes, peers_are_counted
from kernel.inet cimport AF_INET, AF_INET6
from kernel.socket cimport sockaddr
from libc.stdint cimport uint32_t


cdef enum:
    ADMITTED = -1


cdef inline bint access_is_restricted(Access* access) noexcept nogil:
    return (
        access.rules.count != 0 or not access.rules.is_allowed_otherwise
        or peers_are_counted(access))


cdef inline int access_admit(
    Access* access, const sockaddr* client, uint32_t now_ms, uint32_t* peer,
) noexcept nogil:
    """ADMITTED, or the kecho_refusal. `peer`: see peer_comes()."""
    cdef Address address
    peer[0] = KECHO_NO_PEER
    if client.sa_family != AF_INET and client.sa_family != AF_INET6:
        return ADMITTED
    address = address_of(client)
    if not rules_allow(&access.rules, &address):
        return REFUSED_DENIED
    if not peers_are_counted(access):
        return ADMITTED
    address = counted_as(client)
    return peer_comes(access, &address, now_ms, peer)
