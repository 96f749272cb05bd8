/* A client's event loop: waits for events and timers, and gives each connection its turns. */
#ifndef KECHO_LOADGEN_LOOP_H
#define KECHO_LOADGEN_LOOP_H

#include "client.h"

/* Runs one round: waits for events until `until_ns` at most, handles them, looks for timeouts.
 * Returns 0 or -errno. */
int loop_look(struct client *client, uint64_t until_ns);

/* Notes how long the sockets were not looked at. Call it before a wait, and after the last turn. */
void loop_note_turn(struct client *client, uint64_t now);

/* Ends a connection's turn: closes the connection if it is done, and opens the next in its place.
 */
void loop_after_turn(struct client *client, struct connection *connection);

#endif
