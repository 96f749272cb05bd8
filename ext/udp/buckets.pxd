"""Buckets of tokens, and tables of them.

A bucket is kept as the time when it is full again (the generic cell rate algorithm, ITU-T I.371):
to take a token moves that time on by one interval, and it may lie at most a burst ahead of now.
So a table needs no clean-up, and an entry is two words.

A table is bounded: who finds the set taken gets the place of the one that is full, or full soonest.
"""
from kernel.clock cimport CLOCK_MONOTONIC, clock_gettime, timespec
from libc.stdint cimport uint32_t, uint64_t
from udp.layout cimport KECHO_UDP_SETS, KECHO_UDP_WAYS, Bucket, BucketSet, Rate


cdef enum:
    TICKS_PER_NS = 16  # 64 bits of them last 36 years of uptime
    TICKS_PER_MS = 16000000
    BURST_DATAGRAMS_LEAST = 128  # what UDP_SEGMENT may have sent at once
    BURSTS_PER_S = 10  # otherwise the burst is a tenth of a second's worth


cdef inline uint64_t now_in_ticks() noexcept nogil:
    cdef timespec now
    clock_gettime(CLOCK_MONOTONIC, &now)
    return (<uint64_t>now.tv_sec * 1000000000 + <uint64_t>now.tv_nsec) * TICKS_PER_NS


cdef inline void rate_set(Rate* rate, uint32_t datagrams_per_s) noexcept nogil:
    if datagrams_per_s == 0:
        rate.interval_ticks = rate.window_ticks = 0
        return
    rate.interval_ticks = max(
        <uint64_t>1000000000 * TICKS_PER_NS // datagrams_per_s, <uint64_t>1)
    rate.window_ticks = rate.interval_ticks * max(
        datagrams_per_s // BURSTS_PER_S, <uint32_t>BURST_DATAGRAMS_LEAST)


cdef inline uint64_t bucket_ahead(const Bucket* bucket, uint64_t now) noexcept nogil:
    """Ticks until it is full."""
    return bucket.full_at - now if bucket.full_at > now else 0


cdef inline uint64_t bucket_tokens(
    const Bucket* bucket, const Rate* rate, uint64_t now
) noexcept nogil:
    cdef uint64_t ahead = bucket_ahead(bucket, now)
    return (rate.window_ticks - ahead) // rate.interval_ticks if rate.window_ticks > ahead else 0


cdef inline void bucket_take(
    Bucket* bucket, const Rate* rate, uint64_t now, uint64_t tokens
) noexcept nogil:
    bucket.full_at = max(bucket.full_at, now) + tokens * rate.interval_ticks


cdef inline Bucket* bucket_of(BucketSet* sets, uint64_t source) noexcept nogil:
    """The source's own bucket, or one that has become its own, and is full then. `source` is a
    fingerprint: nobody can aim at one set."""
    cdef BucketSet* candidates = &sets[source % KECHO_UDP_SETS]
    cdef Bucket* bucket
    cdef Bucket* oldest = &candidates.buckets[0]
    cdef int way
    for way in range(KECHO_UDP_WAYS):
        bucket = &candidates.buckets[way]
        if bucket.source == source:
            return bucket
        if bucket.full_at < oldest.full_at:
            oldest = bucket
    oldest.source = source
    oldest.full_at = 0
    return oldest
