/* What a client runs: opening its connections, its workload, a burst.
 *
 * Times are CLOCK_MONOTONIC in ns. The calls block the client's thread.
 */
#ifndef KECHO_LOADGEN_RUN_H
#define KECHO_LOADGEN_RUN_H

#include "client.h"

/* Establishes every connection. Returns 0 when each is open or has failed, or -errno when the
 * client cannot go on at all. */
int run_open(struct client *client);

/* Runs the workload from start_ns to end_ns, then waits until the last reply has come or timed out.
 * Messages sent or due from measure_ns on are in the figures. Returns 0 or -errno. */
int run_workload(struct client *client, uint64_t start_ns, uint64_t measure_ns, uint64_t end_ns);

/* Runs one burst at start_ns: connects, echoes and closes every connection. Returns 0 or -errno. */
int run_burst(struct client *client, uint64_t start_ns, bool measured);

#endif
