/* A connection's record: who may touch it, which state it is in, what it holds. */
#ifndef KECHO_ENGINE_CONNECTION_H
#define KECHO_ENGINE_CONNECTION_H

#include <assert.h>
#include <stdint.h>

#include "common/memory.h"

/* ---- ownership --------------------------------------------------------------------------- */

/* The low half of kecho_connection.ownership. The high half is the generation. It changes whenever
 * the record is freed, so that an event for an earlier connection is recognised. */
enum kecho_ownership {
    OWNERSHIP_FREE = 0,         /* in the slab's free list */
    OWNERSHIP_NOBODY,           /* open, waiting for an event */
    OWNERSHIP_ONE,              /* a worker serves it */
    OWNERSHIP_ONE_RECALL,       /* the same, and an event came meanwhile: the worker looks again */
    OWNERSHIP_ONE_RECALL_TO_END /* the same, and the event asks for CONNECTION_READ_TO_END */
};

/* ---- state ------------------------------------------------------------------------------- */

/* Who echoes the connection. A new connection is ECHOED. An engine takes it over (begin) and gives
 * it back (leave). A connection can be closed in any state.
 *
 *   ECHOED       ──▶ FINISHING, IN_KERNEL (sockmap takes it over), RING (io_uring takes it over)
 *   IN_KERNEL    ──▶ PASSED, ECHOED
 *   PASSED       ──▶ ECHOED
 *   RING         ──▶ RING_OVERDUE, RING_LEAVING, RING_ENDED, RING_BROKEN, ECHOED
 *   RING_OVERDUE ──▶               RING_LEAVING, RING_ENDED, RING_BROKEN, ECHOED
 *   RING_LEAVING ──▶ RING_BLOCKED,               RING_ENDED, RING_BROKEN, ECHOED
 *   RING_ENDED   ──▶ RING_BLOCKED,                                        ECHOED
 *   RING_BLOCKED ──▶                                         RING_BROKEN, ECHOED
 *   FINISHING and RING_BROKEN are left only by the end of the connection.
 */
enum kecho_connection_state {
    STATE_ECHOED = 0,   /* the worker receives and sends, when epoll reports the socket */
    STATE_FINISHING,    /* the FIN is sent; the client has yet to acknowledge all bytes */
    STATE_IN_KERNEL,    /* the kernel echoes; the worker reads nothing */
    STATE_PASSED,       /* the worker echoes what the kernel passes to it */
    STATE_RING,         /* the worker's ring receives and sends */
    STATE_RING_OVERDUE, /* it is closed when the ring has let go of it */
    STATE_RING_LEAVING, /* it is given back when the ring has let go of it and sent the rest */
    STATE_RING_BLOCKED, /* the socket had no room; given back, the rest becomes `pending` */
    STATE_RING_ENDED,   /* the client has sent its end of file; the rest is sent, then the FIN */
    STATE_RING_BROKEN,  /* receiving failed with `error`; the rest is sent, then it is closed */
    STATES
};

/* Facts about a connection that are independent of its state and of each other. */
enum kecho_connection_flag {
    CONNECTION_REGISTERED = 1,  /* it is in the queue's epoll set */
    CONNECTION_ARMED_WRITE = 2, /* epoll reports room to send, not data */
    CONNECTION_READ_TO_END = 4, /* a short read does not prove the socket empty (AF_UNIX) */
    CONNECTION_SILENT = 8,      /* nothing has been received yet */
    CONNECTION_HELD = 16,       /* the kernel holds bytes for the client, and epoll does not report
                                   when they are gone; a timer looks (held.pxd) */
    CONNECTION_WAITED = 32,     /* its client once stopped reading, so its window was closed */
    CONNECTION_UNIX = 64,
    CONNECTION_RECEIVING = 128, /* the ring has a request to receive for it */
    CONNECTION_SENDING = 256    /* the ring has a request to send for it */
};

/* ---- the record -------------------------------------------------------------------------- */

struct kecho_connection {
    uint64_t ownership; /* atomic: generation << 32 | enum kecho_ownership */
    uint8_t *pending;   /* bytes that the socket had no room for; NULL if there are none */
    union {
        uint32_t pending_begin; /* [begin, end) of `pending` is still to be sent */
        uint32_t look_at_ms;    /* HELD: when the next look is due, low 32 bits of the clock */
        uint32_t first_chunk;   /* RING: first chunk to send, or KECHO_NO_CHUNK */
    };
    union {
        uint32_t pending_end;
        uint32_t held_bytes; /* HELD: upper bound of what the kernel holds */
        uint32_t last_chunk; /* RING: last chunk to send */
    };
    int32_t fd;
    uint32_t index; /* of this record in its slab */
    union {
        uint32_t next_free;        /* free record: index of the next one */
        struct {                   /* record in use: */
            uint8_t state;         /* enum kecho_connection_state; connection_enter() writes it */
            uint8_t finish_reason; /* FINISHING: enum kecho_close_reason to close with */
            uint16_t error;        /* RING_BROKEN: errno */
        };
    };
    uint32_t last_active_ms; /* atomic: when bytes last moved, low 32 bits of the clock */
    uint16_t flags;          /* enum kecho_connection_flag */
    uint16_t accepted_by;    /* index of the worker whose `active` counts it */
    uint32_t peer;           /* index of its address in the access table, or KECHO_NO_PEER */
    uint32_t to_look_at;     /* atomic: enum kecho_to_look_at, for workers that do not own it */
    uint32_t waiting_next;   /* in the queue's waiting list, under its lock */
    union {
        uint32_t waiting_prev;
        uint32_t waited_until_ms; /* not in the list: when it left, or when note_untaken() was last
                                     called, low 32 bits of the clock */
    };
    uint32_t unread_bytes; /* sent bytes that the client had not taken at the last look; HELD in
                              IN_KERNEL or PASSED: bytes that it had acknowledged */
} __attribute__((aligned(KECHO_CACHE_LINE)));

enum kecho_to_look_at {
    LOOK_AT_NEITHER = 0,
    LOOK_AT_WAITING,   /* in the waiting list: `pending` is not NULL */
    LOOK_AT_HELD,      /* in the waiting list: CONNECTION_HELD */
    LOOK_AT_FINISHING, /* in the waiting list: STATE_FINISHING; it is never evicted */
    LOOK_AT_UNSEEN     /* not in the list: STATE_IN_KERNEL; no worker sees its bytes move */
};

#define KECHO_NO_PEER UINT32_MAX

_Static_assert(sizeof(struct kecho_connection) == KECHO_CACHE_LINE,
               "an idle connection costs one cache line, and two never share one");

/* Changes the state. Builds with assert() check the transition. */
static inline void connection_enter(struct kecho_connection *connection,
                                    enum kecho_connection_state state) {
    static const uint32_t may_follow[STATES] = {
        [STATE_ECHOED] = 1u << STATE_IN_KERNEL | 1u << STATE_RING | 1u << STATE_FINISHING,
        [STATE_IN_KERNEL] = 1u << STATE_PASSED | 1u << STATE_ECHOED,
        [STATE_PASSED] = 1u << STATE_ECHOED,
        [STATE_RING] = 1u << STATE_RING_OVERDUE | 1u << STATE_RING_LEAVING |
                       1u << STATE_RING_ENDED | 1u << STATE_RING_BROKEN | 1u << STATE_ECHOED,
        [STATE_RING_OVERDUE] = 1u << STATE_RING_LEAVING | 1u << STATE_RING_ENDED |
                               1u << STATE_RING_BROKEN | 1u << STATE_ECHOED,
        [STATE_RING_LEAVING] = 1u << STATE_RING_BLOCKED | 1u << STATE_RING_ENDED |
                               1u << STATE_RING_BROKEN | 1u << STATE_ECHOED,
        [STATE_RING_BLOCKED] = 1u << STATE_RING_BROKEN | 1u << STATE_ECHOED,
        [STATE_RING_ENDED] = 1u << STATE_RING_BLOCKED | 1u << STATE_ECHOED,
    };
    (void)may_follow;
    assert(may_follow[connection->state] >> state & 1);
    connection->state = (uint8_t)state;
}

#endif
