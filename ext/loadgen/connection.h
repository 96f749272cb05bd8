/* One connection of a client: its socket, and how many messages it has sent and had answered.
 *
 * Functions return 0 or -errno, and none blocks. What a workload does with a reply is decided in
 * stream.c and datagram.c.
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
    CONNECTION_DONE,   /* has its last reply; loop_after_turn ends it */
    CONNECTION_ENDING, /* has sent FIN and awaits the peer's: ending.h */
    CONNECTION_RETRY,  /* connect is called again at retry_ns */
    CONNECTION_FAILED, /* ended by an error; stays closed */
};

/* When a message was due, and when its first byte was handed to the kernel. */
struct stamp {
    uint64_t due_ns;
    uint64_t sent_ns;
};

/* Messages are numbered from 0. Messages before `sent` have been sent, and sent_bytes bytes of the
 * next one. Replies before `replied` have come, and replied_bytes bytes of the next one.
 * replied <= sent <= allowed. */
struct connection {
    int fd; /* -1 unless CONNECTING, OPEN, DONE or ENDING */
    uint8_t state;
    bool is_ready;     /* on the client's list of connections with more to do */
    bool wants_room;   /* send failed with EAGAIN, and no EPOLLOUT has come since */
    bool has_replied;  /* a reply has come since the connection was established */
    bool watches_room; /* EPOLLOUT is registered */
    uint32_t number;
    uint32_t sent_bytes;
    uint32_t replied_bytes;
    uint64_t allowed;
    uint64_t sent;
    uint64_t replied;
    uint64_t resent;   /* messages before this one were first sent on an earlier connection */
    uint64_t began_ns; /* when connect was called */
    uint64_t retry_ns; /* RETRY: when to call connect next */
    /* When bytes came last, or when a message became due or was sent with none outstanding. The
     * timeout counts from here; a new connection for outstanding messages does not change it. */
    uint64_t moved_ns;
    /* Stamps of the messages replied..allowed, at index message & stamp_mask. Points to `one` until
     * more are needed at once. */
    struct stamp *stamps;
    uint64_t stamp_mask;
    struct stamp one;
    /* Datagrams, which are answered in any order. The messages before `replied` are settled:
     * answered or lost. Of the messages replied..sent, some may have been answered. */
    uint64_t outstanding; /* sent and neither answered nor lost */
    uint64_t highest;     /* the latest message that was answered */
    uint64_t lost;        /* bit k: message replied - 1 - k was lost; cleared by its late reply */
};

union address {
    struct sockaddr any;
    struct sockaddr_in v4;
    struct sockaddr_in6 v6;
    struct sockaddr_un local;
    struct sockaddr_storage storage;
};

/* Opens a non-blocking socket, binds it to `source` (NULL: the kernel chooses), and calls connect.
 * The kernel always chooses the port. Returns 0: connected; -EINPROGRESS: under way; any other
 * -errno: failed, with nothing left open. */
int connection_connect(struct connection *connection, const union address *server,
                       socklen_t server_size, const union address *source, socklen_t source_size,
                       bool datagrams);

/* Returns 0 when the connect has succeeded, otherwise the socket's pending error as -errno. */
int connection_connect_result(const struct connection *connection);

/* Closes the socket: with FIN, or with RST where the protocol has one (SO_LINGER 0, socket(7)). */
void connection_close(struct connection *connection, bool by_reset);

/* Makes room for the stamp of message `allowed`. Returns 0, -ENOMEM, or -ENOBUFS when `most` stamps
 * are in use. */
int connection_reserve_stamp(struct connection *connection, uint64_t most);

/* Returns the stamp of a message from `replied` to `allowed`. */
static inline struct stamp *connection_stamp(struct connection *connection, uint64_t message) {
    return &connection->stamps[message & connection->stamp_mask];
}

/* Forgets the messages that will not be answered. The next one has a new number. */
void connection_forget_messages(struct connection *connection);

/* Frees the stamps. The socket stays as it is. */
void connection_free(struct connection *connection);

#endif
