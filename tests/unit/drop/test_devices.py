"""Devices by name and index: how often the kernel is asked."""

from __future__ import annotations

import fcntl
import socket

import pytest

from kecho.drop import devices
from kecho.drop.devices import SIOCGIFINDEX, Devices

pytestmark = pytest.mark.python_only


def test_numbers_that_somebody_has_written_are_not_each_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []
    real = fcntl.ioctl

    def ioctl(fd: int, request: int, data: bytes) -> bytes:
        asked.append(request)
        return real(fd, request, data)

    monkeypatch.setattr(devices.fcntl, "ioctl", ioctl)
    index = socket.if_nametoindex("lo")
    with socket.socket() as any_socket:
        known = Devices(any_socket.fileno())
        others = [n for n in range(1, 500) if n != index]
        assert not any(known.is_called(index, f"{form}{n}") for form in ("", "if") for n in others)
        assert SIOCGIFINDEX not in asked
        for text in ("lo", f"{index}", f"if{index}"):
            assert known.is_called(index, text)
            assert not known.is_called(index + 100, text)
        assert known.is_called(999_999, "if999999")
    assert asked.count(SIOCGIFINDEX) <= 3
