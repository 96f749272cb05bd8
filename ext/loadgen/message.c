#include "message.h"

#include "failure.h"
#include "figures.h"

void message_allow(struct client *client, struct connection *connection, uint64_t due_ns) {
    int result = connection_reserve_stamp(connection, MOST_STAMPS);
    if (result < 0) {
        failure_note(client, connection, ERROR_OVERRUN, -result);
        return;
    }
    if (connection->allowed == connection->replied)
        connection->moved_ns = due_ns;
    connection_stamp(connection, connection->allowed)->due_ns = due_ns;
    connection->allowed++;
    client->pending++;
}

bool message_has_timed_out(const struct client *client, const struct connection *connection,
                           uint64_t now, uint64_t timeout_ns) {
    bool waits = connection->replied < connection->sent || connection->sent_bytes > 0 ||
                 (client->settings.reconnect && connection->replied < connection->allowed);
    return waits && now > connection->moved_ns && now - connection->moved_ns > timeout_ns;
}
