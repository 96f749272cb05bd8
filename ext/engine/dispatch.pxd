"""Dispatch: how connections are spread over the workers.

shared   one queue. Its ready list is the global work queue; any worker takes the next event.
percpu   a queue for each worker. Every TCP listener is a SO_REUSEPORT group with one socket per
         queue. Classic BPF picks the socket by the CPU that handles the SYN.

An engine may bind connections to their worker (io_uring does). `shared` then has a queue for each
worker as well, and whichever worker is awake first accepts.
"""
from engine.accepting.listener cimport listener_arm_everywhere
from engine.backpressure cimport waiting_destroy, waiting_init
from engine.epoll.events cimport TOKEN_WAKE
from engine.layout cimport KECHO_EVERY_QUEUE, OWNERSHIP_FREE, Connection, Control, Queue
from engine.slab cimport slab_destroy, slab_get, slab_high_water, slab_init
from kernel.epoll cimport (
    EPOLL_CLOEXEC, EPOLL_CTL_ADD, EPOLLET, EPOLLIN, epoll_create1, epoll_ctl, epoll_event,
)
from kernel.eventfd cimport EFD_CLOEXEC, EFD_NONBLOCK, eventfd
from kernel.filter cimport (
    BPF_A, BPF_ABS, BPF_ALU, BPF_JEQ, BPF_JMP, BPF_K, BPF_LD, BPF_MOD, BPF_RET, BPF_W, SKF_AD_CPU,
    SKF_AD_OFF, SO_ATTACH_REUSEPORT_CBPF, sock_filter, sock_fprog,
)
from kernel.socket cimport SOL_SOCKET, setsockopt
from libc.errno cimport EINVAL, errno
from libc.stdint cimport uint32_t
from posix.unistd cimport close


cdef inline int queue_open(Queue* queue, const char** call) noexcept nogil:
    """Open a queue. Return 0, or -errno of what `call` then names. queue_close() is due either way.
    """
    cdef epoll_event event
    cdef int result
    queue.epoll_fd = queue.wake_fd = -1
    call[0] = "pthread_mutex_init"
    result = slab_init(&queue.slab)
    if result == 0:
        result = waiting_init(queue)
    if result < 0:
        return result
    call[0] = "epoll_create1"
    queue.epoll_fd = epoll_create1(EPOLL_CLOEXEC)
    if queue.epoll_fd < 0:
        return -errno
    call[0] = "eventfd"
    queue.wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)
    if queue.wake_fd < 0:
        return -errno
    call[0] = "epoll_ctl"
    event.events = EPOLLIN | EPOLLET
    event.data.u64 = TOKEN_WAKE
    if epoll_ctl(queue.epoll_fd, EPOLL_CTL_ADD, queue.wake_fd, &event) < 0:
        return -errno
    return 0


cdef inline void _close_own(Queue* queue) noexcept nogil:
    if queue.epoll_fd >= 0:
        close(queue.epoll_fd)
    if queue.wake_fd >= 0:
        close(queue.wake_fd)
    queue.epoll_fd = queue.wake_fd = -1


cdef inline void queue_close(Queue* queue) noexcept nogil:
    _close_own(queue)
    slab_destroy(&queue.slab)
    waiting_destroy(queue)


cdef inline void queue_forget(Queue* queue) noexcept nogil:
    """Close a queue's descriptors in the child after fork(2). The workers do not exist there.

    Nothing is sent: the parent also has the sockets. A record whose fd is -1 was just being closed;
    its number may belong to another file by now.
    """
    cdef uint32_t index
    cdef Connection* connection
    _close_own(queue)
    for index in range(slab_high_water(&queue.slab)):
        connection = slab_get(&queue.slab, index)
        if <uint32_t>connection.ownership != OWNERSHIP_FREE and connection.fd >= 0:
            close(connection.fd)
            connection.fd = -1


cdef inline void close_listeners(Control* control) noexcept nogil:
    cdef uint32_t number
    for number in range(control.listener_count):
        if control.listeners[number].fd >= 0:
            close(control.listeners[number].fd)
            control.listeners[number].fd = -1


cdef inline int _connect_listeners(Control* control) noexcept nogil:
    cdef uint32_t number
    cdef int result = 0
    for number in range(control.listener_count):
        result = listener_arm_everywhere(control, number)
        if result < 0:
            break
    return result


cdef inline int dispatch_shared(Control* control) noexcept nogil:
    """Give all workers one queue. Return 0 or -errno."""
    cdef uint32_t i
    for i in range(control.listener_count):
        control.listeners[i].queue = 0
    for i in range(control.worker_count):
        control.workers[i].queue = &control.queues[0]
    control.queues[0].workers_running = control.worker_count
    return _connect_listeners(control)


cdef inline int dispatch_percpu(Control* control) noexcept nogil:
    """Give each worker a queue. Each listener says which one it belongs to. Return 0 or -errno."""
    cdef uint32_t i
    for i in range(control.worker_count):
        control.workers[i].queue = &control.queues[i]
        control.queues[i].workers_running = 1
    return _connect_listeners(control)


cdef inline int dispatch_apart(Control* control) noexcept nogil:
    """Give each worker a queue that accepts from every listener: shared, for an engine whose
    connections cannot change their worker. Return 0 or -errno."""
    cdef uint32_t i
    for i in range(control.listener_count):
        control.listeners[i].queue = KECHO_EVERY_QUEUE
    return dispatch_percpu(control)


cdef enum:
    STEER_BY_CPU_MOST = 1024  # CPUs; all jumps in the program are by 1 instruction


cdef inline int steer_by_cpu(int fd, const uint32_t* cpus, uint32_t cpu_count) noexcept nogil:
    """Give a SYN that cpus[i] handles to the i-th socket bound to the group of `fd`, and a SYN from
    any other CPU to socket (CPU mod cpu_count). Return 0 or -errno.

    The program, by socket(7) SO_ATTACH_REUSEPORT_CBPF; its return value is the socket's index:

        A = the CPU
        if A == cpus[0]: return 0; if A == cpus[1]: return 1; ...
        return A mod cpu_count
    """
    cdef sock_filter program[2 * STEER_BY_CPU_MOST + 3]
    cdef sock_fprog attached
    cdef uint32_t i
    cdef unsigned short size = 0
    if cpu_count == 0 or cpu_count > STEER_BY_CPU_MOST:
        return -EINVAL
    size = _append(program, size, BPF_LD | BPF_W | BPF_ABS, 0, <uint32_t>(SKF_AD_OFF + SKF_AD_CPU))
    for i in range(cpu_count):
        size = _append(program, size, BPF_JMP | BPF_JEQ | BPF_K, 1, cpus[i])
        size = _append(program, size, BPF_RET | BPF_K, 0, i)
    size = _append(program, size, BPF_ALU | BPF_MOD | BPF_K, 0, cpu_count)
    size = _append(program, size, BPF_RET | BPF_A, 0, 0)
    attached.len = size
    attached.filter = program
    if setsockopt(fd, SOL_SOCKET, SO_ATTACH_REUSEPORT_CBPF, &attached, sizeof(attached)) < 0:
        return -errno
    return 0


cdef inline unsigned short _append(
    sock_filter* program, unsigned short size, unsigned short code, unsigned char jump_if_false,
    uint32_t k,
) noexcept nogil:
    program[size].code = code
    program[size].jt = 0
    program[size].jf = jump_if_false
    program[size].k = k
    return size + 1
