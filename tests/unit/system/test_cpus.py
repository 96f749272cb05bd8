from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kecho.system import cpus
from kecho.system.cgroups import cgroup_cpu_quota
from kecho.system.cpus import usable_cpu_count, usable_cpus, whole_cpu_count
from support.fabricated_cgroups import Machine

pytestmark = pytest.mark.python_only


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def limit_v2(directory: Path, cpu_max: str) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "cpu.max").write_text(f"{cpu_max}\n")


def limit_v1(directory: Path, quota_us: object, period_us: object = 100_000) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "cpu.cfs_quota_us").write_text(f"{quota_us}\n")
    (directory / "cpu.cfs_period_us").write_text(f"{period_us}\n")


# ---- cgroup v2 --------------------------------------------------------------------------------


def test_v2_without_a_quota(machine: Machine) -> None:
    root = machine.mounts("cgroup2", "cgroup")
    machine.is_in("0::/a/b")
    limit_v2(root / "a/b", "max 100000")
    limit_v2(root / "a", "max 100000")
    assert machine.quota is None


def test_v2_quota_of_the_own_group(machine: Machine) -> None:
    root = machine.mounts("cgroup2", "cgroup")
    machine.is_in("0::/a.slice/b.service")
    limit_v2(root / "a.slice/b.service", "150000 100000")
    assert machine.quota == 1.5


def test_v2_quota_is_a_share_of_its_period(machine: Machine) -> None:
    root = machine.mounts("cgroup2", "cgroup")
    machine.is_in("0::/a")
    limit_v2(root / "a", "150000 50000")
    assert machine.quota == 3.0


def test_v2_tightest_quota_on_the_way_up_counts(machine: Machine) -> None:
    root = machine.mounts("cgroup2", "cgroup")
    machine.is_in("0::/a/b/c")
    limit_v2(root / "a/b/c", "400000 100000")
    limit_v2(root / "a/b", "max 100000")
    limit_v2(root / "a", "200000 100000")
    assert machine.quota == 2.0
    limit_v2(root / "a/b/c", "100000 100000")
    assert machine.quota == 1.0


def test_v2_quotas_beside_the_way_up_do_not_count(machine: Machine) -> None:
    root = machine.mounts("cgroup2", "cgroup")
    machine.is_in("0::/a/b")
    limit_v2(root / "a/b", "300000 100000")
    limit_v2(root / "a/b/below", "100000 100000")
    limit_v2(root / "a/beside", "100000 100000")
    limit_v2(machine.top, "100000 100000")
    assert machine.quota == 3.0


def test_v2_in_a_group_namespace_the_root_group_has_the_quota(machine: Machine) -> None:
    root = machine.mounts("cgroup2", "cgroup")
    machine.is_in("0::/")
    limit_v2(root, "50000 100000")
    assert machine.quota == 0.5


def test_v2_in_a_container_that_sees_only_its_subtree(machine: Machine) -> None:
    root = machine.mounts("cgroup2", "cgroup", root="/docker/0123")
    machine.is_in("0::/docker/0123")
    limit_v2(root, "250000 100000")
    assert machine.quota == 2.5


def test_v2_nested_in_a_container_that_sees_only_its_subtree(machine: Machine) -> None:
    root = machine.mounts("cgroup2", "cgroup", root="/docker/0123")
    machine.is_in("0::/docker/0123/inner/most")
    limit_v2(root / "inner/most", "400000 100000")
    limit_v2(root / "inner", "300000 100000")
    limit_v2(root, "max 100000")
    assert machine.quota == 3.0


@pytest.mark.parametrize("mount_point", ["control groups", "tab\there", "back\\slash"])
def test_escapes_in_mount_points_are_understood(machine: Machine, mount_point: str) -> None:
    root = machine.mounts("cgroup2", mount_point)
    machine.is_in("0::/a")
    limit_v2(root / "a", "200000 100000")
    assert machine.quota == 2.0


def test_escapes_in_the_root_of_a_mount_are_understood(machine: Machine) -> None:
    # systemd has such names: it writes a hyphen as \x2d.
    scope = r"/machine.slice/machine-a\x2db.scope"
    root = machine.mounts("cgroup2", "cgroup", root=scope)
    machine.is_in(f"0::{scope}/inner")
    limit_v2(root / "inner", "200000 100000")
    assert machine.quota == 2.0


# ---- cgroup v1, and both ----------------------------------------------------------------------


@pytest.mark.parametrize("controllers", ["cpu", "cpu,cpuacct", "cpuacct,cpu"])
def test_v1_quota_of_the_own_group(machine: Machine, controllers: str) -> None:
    machine.mounts("cgroup", "memory", "memory")
    root = machine.mounts("cgroup", controllers, controllers)
    machine.is_in("5:memory:/m", f"4:{controllers}:/a/b", "1:name=systemd:/s")
    limit_v1(root / "a/b", 350_000)
    assert machine.quota == 3.5


def test_v1_quota_is_a_share_of_its_period(machine: Machine) -> None:
    root = machine.mounts("cgroup", "cpu", "cpu")
    machine.is_in("1:cpu:/a")
    limit_v1(root / "a", 20_000, 10_000)
    assert machine.quota == 2.0


def test_v1_without_a_quota(machine: Machine) -> None:
    root = machine.mounts("cgroup", "cpu", "cpu")
    machine.is_in("1:cpu:/a")
    limit_v1(root / "a", -1)
    limit_v1(root, -1)
    assert machine.quota is None


def test_v1_tightest_quota_on_the_way_up_counts(machine: Machine) -> None:
    root = machine.mounts("cgroup", "cpu", "cpu")
    machine.is_in("1:cpu:/a/b")
    limit_v1(root / "a/b", -1)
    limit_v1(root / "a", 200_000)
    assert machine.quota == 2.0


def test_v1_in_a_container_that_sees_only_its_subtree(machine: Machine) -> None:
    root = machine.mounts("cgroup", "cpu", "cpu,cpuacct", root="/docker/0123")
    machine.is_in("3:cpu,cpuacct:/docker/0123")
    limit_v1(root, 50_000)
    assert machine.quota == 0.5


def test_v1_other_controllers_are_no_cpu_controller(machine: Machine) -> None:
    for controllers in ("cpuset", "cpuacct", "name=cpu"):
        limit_v1(machine.mounts("cgroup", controllers, controllers) / "a", 50_000)
    machine.is_in("3:cpuset:/a", "2:cpuacct:/a", "1:name=cpu:/a")
    assert machine.quota is None


def test_v1_quota_counts_beside_a_v2_hierarchy_without_the_controller(machine: Machine) -> None:
    cpu = machine.mounts("cgroup", "cpu", "cpu,cpuacct")
    machine.mounts("cgroup2", "unified")
    machine.is_in("3:cpu,cpuacct:/a", "0::/user.slice")
    limit_v1(cpu / "a", 300_000)
    assert machine.quota == 3.0


def test_v2_quota_counts_beside_v1_hierarchies(machine: Machine) -> None:
    machine.mounts("cgroup", "memory", "memory")
    unified = machine.mounts("cgroup2", "unified")
    machine.is_in("3:memory:/m", "0::/a")
    limit_v2(unified / "a", "150000 100000")
    assert machine.quota == 1.5


# ---- what cannot be read or understood --------------------------------------------------------


def test_no_proc_is_no_quota(tmp_path: Path) -> None:
    assert cgroup_cpu_quota(tmp_path / "missing") is None


@pytest.mark.parametrize("missing", ["mountinfo", "cgroup"])
def test_half_a_proc_is_no_quota(machine: Machine, missing: str) -> None:
    root = machine.mounts("cgroup2", "cgroup")
    machine.is_in("0::/a")
    limit_v2(root / "a", "100000 100000")
    (machine.proc_self / missing).unlink()
    assert machine.quota is None


def test_group_without_files_is_no_quota(machine: Machine) -> None:
    machine.mounts("cgroup2", "cgroup")
    machine.mounts("cgroup", "cpu", "cpu")
    machine.is_in("1:cpu:/gone", "0::/gone")
    assert machine.quota is None


@pytest.mark.parametrize("missing", ["cpu.cfs_quota_us", "cpu.cfs_period_us"])
def test_half_a_v1_quota_is_none(machine: Machine, missing: str) -> None:
    root = machine.mounts("cgroup", "cpu", "cpu")
    machine.is_in("1:cpu:/a")
    limit_v1(root / "a", 100_000)
    (root / "a" / missing).unlink()
    assert machine.quota is None


@pytest.mark.parametrize(
    "cpu_max",
    ["", "max", "100000", "100000 0", "-1 100000", "a b", "1.5 1", "1 2 3", "\xff \xfe", "0x10 1"],
)
def test_unreadable_v2_quota_limits_nothing_but_others_do(machine: Machine, cpu_max: str) -> None:
    root = machine.mounts("cgroup2", "cgroup")
    machine.is_in("0::/a/b")
    limit_v2(root / "a/b", "")
    (root / "a/b/cpu.max").write_bytes(cpu_max.encode("latin-1"))
    assert machine.quota is None
    limit_v2(root / "a", "700000 100000")
    assert machine.quota == 7.0


@pytest.mark.parametrize(("quota", "period"), [("", ""), ("x", 100_000), (1000, 0), (1000, -5)])
def test_unreadable_v1_quota_limits_nothing(
    machine: Machine, quota: object, period: object
) -> None:
    root = machine.mounts("cgroup", "cpu", "cpu")
    machine.is_in("1:cpu:/a")
    limit_v1(root / "a", quota, period)
    assert machine.quota is None


@pytest.mark.parametrize(
    "line", ["", "-", " - ", "1 2 3", "a - cgroup2", "- - -", "\xff\xfe - x y z"]
)
def test_lines_that_make_no_sense_are_passed_over(machine: Machine, line: str) -> None:
    root = machine.mounts("cgroup2", "cgroup")
    mountinfo = machine.proc_self / "mountinfo"
    mountinfo.write_bytes(line.encode("latin-1") + b"\n" + mountinfo.read_bytes())
    (machine.proc_self / "cgroup").write_bytes(line.encode("latin-1") + b"\n:\n::\n0::/a\n")
    limit_v2(root / "a", "600000 100000")
    assert machine.quota == 6.0


# ---- the count --------------------------------------------------------------------------------


@pytest.fixture
def allowed_cpus(monkeypatch: pytest.MonkeyPatch) -> Callable[[set[int]], None]:
    def allow(numbers: set[int]) -> None:
        monkeypatch.setattr(os, "sched_getaffinity", lambda process: numbers)

    return allow


@pytest.mark.parametrize(
    ("allowed", "quota", "expected"),
    [
        ({0, 1, 2, 3}, None, 4),
        ({0, 1, 2, 3}, 2.0, 2),
        ({0, 1, 2, 3}, 1.1, 2),
        ({0, 1, 2, 3}, 0.05, 1),
        ({0, 1, 2, 3}, 64.0, 4),
        ({7}, 8.0, 1),
    ],
)
def test_count_is_the_lesser_of_affinity_and_quota_rounded_up(
    monkeypatch: pytest.MonkeyPatch,
    allowed_cpus: Callable[[set[int]], None],
    allowed: set[int],
    quota: float | None,
    expected: int,
) -> None:
    allowed_cpus(allowed)
    monkeypatch.setattr(cpus, "cgroup_cpu_quota", lambda proc_self: quota)
    assert usable_cpu_count() == expected


@pytest.mark.parametrize(("quota", "expected"), [(None, 4), (4.5, 4), (2.0, 2), (1.9, 1), (0.5, 0)])
def test_whole_cpus_are_the_lesser_of_affinity_and_quota_rounded_down(
    monkeypatch: pytest.MonkeyPatch,
    allowed_cpus: Callable[[set[int]], None],
    quota: float | None,
    expected: int,
) -> None:
    allowed_cpus({0, 1, 2, 3})
    monkeypatch.setattr(cpus, "cgroup_cpu_quota", lambda proc_self: quota)
    assert whole_cpu_count() == expected


def test_cpus_are_in_ascending_order(allowed_cpus: Callable[[set[int]], None]) -> None:
    allowed_cpus({65, 3, 130, 0})
    assert usable_cpus() == [0, 3, 65, 130]


COUNT_IN_A_CHILD = """
import os, sys
procs, cpu = sys.argv[1:]
if procs:
    open(procs, "w").write("0")
if cpu:
    os.sched_setaffinity(0, {int(cpu)})
from kecho.system.cpus import usable_cpu_count
print(usable_cpu_count())
"""


def count_in_a_child(procs: Path | str = "", cpu: int | str = "") -> int:
    command = [sys.executable, "-c", COUNT_IN_A_CHILD, str(procs), str(cpu)]
    child = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    return int(child.stdout)


def test_count_follows_the_affinity_of_the_process() -> None:
    assert count_in_a_child(cpu=usable_cpus()[-1]) == 1


def hierarchy(version: str) -> Path:
    """Where this machine has the hierarchy; in it the process's own group."""
    own = Path("/proc/self/cgroup").read_text().splitlines()
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields, kind = (part.split() for part in line.split(" - "))
        if version == "v2" and kind[0] == "cgroup2":
            groups = [line.split(":", 2)[2] for line in own if line.startswith("0::")]
        elif version == "v1" and kind[0] == "cgroup" and "cpu" in kind[2].split(","):
            groups = [
                line.split(":", 2)[2] for line in own if "cpu" in line.split(":")[1].split(",")
            ]
        else:
            continue
        if groups and fields[3] == "/":
            return Path(fields[4], groups[0].strip("/"))
    pytest.skip(f"no cgroup {version} hierarchy with a cpu controller is mounted here")


@pytest.fixture(params=["v1", "v2"])
def new_group(request: pytest.FixtureRequest) -> Iterator[Path]:
    """A control group of our own, empty, below the one that the tests run in."""
    group = hierarchy(request.param) / f"kecho-test-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no control group can be made: {error}")
    yield group
    group.rmdir()


@pytest.mark.privileged
def test_count_follows_a_real_quota(new_group: Path) -> None:
    if len(usable_cpus()) < 2:
        pytest.skip("with one CPU a quota changes nothing")
    if (new_group / "cpu.max").exists():
        (new_group / "cpu.max").write_text("50000 100000")
    elif (new_group / "cpu.cfs_quota_us").exists():
        (new_group / "cpu.cfs_quota_us").write_text("50000")
    else:
        pytest.skip(f"the cpu controller is not available in {new_group.parent}")
    unlimited = usable_cpu_count()
    assert count_in_a_child(procs=new_group / "cgroup.procs") == 1
    assert usable_cpu_count() == unlimited
