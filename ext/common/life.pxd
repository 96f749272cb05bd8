"""The life of workers: what a stop tells them. Whoever calls wakes them afterwards."""
from common.atomics cimport (
    atomic_u32_load, atomic_u32_store, atomic_u64_load_relaxed, atomic_u64_store_relaxed,
)
from kernel.clock cimport clock_now_ms
from libc.stdint cimport uint32_t, uint64_t

cdef extern from "common/life.h" nogil:
    enum:
        PHASE_RUNNING
        PHASE_DRAINING
        PHASE_STOPPING


cdef inline void life_drain(
    uint32_t* phase, uint64_t* deadline_ms, uint64_t graceful_timeout_ms,
) noexcept nogil:
    """Starts the drain, or brings its deadline forward."""
    cdef uint64_t at_ms = clock_now_ms() + graceful_timeout_ms
    if atomic_u32_load(phase) == PHASE_RUNNING:
        atomic_u64_store_relaxed(deadline_ms, at_ms)
        atomic_u32_store(phase, PHASE_DRAINING)
    elif at_ms < atomic_u64_load_relaxed(deadline_ms):
        atomic_u64_store_relaxed(deadline_ms, at_ms)
