"""From the accept queue to a connection.

Socket options are set on the listener, from which an accepted socket inherits them (TCP_NODELAY,
SO_OOBINLINE), so a connection costs accept4 and one epoll_ctl.
"""
from common.atomics cimport (
    atomic_u32_decrement, atomic_u32_increment, atomic_u32_load, atomic_u32_store_relaxed,
)
from engine.connection cimport (
    SERVED_CLOSED, Served, close_with_reset, connection_arm, connection_fail, connection_serve,
    connection_settle,
)
from engine.counters cimport count_error, count_opened
from engine.layout cimport (
    CONNECTION_READ_TO_END, CONNECTION_REGISTERED, CONNECTION_SILENT, ERROR_ACCEPT,
    ERROR_DESCRIPTORS, ERROR_EPOLL,
    ERROR_LISTENER, ERROR_MEMORY, LISTENER_OPEN, Connection, Control, Listener, Worker,
)
from engine.listener cimport (
    listener_arm, listener_give_up, listener_pause, listeners_resume,
)
from engine.slab cimport slab_take
from kernel.socket cimport (
    SOCK_CLOEXEC, SOCK_NONBLOCK, SOL_SOCKET, SO_OOBINLINE, accept4, setsockopt,
)
from libc.errno cimport (
    EAGAIN, EBADF, EINVAL, EMFILE, ENFILE, ENOBUFS, ENOMEM, ENOTSOCK, EPERM, errno,
)
from libc.stdint cimport uint32_t


cdef enum:
    ACCEPTS_PER_TURN = 64
    ACCEPTS_BEFORE_CLOSING = 65536  # a listener's last turn: more than any backlog in use


cdef inline bint _admit(Worker* worker, Listener* listener) noexcept nogil:
    """Counts a connection in before it is accepted; False when the server is full."""
    cdef Control* control = worker.control
    if atomic_u32_increment(&control.active) <= control.max_connections:
        return True
    atomic_u32_decrement(&control.active)
    listener_pause(worker, listener)
    # A connection that ended before it could see the pause did not resume the listener.
    if atomic_u32_load(&control.active) < control.max_connections:
        listeners_resume(worker)
    return False


cdef inline void _unadmit(Worker* worker) noexcept nogil:
    """Takes _admit() back. Another worker may have found the server full because of it."""
    atomic_u32_decrement(&worker.control.active)
    listeners_resume(worker)


cdef inline void _begin(Worker* worker, Listener* listener, int fd) noexcept nogil:
    """A new connection. Its first bytes are often there already, so they are looked for before
    epoll is asked; registering afterwards reports whatever has come since."""
    cdef Served served
    cdef int result, on = 1
    cdef Connection* connection = slab_take(&worker.queue.slab)
    if connection == NULL:
        close_with_reset(fd)
        count_error(worker, ERROR_MEMORY)
        _unadmit(worker)
        return
    if listener.is_unix:
        # TCP inherits this one from the listener, Unix sockets do not.
        setsockopt(fd, SOL_SOCKET, SO_OOBINLINE, &on, sizeof(on))
    connection.fd = fd
    connection.pending = NULL
    connection.flags = CONNECTION_SILENT
    if listener.is_unix:
        connection.flags |= CONNECTION_READ_TO_END
    connection.accepted_by = <unsigned short>worker.index
    atomic_u32_store_relaxed(&connection.last_active_ms, <uint32_t>worker.now_ms)
    count_opened(worker)
    served = connection_serve(worker, connection, 1)
    if served == SERVED_CLOSED:
        return
    if not connection.flags & CONNECTION_REGISTERED:
        result = connection_arm(worker, connection, False)
        if result < 0:
            connection_fail(worker, connection, -result, ERROR_EPOLL)
            return
    connection_settle(worker, connection, served)


cdef inline bint _accept_failed(Worker* worker, Listener* listener, int error) noexcept nogil:
    """What to do after accept failed, by accept(2). True: try again at once."""
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
    if error == EINVAL or error == EBADF or error == ENOTSOCK:
        count_error(worker, ERROR_LISTENER)
        listener_give_up(worker, listener)
        return False
    count_error(worker, ERROR_ACCEPT)
    if error == EPERM:
        # A security module or BPF said no before the connection left the queue, where it stays.
        listener_pause(worker, listener)
        return False
    # ECONNABORTED, EINTR and the network errors that Linux passes on here: they concern the one
    # connection, which is gone.
    return True


cdef inline void accept_turn(Worker* worker, uint32_t number, int limit) noexcept nogil:
    """Accepts what waits at a listener, up to `limit` connections."""
    cdef Listener* listener = &worker.control.listeners[number]
    cdef int fd
    if atomic_u32_load(&listener.state) != LISTENER_OPEN:
        return
    while limit > 0:
        limit -= 1
        if not _admit(worker, listener):
            return
        fd = accept4(listener.fd, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC)
        if fd >= 0:
            _begin(worker, listener, fd)
            continue
        _unadmit(worker)
        if not _accept_failed(worker, listener, errno):
            return
    if not worker.is_draining and listener_arm(worker.control, worker.queue, number) < 0:
        listener_pause(worker, listener)
