/* Which clients are served, by prefix: --allow and --deny. Written once, before there are workers.
 */
#ifndef KECHO_COMMON_RULES_H
#define KECHO_COMMON_RULES_H

#include <stdint.h>

/* IPv6, or IPv4 in ::ffff:0:0/96; in the machine's byte order, so that they can be compared. */
struct kecho_address {
    uint64_t high;
    uint64_t low;
};

struct kecho_rule {
    struct kecho_address prefix;
    uint32_t length;      /* bits of the prefix, of 128 */
    uint32_t same_length; /* rules from this one on that have the same length */
    uint32_t is_allowed;
};

struct kecho_rules {
    struct kecho_rule *all; /* the longest prefix first, then in the order of the addresses */
    uint32_t count;
    uint32_t is_allowed_otherwise; /* clients that none of them is about */
};

#endif
