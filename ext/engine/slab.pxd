"""Connection records: taken from a slab, found by index, given back.

A record has 64 bytes and stays where it is until the engine ends. Its `ownership` word says which
connection it stands for (generation) and whether a worker owns it. Only the owner may touch the
rest of the record.
"""
from common.atomics cimport (
    atomic_pointer_load_acquire, atomic_pointer_store_release, atomic_u32_load,
    atomic_u32_load_relaxed, atomic_u32_store, atomic_u32_store_relaxed, atomic_u64_load_acquire,
    atomic_u64_store_release, atomic_u64_swap_acquire, atomic_u64_swap_release,
)
from common.memory cimport KECHO_CACHE_LINE, aligned_alloc
from engine.layout cimport (
    CONNECTION_READ_TO_END, KECHO_SLAB_CHUNK_CONNECTIONS, KECHO_SLAB_CHUNKS, KECHO_SLAB_END,
    OWNERSHIP_FREE, OWNERSHIP_NOBODY, OWNERSHIP_ONE, OWNERSHIP_ONE_RECALL,
    OWNERSHIP_ONE_RECALL_TO_END, Connection, Slab,
)
from kernel.pthread cimport (
    pthread_mutex_destroy, pthread_mutex_init, pthread_mutex_lock, pthread_mutex_unlock,
)
from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport free
from libc.string cimport memset


cdef inline int slab_init(Slab* slab) noexcept nogil:
    memset(slab, 0, sizeof(Slab))
    slab.free_head = KECHO_SLAB_END
    return -pthread_mutex_init(&slab.lock, NULL)


cdef inline void slab_destroy(Slab* slab) noexcept nogil:
    cdef int chunk
    for chunk in range(KECHO_SLAB_CHUNKS):
        free(slab.chunks[chunk])
    pthread_mutex_destroy(&slab.lock)


cdef inline Connection* slab_get(Slab* slab, uint32_t index) noexcept nogil:
    """Return the record with this index. It must have been taken before."""
    cdef Connection* chunk = <Connection*>atomic_pointer_load_acquire(
        <void**>&slab.chunks[index // KECHO_SLAB_CHUNK_CONNECTIONS])
    return &chunk[index % KECHO_SLAB_CHUNK_CONNECTIONS]


cdef inline uint32_t slab_high_water(Slab* slab) noexcept nogil:
    """Return the bound of indices: every index below it is valid for slab_get()."""
    return atomic_u32_load(&slab.high_water)


cdef inline uint32_t slab_in_use(Slab* slab) noexcept nogil:
    return atomic_u32_load_relaxed(&slab.in_use)


cdef inline uint32_t _slab_grow(Slab* slab) noexcept nogil:
    """Return the index of a record never used before, or KECHO_SLAB_END. The lock is held."""
    cdef uint32_t index = slab.high_water
    cdef uint32_t chunk = index // KECHO_SLAB_CHUNK_CONNECTIONS
    cdef void* memory
    if chunk == KECHO_SLAB_CHUNKS:
        return KECHO_SLAB_END
    if slab.chunks[chunk] == NULL:
        memory = aligned_alloc(
            KECHO_CACHE_LINE, KECHO_SLAB_CHUNK_CONNECTIONS * sizeof(Connection))
        if memory == NULL:
            return KECHO_SLAB_END
        memset(memory, 0, KECHO_SLAB_CHUNK_CONNECTIONS * sizeof(Connection))
        atomic_pointer_store_release(<void**>&slab.chunks[chunk], memory)
    atomic_u32_store(&slab.high_water, index + 1)
    return index


cdef inline Connection* slab_take(Slab* slab) noexcept nogil:
    """Return a record that the caller owns, or NULL without memory (or with 4 million in use)."""
    cdef Connection* connection = NULL
    cdef uint32_t index
    pthread_mutex_lock(&slab.lock)
    index = slab.free_head
    if index != KECHO_SLAB_END:
        connection = slab_get(slab, index)
        slab.free_head = connection.next_free
    else:
        index = _slab_grow(slab)
        if index != KECHO_SLAB_END:
            connection = slab_get(slab, index)
            connection.index = index
            connection.fd = -1
    if connection != NULL:
        atomic_u32_store_relaxed(&slab.in_use, slab.in_use + 1)
    pthread_mutex_unlock(&slab.lock)
    if connection != NULL:
        ownership_begin(connection)
    return connection


cdef inline void slab_give_back(Slab* slab, Connection* connection) noexcept nogil:
    """End this generation of a record that the caller owns."""
    ownership_end(connection)
    pthread_mutex_lock(&slab.lock)
    connection.next_free = slab.free_head
    slab.free_head = connection.index
    atomic_u32_store_relaxed(&slab.in_use, slab.in_use - 1)
    pthread_mutex_unlock(&slab.lock)


# ---- ownership ------------------------------------------------------------------------------

cdef enum Claim:
    CLAIM_WON        # the caller owns the connection now
    CLAIM_ELSEWHERE  # another worker owns it, and has been told to look again
    CLAIM_STALE      # the connection of this event has ended


cdef inline uint64_t _ownership_word(uint32_t generation, uint32_t state) noexcept nogil:
    return <uint64_t>generation << 32 | state


cdef inline uint32_t ownership_generation(Connection* connection) noexcept nogil:
    return <uint32_t>(atomic_u64_load_acquire(&connection.ownership) >> 32)


cdef inline Claim ownership_claim(
    Connection* connection, uint32_t generation, bint to_end,
) noexcept nogil:
    """Try to own the connection that an event is for. to_end: see CONNECTION_READ_TO_END."""
    cdef uint64_t word = _ownership_word(generation, OWNERSHIP_NOBODY)
    cdef uint32_t recall = OWNERSHIP_ONE_RECALL_TO_END if to_end else OWNERSHIP_ONE_RECALL
    cdef uint32_t state
    while not atomic_u64_swap_acquire(
            &connection.ownership, word, _ownership_word(generation, OWNERSHIP_ONE)):
        word = atomic_u64_load_acquire(&connection.ownership)
        state = <uint32_t>word
        if word >> 32 != generation or state == OWNERSHIP_FREE:
            return CLAIM_STALE
        if state == OWNERSHIP_NOBODY:
            continue
        if state >= recall or atomic_u64_swap_acquire(
                &connection.ownership, word, _ownership_word(generation, recall)):
            return CLAIM_ELSEWHERE
        word = _ownership_word(generation, OWNERSHIP_NOBODY)
    if to_end:
        connection.flags |= CONNECTION_READ_TO_END
    return CLAIM_WON


cdef inline bint ownership_try(Connection* connection) noexcept nogil:
    """Own the connection if it is open and no worker owns it. Leaves no recall: for sweeps."""
    cdef uint64_t word = atomic_u64_load_acquire(&connection.ownership)
    if <uint32_t>word != OWNERSHIP_NOBODY:
        return False
    return atomic_u64_swap_acquire(
        &connection.ownership, word, word - OWNERSHIP_NOBODY + OWNERSHIP_ONE)


cdef inline bint ownership_release(Connection* connection) noexcept nogil:
    """Release a connection. Return False if an event came meanwhile: the caller still owns it and
    must look again."""
    cdef uint64_t owned = _ownership_word(ownership_generation(connection), OWNERSHIP_ONE)
    cdef uint64_t word = owned
    if atomic_u64_swap_release(
            &connection.ownership, owned, owned - OWNERSHIP_ONE + OWNERSHIP_NOBODY):
        return True
    while not atomic_u64_swap_acquire(&connection.ownership, word, owned):
        word = atomic_u64_load_acquire(&connection.ownership)
    if <uint32_t>word == OWNERSHIP_ONE_RECALL_TO_END:
        connection.flags |= CONNECTION_READ_TO_END
    return False


cdef inline void ownership_begin(Connection* connection) noexcept nogil:
    atomic_u64_store_release(
        &connection.ownership,
        _ownership_word(ownership_generation(connection), OWNERSHIP_ONE))


cdef inline void ownership_end(Connection* connection) noexcept nogil:
    atomic_u64_store_release(
        &connection.ownership,
        _ownership_word(ownership_generation(connection) + 1, OWNERSHIP_FREE))
