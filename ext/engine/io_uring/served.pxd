"""Connections that a worker's ring serves: --engine io_uring.

The ring receives by itself, into buffers of 4 KiB that it takes from a pool, and the worker gives
each of them back to it for sending; the calls that an echo takes are then shared by all that are
ready at that moment. That is for clients that ask and wait. A stream, which fills a buffer, or a
client that does not take its echo goes to epoll, for good, where one connection's turn is bounded
and what it pins, too: the ring would go on receiving while there are buffers. So does whoever finds
none.

A connection is owned from its first completion until it is at rest again: nothing is being sent,
nothing is to be sent, and the ring has not been told to let go of it. So whoever finds one that
nobody owns, as timers do, may close it.

    at rest ── received ──▶ sending, chunk after chunk ──▶ at rest
                                │ short             │ a chunk was full
                                ▼                   ▼
                            BLOCKED ─▶ LEAVING: the ring lets go; what it still received is
                                       sent, or pending ──▶ epoll
"""
from common.atomics cimport atomic_u32_load, atomic_u32_store, atomic_u32_store_relaxed
from engine.backpressure cimport has_taken_nothing, wait_with
from engine.connection cimport connection_close, connection_fail, has_rested
from engine.counters cimport count, count_by
from engine.echo cimport connection_await, connection_join, connection_settle
from engine.finishing cimport connection_finish
from engine.io_uring.ring cimport (
    INDEX_MASK, OPERATION_RECEIVED, OPERATION_SENT, OPERATION_SHIFT, OPERATION_WATCHED, Operation,
    chunk_data, chunk_give_back, uring_enter, uring_has_overflowed, uring_let_go, uring_receive,
    uring_send, uring_watch, uring_watch_no_more,
)
from engine.layout cimport (
    CLOSE_EOF, CLOSE_IDLE, CLOSE_STALLED, CONNECTION_BLOCKED, CONNECTION_ENDED, CONNECTION_IN_RING,
    CONNECTION_LEAVING, CONNECTION_OVERDUE, CONNECTION_SENDING, CONNECTION_SILENT, ERROR_RECV,
    ERROR_SEND, KECHO_CHUNK_BYTES, KECHO_NO_CHUNK, SERVED_ALL, SERVED_CLOSED, Chunk, Connection,
    Served, Uring, Worker,
)
from engine.slab cimport (
    CLAIM_WON, ownership_claim, ownership_generation, ownership_try, slab_get, slab_high_water,
)
from kernel.clock cimport clock_now_ms
from kernel.io_uring cimport (
    ECANCELED, IORING_CQE_BUFFER_SHIFT, IORING_CQE_F_BUFFER, IORING_CQE_F_MORE, Cqe,
)
from libc.errno cimport EAGAIN, EINTR, ENOBUFS, ENOMEM
from libc.stdint cimport uint32_t
from libc.stdlib cimport malloc
from libc.string cimport memcpy


cdef enum:
    LOOKS_PER_TURN = 16  # then timers, and connections that epoll serves, get theirs


# ---- chunks of a connection, in the order in which they came ------------------------------------

cdef inline void _append(
    Uring* ring, Connection* connection, uint32_t number, uint32_t size,
) noexcept nogil:
    ring.chunks[number].begin = 0
    ring.chunks[number].end = size
    ring.chunks[number].next = KECHO_NO_CHUNK
    if connection.first_chunk == KECHO_NO_CHUNK:
        connection.first_chunk = number
    else:
        ring.chunks[connection.last_chunk].next = number
    connection.last_chunk = number


cdef inline void _drop_first(Uring* ring, Connection* connection) noexcept nogil:
    cdef uint32_t number = connection.first_chunk
    connection.first_chunk = ring.chunks[number].next
    chunk_give_back(ring, number)


cdef inline void _drop_all(Uring* ring, Connection* connection) noexcept nogil:
    while connection.first_chunk != KECHO_NO_CHUNK:
        _drop_first(ring, connection)


cdef inline int _keep_all(Worker* worker, Connection* connection) noexcept nogil:
    """What was received and not sent becomes `pending`. Returns 0 or -ENOMEM."""
    cdef Uring* ring = &worker.uring
    cdef Chunk* chunk
    cdef unsigned char* pending
    cdef uint32_t number = connection.first_chunk, size = 0
    while number != KECHO_NO_CHUNK:
        chunk = &ring.chunks[number]
        size += chunk.end - chunk.begin
        number = chunk.next
    pending = <unsigned char*>malloc(size)
    if pending == NULL:
        return -ENOMEM
    size = 0
    while connection.first_chunk != KECHO_NO_CHUNK:
        chunk = &ring.chunks[connection.first_chunk]
        memcpy(
            pending + size, chunk_data(ring, connection.first_chunk) + chunk.begin,
            chunk.end - chunk.begin)
        size += chunk.end - chunk.begin
        _drop_first(ring, connection)
    wait_with(worker, connection, pending, size)
    return 0


# ---- what to do next with a connection ----------------------------------------------------------

cdef inline void in_ring_begin(Worker* worker, Connection* connection) noexcept nogil:
    """A new connection; nothing is pending."""
    connection.first_chunk = KECHO_NO_CHUNK
    uring_receive(&worker.uring, connection)
    connection_settle(worker, connection, SERVED_ALL)


cdef inline void _fail(
    Worker* worker, Connection* connection, int error, int kind,
) noexcept nogil:
    _drop_all(&worker.uring, connection)
    connection_fail(worker, connection, error, kind)


cdef inline void _leave(Worker* worker, Connection* connection) noexcept nogil:
    """The ring has let go of it, and from here on it is as any other. An end of file that the ring
    has seen is there to be seen again."""
    cdef Served served
    cdef int result
    if connection.first_chunk != KECHO_NO_CHUNK:
        result = _keep_all(worker, connection)
        if result < 0:
            _fail(worker, connection, -result, ERROR_SEND)
            return
    connection.flags &= ~<unsigned int>(
        CONNECTION_ENDED | CONNECTION_BLOCKED | CONNECTION_LEAVING | CONNECTION_OVERDUE)
    served = connection_await(worker, connection)
    if served != SERVED_CLOSED:
        connection_join(worker, connection, served)


cdef inline void _begin_to_leave(Uring* ring, Connection* connection) noexcept nogil:
    """At once, whatever is to be sent yet: until the ring lets go, it receives in each look."""
    if connection.flags & CONNECTION_LEAVING:
        return
    connection.flags |= CONNECTION_LEAVING
    if connection.flags & CONNECTION_IN_RING:
        uring_let_go(ring, connection)


cdef inline void _end(Worker* worker, Connection* connection, int reason) noexcept nogil:
    """The ring has let go of it, and nothing is to be sent."""
    connection_settle(worker, connection, connection_finish(worker, connection, reason))


cdef inline void _end_overdue(Worker* worker, Connection* connection) noexcept nogil:
    """End an overdue connection: the ring has let go of it, and nothing is to be sent. If its
    client has taken bytes meanwhile, it goes on with epoll."""
    if worker.control.write_timeout_ms != 0 and has_taken_nothing(connection):
        connection_close(worker, connection, CLOSE_STALLED)
    elif has_rested(worker, connection, worker.control.idle_timeout_ms):
        _end(worker, connection, CLOSE_IDLE)
    else:
        _leave(worker, connection)


cdef inline void _go_on(Worker* worker, Connection* connection) noexcept nogil:
    """After a completion of a connection that is owned."""
    cdef Uring* ring = &worker.uring
    if connection.flags & CONNECTION_SENDING:
        return
    if connection.first_chunk != KECHO_NO_CHUNK and not connection.flags & CONNECTION_BLOCKED:
        connection.flags |= CONNECTION_SENDING
        ring.sending += 1
        uring_send(ring, connection, connection.first_chunk)
    elif connection.flags & CONNECTION_IN_RING:
        if not connection.flags & CONNECTION_LEAVING:
            connection_settle(worker, connection, SERVED_ALL)
    elif connection.flags & CONNECTION_ENDED and connection.unread_bytes != 0:
        _fail(worker, connection, <int>connection.unread_bytes, ERROR_RECV)
    elif connection.flags & CONNECTION_ENDED and not connection.flags & CONNECTION_BLOCKED:
        _end(worker, connection, CLOSE_EOF)
    elif connection.flags & CONNECTION_OVERDUE and not ring.is_over:
        _end_overdue(worker, connection)
    elif connection.flags & CONNECTION_LEAVING or ring.is_over:
        _leave(worker, connection)
    else:
        # There was no room for another completion.
        uring_receive(ring, connection)
        connection_settle(worker, connection, SERVED_ALL)


cdef inline void in_ring_close_overdue(Worker* worker, Connection* connection) noexcept nogil:
    """One that the ring receives for, at rest, and owned: it is closed when the ring has let go of
    it. Closed at once, what the ring has received and not told yet would be lost behind a FIN, and
    a request that was prepared for its descriptor would receive for whoever gets the number next.
    If something was received, it is not overdue, and goes on with epoll."""
    connection.flags |= CONNECTION_OVERDUE
    _begin_to_leave(&worker.uring, connection)
    _go_on(worker, connection)


# ---- completions --------------------------------------------------------------------------------

cdef inline bint _is_owned(Connection* connection, uint32_t generation) noexcept nogil:
    """Owns the connection that something was received for. False: it has been closed meanwhile."""
    if connection.flags & (CONNECTION_SENDING | CONNECTION_LEAVING) and (
            ownership_generation(connection) == generation):
        return True
    return ownership_claim(connection, generation, False) == CLAIM_WON


cdef inline bint _is_to_be_made_again(int result) noexcept nogil:
    """A request that ended with this says nothing of its connection."""
    return result == -ECANCELED or result == -EAGAIN or result == -EINTR


cdef inline void _received(
    Worker* worker, Connection* connection, uint32_t generation, const Cqe* completion,
) noexcept nogil:
    cdef Uring* ring = &worker.uring
    cdef bint is_last = not completion.flags & IORING_CQE_F_MORE
    cdef bint has_chunk = completion.flags & IORING_CQE_F_BUFFER != 0
    cdef uint32_t number = completion.flags >> IORING_CQE_BUFFER_SHIFT
    cdef int size = completion.res
    if is_last:
        ring.receiving -= 1
    if not _is_owned(connection, generation):
        if has_chunk:
            chunk_give_back(ring, number)
        return
    if is_last:
        connection.flags &= ~<unsigned int>CONNECTION_IN_RING
    if has_chunk and size > 0:
        count_by(&worker.counters.bytes_received, size)
        connection.flags &= ~<unsigned int>(CONNECTION_SILENT | CONNECTION_OVERDUE)
        atomic_u32_store_relaxed(&connection.last_active_ms, <uint32_t>worker.now_ms)
        _append(ring, connection, number, <uint32_t>size)
        if size == KECHO_CHUNK_BYTES:
            _begin_to_leave(ring, connection)
    elif has_chunk:
        chunk_give_back(ring, number)
    if size == -ENOBUFS:
        # Received for again at once, it would only be in the way of those who have a buffer.
        _begin_to_leave(ring, connection)
    elif is_last and size <= 0 and not _is_to_be_made_again(size):
        connection.flags |= CONNECTION_ENDED
        connection.unread_bytes = <uint32_t>-size
    _go_on(worker, connection)


cdef inline void _sent(
    Worker* worker, Connection* connection, uint32_t number, int result,
) noexcept nogil:
    cdef Uring* ring = &worker.uring
    cdef Chunk* chunk = &ring.chunks[number]
    ring.sending -= 1
    connection.flags &= ~<unsigned int>CONNECTION_SENDING
    if result < 0 and result != -EAGAIN:
        _fail(worker, connection, -result, ERROR_SEND)
        return
    if result > 0:
        count_by(&worker.counters.bytes_sent, result)
        chunk.begin += <uint32_t>result
    if chunk.begin == chunk.end:
        count(&worker.counters.echoes)
        _drop_first(ring, connection)
    else:
        connection.flags |= CONNECTION_BLOCKED
        _begin_to_leave(ring, connection)
    _go_on(worker, connection)


cdef inline void _complete(Worker* worker, const Cqe* completion) noexcept nogil:
    cdef uint32_t low = <uint32_t>completion.user_data
    cdef uint32_t above = <uint32_t>(completion.user_data >> 32)
    cdef Operation operation = <Operation>(low >> OPERATION_SHIFT)
    if operation == OPERATION_RECEIVED:
        _received(worker, slab_get(&worker.queue.slab, low & INDEX_MASK), above, completion)
    elif operation == OPERATION_SENT:
        _sent(worker, slab_get(&worker.queue.slab, low & INDEX_MASK), above, completion.res)
    elif operation == OPERATION_WATCHED:
        worker.uring.is_watching = False
        worker.uring.epoll_is_ready = True


cdef inline void _complete_all(Worker* worker) noexcept nogil:
    cdef Uring* ring = &worker.uring
    cdef uint32_t head = ring.cq_head[0]
    cdef uint32_t tail = atomic_u32_load(ring.cq_tail)
    while head != tail:
        _complete(worker, &ring.cqes[head & ring.cq_mask])
        head += 1
    atomic_u32_store(ring.cq_head, head)


cdef inline int _turn(Worker* worker, int timeout_ms) noexcept nogil:
    """Waits for the ring, and echoes what it has received, a number of times if there is more, as
    what is sent and the next look take one call together. Returns 0 or -errno."""
    cdef Uring* ring = &worker.uring
    cdef int looks = LOOKS_PER_TURN
    cdef bint receives
    uring_enter(ring, True, timeout_ms)
    while True:
        worker.now_ms = clock_now_ms()
        _complete_all(worker)
        if ring.failure < 0 or ring.sending == 0:
            return ring.failure
        looks -= 1
        receives = looks > 0 and not ring.epoll_is_ready
        # It does not wait: what is to be sent has been when it returns.
        uring_enter(
            ring, receives or uring_has_overflowed(ring), -1 if receives else 0)


# ---- for the worker's loop ----------------------------------------------------------------------

cdef inline int in_ring_round(Worker* worker, int timeout_ms) noexcept nogil:
    """Waits for the ring or the epoll set, and serves those whom the ring serves. Returns 1 when
    the epoll set has something, 0, or -errno of io_uring_enter."""
    cdef Uring* ring = &worker.uring
    cdef int result
    if not ring.is_watching:
        uring_watch(ring, worker.queue.epoll_fd)
    result = _turn(worker, timeout_ms)
    if result < 0:
        return result
    result = ring.epoll_is_ready
    ring.epoll_is_ready = False
    return result


cdef inline int in_ring_end(Worker* worker) noexcept nogil:
    """Hands everybody over to epoll. Returns 0 or -errno of io_uring_enter."""
    cdef Uring* ring = &worker.uring
    cdef int result = 0
    cdef uint32_t index
    cdef Connection* connection
    ring.is_over = True
    # Each by itself: to find the next of all takes the kernel a search through all, each time.
    for index in range(slab_high_water(&worker.queue.slab)):
        connection = slab_get(&worker.queue.slab, index)
        if connection.flags & CONNECTION_IN_RING and ownership_try(connection):
            _begin_to_leave(ring, connection)
            _go_on(worker, connection)
    if ring.is_watching:
        uring_watch_no_more(ring)
    while result == 0 and (ring.receiving != 0 or ring.is_watching):
        result = _turn(worker, -1)
    return result
