#include "datagram.h"

#include <endian.h>
#include <errno.h>
#include <string.h>

#include "clock.h"
#include "failure.h"
#include "figures.h"
#include "message.h"

enum {
    DATAGRAMS_A_TURN = 64,
    REMEMBERED = 64, /* settled messages of which `lost` says whether they were lost */
};
#define ANSWERED UINT64_MAX /* as a stamp's sent_ns: the reply has come */

/* ---- the window: messages that are outstanding ----------------------------------------------- */

static void settle_first(struct connection *connection, bool was_lost) {
    connection->lost = connection->lost << 1 | was_lost;
    connection->replied++;
}

/* Settles the messages up to the first one that has not been answered. */
static void settle_answered(struct connection *connection) {
    while (connection->replied < connection->sent &&
           connection_stamp(connection, connection->replied)->sent_ns == ANSWERED)
        settle_first(connection, false);
}

/* Closed loop: allows a message in the place of one that was answered or lost. */
static void allow_next(struct client *client, struct connection *connection, uint64_t now) {
    if (client->settings.mode == MODE_CLOSED && now < client->end_ns && !is_stopped(client))
        datagram_allow(client, connection, now);
}

/* Loses the oldest outstanding message. The caller has checked that there is one: sent > replied.
 */
static void lose_first(struct client *client, struct connection *connection, uint64_t now) {
    if (is_in_the_figures(client, connection, connection_stamp(connection, connection->replied)))
        count(&client->counters.lost, 1);
    client->pending--;
    connection->outstanding--;
    settle_first(connection, true);
    settle_answered(connection);
    allow_next(client, connection, now);
}

void datagram_allow(struct client *client, struct connection *connection, uint64_t due_ns) {
    while (connection->allowed - connection->replied >= MOST_STAMPS &&
           connection->replied < connection->sent)
        lose_first(client, connection, now_ns());
    message_allow(client, connection, due_ns);
}

bool datagram_lose_overdue(struct client *client, struct connection *connection, uint64_t now) {
    if (is_stopped(client)) /* the client no longer waits, so nothing counts as lost */
        return false;
    bool has_lost = false;
    while (connection->state == CONNECTION_OPEN && connection->replied < connection->sent) {
        uint64_t sent_ns = connection_stamp(connection, connection->replied)->sent_ns;
        uint64_t lost_ns = sent_ns + client->settings.timeout_ns;
        if (now < lost_ns) {
            if (lost_ns < client->tick_ns)
                client->tick_ns = lost_ns;
            break;
        }
        lose_first(client, connection, now);
        has_lost = true;
    }
    return has_lost && connection->state == CONNECTION_OPEN;
}

void datagram_give_up(struct client *client) {
    for (uint32_t i = 0; i < client->settings.connection_count; i++) {
        struct connection *connection = &client->connections[i];
        for (unsigned turn = 0; turn < DATAGRAMS_A_TURN && connection->state == CONNECTION_OPEN;
             turn++)
            if (!datagram_receive(client, connection, true))
                break;
        while (connection->state == CONNECTION_OPEN && connection->replied < connection->sent)
            lose_first(client, connection, UINT64_MAX);
    }
}

/* ---- sending --------------------------------------------------------------------------------- */

static void note_sent(struct client *client, struct connection *connection, uint64_t now) {
    struct stamp *stamp = connection_stamp(connection, connection->sent);
    stamp->sent_ns = now;
    if (client->settings.mode == MODE_CLOSED && stamp->due_ns >= client->measure_ns)
        count(&client->counters.between_ns, now - stamp->due_ns);
    connection->sent++;
    connection->outstanding++;
    count(&client->counters.sent, 1);
    if (is_in_the_figures(client, connection, stamp))
        count(&client->counters.bytes_sent, client->settings.length);
}

bool datagram_send(struct client *client, struct connection *connection) {
    for (unsigned turn = 0; turn < DATAGRAMS_A_TURN; turn++) {
        if (connection->state != CONNECTION_OPEN || connection->wants_room ||
            connection->sent == connection->allowed ||
            connection->outstanding >= client->settings.depth)
            return false;
        struct message message = message_of(client, connection, connection->sent);
        payload_fill(client->buffer, &message, 0, message.length);
        uint64_t now = now_ns();
        /* ENOBUFS: a full queue on this host has dropped it. It counts as sent, and as lost. */
        if (send(connection->fd, client->buffer, message.length, MSG_NOSIGNAL) >= 0 ||
            errno == ENOBUFS)
            note_sent(client, connection, now);
        else if (errno == EAGAIN)
            connection->wants_room = true;
        else if (errno == ECONNREFUSED) /* an ICMP error for an earlier message */
            failure_end(client, connection, ERROR_REFUSED, errno);
        else if (errno != EINTR)
            failure_end(client, connection, ERROR_OTHER, errno);
    }
    return true;
}

/* ---- replies --------------------------------------------------------------------------------- */

/* Returns the message that a datagram's header names. */
static struct message message_named_by(const struct client *client, const uint8_t *bytes) {
    uint64_t sequence, origin;
    memcpy(&sequence, bytes, sizeof sequence);
    memcpy(&origin, bytes + sizeof sequence, sizeof origin);
    origin = le64toh(origin);
    return (struct message){.sequence = le64toh(sequence),
                            .connection = (uint32_t)origin,
                            .shown = (uint32_t)(origin >> 32),
                            .key = &client->settings.seed.key,
                            .length = client->settings.length};
}

/* Counts a datagram that is no reply to any message of this connection. */
static void note_wrong(struct client *client, struct connection *connection, enum error_kind kind,
                       const struct message *named, const uint8_t *bytes, uint32_t size) {
    bool is_first = !client->first_error.happened;
    failure_note(client, connection, kind, 0);
    if (!is_first)
        return;
    struct first_error *first = &client->first_error;
    first->offset = size;
    if (kind == ERROR_SHORT || kind == ERROR_EXTRA)
        return;
    bool is_in_window =
        named->sequence >= connection->replied && named->sequence < connection->sent;
    struct message expected =
        message_of(client, connection, is_in_window ? named->sequence : connection->replied);
    if (payload_classify(bytes, &expected, 0, size, &first->offset) == PAYLOAD_RIGHT)
        return;
    first->sequence = expected.sequence;
    first->has_bytes = true;
    first->expected = payload_byte(&expected, first->offset);
    first->found = bytes[first->offset];
}

/* Counts a reply to a message that has been settled. */
static void take_settled(struct client *client, struct connection *connection, uint64_t sequence) {
    uint64_t age = connection->replied - 1 - sequence;
    uint64_t bit = age < REMEMBERED ? UINT64_C(1) << age : 0;
    bool is_late = age >= REMEMBERED || (connection->lost & bit) != 0;
    connection->lost &= ~bit;
    count(is_late ? &client->counters.late : &client->counters.duplicates, 1);
}

/* Counts a reply to a message of the window, which may have been answered before. */
static void take_reply(struct client *client, struct connection *connection, uint64_t sequence,
                       uint64_t now) {
    struct stamp *place = connection_stamp(connection, sequence);
    if (place->sent_ns == ANSWERED) {
        count(&client->counters.duplicates, 1);
        return;
    }
    const struct stamp stamp = *place;
    place->sent_ns = ANSWERED;
    if (sequence < connection->highest)
        count(&client->counters.reordered, 1);
    else
        connection->highest = sequence;
    count(&client->counters.replies, 1);
    client->pending--;
    connection->outstanding--;
    settle_answered(connection);
    if (client->settings.mode == MODE_CLOSED)
        note_carried(client, &stamp, now);
    if (is_in_the_figures(client, connection, &stamp)) {
        if (client->settings.mode == MODE_OPEN)
            record(client, LATENCY_RESPONSE, now - stamp.due_ns);
        record(client, LATENCY_SERVICE, now - stamp.sent_ns);
        put_in_the_figures(client);
    }
    allow_next(client, connection, now);
}

/* Finds out what a datagram is, and counts it. */
static void take(struct client *client, struct connection *connection, const uint8_t *bytes,
                 uint32_t size, uint64_t now) {
    uint32_t length = client->settings.length;
    if (size != length) {
        note_wrong(client, connection, size < length ? ERROR_SHORT : ERROR_EXTRA, NULL, bytes,
                   size);
        return;
    }
    struct message named = message_named_by(client, bytes);
    if (client->settings.verify && !payload_matches(bytes, &named, 0, size))
        note_wrong(client, connection, ERROR_CORRUPT, &named, bytes, size);
    else if (named.shown != client->settings.seed.shown || named.connection != connection->number)
        note_wrong(client, connection, ERROR_FOREIGN, &named, bytes, size);
    else if (named.sequence >= connection->sent)
        note_wrong(client, connection, ERROR_EXTRA, &named, bytes, size);
    else if (named.sequence < connection->replied)
        take_settled(client, connection, named.sequence);
    else
        take_reply(client, connection, named.sequence, now);
}

bool datagram_receive(struct client *client, struct connection *connection, bool to_end) {
    for (unsigned turn = 0; turn < DATAGRAMS_A_TURN; turn++) {
        /* Behind the last reply only a duplicate can be queued; the next turn reads it. */
        if (connection->outstanding == 0 && !to_end)
            return false;
        ssize_t size = recv(connection->fd, client->buffer, BUFFER_BYTES, 0);
        if (size < 0 && errno == EINTR)
            continue;
        if (size < 0 && errno == EAGAIN)
            return false;
        if (size < 0) {
            failure_end(client, connection, errno == ECONNREFUSED ? ERROR_REFUSED : ERROR_OTHER,
                        errno);
            return false;
        }
        uint64_t now = now_ns();
        connection->moved_ns = now;
        take(client, connection, client->buffer, (uint32_t)size, now);
    }
    return true;
}
