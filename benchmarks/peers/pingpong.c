/* pingpong: the barest closed-loop client, to measure a server with as little as possible in
 * between. One thread, one epoll instance; every connection has one message outstanding, and the
 * next is sent when the last byte of the reply has been read and compared.
 *
 *     pingpong PORT CONNECTIONS SECONDS [BYTES]
 *
 * Prints one line of JSON: echoes, echoes per second, and the send-to-receive time's percentiles
 * in ns, exact to 1/64 of the value. Exit status 1: a wrong byte, or a connection ended.
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
#include <time.h>
#include <unistd.h>

enum { EVENTS = 256, SUB_BUCKET_BITS = 6, BUCKETS = 64 << SUB_BUCKET_BITS, MOST_BYTES = 65536 };

struct connection {
    int fd;
    uint32_t received; /* bytes of the present reply */
    uint64_t sent_ns;
    uint64_t sequence;
    uint8_t *message;
};

static uint64_t histogram[BUCKETS];
static uint64_t slowest_ns;

static uint64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static void die(const char *what) {
    fprintf(stderr, "pingpong: %s: %s\n", what, strerror(errno));
    exit(1);
}

/* Log-linear: 64 buckets for each power of two. */
static unsigned bucket_of(uint64_t ns) {
    if (ns < 1u << SUB_BUCKET_BITS)
        return (unsigned)ns;
    unsigned shift = 63u - (unsigned)__builtin_clzll(ns) - SUB_BUCKET_BITS;
    return ((shift + 1) << SUB_BUCKET_BITS) + (unsigned)(ns >> shift) - (1u << SUB_BUCKET_BITS);
}

static uint64_t value_of(unsigned bucket) {
    unsigned shift = bucket >> SUB_BUCKET_BITS;
    uint64_t low = bucket & ((1u << SUB_BUCKET_BITS) - 1);
    return shift ? (low + (1u << SUB_BUCKET_BITS)) << (shift - 1) : low;
}

static uint64_t percentile(uint64_t count, double share) {
    uint64_t wanted = (uint64_t)((double)count * share), seen = 0;
    for (unsigned bucket = 0; bucket < BUCKETS; bucket++) {
        seen += histogram[bucket];
        if (seen > wanted)
            return value_of(bucket);
    }
    return slowest_ns;
}

static void send_message(struct connection *c, size_t bytes) {
    c->sequence++;
    memcpy(c->message, &c->sequence, bytes < sizeof c->sequence ? bytes : sizeof c->sequence);
    c->received = 0;
    c->sent_ns = now_ns();
    /* One message fits an empty send buffer: a short send would be a fault. */
    if (send(c->fd, c->message, bytes, MSG_NOSIGNAL) != (ssize_t)bytes)
        die("send");
}

/* True when the reply is complete. */
static int read_reply(struct connection *c, size_t bytes) {
    static uint8_t buffer[MOST_BYTES];
    ssize_t size = recv(c->fd, buffer, bytes - c->received, 0);
    if (size < 0 && (errno == EAGAIN || errno == EINTR))
        return 0;
    if (size <= 0)
        die("recv");
    if (memcmp(buffer, c->message + c->received, (size_t)size) != 0) {
        fprintf(stderr, "pingpong: a wrong byte came back\n");
        exit(1);
    }
    c->received += (uint32_t)size;
    return c->received == bytes;
}

static void open_connection(struct connection *c, int epoll_fd, uint16_t port, size_t bytes) {
    struct sockaddr_in server = {.sin_family = AF_INET, .sin_port = htons(port)};
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = c};
    int one = 1;
    server.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    c->fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (c->fd < 0 || connect(c->fd, (struct sockaddr *)&server, sizeof server) < 0)
        die("connect");
    setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    c->message = malloc(bytes);
    if (c->message == NULL || epoll_ctl(epoll_fd, EPOLL_CTL_ADD, c->fd, &event) < 0)
        die("epoll_ctl");
    for (size_t i = 0; i < bytes; i++)
        c->message[i] = (uint8_t)(c->fd + (int)i);
}

int main(int argc, char **argv) {
    if (argc < 4) {
        fprintf(stderr, "usage: pingpong PORT CONNECTIONS SECONDS [BYTES]\n");
        return 2;
    }
    uint16_t port = (uint16_t)atoi(argv[1]);
    int count = atoi(argv[2]);
    double seconds = atof(argv[3]);
    size_t bytes = argc > 4 ? (size_t)atol(argv[4]) : 64;
    if (count < 1 || bytes < 1 || bytes > MOST_BYTES) {
        fprintf(stderr, "pingpong: at least 1 connection, 1 to %d bytes\n", MOST_BYTES);
        return 2;
    }
    int epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    struct connection *connections = calloc((size_t)count, sizeof *connections);
    if (epoll_fd < 0 || connections == NULL)
        die("start");
    for (int i = 0; i < count; i++)
        open_connection(&connections[i], epoll_fd, port, bytes);
    for (int i = 0; i < count; i++)
        send_message(&connections[i], bytes);

    uint64_t started_ns = now_ns(), echoes = 0;
    uint64_t end_ns = started_ns + (uint64_t)(seconds * 1e9);
    while (now_ns() < end_ns) {
        struct epoll_event events[EVENTS];
        int ready = epoll_wait(epoll_fd, events, EVENTS, 1000);
        if (ready < 0 && errno != EINTR)
            die("epoll_wait");
        for (int i = 0; i < ready; i++) {
            struct connection *c = events[i].data.ptr;
            if (!read_reply(c, bytes))
                continue;
            uint64_t took_ns = now_ns() - c->sent_ns;
            histogram[bucket_of(took_ns)]++;
            if (took_ns > slowest_ns)
                slowest_ns = took_ns;
            echoes++;
            send_message(c, bytes);
        }
    }
    double took_s = (double)(now_ns() - started_ns) / 1e9;
    printf("{\"connections\": %d, \"bytes\": %zu, \"seconds\": %.3f, \"echoes\": %lu, "
           "\"rate_per_s\": %.0f, \"p50_ns\": %lu, \"p99_ns\": %lu, \"p999_ns\": %lu, "
           "\"max_ns\": %lu}\n",
           count, bytes, took_s, (unsigned long)echoes, (double)echoes / took_s,
           (unsigned long)percentile(echoes, 0.5), (unsigned long)percentile(echoes, 0.99),
           (unsigned long)percentile(echoes, 0.999), (unsigned long)slowest_ns);
    return 0;
}
