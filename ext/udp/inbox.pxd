"""Receiving: a batch of messages, each of them one datagram or, by GRO, several of one flow."""
from kernel.datagram cimport (
    CMSG_DATA, CMSG_FIRSTHDR, CMSG_NXTHDR, MSG_CTRUNC, cmsghdr, mmsghdr, recvmmsg,
)
from kernel.inet cimport (
    IPPROTO_IP, IPPROTO_IPV6, IPV6_HOPLIMIT, IPV6_PKTINFO, IP_PKTINFO, IP_TTL, SOL_UDP, UDP_GRO,
    in6_pktinfo, in_pktinfo,
)
from kernel.socket cimport MSG_DONTWAIT
from libc.errno cimport errno
from libc.stdint cimport uint8_t, uint32_t
from libc.string cimport memcpy
from udp.layout cimport (
    KECHO_UDP_BATCH, KECHO_UDP_BUFFER_BYTES, KECHO_UDP_CONTROL_BYTES, Address, Inbox, Request,
)


cdef inline void inbox_init(Inbox* inbox, uint8_t* buffer) noexcept nogil:
    cdef int i
    inbox.buffer = buffer
    for i in range(KECHO_UDP_BATCH):
        inbox.pieces[i].iov_base = buffer + <size_t>i * KECHO_UDP_BUFFER_BYTES
        inbox.pieces[i].iov_len = KECHO_UDP_BUFFER_BYTES
        inbox.headers[i].msg_hdr.msg_iov = &inbox.pieces[i]
        inbox.headers[i].msg_hdr.msg_iovlen = 1
        inbox.headers[i].msg_hdr.msg_name = &inbox.sources[i]
        inbox.headers[i].msg_hdr.msg_control = inbox.control[i]


cdef inline int inbox_receive(Inbox* inbox, int fd) noexcept nogil:
    """Fills the inbox with what is there. Returns how many messages, or -errno."""
    cdef int i, received
    for i in range(KECHO_UDP_BATCH):  # the kernel has written into those of the last batch
        inbox.headers[i].msg_hdr.msg_namelen = sizeof(Address)
        inbox.headers[i].msg_hdr.msg_controllen = KECHO_UDP_CONTROL_BYTES
    received = recvmmsg(fd, inbox.headers, KECHO_UDP_BATCH, MSG_DONTWAIT, NULL)
    return received if received >= 0 else -errno


cdef inline void inbox_read(Inbox* inbox, uint32_t number, Request* request) noexcept nogil:
    """What message `number` is."""
    cdef mmsghdr* message = &inbox.headers[number]
    cdef cmsghdr* entry = CMSG_FIRSTHDR(&message.msg_hdr)
    cdef int segment_bytes = 0
    cdef int hops = 0
    request.data = <uint8_t*>inbox.pieces[number].iov_base
    request.source = &inbox.sources[number]
    request.bytes = message.msg_len
    request.has_asked = False
    while entry != NULL:
        if entry.cmsg_level == IPPROTO_IP and entry.cmsg_type == IP_PKTINFO:
            memcpy(&request.asked.v4, CMSG_DATA(entry), sizeof(in_pktinfo))
            request.has_asked = True
        elif entry.cmsg_level == IPPROTO_IPV6 and entry.cmsg_type == IPV6_PKTINFO:
            memcpy(&request.asked.v6, CMSG_DATA(entry), sizeof(in6_pktinfo))
            request.has_asked = True
        elif (entry.cmsg_level == IPPROTO_IP and entry.cmsg_type == IP_TTL
                or entry.cmsg_level == IPPROTO_IPV6 and entry.cmsg_type == IPV6_HOPLIMIT):
            memcpy(&hops, CMSG_DATA(entry), sizeof(hops))
        elif entry.cmsg_level == SOL_UDP and entry.cmsg_type == UDP_GRO:
            memcpy(&segment_bytes, CMSG_DATA(entry), sizeof(segment_bytes))
        entry = CMSG_NXTHDR(&message.msg_hdr, entry)
    request.hops = <uint32_t>hops
    request.is_repeated = False
    # Without its segment size a message may be several datagrams that pass for one.
    if message.msg_hdr.msg_flags & MSG_CTRUNC:
        request.has_asked = False
    if 0 < segment_bytes < <int>request.bytes:
        request.segment_bytes = <uint32_t>segment_bytes
        request.datagrams = (request.bytes + request.segment_bytes - 1) // request.segment_bytes
    else:
        request.segment_bytes = 0
        request.datagrams = 1
