"""Who is answered: nobody through whom an echo could come back for ever, and who is allowed.

One spoofed datagram from the server's own address and port, or from another echo's (port 7,
chargen's 19, ...), would run in circles until somebody stops it. The own port is refused from
every address, so that two servers on the same port of two hosts are no such circle, either.
"""
from common.counted cimport counted_as, counted_hash
from common.rules cimport Address as ClientAddress, address_of, rules_allow
from kernel.inet cimport (
    IN6_IS_ADDR_MULTICAST, IN6_IS_ADDR_UNSPECIFIED, ntohl, ntohs,
)
from kernel.socket cimport AF_INET, sockaddr
from libc.stdint cimport uint16_t, uint32_t, uint64_t
from udp.layout cimport (
    REFUSALS, REFUSED_ADDRESS, REFUSED_DENIED, REFUSED_OWN_PORT, REFUSED_PORT, Address, Control,
    Request,
)


cdef inline bint _is_v4_unicast(uint32_t address) noexcept nogil:
    """Neither 0.0.0.0/8 nor multicast nor reserved, which ends with 255.255.255.255."""
    return address >> 24 != 0 and address >> 28 < 0xe


cdef inline bint _is_addressed_to_one(const Request* request) noexcept nogil:
    if request.source.any.sa_family == AF_INET:
        # ip(7): ipi_addr is what the header says, ipi_spec_dst the local address of the route.
        # They differ for multicast and for every kind of broadcast, a subnet's, too.
        return (
            request.asked.v4.ipi_addr.s_addr == request.asked.v4.ipi_spec_dst.s_addr
            and _is_v4_unicast(ntohl(request.asked.v4.ipi_addr.s_addr))
            and _is_v4_unicast(ntohl(request.source.v4.sin_addr.s_addr)))
    return not (
        IN6_IS_ADDR_MULTICAST(&request.asked.v6.ipi6_addr)
        or IN6_IS_ADDR_UNSPECIFIED(&request.asked.v6.ipi6_addr)
        or IN6_IS_ADDR_MULTICAST(&request.source.v6.sin6_addr)
        or IN6_IS_ADDR_UNSPECIFIED(&request.source.v6.sin6_addr))


cdef inline int guard_refusal(const Control* control, const Request* request) noexcept nogil:
    """Why it must not be answered, or REFUSALS."""
    cdef ClientAddress client
    cdef uint16_t port
    if request.source.any.sa_family == AF_INET:
        port = ntohs(request.source.v4.sin_port)
    else:
        port = ntohs(request.source.v6.sin6_port)
    if port == 0 or port < control.source_port_least:
        return REFUSED_PORT
    if port == control.own_port:
        return REFUSED_OWN_PORT
    if not request.has_asked or not _is_addressed_to_one(request):
        return REFUSED_ADDRESS
    client = address_of(<const sockaddr*>request.source)
    if not rules_allow(&control.rules, &client):
        return REFUSED_DENIED
    return REFUSALS


cdef inline uint64_t guard_source(const Control* control, const Address* source) noexcept nogil:
    """Whom a datagram is charged to."""
    cdef ClientAddress counted = counted_as(<const sockaddr*>source)
    return counted_hash(&control.limiter.hash_key, &counted)
