#include "traffic.h"

#include <errno.h>
#include <sys/epoll.h>

#include "clock.h"
#include "payload.h"
#include "udp.h"

enum {
    CHUNKS_A_TURN = 4, /* of one connection, before the others get theirs */
    MOST_STAMPS = 1 << 16,
};
#define BACKLOG_RETRY_NS MS

/* ---- endings --------------------------------------------------------------------------------- */

void traffic_note_error(struct client *client, const struct connection *connection,
                        enum error_kind kind, int error) {
    count(&client->counters.errors[kind], 1);
    struct first_error *first = &client->first_error;
    if (first->happened)
        return;
    first->happened = true;
    first->kind = kind;
    first->error = error;
    first->connection = connection->number;
    first->sequence = connection->replied;
    first->offset = connection->replied_bytes;
    first->at_ns = now_ns();
}

/* The peer has ended the connection between two replies, and another one is to follow. */
static bool is_to_be_reconnected(const struct client *client, const struct connection *connection,
                                 enum error_kind kind) {
    return client->settings.reconnect && !is_stopped(client) &&
           (kind == ERROR_CLOSED || kind == ERROR_RESET) && connection->replied_bytes == 0 &&
           connection->state == CONNECTION_OPEN;
}

static void leave_for_another(struct client *client, struct connection *connection) {
    count(&client->counters.open_now, (uint64_t)-1);
    connection_close(connection, false);
    uint64_t begun = connection->sent + (connection->sent_bytes > 0);
    if (connection->resent < begun)
        connection->resent = begun;
    connection->sent = connection->replied;
    connection->sent_bytes = 0;
    connection->state = CONNECTION_CLOSED;
}

void traffic_fail(struct client *client, struct connection *connection, enum error_kind kind,
                  int error) {
    if (is_to_be_reconnected(client, connection, kind)) {
        leave_for_another(client, connection);
        return;
    }
    traffic_note_error(client, connection, kind, error);
    if (connection->state == CONNECTION_CONNECTING || connection->state == CONNECTION_RETRY)
        client->connecting--;
    else
        count(&client->counters.open_now, (uint64_t)-1);
    if (connection->fd >= 0)
        connection_close(connection, true);
    if (client->settings.mode != MODE_STREAM) {
        uint64_t lost = connection->allowed - connection->replied;
        if (client->settings.datagrams)
            lost = connection->allowed - connection->sent + connection->outstanding;
        client->pending -= lost;
        count(&client->counters.unanswered, lost);
    }
    connection_forget_messages(connection);
    connection->state = CONNECTION_FAILED;
}

static enum error_kind kind_of_connect_error(int error) {
    switch (error) {
    case ECONNREFUSED:
    case ENOENT: /* AF_UNIX: no such file */
        return ERROR_REFUSED;
    case ETIMEDOUT:
        return ERROR_CONNECT_TIMEOUT;
    case EMFILE:
    case ENFILE:
        return ERROR_NO_DESCRIPTORS;
    case EADDRNOTAVAIL:
    case EADDRINUSE:
        return ERROR_NO_PORTS;
    default:
        return ERROR_CONNECT;
    }
}

enum error_kind traffic_kind_of_ending(const struct connection *connection, enum error_kind kind) {
    return connection->replied_bytes > 0 ? ERROR_SHORT : kind;
}

/* ---- connecting ------------------------------------------------------------------------------ */

static void established(struct client *client, struct connection *connection, uint64_t now);

int traffic_watch(struct client *client, struct connection *connection) {
    /* Edge-triggered, EPOLLOUT is reported once the connect ends and after send had no room. On
     * AF_UNIX it would come whenever the peer reads. */
    bool is_local = client->settings.server.any.sa_family == AF_UNIX;
    struct epoll_event event = {
        .events = EPOLLIN | EPOLLRDHUP | EPOLLET | (is_local ? 0u : (uint32_t)EPOLLOUT),
        .data.ptr = connection,
    };
    connection->watches_room = !is_local;
    return epoll_ctl(client->epoll_fd, EPOLL_CTL_ADD, connection->fd, &event);
}

void traffic_retry_at(struct client *client, struct connection *connection, uint64_t at_ns) {
    connection->state = CONNECTION_RETRY;
    connection->retry_ns = at_ns;
    if (at_ns < client->tick_ns)
        client->tick_ns = at_ns;
}

void traffic_try_connect(struct client *client, struct connection *connection) {
    const struct settings *settings = &client->settings;
    const union address *source = NULL;
    if (settings->source_count > 0)
        source =
            &settings
                 ->sources[(settings->first_number + client->attempts++) % settings->source_count];
    connection->state = CONNECTION_CONNECTING;
    int result = connection_connect(connection, &settings->server, settings->server_size, source,
                                    settings->source_size, settings->datagrams);
    if (result == -EAGAIN) { /* AF_UNIX: the backlog is full */
        traffic_retry_at(client, connection, now_ns() + BACKLOG_RETRY_NS);
        return;
    }
    if (result != 0 && result != -EINPROGRESS) {
        traffic_fail(client, connection, kind_of_connect_error(-result), -result);
        return;
    }
    if (traffic_watch(client, connection) < 0)
        traffic_fail(client, connection, ERROR_OTHER, errno);
    else if (result == 0)
        established(client, connection, now_ns());
}

void traffic_connect(struct client *client, struct connection *connection) {
    connection->began_ns = now_ns();
    client->connecting++;
    traffic_try_connect(client, connection);
}

void traffic_finish_connect(struct client *client, struct connection *connection) {
    int result = connection_connect_result(connection);
    if (result != 0)
        traffic_fail(client, connection, kind_of_connect_error(-result), -result);
    else
        established(client, connection, now_ns());
}

/* ---- sending --------------------------------------------------------------------------------- */

/* As many of the allowed messages as the buffer holds; returns their bytes. */
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
        traffic_fail(client, connection, ERROR_OTHER, errno);
}

bool traffic_send(struct client *client, struct connection *connection) {
    if (client->settings.datagrams)
        return udp_send(client, connection);
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
            /* The usual case: one message, taken whole. */
            if (connection->sent == connection->allowed)
                return false;
        } else if (errno == EAGAIN) {
            wait_for_room(client, connection);
        } else if (errno == EPIPE || errno == ECONNRESET) {
            /* What the peer said before it went is still to be read, and then the reason. */
            connection->wants_room = true;
            return true;
        } else if (errno != EINTR) {
            traffic_fail(client, connection, ERROR_OTHER, errno);
        }
    }
    return true;
}

void traffic_allow(struct client *client, struct connection *connection, uint64_t due_ns) {
    int result;
    while ((result = connection_reserve_stamp(connection, MOST_STAMPS)) == -ENOBUFS &&
           client->settings.datagrams && connection->replied < connection->sent)
        udp_lose_first(client, connection, now_ns());
    if (result < 0) {
        traffic_note_error(client, connection, ERROR_OVERRUN, -result);
        return;
    }
    if (connection->allowed == connection->replied)
        connection->moved_ns = due_ns;
    connection_stamp(connection, connection->allowed)->due_ns = due_ns;
    connection->allowed++;
    client->pending++;
}

void traffic_push_ready(struct client *client, struct connection *connection) {
    if (connection->is_ready)
        return;
    connection->is_ready = true;
    uint32_t total = client->settings.connection_count;
    uint32_t last = (client->ready_first + client->ready_count++) % total;
    client->ready[last] = (uint32_t)(connection - client->connections);
}

void traffic_send_more(struct client *client, struct connection *connection) {
    if (traffic_send(client, connection))
        traffic_push_ready(client, connection);
}

static void established(struct client *client, struct connection *connection, uint64_t now) {
    connection->state = CONNECTION_OPEN;
    connection->has_replied = false;
    client->connecting--;
    count(&client->counters.opened, 1);
    count(&client->counters.open_now, 1);
    uint64_t took_ns = now - connection->began_ns;
    if (!client->settings.datagrams &&
        (client->opening || connection->began_ns >= client->measure_ns))
        histogram_record(&client->histograms[LATENCY_CONNECT], took_ns);
    if (client->settings.mode == MODE_BURST)
        client->samples[connection - client->connections].connect_ns = took_ns;
    if (client->settings.mode == MODE_BURST || client->settings.mode == MODE_CONNECT) {
        traffic_allow(client, connection, connection->began_ns);
        traffic_send_more(client, connection);
    } else if (client->settings.reconnect && connection->allowed > connection->sent) {
        traffic_send_more(client, connection);
    }
}

/* ---- replies --------------------------------------------------------------------------------- */

/* The last byte of a reply is there: what it means is the workload's affair. */
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
            traffic_allow(client, connection, now);
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

static void fail_wrong(struct client *client, struct connection *connection,
                       const struct message *message, const uint8_t *bytes, uint32_t size) {
    uint32_t at = 0;
    enum payload_fault fault =
        payload_classify(bytes, message, connection->replied_bytes, size, &at);
    enum error_kind kind = ERROR_CORRUPT + (fault - PAYLOAD_CORRUPT);
    bool is_first = !client->first_error.happened;
    uint32_t offset = connection->replied_bytes + at;
    traffic_fail(client, connection, kind, 0);
    if (is_first) {
        client->first_error.has_bytes = true;
        client->first_error.offset = offset;
        client->first_error.expected = payload_byte(message, offset);
        client->first_error.found = bytes[at];
    }
}

/* Compares what came with what is owed, message by message. */
static void consume(struct client *client, struct connection *connection, const uint8_t *bytes,
                    uint32_t size, uint64_t now) {
    while (size > 0) {
        bool whole = connection->replied < connection->sent;
        uint32_t owed = whole ? client->settings.length : connection->sent_bytes;
        if (connection->replied_bytes >= owed) {
            traffic_fail(client, connection, ERROR_EXTRA, 0);
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

bool traffic_receive(struct client *client, struct connection *connection, bool to_end) {
    if (client->settings.datagrams)
        return udp_receive(client, connection, to_end);
    for (unsigned chunk = 0; chunk < CHUNKS_A_TURN; chunk++) {
        ssize_t size = recv(connection->fd, client->buffer, BUFFER_BYTES, 0);
        if (size < 0 && errno == EINTR)
            continue;
        if (size < 0 && errno == EAGAIN)
            return false;
        if (size < 0) {
            bool reset = errno == ECONNRESET || errno == EPIPE;
            traffic_fail(client, connection, reset ? ERROR_RESET : ERROR_OTHER, errno);
            return false;
        }
        if (size == 0) {
            if (connection->state == CONNECTION_OPEN)
                traffic_fail(client, connection, traffic_kind_of_ending(connection, ERROR_CLOSED),
                             0);
            return false;
        }
        uint64_t now = now_ns();
        connection->moved_ns = now;
        if (client->settings.mode == MODE_STREAM && is_measured(client, now))
            count(&client->counters.bytes_received, (uint64_t)size);
        consume(client, connection, client->buffer, (uint32_t)size, now);
        if (connection->state != CONNECTION_OPEN)
            return false;
        /* A short read has emptied the socket: what comes later is a new edge. */
        if (size < BUFFER_BYTES && !to_end)
            return false;
    }
    return true;
}
