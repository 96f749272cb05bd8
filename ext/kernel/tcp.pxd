"""<linux/tcp.h>: tcp(7)."""
from libc.stdint cimport uint8_t, uint32_t, uint64_t

cdef extern from "<netinet/in.h>" nogil:
    enum:
        IPPROTO_TCP

cdef extern from "<linux/tcp.h>" nogil:
    enum:
        TCP_INFO

    struct tcp_info:
        uint8_t tcpi_state
        uint32_t tcpi_unacked
        uint32_t tcpi_sacked
        uint32_t tcpi_last_data_sent  # ms ago
        uint32_t tcpi_last_data_recv
        uint64_t tcpi_bytes_acked
        uint64_t tcpi_bytes_received  # a FIN counts as one

# Of tcpi_state: only <netinet/tcp.h> has a name for them, and another struct tcp_info.
cdef enum:
    TCP_STATE_CLOSE = 7
    TCP_STATE_CLOSE_WAIT = 8
