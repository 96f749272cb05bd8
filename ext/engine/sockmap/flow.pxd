"""Flows: TCP connections that the kernel echoes, until they end or too much waits to be sent.
ext/bpf/program.c is the program that does it.

A socket enters the kernel's map right after accept, before anything is read. So no bytes can be
sent in the wrong order: bytes that came earlier are echoed by the kernel as well, when it is told
to look. A socket in the map has its receive queue emptied at once. tcp(7)'s figures tell what
became of a byte: it was received, it is queued by the program (which no figure counts), it was
handed to the socket for sending. Closing the socket discards the program's queue.
"""
from common.flows cimport FLOW_BROKEN, FLOW_ECHOED, Flow, kecho_token
from engine.layout cimport Connection, Control, Look
from engine.slab cimport ownership_generation
from engine.sockmap.layout cimport Flows
from engine.sockmap.maps cimport flows_of
from kernel.bpf cimport bpf_map_delete, bpf_map_lookup, bpf_map_update
from kernel.ioctl cimport SIOCOUTQ, ioctl
from kernel.poll cimport POLLERR, poll, pollfd
from kernel.socket cimport (
    SO_ATTACH_BPF, SO_COOKIE, SO_ERROR, SO_RCVLOWAT, SOL_SOCKET, getsockopt, setsockopt, socklen_t,
)
from kernel.tcp cimport IPPROTO_TCP, TCP_INFO, TCP_STATE_CLOSE, TCP_STATE_CLOSE_WAIT, tcp_info
from libc.errno cimport ECONNRESET, errno
from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memset


cdef enum:
    LOOKS = 4  # at figures that are too low for a moment when an acknowledgement comes


cdef inline int _cookie(int fd, uint64_t* cookie) noexcept nogil:
    cdef socklen_t size = sizeof(uint64_t)
    if getsockopt(fd, SOL_SOCKET, SO_COOKIE, cookie, &size) < 0:
        return -errno
    return 0


cdef inline void flow_run(Connection* connection) noexcept nogil:
    """Have TCP run the program on the receive queue, under the socket's lock, after any run in
    progress: tcp_set_rcvlowat()."""
    cdef int one = 1
    setsockopt(connection.fd, SOL_SOCKET, SO_RCVLOWAT, &one, sizeof(one))


cdef inline int flow_begin(
    Control* control, uint32_t queue, Connection* connection,
) noexcept nogil:
    """Have the kernel echo a connection of which nothing has been read. Return 0, or -errno; then a
    worker must echo it. (EOPNOTSUPP: the client has already sent its FIN. E2BIG: the map is full.)
    """
    cdef Flows* flows = flows_of(control)
    cdef uint64_t cookie = 0
    cdef uint32_t fd = <uint32_t>connection.fd
    cdef Flow flow
    cdef int result = _cookie(connection.fd, &cookie)
    if result < 0:
        return result
    memset(&flow, 0, sizeof(flow))
    flow.token = kecho_token(queue, connection.index, ownership_generation(connection))
    result = bpf_map_update(flows.flows_fd, &cookie, &flow)
    if result < 0:
        return result
    if setsockopt(
            connection.fd, SOL_SOCKET, SO_ATTACH_BPF, &flows.filter_fd,
            sizeof(flows.filter_fd)) < 0:
        result = -errno
    if result == 0:
        result = bpf_map_update(flows.sockets_fd, &cookie, &fd)
    if result < 0:
        bpf_map_delete(flows.flows_fd, &cookie)
        return result
    flow_run(connection)
    return 0


cdef inline int flow_read(Control* control, Connection* connection, Flow* flow) noexcept nogil:
    """Copy the program's record of a flow. Return 0 or -errno."""
    cdef uint64_t cookie = 0
    cdef int result = _cookie(connection.fd, &cookie)
    if result == 0:
        result = bpf_map_lookup(flows_of(control).flows_fd, &cookie, flow)
    return result


cdef inline bint flow_is_broken(Control* control, Connection* connection) noexcept nogil:
    """Check whether the program has lost bytes of a flow."""
    cdef Flow flow
    return flow_read(control, connection, &flow) == 0 and flow.mode == FLOW_BROKEN


cdef inline int flow_look(Connection* connection, Look* look) noexcept nogil:
    """Find out where a flow's bytes are. Return 0 or -errno.

    `received` and the acknowledged bytes are of one moment. What the socket holds is read
    afterwards. So `handed` may be too low, but never too high: bytes that are acknowledged between
    the two calls are in neither. (tcpi_bytes_sent less tcpi_bytes_retrans would be too high after a
    local drop, which counts a segment twice.)
    """
    cdef tcp_info info
    cdef socklen_t size = sizeof(info)
    cdef int held = 0
    memset(&info, 0, sizeof(info))
    memset(look, 0, sizeof(Look))  # gcc does not see that -errno is never 0
    if getsockopt(connection.fd, IPPROTO_TCP, TCP_INFO, &info, &size) < 0:
        return -errno
    if ioctl(connection.fd, SIOCOUTQ, &held) < 0:
        return -errno
    look.is_closed = info.tcpi_state == TCP_STATE_CLOSE
    look.has_ended = info.tcpi_state == TCP_STATE_CLOSE_WAIT
    look.received = info.tcpi_bytes_received - (1 if look.has_ended else 0)
    look.handed = info.tcpi_bytes_acked + <uint32_t>held
    look.acknowledged = <uint32_t>info.tcpi_bytes_acked
    look.sent_ms_ago = info.tcpi_last_data_sent
    look.received_ms_ago = info.tcpi_last_data_recv
    return 0


cdef inline int flow_take_error(Connection* connection, Look* look) noexcept nogil:
    """Return the error that broke a socket, as -errno, or 0. Reading SO_ERROR clears it, so the
    caller must end the connection."""
    cdef int error = 0
    cdef socklen_t size = sizeof(error)
    cdef pollfd looked
    looked.fd = connection.fd
    looked.events = 0
    # SO_ERROR would also return, and clear, ICMP errors, which TCP survives. They set no POLLERR.
    if not look.is_closed and (poll(&looked, 1, 0) < 1 or not looked.revents & POLLERR):
        return 0
    if getsockopt(connection.fd, SOL_SOCKET, SO_ERROR, &error, &size) < 0:
        return -errno
    if error == 0 and look.is_closed:
        return -ECONNRESET
    return -error


cdef inline bint flow_is_whole(Connection* connection) noexcept nogil:
    """Check that everything received has been handed to the socket."""
    cdef Look look
    return flow_look(connection, &look) == 0 and look.received <= look.handed


cdef inline int flow_check_end(Connection* connection) noexcept nogil:
    """Return 1 if that is so and the client has sent its FIN, 0 if not yet, or -errno if the socket
    is broken: behind a FIN, recv() does not return the error."""
    cdef Look look
    cdef int result = flow_look(connection, &look)
    if result == 0:
        result = flow_take_error(connection, &look)
    if result < 0:
        return result
    return look.has_ended and look.received <= look.handed


cdef inline bint flow_leave(Control* control, Connection* connection) noexcept nogil:
    """Take a flow out of the kernel's hands after everything was handed back. Bytes that come now
    stay in the receive queue. Return False if bytes came at that moment: they are lost with the
    program's queue."""
    cdef uint64_t cookie = 0
    cdef Look look
    cdef Flow flow
    cdef int _i
    if _cookie(connection.fd, &cookie) < 0:
        return False
    if bpf_map_delete(flows_of(control).sockets_fd, &cookie) < 0:
        return False
    for _i in range(LOOKS):
        # After TCP_INFO, which takes the socket's lock: the program has run to its end by then.
        if (flow_look(connection, &look) < 0
                or bpf_map_lookup(flows_of(control).flows_fd, &cookie, &flow) < 0
                or flow.mode != FLOW_ECHOED):
            return False
        if look.handed == flow.redirected:
            return True
    return False


cdef inline void flow_end(Control* control, Connection* connection) noexcept nogil:
    """Remove the record of a flow. Closing the socket removes it from its map."""
    cdef uint64_t cookie = 0
    if _cookie(connection.fd, &cookie) == 0:
        bpf_map_delete(flows_of(control).flows_fd, &cookie)
