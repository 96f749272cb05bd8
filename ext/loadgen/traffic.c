#include "traffic.h"

#include "datagram.h"
#include "failure.h"
#include "message.h"
#include "stream.h"

void traffic_allow(struct client *client, struct connection *connection, uint64_t due_ns) {
    if (client->settings.datagrams)
        datagram_allow(client, connection, due_ns);
    else
        message_allow(client, connection, due_ns);
}

bool traffic_send(struct client *client, struct connection *connection) {
    return client->settings.datagrams ? datagram_send(client, connection)
                                      : stream_send(client, connection);
}

bool traffic_receive(struct client *client, struct connection *connection, bool to_end) {
    return client->settings.datagrams ? datagram_receive(client, connection, to_end)
                                      : stream_receive(client, connection, to_end);
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

void traffic_tick(struct client *client, struct connection *connection, uint64_t now,
                  uint64_t timeout_ns) {
    if (client->settings.datagrams) {
        if (datagram_lose_overdue(client, connection, now))
            traffic_send_more(client, connection);
    } else if (message_has_timed_out(client, connection, now, timeout_ns)) {
        failure_end(client, connection, failure_kind(connection, ERROR_TIMEOUT), 0);
    }
}

void traffic_give_up(struct client *client) {
    if (client->settings.datagrams)
        datagram_give_up(client);
}
