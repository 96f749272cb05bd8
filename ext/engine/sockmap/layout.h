/* What the sockmap engine keeps for a run. */
#ifndef KECHO_ENGINE_SOCKMAP_LAYOUT_H
#define KECHO_ENGINE_SOCKMAP_LAYOUT_H

#include <pthread.h>
#include <stdint.h>

#include "common/flows.h"

/* The maps that _bpf.open_echo() has made. */
struct kecho_flows {
    int32_t sockets_fd;
    int32_t flows_fd;
    int32_t board_fd;
    int32_t reports_fd;
    int32_t filter_fd;
    struct kecho_flow_board *board; /* mapped */
    uint64_t *consumed;             /* mapped: bytes of reports read so far; atomic */
    const uint64_t *produced;       /* mapped: bytes of reports written so far; atomic */
    const uint8_t *records;         /* mapped, twice in a row */
    pthread_mutex_t reports_lock;   /* held while reports are read */
    uint64_t untold_seen;           /* the board's `untold` at the last look; under reports_lock */
};

#endif
