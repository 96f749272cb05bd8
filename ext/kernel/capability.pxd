"""<linux/capability.h>: capset(2), capabilities(7)."""
from libc.stdint cimport uint32_t

cdef extern from "<linux/capability.h>":
    enum:
        _LINUX_CAPABILITY_U32S_3
        _LINUX_CAPABILITY_VERSION_3

    struct __user_cap_header_struct:
        uint32_t version
        int pid

    struct __user_cap_data_struct:
        uint32_t effective
        uint32_t permitted
        uint32_t inheritable
