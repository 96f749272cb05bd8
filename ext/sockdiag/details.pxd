"""What the kernel says of a socket behind its inet_diag_msg when INET_DIAG_INFO is asked for.

All of it may be missing: of a socket in TIME_WAIT or half-open, and from an older kernel.
"""
from kernel.inet_diag cimport (
    INET_DIAG_INFO, INET_DIAG_ULP_INFO, INET_ULP_INFO_NAME, inet_diag_msg,
)
from kernel.netlink cimport NLA_TYPE_MASK, nlattr
from kernel.tcp cimport tcp_info
from libc.stdint cimport UINT32_MAX, uint8_t, uint16_t, uint32_t
from libc.string cimport memcmp, memcpy, memset

cdef enum:
    TCP_STATE_SYN_SENT = 2
    TCP_STATE_LISTEN = 10
    # The upper layer protocol of a subflow, with its NUL: mptcp_subflow_init().
    MPTCP_NAME_BYTES = 6

cdef struct Seen:
    inet_diag_msg message
    uint32_t idle_ms  # since data was last sent or received, or it was connected; or UINT32_MAX
    bint is_mptcp


cdef inline const uint8_t* next_attribute(
    const uint8_t** at, const uint8_t* end, uint16_t* kind, size_t* size_bytes
) noexcept nogil:
    """The payload of the attribute at `at`, which is moved behind it; NULL when none is left."""
    cdef nlattr header
    cdef const uint8_t* payload
    cdef size_t step
    if <size_t>(end - at[0]) < sizeof(nlattr):
        return NULL
    memcpy(&header, at[0], sizeof(nlattr))
    if header.nla_len < sizeof(nlattr) or header.nla_len > <size_t>(end - at[0]):
        return NULL
    payload = at[0] + sizeof(nlattr)
    kind[0] = header.nla_type & NLA_TYPE_MASK
    size_bytes[0] = header.nla_len - sizeof(nlattr)
    step = (header.nla_len + 3) & ~<size_t>3
    at[0] = end if step > <size_t>(end - at[0]) else at[0] + step
    return payload


cdef inline bint is_named_mptcp(const uint8_t* at, const uint8_t* end) noexcept nogil:
    cdef uint16_t kind
    cdef size_t size_bytes
    cdef const uint8_t* payload = next_attribute(&at, end, &kind, &size_bytes)
    while payload != NULL:
        if kind == INET_ULP_INFO_NAME:
            return size_bytes >= MPTCP_NAME_BYTES and (
                memcmp(payload, <const char*>b"mptcp", MPTCP_NAME_BYTES) == 0
            )
        payload = next_attribute(&at, end, &kind, &size_bytes)
    return False


cdef inline void read_details(
    Seen* seen, const uint8_t* at, const uint8_t* end
) noexcept nogil:
    """Of `seen.message`, from the attributes behind it. What is missing stays unknown."""
    cdef tcp_info info
    cdef uint16_t kind
    cdef size_t size_bytes
    cdef const uint8_t* payload = next_attribute(&at, end, &kind, &size_bytes)
    cdef uint8_t state = seen.message.idiag_state
    seen.idle_ms = UINT32_MAX
    seen.is_mptcp = False
    while payload != NULL:
        if kind == INET_DIAG_INFO and state not in (TCP_STATE_SYN_SENT, TCP_STATE_LISTEN):
            # An older kernel's is shorter, a newer one's longer.
            memset(&info, 0, sizeof(info))
            memcpy(&info, payload, min(size_bytes, sizeof(info)))
            if info.tcpi_state != 0:
                seen.idle_ms = min(info.tcpi_last_data_sent, info.tcpi_last_data_recv)
        elif kind == INET_DIAG_ULP_INFO:
            seen.is_mptcp = is_named_mptcp(payload, payload + size_bytes)
        payload = next_attribute(&at, end, &kind, &size_bytes)
