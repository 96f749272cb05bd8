"""The records of layout.h, declared to Cython."""
from common.flows cimport Board
from kernel.pthread cimport pthread_mutex_t
from libc.stdint cimport int32_t, uint8_t, uint64_t


cdef extern from "engine/sockmap/layout.h" nogil:
    ctypedef struct Flows "struct kecho_flows":
        int32_t sockets_fd
        int32_t flows_fd
        int32_t board_fd
        int32_t reports_fd
        int32_t filter_fd
        Board* board
        uint64_t* consumed
        const uint64_t* produced
        const uint8_t* records
        pthread_mutex_t reports_lock
        uint64_t untold_seen
