"""How many datagrams are answered: a bucket of tokens for each source, and one for all of them.

A bucket is kept as the time when it is full again (the generic cell rate algorithm, ITU-T I.371):
to take a token moves that time on by one interval, and it may lie at most a burst ahead of now.
So the table needs no clean-up, and an entry is two words.

The table is bounded: a source that finds its set taken gets the place of the one that is full, or
full soonest. Somebody with thousands of addresses has a limit in the rate over all.
"""
from kernel.clock cimport CLOCK_MONOTONIC, clock_gettime, timespec
from kernel.pthread cimport (
    pthread_mutex_destroy, pthread_mutex_init, pthread_mutex_lock, pthread_mutex_unlock,
)
from libc.stdint cimport uint32_t, uint64_t
from udp.layout cimport KECHO_UDP_SETS, KECHO_UDP_WAYS, Bucket, BucketSet, Limiter, Rate


cdef enum:
    TICKS_PER_NS = 16  # 64 bits of them last 36 years of uptime
    BURST_DATAGRAMS_LEAST = 128  # what UDP_SEGMENT may have sent at once
    BURSTS_PER_S = 10  # otherwise the burst is a tenth of a second's worth


cdef inline uint64_t limiter_now() noexcept nogil:
    cdef timespec now
    clock_gettime(CLOCK_MONOTONIC, &now)
    return (<uint64_t>now.tv_sec * 1000000000 + <uint64_t>now.tv_nsec) * TICKS_PER_NS


cdef inline void _set_rate(Rate* rate, uint32_t datagrams_per_s) noexcept nogil:
    if datagrams_per_s == 0:
        rate.interval_ticks = rate.window_ticks = 0
        return
    rate.interval_ticks = max(
        <uint64_t>1000000000 * TICKS_PER_NS // datagrams_per_s, <uint64_t>1)
    rate.window_ticks = rate.interval_ticks * max(
        datagrams_per_s // BURSTS_PER_S, <uint32_t>BURST_DATAGRAMS_LEAST)


cdef inline int limiter_init(
    Limiter* limiter, uint32_t per_source_per_s, uint32_t total_per_s
) noexcept nogil:
    """`sets` is the caller's, zeroed, and `hash_key`, drawn. Returns 0 or -errno."""
    _set_rate(&limiter.per_source, per_source_per_s)
    _set_rate(&limiter.total, total_per_s)
    return -pthread_mutex_init(&limiter.lock, NULL)


cdef inline void limiter_destroy(Limiter* limiter) noexcept nogil:
    pthread_mutex_destroy(&limiter.lock)


cdef inline void limiter_lock(Limiter* limiter) noexcept nogil:
    pthread_mutex_lock(&limiter.lock)


cdef inline void limiter_unlock(Limiter* limiter) noexcept nogil:
    pthread_mutex_unlock(&limiter.lock)


cdef inline uint64_t _tokens(const Rate* rate, const Bucket* bucket, uint64_t now) noexcept nogil:
    cdef uint64_t ahead = bucket.full_at - now if bucket.full_at > now else 0
    return (rate.window_ticks - ahead) // rate.interval_ticks if rate.window_ticks > ahead else 0


cdef inline void _take(
    const Rate* rate, Bucket* bucket, uint64_t now, uint64_t tokens
) noexcept nogil:
    bucket.full_at = max(bucket.full_at, now) + tokens * rate.interval_ticks


cdef inline Bucket* _bucket_of(Limiter* limiter, uint64_t source) noexcept nogil:
    """The source's own bucket, or one that has become its own, and is full then. A source is known
    by its hash: that two share one is less likely than to guess the key."""
    cdef BucketSet* candidates = &limiter.sets[source % KECHO_UDP_SETS]
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


cdef inline uint32_t limiter_take(
    Limiter* limiter, uint64_t source, uint32_t wanted, uint64_t now, uint32_t* refused_source,
) noexcept nogil:
    """How many of `wanted` datagrams may be answered, under the lock. Of the rest,
    *refused_source are over the source's own rate, the others over that of all."""
    cdef Bucket* bucket = NULL
    cdef uint64_t granted = wanted
    refused_source[0] = 0
    if limiter.per_source.interval_ticks != 0:
        bucket = _bucket_of(limiter, source)
        granted = min(granted, _tokens(&limiter.per_source, bucket, now))
        refused_source[0] = wanted - <uint32_t>granted
    if limiter.total.interval_ticks != 0:
        granted = min(granted, _tokens(&limiter.total, &limiter.everybody, now))
        _take(&limiter.total, &limiter.everybody, now, granted)
    if bucket != NULL:
        _take(&limiter.per_source, bucket, now, granted)
    return <uint32_t>granted
