"""kecho.drop._sockdiag: the kernel's TCP sockets, shown and destroyed over netlink: sock_diag(7).

This is the only file of it that knows the GIL.
"""
from common.errors cimport system_error
from kernel.clock cimport clock_now_ms
from kernel.inet_diag cimport (
    INET_DIAG_NOCOOKIE, SOCK_DESTROY, SOCK_DIAG_BY_FAMILY, inet_diag_msg, inet_diag_sockid,
)
from kernel.netlink cimport (
    AF_NETLINK, NETLINK_CAP_ACK, NETLINK_SOCK_DIAG, NLM_F_ACK, NLM_F_DUMP, SOL_NETLINK,
)
from kernel.sched cimport CLONE_NEWNET, setns
from kernel.socket cimport (
    AF_INET, AF_INET6, SOCK_CLOEXEC, SOCK_RAW, setsockopt, socket,
)
from libc.errno cimport errno
from libc.stdint cimport UINT32_MAX, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset
from posix.unistd cimport close
from sockdiag.details cimport Seen
from sockdiag.wire cimport (
    ASK_MOST, AWAKE_BIT, BATCH_MOST, LOST, REPLY_BYTES, TRIES_MOST, Found, Request,
    ask_for_details, connect_to_kernel, exchange_batch, exchange_dump, fill_request, read_answers,
    read_dump, receive,
)

import os
from socket import htons, inet_ntop, ntohs
from threading import Lock

MOST_AT_ONCE = BATCH_MOST
IDENTITY_BYTES = 1 + sizeof(inet_diag_sockid)
# What destroy() and states() give where no answer came: neither an errno nor a state.
UNANSWERED = 1 << 16
# What states() adds to the state of a socket that is not idle.
AWAKE = AWAKE_BIT

cdef enum:
    IDENTITY_SIZE = 49
    V4_BYTES = 4
    V6_BYTES = 16


cdef int _open_netlink() except -1:
    cdef int on = 1, result
    cdef int fd = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_SOCK_DIAG)
    if fd < 0:
        raise system_error(errno, "socket(NETLINK_SOCK_DIAG)")
    result = connect_to_kernel(fd)
    if result < 0:
        close(fd)
        raise system_error(-result, "connect(NETLINK_SOCK_DIAG)")
    # Acks of errors then leave out the request; Linux 4.3, and only to save room.
    setsockopt(fd, SOL_NETLINK, NETLINK_CAP_ACK, &on, sizeof(on))
    return fd


cdef int _open_netlink_in(int namespace_fd) except -1:
    """A socket belongs to the network namespace its thread is in when it is made."""
    cdef int outside, fd = -1, error
    outside = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        if setns(namespace_fd, CLONE_NEWNET) < 0:
            raise system_error(errno, "setns")
        try:
            fd = _open_netlink()
        finally:
            if setns(outside, CLONE_NEWNET) < 0:
                error = errno
                if fd >= 0:
                    close(fd)
                raise system_error(error, "setns back")
    finally:
        close(outside)
    return fd


cdef object _as_tuple(const Seen* seen):
    cdef const inet_diag_msg* message = &seen.message
    cdef bint is_v6 = message.idiag_family == AF_INET6
    cdef Py_ssize_t size = V6_BYTES if is_v6 else V4_BYTES
    cdef const inet_diag_sockid* key = &message.id
    return (
        message.idiag_family,
        message.idiag_state,
        inet_ntop(message.idiag_family, (<const char*>key.idiag_src)[:size]),
        ntohs(key.idiag_sport),
        inet_ntop(message.idiag_family, (<const char*>key.idiag_dst)[:size]),
        ntohs(key.idiag_dport),
        key.idiag_if,
        <uint64_t>key.idiag_cookie[1] << 32 | key.idiag_cookie[0],
        message.idiag_timer,
        message.idiag_expires,
        message.idiag_retrans,
        message.idiag_rqueue,
        message.idiag_wqueue,
        message.idiag_uid,
        message.idiag_inode,
        None if seen.idle_ms == UINT32_MAX else seen.idle_ms,
        bool(seen.is_mptcp),
        bytes((message.idiag_family,)) + (<const char*>key)[:sizeof(inet_diag_sockid)],
    )


cdef list _as_tuples(const Found* found):
    cdef size_t i
    return [_as_tuple(&found.sockets[i]) for i in range(found.count)]


cdef class Handle:
    """Two netlink sockets: one to look, one to destroy. Any thread may use it, one at a time.

    namespace_fd: a network namespace to work in, or -1 for the thread's own.
    patience_ms: how long the kernel may be silent.
    Raises OSError that names the system call.
    """

    cdef int _dump_fd
    cdef int _destroy_fd
    cdef uint32_t _sequence
    cdef uint64_t _patience_ms
    cdef uint8_t* _buffer
    cdef object _lock

    def __cinit__(self, *, int namespace_fd=-1, uint64_t patience_ms=10000):
        self._dump_fd = self._destroy_fd = -1
        self._patience_ms = patience_ms
        self._sequence = <uint32_t>int.from_bytes(os.urandom(4), "little")
        self._lock = Lock()
        self._buffer = <uint8_t*>malloc(REPLY_BYTES)
        if self._buffer == NULL:
            raise MemoryError
        if namespace_fd < 0:
            self._dump_fd = _open_netlink()
            self._destroy_fd = _open_netlink()
        else:
            self._dump_fd = _open_netlink_in(namespace_fd)
            self._destroy_fd = _open_netlink_in(namespace_fd)

    def __dealloc__(self):
        self._close()
        free(self._buffer)

    cdef void _close(self) noexcept:
        if self._dump_fd >= 0:
            close(self._dump_fd)
        if self._destroy_fd >= 0:
            close(self._destroy_fd)
        self._dump_fd = self._destroy_fd = -1

    def close(self):
        """Waits until nobody uses it; calling it again does nothing."""
        with self._lock:
            self._close()

    def fileno(self):
        """The socket that looks; ioctl(2) about interfaces answers for its namespace."""
        return self._dump_fd

    def dump(self, uint8_t family, uint32_t states, uint16_t local_port=0, uint16_t peer_port=0):
        """Every TCP socket of a family whose state is in the mask 1 << state; port 0 is any.

        A tuple each: family, state, local address and port, peer address and port, interface
        index, cookie, timer, expires (ms), retransmissions, receive queue, send queue, uid, inode,
        ms since it last sent or received data (None if unknown), whether it is a subflow of MPTCP
        (an older kernel says so only with CAP_NET_ADMIN), identity for destroy(). Raises OSError;
        the handle is to be closed then.
        """
        cdef Found found
        cdef Request request
        cdef inet_diag_sockid identity
        cdef int result = 0, fd
        if family != AF_INET and family != AF_INET6:
            raise ValueError(f"family {family} is neither AF_INET nor AF_INET6")
        memset(&found, 0, sizeof(found))
        memset(&identity, 0, sizeof(identity))
        identity.idiag_sport = htons(local_port)
        identity.idiag_dport = htons(peer_port)
        identity.idiag_cookie[0] = identity.idiag_cookie[1] = INET_DIAG_NOCOOKIE
        try:
            with self._lock:
                fd = self._dump_fd
                if fd < 0:
                    raise ValueError("the handle is closed")
                fill_request(
                    &request, SOCK_DIAG_BY_FAMILY, NLM_F_DUMP, self._sequence + 1, family, states,
                    &identity,
                )
                ask_for_details(&request)
                self._sequence += TRIES_MOST
                with nogil:
                    result = exchange_dump(
                        fd, self._buffer, &request, self._patience_ms, &found
                    )
            if result < 0:
                raise system_error(-result, "SOCK_DIAG_BY_FAMILY")
            return _as_tuples(&found)
        finally:
            free(found.sockets)

    def states(self, list identities not None, uint32_t idle_ms=0):
        """Asks for the states of the sockets with these identities, MOST_AT_ONCE at most.

        Returns for each: its state, with AWAKE added if it has sent or received data within
        idle_ms, or the kernel does not say; -errno (ENOENT: it is gone, or the tuple is another
        socket's by now), or UNANSWERED. Raises as destroy() does.
        """
        return self._exchange(identities, False, idle_ms)

    def destroy(self, list identities not None):
        """Destroys the sockets with these identities, MOST_AT_ONCE at most, in one message.

        Returns for each: 0, or the kernel's errno (ENOENT: it is gone, or the tuple is another
        socket's by now), or UNANSWERED if the ack was lost. Raises ValueError for an identity
        without a cookie, which would match listeners, and OSError if nothing was sent.
        """
        return [abs(answer) for answer in self._exchange(identities, True, 0)]

    cdef list _exchange(self, list identities, bint destroys, uint32_t idle_ms):
        cdef Request[BATCH_MOST] requests
        cdef int[BATCH_MOST] answers
        cdef inet_diag_sockid key
        cdef const uint8_t* raw
        cdef uint32_t i, at, size, count
        cdef int result = 0, fd
        cdef uint16_t kind = SOCK_DESTROY if destroys else SOCK_DIAG_BY_FAMILY
        cdef uint16_t flags = NLM_F_ACK if destroys else 0
        if len(identities) > BATCH_MOST:
            raise ValueError(f"{BATCH_MOST} at most at once, not {len(identities)}")
        count = <uint32_t>len(identities)
        if count == 0:
            return []
        with self._lock:
            fd = self._destroy_fd if destroys else self._dump_fd
            if fd < 0:
                raise ValueError("the handle is closed")
            for i in range(count):
                identity = identities[i]
                if not isinstance(identity, bytes) or len(identity) != IDENTITY_SIZE:
                    raise ValueError("not an identity from dump()")
                raw = <const uint8_t*><const char*>identity
                memcpy(&key, raw + 1, sizeof(key))
                if (
                    key.idiag_cookie[0] == <uint32_t>INET_DIAG_NOCOOKIE
                    and key.idiag_cookie[1] == <uint32_t>INET_DIAG_NOCOOKIE
                ):
                    raise ValueError("an identity without a cookie")
                fill_request(&requests[i], kind, flags, self._sequence + 1 + i, raw[0], 0, &key)
                if idle_ms > 0:
                    ask_for_details(&requests[i])
            self._sequence += count
            with nogil:
                at = 0
                while at < count and result == 0:
                    size = count if destroys else min(<uint32_t>ASK_MOST, count - at)
                    result = exchange_batch(
                        fd, self._buffer, &requests[at], size, self._patience_ms, idle_ms,
                        &answers[at],
                    )
                    at += size
        if result < 0:
            raise system_error(-result, "SOCK_DESTROY" if destroys else "SOCK_DIAG_BY_FAMILY")
        return [answers[i] for i in range(count)]


# ---- the parsers alone, for tests ---------------------------------------------------------------


def receive_from_kernel(int fd, uint64_t patience_ms=0):
    """The next datagram that the kernel has sent to a netlink socket. Raises OSError."""
    cdef uint8_t[4096] buffer
    cdef ssize_t size
    with nogil:
        size = receive(fd, buffer, sizeof(buffer), clock_now_ms() + patience_ms)
    if size < 0:
        raise system_error(<int>-size, "recvfrom")
    return (<const char*>buffer)[:size]


def parse_dump(bytes datagram not None, uint32_t sequence, uint32_t port_id=0):
    """(whether the dump ends here, sockets as dump() gives them) of a datagram that came to this
    port id. Raises OSError."""
    cdef Found found
    cdef int result
    memset(&found, 0, sizeof(found))
    try:
        result = read_dump(
            <uint8_t*><char*>datagram, <size_t>len(datagram), port_id, sequence, &found
        )
        if result < 0:
            raise system_error(-result, "SOCK_DIAG_BY_FAMILY")
        return result == 1, _as_tuples(&found)
    finally:
        free(found.sockets)


def parse_answers(
    bytes datagram not None, uint32_t first, uint32_t count, uint32_t idle_ms=0,
    uint32_t port_id=0
):
    """What states() would return for `count` requests from number `first` on."""
    cdef int[BATCH_MOST] answers
    cdef uint32_t i
    if count > BATCH_MOST:
        raise ValueError(f"{BATCH_MOST} at most at once, not {count}")
    for i in range(count):
        answers[i] = LOST
    read_answers(
        <const uint8_t*><const char*>datagram, <size_t>len(datagram), port_id, first, count,
        idle_ms, answers,
    )
    return [answers[i] for i in range(count)]
