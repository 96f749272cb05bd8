"""Counters. A worker writes only its own; readers add them up."""
from common.atomics cimport atomic_u32_decrement, atomic_u32_increment, atomic_u64_add_single_writer
from engine.layout cimport Worker
from libc.stdint cimport uint64_t


cdef inline void count(uint64_t* counter) noexcept nogil:
    atomic_u64_add_single_writer(counter, 1)


cdef inline void count_by(uint64_t* counter, uint64_t amount) noexcept nogil:
    atomic_u64_add_single_writer(counter, amount)


cdef inline void count_error(Worker* worker, int kind) noexcept nogil:
    atomic_u64_add_single_writer(&worker.counters.errors[kind], 1)


cdef inline void count_opened(Worker* worker) noexcept nogil:
    """Count a connection that was accepted. `control.active` already includes it."""
    count(&worker.counters.accepted)
    atomic_u32_increment(&worker.active)


cdef inline void count_closed(Worker* worker, unsigned int accepted_by, int reason) noexcept nogil:
    """Count a connection that is about to be closed."""
    count(&worker.counters.closed[reason])
    atomic_u32_decrement(&worker.control.workers[accepted_by].active)
    atomic_u32_decrement(&worker.control.active)
