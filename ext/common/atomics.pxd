"""Atomic words, see atomics.h for what each order is for."""
from libc.stdint cimport uint32_t, uint64_t

cdef extern from "common/atomics.h" nogil:
    uint64_t atomic_u64_load_relaxed(const uint64_t* word)
    uint64_t atomic_u64_load_acquire(const uint64_t* word)
    uint64_t atomic_u64_load(const uint64_t* word)
    void atomic_u64_store(uint64_t* word, uint64_t value)
    void atomic_u64_store_relaxed(uint64_t* word, uint64_t value)
    void atomic_u64_store_release(uint64_t* word, uint64_t value)
    void atomic_u64_add_single_writer(uint64_t* word, uint64_t amount)
    bint atomic_u64_swap_acquire(uint64_t* word, uint64_t expected, uint64_t desired)
    bint atomic_u64_swap_release(uint64_t* word, uint64_t expected, uint64_t desired)
    uint32_t atomic_u32_load_relaxed(const uint32_t* word)
    void atomic_u32_store_relaxed(uint32_t* word, uint32_t value)
    uint32_t atomic_u32_load(const uint32_t* word)
    void atomic_u32_store(uint32_t* word, uint32_t value)
    uint32_t atomic_u32_exchange(uint32_t* word, uint32_t value)
    bint atomic_u32_swap(uint32_t* word, uint32_t expected, uint32_t desired)
    uint32_t atomic_u32_increment(uint32_t* word)
    uint32_t atomic_u32_decrement(uint32_t* word)
    void* atomic_pointer_load_acquire(void* const* place)
    void atomic_pointer_store_release(void** place, void* value)
