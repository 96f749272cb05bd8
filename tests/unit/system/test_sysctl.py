from __future__ import annotations

import resource
import socket
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from kecho.system import sysctl

pytestmark = pytest.mark.python_only

TCPI_SACKED = 28  # of struct tcp_info; a listening socket has its backlog there


@pytest.fixture
def sysctls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory in the place of /proc/sys."""
    monkeypatch.setattr(sysctl, "_SYSCTL_ROOT", tmp_path)
    (tmp_path / "net/core").mkdir(parents=True)
    return tmp_path


def backlog_by_the_kernel(backlog: int) -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(backlog)
        info = listener.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
        return int(struct.unpack_from("=I", info, TCPI_SACKED)[0])


def test_somaxconn_is_what_the_kernel_says() -> None:
    assert sysctl.somaxconn() == int(Path("/proc/sys/net/core/somaxconn").read_text())


@pytest.mark.parametrize("backlog", [0, 1, 100, 2**31 - 1])
def test_backlog_in_force_is_what_a_listener_gets(backlog: int) -> None:
    assert sysctl.backlog_in_force(backlog) == backlog_by_the_kernel(backlog)


def test_backlog_is_truncated_to_somaxconn(sysctls: Path) -> None:
    (sysctls / "net/core/somaxconn").write_text("200\n")
    assert sysctl.somaxconn() == 200
    assert [sysctl.backlog_in_force(backlog) for backlog in (199, 200, 201)] == [199, 200, 200]


@pytest.mark.parametrize("text", [None, "", "many\n"])
def test_somaxconn_that_cannot_be_read_is_the_default(sysctls: Path, text: str | None) -> None:
    if text is not None:
        (sysctls / "net/core/somaxconn").write_text(text)
    assert sysctl.read_sysctl("net.core.somaxconn") is None
    assert sysctl.somaxconn() == 4096
    assert sysctl.backlog_in_force(5000) == 4096


RAISE_IN_A_CHILD = """
import resource, sys
from kecho.system import sysctl
soft, hard = map(int, sys.argv[1:])
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
print(sysctl.raise_descriptor_limit(), *resource.getrlimit(resource.RLIMIT_NOFILE))
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
    assert sysctl.raise_descriptor_limit() == 64


# ---- what a run wants ----------------------------------------------------------------------------


@pytest.fixture
def usual(sysctls: Path) -> Path:
    """The values of a kernel as it comes."""
    (sysctls / "net/ipv4").mkdir()
    (sysctls / "net/core/somaxconn").write_text("4096\n")
    (sysctls / "net/ipv4/tcp_max_syn_backlog").write_text("2048\n")
    (sysctls / "net/ipv4/ip_local_port_range").write_text("32768\t60999\n")
    (sysctls / "net/ipv4/ip_unprivileged_port_start").write_text("1024\n")
    (sysctls / "net/ipv4/ip_local_reserved_ports").write_text("\n")
    (sysctls / "fs").mkdir()
    (sysctls / "fs/file-max").write_text("2466177\n")
    (sysctls / "fs/nr_open").write_text("1048576\n")
    return sysctls


def test_sysctl_of_two_numbers_is_read_as_text(usual: Path) -> None:
    assert sysctl.read_sysctl_text("net.ipv4.ip_local_port_range") == "32768 60999"
    assert sysctl.read_sysctl("net.ipv4.ip_local_port_range") is None
    assert sysctl.read_port_range() == (32768, 60999)


def test_sysctl_is_written_in_one_line(usual: Path) -> None:
    sysctl.write_sysctl("net.ipv4.ip_local_port_range", "1024 65535")
    assert (usual / "net/ipv4/ip_local_port_range").read_bytes() == b"1024 65535\n"


def test_asking_whether_a_sysctl_can_be_set_sets_nothing(usual: Path) -> None:
    sysctl.check_writable("net.core.somaxconn")
    assert (usual / "net/core/somaxconn").read_text() == "4096\n"
    with pytest.raises(FileNotFoundError):
        sysctl.check_writable("net.core.nothing")


def test_root_can_be_given(usual: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    (other / "net/core").mkdir(parents=True)
    sysctl.write_sysctl("net.core.somaxconn", "1", root=other)
    assert sysctl.somaxconn(root=other) == 1
    assert sysctl.somaxconn() == 4096


def test_small_run_wants_nothing(usual: Path) -> None:
    assert sysctl.wanted_for(100) == {}


@pytest.mark.parametrize(
    ("connections", "somaxconn", "syn_backlog"),
    [
        (1536, None, None),
        (1537, None, "4096"),
        (4096, None, "8192"),
        (4097, "8192", "8192"),
        (18_000, "32768", "32768"),
        (40_000, "65535", "65536"),
        (65_535, "65535", "131072"),
        (65_536, "65536", "131072"),
        (2**31, "2147483647", "2147483647"),
    ],
)
def test_queues_are_to_hold_every_connection(
    usual: Path, connections: int, somaxconn: str | None, syn_backlog: str | None
) -> None:
    wanted = sysctl.wanted_for(connections, sources=2**31)
    assert wanted.get("net.core.somaxconn") == somaxconn
    assert wanted.get("net.ipv4.tcp_max_syn_backlog") == syn_backlog


@pytest.mark.parametrize(
    ("connections", "sources", "opened_total", "widened"),
    [
        (7058, 1, 0, False),
        (7059, 1, 0, True),
        (1000, 1, 10_000, True),
        (18_000, 2, 0, True),
        (18_000, 64, 0, False),
    ],
)
def test_port_range_is_widened_where_ports_are_not_plenty(
    usual: Path, connections: int, sources: int, opened_total: int, widened: bool
) -> None:
    wanted = sysctl.wanted_for(connections, sources, opened_total)
    assert wanted.get("net.ipv4.ip_local_port_range") == ("1024 65535" if widened else None)


@pytest.mark.parametrize(
    ("present", "start", "wanted"),
    [
        ("1024 65535", "1024", None),
        ("500 40000", "500", "500 65535"),
        ("32768 60999", "0", "1024 65535"),
        ("32768 60999", "2000", "2000 65535"),
        ("40000 40001", "1024", "1024 65535"),
    ],
)
def test_port_range_takes_in_what_it_was_and_no_privileged_port(
    usual: Path, present: str, start: str, wanted: str | None
) -> None:
    (usual / "net/ipv4/ip_local_port_range").write_text(present)
    (usual / "net/ipv4/ip_unprivileged_port_start").write_text(start)
    assert sysctl.wanted_for(60_000).get("net.ipv4.ip_local_port_range") == wanted
