/* What a client sends and reads on a connection that carries a byte stream: TCP or AF_UNIX.
 *
 * Replies come in the order of the messages, and every byte of them is compared. A wrong byte ends
 * the connection with an error.
 */
#ifndef KECHO_LOADGEN_STREAM_H
#define KECHO_LOADGEN_STREAM_H

#include "client.h"

/* Sends the messages that are allowed, up to `depth` outstanding. Returns true when it stopped only
 * to let other connections have their turn. */
bool stream_send(struct client *client, struct connection *connection);

/* Reads and compares replies until the socket is empty; with `to_end`, until EAGAIN, the end of the
 * stream or an error says so. Returns true when it stopped only to let other connections have their
 * turn. */
bool stream_receive(struct client *client, struct connection *connection, bool to_end);

#endif
