#include "loop.h"

#include <errno.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "goodbye.h"
#include "traffic.h"
#include "udp.h"

#define RETRY_NS (10 * MS)

static void retry_later(struct client *client, struct connection *connection, uint64_t now) {
    connection->began_ns = 0; /* another connect, not the same one again */
    client->connecting++;
    traffic_retry_at(client, connection, now + RETRY_NS);
}

/* After the peer has ended a connection that another one is to follow: at once if a reply had come
 * on it. What was outstanding is sent again, and its time goes on. */
static void reconnect(struct client *client, struct connection *connection) {
    uint64_t now = now_ns();
    if (connection->replied == connection->allowed && now >= client->end_ns)
        return; /* nothing is waited for any more */
    count(&client->counters.reconnects, 1);
    if (connection->has_replied) {
        traffic_connect(client, connection);
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
        /* Where the next connect follows, it does not wait for the peer's end. */
        if (more || client->settings.close_by_reset)
            goodbye_close(client, connection);
        else
            goodbye_say(client, connection);
    }
    if (client->settings.reconnect && connection->state == CONNECTION_CLOSED)
        reconnect(client, connection);
    if (!more)
        return;
    if (connection->state == CONNECTION_CLOSED)
        traffic_connect(client, connection);
    if (connection->state == CONNECTION_FAILED)
        retry_later(client, connection, now_ns());
}

static void handle_event(struct client *client, const struct epoll_event *event) {
    struct connection *connection = event->data.ptr;
    if (connection->state == CONNECTION_CONNECTING) {
        if ((event->events & (EPOLLOUT | EPOLLERR | EPOLLHUP)) == 0)
            return;
        traffic_finish_connect(client, connection);
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

/* A turn for each connection that had more to do. */
static void serve_ready(struct client *client) {
    for (uint32_t turns = client->ready_count; turns > 0; turns--) {
        struct connection *connection = &client->connections[client->ready[client->ready_first]];
        client->ready_first = (client->ready_first + 1) % client->settings.connection_count;
        client->ready_count--;
        connection->is_ready = false;
        if (connection->state != CONNECTION_OPEN)
            continue;
        /* Not knowing why it stopped, read until the kernel says that there is no more. */
        bool more = traffic_receive(client, connection, true);
        if (connection->state == CONNECTION_OPEN) {
            more |= traffic_send(client, connection);
            if (more && connection->state == CONNECTION_OPEN)
                traffic_push_ready(client, connection);
        }
        loop_after_turn(client, connection);
    }
}

static bool is_waiting_for_reply(const struct connection *connection) {
    return connection->replied < connection->sent || connection->sent_bytes > 0;
}

static bool has_waited_too_long(const struct client *client, const struct connection *connection,
                                uint64_t now, uint64_t timeout_ns) {
    bool waits = is_waiting_for_reply(connection) ||
                 (client->settings.reconnect && connection->replied < connection->allowed);
    return waits && now > connection->moved_ns && now - connection->moved_ns > timeout_ns;
}

static void tick_connecting(struct client *client, struct connection *connection, uint64_t now,
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
        traffic_try_connect(client, connection);
    } else if (is_retry && connection->retry_ns < client->tick_ns) {
        client->tick_ns = connection->retry_ns;
    }
    if (connection->state == CONNECTION_CONNECTING || connection->state == CONNECTION_RETRY) {
        uint64_t began_ns = connection->began_ns;
        if (began_ns != 0 && now > began_ns && now - began_ns > timeout_ns)
            traffic_fail(client, connection, ERROR_CONNECT_TIMEOUT, 0);
        else if (has_waited_too_long(client, connection, now, timeout_ns))
            traffic_fail(client, connection, ERROR_TIMEOUT, 0);
    }
    loop_after_turn(client, connection);
}

/* Ends what has waited too long, tries again what was to be tried again. */
static void tick(struct client *client, uint64_t now) {
    uint64_t timeout_ns = client->settings.timeout_ns;
    if (is_stopped(client) && timeout_ns > STOP_NS)
        timeout_ns = STOP_NS;
    client->tick_ns = now + TICK_NS;
    for (uint32_t i = 0; i < client->settings.connection_count; i++) {
        struct connection *connection = &client->connections[i];
        if (connection->state == CONNECTION_CONNECTING || connection->state == CONNECTION_RETRY)
            tick_connecting(client, connection, now, timeout_ns);
        else if (client->settings.datagrams)
            udp_tick(client, connection, now);
        else if (connection->state == CONNECTION_OPEN &&
                 has_waited_too_long(client, connection, now, timeout_ns)) {
            traffic_fail(client, connection, traffic_kind_of_ending(connection, ERROR_TIMEOUT), 0);
            loop_after_turn(client, connection);
        }
    }
}

/* ---- the loop -------------------------------------------------------------------------------- */

void loop_note_turn(struct client *client, uint64_t now) {
    if (now >= client->measure_ns && now > client->turn_ns &&
        now - client->turn_ns > client->counters.away_ns)
        atomic_u64_store_relaxed(&client->counters.away_ns, now - client->turn_ns);
}

/* Waits for events, at most until `until_ns`. Their number, 0 after an interruption, or -errno. */
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
        if (found < 0 && errno == EPERM) /* a seccomp filter that does not know it */
            errno = ENOSYS;
        client->no_pwait2 = found < 0 && errno == ENOSYS;
    }
    /* Rounded down: the last millisecond is polled away, so that no message is late. */
    if (found < 0 && errno == ENOSYS)
        found = epoll_wait(client->epoll_fd, events, EVENTS, (int)(wait_ns / MS));
    if (found < 0 && errno != EINTR)
        return -errno;
    /* A later wake-up than was asked for is the client's own. */
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
