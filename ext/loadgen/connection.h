/* One connection of a client: its socket, what it has sent and what has come back.
 *
 * Functions return 0 or a count, or -errno; none blocks. What a workload does with a reply is
 * not known here: see client.c.
 */
#ifndef KECHO_LOADGEN_CONNECTION_H
#define KECHO_LOADGEN_CONNECTION_H

#include <netinet/in.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/socket.h>
#include <sys/un.h>

enum connection_state {
    CONNECTION_CLOSED,
    CONNECTION_CONNECTING,
    CONNECTION_OPEN,
    CONNECTION_DONE,   /* has got all it waited for; to be ended after the event */
    CONNECTION_ENDING, /* has sent FIN, and the peer's is awaited: goodbye.h */
    CONNECTION_RETRY,  /* connect is to be tried again at retry_ns */
    CONNECTION_FAILED, /* ended by an error, stays closed */
};

/* When a message was due and when the first of its bytes was handed to the kernel. */
struct stamp {
    uint64_t due_ns;
    uint64_t sent_ns;
};

/* Messages are numbered from 0; of message `sent`, sent_bytes bytes have gone, and of the reply
 * `replied`, replied_bytes have come. replied <= sent <= allowed. */
struct connection {
    int fd; /* -1 unless CONNECTING, OPEN, DONE or ENDING */
    uint8_t state;
    bool is_ready;     /* is on the client's list of connections with more to do */
    bool wants_room;   /* send has said EAGAIN, and no EPOLLOUT has come since */
    bool has_replied;  /* a reply has come since it was established */
    bool watches_room; /* EPOLLOUT is registered */
    uint32_t number;
    uint32_t sent_bytes;
    uint32_t replied_bytes;
    uint64_t allowed;
    uint64_t sent;
    uint64_t replied;
    uint64_t resent;   /* messages before this one have been sent on an earlier connection, too */
    uint64_t began_ns; /* when connect was called */
    uint64_t retry_ns; /* RETRY: when to call connect next */
    /* When bytes came, or a message was due or first sent with none outstanding. Another connection
     * for what is outstanding is no news of it. */
    uint64_t moved_ns;
    /* Stamps of the messages replied..allowed, at message & stamp_mask. `one` until there are
     * more at once. */
    struct stamp *stamps;
    uint64_t stamp_mask;
    struct stamp one;
    /* Datagrams, which are answered in any order: of the messages replied..sent some may have been
     * answered, the earlier ones have all been settled, one way or the other. */
    uint64_t outstanding; /* sent and neither answered nor lost */
    uint64_t highest;     /* the latest message that was answered */
    uint64_t lost;        /* bit k: message replied - 1 - k was lost, and its reply has not come */
};

union address {
    struct sockaddr any;
    struct sockaddr_in v4;
    struct sockaddr_in6 v6;
    struct sockaddr_un local;
    struct sockaddr_storage storage;
};

/* Opens a non-blocking socket, binds it to `source` (NULL: the kernel's choice; the port always
 * is), and calls connect. 0: connected, -EINPROGRESS: under way, otherwise it has failed and
 * nothing is left open. */
int connection_connect(struct connection *connection, const union address *server,
                       socklen_t server_size, const union address *source, socklen_t source_size,
                       bool datagrams);

/* The pending error of the socket, as -errno; 0 when the connect has succeeded. */
int connection_connect_result(const struct connection *connection);

/* With FIN, or with RST where the protocol has one (SO_LINGER 0, socket(7)). */
void connection_close(struct connection *connection, bool by_reset);

/* Makes room for the stamp of message `allowed`; -ENOMEM, or -ENOBUFS at `most` messages. */
int connection_reserve_stamp(struct connection *connection, uint64_t most);

static inline struct stamp *connection_stamp(struct connection *connection, uint64_t message) {
    return &connection->stamps[message & connection->stamp_mask];
}

/* Forgets messages that will not be answered; the next one has a number of its own. */
void connection_forget_messages(struct connection *connection);

/* Frees what the connection holds beside its socket. */
void connection_free(struct connection *connection);

#endif
