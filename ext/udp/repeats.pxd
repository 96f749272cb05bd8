"""The end of loops: of what a source sends again and again, not all is answered.

Two echo servers, of which each takes the other for a client, send one forged datagram to and fro
for ever. What comes back is what was sent: so a datagram is repeated if the same address and port
has sent the same bytes within a second (of more than 64 bytes, twice). A loop is made of nothing
else, and what carries a number never is. Each datagram refused is one less in the loop for good.

- A repeated datagram takes a token of its source's bucket (an address and a port). A bucket lacks
  tokens only if the source repeats more than the rate allows, be it one datagram or a thousand.
- Without a token it is answered all the same, but for some: the more tokens are owed, the likelier
  it is refused, and with REFUSED_FOR_CERTAIN owed it is. A refusal remits what is owed. That is one
  in ten in the mean. Somebody who forges a client's address and port, so that the client lacks
  tokens, costs it one in ten of its repeated datagrams, and no other; nobody can tell which.
- The answer to a repeated datagram may go one hop less far than the datagram still could (the TTL
  of IPv4, the hop limit of IPv6), and one that could go no farther is not answered. So what goes
  round between two servers of this kind, however slowly, ends after MOST_HOPS answers.

What was answered is remembered by fingerprint, in 131,072 places. A new one takes a random place of
its set: the oldest would be the next to come round.
"""
from common.atomics cimport atomic_u64_load_relaxed, atomic_u64_store_relaxed
from kernel.pthread cimport (
    pthread_mutex_destroy, pthread_mutex_init, pthread_mutex_lock, pthread_mutex_unlock,
)
from kernel.socket cimport AF_INET
from libc.stdint cimport int32_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy
from udp.buckets cimport TICKS_PER_MS, bucket_ahead, bucket_of, bucket_take, rate_set
from udp.layout cimport (
    KECHO_UDP_BLOCK_BYTES, KECHO_UDP_SEEN_SETS, KECHO_UDP_SEEN_WAYS, Address, Bucket, Control,
    Repeats, Request, Secret, SeenSet, fingerprint,
)


cdef enum:
    REPEATED_WITHIN_MS = 1000
    REFUSED_FOR_CERTAIN = 64  # tokens owed
    END_BYTES = 32  # KECHO_UDP_BLOCK_BYTES are two of them
    MOST_HOPS = 64  # of an answer to a repeated datagram: RFC 1700's default


cdef inline int repeats_init(
    Repeats* repeats, uint32_t answered_per_s, uint64_t chance
) noexcept nogil:
    """`seen` and `sources` are the caller's, zeroed; chance: random, not 0. Returns 0 or -errno."""
    # A fifth more: a client's clock may be faster, and a network bunches what came evenly.
    rate_set(&repeats.rate, answered_per_s + (answered_per_s + 4) // 5)
    repeats.chance = chance
    return -pthread_mutex_init(&repeats.lock, NULL)


cdef inline void repeats_destroy(Repeats* repeats) noexcept nogil:
    pthread_mutex_destroy(&repeats.lock)


# ---- what was answered --------------------------------------------------------------------------

cdef inline uint64_t _sender(const Secret* secret, const Address* source) noexcept nogil:
    """Who has sent it: an address and a port."""
    cdef uint64_t context
    if source.any.sa_family == AF_INET:
        return fingerprint(
            secret, source.v4.sin_port, <const uint8_t*>&source.v4.sin_addr,
            sizeof(source.v4.sin_addr))
    context = <uint64_t>source.v6.sin6_scope_id << 16 | source.v6.sin6_port
    return fingerprint(
        secret, context, <const uint8_t*>&source.v6.sin6_addr, sizeof(source.v6.sin6_addr))


cdef inline bint _was_seen(Repeats* repeats, uint64_t datagram, uint64_t now) noexcept nogil:
    """Whether it was, within REPEATED_WITHIN_MS; from now on it was."""
    cdef SeenSet* seen = &repeats.seen[datagram % KECHO_UDP_SEEN_SETS]
    cdef uint32_t tag = <uint32_t>(datagram >> 32)
    cdef uint32_t now_ms = <uint32_t>(now // TICKS_PER_MS)
    # Not by the datagram alone: two of one place would push each other out for ever.
    cdef uint64_t place = ((datagram ^ now) * <uint64_t>0x9E3779B97F4A7C15) >> 61
    cdef uint64_t found = 0
    cdef int way
    cdef bint is_known = False
    for way in range(KECHO_UDP_SEEN_WAYS):
        found = atomic_u64_load_relaxed(&seen.datagrams[way])
        if <uint32_t>(found >> 32) == tag:
            place = <uint64_t>way
            is_known = True
            break
    atomic_u64_store_relaxed(&seen.datagrams[place], <uint64_t>tag << 32 | now_ms)
    # Signed: another worker may have read the clock a little later.
    return is_known and <int32_t>(now_ms - <uint32_t>found) < REPEATED_WITHIN_MS


cdef inline bint _is_repeated(
    Control* control, uint64_t sender, const uint8_t* data, uint32_t size, uint64_t now
) noexcept nogil:
    """Whether its sender has sent the same before, as far as is remembered.

    Of a long one the two ends are looked at first: where the sender numbers its datagrams, it is
    there as a rule, and the rest, which is no longer in the CPU's caches, need not be read.
    """
    cdef uint8_t ends[KECHO_UDP_BLOCK_BYTES]
    if size > KECHO_UDP_BLOCK_BYTES:
        memcpy(ends, data, END_BYTES)
        memcpy(ends + END_BYTES, data + size - END_BYTES, END_BYTES)
        if not _was_seen(
                &control.repeats, fingerprint(&control.secret, sender + size, ends, sizeof(ends)),
                now):
            return False
    return _was_seen(
        &control.repeats, fingerprint(&control.secret, sender, data, size), now)


# ---- who is answered ----------------------------------------------------------------------------

cdef inline uint64_t _random(Repeats* repeats) noexcept nogil:
    repeats.chance ^= repeats.chance << 13
    repeats.chance ^= repeats.chance >> 7
    repeats.chance ^= repeats.chance << 17
    return repeats.chance >> 32


cdef inline bint _is_one_too_many(Repeats* repeats, uint64_t sender, uint64_t now) noexcept nogil:
    """Under the lock: takes a token, or owes one, or is refused."""
    cdef Bucket* bucket = bucket_of(repeats.sources, sender)
    cdef uint64_t ahead = bucket_ahead(bucket, now)
    cdef uint64_t owed = 0
    if ahead >= repeats.rate.window_ticks:
        owed = (ahead - repeats.rate.window_ticks) // repeats.rate.interval_ticks + 1
    if owed > _random(repeats) % REFUSED_FOR_CERTAIN:
        bucket.full_at = now + repeats.rate.window_ticks
        return True
    bucket_take(bucket, &repeats.rate, now, 1)
    return False


cdef inline bint repeats_are_limited(const Repeats* repeats) noexcept nogil:
    return repeats.rate.interval_ticks != 0


cdef inline uint32_t repeats_hops(const Request* request) noexcept nogil:
    """How far the answer to a repeated datagram may go; 0: as far as any."""
    return min(request.hops - 1, <uint32_t>MOST_HOPS) if request.hops > 1 else 0


cdef inline bint repeats_refuse(
    Control* control, Request* request, uint32_t number, uint64_t now
) noexcept nogil:
    """Whether datagram `number` of a request is not answered, so that a loop ends."""
    cdef Repeats* repeats = &control.repeats
    cdef uint32_t begin = number * request.segment_bytes
    cdef uint32_t size = request.bytes - begin
    cdef uint64_t sender
    cdef bint is_refused
    if request.segment_bytes != 0:
        size = min(size, request.segment_bytes)
    sender = _sender(&control.secret, request.source)
    if not _is_repeated(control, sender, request.data + begin, size, now):
        return False
    request.is_repeated = True
    if request.hops == 1:
        return True
    pthread_mutex_lock(&repeats.lock)
    is_refused = _is_one_too_many(repeats, sender, now)
    pthread_mutex_unlock(&repeats.lock)
    return is_refused
