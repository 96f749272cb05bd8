"""Busy polling: after its last event a worker polls for a while before it sleeps.

Waking a thread whose CPU is idle takes some 50 us, several times as long as the echo. epoll_wait
with a timeout of 0 takes less than 1 us when nothing is ready, because it then takes no lock. Where
the driver of a network card can be polled, it also does that (ep_busy_loop() in fs/eventpoll.c).

shared: each worker polls. All pollers see one event. They queue for the set's mutex, and the later
ones find nothing. If only one worker polled, each event would also wake a sleeping one, because the
kernel cannot know that it is not needed.
"""
from engine.layout cimport Control, Listener, Worker
from kernel.clock cimport clock_now_ns
from kernel.epoll cimport EPIOCSPARAMS, epoll_event, epoll_params, epoll_wait
from kernel.ioctl cimport ioctl
from kernel.socket cimport SO_BUSY_POLL, SO_PREFER_BUSY_POLL, SOL_SOCKET, setsockopt
from libc.errno cimport errno
from libc.stdint cimport UINT64_MAX, uint32_t, uint64_t
from libc.string cimport memset


cdef extern from "<sched.h>" nogil:
    int sched_yield()


cdef enum:
    GAPS_AVERAGED = 8  # the weight of a new gap is one part of this
    GAP_MOST = 4  # a gap counts as this many times busy_poll_ns at most
    STOOD_STILL_NS = 200000  # between two looks: others want this CPU
    REST_NS = 20000000  # before the worker polls again
    POLL_DEVICE_US = 1
    POLL_DEVICE_PACKETS = 64  # per look, as NAPI's weight; more needs CAP_NET_ADMIN


cdef inline void _poll_devices(Control* control) noexcept nogil:
    """Have epoll_wait poll the network card from which packets come. For 1 us: with a timeout of 0
    epoll_wait looks once, whatever the time, and the worker decides how long to go on.

    prefer_busy_poll puts off the card's interrupts, where the device is set up for it. It is only
    set if workers never sleep: a sleeping worker needs the interrupts. No privilege is needed.
    Before Linux 6.9, or without CONFIG_NET_RX_BUSY_POLL, the call fails (EINVAL, ENOTTY), and the
    card interrupts as usual.
    """
    cdef epoll_params params
    cdef uint32_t queue
    memset(&params, 0, sizeof(params))
    params.busy_poll_usecs = POLL_DEVICE_US
    params.busy_poll_budget = POLL_DEVICE_PACKETS
    params.prefer_busy_poll = control.busy_poll_ns == UINT64_MAX
    for queue in range(control.queue_count):
        ioctl(control.queues[queue].epoll_fd, EPIOCSPARAMS, &params)


cdef inline void busy_poll_listener(Listener* listener, Control* control) noexcept nogil:
    """Have recv poll the card as well when there is no data: socket(7). Accepted sockets inherit
    the option. It needs CAP_NET_ADMIN; without it, only epoll_wait polls the card."""
    cdef int on = POLL_DEVICE_US
    if control.busy_poll_ns == 0 or listener.is_unix or listener.is_inherited:
        return
    if setsockopt(listener.fd, SOL_SOCKET, SO_BUSY_POLL, &on, sizeof(on)) == 0 and (
            control.busy_poll_ns == UINT64_MAX):
        setsockopt(listener.fd, SOL_SOCKET, SO_PREFER_BUSY_POLL, &on, sizeof(on))


cdef inline void busy_poll_init(
    Control* control, uint64_t busy_poll_ns, bint by_gaps,
) noexcept nogil:
    """Set up busy polling for a run."""
    cdef uint32_t i
    control.busy_poll_ns = busy_poll_ns
    control.busy_poll_by_gaps = by_gaps
    if busy_poll_ns == 0:
        return
    for i in range(control.worker_count):
        control.workers[i].mean_gap_ns = UINT64_MAX
    _poll_devices(control)
    for i in range(control.listener_count):
        busy_poll_listener(&control.listeners[i], control)


cdef inline uint64_t _until_ns(Worker* worker, uint64_t now_ns) noexcept nogil:
    """Return when to give up polling and sleep."""
    cdef Control* control = worker.control
    if control.busy_poll_ns == UINT64_MAX:
        return UINT64_MAX
    if now_ns < worker.rest_until_ns:
        return 0
    if control.busy_poll_by_gaps and worker.mean_gap_ns > control.busy_poll_ns:
        return 0
    return worker.idle_since_ns + control.busy_poll_ns


cdef inline void _note_gap(Worker* worker, uint64_t gap_ns) noexcept nogil:
    """Add the time from the end of service to the next event to the average."""
    cdef uint64_t most_ns = GAP_MOST * worker.control.busy_poll_ns
    worker.mean_gap_ns = min(worker.mean_gap_ns, most_ns)
    worker.mean_gap_ns -= worker.mean_gap_ns // GAPS_AVERAGED
    worker.mean_gap_ns += min(gap_ns, most_ns) // GAPS_AVERAGED


cdef inline int _wait(
    int epoll_fd, epoll_event* events, int most, int timeout_ms,
) noexcept nogil:
    cdef int ready = epoll_wait(epoll_fd, events, most, timeout_ms)
    return ready if ready >= 0 else -errno


cdef inline int _poll(
    Worker* worker, epoll_event* events, int most, int timeout_ms,
) noexcept nogil:
    """Poll for as long as is set, then sleep."""
    cdef Control* control = worker.control
    cdef int epoll_fd = worker.queue.epoll_fd
    cdef int ready = 0
    cdef uint64_t now_ns, looked_ns, until_ns, timer_ns = UINT64_MAX
    now_ns = clock_now_ns()
    if worker.has_served:
        worker.has_served = False
        worker.idle_since_ns = now_ns
    until_ns = _until_ns(worker, now_ns)
    if timeout_ms > 0:
        timer_ns = now_ns + <uint64_t>timeout_ms * 1000000
    while now_ns < until_ns:
        if now_ns >= timer_ns:
            return 0
        ready = _wait(epoll_fd, events, most, 0)
        if ready != 0:
            break
        if now_ns >= worker.rest_until_ns:
            sched_yield()
        looked_ns = now_ns
        now_ns = clock_now_ns()
        if now_ns - looked_ns > STOOD_STILL_NS:
            worker.rest_until_ns = now_ns + REST_NS
            if until_ns != UINT64_MAX:
                break
    if ready == 0:
        if timeout_ms > 0:
            timeout_ms = <int>((timer_ns - now_ns) // 1000000) + 1 if now_ns < timer_ns else 0
        ready = _wait(epoll_fd, events, most, timeout_ms)
    if ready > 0:
        worker.has_served = True
        if control.busy_poll_by_gaps:
            _note_gap(worker, clock_now_ns() - worker.idle_since_ns)
    return ready


cdef inline int busy_poll_wait(
    Worker* worker, epoll_event* events, int most, int timeout_ms,
) noexcept nogil:
    """Wait as epoll_wait does, after polling for as long as is set. Return the number of events, or
    -errno."""
    if worker.control.busy_poll_ns == 0 or timeout_ms == 0 or worker.is_draining:
        return _wait(worker.queue.epoll_fd, events, most, timeout_ms)
    return _poll(worker, events, most, timeout_ms)
