/* How an engine takes part in a run: a table of calls. Shared files use only this table.
 *
 * epoll/engine.pxd fills the table for a run without another engine. Other engines start from that
 * table and replace entries. A call returns 0 or more, or -errno if it fails.
 */
#ifndef KECHO_ENGINE_CALLS_H
#define KECHO_ENGINE_CALLS_H

#include <stdint.h>

struct epoll_event;
struct kecho_connection;
struct kecho_control;
struct kecho_worker;

/* The result of a turn with a connection. */
enum kecho_served {
    SERVED_ALL = 0, /* nothing left to read, or waiting for room to send */
    SERVED_MORE,    /* the turn is over, and there is more to read */
    SERVED_CLOSED   /* the connection is closed, its record is free */
};

/* Where the bytes are that pass a worker by. */
struct kecho_look {
    uint64_t received;     /* bytes received, the FIN not counted */
    uint64_t handed;       /* bytes given to the socket for sending; may be a little too low */
    uint32_t acknowledged; /* bytes that the client has acknowledged, low 32 bits */
    uint32_t sent_ms_ago;  /* since the last segment with data */
    uint32_t received_ms_ago;
    uint32_t has_ended; /* the client has sent its FIN */
    uint32_t is_closed; /* the connection is broken */
};

struct kecho_engine {
    uint32_t begins_unread;         /* 1: begin() comes before the first recv; 0: after it */
    uint32_t queue_for_each_worker; /* 1: a connection cannot change its worker */

    /* ---- for a run ---- */

    /* Opens what the run needs from `given`. On failure, *call names the system call. */
    int (*open)(struct kecho_control *, const int *given, uint32_t count, const char **call);
    /* Closes whatever is open. */
    void (*close)(struct kecho_control *);
    /* Closes descriptors in the child after fork(2). */
    void (*forget)(struct kecho_control *);
    /* Runs on the worker's thread before its first wait. If it or stop() fails,
     * worker.fatal_syscall names the call. */
    int (*start)(struct kecho_worker *);
    /* Waits as epoll_wait(2) does. On failure, worker.fatal_syscall names the call unless it was
     * epoll_wait. */
    int (*wait)(struct kecho_worker *, struct epoll_event *, int most, int timeout_ms);
    /* Gives all connections of a worker back to it, before it drains. */
    int (*stop)(struct kecho_worker *);
    /* Reads the engine's reports: epoll has returned TOKEN_REPORTS. */
    void (*read_reports)(struct kecho_control *);
    /* Adapts shares of memory: control.active has changed. */
    void (*share)(struct kecho_control *);
    /* Adds what was echoed on behalf of one worker and is in none of its counters. */
    void (*add_echoed)(struct kecho_control *, uint32_t worker, uint64_t *bytes, uint64_t *chunks);

    /* ---- for a connection, called by the worker that owns it ---- */

    /* Takes over an ECHOED connection. Returns 0 if the worker is to keep it. */
    int (*begin)(struct kecho_worker *, struct kecho_connection *);

    /* The rest is only called for a connection that is in one of the engine's states. */

    /* Serves a connection: epoll has reported it, or a timer looks. */
    enum kecho_served (*serve)(struct kecho_worker *, struct kecho_connection *, int reads);
    /* Decides about an end of file that recv has returned. */
    enum kecho_served (*at_eof)(struct kecho_worker *, struct kecho_connection *);
    /* Has the next event of the connection be reported, at once if it has already happened. */
    int (*arm)(struct kecho_worker *, struct kecho_connection *);
    /* Finds out where the bytes are. */
    int (*look)(struct kecho_connection *, struct kecho_look *);
    /* Lets go of a connection, before it is closed for `reason` or becomes ECHOED. Returns whether
     * no byte of it is lost, as far as the caller knows (is_whole) and the engine. */
    int (*leave)(struct kecho_worker *, struct kecho_connection *, int is_whole, int reason);
    /* Ends a connection that is overdue, at once or when it can. */
    void (*end)(struct kecho_worker *, struct kecho_connection *, int reason);
};

#endif
