"""What the kernel answers over netlink, whatever the bytes, and what is never sent."""

from __future__ import annotations

import errno
import socket
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kecho.drop import _sockdiag
from support.chosen_kernel import NUMBERS, identity

SOCK_DIAG = 4  # NETLINK_SOCK_DIAG


def message(kind: int, sequence: int, payload: bytes, port_id: int = 0) -> bytes:
    return struct.pack("=IHHII", 16 + len(payload), kind, 0, sequence, port_id) + payload


def test_acks_are_told_apart_by_their_number() -> None:
    datagram = b"".join(
        message(2, number, struct.pack("=i", -error) + bytes(16))
        for number, error in ((12, errno.ENOENT), (9, errno.EPERM), (10, 0), (13, errno.EOPNOTSUPP))
    )
    answers = _sockdiag.parse_answers(datagram, 10, 4)
    assert answers == [0, _sockdiag.UNANSWERED, -errno.ENOENT, -errno.EOPNOTSUPP]


def test_message_to_another_port_id_or_number_is_passed_over() -> None:
    found, done = bytes([2, 1]) + bytes(70), bytes(4)
    for sequence, port_id in ((7, 4242), (8, 77), (6, 77)):
        datagram = message(20, sequence, found, port_id) + message(3, sequence, done, port_id)
        assert _sockdiag.parse_dump(datagram, 7, 77) == (False, [])
        answers = _sockdiag.parse_answers(datagram, 7, 1, port_id=77)
        assert answers == [_sockdiag.UNANSWERED]
    ended, rows = _sockdiag.parse_dump(message(20, 7, found, 77) + message(3, 7, done, 77), 7, 77)
    assert (ended, len(rows)) == (True, 1)


def test_datagram_of_anybody_but_the_kernel_is_passed_over() -> None:
    with (
        socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, SOCK_DIAG) as ours,
        socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, SOCK_DIAG) as theirs,
    ):
        ours.bind((0, 0))
        try:
            theirs.sendto(message(3, 1, bytes(4)), ours.getsockname())
        except PermissionError:
            pytest.skip("needs CAP_NET_ADMIN")
        with pytest.raises(TimeoutError):
            _sockdiag.receive_from_kernel(ours.fileno())
        theirs.sendto(message(3, 1, bytes(4)), ours.getsockname())
        ours.sendto(struct.pack("=IHHII", 16, 4711, 5, 1, 0), (0, 0))  # NLM_F_REQUEST | NLM_F_ACK
        reply = _sockdiag.receive_from_kernel(ours.fileno(), 10_000)
    assert struct.unpack_from("=HxxI", reply, 4) == (2, 1)


@given(st.binary(max_size=400), st.integers(0, 3))
def test_any_datagram_is_read_within_its_bounds(data: bytes, kind: int) -> None:
    assert len(_sockdiag.parse_answers(data, 0, 128)) == 128
    for datagram in (data, message((2, 3, 20, 4)[kind], 1, data)):
        try:
            ended, rows = _sockdiag.parse_dump(datagram, 1)
        except OSError:
            continue
        assert len(rows) <= len(datagram) // 72
        assert isinstance(ended, bool)


def test_socket_of_another_family_is_a_bad_message() -> None:
    for family in (0, 1, 16, 255):
        datagram = message(20, 1, bytes([family]) + bytes(71))
        with pytest.raises(OSError, match="SOCK_DIAG_BY_FAMILY") as caught:
            _sockdiag.parse_dump(datagram, 1)
        assert caught.value.errno == errno.EBADMSG


def test_state_that_is_asked_for_is_told_by_its_number() -> None:
    found = message(20, 7, bytes([2, NUMBERS["time-wait"]]) + bytes(70))
    short, gone = message(20, 8, bytes(12)), message(2, 9, struct.pack("=i", -errno.ENOENT))
    answers = _sockdiag.parse_answers(found + short + gone, 7, 4)
    assert answers == [6, -errno.EBADMSG, -errno.ENOENT, _sockdiag.UNANSWERED]


@pytest.mark.parametrize("number", [1, 4095, -4096, -(2**31), 2**31 - 1])
@pytest.mark.parametrize("kind", [2, 3])
def test_number_that_is_no_errno_is_a_bad_message(kind: int, number: int) -> None:
    datagram = message(kind, 7, struct.pack("=i", number) + bytes(16))
    with pytest.raises(OSError, match="SOCK_DIAG_BY_FAMILY") as caught:
        _sockdiag.parse_dump(datagram, 7)
    assert caught.value.errno == errno.EBADMSG
    if kind == 2:
        assert _sockdiag.parse_answers(datagram, 7, 1) == [-errno.EBADMSG]


def attribute(kind: int, payload: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(payload), kind) + payload + bytes(-len(payload) % 4)


INFO, ULP, NAME = 2, 19, 1  # <linux/inet_diag.h>
LAST_SENT_AT = 44  # struct tcp_info


def info(state: int, last_sent_ms: int, last_received_ms: int) -> bytes:
    times = struct.pack("=4I", last_sent_ms, 0, last_received_ms, 0)
    return attribute(INFO, bytes([state]) + bytes(LAST_SENT_AT - 1) + times)


def seen(state: str, attributes: bytes) -> tuple[int | None, bool]:
    socket_message = bytes([2, NUMBERS[state]]) + bytes(70)
    _, ((*_, idle_ms, is_mptcp, _),) = _sockdiag.parse_dump(
        message(20, 1, socket_message + attributes), 1
    )
    return idle_ms, is_mptcp


def test_details_of_a_socket_are_read_where_the_kernel_tells_them() -> None:
    mptcp = attribute(0x8000 | ULP, attribute(NAME, b"mptcp\0") + attribute(3, bytes(8)))
    tls = attribute(ULP, attribute(9, b"x") + attribute(NAME, b"tls\0"))
    assert seen("established", info(1, 70, 30) + tls) == (30, False)
    assert seen("established", mptcp + info(1, 20, 30)) == (20, True)
    assert seen("established", b"") == (None, False)
    assert seen("close-wait", info(0, 0, 0)) == (None, False)  # all of it zero
    assert seen("syn-sent", info(2, 1 << 30, 1 << 30)) == (None, False)
    assert seen("listen", info(10, 5, 5)) == (None, False)
    for wrong in (attribute(ULP, attribute(NAME, b"mptcp")), attribute(ULP, b"\6\0\1\0mp")):
        assert seen("established", wrong) == (None, False)


@given(st.binary(max_size=300))
def test_any_attributes_are_read_within_their_bounds(data: bytes) -> None:
    idle_ms, is_mptcp = seen("established", data)
    assert idle_ms is None or 0 <= idle_ms < 1 << 32
    assert is_mptcp is False or b"mptcp" in data


def test_socket_that_is_not_idle_is_told_with_its_state() -> None:
    found = bytes([2, NUMBERS["established"]]) + bytes(70)
    datagram = message(20, 5, found + info(1, 400, 900)) + message(20, 6, found)
    assert _sockdiag.parse_answers(datagram, 5, 2) == [1, 1]
    assert _sockdiag.parse_answers(datagram, 5, 2, 400) == [1, 1 | _sockdiag.AWAKE]
    assert _sockdiag.parse_answers(datagram, 5, 2, 401) == 2 * [1 | _sockdiag.AWAKE]


def test_identity_without_a_cookie_is_never_sent() -> None:
    handle = _sockdiag.Handle()
    key = identity(int(socket.AF_INET), "127.0.0.1", 1, "127.0.0.1", 2, (1 << 64) - 1)
    with pytest.raises(ValueError, match="cookie"):
        handle.destroy([key])
    with pytest.raises(ValueError, match="identity"):
        handle.destroy([key[:-1]])
    with pytest.raises(ValueError, match="128"):
        handle.destroy([key] * 129)
    with pytest.raises(ValueError, match="cookie"):
        handle.states([key])
    handle.close()
    handle.close()
    with pytest.raises(ValueError, match="closed"):
        handle.dump(2, 1)
