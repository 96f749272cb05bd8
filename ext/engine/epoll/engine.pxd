"""The epoll engine: workers receive and send when epoll reports a socket.

Its begin() leaves every connection to its worker, so the calls for a connection stay empty. Other
engines fill the table with these calls first, and then replace some.
"""
from engine.epoll.busy_poll cimport busy_poll_wait
from engine.layout cimport Connection, Control, EngineCalls, Worker
from engine.turns cimport connection_end
from libc.stdint cimport uint32_t, uint64_t


cdef inline int _open(
    Control* control, const int* given, uint32_t count, const char** call,
) noexcept nogil:
    return 0


cdef inline void _nothing(Control* control) noexcept nogil:
    pass


cdef inline int _no_step(Worker* worker) noexcept nogil:
    return 0


cdef inline void _add_echoed(
    Control* control, uint32_t worker, uint64_t* bytes, uint64_t* chunks,
) noexcept nogil:
    pass


cdef inline bint _begin(Worker* worker, Connection* connection) noexcept nogil:
    return False


cdef inline void epoll_engine(EngineCalls* engine) noexcept nogil:
    """Fill the table."""
    engine.open = _open
    engine.close = _nothing
    engine.forget = _nothing
    engine.start = _no_step
    engine.wait = busy_poll_wait
    engine.stop = _no_step
    engine.read_reports = _nothing
    engine.share = _nothing
    engine.add_echoed = _add_echoed
    engine.begin = _begin
    engine.end = connection_end
