from common.errors cimport system_error
from engine.io_uring.engine cimport io_uring_engine
from engine.io_uring.layout cimport Uring
from engine.io_uring.ring cimport uring_close, uring_open
from libc.stdint cimport uint32_t


_register("io_uring", io_uring_engine)


def try_io_uring(uint32_t entries):
    """Open a ring as workers do, and close it again. Raise OSError, which names the call: the
    kernel is older than Linux 6.1, or it does not allow rings (kernel.io_uring_disabled)."""
    cdef Uring ring
    cdef const char* call = NULL
    cdef int result = uring_open(&ring, entries, &call)
    uring_close(&ring)
    if result < 0:
        raise system_error(-result, call.decode())
