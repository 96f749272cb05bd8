"""How many datagrams are answered: a bucket of tokens for each source, and one for all of them.

Somebody with thousands of addresses, more than the table holds, has a limit in the rate over all.
"""
from kernel.pthread cimport (
    pthread_mutex_destroy, pthread_mutex_init, pthread_mutex_lock, pthread_mutex_unlock,
)
from libc.stdint cimport uint32_t, uint64_t
from udp.buckets cimport bucket_of, bucket_take, bucket_tokens, rate_set
from udp.layout cimport Bucket, Limiter


cdef inline int limiter_init(
    Limiter* limiter, uint32_t per_source_per_s, uint32_t total_per_s
) noexcept nogil:
    """`sets` is the caller's, zeroed, and `hash_key`, drawn. Returns 0 or -errno."""
    rate_set(&limiter.per_source, per_source_per_s)
    rate_set(&limiter.total, total_per_s)
    return -pthread_mutex_init(&limiter.lock, NULL)


cdef inline void limiter_destroy(Limiter* limiter) noexcept nogil:
    pthread_mutex_destroy(&limiter.lock)


cdef inline void limiter_lock(Limiter* limiter) noexcept nogil:
    pthread_mutex_lock(&limiter.lock)


cdef inline void limiter_unlock(Limiter* limiter) noexcept nogil:
    pthread_mutex_unlock(&limiter.lock)


cdef inline uint32_t limiter_take(
    Limiter* limiter, uint64_t source, uint32_t wanted, uint64_t now, uint32_t* refused_source,
) noexcept nogil:
    """How many of `wanted` datagrams may be answered, under the lock. Of the rest,
    *refused_source are over the source's own rate, the others over that of all."""
    cdef Bucket* bucket = NULL
    cdef uint64_t granted = wanted
    refused_source[0] = 0
    if limiter.per_source.interval_ticks != 0:
        bucket = bucket_of(limiter.sets, source)
        granted = min(granted, bucket_tokens(bucket, &limiter.per_source, now))
        refused_source[0] = wanted - <uint32_t>granted
    if limiter.total.interval_ticks != 0:
        granted = min(granted, bucket_tokens(&limiter.everybody, &limiter.total, now))
        bucket_take(&limiter.everybody, &limiter.total, now, granted)
    if bucket != NULL:
        bucket_take(bucket, &limiter.per_source, now, granted)
    return <uint32_t>granted
