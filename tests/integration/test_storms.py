"""Storms of hostile clients beside one that plays ping-pong: nobody notices, nothing leaks.

Its p50, p99 and longest are printed and recorded (`-rP`, or --junitxml); only a stall fails.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from support.clients import connect, echo, wait_for
from support.fixture_types import StartProcess
from support.server_process import ServerProcess
from support.storms import Storm, descriptors, rss_bytes

pytestmark = [pytest.mark.alone, pytest.mark.e2e, pytest.mark.release, pytest.mark.timeout(600)]

IS_SANITIZED = "KECHO_EXPECT_BUILD" in os.environ
SHRINK = 50 if IS_SANITIZED else 1
STALL_MS = 5_000

Record = Callable[[str, object], None]


@contextmanager
def nothing_leaks(process: ServerProcess, warm_up: Callable[[], object]) -> Iterator[None]:
    """After a first storm, a second one leaves descriptors and memory as they were."""
    before = descriptors(process.pid)
    warm_up()
    wait_for(lambda: descriptors(process.pid) == before, "the descriptors are closed")
    rss_before = rss_bytes(process.pid)
    yield
    wait_for(lambda: descriptors(process.pid) == before, "the descriptors are closed")
    rss_after = rss_bytes(process.pid)
    print(f"rss {rss_before >> 10} KiB, then {rss_after >> 10} KiB; {before} descriptors")
    # ASan keeps what was freed for a while.
    assert IS_SANITIZED or rss_after <= 1.1 * rss_before


@contextmanager
def beside_ping_pong(process: ServerProcess, name: str, record: Record) -> Iterator[None]:
    with Storm("ping", process.port) as ping:
        time.sleep(0.2)
        began_s = time.monotonic()
        yield
        figures = {"storm": name, "seconds": round(time.monotonic() - began_s, 1), **ping.stop()}
    record("ping_pong", json.dumps(figures))
    print(json.dumps(figures))
    assert figures["echoes"] > 0
    assert not figures["cut"]
    assert figures["max_ms"] < STALL_MS


def stopped(process: ServerProcess) -> dict[str, Any]:
    """Its last counters, when it has served one more client and stopped in order."""
    with connect(process.port) as client:
        assert echo(client, b"after the storm") == b"after the storm"
    assert process.stop() == 0
    stats: dict[str, Any] = json.loads(process.stderr.splitlines()[-1])["stats"]
    assert stats["active"] == 0
    assert stats["accepted"] == sum(stats["closed"].values())
    assert stats["bytes_sent"] <= stats["bytes_received"]
    return stats


def storm(kind: str, process: ServerProcess, count: int, seconds: float = 0) -> dict[str, Any]:
    with Storm(kind, process.port, count, seconds) as raging:
        found = raging.wait()
    assert found.get("refused", 0) == 0
    return found


@pytest.fixture
def process(start_process: StartProcess, dispatch: str) -> ServerProcess:
    return start_process(
        *("--dispatch", dispatch, "--threads=2", "--backlog=4096", "--log-format=json")
    )


def test_a_storm_of_resets_is_not_noticed(
    process: ServerProcess, dispatch: str, record_property: Record
) -> None:
    count = 100_000 // SHRINK
    with (
        nothing_leaks(process, lambda: storm("resets", process, count // 10)),
        beside_ping_pong(process, f"{count} resets, {dispatch}", record_property),
    ):
        storm("resets", process, count)
    stats = stopped(process)
    # The ping-pong client, and the last one, end in order.
    assert stats["accepted"] == count + count // 10 + 2
    assert stats["closed"]["reset"] == count + count // 10
    assert not sum(stats["errors"].values())


def test_slow_loris_is_not_noticed(
    process: ServerProcess, dispatch: str, record_property: Record
) -> None:
    count = 10_000 // SHRINK
    with (
        nothing_leaks(process, lambda: storm("loris", process, count, 1)),
        beside_ping_pong(process, f"loris on {count}, {dispatch}", record_property),
    ):
        found = storm("loris", process, count, 5)
    assert found["connections"] == count
    assert found["cut"] == found["late"] == 0
    assert found["bytes"] == count * found["rounds"]
    assert stopped(process)["closed"]["reset"] == 2 * count


def test_clients_that_never_read_are_not_noticed(
    process: ServerProcess, dispatch: str, record_property: Record
) -> None:
    count = 1_000 // SHRINK
    with (
        nothing_leaks(process, lambda: storm("silent", process, count, 2)),
        beside_ping_pong(process, f"{count} never read, {dispatch}", record_property),
    ):
        storm("silent", process, count, 5)
    stats = stopped(process)
    assert stats["accepted"] == 2 * count + 2
    assert stats["backpressure"] >= count  # the first storm is too short for some
