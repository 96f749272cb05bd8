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

/* A reply that counts has come. */
static inline void put_in_the_figures(struct client *client, uint64_t now) {
    count(&client->counters.echoes, 1);
    atomic_u64_store_relaxed(&client->counters.last_reply_ns, now);
}

static inline struct message message_of(const struct client *client,
                                        const struct connection *connection, uint64_t sequence) {
    return (struct message){.sequence = sequence,
                            .connection = connection->number,
                            .seed = client->settings.seed,
                            .length = client->settings.length};
}

/* Begins a connection: its time counts from here. */
void traffic_connect(struct client *client, struct connection *connection);

/* The same connect once more: `began_ns` stays what it was. */
void traffic_try_connect(struct client *client, struct connection *connection);

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
