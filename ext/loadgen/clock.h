/* Time in ns, by clock_gettime(2). Any thread. */
#ifndef KECHO_LOADGEN_CLOCK_H
#define KECHO_LOADGEN_CLOCK_H

#include <stdint.h>
#include <time.h>

#define SECOND_NS UINT64_C(1000000000)
#define MS UINT64_C(1000000)

static inline uint64_t clock_read_ns(clockid_t clock) {
    struct timespec now;
    clock_gettime(clock, &now);
    return (uint64_t)now.tv_sec * SECOND_NS + (uint64_t)now.tv_nsec;
}

/* CLOCK_MONOTONIC. */
static inline uint64_t now_ns(void) {
    return clock_read_ns(CLOCK_MONOTONIC);
}

/* CPU time of the calling thread. */
static inline uint64_t thread_cpu_ns(void) {
    return clock_read_ns(CLOCK_THREAD_CPUTIME_ID);
}

/* Returns how long the calling thread has been ready to run and without a CPU. 0 if the kernel does
 * not say (CONFIG_SCHED_INFO). */
uint64_t thread_queued_ns(void);

static inline struct timespec timespec_of(uint64_t ns) {
    return (struct timespec){.tv_sec = (time_t)(ns / SECOND_NS), .tv_nsec = (long)(ns % SECOND_NS)};
}

#endif
