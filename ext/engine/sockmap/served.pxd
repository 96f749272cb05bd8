"""Connections that the kernel echoes: what workers do with them."""
from common.atomics cimport atomic_u32_store_relaxed, atomic_u64_load_relaxed
from common.flows cimport FLOW_BROKEN, FLOW_ECHOED, Flow
from engine.connection cimport connection_arm, connection_close, connection_fail, connection_leave
from engine.counters cimport count
from engine.echo cimport connection_await, echo
from engine.epoll.events cimport AWAIT_END, awaited_by, epoll_arm
from engine.eviction cimport evict_slowest
from engine.finishing cimport connection_finish
from engine.held cimport held_begin, held_end, note_held, note_movement
from engine.layout cimport (
    CLOSE_DRAINED, CLOSE_EOF, CLOSE_EVICTED, CONNECTION_UNIX, CONNECTION_WAITED, ERROR_EPOLL,
    ERROR_RECV, KECHO_BUFFER_BYTES, LOOK_AT_NEITHER, LOOK_AT_UNSEEN, SERVED_ALL, SERVED_CLOSED,
    STATE_IN_KERNEL, STATE_PASSED, Connection, Look, Served, Worker, connection_enter,
)
from engine.sockmap.flow cimport (
    flow_begin, flow_check_end, flow_end, flow_is_broken, flow_is_whole, flow_leave, flow_look,
    flow_read, flow_run, flow_take_error,
)
from engine.sockmap.maps cimport flows_of
from engine.turns cimport connection_serve
from libc.errno cimport ENOMEM
from libc.stdint cimport uint32_t, uint64_t


cdef inline bint sockmap_begin(Worker* worker, Connection* connection) noexcept nogil:
    """Hand a connection of which nothing has been read to the kernel."""
    cdef uint32_t queue = <uint32_t>(worker.queue - worker.control.queues)
    if connection.flags & CONNECTION_UNIX or worker.is_draining:
        return False
    if flow_begin(worker.control, queue, connection) < 0:
        return False
    connection_enter(connection, STATE_IN_KERNEL)
    connection.unread_bytes = 0
    atomic_u32_store_relaxed(&connection.to_look_at, LOOK_AT_UNSEEN)
    return True


cdef inline int sockmap_arm(Worker* worker, Connection* connection) noexcept nogil:
    """Have the next event be reported. For a connection that the kernel echoes, epoll would report
    data as well, and wake a worker for each echo."""
    return epoll_arm(
        worker, connection,
        AWAIT_END if connection.state == STATE_IN_KERNEL else awaited_by(connection))


cdef inline bint sockmap_leave(
    Worker* worker, Connection* connection, bint is_whole, int reason,
) noexcept nogil:
    """Take a connection out of the maps. Return whether all bytes were handed back. CLOSE_EOF means
    that this was checked, and that nothing follows."""
    if is_whole and reason != CLOSE_EOF:
        if connection.state == STATE_IN_KERNEL:
            is_whole = flow_leave(worker.control, connection)
        else:
            is_whole = flow_is_whole(connection)
    atomic_u32_store_relaxed(&connection.to_look_at, LOOK_AT_NEITHER)
    flow_end(worker.control, connection)
    return is_whole


# ---- passed to its worker -----------------------------------------------------------------------

cdef inline Served sockmap_at_eof(Worker* worker, Connection* connection) noexcept nogil:
    """Decide about an end of file. recv returns nothing until the kernel has sent what it holds,
    because passed bytes are behind those in one queue. So the stream has only ended when that queue
    is empty."""
    cdef int result = flow_check_end(connection)
    if result < 0:
        return connection_fail(worker, connection, -result, ERROR_RECV)
    if result == 0:
        held_begin(worker, connection, KECHO_BUFFER_BYTES)
        return connection_await(worker, connection)
    held_end(worker, connection)
    return connection_finish(worker, connection, CLOSE_EOF)


cdef inline Served _pass(Worker* worker, Connection* connection, int reads) noexcept nogil:
    """Have the kernel pass what comes to the worker: too much waits to be sent. The socket's window
    then bounds it. The connection is held until the kernel has sent the rest."""
    cdef uint64_t most = atomic_u64_load_relaxed(&flows_of(worker.control).board.charge_most)
    cdef int result
    held_end(worker, connection)
    connection_enter(connection, STATE_PASSED)
    connection.flags |= CONNECTION_WAITED
    count(&worker.counters.backpressure)
    held_begin(worker, connection, <uint32_t>most)
    if not evict_slowest(worker):
        connection_close(worker, connection, CLOSE_EVICTED)
        return SERVED_CLOSED
    result = sockmap_arm(worker, connection)
    if result < 0:
        return connection_fail(worker, connection, -result, ERROR_EPOLL)
    return echo(worker, connection, reads)


# ---- echoed by the kernel -----------------------------------------------------------------------

cdef inline Served _take_back(Worker* worker, Connection* connection, int reads) noexcept nogil:
    """Take a connection back in a drain, after everything was handed back. The worker echoes what
    still comes. If the client sends at this very moment, the connection is reset, like one whose
    bytes are not read any more."""
    cdef int result
    if not connection_leave(worker, connection, CLOSE_DRAINED):
        connection_close(worker, connection, CLOSE_DRAINED)
        return SERVED_CLOSED
    result = connection_arm(worker, connection)
    if result < 0:
        return connection_fail(worker, connection, -result, ERROR_EPOLL)
    return connection_serve(worker, connection, reads)


cdef inline Served sockmap_serve(Worker* worker, Connection* connection, int reads) noexcept nogil:
    """Serve a connection: epoll has reported it, or a timer looks."""
    cdef Look look
    cdef Flow flow
    cdef int result
    if connection.state == STATE_PASSED:
        if flow_is_broken(worker.control, connection):
            return connection_fail(worker, connection, ENOMEM, ERROR_RECV)
        return echo(worker, connection, reads)
    result = flow_look(connection, &look)
    if result == 0:
        result = flow_read(worker.control, connection, &flow)
    if result == 0:
        result = flow_take_error(connection, &look)
    if result < 0:
        return connection_fail(worker, connection, -result, ERROR_RECV)
    note_movement(worker, connection, &look)
    if flow.mode == FLOW_BROKEN:
        return connection_fail(worker, connection, ENOMEM, ERROR_RECV)
    if flow.mode != FLOW_ECHOED:
        return _pass(worker, connection, reads)
    if note_held(worker, connection, &look):
        return SERVED_ALL
    if look.has_ended:
        # Bytes may be in front of the FIN. If they stayed unread, close() would send RST.
        flow_run(connection)
        return connection_finish(worker, connection, CLOSE_EOF)
    if worker.is_draining:
        return _take_back(worker, connection, reads)
    return SERVED_ALL
