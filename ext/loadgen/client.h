/* A client: one thread that drives some connections and measures them.
 *
 * The thread that owns the client calls run_open, run_workload or run_burst, and client_close, one
 * after the other. Any thread may call client_stop, and read counters and histograms, at any
 * time. All times are CLOCK_MONOTONIC in ns. Nothing here knows Python.
 */
#ifndef KECHO_LOADGEN_CLIENT_H
#define KECHO_LOADGEN_CLIENT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "clock.h"
#include "connection.h"
#include "histogram.h"
#include "payload.h"

enum {
    BUFFER_BYTES = 64 * 1024, /* of client->buffer */
    EVENTS = 256,             /* taken from the kernel in one call */
};
#define TICK_NS (50 * MS)   /* how late timeouts and client_stop are noticed, at most */
#define STOP_NS (1000 * MS) /* how long what is under way may take after client_stop */

enum mode { MODE_BURST, MODE_CLOSED, MODE_OPEN, MODE_STREAM, MODE_CONNECT, MODE_IDLE, MODES };
extern const char *const mode_names[MODES];

/* Why a connection failed, or a message was not sent. error_names has the names. */
enum error_kind {
    ERROR_REFUSED,
    ERROR_CONNECT_TIMEOUT,
    ERROR_NO_DESCRIPTORS,
    ERROR_NO_PORTS,
    ERROR_CONNECT, /* connect failed for another reason */
    ERROR_CLOSED,  /* the peer sent FIN between replies */
    ERROR_RESET,   /* the peer sent RST */
    ERROR_TIMEOUT, /* no byte of the reply came */
    ERROR_SHORT,   /* some bytes of the reply came, then none, or the end */
    ERROR_EXTRA,   /* more bytes came than the client had sent */
    ERROR_CORRUPT, /* this and the next three: enum payload_fault, in its order */
    ERROR_FOREIGN,
    ERROR_REPEATED,
    ERROR_REORDERED,
    ERROR_OVERRUN, /* more messages due on one connection than MOST_STAMPS */
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
    uint32_t first_number;     /* of the first connection; the others follow */
    uint32_t connection_count; /* at least 1 */
    uint32_t connects_at_once; /* while opening, at least 1; a burst has no limit */
    struct payload_seed seed;  /* of the run, in every payload */
    uint32_t length;           /* of a message, 1 to 1 << 30 bytes */
    uint32_t depth;            /* messages outstanding on a connection, at most; at least 1 */
    uint64_t timeout_ns;       /* for a connect, and for the next byte of a reply */
    double interval_ns;        /* open loop: message k of the whole run is due at start + k * it */
    uint64_t schedule_first;   /* open loop: number of this client's first message */
    uint64_t schedule_step;    /* open loop: how many clients share the schedule, at least 1 */
    bool datagrams;            /* UDP; closed and open loop only */
    bool line;                 /* messages are lines of text */
    bool verify;               /* compare every byte of the replies */
    bool spin;                 /* poll instead of sleeping */
    bool close_by_reset;       /* with RST instead of FIN */
    bool reconnect;            /* closed and open loop: replace a connection that the peer ends */
    bool keep_ends;            /* remember the local end of each connection closed with FIN */
};

/* The client's thread writes them, any thread may read them: atomics.h, single writer. Times in
 * ns. */
struct client_counters {
    uint64_t opened; /* connections established */
    uint64_t open_now;
    uint64_t echoes;         /* complete replies that are in the figures */
    uint64_t replies;        /* complete replies, warm-up and drain included */
    uint64_t sent;           /* messages sent, in the figures or not */
    uint64_t bytes_sent;     /* of messages in the figures; stream: within the measured time */
    uint64_t bytes_received; /* likewise */
    uint64_t unanswered;     /* messages lost with their connection, or outstanding at the end */
    /* Datagrams. `lost` counts messages in the figures; the other three count all messages. */
    uint64_t lost;       /* no reply within the timeout */
    uint64_t late;       /* the reply came after the timeout */
    uint64_t duplicates; /* a further reply to the same message */
    uint64_t reordered;  /* the reply to a later message came first */
    uint64_t ended_ns;   /* when the client stopped sending; 0: not yet */
    uint64_t waited_ns;  /* `spin`: time without anything to do */
    uint64_t cpu_ns;     /* CPU time of the thread in run_workload or run_burst */
    uint64_t running_ns; /* time in them, from the start that was asked for */
    uint64_t queued_ns;  /* part of it: ready to run, without a CPU; 0 if the kernel does not say */
    uint64_t away_ns;    /* the longest unintended time between two looks at the sockets */
    uint64_t between_ns; /* closed: from a reply to the next message, added up */
    /* Closed: time for which messages were outstanding, added up: inside the measured time, of
     * messages that are not in the figures; and after it, of messages that are. */
    uint64_t carried_in_ns, carried_out_ns;
    uint64_t owed_half, owed; /* open: outstanding at half of the measured time, and at its end */
    uint64_t reconnects;      /* connections that the peer ended and the client replaced */
    uint64_t unended;         /* connections whose peer sent no FIN after the client's */
    uint64_t errors[ERROR_KINDS];
};

/* The first error of a client, in full. */
struct first_error {
    enum error_kind kind;
    int error; /* errno, or 0 */
    bool happened;
    bool has_bytes; /* expected and found are set */
    uint8_t expected;
    uint8_t found;
    uint32_t connection;
    uint32_t offset; /* in the message */
    uint64_t sequence;
    uint64_t at_ns;
};

/* The local end of a connection that was closed with FIN. It stays in TIME_WAIT for a minute. */
struct local_end {
    uint8_t address[16]; /* network byte order; IPv4: the first four bytes */
    uint8_t port[2];     /* big-endian */
    uint8_t cookie[8];   /* SO_COOKIE, host byte order; the TIME_WAIT socket keeps it */
};
enum { MOST_ENDS = 1 << 17 };

/* A connection's times in the last burst, in ns; 0 for a step that it did not reach. */
struct burst_sample {
    uint64_t connect_ns;    /* from connect to established */
    uint64_t first_echo_ns; /* from the message sent to the reply complete */
    uint64_t response_ns;   /* from the burst's start to the reply complete */
};

struct client {
    struct settings settings;
    struct client_counters counters;
    struct histogram histograms[LATENCIES];
    struct first_error first_error; /* to be read only while no thread is in a call */
    uint32_t stop;                  /* atomic flag */

    struct connection *connections;
    struct burst_sample *samples; /* burst: one for each connection */
    uint32_t *ready;              /* connections with more to do: a circular list of indices */
    uint32_t ready_first, ready_count;
    struct local_end *ends; /* keep_ends: a circular list of MOST_ENDS */
    uint64_t ends_written,
        ends_read;   /* atomic: this thread writes one, client_take_ends the other */
    uint8_t *buffer; /* BUFFER_BYTES, received or to be sent, never both at once */
    int epoll_fd;

    uint32_t connecting; /* in CONNECTING or RETRY */
    uint32_t ending;     /* in ENDING */
    uint32_t next_unopened;
    uint64_t pending;  /* messages allowed and not answered, on connections still open */
    uint64_t attempts; /* connects so far; chooses the source address */
    uint64_t start_ns, measure_ns, end_ns;
    uint64_t schedule_next; /* open loop: number of this client's next message */
    uint32_t schedule_turn; /* open loop: the connection whose turn it is */
    uint32_t check_next;    /* idle: the next connection that has to echo once */
    uint64_t tick_ns;       /* when to look for timeouts next */
    uint64_t turn_ns;       /* when this round of the loop began, or should have begun */
    uint64_t cpu_before_ns, queued_before_ns; /* of the thread, when the measurement began */
    bool no_pwait2;                           /* there is no epoll_pwait2: Linux < 5.11 */
    bool opening;                             /* the thread is in run_open */
};

/* Initialises a client. Returns 0 or -errno; client_free is due in any case. The client owns
 * settings->sources from here on, also after an error. */
int client_init(struct client *client, const struct settings *settings);

/* Closes every connection. */
void client_close(struct client *client);

/* Copies up to `most` local ends that have not been taken yet. Returns how many. Any thread, one at
 * a time. When MOST_ENDS have not been taken, further ones are not kept. */
size_t client_take_ends(struct client *client, struct local_end *out, size_t most);

/* Makes run_open, run_workload and run_burst return soon: STOP_NS at most. Any thread. */
void client_stop(struct client *client);

/* Frees everything, after client_init and when no thread is in a call. */
void client_free(struct client *client);

#endif
