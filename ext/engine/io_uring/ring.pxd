"""A worker's ring, io_uring(7): requests need no system call each, and results are read from
memory. Only its worker uses it (IORING_SETUP_SINGLE_ISSUER), and the kernel only receives when
asked (IORING_SETUP_DEFER_TASKRUN). So nothing here is concurrent.

The ring can receive, send, poll and cancel, and nothing else (IORING_REGISTER_RESTRICTIONS): a
seccomp filter does not see what a ring does.
"""
from common.atomics cimport atomic_u32_load, atomic_u32_store
from engine.io_uring.layout cimport KECHO_CHUNK_BYTES, KECHO_CHUNKS, Chunk, Uring
from engine.layout cimport CONNECTION_RECEIVING, Connection, Worker
from engine.slab cimport ownership_generation
from kernel.io_uring cimport (
    IORING_ENTER_EXT_ARG, IORING_ENTER_GETEVENTS, IORING_OFF_SQES, IORING_OP_ASYNC_CANCEL,
    IORING_OP_POLL_ADD, IORING_OP_RECV, IORING_OP_SEND, IORING_POLLIN, IORING_RECV_MULTISHOT,
    IORING_REGISTER_ENABLE_RINGS, IORING_REGISTER_PBUF_RING, IORING_REGISTER_RESTRICTIONS,
    IORING_RESTRICTION_SQE_FLAGS_ALLOWED, IORING_RESTRICTION_SQE_OP, IORING_SETUP_CQSIZE,
    IORING_SETUP_DEFER_TASKRUN, IORING_SETUP_R_DISABLED, IORING_SETUP_SINGLE_ISSUER,
    IORING_SETUP_SUBMIT_ALL, IORING_SQ_CQ_OVERFLOW, IOSQE_BUFFER_SELECT, Cqe, Sqe, UringBuffer,
    io_uring_buf_reg, io_uring_buf_ring_tail, io_uring_enter, io_uring_getevents_arg,
    io_uring_params, io_uring_register, io_uring_restriction, io_uring_setup, kernel_timespec,
)
from kernel.poll cimport poll
from kernel.socket cimport MSG_DONTWAIT, MSG_NOSIGNAL
from libc.errno cimport EAGAIN, EBUSY, EINTR, ENOMEM, ETIME, errno
from libc.stdint cimport uint16_t, uint32_t, uint64_t, uint8_t
from libc.string cimport memset
from posix.mman cimport (
    MADV_DONTFORK, MAP_ANONYMOUS, MAP_FAILED, MAP_PRIVATE, MAP_SHARED, PROT_READ, PROT_WRITE,
    madvise, mmap, munmap,
)
from posix.unistd cimport close


cdef enum:
    REFUSALS_MOST = 2000  # in a row, then the worker gives up
    REFUSED_MS = 1
    MEMORY_TRIES = 100
    MEMORY_AGAIN_MS = 10
    STRIDE = KECHO_CHUNK_BYTES + 64  # so that buffers do not begin in the same set of the cache
    FREE_BUFFERS_BYTES = 16 * KECHO_CHUNKS
    BUFFER_GROUP = 0


# A completion's user_data: bits 0 to 29 are a connection's index, bits 30 and 31 the operation. The
# high half is the connection's generation (RECEIVED) or the number of the chunk (SENT).
cdef enum Operation:
    OPERATION_RECEIVED
    OPERATION_SENT
    OPERATION_WATCHED  # the epoll set has events
    OPERATION_CANCELLED


cdef enum:
    OPERATION_SHIFT = 30
    INDEX_MASK = (1 << 30) - 1


# ---- opening and closing ------------------------------------------------------------------------

cdef inline Uring* ring_of(Worker* worker) noexcept nogil:
    return <Uring*>worker.of_engine


cdef inline void uring_reset(Uring* ring) noexcept nogil:
    memset(ring, 0, sizeof(Uring))
    ring.fd = -1


cdef inline void uring_close(Uring* ring) noexcept nogil:
    if ring.fd >= 0:
        close(ring.fd)
    if ring.rings != NULL:
        munmap(ring.rings, ring.rings_bytes)
    if ring.sqes != NULL:
        munmap(ring.sqes, ring.sqes_bytes)
    if ring.free_buffers != NULL:
        munmap(ring.free_buffers, ring.memory_bytes)
    uring_reset(ring)


cdef inline void uring_forget(Uring* ring) noexcept nogil:
    """Close a ring in the child after fork(2), which only has the descriptor: MADV_DONTFORK."""
    if ring.fd >= 0:
        close(ring.fd)
    uring_reset(ring)


cdef inline void* _map(size_t size, int flags, int fd, size_t offset) noexcept nogil:
    """Map memory that a forked child does not get. Return NULL with errno if it fails."""
    cdef void* memory = mmap(NULL, size, PROT_READ | PROT_WRITE, flags, fd, offset)
    if memory == MAP_FAILED:
        return NULL
    madvise(memory, size, MADV_DONTFORK)
    return memory


cdef inline int _map_rings(Uring* ring, io_uring_params* params) noexcept nogil:
    cdef uint8_t* rings
    cdef uint32_t* array
    cdef uint32_t i
    ring.rings_bytes = max(
        params.sq_off.array + params.sq_entries * sizeof(uint32_t),
        params.cq_off.cqes + params.cq_entries * sizeof(Cqe))
    ring.sqes_bytes = params.sq_entries * sizeof(Sqe)
    ring.rings = _map(ring.rings_bytes, MAP_SHARED, ring.fd, 0)
    if ring.rings == NULL:
        return -errno
    ring.sqes = <Sqe*>_map(ring.sqes_bytes, MAP_SHARED, ring.fd, IORING_OFF_SQES)
    if ring.sqes == NULL:
        return -errno
    rings = <uint8_t*>ring.rings
    ring.sq_head = <uint32_t*>(rings + params.sq_off.head)
    ring.sq_tail = <uint32_t*>(rings + params.sq_off.tail)
    ring.sq_flags = <uint32_t*>(rings + params.sq_off.flags)
    ring.sq_mask = params.sq_entries - 1
    ring.cq_head = <uint32_t*>(rings + params.cq_off.head)
    ring.cq_tail = <uint32_t*>(rings + params.cq_off.tail)
    ring.cq_mask = params.cq_entries - 1
    ring.cqes = <Cqe*>(rings + params.cq_off.cqes)
    array = <uint32_t*>(rings + params.sq_off.array)
    for i in range(params.sq_entries):
        array[i] = i
    return 0


cdef inline int _give_buffers(Uring* ring) noexcept nogil:
    cdef io_uring_buf_reg registration
    cdef uint32_t i
    ring.memory_bytes = FREE_BUFFERS_BYTES + KECHO_CHUNKS * STRIDE
    ring.free_buffers = <UringBuffer*>_map(
        ring.memory_bytes, MAP_ANONYMOUS | MAP_PRIVATE, -1, 0)
    if ring.free_buffers == NULL:
        return -errno
    ring.buffers = <uint8_t*>ring.free_buffers + FREE_BUFFERS_BYTES
    memset(&registration, 0, sizeof(registration))
    registration.ring_addr = <uint64_t>ring.free_buffers
    registration.ring_entries = KECHO_CHUNKS
    registration.bgid = BUFFER_GROUP
    for i in range(<uint32_t>KECHO_CHUNKS):
        chunk_give_back(ring, i)
    return io_uring_register(ring.fd, IORING_REGISTER_PBUF_RING, &registration, 1)


cdef inline int _restrict(Uring* ring) noexcept nogil:
    cdef io_uring_restriction rules[5]
    cdef uint8_t[4] allowed
    cdef int i
    allowed[0] = IORING_OP_RECV
    allowed[1] = IORING_OP_SEND
    allowed[2] = IORING_OP_POLL_ADD
    allowed[3] = IORING_OP_ASYNC_CANCEL
    memset(rules, 0, sizeof(rules))
    for i in range(4):
        rules[i].opcode = IORING_RESTRICTION_SQE_OP
        rules[i].what = allowed[i]
    rules[4].opcode = IORING_RESTRICTION_SQE_FLAGS_ALLOWED
    rules[4].what = IOSQE_BUFFER_SELECT
    return io_uring_register(ring.fd, IORING_REGISTER_RESTRICTIONS, rules, 5)


cdef inline int _open(Uring* ring, uint32_t entries, const char** call) noexcept nogil:
    cdef io_uring_params params
    cdef int result
    uring_reset(ring)
    memset(&params, 0, sizeof(params))
    params.flags = (
        IORING_SETUP_R_DISABLED | IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN
        | IORING_SETUP_SUBMIT_ALL | IORING_SETUP_CQSIZE)
    params.cq_entries = entries
    call[0] = "io_uring_setup"
    ring.fd = io_uring_setup(entries, &params)
    if ring.fd < 0:
        result = ring.fd
        ring.fd = -1
        return result
    call[0] = "mmap"
    result = _map_rings(ring, &params)
    if result < 0:
        return result
    call[0] = "io_uring_register(IORING_REGISTER_PBUF_RING)"
    result = _give_buffers(ring)
    if result < 0:
        return result
    call[0] = "io_uring_register(IORING_REGISTER_RESTRICTIONS)"
    return _restrict(ring)


cdef inline int uring_open(Uring* ring, uint32_t entries, const char** call) noexcept nogil:
    """Open a ring, on any thread; uring_enable() makes it its worker's. Return 0, or -errno of what
    `call` then names. uring_close() is due either way.

    entries: the size of both queues, a power of two. When the submission queue is full, it is
    submitted early. Completions for which there is no room wait in the kernel.

    An ordinary user's rings count against RLIMIT_MEMLOCK, and the kernel returns what closed ones
    held a little later (io_ring_exit_work()). So a lack of memory may be over in a moment.
    """
    cdef int tries = 0
    cdef int result = _open(ring, entries, call)
    while result == -ENOMEM and tries < MEMORY_TRIES:
        uring_close(ring)
        poll(NULL, 0, MEMORY_AGAIN_MS)
        tries += 1
        result = _open(ring, entries, call)
    return result


cdef inline int uring_enable(Uring* ring) noexcept nogil:
    """Enable a ring, by its worker, which owns it from now on. Return 0 or -errno."""
    return io_uring_register(ring.fd, IORING_REGISTER_ENABLE_RINGS, NULL, 0)


# ---- buffers ------------------------------------------------------------------------------------

cdef inline uint8_t* chunk_data(Uring* ring, uint32_t number) noexcept nogil:
    return ring.buffers + <size_t>number * STRIDE


cdef inline void chunk_give_back(Uring* ring, uint32_t number) noexcept nogil:
    """Give a buffer back to the kernel, which may receive into it again."""
    cdef UringBuffer* free_buffer = &ring.free_buffers[ring.given & (KECHO_CHUNKS - 1)]
    free_buffer.addr = <uint64_t>chunk_data(ring, number)
    free_buffer.len = KECHO_CHUNK_BYTES
    free_buffer.bid = <uint16_t>number
    ring.given += 1
    io_uring_buf_ring_tail(ring.free_buffers, <uint16_t>ring.given)


# ---- requests and completions -------------------------------------------------------------------

cdef inline int uring_enter(
    Uring* ring, bint waits, int timeout_ms,
) noexcept nogil:
    """Submit what was prepared. With `waits`, have the kernel process what has happened, and wait
    until something has, for timeout_ms at most (-1: without limit). Return 0, even if the kernel is
    short of resources just now, or -errno; then the ring cannot be used any more."""
    cdef io_uring_getevents_arg argument
    cdef kernel_timespec timeout
    cdef int result
    cdef uint32_t submit = ring.sq_next - atomic_u32_load(ring.sq_head)
    atomic_u32_store(ring.sq_tail, ring.sq_next)
    if not waits:
        result = io_uring_enter(ring.fd, submit, 0, 0, NULL)
    else:
        memset(&argument, 0, sizeof(argument))
        if timeout_ms > 0:
            timeout.tv_sec = timeout_ms // 1000
            timeout.tv_nsec = <long long>(timeout_ms % 1000) * 1000000
            argument.ts = <uint64_t>&timeout
        result = io_uring_enter(
            ring.fd, submit, timeout_ms != 0, IORING_ENTER_GETEVENTS | IORING_ENTER_EXT_ARG,
            &argument)
    if result >= 0 or result == -ETIME or result == -EINTR:
        ring.refusals = 0
        return 0
    if result == -EAGAIN or result == -EBUSY:
        # No memory for a request, or completions must be read first. It is tried again for a
        # while: what was prepared is still there.
        ring.refusals += 1
        if ring.refusals < REFUSALS_MOST:
            if result == -EAGAIN:
                poll(NULL, 0, REFUSED_MS)
            return 0
    ring.failure = result
    return result


cdef inline bint uring_has_overflowed(Uring* ring) noexcept nogil:
    """Check whether there was no room for a completion. It and later ones wait in the kernel until
    uring_enter() is called with `waits`."""
    return atomic_u32_load(ring.sq_flags) & IORING_SQ_CQ_OVERFLOW != 0


cdef inline Sqe* _prepare(
    Uring* ring, uint8_t opcode, int fd, Operation operation, uint32_t index, uint32_t above,
) noexcept nogil:
    cdef Sqe* request
    while ring.sq_next - atomic_u32_load(ring.sq_head) > ring.sq_mask and ring.failure == 0:
        uring_enter(ring, False, 0)
    request = &ring.sqes[ring.sq_next & ring.sq_mask]
    if ring.failure == 0:  # otherwise the kernel does not read it any more
        ring.sq_next += 1
    memset(request, 0, sizeof(Sqe))
    request.opcode = opcode
    request.fd = fd
    request.user_data = (
        <uint64_t>above << 32 | <uint32_t>operation << OPERATION_SHIFT | index)
    return request


cdef inline void uring_receive(Uring* ring, Connection* connection) noexcept nogil:
    """Prepare to receive until an end of file, an error, or a lack of buffers. Each chunk
    completes."""
    cdef Sqe* request = _prepare(
        ring, IORING_OP_RECV, connection.fd, OPERATION_RECEIVED, connection.index,
        ownership_generation(connection))
    request.ioprio = IORING_RECV_MULTISHOT
    request.flags = IOSQE_BUFFER_SELECT
    request.buf_group = BUFFER_GROUP
    connection.flags |= CONNECTION_RECEIVING
    ring.receiving += 1


cdef inline void uring_send(
    Uring* ring, Connection* connection, uint32_t number,
) noexcept nogil:
    """Prepare to send a chunk. With MSG_DONTWAIT, it has ended when it has been submitted."""
    cdef Chunk* chunk = &ring.chunks[number]
    cdef Sqe* request = _prepare(
        ring, IORING_OP_SEND, connection.fd, OPERATION_SENT, connection.index, number)
    request.addr = <uint64_t>(chunk_data(ring, number) + chunk.begin)
    request.len = chunk.end - chunk.begin
    request.op_flags = MSG_NOSIGNAL | MSG_DONTWAIT


cdef inline void uring_watch(Uring* ring, int epoll_fd) noexcept nogil:
    """Prepare to report the epoll set once, when it has events."""
    cdef Sqe* request = _prepare(ring, IORING_OP_POLL_ADD, epoll_fd, OPERATION_WATCHED, 0, 0)
    request.op_flags = IORING_POLLIN
    ring.is_watching = True


cdef inline void uring_let_go(Uring* ring, Connection* connection) noexcept nogil:
    """Prepare to cancel what receives for a connection. Its last completion follows soon:
    ECANCELED, unless it had ended."""
    cdef Sqe* request = _prepare(
        ring, IORING_OP_ASYNC_CANCEL, -1, OPERATION_CANCELLED, connection.index, 0)
    request.addr = <uint64_t>ownership_generation(connection) << 32 | connection.index


cdef inline void uring_watch_no_more(Uring* ring) noexcept nogil:
    """Prepare to cancel uring_watch()."""
    cdef Sqe* request = _prepare(ring, IORING_OP_ASYNC_CANCEL, -1, OPERATION_CANCELLED, 0, 0)
    request.addr = <uint64_t>OPERATION_WATCHED << OPERATION_SHIFT
