/* The messages of a connection: which may be sent, when each was due, what it holds. */
#ifndef KECHO_LOADGEN_MESSAGE_H
#define KECHO_LOADGEN_MESSAGE_H

#include "client.h"
#include "payload.h"

enum { MOST_STAMPS = 1 << 16 }; /* messages due and not settled, on one connection */

static inline struct message message_of(const struct client *client,
                                        const struct connection *connection, uint64_t sequence) {
    return (struct message){.sequence = sequence,
                            .connection = connection->number,
                            .shown = client->settings.seed.shown,
                            .key = &client->settings.seed.key,
                            .length = client->settings.length,
                            .line = client->settings.line};
}

/* Lets the connection send one more message, due at `due_ns`. Counts ERROR_OVERRUN instead when
 * MOST_STAMPS messages are waiting already or there is no memory. */
void message_allow(struct client *client, struct connection *connection, uint64_t due_ns);

/* Returns whether nothing has moved on the connection for more than `timeout_ns` although a reply
 * is awaited. Where the client reconnects, messages that are not sent yet count as well. */
bool message_has_timed_out(const struct client *client, const struct connection *connection,
                           uint64_t now, uint64_t timeout_ns);

#endif
