"""What epoll reports of a connection."""
from engine.layout cimport (
    CONNECTION_ARMED_WRITE, CONNECTION_IN_KERNEL, CONNECTION_REGISTERED, Connection, Worker,
)
from engine.slab cimport ownership_generation
from kernel.epoll cimport (
    EPOLL_CTL_ADD, EPOLL_CTL_MOD, EPOLLET, EPOLLIN, EPOLLOUT, EPOLLPRI, EPOLLRDHUP, epoll_ctl,
    epoll_event,
)
from libc.errno cimport errno
from libc.stdint cimport uint64_t


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
