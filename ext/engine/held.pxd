"""Connections of which the kernel holds bytes that their client has yet to take, while nothing
reports when they are gone: they are in the list of backpressure.pxd, and looked at."""
from common.atomics cimport (
    atomic_u32_load_relaxed, atomic_u32_store_relaxed, atomic_u64_load_relaxed,
    atomic_u64_store_relaxed,
)
from engine.backpressure cimport note_progress, waiting_begin, waiting_end, waiting_look_at
from engine.layout cimport CONNECTION_HELD, CONNECTION_SILENT, Connection, Look, Worker
from libc.stdint cimport UINT32_MAX, uint32_t, uint64_t


cdef enum:
    LOOK_AGAIN_MOST_MS = 100


cdef inline uint32_t bytes_held(const Look* look) noexcept nogil:
    """What was received and has not been handed to the socket."""
    if look.received <= look.handed:
        return 0
    return <uint32_t>min(look.received - look.handed, <uint64_t>UINT32_MAX)


cdef inline uint32_t _look_again_ms(Worker* worker, Connection* connection) noexcept nogil:
    """When to ask the kernel again: soon after something has moved, then less and less often."""
    cdef uint32_t age_ms = (
        <uint32_t>worker.now_ms - atomic_u32_load_relaxed(&connection.last_active_ms))
    return <uint32_t>worker.now_ms + min(age_ms // 8 + 1, <uint32_t>LOOK_AGAIN_MOST_MS)


cdef inline void look_by(Worker* worker, uint32_t at_ms) noexcept nogil:
    """Has the queue looked at by then. This worker, at least, sees it before it waits again."""
    cdef uint64_t next_ms = worker.now_ms + (at_ms - <uint32_t>worker.now_ms)
    if next_ms < atomic_u64_load_relaxed(&worker.queue.next_look_ms):
        atomic_u64_store_relaxed(&worker.queue.next_look_ms, next_ms)


cdef inline void held_begin(
    Worker* worker, Connection* connection, uint32_t held_bytes,
) noexcept nogil:
    """The kernel holds bytes that wait for the client to take others; nothing says when they have
    gone, so they are looked at."""
    if connection.flags & CONNECTION_HELD:
        return
    connection.flags |= CONNECTION_HELD
    connection.held_bytes = held_bytes
    connection.look_at_ms = _look_again_ms(worker, connection)
    waiting_begin(worker.queue, connection)
    look_by(worker, connection.look_at_ms)


cdef inline void held_end(Worker* worker, Connection* connection) noexcept nogil:
    if connection.flags & CONNECTION_HELD:
        waiting_end(worker.queue, connection, <uint32_t>worker.now_ms)
        connection.flags &= ~<unsigned int>CONNECTION_HELD


cdef inline void held_look(Worker* worker, Connection* connection) noexcept nogil:
    """The kernel still holds bytes of it: whether the client has taken some, how many they are now,
    and when to look again. They may have become more: what is passed to a socket whose queue does
    not move, as when TCP lacks memory, is charged to nobody, up to its receive buffer. Of a client
    that reads they are on their way, and no reason to reset the slowest."""
    cdef Look look
    cdef uint32_t age_ms, held_bytes = connection.held_bytes
    if worker.control.engine.look(connection, &look) == 0:
        if look.acknowledged != connection.unread_bytes:
            note_progress(worker, connection)
        age_ms = (
            <uint32_t>worker.now_ms - atomic_u32_load_relaxed(&connection.last_active_ms))
        if age_ms >= LOOK_AGAIN_MOST_MS or bytes_held(&look) < held_bytes:
            held_bytes = bytes_held(&look)
    if held_bytes == 0 and connection.held_bytes == 0:
        held_end(worker, connection)  # since the look before, its end would have been read
        return
    waiting_look_at(worker.queue, connection, _look_again_ms(worker, connection), held_bytes)
    look_by(worker, connection.look_at_ms)


# ---- bytes that nobody here sees ----------------------------------------------------------------

cdef inline void note_movement(
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


cdef inline bint note_held(
    Worker* worker, Connection* connection, Look* look,
) noexcept nogil:
    """Whether the kernel holds bytes of it."""
    cdef uint32_t held_bytes = bytes_held(look)
    if held_bytes == 0:
        held_end(worker, connection)
        return False
    if not connection.flags & CONNECTION_HELD:
        connection.unread_bytes = look.acknowledged
    held_begin(worker, connection, held_bytes)
    return True


cdef inline void note_unseen(Worker* worker, Connection* connection) noexcept nogil:
    """For the timers: when its bytes moved, and whether some are held up."""
    cdef Look look
    if worker.control.engine.look(connection, &look) < 0 or look.is_closed:
        return  # epoll reports it, and the error is for who serves it then
    note_movement(worker, connection, &look)
    note_held(worker, connection, &look)
