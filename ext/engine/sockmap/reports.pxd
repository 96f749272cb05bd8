"""The reports of the kernel's program: which flow has changed its mode. They are in every queue's
epoll set. The worker that reads them has the connection reported to its own queue."""
from common.flows cimport (
    FLOW_BROKEN, FLOW_ECHOED, Flow, kecho_token_generation, kecho_token_index, kecho_token_queue,
)
from engine.epoll.events cimport (
    AWAIT_DATA, AWAIT_DATA_OR_ROOM, AWAIT_END, AWAIT_ROOM, TOKEN_REPORTS, Awaited, epoll_report,
)
from engine.layout cimport CONNECTION_ARMED_WRITE, Connection, Control, Queue
from engine.slab cimport (
    CLAIM_WON, ownership_claim, ownership_generation, ownership_release, slab_get, slab_high_water,
)
from engine.sockmap.flow cimport flow_read
from engine.sockmap.layout cimport Flows
from engine.sockmap.maps cimport flows_next, flows_of, flows_take_untold
from kernel.epoll cimport (
    EPOLL_CTL_ADD, EPOLL_CTL_MOD, EPOLLET, EPOLLEXCLUSIVE, EPOLLIN, epoll_ctl, epoll_event,
)
from kernel.pthread cimport pthread_mutex_lock, pthread_mutex_unlock
from libc.errno cimport errno
from libc.stdint cimport uint32_t, uint64_t


cdef inline int reports_arm(Control* control, Queue* queue) noexcept nogil:
    """Register the reports with a queue. Return 0 or -errno."""
    cdef epoll_event event
    event.events = EPOLLIN | EPOLLET
    if control.queue_count > 1:
        event.events |= EPOLLEXCLUSIVE
    event.data.u64 = TOKEN_REPORTS
    if epoll_ctl(queue.epoll_fd, EPOLL_CTL_ADD, flows_of(control).reports_fd, &event) < 0:
        return -errno
    return 0


cdef inline Awaited _awaited(Control* control, Connection* connection) noexcept nogil:
    """Return what epoll is to report of a connection. PASSED: bytes that are there and not read.
    BROKEN: there may be nothing but room to send. ECHOED: data is not for a worker and must not
    wake one."""
    cdef Flow flow
    if flow_read(control, connection, &flow) < 0:
        return AWAIT_ROOM if connection.flags & CONNECTION_ARMED_WRITE else AWAIT_DATA
    if flow.mode == FLOW_ECHOED:
        return AWAIT_END
    if flow.mode == FLOW_BROKEN or connection.flags & CONNECTION_ARMED_WRITE:
        return AWAIT_DATA_OR_ROOM
    return AWAIT_DATA


cdef inline void _report(
    Control* control, Queue* queue, uint32_t index, uint32_t generation,
) noexcept nogil:
    """Have epoll report a connection to its queue. If a worker owns it now, it looks again and sees
    the mode."""
    cdef Connection* connection
    if index >= slab_high_water(&queue.slab):
        return
    connection = slab_get(&queue.slab, index)
    if ownership_claim(connection, generation, False) != CLAIM_WON:
        return
    while True:
        # It is registered: a connection that is being accepted is owned.
        epoll_report(queue, connection, EPOLL_CTL_MOD, _awaited(control, connection))
        if ownership_release(connection):
            return


cdef inline void _report_untold(Control* control) noexcept nogil:
    """Report all open connections: one of them has changed its mode without a report."""
    cdef uint32_t number, index
    cdef Queue* queue
    cdef Connection* connection
    for number in range(control.queue_count):
        queue = &control.queues[number]
        for index in range(slab_high_water(&queue.slab)):
            connection = slab_get(&queue.slab, index)
            _report(control, queue, index, ownership_generation(connection))


cdef inline void reports_read(Control* control) noexcept nogil:
    """Read all reports and have epoll report their connections."""
    cdef Flows* flows = flows_of(control)
    cdef uint64_t token
    cdef uint32_t queue
    cdef bint is_one = True, are_untold = False
    while is_one:
        pthread_mutex_lock(&flows.reports_lock)
        token = flows_next(flows, &is_one)
        if not is_one:
            are_untold = flows_take_untold(flows)
        pthread_mutex_unlock(&flows.reports_lock)
        queue = kecho_token_queue(token)
        if is_one and queue < control.queue_count:
            _report(
                control, &control.queues[queue], kecho_token_index(token),
                kecho_token_generation(token))
    if are_untold:
        _report_untold(control)
