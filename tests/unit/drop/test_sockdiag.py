"""What the kernel answers over netlink, whatever the bytes, and what is never sent."""

from __future__ import annotations

import errno
import socket
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kecho import _sockdiag
from support.chosen_kernel import NUMBERS, identity


def message(kind: int, sequence: int, payload: bytes) -> bytes:
    return struct.pack("=IHHII", 16 + len(payload), kind, 0, sequence, 0) + payload


def test_acks_are_told_apart_by_their_number() -> None:
    datagram = b"".join(
        message(2, number, struct.pack("=i", -error) + bytes(16))
        for number, error in ((12, errno.ENOENT), (9, errno.EPERM), (10, 0), (13, errno.EOPNOTSUPP))
    )
    answers = _sockdiag.parse_answers(datagram, 10, 4)
    assert answers == [0, _sockdiag.UNANSWERED, -errno.ENOENT, -errno.EOPNOTSUPP]


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
