"""<sys/socket.h>: socket(7), accept(2), recv(2), send(2)."""

cdef extern from "<linux/sock_diag.h>" nogil:
    enum:
        SK_MEMINFO_DROPS
        SK_MEMINFO_VARS

cdef extern from "<sys/socket.h>" nogil:
    enum:
        AF_INET
        AF_INET6
        AF_UNSPEC
        MSG_DONTWAIT
        MSG_NOSIGNAL
        MSG_TRUNC
        SHUT_WR
        SOCK_CLOEXEC
        SOCK_NONBLOCK
        SOCK_RAW
        SOL_SOCKET
        SO_BUSY_POLL
        SO_LINGER
        SO_OOBINLINE

        SO_ACCEPTCONN
        SO_ATTACH_BPF
        SO_COOKIE
        SO_ERROR
        SO_MEMINFO
        SO_PEERCRED
        SO_PREFER_BUSY_POLL
        SO_RCVLOWAT

    ctypedef unsigned int socklen_t

    struct sockaddr:
        unsigned short sa_family

    struct ucred:
        int pid
        unsigned int uid
        unsigned int gid

    struct linger:
        int l_onoff
        int l_linger

    int socket(int family, int kind, int protocol)
    int bind(int fd, const sockaddr* address, socklen_t length)
    int shutdown(int fd, int how)
    int connect(int fd, const sockaddr* address, socklen_t length)
    int accept4(int fd, sockaddr* address, socklen_t* length, int flags)
    int getsockname(int fd, sockaddr* address, socklen_t* length)
    ssize_t recv(int fd, void* buffer, size_t length_bytes, int flags)
    ssize_t recvfrom(
        int fd, void* buffer, size_t length_bytes, int flags, sockaddr* address, socklen_t* length
    )
    ssize_t send(int fd, const void* buffer, size_t length_bytes, int flags)
    int setsockopt(int fd, int level, int option, const void* value, socklen_t length_bytes)
    int getsockopt(int fd, int level, int option, void* value, socklen_t* length_bytes)
