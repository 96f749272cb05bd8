#include "stream.h"

#include <errno.h>
#include <sys/epoll.h>

#include "clock.h"
#include "failure.h"
#include "figures.h"
#include "message.h"

enum { CHUNKS_A_TURN = 4 }; /* of BUFFER_BYTES, on one connection, before the others' turn */

/* ---- sending --------------------------------------------------------------------------------- */

/* Fills the buffer with the messages that may be sent. Returns how many bytes there are. */
static uint32_t fill_buffer(struct client *client, const struct connection *connection) {
    uint32_t filled = 0, offset = connection->sent_bytes;
    uint64_t most = connection->replied + client->settings.depth;
    uint64_t last = connection->allowed < most ? connection->allowed : most;
    for (uint64_t sequence = connection->sent; sequence < last && filled < BUFFER_BYTES;
         sequence++) {
        struct message message = message_of(client, connection, sequence);
        uint32_t size = message.length - offset, room = BUFFER_BYTES - filled;
        if (size > room)
            size = room;
        payload_fill(client->buffer + filled, &message, offset, size);
        filled += size;
        offset = 0;
    }
    return filled;
}

/* Notes when the first byte of message `sent` was sent, unless it is sent again. */
static void stamp_begun(struct client *client, struct connection *connection, uint64_t now) {
    if (client->settings.mode == MODE_STREAM)
        return;
    if (connection->sent < connection->resent)
        return;
    struct stamp *stamp = connection_stamp(connection, connection->sent);
    stamp->sent_ns = now;
    if (client->settings.mode == MODE_CLOSED && stamp->due_ns >= client->measure_ns)
        count(&client->counters.between_ns, now - stamp->due_ns);
}

/* Counts `size` bytes that the kernel has taken. */
static void note_sent(struct client *client, struct connection *connection, uint32_t size,
                      uint64_t now) {
    if (connection->sent == connection->replied && connection->sent_bytes == 0 &&
        connection->sent >= connection->resent)
        connection->moved_ns = now;
    bool is_stream = client->settings.mode == MODE_STREAM;
    if (is_stream && is_measured(client, now))
        count(&client->counters.bytes_sent, size);
    while (size > 0) {
        uint32_t rest = client->settings.length - connection->sent_bytes;
        if (connection->sent_bytes == 0)
            stamp_begun(client, connection, now);
        if (size < rest) {
            connection->sent_bytes += size;
            return;
        }
        size -= rest;
        if (!is_stream && connection->sent >= connection->resent &&
            is_in_the_figures(client, connection, connection_stamp(connection, connection->sent)))
            count(&client->counters.bytes_sent, client->settings.length);
        connection->sent_bytes = 0;
        connection->sent++;
        count(&client->counters.sent, 1);
    }
}

static void wait_for_room(struct client *client, struct connection *connection) {
    connection->wants_room = true;
    if (connection->watches_room)
        return;
    struct epoll_event event = {.events = EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET,
                                .data.ptr = connection};
    connection->watches_room = true;
    if (epoll_ctl(client->epoll_fd, EPOLL_CTL_MOD, connection->fd, &event) < 0)
        failure_end(client, connection, ERROR_OTHER, errno);
}

bool stream_send(struct client *client, struct connection *connection) {
    for (unsigned chunk = 0; chunk < CHUNKS_A_TURN; chunk++) {
        if (connection->state != CONNECTION_OPEN || connection->wants_room)
            return false;
        uint32_t filled = fill_buffer(client, connection);
        if (filled == 0)
            return false;
        uint64_t now = now_ns();
        ssize_t size = send(connection->fd, client->buffer, filled, MSG_NOSIGNAL);
        if (size >= 0) {
            note_sent(client, connection, (uint32_t)size, now);
            /* The usual case: the kernel took one message whole. */
            if (connection->sent == connection->allowed)
                return false;
        } else if (errno == EAGAIN) {
            wait_for_room(client, connection);
        } else if (errno == EPIPE || errno == ECONNRESET) {
            /* Read first: what the peer sent before it closed, then the reason. */
            connection->wants_room = true;
            return true;
        } else if (errno != EINTR) {
            failure_end(client, connection, ERROR_OTHER, errno);
        }
    }
    return true;
}

/* ---- replies --------------------------------------------------------------------------------- */

/* Handles the last byte of a reply: what follows depends on the mode. */
static void complete(struct client *client, struct connection *connection, uint64_t now) {
    struct stamp stamp = *connection_stamp(connection, connection->replied);
    connection->replied_bytes = 0;
    connection->replied++;
    connection->has_replied = true;
    count(&client->counters.replies, 1);
    if (client->settings.mode != MODE_STREAM)
        client->pending--;

    bool counts = is_in_the_figures(client, connection, &stamp);
    if (counts)
        put_in_the_figures(client);
    switch (client->settings.mode) {
    case MODE_CLOSED:
        note_carried(client, &stamp, now);
        if (counts)
            record(client, LATENCY_SERVICE, now - stamp.sent_ns);
        if (now < client->end_ns && !is_stopped(client))
            message_allow(client, connection, now);
        break;
    case MODE_OPEN:
        if (counts) {
            record(client, LATENCY_RESPONSE, now - stamp.due_ns);
            record(client, LATENCY_SERVICE, now - stamp.sent_ns);
        }
        break;
    case MODE_STREAM:
        if (is_measured(client, now))
            put_in_the_figures(client);
        break;
    case MODE_BURST: {
        struct burst_sample *sample = &client->samples[connection - client->connections];
        sample->first_echo_ns = now - stamp.sent_ns;
        sample->response_ns = now - client->start_ns;
        if (counts) {
            record(client, LATENCY_FIRST_ECHO, sample->first_echo_ns);
            record(client, LATENCY_RESPONSE, sample->response_ns);
        }
        connection->state = CONNECTION_DONE;
        break;
    }
    case MODE_CONNECT:
        if (counts) {
            record(client, LATENCY_FIRST_ECHO, now - stamp.sent_ns);
            record(client, LATENCY_RESPONSE, now - connection->began_ns);
        }
        connection->state = CONNECTION_DONE;
        break;
    case MODE_IDLE:
        record(client, LATENCY_SERVICE, now - stamp.sent_ns);
        break;
    case MODES:
        break;
    }
}

/* Ends the connection because of a wrong byte, and notes that byte in the first error. */
static void fail_wrong(struct client *client, struct connection *connection,
                       const struct message *message, const uint8_t *bytes, uint32_t size) {
    uint32_t at = 0;
    enum payload_fault fault =
        payload_classify(bytes, message, connection->replied_bytes, size, &at);
    enum error_kind kind = ERROR_CORRUPT + (fault - PAYLOAD_CORRUPT);
    bool is_first = !client->first_error.happened;
    uint32_t offset = connection->replied_bytes + at;
    failure_end(client, connection, kind, 0);
    if (is_first) {
        client->first_error.has_bytes = true;
        client->first_error.offset = offset;
        client->first_error.expected = payload_byte(message, offset);
        client->first_error.found = bytes[at];
    }
}

/* Compares the bytes received with the replies that are owed, message by message. */
static void consume(struct client *client, struct connection *connection, const uint8_t *bytes,
                    uint32_t size, uint64_t now) {
    while (size > 0) {
        bool whole = connection->replied < connection->sent;
        uint32_t owed = whole ? client->settings.length : connection->sent_bytes;
        if (connection->replied_bytes >= owed) {
            failure_end(client, connection, ERROR_EXTRA, 0);
            return;
        }
        uint32_t part = owed - connection->replied_bytes;
        if (part > size)
            part = size;
        struct message message = message_of(client, connection, connection->replied);
        if (client->settings.verify &&
            !payload_matches(bytes, &message, connection->replied_bytes, part)) {
            fail_wrong(client, connection, &message, bytes, part);
            return;
        }
        connection->replied_bytes += part;
        bytes += part;
        size -= part;
        if (connection->replied_bytes == client->settings.length)
            complete(client, connection, now);
    }
}

bool stream_receive(struct client *client, struct connection *connection, bool to_end) {
    for (unsigned chunk = 0; chunk < CHUNKS_A_TURN; chunk++) {
        ssize_t size = recv(connection->fd, client->buffer, BUFFER_BYTES, 0);
        if (size < 0 && errno == EINTR)
            continue;
        if (size < 0 && errno == EAGAIN)
            return false;
        if (size < 0) {
            bool reset = errno == ECONNRESET || errno == EPIPE;
            failure_end(client, connection, reset ? ERROR_RESET : ERROR_OTHER, errno);
            return false;
        }
        if (size == 0) {
            if (connection->state == CONNECTION_OPEN)
                failure_end(client, connection, failure_kind(connection, ERROR_CLOSED), 0);
            return false;
        }
        uint64_t now = now_ns();
        connection->moved_ns = now;
        if (client->settings.mode == MODE_STREAM && is_measured(client, now))
            count(&client->counters.bytes_received, (uint64_t)size);
        consume(client, connection, client->buffer, (uint32_t)size, now);
        if (connection->state != CONNECTION_OPEN)
            return false;
        /* A short read has emptied the socket: later bytes are reported by a new edge. */
        if (size < BUFFER_BYTES && !to_end)
            return false;
    }
    return true;
}
