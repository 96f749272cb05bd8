"""Connections whose client does not take what was sent: a list for each queue, the one that has
gone longest without progress first, and what their buffers hold in all. Flows are among them for
which the kernel holds bytes, and connections that are FINISHING.

Only a backpressured connection comes here, so that its lock is not on the usual path. It is held
for a few instructions; whoever holds it may try to own a connection, but waits for nothing.
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
    """`pending` has been filled, or CONNECTION_HELD set."""
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
    """The client has taken some of it."""
    pthread_mutex_lock(&queue.waiting_lock)
    _unlink(queue, connection)
    _append(queue, connection)
    pthread_mutex_unlock(&queue.waiting_lock)


cdef inline void waiting_end(
    Queue* queue, Connection* connection, uint32_t now_ms,
) noexcept nogil:
    """`pending` is about to be freed, or CONNECTION_HELD to be taken away."""
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
    """The buffers of this queue's connections hold more than they may. Of one that waits alone they
    may hold what its ring had received; what the kernel holds of a flow has no such bound."""
    cdef bint is_over
    pthread_mutex_lock(&queue.waiting_lock)
    is_over = queue.waiting_bytes > control.queue_buffer_bytes and (
        queue.waiting_count - queue.finishing > 1 or queue.held > queue.finishing)
    pthread_mutex_unlock(&queue.waiting_lock)
    return is_over


cdef inline Connection* waiting_claim_slowest(Queue* queue) noexcept nogil:
    """Owns the connection that has gone longest without progress, or the next one that no worker
    has; NULL if there is none."""
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
    """Of one that is CONNECTION_HELD: when to look at it, and what the kernel holds of it now."""
    pthread_mutex_lock(&queue.waiting_lock)
    connection.look_at_ms = at_ms
    queue.waiting_bytes += held_bytes
    queue.waiting_bytes -= connection.held_bytes
    connection.held_bytes = held_bytes
    pthread_mutex_unlock(&queue.waiting_lock)


cdef inline int waiting_claim_due(
    Queue* queue, uint32_t now_ms, Connection** due, int most, uint32_t* next_ms,
) noexcept nogil:
    """Owns up to `most` of them that are to be looked at by now; returns how many. next_ms: how
    long until the first of the others, or of those that somebody else has."""
    cdef Connection* connection
    cdef uint32_t index
    cdef int count = 0
    cdef int left_ms
    pthread_mutex_lock(&queue.waiting_lock)
    index = queue.waiting_head
    while index != KECHO_SLAB_END:
        connection = slab_get(&queue.slab, index)
        index = connection.waiting_next
        if atomic_u32_load_relaxed(&connection.to_look_at) == LOOK_AT_WAITING:
            continue
        left_ms = <int>(connection.look_at_ms - now_ms)
        if count == most:
            next_ms[0] = 1
            break
        if left_ms <= 0 and ownership_try(connection):
            due[count] = connection
            count += 1
        else:
            next_ms[0] = min(next_ms[0], <uint32_t>max(left_ms, 1))
    pthread_mutex_unlock(&queue.waiting_lock)
    return count


# ---- progress that only the kernel sees ---------------------------------------------------------

cdef inline uint32_t unread_bytes(Connection* connection) noexcept nogil:
    """What has been sent and the client's side has not taken: tcp(7), unix(7) SIOCOUTQ. While
    nothing is sent it changes only when the client takes something, long before there is so much
    room that epoll would report it."""
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
    """For those who do not own it; true of a connection that was waiting a moment ago."""
    cdef uint32_t what = atomic_u32_load_relaxed(&connection.to_look_at)
    return what == LOOK_AT_WAITING or what == LOOK_AT_HELD or what == LOOK_AT_FINISHING


cdef inline bint is_marked_unseen(Connection* connection) noexcept nogil:
    """For those who do not own it: one whose bytes move without anybody here seeing it."""
    return atomic_u32_load_relaxed(&connection.to_look_at) == LOOK_AT_UNSEEN


# ---- bytes that the kernel would not take ----------------------------------------------------

cdef inline uint32_t untaken(Worker* worker, Connection* connection) noexcept nogil:
    """A figure that changes when the client takes something."""
    cdef Look look
    if not connection.flags & CONNECTION_HELD or connection.state == STATE_FINISHING:
        return unread_bytes(connection)
    if worker.control.engine.look(connection, &look) < 0:
        return connection.unread_bytes
    return look.acknowledged


cdef inline void note_progress(Worker* worker, Connection* connection) noexcept nogil:
    """The client has taken some of what was pending."""
    atomic_u32_store_relaxed(&connection.last_active_ms, <uint32_t>worker.now_ms)
    waiting_progress(worker.queue, connection)
    connection.unread_bytes = untaken(worker, connection)


cdef inline void wait_with(
    Worker* worker, Connection* connection, unsigned char* pending, uint32_t size,
) noexcept nogil:
    """Backpressure: `pending`, from malloc, is sent when there is room. Until then nothing more is
    read, so a client can pin no more than that. What all of them can pin is bounded by
    evict_slowest()."""
    connection.pending = pending
    connection.pending_begin = 0
    connection.pending_end = size
    connection.flags |= CONNECTION_WAITED
    connection.unread_bytes = unread_bytes(connection)
    waiting_begin(worker.queue, connection)
    count(&worker.counters.backpressure)


cdef inline void free_pending(Worker* worker, Connection* connection) noexcept nogil:
    waiting_end(worker.queue, connection, <uint32_t>worker.now_ms)
    free(connection.pending)
    connection.pending = NULL


cdef inline int keep_pending(
    Worker* worker, Connection* connection, uint32_t begin, uint32_t end,
) noexcept nogil:
    """Copies [begin, end) of the worker's buffer aside. Returns 0 or -ENOMEM."""
    cdef unsigned char* pending = <unsigned char*>malloc(end - begin)
    if pending == NULL:
        return -ENOMEM
    memcpy(pending, worker.buffer + begin, end - begin)
    wait_with(worker, connection, pending, end - begin)
    return 0
