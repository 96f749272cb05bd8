"""The echo: recv, send at once, and keep only what the kernel has no room for.

All functions are called by the worker that owns the connection.
"""
from common.atomics cimport atomic_u32_store_relaxed
from engine.backpressure cimport free_pending, keep_pending, note_progress
from engine.connection cimport connection_arm, connection_close, connection_fail
from engine.counters cimport count, count_by
from engine.eviction cimport evict_slowest
from engine.finishing cimport connection_finish
from engine.held cimport held_end
from engine.layout cimport (
    CLOSE_EOF, CLOSE_EVICTED, CONNECTION_ARMED_WRITE, CONNECTION_READ_TO_END, CONNECTION_SILENT,
    ERROR_EPOLL, ERROR_RECV, ERROR_SEND, KECHO_BUFFER_BYTES, SERVED_ALL, SERVED_CLOSED, SERVED_MORE,
    STATE_ECHOED, Connection, Served, Worker,
)
from kernel.socket cimport MSG_NOSIGNAL, recv, send
from libc.errno cimport EAGAIN, EINTR, errno
from libc.stdint cimport uint32_t


cdef inline ssize_t send_some(
    Connection* connection, const void* data, size_t size,
) noexcept nogil:
    """Send once. Return the bytes that the kernel took, 0 if it has no room now, or -errno."""
    cdef ssize_t sent
    while True:
        sent = send(connection.fd, data, size, MSG_NOSIGNAL)
        if sent >= 0:
            return sent
        if errno == EAGAIN:
            return 0
        if errno != EINTR:
            return -errno


cdef inline int flush_pending(Worker* worker, Connection* connection) noexcept nogil:
    """Send `pending`. Return 1 when nothing is left, 0 when the kernel has no room yet, or -errno.
    """
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
    free_pending(worker, connection)
    count(&worker.counters.echoes)
    return 1


cdef inline int _echo_chunk(Worker* worker, Connection* connection, size_t size) noexcept nogil:
    """Send what recv has put into the worker's buffer. Return 1 if all of it went, 0 if the rest is
    pending, or -errno."""
    cdef ssize_t sent = send_some(connection, worker.buffer, size)
    if sent < 0:
        return <int>sent
    count_by(&worker.counters.bytes_sent, sent)
    if <size_t>sent == size:
        count(&worker.counters.echoes)
        return 1
    return keep_pending(worker, connection, <uint32_t>sent, <uint32_t>size)


cdef inline Served _at_eof(Worker* worker, Connection* connection) noexcept nogil:
    """Handle an end of file."""
    if connection.state == STATE_ECHOED:
        return connection_finish(worker, connection, CLOSE_EOF)
    return worker.control.engine.at_eof(worker, connection)


cdef inline Served echo(Worker* worker, Connection* connection, int reads) noexcept nogil:
    """Receive and send back, in at most `reads` chunks.

    A recv that returns less than it was asked for has emptied a TCP socket. Bytes that come later
    cause a new event. So there is no second recv just to see EAGAIN. Three things can still follow
    a short read: an end of file, an error, and bytes after an urgent mark, at which recv stops. The
    event then has EPOLLRDHUP, EPOLLERR or EPOLLPRI, which sets CONNECTION_READ_TO_END for good.
    """
    cdef bint to_end = connection.flags & CONNECTION_READ_TO_END != 0 or worker.is_draining
    cdef ssize_t size
    cdef int result
    if connection.pending != NULL:
        result = flush_pending(worker, connection)
        if result < 0:
            return connection_fail(worker, connection, -result, ERROR_SEND)
        if result == 0:
            return SERVED_ALL
    while True:
        if reads == 0:
            return SERVED_MORE
        reads -= 1
        size = recv(connection.fd, worker.buffer, KECHO_BUFFER_BYTES, 0)
        if size < 0:
            if errno == EAGAIN:
                break
            if errno == EINTR:
                continue
            return connection_fail(worker, connection, errno, ERROR_RECV)
        if size == 0:
            return _at_eof(worker, connection)
        held_end(worker, connection)
        count_by(&worker.counters.bytes_received, size)
        connection.flags &= ~<unsigned int>CONNECTION_SILENT
        atomic_u32_store_relaxed(&connection.last_active_ms, <uint32_t>worker.now_ms)
        result = _echo_chunk(worker, connection, size)
        if result < 0:
            return connection_fail(worker, connection, -result, ERROR_SEND)
        if result == 0:
            break
        if size < KECHO_BUFFER_BYTES and not to_end:
            break
    return connection_await(worker, connection)


cdef inline Served connection_await(Worker* worker, Connection* connection) noexcept nogil:
    """Have epoll report what the connection waits for: room if bytes are pending, otherwise data.
    """
    if connection.pending == NULL and not connection.flags & CONNECTION_ARMED_WRITE:
        return SERVED_ALL
    return _await_otherwise(worker, connection)


cdef inline Served _await_otherwise(Worker* worker, Connection* connection) noexcept nogil:
    """Do so for a connection that has pending bytes, or had some."""
    cdef bint for_write = connection.pending != NULL
    cdef int result
    if for_write and not evict_slowest(worker):
        connection_close(worker, connection, CLOSE_EVICTED)
        return SERVED_CLOSED
    if for_write != (connection.flags & CONNECTION_ARMED_WRITE != 0):
        result = connection_arm(worker, connection)
        if result < 0:
            return connection_fail(worker, connection, -result, ERROR_EPOLL)
    return SERVED_ALL
