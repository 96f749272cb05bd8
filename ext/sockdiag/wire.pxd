"""The wire: one request and its replies on a NETLINK_SOCK_DIAG socket, without the GIL.

Functions return >= 0 or -errno. A reply comes from the kernel, whose port id is 0, names our port
id and the sequence number of its request. Others are passed over: they are left over from an
exchange that was given up, or somebody has forged them, which takes CAP_NET_ADMIN over the network
namespace, as whoever made it has (netlink(7); netlink_sendmsg() in net/netlink/af_netlink.c).
"""
from kernel.clock cimport clock_now_ms
from kernel.inet_diag cimport (
    INET_DIAG_INFO, SOCK_DESTROY, SOCK_DIAG_BY_FAMILY, inet_diag_msg, inet_diag_req_v2,
    inet_diag_sockid,
)
from kernel.netlink cimport (
    AF_NETLINK, NLMSG_DONE, NLMSG_ERROR, NLMSG_OVERRUN, NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST,
    nlmsgerr, nlmsghdr, sockaddr_nl,
)
from kernel.poll cimport POLLIN, poll, pollfd
from kernel.socket cimport (
    AF_INET, AF_INET6, MSG_DONTWAIT, MSG_TRUNC, connect, getsockname, recv, recvfrom, send,
    sockaddr, socklen_t,
)
from libc.errno cimport EAGAIN, EBADMSG, EINTR, EMSGSIZE, ENOBUFS, ENOMEM, ETIMEDOUT, errno
from libc.stdint cimport UINT32_MAX, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport realloc
from libc.string cimport memcpy, memset
from sockdiag.details cimport Seen, read_details

cdef enum:
    # The acks of so many requests fit the default receive buffer twice over; one that does not
    # fit is lost for ever (tried on Linux 6.18: 256 fit).
    BATCH_MOST = 128
    # A reply with a socket in it takes more room than an ack (tried on Linux 6.18: 128 fit).
    ASK_MOST = 32
    # Of a dump, or of sending, that the kernel had no memory for.
    TRIES_MOST = 4
    RETRY_MS = 10
    # What stands where no answer came: neither a state nor -errno.
    LOST = 1 << 16
    # Added to the state of a socket that is not idle.
    AWAKE_BIT = 1 << 8
    # The kernel's greatest errno: MAX_ERRNO in include/linux/err.h.
    ERRNO_MOST = 4095
    # netlink(7): the kernel fills at most 32 KiB a message of a dump.
    REPLY_BYTES = 65536
    IPPROTO_TCP_NUMBER = 6

cdef struct Request:
    nlmsghdr header
    inet_diag_req_v2 body

cdef struct Found:
    Seen* sockets
    size_t count
    size_t room


cdef inline int connect_to_kernel(int fd) noexcept nogil:
    """Has the kernel refuse what others send to this socket, with ECONNREFUSED, whatever they may;
    what they sent before is thrown away. It binds the socket, too: netlink_connect()."""
    cdef sockaddr_nl kernel
    cdef uint8_t byte
    memset(&kernel, 0, sizeof(kernel))
    kernel.nl_family = AF_NETLINK
    if connect(fd, <sockaddr*>&kernel, sizeof(kernel)) < 0:
        return -errno
    while recv(fd, &byte, sizeof(byte), MSG_DONTWAIT) >= 0 or errno == EINTR:
        pass
    return 0


cdef inline int read_port_id(int fd, uint32_t* port_id) noexcept nogil:
    """Our own, which stands in the kernel's replies."""
    cdef sockaddr_nl own
    cdef socklen_t size_bytes = sizeof(own)
    if getsockname(fd, <sockaddr*>&own, &size_bytes) < 0:
        return -errno
    port_id[0] = own.nl_pid
    return 0


cdef inline int send_all(int fd, const void* data, size_t size_bytes) noexcept nogil:
    """A netlink datagram goes as a whole or not at all; ENOBUFS: the kernel had no memory for it,
    which may be over in a moment."""
    cdef ssize_t sent
    cdef int error, tries = 0
    while True:
        sent = send(fd, data, size_bytes, 0)
        if sent >= 0:
            return 0
        error = errno
        if error == ENOBUFS and tries + 1 < TRIES_MOST:
            tries += 1
            poll(NULL, 0, RETRY_MS)
        elif error != EINTR:
            return -error


cdef inline ssize_t receive(
    int fd, uint8_t* buffer, size_t room_bytes, uint64_t deadline_ms
) noexcept nogil:
    """The kernel's next datagram, or -ETIMEDOUT at the deadline; -EMSGSIZE if it did not fit."""
    cdef pollfd waited
    cdef sockaddr_nl sender
    cdef socklen_t sender_bytes
    cdef ssize_t size
    cdef uint64_t now_ms
    while True:
        sender_bytes = sizeof(sender)
        size = recvfrom(
            fd, buffer, room_bytes, MSG_DONTWAIT | MSG_TRUNC, <sockaddr*>&sender, &sender_bytes
        )
        if size >= 0 and sender_bytes == sizeof(sender) and sender.nl_pid == 0:
            return size if <size_t>size <= room_bytes else -EMSGSIZE
        if size < 0 and errno == EINTR:
            continue
        if size < 0 and errno != EAGAIN:
            return -errno
        now_ms = clock_now_ms()
        if now_ms >= deadline_ms:
            return -ETIMEDOUT
        if size >= 0:
            continue  # somebody else's
        waited.fd = fd
        waited.events = POLLIN
        waited.revents = 0
        if poll(&waited, 1, <int>min(deadline_ms - now_ms, <uint64_t>60000)) < 0:
            if errno != EINTR:
                return -errno


cdef inline void fill_request(
    Request* request, uint16_t kind, uint16_t flags, uint32_t sequence, uint8_t family,
    uint32_t states, const inet_diag_sockid* identity,
) noexcept nogil:
    memset(request, 0, sizeof(Request))
    request.header.nlmsg_len = sizeof(Request)
    request.header.nlmsg_type = kind
    request.header.nlmsg_flags = <uint16_t>(NLM_F_REQUEST | flags)
    request.header.nlmsg_seq = sequence
    request.body.sdiag_family = family
    request.body.sdiag_protocol = IPPROTO_TCP_NUMBER
    request.body.idiag_states = states
    memcpy(&request.body.id, identity, sizeof(inet_diag_sockid))


cdef inline void ask_for_details(Request* request) noexcept nogil:
    """It costs the kernel a lock of each socket."""
    request.body.idiag_ext = 1 << (INET_DIAG_INFO - 1)


cdef inline int keep(
    Found* found, const uint8_t* payload, size_t payload_bytes
) noexcept nogil:
    cdef size_t room
    cdef void* larger
    if found.count == found.room:
        room = max(<size_t>256, found.room * 2)
        larger = realloc(found.sockets, room * sizeof(Seen))
        if larger == NULL:
            return -ENOMEM
        found.sockets = <Seen*>larger
        found.room = room
    memcpy(&found.sockets[found.count].message, payload, sizeof(inet_diag_msg))
    read_details(
        &found.sockets[found.count], payload + sizeof(inet_diag_msg), payload + payload_bytes
    )
    found.count += 1
    return 0


cdef inline int reply_error(
    const uint8_t* payload, size_t payload_bytes
) noexcept nogil:
    """0 or -errno, as an NLMSG_ERROR or NLMSG_DONE carries it; -EBADMSG: it carries neither."""
    cdef int error
    if payload_bytes < sizeof(int):
        return -EBADMSG
    memcpy(&error, payload, sizeof(int))
    return error if -ERRNO_MOST <= error <= 0 else -EBADMSG


cdef inline bint has_known_family(const uint8_t* payload) noexcept nogil:
    cdef inet_diag_msg message
    memcpy(&message, payload, sizeof(message))
    return message.idiag_family == AF_INET or message.idiag_family == AF_INET6


cdef inline int read_dump(
    uint8_t* data, size_t size_bytes, uint32_t port_id, uint32_t sequence, Found* found
) noexcept nogil:
    """Takes one datagram of a dump apart: 1 at the end of the dump, 0 before it."""
    cdef size_t offset = 0
    cdef nlmsghdr header
    cdef size_t payload_bytes
    cdef int result
    while size_bytes - offset >= sizeof(nlmsghdr):
        memcpy(&header, data + offset, sizeof(nlmsghdr))
        if header.nlmsg_len < sizeof(nlmsghdr) or header.nlmsg_len > size_bytes - offset:
            return -EBADMSG
        payload_bytes = header.nlmsg_len - sizeof(nlmsghdr)
        if header.nlmsg_seq == sequence and header.nlmsg_pid == port_id:
            if header.nlmsg_type == SOCK_DIAG_BY_FAMILY:
                if payload_bytes < sizeof(inet_diag_msg) or not has_known_family(
                    data + offset + sizeof(nlmsghdr)
                ):
                    return -EBADMSG
                result = keep(found, data + offset + sizeof(nlmsghdr), payload_bytes)
                if result < 0:
                    return result
            elif header.nlmsg_type == NLMSG_DONE:
                # Linux before 4.13 may leave the error out.
                if payload_bytes >= sizeof(int):
                    result = reply_error(data + offset + sizeof(nlmsghdr), payload_bytes)
                    if result < 0:
                        return result
                return 1
            elif header.nlmsg_type == NLMSG_ERROR:
                result = reply_error(data + offset + sizeof(nlmsghdr), payload_bytes)
                return result if result < 0 else -EBADMSG
            elif header.nlmsg_type == NLMSG_OVERRUN:
                return -ENOBUFS
        offset += (header.nlmsg_len + 3) & ~<size_t>3
        if offset > size_bytes:
            break
    return 0


cdef inline int collect_dump(
    int fd, uint8_t* buffer, uint32_t port_id, uint32_t sequence, uint64_t patience_ms,
    Found* found,
) noexcept nogil:
    """The rest of a dump that was asked for; -ETIMEDOUT after `patience_ms` of silence."""
    cdef ssize_t size
    cdef int result = 0
    while result == 0:
        size = receive(fd, buffer, REPLY_BYTES, clock_now_ms() + patience_ms)
        if size < 0:
            return <int>size
        result = read_dump(buffer, <size_t>size, port_id, sequence, found)
    return result if result < 0 else 0


cdef inline int exchange_dump(
    int fd, uint8_t* buffer, Request* request, uint64_t patience_ms, Found* found
) noexcept nogil:
    """Asks for a dump and collects all of it. It takes TRIES_MOST sequence numbers at most.

    After ENOBUFS what is left is read to its end, since the kernel begins no other dump before,
    and thrown away: one that may have a hole would make a socket look gone.
    """
    cdef uint32_t port_id = 0
    cdef int tries = 0, result = read_port_id(fd, &port_id)
    if result < 0:
        return result
    while True:
        found.count = 0
        result = send_all(fd, request, sizeof(Request))
        if result == 0:
            result = collect_dump(
                fd, buffer, port_id, request.header.nlmsg_seq, patience_ms, found
            )
            if result != -ENOBUFS:
                return result
            while result == -ENOBUFS and tries + 1 < TRIES_MOST:
                tries += 1
                result = collect_dump(
                    fd, buffer, port_id, request.header.nlmsg_seq, patience_ms, found
                )
        if result < 0:
            return result
        request.header.nlmsg_seq += 1


cdef inline int read_answer(
    uint16_t kind, const uint8_t* payload, size_t payload_bytes, uint32_t idle_ms
) noexcept nogil:
    """The state of a socket that was asked for, 0 (done) or -errno; LOST: it is no answer."""
    cdef Seen seen
    if kind == NLMSG_ERROR:
        return reply_error(payload, payload_bytes)
    if kind != SOCK_DIAG_BY_FAMILY:
        return LOST
    if payload_bytes < sizeof(inet_diag_msg):
        return -EBADMSG
    memcpy(&seen.message, payload, sizeof(inet_diag_msg))
    if idle_ms > 0:
        read_details(&seen, payload + sizeof(inet_diag_msg), payload + payload_bytes)
        if seen.idle_ms < idle_ms or seen.idle_ms == UINT32_MAX:
            return seen.message.idiag_state | AWAKE_BIT
    return seen.message.idiag_state


cdef inline uint32_t read_answers(
    const uint8_t* data, size_t size_bytes, uint32_t port_id, uint32_t first, uint32_t count,
    uint32_t idle_ms, int* answers,
) noexcept nogil:
    """Puts each answer to requests first .. first + count - 1 in its place; how many were new."""
    cdef size_t offset = 0
    cdef nlmsghdr header
    cdef uint32_t index, answered = 0
    while size_bytes - offset >= sizeof(nlmsghdr):
        memcpy(&header, data + offset, sizeof(nlmsghdr))
        if header.nlmsg_len < sizeof(nlmsghdr) or header.nlmsg_len > size_bytes - offset:
            break
        index = header.nlmsg_seq - first
        if header.nlmsg_pid == port_id and index < count and answers[index] == LOST:
            answers[index] = read_answer(
                header.nlmsg_type, data + offset + sizeof(nlmsghdr),
                header.nlmsg_len - sizeof(nlmsghdr), idle_ms,
            )
            answered += answers[index] != LOST
        offset += (header.nlmsg_len + 3) & ~<size_t>3
        if offset > size_bytes:
            break
    return answered


cdef inline int exchange_batch(
    int fd, uint8_t* buffer, const Request* requests, uint32_t count, uint64_t patience_ms,
    uint32_t idle_ms, int* answers,
) noexcept nogil:
    """Sends a batch in one message and drains its answers, as read_answer() gives them.

    Returns -errno if the batch was not sent at all. What was not answered stays LOST.
    """
    cdef uint32_t first = requests[0].header.nlmsg_seq
    cdef uint32_t i, port_id = 0, answered = 0
    cdef ssize_t size
    cdef uint64_t deadline_ms
    cdef int result = read_port_id(fd, &port_id)
    if result < 0:
        return result
    for i in range(count):
        answers[i] = LOST
    result = send_all(fd, requests, count * sizeof(Request))
    if result < 0:
        return result
    deadline_ms = clock_now_ms() + patience_ms
    while answered < count:
        size = receive(fd, buffer, REPLY_BYTES, deadline_ms)
        if size == -ENOBUFS:
            # Some answers are lost. The kernel had handled the whole batch when send() returned,
            # so that those which are not lost are here already.
            deadline_ms = 0
        elif size == -EMSGSIZE:
            pass
        elif size < 0:
            break
        else:
            answered += read_answers(
                buffer, <size_t>size, port_id, first, count, idle_ms, answers
            )
    return 0
