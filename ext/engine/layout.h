/* The engine's records: what they hold, who writes them, how they lie in memory.
 *
 *   control -> queue (an epoll instance, its listeners, its connections) -> connection
 *           -> worker (a thread that reads from one queue)
 *
 * shared: one queue for all workers. percpu, and io_uring: one queue for each worker.
 */
#ifndef KECHO_ENGINE_LAYOUT_H
#define KECHO_ENGINE_LAYOUT_H

#include <pthread.h>
#include <stddef.h>
#include <stdint.h>

#include "common/life.h"
#include "common/memory.h"
#include "common/rules.h"
#include "common/siphash.h"
#include "engine/connection.h"
#include "engine/calls.h"

/* ---- slab: where a queue's connections live ---------------------------------------------- */

#define KECHO_SLAB_CHUNK_CONNECTIONS 1024 /* 64 KiB a chunk */
#define KECHO_SLAB_CHUNKS 4096            /* 4,194,304 connections a queue */

/* Chunks are not freed before the engine ends. So a worker that holds a stale event can still read
 * the generation of the record. */
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
    uint32_t is_inherited; /* other processes may accept from it as well */
    int32_t queue;         /* index of the queue that accepts from it, or KECHO_EVERY_QUEUE */
    uint32_t state;        /* atomic: enum kecho_listener_state */
    uint32_t drops_seen;   /* as the kernel counts them, in 32 bits; under listeners_lock */
    uint64_t dropped;      /* SYNs dropped up to then; under listeners_lock */
};

/* ---- queue ------------------------------------------------------------------------------- */

struct kecho_queue {
    int32_t epoll_fd;
    int32_t wake_fd;          /* eventfd, written when the phase changes */
    uint32_t workers_running; /* atomic: the last worker to leave closes what is left */
    uint64_t next_sweep_ms;   /* atomic: when the next sweep for timeouts is due */
    struct kecho_slab slab;
    /* The waiting list (backpressure.pxd): connections whose client does not take its bytes. The
     * one without progress for the longest time is first. */
    pthread_mutex_t waiting_lock; /* guards the fields below, and the links in the records */
    uint32_t waiting_head;        /* index, or KECHO_SLAB_END */
    uint32_t waiting_tail;
    uint64_t waiting_bytes; /* all that they pin: `pending` and held bytes */
    uint32_t waiting_count;
    uint32_t finishing;    /* how many of them are STATE_FINISHING */
    uint32_t held;         /* how many of them are CONNECTION_HELD; atomic, read without the lock */
    uint64_t next_look_ms; /* atomic: when the next look at held connections is due */
};

/* ---- access: which clients are served --------------------------------------------------- */

/* One client address (common/counted.pxd) that has connections, or had some recently. */
struct kecho_peer {
    struct kecho_address address;
    uint32_t connections;
    uint32_t chain;        /* the next one of the same bucket, or KECHO_NO_PEER */
    uint32_t tokens_milli; /* thousandths of connections that it may open at once */
    uint32_t refilled_ms;  /* low 32 bits of the clock */
    uint32_t idle_next;    /* in the list of peers without connections, longest idle first; */
    uint32_t idle_prev;    /* of a free record, idle_next is the next free one */
};

#define KECHO_IDLE_PEERS_MOST 65536

struct kecho_access {
    struct kecho_rules rules;
    uint32_t per_address; /* connections of one address at once; 0: any number */
    uint32_t rate_per_s;  /* connections that one address may open a second; 0: any number */
    struct kecho_hash_key hash_key;
    pthread_mutex_t lock; /* guards the fields below */
    struct kecho_peer *peers;
    uint32_t *buckets;   /* index of the first peer, or KECHO_NO_PEER */
    uint32_t capacity;   /* of `peers`, and of `buckets`: a power of two, or 0 */
    uint32_t high_water; /* peers ever used */
    uint32_t free_head;
    uint32_t idle_head, idle_tail, idle_count;
};

/* ---- control: shared by all threads of a run ---------------------------------- */

struct kecho_control {
    uint32_t phase;             /* atomic: enum kecho_phase, only ever grows */
    uint64_t deadline_ms;       /* atomic: end of the drain, on the clock of clock_now_ms() */
    uint32_t active;            /* atomic: open connections in all queues */
    uint32_t paused;            /* atomic: listeners that are LISTENER_PAUSED */
    uint32_t workers_accepting; /* atomic: workers that have not seen the stop yet */
    uint32_t unaccepted; /* clients that were still in an accept queue at the end, and were reset */
    int32_t unaccepted_errno; /* of the accept4 that failed for them; 0: none did */
    uint32_t left_to_others;  /* clients in the accept queues of inherited listeners, at the stop */
    uint32_t max_connections; /* UINT32_MAX: no limit */
    uint32_t idle_timeout_ms; /* 0: none */
    uint32_t write_timeout_ms;   /* 0: none */
    uint32_t finish_timeout_ms;  /* of a FINISHING connection without progress */
    uint64_t queue_buffer_bytes; /* bound for all buffers of a queue */
    uint64_t busy_poll_ns;       /* how long a worker polls after its last event; 0: it does not */
    uint32_t busy_poll_by_gaps;  /* poll only while events are that close together */
    uint32_t queue_count;
    uint32_t worker_count;
    uint32_t listener_count;
    struct kecho_queue *queues;
    struct kecho_worker *workers;
    struct kecho_listener *listeners;
    pthread_mutex_t listeners_lock; /* held while listeners are closed or queried */
    struct kecho_access access;
    struct kecho_engine engine;
    void *of_engine; /* what the engine keeps for a run */
};

/* ---- worker ------------------------------------------------------------------------------ */

enum kecho_close_reason {
    CLOSE_EOF = 0,   /* the client sent its FIN, everything was echoed */
    CLOSE_RESET,     /* the client reset it */
    CLOSE_TIMED_OUT, /* the kernel gave up on the client (retransmission) */
    CLOSE_IDLE,      /* idle_timeout */
    CLOSE_STALLED,   /* write_timeout: the client has taken nothing for that time */
    CLOSE_EVICTED,   /* max_buffer_memory: the slowest reader */
    CLOSE_DRAINED,   /* the server stopped, everything received was echoed */
    CLOSE_ABORTED,   /* the server stopped before everything was echoed */
    CLOSE_ERROR,     /* anything else; also counted as an error */
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

/* Written by one worker, with relaxed stores; read by any thread. */
struct kecho_counters {
    uint64_t accepted;
    uint64_t bytes_received;
    uint64_t bytes_sent;
    uint64_t echoes;       /* chunks, as recv returned them, that were sent back whole */
    uint64_t backpressure; /* times that the socket had no room for everything */
    uint64_t accept_pauses;
    uint64_t closed[CLOSE_REASONS];
    uint64_t errors[ERROR_KINDS];
    uint64_t refused[REFUSALS];
} __attribute__((aligned(KECHO_CACHE_LINE)));

#define KECHO_BUFFER_BYTES 65536
#define KECHO_STREAMS_MOST 8 /* streams that a worker keeps */

struct kecho_worker {
    struct kecho_counters counters;
    struct kecho_control *control __attribute__((aligned(KECHO_CACHE_LINE)));
    struct kecho_queue *queue;
    uint8_t *buffer; /* KECHO_BUFFER_BYTES, for recv and send */
    /* Connections that it owns and that have more to read (epoll/streams.pxd). */
    struct kecho_connection *streams[KECHO_STREAMS_MOST];
    uint32_t stream_count;
    uint32_t turns_in_a_row; /* of the first stream */
    uint32_t stream_turns;   /* of streams that the last wait reported */
    uint32_t has_served;     /* the last wait returned events */
    uint64_t now_ms;         /* when the last wait returned */
    uint64_t resume_at_ms;   /* when to resume paused listeners; 0: none is paused */
    uint64_t greet_until_ms; /* in a drain: until when a new connection may send its first bytes */
    uint64_t serve_again_ms; /* in a drain: when to serve all connections again; 0: never */
    uint64_t idle_since_ns;  /* busy polling: when the last event had been served */
    uint64_t mean_gap_ns;    /* busy polling: recent average from there to the next event */
    uint64_t rest_until_ns;  /* busy polling: no sched_yield() before, others want this CPU */
    uint32_t index;
    uint32_t is_draining;
    uint32_t listeners_left; /* at the stop: listeners whose accept queue is not empty */
    int32_t accept_errno;    /* errno of the accept4 that failed for one of them */
    int32_t fatal_errno;     /* why the worker gave up; read after its thread has ended */
    const char *fatal_syscall;
    void *of_engine; /* what the engine keeps for a worker */
    uint32_t active __attribute__((aligned(KECHO_CACHE_LINE))); /* atomic: written by all */
};

_Static_assert(offsetof(struct kecho_worker, active) % KECHO_CACHE_LINE == 0,
               "what other workers write has a cache line of its own");

#endif
