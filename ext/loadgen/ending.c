#include "ending.h"

#include <errno.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>

#include "clock.h"
#include "failure.h"
#include "figures.h"

/* Remembers the connection's local end. Call it before the FIN: a socket in TIME_WAIT has given its
 * port back to the kernel. */
static void keep_end(struct client *client, const struct connection *connection) {
    if (!client->settings.keep_ends || client->settings.close_by_reset)
        return;
    union address end;
    uint64_t cookie;
    socklen_t size = sizeof end, cookie_size = sizeof cookie;
    uint64_t written = client->ends_written;
    if (written - atomic_u64_load_acquire(&client->ends_read) == MOST_ENDS ||
        getsockname(connection->fd, &end.any, &size) < 0 ||
        getsockopt(connection->fd, SOL_SOCKET, SO_COOKIE, &cookie, &cookie_size) < 0)
        return;
    struct local_end *kept = &client->ends[written % MOST_ENDS];
    memset(kept, 0, sizeof *kept);
    memcpy(kept->cookie, &cookie, sizeof cookie);
    if (end.any.sa_family == AF_INET) {
        memcpy(kept->address, &end.v4.sin_addr, 4);
        memcpy(kept->port, &end.v4.sin_port, 2);
    } else {
        memcpy(kept->address, &end.v6.sin6_addr, 16);
        memcpy(kept->port, &end.v6.sin6_port, 2);
    }
    atomic_u64_store_release(&client->ends_written, written + 1);
}

static void close_now(struct client *client, struct connection *connection) {
    connection_close(connection, client->settings.close_by_reset);
    connection->state = CONNECTION_CLOSED;
}

/* Reads what has come. Returns true when the connection has ended, in whatever way. */
static bool look(struct client *client, struct connection *connection) {
    ssize_t size = recv(connection->fd, client->buffer, BUFFER_BYTES, 0);
    if (size > 0)
        failure_note(client, connection, ERROR_EXTRA, 0);
    return size >= 0 || (errno != EAGAIN && errno != EINTR);
}

void ending_close(struct client *client, struct connection *connection) {
    keep_end(client, connection);
    look(client, connection);
    close_now(client, connection);
}

void ending_begin(struct client *client, struct connection *connection) {
    keep_end(client, connection);
    if (shutdown(connection->fd, SHUT_WR) < 0) {
        close_now(client, connection);
        return;
    }
    connection->state = CONNECTION_ENDING;
    client->ending++;
}

static void look_for_end(struct client *client, struct connection *connection) {
    if (connection->state != CONNECTION_ENDING || !look(client, connection))
        return;
    close_now(client, connection);
    client->ending--;
}

int ending_wait(struct client *client) {
    struct epoll_event events[EVENTS];
    uint64_t give_up_ns = now_ns() + client->settings.timeout_ns;
    int found = 0;
    /* What has come already causes no new edge. */
    for (uint32_t i = 0; client->ending > 0 && i < client->settings.connection_count; i++)
        look_for_end(client, &client->connections[i]);
    while (client->ending > 0 && !is_stopped(client) && now_ns() < give_up_ns) {
        found = epoll_wait(client->epoll_fd, events, EVENTS, (int)(TICK_NS / MS));
        if (found < 0 && errno != EINTR)
            return -errno;
        for (int i = 0; i < found; i++)
            look_for_end(client, events[i].data.ptr);
    }
    if (!is_stopped(client))
        count(&client->counters.unended, client->ending);
    return 0;
}
