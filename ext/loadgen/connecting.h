/* How a connection is established: connect, retry, time out.
 *
 * All of it runs on the client's thread and never blocks. What goes wrong is counted and ends the
 * connection.
 */
#ifndef KECHO_LOADGEN_CONNECTING_H
#define KECHO_LOADGEN_CONNECTING_H

#include "client.h"

/* Takes over an established, non-blocking socket as connection 0, on which the first message has
 * been echoed. Call it before run_open. connect_ns: how long the connect took. Returns 0, or
 * -errno after closing the socket. */
int connecting_adopt(struct client *client, int fd, uint64_t connect_ns);

/* Calls connect. The connection's time counts from here. */
void connecting_begin(struct client *client, struct connection *connection);

/* Schedules a connect at `at_ns`. The caller has counted it in client->connecting. */
void connecting_retry_at(struct client *client, struct connection *connection, uint64_t at_ns);

/* Handles the event that a connect has succeeded or failed. */
void connecting_finish(struct client *client, struct connection *connection);

/* Calls connect where it is due, and fails a connect that has taken longer than `timeout_ns`. The
 * connection is CONNECTING or RETRY. */
void connecting_tick(struct client *client, struct connection *connection, uint64_t now,
                     uint64_t timeout_ns);

#endif
