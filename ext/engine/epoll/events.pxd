"""What is registered with epoll, for which events, and what an event's token stands for."""
from engine.layout cimport CONNECTION_ARMED_WRITE, CONNECTION_REGISTERED, Connection, Queue, Worker
from engine.slab cimport ownership_generation
from kernel.epoll cimport (
    EPOLL_CTL_ADD, EPOLL_CTL_MOD, EPOLLET, EPOLLIN, EPOLLOUT, EPOLLPRI, EPOLLRDHUP, epoll_ctl,
    epoll_event,
)
from libc.errno cimport errno
from libc.stdint cimport uint32_t, uint64_t


# The low half of an event's data: a connection's index, or one of these. The high half is the
# connection's generation.
cdef enum:
    TOKEN_WAKE = 0xFFFFFFFFu
    TOKEN_REPORTS = 0xFFFEFFFFu  # the engine reads its reports
    TOKEN_LISTENERS = 0xFFFF0000u  # plus the listener's number


cdef enum Awaited:
    AWAIT_DATA  # and what can follow a short recv: see echo()
    AWAIT_ROOM  # room to send; not data, so a client that never reads causes no wake-ups
    AWAIT_DATA_OR_ROOM
    AWAIT_END   # the end of the stream; not data, which the worker does not read


cdef inline uint32_t event_mask(Awaited awaited) noexcept nogil:
    """Return the events to register for: the only place that chooses them."""
    if awaited == AWAIT_ROOM:
        return EPOLLOUT | EPOLLET
    if awaited == AWAIT_END:
        return EPOLLRDHUP | EPOLLET
    if awaited == AWAIT_DATA_OR_ROOM:
        return EPOLLOUT | EPOLLIN | EPOLLRDHUP | EPOLLPRI | EPOLLET
    return EPOLLIN | EPOLLRDHUP | EPOLLPRI | EPOLLET


cdef inline int epoll_report(
    Queue* queue, Connection* connection, int operation, Awaited awaited,
) noexcept nogil:
    """Register a connection again. epoll then reports anew what is there. Return 0 or -errno."""
    cdef epoll_event event
    event.events = event_mask(awaited)
    event.data.u64 = <uint64_t>ownership_generation(connection) << 32 | connection.index
    if epoll_ctl(queue.epoll_fd, operation, connection.fd, &event) < 0:
        return -errno
    return 0


cdef inline int epoll_arm(
    Worker* worker, Connection* connection, Awaited awaited,
) noexcept nogil:
    """Have epoll report what is awaited, at once if it is there. Return 0 or -errno."""
    cdef int operation = EPOLL_CTL_MOD
    if not connection.flags & CONNECTION_REGISTERED:
        connection.flags |= CONNECTION_REGISTERED
        operation = EPOLL_CTL_ADD
    if awaited == AWAIT_ROOM:
        connection.flags |= CONNECTION_ARMED_WRITE
    else:
        connection.flags &= ~<unsigned int>CONNECTION_ARMED_WRITE
    return epoll_report(worker.queue, connection, operation, awaited)


cdef inline Awaited awaited_by(Connection* connection) noexcept nogil:
    """Return what a connection waits for that its worker echoes."""
    return AWAIT_DATA if connection.pending == NULL else AWAIT_ROOM
