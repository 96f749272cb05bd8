/* Typed wrappers of the __atomic builtins: a 32- or 64-bit word shared by threads is touched
 * through these and nothing else, so that ThreadSanitizer sees every access.
 *
 * The name says the order: relaxed for counters with one writer, acquire/release for handing
 * memory from one thread to another, and no suffix for sequentially consistent (flags that two
 * threads check against each other).
 */
#ifndef KECHO_ATOMICS_H
#define KECHO_ATOMICS_H

#include <stdbool.h>
#include <stdint.h>

static inline uint64_t atomic_u64_load_relaxed(const uint64_t *word) {
    return __atomic_load_n(word, __ATOMIC_RELAXED);
}

static inline uint64_t atomic_u64_load_acquire(const uint64_t *word) {
    return __atomic_load_n(word, __ATOMIC_ACQUIRE);
}

static inline uint64_t atomic_u64_load(const uint64_t *word) {
    return __atomic_load_n(word, __ATOMIC_SEQ_CST);
}

static inline void atomic_u64_store(uint64_t *word, uint64_t value) {
    __atomic_store_n(word, value, __ATOMIC_SEQ_CST);
}

static inline void atomic_u64_store_relaxed(uint64_t *word, uint64_t value) {
    __atomic_store_n(word, value, __ATOMIC_RELAXED);
}

static inline void atomic_u64_store_release(uint64_t *word, uint64_t value) {
    __atomic_store_n(word, value, __ATOMIC_RELEASE);
}

/* Adds to a counter that only the calling thread writes: a load and a store, no locked
 * instruction. Readers on other threads see some recent value, never a torn one. */
static inline void atomic_u64_add_single_writer(uint64_t *word, uint64_t amount) {
    atomic_u64_store_relaxed(word, atomic_u64_load_relaxed(word) + amount);
}

/* True when *word was `expected` and is now `desired`. Acquires on success. */
static inline bool atomic_u64_swap_acquire(uint64_t *word, uint64_t expected, uint64_t desired) {
    return __atomic_compare_exchange_n(word, &expected, desired, false, __ATOMIC_ACQ_REL,
                                       __ATOMIC_ACQUIRE);
}

/* True when *word was `expected` and is now `desired`. Releases on success. */
static inline bool atomic_u64_swap_release(uint64_t *word, uint64_t expected, uint64_t desired) {
    return __atomic_compare_exchange_n(word, &expected, desired, false, __ATOMIC_ACQ_REL,
                                       __ATOMIC_ACQUIRE);
}

static inline uint32_t atomic_u32_load_relaxed(const uint32_t *word) {
    return __atomic_load_n(word, __ATOMIC_RELAXED);
}

static inline void atomic_u32_store_relaxed(uint32_t *word, uint32_t value) {
    __atomic_store_n(word, value, __ATOMIC_RELAXED);
}

static inline uint32_t atomic_u32_load(const uint32_t *word) {
    return __atomic_load_n(word, __ATOMIC_SEQ_CST);
}

static inline void atomic_u32_store(uint32_t *word, uint32_t value) {
    __atomic_store_n(word, value, __ATOMIC_SEQ_CST);
}

static inline uint32_t atomic_u32_exchange(uint32_t *word, uint32_t value) {
    return __atomic_exchange_n(word, value, __ATOMIC_SEQ_CST);
}

/* True when *word was `expected` and is now `desired`. */
static inline bool atomic_u32_swap(uint32_t *word, uint32_t expected, uint32_t desired) {
    return __atomic_compare_exchange_n(word, &expected, desired, false, __ATOMIC_SEQ_CST,
                                       __ATOMIC_SEQ_CST);
}

/* Both return the value after the operation. */
static inline uint32_t atomic_u32_increment(uint32_t *word) {
    return __atomic_add_fetch(word, 1, __ATOMIC_SEQ_CST);
}

static inline uint32_t atomic_u32_decrement(uint32_t *word) {
    return __atomic_sub_fetch(word, 1, __ATOMIC_SEQ_CST);
}

static inline void *atomic_pointer_load_acquire(void *const *place) {
    return __atomic_load_n(place, __ATOMIC_ACQUIRE);
}

static inline void atomic_pointer_store_release(void **place, void *value) {
    __atomic_store_n(place, value, __ATOMIC_RELEASE);
}

#endif
