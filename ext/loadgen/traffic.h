/* What a client does on one of its connections: connect, send, receive and compare, fail.
 *
 * All of it runs on the client's thread and never blocks; whatever goes wrong ends the connection
 * and is counted.
 */
#ifndef KECHO_LOADGEN_TRAFFIC_H
#define KECHO_LOADGEN_TRAFFIC_H

#include "client.h"
#include "payload.h"

enum { BUFFER_BYTES = 64 * 1024 };

static inline void count(uint64_t *counter, uint64_t amount) {
    atomic_u64_add_single_writer(counter, amount);
}

static inline void record(struct client *client, enum latency which, uint64_t value_ns) {
    histogram_record(&client->histograms[which], value_ns);
}

static inline bool is_stopped(const struct client *client) {
    return atomic_u32_load_relaxed(&client->stop) != 0;
}

static inline bool is_measured(const struct client *client, uint64_t now) {
    return now >= client->measure_ns && now < client->end_ns;
}

/* Whether a message counts: by when it was due in an open loop, when it was sent in a closed one,
 * and when its connection was begun where there is one for each message. A stream counts bytes. */
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

/* A reply that counts has come. */
static inline void put_in_the_figures(struct client *client) {
    count(&client->counters.echoes, 1);
    if (client->settings.mode != MODE_STREAM)
        count(&client->counters.bytes_received, client->settings.length);
}

/* Closed: the part of a message's time that lies on the other side of an end of the measured time
 * than the figure that counts it. */
static inline void note_carried(struct client *client, const struct stamp *stamp, uint64_t now) {
    if (stamp->sent_ns < client->measure_ns && now > client->measure_ns) {
        uint64_t until_ns = now < client->end_ns ? now : client->end_ns;
        count(&client->counters.carried_in_ns, until_ns - client->measure_ns);
    } else if (is_measured(client, stamp->sent_ns) && now > client->end_ns) {
        count(&client->counters.carried_out_ns, now - client->end_ns);
    }
}

static inline struct message message_of(const struct client *client,
                                        const struct connection *connection, uint64_t sequence) {
    return (struct message){.sequence = sequence,
                            .connection = connection->number,
                            .seed = client->settings.seed,
                            .length = client->settings.length,
                            .line = client->settings.line};
}

/* Has the events of the connection's socket looked at. 0, or -1 and errno. */
int traffic_watch(struct client *client, struct connection *connection);

/* Begins a connection: its time counts from here. */
void traffic_connect(struct client *client, struct connection *connection);

/* The same connect once more: `began_ns` stays what it was. */
void traffic_try_connect(struct client *client, struct connection *connection);

/* Has a connect called at `at_ns`. */
void traffic_retry_at(struct client *client, struct connection *connection, uint64_t at_ns);

/* After the event that a connect has ended, one way or the other. */
void traffic_finish_connect(struct client *client, struct connection *connection);

/* Lets the connection send one more message, due at `due_ns`. */
void traffic_allow(struct client *client, struct connection *connection, uint64_t due_ns);

/* Sends what is allowed. True when it stopped only to let others have their turn. */
bool traffic_send(struct client *client, struct connection *connection);

/* traffic_send, and the list of those with more to do. */
void traffic_send_more(struct client *client, struct connection *connection);

void traffic_push_ready(struct client *client, struct connection *connection);

/* Reads what is there, to the end of the stream if `to_end`, and compares it. True when it stopped
 * only to let others have their turn. */
bool traffic_receive(struct client *client, struct connection *connection, bool to_end);

/* Counts an error, and keeps the first. error: errno, or 0. */
void traffic_note_error(struct client *client, const struct connection *connection,
                        enum error_kind kind, int error);

/* The connection ends before its work is done. error: errno, or 0. */
void traffic_fail(struct client *client, struct connection *connection, enum error_kind kind,
                  int error);

/* Counts an error, and keeps the first one in full; the connection stays as it is. */
void traffic_note_error(struct client *client, const struct connection *connection,
                        enum error_kind kind, int error);

/* `kind`, or ERROR_SHORT in the middle of a reply. */
enum error_kind traffic_kind_of_ending(const struct connection *connection, enum error_kind kind);

#endif
