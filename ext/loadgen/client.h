/* A client: one thread that drives some connections and measures them.
 *
 * client_open, client_run, client_burst and client_close are called one after the other by the
 * thread that owns the client; client_stop, the counters and the histograms are for any thread at
 * any time. All times are CLOCK_MONOTONIC in ns. Nothing here knows Python.
 */
#ifndef KECHO_LOADGEN_CLIENT_H
#define KECHO_LOADGEN_CLIENT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "connection.h"
#include "histogram.h"

enum mode { MODE_BURST, MODE_CLOSED, MODE_OPEN, MODE_STREAM, MODE_CONNECT, MODE_IDLE, MODES };
extern const char *const mode_names[MODES];

/* Why a connection failed, or a message was not sent. The names in error_names. */
enum error_kind {
    ERROR_REFUSED,
    ERROR_CONNECT_TIMEOUT,
    ERROR_NO_DESCRIPTORS,
    ERROR_NO_PORTS,
    ERROR_CONNECT, /* any other reason why there is no connection */
    ERROR_CLOSED,  /* by the peer, with FIN, between replies */
    ERROR_RESET,   /* by the peer */
    ERROR_TIMEOUT, /* no byte of the reply came */
    ERROR_SHORT,   /* some bytes of the reply came, then none, or the end */
    ERROR_EXTRA,   /* bytes came that nobody had sent */
    ERROR_CORRUPT, /* from here: payload_fault, in its order */
    ERROR_FOREIGN,
    ERROR_REPEATED,
    ERROR_REORDERED,
    ERROR_OVERRUN, /* more messages due on one connection than are kept in mind */
    ERROR_OTHER,   /* a system call failed in another way */
    ERROR_KINDS,
};
extern const char *const error_names[ERROR_KINDS];

enum latency {
    LATENCY_RESPONSE,
    LATENCY_SERVICE,
    LATENCY_CONNECT,
    LATENCY_FIRST_ECHO,
    LATENCY_LATENESS,
    LATENCIES
};
extern const char *const latency_names[LATENCIES];

struct settings {
    enum mode mode;
    union address server;
    socklen_t server_size;
    union address *sources; /* connection k starts from sources[k % source_count] */
    size_t source_count;    /* 0: the kernel chooses */
    socklen_t source_size;
    uint32_t first_number;     /* connections are numbered from here */
    uint32_t connection_count; /* at least 1 */
    uint32_t connects_at_once; /* while opening; burst knows no limit */
    uint32_t seed;             /* the run's, in every payload */
    uint32_t length;           /* of a message, bytes, at least 1 */
    uint32_t depth;            /* messages outstanding on a connection, at most */
    uint64_t timeout_ns;       /* for a connect, and without a byte of a reply */
    double interval_ns;        /* open loop: message k of the whole run is due at start + k * it */
    uint64_t schedule_first;   /* open loop: this client's first message, and */
    uint64_t schedule_step;    /* how many clients share the schedule */
    bool datagrams;            /* UDP: closed and open loop */
    bool line;                 /* messages are lines */
    bool verify;
    bool spin;
    bool close_by_reset;
    bool reconnect; /* closed and open: after the peer has ended a connection between replies */
    bool keep_ends; /* remember the local end of each connection closed with FIN */
};

/* Written by the client's thread, read by any: atomics.h, single writer. */
struct client_counters {
    uint64_t opened; /* connections established */
    uint64_t open_now;
    uint64_t echoes;         /* complete replies that are in the figures */
    uint64_t replies;        /* complete replies, warm-up and drain included */
    uint64_t sent;           /* messages that have gone, in the figures or not */
    uint64_t bytes_sent;     /* of messages in the figures; stream: within the measured time */
    uint64_t bytes_received; /* likewise */
    uint64_t unanswered; /* messages lost with their connection, or still waited for at the end */
    /* Of datagrams: in the figures those lost, all the others. */
    uint64_t lost;       /* no reply within the timeout */
    uint64_t late;       /* a reply that came after that */
    uint64_t duplicates; /* a further reply to the same message */
    uint64_t reordered;  /* a reply that a later message's has overtaken */
    uint64_t ended_ns;   /* when it stopped sending: at the end, or earlier; 0: not yet */
    uint64_t waited_ns;  /* time without anything to do, where `spin` */
    uint64_t cpu_ns;     /* CPU time of the thread in client_run or client_burst */
    uint64_t running_ns; /* time in them, from the start that was asked for */
    uint64_t queued_ns;  /* of it, ready to run and without a CPU; 0: the kernel does not say */
    uint64_t away_ns;    /* the longest stretch between two looks at the sockets, not asked for */
    uint64_t between_ns; /* closed: from a reply to when the next message goes, added up */
    /* Closed: of the time that messages were outstanding, what lies within the measured time of
     * those that are not in the figures, and beyond it of those that are. */
    uint64_t carried_in_ns, carried_out_ns;
    uint64_t owed_half, owed; /* open: outstanding at half of the measured time, and at its end */
    uint64_t reconnects;      /* connections that the peer ended, and that were opened anew */
    uint64_t unended;         /* connections whose peer did not end them after our FIN */
    uint64_t errors[ERROR_KINDS];
};

/* The first error that a client met, in full. */
struct first_error {
    enum error_kind kind;
    int error; /* errno, or 0 */
    bool happened;
    bool has_bytes; /* offset, expected and found mean something */
    uint8_t expected;
    uint8_t found;
    uint32_t connection;
    uint32_t offset; /* in the message */
    uint64_t sequence;
    uint64_t at_ns;
};

/* The local end of a connection that was closed with FIN, which is in TIME_WAIT for a minute. */
struct local_end {
    uint8_t address[16]; /* IPv4: the first four */
    uint8_t port[2];     /* big-endian */
    uint8_t cookie[8];   /* SO_COOKIE, host byte order; the TIME_WAIT socket keeps it */
};
enum { MOST_ENDS = 1 << 17 };

/* A connection's times in the last burst, ns; 0 where it did not get so far. */
struct burst_sample {
    uint64_t connect_ns;    /* connect called -> established */
    uint64_t first_echo_ns; /* message sent -> reply complete */
    uint64_t response_ns;   /* the instant of the burst -> reply complete */
};

struct client {
    struct settings settings;
    struct client_counters counters;
    struct histogram histograms[LATENCIES];
    struct first_error first_error; /* read it when the client's thread has come back */
    uint32_t stop;                  /* atomic flag */

    struct connection *connections;
    struct burst_sample *samples; /* burst: one for each connection */
    uint32_t *ready;              /* connections with more to do: a ring */
    uint32_t ready_first, ready_count;
    struct local_end *ends;           /* keep_ends: a ring of MOST_ENDS */
    uint64_t ends_written, ends_read; /* atomic: by this thread, by client_take_ends */
    uint8_t *buffer; /* what is received, or about to be sent: never both at once */
    int epoll_fd;

    uint32_t connecting; /* in CONNECTING or RETRY */
    uint32_t ending;     /* in ENDING */
    uint32_t next_unopened;
    uint64_t pending;  /* messages allowed and not answered, of connections still open */
    uint64_t attempts; /* connects so far, for the source addresses */
    uint64_t start_ns, measure_ns, end_ns;
    uint64_t schedule_next; /* open loop: the next message of this client */
    uint32_t schedule_turn; /* open loop: the connection whose turn it is */
    uint32_t check_next;    /* idle: the next connection to ask whether it still lives */
    uint64_t tick_ns;       /* when to look for timeouts next */
    uint64_t turn_ns;       /* when this turn of the loop began, or should have begun */
    uint64_t cpu_before_ns, queued_before_ns; /* of the thread, when the measurement began */
    bool no_pwait2;                           /* epoll_pwait2 is not there: Linux < 5.11 */
    bool opening;                             /* in client_open */
};

/* 0, or -errno. The client takes over `sources` in any case. */
int client_init(struct client *client, const struct settings *settings);

/* Takes over an established, non-blocking socket as connection 0, on which the first message has
 * been echoed. Before client_open; connect_ns: how long its connect took. 0, or -errno, and then
 * the socket is closed. */
int client_adopt(struct client *client, int fd, uint64_t connect_ns);

/* Establishes every connection; returns when each is open or has failed. 0, or -errno when the
 * client cannot go on at all. */
int client_open(struct client *client);

/* From start_ns to end_ns the workload, then until the last reply is there or has timed out. What
 * is sent or due from measure_ns on is in the figures. */
int client_run(struct client *client, uint64_t start_ns, uint64_t measure_ns, uint64_t end_ns);

/* One burst at start_ns: connect, echo, close, on every connection. */
int client_burst(struct client *client, uint64_t start_ns, bool measured);

/* Closes every connection. */
void client_close(struct client *client);

/* Copies up to `most` local ends that have not been taken yet, returns how many. One thread at a
 * time, which need not be the client's; ends that find no room in the ring are forgotten. */
size_t client_take_ends(struct client *client, struct local_end *out, size_t most);

/* Makes the calls above return soon. Any thread. */
void client_stop(struct client *client);

/* After everything else. */
void client_free(struct client *client);

#endif
