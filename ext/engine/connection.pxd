"""A connection: what its worker can do with it, apart from serving it.

All functions are called by the worker that owns the connection. The socket is edge-triggered in the
epoll set. A worker that leaves bytes in the socket must return to it: it keeps the connection
(SERVED_MORE), or registers it again, after which epoll reports what is there.
"""
from common.atomics cimport atomic_u32_load_relaxed
from engine.accepting.listener cimport listeners_resume
from engine.accepting.peers cimport peer_leaves
from engine.backpressure cimport free_pending
from engine.counters cimport count_closed, count_error
from engine.epoll.events cimport awaited_by, epoll_arm
from engine.held cimport held_end
from engine.layout cimport (
    CLOSE_DRAINED, CLOSE_EOF, CLOSE_ERROR, CLOSE_IDLE, CLOSE_RESET, CLOSE_TIMED_OUT,
    CONNECTION_HELD, ERROR_EPOLL, ERROR_MEMORY, KECHO_NO_PEER, SERVED_CLOSED, STATE_ECHOED,
    STATE_FINISHING, Connection, Served, Worker, connection_enter,
)
from engine.slab cimport ownership_release, slab_give_back
from kernel.socket cimport AF_UNSPEC, SO_LINGER, SOL_SOCKET, connect, linger, setsockopt, sockaddr
from libc.errno cimport ECONNABORTED, ECONNRESET, ENOBUFS, ENOMEM, EPIPE, ETIMEDOUT
from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memset
from posix.unistd cimport close


cdef enum:
    GIVEN_BACK_MS = 20  # in a drain, until a connection that was given back is served again


cdef inline void close_with_reset(int fd) noexcept nogil:
    """Close a socket with RST instead of FIN and discard what it has not sent: SO_LINGER 0,
    socket(7). If the option is refused, connect(2) with AF_UNSPEC sends the RST. A Unix socket has
    no RST: its peer only sees an error if bytes were left unread."""
    cdef linger at_once
    cdef sockaddr none
    at_once.l_onoff = 1
    at_once.l_linger = 0
    if setsockopt(fd, SOL_SOCKET, SO_LINGER, &at_once, sizeof(at_once)) < 0:
        memset(&none, 0, sizeof(none))
        none.sa_family = AF_UNSPEC
        connect(fd, &none, sizeof(none))
    close(fd)


# ---- its engine ---------------------------------------------------------------------------------

cdef inline bint _is_with_an_engine(Connection* connection) noexcept nogil:
    """Check that an engine other than epoll has taken the connection over."""
    return connection.state != STATE_ECHOED and connection.state != STATE_FINISHING


cdef inline bint connection_leave(
    Worker* worker, Connection* connection, int reason,
) noexcept nogil:
    """Take a connection back from its engine, to serve it or to end it for `reason`. Return False
    if bytes of it are lost; then it can only be closed."""
    if _is_with_an_engine(connection):
        if not worker.control.engine.leave(worker, connection, True, reason):
            return False
        connection_enter(connection, STATE_ECHOED)
    return True


cdef inline int connection_arm(Worker* worker, Connection* connection) noexcept nogil:
    """Have the next event of the connection be reported, at once if it has already happened. Return
    0 or -errno."""
    if _is_with_an_engine(connection):
        return worker.control.engine.arm(worker, connection)
    return epoll_arm(worker, connection, awaited_by(connection))


# ---- its end ------------------------------------------------------------------------------------

cdef inline void connection_close(
    Worker* worker, Connection* connection, int reason,
) noexcept nogil:
    """Close a connection: with FIN if every byte read was handed to the kernel, otherwise with RST,
    so that the client does not take a truncated stream for a complete one. After an error, RST is
    always right: the socket is usually closed anyway, and otherwise bytes are lost. After
    CLOSE_EOF the kernel has also handed back all that it was to echo."""
    cdef int fd = connection.fd
    cdef bint is_whole = (
        connection.pending == NULL and not connection.flags & CONNECTION_HELD
        and (reason == CLOSE_EOF or reason == CLOSE_IDLE or reason == CLOSE_DRAINED))
    if connection.pending != NULL:
        free_pending(worker, connection)
    if connection.flags & CONNECTION_HELD:
        held_end(worker, connection)
    if _is_with_an_engine(connection):
        is_whole = worker.control.engine.leave(worker, connection, is_whole, reason)
    connection.fd = -1  # before close(): see queue_forget()
    # Before close(): the client may connect again at once.
    if connection.peer != KECHO_NO_PEER:
        peer_leaves(&worker.control.access, connection.peer)
    if not is_whole:
        close_with_reset(fd)
    else:
        close(fd)
    count_closed(worker, connection.accepted_by, reason)
    worker.control.engine.share(worker.control)
    slab_give_back(&worker.queue.slab, connection)
    listeners_resume(worker)


cdef inline Served connection_fail(
    Worker* worker, Connection* connection, int error, int kind,
) noexcept nogil:
    """Close a connection after a failed recv, send or epoll_ctl. A client or a network that breaks
    a connection is a normal end. Anything else also counts as an error."""
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


cdef inline bint has_rested(
    Worker* worker, Connection* connection, uint32_t timeout_ms,
) noexcept nogil:
    """Check whether no byte of a connection has moved for a timeout; 0: there is none."""
    # In 32 bits: another worker may have marked it active just now, by a clock that is ahead.
    cdef uint32_t age_ms = (
        <uint32_t>worker.now_ms - atomic_u32_load_relaxed(&connection.last_active_ms))
    return timeout_ms != 0 and age_ms >= timeout_ms and age_ms < 0x80000000u


# ---- letting go of it ---------------------------------------------------------------------------

cdef inline void serve_again_by(Worker* worker, uint64_t at_ms) noexcept nogil:
    """In a drain, have all connections served again by then."""
    if worker.serve_again_ms == 0 or at_ms < worker.serve_again_ms:
        worker.serve_again_ms = at_ms


cdef inline void connection_let_go(Worker* worker, Connection* connection) noexcept nogil:
    """Release a connection that was owned out of turn, without losing an event that came meanwhile.
    """
    cdef int result
    while not ownership_release(connection):
        # epoll then reports again what came meanwhile.
        result = connection_arm(worker, connection)
        if result < 0:
            connection_fail(worker, connection, -result, ERROR_EPOLL)
            return


cdef inline void connection_give_back(Worker* worker, Connection* connection) noexcept nogil:
    """Release a connection that has more to read. Registering it again puts it at the end of the
    kernel's ready list, from where any worker of the queue may take it. In a drain its socket may
    be empty, which epoll does not report, so it is served again a little later."""
    cdef int result = connection_arm(worker, connection)
    if result < 0:
        connection_fail(worker, connection, -result, ERROR_EPOLL)
        return
    if worker.is_draining:
        serve_again_by(worker, worker.now_ms + GIVEN_BACK_MS)
    connection_let_go(worker, connection)
