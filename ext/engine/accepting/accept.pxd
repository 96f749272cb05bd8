"""From the accept queue to a connection.

Socket options are set on the listener, from which an accepted socket inherits them (TCP_NODELAY,
SO_OOBINLINE), so a connection costs accept4 and one epoll_ctl.
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
    """Returns how many are left."""
    cdef uint32_t left = atomic_u32_decrement(&control.active)
    control.engine.share(control)
    return left


cdef inline bint _admit(Worker* worker, Listener* listener) noexcept nogil:
    """Counts a connection in before it is accepted; False when the server is full. In a drain it
    never is: those who wait in the queues are no more than the backlogs, and leave at once."""
    cdef Control* control = worker.control
    cdef uint32_t active = atomic_u32_increment(&control.active)
    control.engine.share(control)
    if active <= control.max_connections or worker.is_draining:
        return True
    _count_out(control)
    listener_pause(worker, listener)
    # A connection that ended before it could see the pause did not resume the listener.
    if atomic_u32_load(&control.active) < control.max_connections:
        listeners_resume(worker)
    return False


cdef inline void _unadmit(Worker* worker) noexcept nogil:
    """Takes _admit() back. Another worker may have found the server full because of it; if it was
    not, a listener that is paused lacks descriptors or memory, and has to wait for them: two
    that resume each other would spin."""
    if _count_out(worker.control) + 1 >= worker.control.max_connections:
        listeners_resume(worker)


cdef inline void _give_up(Worker* worker, int fd, uint32_t peer, int error) noexcept nogil:
    """Closes a connection that was admitted and cannot be served."""
    if peer != KECHO_NO_PEER:
        peer_leaves(&worker.control.access, peer)
    close_with_reset(fd)
    count_error(worker, error)
    _unadmit(worker)


cdef inline Connection* _new_connection(
    Worker* worker, Listener* listener, int fd, uint32_t peer,
) noexcept nogil:
    """Owned by the worker, and known to nobody else yet. NULL: it had to be closed."""
    cdef int on = 1
    cdef Connection* connection
    # TCP inherits this one from the listener, Unix sockets do not. Without it urgent bytes would
    # be missing from the echo.
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


cdef inline void _begin(
    Worker* worker, Listener* listener, Connection* connection, bint at_once,
) noexcept nogil:
    """Its first bytes are often there already, so they are looked for before epoll is asked, if
    there is time for that; registering afterwards reports whatever has come since."""
    cdef EngineCalls* engine = &worker.control.engine
    cdef Served served = SERVED_ALL
    cdef bint has_begun = engine.begins_unread and engine.begin(worker, connection)
    if at_once and not has_begun:
        # In a drain to the end, so that it does not keep a descriptor from whoever waits behind it.
        served = connection_serve(
            worker, connection, READS_PER_TURN if worker.is_draining else 1)
    if served == SERVED_ALL and not engine.begins_unread:
        engine.begin(worker, connection)
    if served != SERVED_CLOSED:
        connection_join(worker, connection, served)


cdef inline bint _reset_if_refused(
    Worker* worker, int fd, const sockaddr* client, uint32_t* peer,
) noexcept nogil:
    """A client that is not to be served is turned away with RST: no TIME_WAIT stays behind."""
    cdef int refused = access_admit(
        &worker.control.access, fd, client, <uint32_t>worker.now_ms, peer)
    if refused == ADMITTED:
        return False
    close_with_reset(fd)
    count(&worker.counters.refused[refused])
    _unadmit(worker)
    return True


cdef inline bint _try_again_after(Worker* worker, Listener* listener, int error) noexcept nogil:
    """What to do after accept failed, by accept(2). True: try again at once."""
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
        # A security module or BPF said no before the connection left the queue, where it stays.
        listener_pause(worker, listener)
        return False
    # ECONNABORTED, EINTR and the network errors that Linux passes on here: they concern the one
    # connection, which is gone.
    return True


cdef inline int _accept_one(
    Worker* worker, Listener* listener, Connection** accepted,
) noexcept nogil:
    """Accepts a client that _admit() has counted in; NULL if it is not to be served. Returns 0 or
    -errno of accept4."""
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
    """Up to ACCEPTS_PER_TURN; returns how many of them are to be served."""
    cdef Listener* listener = &worker.control.listeners[number]
    cdef bint is_getting_on = False
    cdef int result, _i, taken = 0
    if not listener_is_open(listener):
        return 0
    for _i in range(ACCEPTS_PER_TURN):
        if not _admit(worker, listener):
            return taken
        result = _accept_one(worker, listener, &accepted[taken])
        if result == 0:
            is_getting_on = True
            taken += accepted[taken] != NULL
        elif not _try_again_after(worker, listener, -result):
            return taken
    # A turn of nothing but errors: if they do not take anybody out of the queue, whatever
    # accept(2) says, the next turn would be another, without end.
    if not is_getting_on or listener_arm(worker.control, worker.queue, number) < 0:
        listener_pause(worker, listener)
    return taken


cdef inline void accept_turn(Worker* worker, uint32_t number) noexcept nogil:
    """Takes clients out of a listener's queue, and then serves them. In a burst of connects whoever
    finds the queue full loses a second: where a turn was not enough, epoll has to report them."""
    cdef Connection* accepted[ACCEPTS_PER_TURN]
    cdef int i, taken = _accept_some(worker, number, accepted)
    for i in range(taken):
        _begin(worker, &worker.control.listeners[number], accepted[i], taken < ACCEPTS_PER_TURN)


cdef inline int accept_last(Worker* worker, uint32_t number) noexcept nogil:
    """In a drain: empties the queue of a listener that is about to be closed, whether it was paused
    or not. Returns 0, 1 after a turn, or -errno of accept4 when somebody may be left."""
    cdef Listener* listener = &worker.control.listeners[number]
    cdef Connection* connection
    cdef int result, _i
    for _i in range(ACCEPTS_PER_TURN):
        _admit(worker, listener)
        result = _accept_one(worker, listener, &connection)
        if result < 0 and not _try_again_after(worker, listener, -result):
            return 0 if result == -EAGAIN or listener_is_dead(listener) else result
        if connection != NULL:
            _begin(worker, listener, connection, True)
    return 1
