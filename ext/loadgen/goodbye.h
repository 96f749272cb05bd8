/* The end of a connection that has got its last reply: nothing else may come.
 *
 * With FIN it is ended, by default, in two steps: ours is sent at once, and what the peer still
 * sends up to its own is read when the figures are complete, so that they do not contain it. An
 * echo server ends a connection that its client has ended; one that does not is not waited for
 * longer than the timeout.
 */
#ifndef KECHO_LOADGEN_GOODBYE_H
#define KECHO_LOADGEN_GOODBYE_H

#include "client.h"

/* Sends our FIN: the connection is ENDING, or CLOSED if the peer has reset it. */
void goodbye_say(struct client *client, struct connection *connection);

/* Closes at once, after a look at what has come: with FIN, or with RST where that is asked for. */
void goodbye_close(struct client *client, struct connection *connection);

/* Reads every connection that is ENDING to its end, until the timeout or client_stop at most. 0 or
 * -errno. */
int goodbye_wait(struct client *client);

#endif
