"""The io_uring engine: each worker has a ring that receives and sends for its TCP connections."""
from common.memory cimport KECHO_CACHE_LINE, aligned_alloc
from engine.epoll.engine cimport epoll_engine
from engine.io_uring.layout cimport Uring
from engine.io_uring.ring cimport ring_of, uring_close, uring_enable, uring_forget, uring_open
from engine.io_uring.served cimport (
    ring_arm, ring_begin, ring_end, ring_leave, ring_serve, ring_stop, ring_wait,
)
from engine.layout cimport Control, EngineCalls, Worker
from libc.errno cimport EINVAL, ENOMEM
from libc.stdint cimport uint32_t
from libc.stdlib cimport free


cdef inline int _open(
    Control* control, const int* entries, uint32_t count, const char** call,
) noexcept nogil:
    """Open a ring for each worker."""
    cdef uint32_t i
    cdef int result
    cdef Uring* ring
    call[0] = "io_uring"
    if count != 1:
        return -EINVAL
    for i in range(control.worker_count):
        ring = <Uring*>aligned_alloc(KECHO_CACHE_LINE, sizeof(Uring))
        if ring == NULL:
            return -ENOMEM
        control.workers[i].of_engine = ring
        result = uring_open(ring, <uint32_t>entries[0], call)
        if result < 0:
            return result
    return 0


cdef inline void _close(Control* control) noexcept nogil:
    cdef uint32_t i
    for i in range(control.worker_count):
        if control.workers[i].of_engine != NULL:
            uring_close(ring_of(&control.workers[i]))
            free(control.workers[i].of_engine)
            control.workers[i].of_engine = NULL


cdef inline void _forget(Control* control) noexcept nogil:
    cdef uint32_t i
    for i in range(control.worker_count):
        uring_forget(ring_of(&control.workers[i]))


cdef inline int _start(Worker* worker) noexcept nogil:
    cdef int result = uring_enable(ring_of(worker))
    if result < 0:
        worker.fatal_syscall = "io_uring_register(IORING_REGISTER_ENABLE_RINGS)"
    return result


cdef inline void io_uring_engine(EngineCalls* engine) noexcept nogil:
    """Fill the table."""
    epoll_engine(engine)
    engine.queue_for_each_worker = True
    engine.open = _open
    engine.close = _close
    engine.forget = _forget
    engine.start = _start
    engine.wait = ring_wait
    engine.stop = ring_stop
    engine.begin = ring_begin
    engine.serve = ring_serve
    engine.arm = ring_arm
    engine.leave = ring_leave
    engine.end = ring_end
