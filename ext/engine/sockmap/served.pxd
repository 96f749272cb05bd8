"""Connections that the kernel echoes: what is left to do for one when something is reported of it,
or its time has come to be looked at."""
from common.atomics cimport (
    atomic_u32_load_relaxed, atomic_u32_store_relaxed, atomic_u64_load_relaxed,
)
from common.flows cimport FLOW_BROKEN, FLOW_ECHOED, Flow
from engine.backpressure cimport note_progress
from engine.connection cimport (
    SERVED_ALL, SERVED_CLOSED, SERVED_NOT, Served, connection_close, connection_fail,
)
from engine.counters cimport count
from engine.epoll.arm cimport connection_arm
from engine.eviction cimport evict_slowest
from engine.finishing cimport connection_finish
from engine.held cimport held_begin, held_end
from engine.layout cimport (
    CLOSE_DRAINED, CLOSE_EOF, CLOSE_EVICTED, CONNECTION_HELD, CONNECTION_IN_KERNEL,
    CONNECTION_PASSED, CONNECTION_SILENT, CONNECTION_WAITED, ERROR_EPOLL, ERROR_RECV, LOOK_AT_FLOW,
    LOOK_AT_NEITHER, Connection, Worker,
)
from engine.sockmap.flow cimport (
    Look, flow_end, flow_held_bytes, flow_leave, flow_look, flow_read, flow_run, flow_take_error,
)
from libc.errno cimport ENOMEM
from libc.stdint cimport uint32_t, uint64_t


cdef inline void in_kernel_begin(Connection* connection) noexcept nogil:
    connection.flags |= CONNECTION_IN_KERNEL
    connection.unread_bytes = 0
    atomic_u32_store_relaxed(&connection.to_look_at, LOOK_AT_FLOW)


cdef inline void _in_kernel_end(Connection* connection) noexcept nogil:
    connection.flags &= ~<unsigned int>CONNECTION_IN_KERNEL
    atomic_u32_store_relaxed(&connection.to_look_at, LOOK_AT_NEITHER)


cdef inline Served _serve_here(Worker* worker, Connection* connection) noexcept nogil:
    cdef int result = connection_arm(worker, connection, False)
    if result < 0:
        return connection_fail(worker, connection, -result, ERROR_EPOLL)
    return SERVED_NOT


cdef inline Served _take_over(Worker* worker, Connection* connection) noexcept nogil:
    """Too much waits to be sent: what comes now is passed, and bounded by the socket's window.
    Until the kernel has sent the rest, the connection stands among those whose client does not
    read."""
    cdef uint64_t most = atomic_u64_load_relaxed(&worker.control.flows.board.charge_most)
    held_end(worker, connection)
    _in_kernel_end(connection)
    connection.flags |= CONNECTION_PASSED | CONNECTION_WAITED
    count(&worker.counters.backpressure)
    held_begin(worker, connection, <uint32_t>most)
    if not evict_slowest(worker):
        connection_close(worker, connection, CLOSE_EVICTED)
        return SERVED_CLOSED
    return _serve_here(worker, connection)


cdef inline Served _take_back(Worker* worker, Connection* connection) noexcept nogil:
    """In a drain, everything having been handed back: what still comes is answered here. Who has
    sent something this very moment is reset, as one is whose bytes are not read any more."""
    cdef bint is_whole = flow_leave(worker.control, connection)
    held_end(worker, connection)
    if not is_whole:
        connection_close(worker, connection, CLOSE_DRAINED)
        return SERVED_CLOSED
    flow_end(worker.control, connection)
    _in_kernel_end(connection)
    return _serve_here(worker, connection)


cdef inline void _note_movement(
    Worker* worker, Connection* connection, Look* look,
) noexcept nogil:
    """When bytes last moved. One for which bytes wait is judged by what its client takes."""
    cdef uint32_t now_ms = <uint32_t>worker.now_ms
    cdef uint32_t age_ms = now_ms - atomic_u32_load_relaxed(&connection.last_active_ms)
    if look.received > 0:
        connection.flags &= ~<unsigned int>CONNECTION_SILENT
    if connection.flags & CONNECTION_HELD:
        if look.acknowledged != connection.unread_bytes:
            note_progress(worker, connection)
        return
    age_ms = min(age_ms, look.sent_ms_ago)
    if look.received <= look.handed:
        age_ms = min(age_ms, look.received_ms_ago)
    atomic_u32_store_relaxed(&connection.last_active_ms, now_ms - age_ms)


cdef inline bint _note_held(
    Worker* worker, Connection* connection, Look* look,
) noexcept nogil:
    """Whether the kernel holds bytes of it."""
    cdef uint32_t held_bytes = flow_held_bytes(look)
    if held_bytes == 0:
        held_end(worker, connection)
        return False
    if not connection.flags & CONNECTION_HELD:
        connection.unread_bytes = look.acknowledged
    held_begin(worker, connection, held_bytes)
    return True


cdef inline void in_kernel_note(Worker* worker, Connection* connection) noexcept nogil:
    """For the timers: when its bytes moved, and whether some are held up."""
    cdef Look look
    if flow_look(connection, &look) < 0 or look.is_closed:
        return  # epoll reports it, and the error is for who serves it then
    _note_movement(worker, connection, &look)
    _note_held(worker, connection, &look)


cdef inline Served in_kernel_serve(Worker* worker, Connection* connection) noexcept nogil:
    """SERVED_NOT: it is not the kernel's any more, and to be served here."""
    cdef Look look
    cdef Flow flow
    cdef int result = flow_look(connection, &look)
    if result == 0:
        result = flow_read(worker.control, connection, &flow)
    if result == 0:
        result = flow_take_error(connection, &look)
    if result < 0:
        return connection_fail(worker, connection, -result, ERROR_RECV)
    _note_movement(worker, connection, &look)
    if flow.mode == FLOW_BROKEN:
        return connection_fail(worker, connection, ENOMEM, ERROR_RECV)
    if flow.mode != FLOW_ECHOED:
        return _take_over(worker, connection)
    if _note_held(worker, connection, &look):
        return SERVED_ALL
    if look.has_ended:
        # The FIN may stand behind bytes that had come before. Unread they would make it a RST.
        flow_run(connection)
        return connection_finish(worker, connection, CLOSE_EOF)
    if worker.is_draining:
        return _take_back(worker, connection)
    return SERVED_ALL
