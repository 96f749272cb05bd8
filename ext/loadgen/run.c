#include "run.h"

#include <string.h>
#include <sys/prctl.h>
#include <time.h>

#include "clock.h"
#include "connecting.h"
#include "ending.h"
#include "figures.h"
#include "loop.h"
#include "traffic.h"

enum {
    CONNECTS_A_LOOK = 16, /* burst: connects between two looks at the sockets */
    DUE_A_LOOK = 64,      /* open loop: messages sent between two looks */
    CHECKS_AT_ONCE = 256, /* idle: connections that echo at the same time */
};

/* ---- opening --------------------------------------------------------------------------------- */

int run_open(struct client *client) {
    client->opening = true;
    client->measure_ns = client->end_ns = UINT64_MAX;
    client->tick_ns = now_ns() + TICK_NS;
    int result = 0;
    while (result == 0 && !is_stopped(client)) {
        while (client->next_unopened < client->settings.connection_count &&
               client->connecting < client->settings.connects_at_once)
            connecting_begin(client, &client->connections[client->next_unopened++]);
        if (client->connecting == 0 && client->next_unopened == client->settings.connection_count)
            break;
        result = loop_look(client, UINT64_MAX);
    }
    client->opening = false;
    return result;
}

/* ---- the begin and end of a measurement ------------------------------------------------------ */

/* Sleeps until `at_ns`, or until client_stop. */
static void sleep_until(const struct client *client, uint64_t at_ns) {
    uint64_t now;
    while ((now = now_ns()) < at_ns && !is_stopped(client)) {
        uint64_t wake_ns = at_ns - now > TICK_NS ? now + TICK_NS : at_ns;
        struct timespec wake = timespec_of(wake_ns);
        clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &wake, NULL);
    }
}

static void begin_measuring(struct client *client, uint64_t start_ns) {
    prctl(PR_SET_TIMERSLACK, 1UL); /* of this thread, in ns: the default of 50 µs is too late */
    client->queued_before_ns = thread_queued_ns();
    sleep_until(client, start_ns);
    client->start_ns = start_ns;
    client->turn_ns = start_ns;
    client->tick_ns = start_ns + TICK_NS;
    client->cpu_before_ns = thread_cpu_ns();
}

/* Counts the time that the measurement took: CPU, run queue, and altogether. */
static void note_time(struct client *client) {
    uint64_t now = now_ns();
    loop_note_turn(client, now);
    count(&client->counters.cpu_ns, thread_cpu_ns() - client->cpu_before_ns);
    count(&client->counters.queued_ns, thread_queued_ns() - client->queued_before_ns);
    count(&client->counters.running_ns, now > client->start_ns ? now - client->start_ns : 0);
}

/* ---- the workload ---------------------------------------------------------------------------- */

/* Returns when the next message of this client is due. */
static uint64_t next_due_ns(const struct client *client) {
    return client->start_ns +
           (uint64_t)((double)client->schedule_next * client->settings.interval_ns);
}

/* Returns whether the connection is being replaced: it will send what becomes due meanwhile. */
static bool is_on_its_way(const struct client *client, const struct connection *connection) {
    return client->settings.reconnect &&
           (connection->state == CONNECTION_CONNECTING || connection->state == CONNECTION_RETRY);
}

/* Open loop: sends the messages that are due, in turn on each connection. */
static void send_due(struct client *client) {
    uint32_t total = client->settings.connection_count;
    for (unsigned sent = 0; sent < DUE_A_LOOK; sent++) {
        uint64_t due_ns = next_due_ns(client);
        uint64_t now = now_ns();
        if (due_ns >= client->end_ns || due_ns > now)
            return;
        /* The client's own lateness. A delay by a full socket or by --depth is the server's. */
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

/* Idle: makes every connection echo once, at the end of the time. */
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

/* Stream: lets no connection begin another message. */
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
            connecting_begin(client, connection);
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

/* Returns true when the workload has nothing left to send or to wait for. */
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

/* Notes when sending ended, within the measured time: waiting for the last replies is not part of
 * it. */
static void note_end(struct client *client, uint64_t now) {
    atomic_u64_store_relaxed(&client->counters.ended_ns,
                             now < client->end_ns ? now : client->end_ns);
}

/* Open loop: notes once, at `at_ns`, how many replies are owed. If the server does not keep up, the
 * number grows from half time to the end. */
static void note_owed(const struct client *client, uint64_t now, uint64_t *counter, uint64_t at_ns,
                      bool *is_noted) {
    if (client->settings.mode != MODE_OPEN || *is_noted || now < at_ns)
        return;
    *is_noted = true;
    atomic_u64_store_relaxed(counter, client->pending);
}

static uint64_t half_of_time_ns(const struct client *client) {
    uint64_t end_ns = client->end_ns; /* client_stop may have brought it forward */
    return end_ns > client->measure_ns ? client->measure_ns + (end_ns - client->measure_ns) / 2
                                       : end_ns;
}

int run_workload(struct client *client, uint64_t start_ns, uint64_t measure_ns, uint64_t end_ns) {
    client->measure_ns = measure_ns;
    client->end_ns = end_ns;
    client->schedule_next = client->settings.schedule_first;
    client->check_next = 0;
    begin_measuring(client, start_ns);
    begin_workload(client);

    int result = 0;
    bool ended = false, half_noted = false, end_noted = false;
    uint64_t give_up_ns = UINT64_MAX; /* when to give up what is still outstanding */
    for (uint64_t now = now_ns(); result == 0 && !is_over(client, now); now = now_ns()) {
        uint64_t until_ns = UINT64_MAX;
        if (is_stopped(client)) {
            if (now < client->end_ns)
                client->end_ns = now; /* no message is due later; those under way may end */
            if (give_up_ns > now + STOP_NS)
                give_up_ns = now + STOP_NS;
        } else if (now >= client->end_ns && give_up_ns == UINT64_MAX) {
            /* Late enough for the tick that notices the timeout of the last message. */
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
    if (!is_stopped(client))
        traffic_give_up(client);
    count(&client->counters.unanswered, client->pending);
    note_time(client);
    return result < 0 ? result : ending_wait(client);
}

/* ---- a burst --------------------------------------------------------------------------------- */

int run_burst(struct client *client, uint64_t start_ns, bool measured) {
    uint32_t total = client->settings.connection_count;
    memset(client->samples, 0, total * sizeof *client->samples);
    client->measure_ns = measured ? start_ns : UINT64_MAX;
    client->end_ns = UINT64_MAX;
    begin_measuring(client, start_ns);

    int result = 0;
    for (uint32_t i = 0; i < total && result == 0 && !is_stopped(client); i++) {
        struct connection *connection = &client->connections[i];
        connecting_begin(client, connection);
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
        result = ending_wait(client);
    client_close(client); /* what client_stop or a peer without a FIN has left open */
    return result;
}
