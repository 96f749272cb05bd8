"""Which clients are served: allow and deny by prefix, then what peers.pxd counts by address."""
from engine.layout cimport KECHO_NO_PEER, REFUSED_DENIED, Access, Address
from engine.peers cimport peer_comes, peers_are_counted
from kernel.inet cimport AF_INET, AF_INET6, be64toh, ntohl, sockaddr_in, sockaddr_in6
from kernel.socket cimport sockaddr
from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memcpy


cdef enum:
    ADMITTED = -1
    V4_BITS_BEFORE = 96  # IPv4 is ::ffff:0:0/96


cdef inline bint access_is_restricted(Access* access) noexcept nogil:
    return access.rule_count != 0 or not access.is_allowed_otherwise or peers_are_counted(access)


cdef inline Address _address_of(const sockaddr* client) noexcept nogil:
    """Of IPv4 or IPv6; a v4-mapped address is the same as the IPv4 one."""
    cdef Address address
    cdef uint64_t halves[2]
    if client.sa_family == AF_INET:
        address.high = 0
        address.low = <uint64_t>0xFFFF << 32 | ntohl((<const sockaddr_in*>client).sin_addr.s_addr)
    else:
        memcpy(halves, (<const sockaddr_in6*>client).sin6_addr.s6_addr, sizeof(halves))
        address.high = be64toh(halves[0])
        address.low = be64toh(halves[1])
    return address


cdef inline bint _is_v4(const Address* address) noexcept nogil:
    return address.high == 0 and address.low >> 32 == 0xFFFF


cdef inline Address _first_bits(const Address* address, uint32_t length) noexcept nogil:
    cdef Address masked
    masked.high = address.high if length >= 64 else 0
    if 0 < length < 64:
        masked.high = address.high & ~<uint64_t>0 << (64 - length)
    masked.low = 0
    if length > 64:
        masked.low = address.low & ~<uint64_t>0 << (128 - length)
    return masked


cdef inline bint _is_before(const Address* left, const Address* right) noexcept nogil:
    return left.high < right.high or (left.high == right.high and left.low < right.low)


cdef inline bint _is_allowed(Access* access, const Address* address) noexcept nogil:
    """By the longest prefix that holds the address: a binary search for each length there is.
    ::/0 and the like are about IPv6 clients only."""
    cdef uint32_t begin = 0, end, low, high, middle
    cdef Address wanted
    cdef uint32_t shortest = V4_BITS_BEFORE if _is_v4(address) else 0
    while begin < access.rule_count and access.rules[begin].length >= shortest:
        end = begin + access.rules[begin].same_length
        wanted = _first_bits(address, access.rules[begin].length)
        low, high = begin, end
        while low < high:
            middle = low + (high - low) // 2
            if _is_before(&access.rules[middle].prefix, &wanted):
                low = middle + 1
            else:
                high = middle
        if low < end and not _is_before(&wanted, &access.rules[low].prefix):
            return access.rules[low].is_allowed != 0
        begin = end
    return access.is_allowed_otherwise != 0


cdef inline int access_admit(
    Access* access, const sockaddr* client, uint32_t now_ms, uint32_t* peer,
) noexcept nogil:
    """ADMITTED, or the kecho_refusal. `peer`: see peer_comes()."""
    cdef Address address
    peer[0] = KECHO_NO_PEER
    if client.sa_family != AF_INET and client.sa_family != AF_INET6:
        return ADMITTED
    address = _address_of(client)
    if not _is_allowed(access, &address):
        return REFUSED_DENIED
    if not peers_are_counted(access):
        return ADMITTED
    if not _is_v4(&address):
        address.low = 0
    return peer_comes(access, &address, now_ms, peer)
