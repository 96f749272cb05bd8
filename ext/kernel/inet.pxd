"""<netinet/in.h>, <endian.h>: ip(7), ipv6(7), endian(3)."""
from libc.stdint cimport uint8_t, uint32_t, uint64_t

cdef extern from "<netinet/in.h>" nogil:
    enum:
        AF_INET
        AF_INET6

    struct in_addr:
        uint32_t s_addr

    struct in6_addr:
        uint8_t* s6_addr

    struct sockaddr_in:
        in_addr sin_addr

    struct sockaddr_in6:
        in6_addr sin6_addr

    struct sockaddr_storage:
        pass

    uint32_t ntohl(uint32_t number)

cdef extern from "<endian.h>" nogil:
    uint64_t be64toh(uint64_t number)
