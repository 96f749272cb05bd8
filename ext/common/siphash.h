/* SipHash-2-4 of sixteen bytes: a keyed hash that nobody without the key can find collisions of
 * (Aumasson and Bernstein, "SipHash: a fast short-input PRF", 2012). For tables whose keys
 * strangers choose.
 */
#ifndef KECHO_COMMON_SIPHASH_H
#define KECHO_COMMON_SIPHASH_H

#include <errno.h>
#include <stdint.h>
#include <sys/random.h>

/* Secret, and another one for each table. */
struct kecho_hash_key {
    uint64_t words[2];
};

/* Returns 0 or -errno. Blocks until the kernel's generator is seeded: getrandom(2). */
static inline int kecho_hash_key_draw(struct kecho_hash_key *key) {
    /* Up to 256 bytes come whole once it is, and no signal interrupts that. */
    while (getrandom(key, sizeof *key, 0) != (ssize_t)sizeof *key)
        if (errno != EINTR)
            return -errno;
    return 0;
}

static inline uint64_t kecho_siphash_turn(uint64_t word, unsigned int bits) {
    return word << bits | word >> (64 - bits);
}

static inline void kecho_siphash_rounds(uint64_t v[4], unsigned int rounds) {
    while (rounds-- > 0) {
        v[0] += v[1];
        v[2] += v[3];
        v[1] = kecho_siphash_turn(v[1], 13) ^ v[0];
        v[3] = kecho_siphash_turn(v[3], 16) ^ v[2];
        v[0] = kecho_siphash_turn(v[0], 32);
        v[2] += v[1];
        v[0] += v[3];
        v[1] = kecho_siphash_turn(v[1], 17) ^ v[2];
        v[3] = kecho_siphash_turn(v[3], 21) ^ v[0];
        v[2] = kecho_siphash_turn(v[2], 32);
    }
}

/* Of two words, which stand for the bytes that a little-endian machine has them in. */
static inline uint64_t kecho_siphash(const struct kecho_hash_key *key, uint64_t first,
                                     uint64_t second) {
    const uint64_t blocks[3] = {first, second, (uint64_t)16 << 56}; /* the last: how long it was */
    uint64_t v[4] = {key->words[0] ^ 0x736f6d6570736575u, key->words[1] ^ 0x646f72616e646f6du,
                     key->words[0] ^ 0x6c7967656e657261u, key->words[1] ^ 0x7465646279746573u};
    for (int i = 0; i < 3; i++) {
        v[3] ^= blocks[i];
        kecho_siphash_rounds(v, 2);
        v[0] ^= blocks[i];
    }
    v[2] ^= 0xff;
    kecho_siphash_rounds(v, 4);
    return v[0] ^ v[1] ^ v[2] ^ v[3];
}

#endif
