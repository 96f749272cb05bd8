"""The sockmap engine: the kernel echoes TCP connections; workers accept, count, time and close
them."""
from engine.epoll.engine cimport epoll_engine
from engine.layout cimport Control, EngineCalls
from engine.sockmap.flow cimport flow_look
from engine.sockmap.layout cimport Flows
from engine.sockmap.maps cimport (
    flows_add_echoed, flows_close, flows_disown, flows_of, flows_open, flows_reset, flows_share,
)
from engine.sockmap.reports cimport reports_arm, reports_read
from engine.sockmap.served cimport (
    sockmap_arm, sockmap_at_eof, sockmap_begin, sockmap_leave, sockmap_serve,
)
from libc.errno cimport EINVAL, ENOMEM
from libc.stdint cimport uint32_t
from libc.stdlib cimport free, malloc


cdef enum:
    DESCRIPTORS = 5  # that open_echo() of _bpf returns


cdef inline int _arm_reports(Control* control, const char** call) noexcept nogil:
    cdef uint32_t i
    cdef int result
    call[0] = "epoll_ctl"
    for i in range(control.queue_count):
        result = reports_arm(control, &control.queues[i])
        if result < 0:
            return result
    return 0


cdef inline int _open(
    Control* control, const int* fds, uint32_t count, const char** call,
) noexcept nogil:
    """Take over the descriptors in `fds`, unless it fails."""
    cdef Flows* flows
    cdef int result
    call[0] = "sockmap"
    if count != DESCRIPTORS:
        return -EINVAL
    flows = <Flows*>malloc(sizeof(Flows))
    if flows == NULL:
        return -ENOMEM
    flows_reset(flows)
    control.of_engine = flows
    result = flows_open(flows, fds, call)
    if result < 0:
        return result
    flows_share(control)
    result = _arm_reports(control, call)
    if result < 0:
        flows_disown(flows)
    return result


cdef inline void _forget(Control* control) noexcept nogil:
    if control.of_engine != NULL:
        flows_close(flows_of(control))


cdef inline void _close(Control* control) noexcept nogil:
    _forget(control)
    free(control.of_engine)
    control.of_engine = NULL


cdef inline void sockmap_engine(EngineCalls* engine) noexcept nogil:
    """Fill the table."""
    epoll_engine(engine)
    engine.begins_unread = True  # otherwise both could send bytes, in the wrong order
    engine.open = _open
    engine.close = _close
    engine.forget = _forget
    engine.read_reports = reports_read
    engine.share = flows_share
    engine.add_echoed = flows_add_echoed
    engine.begin = sockmap_begin
    engine.serve = sockmap_serve
    engine.at_eof = sockmap_at_eof
    engine.arm = sockmap_arm
    engine.look = flow_look
    engine.leave = sockmap_leave
