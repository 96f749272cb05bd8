"""Sending: replies are gathered, go in one call, and leave from the address that was asked.

Whatever a reply meets, it is sent once: it has gone, or it is lost and counted. UDP promises no
more, and whoever waits for one slow way would hold up all the others.
"""
from common.atomics cimport atomic_u64_add_single_writer
from kernel.datagram cimport (
    CMSG_DATA, CMSG_FIRSTHDR, CMSG_LEN, CMSG_SPACE, cmsghdr, mmsghdr, msghdr, sendmmsg,
)
from kernel.inet cimport (
    IN6_IS_ADDR_LINKLOCAL, IPPROTO_IP, IPPROTO_IPV6, IPV6_HOPLIMIT, IPV6_PKTINFO, IP_PKTINFO,
    IP_TTL, SOL_UDP, UDP_SEGMENT, in6_pktinfo, in_pktinfo, sockaddr_in, sockaddr_in6,
)
from kernel.socket cimport AF_INET, MSG_DONTWAIT, MSG_NOSIGNAL
from libc.errno cimport (
    EACCES, EAGAIN, ECONNREFUSED, EHOSTDOWN, EHOSTUNREACH, EINTR, EINVAL, EIO, EMSGSIZE, ENETDOWN,
    ENETUNREACH, ENOBUFS, ENOMEM, EPERM, errno,
)
from libc.stdint cimport uint8_t, uint16_t, uint32_t
from libc.string cimport memcpy
from udp.layout cimport (
    KECHO_UDP_CONTROL_BYTES, KECHO_UDP_REPLIES, KECHO_UDP_SEGMENTS, UDP_ERROR_DENIED,
    UDP_ERROR_FULL, UDP_ERROR_MEMORY, UDP_ERROR_SEND, UDP_ERROR_UNREACHABLE, Counters, Outbox,
    Request,
)
from udp.repeats cimport repeats_hops


# ---- gathering ----------------------------------------------------------------------------------

cdef inline void _say(
    msghdr* message, int level, int kind, const void* data, size_t size
) noexcept nogil:
    """Appends control data; msg_controllen is what there is so far."""
    cdef cmsghdr* entry
    cdef size_t before = message.msg_controllen
    # CMSG_NXTHDR would look into the entry that is not there yet.
    entry = <cmsghdr*>(<uint8_t*>message.msg_control + before)
    entry.cmsg_level = level
    entry.cmsg_type = kind
    entry.cmsg_len = CMSG_LEN(size)
    memcpy(CMSG_DATA(entry), data, size)
    message.msg_controllen = before + CMSG_SPACE(size)


cdef inline void _say_from_where(msghdr* message, const Request* request) noexcept nogil:
    cdef in_pktinfo v4
    cdef in6_pktinfo v6
    # Interface 0: by the routing table, which need not lead back where the request came from.
    if request.source.any.sa_family == AF_INET:
        v4.ipi_ifindex = 0
        v4.ipi_spec_dst = request.asked.v4.ipi_addr
        v4.ipi_addr.s_addr = 0
        _say(message, IPPROTO_IP, IP_PKTINFO, &v4, sizeof(v4))
        return
    v6.ipi6_addr = request.asked.v6.ipi6_addr
    v6.ipi6_ifindex = 0
    if IN6_IS_ADDR_LINKLOCAL(&v6.ipi6_addr):  # every interface has such addresses: EINVAL
        v6.ipi6_ifindex = request.asked.v6.ipi6_ifindex
    _say(message, IPPROTO_IPV6, IPV6_PKTINFO, &v6, sizeof(v6))


cdef inline void _say_how_far(msghdr* message, const Request* request) noexcept nogil:
    cdef int hops = <int>repeats_hops(request)
    if hops == 0:
        return
    if request.source.any.sa_family == AF_INET:
        _say(message, IPPROTO_IP, IP_TTL, &hops, sizeof(hops))
    else:
        _say(message, IPPROTO_IPV6, IPV6_HOPLIMIT, &hops, sizeof(hops))


cdef inline void _append(
    Outbox* outbox, const Request* request, uint32_t begin, uint32_t size, uint32_t datagrams
) noexcept nogil:
    """One message: bytes [begin, begin + size) of the request, so many datagrams."""
    cdef uint32_t number = outbox.count
    cdef msghdr* message = &outbox.headers[number].msg_hdr
    cdef uint16_t segment_bytes
    outbox.pieces[number].iov_base = request.data + begin
    outbox.pieces[number].iov_len = size
    outbox.datagrams[number] = datagrams
    outbox.segment_bytes[number] = request.segment_bytes if datagrams > 1 else 0
    message.msg_name = request.source
    message.msg_namelen = (
        sizeof(sockaddr_in) if request.source.any.sa_family == AF_INET else sizeof(sockaddr_in6))
    message.msg_iov = &outbox.pieces[number]
    message.msg_iovlen = 1
    message.msg_control = outbox.control[number]
    message.msg_controllen = 0
    message.msg_flags = 0
    _say_from_where(message, request)
    if request.is_repeated:
        _say_how_far(message, request)
    if datagrams > 1:
        segment_bytes = <uint16_t>request.segment_bytes
        _say(message, SOL_UDP, UDP_SEGMENT, &segment_bytes, sizeof(segment_bytes))
    outbox.count += 1


cdef inline void outbox_answer(
    Outbox* outbox, int fd, Counters* counters, const Request* request, uint32_t first,
    uint32_t datagrams
) noexcept nogil:
    """Echoes `datagrams` of a request from `first` on; sends what there is when there is no
    room."""
    cdef uint32_t begin = first * request.segment_bytes
    cdef uint32_t several, size
    while datagrams > 0:
        several = min(datagrams, <uint32_t>KECHO_UDP_SEGMENTS)
        size = request.bytes - begin
        if request.segment_bytes != 0:
            size = min(size, several * request.segment_bytes)
        if outbox.count == KECHO_UDP_REPLIES:
            outbox_flush(outbox, fd, counters)
        _append(outbox, request, begin, size, several)
        begin += size
        datagrams -= several


# ---- sending ------------------------------------------------------------------------------------

cdef inline int _kind_of(int error) noexcept nogil:
    if error == EAGAIN:
        return UDP_ERROR_FULL
    if error == ENOBUFS or error == ENOMEM:
        return UDP_ERROR_MEMORY
    if (error == ENETUNREACH or error == EHOSTUNREACH or error == ECONNREFUSED
            or error == EHOSTDOWN or error == ENETDOWN):
        return UDP_ERROR_UNREACHABLE
    if error == EPERM or error == EACCES:
        return UDP_ERROR_DENIED
    return UDP_ERROR_SEND


cdef inline void _note_sent(Counters* counters, uint32_t datagrams, size_t size) noexcept nogil:
    atomic_u64_add_single_writer(&counters.sent, datagrams)
    atomic_u64_add_single_writer(&counters.bytes_sent, size)


cdef inline void _note_lost(Counters* counters, int error, uint32_t datagrams) noexcept nogil:
    atomic_u64_add_single_writer(&counters.errors[_kind_of(error)], datagrams)


cdef inline int _send(int fd, mmsghdr* messages, uint32_t count) noexcept nogil:
    """Returns how many have gone, at least 1, or -errno of the first."""
    cdef int sent
    while True:
        sent = sendmmsg(fd, messages, count, MSG_DONTWAIT | MSG_NOSIGNAL)
        if sent >= 0 or errno != EINTR:
            return sent if sent >= 0 else -errno


cdef inline void _send_in_segments(
    Outbox* outbox, uint32_t number, int fd, Counters* counters
) noexcept nogil:
    """Message `number` once more, as single datagrams: the way to the source cannot carry it as
    one: no checksum offload on the device (EIO, read), segments longer than its MTU (EMSGSIZE;
    on older kernels EINVAL, read)."""
    cdef mmsghdr* message = &outbox.headers[number]
    cdef uint8_t* begin = <uint8_t*>outbox.pieces[number].iov_base
    cdef size_t left = outbox.pieces[number].iov_len
    cdef int result
    # UDP_SEGMENT is the last of the control data.
    message.msg_hdr.msg_controllen -= CMSG_SPACE(sizeof(uint16_t))
    while left > 0:
        outbox.pieces[number].iov_base = begin
        outbox.pieces[number].iov_len = min(left, <size_t>outbox.segment_bytes[number])
        result = _send(fd, message, 1)
        if result < 0:
            _note_lost(counters, -result, 1)
        else:
            _note_sent(counters, 1, outbox.pieces[number].iov_len)
        begin += outbox.pieces[number].iov_len
        left -= outbox.pieces[number].iov_len


cdef inline void outbox_flush(Outbox* outbox, int fd, Counters* counters) noexcept nogil:
    """Sends all of it; empty afterwards."""
    cdef uint32_t first = 0
    cdef uint32_t number
    cdef int result
    while first < outbox.count:
        # An error of a later message is not told: it is met again as that of the first.
        result = _send(fd, &outbox.headers[first], outbox.count - first)
        if result >= 0:
            for number in range(first, first + <uint32_t>result):
                _note_sent(counters, outbox.datagrams[number], outbox.pieces[number].iov_len)
            first += <uint32_t>result
            continue
        if result == -EAGAIN:  # the others would find no room, either
            for number in range(first, outbox.count):
                _note_lost(counters, EAGAIN, outbox.datagrams[number])
            break
        if outbox.datagrams[first] > 1 and (
                result == -EIO or result == -EINVAL or result == -EMSGSIZE):
            _send_in_segments(outbox, first, fd, counters)
        else:
            _note_lost(counters, -result, outbox.datagrams[first])
        first += 1
    outbox.count = 0
