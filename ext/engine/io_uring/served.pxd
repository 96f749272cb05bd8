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
from engine.echo cimport connection_await
from engine.epoll.busy_poll cimport busy_poll_wait
from engine.finishing cimport connection_finish
from engine.io_uring.layout cimport KECHO_CHUNK_BYTES, KECHO_NO_CHUNK, Chunk, Uring
from engine.io_uring.ring cimport (
    INDEX_MASK, OPERATION_RECEIVED, OPERATION_SENT, OPERATION_SHIFT, OPERATION_WATCHED, Operation,
    chunk_data, chunk_give_back, ring_of, uring_enter, uring_has_overflowed, uring_let_go,
    uring_receive, uring_send, uring_watch, uring_watch_no_more,
)
from engine.layout cimport (
    CLOSE_EOF, CLOSE_IDLE, CLOSE_STALLED, CONNECTION_RECEIVING, CONNECTION_REGISTERED,
    CONNECTION_SENDING, CONNECTION_SILENT, CONNECTION_UNIX, ERROR_RECV, ERROR_SEND, SERVED_ALL,
    SERVED_CLOSED, STATE_ECHOED, STATE_RING, STATE_RING_BLOCKED, STATE_RING_BROKEN,
    STATE_RING_ENDED, STATE_RING_LEAVING, STATE_RING_OVERDUE, Connection, Served, State, Worker,
    connection_enter,
)
from engine.slab cimport (
    CLAIM_WON, ownership_claim, ownership_generation, ownership_try, slab_get, slab_high_water,
)
from engine.turns cimport connection_join, connection_settle
from kernel.clock cimport clock_now_ms
from kernel.epoll cimport epoll_event
from kernel.io_uring cimport (
    ECANCELED, IORING_CQE_BUFFER_SHIFT, IORING_CQE_F_BUFFER, IORING_CQE_F_MORE, Cqe,
)
from libc.errno cimport EAGAIN, EINTR, ENOBUFS, ENOMEM, errno
from libc.stdint cimport uint16_t, uint32_t
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
    cdef Uring* ring = ring_of(worker)
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

cdef inline bint ring_begin(Worker* worker, Connection* connection) noexcept nogil:
    """Takes a new connection that has shown itself to be no stream."""
    if (ring_of(worker).is_over or connection.state != STATE_ECHOED
            or connection.flags & (CONNECTION_REGISTERED | CONNECTION_UNIX)):
        return False
    connection_enter(connection, STATE_RING)
    connection.first_chunk = KECHO_NO_CHUNK
    return True


cdef inline int ring_arm(Worker* worker, Connection* connection) noexcept nogil:
    uring_receive(ring_of(worker), connection)
    return 0


cdef inline Served ring_serve(Worker* worker, Connection* connection, int reads) noexcept nogil:
    """A completion says when there is something to do."""
    return SERVED_ALL


cdef inline bint ring_leave(
    Worker* worker, Connection* connection, bint is_whole, int reason,
) noexcept nogil:
    """The socket is the ring's, too, until it has let go of it: before the next wait."""
    if connection.flags & CONNECTION_RECEIVING:
        uring_let_go(ring_of(worker), connection)
    return is_whole


cdef inline void _fail(
    Worker* worker, Connection* connection, int error, int kind,
) noexcept nogil:
    _drop_all(ring_of(worker), connection)
    connection_fail(worker, connection, error, kind)


cdef inline void _give_to_worker(Worker* worker, Connection* connection) noexcept nogil:
    """The ring has let go of it, and from here on it is as any other. An end of file that the ring
    has seen is there to be seen again."""
    cdef Served served
    cdef int result
    if connection.first_chunk != KECHO_NO_CHUNK:
        result = _keep_all(worker, connection)
        if result < 0:
            _fail(worker, connection, -result, ERROR_SEND)
            return
    connection_enter(connection, STATE_ECHOED)
    served = connection_await(worker, connection)
    if served != SERVED_CLOSED:
        connection_join(worker, connection, served)


cdef inline void _begin_to_leave(
    Uring* ring, Connection* connection, State state,
) noexcept nogil:
    """At once, whatever is to be sent yet: until the ring lets go, it receives in each look."""
    if connection.state != STATE_RING:
        return
    connection_enter(connection, state)
    if connection.flags & CONNECTION_RECEIVING:
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
        _give_to_worker(worker, connection)


cdef inline void _go_on(Worker* worker, Uring* ring, Connection* connection) noexcept nogil:
    """After a completion of a connection that is owned."""
    if connection.flags & CONNECTION_SENDING:
        return
    if connection.first_chunk != KECHO_NO_CHUNK and connection.state != STATE_RING_BLOCKED:
        connection.flags |= CONNECTION_SENDING
        ring.sending += 1
        uring_send(ring, connection, connection.first_chunk)
    elif connection.flags & CONNECTION_RECEIVING:
        if connection.state == STATE_RING:
            connection_settle(worker, connection, SERVED_ALL)
    elif connection.state == STATE_RING_BROKEN:
        _fail(worker, connection, connection.error, ERROR_RECV)
    elif connection.state == STATE_RING_ENDED:
        _end(worker, connection, CLOSE_EOF)
    elif connection.state == STATE_RING_OVERDUE and not ring.is_over:
        _end_overdue(worker, connection)
    elif connection.state != STATE_RING or ring.is_over:
        _give_to_worker(worker, connection)
    else:
        # There was no room for another completion.
        uring_receive(ring, connection)
        connection_settle(worker, connection, SERVED_ALL)


cdef inline void ring_end(Worker* worker, Connection* connection, int reason) noexcept nogil:
    """One at rest, which is overdue: it is closed when the ring has let go of it. Closed at once, what
    the ring has received and not told yet would be lost behind a FIN, and a request that was
    prepared for its descriptor would receive for whoever gets the number next. If something was
    received, it is not overdue, and goes on with epoll."""
    cdef Uring* ring = ring_of(worker)
    _begin_to_leave(ring, connection, STATE_RING_OVERDUE)
    _go_on(worker, ring, connection)


# ---- completions --------------------------------------------------------------------------------

cdef inline bint _own(Connection* connection, uint32_t generation) noexcept nogil:
    """Owns the connection that something was received for: one that is not at rest is owned. False:
    it has been closed meanwhile."""
    if (connection.state != STATE_RING or connection.flags & CONNECTION_SENDING) and (
            ownership_generation(connection) == generation):
        return True
    return ownership_claim(connection, generation, False) == CLAIM_WON


cdef inline bint _is_to_be_made_again(int result) noexcept nogil:
    """A request that ended with this says nothing of its connection."""
    return result == -ECANCELED or result == -EAGAIN or result == -EINTR


cdef inline void _note_end(Connection* connection, int result) noexcept nogil:
    """Nothing more is received: at an end of file (0), or for an error. One that is BLOCKED finds
    its end of file again when it has been given to its worker."""
    if result < 0:
        connection_enter(connection, STATE_RING_BROKEN)
        connection.error = <uint16_t>-result
    elif connection.state != STATE_RING_BLOCKED:
        connection_enter(connection, STATE_RING_ENDED)


cdef inline void _received(
    Worker* worker, Uring* ring, Connection* connection, uint32_t generation,
    const Cqe* completion,
) noexcept nogil:
    cdef bint is_last = not completion.flags & IORING_CQE_F_MORE
    cdef bint has_chunk = completion.flags & IORING_CQE_F_BUFFER != 0
    cdef uint32_t number = completion.flags >> IORING_CQE_BUFFER_SHIFT
    cdef int size = completion.res
    if is_last:
        ring.receiving -= 1
    if not _own(connection, generation):
        if has_chunk:
            chunk_give_back(ring, number)
        return
    if is_last:
        connection.flags &= ~<unsigned int>CONNECTION_RECEIVING
    if has_chunk and size > 0:
        count_by(&worker.counters.bytes_received, size)
        connection.flags &= ~<unsigned int>CONNECTION_SILENT
        if connection.state == STATE_RING_OVERDUE:
            connection_enter(connection, STATE_RING_LEAVING)
        atomic_u32_store_relaxed(&connection.last_active_ms, <uint32_t>worker.now_ms)
        _append(ring, connection, number, <uint32_t>size)
        if size == KECHO_CHUNK_BYTES:
            _begin_to_leave(ring, connection, STATE_RING_LEAVING)
    elif has_chunk:
        chunk_give_back(ring, number)
    if size == -ENOBUFS:
        # Received for again at once, it would only be in the way of those who have a buffer.
        _begin_to_leave(ring, connection, STATE_RING_LEAVING)
    elif is_last and size <= 0 and not _is_to_be_made_again(size):
        _note_end(connection, size)
    _go_on(worker, ring, connection)


cdef inline void _sent(
    Worker* worker, Uring* ring, Connection* connection, uint32_t number, int result,
) noexcept nogil:
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
    elif connection.state == STATE_RING_BROKEN:
        _fail(worker, connection, connection.error, ERROR_RECV)
        return
    else:
        _begin_to_leave(ring, connection, STATE_RING_LEAVING)
        connection_enter(connection, STATE_RING_BLOCKED)
    _go_on(worker, ring, connection)


cdef inline void _complete(Worker* worker, Uring* ring, const Cqe* completion) noexcept nogil:
    cdef uint32_t low = <uint32_t>completion.user_data
    cdef uint32_t above = <uint32_t>(completion.user_data >> 32)
    cdef Operation operation = <Operation>(low >> OPERATION_SHIFT)
    if operation == OPERATION_RECEIVED:
        _received(worker, ring, slab_get(&worker.queue.slab, low & INDEX_MASK), above, completion)
    elif operation == OPERATION_SENT:
        _sent(worker, ring, slab_get(&worker.queue.slab, low & INDEX_MASK), above, completion.res)
    elif operation == OPERATION_WATCHED:
        ring.is_watching = False
        ring.epoll_is_ready = True


cdef inline void _complete_all(Worker* worker, Uring* ring) noexcept nogil:
    cdef uint32_t head = ring.cq_head[0]
    cdef uint32_t tail = atomic_u32_load(ring.cq_tail)
    while head != tail:
        _complete(worker, ring, &ring.cqes[head & ring.cq_mask])
        head += 1
    atomic_u32_store(ring.cq_head, head)


cdef inline int _turn(Worker* worker, Uring* ring, int timeout_ms) noexcept nogil:
    """Waits for the ring, and echoes what it has received, a number of times if there is more, as
    what is sent and the next look take one call together. Returns 0 or -errno."""
    cdef int looks = LOOKS_PER_TURN
    cdef bint receives
    uring_enter(ring, True, timeout_ms)
    while True:
        worker.now_ms = clock_now_ms()
        _complete_all(worker, ring)
        if ring.failure < 0 or ring.sending == 0:
            return ring.failure
        looks -= 1
        receives = looks > 0 and not ring.epoll_is_ready
        # It does not wait: what is to be sent has been when it returns.
        uring_enter(
            ring, receives or uring_has_overflowed(ring), -1 if receives else 0)


# ---- for the worker's loop ----------------------------------------------------------------------

cdef inline int ring_wait(
    Worker* worker, epoll_event* events, int most, int timeout_ms,
) noexcept nogil:
    """Waits for the ring, and serves those whom it serves; then looks at the epoll set if that has
    something. Where the ring serves nobody, it is not worth waiting for."""
    cdef Uring* ring = ring_of(worker)
    cdef int result
    if ring.receiving == 0 or ring.is_over:
        return busy_poll_wait(worker, events, most, timeout_ms)
    if not ring.is_watching:
        uring_watch(ring, worker.queue.epoll_fd)
    result = _turn(worker, ring, timeout_ms)
    if result < 0:
        worker.fatal_syscall = "io_uring_enter"
        errno = -result
        return -1
    if not ring.epoll_is_ready:
        return 0
    ring.epoll_is_ready = False
    return busy_poll_wait(worker, events, most, 0)


cdef inline int ring_stop(Worker* worker) noexcept nogil:
    """Hands everybody over to epoll. Returns 0 or -errno."""
    cdef Uring* ring = ring_of(worker)
    cdef int result = 0
    cdef uint32_t index
    cdef Connection* connection
    ring.is_over = True
    # Each by itself: to find the next of all takes the kernel a search through all, each time.
    for index in range(slab_high_water(&worker.queue.slab)):
        connection = slab_get(&worker.queue.slab, index)
        if connection.flags & CONNECTION_RECEIVING and ownership_try(connection):
            _begin_to_leave(ring, connection, STATE_RING_LEAVING)
            _go_on(worker, ring, connection)
    if ring.is_watching:
        uring_watch_no_more(ring)
    while result == 0 and (ring.receiving != 0 or ring.is_watching):
        result = _turn(worker, ring, -1)
    if result < 0:
        worker.fatal_syscall = "io_uring_enter"
    return result
