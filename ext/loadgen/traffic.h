/* What a client does on an open connection, whether it carries a stream or datagrams.
 *
 * Only this file pair chooses between stream.h and datagram.h. All of it runs on the client's
 * thread and never blocks.
 */
#ifndef KECHO_LOADGEN_TRAFFIC_H
#define KECHO_LOADGEN_TRAFFIC_H

#include "client.h"

/* Lets the connection send one more message, due at `due_ns`. */
void traffic_allow(struct client *client, struct connection *connection, uint64_t due_ns);

/* Sends what is allowed. Returns true when it stopped only to let other connections have their
 * turn. */
bool traffic_send(struct client *client, struct connection *connection);

/* Sends what is allowed, and lists the connection as ready if there is more to do. */
void traffic_send_more(struct client *client, struct connection *connection);

/* Lists the connection as ready: it has a turn after the next look at the sockets. */
void traffic_push_ready(struct client *client, struct connection *connection);

/* Reads and compares replies, to the end of the stream if `to_end`. Returns true when it stopped
 * only to let other connections have their turn. */
bool traffic_receive(struct client *client, struct connection *connection, bool to_end);

/* Gives up what has waited for longer than `timeout_ns`: a stream ends with an error, a datagram is
 * lost. */
void traffic_tick(struct client *client, struct connection *connection, uint64_t now,
                  uint64_t timeout_ns);

/* Ends the run of the connections: what is still awaited as a datagram is lost. */
void traffic_give_up(struct client *client);

#endif
