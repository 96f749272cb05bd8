"""kecho.server._udp: the UDP workers, as seen from Python.

This is the only file that knows the GIL. A Python thread enters Echo.run_worker(), lets go of the
GIL once, and comes back when the echo stops.
"""
from common.atomics cimport atomic_u32_store, atomic_u64_load_relaxed
from common.errors cimport system_error
from common.life cimport PHASE_STOPPING, life_drain
from common.memory cimport cache_lines
from common.rules cimport rules_take
from common.siphash cimport hash_key_draw
from kernel.eventfd cimport EFD_CLOEXEC, EFD_NONBLOCK, eventfd
from kernel.poll cimport pollfd
from libc.errno cimport errno
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport free
from posix.unistd cimport close
from udp.inbox cimport inbox_init
from udp.layout cimport (
    KECHO_UDP_BATCH, KECHO_UDP_BUFFER_BYTES, KECHO_UDP_SECRET_WORDS, KECHO_UDP_SEEN_SETS,
    KECHO_UDP_SETS, REFUSED_ADDRESS, REFUSED_DENIED, REFUSED_OWN_PORT, REFUSED_PORT,
    REFUSED_RATE, REFUSED_REPEATED, REFUSED_TOTAL, UDP_ERROR_DENIED, UDP_ERROR_FULL,
    UDP_ERROR_MEMORY, UDP_ERROR_RECV, UDP_ERROR_SEND, UDP_ERROR_TRUNCATED,
    UDP_ERROR_UNREACHABLE, BucketSet, Control, Counters, Inbox, Outbox, SeenSet, Socket, Worker,
)
from udp.limiter cimport limiter_destroy, limiter_init
from udp.repeats cimport repeats_destroy, repeats_init
from udp.worker cimport socket_close, socket_drops, wake_everybody, worker_run

import os

REFUSALS = {
    "port": REFUSED_PORT,
    "own_port": REFUSED_OWN_PORT,
    "address": REFUSED_ADDRESS,
    "denied": REFUSED_DENIED,
    "rate": REFUSED_RATE,
    "rate_total": REFUSED_TOTAL,
    "repeated": REFUSED_REPEATED,
}

ERROR_KINDS = {
    "truncated": UDP_ERROR_TRUNCATED,
    "full": UDP_ERROR_FULL,
    "memory": UDP_ERROR_MEMORY,
    "unreachable": UDP_ERROR_UNREACHABLE,
    "denied": UDP_ERROR_DENIED,
    "send": UDP_ERROR_SEND,
    "recv": UDP_ERROR_RECV,
}


cdef class Echo:
    """The UDP workers of one run of a server, and their sockets.

    sockets: (fd, worker) each; bound, with IP_PKTINFO or IPV6_RECVPKTINFO. They are taken over
    when this returns, and closed when their worker ends. rules: as the engine's.
    """

    cdef Control _control
    cdef bint _owns_sockets
    cdef bint _has_limiter
    cdef bint _has_repeats

    def __cinit__(
        self,
        list sockets not None,
        *,
        uint32_t worker_count,
        uint16_t own_port,
        uint16_t source_port_least,
        uint32_t rate_per_source,
        uint32_t rate_total,
        uint32_t rate_repeated,
        list rules not None,
        bint is_allowed_otherwise,
    ):
        cdef Control* control = &self._control
        cdef uint32_t i
        cdef int result
        for _, worker in sockets:
            if not 0 <= worker < worker_count:
                raise ValueError(f"sockets: there is no worker {worker}")
        control.own_port = own_port
        control.source_port_least = source_port_least
        rules_take(&control.rules, rules, is_allowed_otherwise)
        control.limiter.sets = <BucketSet*>cache_lines(KECHO_UDP_SETS * sizeof(BucketSet))
        result = hash_key_draw(&control.limiter.hash_key)
        if result < 0:
            raise system_error(-result, "getrandom")
        result = limiter_init(&control.limiter, rate_per_source, rate_total)
        if result < 0:
            raise system_error(-result, "pthread_mutex_init")
        self._has_limiter = True
        for i in range(<uint32_t>KECHO_UDP_SECRET_WORDS):
            control.secret.words[i] = _random_word()
        if rate_repeated != 0:
            control.repeats.seen = <SeenSet*>cache_lines(KECHO_UDP_SEEN_SETS * sizeof(SeenSet))
            control.repeats.sources = <BucketSet*>cache_lines(KECHO_UDP_SETS * sizeof(BucketSet))
        result = repeats_init(&control.repeats, rate_repeated, _random_word() | 1)
        if result < 0:
            raise system_error(-result, "pthread_mutex_init")
        self._has_repeats = True
        control.sockets = <Socket*>cache_lines(len(sockets) * sizeof(Socket))
        for fd, worker in sorted(sockets, key=lambda pair: pair[1]):
            control.sockets[control.socket_count].fd = fd
            control.sockets[control.socket_count].worker = worker
            control.socket_count += 1
        control.workers = <Worker*>cache_lines(worker_count * sizeof(Worker))
        for i in range(worker_count):
            control.workers[i].wake_fd = -1
        control.worker_count = worker_count
        for i in range(worker_count):
            self._set_up_worker(i)
        self._owns_sockets = True

    cdef int _set_up_worker(self, uint32_t index) except -1:
        cdef Worker* worker = &self._control.workers[index]
        cdef uint8_t* buffer
        cdef uint32_t i
        worker.control = &self._control
        for i in range(self._control.socket_count):
            if self._control.sockets[i].worker == index:
                if worker.socket_count == 0:
                    worker.sockets = &self._control.sockets[i]
                worker.socket_count += 1
        worker.polls = <pollfd*>cache_lines((worker.socket_count + 1) * sizeof(pollfd))
        worker.outbox = <Outbox*>cache_lines(sizeof(Outbox))
        worker.inbox = <Inbox*>cache_lines(sizeof(Inbox))
        # Not zeroed: what no datagram was long enough to touch takes no memory.
        buffer = <uint8_t*>cache_lines(<size_t>KECHO_UDP_BATCH * KECHO_UDP_BUFFER_BYTES, False)
        inbox_init(worker.inbox, buffer)
        worker.wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)
        if worker.wake_fd < 0:
            raise system_error(errno, "eventfd")
        return 0

    def __dealloc__(self):
        cdef Control* control = &self._control
        cdef uint32_t i
        self._close()
        if control.workers != NULL:
            for i in range(control.worker_count):
                if control.workers[i].inbox != NULL:
                    free(control.workers[i].inbox.buffer)
                free(control.workers[i].inbox)
                free(control.workers[i].outbox)
                free(control.workers[i].polls)
        free(control.workers)
        free(control.sockets)
        free(control.limiter.sets)
        free(control.repeats.seen)
        free(control.repeats.sources)
        free(control.rules.all)
        if self._has_limiter:
            limiter_destroy(&control.limiter)
        if self._has_repeats:
            repeats_destroy(&control.repeats)

    cdef void _close(self):
        cdef Control* control = &self._control
        cdef uint32_t i
        if self._owns_sockets:
            for i in range(control.socket_count):
                socket_close(&control.sockets[i])
        for i in range(control.worker_count):
            if control.workers[i].wake_fd >= 0:
                close(control.workers[i].wake_fd)
                control.workers[i].wake_fd = -1

    def run_worker(self, uint32_t index):
        """The life of one worker: returns when the echo has been stopped.

        Each index below worker_count is run once, on a thread of its own. Raises OSError with
        the system call's name when the worker had to give up; the others then stop, too.
        """
        if index >= self._control.worker_count:
            raise IndexError(f"worker {index} of {self._control.worker_count}")
        cdef Worker* worker = &self._control.workers[index]
        with nogil:
            worker_run(worker)
        if worker.fatal_errno != 0:
            raise system_error(worker.fatal_errno, "poll")

    def stop(self, uint64_t graceful_timeout_ms):
        """Starts the drain, or brings its deadline forward. Returns at once; any thread."""
        cdef Control* control = &self._control
        life_drain(&control.phase, &control.deadline_ms, graceful_timeout_ms)
        wake_everybody(control)

    def abort(self):
        """Stops at once: what has been received and not answered is lost. Any thread."""
        atomic_u32_store(&self._control.phase, PHASE_STOPPING)
        wake_everybody(&self._control)

    def forget(self):
        """In the child after fork(2): closes its copies of every descriptor."""
        self._close()

    def counters(self):
        """What each worker has counted so far: a list of dict, at any time, from any thread."""
        return [
            _counters_dict(&self._control.workers[i])
            for i in range(self._control.worker_count)
        ]


cdef uint64_t _random_word() except? 0:
    return int.from_bytes(os.urandom(8), "little")


cdef dict _counters_dict(Worker* worker):
    cdef Counters* counters = &worker.counters
    cdef uint64_t dropped = 0
    cdef uint32_t i
    for i in range(worker.socket_count):
        dropped += socket_drops(&worker.sockets[i])
    return {
        "received": atomic_u64_load_relaxed(&counters.received),
        "sent": atomic_u64_load_relaxed(&counters.sent),
        "bytes_received": atomic_u64_load_relaxed(&counters.bytes_received),
        "bytes_sent": atomic_u64_load_relaxed(&counters.bytes_sent),
        "dropped": dropped,
        "refused": {
            name: atomic_u64_load_relaxed(&counters.refused[<int>reason])
            for name, reason in REFUSALS.items()
        },
        "errors": {
            name: atomic_u64_load_relaxed(&counters.errors[<int>kind])
            for name, kind in ERROR_KINDS.items()
        },
    }
