"""Whom a limit per address counts as one client.

An IPv4 address; an IPv6 /64, the least that one subscriber has; but of link-local addresses
(RFC 4291, 2.5.6), whose prefix all hosts share, each with the link that it is on.
"""
from common.rules cimport Address, address_is_v4, address_of
from common.siphash cimport HashKey, siphash
from kernel.inet cimport sockaddr_in6
from kernel.socket cimport sockaddr
from libc.stdint cimport uint64_t


cdef enum:
    LINK_LOCAL_BITS_BEFORE = 48
    LINK_LOCAL = 0xFE80  # and 48 bits of zero, where there is room for the link's number


cdef inline Address counted_as(const sockaddr* client) noexcept nogil:
    """`client` is IPv4 or IPv6."""
    cdef Address address = address_of(client)
    if address_is_v4(&address):
        return address
    if address.high == <uint64_t>LINK_LOCAL << LINK_LOCAL_BITS_BEFORE:
        address.high |= (<const sockaddr_in6*>client).sin6_scope_id
    else:
        address.low = 0
    return address


cdef inline uint64_t counted_hash(const HashKey* key, const Address* counted) noexcept nogil:
    """For a place in a table. Clients choose their addresses, and must not choose places."""
    return siphash(key, counted.high, counted.low)
