"""One connection: recv, send at once, keep only what the kernel would not take.

Every function here is called by the worker that owns the connection. The socket is edge-triggered
in the epoll set, so a worker that leaves bytes in it must see to it that it comes back: it holds
the connection (SERVED_MORE) or changes the registration, upon which epoll reports again whatever
is there.
"""
from common.atomics cimport atomic_u32_load_relaxed, atomic_u32_store_relaxed
from engine.counters cimport count, count_by, count_closed, count_error
from engine.layout cimport (
    CLOSE_DRAINED, CLOSE_EOF, CLOSE_ERROR, CLOSE_EVICTED, CLOSE_IDLE, CLOSE_RESET, CLOSE_STALLED,
    CLOSE_TIMED_OUT, CONNECTION_ARMED_WRITE, CONNECTION_READ_TO_END, CONNECTION_REGISTERED,
    CONNECTION_SILENT, ERROR_EPOLL, ERROR_MEMORY, ERROR_RECV, ERROR_SEND, KECHO_BUFFER_BYTES,
    KECHO_NO_PEER, Connection, Worker,
)
from engine.listener cimport listeners_resume
from engine.peers cimport peer_leaves
from engine.slab cimport ownership_generation, ownership_release, slab_give_back
from engine.waiting cimport (
    unread_bytes, waiting_begin, waiting_claim_slowest, waiting_end, waiting_is_over,
    waiting_progress,
)
from kernel.epoll cimport (
    EPOLL_CTL_ADD, EPOLL_CTL_MOD, EPOLLET, EPOLLIN, EPOLLOUT, EPOLLPRI, EPOLLRDHUP, epoll_ctl,
    epoll_event,
)
from kernel.socket cimport (
    AF_UNSPEC, MSG_NOSIGNAL, SO_LINGER, SOL_SOCKET, connect, linger, recv, send, setsockopt,
    sockaddr,
)
from libc.errno cimport (
    EAGAIN, ECONNABORTED, ECONNRESET, EINTR, ENOBUFS, ENOMEM, EPIPE, ETIMEDOUT, errno,
)
from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset
from posix.unistd cimport close


cdef enum Served:
    SERVED_ALL     # nothing left to read, or waiting for room to send
    SERVED_MORE    # the turn is over, there is more to read
    SERVED_CLOSED  # the connection is gone, and its record with it


cdef enum:
    READS_PER_TURN = 4  # of up to 64 KiB, then the others get theirs
    SPARED_MOST = 64    # readers, in one search for one that is not
    GREETING_MS = 500   # from accept to the first bytes, when the server is about to stop


cdef inline void close_with_reset(int fd) noexcept nogil:
    """RST instead of FIN, and what was still to be sent is thrown away: SO_LINGER 0, socket(7).
    If the option is refused, dissolving the association sends it: connect(2), AF_UNSPEC.
    A Unix socket has no such thing: its peer sees an error only if bytes were left unread."""
    cdef linger at_once
    cdef sockaddr nobody
    at_once.l_onoff = 1
    at_once.l_linger = 0
    if setsockopt(fd, SOL_SOCKET, SO_LINGER, &at_once, sizeof(at_once)) < 0:
        memset(&nobody, 0, sizeof(nobody))
        nobody.sa_family = AF_UNSPEC
        connect(fd, &nobody, sizeof(nobody))
    close(fd)


cdef inline void _free_pending(Worker* worker, Connection* connection) noexcept nogil:
    waiting_end(worker.queue, connection)
    free(connection.pending)
    connection.pending = NULL


cdef inline void connection_close(
    Worker* worker, Connection* connection, int reason,
) noexcept nogil:
    """Closes with FIN when every byte read has been handed to the kernel, otherwise with RST:
    a client must not take a cut-off stream for a finished one. After an error that is usually
    the end of the socket, too, RST costs nothing; where it is not, bytes are lost."""
    cdef int fd = connection.fd
    connection.fd = -1  # before it is closed: see queue_forget()
    cdef bint is_whole = (
        connection.pending == NULL
        and (reason == CLOSE_EOF or reason == CLOSE_IDLE or reason == CLOSE_DRAINED))
    if connection.pending != NULL:
        _free_pending(worker, connection)
    # Before it is closed: the client may connect again at once.
    if connection.peer != KECHO_NO_PEER:
        peer_leaves(&worker.control.access, connection.peer)
    if not is_whole:
        close_with_reset(fd)
    else:
        close(fd)
    count_closed(worker, connection.accepted_by, reason)
    slab_give_back(&worker.queue.slab, connection)
    listeners_resume(worker)


cdef inline Served connection_fail(
    Worker* worker, Connection* connection, int error, int kind,
) noexcept nogil:
    """Closes after a failed recv, send or epoll_ctl. Broken by the client's side or the network
    is a normal ending, anything else is counted as an error as well."""
    cdef int reason = CLOSE_ERROR
    if error == ECONNRESET or error == EPIPE or error == ECONNABORTED:
        reason = CLOSE_RESET
    elif error == ETIMEDOUT:
        # The listener's TCP_USER_TIMEOUT, which is write_timeout, comes before the kernel's own.
        reason = CLOSE_TIMED_OUT if worker.control.write_timeout_ms == 0 else CLOSE_STALLED
    elif error == ENOMEM or error == ENOBUFS:
        count_error(worker, ERROR_MEMORY)
    else:
        count_error(worker, kind)
    connection_close(worker, connection, reason)
    return SERVED_CLOSED


cdef inline int connection_arm(
    Worker* worker, Connection* connection, bint for_write,
) noexcept nogil:
    """Has epoll report the next data, or the next room to send; at once if it is there already.

    Returns 0 or -errno. EPOLLPRI: see connection_serve(). Under backpressure the socket is not
    watched for data, so a client that never reads costs no wake-ups.
    """
    cdef epoll_event event
    cdef int operation = EPOLL_CTL_MOD
    event.events = EPOLLET
    if for_write:
        event.events |= EPOLLOUT
        connection.flags |= CONNECTION_ARMED_WRITE
    else:
        event.events |= EPOLLIN | EPOLLRDHUP | EPOLLPRI
        connection.flags &= ~CONNECTION_ARMED_WRITE
    if not connection.flags & CONNECTION_REGISTERED:
        connection.flags |= CONNECTION_REGISTERED
        operation = EPOLL_CTL_ADD
    event.data.u64 = <uint64_t>ownership_generation(connection) << 32 | connection.index
    if epoll_ctl(worker.queue.epoll_fd, operation, connection.fd, &event) < 0:
        return -errno
    return 0


cdef inline ssize_t _send_some(
    Connection* connection, const void* data, size_t size,
) noexcept nogil:
    """Bytes that the kernel took, 0 when there is no room now, or -errno."""
    cdef ssize_t sent
    while True:
        sent = send(connection.fd, data, size, MSG_NOSIGNAL)
        if sent >= 0:
            return sent
        if errno == EAGAIN:
            return 0
        if errno != EINTR:
            return -errno


cdef inline int _keep_pending(
    Worker* worker, Connection* connection, uint32_t begin, uint32_t end,
) noexcept nogil:
    """Backpressure: copies [begin, end) of the worker's buffer aside. Returns 0 or -ENOMEM.

    Until this is sent nothing more is read, so one buffer bounds what a client can pin. What all
    of them can pin is bounded by _evict_slowest().
    """
    connection.pending = <unsigned char*>malloc(end - begin)
    if connection.pending == NULL:
        return -ENOMEM
    memcpy(connection.pending, worker.buffer + begin, end - begin)
    connection.pending_begin = 0
    connection.pending_end = end - begin
    connection.unread_bytes = unread_bytes(connection)
    waiting_begin(worker.queue, connection)
    count(&worker.counters.backpressure)
    return 0


cdef inline void note_progress(Worker* worker, Connection* connection) noexcept nogil:
    """The client has taken some of what was pending."""
    atomic_u32_store_relaxed(&connection.last_active_ms, <uint32_t>worker.now_ms)
    waiting_progress(worker.queue, connection)
    connection.unread_bytes = unread_bytes(connection)


cdef inline void _spare(Worker* worker, Connection* connection) noexcept nogil:
    """Lets go of a waiting connection that was claimed, and misses no event of it."""
    cdef int result
    while not ownership_release(connection):
        result = connection_arm(worker, connection, True)  # reports anew what came meanwhile
        if result < 0:
            connection_fail(worker, connection, -result, ERROR_EPOLL)
            return


cdef inline bint _evict_slowest(Worker* worker) noexcept nogil:
    """Closes the connections longest without progress until the queue's buffers are within their
    bounds. False when those that are left are being served, by this worker or another.

    A client that reads, but too little for epoll to report it, is spared, a number of times.
    """
    cdef Connection* slowest
    cdef int spared = 0
    while waiting_is_over(worker.queue, worker.control):
        slowest = waiting_claim_slowest(worker.queue)
        if slowest == NULL:
            return False
        if spared < SPARED_MOST and unread_bytes(slowest) != slowest.unread_bytes:
            spared += 1
            note_progress(worker, slowest)
            _spare(worker, slowest)
        else:
            connection_close(worker, slowest, CLOSE_EVICTED)
    return True


cdef inline int _flush_pending(Worker* worker, Connection* connection) noexcept nogil:
    """1 when nothing is pending any more, 0 when the kernel has no room yet, or -errno."""
    cdef ssize_t sent = _send_some(
        connection, connection.pending + connection.pending_begin,
        connection.pending_end - connection.pending_begin)
    if sent < 0:
        return <int>sent
    if sent == 0:
        return 0
    count_by(&worker.counters.bytes_sent, sent)
    connection.pending_begin += <uint32_t>sent
    if connection.pending_begin < connection.pending_end:
        note_progress(worker, connection)
        return 0
    atomic_u32_store_relaxed(&connection.last_active_ms, <uint32_t>worker.now_ms)
    _free_pending(worker, connection)
    count(&worker.counters.echoes)
    return 1


cdef inline int _echo_chunk(Worker* worker, Connection* connection, size_t size) noexcept nogil:
    """Sends back what recv has put into the worker's buffer. Returns 1 when all of it went, 0
    when the rest is pending, or -errno."""
    cdef ssize_t sent = _send_some(connection, worker.buffer, size)
    if sent < 0:
        return <int>sent
    count_by(&worker.counters.bytes_sent, sent)
    if <size_t>sent == size:
        count(&worker.counters.echoes)
        return 1
    return _keep_pending(worker, connection, <uint32_t>sent, <uint32_t>size)


cdef inline Served connection_serve(
    Worker* worker, Connection* connection, int reads,
) noexcept nogil:
    """Echoes what is there, in at most `reads` chunks.

    A recv that returns less than was asked for has emptied a TCP socket, and what comes later
    makes a new edge, so there is no second recv just to see EAGAIN. Three things can stand
    behind a short read all the same: an end of file, an error, and the rest of the stream behind
    an urgent mark, where recv stops. The event names them (EPOLLRDHUP, EPOLLERR, EPOLLPRI), which
    sets CONNECTION_READ_TO_END for good.
    """
    cdef bint to_end = connection.flags & CONNECTION_READ_TO_END != 0 or worker.is_draining
    cdef ssize_t size
    cdef int result
    if connection.pending != NULL:
        result = _flush_pending(worker, connection)
        if result < 0:
            return connection_fail(worker, connection, -result, ERROR_SEND)
        if result == 0:
            return SERVED_ALL
    while True:
        if reads == 0:
            return SERVED_MORE
        reads -= 1
        size = recv(connection.fd, worker.buffer, KECHO_BUFFER_BYTES, 0)
        if size < 0:
            if errno == EAGAIN:
                break
            if errno == EINTR:
                continue
            return connection_fail(worker, connection, errno, ERROR_RECV)
        if size == 0:
            connection_close(worker, connection, CLOSE_EOF)
            return SERVED_CLOSED
        count_by(&worker.counters.bytes_received, size)
        connection.flags &= ~<unsigned int>CONNECTION_SILENT
        atomic_u32_store_relaxed(&connection.last_active_ms, <uint32_t>worker.now_ms)
        result = _echo_chunk(worker, connection, size)
        if result < 0:
            return connection_fail(worker, connection, -result, ERROR_SEND)
        if result == 0:
            break
        if size < KECHO_BUFFER_BYTES and not to_end:
            break
    if connection.pending != NULL:
        if not _evict_slowest(worker):
            connection_close(worker, connection, CLOSE_EVICTED)
            return SERVED_CLOSED
        if not connection.flags & CONNECTION_ARMED_WRITE:
            result = connection_arm(worker, connection, True)
            if result < 0:
                return connection_fail(worker, connection, -result, ERROR_EPOLL)
        return SERVED_ALL
    if connection.flags & CONNECTION_ARMED_WRITE:
        result = connection_arm(worker, connection, False)
        if result < 0:
            return connection_fail(worker, connection, -result, ERROR_EPOLL)
    return SERVED_ALL


cdef inline bint _is_new(Worker* worker, Connection* connection) noexcept nogil:
    """In a drain: accepted a moment ago, and its first bytes, which the client sends when connect()
    has returned, are on their way. Closed now, it would look to the client like a server that
    does not serve."""
    cdef uint32_t age_ms
    if not connection.flags & CONNECTION_SILENT or worker.now_ms >= worker.greet_until_ms:
        return False
    age_ms = <uint32_t>worker.now_ms - atomic_u32_load_relaxed(&connection.last_active_ms)
    return age_ms < GREETING_MS or age_ms >= 0x80000000u


cdef inline void connection_settle(
    Worker* worker, Connection* connection, Served served,
) noexcept nogil:
    """Ends the worker's turn with a connection it owns: lets go of it, or keeps it for the next.

    A worker keeps one connection that has more to read; further ones go back to the end of
    the kernel's ready list, from where any worker of the queue may take them.
    """
    cdef int result
    while served != SERVED_CLOSED:
        if served == SERVED_MORE:
            if worker.held == NULL:
                worker.held = connection
                return
            result = connection_arm(worker, connection, False)
            if result < 0:
                connection_fail(worker, connection, -result, ERROR_EPOLL)
                return
        elif (worker.is_draining and connection.pending == NULL
                and not _is_new(worker, connection)):
            connection_close(worker, connection, CLOSE_DRAINED)
            return
        if ownership_release(connection):
            return
        if served == SERVED_ALL:
            served = connection_serve(worker, connection, READS_PER_TURN)
