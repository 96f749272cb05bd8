/* How errors are counted, and how they end a connection. */
#ifndef KECHO_LOADGEN_FAILURE_H
#define KECHO_LOADGEN_FAILURE_H

#include "client.h"

/* Counts an error, and keeps the first one in full. The connection stays as it is. error: errno,
 * or 0. */
void failure_note(struct client *client, const struct connection *connection, enum error_kind kind,
                  int error);

/* Ends a connection before its work is done: counts the error, closes the socket, gives up what is
 * not answered. If the peer has ended it between two replies and the client reconnects, nothing is
 * counted: the connection becomes CLOSED, and what is outstanding is sent again on the next one.
 * error: errno, or 0. */
void failure_end(struct client *client, struct connection *connection, enum error_kind kind,
                 int error);

/* Returns ERROR_SHORT in the middle of a reply, otherwise `kind`. */
enum error_kind failure_kind(const struct connection *connection, enum error_kind kind);

#endif
