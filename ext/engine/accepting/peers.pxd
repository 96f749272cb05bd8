"""Client addresses, with their connections and how many they may open per second.

A hash table under a lock; each step is O(1). It holds every address with connections, and the
65,536 addresses without that left last. So a client cannot make it grow beyond what its connections
cost anyway. common/counted.pxd says what counts as one address.
"""
from common.counted cimport counted_hash
from common.rules cimport Address
from engine.layout cimport (
    KECHO_IDLE_PEERS_MOST, KECHO_NO_PEER, REFUSED_PER_ADDRESS, REFUSED_RATE, Access, Peer,
)
from kernel.pthread cimport (
    pthread_mutex_destroy, pthread_mutex_init, pthread_mutex_lock, pthread_mutex_unlock,
)
from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport free, malloc, realloc


cdef enum:
    FIRST_CAPACITY = 1024
    A_TOKEN_MILLI = 1000
    CLOCKS_APART_MS = 60000
    PEER_UNKNOWN = -1  # there is no memory for it


cdef inline int peers_init(Access* access) noexcept nogil:
    access.peers = NULL
    access.buckets = NULL
    access.capacity = access.high_water = access.idle_count = 0
    access.free_head = access.idle_head = access.idle_tail = KECHO_NO_PEER
    return -pthread_mutex_init(&access.lock, NULL)


cdef inline void peers_destroy(Access* access) noexcept nogil:
    free(access.peers)
    free(access.buckets)
    pthread_mutex_destroy(&access.lock)


cdef inline bint peers_are_counted(Access* access) noexcept nogil:
    return access.per_address != 0 or access.rate_per_s != 0


# ---- the table, under the lock ------------------------------------------------------------------

cdef inline uint32_t* _bucket_of(Access* access, const Address* address) noexcept nogil:
    return &access.buckets[
        <uint32_t>counted_hash(&access.hash_key, address) & (access.capacity - 1)]


cdef inline bint _grow(Access* access) noexcept nogil:
    """Double the records and buckets. Return False without memory."""
    cdef uint32_t capacity = max(<uint32_t>FIRST_CAPACITY, access.capacity * 2)
    cdef uint32_t* buckets
    cdef uint32_t* bucket
    cdef uint32_t index
    cdef Peer* peers = <Peer*>realloc(access.peers, capacity * sizeof(Peer))
    if peers == NULL:
        return False
    access.peers = peers
    buckets = <uint32_t*>malloc(capacity * sizeof(uint32_t))
    if buckets == NULL:
        return False
    free(access.buckets)
    access.buckets = buckets
    access.capacity = capacity
    for index in range(capacity):
        buckets[index] = KECHO_NO_PEER
    # It grows only when every record is in use.
    for index in range(access.high_water):
        bucket = _bucket_of(access, &peers[index].address)
        peers[index].chain = bucket[0]
        bucket[0] = index
    return True


cdef inline void _leave_idle_list(Access* access, Peer* peer) noexcept nogil:
    if peer.idle_prev == KECHO_NO_PEER:
        access.idle_head = peer.idle_next
    else:
        access.peers[peer.idle_prev].idle_next = peer.idle_next
    if peer.idle_next == KECHO_NO_PEER:
        access.idle_tail = peer.idle_prev
    else:
        access.peers[peer.idle_next].idle_prev = peer.idle_prev
    access.idle_count -= 1


cdef inline void _forget_longest_idle(Access* access) noexcept nogil:
    cdef uint32_t index = access.idle_head
    cdef Peer* peer = &access.peers[index]
    cdef uint32_t* link = _bucket_of(access, &peer.address)
    _leave_idle_list(access, peer)
    while link[0] != index:
        link = &access.peers[link[0]].chain
    link[0] = peer.chain
    peer.idle_next = access.free_head
    access.free_head = index


cdef inline void _enter_idle_list(Access* access, uint32_t index) noexcept nogil:
    cdef Peer* peer = &access.peers[index]
    peer.idle_prev = access.idle_tail
    peer.idle_next = KECHO_NO_PEER
    if access.idle_tail == KECHO_NO_PEER:
        access.idle_head = index
    else:
        access.peers[access.idle_tail].idle_next = index
    access.idle_tail = index
    access.idle_count += 1
    if access.idle_count > KECHO_IDLE_PEERS_MOST:
        _forget_longest_idle(access)


cdef inline uint32_t _find(Access* access, const Address* address) noexcept nogil:
    cdef uint32_t index
    if access.capacity == 0:
        return KECHO_NO_PEER
    index = _bucket_of(access, address)[0]
    while index != KECHO_NO_PEER and (
            access.peers[index].address.low != address.low
            or access.peers[index].address.high != address.high):
        index = access.peers[index].chain
    return index


cdef inline uint32_t _add(Access* access, const Address* address, uint32_t now_ms) noexcept nogil:
    """Return a new peer without connections, in no list; KECHO_NO_PEER without memory."""
    cdef uint32_t index = access.free_head
    cdef uint32_t* bucket
    if index != KECHO_NO_PEER:
        access.free_head = access.peers[index].idle_next
    else:
        if access.high_water == access.capacity and not _grow(access):
            return KECHO_NO_PEER
        index = access.high_water
        access.high_water += 1
    access.peers[index].address = address[0]
    access.peers[index].connections = 0
    access.peers[index].tokens_milli = access.rate_per_s * A_TOKEN_MILLI
    access.peers[index].refilled_ms = now_ms
    bucket = _bucket_of(access, address)
    access.peers[index].chain = bucket[0]
    bucket[0] = index
    return index


cdef inline bint _take_token(Access* access, Peer* peer, uint32_t now_ms) noexcept nogil:
    """Take a token from a bucket that holds up to one second's worth. Return False if it is empty.
    """
    cdef uint64_t tokens_milli = peer.tokens_milli
    cdef uint32_t passed_ms = now_ms - peer.refilled_ms
    # The clocks of two workers may be read in the other order; 49 days later it does not matter.
    if passed_ms < 0xFFFFFFFFu - CLOCKS_APART_MS:
        tokens_milli += <uint64_t>passed_ms * access.rate_per_s
        peer.refilled_ms = now_ms
    peer.tokens_milli = <uint32_t>min(tokens_milli, <uint64_t>access.rate_per_s * A_TOKEN_MILLI)
    if peer.tokens_milli < A_TOKEN_MILLI:
        return False
    peer.tokens_milli -= A_TOKEN_MILLI
    return True


cdef inline int _why_not(Access* access, Peer* peer, uint32_t now_ms) noexcept nogil:
    """Return a kecho_refusal, or -1 if the address may have one more connection."""
    if access.per_address != 0 and peer.connections >= access.per_address:
        return REFUSED_PER_ADDRESS
    if access.rate_per_s != 0 and not _take_token(access, peer, now_ms):
        return REFUSED_RATE
    return -1


# ---- from accept to close -----------------------------------------------------------------------

cdef inline int peer_comes(
    Access* access, const Address* address, uint32_t now_ms, uint32_t* index,
) noexcept nogil:
    """Count a connection of this address in. Return -1, or why it is refused. `index` is for
    peer_leaves(). It is KECHO_NO_PEER for a client that could not be counted for lack of memory.
    Such a client is let in: that is not its fault, and max_connections still bounds it."""
    cdef Peer* peer
    cdef bint was_idle
    cdef int refused
    pthread_mutex_lock(&access.lock)
    index[0] = _find(access, address)
    was_idle = index[0] != KECHO_NO_PEER and access.peers[index[0]].connections == 0
    if index[0] == KECHO_NO_PEER:
        index[0] = _add(access, address, now_ms)
    if index[0] == KECHO_NO_PEER:
        pthread_mutex_unlock(&access.lock)
        return -1
    peer = &access.peers[index[0]]
    if was_idle:
        _leave_idle_list(access, peer)
    refused = _why_not(access, peer, now_ms)
    if refused < 0:
        peer.connections += 1
    elif peer.connections == 0:
        _enter_idle_list(access, index[0])
    pthread_mutex_unlock(&access.lock)
    return refused


cdef inline void peer_leaves(Access* access, uint32_t index) noexcept nogil:
    """Count a connection of this peer out."""
    cdef Peer* peer
    pthread_mutex_lock(&access.lock)
    peer = &access.peers[index]
    peer.connections -= 1
    if peer.connections == 0:
        _enter_idle_list(access, index)
    pthread_mutex_unlock(&access.lock)
