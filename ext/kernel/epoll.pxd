"""<sys/epoll.h>, epoll(7)."""
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

cdef extern from "<sys/epoll.h>" nogil:
    enum:
        EPOLL_CLOEXEC
        EPOLL_CTL_ADD
        EPOLL_CTL_DEL
        EPOLL_CTL_MOD
        EPOLLIN
        EPOLLPRI
        EPOLLOUT
        EPOLLRDHUP
        EPOLLERR
        EPOLLHUP
        EPOLLET
        EPOLLEXCLUSIVE

    union epoll_data:
        uint64_t u64

    struct epoll_event:
        uint32_t events
        epoll_data data

    int epoll_create1(int flags)
    int epoll_ctl(int epoll_fd, int operation, int fd, epoll_event* event)
    int epoll_wait(int epoll_fd, epoll_event* events, int max_events, int timeout_ms)

# <linux/eventpoll.h> of Linux 6.9; older headers have neither. ioctl_eventpoll(2).
cdef extern from *:
    """
    #include <stdint.h>
    #include <sys/ioctl.h>
    struct kecho_epoll_params {
        uint32_t busy_poll_usecs;
        uint16_t busy_poll_budget;
        uint8_t prefer_busy_poll;
        uint8_t __pad;
    };
    #define KECHO_EPIOCSPARAMS _IOW(0x8A, 0x01, struct kecho_epoll_params)
    """
    struct epoll_params "kecho_epoll_params":
        uint32_t busy_poll_usecs
        uint16_t busy_poll_budget
        uint8_t prefer_busy_poll
        uint8_t __pad

    const unsigned long EPIOCSPARAMS "KECHO_EPIOCSPARAMS"
