#include "loop.h"

#include <errno.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "clock.h"
#include "connecting.h"
#include "ending.h"
#include "figures.h"
#include "traffic.h"

#define RETRY_NS (10 * MS)

static void retry_later(struct client *client, struct connection *connection, uint64_t now) {
    connection->began_ns = 0; /* a new connect, whose time begins when it is called */
    client->connecting++;
    connecting_retry_at(client, connection, now + RETRY_NS);
}

/* Replaces a connection that the peer has ended: at once if it had carried a reply, otherwise after
 * RETRY_NS. What was outstanding is sent again, and its time goes on. */
static void reconnect(struct client *client, struct connection *connection) {
    uint64_t now = now_ns();
    if (connection->replied == connection->allowed && now >= client->end_ns)
        return; /* there is nothing left to send or to receive */
    count(&client->counters.reconnects, 1);
    if (connection->has_replied) {
        connecting_begin(client, connection);
        return;
    }
    retry_later(client, connection, now);
}

/* ---- after a turn ---------------------------------------------------------------------------- */

void loop_after_turn(struct client *client, struct connection *connection) {
    enum mode mode = client->settings.mode;
    bool more = mode == MODE_CONNECT && !is_stopped(client) && now_ns() < client->end_ns;
    if (connection->state == CONNECTION_DONE) {
        count(&client->counters.open_now, (uint64_t)-1);
        /* Where the next connect follows, it does not wait for the peer's FIN. */
        if (more || client->settings.close_by_reset)
            ending_close(client, connection);
        else
            ending_begin(client, connection);
    }
    if (client->settings.reconnect && connection->state == CONNECTION_CLOSED)
        reconnect(client, connection);
    if (!more)
        return;
    if (connection->state == CONNECTION_CLOSED)
        connecting_begin(client, connection);
    if (connection->state == CONNECTION_FAILED)
        retry_later(client, connection, now_ns());
}

static void handle_event(struct client *client, const struct epoll_event *event) {
    struct connection *connection = event->data.ptr;
    if (connection->state == CONNECTION_CONNECTING) {
        if ((event->events & (EPOLLOUT | EPOLLERR | EPOLLHUP)) == 0)
            return;
        connecting_finish(client, connection);
    }
    if (connection->state == CONNECTION_OPEN) {
        bool more = false;
        bool to_end = (event->events & (EPOLLRDHUP | EPOLLHUP | EPOLLERR)) != 0;
        if (to_end || (event->events & EPOLLIN) != 0)
            more = traffic_receive(client, connection, to_end);
        if ((event->events & EPOLLOUT) != 0)
            connection->wants_room = false;
        if (connection->state == CONNECTION_OPEN) {
            more |= traffic_send(client, connection);
            if (more && connection->state == CONNECTION_OPEN)
                traffic_push_ready(client, connection);
        }
    }
    loop_after_turn(client, connection);
}

/* Gives each connection on the ready list a turn. */
static void serve_ready(struct client *client) {
    for (uint32_t turns = client->ready_count; turns > 0; turns--) {
        struct connection *connection = &client->connections[client->ready[client->ready_first]];
        client->ready_first = (client->ready_first + 1) % client->settings.connection_count;
        client->ready_count--;
        connection->is_ready = false;
        if (connection->state != CONNECTION_OPEN)
            continue;
        /* Why it stopped is not known: read until the kernel says that there is no more. */
        bool more = traffic_receive(client, connection, true);
        if (connection->state == CONNECTION_OPEN) {
            more |= traffic_send(client, connection);
            if (more && connection->state == CONNECTION_OPEN)
                traffic_push_ready(client, connection);
        }
        loop_after_turn(client, connection);
    }
}

/* Gives up what has waited too long, and calls connect where a retry is due. */
static void tick(struct client *client, uint64_t now) {
    uint64_t timeout_ns = client->settings.timeout_ns;
    if (is_stopped(client) && timeout_ns > STOP_NS)
        timeout_ns = STOP_NS;
    client->tick_ns = now + TICK_NS;
    for (uint32_t i = 0; i < client->settings.connection_count; i++) {
        struct connection *connection = &client->connections[i];
        if (connection->state == CONNECTION_CONNECTING || connection->state == CONNECTION_RETRY)
            connecting_tick(client, connection, now, timeout_ns);
        else if (connection->state == CONNECTION_OPEN)
            traffic_tick(client, connection, now, timeout_ns);
        else
            continue;
        if (connection->state != CONNECTION_OPEN)
            loop_after_turn(client, connection);
    }
}

/* ---- the loop -------------------------------------------------------------------------------- */

void loop_note_turn(struct client *client, uint64_t now) {
    if (now >= client->measure_ns && now > client->turn_ns &&
        now - client->turn_ns > client->counters.away_ns)
        atomic_u64_store_relaxed(&client->counters.away_ns, now - client->turn_ns);
}

/* Waits for events, until `until_ns` at most. Returns how many there are, 0 after a signal, or
 * -errno. */
static int wait_for_events(struct client *client, struct epoll_event *events, uint64_t until_ns) {
    uint64_t now = now_ns();
    loop_note_turn(client, now);
    uint64_t wait_ns =
        client->settings.spin || client->ready_count > 0 || until_ns <= now ? 0 : until_ns - now;
    int found = -1;
    errno = ENOSYS;
    if (wait_ns > 0 && !client->no_pwait2) {
        struct timespec timeout = timespec_of(wait_ns);
        found = (int)syscall(SYS_epoll_pwait2, client->epoll_fd, events, EVENTS, &timeout, NULL,
                             (size_t)0);
        if (found < 0 && errno == EPERM) /* a seccomp filter older than the call */
            errno = ENOSYS;
        client->no_pwait2 = found < 0 && errno == ENOSYS;
    }
    /* Rounded down: the last millisecond is spent polling, so that no message is late. */
    if (found < 0 && errno == ENOSYS)
        found = epoll_wait(client->epoll_fd, events, EVENTS, (int)(wait_ns / MS));
    if (found < 0 && errno != EINTR)
        return -errno;
    /* A wake-up later than asked for counts as time away from the sockets. */
    uint64_t woken = now_ns();
    client->turn_ns = woken < now + wait_ns ? woken : now + wait_ns;
    if (found == 0 && client->settings.spin && !client->opening)
        count(&client->counters.waited_ns, woken - now);
    return found < 0 ? 0 : found;
}

int loop_look(struct client *client, uint64_t until_ns) {
    struct epoll_event events[EVENTS];
    int found =
        wait_for_events(client, events, until_ns < client->tick_ns ? until_ns : client->tick_ns);
    if (found < 0)
        return found;
    for (int i = 0; i < found; i++)
        handle_event(client, &events[i]);
    if (client->ready_count > 0)
        serve_ready(client);
    uint64_t now = now_ns();
    if (now >= client->tick_ns)
        tick(client, now);
    return 0;
}
