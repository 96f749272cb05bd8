/* epoll_echo: a minimal single-threaded echo server, to measure others by. One level-triggered
 * epoll instance, one 64 KiB buffer; what send did not take is kept for the connection, which is
 * not read meanwhile, and goes out when epoll reports room.
 *
 *     epoll_echo PORT [BACKLOG]
 *
 * Listens on 127.0.0.1; port 0 takes a free one. Prints "listening PORT" and serves until SIGTERM.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

enum { EVENTS = 256, BUFFER_BYTES = 65536, ACCEPTS_A_TURN = 64, REST_MS = 100 };

struct connection {
    int fd;
    size_t begin, end; /* what waits to be sent; begin == end: nothing */
    uint8_t *waiting;  /* BUFFER_BYTES, made when it is first needed */
};

static int epoll_fd;

static void die(const char *what) {
    fprintf(stderr, "epoll_echo: %s: %s\n", what, strerror(errno));
    exit(1);
}

static int watch(int operation, struct connection *c, uint32_t events) {
    struct epoll_event event = {.events = events, .data.ptr = c};
    return epoll_ctl(epoll_fd, operation, c->fd, &event);
}

static void end(struct connection *c) {
    close(c->fd);
    free(c->waiting);
    free(c);
}

/* Sends what it can of size bytes: how many, or -1 if the connection has failed. */
static ssize_t send_some(int fd, const uint8_t *bytes, size_t size) {
    ssize_t sent;
    do
        sent = send(fd, bytes, size, MSG_NOSIGNAL);
    while (sent < 0 && errno == EINTR);
    if (sent < 0 && (errno == EAGAIN || errno == EWOULDBLOCK))
        return 0;
    return sent;
}

/* The three below return -1 when the connection is to be ended. */

static int keep_for_later(struct connection *c, const uint8_t *bytes, size_t size) {
    if (c->waiting == NULL && (c->waiting = malloc(BUFFER_BYTES)) == NULL)
        return -1;
    memcpy(c->waiting, bytes, size);
    c->begin = 0;
    c->end = size;
    return watch(EPOLL_CTL_MOD, c, EPOLLOUT);
}

static int echo(struct connection *c) {
    static uint8_t buffer[BUFFER_BYTES];
    ssize_t size = recv(c->fd, buffer, sizeof buffer, 0);
    if (size < 0)
        return errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR ? 0 : -1;
    if (size == 0)
        return -1;
    ssize_t sent = send_some(c->fd, buffer, (size_t)size);
    if (sent < 0)
        return -1;
    return sent == size ? 0 : keep_for_later(c, buffer + sent, (size_t)(size - sent));
}

static int send_the_rest(struct connection *c) {
    ssize_t sent = send_some(c->fd, c->waiting + c->begin, c->end - c->begin);
    if (sent < 0)
        return -1;
    c->begin += (size_t)sent;
    return c->begin < c->end ? 0 : watch(EPOLL_CTL_MOD, c, EPOLLIN);
}

/* False when there are no descriptors or no memory: the listener has to rest. */
static int accept_some(int listener) {
    for (int turn = 0; turn < ACCEPTS_A_TURN; turn++) {
        int fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
        if (fd < 0)
            return errno != EMFILE && errno != ENFILE && errno != ENOBUFS && errno != ENOMEM;
        struct connection *c = calloc(1, sizeof *c);
        if (c == NULL) {
            close(fd);
            return 0;
        }
        c->fd = fd;
        if (watch(EPOLL_CTL_ADD, c, EPOLLIN) < 0)
            end(c);
    }
    return 1;
}

static int listen_at(uint16_t port, int backlog) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(port)};
    socklen_t size = sizeof address;
    int one = 1, fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    if (fd < 0)
        die("socket");
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one); /* accepted sockets inherit it */
    if (bind(fd, (struct sockaddr *)&address, size) < 0)
        die("bind");
    if (listen(fd, backlog) < 0)
        die("listen");
    getsockname(fd, (struct sockaddr *)&address, &size);
    printf("listening %u\n", ntohs(address.sin_port));
    fflush(stdout);
    return fd;
}

int main(int argc, char **argv) {
    if (argc < 2) {
        fprintf(stderr, "usage: epoll_echo PORT [BACKLOG]\n");
        return 2;
    }
    int listener = listen_at((uint16_t)atoi(argv[1]), argc > 2 ? atoi(argv[2]) : 128);
    epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    struct connection listening = {.fd = listener};
    if (epoll_fd < 0 || watch(EPOLL_CTL_ADD, &listening, EPOLLIN) < 0)
        die("epoll");
    int resting = 0;
    for (;;) {
        struct epoll_event events[EVENTS];
        int ready = epoll_wait(epoll_fd, events, EVENTS, resting ? REST_MS : -1);
        if (ready < 0 && errno != EINTR)
            die("epoll_wait");
        for (int i = 0; i < ready; i++) {
            struct connection *c = events[i].data.ptr;
            if (c == &listening) {
                if (!accept_some(listener))
                    resting = watch(EPOLL_CTL_MOD, &listening, 0) == 0;
            } else if ((events[i].events & EPOLLOUT ? send_the_rest(c) : echo(c)) < 0) {
                end(c);
            }
        }
        if (resting && ready < EVENTS && watch(EPOLL_CTL_MOD, &listening, EPOLLIN) == 0)
            resting = 0;
    }
}
