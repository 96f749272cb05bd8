"""The maps that the workers share with the kernel's program, ext/bpf/program.c."""
from common.atomics cimport (
    atomic_u32_load, atomic_u32_load_relaxed, atomic_u64_load, atomic_u64_load_acquire,
    atomic_u64_load_relaxed, atomic_u64_store, atomic_u64_store_release,
)
from common.flows cimport (
    KECHO_FLOW_CHARGE_LEAST, KECHO_FLOW_CHARGE_MOST, KECHO_FLOW_CPUS, KECHO_FLOW_REPORTS_BYTES,
    Board, FlowCounters,
)
from engine.layout cimport Control
from engine.sockmap.layout cimport Flows
from kernel.bpf cimport BPF_RINGBUF_BUSY_BIT, BPF_RINGBUF_DISCARD_BIT, BPF_RINGBUF_HDR_SZ
from kernel.pthread cimport pthread_mutex_destroy, pthread_mutex_init
from libc.errno cimport errno
from libc.stdint cimport uint32_t, uint64_t, uint8_t
from libc.string cimport memset
from posix.mman cimport MAP_FAILED, MAP_SHARED, PROT_READ, PROT_WRITE, mmap, munmap
from posix.unistd cimport _SC_PAGESIZE, close, sysconf


cdef inline Flows* flows_of(Control* control) noexcept nogil:
    return <Flows*>control.of_engine


cdef inline void flows_reset(Flows* flows) noexcept nogil:
    memset(flows, 0, sizeof(Flows))
    flows.sockets_fd = flows.flows_fd = flows.board_fd = flows.reports_fd = flows.filter_fd = -1


cdef inline int flows_open(Flows* flows, const int* fds, const char** call) noexcept nogil:
    """Take over the descriptors of _bpf.open_echo(). Return 0, or -errno of what `call` then names.
    flows_close() is due either way; it closes only what was taken over."""
    cdef size_t page = <size_t>sysconf(_SC_PAGESIZE)
    cdef void* memory
    call[0] = "mmap"
    memory = mmap(NULL, sizeof(Board), PROT_READ | PROT_WRITE, MAP_SHARED, fds[2], 0)
    if memory == MAP_FAILED:
        return -errno
    flows.board = <Board*>memory
    # BPF_MAP_TYPE_RINGBUF: a page to write, then one to read, then the records, twice.
    memory = mmap(NULL, page, PROT_READ | PROT_WRITE, MAP_SHARED, fds[3], 0)
    if memory == MAP_FAILED:
        return -errno
    flows.consumed = <uint64_t*>memory
    memory = mmap(
        NULL, page + 2 * KECHO_FLOW_REPORTS_BYTES, PROT_READ, MAP_SHARED, fds[3], <long>page)
    if memory == MAP_FAILED:
        return -errno
    flows.produced = <const uint64_t*>memory
    flows.records = <const uint8_t*>memory + page
    call[0] = "pthread_mutex_init"
    if pthread_mutex_init(&flows.reports_lock, NULL) != 0:
        return -errno
    flows.sockets_fd, flows.flows_fd, flows.board_fd, flows.reports_fd = (
        fds[0], fds[1], fds[2], fds[3])
    flows.filter_fd = fds[4]
    return 0


cdef inline void flows_close(Flows* flows) noexcept nogil:
    cdef size_t page = <size_t>sysconf(_SC_PAGESIZE)
    if flows.board != NULL:
        munmap(flows.board, sizeof(Board))
    if flows.consumed != NULL:
        munmap(flows.consumed, page)
    if flows.produced != NULL:
        munmap(<void*>flows.produced, page + 2 * KECHO_FLOW_REPORTS_BYTES)
    if flows.sockets_fd >= 0:
        pthread_mutex_destroy(&flows.reports_lock)
        close(flows.sockets_fd)
        close(flows.flows_fd)
        close(flows.board_fd)
        close(flows.reports_fd)
        close(flows.filter_fd)
    flows_reset(flows)


cdef inline void flows_disown(Flows* flows) noexcept nogil:
    """Give the descriptors back to the caller of flows_open()."""
    flows.sockets_fd = -1
    pthread_mutex_destroy(&flows.reports_lock)


cdef inline uint64_t _share_bytes(Control* control, uint32_t active) noexcept nogil:
    """Return how many bytes the kernel may hold for each connection."""
    cdef uint64_t most = control.queue_buffer_bytes * control.queue_count
    most //= max(active, <uint32_t>1)
    most = min(max(most, <uint64_t>KECHO_FLOW_CHARGE_LEAST), <uint64_t>KECHO_FLOW_CHARGE_MOST)
    return min(most, control.queue_buffer_bytes)  # a single held connection is not evicted


cdef inline void flows_share(Control* control) noexcept nogil:
    """Bound what the kernel may hold for one connection, so that all of them stay within
    max_buffer_memory. With so many connections that a share would be too small, evicting the
    slowest readers keeps the bound.

    Called whenever `active` has changed, by several workers at once. The one that saw the older
    number may write last. So each looks again after it has written, until it finds what it would
    write.
    """
    cdef Flows* flows = flows_of(control)
    cdef uint64_t most
    while True:
        most = _share_bytes(control, atomic_u32_load(&control.active))
        if atomic_u64_load(&flows.board.charge_most) == most:
            return
        atomic_u64_store(&flows.board.charge_most, most)


cdef inline uint64_t flows_next(Flows* flows, bint* is_one) noexcept nogil:
    """Return the next token of the reports, if there is one. Their lock is held."""
    cdef uint64_t at = atomic_u64_load_relaxed(flows.consumed)
    cdef const uint8_t* record
    cdef uint32_t header
    cdef uint64_t token
    is_one[0] = False
    while at != atomic_u64_load_acquire(flows.produced):
        record = flows.records + at % KECHO_FLOW_REPORTS_BYTES
        header = atomic_u32_load_relaxed(<const uint32_t*>record)
        if header & BPF_RINGBUF_BUSY_BIT:
            break  # being written: epoll reports it again
        token = (<const uint64_t*>(record + BPF_RINGBUF_HDR_SZ))[0]
        at += BPF_RINGBUF_HDR_SZ + sizeof(token)
        atomic_u64_store_release(flows.consumed, at)
        if not header & BPF_RINGBUF_DISCARD_BIT:
            is_one[0] = True
            return token
    return 0


cdef inline bint flows_take_untold(Flows* flows) noexcept nogil:
    """Check whether reports were dropped since the last call. Their lock is held."""
    cdef uint64_t untold = atomic_u64_load_relaxed(&flows.board.untold)
    if untold == flows.untold_seen:
        return False
    flows.untold_seen = untold
    return True


cdef inline void flows_add_echoed(
    Control* control, uint32_t worker, uint64_t* bytes, uint64_t* chunks,
) noexcept nogil:
    """Add what the kernel has echoed on the CPUs of one worker. Under percpu that worker accepted
    the connections; otherwise it is as good as any."""
    cdef FlowCounters* counters
    cdef uint32_t cpu = worker
    while cpu < KECHO_FLOW_CPUS:
        counters = &flows_of(control).board.cpus[cpu]
        bytes[0] += atomic_u64_load_relaxed(&counters.bytes)
        chunks[0] += atomic_u64_load_relaxed(&counters.chunks)
        cpu += control.worker_count
