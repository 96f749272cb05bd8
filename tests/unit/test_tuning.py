from __future__ import annotations

import resource
import socket
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from kecho import tuning

TCPI_SACKED = 28  # of struct tcp_info; a listening socket has its backlog there


@pytest.fixture
def sysctls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory in the place of /proc/sys."""
    monkeypatch.setattr(tuning, "_SYSCTL_ROOT", tmp_path)
    (tmp_path / "net/core").mkdir(parents=True)
    return tmp_path


def backlog_by_the_kernel(backlog: int) -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(backlog)
        info = listener.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
        return int(struct.unpack_from("=I", info, TCPI_SACKED)[0])


def test_somaxconn_is_what_the_kernel_says() -> None:
    assert tuning.somaxconn() == int(Path("/proc/sys/net/core/somaxconn").read_text())


@pytest.mark.parametrize("backlog", [0, 1, 100, 2**31 - 1])
def test_backlog_in_force_is_what_a_listener_gets(backlog: int) -> None:
    assert tuning.backlog_in_force(backlog) == backlog_by_the_kernel(backlog)


def test_backlog_is_truncated_to_somaxconn(sysctls: Path) -> None:
    (sysctls / "net/core/somaxconn").write_text("200\n")
    assert tuning.somaxconn() == 200
    assert [tuning.backlog_in_force(backlog) for backlog in (199, 200, 201)] == [199, 200, 200]


@pytest.mark.parametrize("text", [None, "", "many\n"])
def test_somaxconn_that_cannot_be_read_is_the_default(sysctls: Path, text: str | None) -> None:
    if text is not None:
        (sysctls / "net/core/somaxconn").write_text(text)
    assert tuning.read_sysctl("net.core.somaxconn") is None
    assert tuning.somaxconn() == 4096
    assert tuning.backlog_in_force(5000) == 4096


RAISE_IN_A_CHILD = """
import resource, sys
from kecho import tuning
soft, hard = map(int, sys.argv[1:])
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
print(tuning.raise_descriptor_limit(), *resource.getrlimit(resource.RLIMIT_NOFILE))
"""


@pytest.mark.parametrize(("soft", "hard"), [(64, 128), (128, 128), (0, 128)])
def test_descriptor_limit_is_raised_to_the_hard_limit(soft: int, hard: int) -> None:
    command = [sys.executable, "-c", RAISE_IN_A_CHILD, str(soft), str(hard)]
    child = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    assert child.stdout.split() == [str(hard)] * 3


def test_descriptor_limit_that_cannot_be_raised_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(limit: int, values: tuple[int, int]) -> None:
        raise PermissionError

    monkeypatch.setattr(resource, "getrlimit", lambda limit: (64, 128))
    monkeypatch.setattr(resource, "setrlimit", refuse)
    assert tuning.raise_descriptor_limit() == 64
