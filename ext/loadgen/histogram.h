/* A histogram of nanoseconds with HdrHistogram's index mapping: 3 significant digits, 1 ns to one
 * hour, memory that does not grow. One thread records; any thread may read meanwhile.
 * kecho/bench/results/histogram.py knows the same mapping and does everything but record.
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

/* Memory that was never written to is never resident: a histogram that records nothing is free. */
struct histogram {
    uint64_t *counts; /* HISTOGRAM_LENGTH */
};

/* 0 or -ENOMEM. */
int histogram_open(struct histogram *histogram);
void histogram_close(struct histogram *histogram);

static inline size_t histogram_index(uint64_t value) {
    /* The bucket is the power of two, the rest the first eleven bits of the value. */
    unsigned bits = 64u - (unsigned)__builtin_clzll(value | (2 * HISTOGRAM_HALF - 1));
    unsigned bucket = bits - (HISTOGRAM_HALF_BITS + 1);
    return ((size_t)bucket << HISTOGRAM_HALF_BITS) + (size_t)(value >> bucket);
}

/* Counts one value; what is longer than an hour counts as an hour. */
static inline void histogram_record(struct histogram *histogram, uint64_t value_ns) {
    uint64_t value = value_ns < HISTOGRAM_HIGHEST ? value_ns : HISTOGRAM_HIGHEST;
    atomic_u64_add_single_writer(&histogram->counts[histogram_index(value)], 1);
}

#endif
