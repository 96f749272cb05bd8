"""<linux/seccomp.h>: seccomp(2). The filter is classic BPF over struct seccomp_data."""

cdef extern from "<linux/seccomp.h>":
    enum:
        SECCOMP_FILTER_FLAG_SPEC_ALLOW
        SECCOMP_FILTER_FLAG_TSYNC
        SECCOMP_RET_ALLOW
        SECCOMP_RET_ERRNO
        SECCOMP_SET_MODE_FILTER
