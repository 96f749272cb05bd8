"""<linux/filter.h>: classic BPF, on what a socket receives and on a SO_REUSEPORT group (socket(7),
Linux 4.5)."""
from libc.stdint cimport uint8_t, uint16_t, uint32_t

cdef extern from *:
    """
    #include <linux/filter.h>
    #include <sys/socket.h>
    """
    enum:
        BPF_ABS
        BPF_ALU
        BPF_AND
        BPF_JEQ
        BPF_JGE
        BPF_JMP
        BPF_K
        BPF_LD
        BPF_MOD
        BPF_A
        BPF_RET
        BPF_W
        SKF_AD_CPU
        SKF_AD_OFF
        SO_ATTACH_FILTER
        SO_ATTACH_REUSEPORT_CBPF

    struct sock_filter:
        uint16_t code
        uint8_t jt
        uint8_t jf
        uint32_t k

    struct sock_fprog:
        unsigned short len
        sock_filter* filter
