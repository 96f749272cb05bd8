"""For how long a worker polls, by the option and the CPUs there are."""

from __future__ import annotations

import pytest

from kecho import ServerConfig
from kecho.server import busy_poll
from kecho.server.busy_poll import busy_poll_of

FOREVER_NS = 2**64 - 1


@pytest.mark.parametrize(
    ("value", "expected", "expected_if_crowded"),
    [
        (0, (0, False), (0, False)),
        (1, (1000, False), (1000, False)),
        (1_000_000, (10**9, False), (10**9, False)),
        ("auto", (200_000, True), (0, False)),
        ("forever", (FOREVER_NS, False), (FOREVER_NS, False)),
    ],
)
def test_auto_polls_only_with_a_whole_cpu_for_each_thread(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    value: int | str,
    expected: tuple[int, bool],
    expected_if_crowded: tuple[int, bool],
) -> None:
    monkeypatch.setattr(busy_poll, "whole_cpu_count", lambda: 2)
    config = ServerConfig(busy_poll=value)  # type: ignore[arg-type]
    assert busy_poll_of(config, 1) == busy_poll_of(config, 2) == expected
    assert not caplog.records
    assert busy_poll_of(config, 3) == expected_if_crowded
    assert len(caplog.records) == (1 if value else 0)
    assert all("3 threads and 2 whole CPUs" in one.getMessage() for one in caplog.records)
