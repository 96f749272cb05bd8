"""<fcntl.h>, <unistd.h>: dup(2)."""

cdef extern from "<fcntl.h>" nogil:
    enum:
        O_CLOEXEC

cdef extern from "<unistd.h>" nogil:
    int dup3(int old_fd, int new_fd, int flags)
