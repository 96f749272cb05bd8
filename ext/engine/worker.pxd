"""Run a worker: wait, serve what is ready, run timers; then drain.

The engine waits (calls.h), the accept queue is in accepting/, a turn with a connection in
turns.pxd.
"""
from common.atomics cimport (
    atomic_u32_decrement, atomic_u32_load, atomic_u32_load_relaxed, atomic_u32_store,
    atomic_u64_load_relaxed,
)
from common.life cimport PHASE_DRAINING, PHASE_RUNNING, PHASE_STOPPING
from engine.accepting.accept cimport accept_turn
from engine.accepting.closing cimport close_listeners_at_last, empty_listeners
from engine.accepting.listener cimport RESUME_AFTER_MS
from engine.connection cimport connection_close, connection_give_back
from engine.epoll.events cimport TOKEN_LISTENERS, TOKEN_REPORTS, TOKEN_WAKE
from engine.epoll.streams cimport stream_count_turn, stream_has_had_its_turns, stream_take
from engine.finishing cimport finishing_end
from engine.layout cimport (
    CLOSE_ABORTED, KECHO_BUFFER_BYTES, OWNERSHIP_FREE, SERVED_MORE, STATE_FINISHING, Connection,
    Control, Queue, Served, Worker,
)
from engine.slab cimport (
    CLAIM_WON, ownership_claim, ownership_try, slab_get, slab_high_water, slab_in_use,
)
from engine.timers cimport look_at_held, run_timers, until_timer_ms
from engine.turns cimport (
    GREETING_MS, READS_PER_TURN, connection_serve, connection_settle, streams_give_back,
)
from kernel.clock cimport clock_now_ms
from kernel.epoll cimport EPOLLERR, EPOLLHUP, EPOLLPRI, EPOLLRDHUP, epoll_event
from kernel.eventfd cimport eventfd_write
from libc.errno cimport EINTR, errno
from libc.stdint cimport uint32_t, uint64_t


cdef extern from "<sched.h>" nogil:
    int sched_yield()


cdef enum:
    EVENTS_PER_WAIT = 64
    DRAIN_LOOK_MS = 20  # a drain notices within this time that another worker has ended it


# ---- stopping: called by any thread ------------------------------------------------------------

cdef inline void wake(Queue* queue) noexcept nogil:
    """Wake a worker that waits at this queue. EAGAIN means that wake-ups are already queued."""
    while eventfd_write(queue.wake_fd, 1) < 0 and errno == EINTR:
        pass


cdef inline void wake_all(Control* control) noexcept nogil:
    """Wake one worker of each queue. It wakes the next one when it sees the new phase."""
    cdef uint32_t queue
    for queue in range(control.queue_count):
        wake(&control.queues[queue])


cdef inline void _give_up(Worker* worker, int error) noexcept nogil:
    """Record a fatal error and stop all workers."""
    worker.fatal_errno = error
    if worker.fatal_syscall == NULL:
        worker.fatal_syscall = "epoll_wait"
    atomic_u32_store(&worker.control.phase, PHASE_STOPPING)
    wake_all(worker.control)


# ---- one round --------------------------------------------------------------------------------

cdef inline void _serve_event(Worker* worker, epoll_event* event) noexcept nogil:
    """Handle one event, by what its token stands for."""
    cdef uint32_t token = <uint32_t>event.data.u64
    cdef uint32_t generation = <uint32_t>(event.data.u64 >> 32)
    cdef bint to_end = (
        event.events & (EPOLLRDHUP | EPOLLHUP | EPOLLERR | EPOLLPRI) != 0)
    cdef Connection* connection
    if token == TOKEN_WAKE:
        # It may have been meant for a sleeping worker of this queue, so pass it on.
        if worker.is_draining and atomic_u32_load(&worker.control.workers_accepting) != 0:
            wake(worker.queue)
            sched_yield()
        return
    if token == TOKEN_REPORTS:
        worker.control.engine.read_reports(worker.control)
        return
    if token >= TOKEN_LISTENERS:
        if not worker.is_draining:
            accept_turn(worker, token - TOKEN_LISTENERS)
        return
    connection = slab_get(&worker.queue.slab, token)
    if ownership_claim(connection, generation, to_end) == CLAIM_WON:
        connection_settle(
            worker, connection, connection_serve(worker, connection, READS_PER_TURN))


cdef inline void _serve_streams(Worker* worker, uint64_t received) noexcept nogil:
    """Give streams their turns after a round. `received` is the number of bytes that the round has
    received.

    A round in which the wait returned no stream gives the first stream one turn. Otherwise, streams
    get turns for the bytes that others received beyond what the returned streams had, one per full
    turn, and one per stream at most. So a client that sends a lot in requests gets no more than a
    stream.
    """
    cdef uint64_t turns = received // (READS_PER_TURN * KECHO_BUFFER_BYTES)
    cdef uint64_t _i
    cdef Served served
    if worker.stream_turns == 0:
        turns = max(turns, <uint64_t>1)
    else:
        turns -= min(turns, <uint64_t>worker.stream_turns)
    for _i in range(min(turns, <uint64_t>worker.stream_count)):
        if stream_has_had_its_turns(worker):
            # Before the next stream has its turn, so that a worker woken by this is awake soon.
            connection_give_back(worker, stream_take(worker))
        if worker.stream_count == 0:
            return
        stream_count_turn(worker)
        served = connection_serve(worker, worker.streams[0], READS_PER_TURN)
        if served != SERVED_MORE:
            connection_settle(worker, stream_take(worker), served)


cdef inline int _round(Worker* worker, int timeout_ms) noexcept nogil:
    """Wait once and serve what is ready. Return 0, or -1 if the worker has given up."""
    cdef epoll_event events[EVENTS_PER_WAIT]
    cdef uint64_t received = atomic_u64_load_relaxed(&worker.counters.bytes_received)
    cdef int ready, i
    worker.stream_turns = 0
    if worker.stream_count != 0:
        timeout_ms = 0
    ready = worker.control.engine.wait(worker, events, EVENTS_PER_WAIT, timeout_ms)
    if ready < 0 and ready != -EINTR:
        _give_up(worker, -ready)
        return -1
    worker.now_ms = clock_now_ms()
    for i in range(ready):
        _serve_event(worker, &events[i])
    if worker.stream_count != 0:
        _serve_streams(
            worker, atomic_u64_load_relaxed(&worker.counters.bytes_received) - received)
    return 0


# ---- drain ------------------------------------------------------------------------------------

cdef inline void _serve_all(Worker* worker) noexcept nogil:
    """Serve all connections that no other worker owns. connection_settle() closes those that are
    done. A worker that owns one settles it itself, when it gets here."""
    cdef Queue* queue = worker.queue
    cdef uint32_t index
    cdef Connection* connection
    for index in range(slab_high_water(&queue.slab)):
        connection = slab_get(&queue.slab, index)
        if ownership_try(connection):
            connection_settle(
                worker, connection, connection_serve(worker, connection, READS_PER_TURN))


cdef inline void _abort_all(Worker* worker) noexcept nogil:
    """Close all connections of the queue. Only its last worker calls this, so no other worker owns
    one. A connection that is FINISHING when the deadline expires has handed all bytes to the
    kernel, so it is not aborted but closed."""
    cdef Queue* queue = worker.queue
    cdef uint32_t index
    cdef Connection* connection
    for index in range(slab_high_water(&queue.slab)):
        connection = slab_get(&queue.slab, index)
        if <uint32_t>connection.ownership == OWNERSHIP_FREE:
            continue
        if connection.state == STATE_FINISHING and (
                atomic_u32_load(&worker.control.phase) == PHASE_DRAINING):
            finishing_end(worker, connection)
        else:
            connection_close(worker, connection, CLOSE_ABORTED)


cdef inline void _drain(Worker* worker) noexcept nogil:
    """Echo what has been received and close connections, until no connection and no client in an
    accept queue is left, the deadline expires, or the worker gives up."""
    cdef Control* control = worker.control
    cdef uint64_t deadline_ms, look_ms, retry_ms, wait_ms
    worker.now_ms = clock_now_ms()
    retry_ms = worker.now_ms + RESUME_AFTER_MS
    if atomic_u32_load(&control.phase) == PHASE_DRAINING:
        streams_give_back(worker)
        _serve_all(worker)
    while atomic_u32_load(&control.phase) == PHASE_DRAINING:
        if worker.listeners_left != 0 and worker.now_ms >= retry_ms:
            retry_ms = worker.now_ms + RESUME_AFTER_MS
            empty_listeners(worker)
        if worker.listeners_left == 0 and slab_in_use(&worker.queue.slab) == 0:
            break
        if worker.serve_again_ms != 0 and worker.now_ms >= worker.serve_again_ms:
            worker.serve_again_ms = 0
            _serve_all(worker)
        deadline_ms = atomic_u64_load_relaxed(&control.deadline_ms)
        if worker.now_ms >= deadline_ms:
            break
        wait_ms = min(deadline_ms - worker.now_ms, <uint64_t>DRAIN_LOOK_MS)
        if atomic_u32_load_relaxed(&worker.queue.held) != 0:
            look_ms = atomic_u64_load_relaxed(&worker.queue.next_look_ms)
            wait_ms = min(wait_ms, look_ms - worker.now_ms if look_ms > worker.now_ms else 0)
        if _round(worker, <int>wait_ms) < 0:
            break
        look_at_held(worker)


# ---- a worker's life ---------------------------------------------------------------------------

cdef inline void worker_run(Worker* worker) noexcept nogil:
    """Run a worker until the phase says stop or an error is fatal. worker.fatal_errno and
    worker.fatal_syscall then say why. The last worker of a queue closes all its connections."""
    cdef Control* control = worker.control
    cdef bint closes_listeners
    cdef int result
    worker.now_ms = clock_now_ms()
    result = control.engine.start(worker)
    if result < 0:
        _give_up(worker, -result)
    while result == 0 and atomic_u32_load(&control.phase) == PHASE_RUNNING:
        result = _round(worker, until_timer_ms(worker))
        run_timers(worker)
    if result == 0:
        result = control.engine.stop(worker)
        if result < 0:
            _give_up(worker, -result)
    wake(worker.queue)
    worker.now_ms = clock_now_ms()
    worker.greet_until_ms = min(
        worker.now_ms + GREETING_MS, atomic_u64_load_relaxed(&control.deadline_ms))
    worker.is_draining = True
    closes_listeners = atomic_u32_decrement(&control.workers_accepting) == 0
    if closes_listeners:
        empty_listeners(worker)
    if result == 0:
        _drain(worker)
    if closes_listeners:
        close_listeners_at_last(worker)
    wake(worker.queue)
    if atomic_u32_decrement(&worker.queue.workers_running) == 0:
        _abort_all(worker)
