"""kecho.server._bpf: loads the program by which the kernel echoes TCP connections itself.

What stays in the kernel belongs to the descriptors that open_echo() returns: it is gone with the
last of them, however the process ends.
"""
from common.errors cimport system_error
from common.flows cimport KECHO_FLOW_REPORTS_BYTES, Board, Flow
from kernel.bpf cimport (
    BPF_F_MMAPABLE, BPF_F_NO_PREALLOC, BPF_MAP_TYPE_ARRAY, BPF_MAP_TYPE_HASH,
    BPF_MAP_TYPE_RINGBUF, BPF_MAP_TYPE_SOCKHASH, BPF_PROG_TYPE_SK_SKB, BPF_PROG_TYPE_SOCKET_FILTER,
    BPF_SK_SKB_STREAM_VERDICT, bpf_insn, bpf_map_create, bpf_prog_attach, bpf_prog_load,
)
from libc.errno cimport EINVAL
from libc.stdint cimport int16_t, int32_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from posix.unistd cimport close

cdef extern from "bpf/btf.h":
    int kecho_btf_offset(
        const uint8_t* data, size_t size, const char* structure, const char* member)
    int kecho_btf_function(const uint8_t* data, size_t size, const char* function)

cdef extern from "bpf/program.h":
    enum:
        KECHO_PROGRAM_MOST

    ctypedef struct Places "struct kecho_program_places":
        int32_t sockets_fd
        int32_t flows_fd
        int32_t board_fd
        int32_t reports_fd
        int16_t bytes_acked
        int16_t write_seq
        int16_t snd_una
        int16_t rcv_nxt
        int16_t copied_seq
        int16_t sk_sndbuf
        int16_t sk_wmem_queued
        int16_t sk_rcvbuf
        int16_t seq
        int32_t bpf_cast_to_kern_ctx

    uint32_t kecho_write_program(bpf_insn* program, const Places* places)
    uint32_t kecho_write_filter(bpf_insn* program, const Places* places)


cdef enum:
    LOG_BYTES = 1 << 20


def offset_of(bytes btf not None, str structure not None, str member not None):
    """Where a member of one of the kernel's structures lies, in bytes. Raises LookupError."""
    cdef bytes outer = structure.encode(), name = member.encode()
    cdef int offset = kecho_btf_offset(btf, len(btf), outer, name)
    if offset == -EINVAL:
        raise LookupError("this is no type information (BTF) that is known here")
    if not 0 <= offset < 32768:
        raise LookupError(f"struct {structure} has no member {member}")
    return offset


def function_id(bytes btf not None, str function not None):
    """By which a program calls one of the kernel's functions. Raises LookupError."""
    cdef bytes name = function.encode()
    cdef int number = kecho_btf_function(btf, len(btf), name)
    if number == -EINVAL:
        raise LookupError("this is no type information (BTF) that is known here")
    if number < 0:
        raise LookupError(f"this kernel has no function {function}()")
    return number


cdef int _map(list made, str what, uint32_t kind, uint32_t key_bytes, uint32_t value_bytes,
              uint32_t entries, uint32_t flags) except -1:
    cdef int fd = bpf_map_create(kind, key_bytes, value_bytes, entries, flags)
    if fd < 0:
        raise system_error(-fd, f"bpf(BPF_MAP_CREATE, {what})")
    made.append(fd)
    return fd


def open_echo(bytes btf not None, uint32_t capacity):
    """Loads the programs; returns the descriptors of their maps, and of the filter that is for each
    socket: (sockets, flows, board, reports, filter), which are the caller's.

    btf: /sys/kernel/btf/vmlinux. capacity: connections that it can have at once.
    Raises LookupError for what btf has not, OSError that names the command of bpf(2); its
    attribute verifier_log is what the kernel says about the program, if it refused that.
    """
    cdef Places places
    cdef list made = []
    try:
        places.bytes_acked = offset_of(btf, "tcp_sock", "bytes_acked")
        places.write_seq = offset_of(btf, "tcp_sock", "write_seq")
        places.snd_una = offset_of(btf, "tcp_sock", "snd_una")
        places.rcv_nxt = offset_of(btf, "tcp_sock", "rcv_nxt")
        places.copied_seq = offset_of(btf, "tcp_sock", "copied_seq")
        places.sk_sndbuf = offset_of(btf, "sock", "sk_sndbuf")
        places.sk_wmem_queued = offset_of(btf, "sock", "sk_wmem_queued")
        places.sk_rcvbuf = offset_of(btf, "sock", "sk_rcvbuf")
        places.seq = offset_of(btf, "sk_buff", "cb") + offset_of(btf, "tcp_skb_cb", "seq")
        places.bpf_cast_to_kern_ctx = function_id(btf, "bpf_cast_to_kern_ctx")
        places.sockets_fd = _map(
            made, "SOCKHASH", BPF_MAP_TYPE_SOCKHASH, sizeof(uint64_t), sizeof(uint32_t), capacity,
            0)
        places.flows_fd = _map(
            made, "HASH", BPF_MAP_TYPE_HASH, sizeof(uint64_t), sizeof(Flow), capacity,
            BPF_F_NO_PREALLOC)
        places.board_fd = _map(
            made, "ARRAY", BPF_MAP_TYPE_ARRAY, sizeof(uint32_t), sizeof(Board), 1, BPF_F_MMAPABLE)
        places.reports_fd = _map(
            made, "RINGBUF", BPF_MAP_TYPE_RINGBUF, 0, 0, KECHO_FLOW_REPORTS_BYTES, 0)
        _attach(&places)
        made.append(_load_filter(&places))
    except BaseException:
        for fd in made:
            close(fd)
        raise
    return tuple(made)


cdef int _load(
    uint32_t kind, uint32_t attach_type, const char* name, const bpf_insn* program, uint32_t count,
) except -1:
    cdef int fd = bpf_prog_load(kind, attach_type, name, program, count, NULL, 0)
    cdef char* log
    if fd >= 0:
        return fd
    error = system_error(-fd, f"bpf(BPF_PROG_LOAD, {name.decode()})")
    log = <char*>malloc(LOG_BYTES)
    if log != NULL:
        # Once more, for what the kernel has to say about it.
        log[0] = 0
        fd = bpf_prog_load(kind, attach_type, name, program, count, log, LOG_BYTES)
        if fd >= 0:
            close(fd)
        error.verifier_log = log.decode("utf-8", "replace").strip()
        free(log)
    raise error


cdef int _attach(const Places* places) except -1:
    cdef bpf_insn program[KECHO_PROGRAM_MOST]
    cdef uint32_t count = kecho_write_program(program, places)
    cdef int fd = _load(
        BPF_PROG_TYPE_SK_SKB, BPF_SK_SKB_STREAM_VERDICT, b"kecho_echo", program, count)
    cdef int result = bpf_prog_attach(places.sockets_fd, fd, BPF_SK_SKB_STREAM_VERDICT)
    close(fd)  # the map has it
    if result < 0:
        raise system_error(-result, "bpf(BPF_PROG_ATTACH, SK_SKB_STREAM_VERDICT)")
    return 0


cdef int _load_filter(const Places* places) except -1:
    cdef bpf_insn program[KECHO_PROGRAM_MOST]
    cdef uint32_t count = kecho_write_filter(program, places)
    return _load(BPF_PROG_TYPE_SOCKET_FILTER, 0, b"kecho_filter", program, count)
