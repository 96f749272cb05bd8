/* The bytes of a message. They depend only on the run's seed, the connection and the message's
 * sequence number, so that they are made and compared piece by piece and never stored.
 *
 * A message of 16 bytes or more begins with its sequence number (8 bytes), its connection (4) and
 * the part of the run's seed that is shown (4), little-endian, which a packet capture shows. The
 * rest depends on a key that is not sent: a server cannot know it before it has read it. (What
 * follows in a message that it has read in part, it could try to compute; no other message.)
 * A shorter message has no header; its first byte differs from that of the message before. A line
 * has no header either: its bytes are printable, '0' to 'o', and it ends in a newline.
 */
#ifndef KECHO_LOADGEN_PAYLOAD_H
#define KECHO_LOADGEN_PAYLOAD_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "common/siphash.h"

enum { PAYLOAD_HEADER_BYTES = 16 };

/* Of a run, the same in all its processes. */
struct payload_seed {
    uint32_t shown; /* in each header */
    struct kecho_hash_key key;
};

enum { PAYLOAD_SEED_BYTES = sizeof(uint32_t) + sizeof(struct kecho_hash_key) };

struct message {
    uint64_t sequence;
    uint32_t connection;
    uint32_t shown; /* of the seed */
    const struct kecho_hash_key *key;
    uint32_t length; /* bytes */
    bool line;
};

enum payload_fault {
    PAYLOAD_RIGHT,
    PAYLOAD_CORRUPT,   /* not the bytes of any message */
    PAYLOAD_FOREIGN,   /* a message of another connection */
    PAYLOAD_REPEATED,  /* an earlier message of this connection */
    PAYLOAD_REORDERED, /* a later message of this connection */
};

/* Reads PAYLOAD_SEED_BYTES bytes. */
void payload_seed_read(struct payload_seed *seed, const char *bytes);

/* Writes bytes [offset, offset + size) of the message. */
void payload_fill(uint8_t *out, const struct message *message, uint32_t offset, uint32_t size);

/* Returns whether `bytes` are bytes [offset, offset + size) of the message. */
bool payload_matches(const uint8_t *bytes, const struct message *message, uint32_t offset,
                     uint32_t size);

/* Returns what is wrong with bytes that do not match. Sets *wrong_at to the index of the first
 * wrong byte. */
enum payload_fault payload_classify(const uint8_t *bytes, const struct message *message,
                                    uint32_t offset, uint32_t size, uint32_t *wrong_at);

/* Returns the byte at `offset` of the message. */
uint8_t payload_byte(const struct message *message, uint32_t offset);

#endif
