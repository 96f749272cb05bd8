"""policy.h, which says what each of these is."""
from libc.stdint cimport uint32_t

cdef extern from "sandbox/policy.h":
    enum:
        KECHO_CONDITIONS
        KECHO_IS_SANITIZED
        KECHO_PERMITS
        KECHO_PERMITS_OF_A_FILE
        KECHO_PERMITS_OF_DATAGRAMS
        KECHO_PERMITS_OF_FLOWS
        KECHO_PERMITS_OF_RINGS

    const uint32_t KECHO_AUDIT_ARCH
    const uint32_t KECHO_CLONE3
    const uint32_t KECHO_FOREIGN_CALLS
    const uint32_t KECHO_OWN_PID

    ctypedef struct Condition "struct kecho_condition":
        uint32_t offset
        uint32_t mask
        uint32_t value

    ctypedef struct Permit "struct kecho_permit":
        uint32_t call
        Condition* conditions

    const Permit* kecho_permits
    const Permit* kecho_permits_of_a_file
    const Permit* kecho_permits_of_datagrams
    const Permit* kecho_permits_of_flows
    const Permit* kecho_permits_of_rings
