"""<sys/eventfd.h>, eventfd(2)."""
from libc.stdint cimport uint64_t

cdef extern from "<sys/eventfd.h>" nogil:
    enum:
        EFD_CLOEXEC
        EFD_NONBLOCK

    int eventfd(unsigned int initial_value, int flags)
    int eventfd_write(int fd, uint64_t value)
