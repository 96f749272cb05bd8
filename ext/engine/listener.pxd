"""Listening sockets in the epoll sets: arming, pausing, resuming.

A listener is edge-triggered, so whoever stops accepting before EAGAIN arms it again. It is paused
when there are no descriptors or no memory for another connection, or when max_connections is
reached; clients then wait in the kernel's accept queue. It is resumed when any connection ends,
and by a timer, since descriptors may be freed by somebody else.
"""
from common.atomics cimport (
    atomic_u32_decrement, atomic_u32_exchange, atomic_u32_increment, atomic_u32_load,
    atomic_u32_swap,
)
from engine.counters cimport count
from engine.layout cimport (
    KECHO_EVERY_QUEUE, LISTENER_DEAD, LISTENER_OPEN, LISTENER_PAUSED, Control, Listener, Queue,
    Worker,
)
from kernel.epoll cimport (
    EPOLL_CTL_ADD, EPOLL_CTL_DEL, EPOLLET, EPOLLEXCLUSIVE, EPOLLIN, epoll_ctl, epoll_event,
)
from libc.errno cimport EEXIST, errno
from libc.stdint cimport uint32_t


cdef enum:
    RESUME_AFTER_MS = 100


# What an event's data holds in its low half: a connection's index, or one of these.
cdef enum:
    TOKEN_WAKE = 0xFFFFFFFFu
    TOKEN_LISTENERS = 0xFFFF0000u  # plus the listener's number


cdef inline int listener_arm(Control* control, Queue* queue, uint32_t number) noexcept nogil:
    """(Re-)registers a listener with a queue, upon which epoll reports it if somebody waits.

    A listener in several epoll sets is EPOLLEXCLUSIVE: one of them is woken, not all. (Unless
    another process has it, too: its sets are in the same line, and the one wake-up might go to a
    process that stops or is killed before it accepts, while the client waits.) Such a
    registration cannot be modified (epoll_ctl(2)), so it is made anew. EEXIST: another worker was
    faster, and what it registered has reported whoever waits. Returns 0 or -errno.
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


cdef inline void listener_pause(Worker* worker, Listener* listener) noexcept nogil:
    if atomic_u32_swap(&listener.state, LISTENER_OPEN, LISTENER_PAUSED):
        atomic_u32_increment(&worker.control.paused)
        count(&worker.counters.accept_pauses)
    worker.resume_at_ms = worker.now_ms + RESUME_AFTER_MS


cdef inline void listener_give_up(Worker* worker, Listener* listener) noexcept nogil:
    """accept says that it no longer listens (destroyed from outside): leave it alone."""
    if atomic_u32_exchange(&listener.state, LISTENER_DEAD) == LISTENER_PAUSED:
        atomic_u32_decrement(&worker.control.paused)


cdef inline void listeners_resume(Worker* worker) noexcept nogil:
    """Opens what is paused.

    A worker that has seen the stop keeps its hands off the listeners: the last one of all to
    see it closes them.
    """
    cdef Control* control = worker.control
    cdef uint32_t number, queue
    cdef Listener* listener
    if worker.is_draining or atomic_u32_load(&control.paused) == 0:
        return
    for number in range(control.listener_count):
        listener = &control.listeners[number]
        if not atomic_u32_swap(&listener.state, LISTENER_PAUSED, LISTENER_OPEN):
            continue
        atomic_u32_decrement(&control.paused)
        for queue in range(control.queue_count):
            if listener.queue == KECHO_EVERY_QUEUE or <uint32_t>listener.queue == queue:
                if listener_arm(control, &control.queues[queue], number) < 0:
                    listener_pause(worker, listener)
