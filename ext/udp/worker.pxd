"""One worker's loop: wait, answer batch by batch, and the drain."""
from common.atomics cimport (
    atomic_u32_load, atomic_u32_load_relaxed, atomic_u32_store, atomic_u64_add_single_writer,
    atomic_u64_load_relaxed, atomic_u64_store_release,
)
from common.life cimport PHASE_DRAINING, PHASE_RUNNING, PHASE_STOPPING
from kernel.clock cimport clock_now_ms
from kernel.datagram cimport SK_MEMINFO_DROPS, SK_MEMINFO_VARS, SO_MEMINFO, getsockopt
from kernel.eventfd cimport eventfd_write
from kernel.filter cimport BPF_K, BPF_RET, SO_ATTACH_FILTER, sock_filter, sock_fprog
from kernel.poll cimport POLLIN, poll
from kernel.socket cimport MSG_TRUNC, SOL_SOCKET, setsockopt, socklen_t
from libc.errno cimport EAGAIN, EINTR, errno
from libc.stdint cimport int32_t, uint32_t, uint64_t
from posix.unistd cimport close
from udp.buckets cimport now_in_ticks
from udp.guard cimport guard_refusal, guard_source
from udp.inbox cimport inbox_read, inbox_receive
from udp.layout cimport (
    KECHO_UDP_BATCH, REFUSALS, REFUSED_RATE, REFUSED_REPEATED, REFUSED_TOTAL, UDP_ERROR_RECV,
    UDP_ERROR_TRUNCATED, Control, Limiter, Request, Socket, Worker,
)
from udp.limiter cimport limiter_lock, limiter_take, limiter_unlock
from udp.outbox cimport outbox_answer, outbox_flush
from udp.repeats cimport repeats_are_limited, repeats_refuse


cdef enum:
    BATCHES_PER_TURN = 4   # of one socket, before the worker's others get theirs
    RESUME_AFTER_MS = 100  # an error that lasts must not spin


# ---- a batch ------------------------------------------------------------------------------------

cdef inline void _count(uint64_t* counter, uint32_t amount) noexcept nogil:
    atomic_u64_add_single_writer(counter, amount)


cdef inline uint32_t _allowed(Worker* worker, uint32_t number, Request* request) noexcept nogil:
    """How many datagrams of a message may be answered, whatever the rates."""
    cdef int refusal
    _count(&worker.counters.received, request.datagrams)
    _count(&worker.counters.bytes_received, request.bytes)
    if worker.inbox.headers[number].msg_hdr.msg_flags & MSG_TRUNC:
        _count(&worker.counters.errors[<int>UDP_ERROR_TRUNCATED], request.datagrams)
        return 0
    refusal = guard_refusal(worker.control, request)
    if refusal != REFUSALS:
        _count(&worker.counters.refused[refusal], request.datagrams)
        return 0
    return request.datagrams


cdef inline uint32_t _granted(
    Worker* worker, Request* request, uint64_t source, uint64_t now
) noexcept nogil:
    """How many of the request's datagrams are answered, under the limiter's lock."""
    cdef uint32_t granted, over_own_rate
    granted = limiter_take(
        &worker.control.limiter, source, request.datagrams, now, &over_own_rate)
    if granted < request.datagrams:
        _count(&worker.counters.refused[<int>REFUSED_RATE], over_own_rate)
        _count(
            &worker.counters.refused[<int>REFUSED_TOTAL],
            request.datagrams - granted - over_own_rate)
    return granted


cdef inline void _answer(
    Worker* worker, int fd, Request* request, uint32_t granted, uint64_t now
) noexcept nogil:
    """Echoes its first `granted` datagrams, but for those that would keep a loop alive."""
    cdef uint32_t first = 0
    cdef uint32_t number
    for number in range(granted if repeats_are_limited(&worker.control.repeats) else 0):
        if repeats_refuse(worker.control, request, number, now):
            _count(&worker.counters.refused[<int>REFUSED_REPEATED], 1)
            outbox_answer(worker.outbox, fd, &worker.counters, request, first, number - first)
            first = number + 1
    outbox_answer(worker.outbox, fd, &worker.counters, request, first, granted - first)


cdef inline int _batch(Worker* worker, int fd) noexcept nogil:
    """Receives and answers at most KECHO_UDP_BATCH messages. Returns how many, or -errno."""
    cdef Request requests[KECHO_UDP_BATCH]
    cdef uint32_t granted[KECHO_UDP_BATCH]
    cdef uint64_t sources[KECHO_UDP_BATCH]
    cdef Limiter* limiter = &worker.control.limiter
    cdef int received = inbox_receive(worker.inbox, fd)
    cdef int i
    cdef uint64_t now
    if received <= 0:
        return received
    for i in range(received):  # before the lock: thousands of rules take their time
        inbox_read(worker.inbox, i, &requests[i])
        granted[i] = _allowed(worker, i, &requests[i])
        sources[i] = guard_source(worker.control, requests[i].source)
    now = now_in_ticks()
    limiter_lock(limiter)
    for i in range(received):
        if granted[i] > 0:
            granted[i] = _granted(worker, &requests[i], sources[i], now)
    limiter_unlock(limiter)
    for i in range(received):
        _answer(worker, fd, &requests[i], granted[i], now)
    outbox_flush(worker.outbox, fd, &worker.counters)
    return received


cdef inline void _turn(Worker* worker, Socket* one) noexcept nogil:
    """Some batches of one socket; after an error, which may be met again at once, it rests."""
    cdef int _number, received
    for _number in range(BATCHES_PER_TURN):
        received = _batch(worker, one.fd)
        if received == -EINTR:
            continue
        if received < 0 and received != -EAGAIN:
            _count(&worker.counters.errors[<int>UDP_ERROR_RECV], 1)
            one.resume_at_ms = clock_now_ms() + RESUME_AFTER_MS
        if received < KECHO_UDP_BATCH:
            return


# ---- waiting ------------------------------------------------------------------------------------

cdef inline int _wait(Worker* worker) noexcept nogil:
    """Until a socket can be read or the phase has changed. Returns 0 or -errno of poll."""
    cdef uint64_t now_ms = clock_now_ms()
    cdef uint32_t i
    cdef int timeout_ms = -1
    cdef Socket* one
    worker.polls[0].fd = worker.wake_fd
    worker.polls[0].events = POLLIN
    for i in range(worker.socket_count):
        one = &worker.sockets[i]
        if one.resume_at_ms != 0 and now_ms >= one.resume_at_ms:
            one.resume_at_ms = 0
        worker.polls[i + 1].events = POLLIN
        worker.polls[i + 1].fd = one.fd
        if one.resume_at_ms != 0:
            worker.polls[i + 1].fd = -1  # is passed over: poll(2)
            timeout_ms = RESUME_AFTER_MS
    if poll(worker.polls, worker.socket_count + 1, timeout_ms) < 0:
        for i in range(worker.socket_count + 1):
            worker.polls[i].revents = 0
        return 0 if errno == EINTR else -errno
    return 0


cdef inline int _round(Worker* worker) noexcept nogil:
    cdef uint32_t i
    cdef int result = _wait(worker)
    if result < 0:
        return result
    for i in range(worker.socket_count):
        if worker.polls[i + 1].revents != 0:
            _turn(worker, &worker.sockets[i])
    return 0


# ---- stopping -----------------------------------------------------------------------------------

cdef inline void wake_everybody(Control* control) noexcept nogil:
    cdef uint32_t i
    for i in range(control.worker_count):
        eventfd_write(control.workers[i].wake_fd, 1)


cdef inline void _take_no_more(int fd) noexcept nogil:
    """Has the kernel drop what comes from now on, so that the receive queue has an end, whatever
    is sent meanwhile. If it will not, the deadline is the end."""
    cdef sock_filter program[1]
    cdef sock_fprog attached
    program[0].code = BPF_RET | BPF_K
    program[0].jt = 0
    program[0].jf = 0
    program[0].k = 0
    attached.len = 1
    attached.filter = program
    setsockopt(fd, SOL_SOCKET, SO_ATTACH_FILTER, &attached, sizeof(attached))


cdef inline void _drain(Worker* worker) noexcept nogil:
    """Answers what is in the receive queues, until they are empty or the deadline has come."""
    cdef Control* control = worker.control
    cdef uint32_t i
    cdef int received
    cdef bint more = True
    for i in range(worker.socket_count):
        _take_no_more(worker.sockets[i].fd)
    while more and atomic_u32_load(&control.phase) == PHASE_DRAINING:
        more = False
        for i in range(worker.socket_count):
            # Not _turn(): a batch that is not full may have ended at an error, with more behind.
            received = _batch(worker, worker.sockets[i].fd)
            more |= received > 0 or received == -EINTR
        if clock_now_ms() >= atomic_u64_load_relaxed(&control.deadline_ms):
            break


cdef inline uint64_t _kernel_drops(int fd) noexcept nogil:
    """Datagrams that found the receive queue full, or came after the stop: socket(7) SO_MEMINFO,
    Linux 4.12."""
    cdef uint32_t values[SK_MEMINFO_VARS]
    cdef socklen_t size = sizeof(values)
    if getsockopt(fd, SOL_SOCKET, SO_MEMINFO, values, &size) < 0:
        return 0
    return values[<int>SK_MEMINFO_DROPS]


cdef inline uint64_t socket_drops(Socket* one) noexcept nogil:
    """By any thread. The descriptor is closed after `fd` says so: if it still does not, it was
    this socket that was asked."""
    cdef int32_t fd = <int32_t>atomic_u32_load(<uint32_t*>&one.fd)
    cdef uint64_t drops
    if fd >= 0:
        drops = _kernel_drops(fd)
        if <int32_t>atomic_u32_load(<uint32_t*>&one.fd) >= 0:
            return drops
    return atomic_u64_load_relaxed(&one.dropped)


cdef inline void socket_close(Socket* one) noexcept nogil:
    cdef int32_t fd = one.fd
    if fd < 0:
        return
    atomic_u64_store_release(&one.dropped, _kernel_drops(fd))
    atomic_u32_store(<uint32_t*>&one.fd, <uint32_t>-1)
    close(fd)


# ---- the whole ----------------------------------------------------------------------------------

cdef inline void worker_run(Worker* worker) noexcept nogil:
    """A worker's life. Leaves when the phase says so, or when poll fails, which it keeps in
    worker.fatal_errno; its sockets are closed by then."""
    cdef Control* control = worker.control
    cdef uint32_t i
    cdef int result = 0
    while result == 0 and atomic_u32_load(&control.phase) == PHASE_RUNNING:
        result = _round(worker)
    if result < 0:
        worker.fatal_errno = -result
        atomic_u32_store(&control.phase, PHASE_STOPPING)
        wake_everybody(control)
    _drain(worker)
    for i in range(worker.socket_count):
        socket_close(&worker.sockets[i])
