"""The UDP side's records, declared to Cython; layout.h says what each field means."""
from common.rules cimport Rules
from common.siphash cimport HashKey
from kernel.datagram cimport iovec, mmsghdr
from kernel.inet cimport in6_pktinfo, in_pktinfo, sockaddr_in, sockaddr_in6
from kernel.poll cimport pollfd
from kernel.pthread cimport pthread_mutex_t
from libc.stdint cimport int32_t, uint8_t, uint16_t, uint32_t, uint64_t

cdef extern from "udp/fingerprint.h" nogil:
    enum:
        KECHO_UDP_BLOCK_BYTES
        KECHO_UDP_SECRET_WORDS

    ctypedef struct Secret "struct kecho_udp_secret":
        uint64_t words[KECHO_UDP_SECRET_WORDS]

    uint64_t fingerprint "kecho_udp_fingerprint"(
        const Secret* secret, uint64_t context, const uint8_t* bytes, size_t size)

cdef extern from "udp/layout.h" nogil:
    enum:
        KECHO_UDP_BATCH
        KECHO_UDP_BUFFER_BYTES
        KECHO_UDP_CONTROL_BYTES
        KECHO_UDP_REPLIES
        KECHO_UDP_SEEN_SETS
        KECHO_UDP_SEEN_WAYS
        KECHO_UDP_SEGMENTS
        KECHO_UDP_SETS
        KECHO_UDP_WAYS

    enum:
        REFUSED_PORT
        REFUSED_OWN_PORT
        REFUSED_ADDRESS
        REFUSED_DENIED
        REFUSED_RATE
        REFUSED_TOTAL
        REFUSED_REPEATED
        REFUSALS

    enum:
        UDP_ERROR_TRUNCATED
        UDP_ERROR_FULL
        UDP_ERROR_MEMORY
        UDP_ERROR_UNREACHABLE
        UDP_ERROR_DENIED
        UDP_ERROR_SEND
        UDP_ERROR_RECV

    ctypedef struct sockaddr_any "struct sockaddr":
        uint16_t sa_family

    ctypedef union Address "union kecho_udp_address":
        sockaddr_any any
        sockaddr_in v4
        sockaddr_in6 v6

    ctypedef struct Inbox "struct kecho_udp_inbox":
        mmsghdr headers[KECHO_UDP_BATCH]
        iovec pieces[KECHO_UDP_BATCH]
        Address sources[KECHO_UDP_BATCH]
        uint8_t control[KECHO_UDP_BATCH][KECHO_UDP_CONTROL_BYTES]
        uint8_t* buffer

    ctypedef struct Outbox "struct kecho_udp_outbox":
        mmsghdr headers[KECHO_UDP_REPLIES]
        iovec pieces[KECHO_UDP_REPLIES]
        uint32_t datagrams[KECHO_UDP_REPLIES]
        uint32_t segment_bytes[KECHO_UDP_REPLIES]
        uint8_t control[KECHO_UDP_REPLIES][KECHO_UDP_CONTROL_BYTES]
        uint32_t count

    ctypedef union Asked "union kecho_udp_asked":
        in_pktinfo v4
        in6_pktinfo v6

    ctypedef struct Request "struct kecho_udp_request":
        uint8_t* data
        Address* source
        uint32_t bytes
        uint32_t segment_bytes
        uint32_t datagrams
        uint32_t has_asked
        uint32_t hops
        uint32_t is_repeated
        Asked asked

    ctypedef struct Counters "struct kecho_udp_counters":
        uint64_t received
        uint64_t sent
        uint64_t bytes_received
        uint64_t bytes_sent
        uint64_t* refused
        uint64_t* errors

    ctypedef struct Bucket "struct kecho_udp_bucket":
        uint64_t source
        uint64_t full_at

    ctypedef struct BucketSet "struct kecho_udp_set":
        Bucket buckets[KECHO_UDP_WAYS]

    ctypedef struct Rate "struct kecho_udp_rate":
        uint64_t interval_ticks
        uint64_t window_ticks

    ctypedef struct Limiter "struct kecho_udp_limiter":
        pthread_mutex_t lock
        Rate per_source
        Rate total
        HashKey hash_key
        Bucket everybody
        BucketSet* sets

    ctypedef struct SeenSet "struct kecho_udp_seen_set":
        uint64_t datagrams[KECHO_UDP_SEEN_WAYS]

    ctypedef struct Repeats "struct kecho_udp_repeats":
        SeenSet* seen
        pthread_mutex_t lock
        Rate rate
        uint64_t chance
        BucketSet* sources

    ctypedef struct Socket "struct kecho_udp_socket":
        int32_t fd
        uint32_t worker
        uint64_t resume_at_ms
        uint64_t dropped

    ctypedef struct Worker "struct kecho_udp_worker":
        Counters counters
        Control* control
        Socket* sockets
        pollfd* polls
        Inbox* inbox
        Outbox* outbox
        uint32_t socket_count
        int32_t wake_fd
        int32_t fatal_errno

    ctypedef struct Control "struct kecho_udp_control":
        uint32_t phase
        uint64_t deadline_ms
        uint16_t own_port
        uint16_t source_port_least
        uint32_t worker_count
        uint32_t socket_count
        Worker* workers
        Socket* sockets
        Limiter limiter
        Repeats repeats
        Secret secret
        Rules rules
