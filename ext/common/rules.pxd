"""Clients by prefix: the most specific rule decides. rules.h says what each field means."""
from common.memory cimport cache_lines
from kernel.inet cimport AF_INET, be64toh, ntohl, sockaddr_in, sockaddr_in6
from kernel.socket cimport sockaddr
from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memcpy

cdef extern from "common/rules.h" nogil:
    ctypedef struct Address "struct kecho_address":
        uint64_t high
        uint64_t low

    ctypedef struct Rule "struct kecho_rule":
        Address prefix
        uint32_t length
        uint32_t same_length
        uint32_t is_allowed

    ctypedef struct Rules "struct kecho_rules":
        Rule* all
        uint32_t count
        uint32_t is_allowed_otherwise


cdef enum:
    V4_BITS_BEFORE = 96  # IPv4 is ::ffff:0:0/96


cdef inline Address address_of(const sockaddr* client) noexcept nogil:
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


cdef inline bint address_is_v4(const Address* address) noexcept nogil:
    return address.high == 0 and address.low >> 32 == 0xFFFF


cdef inline int rules_take(Rules* rules, list given, bint is_allowed_otherwise) except -1:
    """For the .pyx files, which hold the GIL. given: (prefix as an integer of 128 bits, its length,
    whether it is allowed), the longest first and then in ascending order. `all` is to be freed.
    Raises OSError."""
    cdef Rule* rule
    cdef uint32_t i
    rules.is_allowed_otherwise = is_allowed_otherwise
    rules.all = <Rule*>cache_lines(len(given) * sizeof(Rule))
    for prefix, length, is_allowed in given:
        rule = &rules.all[rules.count]
        rule.prefix.high, rule.prefix.low = prefix >> 64, prefix & 0xFFFFFFFFFFFFFFFF
        rule.length = length
        rule.is_allowed = is_allowed
        rules.count += 1
    i = rules.count
    while i > 0:
        i -= 1
        rule = &rules.all[i]
        rule.same_length = 1
        if i + 1 < rules.count and rule[1].length == rule.length:
            rule.same_length += rule[1].same_length
    return 0


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


cdef inline bint rules_allow(const Rules* rules, const Address* address) noexcept nogil:
    """By the longest prefix that holds the address: a binary search for each length there is.
    ::/0 and the like are about IPv6 clients only."""
    cdef uint32_t begin = 0, end, low, high, middle
    cdef Address wanted
    cdef uint32_t shortest = V4_BITS_BEFORE if address_is_v4(address) else 0
    while begin < rules.count and rules.all[begin].length >= shortest:
        end = begin + rules.all[begin].same_length
        wanted = _first_bits(address, rules.all[begin].length)
        low, high = begin, end
        while low < high:
            middle = low + (high - low) // 2
            if _is_before(&rules.all[middle].prefix, &wanted):
                low = middle + 1
            else:
                high = middle
        if low < end and not _is_before(&wanted, &rules.all[low].prefix):
            return rules.all[low].is_allowed != 0
        begin = end
    return rules.is_allowed_otherwise != 0
