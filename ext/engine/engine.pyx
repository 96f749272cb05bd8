"""kecho._engine: the workers, as seen from Python.

This is the only file that knows the GIL. A Python thread enters Engine.run_worker(), lets go of
the GIL once, and comes back when the engine stops.
"""
from common.atomics cimport (
    atomic_u32_load, atomic_u32_load_relaxed, atomic_u32_store, atomic_u64_load_relaxed,
    atomic_u64_store_relaxed,
)
from engine.backend_epoll cimport wake_everybody, worker_run
from engine.dispatch cimport (
    STEER_BY_CPU_MOST, close_listeners, dispatch_percpu, dispatch_shared, queue_close,
    queue_forget, queue_open, steer_by_cpu,
)
from engine.layout cimport (
    CLOSE_ABORTED, CLOSE_DRAINED, CLOSE_EOF, CLOSE_ERROR, CLOSE_IDLE, CLOSE_RESET,
    CLOSE_TIMED_OUT, ERROR_ACCEPT, ERROR_DESCRIPTORS, ERROR_EPOLL, ERROR_LISTENER, ERROR_MEMORY,
    ERROR_RECV, ERROR_SEND, KECHO_BUFFER_BYTES, KECHO_CACHE_LINE, KECHO_LISTENERS_MOST, Control,
    Counters, Listener, PHASE_DRAINING, PHASE_RUNNING, PHASE_STOPPING, Queue, Worker,
)
from engine.slab cimport aligned_alloc
from kernel.clock cimport clock_now_ms
from libc.stdint cimport UINT32_MAX, uint32_t, uint64_t
from libc.stdlib cimport free
from libc.string cimport memset

import os

CLOSE_REASONS = {
    "eof": CLOSE_EOF,
    "reset": CLOSE_RESET,
    "timed_out": CLOSE_TIMED_OUT,
    "idle": CLOSE_IDLE,
    "drained": CLOSE_DRAINED,
    "aborted": CLOSE_ABORTED,
    "error": CLOSE_ERROR,
}

ERROR_KINDS = {
    "accept": ERROR_ACCEPT,
    "descriptors": ERROR_DESCRIPTORS,
    "memory": ERROR_MEMORY,
    "listener": ERROR_LISTENER,
    "recv": ERROR_RECV,
    "send": ERROR_SEND,
    "epoll": ERROR_EPOLL,
}


cdef void* _zeroed(size_t size) except NULL:
    """Cache-line aligned and zeroed; free() gives it back."""
    size = (size + KECHO_CACHE_LINE - 1) // KECHO_CACHE_LINE * KECHO_CACHE_LINE
    cdef void* memory = aligned_alloc(KECHO_CACHE_LINE, max(size, <size_t>KECHO_CACHE_LINE))
    if memory == NULL:
        raise MemoryError
    memset(memory, 0, size)
    return memory


cdef object _system_error(int error, str syscall):
    return OSError(error, f"{syscall}: {os.strerror(error)}")


cdef class Engine:
    """The workers of one run of a server, their queues and connections.

    listeners: (fd, queue, is_unix, is_inherited) each; listening, non-blocking. queue is the index
    of the worker that accepts from it under percpu, or -1 for every worker's; ignored under
    shared. is_inherited: another process may have the socket, too.
    The engine takes the descriptors over when this returns, and closes them in the end.
    """

    cdef Control _control
    cdef bint _owns_listeners

    def __cinit__(
        self,
        list listeners not None,
        *,
        bint percpu,
        uint32_t worker_count,
        uint32_t max_connections,
        uint32_t idle_timeout_ms,
    ):
        cdef Control* control = &self._control
        cdef uint32_t i
        cdef int result
        if len(listeners) > KECHO_LISTENERS_MOST:
            raise ValueError(f"listeners: {KECHO_LISTENERS_MOST} at most, not {len(listeners)}")
        control.max_connections = max_connections or UINT32_MAX
        control.idle_timeout_ms = idle_timeout_ms
        control.workers_accepting = worker_count
        control.listeners = <Listener*>_zeroed(len(listeners) * sizeof(Listener))
        for fd, queue, is_unix, is_inherited in listeners:
            control.listeners[control.listener_count].fd = fd
            control.listeners[control.listener_count].queue = queue
            control.listeners[control.listener_count].is_unix = is_unix
            control.listeners[control.listener_count].is_inherited = is_inherited
            control.listener_count += 1
        control.workers = <Worker*>_zeroed(worker_count * sizeof(Worker))
        for i in range(worker_count):
            control.workers[i].control = control
            control.workers[i].index = i
            control.worker_count += 1
            control.workers[i].buffer = <unsigned char*>_zeroed(KECHO_BUFFER_BYTES)
        control.queues = <Queue*>_zeroed((worker_count if percpu else 1) * sizeof(Queue))
        for i in range(worker_count if percpu else 1):
            control.queue_count += 1
            result = queue_open(&control.queues[i])
            if result < 0:
                raise _system_error(-result, "epoll_create1")
        result = dispatch_percpu(control) if percpu else dispatch_shared(control)
        if result < 0:
            raise _system_error(-result, "epoll_ctl")
        self._owns_listeners = True

    def __dealloc__(self):
        cdef Control* control = &self._control
        cdef uint32_t i
        if self._owns_listeners:
            close_listeners(control)
        for i in range(control.queue_count):
            queue_close(&control.queues[i])
        for i in range(control.worker_count):
            free(control.workers[i].buffer)
        free(control.queues)
        free(control.workers)
        free(control.listeners)

    def run_worker(self, uint32_t index):
        """The life of one worker: returns when the engine has been stopped.

        Each index below worker_count is run once, on a thread of its own. Raises OSError with
        the system call's name when the worker had to give up; the others then stop, too.
        """
        if index >= self._control.worker_count:
            raise IndexError(f"worker {index} of {self._control.worker_count}")
        cdef Worker* worker = &self._control.workers[index]
        with nogil:
            worker_run(worker)
        if worker.fatal_errno != 0:
            raise _system_error(worker.fatal_errno, worker.fatal_syscall.decode())

    def stop(self, uint64_t graceful_timeout_ms):
        """Starts the drain, or brings its deadline forward. Returns at once; any thread."""
        cdef Control* control = &self._control
        cdef uint64_t deadline_ms = clock_now_ms() + graceful_timeout_ms
        if atomic_u32_load(&control.phase) == PHASE_RUNNING:
            atomic_u64_store_relaxed(&control.deadline_ms, deadline_ms)
            atomic_u32_store(&control.phase, PHASE_DRAINING)
        elif deadline_ms < atomic_u64_load_relaxed(&control.deadline_ms):
            atomic_u64_store_relaxed(&control.deadline_ms, deadline_ms)
        wake_everybody(control)

    def abort(self):
        """Stops at once: every connection is reset. Returns at once; any thread."""
        atomic_u32_store(&self._control.phase, PHASE_STOPPING)
        wake_everybody(&self._control)

    def forget(self):
        """In the child after fork(2): closes its copies of every descriptor, quietly.

        Otherwise clients would never see the end of a connection that the parent closes, and
        the port would stay taken. The engine cannot be run any more.
        """
        cdef uint32_t i
        if self._owns_listeners:
            close_listeners(&self._control)
        for i in range(self._control.queue_count):
            queue_forget(&self._control.queues[i])

    def counters(self):
        """What each worker has counted so far: a list of dict, at any time, from any thread."""
        return [
            _counters_dict(&self._control.workers[i])
            for i in range(self._control.worker_count)
        ]


cdef dict _counters_dict(Worker* worker):
    cdef Counters* counters = &worker.counters
    return {
        "accepted": atomic_u64_load_relaxed(&counters.accepted),
        "active": atomic_u32_load_relaxed(&worker.active),
        "bytes_received": atomic_u64_load_relaxed(&counters.bytes_received),
        "bytes_sent": atomic_u64_load_relaxed(&counters.bytes_sent),
        "echoes": atomic_u64_load_relaxed(&counters.echoes),
        "backpressure": atomic_u64_load_relaxed(&counters.backpressure),
        "accept_pauses": atomic_u64_load_relaxed(&counters.accept_pauses),
        "closed": {
            name: atomic_u64_load_relaxed(&counters.closed[<int>reason])
            for name, reason in CLOSE_REASONS.items()
        },
        "errors": {
            name: atomic_u64_load_relaxed(&counters.errors[<int>kind])
            for name, kind in ERROR_KINDS.items()
        },
    }


def attach_cpu_steering(int fd, list cpus not None):
    """Has the SO_REUSEPORT group of `fd` give a SYN to the socket of the CPU that handles it.

    cpus[i] is the CPU of the i-th socket bound to the group. socket(7), Linux 4.5.
    Raises OSError.
    """
    cdef uint32_t numbers[STEER_BY_CPU_MOST]
    cdef int result
    if not 0 < len(cpus) <= STEER_BY_CPU_MOST:
        raise ValueError(f"cpus: 1 to {STEER_BY_CPU_MOST} of them, not {len(cpus)}")
    for i, cpu in enumerate(cpus):
        numbers[<int>i] = cpu
    result = steer_by_cpu(fd, numbers, <uint32_t>len(cpus))
    if result < 0:
        raise _system_error(-result, "setsockopt(SO_ATTACH_REUSEPORT_CBPF)")
