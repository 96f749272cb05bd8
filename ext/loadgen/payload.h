/* What a message holds, byte for byte: a function of the run, the connection and the message's
 * number in it, so that it is made and compared piece by piece and never stored.
 *
 * From 16 bytes on a message begins with its sequence number (8 bytes), its connection (4) and
 * the run's seed (4), little-endian, as a packet capture shows; the rest is a mix of the three.
 * A shorter one is cut from a mix whose first byte differs between neighbours. A line has no such
 * header either: it is printable ASCII, 64 characters from '0' to 'o', and ends in a newline.
 */
#ifndef KECHO_LOADGEN_PAYLOAD_H
#define KECHO_LOADGEN_PAYLOAD_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { PAYLOAD_HEADER_BYTES = 16 };

struct message {
    uint64_t sequence;
    uint32_t connection;
    uint32_t seed;
    uint32_t length; /* bytes */
    bool line;
};

enum payload_fault {
    PAYLOAD_RIGHT,
    PAYLOAD_CORRUPT,   /* no message of this run holds these bytes */
    PAYLOAD_FOREIGN,   /* a message of another connection */
    PAYLOAD_REPEATED,  /* an earlier message of this connection */
    PAYLOAD_REORDERED, /* a later message of this connection */
};

/* Writes bytes [offset, offset + size) of the message. */
void payload_fill(uint8_t *out, const struct message *message, uint32_t offset, uint32_t size);

/* True when `bytes` are bytes [offset, offset + size) of the message. */
bool payload_matches(const uint8_t *bytes, const struct message *message, uint32_t offset,
                     uint32_t size);

/* What is wrong with bytes that do not match; *wrong_at is the first wrong one's index. */
enum payload_fault payload_classify(const uint8_t *bytes, const struct message *message,
                                    uint32_t offset, uint32_t size, uint32_t *wrong_at);

/* The byte at `offset` of the message. */
uint8_t payload_byte(const struct message *message, uint32_t offset);

#endif
