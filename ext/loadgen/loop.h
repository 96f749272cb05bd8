/* A client's event loop. */
#ifndef KECHO_LOADGEN_LOOP_H
#define KECHO_LOADGEN_LOOP_H

#include "client.h"
#include "clock.h"

enum { EVENTS = 256 };      /* taken from the kernel at once */
#define TICK_NS (50 * MS)   /* timeouts are seen, and client_stop heard, that late at most */
#define STOP_NS (1000 * MS) /* after client_stop, the longest wait for what is under way */

/* One round: waits for events until `until_ns` at most, serves them, looks for timeouts. 0 or
 * -errno. */
int loop_look(struct client *client, uint64_t until_ns);

/* Before a wait, and after the last turn: how long the sockets were not looked at. */
void loop_note_turn(struct client *client, uint64_t now);

/* After a connection's turn: closes it if it is done, and opens the next in its place. */
void loop_after_turn(struct client *client, struct connection *connection);

#endif
