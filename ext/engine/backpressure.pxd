"""Backpressure: connections whose client stops reading join their queue's waiting list.

The one without progress for the longest time is first. The list also has held connections
(held.pxd) and FINISHING ones. Its lock is not on the usual path. It is held for a few instructions.
Its holder may try to own a connection, but waits for nothing.
"""
from common.atomics cimport atomic_u32_load_relaxed, atomic_u32_store_relaxed
from engine.counters cimport count
from engine.layout cimport (
    CONNECTION_HELD, CONNECTION_WAITED, KECHO_SLAB_END, LOOK_AT_FINISHING, LOOK_AT_HELD,
    LOOK_AT_NEITHER, LOOK_AT_UNSEEN, LOOK_AT_WAITING, STATE_FINISHING, STATE_IN_KERNEL, Connection,
    Control, Look, Queue, Worker,
)
from engine.slab cimport ownership_try, slab_get
from kernel.ioctl cimport SIOCOUTQ, ioctl
from kernel.pthread cimport (
    pthread_mutex_destroy, pthread_mutex_init, pthread_mutex_lock, pthread_mutex_unlock,
)
from libc.errno cimport ENOMEM
from libc.stdint cimport uint32_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy


cdef inline int waiting_init(Queue* queue) noexcept nogil:
    """Initialise the waiting list. Return 0 or -errno."""
    queue.waiting_head = queue.waiting_tail = KECHO_SLAB_END
    queue.waiting_bytes = 0
    queue.waiting_count = queue.finishing = queue.held = 0
    return -pthread_mutex_init(&queue.waiting_lock, NULL)


cdef inline void waiting_destroy(Queue* queue) noexcept nogil:
    pthread_mutex_destroy(&queue.waiting_lock)


cdef inline void _append(Queue* queue, Connection* connection) noexcept nogil:
    connection.waiting_prev = queue.waiting_tail
    connection.waiting_next = KECHO_SLAB_END
    if queue.waiting_tail == KECHO_SLAB_END:
        queue.waiting_head = connection.index
    else:
        slab_get(&queue.slab, queue.waiting_tail).waiting_next = connection.index
    queue.waiting_tail = connection.index


cdef inline void _unlink(Queue* queue, Connection* connection) noexcept nogil:
    if connection.waiting_prev == KECHO_SLAB_END:
        queue.waiting_head = connection.waiting_next
    else:
        slab_get(&queue.slab, connection.waiting_prev).waiting_next = connection.waiting_next
    if connection.waiting_next == KECHO_SLAB_END:
        queue.waiting_tail = connection.waiting_prev
    else:
        slab_get(&queue.slab, connection.waiting_next).waiting_prev = connection.waiting_prev


# ---- by the worker that owns the connection -----------------------------------------------------

cdef inline void waiting_begin(Queue* queue, Connection* connection) noexcept nogil:
    """Add a connection to the list: `pending` was filled, or CONNECTION_HELD set."""
    cdef bint is_held = connection.flags & CONNECTION_HELD != 0
    cdef uint32_t mark = LOOK_AT_WAITING
    if connection.state == STATE_FINISHING:
        mark = LOOK_AT_FINISHING
    elif is_held:
        mark = LOOK_AT_HELD
    pthread_mutex_lock(&queue.waiting_lock)
    atomic_u32_store_relaxed(&connection.to_look_at, mark)
    _append(queue, connection)
    queue.waiting_bytes += connection.pending_end
    queue.waiting_count += 1
    queue.finishing += mark == LOOK_AT_FINISHING
    if is_held:
        atomic_u32_store_relaxed(&queue.held, queue.held + 1)
    pthread_mutex_unlock(&queue.waiting_lock)


cdef inline void waiting_progress(Queue* queue, Connection* connection) noexcept nogil:
    """Move a connection to the end of the list: its client has taken bytes."""
    pthread_mutex_lock(&queue.waiting_lock)
    _unlink(queue, connection)
    _append(queue, connection)
    pthread_mutex_unlock(&queue.waiting_lock)


cdef inline void waiting_end(
    Queue* queue, Connection* connection, uint32_t now_ms,
) noexcept nogil:
    """Remove a connection: `pending` is about to be freed, or CONNECTION_HELD to be cleared."""
    atomic_u32_store_relaxed(
        &connection.to_look_at,
        LOOK_AT_UNSEEN if connection.state == STATE_IN_KERNEL else LOOK_AT_NEITHER)
    pthread_mutex_lock(&queue.waiting_lock)
    _unlink(queue, connection)
    queue.waiting_bytes -= connection.pending_end
    queue.waiting_count -= 1
    queue.finishing -= connection.state == STATE_FINISHING
    if connection.flags & CONNECTION_HELD:
        atomic_u32_store_relaxed(&queue.held, queue.held - 1)
    pthread_mutex_unlock(&queue.waiting_lock)
    connection.waited_until_ms = now_ms


cdef inline bint waiting_is_over(Queue* queue, Control* control) noexcept nogil:
    """Check whether the queue's buffers exceed their bound. The `pending` bytes of a single
    connection may: a ring may have received more. Held bytes may not."""
    cdef bint is_over
    pthread_mutex_lock(&queue.waiting_lock)
    is_over = queue.waiting_bytes > control.queue_buffer_bytes and (
        queue.waiting_count - queue.finishing > 1 or queue.held > queue.finishing)
    pthread_mutex_unlock(&queue.waiting_lock)
    return is_over


cdef inline Connection* waiting_claim_slowest(Queue* queue) noexcept nogil:
    """Own the connection without progress for the longest time, or the next one that no worker
    owns. Return NULL if there is none."""
    cdef Connection* connection
    cdef uint32_t index
    pthread_mutex_lock(&queue.waiting_lock)
    index = queue.waiting_head
    while index != KECHO_SLAB_END:
        connection = slab_get(&queue.slab, index)
        if (atomic_u32_load_relaxed(&connection.to_look_at) != LOOK_AT_FINISHING
                and ownership_try(connection)):
            break
        index = connection.waiting_next
    pthread_mutex_unlock(&queue.waiting_lock)
    return NULL if index == KECHO_SLAB_END else connection


cdef inline void waiting_look_at(
    Queue* queue, Connection* connection, uint32_t at_ms, uint32_t held_bytes,
) noexcept nogil:
    """Set when a held connection is looked at next, and what the kernel holds of it now."""
    pthread_mutex_lock(&queue.waiting_lock)
    connection.look_at_ms = at_ms
    queue.waiting_bytes += held_bytes
    queue.waiting_bytes -= connection.held_bytes
    connection.held_bytes = held_bytes
    pthread_mutex_unlock(&queue.waiting_lock)


cdef inline int waiting_claim_due(
    Queue* queue, uint32_t now_ms, Connection** due, int most, uint32_t* next_ms,
) noexcept nogil:
    """Own up to `most` connections whose look is due. Return how many. next_ms becomes the time
    until the next of the others is due, or of one that another worker owns."""
    cdef Connection* connection
    cdef uint32_t index
    cdef int found = 0
    cdef int left_ms
    pthread_mutex_lock(&queue.waiting_lock)
    index = queue.waiting_head
    while index != KECHO_SLAB_END:
        connection = slab_get(&queue.slab, index)
        index = connection.waiting_next
        if atomic_u32_load_relaxed(&connection.to_look_at) == LOOK_AT_WAITING:
            continue
        left_ms = <int>(connection.look_at_ms - now_ms)
        if found == most:
            next_ms[0] = 1
            break
        if left_ms <= 0 and ownership_try(connection):
            due[found] = connection
            found += 1
        else:
            next_ms[0] = min(next_ms[0], <uint32_t>max(left_ms, 1))
    pthread_mutex_unlock(&queue.waiting_lock)
    return found


# ---- progress that only the kernel sees ---------------------------------------------------------

cdef inline uint32_t unread_bytes(Connection* connection) noexcept nogil:
    """Return how many sent bytes the client has not taken: SIOCOUTQ, tcp(7), unix(7). The number
    changes as soon as the client takes bytes, long before there is so much room that epoll reports
    it."""
    cdef int size = 0
    if ioctl(connection.fd, SIOCOUTQ, &size) < 0:
        return 0
    return <uint32_t>size


cdef inline bint has_taken_nothing(Connection* connection) noexcept nogil:
    """Check, for a connection that waits for nothing here, whether its client has taken nothing
    since note_untaken(), and nothing else has happened."""
    cdef uint32_t unread = unread_bytes(connection)
    return (
        unread != 0 and unread == connection.unread_bytes
        and connection.waited_until_ms == atomic_u32_load_relaxed(&connection.last_active_ms))


cdef inline void note_untaken(Connection* connection, uint32_t now_ms) noexcept nogil:
    """Note, for such a connection, what its client has still to take, if anything."""
    cdef uint32_t unread = unread_bytes(connection)
    if unread == 0:
        return
    connection.unread_bytes = unread
    connection.waited_until_ms = now_ms
    atomic_u32_store_relaxed(&connection.last_active_ms, now_ms)


cdef inline bint is_marked_waiting(Connection* connection) noexcept nogil:
    """Check, without owning it, whether a connection was in the list a moment ago."""
    cdef uint32_t what = atomic_u32_load_relaxed(&connection.to_look_at)
    return what == LOOK_AT_WAITING or what == LOOK_AT_HELD or what == LOOK_AT_FINISHING


cdef inline bint is_marked_unseen(Connection* connection) noexcept nogil:
    """Check, without owning it, whether a connection's bytes move without a worker seeing them."""
    return atomic_u32_load_relaxed(&connection.to_look_at) == LOOK_AT_UNSEEN


# ---- bytes that the kernel would not take ----------------------------------------------------

cdef inline uint32_t untaken(Worker* worker, Connection* connection) noexcept nogil:
    """Return a number that changes when the client takes bytes."""
    cdef Look look
    if not connection.flags & CONNECTION_HELD or connection.state == STATE_FINISHING:
        return unread_bytes(connection)
    if worker.control.engine.look(connection, &look) < 0:
        return connection.unread_bytes
    return look.acknowledged


cdef inline void note_progress(Worker* worker, Connection* connection) noexcept nogil:
    """Note that the client has taken bytes."""
    atomic_u32_store_relaxed(&connection.last_active_ms, <uint32_t>worker.now_ms)
    waiting_progress(worker.queue, connection)
    connection.unread_bytes = untaken(worker, connection)


cdef inline void wait_with(
    Worker* worker, Connection* connection, unsigned char* pending, uint32_t size,
) noexcept nogil:
    """Begin backpressure: keep `pending`, from malloc, until there is room. Nothing more is read
    until then, so a client cannot pin more. evict_slowest() bounds what all of them pin."""
    connection.pending = pending
    connection.pending_begin = 0
    connection.pending_end = size
    connection.flags |= CONNECTION_WAITED
    connection.unread_bytes = unread_bytes(connection)
    waiting_begin(worker.queue, connection)
    count(&worker.counters.backpressure)


cdef inline void free_pending(Worker* worker, Connection* connection) noexcept nogil:
    """Free `pending` and leave the list."""
    waiting_end(worker.queue, connection, <uint32_t>worker.now_ms)
    free(connection.pending)
    connection.pending = NULL


cdef inline int keep_pending(
    Worker* worker, Connection* connection, uint32_t begin, uint32_t end,
) noexcept nogil:
    """Keep a copy of [begin, end) of the worker's buffer. Return 0 or -ENOMEM."""
    cdef unsigned char* pending = <unsigned char*>malloc(end - begin)
    if pending == NULL:
        return -ENOMEM
    memcpy(pending, worker.buffer + begin, end - begin)
    wait_with(worker, connection, pending, end - begin)
    return 0
