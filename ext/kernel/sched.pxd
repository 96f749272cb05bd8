"""<sched.h>: setns(2)."""

cdef extern from * nogil:
    """
    #ifndef _GNU_SOURCE
    #define _GNU_SOURCE
    #endif
    #include <sched.h>
    """
    enum:
        CLONE_NEWNET

    int setns(int namespace_fd, int kind)
