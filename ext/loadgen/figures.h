/* What a client counts, and which messages are in its figures.
 *
 * Times are CLOCK_MONOTONIC in ns. Everything here runs on the client's thread, unless the counters
 * and histograms are read: those are for any thread.
 */
#ifndef KECHO_LOADGEN_FIGURES_H
#define KECHO_LOADGEN_FIGURES_H

#include "client.h"

static inline void count(uint64_t *counter, uint64_t amount) {
    atomic_u64_add_single_writer(counter, amount);
}

static inline void record(struct client *client, enum latency which, uint64_t value_ns) {
    histogram_record(&client->histograms[which], value_ns);
}

static inline bool is_stopped(const struct client *client) {
    return atomic_u32_load_relaxed(&client->stop) != 0;
}

/* Returns whether `at_ns` lies within the measured time. */
static inline bool is_measured(const struct client *client, uint64_t at_ns) {
    return at_ns >= client->measure_ns && at_ns < client->end_ns;
}

/* Returns whether a message is in the figures. What decides is when it was due in an open loop,
 * when it was sent in a closed loop, and when its connection was begun where each message has one
 * of its own. A stream counts bytes, not messages. */
static inline bool is_in_the_figures(const struct client *client,
                                     const struct connection *connection,
                                     const struct stamp *stamp) {
    switch (client->settings.mode) {
    case MODE_OPEN:
        return is_measured(client, stamp->due_ns);
    case MODE_CLOSED:
        return is_measured(client, stamp->sent_ns);
    case MODE_BURST:
        return client->start_ns >= client->measure_ns;
    case MODE_CONNECT:
        return connection->began_ns >= client->measure_ns;
    case MODE_IDLE:
        return true;
    default:
        return false;
    }
}

/* Counts a complete reply that is in the figures. */
static inline void put_in_the_figures(struct client *client) {
    count(&client->counters.echoes, 1);
    if (client->settings.mode != MODE_STREAM)
        count(&client->counters.bytes_received, client->settings.length);
}

/* Closed loop: counts the part of a message's time that lies outside the measured time although
 * the message is in the figures, or inside although it is not. */
static inline void note_carried(struct client *client, const struct stamp *stamp, uint64_t now) {
    if (stamp->sent_ns < client->measure_ns && now > client->measure_ns) {
        uint64_t until_ns = now < client->end_ns ? now : client->end_ns;
        count(&client->counters.carried_in_ns, until_ns - client->measure_ns);
    } else if (is_measured(client, stamp->sent_ns) && now > client->end_ns) {
        count(&client->counters.carried_out_ns, now - client->end_ns);
    }
}

#endif
