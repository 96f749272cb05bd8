/* uring_echo: the same single-threaded echo server by io_uring, to see what that gains. Multishot
 * accept into registered files, multishot recv into a ring of buffers, one send at a time for each
 * connection, in the order in which its buffers came. What is not sent keeps its buffer; when all
 * are taken, nobody is read until one comes back.
 *
 *     uring_echo PORT [BACKLOG]
 *
 * Listens on 127.0.0.1; port 0 takes a free one. Prints "listening PORT" and serves until SIGTERM.
 * Needs Linux 6.1 and liburing. 16,384 connections at most.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <liburing.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

enum {
    ENTRIES = 4096,
    COMPLETIONS = 65536,
    CONNECTIONS_MOST = 16384,
    BUFFERS = 256,
    BUFFER_BYTES = 65536,
    STRIDE = BUFFER_BYTES + 4160, /* so that their beginnings do not share a set of the cache */
    GROUP = 0,
    NONE = -1
};

enum operation { ACCEPT, RECV, SEND, SHUTDOWN, CLOSE };

struct chunk {
    int next; /* of the same connection */
    unsigned begin, end;
};

struct connection {
    int first, last; /* chunks that wait to be sent, the first one being sent; NONE */
    char is_receiving, is_shutting_down, has_ended, has_failed;
};

static struct io_uring ring;
static struct io_uring_buf_ring *buffer_ring;
static uint8_t *buffers;
static struct chunk chunks[BUFFERS];
static struct connection connections[CONNECTIONS_MOST];
static int starving[CONNECTIONS_MOST]; /* connections that found no buffer */
static int starving_count;

static void die(const char *what, int error) {
    fprintf(stderr, "uring_echo: %s: %s\n", what, strerror(error));
    exit(1);
}

static struct io_uring_sqe *request(enum operation operation, int file) {
    struct io_uring_sqe *sqe;
    while ((sqe = io_uring_get_sqe(&ring)) == NULL) {
        int result = io_uring_submit(&ring);
        if (result < 0)
            die("io_uring_submit", -result);
    }
    io_uring_sqe_set_data64(sqe, (uint64_t)(unsigned)file << 8 | operation);
    return sqe;
}

static void begin_accepting(int listener) {
    struct io_uring_sqe *sqe = request(ACCEPT, 0);
    io_uring_prep_multishot_accept_direct(sqe, listener, NULL, NULL, 0);
}

static void begin_receiving(int file) {
    struct io_uring_sqe *sqe = request(RECV, file);
    io_uring_prep_recv_multishot(sqe, file, NULL, 0, 0);
    sqe->flags |= IOSQE_FIXED_FILE | IOSQE_BUFFER_SELECT;
    sqe->buf_group = GROUP;
    connections[file].is_receiving = 1;
}

static void send_first(int file) {
    int number = connections[file].first;
    struct chunk *chunk = &chunks[number];
    struct io_uring_sqe *sqe = request(SEND, file);
    io_uring_prep_send(sqe, file, buffers + (size_t)number * STRIDE + chunk->begin,
                       chunk->end - chunk->begin, MSG_NOSIGNAL | MSG_WAITALL);
    sqe->flags |= IOSQE_FIXED_FILE;
}

static void give_back(int number) {
    io_uring_buf_ring_add(buffer_ring, buffers + (size_t)number * STRIDE, BUFFER_BYTES,
                          (unsigned short)number, io_uring_buf_ring_mask(BUFFERS), 0);
    io_uring_buf_ring_advance(buffer_ring, 1);
    if (starving_count > 0)
        begin_receiving(starving[--starving_count]);
}

/* Closes a connection of which nothing is under way any more. */
static void end_if_done(int file) {
    struct connection *c = &connections[file];
    if (c->is_receiving || c->is_shutting_down || !c->has_ended || c->first != NONE)
        return;
    struct io_uring_sqe *sqe = request(CLOSE, file);
    io_uring_prep_close_direct(sqe, (unsigned)file);
}

static void on_accept(int listener, struct io_uring_cqe *cqe) {
    if (cqe->res >= 0) {
        connections[cqe->res] = (struct connection){.first = NONE, .last = NONE};
        begin_receiving(cqe->res);
    }
    if (!(cqe->flags & IORING_CQE_F_MORE))
        begin_accepting(listener);
}

static void on_received(int file, struct io_uring_cqe *cqe) {
    struct connection *c = &connections[file];
    if (cqe->flags & IORING_CQE_F_BUFFER) {
        int number = (int)(cqe->flags >> IORING_CQE_BUFFER_SHIFT);
        if (cqe->res <= 0 || c->has_failed) {
            give_back(number);
        } else {
            chunks[number] = (struct chunk){NONE, 0, (unsigned)cqe->res};
            if (c->first == NONE) {
                c->first = c->last = number;
                send_first(file);
            } else {
                c->last = chunks[c->last].next = number;
            }
        }
    }
    if (cqe->flags & IORING_CQE_F_MORE)
        return;
    c->is_receiving = 0;
    if (cqe->res == -ENOBUFS && !c->has_failed)
        starving[starving_count++] = file;
    else if (cqe->res > 0)
        begin_receiving(file);
    else
        c->has_ended = 1;
    end_if_done(file);
}

static void on_sent(int file, struct io_uring_cqe *cqe) {
    struct connection *c = &connections[file];
    int number = c->first;
    if (cqe->res < 0) {
        while ((number = c->first) != NONE) {
            c->first = chunks[number].next;
            give_back(number);
        }
        c->has_failed = 1;
        c->is_shutting_down = 1;
        struct io_uring_sqe *sqe = request(SHUTDOWN, file); /* ends what is being received */
        io_uring_prep_shutdown(sqe, file, SHUT_RDWR);
        sqe->flags |= IOSQE_FIXED_FILE;
        return;
    }
    chunks[number].begin += (unsigned)cqe->res;
    if (chunks[number].begin == chunks[number].end) {
        c->first = chunks[number].next;
        give_back(number);
    }
    if (c->first != NONE)
        send_first(file);
    else
        end_if_done(file);
}

static int listen_at(uint16_t port, int backlog) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(port)};
    socklen_t size = sizeof address;
    int one = 1, fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    if (fd < 0)
        die("socket", errno);
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one); /* accepted sockets inherit it */
    if (bind(fd, (struct sockaddr *)&address, size) < 0)
        die("bind", errno);
    if (listen(fd, backlog) < 0)
        die("listen", errno);
    getsockname(fd, (struct sockaddr *)&address, &size);
    printf("listening %u\n", ntohs(address.sin_port));
    fflush(stdout);
    return fd;
}

static void open_ring(void) {
    struct io_uring_params parameters = {.flags = IORING_SETUP_SINGLE_ISSUER |
                                                  IORING_SETUP_DEFER_TASKRUN | IORING_SETUP_CQSIZE,
                                         .cq_entries = COMPLETIONS};
    struct rlimit files;
    int result = io_uring_queue_init_params(ENTRIES, &ring, &parameters);
    if (result < 0)
        die("io_uring_queue_init", -result);
    getrlimit(RLIMIT_NOFILE, &files);
    result = io_uring_register_files_sparse(
        &ring, files.rlim_cur < CONNECTIONS_MOST ? (unsigned)files.rlim_cur : CONNECTIONS_MOST);
    if (result < 0)
        die("io_uring_register_files", -result);
    buffer_ring = mmap(NULL, BUFFERS * sizeof(struct io_uring_buf), PROT_READ | PROT_WRITE,
                       MAP_ANONYMOUS | MAP_PRIVATE, -1, 0);
    buffers = aligned_alloc(64, (size_t)BUFFERS * STRIDE);
    if (buffer_ring == MAP_FAILED || buffers == NULL)
        die("buffers", ENOMEM);
    struct io_uring_buf_reg registration = {
        .ring_addr = (uintptr_t)buffer_ring, .ring_entries = BUFFERS, .bgid = GROUP};
    result = io_uring_register_buf_ring(&ring, &registration, 0);
    if (result < 0)
        die("io_uring_register_buf_ring", -result);
    io_uring_buf_ring_init(buffer_ring);
    for (int number = 0; number < BUFFERS; number++)
        give_back(number);
}

int main(int argc, char **argv) {
    if (argc < 2) {
        fprintf(stderr, "usage: uring_echo PORT [BACKLOG]\n");
        return 2;
    }
    open_ring();
    int listener = listen_at((uint16_t)atoi(argv[1]), argc > 2 ? atoi(argv[2]) : 128);
    begin_accepting(listener);
    for (;;) {
        struct io_uring_cqe *cqe;
        unsigned head, count = 0;
        int result = io_uring_submit_and_wait(&ring, 1);
        if (result < 0 && result != -EINTR)
            die("io_uring_submit_and_wait", -result);
        io_uring_for_each_cqe(&ring, head, cqe) {
            int file = (int)(cqe->user_data >> 8);
            count++;
            switch ((enum operation)(cqe->user_data & 0xff)) {
            case ACCEPT:
                on_accept(listener, cqe);
                break;
            case RECV:
                on_received(file, cqe);
                break;
            case SEND:
                on_sent(file, cqe);
                break;
            case SHUTDOWN:
                connections[file].is_shutting_down = 0;
                end_if_done(file);
                break;
            case CLOSE:
                break;
            }
        }
        io_uring_cq_advance(&ring, count);
    }
}
