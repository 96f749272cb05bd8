"""What the suite takes for trouble in the kernel's log."""

from __future__ import annotations

import pytest

from support.kernel_log import KernelLog, troubles

pytestmark = pytest.mark.python_only


@pytest.mark.parametrize(
    ("message", "is_trouble"),
    [
        ("WARNING: CPU: 0 PID: 9 at net/core/stream.c:217 sk_stream_kill_queues+0x1/0x2", True),
        ("WARNING: CPU: 0 PID: 9 at net/ipv4/af_inet.c:157 inet_sock_destruct+0x174/0x1a0", False),
        ("BUG: soft lockup - CPU#1 stuck for 22s! [kecho:1]", True),
        ("workqueue: sk_psock_backlog hogged CPU for >10000us 4 times", True),
        ("INFO: task kecho:1 blocked for more than 122 seconds.", True),
        (
            "TCP: request_sock_TCP: Possible SYN flooding on port 127.0.0.1:1. Sending cookies.",
            False,
        ),
    ],
)
def test_trouble_is_told_from_what_is_usual(message: str, is_trouble: bool) -> None:
    assert troubles([message]) == [message] * is_trouble


def test_nothing_is_new_at_first() -> None:
    log = KernelLog()
    try:
        assert troubles(log.new_messages()) == []
    finally:
        log.close()
