"""One connection: what its worker can do with it, short of serving it.

Every function here is called by the worker that owns the connection. The socket is edge-triggered
in the epoll set, so a worker that leaves bytes in it must see to it that it comes back: it holds
the connection (SERVED_MORE) or changes the registration, upon which epoll reports again whatever
is there.
"""
from common.atomics cimport (
    atomic_u32_load_relaxed, atomic_u32_store_relaxed, atomic_u64_load_relaxed,
    atomic_u64_store_relaxed,
)
from engine.accepting.listener cimport listeners_resume
from engine.accepting.peers cimport peer_leaves
from engine.backpressure cimport (
    unread_bytes, waiting_begin, waiting_claim_slowest, waiting_end, waiting_is_over,
    waiting_look_at, waiting_progress,
)
from engine.counters cimport count, count_by, count_closed, count_error
from engine.io_uring.ring cimport uring_let_go
from engine.layout cimport (
    CLOSE_DRAINED, CLOSE_EOF, CLOSE_ERROR, CLOSE_EVICTED, CLOSE_IDLE, CLOSE_RESET, CLOSE_TIMED_OUT,
    CONNECTION_ARMED_WRITE, CONNECTION_BUSY, CONNECTION_FINISHING, CONNECTION_IN_KERNEL,
    CONNECTION_IN_RING, CONNECTION_PASSED, CONNECTION_REGISTERED, CONNECTION_WAITED, ERROR_EPOLL,
    ERROR_MEMORY, KECHO_NO_PEER, LOOK_AT_NEITHER, Connection, Worker,
)
from engine.slab cimport ownership_generation, ownership_release, slab_give_back
from engine.sockmap.flow cimport (
    Look, flow_end, flow_held_bytes, flow_is_whole, flow_leave, flow_look, flows_share,
)
from kernel.epoll cimport (
    EPOLL_CTL_ADD, EPOLL_CTL_MOD, EPOLLET, EPOLLIN, EPOLLOUT, EPOLLPRI, EPOLLRDHUP, epoll_ctl,
    epoll_event,
)
from kernel.socket cimport (
    AF_UNSPEC, MSG_NOSIGNAL, SO_LINGER, SOL_SOCKET, connect, linger, send, setsockopt, sockaddr,
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
    SERVED_NOT     # by the kernel any more: to be served here


cdef enum:
    SPARED_MOST = 64  # readers, in one search for one that is not
    LOOK_AGAIN_MOST_MS = 100
    GIVEN_BACK_MS = 20  # in a drain, before it is looked for again


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
    waiting_end(worker.queue, connection, <uint32_t>worker.now_ms)
    free(connection.pending)
    connection.pending = NULL


# ---- flows of which the kernel holds bytes ------------------------------------------------------

cdef inline uint32_t _look_again_ms(Worker* worker, Connection* connection) noexcept nogil:
    """When to ask the kernel again: soon after something has moved, then less and less often."""
    cdef uint32_t age_ms = (
        <uint32_t>worker.now_ms - atomic_u32_load_relaxed(&connection.last_active_ms))
    return <uint32_t>worker.now_ms + min(age_ms // 8 + 1, <uint32_t>LOOK_AGAIN_MOST_MS)


cdef inline void look_by(Worker* worker, uint32_t at_ms) noexcept nogil:
    """Has the queue looked at by then. This worker, at least, sees it before it waits again."""
    cdef uint64_t next_ms = worker.now_ms + (at_ms - <uint32_t>worker.now_ms)
    if next_ms < atomic_u64_load_relaxed(&worker.queue.next_look_ms):
        atomic_u64_store_relaxed(&worker.queue.next_look_ms, next_ms)


cdef inline void busy_begin(
    Worker* worker, Connection* connection, uint32_t held_bytes,
) noexcept nogil:
    """The kernel holds bytes that wait for the client to take others; nothing says when they have
    gone, so they are looked at."""
    if connection.flags & CONNECTION_BUSY:
        return
    connection.flags |= CONNECTION_BUSY
    connection.held_bytes = held_bytes
    connection.look_at_ms = _look_again_ms(worker, connection)
    waiting_begin(worker.queue, connection)
    look_by(worker, connection.look_at_ms)


cdef inline void busy_end(Worker* worker, Connection* connection) noexcept nogil:
    if connection.flags & CONNECTION_BUSY:
        waiting_end(worker.queue, connection, <uint32_t>worker.now_ms)
        connection.flags &= ~<unsigned int>CONNECTION_BUSY


cdef inline bint _end_flow(
    Worker* worker, Connection* connection, bint is_whole, int reason,
) noexcept nogil:
    """Before it is closed; whether it still may be with FIN: the end of file was looked at already,
    and after it nothing comes."""
    if is_whole and reason != CLOSE_EOF:
        if connection.flags & CONNECTION_IN_KERNEL:
            is_whole = flow_leave(worker.control, connection)
        else:
            is_whole = flow_is_whole(connection)
    atomic_u32_store_relaxed(&connection.to_look_at, LOOK_AT_NEITHER)
    flow_end(worker.control, connection)
    return is_whole


cdef inline bint flow_let_go(Worker* worker, Connection* connection, int reason) noexcept nogil:
    """Makes a flow a connection as any other, before its FIN. False: it has lost bytes."""
    if connection.flags & (CONNECTION_IN_KERNEL | CONNECTION_PASSED):
        if not _end_flow(worker, connection, True, reason):
            return False
        connection.flags &= ~<unsigned int>(CONNECTION_IN_KERNEL | CONNECTION_PASSED)
    return True


cdef inline void connection_close(
    Worker* worker, Connection* connection, int reason,
) noexcept nogil:
    """Closes with FIN when every byte read has been handed to the kernel, otherwise with RST:
    a client must not take a cut-off stream for a finished one. After an error that is usually
    the end of the socket, too, RST costs nothing; where it is not, bytes are lost. In CLOSE_EOF
    everything that a flow has received is known to have been handed back."""
    cdef int fd = connection.fd
    cdef bint is_whole = (
        connection.pending == NULL and not connection.flags & CONNECTION_BUSY
        and (reason == CLOSE_EOF or reason == CLOSE_IDLE or reason == CLOSE_DRAINED))
    if connection.pending != NULL:
        _free_pending(worker, connection)
    if connection.flags & CONNECTION_BUSY:
        busy_end(worker, connection)
    if connection.flags & (CONNECTION_IN_KERNEL | CONNECTION_PASSED):
        is_whole = _end_flow(worker, connection, is_whole, reason)
    if connection.flags & CONNECTION_IN_RING:
        # The socket is the ring's, too, until it has let go of it: before the next wait.
        uring_let_go(&worker.uring, connection)
    connection.fd = -1  # before it is closed: see queue_forget()
    # Before it is closed: the client may connect again at once.
    if connection.peer != KECHO_NO_PEER:
        peer_leaves(&worker.control.access, connection.peer)
    if not is_whole:
        close_with_reset(fd)
    else:
        close(fd)
    count_closed(worker, connection.accepted_by, reason)
    flows_share(worker.control)
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
        reason = CLOSE_TIMED_OUT
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
    elif connection.flags & CONNECTION_IN_KERNEL:
        # Data would be reported all the same, and wake a worker for each echo.
        event.events |= EPOLLRDHUP
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


cdef inline bint has_rested(
    Worker* worker, Connection* connection, uint32_t timeout_ms,
) noexcept nogil:
    """Check whether no byte of a connection has moved for a timeout; 0: there is none."""
    # In 32 bits: another worker may have marked it active just now, by a clock that is ahead.
    cdef uint32_t age_ms = (
        <uint32_t>worker.now_ms - atomic_u32_load_relaxed(&connection.last_active_ms))
    return timeout_ms != 0 and age_ms >= timeout_ms and age_ms < 0x80000000u


cdef inline void serve_again_by(Worker* worker, uint64_t at_ms) noexcept nogil:
    """In a drain: has everybody looked at by then."""
    if worker.serve_again_ms == 0 or at_ms < worker.serve_again_ms:
        worker.serve_again_ms = at_ms


cdef inline void _let_go(Worker* worker, Connection* connection) noexcept nogil:
    """Misses no event of a connection that was owned meanwhile."""
    cdef int result
    while not ownership_release(connection):
        # Reports anew what came meanwhile.
        result = connection_arm(worker, connection, connection.pending != NULL)
        if result < 0:
            connection_fail(worker, connection, -result, ERROR_EPOLL)
            return


cdef inline void connection_give_back(Worker* worker, Connection* connection) noexcept nogil:
    """Lets go of a connection that has more to read: it goes to the end of the kernel's ready list,
    from where any worker of the queue may take it. In a drain its socket may be empty, which epoll
    does not report."""
    cdef int result = connection_arm(worker, connection, False)
    if result < 0:
        connection_fail(worker, connection, -result, ERROR_EPOLL)
        return
    if worker.is_draining:
        serve_again_by(worker, worker.now_ms + GIVEN_BACK_MS)
    _let_go(worker, connection)


cdef inline ssize_t send_some(
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


cdef inline void wait_with(
    Worker* worker, Connection* connection, unsigned char* pending, uint32_t size,
) noexcept nogil:
    """Backpressure: `pending`, from malloc, is sent when there is room. Until then nothing more is
    read, so a client can pin no more than that. What all of them can pin is bounded by
    evict_slowest()."""
    connection.pending = pending
    connection.pending_begin = 0
    connection.pending_end = size
    connection.flags |= CONNECTION_WAITED
    connection.unread_bytes = unread_bytes(connection)
    waiting_begin(worker.queue, connection)
    count(&worker.counters.backpressure)


cdef inline int keep_pending(
    Worker* worker, Connection* connection, uint32_t begin, uint32_t end,
) noexcept nogil:
    """Copies [begin, end) of the worker's buffer aside. Returns 0 or -ENOMEM."""
    cdef unsigned char* pending = <unsigned char*>malloc(end - begin)
    if pending == NULL:
        return -ENOMEM
    memcpy(pending, worker.buffer + begin, end - begin)
    wait_with(worker, connection, pending, end - begin)
    return 0


cdef inline uint32_t untaken(Connection* connection) noexcept nogil:
    """A figure that changes when the client takes something."""
    cdef Look look
    if connection.flags & (CONNECTION_BUSY | CONNECTION_FINISHING) != CONNECTION_BUSY:
        return unread_bytes(connection)
    if flow_look(connection, &look) < 0:
        return connection.unread_bytes
    return look.acknowledged


cdef inline void note_progress(Worker* worker, Connection* connection) noexcept nogil:
    """The client has taken some of what was pending."""
    atomic_u32_store_relaxed(&connection.last_active_ms, <uint32_t>worker.now_ms)
    waiting_progress(worker.queue, connection)
    connection.unread_bytes = untaken(connection)


cdef inline void busy_note(Worker* worker, Connection* connection) noexcept nogil:
    """The kernel still holds bytes of it: whether the client has taken some, how many they are now,
    and when to look again. They may have become more: what is passed to a socket whose queue does
    not move, as when TCP lacks memory, is charged to nobody, up to its receive buffer. Of a client
    that reads they are on their way, and no reason to reset the slowest."""
    cdef Look look
    cdef uint32_t age_ms, held_bytes = connection.held_bytes
    if flow_look(connection, &look) == 0:
        if look.acknowledged != connection.unread_bytes:
            note_progress(worker, connection)
        age_ms = (
            <uint32_t>worker.now_ms - atomic_u32_load_relaxed(&connection.last_active_ms))
        if age_ms >= LOOK_AGAIN_MOST_MS or flow_held_bytes(&look) < held_bytes:
            held_bytes = flow_held_bytes(&look)
    if held_bytes == 0 and connection.held_bytes == 0:
        busy_end(worker, connection)  # since the look before, its end would have been read
        return
    waiting_look_at(worker.queue, connection, _look_again_ms(worker, connection), held_bytes)
    look_by(worker, connection.look_at_ms)


cdef inline bint evict_slowest(Worker* worker) noexcept nogil:
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
        if spared < SPARED_MOST and untaken(slowest) != slowest.unread_bytes:
            spared += 1
            note_progress(worker, slowest)
            _let_go(worker, slowest)
        else:
            connection_close(worker, slowest, CLOSE_EVICTED)
    return True


cdef inline int flush_pending(Worker* worker, Connection* connection) noexcept nogil:
    """1 when nothing is pending any more, 0 when the kernel has no room yet, or -errno."""
    cdef ssize_t sent = send_some(
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
