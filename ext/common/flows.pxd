"""What the kernel's echo and the engine share; flows.h says what each field means."""
from libc.stdint cimport uint32_t, uint64_t

cdef extern from "common/flows.h" nogil:
    enum:
        FLOW_ECHOED
        FLOW_PASSED
        FLOW_BROKEN

    const uint32_t KECHO_FLOW_CHARGE_MOST
    const uint32_t KECHO_FLOW_CHARGE_LEAST
    const uint32_t KECHO_FLOW_REPORTS_BYTES
    const uint32_t KECHO_FLOW_CPUS

    ctypedef struct Flow "struct kecho_flow":
        uint64_t token
        uint64_t redirected
        uint64_t passed
        uint64_t mark
        uint32_t charge_before
        uint32_t charge
        uint32_t mode
        uint32_t is_told
        uint32_t first

    ctypedef struct FlowCounters "struct kecho_flow_counters":
        uint64_t bytes
        uint64_t chunks

    ctypedef struct Board "struct kecho_flow_board":
        uint64_t charge_most
        uint64_t untold
        FlowCounters cpus[1]  # KECHO_FLOW_CPUS of them

    uint64_t kecho_token(uint32_t queue, uint32_t index, uint32_t generation)
    uint32_t kecho_token_index(uint64_t token)
    uint32_t kecho_token_queue(uint64_t token)
    uint32_t kecho_token_generation(uint64_t token)
