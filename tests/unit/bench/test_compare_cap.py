"""`make compare` holds servers to a part of a CPU: in which cgroup, and what comes of it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.compare import cap
from benchmarks.compare.cap import SHARE, capped
from benchmarks.compare.serving import cpu_ns

pytestmark = [pytest.mark.python_only, pytest.mark.slow_under_sanitizers]


@pytest.fixture(autouse=True)
def _no_patience(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """A fabricated cgroup is a directory with files, which rmdir() leaves."""
    if "tmp_path" in request.fixturenames:
        monkeypatch.setattr(cap, "_REMOVE_S", 0.0)


def proc_self(top: Path, kind: str, options: str, group: str) -> Path:
    """/proc/self of a process in `group`, whose hierarchy is mounted at top/mount."""
    (top / "proc").mkdir()
    (top / "mount" / group.strip("/")).mkdir(parents=True, exist_ok=True)
    (top / "proc" / "mountinfo").write_text(
        f"30 24 0:26 / {top}/mount rw shared:9 - {kind} cgroup rw{options}\n"
    )
    controller = "1:cpu:" if kind == "cgroup" else "0::"
    (top / "proc" / "cgroup").write_text(f"{controller}{group}\n")
    return top / "proc"


def only_child(directory: Path) -> Path:
    (child,) = directory.glob("kecho-compare-*")
    return child


def test_v1_is_within_the_own_group(tmp_path: Path) -> None:
    own = tmp_path / "mount" / "a"
    process = proc_self(tmp_path, "cgroup", ",cpu", "/a")
    (own / "cpu.cfs_quota_us").write_text("-1\n")
    with capped(process) as hold:
        child = only_child(own)
        quota_us = int((child / "cpu.cfs_quota_us").read_text())
        assert quota_us / int((child / "cpu.cfs_period_us").read_text()) == SHARE
        hold(4321)
        assert (child / "cgroup.procs").read_text() == "4321\n"


def test_v2_is_at_the_root_where_groups_share_cpus(tmp_path: Path) -> None:
    process = proc_self(tmp_path, "cgroup2", "", "/a")
    (tmp_path / "mount" / "cgroup.subtree_control").write_text("cpuset cpu io\n")
    with capped(process):
        quota_us, period_us = (only_child(tmp_path / "mount") / "cpu.max").read_text().split()
        assert int(quota_us) / int(period_us) == SHARE


def test_without_the_cpu_controller_there_is_none(tmp_path: Path) -> None:
    process = proc_self(tmp_path, "cgroup2", "", "/a")
    (tmp_path / "mount" / "cgroup.subtree_control").write_text("cpuset io\n")
    with pytest.raises(OSError, match="no cgroup has the cpu controller"), capped(process):
        pass


def test_one_that_was_left_behind_is_removed_and_another_ones_is_not(tmp_path: Path) -> None:
    process = proc_self(tmp_path, "cgroup2", "", "/")
    (tmp_path / "mount" / "cgroup.subtree_control").write_text("cpu\n")
    own, another, nobodys = (f"kecho-compare-{pid}" for pid in (os.getpid(), 1, 1 << 30))
    (tmp_path / "mount" / another).mkdir()
    (tmp_path / "mount" / nobodys).mkdir()
    with capped(process):
        found = {one.name for one in (tmp_path / "mount").glob("kecho-compare-*")}
        assert found == {own, another}


def test_a_process_in_it_gets_its_share_and_the_cgroup_is_gone_afterwards() -> None:
    try:
        with capped() as hold:
            spinning = subprocess.Popen([sys.executable, "-c", "while True: pass"])
            try:
                hold(spinning.pid)
                begun_s, begun_ns = time.monotonic(), cpu_ns(spinning.pid)
                time.sleep(1)
                took_ns = cpu_ns(spinning.pid) - begun_ns
                share = took_ns / 1e9 / (time.monotonic() - begun_s)
            finally:
                spinning.kill()
                spinning.wait()
            directory = cap._parent(Path("/proc/self"))
            assert len(list(directory.glob("kecho-compare-*"))) == 1
    except OSError as error:
        pytest.skip(f"no cgroup to be made here: {error}")
    assert 0.05 < share < SHARE + 0.05
    assert not list(directory.glob("kecho-compare-*"))
