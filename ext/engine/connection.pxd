"""One connection: what its worker can do with it, short of serving it.

Every function here is called by the worker that owns the connection. The socket is edge-triggered
in the epoll set, so a worker that leaves bytes in it must see to it that it comes back: it holds
the connection (SERVED_MORE) or changes the registration, upon which epoll reports again whatever
is there.
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


# ---- what an engine has of it -------------------------------------------------------------------

cdef inline bint _is_with_an_engine(Connection* connection) noexcept nogil:
    return connection.state != STATE_ECHOED and connection.state != STATE_FINISHING


cdef inline bint connection_leave(Worker* worker, Connection* connection, int reason) noexcept nogil:
    """Makes it its worker's, who goes on with it, or ends it for `reason`. False: bytes of it are
    lost, and it can only be closed."""
    if _is_with_an_engine(connection):
        if not worker.control.engine.leave(worker, connection, True, reason):
            return False
        connection_enter(connection, STATE_ECHOED)
    return True


cdef inline int connection_arm(Worker* worker, Connection* connection) noexcept nogil:
    """Has what comes next be reported; at once if it is there. Returns 0 or -errno."""
    if _is_with_an_engine(connection):
        return worker.control.engine.arm(worker, connection)
    return epoll_arm(worker, connection, awaited_by(connection))


# ---- its end ------------------------------------------------------------------------------------

cdef inline void connection_close(
    Worker* worker, Connection* connection, int reason,
) noexcept nogil:
    """Closes with FIN when every byte read has been handed to the kernel, otherwise with RST:
    a client must not take a cut-off stream for a finished one. After an error that is usually
    the end of the socket, too, RST costs nothing; where it is not, bytes are lost. In CLOSE_EOF
    everything that the kernel was to echo is known to have been handed back."""
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
    connection.fd = -1  # before it is closed: see queue_forget()
    # Before it is closed: the client may connect again at once.
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
    """In a drain: has everybody looked at by then."""
    if worker.serve_again_ms == 0 or at_ms < worker.serve_again_ms:
        worker.serve_again_ms = at_ms


cdef inline void connection_let_go(Worker* worker, Connection* connection) noexcept nogil:
    """Misses no event of a connection that was owned meanwhile."""
    cdef int result
    while not ownership_release(connection):
        # Reports anew what came meanwhile.
        result = connection_arm(worker, connection)
        if result < 0:
            connection_fail(worker, connection, -result, ERROR_EPOLL)
            return


cdef inline void connection_give_back(Worker* worker, Connection* connection) noexcept nogil:
    """Lets go of a connection that has more to read: it goes to the end of the kernel's ready list,
    from where any worker of the queue may take it. In a drain its socket may be empty, which epoll
    does not report."""
    cdef int result = connection_arm(worker, connection)
    if result < 0:
        connection_fail(worker, connection, -result, ERROR_EPOLL)
        return
    if worker.is_draining:
        serve_again_by(worker, worker.now_ms + GIVEN_BACK_MS)
    connection_let_go(worker, connection)
