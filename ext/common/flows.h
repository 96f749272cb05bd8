/* What the kernel's echo and the engine share: the records of the maps of ext/bpf.
 *
 * A flow is a TCP connection that the kernel echoes by itself. Its record lies in a BPF map, keyed
 * by the socket's cookie; the program writes it, user space makes, reads and removes it.
 */
#ifndef KECHO_COMMON_FLOWS_H
#define KECHO_COMMON_FLOWS_H

#include <stddef.h>
#include <stdint.h>

enum kecho_flow_mode {
    FLOW_ECHOED = 0, /* every skb goes back where it came from */
    FLOW_PASSED,     /* for good: what comes is for user space to read, behind what is queued */
    FLOW_BROKEN      /* for good: bytes were lost, it is to be reset */
};

/* Charges stand for the kernel's memory, which nobody else counts: bytes, and so much for each skb
 * as it costs when it holds a single byte. */
#define KECHO_SKB_CHARGE 1024u
#define KECHO_FLOW_CHARGE_MOST (1u << 20)   /* of what waits to be sent: FLOW_PASSED beyond it */
#define KECHO_FLOW_CHARGE_LEAST (1u << 16)  /* however many connections share a bound */
#define KECHO_PASSED_CHARGE_MOST (2u << 20) /* of small skbs not read */

struct kecho_flow {
    uint64_t token;      /* of user space: what a report says when the mode changes */
    uint64_t redirected; /* bytes queued for sending, ever */
    uint64_t passed;     /* bytes left to user space, ever */
    /* The queue's charge is of two epochs: all of the one before is gone from the queue when the
     * position reaches `mark`, and a new one begins. */
    uint64_t mark;
    uint32_t charge_before;
    uint32_t charge;
    uint32_t mode; /* enum kecho_flow_mode */
    uint32_t is_told;
    uint32_t first; /* sequence number of the first byte */
    uint32_t trim;  /* the program's own: bytes that are to be taken off an skb */
};

/* An array map of one element, mapped by user space. */
#define KECHO_FLOW_CPUS 1024u /* a power of two: CPUs beyond it share counters */

struct kecho_flow_counters {
    uint64_t bytes;
    uint64_t chunks;
    uint64_t unused[6];
};

struct kecho_flow_board {
    uint64_t charge_most; /* written by user space, read by the program */
    uint64_t untold; /* flows for which the reports had no room; from here on the other way round */
    uint64_t unused[6];
    struct kecho_flow_counters cpus[KECHO_FLOW_CPUS];
};

_Static_assert(sizeof(struct kecho_flow_counters) == 64, "a cache line for each CPU");

#define KECHO_FLOW_REPORTS_BYTES (256u << 10)

/* token: which connection of which queue, of which generation. */
#define KECHO_TOKEN_INDEX_BITS 22
#define KECHO_TOKEN_QUEUE_BITS 10

static inline uint64_t kecho_token(uint32_t queue, uint32_t index, uint32_t generation) {
    return (uint64_t)generation << 32 | (uint64_t)queue << KECHO_TOKEN_INDEX_BITS | index;
}

static inline uint32_t kecho_token_index(uint64_t token) {
    return (uint32_t)token & ((1u << KECHO_TOKEN_INDEX_BITS) - 1);
}

static inline uint32_t kecho_token_queue(uint64_t token) {
    return (uint32_t)token >> KECHO_TOKEN_INDEX_BITS;
}

static inline uint32_t kecho_token_generation(uint64_t token) {
    return (uint32_t)(token >> 32);
}

#endif
