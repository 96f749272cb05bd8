"""Turns: a connection gets up to READS_PER_TURN reads, then the next one gets its turn.

All functions are called by the worker that owns the connection. connection_serve() begins a turn,
connection_settle() ends it.
"""
from common.atomics cimport atomic_u32_load_relaxed
from engine.connection cimport (
    connection_arm, connection_close, connection_fail, connection_give_back, serve_again_by,
)
from engine.echo cimport echo
from engine.epoll.streams cimport stream_keep, stream_take
from engine.finishing cimport connection_finish, finishing_serve
from engine.held cimport bytes_held, held_begin
from engine.layout cimport (
    CLOSE_DRAINED, CLOSE_IDLE, CONNECTION_HELD, CONNECTION_REGISTERED, CONNECTION_SILENT,
    CONNECTION_WAITED, ERROR_EPOLL, KECHO_BUFFER_BYTES, SERVED_ALL, SERVED_CLOSED, SERVED_MORE,
    STATE_ECHOED, STATE_FINISHING, STATE_PASSED, Connection, Look, Served, Worker,
)
from engine.slab cimport ownership_release
from libc.stdint cimport uint32_t, uint64_t


cdef enum:
    READS_PER_TURN = 4       # of up to 64 KiB
    GREETING_MS = 500        # in a drain: from accept to the first bytes
    REOPENED_MS = 200        # in a drain: from the end of backpressure to the client's next bytes
    REOPENED_MOST_MS = 1000  # in a drain: from there to the last bytes that are still served


cdef inline Served _serve_otherwise(
    Worker* worker, Connection* connection, int reads,
) noexcept nogil:
    """Serve a connection that its worker does not echo."""
    if connection.state == STATE_FINISHING:
        return finishing_serve(worker, connection)
    return worker.control.engine.serve(worker, connection, reads)


cdef inline Served connection_serve(
    Worker* worker, Connection* connection, int reads,
) noexcept nogil:
    """Give a connection a turn: epoll has reported it, or it may have something to do."""
    if connection.state == STATE_ECHOED:
        return echo(worker, connection, reads)
    return _serve_otherwise(worker, connection, reads)


cdef inline bint _keep_if_awaited(Worker* worker, Connection* connection) noexcept nogil:
    """Check in a drain whether a well-behaved client is about to send, and schedule another look.

    A client sends its first bytes a moment after connect() has returned. If the connection were
    closed at once, the server would look as if it did not serve. A client that had stopped reading
    was not able to send, because its window was closed. What it held back comes now.
    """
    cdef uint32_t age_ms = (
        <uint32_t>worker.now_ms - atomic_u32_load_relaxed(&connection.last_active_ms))
    # Both ages are in 32 bits, because another worker's clock may be ahead of this one's.
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
    """Give all streams of a worker back to the kernel's ready list."""
    while worker.stream_count != 0:
        connection_give_back(worker, stream_take(worker))


cdef inline bint _is_handed_back(Worker* worker, Connection* connection) noexcept nogil:
    """Check that the kernel holds no more bytes that it was to echo."""
    cdef Look look
    return worker.control.engine.look(connection, &look) == 0 and bytes_held(&look) == 0


cdef inline void _settle(Worker* worker, Connection* connection, Served served) noexcept nogil:
    while served != SERVED_CLOSED:
        if served == SERVED_MORE:
            if not stream_keep(worker, connection):
                # The table is full. The kernel's ready list then does the round-robin.
                streams_give_back(worker)
                connection_give_back(worker, connection)
            return
        if (worker.is_draining and connection.pending == NULL
                and not connection.flags & CONNECTION_HELD
                and not _keep_if_awaited(worker, connection)):
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
    """End a turn with a connection that the worker owns: let go of it, keep it as a stream, or
    serve it again."""
    if served == SERVED_ALL and not worker.is_draining:
        if ownership_release(connection):
            return
        served = connection_serve(worker, connection, READS_PER_TURN)
    _settle(worker, connection, served)


cdef inline void connection_join(
    Worker* worker, Connection* connection, Served served,
) noexcept nogil:
    """End the first turn with a new connection: register it, unless it is registered. Registering
    reports whatever has come since."""
    cdef int result
    if not connection.flags & CONNECTION_REGISTERED:
        result = connection_arm(worker, connection)
        if result < 0:
            connection_fail(worker, connection, -result, ERROR_EPOLL)
            return
    connection_settle(worker, connection, served)


cdef inline void connection_end(Worker* worker, Connection* connection, int reason) noexcept nogil:
    """Close an overdue connection: with FIN if it is idle, otherwise with RST."""
    if reason == CLOSE_IDLE:
        connection_settle(worker, connection, connection_finish(worker, connection, reason))
    else:
        connection_close(worker, connection, reason)
