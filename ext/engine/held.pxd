"""Held connections: the kernel holds bytes that the client has yet to take, and epoll does not
report when they are gone. They are in the waiting list (backpressure.pxd), and a timer looks at
them."""
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
    """Return how many bytes were received and not yet handed to the socket."""
    if look.received <= look.handed:
        return 0
    return <uint32_t>min(look.received - look.handed, <uint64_t>UINT32_MAX)


cdef inline uint32_t _look_again_ms(Worker* worker, Connection* connection) noexcept nogil:
    """Return when the next look is due: soon after bytes have moved, then at growing intervals."""
    cdef uint32_t age_ms = (
        <uint32_t>worker.now_ms - atomic_u32_load_relaxed(&connection.last_active_ms))
    return <uint32_t>worker.now_ms + min(age_ms // 8 + 1, <uint32_t>LOOK_AGAIN_MOST_MS)


cdef inline void look_by(Worker* worker, uint32_t at_ms) noexcept nogil:
    """Schedule a look of the queue. At least this worker sees it before it waits again."""
    cdef uint64_t next_ms = worker.now_ms + (at_ms - <uint32_t>worker.now_ms)
    if next_ms < atomic_u64_load_relaxed(&worker.queue.next_look_ms):
        atomic_u64_store_relaxed(&worker.queue.next_look_ms, next_ms)


cdef inline void held_begin(
    Worker* worker, Connection* connection, uint32_t held_bytes,
) noexcept nogil:
    """Add a connection to the waiting list because the kernel holds bytes of it."""
    if connection.flags & CONNECTION_HELD:
        return
    connection.flags |= CONNECTION_HELD
    connection.held_bytes = held_bytes
    connection.look_at_ms = _look_again_ms(worker, connection)
    waiting_begin(worker.queue, connection)
    look_by(worker, connection.look_at_ms)


cdef inline void held_end(Worker* worker, Connection* connection) noexcept nogil:
    """Remove a connection from the waiting list: the kernel holds nothing of it."""
    if connection.flags & CONNECTION_HELD:
        waiting_end(worker.queue, connection, <uint32_t>worker.now_ms)
        connection.flags &= ~<unsigned int>CONNECTION_HELD


cdef inline void held_look(Worker* worker, Connection* connection) noexcept nogil:
    """Look at a held connection: note progress and the number of held bytes, and schedule the next
    look.

    held_bytes can grow. Bytes that are passed to a socket whose send queue does not move, as when
    TCP is short of memory, are charged to no one, up to the receive buffer. It only grows if
    nothing has moved for LOOK_AGAIN_MOST_MS: if the client reads, those bytes are on their way, and
    no reason to evict it.
    """
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
        held_end(worker, connection)  # at two looks in a row
        return
    waiting_look_at(worker.queue, connection, _look_again_ms(worker, connection), held_bytes)
    look_by(worker, connection.look_at_ms)


# ---- bytes that no worker sees ------------------------------------------------------------------

cdef inline void note_movement(
    Worker* worker, Connection* connection, Look* look,
) noexcept nogil:
    """Note when bytes last moved. For a connection with held bytes, only what the client takes
    counts."""
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
    """Note whether the kernel holds bytes of a connection, and return it."""
    cdef uint32_t held_bytes = bytes_held(look)
    if held_bytes == 0:
        held_end(worker, connection)
        return False
    if not connection.flags & CONNECTION_HELD:
        connection.unread_bytes = look.acknowledged
    held_begin(worker, connection, held_bytes)
    return True


cdef inline void note_unseen(Worker* worker, Connection* connection) noexcept nogil:
    """Note for the timers when bytes moved that no worker sees, and whether some are held."""
    cdef Look look
    if worker.control.engine.look(connection, &look) < 0 or look.is_closed:
        return  # epoll reports it; the worker that serves it then reads the error
    note_movement(worker, connection, &look)
    note_held(worker, connection, &look)
