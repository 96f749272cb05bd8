/* How a connection ends after its last reply, when nothing more may come.
 *
 * By default it ends with FIN, in two steps. The client's FIN is sent at once. What the peer still
 * sends before its own FIN is read when the figures are complete, so that they do not contain it.
 * An echo server closes a connection after its client's FIN. For one that does not, the client
 * waits no longer than the timeout.
 */
#ifndef KECHO_LOADGEN_ENDING_H
#define KECHO_LOADGEN_ENDING_H

#include "client.h"

/* Sends the client's FIN. The connection becomes ENDING, or CLOSED if the peer has reset it. */
void ending_begin(struct client *client, struct connection *connection);

/* Reads what has come, then closes at once: with RST where `close_by_reset`, otherwise with FIN. */
void ending_close(struct client *client, struct connection *connection);

/* Reads every ENDING connection to its end, until the timeout or client_stop at most. Returns 0 or
 * -errno. */
int ending_wait(struct client *client);

#endif
