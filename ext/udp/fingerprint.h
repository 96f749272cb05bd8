/* 64 bits for some bytes, by a secret: without it nobody can tell which bytes share a place in a
 * table, or look alike there. Not a cryptographic hash: the values are shown to nobody.
 *
 * As in wyhash (public domain), 16 bytes are a multiplication of two words of 64 bits, whose halves
 * of the product are folded; four of them run beside each other, as each takes some cycles.
 */
#ifndef KECHO_UDP_FINGERPRINT_H
#define KECHO_UDP_FINGERPRINT_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

enum {
    KECHO_UDP_SECRET_WORDS = 4,
    KECHO_UDP_LANE_BYTES = 16,
    KECHO_UDP_BLOCK_BYTES = 4 * KECHO_UDP_LANE_BYTES,
};

struct kecho_udp_secret {
    uint64_t words[KECHO_UDP_SECRET_WORDS]; /* random, for each run of the server */
};

static inline uint64_t kecho_udp_folded(uint64_t one, uint64_t other) {
    __extension__ typedef unsigned __int128 product;
    product both = (product)one * other;
    return (uint64_t)both ^ (uint64_t)(both >> 64);
}

static inline uint64_t kecho_udp_absorbed(uint64_t state, uint64_t key, const uint8_t *bytes) {
    uint64_t words[2];
    memcpy(words, bytes, sizeof words);
    return kecho_udp_folded(words[0] ^ key, words[1] ^ state);
}

/* Of `size` bytes, and of `context`, a number that says what they are about. */
static inline uint64_t kecho_udp_fingerprint(const struct kecho_udp_secret *secret,
                                             uint64_t context, const uint8_t *bytes, size_t size) {
    const uint64_t *keys = secret->words;
    uint64_t state = context ^ keys[0];
    size_t left = size;
    if (left >= KECHO_UDP_BLOCK_BYTES) {
        uint64_t a = state, b = keys[1], c = keys[2], d = keys[3];
        for (; left >= KECHO_UDP_BLOCK_BYTES;
             left -= KECHO_UDP_BLOCK_BYTES, bytes += KECHO_UDP_BLOCK_BYTES) {
            a = kecho_udp_absorbed(a, keys[0], bytes);
            b = kecho_udp_absorbed(b, keys[1], bytes + 16);
            c = kecho_udp_absorbed(c, keys[2], bytes + 32);
            d = kecho_udp_absorbed(d, keys[3], bytes + 48);
        }
        state =
            kecho_udp_folded(a ^ keys[1], b ^ keys[2]) ^ kecho_udp_folded(c ^ keys[3], d ^ keys[0]);
    }
    for (; left >= KECHO_UDP_LANE_BYTES;
         left -= KECHO_UDP_LANE_BYTES, bytes += KECHO_UDP_LANE_BYTES)
        state = kecho_udp_absorbed(state, keys[1], bytes);
    if (left > 0) {
        uint8_t last[KECHO_UDP_LANE_BYTES] = {0};
        memcpy(last, bytes, left);
        state = kecho_udp_absorbed(state, keys[2], last);
    }
    return kecho_udp_folded(state ^ keys[3], size ^ keys[1]);
}

#endif
