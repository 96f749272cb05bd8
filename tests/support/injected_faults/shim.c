/* Makes calls of the engine to libc fail. LD_PRELOADed into a server by __init__.py.
 *
 * Only calls that come from kecho's engine, told by their return address, can fail: Python's own
 * are passed on. FAULTS names a file that holds a `struct faults`, mapped by the test, too: rules
 * are written and counts are read while the server runs.
 *
 * What a fault leaves behind is what the kernel would leave. A recv or send that says EAGAIN, or
 * that is short, promises another edge once there is more (epoll(7)): the registration is made
 * again, upon which epoll reports whatever is there. close(2) closes, whatever it returns.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <link.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

/* ---- what is shared with the test: Rule and CALLS in __init__.py ------------------------ */

enum call {
    CALL_ACCEPT4,
    CALL_RECV,
    CALL_SEND,
    CALL_EPOLL_WAIT,
    CALL_EPOLL_CTL,
    CALL_SETSOCKOPT,
    CALL_CONNECT,
    CALL_CLOSE,
    CALL_EVENTFD_WRITE,
    CALL_SCHED_YIELD,
    CALL_MALLOC,
    CALL_ALIGNED_ALLOC,
    CALL_EPOLL_CREATE1,
    CALL_EVENTFD,
    CALLS
};

enum whose { WHOSE_ANY, WHOSE_LISTENER, WHOSE_OTHER };

#define ACTIONS_MOST 64

struct rule {
    uint32_t armed;     /* atomic; the rest but the counts is read only while it is set */
    uint32_t skip;      /* so many calls pass first */
    uint32_t every;     /* then every so many-th fails; 0: by chance */
    uint32_t per_mille; /* that chance */
    uint32_t most;      /* faults; 0: no end */
    uint32_t detail;    /* operation of epoll_ctl, option of setsockopt; 0: any */
    uint32_t whose;     /* enum whose: which descriptors */
    uint32_t action_count;
    int32_t actions[ACTIONS_MOST]; /* in turn or by chance: errno, or -n: short, n bytes at most */
    uint64_t seed;
    uint64_t matched;  /* atomic: calls since it was armed that it is about */
    uint64_t injected; /* atomic: of those, the ones that failed */
    uint64_t calls;    /* atomic: all the engine's calls of this kind, ever */
};

struct faults {
    struct rule rules[CALLS];
};

static struct faults *faults;

__attribute__((constructor)) static void map_faults(void) {
    const char *path = getenv("FAULTS");
    int fd = path ? open(path, O_RDWR | O_CLOEXEC) : -1;
    if (fd < 0)
        return;
    void *mapped = mmap(NULL, sizeof(*faults), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (mapped != MAP_FAILED)
        faults = mapped;
    close(fd);
}

/* ---- whose call is it ---------------------------------------------------------------------- */

static uintptr_t engine_begin, engine_end; /* atomic; 0 until the engine's first call */

struct found {
    const char *name;
    uintptr_t begin, end;
};

static int look_at_object(struct dl_phdr_info *info, size_t size, void *argument) {
    struct found *found = argument;
    (void)size;
    if (!info->dlpi_name || strcmp(info->dlpi_name, found->name) != 0)
        return 0;
    for (int i = 0; i < info->dlpi_phnum; i++) {
        const ElfW(Phdr) *part = &info->dlpi_phdr[i];
        uintptr_t begin = info->dlpi_addr + part->p_vaddr;
        if (part->p_type != PT_LOAD || !(part->p_flags & PF_X))
            continue;
        found->begin = begin;
        found->end = begin + part->p_memsz;
    }
    return 1;
}

static void look_for_engine(const void *caller) {
    Dl_info info;
    if (!dladdr(caller, &info) || !info.dli_fname || !strstr(info.dli_fname, "/_engine."))
        return;
    struct found found = {info.dli_fname, 0, 0};
    dl_iterate_phdr(look_at_object, &found);
    __atomic_store_n(&engine_end, found.end, __ATOMIC_RELAXED);
    __atomic_store_n(&engine_begin, found.begin, __ATOMIC_RELEASE);
}

static int is_engine(const void *caller) {
    uintptr_t begin = __atomic_load_n(&engine_begin, __ATOMIC_ACQUIRE);
    return begin && (uintptr_t)caller >= begin &&
           (uintptr_t)caller < __atomic_load_n(&engine_end, __ATOMIC_RELAXED);
}

/* ---- does it fail -------------------------------------------------------------------------- */

static uint64_t scramble(uint64_t x) { /* SplitMix64's mixing function */
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}

static int is_listener(int fd) {
    int listens = 0;
    socklen_t size = sizeof(listens);
    int saved = errno;
    getsockopt(fd, SOL_SOCKET, SO_ACCEPTCONN, &listens, &size);
    errno = saved;
    return listens;
}

static int32_t action_of(struct rule *rule, uint32_t detail, int fd) {
    if (!__atomic_load_n(&rule->armed, __ATOMIC_ACQUIRE) || rule->action_count == 0 ||
        (rule->detail && rule->detail != detail) ||
        (rule->whose && (rule->whose == WHOSE_LISTENER) != is_listener(fd)))
        return 0;
    uint64_t number = __atomic_fetch_add(&rule->matched, 1, __ATOMIC_RELAXED);
    if (number < rule->skip)
        return 0;
    number -= rule->skip;
    uint64_t chance = scramble(rule->seed + number * 0x9e3779b97f4a7c15u);
    if (rule->every ? number % rule->every != 0 : chance % 1000 >= rule->per_mille)
        return 0;
    uint64_t injected = __atomic_load_n(&rule->injected, __ATOMIC_RELAXED);
    do {
        if (rule->most && injected >= rule->most)
            return 0;
    } while (!__atomic_compare_exchange_n(&rule->injected, &injected, injected + 1, 0,
                                          __ATOMIC_ACQ_REL, __ATOMIC_RELAXED));
    return rule->actions[(rule->every ? injected : chance >> 32) % rule->action_count];
}

/* 0: the call is to be made as it is. */
static int32_t fault(enum call call, uint32_t detail, int fd, const void *caller) {
    if (!faults)
        return 0;
    if (call != CALL_MALLOC && !__atomic_load_n(&engine_begin, __ATOMIC_RELAXED))
        look_for_engine(caller);
    if (!is_engine(caller))
        return 0;
    __atomic_fetch_add(&faults->rules[call].calls, 1, __ATOMIC_RELAXED);
    return action_of(&faults->rules[call], detail, fd);
}

#define CALLER __builtin_extract_return_addr(__builtin_return_address(0))

static int fails(int error) {
    errno = error;
    return -1;
}

/* The libc's function of this name. */
#define REAL(name)                                                                                 \
    ({                                                                                             \
        static __typeof__(&name) real;                                                             \
        __typeof__(&name) found = __atomic_load_n(&real, __ATOMIC_RELAXED);                        \
        if (!found) {                                                                              \
            found = (__typeof__(&name))dlsym(RTLD_NEXT, #name);                                    \
            __atomic_store_n(&real, found, __ATOMIC_RELAXED);                                      \
        }                                                                                          \
        found;                                                                                     \
    })

/* ---- edges --------------------------------------------------------------------------------- */

#define WATCHED_MOST 65536

/* By descriptor: how it is registered. Written by whoever owns it in the engine. */
static struct watch {
    int epoll_fd; /* plus one; 0: not registered */
    struct epoll_event event;
} watches[WATCHED_MOST];

static void new_edge(int fd) {
    if (fd < 0 || fd >= WATCHED_MOST || watches[fd].epoll_fd == 0)
        return;
    int saved = errno, epoll_fd = watches[fd].epoll_fd - 1;
    struct epoll_event event = watches[fd].event;
    if (REAL(epoll_ctl)(epoll_fd, EPOLL_CTL_MOD, fd, &event) < 0) { /* EPOLLEXCLUSIVE */
        REAL(epoll_ctl)(epoll_fd, EPOLL_CTL_DEL, fd, NULL);
        REAL(epoll_ctl)(epoll_fd, EPOLL_CTL_ADD, fd, &event);
    }
    errno = saved;
}

/* ---- the calls ----------------------------------------------------------------------------- */

int accept4(int fd, struct sockaddr *address, socklen_t *length, int flags) {
    int32_t action = fault(CALL_ACCEPT4, 0, fd, CALLER);
    if (action == EAGAIN)
        new_edge(fd);
    return action ? fails(action) : REAL(accept4)(fd, address, length, flags);
}

ssize_t recv(int fd, void *buffer, size_t size, int flags) {
    int32_t action = fault(CALL_RECV, 0, fd, CALLER);
    if (action > 0) {
        if (action == EAGAIN)
            new_edge(fd);
        return fails(action);
    }
    if (action == 0 || (size_t)-action >= size)
        return REAL(recv)(fd, buffer, size, flags);
    ssize_t received = REAL(recv)(fd, buffer, (size_t)-action, flags);
    new_edge(fd);
    return received;
}

ssize_t send(int fd, const void *buffer, size_t size, int flags) {
    int32_t action = fault(CALL_SEND, 0, fd, CALLER);
    if (action > 0) {
        if (action == EAGAIN)
            new_edge(fd);
        return fails(action);
    }
    if (action == 0 || (size_t)-action >= size)
        return REAL(send)(fd, buffer, size, flags);
    ssize_t sent = REAL(send)(fd, buffer, (size_t)-action, flags);
    new_edge(fd);
    return sent;
}

int epoll_wait(int fd, struct epoll_event *events, int most, int timeout_ms) {
    int32_t action = fault(CALL_EPOLL_WAIT, 0, fd, CALLER);
    return action ? fails(action) : REAL(epoll_wait)(fd, events, most, timeout_ms);
}

int epoll_ctl(int epoll_fd, int operation, int fd, struct epoll_event *event) {
    int32_t action = fault(CALL_EPOLL_CTL, (uint32_t)operation, fd, CALLER);
    /* Not there any more, or there already: then it is. */
    int is_done = action == 0 || (operation == EPOLL_CTL_DEL && action == ENOENT) ||
                  (operation == EPOLL_CTL_ADD && action == EEXIST);
    /* Noted first: once it is registered, another worker may want a new edge. */
    if (is_done && operation != EPOLL_CTL_DEL && is_engine(CALLER) && fd >= 0 &&
        fd < WATCHED_MOST) {
        watches[fd].event = *event;
        watches[fd].epoll_fd = epoll_fd + 1;
    }
    int result = is_done ? REAL(epoll_ctl)(epoll_fd, operation, fd, event) : 0;
    return action ? fails(action) : result;
}

int setsockopt(int fd, int level, int option, const void *value, socklen_t length) {
    int32_t action = fault(CALL_SETSOCKOPT, (uint32_t)option, fd, CALLER);
    return action ? fails(action) : REAL(setsockopt)(fd, level, option, value, length);
}

int connect(int fd, const struct sockaddr *address, socklen_t length) {
    int32_t action = fault(CALL_CONNECT, 0, fd, CALLER);
    return action ? fails(action) : REAL(connect)(fd, address, length);
}

int close(int fd) {
    int32_t action = fault(CALL_CLOSE, 0, fd, CALLER);
    if (is_engine(CALLER) && fd >= 0 && fd < WATCHED_MOST)
        watches[fd].epoll_fd = 0;
    int result = REAL(close)(fd);
    return action ? fails(action) : result;
}

int eventfd_write(int fd, eventfd_t value) {
    int32_t action = fault(CALL_EVENTFD_WRITE, 0, fd, CALLER);
    /* EAGAIN: it is full, and so it is readable. */
    int result = action == 0 || action == EAGAIN ? REAL(eventfd_write)(fd, value) : 0;
    return action ? fails(action) : result;
}

int sched_yield(void) {
    int32_t action = fault(CALL_SCHED_YIELD, 0, -1, CALLER);
    return action ? fails(action) : REAL(sched_yield)();
}

int epoll_create1(int flags) {
    int32_t action = fault(CALL_EPOLL_CREATE1, 0, -1, CALLER);
    return action ? fails(action) : REAL(epoll_create1)(flags);
}

int eventfd(unsigned int value, int flags) {
    int32_t action = fault(CALL_EVENTFD, 0, -1, CALLER);
    return action ? fails(action) : REAL(eventfd)(value, flags);
}

void *aligned_alloc(size_t alignment, size_t size) {
    if (fault(CALL_ALIGNED_ALLOC, 0, -1, CALLER)) {
        errno = ENOMEM;
        return NULL;
    }
    return REAL(aligned_alloc)(alignment, size);
}

void *__libc_malloc(size_t size); /* dlsym itself may need memory */

void *malloc(size_t size) {
    if (fault(CALL_MALLOC, 0, -1, CALLER)) {
        errno = ENOMEM;
        return NULL;
    }
    return __libc_malloc(size);
}
