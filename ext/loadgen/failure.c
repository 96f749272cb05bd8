#include "failure.h"

#include "clock.h"
#include "figures.h"

void failure_note(struct client *client, const struct connection *connection, enum error_kind kind,
                  int error) {
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

static bool is_to_be_reconnected(const struct client *client, const struct connection *connection,
                                 enum error_kind kind) {
    return client->settings.reconnect && !is_stopped(client) &&
           (kind == ERROR_CLOSED || kind == ERROR_RESET) && connection->replied_bytes == 0 &&
           connection->state == CONNECTION_OPEN;
}

/* Closes the connection so that the next one sends again what has not been answered. */
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

void failure_end(struct client *client, struct connection *connection, enum error_kind kind,
                 int error) {
    if (is_to_be_reconnected(client, connection, kind)) {
        leave_for_another(client, connection);
        return;
    }
    failure_note(client, connection, kind, error);
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

enum error_kind failure_kind(const struct connection *connection, enum error_kind kind) {
    return connection->replied_bytes > 0 ? ERROR_SHORT : kind;
}
