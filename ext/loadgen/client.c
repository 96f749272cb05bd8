/* In the order in which it runs: a client's life, opening, the workload, a burst. What happens on
 * a connection is in traffic.c, waiting for it in loop.c. */
#include "client.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <unistd.h>

#include "clock.h"
#include "goodbye.h"
#include "loop.h"
#include "traffic.h"
#include "udp.h"

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

enum {
    CONNECTS_A_LOOK = 16, /* burst: connects between two looks at what has happened */
    DUE_A_LOOK = 64,      /* open loop: messages sent between two looks */
    CHECKS_AT_ONCE = 256, /* idle: connections asked at once whether they live */
};

/* ---- life of a client ------------------------------------------------------------------------ */

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
        /* What is not established has nothing to say goodbye to. */
        bool by_reset =
            client->settings.close_by_reset || connection->state == CONNECTION_CONNECTING;
        if (connection->state != CONNECTION_CONNECTING && connection->state != CONNECTION_ENDING)
            count(&client->counters.open_now, (uint64_t)-1);
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

/* ---- opening --------------------------------------------------------------------------------- */

int client_adopt(struct client *client, int fd, uint64_t connect_ns) {
    struct connection *connection = &client->connections[0];
    connection->fd = fd;
    if (traffic_watch(client, connection) < 0) {
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

int client_open(struct client *client) {
    client->opening = true;
    client->measure_ns = client->end_ns = UINT64_MAX;
    client->tick_ns = now_ns() + TICK_NS;
    int result = 0;
    while (result == 0 && !is_stopped(client)) {
        while (client->next_unopened < client->settings.connection_count &&
               client->connecting < client->settings.connects_at_once)
            traffic_connect(client, &client->connections[client->next_unopened++]);
        if (client->connecting == 0 && client->next_unopened == client->settings.connection_count)
            break;
        result = loop_look(client, UINT64_MAX);
    }
    client->opening = false;
    return result;
}

static void sleep_until(const struct client *client, uint64_t at_ns) {
    uint64_t now;
    while ((now = now_ns()) < at_ns && !is_stopped(client)) {
        uint64_t wake_ns = at_ns - now > TICK_NS ? now + TICK_NS : at_ns;
        struct timespec wake = timespec_of(wake_ns);
        clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &wake, NULL);
    }
}

/* ---- the workload ---------------------------------------------------------------------------- */

static uint64_t next_due_ns(const struct client *client) {
    return client->start_ns +
           (uint64_t)((double)client->schedule_next * client->settings.interval_ns);
}

/* A connection that is opened anew sends what has become due meanwhile. */
static bool is_on_its_way(const struct client *client, const struct connection *connection) {
    return client->settings.reconnect &&
           (connection->state == CONNECTION_CONNECTING || connection->state == CONNECTION_RETRY);
}

/* Open loop: sends what is due, each on the connection whose turn it is. */
static void send_due(struct client *client) {
    uint32_t total = client->settings.connection_count;
    for (unsigned sent = 0; sent < DUE_A_LOOK; sent++) {
        uint64_t due_ns = next_due_ns(client);
        uint64_t now = now_ns();
        if (due_ns >= client->end_ns || due_ns > now)
            return;
        /* The client's own lateness: what a full socket or --depth adds is the server's. */
        if (due_ns >= client->measure_ns)
            record(client, LATENCY_LATENESS, now - due_ns);
        client->schedule_next += client->settings.schedule_step;
        for (uint32_t tried = 0; tried < total; tried++) {
            struct connection *connection = &client->connections[client->schedule_turn];
            client->schedule_turn = (client->schedule_turn + 1) % total;
            if (connection->state != CONNECTION_OPEN && !is_on_its_way(client, connection))
                continue;
            traffic_allow(client, connection, due_ns);
            traffic_send_more(client, connection);
            break;
        }
    }
}

/* Idle: when they have been held long enough, every connection has to echo once. */
static void check_alive(struct client *client) {
    while (client->check_next < client->settings.connection_count &&
           client->pending < CHECKS_AT_ONCE) {
        struct connection *connection = &client->connections[client->check_next++];
        if (connection->state != CONNECTION_OPEN)
            continue;
        traffic_allow(client, connection, now_ns());
        traffic_send_more(client, connection);
    }
}

/* Stream: no message is begun any more. */
static void stop_streams(struct client *client) {
    for (uint32_t i = 0; i < client->settings.connection_count; i++) {
        struct connection *connection = &client->connections[i];
        if (connection->state == CONNECTION_OPEN)
            connection->allowed = connection->sent + (connection->sent_bytes > 0);
    }
}

static bool streams_are_drained(const struct client *client) {
    for (uint32_t i = 0; i < client->settings.connection_count; i++) {
        const struct connection *connection = &client->connections[i];
        if (connection->state == CONNECTION_OPEN && connection->replied < connection->allowed)
            return false;
    }
    return true;
}

static void begin_workload(struct client *client) {
    for (uint32_t i = 0; i < client->settings.connection_count; i++) {
        struct connection *connection = &client->connections[i];
        if (client->settings.mode == MODE_CONNECT) {
            traffic_connect(client, connection);
            loop_after_turn(client, connection);
            continue;
        }
        if (connection->state != CONNECTION_OPEN)
            continue;
        if (client->settings.mode == MODE_STREAM)
            connection->allowed = UINT64_MAX;
        else if (client->settings.mode == MODE_CLOSED)
            for (uint32_t message = 0; message < client->settings.depth; message++)
                traffic_allow(client, connection, client->start_ns);
        traffic_send_more(client, connection);
    }
}

/* True when the workload has nothing left to wait for. */
static bool is_over(struct client *client, uint64_t now) {
    if (client->connecting == 0 && atomic_u64_load_relaxed(&client->counters.open_now) == 0 &&
        (client->settings.mode != MODE_CONNECT || now >= client->end_ns))
        return true;
    if (now < client->end_ns)
        return false;
    switch (client->settings.mode) {
    case MODE_STREAM:
        return streams_are_drained(client);
    case MODE_IDLE:
        return client->pending == 0 && client->check_next == client->settings.connection_count;
    case MODE_OPEN:
        return client->pending == 0 && next_due_ns(client) >= client->end_ns;
    default:
        return client->pending == 0 && client->connecting == 0;
    }
}

static void begin_measuring(struct client *client, uint64_t start_ns) {
    prctl(PR_SET_TIMERSLACK, 1UL); /* of this thread: due times are met to the µs, not to 50 */
    client->queued_before_ns = thread_queued_ns();
    sleep_until(client, start_ns);
    client->start_ns = start_ns;
    client->turn_ns = start_ns;
    client->tick_ns = start_ns + TICK_NS;
    client->cpu_before_ns = thread_cpu_ns();
}

static void note_time(struct client *client) {
    uint64_t now = now_ns();
    loop_note_turn(client, now);
    count(&client->counters.cpu_ns, thread_cpu_ns() - client->cpu_before_ns);
    count(&client->counters.queued_ns, thread_queued_ns() - client->queued_before_ns);
    count(&client->counters.running_ns, now > client->start_ns ? now - client->start_ns : 0);
}

/* Of the measured time: what is waited for beyond it is in the figures, and this is not. */
static void note_end(struct client *client, uint64_t now) {
    atomic_u64_store_relaxed(&client->counters.ended_ns,
                             now < client->end_ns ? now : client->end_ns);
}

/* Open: where the server does not keep up, what is owed grows through all of the time. */
static void note_owed(const struct client *client, uint64_t now, uint64_t *counter, uint64_t at_ns,
                      bool *is_noted) {
    if (client->settings.mode != MODE_OPEN || *is_noted || now < at_ns)
        return;
    *is_noted = true;
    atomic_u64_store_relaxed(counter, client->pending);
}

static uint64_t half_of_time_ns(const struct client *client) {
    uint64_t end_ns = client->end_ns; /* a stop may have brought it forward */
    return end_ns > client->measure_ns ? client->measure_ns + (end_ns - client->measure_ns) / 2
                                       : end_ns;
}

int client_run(struct client *client, uint64_t start_ns, uint64_t measure_ns, uint64_t end_ns) {
    client->measure_ns = measure_ns;
    client->end_ns = end_ns;
    client->schedule_next = client->settings.schedule_first;
    client->check_next = 0;
    begin_measuring(client, start_ns);
    begin_workload(client);

    int result = 0;
    bool ended = false, half_noted = false, end_noted = false;
    uint64_t give_up_ns = UINT64_MAX; /* on what is still outstanding */
    for (uint64_t now = now_ns(); result == 0 && !is_over(client, now); now = now_ns()) {
        uint64_t until_ns = UINT64_MAX;
        if (is_stopped(client)) {
            if (now < client->end_ns)
                client->end_ns = now; /* no message is due after it; what is under way may end */
            if (give_up_ns > now + STOP_NS)
                give_up_ns = now + STOP_NS;
        } else if (now >= client->end_ns && give_up_ns == UINT64_MAX) {
            /* After the tick that sees the timeout of what is sent at the end. */
            give_up_ns = now + client->settings.timeout_ns + 2 * TICK_NS;
        }
        note_owed(client, now, &client->counters.owed_half, half_of_time_ns(client), &half_noted);
        note_owed(client, now, &client->counters.owed, client->end_ns, &end_noted);
        if (now >= give_up_ns)
            break;
        if (now >= client->end_ns) {
            if (!ended && client->settings.mode == MODE_STREAM)
                stop_streams(client);
            ended = true;
            if (client->settings.mode == MODE_IDLE)
                check_alive(client);
        } else {
            until_ns = client->end_ns;
        }
        if (client->settings.mode == MODE_OPEN) {
            send_due(client);
            uint64_t due_ns = next_due_ns(client);
            if (due_ns < client->end_ns)
                until_ns = due_ns;
        }
        result = loop_look(client, until_ns);
    }
    note_end(client, now_ns());
    if (client->settings.datagrams && !is_stopped(client))
        udp_give_up(client);
    count(&client->counters.unanswered, client->pending);
    note_time(client);
    return result < 0 ? result : goodbye_wait(client);
}

/* ---- a burst --------------------------------------------------------------------------------- */

int client_burst(struct client *client, uint64_t start_ns, bool measured) {
    uint32_t total = client->settings.connection_count;
    memset(client->samples, 0, total * sizeof *client->samples);
    client->measure_ns = measured ? start_ns : UINT64_MAX;
    client->end_ns = UINT64_MAX;
    begin_measuring(client, start_ns);

    int result = 0;
    for (uint32_t i = 0; i < total && result == 0 && !is_stopped(client); i++) {
        struct connection *connection = &client->connections[i];
        traffic_connect(client, connection);
        if (measured)
            record(client, LATENCY_LATENESS, connection->began_ns - start_ns);
        if (i % CONNECTS_A_LOOK == CONNECTS_A_LOOK - 1)
            result = loop_look(client, 0);
    }
    while (result == 0 && !is_stopped(client) &&
           (client->connecting > 0 || atomic_u64_load_relaxed(&client->counters.open_now) > 0))
        result = loop_look(client, UINT64_MAX);
    count(&client->counters.unanswered, client->pending);
    note_time(client);
    if (result == 0)
        result = goodbye_wait(client);
    client_close(client); /* after a stop, and what the peer has not ended */
    return result;
}
