#include "connecting.h"

#include <errno.h>
#include <sys/epoll.h>

#include "clock.h"
#include "failure.h"
#include "figures.h"
#include "message.h"
#include "traffic.h"

#define BACKLOG_RETRY_NS MS

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

/* Adds the connection's socket to the client's epoll set. Returns 0, or -1 with errno. */
static int watch(struct client *client, struct connection *connection) {
    /* Edge-triggered EPOLLOUT comes once the connect ends, and when there is room again after
     * EAGAIN. On AF_UNIX it would come whenever the peer reads. */
    bool is_local = client->settings.server.any.sa_family == AF_UNIX;
    struct epoll_event event = {
        .events = EPOLLIN | EPOLLRDHUP | EPOLLET | (is_local ? 0u : (uint32_t)EPOLLOUT),
        .data.ptr = connection,
    };
    connection->watches_room = !is_local;
    return epoll_ctl(client->epoll_fd, EPOLL_CTL_ADD, connection->fd, &event);
}

int connecting_adopt(struct client *client, int fd, uint64_t connect_ns) {
    struct connection *connection = &client->connections[0];
    connection->fd = fd;
    if (watch(client, connection) < 0) {
        int error = errno;
        connection_close(connection, true);
        return -error;
    }
    connection->state = CONNECTION_OPEN;
    connection->moved_ns = now_ns();
    connection->has_replied = true;
    connection->allowed = connection->sent = connection->replied = 1;
    client->next_unopened = 1;
    client->attempts = 1;
    count(&client->counters.opened, 1);
    count(&client->counters.open_now, 1);
    record(client, LATENCY_CONNECT, connect_ns);
    return 0;
}

static void establish(struct client *client, struct connection *connection, uint64_t now) {
    connection->state = CONNECTION_OPEN;
    connection->has_replied = false;
    client->connecting--;
    count(&client->counters.opened, 1);
    count(&client->counters.open_now, 1);
    uint64_t took_ns = now - connection->began_ns;
    if (!client->settings.datagrams &&
        (client->opening || connection->began_ns >= client->measure_ns))
        record(client, LATENCY_CONNECT, took_ns);
    if (client->settings.mode == MODE_BURST)
        client->samples[connection - client->connections].connect_ns = took_ns;
    if (client->settings.mode == MODE_BURST || client->settings.mode == MODE_CONNECT) {
        traffic_allow(client, connection, connection->began_ns);
        traffic_send_more(client, connection);
    } else if (client->settings.reconnect && connection->allowed > connection->sent) {
        traffic_send_more(client, connection);
    }
}

void connecting_retry_at(struct client *client, struct connection *connection, uint64_t at_ns) {
    connection->state = CONNECTION_RETRY;
    connection->retry_ns = at_ns;
    if (at_ns < client->tick_ns)
        client->tick_ns = at_ns;
}

/* Calls connect; `began_ns` stays as it is. */
static void try_connect(struct client *client, struct connection *connection) {
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
        connecting_retry_at(client, connection, now_ns() + BACKLOG_RETRY_NS);
        return;
    }
    if (result != 0 && result != -EINPROGRESS) {
        failure_end(client, connection, kind_of_connect_error(-result), -result);
        return;
    }
    if (watch(client, connection) < 0)
        failure_end(client, connection, ERROR_OTHER, errno);
    else if (result == 0)
        establish(client, connection, now_ns());
}

void connecting_begin(struct client *client, struct connection *connection) {
    connection->began_ns = now_ns();
    client->connecting++;
    try_connect(client, connection);
}

void connecting_finish(struct client *client, struct connection *connection) {
    int result = connection_connect_result(connection);
    if (result != 0)
        failure_end(client, connection, kind_of_connect_error(-result), -result);
    else
        establish(client, connection, now_ns());
}

void connecting_tick(struct client *client, struct connection *connection, uint64_t now,
                     uint64_t timeout_ns) {
    bool is_retry = connection->state == CONNECTION_RETRY;
    bool is_waited_for = connection->replied < connection->allowed;
    if (is_retry && connection->began_ns == 0 &&
        ((now >= client->end_ns && !is_waited_for) || is_stopped(client))) {
        connection->state = CONNECTION_FAILED;
        client->connecting--;
        return;
    }
    if (is_retry && now >= connection->retry_ns) {
        if (connection->began_ns == 0)
            connection->began_ns = now;
        try_connect(client, connection);
    } else if (is_retry && connection->retry_ns < client->tick_ns) {
        client->tick_ns = connection->retry_ns;
    }
    if (connection->state == CONNECTION_CONNECTING || connection->state == CONNECTION_RETRY) {
        uint64_t began_ns = connection->began_ns;
        if (began_ns != 0 && now > began_ns && now - began_ns > timeout_ns)
            failure_end(client, connection, ERROR_CONNECT_TIMEOUT, 0);
        else if (message_has_timed_out(client, connection, now, timeout_ns))
            failure_end(client, connection, ERROR_TIMEOUT, 0);
    }
}
