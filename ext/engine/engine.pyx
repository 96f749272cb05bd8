"""kecho.server._engine: the workers, as seen from Python.

This is the only file that knows the GIL. A Python thread enters Engine.run_worker(), releases the
GIL once, and comes back when the engine stops.
"""
from common.atomics cimport atomic_u32_load_relaxed, atomic_u32_store, atomic_u64_load_relaxed
from common.errors cimport system_error
from common.life cimport PHASE_STOPPING, life_drain
from common.memory cimport cache_lines
from common.rules cimport rules_take
from common.siphash cimport hash_key_draw
from engine.accepting.listener cimport Figures, listener_figures
from engine.accepting.peers cimport peers_destroy, peers_init
from engine.dispatch cimport (
    STEER_BY_CPU_MOST, close_listeners, dispatch_apart, dispatch_percpu, dispatch_shared,
    queue_close, queue_forget, queue_open, steer_by_cpu,
)
from engine.epoll.busy_poll cimport busy_poll_init
from engine.epoll.engine cimport epoll_engine
from engine.layout cimport (
    CLOSE_ABORTED, CLOSE_DRAINED, CLOSE_EOF, CLOSE_ERROR, CLOSE_EVICTED, CLOSE_IDLE, CLOSE_RESET,
    CLOSE_STALLED, CLOSE_TIMED_OUT, ERROR_ACCEPT, ERROR_DESCRIPTORS, ERROR_EPOLL, ERROR_LISTENER,
    ERROR_MEMORY, ERROR_RECV, ERROR_SEND, KECHO_BUFFER_BYTES, KECHO_LISTENERS_MOST, REFUSED_DENIED,
    REFUSED_PER_ADDRESS, REFUSED_RATE, Access, Control, Counters, EngineCalls, Listener, Queue,
    Worker,
)
from engine.worker cimport wake_all, worker_run
from kernel.pthread cimport (
    pthread_mutex_destroy, pthread_mutex_init, pthread_mutex_lock, pthread_mutex_unlock,
)
from libc.stdint cimport UINT32_MAX, uint32_t, uint64_t
from libc.stdlib cimport free


# ---- engines: one line registers each -----------------------------------------------------------

cdef enum:
    GIVEN_MOST = 8
    ENGINES_MOST = 8

ctypedef void (*Fill)(EngineCalls* engine) noexcept nogil

ENGINES = []  # names
cdef Fill _fill[ENGINES_MOST]


cdef _register(str name, Fill fill):
    _fill[len(ENGINES)] = fill
    ENGINES.append(name)


_register("epoll", epoll_engine)
include "engine/io_uring/face.pxi"
include "engine/sockmap/face.pxi"


# ---- names of what is counted -------------------------------------------------------------------

CLOSE_REASONS = {
    "eof": CLOSE_EOF,
    "reset": CLOSE_RESET,
    "timed_out": CLOSE_TIMED_OUT,
    "idle": CLOSE_IDLE,
    "stalled": CLOSE_STALLED,
    "evicted": CLOSE_EVICTED,
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

REFUSALS = {
    "denied": REFUSED_DENIED,
    "per_address": REFUSED_PER_ADDRESS,
    "rate": REFUSED_RATE,
}


cdef class Engine:
    """The workers of one run of a server, with their queues and connections.

    listeners: (fd, queue, is_unix, is_inherited) each; they listen and are non-blocking. queue is
    the index of the worker that accepts from it under percpu, or -1 for every worker; shared
    ignores it. is_inherited: another process may have the socket as well. The engine takes the
    descriptors over when this returns, and closes them in the end.

    0 means no limit. buffer_bytes: for all backpressured connections; each queue has an equal
    share. rules: (prefix as an integer of 128 bits, its length, whether it is allowed), sorted by
    falling length, then by prefix. is_allowed_otherwise: for clients that match no rule.
    per_address, rate_per_s: connections of one client address, at once and per second.
    busy_poll_ns: how long a worker polls after its last event before it sleeps; 2**64 - 1: without
    limit. busy_poll_by_gaps: only while events come that close together on average.
    engine: one of ENGINES. given: what that engine needs. sockmap: what _bpf.open_echo() returned;
    it is taken over like the listeners. io_uring: the size of each worker's ring, a power of two.
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
        uint32_t write_timeout_ms,
        uint32_t finish_timeout_ms,
        uint64_t buffer_bytes,
        list rules not None,
        bint is_allowed_otherwise,
        uint32_t per_address,
        uint32_t rate_per_s,
        uint64_t busy_poll_ns,
        bint busy_poll_by_gaps,
        str engine not None = "epoll",
        tuple given not None = (),
    ):
        cdef Control* control = &self._control
        cdef const char* call = NULL
        cdef uint32_t queue_count = 1, i
        cdef int ints[GIVEN_MOST]
        cdef int result
        if len(listeners) > KECHO_LISTENERS_MOST:
            raise ValueError(f"listeners: {KECHO_LISTENERS_MOST} at most, not {len(listeners)}")
        if engine not in ENGINES or len(given) > GIVEN_MOST:
            raise ValueError(f"engine: one of {', '.join(ENGINES)}, not {engine!r}")
        for i, value in enumerate(given):
            ints[i] = value
        _fill[ENGINES.index(engine)](&control.engine)
        if percpu or control.engine.queue_for_each_worker:
            queue_count = worker_count
        control.max_connections = max_connections or UINT32_MAX
        control.idle_timeout_ms = idle_timeout_ms
        control.write_timeout_ms = write_timeout_ms
        control.finish_timeout_ms = finish_timeout_ms
        # At least one buffer: a single backpressured connection is not evicted.
        control.queue_buffer_bytes = max(
            buffer_bytes // queue_count, <uint64_t>KECHO_BUFFER_BYTES)
        result = hash_key_draw(&control.access.hash_key)
        if result < 0:
            raise system_error(-result, "getrandom")
        result = peers_init(&control.access)
        if result == 0:
            result = -pthread_mutex_init(&control.listeners_lock, NULL)
        if result < 0:
            raise system_error(-result, "pthread_mutex_init")
        self._set_access(rules, is_allowed_otherwise, per_address, rate_per_s)
        control.workers_accepting = worker_count
        control.listeners = <Listener*>cache_lines(len(listeners) * sizeof(Listener))
        for fd, queue, is_unix, is_inherited in listeners:
            control.listeners[control.listener_count].fd = fd
            control.listeners[control.listener_count].queue = queue
            control.listeners[control.listener_count].is_unix = is_unix
            control.listeners[control.listener_count].is_inherited = is_inherited
            control.listener_count += 1
        control.workers = <Worker*>cache_lines(worker_count * sizeof(Worker))
        for i in range(worker_count):
            control.workers[i].control = control
            control.workers[i].index = i
            control.worker_count += 1
            control.workers[i].buffer = <unsigned char*>cache_lines(KECHO_BUFFER_BYTES)
        control.queues = <Queue*>cache_lines(queue_count * sizeof(Queue))
        for i in range(queue_count):
            control.queue_count += 1
            result = queue_open(&control.queues[i], &call)
            if result < 0:
                raise system_error(-result, call.decode())
        busy_poll_init(control, busy_poll_ns, busy_poll_by_gaps)
        if percpu:
            result = dispatch_percpu(control)
        elif control.engine.queue_for_each_worker:
            result = dispatch_apart(control)
        else:
            result = dispatch_shared(control)
        if result < 0:
            raise system_error(-result, "epoll_ctl")
        # The last thing that can fail: before it, the descriptors are the caller's.
        result = control.engine.open(control, ints, <uint32_t>len(given), &call)
        if result < 0:
            raise system_error(-result, call.decode())
        self._owns_listeners = True

    cdef int _set_access(
        self, list rules, bint is_allowed_otherwise, uint32_t per_address, uint32_t rate_per_s,
    ) except -1:
        cdef Access* access = &self._control.access
        access.per_address = per_address
        access.rate_per_s = rate_per_s
        rules_take(&access.rules, rules, is_allowed_otherwise)
        return 0

    def __dealloc__(self):
        cdef Control* control = &self._control
        cdef uint32_t i
        if self._owns_listeners:
            close_listeners(control)
        for i in range(control.queue_count):
            queue_close(&control.queues[i])
        for i in range(control.worker_count):
            free(control.workers[i].buffer)
        if control.engine.close != NULL:  # or its arguments were refused
            control.engine.close(control)
        free(control.queues)
        free(control.workers)
        free(control.listeners)
        free(control.access.rules.all)
        peers_destroy(&control.access)
        pthread_mutex_destroy(&control.listeners_lock)

    def run_worker(self, uint32_t index):
        """Run one worker, until the engine has been stopped.

        Each index below worker_count is run once, on a thread of its own. Raise OSError with the
        system call's name if the worker had to give up; the others then stop as well.
        """
        if index >= self._control.worker_count:
            raise IndexError(f"worker {index} of {self._control.worker_count}")
        cdef Worker* worker = &self._control.workers[index]
        with nogil:
            worker_run(worker)
        if worker.fatal_errno != 0:
            raise system_error(worker.fatal_errno, worker.fatal_syscall.decode())

    def stop(self, uint64_t graceful_timeout_ms):
        """Start the drain, or bring its deadline forward. Return at once. Any thread may call it.
        """
        cdef Control* control = &self._control
        life_drain(&control.phase, &control.deadline_ms, graceful_timeout_ms)
        wake_all(control)

    def abort(self):
        """Stop at once: reset every connection. Return at once. Any thread may call it."""
        atomic_u32_store(&self._control.phase, PHASE_STOPPING)
        wake_all(&self._control)

    def forget(self):
        """Close the child's copies of every descriptor after fork(2), without a word to clients.

        Otherwise clients would never see the end of a connection that the parent closes, and the
        port would stay taken. The engine cannot be run any more.
        """
        cdef uint32_t i
        if self._owns_listeners:
            close_listeners(&self._control)
        for i in range(self._control.queue_count):
            queue_forget(&self._control.queues[i])
        self._control.engine.forget(&self._control)

    def listener_figures(self):
        """Return for each listener: SYNs that it dropped, connections in its accept queue, how many
        fit, and whether it is dead for another reason than a stop. Any thread may call it."""
        cdef Control* control = &self._control
        cdef Figures figures
        cdef uint32_t i
        found = []
        pthread_mutex_lock(&control.listeners_lock)  # for a few system calls
        for i in range(control.listener_count):
            listener_figures(control, &control.listeners[i], &figures)
            found.append((
                figures.dropped, figures.length, figures.length_most, figures.is_dead,
            ))
        pthread_mutex_unlock(&control.listeners_lock)
        return found

    def unaccepted(self):
        """Return, once every worker has ended: how many clients were left in accept queues and
        reset; the errno of the accept4 that left them there (0: there was no time to try); and how
        many were left to the other holders of inherited listeners."""
        cdef Control* control = &self._control
        return control.unaccepted, control.unaccepted_errno, control.left_to_others

    def counters(self):
        """Return what each worker has counted so far: a list of dict. Any thread may call it."""
        cdef Control* control = &self._control
        return [_counters_dict(control, i) for i in range(control.worker_count)]


cdef dict _counters_dict(Control* control, uint32_t index):
    cdef Worker* worker = &control.workers[index]
    cdef Counters* counters = &worker.counters
    cdef uint64_t bytes_echoed = 0, chunks_echoed = 0
    control.engine.add_echoed(control, index, &bytes_echoed, &chunks_echoed)
    return {
        "accepted": atomic_u64_load_relaxed(&counters.accepted),
        "active": atomic_u32_load_relaxed(&worker.active),
        "bytes_received": atomic_u64_load_relaxed(&counters.bytes_received) + bytes_echoed,
        "bytes_sent": atomic_u64_load_relaxed(&counters.bytes_sent) + bytes_echoed,
        "echoes": atomic_u64_load_relaxed(&counters.echoes) + chunks_echoed,
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
        "refused": {
            name: atomic_u64_load_relaxed(&counters.refused[<int>reason])
            for name, reason in REFUSALS.items()
        },
    }


def attach_cpu_steering(int fd, list cpus not None):
    """Have the SO_REUSEPORT group of `fd` give a SYN to the socket of the CPU that handles it.

    cpus[i] is the CPU of the i-th socket bound to the group. socket(7), Linux 4.5. Raise OSError.
    """
    cdef uint32_t numbers[STEER_BY_CPU_MOST]
    cdef int result
    if not 0 < len(cpus) <= STEER_BY_CPU_MOST:
        raise ValueError(f"cpus: 1 to {STEER_BY_CPU_MOST} of them, not {len(cpus)}")
    for i, cpu in enumerate(cpus):
        numbers[<int>i] = cpu
    result = steer_by_cpu(fd, numbers, <uint32_t>len(cpus))
    if result < 0:
        raise system_error(-result, "setsockopt(SO_ATTACH_REUSEPORT_CBPF)")
