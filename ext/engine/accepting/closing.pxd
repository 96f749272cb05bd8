"""The end of the listeners, by the last worker to see the stop: until then no one may, so no one
touches a closed one.

Closing a listener resets the clients that wait in its accept queue. In a drain the queues are
emptied first, beyond max_connections too: memory is bounded by the backlogs. Where there is no
descriptor or no memory for somebody, it is tried again as connections end, until the deadline.
"""
from common.atomics cimport atomic_u32_load, atomic_u64_load_relaxed
from common.life cimport PHASE_DRAINING
from engine.accepting.accept cimport accept_last
from engine.accepting.listener cimport listener_close, listener_disarm, listener_queued
from engine.layout cimport Control, Listener, Worker
from kernel.clock cimport clock_now_ms
from kernel.pthread cimport pthread_mutex_lock, pthread_mutex_unlock
from libc.stdint cimport uint32_t


cdef inline void _close(Control* control, Listener* listener) noexcept nogil:
    pthread_mutex_lock(&control.listeners_lock)
    listener_close(listener)
    pthread_mutex_unlock(&control.listeners_lock)


cdef inline int _accept_all(Worker* worker, uint32_t number) noexcept nogil:
    """Returns 0, 1 when the deadline has come before the end, or -errno of accept4."""
    cdef Control* control = worker.control
    cdef int result = accept_last(worker, number)
    while (result == 1 and atomic_u32_load(&control.phase) == PHASE_DRAINING
            and clock_now_ms() < atomic_u64_load_relaxed(&control.deadline_ms)):
        result = accept_last(worker, number)
    return result


cdef inline void empty_listeners(Worker* worker) noexcept nogil:
    """Closes those whose queue is empty, or another process's concern; worker.listeners_left is how
    many are left, for close_listeners_at_last() or the next try."""
    cdef Control* control = worker.control
    cdef Listener* listener
    cdef uint32_t number
    cdef int result
    worker.listeners_left = 0
    for number in range(control.listener_count):
        listener = &control.listeners[number]
        if listener.fd < 0:
            continue
        if listener.is_inherited:
            # Whoever waits there waits for the other holders, too: closing resets nobody, if there
            # are any. The kernel does not tell.
            control.left_to_others += listener_queued(listener)
            listener_disarm(control, number)
            _close(control, listener)
            continue
        if atomic_u32_load(&control.phase) == PHASE_DRAINING:
            result = _accept_all(worker, number)
            # Without descriptors accept4 fails before it looks whether anybody waits.
            if result == 0 or listener_queued(listener) == 0:
                _close(control, listener)
                continue
            worker.accept_errno = -result if result < 0 else 0
        worker.listeners_left += 1


cdef inline void close_listeners_at_last(Worker* worker) noexcept nogil:
    """Whoever waits yet is reset; counted before anything is closed, since the kernel may hand
    them on to a listener that is closed next (tcp_migrate_req)."""
    cdef Control* control = worker.control
    cdef uint32_t number, lost = 0
    for number in range(control.listener_count):
        lost += listener_queued(&control.listeners[number])
    for number in range(control.listener_count):
        _close(control, &control.listeners[number])
    control.unaccepted = lost
    control.unaccepted_errno = worker.accept_errno
