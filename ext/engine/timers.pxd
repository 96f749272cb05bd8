"""Timers: sweeps for timeouts, looks at held connections, and a new try for paused listeners."""
from common.atomics cimport (
    atomic_u32_load_relaxed, atomic_u64_load_relaxed, atomic_u64_swap_acquire,
)
from engine.accepting.listener cimport listeners_resume
from engine.backpressure cimport (
    has_taken_nothing, is_marked_unseen, is_marked_waiting, note_progress, note_untaken, untaken,
    waiting_claim_due,
)
from engine.connection cimport has_rested
from engine.eviction cimport evict_slowest
from engine.finishing cimport finishing_note
from engine.held cimport held_look, look_by, note_unseen
from engine.layout cimport (
    CLOSE_IDLE, CLOSE_STALLED, CONNECTION_HELD, SERVED_CLOSED, STATE_ECHOED, STATE_FINISHING,
    STATE_IN_KERNEL, Connection, Control, Queue, Served, Worker,
)
from engine.slab cimport ownership_release, ownership_try, slab_get, slab_high_water
from engine.turns cimport READS_PER_TURN, connection_end, connection_serve, connection_settle
from libc.stdint cimport uint32_t, uint64_t


cdef enum:
    SWEEP_AT_MOST_EVERY_MS = 10
    SWEEP_AT_LEAST_EVERY_MS = 500
    LOOKS_PER_ROUND = 64
    NEXT_LOOK_MOST_MS = 200


cdef inline uint32_t _shortest_timeout_ms(Control* control) noexcept nogil:
    """Return the shorter of the two timeouts; 0: there is none."""
    cdef uint32_t idle_ms = control.idle_timeout_ms, write_ms = control.write_timeout_ms
    if idle_ms == 0 or write_ms == 0:
        return idle_ms + write_ms
    return min(idle_ms, write_ms)


cdef inline uint64_t _sweep_interval_ms(Control* control) noexcept nogil:
    """Return the time between two sweeps: a quarter of the shortest timeout, within bounds."""
    cdef uint64_t interval_ms = _shortest_timeout_ms(control) // 4
    return min(
        max(interval_ms, <uint64_t>SWEEP_AT_MOST_EVERY_MS), <uint64_t>SWEEP_AT_LEAST_EVERY_MS)


cdef inline int until_timer_ms(Worker* worker) noexcept nogil:
    """Return how long the worker may wait for events; -1: without limit."""
    cdef uint64_t due_ms = worker.resume_at_ms
    cdef uint64_t sweep_ms, look_ms
    if _shortest_timeout_ms(worker.control) != 0:
        sweep_ms = atomic_u64_load_relaxed(&worker.queue.next_sweep_ms)
        if due_ms == 0 or sweep_ms < due_ms:
            due_ms = sweep_ms
    if atomic_u32_load_relaxed(&worker.queue.held) != 0:
        look_ms = atomic_u64_load_relaxed(&worker.queue.next_look_ms)
        if due_ms == 0 or look_ms < due_ms:
            due_ms = look_ms
    if due_ms == 0:
        return -1
    return <int>(due_ms - worker.now_ms) + 1 if due_ms > worker.now_ms else 1


cdef inline bint _is_to_be_looked_at(
    Worker* worker, Connection* connection, uint64_t since_ms,
) noexcept nogil:
    """Check, without owning it, whether a sweep has to look at a connection. since_ms: the time
    since the last sweep. The kernel may hold bytes of a connection that waits for nothing here.
    Such a connection is looked at once in each write_timeout."""
    cdef Control* control = worker.control
    cdef uint32_t age_ms
    if is_marked_waiting(connection):
        return True
    if is_marked_unseen(connection):
        return has_rested(worker, connection, _shortest_timeout_ms(control))
    if has_rested(worker, connection, control.idle_timeout_ms):
        return True
    if not has_rested(worker, connection, control.write_timeout_ms):
        return False
    age_ms = (
        <uint32_t>worker.now_ms - atomic_u32_load_relaxed(&connection.last_active_ms))
    return age_ms % control.write_timeout_ms <= since_ms


cdef inline int _why_overdue(Worker* worker, Connection* connection) noexcept nogil:
    """Return the kecho_close_reason for which to end a connection, or -1."""
    cdef Control* control = worker.control
    if connection.state == STATE_FINISHING:
        return -1  # finish_timeout_ms limits it, and finishing_serve() checks it
    if connection.state == STATE_IN_KERNEL:
        note_unseen(worker, connection)
    if connection.pending != NULL or connection.flags & CONNECTION_HELD:
        if untaken(worker, connection) != connection.unread_bytes:
            note_progress(worker, connection)
        elif has_rested(worker, connection, control.write_timeout_ms):
            return CLOSE_STALLED
    elif has_rested(worker, connection, control.write_timeout_ms):
        if has_taken_nothing(connection):
            return CLOSE_STALLED
        note_untaken(connection, <uint32_t>worker.now_ms)
    if has_rested(worker, connection, control.idle_timeout_ms):
        return CLOSE_IDLE
    return -1


cdef inline void _close_overdue(Worker* worker, uint64_t since_ms) noexcept nogil:
    """Sweep: end all connections that are overdue."""
    cdef Queue* queue = worker.queue
    cdef uint32_t index
    cdef Connection* connection
    cdef int reason
    for index in range(slab_high_water(&queue.slab)):
        connection = slab_get(&queue.slab, index)
        if not _is_to_be_looked_at(worker, connection, since_ms) or not ownership_try(connection):
            continue
        reason = _why_overdue(worker, connection)
        if reason >= 0 and connection.state != STATE_ECHOED:
            worker.control.engine.end(worker, connection, reason)
        elif reason >= 0:
            connection_end(worker, connection, reason)
        elif not ownership_release(connection):
            connection_settle(
                worker, connection, connection_serve(worker, connection, READS_PER_TURN))


cdef inline void _look_at(Worker* worker, Connection* connection) noexcept nogil:
    """Look at a held or FINISHING connection."""
    cdef Served served = connection_serve(worker, connection, READS_PER_TURN)
    if served != SERVED_CLOSED and connection.state == STATE_FINISHING:
        finishing_note(worker, connection)
    elif served != SERVED_CLOSED and connection.flags & CONNECTION_HELD:
        held_look(worker, connection)
    connection_settle(worker, connection, served)


cdef inline void _look_at_held(Worker* worker) noexcept nogil:
    """Look at the connections whose look is due, if no other worker does."""
    cdef Connection* due[LOOKS_PER_ROUND]
    cdef Queue* queue = worker.queue
    cdef uint64_t due_ms = atomic_u64_load_relaxed(&queue.next_look_ms)
    cdef uint32_t next_ms = NEXT_LOOK_MOST_MS
    cdef int count, i
    if (worker.now_ms < due_ms or not atomic_u64_swap_acquire(
                &queue.next_look_ms, due_ms, worker.now_ms + NEXT_LOOK_MOST_MS)):
        return
    count = waiting_claim_due(queue, <uint32_t>worker.now_ms, due, LOOKS_PER_ROUND, &next_ms)
    look_by(worker, <uint32_t>worker.now_ms + next_ms)
    for i in range(count):
        _look_at(worker, due[i])
    if count > 0:
        evict_slowest(worker)  # a connection that is being served now has another look later


cdef inline void look_at_held(Worker* worker) noexcept nogil:
    """Look at held connections, if there are any."""
    if atomic_u32_load_relaxed(&worker.queue.held) != 0:
        _look_at_held(worker)


cdef inline void run_timers(Worker* worker) noexcept nogil:
    """Run what is due."""
    cdef uint64_t due_ms, interval_ms = _sweep_interval_ms(worker.control)
    look_at_held(worker)
    if worker.resume_at_ms != 0 and worker.now_ms >= worker.resume_at_ms:
        worker.resume_at_ms = 0
        listeners_resume(worker)
    if _shortest_timeout_ms(worker.control) == 0:
        return
    due_ms = atomic_u64_load_relaxed(&worker.queue.next_sweep_ms)
    if worker.now_ms >= due_ms and atomic_u64_swap_acquire(
            &worker.queue.next_sweep_ms, due_ms,
            worker.now_ms + interval_ms):
        _close_overdue(worker, worker.now_ms - due_ms + interval_ms)
