/* user_echo_server: the baseline in user space that the in-kernel original was compared with, made
 * anew in its manner: one thread, edge-triggered epoll, 512-byte buffer, backlog 128.
 *
 *     user_echo_server PORT [BACKLOG]
 *
 * Listens on 127.0.0.1; port 0 takes a free one. Prints "listening PORT" and serves until SIGTERM.
 *
 * Its limits are part of the manner: it reads once for each edge, so that a message of more than
 * 512 bytes may wait for the next one, and an end that comes with a message is never seen; a short
 * send loses the rest; without SO_REUSEADDR it cannot have its port again at once. It does not
 * answer 512 bytes to whatever came and does not exit at a reset, which would leave nothing to
 * compare.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

enum { EVENTS = 512, MESSAGE_BYTES = 512, BACKLOG = 128 };

static void check(int result, const char *what) {
    if (result >= 0)
        return;
    fprintf(stderr, "user_echo_server: %s: %s\n", what, strerror(errno));
    exit(1);
}

static void add(int epoll_fd, int fd) {
    struct epoll_event event = {.events = EPOLLIN | EPOLLET, .data.fd = fd};
    check(fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK), "fcntl");
    check(epoll_ctl(epoll_fd, EPOLL_CTL_ADD, fd, &event), "epoll_ctl");
}

/* Edge-triggered: nobody says again that there are more. */
static void accept_all(int epoll_fd, int listener) {
    for (;;) {
        int client = accept(listener, NULL, NULL);
        if (client >= 0)
            add(epoll_fd, client);
        else if (errno == EAGAIN)
            return;
        else if (errno != ECONNABORTED && errno != EINTR)
            check(client, "accept");
    }
}

static void answer(int client) {
    char message[MESSAGE_BYTES];
    ssize_t size = recv(client, message, sizeof message, 0);
    if (size > 0)
        send(client, message, (size_t)size, MSG_NOSIGNAL);
    else if (size == 0 || errno != EAGAIN)
        close(client);
}

int main(int argc, char **argv) {
    if (argc < 2) {
        fprintf(stderr, "usage: user_echo_server PORT [BACKLOG]\n");
        return 2;
    }
    struct sockaddr_in address = {.sin_family = AF_INET,
                                  .sin_port = htons((uint16_t)atoi(argv[1]))};
    socklen_t size = sizeof address;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    int listener = socket(AF_INET, SOCK_STREAM, 0);
    check(listener, "socket");
    check(bind(listener, (struct sockaddr *)&address, size), "bind");
    check(listen(listener, argc > 2 ? atoi(argv[2]) : BACKLOG), "listen");
    check(getsockname(listener, (struct sockaddr *)&address, &size), "getsockname");
    int epoll_fd = epoll_create1(0);
    check(epoll_fd, "epoll_create1");
    add(epoll_fd, listener);
    printf("listening %d\n", ntohs(address.sin_port));
    fflush(stdout);
    for (;;) {
        struct epoll_event events[EVENTS];
        int ready = epoll_wait(epoll_fd, events, EVENTS, -1);
        if (ready < 0 && errno != EINTR)
            check(ready, "epoll_wait");
        for (int i = 0; i < ready; i++) {
            if (events[i].data.fd == listener)
                accept_all(epoll_fd, listener);
            else
                answer(events[i].data.fd);
        }
    }
}
