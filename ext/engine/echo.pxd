"""Serving a connection: recv, send at once, keep only what the kernel would not take.

Every function here is called by the worker that owns the connection.
"""
from common.atomics cimport atomic_u32_load_relaxed, atomic_u32_store_relaxed
from engine.backpressure cimport free_pending, keep_pending, note_progress
from engine.connection cimport (
    connection_arm, connection_close, connection_fail, connection_give_back, serve_again_by,
)
from engine.counters cimport count, count_by
from engine.epoll.streams cimport stream_keep, stream_take
from engine.eviction cimport evict_slowest
from engine.finishing cimport connection_finish, finishing_serve
from engine.held cimport bytes_held, held_begin, held_end
from engine.layout cimport (
    CLOSE_DRAINED, CLOSE_EOF, CLOSE_EVICTED, CLOSE_IDLE, CONNECTION_ARMED_WRITE, CONNECTION_HELD,
    CONNECTION_READ_TO_END, CONNECTION_REGISTERED, CONNECTION_SILENT, CONNECTION_WAITED,
    ERROR_EPOLL, ERROR_RECV, ERROR_SEND, KECHO_BUFFER_BYTES, SERVED_ALL, SERVED_CLOSED, SERVED_MORE,
    STATE_ECHOED, STATE_FINISHING, STATE_PASSED, Connection, Look, Served, Worker,
)
from engine.slab cimport ownership_release
from kernel.socket cimport MSG_NOSIGNAL, recv, send
from libc.errno cimport EAGAIN, EINTR, errno
from libc.stdint cimport uint32_t, uint64_t


cdef enum:
    READS_PER_TURN = 4  # of up to 64 KiB, then the others get theirs
    GREETING_MS = 500   # from accept to the first bytes, when the server is about to stop
    REOPENED_MS = 200   # then, from a window that opens to what had been waiting for it
    REOPENED_MOST_MS = 1000  # and to the last of it, or a client that goes on would never be closed


cdef inline ssize_t send_some(
    Connection* connection, const void* data, size_t size,
) noexcept nogil:
    """Bytes that the kernel took, 0 when there is no room now, or -errno."""
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
    """1 when nothing is pending any more, 0 when the kernel has no room yet, or -errno."""
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
    """Sends back what recv has put into the worker's buffer. Returns 1 when all of it went, 0
    when the rest is pending, or -errno."""
    cdef ssize_t sent = send_some(connection, worker.buffer, size)
    if sent < 0:
        return <int>sent
    count_by(&worker.counters.bytes_sent, sent)
    if <size_t>sent == size:
        count(&worker.counters.echoes)
        return 1
    return keep_pending(worker, connection, <uint32_t>sent, <uint32_t>size)


cdef inline Served _at_eof(Worker* worker, Connection* connection) noexcept nogil:
    if connection.state == STATE_ECHOED:
        return connection_finish(worker, connection, CLOSE_EOF)
    return worker.control.engine.at_eof(worker, connection)


cdef inline Served echo(Worker* worker, Connection* connection, int reads) noexcept nogil:
    """Echoes what is there, in at most `reads` chunks.

    A recv that returns less than was asked for has emptied a TCP socket, and what comes later
    makes a new edge, so there is no second recv just to see EAGAIN. Three things can stand
    behind a short read all the same: an end of file, an error, and the rest of the stream behind
    an urgent mark, where recv stops. The event names them (EPOLLRDHUP, EPOLLERR, EPOLLPRI), which
    sets CONNECTION_READ_TO_END for good.
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


cdef inline Served _serve_otherwise(
    Worker* worker, Connection* connection, int reads,
) noexcept nogil:
    if connection.state == STATE_FINISHING:
        return finishing_serve(worker, connection)
    return worker.control.engine.serve(worker, connection, reads)


cdef inline Served connection_serve(
    Worker* worker, Connection* connection, int reads,
) noexcept nogil:
    """A turn with a connection of which something was reported, or may be to be done."""
    if connection.state == STATE_ECHOED:
        return echo(worker, connection, reads)
    return _serve_otherwise(worker, connection, reads)


cdef inline Served connection_await(Worker* worker, Connection* connection) noexcept nogil:
    """Has epoll report what the connection waits for, if it does not do so already: room for what
    is pending, or data. A new one is registered by whoever accepts it."""
    if connection.pending == NULL and not connection.flags & CONNECTION_ARMED_WRITE:
        return SERVED_ALL
    return _await_otherwise(worker, connection)


cdef inline Served _await_otherwise(Worker* worker, Connection* connection) noexcept nogil:
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


cdef inline bint _is_awaited(Worker* worker, Connection* connection) noexcept nogil:
    """In a drain: more is on its way from a client that did nothing wrong, and is looked for again.

    Of one that was accepted a moment ago the first bytes, which it sends when connect() has
    returned: closed now, it would look to the client like a server that does not serve. Of one
    that did not read, and whose window was shut for that, what it had sent meanwhile.
    """
    cdef uint32_t age_ms = (
        <uint32_t>worker.now_ms - atomic_u32_load_relaxed(&connection.last_active_ms))
    # Another worker's clock may be ahead of this one's: in 32 bits, both ages.
    cdef uint32_t reopened_ms = <uint32_t>worker.now_ms - connection.waited_until_ms
    cdef uint64_t again_ms = worker.now_ms + REOPENED_MS
    if connection.flags & CONNECTION_SILENT:
        again_ms = worker.greet_until_ms
        if worker.now_ms >= again_ms or GREETING_MS <= age_ms < 0x80000000u:
            return False
    elif (not connection.flags & CONNECTION_WAITED or REOPENED_MS <= age_ms < 0x80000000u
            or REOPENED_MOST_MS <= reopened_ms < 0x80000000u):
        return False
    serve_again_by(worker, again_ms)
    return True


cdef inline void streams_give_back(Worker* worker) noexcept nogil:
    while worker.stream_count != 0:
        connection_give_back(worker, stream_take(worker))


cdef inline bint _is_handed_back(Worker* worker, Connection* connection) noexcept nogil:
    """The kernel holds nothing more of what it was to echo."""
    cdef Look look
    return worker.control.engine.look(connection, &look) == 0 and bytes_held(&look) == 0


cdef inline void _settle(Worker* worker, Connection* connection, Served served) noexcept nogil:
    while served != SERVED_CLOSED:
        if served == SERVED_MORE:
            if not stream_keep(worker, connection):
                streams_give_back(worker)  # for all, then, the kernel's list is the circle
                connection_give_back(worker, connection)
            return
        if (worker.is_draining and connection.pending == NULL
                and not connection.flags & CONNECTION_HELD
                and not _is_awaited(worker, connection)):
            if connection.state == STATE_PASSED and not _is_handed_back(worker, connection):
                held_begin(worker, connection, KECHO_BUFFER_BYTES)
            elif connection_finish(worker, connection, CLOSE_DRAINED) == SERVED_CLOSED:
                return
        if ownership_release(connection):
            return
        served = connection_serve(worker, connection, READS_PER_TURN)


cdef inline void connection_settle(
    Worker* worker, Connection* connection, Served served,
) noexcept nogil:
    """Ends a turn with a connection that the worker owns: it lets go of it, or keeps it for another
    turn."""
    if served == SERVED_ALL and not worker.is_draining:
        if ownership_release(connection):
            return
        served = connection_serve(worker, connection, READS_PER_TURN)
    _settle(worker, connection, served)


cdef inline void connection_join(
    Worker* worker, Connection* connection, Served served,
) noexcept nogil:
    """Ends the turn with a connection that epoll does not know yet, unless it waits for room;
    registering it reports whatever has come meanwhile."""
    cdef int result
    if not connection.flags & CONNECTION_REGISTERED:
        result = connection_arm(worker, connection)
        if result < 0:
            connection_fail(worker, connection, -result, ERROR_EPOLL)
            return
    connection_settle(worker, connection, served)


cdef inline void connection_end(Worker* worker, Connection* connection, int reason) noexcept nogil:
    """Ends one that is overdue: with FIN if it is idle, otherwise with RST."""
    if reason == CLOSE_IDLE:
        connection_settle(worker, connection, connection_finish(worker, connection, reason))
    else:
        connection_close(worker, connection, reason)
