/* The life of workers: what a stop tells them. */
#ifndef KECHO_COMMON_LIFE_H
#define KECHO_COMMON_LIFE_H

enum kecho_phase {
    PHASE_RUNNING = 0,
    PHASE_DRAINING, /* take on nothing new; echo what was received, until the deadline */
    PHASE_STOPPING  /* leave now */
};

#endif
