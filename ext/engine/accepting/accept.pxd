"""From the accept queue to a connection.

Options that accepted sockets inherit (TCP_NODELAY, SO_OOBINLINE) are set on the listener. So a
connection costs accept4 and one epoll_ctl.
"""
from common.atomics cimport (
    atomic_u32_decrement, atomic_u32_increment, atomic_u32_load, atomic_u32_store_relaxed,
)
from engine.accepting.access cimport ADMITTED, access_admit, access_is_restricted
from engine.accepting.listener cimport (
    listener_arm, listener_is_dead, listener_is_open, listener_mark_if_dead, listener_pause,
    listeners_resume,
)
from engine.accepting.peers cimport peer_leaves
from engine.connection cimport close_with_reset
from engine.counters cimport count, count_error, count_opened
from engine.layout cimport (
    CONNECTION_READ_TO_END, CONNECTION_SILENT, CONNECTION_UNIX, ERROR_ACCEPT, ERROR_DESCRIPTORS,
    ERROR_MEMORY, KECHO_NO_PEER, SERVED_ALL, SERVED_CLOSED, STATE_ECHOED, Connection, Control,
    EngineCalls, Listener, Served, Worker,
)
from engine.slab cimport slab_take
from engine.turns cimport READS_PER_TURN, connection_join, connection_serve
from kernel.inet cimport sockaddr_storage
from kernel.socket cimport (
    SO_OOBINLINE, SOCK_CLOEXEC, SOCK_NONBLOCK, SOL_SOCKET, accept4, setsockopt, sockaddr, socklen_t,
)
from libc.errno cimport (
    EACCES, EAGAIN, EBADF, EINVAL, EMFILE, ENFILE, ENOBUFS, ENOMEM, ENOTSOCK, EPERM, errno,
)
from libc.stdint cimport uint32_t


cdef enum:
    ACCEPTS_PER_TURN = 64


cdef inline uint32_t _count_out(Control* control) noexcept nogil:
    """Count a connection out. Return how many are left."""
    cdef uint32_t left = atomic_u32_decrement(&control.active)
    control.engine.share(control)
    return left


cdef inline bint _admit(Worker* worker, Listener* listener) noexcept nogil:
    """Count a connection in before it is accepted. Return False if the server is full. In a drain
    it never is: the backlogs bound how many clients wait, and each leaves at once."""
    cdef Control* control = worker.control
    cdef uint32_t active = atomic_u32_increment(&control.active)
    control.engine.share(control)
    if active <= control.max_connections or worker.is_draining:
        return True
    _count_out(control)
    listener_pause(worker, listener)
    # A connection that ended before the pause did not resume the listener.
    if atomic_u32_load(&control.active) < control.max_connections:
        listeners_resume(worker)
    return False


cdef inline void _unadmit(Worker* worker) noexcept nogil:
    """Take _admit() back. Another worker may have found the server full because of it. If not, a
    paused listener lacks descriptors or memory and must wait for them: two workers that resumed
    each other's listener would spin."""
    if _count_out(worker.control) + 1 >= worker.control.max_connections:
        listeners_resume(worker)


cdef inline void _give_up(Worker* worker, int fd, uint32_t peer, int error) noexcept nogil:
    """Reset a connection that was admitted and cannot be served."""
    if peer != KECHO_NO_PEER:
        peer_leaves(&worker.control.access, peer)
    close_with_reset(fd)
    count_error(worker, error)
    _unadmit(worker)


cdef inline Connection* _new_connection(
    Worker* worker, Listener* listener, int fd, uint32_t peer,
) noexcept nogil:
    """Return a record for a client, owned by the worker, or NULL if it had to be closed."""
    cdef int on = 1
    cdef Connection* connection
    # TCP sockets inherit this option from the listener, Unix sockets do not. Without it, the echo
    # would lack urgent bytes.
    if listener.is_unix and setsockopt(fd, SOL_SOCKET, SO_OOBINLINE, &on, sizeof(on)) < 0:
        _give_up(worker, fd, peer, ERROR_ACCEPT)
        return NULL
    connection = slab_take(&worker.queue.slab)
    if connection == NULL:
        _give_up(worker, fd, peer, ERROR_MEMORY)
        return NULL
    connection.fd = fd
    connection.pending = NULL
    connection.peer = peer
    connection.state = STATE_ECHOED
    connection.flags = CONNECTION_SILENT
    if listener.is_unix:
        connection.flags |= CONNECTION_READ_TO_END | CONNECTION_UNIX
    connection.accepted_by = <unsigned short>worker.index
    atomic_u32_store_relaxed(&connection.last_active_ms, <uint32_t>worker.now_ms)
    count_opened(worker)
    return connection


cdef inline void _begin(Worker* worker, Connection* connection, bint at_once) noexcept nogil:
    """Begin to serve a connection. Its first bytes have often arrived already, so they are received
    before it is registered with epoll, if there is time. Registering then reports what came later.
    """
    cdef EngineCalls* engine = &worker.control.engine
    cdef Served served = SERVED_ALL
    cdef bint has_begun = engine.begins_unread and engine.begin(worker, connection)
    if at_once and not has_begun:
        # In a drain to the end: the next client in the queue may need the descriptor.
        served = connection_serve(
            worker, connection, READS_PER_TURN if worker.is_draining else 1)
    if served == SERVED_ALL and not engine.begins_unread:
        engine.begin(worker, connection)
    if served != SERVED_CLOSED:
        connection_join(worker, connection, served)


cdef inline bint _reset_if_refused(
    Worker* worker, int fd, const sockaddr* client, uint32_t* peer,
) noexcept nogil:
    """Reset a client that is not to be served. RST leaves no TIME_WAIT behind. Return whether it
    was."""
    cdef int refused = access_admit(
        &worker.control.access, fd, client, <uint32_t>worker.now_ms, peer)
    if refused == ADMITTED:
        return False
    close_with_reset(fd)
    count(&worker.counters.refused[refused])
    _unadmit(worker)
    return True


cdef inline bint _try_again_after(Worker* worker, Listener* listener, int error) noexcept nogil:
    """Handle a failed accept, by accept(2). Return whether to try again at once."""
    cdef bint is_no_listener
    if error == EAGAIN:
        return False
    if error == EMFILE or error == ENFILE:
        count_error(worker, ERROR_DESCRIPTORS)
        listener_pause(worker, listener)
        return False
    if error == ENOMEM or error == ENOBUFS:
        count_error(worker, ERROR_MEMORY)
        listener_pause(worker, listener)
        return False
    is_no_listener = error == EINVAL or error == EBADF or error == ENOTSOCK
    if is_no_listener and listener_mark_if_dead(worker, listener):
        return False
    count_error(worker, ERROR_ACCEPT)
    if is_no_listener or error == EPERM or error == EACCES:
        # A security module or BPF refused before the connection left the queue. It is still there.
        listener_pause(worker, listener)
        return False
    # ECONNABORTED, EINTR, and network errors: these concern one connection, which is gone.
    return True


cdef inline int _accept_one(
    Worker* worker, Listener* listener, Connection** accepted,
) noexcept nogil:
    """Accept a client that _admit() has counted in; NULL if it is not served. Return 0 or -errno of
    accept4."""
    cdef bint is_restricted = access_is_restricted(&worker.control.access)
    cdef sockaddr_storage client
    cdef socklen_t size = sizeof(client)
    cdef uint32_t peer = KECHO_NO_PEER
    cdef int error, fd = accept4(
        listener.fd, <sockaddr*>&client if is_restricted else NULL,
        &size if is_restricted else NULL, SOCK_NONBLOCK | SOCK_CLOEXEC)
    accepted[0] = NULL
    if fd < 0:
        error = errno
        _unadmit(worker)
        return -error
    if not is_restricted or not _reset_if_refused(worker, fd, <sockaddr*>&client, &peer):
        accepted[0] = _new_connection(worker, listener, fd, peer)
    return 0


cdef inline int _accept_some(
    Worker* worker, uint32_t number, Connection** accepted,
) noexcept nogil:
    """Accept up to ACCEPTS_PER_TURN clients. Return how many of them to serve."""
    cdef Listener* listener = &worker.control.listeners[number]
    cdef bint has_progress = False
    cdef int result, _i, taken = 0
    if not listener_is_open(listener):
        return 0
    for _i in range(ACCEPTS_PER_TURN):
        if not _admit(worker, listener):
            return taken
        result = _accept_one(worker, listener, &accepted[taken])
        if result == 0:
            has_progress = True
            taken += accepted[taken] != NULL
        elif not _try_again_after(worker, listener, -result):
            return taken
    # If a turn only had errors, they may not take clients out of the queue, whatever accept(2)
    # says. Then turns would follow one another without end.
    if not has_progress or listener_arm(worker.control, worker.queue, number) < 0:
        listener_pause(worker, listener)
    return taken


cdef inline void accept_turn(Worker* worker, uint32_t number) noexcept nogil:
    """Accept clients, then serve them. In a burst of connects, a client that finds the accept queue
    full loses a second. So after a full turn the new connections are only registered: accepting
    comes first."""
    cdef Connection* accepted[ACCEPTS_PER_TURN]
    cdef int i, taken = _accept_some(worker, number, accepted)
    for i in range(taken):
        _begin(worker, accepted[i], taken < ACCEPTS_PER_TURN)


cdef inline int accept_last(Worker* worker, uint32_t number) noexcept nogil:
    """Empty the accept queue of a listener that is about to be closed, even of a paused one. Return
    0, 1 if clients may be left after a turn, or -errno of an accept4 that left clients there."""
    cdef Listener* listener = &worker.control.listeners[number]
    cdef Connection* connection
    cdef int result, _i
    for _i in range(ACCEPTS_PER_TURN):
        _admit(worker, listener)
        result = _accept_one(worker, listener, &connection)
        if result < 0 and not _try_again_after(worker, listener, -result):
            return 0 if result == -EAGAIN or listener_is_dead(listener) else result
        if connection != NULL:
            _begin(worker, connection, True)
    return 1
