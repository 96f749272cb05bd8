/* The UDP side's records: what they hold, who writes them, how they lie in memory.
 *
 *   control -> worker (a thread) -> its sockets, an inbox, an outbox
 *           -> limiter, which all the workers share
 */
#ifndef KECHO_UDP_LAYOUT_H
#define KECHO_UDP_LAYOUT_H

#include <netinet/in.h>
#include <poll.h>
#include <pthread.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/socket.h>
#include <sys/uio.h>

#include "common/life.h"
#include "common/memory.h"
#include "common/rules.h"
#include "common/siphash.h"
#include "udp/fingerprint.h"

/* ---- what is taken and given at once ----------------------------------------------------- */

#define KECHO_UDP_BATCH 32   /* messages of one recvmmsg; with GRO each may be many datagrams */
#define KECHO_UDP_REPLIES 64 /* messages of one sendmmsg */
#define KECHO_UDP_BUFFER_BYTES                                                                     \
    65536                           /* more than any datagram, and than what GRO makes of several */
#define KECHO_UDP_CONTROL_BYTES 128 /* the address asked (20 bytes at most), the segment size */
/* Of one send with UDP_SEGMENT. Linux 6.9 takes 128 of them; before, 64 were the most (read). */
#define KECHO_UDP_SEGMENTS 64

union kecho_udp_address {
    struct sockaddr any;
    struct sockaddr_in v4;
    struct sockaddr_in6 v6;
};

/* One for each worker, reused for every batch. */
struct kecho_udp_inbox {
    struct mmsghdr headers[KECHO_UDP_BATCH];
    struct iovec pieces[KECHO_UDP_BATCH];
    union kecho_udp_address sources[KECHO_UDP_BATCH];
    uint8_t control[KECHO_UDP_BATCH][KECHO_UDP_CONTROL_BYTES] __attribute__((aligned(8)));
    uint8_t *buffer; /* KECHO_UDP_BATCH times KECHO_UDP_BUFFER_BYTES */
};

/* Replies that have not gone yet. They point into the inbox: sent before it is filled again. */
struct kecho_udp_outbox {
    struct mmsghdr headers[KECHO_UDP_REPLIES];
    struct iovec pieces[KECHO_UDP_REPLIES];
    uint32_t datagrams[KECHO_UDP_REPLIES];     /* how many each of them is on the wire */
    uint32_t segment_bytes[KECHO_UDP_REPLIES]; /* 0: it is one */
    uint8_t control[KECHO_UDP_REPLIES][KECHO_UDP_CONTROL_BYTES] __attribute__((aligned(8)));
    uint32_t count;
};

union kecho_udp_asked {
    struct in_pktinfo v4;
    struct in6_pktinfo v6;
};

/* What a message of the inbox is. */
struct kecho_udp_request {
    uint8_t *data;
    union kecho_udp_address *source;
    uint32_t bytes;
    uint32_t segment_bytes; /* GRO: each datagram's but the last's; 0: it is one datagram */
    uint32_t datagrams;
    uint32_t has_asked; /* whether the kernel has said which address was asked */
    uint32_t hops;      /* it could still go: IPv4's time to live, IPv6's hop limit; 0: not said */
    uint32_t is_repeated; /* one of its datagrams came before, a moment ago */
    union kecho_udp_asked asked;
};

/* ---- counters ---------------------------------------------------------------------------- */

/* Why a datagram is not answered. */
enum kecho_udp_refusal {
    REFUSED_PORT = 0, /* source port 0 or below the lowest that is answered */
    REFUSED_OWN_PORT, /* source port is the server's own */
    REFUSED_ADDRESS,  /* broadcast, multicast, unspecified or reserved, on either side */
    REFUSED_DENIED,   /* allow, deny */
    REFUSED_RATE,     /* its source sends too many */
    REFUSED_TOTAL,    /* all sources together do */
    REFUSED_REPEATED, /* its source sends the same again and again, as a loop would */
    REFUSALS
};

enum kecho_udp_error_kind {
    UDP_ERROR_TRUNCATED = 0, /* longer than the buffer: an IPv6 jumbogram */
    UDP_ERROR_FULL,          /* EAGAIN: no room in the send buffer */
    UDP_ERROR_MEMORY,        /* ENOBUFS, ENOMEM: no room in a queue of the kernel's */
    UDP_ERROR_UNREACHABLE,   /* no way to the source, or ICMP said so of an earlier reply */
    UDP_ERROR_DENIED,        /* EPERM, EACCES: a firewall, or a broadcast address */
    UDP_ERROR_SEND,          /* any other errno of sendmmsg */
    UDP_ERROR_RECV,          /* a recvmmsg failed: the only one that is no lost reply */
    UDP_ERROR_KINDS
};

/* One writer, the worker; relaxed. Datagrams, not messages. */
struct kecho_udp_counters {
    uint64_t received;
    uint64_t sent;
    uint64_t bytes_received;
    uint64_t bytes_sent;
    uint64_t refused[REFUSALS];
    uint64_t errors[UDP_ERROR_KINDS];
} __attribute__((aligned(KECHO_CACHE_LINE)));

/* ---- limiter ----------------------------------------------------------------------------- */

#define KECHO_UDP_WAYS 4
#define KECHO_UDP_SETS 4096 /* 256 KiB for 16,384 sources */

/* A bucket of tokens, as the time when it is full again. One whose time has come is full, which
 * is what a source that was never seen has: to forget it loses nothing. */
struct kecho_udp_bucket {
    uint64_t source;  /* counted_hash() */
    uint64_t full_at; /* ticks: limiter.pxd */
};

struct kecho_udp_set {
    struct kecho_udp_bucket buckets[KECHO_UDP_WAYS];
} __attribute__((aligned(KECHO_CACHE_LINE)));

_Static_assert(sizeof(struct kecho_udp_set) == KECHO_CACHE_LINE, "a look-up is one cache miss");

/* A rate and how far ahead of it a bucket may run. interval_ticks 0: no limit. */
struct kecho_udp_rate {
    uint64_t interval_ticks; /* between two datagrams */
    uint64_t window_ticks;   /* the burst: interval times datagrams */
};

struct kecho_udp_limiter {
    pthread_mutex_t lock; /* taken once for a batch; guards all but the rates */
    struct kecho_udp_rate per_source;
    struct kecho_udp_rate total;
    struct kecho_hash_key hash_key; /* so that nobody can aim at one set */
    struct kecho_udp_bucket everybody;
    struct kecho_udp_set *sets; /* KECHO_UDP_SETS */
};

/* ---- repeats ----------------------------------------------------------------------------- */

#define KECHO_UDP_SEEN_WAYS 8
#define KECHO_UDP_SEEN_SETS 16384 /* 1 MiB for 131,072 datagrams */

/* Datagrams answered: the high half of a word is the high half of the fingerprint, the low half
 * the time in ms. Any worker writes them, relaxed: one that overwrites another's loses a memory. */
struct kecho_udp_seen_set {
    uint64_t datagrams[KECHO_UDP_SEEN_WAYS];
} __attribute__((aligned(KECHO_CACHE_LINE)));

_Static_assert(sizeof(struct kecho_udp_seen_set) == KECHO_CACHE_LINE, "a look-up is one miss");

struct kecho_udp_repeats {
    struct kecho_udp_seen_set *seen; /* KECHO_UDP_SEEN_SETS */
    pthread_mutex_t lock;            /* taken for a repeated datagram; guards what is below */
    struct kecho_udp_rate rate;      /* interval_ticks 0: repeats are like any other datagram */
    uint64_t chance;                 /* state of a xorshift generator, never 0 */
    struct kecho_udp_set *sources;   /* KECHO_UDP_SETS, by address and port */
};

/* ---- control ----------------------------------------------------------------------------- */

struct kecho_udp_socket {
    int32_t fd;            /* atomic: -1 once its worker has closed it */
    uint32_t worker;       /* index */
    uint64_t resume_at_ms; /* when to read again after an error; 0: it is read */
    uint64_t dropped;      /* atomic: what SO_MEMINFO said before it was closed */
};

struct kecho_udp_worker {
    struct kecho_udp_counters counters;
    struct kecho_udp_control *control;
    struct kecho_udp_socket *sockets;
    struct pollfd *polls; /* the eventfd, then the sockets */
    struct kecho_udp_inbox *inbox;
    struct kecho_udp_outbox *outbox;
    uint32_t socket_count;
    int32_t wake_fd;     /* eventfd, written when the phase changes, never read */
    int32_t fatal_errno; /* of poll, why the worker gave up; read after its thread was joined */
} __attribute__((aligned(KECHO_CACHE_LINE)));

struct kecho_udp_control {
    uint32_t phase;       /* atomic: enum kecho_phase, only ever grows */
    uint64_t deadline_ms; /* atomic: end of the drain, on the clock of clock_now_ms() */
    uint16_t own_port;
    uint16_t source_port_least;
    uint32_t worker_count;
    uint32_t socket_count;
    struct kecho_udp_worker *workers;
    struct kecho_udp_socket *sockets; /* in the order of their workers */
    struct kecho_udp_limiter limiter;
    struct kecho_udp_repeats repeats;
    struct kecho_udp_secret secret;
    struct kecho_rules rules;
};

#endif
