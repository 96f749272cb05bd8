/* What a server that already listens may ask of the kernel: serving, logging, statistics, signals,
 * starting threads, draining, exiting. Everything else is refused with EPERM.
 *
 * Sockets come from accept4() alone: none is made, bound, connected or made to listen. No file is
 * opened, and one that is open (a log) is written at its end if it is in append mode: nothing moves
 * that end, or changes the mode.
 *
 * Calls that some architecture has not (dup2 on aarch64, say) are left out there by #ifdef.
 */
#ifndef KECHO_SANDBOX_POLICY_H
#define KECHO_SANDBOX_POLICY_H

#include <fcntl.h>
#include <linux/sockios.h>
#include <linux/audit.h>
#include <linux/bpf.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sched.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>

#if defined(__x86_64__) && !defined(__ILP32__)
#define KECHO_AUDIT_ARCH AUDIT_ARCH_X86_64
#define KECHO_FOREIGN_CALLS 0x40000000u /* x32: the numbers from here on */
#elif defined(__aarch64__) && !defined(__ILP32__)
#define KECHO_AUDIT_ARCH AUDIT_ARCH_AARCH64
#define KECHO_FOREIGN_CALLS UINT32_MAX /* none */
#else
#define KECHO_AUDIT_ARCH 0 /* nobody has tried the list there */
#define KECHO_FOREIGN_CALLS UINT32_MAX
#endif

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define KECHO_IS_SANITIZED 1 /* their runtimes open files and start processes */
#else
#define KECHO_IS_SANITIZED 0
#endif

/* One half of an argument, masked, has this value; mask 0: no condition. */
struct kecho_condition {
    uint32_t offset; /* into struct seccomp_data */
    uint32_t mask;
    uint32_t value;
};

#define KECHO_CONDITIONS 3
#define KECHO_OWN_PID UINT32_MAX /* as a value: this process */

/* Allowed if all conditions hold. A call may have several of these: any one allows it. */
struct kecho_permit {
    uint32_t call;
    struct kecho_condition conditions[KECHO_CONDITIONS];
};

#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
#define LOW(n) (offsetof(struct seccomp_data, args) + 8 * (n))
#define HIGH(n) (LOW(n) + 4)
#else
#define HIGH(n) (offsetof(struct seccomp_data, args) + 8 * (n))
#define LOW(n) (HIGH(n) + 4)
#endif

/* An int argument has 32 bits: what stands above them, the kernel does not look at. */
#define IS(n, value) {LOW(n), UINT32_MAX, (uint32_t)(value)}
#define HAS(n, bits) {LOW(n), (uint32_t)(bits), (uint32_t)(bits)}
#define LACKS(n, bits) {LOW(n), (uint32_t)(bits), 0}
#define IS_NULL(n) {LOW(n), UINT32_MAX, 0}, {HIGH(n), UINT32_MAX, 0}
/* clang-format off */
#define CALL(name) {SYS_##name, {{0, 0, 0}}}
#define CALL_IF(name, ...) {SYS_##name, {__VA_ARGS__}}
/* clang-format on */

#define SETSOCKOPT(name) CALL_IF(setsockopt, IS(1, SOL_SOCKET), IS(2, name))

#define KECHO_MSG_FASTOPEN 0x20000000 /* sending that connects */
#define KECHO_AT_EMPTY_PATH 0x1000    /* newfstatat() that is fstat() */

static const struct kecho_permit kecho_permits[] = {
    /* A filter is gone through from its beginning, unless the call is allowed whatever its
     * arguments, which the kernel (since 5.11) keeps in a bitmap. So the one that every echo makes
     * and that has conditions stands first. Without an address nobody is sent anything but a peer,
     * and MSG_FASTOPEN gives EINVAL. With one it connects out, without socket() or connect(), from
     * a listener that was destroyed from outside or shut down by another holder, and, in two
     * calls, from an MPTCP listener or an MPTCP connection that its client has reset. */
    CALL_IF(sendto, IS_NULL(4)),
    CALL(recvfrom),
    CALL(epoll_pwait),
    CALL(epoll_ctl),
    CALL(accept4),
    CALL(close),
    CALL_IF(shutdown, IS(1, SHUT_WR)), /* SHUT_RD has a listener cease to be one */
    CALL(read),
    CALL(write),
    CALL(writev),
    CALL(pread64),
    CALL(ppoll),
    CALL(pselect6),
#ifdef SYS_epoll_wait
    CALL(epoll_wait),
    CALL(poll),
    CALL(select),
#endif
#ifdef SYS_epoll_pwait2
    CALL(epoll_pwait2),
#endif

    /* No other option: TCP_ULP, TCP_CONGESTION or a filter reach code of the kernel that serving
     * does not need. */
    SETSOCKOPT(SO_LINGER),
    SETSOCKOPT(SO_OOBINLINE),
    CALL(getsockopt),
    CALL(getsockname),
    CALL(getpeername),
    CALL(dup),
    CALL(dup3),
#ifdef SYS_dup2
    CALL(dup2),
#endif
    CALL_IF(fcntl, IS(1, F_DUPFD)),
    CALL_IF(fcntl, IS(1, F_DUPFD_CLOEXEC)),
    CALL_IF(fcntl, IS(1, F_GETFD)),
    CALL_IF(fcntl, IS(1, F_SETFD)),
    CALL_IF(fcntl, IS(1, F_GETFL)),
    CALL_IF(ioctl, IS(1, SIOCOUTQ)),
    CALL_IF(ioctl, IS(1, FIOCLEX)),
    CALL_IF(ioctl, IS(1, FIONCLEX)),
    CALL_IF(newfstatat, HAS(3, KECHO_AT_EMPTY_PATH)),
    CALL(fstat),
#ifdef SYS_statx
    CALL_IF(statx, HAS(2, KECHO_AT_EMPTY_PATH)),
#endif

    /* Memory, of no file; what can be written does not become code. */
    CALL(brk),
    CALL_IF(mmap, LACKS(2, PROT_EXEC), HAS(3, MAP_ANONYMOUS)),
    CALL_IF(mprotect, LACKS(2, PROT_EXEC)),
    CALL(munmap),
    CALL(mremap),
    CALL(madvise),

    /* Threads, and no processes. clone3() is told apart in seccomp.pxd. */
    CALL_IF(clone, HAS(0, CLONE_THREAD | CLONE_VM)),
    CALL(futex),
    CALL(set_robust_list),
    CALL(set_tid_address),
#ifdef SYS_rseq
    CALL(rseq),
#endif
    CALL(membarrier),
    CALL(sched_yield),
    CALL(sched_getaffinity),
    CALL_IF(sched_setaffinity, IS(0, 0)),
    CALL_IF(prctl, IS(0, PR_SET_NAME)),
    CALL(exit),
    CALL(exit_group),

    CALL(rt_sigaction),
    CALL(rt_sigpending),
    CALL(rt_sigprocmask),
    CALL(rt_sigreturn),
    CALL(rt_sigtimedwait),
    CALL(restart_syscall),
    CALL(sigaltstack),
    CALL_IF(kill, IS(0, KECHO_OWN_PID)),
    CALL_IF(tgkill, IS(0, KECHO_OWN_PID)),

    CALL(clock_getres),
    CALL(clock_gettime),
    CALL(clock_nanosleep),
    CALL(gettimeofday),
    CALL(nanosleep),
#ifdef SYS_time
    CALL(time),
#endif

    CALL(getrandom),
    CALL(getpid),
    CALL(getppid),
    CALL(gettid),
    CALL(getuid),
    CALL(geteuid),
    CALL(getgid),
    CALL(getegid),
    CALL(getrusage),
    CALL_IF(prlimit64, IS(0, 0), IS_NULL(2)), /* getrlimit() */
#ifdef SYS_getrlimit
    CALL(getrlimit),
#endif
    CALL(sysinfo),
};

/* To remove the Unix socket's file; Landlock says beneath which directory. */
static const struct kecho_permit kecho_permits_of_a_file[] = {
    CALL_IF(newfstatat, HAS(3, AT_SYMLINK_NOFOLLOW)),
    CALL_IF(unlinkat, IS(2, 0)),
};

/* --udp. Whom a message is for, and whether it carries descriptors (of a Unix socket's), stands in
 * memory, where a filter cannot look. */
static const struct kecho_permit kecho_permits_of_datagrams[] = {
    CALL(recvmmsg),
    CALL_IF(sendmmsg, LACKS(3, KECHO_MSG_FASTOPEN)),
    SETSOCKOPT(SO_ATTACH_FILTER), /* to take no more */
};

/* To hand connections to the kernel's echo and to look at them; no program and no map is made. */
static const struct kecho_permit kecho_permits_of_flows[] = {
    SETSOCKOPT(SO_ATTACH_BPF),
    SETSOCKOPT(SO_RCVLOWAT),
    CALL_IF(bpf, IS(0, BPF_MAP_LOOKUP_ELEM)),
    CALL_IF(bpf, IS(0, BPF_MAP_UPDATE_ELEM)),
    CALL_IF(bpf, IS(0, BPF_MAP_DELETE_ELEM)),
};

/* To use rings, which say themselves what they can be used for; none is made, or given more rights.
 * The numbers are the same on every architecture, and older headers do not know them. */
static const struct kecho_permit kecho_permits_of_rings[] = {
    {426, {{0, 0, 0}}}, /* io_uring_enter() */
    {427, {IS(1, 12)}}, /* io_uring_register(): IORING_REGISTER_ENABLE_RINGS */
};

enum {
    KECHO_PERMITS = sizeof(kecho_permits) / sizeof(*kecho_permits),
    KECHO_PERMITS_OF_A_FILE = sizeof(kecho_permits_of_a_file) / sizeof(*kecho_permits_of_a_file),
    KECHO_PERMITS_OF_DATAGRAMS = sizeof(kecho_permits_of_datagrams) /
        sizeof(*kecho_permits_of_datagrams),
    KECHO_PERMITS_OF_FLOWS = sizeof(kecho_permits_of_flows) / sizeof(*kecho_permits_of_flows),
    KECHO_PERMITS_OF_RINGS = sizeof(kecho_permits_of_rings) / sizeof(*kecho_permits_of_rings)
};

#ifdef SYS_clone3
#define KECHO_CLONE3 SYS_clone3
#else
#define KECHO_CLONE3 435 /* the same on every architecture */
#endif

#undef LOW
#undef HIGH
#undef IS
#undef HAS
#undef LACKS
#undef IS_NULL
#undef CALL
#undef CALL_IF
#undef SETSOCKOPT

#endif
