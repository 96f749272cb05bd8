/* A histogram of nanoseconds with HdrHistogram's index mapping: 3 significant digits, 1 ns to one
 * hour, in memory of a fixed size. One thread records; any thread may read at the same time.
 * kecho/bench/results/buckets.py has the same mapping.
 */
#ifndef KECHO_LOADGEN_HISTOGRAM_H
#define KECHO_LOADGEN_HISTOGRAM_H

#include <stddef.h>
#include <stdint.h>

#include "common/atomics.h"

enum {
    HISTOGRAM_HALF_BITS = 10, /* 1024 counters for each power of two above 2048 */
    HISTOGRAM_HALF = 1 << HISTOGRAM_HALF_BITS,
    HISTOGRAM_BUCKETS = 32,
    HISTOGRAM_LENGTH = (HISTOGRAM_BUCKETS + 1) * HISTOGRAM_HALF,
};
#define HISTOGRAM_HIGHEST UINT64_C(3600000000000)

/* Pages that were never written to are not resident, so an empty histogram takes no memory. */
struct histogram {
    uint64_t *counts; /* HISTOGRAM_LENGTH */
};

/* Allocates the counters, all zero. Returns 0 or -ENOMEM. */
int histogram_open(struct histogram *histogram);
void histogram_close(struct histogram *histogram);

/* Returns the index of a value's counter. value: HISTOGRAM_HIGHEST at most. */
static inline size_t histogram_index(uint64_t value) {
    /* The power of two chooses the bucket, the value's first eleven bits the counter in it. */
    unsigned bits = 64u - (unsigned)__builtin_clzll(value | (2 * HISTOGRAM_HALF - 1));
    unsigned bucket = bits - (HISTOGRAM_HALF_BITS + 1);
    return ((size_t)bucket << HISTOGRAM_HALF_BITS) + (size_t)(value >> bucket);
}

/* Counts one value. More than an hour counts as an hour. */
static inline void histogram_record(struct histogram *histogram, uint64_t value_ns) {
    uint64_t value = value_ns < HISTOGRAM_HIGHEST ? value_ns : HISTOGRAM_HIGHEST;
    atomic_u64_add_single_writer(&histogram->counts[histogram_index(value)], 1);
}

#endif
