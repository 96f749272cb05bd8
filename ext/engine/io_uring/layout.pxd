"""The records of layout.h, declared to Cython."""
from kernel.io_uring cimport Cqe, Sqe, UringBuffer
from libc.stdint cimport int32_t, uint8_t, uint32_t


cdef extern from "engine/io_uring/layout.h" nogil:
    enum:
        KECHO_CHUNK_BYTES
        KECHO_CHUNKS

    const uint32_t KECHO_NO_CHUNK

    ctypedef struct Chunk "struct kecho_chunk":
        uint32_t begin
        uint32_t end
        uint32_t next

    ctypedef struct Uring "struct kecho_uring":
        int32_t fd
        void* rings
        size_t rings_bytes
        Sqe* sqes
        size_t sqes_bytes
        uint32_t* sq_head
        uint32_t* sq_tail
        uint32_t* sq_flags
        uint32_t sq_mask
        uint32_t sq_next
        uint32_t* cq_head
        uint32_t* cq_tail
        uint32_t cq_mask
        Cqe* cqes
        uint32_t receiving
        uint32_t sending
        uint32_t is_watching
        uint32_t epoll_is_ready
        uint32_t is_over
        uint32_t refusals
        int32_t failure
        uint32_t given
        UringBuffer* free_buffers
        uint8_t* buffers
        size_t memory_bytes
        Chunk* chunks
