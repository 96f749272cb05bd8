"""Listeners in the epoll sets: arming, pausing, resuming.

A listener is edge-triggered. A worker that stops accepting before EAGAIN arms it again. It is
paused when descriptors or memory run out, or at max_connections. Clients then wait in the accept
queue. It is resumed when a connection ends, and by a timer, because other processes may free
descriptors. A listener that was destroyed from outside is dead for good: the watching thread then
ends the server.
"""
from common.atomics cimport (
    atomic_u32_decrement, atomic_u32_increment, atomic_u32_load, atomic_u32_swap,
)
from common.life cimport PHASE_RUNNING
from engine.counters cimport count, count_error
from engine.epoll.events cimport TOKEN_LISTENERS
from engine.layout cimport (
    ERROR_LISTENER, KECHO_EVERY_QUEUE, LISTENER_DEAD, LISTENER_OPEN, LISTENER_PAUSED, Control,
    Listener, Queue, Worker,
)
from kernel.epoll cimport (
    EPOLL_CTL_ADD, EPOLL_CTL_DEL, EPOLLET, EPOLLEXCLUSIVE, EPOLLIN, epoll_ctl, epoll_event,
)
from kernel.poll cimport POLLIN, POLLRDHUP, poll, pollfd
from kernel.socket cimport (
    SK_MEMINFO_DROPS, SK_MEMINFO_VARS, SO_ACCEPTCONN, SO_MEMINFO, SOL_SOCKET, getsockopt, socklen_t,
)
from kernel.tcp cimport IPPROTO_TCP, TCP_INFO, tcp_info
from libc.errno cimport EEXIST, errno
from libc.stdint cimport uint32_t, uint64_t
from posix.unistd cimport close


cdef enum:
    RESUME_AFTER_MS = 100


cdef inline int listener_arm(Control* control, Queue* queue, uint32_t number) noexcept nogil:
    """Register a listener with a queue (again). epoll reports it if a client waits. Return 0 or
    -errno.

    A listener in several epoll sets is EPOLLEXCLUSIVE, so that one set is woken, not all. This
    works where workers wait in epoll_wait, not in a ring. An inherited listener is not
    EPOLLEXCLUSIVE: the one wake-up might go to another process that stops or is killed before it
    accepts. An EPOLLEXCLUSIVE registration cannot be modified (epoll_ctl(2)), so it is removed and
    made again. EEXIST: another worker was faster, and its registration has reported the clients.
    """
    cdef Listener* listener = &control.listeners[number]
    cdef epoll_event event
    event.events = EPOLLIN | EPOLLET
    if listener.queue == KECHO_EVERY_QUEUE and not listener.is_inherited:
        event.events |= EPOLLEXCLUSIVE
    event.data.u64 = TOKEN_LISTENERS + number
    epoll_ctl(queue.epoll_fd, EPOLL_CTL_DEL, listener.fd, NULL)
    if epoll_ctl(queue.epoll_fd, EPOLL_CTL_ADD, listener.fd, &event) < 0 and errno != EEXIST:
        return -errno
    return 0


cdef inline void listener_disarm(Control* control, uint32_t number) noexcept nogil:
    """Remove a listener from every epoll set. Closing it does that only if no other process has the
    socket: a registration lives as long as the open file description, epoll(7)."""
    cdef uint32_t queue
    for queue in range(control.queue_count):
        epoll_ctl(
            control.queues[queue].epoll_fd, EPOLL_CTL_DEL, control.listeners[number].fd, NULL)


# ---- states -------------------------------------------------------------------------------------

cdef inline bint listener_is_open(Listener* listener) noexcept nogil:
    return atomic_u32_load(&listener.state) == LISTENER_OPEN


cdef inline bint listener_is_dead(Listener* listener) noexcept nogil:
    return atomic_u32_load(&listener.state) == LISTENER_DEAD


cdef inline void listener_pause(Worker* worker, Listener* listener) noexcept nogil:
    if atomic_u32_swap(&listener.state, LISTENER_OPEN, LISTENER_PAUSED):
        atomic_u32_increment(&worker.control.paused)
        count(&worker.counters.accept_pauses)
    worker.resume_at_ms = worker.now_ms + RESUME_AFTER_MS


cdef inline short _polled(Listener* listener, short events) noexcept nogil:
    cdef pollfd looked
    looked.fd = listener.fd
    looked.events = events
    looked.revents = 0
    return looked.revents if poll(&looked, 1, 0) == 1 else 0


cdef inline bint _is_listening(Listener* listener) noexcept nogil:
    """Check whether a socket listens. A Unix socket that was shut down still has SO_ACCEPTCONN, and
    accept4 returns EAGAIN."""
    cdef int answer = 0
    cdef socklen_t size = sizeof(answer)
    if getsockopt(listener.fd, SOL_SOCKET, SO_ACCEPTCONN, &answer, &size) < 0 or answer == 0:
        return False
    return not listener.is_unix or _polled(listener, POLLRDHUP) & POLLRDHUP == 0


cdef inline bint listener_mark_if_dead(Worker* worker, Listener* listener) noexcept nogil:
    """Mark a listener dead if it does not listen any more. Return whether it is dead. It is not
    used again."""
    if _is_listening(listener):
        return False
    if atomic_u32_swap(&listener.state, LISTENER_OPEN, LISTENER_DEAD):
        count_error(worker, ERROR_LISTENER)
    elif atomic_u32_swap(&listener.state, LISTENER_PAUSED, LISTENER_DEAD):
        atomic_u32_decrement(&worker.control.paused)
        count_error(worker, ERROR_LISTENER)
    return True


cdef inline int listener_arm_everywhere(Control* control, uint32_t number) noexcept nogil:
    """Register a listener with each queue that accepts from it. Return 0 or -errno."""
    cdef Listener* listener = &control.listeners[number]
    cdef uint32_t queue
    cdef int result
    for queue in range(control.queue_count):
        if listener.queue == KECHO_EVERY_QUEUE or <uint32_t>listener.queue == queue:
            result = listener_arm(control, &control.queues[queue], number)
            if result < 0:
                return result
    return 0


cdef inline void listeners_resume(Worker* worker) noexcept nogil:
    """Resume paused listeners. A worker that has seen the stop does not use listeners: the last one
    to see it closes them."""
    cdef Control* control = worker.control
    cdef uint32_t number
    cdef Listener* listener
    if worker.is_draining or atomic_u32_load(&control.paused) == 0:
        return
    for number in range(control.listener_count):
        listener = &control.listeners[number]
        if not atomic_u32_swap(&listener.state, LISTENER_PAUSED, LISTENER_OPEN):
            continue
        atomic_u32_decrement(&control.paused)
        if listener_arm_everywhere(control, number) < 0:
            listener_pause(worker, listener)


# ---- for the watching thread: under listeners_lock ----------------------------------------------

cdef struct Figures:
    uint64_t dropped      # SYNs
    uint32_t length       # of the accept queue, connections
    uint32_t length_most  # of the accept queue, at most
    bint is_dead          # it does not listen any more, although the server has not stopped


cdef inline void _count_drops(Listener* listener) noexcept nogil:
    """Add the SYNs that found the accept queue full: SO_MEMINFO, socket(7). A SYN that is sent
    again counts again, and other drops of the listener (a failed checksum, say) also count. The
    kernel's 32 bits overflow after hours of a flood, so this must be called more often."""
    cdef uint32_t info[SK_MEMINFO_VARS]
    cdef socklen_t size = sizeof(info)
    if getsockopt(listener.fd, SOL_SOCKET, SO_MEMINFO, info, &size) < 0 or size < sizeof(info):
        return
    listener.dropped += <uint32_t>(info[SK_MEMINFO_DROPS] - listener.drops_seen)
    listener.drops_seen = info[SK_MEMINFO_DROPS]


cdef inline void listener_figures(
    Control* control, Listener* listener, Figures* figures,
) noexcept nogil:
    """Fill in the figures of a listener; of a closed one, the last figures."""
    cdef tcp_info info
    cdef socklen_t size = sizeof(info)
    if listener.fd >= 0 and not listener.is_unix:
        _count_drops(listener)
    figures.dropped = listener.dropped
    figures.length = figures.length_most = 0
    # No worker accepts from a paused listener, so no worker has noticed that it died.
    figures.is_dead = atomic_u32_load(&control.phase) == PHASE_RUNNING and (
        listener_is_dead(listener) or not _is_listening(listener))
    if listener.fd < 0 or listener.is_unix:
        return
    # Of a listener, these two fields are about the accept queue: tcp_get_info(), net/ipv4/tcp.c.
    if getsockopt(listener.fd, IPPROTO_TCP, TCP_INFO, &info, &size) == 0:
        figures.length = info.tcpi_unacked
        figures.length_most = info.tcpi_sacked


cdef inline uint32_t listener_queued(Listener* listener) noexcept nogil:
    """Return how many clients wait to be accepted. A Unix socket's queue length is not exposed by
    the kernel; a queue that is not empty counts as one client: poll(2)."""
    cdef tcp_info info
    cdef socklen_t size = sizeof(info)
    if listener.fd < 0 or not _is_listening(listener):
        return 0
    if not listener.is_unix and getsockopt(
            listener.fd, IPPROTO_TCP, TCP_INFO, &info, &size) == 0:
        return info.tcpi_unacked
    return _polled(listener, POLLIN) & POLLIN != 0


cdef inline void listener_close(Listener* listener) noexcept nogil:
    """Close a listener. Its count of drops stays."""
    if listener.fd < 0:
        return
    if not listener.is_unix:
        _count_drops(listener)
    close(listener.fd)
    listener.fd = -1
