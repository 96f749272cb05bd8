"""Listening sockets in the epoll sets: arming, pausing, resuming.

A listener is edge-triggered, so whoever stops accepting before EAGAIN arms it again. It is paused
when there are no descriptors or no memory for another connection, or when max_connections is
reached; clients then wait in the kernel's accept queue. It is resumed when any connection ends,
and by a timer, since descriptors may be freed by somebody else. One that was destroyed from
outside is dead for good: the thread that watches ends the server for it.
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
    """(Re-)registers a listener with a queue, upon which epoll reports it if somebody waits.

    A listener in several epoll sets is EPOLLEXCLUSIVE: one of them is woken, not all, where workers
    wait in epoll_wait and not at a ring. (Unless another process has it, too: its sets are in the
    same line, and the one wake-up might go to a process that stops or is killed before it accepts,
    while the client waits.) Such a registration cannot be modified (epoll_ctl(2)), so it is made
    anew. EEXIST: another worker was faster, and what it registered has reported whoever waits.
    Returns 0 or -errno.
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
    """Takes a listener out of every epoll set. Closing it does that only if no other process has
    the socket: epoll(7), a registration lives as long as the open file description."""
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
    """A Unix socket that was shut down has SO_ACCEPTCONN all the same, and accept4 gives EAGAIN."""
    cdef int answer = 0
    cdef socklen_t size = sizeof(answer)
    if getsockopt(listener.fd, SOL_SOCKET, SO_ACCEPTCONN, &answer, &size) < 0 or answer == 0:
        return False
    return not listener.is_unix or _polled(listener, POLLRDHUP) & POLLRDHUP == 0


cdef inline bint listener_mark_if_dead(Worker* worker, Listener* listener) noexcept nogil:
    """After accept has said that it does not listen: whether that is so, upon which it is left
    alone."""
    if _is_listening(listener):
        return False
    if atomic_u32_swap(&listener.state, LISTENER_OPEN, LISTENER_DEAD):
        count_error(worker, ERROR_LISTENER)
    elif atomic_u32_swap(&listener.state, LISTENER_PAUSED, LISTENER_DEAD):
        atomic_u32_decrement(&worker.control.paused)
        count_error(worker, ERROR_LISTENER)
    return True


cdef inline int listener_arm_everywhere(Control* control, uint32_t number) noexcept nogil:
    """In each queue that accepts from it. Returns 0 or -errno."""
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
    """Opens what is paused.

    A worker that has seen the stop keeps its hands off the listeners: the last one of all to
    see it closes them.
    """
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


# ---- from the thread that watches: under listeners_lock -----------------------------------------

cdef struct Figures:
    uint64_t dropped      # SYNs
    uint32_t length       # connections that wait to be accepted
    uint32_t length_most  # how many may
    bint is_dead          # it listens no more, and not because of a stop


cdef inline void _count_drops(Listener* listener) noexcept nogil:
    """SYNs that found the accept queue full; one that is sent again counts again: SO_MEMINFO,
    socket(7). Other drops of a listener (a failed checksum, say) are among them. The kernel's 32
    bits are full after hours of a flood, so they are added up, which has to be more often."""
    cdef uint32_t info[SK_MEMINFO_VARS]
    cdef socklen_t size = sizeof(info)
    if getsockopt(listener.fd, SOL_SOCKET, SO_MEMINFO, info, &size) < 0 or size < sizeof(info):
        return
    listener.dropped += <uint32_t>(info[SK_MEMINFO_DROPS] - listener.drops_seen)
    listener.drops_seen = info[SK_MEMINFO_DROPS]


cdef inline void listener_figures(
    Control* control, Listener* listener, Figures* figures,
) noexcept nogil:
    """Of a listener that is closed, what was so in the end."""
    cdef tcp_info info
    cdef socklen_t size = sizeof(info)
    if listener.fd >= 0 and not listener.is_unix:
        _count_drops(listener)
    figures.dropped = listener.dropped
    figures.length = figures.length_most = 0
    # One that is paused is not accepted from, and nobody has been told.
    figures.is_dead = atomic_u32_load(&control.phase) == PHASE_RUNNING and (
        listener_is_dead(listener) or not _is_listening(listener))
    if listener.fd < 0 or listener.is_unix:
        return
    # For a listener these two stand for the accept queue: tcp_get_info() in net/ipv4/tcp.c.
    if getsockopt(listener.fd, IPPROTO_TCP, TCP_INFO, &info, &size) == 0:
        figures.length = info.tcpi_unacked
        figures.length_most = info.tcpi_sacked


cdef inline uint32_t listener_queued(Listener* listener) noexcept nogil:
    """Clients that wait to be accepted. Of a Unix socket's queue, whose length is told nobody, one
    is counted: poll(2)."""
    cdef tcp_info info
    cdef socklen_t size = sizeof(info)
    if listener.fd < 0 or not _is_listening(listener):
        return 0
    if not listener.is_unix and getsockopt(
            listener.fd, IPPROTO_TCP, TCP_INFO, &info, &size) == 0:
        return info.tcpi_unacked
    return _polled(listener, POLLIN) & POLLIN != 0


cdef inline void listener_close(Listener* listener) noexcept nogil:
    """Keeps what it has dropped."""
    if listener.fd < 0:
        return
    if not listener.is_unix:
        _count_drops(listener)
    close(listener.fd)
    listener.fd = -1
