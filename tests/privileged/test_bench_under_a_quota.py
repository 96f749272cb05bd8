"""A server that its cgroup's CPU quota holds up, and the client's verdict of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from benchmarks.compare import cap
from kecho import bench
from kecho.bench import Workload
from support.privileges import needs_root
from support.server_process import ServerProcess

pytestmark = [pytest.mark.privileged, needs_root, pytest.mark.slow_under_sanitizers]


@pytest.fixture
def hold(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """Puts a process into a cgroup that has 1 ms of CPU time in 100 ms."""
    monkeypatch.setattr(cap, "_NAME", "kecho-test-quota-")
    monkeypatch.setattr(cap, "SHARE", 0.01)
    monkeypatch.setattr(cap, "_PERIOD_US", 100_000)
    try:
        with cap.capped() as put_in:
            yield put_in
    except OSError as error:
        pytest.skip(f"no cgroup with a CPU quota can be made here: {error}")


@pytest.mark.parametrize("rate", [None, 1e6])
def test_a_server_that_its_quota_held_up_is_told_in_the_verdict(
    hold: Callable[[int], None], start_process: Callable[..., ServerProcess], rate: float | None
) -> None:
    server = start_process()
    hold(server.pid)
    mode = "closed" if rate is None else "open"
    result = bench.run(
        Workload(port=server.port, mode=mode, rate=rate, connections=50, duration=0.5)
    )
    told = result.verdict.notes if rate is None else result.verdict.reasons
    assert any("the server was throttled: in " in line for line in told), result.verdict
