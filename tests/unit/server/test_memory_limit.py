"""How much may wait for clients that do not read: the option, or a share of the cgroup's memory."""

from __future__ import annotations

from pathlib import Path

import pytest

import kecho.server.run
from kecho import ServerConfig
from kecho.options import describe_size
from kecho.server.sockets import memory as socket_memory
from kecho.server.sockets.memory import budget_of
from support.fabricated_cgroups import Machine

pytestmark = pytest.mark.python_only

MIB = 1 << 20
NONE_V1 = str(2**63 - 4096)  # PAGE_COUNTER_MAX, in bytes


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def limit(directory: Path, name: str, text: object) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / name).write_text(f"{text}\n")


def test_v1_limit_is_the_tightest_on_the_way_up(machine: Machine) -> None:
    top = machine.mounts("cgroup", "memory", "memory")
    machine.mounts("cgroup", "cpu", "cpu")
    machine.is_in("4:memory:/a/b", "2:cpu:/c", "0::/")
    limit(top, "memory.limit_in_bytes", NONE_V1)
    limit(top / "a", "memory.limit_in_bytes", 48 * MIB)
    limit(top / "a/b", "memory.limit_in_bytes", 64 * MIB)
    limit(top / "c", "memory.limit_in_bytes", 1)
    assert machine.memory == 48 * MIB


@pytest.mark.parametrize(
    ("most", "high", "expected"),
    [(48 * MIB, "max", 48 * MIB), ("max", 32 * MIB, 32 * MIB), (5, 6, 5), ("max", "max", None)],
)
def test_v2_limit_is_where_it_kills_or_throttles(
    machine: Machine, most: object, high: object, expected: int | None
) -> None:
    top = machine.mounts("cgroup2", "unified")
    machine.is_in("0::/a/b")
    limit(top / "a", "memory.max", most)
    limit(top / "a/b", "memory.high", high)
    assert machine.memory == expected


@pytest.mark.parametrize("text", ["", "max", "x", "-1", "1.5", NONE_V1])
def test_what_is_no_limit_limits_nothing(machine: Machine, text: str) -> None:
    top = machine.mounts("cgroup", "memory", "memory")
    machine.is_in("4:memory:/")
    limit(top, "memory.limit_in_bytes", text)
    assert machine.memory is None


@pytest.mark.parametrize(
    ("memory", "expected"),
    [
        (None, 256 * MIB),
        (1 << 40, 256 * MIB),
        (48 * MIB, 12 * MIB),
        (47 * MIB, 11 * MIB),
        (1000, MIB),
    ],
)
def test_default_is_a_quarter_of_the_limit_in_whole_mebibytes(
    monkeypatch: pytest.MonkeyPatch, memory: int | None, expected: int
) -> None:
    monkeypatch.setattr(kecho.server.run, "cgroup_memory_limit", lambda proc_self: memory)
    assert kecho.Server().max_buffer_memory == expected
    assert kecho.server.run.buffer_bytes(ServerConfig(max_buffer_memory=1 << 17)) == 1 << 17


@pytest.mark.parametrize(
    ("memory", "options", "expected"),
    [
        (None, {"max_connections": 10}, None),
        (512 * MIB, {}, None),
        (512 * MIB, {"max_connections": 1024}, 256 << 10),
        (100 * MIB, {"max_connections": 1000}, 64 << 10),  # the least
        (512 * MIB, {"max_connections": 7}, 512 * MIB // 14 // 1024 * 1024),
        (520 * MIB, {"max_connections": 7}, None),  # more than the kernel's own most
        (512 * MIB, {"max_connections": 1024, "socket_memory": MIB}, MIB),
        (None, {"socket_memory": MIB}, MIB),
    ],
)
def test_each_connection_has_a_share_of_half_of_the_limit(
    monkeypatch: pytest.MonkeyPatch,
    memory: int | None,
    options: dict[str, int],
    expected: int | None,
) -> None:
    monkeypatch.setattr(socket_memory, "cgroup_memory_limit", lambda proc_self: memory)
    monkeypatch.setattr(socket_memory, "_kernels_most", lambda: 37 * MIB)
    assert budget_of(ServerConfig(**options)) == expected


def test_what_the_kernel_takes_by_itself_is_known() -> None:
    assert 1 * MIB < socket_memory._kernels_most() < 1 << 32


@pytest.mark.parametrize(
    ("count", "text"),
    [(65536, "64K"), (65537, "65537"), (12 * MIB, "12M"), (3 << 30, "3G"), (1 << 40, "1024G")],
)
def test_sizes_are_told_as_they_are_given(count: int, text: str) -> None:
    assert describe_size(count) == text
