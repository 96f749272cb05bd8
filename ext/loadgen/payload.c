#include "payload.h"

#include <endian.h>
#include <string.h>

enum { WORD = 8 };

/* Odd constants with well spread bits: multiplying by an odd number loses no bit. */
#define SPREAD_CONNECTION UINT64_C(0xC2B2AE3D27D4EB4F)
#define SPREAD_WORD UINT64_C(0xD6E8FEB86659FD93)

/* What all words of a message have in common. */
struct pattern {
    uint64_t first, second;
    uint64_t base, factor; /* of the other words */
    uint64_t kept, added;  /* applied to each word to make a line's bytes printable */
};

static inline bool has_header(const struct message *message) {
    return message->length >= PAYLOAD_HEADER_BYTES && !message->line;
}

static inline bool ends_in_newline(const struct message *message, uint32_t offset, uint32_t size) {
    return message->line && size > 0 && offset + size == message->length;
}

/* Returns word `index` of those that the key makes: both halves of a product, so that one word does
 * not tell the next. */
static inline uint64_t keyed_word(const struct pattern *pattern, uint32_t index) {
    __extension__ typedef unsigned __int128 product;
    product both = (product)(pattern->base + index * SPREAD_WORD) * pattern->factor;
    return (uint64_t)both ^ (uint64_t)(both >> 64);
}

static inline struct pattern pattern_of(const struct message *message) {
    struct pattern pattern;
    uint64_t origin = (uint64_t)message->shown << 32 | message->connection;
    pattern.base = kecho_siphash(message->key, message->sequence, origin);
    pattern.factor = message->key->words[1] | 1;
    pattern.kept = message->line ? UINT64_C(0x3F3F3F3F3F3F3F3F) : UINT64_MAX;
    pattern.added = message->line ? UINT64_C(0x3030303030303030) : 0;
    if (has_header(message)) {
        pattern.first = message->sequence;
        pattern.second = origin;
    } else {
        uint64_t first_byte = (message->sequence + origin * SPREAD_CONNECTION) & 0xff;
        pattern.first = (keyed_word(&pattern, 0) & ~UINT64_C(0xff)) | first_byte;
        pattern.second = keyed_word(&pattern, 1);
    }
    return pattern;
}

static inline uint64_t word_at(const struct pattern *pattern, uint32_t index) {
    uint64_t word = index == 0   ? pattern->first
                    : index == 1 ? pattern->second
                                 : keyed_word(pattern, index);
    return htole64((word & pattern->kept) + pattern->added);
}

static inline uint32_t smaller(uint32_t a, uint32_t b) {
    return a < b ? a : b;
}

void payload_seed_read(struct payload_seed *seed, const char *bytes) {
    memcpy(&seed->shown, bytes, sizeof seed->shown);
    memcpy(&seed->key, bytes + sizeof seed->shown, sizeof seed->key);
}

void payload_fill(uint8_t *out, const struct message *message, uint32_t offset, uint32_t size) {
    struct pattern pattern = pattern_of(message);
    uint32_t index = offset / WORD, skip = offset % WORD;
    if (ends_in_newline(message, offset, size))
        out[--size] = '\n';
    while (size > 0) {
        uint64_t word = word_at(&pattern, index++);
        uint32_t take = smaller(WORD - skip, size);
        if (take == WORD)
            memcpy(out, &word, WORD);
        else
            memcpy(out, (uint8_t *)&word + skip, take);
        out += take;
        size -= take;
        skip = 0;
    }
}

bool payload_matches(const uint8_t *bytes, const struct message *message, uint32_t offset,
                     uint32_t size) {
    struct pattern pattern = pattern_of(message);
    uint32_t index = offset / WORD, skip = offset % WORD;
    uint64_t difference = 0;
    if (ends_in_newline(message, offset, size) && bytes[--size] != '\n')
        return false;
    while (size > 0) {
        uint64_t word = word_at(&pattern, index++), found = 0;
        uint32_t take = smaller(WORD - skip, size);
        if (take == WORD) {
            memcpy(&found, bytes, WORD);
            difference |= found ^ word;
        } else {
            difference |= (uint64_t)(memcmp(bytes, (uint8_t *)&word + skip, take) != 0);
        }
        bytes += take;
        size -= take;
        skip = 0;
    }
    return difference == 0;
}

uint8_t payload_byte(const struct message *message, uint32_t offset) {
    uint8_t byte;
    payload_fill(&byte, message, offset, 1);
    return byte;
}

enum payload_fault payload_classify(const uint8_t *bytes, const struct message *message,
                                    uint32_t offset, uint32_t size, uint32_t *wrong_at) {
    uint32_t at = 0;
    while (at < size && bytes[at] == payload_byte(message, offset + at))
        at++;
    *wrong_at = at;
    if (at == size)
        return PAYLOAD_RIGHT;
    if (offset != 0 || size < PAYLOAD_HEADER_BYTES || !has_header(message))
        return PAYLOAD_CORRUPT;

    /* The header may name another message. It counts only if all bytes are that message's. */
    struct message other = *message;
    uint64_t origin;
    memcpy(&other.sequence, bytes, WORD);
    memcpy(&origin, bytes + WORD, WORD);
    other.sequence = le64toh(other.sequence);
    other.connection = (uint32_t)le64toh(origin);
    if (!payload_matches(bytes, &other, 0, size))
        return PAYLOAD_CORRUPT;
    if (other.connection != message->connection)
        return PAYLOAD_FOREIGN;
    return other.sequence < message->sequence ? PAYLOAD_REPEATED : PAYLOAD_REORDERED;
}
