"""<linux/io_uring.h>: io_uring(7), as much of it as kecho uses; Linux 6.1 has all of that.

Written out here: distributions' headers are older than the kernels that they meet.
"""
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t

cdef extern from "<errno.h>":  # libc.errno leaves it out
    enum:
        ECANCELED

cdef extern from * nogil:
    """
    #include <errno.h>
    #include <stdint.h>
    #include <sys/syscall.h>
    #include <unistd.h>

    /* The same on every architecture; headers before Linux 5.1 do not know them. */
    #ifndef SYS_io_uring_setup
    #define SYS_io_uring_setup 425
    #define SYS_io_uring_enter 426
    #define SYS_io_uring_register 427
    #endif

    enum {
        KECHO_SETUP_CQSIZE = 1 << 3,
        KECHO_SETUP_R_DISABLED = 1 << 6,
        KECHO_SETUP_SUBMIT_ALL = 1 << 7,
        KECHO_SETUP_SINGLE_ISSUER = 1 << 12,
        KECHO_SETUP_DEFER_TASKRUN = 1 << 13,

        KECHO_ENTER_GETEVENTS = 1 << 0,
        KECHO_ENTER_EXT_ARG = 1 << 3,

        KECHO_REGISTER_RESTRICTIONS = 11,
        KECHO_REGISTER_ENABLE_RINGS = 12,
        KECHO_REGISTER_PBUF_RING = 22,

        KECHO_RESTRICTION_SQE_OP = 1,
        KECHO_RESTRICTION_SQE_FLAGS_ALLOWED = 2,

        KECHO_OP_POLL_ADD = 6,
        KECHO_OP_ASYNC_CANCEL = 14,
        KECHO_OP_SEND = 26,
        KECHO_OP_RECV = 27,

#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
        KECHO_POLLIN = 1,
#else
        KECHO_POLLIN = 1 << 16, /* its halves are swapped */
#endif
        KECHO_SQE_BUFFER_SELECT = 1 << 5,
        KECHO_RECV_MULTISHOT = 1 << 1, /* in ioprio */

        KECHO_SQ_CQ_OVERFLOW = 1 << 1, /* in the flags of the requests' ring */
        KECHO_CQE_F_BUFFER = 1 << 0,
        KECHO_CQE_F_MORE = 1 << 1,
        KECHO_CQE_BUFFER_SHIFT = 16
    };
    #define KECHO_OFF_SQES 0x10000000

    struct kecho_sqe {
        uint8_t opcode;
        uint8_t flags;
        uint16_t ioprio;
        int32_t fd;
        uint64_t off;
        uint64_t addr;
        uint32_t len;
        uint32_t op_flags;
        uint64_t user_data;
        uint16_t buf_group;
        uint16_t personality;
        int32_t file_index;
        uint64_t rest[2];
    };
    struct kecho_cqe {
        uint64_t user_data;
        int32_t res;
        uint32_t flags;
    };
    struct kecho_ring_offsets {
        uint32_t head, tail, ring_mask, ring_entries;
        uint32_t fifth, sixth, seventh, reserved; /* flags, dropped, array; overflow, cqes, flags */
        uint64_t user_addr;
    };
    struct kecho_uring_params {
        uint32_t sq_entries, cq_entries, flags, sq_thread_cpu, sq_thread_idle, features, wq_fd;
        uint32_t reserved[3];
        struct kecho_ring_offsets sq_off, cq_off;
    };
    struct kecho_uring_restriction {
        uint16_t opcode;
        uint8_t what;
        uint8_t reserved[13];
    };
    struct kecho_uring_buf {
        uint64_t addr;
        uint32_t len;
        uint16_t bid;
        uint16_t tail; /* of the first one: how many have been given, ever */
    };
    struct kecho_uring_buf_reg {
        uint64_t ring_addr;
        uint32_t ring_entries;
        uint16_t bgid;
        uint16_t flags;
        uint64_t reserved[3];
    };
    struct kecho_uring_getevents_arg {
        uint64_t sigmask;
        uint32_t sigmask_sz;
        uint32_t reserved;
        uint64_t ts;
    };
    struct kecho_uring_timespec {
        int64_t tv_sec;
        long long tv_nsec;
    };
    _Static_assert(sizeof(struct kecho_sqe) == 64 && sizeof(struct kecho_cqe) == 16 &&
                       sizeof(struct kecho_uring_params) == 120 &&
                       sizeof(struct kecho_uring_restriction) == 16 &&
                       sizeof(struct kecho_uring_buf) == 16 &&
                       sizeof(struct kecho_uring_buf_reg) == 40 &&
                       sizeof(struct kecho_uring_getevents_arg) == 24,
                   "as the kernel has them");

    static inline int io_uring_setup(uint32_t entries, struct kecho_uring_params *params) {
        int fd = (int)syscall(SYS_io_uring_setup, entries, params);
        return fd < 0 ? -errno : fd;
    }

    static inline int io_uring_register(int fd, unsigned what, void *arg, unsigned count) {
        int result = (int)syscall(SYS_io_uring_register, fd, what, arg, count);
        return result < 0 ? -errno : result;
    }

    static inline int io_uring_enter(int fd, uint32_t submit, uint32_t least, uint32_t flags,
                                     const struct kecho_uring_getevents_arg *arg) {
        int result = (int)syscall(SYS_io_uring_enter, fd, submit, least, flags, arg,
                                  arg == NULL ? 0 : sizeof(*arg));
        return result < 0 ? -errno : result;
    }

    /* What stands in the ring's memory before is there for the kernel, too. */
    static inline void kecho_uring_buf_tail(struct kecho_uring_buf *ring, uint16_t tail) {
        __atomic_store_n(&ring->tail, tail, __ATOMIC_RELEASE);
    }
    """
    enum:
        IORING_SETUP_CQSIZE "KECHO_SETUP_CQSIZE"
        IORING_SETUP_R_DISABLED "KECHO_SETUP_R_DISABLED"
        IORING_SETUP_SUBMIT_ALL "KECHO_SETUP_SUBMIT_ALL"
        IORING_SETUP_SINGLE_ISSUER "KECHO_SETUP_SINGLE_ISSUER"
        IORING_SETUP_DEFER_TASKRUN "KECHO_SETUP_DEFER_TASKRUN"
        IORING_ENTER_GETEVENTS "KECHO_ENTER_GETEVENTS"
        IORING_ENTER_EXT_ARG "KECHO_ENTER_EXT_ARG"
        IORING_REGISTER_RESTRICTIONS "KECHO_REGISTER_RESTRICTIONS"
        IORING_REGISTER_ENABLE_RINGS "KECHO_REGISTER_ENABLE_RINGS"
        IORING_REGISTER_PBUF_RING "KECHO_REGISTER_PBUF_RING"
        IORING_RESTRICTION_SQE_OP "KECHO_RESTRICTION_SQE_OP"
        IORING_RESTRICTION_SQE_FLAGS_ALLOWED "KECHO_RESTRICTION_SQE_FLAGS_ALLOWED"
        IORING_OP_POLL_ADD "KECHO_OP_POLL_ADD"
        IORING_OP_ASYNC_CANCEL "KECHO_OP_ASYNC_CANCEL"
        IORING_OP_SEND "KECHO_OP_SEND"
        IORING_OP_RECV "KECHO_OP_RECV"
        IORING_POLLIN "KECHO_POLLIN"
        IOSQE_BUFFER_SELECT "KECHO_SQE_BUFFER_SELECT"
        IORING_RECV_MULTISHOT "KECHO_RECV_MULTISHOT"
        IORING_SQ_CQ_OVERFLOW "KECHO_SQ_CQ_OVERFLOW"
        IORING_CQE_F_BUFFER "KECHO_CQE_F_BUFFER"
        IORING_CQE_F_MORE "KECHO_CQE_F_MORE"
        IORING_CQE_BUFFER_SHIFT "KECHO_CQE_BUFFER_SHIFT"
        IORING_OFF_SQES "KECHO_OFF_SQES"

    ctypedef struct Sqe "struct kecho_sqe":
        uint8_t opcode
        uint8_t flags
        uint16_t ioprio
        int32_t fd
        uint64_t off
        uint64_t addr
        uint32_t len
        uint32_t op_flags
        uint64_t user_data
        uint16_t buf_group

    ctypedef struct Cqe "struct kecho_cqe":
        uint64_t user_data
        int32_t res
        uint32_t flags

    struct ring_offsets "kecho_ring_offsets":
        uint32_t head
        uint32_t tail
        uint32_t ring_mask
        uint32_t ring_entries
        uint32_t flags "fifth"
        uint32_t cqes "sixth"
        uint32_t array "seventh"

    struct io_uring_params "kecho_uring_params":
        uint32_t sq_entries
        uint32_t cq_entries
        uint32_t flags
        ring_offsets sq_off
        ring_offsets cq_off

    struct io_uring_restriction "kecho_uring_restriction":
        uint16_t opcode
        uint8_t what

    ctypedef struct UringBuffer "struct kecho_uring_buf":
        uint64_t addr
        uint32_t len
        uint16_t bid

    struct io_uring_buf_reg "kecho_uring_buf_reg":
        uint64_t ring_addr
        uint32_t ring_entries
        uint16_t bgid

    struct io_uring_getevents_arg "kecho_uring_getevents_arg":
        uint64_t ts

    struct kernel_timespec "kecho_uring_timespec":
        int64_t tv_sec
        long long tv_nsec

    int io_uring_setup(uint32_t entries, io_uring_params* params)
    int io_uring_register(int fd, unsigned int what, void* arg, unsigned int count)
    int io_uring_enter(
        int fd, uint32_t submit, uint32_t least, uint32_t flags, const io_uring_getevents_arg* arg)
    void io_uring_buf_ring_tail "kecho_uring_buf_tail" (UringBuffer* ring, uint16_t tail)
