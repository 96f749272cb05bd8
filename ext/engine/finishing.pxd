"""The end of a TCP connection of which everything was handed to the kernel, and not all of it has
been acknowledged.

close(2) would leave an orphan to the kernel, which counts in no limit of ours, and which the kernel
resets when its probes run out (net.ipv4.tcp_orphan_retries) or TCP memory is short: tcp(7). So the
FIN is sent by shutdown(2), and the descriptor is kept until the client has acknowledged all that it
was sent. EPOLLHUP then reports the end of the socket (LAST_ACK to CLOSE), or its error; it is
reported after both FINs as well, and says nothing by itself. That the client takes something is not
reported, so these connections are looked at, as flows are of which the kernel holds bytes.

What they hold is the kernel's: they are never the slowest reader that is evicted.
"""
from common.atomics cimport atomic_u32_load_relaxed, atomic_u32_store_relaxed
from engine.backpressure cimport note_progress, unread_bytes, waiting_look_at, waiting_progress
from engine.connection cimport connection_close, connection_fail, connection_leave
from engine.epoll.events cimport AWAIT_ROOM, epoll_arm
from engine.held cimport held_begin, held_end, look_by
from engine.layout cimport (
    CLOSE_EOF, CLOSE_STALLED, CONNECTION_HELD, CONNECTION_REGISTERED, CONNECTION_UNIX, ERROR_EPOLL,
    ERROR_SEND, SERVED_ALL, SERVED_CLOSED, STATE_FINISHING, Connection, Served, Worker,
    connection_enter,
)
from kernel.poll cimport POLLERR, poll, pollfd
from kernel.socket cimport SHUT_WR, SO_ERROR, SOL_SOCKET, getsockopt, shutdown, socklen_t
from libc.errno cimport errno
from libc.stdint cimport uint32_t, uint8_t


cdef enum:
    FINISHING_LOOK_MOST_MS = 1000


cdef inline int _error_of(int fd) noexcept nogil:
    """What broke the socket, as errno; 0: it is not broken. SO_ERROR alone also tells what ICMP
    said and TCP bears: that is no POLLERR."""
    cdef int error = 0
    cdef socklen_t size = sizeof(error)
    cdef pollfd looked
    looked.fd = fd
    looked.events = 0
    if poll(&looked, 1, 0) < 1 or not looked.revents & POLLERR:
        return 0
    if getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &size) < 0:
        return errno
    return error


cdef inline Served connection_finish(
    Worker* worker, Connection* connection, int reason,
) noexcept nogil:
    """Ends a connection for a reason that sends FIN if everything was handed to the kernel: closes
    it, or keeps it until all is acknowledged. One that was kept is closed."""
    cdef uint32_t unread = 0
    cdef int result
    if connection.pending == NULL and not connection.flags & (CONNECTION_UNIX | CONNECTION_HELD):
        unread = unread_bytes(connection)
    if unread == 0 or not connection_leave(worker, connection, reason):
        connection_close(worker, connection, reason)
        return SERVED_CLOSED
    if shutdown(connection.fd, SHUT_WR) < 0:
        result = _error_of(connection.fd)
        if result != 0:  # ENOTCONN: it was reset meanwhile
            return connection_fail(worker, connection, result, ERROR_SEND)
        connection_close(worker, connection, reason)
        return SERVED_CLOSED
    connection_enter(connection, STATE_FINISHING)
    connection.finish_reason = <uint8_t>reason
    connection.unread_bytes = unread_bytes(connection)  # the FIN is one
    if connection.unread_bytes == 0:
        connection_close(worker, connection, reason)
        return SERVED_CLOSED
    atomic_u32_store_relaxed(&connection.last_active_ms, <uint32_t>worker.now_ms)
    held_begin(worker, connection, 0)
    # Before the client's own FIN (FIN_WAIT2), that ours was acknowledged is told as EPOLLOUT.
    if reason != CLOSE_EOF or not connection.flags & CONNECTION_REGISTERED:
        result = epoll_arm(worker, connection, AWAIT_ROOM)
        if result < 0:
            return connection_fail(worker, connection, -result, ERROR_EPOLL)
    return SERVED_ALL


cdef inline void finishing_end(Worker* worker, Connection* connection) noexcept nogil:
    """Closes it with what its FIN was sent for."""
    held_end(worker, connection)
    connection_close(worker, connection, <int>connection.finish_reason)


cdef inline Served finishing_serve(Worker* worker, Connection* connection) noexcept nogil:
    """Something is reported of it, or its time has come to be looked at."""
    cdef uint32_t unread = unread_bytes(connection)
    cdef uint32_t age_ms
    cdef int error
    if unread == 0:
        finishing_end(worker, connection)
        return SERVED_CLOSED
    error = _error_of(connection.fd)
    if error != 0:
        return connection_fail(worker, connection, error, ERROR_SEND)
    if unread != connection.unread_bytes:
        note_progress(worker, connection)
        return SERVED_ALL
    age_ms = <uint32_t>worker.now_ms - atomic_u32_load_relaxed(&connection.last_active_ms)
    if worker.control.finish_timeout_ms <= age_ms < 0x80000000u:
        connection_close(worker, connection, CLOSE_STALLED)
        return SERVED_CLOSED
    return SERVED_ALL


cdef inline void finishing_note(Worker* worker, Connection* connection) noexcept nogil:
    """Has it looked at again: soon after something has moved, then less and less often."""
    cdef uint32_t age_ms = (
        <uint32_t>worker.now_ms - atomic_u32_load_relaxed(&connection.last_active_ms))
    cdef uint32_t next_ms = min(age_ms // 8 + 1, <uint32_t>FINISHING_LOOK_MOST_MS)
    waiting_look_at(worker.queue, connection, <uint32_t>worker.now_ms + next_ms, 0)
    waiting_progress(worker.queue, connection)  # those behind it have not been looked at
    look_by(worker, connection.look_at_ms)
