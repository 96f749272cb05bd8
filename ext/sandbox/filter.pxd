"""The policy as a seccomp filter: classic BPF over struct seccomp_data, seccomp(2).

    architecture is not ours, or the call is x32's: EPERM
    it is clone3: ENOSYS
    for each permit: it is this call, and its conditions hold: allowed
    EPERM

EPERM and not death: what a server in its last hour asks for once more must not cost its clients'
connections. clone3 has its flags in memory, where a filter cannot look; told that it does not
exist, the C library turns to clone, whose flags are in a register.
"""
from kernel.filter cimport (
    BPF_ABS, BPF_ALU, BPF_AND, BPF_JEQ, BPF_JGE, BPF_JMP, BPF_K, BPF_LD, BPF_RET, BPF_W,
    sock_filter,
)
from kernel.seccomp cimport SECCOMP_RET_ALLOW, SECCOMP_RET_ERRNO
from libc.errno cimport ENOSYS, EPERM
from libc.stdint cimport UINT32_MAX, uint8_t, uint32_t
from posix.unistd cimport getpid
from sandbox.policy cimport (
    KECHO_AUDIT_ARCH, KECHO_CLONE3, KECHO_CONDITIONS, KECHO_FOREIGN_CALLS, KECHO_OWN_PID,
    KECHO_PERMITS, KECHO_PERMITS_OF_A_FILE, KECHO_PERMITS_OF_DATAGRAMS, KECHO_PERMITS_OF_FLOWS,
    KECHO_PERMITS_OF_RINGS, Condition, Permit, kecho_permits, kecho_permits_of_a_file,
    kecho_permits_of_datagrams, kecho_permits_of_flows, kecho_permits_of_rings,
)


cdef enum:
    OFFSET_OF_CALL = 0  # of struct seccomp_data: nr, arch, instruction_pointer, args
    OFFSET_OF_ARCH = 4
    INSTRUCTIONS_MOST = 2048  # a permit takes at most 15 of them


cdef inline uint32_t _append(
    sock_filter* program, uint32_t size, unsigned short code, uint32_t k, uint8_t jump_if_true,
    uint8_t jump_if_false,
) noexcept nogil:
    program[size].code = code
    program[size].k = k
    program[size].jt = jump_if_true
    program[size].jf = jump_if_false
    return size + 1


cdef inline uint32_t _load(sock_filter* program, uint32_t size, uint32_t offset) noexcept nogil:
    return _append(program, size, BPF_LD | BPF_W | BPF_ABS, offset, 0, 0)


cdef inline uint32_t _return(sock_filter* program, uint32_t size, uint32_t value) noexcept nogil:
    return _append(program, size, BPF_RET | BPF_K, value, 0, 0)


cdef inline uint32_t _append_permit(
    sock_filter* program, uint32_t size, const Permit* permit
) noexcept nogil:
    """Starts and ends with the call's number loaded, and falls through if it does not allow."""
    cdef const Condition* condition
    cdef uint32_t i, count = 0, value, after_call
    while count < KECHO_CONDITIONS and permit.conditions[count].mask != 0:
        count += 1
    # Each condition takes 3 instructions, the one after the last loads the number again.
    after_call = 1 if count == 0 else 3 * count + 2
    size = _append(program, size, BPF_JMP | BPF_JEQ | BPF_K, permit.call, 0, <uint8_t>after_call)
    for i in range(count):
        condition = &permit.conditions[i]
        value = condition.value
        if value == KECHO_OWN_PID:
            value = <uint32_t>getpid()
        size = _load(program, size, condition.offset)
        size = _append(program, size, BPF_ALU | BPF_AND | BPF_K, condition.mask, 0, 0)
        size = _append(
            program, size, BPF_JMP | BPF_JEQ | BPF_K, value, 0,
            <uint8_t>(3 * (count - 1 - i) + 1))
    size = _return(program, size, SECCOMP_RET_ALLOW)
    if count != 0:
        size = _load(program, size, OFFSET_OF_CALL)
    return size


cdef inline uint32_t _append_permits(
    sock_filter* program, uint32_t size, const Permit* permits, int count,
) noexcept nogil:
    cdef int i
    for i in range(count):
        size = _append_permit(program, size, &permits[i])
    return size


cdef inline uint32_t write_filter(
    sock_filter* program, bint for_a_file, bint for_datagrams, bint for_flows, bint for_rings,
) noexcept nogil:
    """Writes the filter to `program`, of INSTRUCTIONS_MOST; returns its size.

    for_a_file: a Unix socket's file is to be removed at the end. for_datagrams: UDP is served, too.
    for_flows: the kernel echoes. for_rings: the workers have rings.
    """
    cdef uint32_t size = 0
    size = _load(program, size, OFFSET_OF_ARCH)
    size = _append(program, size, BPF_JMP | BPF_JEQ | BPF_K, KECHO_AUDIT_ARCH, 1, 0)
    size = _return(program, size, SECCOMP_RET_ERRNO | <uint32_t>EPERM)
    size = _load(program, size, OFFSET_OF_CALL)
    if KECHO_FOREIGN_CALLS != UINT32_MAX:
        size = _append(program, size, BPF_JMP | BPF_JGE | BPF_K, KECHO_FOREIGN_CALLS, 0, 1)
        size = _return(program, size, SECCOMP_RET_ERRNO | <uint32_t>EPERM)
    size = _append_permits(program, size, kecho_permits, KECHO_PERMITS)
    if for_a_file:
        size = _append_permits(program, size, kecho_permits_of_a_file, KECHO_PERMITS_OF_A_FILE)
    if for_datagrams:
        size = _append_permits(
            program, size, kecho_permits_of_datagrams, KECHO_PERMITS_OF_DATAGRAMS)
    if for_flows:
        size = _append_permits(program, size, kecho_permits_of_flows, KECHO_PERMITS_OF_FLOWS)
    if for_rings:
        size = _append_permits(program, size, kecho_permits_of_rings, KECHO_PERMITS_OF_RINGS)
    size = _append(program, size, BPF_JMP | BPF_JEQ | BPF_K, KECHO_CLONE3, 0, 1)
    size = _return(program, size, SECCOMP_RET_ERRNO | <uint32_t>ENOSYS)
    return _return(program, size, SECCOMP_RET_ERRNO | <uint32_t>EPERM)
