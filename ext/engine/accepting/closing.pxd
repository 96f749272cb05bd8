"""The end of the listeners. The last worker to see the stop closes them; before that no worker may,
so no worker uses a closed one.

Closing a listener resets the clients in its accept queue. In a drain the queues are emptied first,
even beyond max_connections: the backlogs bound the memory. If descriptors or memory run out, a
later try follows as connections end, until the deadline.
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
    """Empty an accept queue. Return 0, 1 if the deadline came first, or -errno of accept4."""
    cdef Control* control = worker.control
    cdef int result = accept_last(worker, number)
    while (result == 1 and atomic_u32_load(&control.phase) == PHASE_DRAINING
            and clock_now_ms() < atomic_u64_load_relaxed(&control.deadline_ms)):
        result = accept_last(worker, number)
    return result


cdef inline void empty_listeners(Worker* worker) noexcept nogil:
    """Close the listeners whose accept queue is empty, and inherited ones. worker.listeners_left is
    how many are left, for the next try or close_listeners_at_last()."""
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
            # Other holders of the socket can accept its clients. If there are any, closing resets
            # no client. The kernel does not tell whether there are.
            control.left_to_others += listener_queued(listener)
            listener_disarm(control, number)
            _close(control, listener)
            continue
        if atomic_u32_load(&control.phase) == PHASE_DRAINING:
            result = _accept_all(worker, number)
            # Without a free descriptor, accept4 fails even if the queue is empty.
            if result == 0 or listener_queued(listener) == 0:
                _close(control, listener)
                continue
            worker.accept_errno = -result if result < 0 else 0
        worker.listeners_left += 1


cdef inline void close_listeners_at_last(Worker* worker) noexcept nogil:
    """Close all listeners, which resets the clients in their accept queues. They are counted before
    any listener is closed, because the kernel may move them to one that is closed next
    (tcp_migrate_req)."""
    cdef Control* control = worker.control
    cdef uint32_t number, lost = 0
    for number in range(control.listener_count):
        lost += listener_queued(&control.listeners[number])
    for number in range(control.listener_count):
        _close(control, &control.listeners[number])
    control.unaccepted = lost
    control.unaccepted_errno = worker.accept_errno
