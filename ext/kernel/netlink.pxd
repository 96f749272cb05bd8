"""<linux/netlink.h>: netlink(7)."""
from libc.stdint cimport uint16_t, uint32_t

cdef extern from *:
    """
    #include <linux/netlink.h>
    #include <sys/socket.h>
    """
    enum:
        AF_NETLINK
        NETLINK_CAP_ACK
        NETLINK_SOCK_DIAG
        NLA_TYPE_MASK
        NLMSG_DONE
        NLMSG_ERROR
        NLMSG_OVERRUN
        NLM_F_ACK
        NLM_F_DUMP
        NLM_F_REQUEST
        SOL_NETLINK

    struct nlmsghdr:
        uint32_t nlmsg_len
        uint16_t nlmsg_type
        uint16_t nlmsg_flags
        uint32_t nlmsg_seq
        uint32_t nlmsg_pid

    struct nlattr:
        uint16_t nla_len
        uint16_t nla_type

    struct nlmsgerr:
        int error
        nlmsghdr msg

    struct sockaddr_nl:
        unsigned short nl_family
        uint32_t nl_pid
        uint32_t nl_groups
