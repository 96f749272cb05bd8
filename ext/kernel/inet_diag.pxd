"""<linux/inet_diag.h> and <linux/sock_diag.h>: sock_diag(7)."""
from libc.stdint cimport uint8_t, uint16_t, uint32_t

cdef extern from *:
    """
    #include <linux/inet_diag.h>
    #include <linux/sock_diag.h>
    """
    enum:
        INET_DIAG_INFO
        INET_DIAG_NOCOOKIE
        INET_DIAG_ULP_INFO
        INET_ULP_INFO_NAME
        SOCK_DESTROY
        SOCK_DIAG_BY_FAMILY

    # Ports and addresses are in network byte order, the local side is the source.
    struct inet_diag_sockid:
        uint16_t idiag_sport
        uint16_t idiag_dport
        uint32_t[4] idiag_src
        uint32_t[4] idiag_dst
        uint32_t idiag_if
        uint32_t[2] idiag_cookie

    struct inet_diag_req_v2:
        uint8_t sdiag_family
        uint8_t sdiag_protocol
        uint8_t idiag_ext
        uint32_t idiag_states
        inet_diag_sockid id

    struct inet_diag_msg:
        uint8_t idiag_family
        uint8_t idiag_state
        uint8_t idiag_timer
        uint8_t idiag_retrans
        inet_diag_sockid id
        uint32_t idiag_expires
        uint32_t idiag_rqueue
        uint32_t idiag_wqueue
        uint32_t idiag_uid
        uint32_t idiag_inode
