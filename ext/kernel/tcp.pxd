"""<netinet/tcp.h>: tcp(7)."""
from libc.stdint cimport uint32_t

cdef extern from "<netinet/in.h>" nogil:
    enum:
        IPPROTO_TCP

cdef extern from "<netinet/tcp.h>" nogil:
    enum:
        TCP_INFO

    struct tcp_info:
        uint32_t tcpi_unacked
        uint32_t tcpi_sacked
