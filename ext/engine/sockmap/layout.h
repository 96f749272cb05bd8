/* What the sockmap engine keeps for a run. */
#ifndef KECHO_ENGINE_SOCKMAP_LAYOUT_H
#define KECHO_ENGINE_SOCKMAP_LAYOUT_H

#include <pthread.h>
#include <stdint.h>

#include "common/flows.h"

/* The maps of _bpf, which see. */
struct kecho_flows {
    int32_t sockets_fd;
    int32_t flows_fd;
    int32_t board_fd;
    int32_t reports_fd;
    int32_t filter_fd;
    struct kecho_flow_board *board; /* mapped */
    uint64_t *consumed;             /* mapped: bytes of the reports that were read, ever; atomic */
    const uint64_t *produced;     /* mapped: bytes of the reports that were written, ever; atomic */
    const uint8_t *records;       /* mapped, twice in a row */
    pthread_mutex_t reports_lock; /* guards reading them */
    uint64_t untold_seen;         /* of the board's `untold`; guarded by reports_lock */
};

#endif
