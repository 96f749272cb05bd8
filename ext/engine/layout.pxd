"""The engine's records, declared to Cython; layout.h says what each field means."""
from common.rules cimport Address, Rules
from common.siphash cimport HashKey
from kernel.epoll cimport epoll_event
from kernel.pthread cimport pthread_mutex_t
from libc.stdint cimport int32_t, uint8_t, uint16_t, uint32_t, uint64_t

cdef extern from "engine/layout.h" nogil:
    enum:
        OWNERSHIP_FREE
        OWNERSHIP_NOBODY
        OWNERSHIP_ONE
        OWNERSHIP_ONE_RECALL
        OWNERSHIP_ONE_RECALL_TO_END

    ctypedef enum State "enum kecho_connection_state":
        STATE_ECHOED
        STATE_FINISHING
        STATE_IN_KERNEL
        STATE_PASSED
        STATE_RING
        STATE_RING_OVERDUE
        STATE_RING_LEAVING
        STATE_RING_BLOCKED
        STATE_RING_ENDED
        STATE_RING_BROKEN

    enum:
        CONNECTION_REGISTERED
        CONNECTION_ARMED_WRITE
        CONNECTION_READ_TO_END
        CONNECTION_SILENT
        CONNECTION_HELD
        CONNECTION_WAITED
        CONNECTION_UNIX
        CONNECTION_RECEIVING
        CONNECTION_SENDING

    enum:
        LOOK_AT_NEITHER
        LOOK_AT_WAITING
        LOOK_AT_HELD
        LOOK_AT_FINISHING
        LOOK_AT_UNSEEN

    enum:
        KECHO_SLAB_CHUNK_CONNECTIONS
        KECHO_SLAB_CHUNKS
        KECHO_BUFFER_BYTES
        KECHO_STREAMS_MOST
        KECHO_EVERY_QUEUE
        KECHO_LISTENERS_MOST

        KECHO_IDLE_PEERS_MOST

    const uint32_t KECHO_SLAB_END
    const uint32_t KECHO_NO_PEER

    enum:
        LISTENER_OPEN
        LISTENER_PAUSED
        LISTENER_DEAD

    enum:
        CLOSE_EOF
        CLOSE_RESET
        CLOSE_TIMED_OUT
        CLOSE_IDLE
        CLOSE_STALLED
        CLOSE_EVICTED
        CLOSE_DRAINED
        CLOSE_ABORTED
        CLOSE_ERROR

    enum:
        ERROR_ACCEPT
        ERROR_DESCRIPTORS
        ERROR_MEMORY
        ERROR_LISTENER
        ERROR_RECV
        ERROR_SEND
        ERROR_EPOLL

    enum:
        REFUSED_DENIED
        REFUSED_PER_ADDRESS
        REFUSED_RATE

    ctypedef struct Connection "struct kecho_connection":
        uint64_t ownership
        uint8_t* pending
        uint32_t pending_begin
        uint32_t pending_end
        int32_t fd
        uint32_t index
        uint32_t next_free
        uint8_t state
        uint8_t finish_reason
        uint16_t error
        uint32_t last_active_ms
        uint16_t flags
        uint16_t accepted_by
        uint32_t peer
        uint32_t to_look_at
        uint32_t waiting_next
        uint32_t waiting_prev
        uint32_t waited_until_ms
        uint32_t unread_bytes
        uint32_t look_at_ms
        uint32_t held_bytes
        uint32_t first_chunk
        uint32_t last_chunk

    void connection_enter(Connection* connection, State state)

    ctypedef struct Slab "struct kecho_slab":
        pthread_mutex_t lock
        Connection** chunks
        uint32_t free_head
        uint32_t high_water
        uint32_t in_use

    ctypedef struct Listener "struct kecho_listener":
        int32_t fd
        uint32_t is_unix
        uint32_t is_inherited
        int32_t queue
        uint32_t state
        uint32_t drops_seen
        uint64_t dropped

    ctypedef struct Queue "struct kecho_queue":
        int32_t epoll_fd
        int32_t wake_fd
        uint32_t workers_running
        uint64_t next_sweep_ms
        Slab slab
        pthread_mutex_t waiting_lock
        uint32_t waiting_head
        uint32_t waiting_tail
        uint64_t waiting_bytes
        uint32_t waiting_count
        uint32_t finishing
        uint32_t held
        uint64_t next_look_ms

    ctypedef struct Peer "struct kecho_peer":
        Address address
        uint32_t connections
        uint32_t chain
        uint32_t tokens_milli
        uint32_t refilled_ms
        uint32_t idle_next
        uint32_t idle_prev

    ctypedef struct Access "struct kecho_access":
        Rules rules
        uint32_t per_address
        uint32_t rate_per_s
        HashKey hash_key
        pthread_mutex_t lock
        Peer* peers
        uint32_t* buckets
        uint32_t capacity
        uint32_t high_water
        uint32_t free_head
        uint32_t idle_head
        uint32_t idle_tail
        uint32_t idle_count

    ctypedef enum Served "enum kecho_served":
        SERVED_ALL
        SERVED_MORE
        SERVED_CLOSED

    ctypedef struct Look "struct kecho_look":
        uint64_t received
        uint64_t handed
        uint32_t acknowledged
        uint32_t sent_ms_ago
        uint32_t received_ms_ago
        uint32_t has_ended
        uint32_t is_closed

    ctypedef struct EngineCalls "struct kecho_engine":
        uint32_t begins_unread
        uint32_t queue_for_each_worker
        int (*open)(
            Control* control, const int* given, uint32_t count, const char** call,
        ) noexcept nogil
        void (*close)(Control* control) noexcept nogil
        void (*forget)(Control* control) noexcept nogil
        int (*start)(Worker* worker) noexcept nogil
        int (*wait)(
            Worker* worker, epoll_event* events, int most, int timeout_ms,
        ) noexcept nogil
        int (*stop)(Worker* worker) noexcept nogil
        void (*read_reports)(Control* control) noexcept nogil
        void (*share)(Control* control) noexcept nogil
        void (*add_echoed)(
            Control* control, uint32_t worker, uint64_t* bytes, uint64_t* chunks,
        ) noexcept nogil
        bint (*begin)(Worker* worker, Connection* connection) noexcept nogil
        Served (*serve)(Worker* worker, Connection* connection, int reads) noexcept nogil
        Served (*at_eof)(Worker* worker, Connection* connection) noexcept nogil
        int (*arm)(Worker* worker, Connection* connection) noexcept nogil
        int (*look)(Connection* connection, Look* look) noexcept nogil
        bint (*leave)(
            Worker* worker, Connection* connection, bint is_whole, int reason,
        ) noexcept nogil
        void (*end)(Worker* worker, Connection* connection, int reason) noexcept nogil

    ctypedef struct Control "struct kecho_control":
        uint32_t phase
        uint64_t deadline_ms
        uint32_t active
        uint32_t paused
        uint32_t workers_accepting
        uint32_t unaccepted
        int32_t unaccepted_errno
        uint32_t left_to_others
        uint32_t max_connections
        uint32_t idle_timeout_ms
        uint32_t write_timeout_ms
        uint32_t finish_timeout_ms
        uint64_t queue_buffer_bytes
        uint64_t busy_poll_ns
        uint32_t busy_poll_by_gaps
        uint32_t queue_count
        uint32_t worker_count
        uint32_t listener_count
        Queue* queues
        Worker* workers
        Listener* listeners
        pthread_mutex_t listeners_lock
        Access access
        EngineCalls engine
        void* of_engine

    ctypedef struct Counters "struct kecho_counters":
        uint64_t accepted
        uint64_t bytes_received
        uint64_t bytes_sent
        uint64_t echoes
        uint64_t backpressure
        uint64_t accept_pauses
        uint64_t* closed
        uint64_t* errors
        uint64_t* refused

    ctypedef struct Worker "struct kecho_worker":
        Counters counters
        Control* control
        Queue* queue
        uint8_t* buffer
        Connection** streams
        uint32_t stream_count
        uint32_t turns_in_a_row
        uint32_t stream_turns
        uint32_t has_served
        uint64_t now_ms
        uint64_t resume_at_ms
        uint64_t greet_until_ms
        uint64_t serve_again_ms
        uint64_t idle_since_ns
        uint64_t mean_gap_ns
        uint64_t rest_until_ns
        uint32_t index
        uint32_t is_draining
        uint32_t listeners_left
        int32_t accept_errno
        int32_t fatal_errno
        const char* fatal_syscall
        void* of_engine
        uint32_t active
