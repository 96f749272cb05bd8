/* What a client sends and reads on a UDP socket, where replies come in any order, twice, late or
 * never.
 *
 * A message without a reply within the timeout is counted as lost; the connection goes on. The
 * header of a datagram says what it is: the reply to an outstanding message, a duplicate, the late
 * reply to a lost message, or wrong bytes, which are an error. A message stays outstanding until
 * its own reply or its timeout.
 */
#ifndef KECHO_LOADGEN_DATAGRAM_H
#define KECHO_LOADGEN_DATAGRAM_H

#include "client.h"

/* Lets the connection send one more message, due at `due_ns`. When the window is full, the oldest
 * outstanding messages are lost to make room. */
void datagram_allow(struct client *client, struct connection *connection, uint64_t due_ns);

/* Sends the messages that are allowed, up to `depth` outstanding. Returns true when it stopped only
 * to let other connections have their turn. */
bool datagram_send(struct client *client, struct connection *connection);

/* Reads and compares replies until the socket is empty; without `to_end`, only while a reply is
 * outstanding. Returns true when it stopped only to let other connections have their turn. */
bool datagram_receive(struct client *client, struct connection *connection, bool to_end);

/* Loses the messages that have waited for longer than the timeout, but none after client_stop.
 * Returns true when there were any and the connection is still open: it may send more. */
bool datagram_lose_overdue(struct client *client, struct connection *connection, uint64_t now);

/* Reads what has come on every connection; whatever is still outstanding is lost. */
void datagram_give_up(struct client *client);

#endif
