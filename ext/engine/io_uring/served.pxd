"""Connections that a worker's ring serves: --engine io_uring.

The ring receives into buffers of 4 KiB from a pool, and the worker has it send from there. So
connections that are ready at the same time share the system calls of their echoes. This pays for
clients that send a request and wait. A stream fills a buffer. A stream, and a client that stops
reading, go to epoll for good, where a turn and what a connection pins are bounded: the ring would
receive as long as there are buffers. A connection that finds no buffer also goes to epoll.

A connection is owned from its first completion until it is at rest again: nothing is being sent,
nothing is to be sent, and its state is RING. So a timer that finds a connection that no worker owns
may end it.

    RING, at rest ── received ──▶ sending, chunk after chunk ──▶ at rest
                                     │ a short send    │ a chunk was full
                                     ▼                 ▼
                               RING_BLOCKED       RING_LEAVING
                                     └────────┬────────┘
            the ring lets go; what it has received meanwhile is sent, or becomes pending
                                              ▼
                                           ECHOED
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
from libc.errno cimport EAGAIN, EINTR, ENOBUFS, ENOMEM
from libc.stdint cimport uint16_t, uint32_t
from libc.stdlib cimport malloc
from libc.string cimport memcpy


cdef enum:
    LOOKS_PER_TURN = 16  # then timers and epoll get their turn


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
    """Move all chunks of a connection into `pending`. Return 0 or -ENOMEM."""
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
    """Take over a new connection that is no stream."""
    if (ring_of(worker).is_over or connection.state != STATE_ECHOED
            or connection.flags & (CONNECTION_REGISTERED | CONNECTION_UNIX)):
        return False
    connection_enter(connection, STATE_RING)
    connection.first_chunk = KECHO_NO_CHUNK
    return True


cdef inline int ring_arm(Worker* worker, Connection* connection) noexcept nogil:
    """Prepare a request to receive. It takes the place of a registration with epoll."""
    uring_receive(ring_of(worker), connection)
    return 0


cdef inline Served ring_serve(Worker* worker, Connection* connection, int reads) noexcept nogil:
    """Do nothing: a completion says what there is to do."""
    return SERVED_ALL


cdef inline bint ring_leave(
    Worker* worker, Connection* connection, bint is_whole, int reason,
) noexcept nogil:
    """Cancel the request to receive. The kernel keeps the socket open until the ring has let go of
    it, before the next wait."""
    if connection.flags & CONNECTION_RECEIVING:
        uring_let_go(ring_of(worker), connection)
    return is_whole


cdef inline void _fail(
    Worker* worker, Connection* connection, int error, int kind,
) noexcept nogil:
    """Close a connection after an error."""
    _drop_all(ring_of(worker), connection)
    connection_fail(worker, connection, error, kind)


cdef inline void _give_to_worker(Worker* worker, Connection* connection) noexcept nogil:
    """Give a connection to its worker: the ring has let go of it. If the client has sent its end of
    file, recv returns it again."""
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
    """Have the ring let go of a connection, even if bytes are to be sent: until then the ring
    receives at each look."""
    if connection.state != STATE_RING:
        return
    connection_enter(connection, state)
    if connection.flags & CONNECTION_RECEIVING:
        uring_let_go(ring, connection)


cdef inline void _end(Worker* worker, Connection* connection, int reason) noexcept nogil:
    """End a connection: the ring has let go of it, and nothing is to be sent."""
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
    """Take the next step with a connection that is owned, after a completion."""
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
        # The request ended because there was no room for another completion.
        uring_receive(ring, connection)
        connection_settle(worker, connection, SERVED_ALL)


cdef inline void ring_end(Worker* worker, Connection* connection, int reason) noexcept nogil:
    """Have an overdue connection at rest closed when the ring lets go of it. If it were closed at
    once, bytes that the ring has received would be lost behind a FIN, and a request prepared for
    the descriptor would receive for another connection that gets the same number. If bytes have
    been received, the connection is not overdue, and goes on with epoll."""
    cdef Uring* ring = ring_of(worker)
    _begin_to_leave(ring, connection, STATE_RING_OVERDUE)
    _go_on(worker, ring, connection)


# ---- completions --------------------------------------------------------------------------------

cdef inline bint _own(Connection* connection, uint32_t generation) noexcept nogil:
    """Own the connection that bytes were received for. A connection that is not at rest is owned
    already. Return False if it has been closed meanwhile."""
    if (connection.state != STATE_RING or connection.flags & CONNECTION_SENDING) and (
            ownership_generation(connection) == generation):
        return True
    return ownership_claim(connection, generation, False) == CLAIM_WON


cdef inline bint _is_to_be_made_again(int result) noexcept nogil:
    """Check whether a request ended with a result that says nothing about its connection."""
    return result == -ECANCELED or result == -EAGAIN or result == -EINTR


cdef inline void _note_end(Connection* connection, int result) noexcept nogil:
    """Note that nothing more is received: end of file (0), or an error. A BLOCKED connection gets
    its end of file again from recv, when its worker has it."""
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
        # Received for again at once, it would be in the way of connections that have a buffer.
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
    """Wait for the ring and echo what it has received. Look again a number of times if there is
    more: sends and the next look share a system call. Return 0 or -errno."""
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
        # This call does not wait. All sends have ended when it returns.
        uring_enter(
            ring, receives or uring_has_overflowed(ring), -1 if receives else 0)


# ---- for the worker's loop ----------------------------------------------------------------------

cdef inline int ring_wait(
    Worker* worker, epoll_event* events, int most, int timeout_ms,
) noexcept nogil:
    """Wait for the ring and serve its connections. Then look at the epoll set, if the ring has
    reported it. If the ring serves no connection, wait for the epoll set alone."""
    cdef Uring* ring = ring_of(worker)
    cdef int result
    if ring.receiving == 0 or ring.is_over:
        return busy_poll_wait(worker, events, most, timeout_ms)
    if not ring.is_watching:
        uring_watch(ring, worker.queue.epoll_fd)
    result = _turn(worker, ring, timeout_ms)
    if result < 0:
        worker.fatal_syscall = "io_uring_enter"
        return result
    if not ring.epoll_is_ready:
        return 0
    ring.epoll_is_ready = False
    return busy_poll_wait(worker, events, most, 0)


cdef inline int ring_stop(Worker* worker) noexcept nogil:
    """Give all connections to their worker. Return 0 or -errno."""
    cdef Uring* ring = ring_of(worker)
    cdef int result = 0
    cdef uint32_t index
    cdef Connection* connection
    ring.is_over = True
    # One by one: to cancel all at once, the kernel searches all requests for each of them.
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
