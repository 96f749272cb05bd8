"""<sys/socket.h>: several datagrams in one call, with control data: recvmmsg(2), sendmmsg(2),
cmsg(3)."""
from kernel.socket cimport socklen_t

cdef extern from * nogil:
    """
    #include <linux/sock_diag.h>
    #include <sys/socket.h>
    #include <sys/uio.h>
    """
    enum:
        MSG_CTRUNC
        SK_MEMINFO_DROPS
        SK_MEMINFO_VARS
        SO_MEMINFO

    struct iovec:
        void* iov_base
        size_t iov_len

    struct msghdr:
        void* msg_name
        socklen_t msg_namelen
        iovec* msg_iov
        size_t msg_iovlen
        void* msg_control
        size_t msg_controllen
        int msg_flags

    struct mmsghdr:
        msghdr msg_hdr
        unsigned int msg_len

    struct cmsghdr:
        size_t cmsg_len
        int cmsg_level
        int cmsg_type

    struct timespec:
        pass

    cmsghdr* CMSG_FIRSTHDR(msghdr* message)
    cmsghdr* CMSG_NXTHDR(msghdr* message, cmsghdr* entry)
    unsigned char* CMSG_DATA(cmsghdr* entry)
    size_t CMSG_LEN(size_t data_bytes)
    size_t CMSG_SPACE(size_t data_bytes)
    int recvmmsg(
        int fd, mmsghdr* messages, unsigned int count, int flags, timespec* timeout)
    int sendmmsg(int fd, mmsghdr* messages, unsigned int count, int flags)
    int getsockopt(int fd, int level, int option, void* value, socklen_t* length_bytes)
