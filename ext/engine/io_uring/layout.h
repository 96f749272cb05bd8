/* A worker's ring, and its buffers. */
#ifndef KECHO_ENGINE_IO_URING_LAYOUT_H
#define KECHO_ENGINE_IO_URING_LAYOUT_H

#include <stddef.h>
#include <stdint.h>

#include "common/memory.h"

#define KECHO_CHUNK_BYTES 4096
#define KECHO_CHUNKS 512 /* a power of two: a ring's buffers take 2 MiB */
#define KECHO_NO_CHUNK UINT32_MAX

/* A buffer that holds received bytes. */
struct kecho_chunk {
    uint32_t begin, end; /* bytes still to be sent */
    uint32_t next;       /* next chunk of the connection, or KECHO_NO_CHUNK */
};

struct kecho_sqe;
struct kecho_cqe;
struct kecho_uring_buf;

/* Used by its worker only, apart from opening and closing. */
struct kecho_uring {
    int32_t fd; /* -1: it is not open */
    void *rings;
    size_t rings_bytes;
    struct kecho_sqe *sqes;
    size_t sqes_bytes;
    uint32_t *sq_head, *sq_tail, *sq_flags; /* shared with the kernel */
    uint32_t sq_mask;
    uint32_t sq_next; /* requests prepared so far */
    uint32_t *cq_head, *cq_tail;
    uint32_t cq_mask;
    struct kecho_cqe *cqes;
    uint32_t receiving;      /* requests to receive that are active */
    uint32_t sending;        /* connections that are SENDING */
    uint32_t is_watching;    /* the epoll set is polled by the ring */
    uint32_t epoll_is_ready; /* and has something */
    uint32_t is_over;        /* the ring takes no more connections */
    uint32_t refusals;       /* times in a row that the kernel refused io_uring_enter */
    int32_t failure;         /* -errno: it cannot be used any more */
    uint32_t given;          /* buffers given to the kernel so far */
    struct kecho_uring_buf *free_buffers; /* the kernel takes them from here */
    uint8_t *buffers;
    size_t memory_bytes; /* of both */
    struct kecho_chunk chunks[KECHO_CHUNKS];
} __attribute__((aligned(KECHO_CACHE_LINE)));

#endif
