#include "client.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <unistd.h>

const char *const error_names[ERROR_KINDS] = {
    [ERROR_REFUSED] = "refused",
    [ERROR_CONNECT_TIMEOUT] = "connect_timeout",
    [ERROR_NO_DESCRIPTORS] = "no_descriptors",
    [ERROR_NO_PORTS] = "no_ports",
    [ERROR_CONNECT] = "connect",
    [ERROR_CLOSED] = "closed",
    [ERROR_RESET] = "reset",
    [ERROR_TIMEOUT] = "timeout",
    [ERROR_SHORT] = "short",
    [ERROR_EXTRA] = "extra",
    [ERROR_CORRUPT] = "corrupt",
    [ERROR_FOREIGN] = "foreign",
    [ERROR_REPEATED] = "repeated",
    [ERROR_REORDERED] = "reordered",
    [ERROR_OVERRUN] = "overrun",
    [ERROR_OTHER] = "other",
};

const char *const mode_names[MODES] = {
    [MODE_BURST] = "burst",   [MODE_CLOSED] = "closed",   [MODE_OPEN] = "open",
    [MODE_STREAM] = "stream", [MODE_CONNECT] = "connect", [MODE_IDLE] = "idle",
};

const char *const latency_names[LATENCIES] = {
    [LATENCY_RESPONSE] = "response", [LATENCY_SERVICE] = "service",
    [LATENCY_CONNECT] = "connect",   [LATENCY_FIRST_ECHO] = "first_echo",
    [LATENCY_LATENESS] = "lateness",
};

int client_init(struct client *client, const struct settings *settings) {
    uint32_t total = settings->connection_count;
    memset(client, 0, sizeof *client);
    client->settings = *settings;
    client->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    if (client->epoll_fd < 0)
        return -errno;
    client->connections = calloc(total, sizeof *client->connections);
    client->ready = calloc(total, sizeof *client->ready);
    client->buffer = malloc(BUFFER_BYTES);
    if (settings->mode == MODE_BURST)
        client->samples = calloc(total, sizeof *client->samples);
    if (settings->keep_ends)
        client->ends = calloc(MOST_ENDS, sizeof *client->ends);
    if ((settings->keep_ends && client->ends == NULL) || client->connections == NULL ||
        client->ready == NULL || client->buffer == NULL ||
        (settings->mode == MODE_BURST && client->samples == NULL))
        return -ENOMEM;
    for (unsigned which = 0; which < LATENCIES; which++)
        if (histogram_open(&client->histograms[which]) < 0)
            return -ENOMEM;
    for (uint32_t i = 0; i < total; i++) {
        struct connection *connection = &client->connections[i];
        connection->fd = -1;
        connection->number = settings->first_number + i;
        connection->stamps = &connection->one;
    }
    return 0;
}

void client_free(struct client *client) {
    client_close(client);
    for (uint32_t i = 0; client->connections != NULL && i < client->settings.connection_count; i++)
        connection_free(&client->connections[i]);
    for (unsigned which = 0; which < LATENCIES; which++)
        histogram_close(&client->histograms[which]);
    if (client->epoll_fd >= 0)
        close(client->epoll_fd);
    free(client->connections);
    free(client->samples);
    free(client->ends);
    free(client->ready);
    free(client->buffer);
    free(client->settings.sources);
}

void client_stop(struct client *client) {
    atomic_u32_store_relaxed(&client->stop, 1);
}

void client_close(struct client *client) {
    for (uint32_t i = 0; client->connections != NULL && i < client->settings.connection_count;
         i++) {
        struct connection *connection = &client->connections[i];
        if (connection->fd < 0)
            continue;
        /* A connection that is not established has no peer to send FIN to. */
        bool by_reset =
            client->settings.close_by_reset || connection->state == CONNECTION_CONNECTING;
        if (connection->state != CONNECTION_CONNECTING && connection->state != CONNECTION_ENDING)
            atomic_u64_add_single_writer(&client->counters.open_now, (uint64_t)-1);
        connection_close(connection, by_reset);
        connection_forget_messages(connection);
        connection->state = CONNECTION_CLOSED;
    }
    client->pending = 0;
    client->connecting = 0;
    client->ending = 0;
}

size_t client_take_ends(struct client *client, struct local_end *out, size_t most) {
    uint64_t read = client->ends_read;
    uint64_t written = atomic_u64_load_acquire(&client->ends_written);
    size_t taken = 0;
    while (read < written && taken < most)
        out[taken++] = client->ends[read++ % MOST_ENDS];
    atomic_u64_store_release(&client->ends_read, read);
    return taken;
}
