#include "connection.h"

#include <errno.h>
#include <netinet/tcp.h>
#include <stdlib.h>
#include <unistd.h>

#ifndef IP_BIND_ADDRESS_NO_PORT
#define IP_BIND_ADDRESS_NO_PORT 24 /* Linux 4.2 */
#endif

enum { DATAGRAMS_BUFFER_BYTES = 1 << 20 };

/* Sets the socket's options and binds it. Returns 0 or -errno. */
static int set_up(int fd, const union address *source, socklen_t source_size, bool is_tcp,
                  bool datagrams) {
    int one = 1, room = DATAGRAMS_BUFFER_BYTES;
    /* Without it, a message would wait for the acknowledgement of the one before. */
    if (is_tcp && setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one) < 0)
        return -errno;
    /* An urgent byte is then read in the stream, where it is found to be wrong: tcp(7). */
    if (!datagrams && setsockopt(fd, SOL_SOCKET, SO_OOBINLINE, &one, sizeof one) < 0)
        return -errno;
    /* A reply that does not fit in here is lost. net.core.rmem_max may allow less. */
    if (datagrams && setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &room, sizeof room) < 0)
        return -errno;
    if (source == NULL)
        return 0;
    /* Otherwise bind takes a port that no other connection from this address can share. This way
     * connect takes one that is free towards this server: ip(7). */
    if (setsockopt(fd, IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, &one, sizeof one) < 0 ||
        bind(fd, &source->any, source_size) < 0)
        return -errno;
    return 0;
}

int connection_connect(struct connection *connection, const union address *server,
                       socklen_t server_size, const union address *source, socklen_t source_size,
                       bool datagrams) {
    int family = server->any.sa_family;
    int fd =
        socket(family, (datagrams ? SOCK_DGRAM : SOCK_STREAM) | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (fd < 0)
        return -errno;
    int result = set_up(fd, source, source_size, family != AF_UNIX && !datagrams, datagrams);
    if (result == 0 && connect(fd, &server->any, server_size) < 0)
        /* An interrupted connect goes on in the background: connect(2). */
        result = errno == EINTR ? -EINPROGRESS : -errno;
    if (result == 0 || result == -EINPROGRESS)
        connection->fd = fd;
    else
        close(fd);
    return result;
}

int connection_connect_result(const struct connection *connection) {
    int error = 0;
    socklen_t size = sizeof error;
    if (getsockopt(connection->fd, SOL_SOCKET, SO_ERROR, &error, &size) < 0)
        return -errno;
    return -error;
}

void connection_close(struct connection *connection, bool by_reset) {
    const struct linger at_once = {.l_onoff = 1, .l_linger = 0};
    if (by_reset)
        setsockopt(connection->fd, SOL_SOCKET, SO_LINGER, &at_once, sizeof at_once);
    close(connection->fd);
    connection->fd = -1;
    connection->wants_room = false;
    connection->watches_room = false;
}

int connection_reserve_stamp(struct connection *connection, uint64_t most) {
    uint64_t room = connection->stamp_mask + 1;
    uint64_t used = connection->allowed - connection->replied;
    if (used < room)
        return 0;
    if (used >= most)
        return -ENOBUFS;
    struct stamp *larger = malloc(2 * room * sizeof *larger);
    if (larger == NULL)
        return -ENOMEM;
    for (uint64_t message = connection->replied; message < connection->allowed; message++)
        larger[message & (2 * room - 1)] = *connection_stamp(connection, message);
    connection_free(connection);
    connection->stamps = larger;
    connection->stamp_mask = 2 * room - 1;
    return 0;
}

void connection_forget_messages(struct connection *connection) {
    connection->sent = connection->replied = connection->allowed;
    connection->sent_bytes = connection->replied_bytes = 0;
    connection->outstanding = 0;
}

void connection_free(struct connection *connection) {
    if (connection->stamps != &connection->one)
        free(connection->stamps);
    connection->stamps = &connection->one;
    connection->stamp_mask = 0;
}
