"""<time.h>: clock_gettime(2). Both clocks are read in the vDSO, without a system call."""
from libc.stdint cimport uint64_t

cdef extern from "<time.h>" nogil:
    enum:
        CLOCK_MONOTONIC
        CLOCK_MONOTONIC_COARSE

    struct timespec:
        long tv_sec
        long tv_nsec

    int clock_gettime(int clock_id, timespec* now)


cdef inline uint64_t clock_now_ns() noexcept nogil:
    cdef timespec now
    clock_gettime(CLOCK_MONOTONIC, &now)
    return <uint64_t>now.tv_sec * 1000000000 + <uint64_t>now.tv_nsec


cdef inline uint64_t clock_now_ms() noexcept nogil:
    """CLOCK_MONOTONIC_COARSE in ms: steps of one timer tick (1 to 10 ms), a few ns to read."""
    cdef timespec now
    clock_gettime(CLOCK_MONOTONIC_COARSE, &now)
    return <uint64_t>now.tv_sec * 1000 + <uint64_t>now.tv_nsec // 1000000
