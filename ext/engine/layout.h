/* The engine's records: what they hold, who writes them, how they lie in memory.
 *
 *   engine -> queue (an epoll instance, its listeners, its connections) -> connection
 *          -> worker (a thread; reads from one queue)
 *
 * shared: one queue, all the workers.   percpu, or with rings: as many queues as workers, one each.
 */
#ifndef KECHO_ENGINE_LAYOUT_H
#define KECHO_ENGINE_LAYOUT_H

#include <assert.h>
#include <pthread.h>
#include <stddef.h>
#include <stdint.h>

#include "common/life.h"
#include "common/memory.h"
#include "common/rules.h"
#include "common/siphash.h"

/* ---- connection -------------------------------------------------------------------------- */

/* The low half of kecho_connection.ownership; the high half is the generation, which changes
 * whenever the record is freed, so that an event for an earlier connection is recognised. */
enum kecho_ownership {
    OWNERSHIP_FREE = 0,         /* in the slab's free list */
    OWNERSHIP_NOBODY,           /* open, waiting for an event */
    OWNERSHIP_ONE,              /* a worker serves it */
    OWNERSHIP_ONE_RECALL,       /* the same, and an event came meanwhile: it looks again */
    OWNERSHIP_ONE_RECALL_TO_END /* the same, and the event wants CONNECTION_READ_TO_END */
};

/* Who receives from a connection, and sends. An engine takes one over from its worker (begin), and
 * gives it back (leave); it is closed in any state.
 *
 *   accepted ──▶ ECHOED ──────────────────────────▶ FINISHING
 *                  │ ▲
 *                  │ ├───────────┬────────┐
 *      sockmap:    ├─┼───▶ IN_KERNEL ─▶ PASSED
 *                  │ │
 *                  │ ├────────┬───────────┬──────────────┬──────────┐
 *      io_uring:   └─┼────▶ RING ─▶ RING_LEAVING ─▶ RING_BLOCKED    │
 *                    │        │        ▲        │      ▲            │
 *                    ├── RING_OVERDUE ─┘        ▼      │            │
 *                    │        └──────────▶ RING_ENDED ─┴────────────┘
 *                    └ (RING_BROKEN, from any of RING's, is only closed)
 *
 * connection_enter() changes it, and checks that it may where assert() does. */
enum kecho_connection_state {
    STATE_ECHOED = 0,   /* its worker does, by recv and send, when epoll reports something */
    STATE_FINISHING,    /* nobody: our FIN was sent, not all of it has been acknowledged */
    STATE_IN_KERNEL,    /* the kernel does, nothing is read here */
    STATE_PASSED,       /* its worker does: what it reads was redirected to it by the kernel */
    STATE_RING,         /* its worker's ring does, and so in those that follow */
    STATE_RING_OVERDUE, /* by a timeout: closed when the ring has let go of it */
    STATE_RING_LEAVING, /* its worker's, when what was received is sent, or pending */
    STATE_RING_BLOCKED, /* so, and the kernel had no room for a chunk: nothing more is sent */
    STATE_RING_ENDED,   /* at its end of file: ended when all is sent */
    STATE_RING_BROKEN,  /* by `error`: closed then */
    STATES
};

/* Facts about it that are independent of its state, and of one another. */
enum kecho_connection_flag {
    CONNECTION_REGISTERED = 1,  /* is in the queue's epoll set */
    CONNECTION_ARMED_WRITE = 2, /* epoll watches for room to send, not for data */
    CONNECTION_READ_TO_END = 4, /* a short read does not prove the socket empty (AF_UNIX) */
    CONNECTION_SILENT = 8,      /* nothing has been received yet */
    CONNECTION_HELD = 16,       /* to be looked at: the kernel holds bytes that the client has yet
                                   to take, and nothing reports that they are gone */
    CONNECTION_WAITED = 32,     /* its client once did not read, and the window was shut */
    CONNECTION_UNIX = 64,
    CONNECTION_RECEIVING = 128, /* a ring has been told to receive for it, and is not done */
    CONNECTION_SENDING = 256    /* a ring has been given a chunk of it to send */
};

struct kecho_connection {
    uint64_t ownership; /* atomic: generation << 32 | enum kecho_ownership */
    uint8_t *pending;   /* what the kernel would not take yet; NULL unless backpressured */
    union {
        uint32_t pending_begin; /* [begin, end) of `pending`, bytes */
        uint32_t look_at_ms;    /* HELD: when to ask the kernel again, low 32 bits of the clock */
        uint32_t first_chunk; /* RING: received and to be sent, in this order; or KECHO_NO_CHUNK */
    };
    union {
        uint32_t pending_end;
        uint32_t held_bytes; /* HELD: what the kernel holds, at most */
        uint32_t last_chunk; /* RING: of those */
    };
    int32_t fd;
    uint32_t index; /* of this record in its slab */
    union {
        uint32_t next_free;        /* index of the next free record, while this one is free */
        struct {                   /* while it is not */
            uint8_t state;         /* enum kecho_connection_state */
            uint8_t finish_reason; /* FINISHING: enum kecho_close_reason, for the end */
            uint16_t error;        /* RING_BROKEN: errno */
        };
    };
    uint32_t last_active_ms; /* atomic: low 32 bits of the clock when bytes last moved */
    uint16_t flags;          /* enum kecho_connection_flag */
    uint16_t accepted_by;    /* index of the worker whose `active` counts it */
    uint32_t peer;           /* index of its address in the access table, or KECHO_NO_PEER */
    uint32_t to_look_at;     /* atomic: enum kecho_to_look_at, for those who do not own it */
    uint32_t waiting_next;   /* in the queue's list of those, under its lock */
    union {
        uint32_t waiting_prev;
        uint32_t waited_until_ms; /* not in the list: when it left, or when note_untaken() was last
                                     called, low 32 bits of the clock */
    };
    uint32_t unread_bytes; /* what the peer had not taken at the last look; of a flow whose bytes
                              are held, what it had acknowledged */
} __attribute__((aligned(KECHO_CACHE_LINE)));

enum kecho_to_look_at {
    LOOK_AT_NEITHER = 0,
    LOOK_AT_WAITING,   /* `pending` is not NULL: in the queue's list */
    LOOK_AT_HELD,      /* CONNECTION_HELD: in that list, too */
    LOOK_AT_FINISHING, /* STATE_FINISHING: likewise, but never evicted */
    LOOK_AT_UNSEEN     /* STATE_IN_KERNEL, and not in it: nobody here sees its bytes move */
};

#define KECHO_NO_PEER UINT32_MAX

_Static_assert(sizeof(struct kecho_connection) == KECHO_CACHE_LINE,
               "an idle connection costs one cache line, and two never share one");

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

/* ---- slab: where a queue's connections live ---------------------------------------------- */

#define KECHO_SLAB_CHUNK_CONNECTIONS 1024 /* 64 KiB a chunk */
#define KECHO_SLAB_CHUNKS 4096            /* 4,194,304 connections a queue */

/* Chunks are never given back before the engine ends: a record stays a record, so a worker that
 * holds a stale event may still look at its generation. */
struct kecho_slab {
    pthread_mutex_t lock; /* guards next_free of free records, free_head, high_water, `chunks` */
    struct kecho_connection *chunks[KECHO_SLAB_CHUNKS]; /* atomic to read without the lock */
    uint32_t free_head;                                 /* index, or KECHO_SLAB_END */
    uint32_t high_water;                                /* atomic: records ever handed out */
    uint32_t in_use;                                    /* atomic */
};

#define KECHO_SLAB_END UINT32_MAX

/* ---- listener ---------------------------------------------------------------------------- */

enum kecho_listener_state {
    LISTENER_OPEN = 0,
    LISTENER_PAUSED, /* out of descriptors or memory, or max_connections reached */
    LISTENER_DEAD    /* no longer listening: destroyed from outside */
};

#define KECHO_EVERY_QUEUE (-1)
#define KECHO_LISTENERS_MOST 65535 /* their numbers share 32 bits with connections' indices */

struct kecho_listener {
    int32_t fd;
    uint32_t is_unix;
    uint32_t is_inherited; /* other processes may accept from it, too */
    int32_t queue;         /* index of the queue that accepts from it, or KECHO_EVERY_QUEUE */
    uint32_t state;        /* atomic: enum kecho_listener_state */
    uint32_t drops_seen;   /* in 32 bits, as the kernel has them; listeners_lock */
    uint64_t dropped;      /* SYNs, until then; listeners_lock */
};

/* ---- queue ------------------------------------------------------------------------------- */

struct kecho_queue {
    int32_t epoll_fd;
    int32_t wake_fd;          /* eventfd, written when the phase changes */
    uint32_t workers_running; /* atomic: the last one to leave closes what is left */
    uint64_t next_sweep_ms;   /* atomic: when the next sweep for timeouts is due */
    struct kecho_slab slab;
    /* Connections whose client does not take what was sent, longest without progress first. */
    pthread_mutex_t waiting_lock; /* guards what follows, and the links in the records */
    uint32_t waiting_head;        /* index, or KECHO_SLAB_END */
    uint32_t waiting_tail;
    uint64_t waiting_bytes; /* of all their `pending` */
    uint32_t waiting_count;
    uint32_t finishing;    /* how many of them are STATE_FINISHING */
    uint32_t held;         /* how many of them are CONNECTION_HELD; atomic to read without it */
    uint64_t next_look_ms; /* atomic: when the next look at those is due */
};

/* ---- access: which clients are served --------------------------------------------------- */

/* One client address (common/counted.pxd) that has connections, or had some a short time ago. */
struct kecho_peer {
    struct kecho_address address;
    uint32_t connections;
    uint32_t chain;        /* the next one of the same bucket, or KECHO_NO_PEER */
    uint32_t tokens_milli; /* thousandths of connections that it may open at once */
    uint32_t refilled_ms;  /* low 32 bits of the clock */
    uint32_t idle_next;    /* without connections: the list of those, longest idle first; */
    uint32_t idle_prev;    /* idle_next is the next free one where the record is free */
};

#define KECHO_IDLE_PEERS_MOST 65536

struct kecho_access {
    struct kecho_rules rules;
    uint32_t per_address; /* connections of one address at once; 0: any number */
    uint32_t rate_per_s;  /* connections that one address may open a second; 0: any number */
    struct kecho_hash_key hash_key;
    pthread_mutex_t lock; /* guards what follows */
    struct kecho_peer *peers;
    uint32_t *buckets;   /* index of the first peer, or KECHO_NO_PEER */
    uint32_t capacity;   /* of `peers`, and of `buckets`: a power of two, or 0 */
    uint32_t high_water; /* peers ever used */
    uint32_t free_head;
    uint32_t idle_head, idle_tail, idle_count;
};

/* ---- engine: what moves connections' bytes ------------------------------------------------ */

struct kecho_control;
struct kecho_worker;
struct epoll_event;

/* What a turn with a connection came to. */
enum kecho_served {
    SERVED_ALL = 0, /* nothing left to read, or waiting for room to send */
    SERVED_MORE,    /* the turn is over, there is more to read */
    SERVED_CLOSED   /* the connection is gone, and its record with it */
};

/* What became of the bytes of a connection that its worker does not see. */
struct kecho_look {
    uint64_t received;     /* bytes, the FIN not counted */
    uint64_t handed;       /* bytes that the socket has been given for sending, or a little less */
    uint32_t acknowledged; /* low 32 bits of the bytes that the client's side has taken */
    uint32_t sent_ms_ago;  /* the last segment with data */
    uint32_t received_ms_ago;
    uint32_t has_ended; /* the client's FIN has come: nothing follows */
    uint32_t is_closed; /* broken */
};

/* The calls by which an engine beside epoll takes part; epoll/engine.pxd has those of a run in
 * which there is none. int: 0 or more, or -errno, of the system call that worker.fatal_syscall, or
 * `call`, then names; or 1 for yes. */
struct kecho_engine {
    uint32_t begins_unread;         /* begin() comes before the first recv, not after it */
    uint32_t queue_for_each_worker; /* under shared, too: a connection cannot change its worker */

    /* a run */
    int (*open)(struct kecho_control *, const int *given, uint32_t count, const char **call);
    void (*close)(struct kecho_control *);  /* whatever of it is open */
    void (*forget)(struct kecho_control *); /* in the child after fork(2) */
    int (*start)(struct kecho_worker *);    /* by the worker, before its first wait */
    /* as epoll_wait(2); -1: errno, of the call that worker.fatal_syscall names if it is another */
    int (*wait)(struct kecho_worker *, struct epoll_event *, int most, int timeout_ms);
    int (*stop)(struct kecho_worker *); /* gives every connection of the worker's back to it */
    void (*read_reports)(struct kecho_control *); /* TOKEN_REPORTS has an event */
    void (*share)(struct kecho_control *);        /* `active` has changed */
    /* adds what was echoed and no worker has counted, of the share of one of them */
    void (*add_echoed)(struct kecho_control *, uint32_t worker, uint64_t *bytes, uint64_t *chunks);

    /* a connection, by the worker that owns it; begin() apart, of one that is in a state of its */
    int (*begin)(struct kecho_worker *, struct kecho_connection *); /* 0: the worker keeps it */
    enum kecho_served (*serve)(struct kecho_worker *, struct kecho_connection *, int reads);
    enum kecho_served (*at_eof)(struct kecho_worker *, struct kecho_connection *);
    int (*arm)(struct kecho_worker *, struct kecho_connection *);
    int (*look)(struct kecho_connection *, struct kecho_look *);
    /* before it is closed, or the worker goes on with it; 0: bytes of it are lost */
    int (*leave)(struct kecho_worker *, struct kecho_connection *, int is_whole, int reason);
    void (*end)(struct kecho_worker *, struct kecho_connection *, int reason);
};

/* ---- control: what all the threads of an engine look at ---------------------------------- */

struct kecho_control {
    uint32_t phase;              /* atomic: enum kecho_phase, only ever grows */
    uint64_t deadline_ms;        /* atomic: end of the drain, on the clock of clock_now_ms() */
    uint32_t active;             /* atomic: open connections of all the queues */
    uint32_t paused;             /* atomic: listeners that are LISTENER_PAUSED */
    uint32_t workers_accepting;  /* atomic: workers that have not yet seen the stop */
    uint32_t unaccepted;         /* clients whom the end found in an accept queue, and reset */
    int32_t unaccepted_errno;    /* of the accept4 that left them there; 0: nobody tried */
    uint32_t left_to_others;     /* clients in the queues of inherited listeners, at the stop */
    uint32_t max_connections;    /* UINT32_MAX: no limit of ours */
    uint32_t idle_timeout_ms;    /* 0: none */
    uint32_t write_timeout_ms;   /* 0: none */
    uint32_t finish_timeout_ms;  /* of one that is FINISHING, without progress */
    uint64_t queue_buffer_bytes; /* all `pending` of a queue together, at most */
    uint64_t busy_poll_ns;       /* after its last event a worker polls for so long; 0: never */
    uint32_t busy_poll_by_gaps;  /* only while events are that close together */
    uint32_t queue_count;
    uint32_t worker_count;
    uint32_t listener_count;
    struct kecho_queue *queues;
    struct kecho_worker *workers;
    struct kecho_listener *listeners;
    pthread_mutex_t listeners_lock; /* held while listeners are closed or asked */
    struct kecho_access access;
    struct kecho_engine engine;
    void *of_engine; /* its own */
};

/* ---- worker ------------------------------------------------------------------------------ */

enum kecho_close_reason {
    CLOSE_EOF = 0,   /* the client ended, everything was echoed */
    CLOSE_RESET,     /* the client reset it */
    CLOSE_TIMED_OUT, /* the kernel gave up on the client (retransmission) */
    CLOSE_IDLE,      /* idle_timeout */
    CLOSE_STALLED,   /* write_timeout: the client has not taken a byte for so long */
    CLOSE_EVICTED,   /* max_buffer_memory: the slowest reader */
    CLOSE_DRAINED,   /* the server stopped, everything received was echoed */
    CLOSE_ABORTED,   /* the server stopped before everything was echoed */
    CLOSE_ERROR,     /* anything else; counted as an error, too */
    CLOSE_REASONS
};

enum kecho_error_kind {
    ERROR_ACCEPT = 0,  /* a connection broke before accept returned it */
    ERROR_DESCRIPTORS, /* EMFILE, ENFILE: accepting paused */
    ERROR_MEMORY,      /* ENOMEM, ENOBUFS, or malloc */
    ERROR_LISTENER,    /* a listener is gone */
    ERROR_RECV,
    ERROR_SEND,
    ERROR_EPOLL,
    ERROR_KINDS
};

/* Why a client was turned away at accept. */
enum kecho_refusal {
    REFUSED_DENIED = 0,  /* allow, deny */
    REFUSED_PER_ADDRESS, /* max_connections_per_ip */
    REFUSED_RATE,        /* rate_limit */
    REFUSALS
};

/* One writer, the worker (`active` excepted); relaxed. */
struct kecho_counters {
    uint64_t accepted;
    uint64_t bytes_received;
    uint64_t bytes_sent;
    uint64_t echoes;       /* chunks as recv returned them, once given back whole */
    uint64_t backpressure; /* times the kernel took less than was to be sent */
    uint64_t accept_pauses;
    uint64_t closed[CLOSE_REASONS];
    uint64_t errors[ERROR_KINDS];
    uint64_t refused[REFUSALS];
} __attribute__((aligned(KECHO_CACHE_LINE)));

#define KECHO_BUFFER_BYTES 65536
#define KECHO_STREAMS_MOST 8 /* that a worker keeps */

struct kecho_worker {
    struct kecho_counters counters;
    struct kecho_control *control __attribute__((aligned(KECHO_CACHE_LINE)));
    struct kecho_queue *queue;
    uint8_t *buffer; /* KECHO_BUFFER_BYTES: what recv fills and send empties */
    /* Owned, have more to read: the first one is served between two waits. */
    struct kecho_connection *streams[KECHO_STREAMS_MOST];
    uint32_t stream_count;
    uint32_t turns_in_a_row; /* that the first one has had */
    uint32_t stream_turns;   /* since the last wait, of those that it brought */
    uint32_t has_served;     /* the last wait brought events */
    uint64_t now_ms;         /* when the last wait returned */
    uint64_t resume_at_ms;   /* when to try a paused listener again; 0: none is paused */
    uint64_t greet_until_ms; /* in a drain: how long new connections may begin to speak */
    uint64_t serve_again_ms; /* then, when to look again for what is on its way; 0: never */
    uint64_t idle_since_ns;  /* busy polling: when its last event had been served */
    uint64_t mean_gap_ns;    /* from then to the next event, on average, lately */
    uint64_t rest_until_ns;  /* others want this CPU, until then it does not yield to them */
    uint32_t index;
    uint32_t is_draining;
    uint32_t
        listeners_left;   /* at the stop, of the one that closes them: whose queue is not empty */
    int32_t accept_errno; /* why one of them is not */
    int32_t fatal_errno;  /* why the worker gave up; read after its thread was joined */
    const char *fatal_syscall;
    void *of_engine;                                            /* its own */
    uint32_t active __attribute__((aligned(KECHO_CACHE_LINE))); /* atomic: written by all */
};

_Static_assert(offsetof(struct kecho_worker, active) % KECHO_CACHE_LINE == 0,
               "what other workers write has a cache line of its own");

#endif
