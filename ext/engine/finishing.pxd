"""The end of a TCP connection whose client has yet to acknowledge bytes.

After close(2) the kernel would own an orphan, which none of our limits counts. The kernel resets it
when its probes run out (net.ipv4.tcp_orphan_retries) or when TCP is short of memory: tcp(7). So
shutdown(2) sends the FIN, and the descriptor stays open until all bytes are acknowledged. EPOLLHUP
reports that the socket has ended (LAST_ACK to CLOSE) or broken. It also reports that both FINs were
sent, so it proves nothing by itself. epoll does not report that the client takes bytes, so a timer
looks.

The kernel holds the bytes of these connections. So they are never evicted.
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
    """Return the errno that broke a socket, or 0. SO_ERROR alone would also return ICMP errors,
    which TCP survives; those do not set POLLERR."""
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
    """End a connection with FIN: close it, or keep it until the client has acknowledged all bytes.
    Close it with RST if not every byte was handed to the kernel."""
    cdef uint32_t unread = 0
    cdef int result
    if connection.pending == NULL and not connection.flags & (CONNECTION_UNIX | CONNECTION_HELD):
        unread = unread_bytes(connection)
    if unread == 0 or not connection_leave(worker, connection, reason):
        connection_close(worker, connection, reason)
        return SERVED_CLOSED
    if shutdown(connection.fd, SHUT_WR) < 0:
        result = _error_of(connection.fd)
        if result != 0:  # ENOTCONN: the client has reset it meanwhile
            return connection_fail(worker, connection, result, ERROR_SEND)
        connection_close(worker, connection, reason)
        return SERVED_CLOSED
    connection_enter(connection, STATE_FINISHING)
    connection.finish_reason = <uint8_t>reason
    connection.unread_bytes = unread_bytes(connection)  # the FIN counts as a byte
    if connection.unread_bytes == 0:
        connection_close(worker, connection, reason)
        return SERVED_CLOSED
    atomic_u32_store_relaxed(&connection.last_active_ms, <uint32_t>worker.now_ms)
    held_begin(worker, connection, 0)
    # If the client has not sent its FIN, EPOLLOUT reports that ours is acknowledged (FIN_WAIT2).
    if reason != CLOSE_EOF or not connection.flags & CONNECTION_REGISTERED:
        result = epoll_arm(worker, connection, AWAIT_ROOM)
        if result < 0:
            return connection_fail(worker, connection, -result, ERROR_EPOLL)
    return SERVED_ALL


cdef inline void finishing_end(Worker* worker, Connection* connection) noexcept nogil:
    """Close a connection for the reason for which its FIN was sent."""
    held_end(worker, connection)
    connection_close(worker, connection, <int>connection.finish_reason)


cdef inline Served finishing_serve(Worker* worker, Connection* connection) noexcept nogil:
    """Serve a FINISHING connection: epoll has reported it, or a look is due."""
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
    """Schedule the next look: soon after bytes have moved, then at growing intervals."""
    cdef uint32_t age_ms = (
        <uint32_t>worker.now_ms - atomic_u32_load_relaxed(&connection.last_active_ms))
    cdef uint32_t next_ms = min(age_ms // 8 + 1, <uint32_t>FINISHING_LOOK_MOST_MS)
    waiting_look_at(worker.queue, connection, <uint32_t>worker.now_ms + next_ms, 0)
    waiting_progress(worker.queue, connection)  # those behind it are looked at first next time
    look_by(worker, connection.look_at_ms)
