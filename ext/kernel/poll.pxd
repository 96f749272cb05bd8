"""<poll.h>: poll(2)."""

cdef extern from "<poll.h>" nogil:
    enum:
        POLLIN
        POLLERR
        POLLRDHUP

    struct pollfd:
        int fd
        short events
        short revents

    int poll(pollfd* fds, unsigned long count, int timeout_ms)
