from __future__ import annotations

import resource
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from kecho.bench.tuning.limits import Limits, Needs, advice

pytestmark = pytest.mark.python_only

USUAL = Limits(
    somaxconn=4096,
    syn_backlog=2048,
    port_range=(32768, 60999),
    reserved_ports=0,
    nofile_soft=1024,
    nofile_hard=20_000,
    file_max=2_000_000,
    nr_open=1_048_576,
)


def test_run_that_fits_has_no_problem() -> None:
    needs = Needs(connections=1000, descriptors=1000, descriptors_extra=20, backlog=4096)
    assert advice(needs, USUAL) == []


@pytest.mark.parametrize(
    ("needs", "limit", "value", "needed", "fatal", "command"),
    [
        (
            Needs(1000, descriptors=1000, descriptors_extra=100),
            *("RLIMIT_NOFILE", 1024, 1100, True, "ulimit -n 1100"),
        ),
        (
            Needs(100, descriptors=20_000, descriptors_extra=100),
            *("RLIMIT_NOFILE", 20_000, 20_100, True),
            "prlimit --pid $$ --nofile=20100:20100",
        ),
        (
            Needs(100, descriptors=1_048_577),
            *("RLIMIT_NOFILE", 20_000, 1_048_577, True),
            "sysctl -w fs.nr_open=1048577 && prlimit --pid $$ --nofile=1048577:1048577",
        ),
        (
            Needs(28_233, local=False),
            *("ephemeral ports", 28_232, 28_233, True),
            'sysctl -w net.ipv4.ip_local_port_range="1024 65535"',
        ),
        (
            Needs(64_513, local=False),
            *("ephemeral ports", 28_232, 64_513, True),
            "--source with 3 addresses of this machine",
        ),
        (
            Needs(1000, opened_total=30_000),
            *("ephemeral ports", 28_232, 30_000, False),
            'sysctl -w net.ipv4.ip_local_port_range="1024 65535"',
        ),
        (
            Needs(1000, opened_total=100_000),
            *("ephemeral ports", 28_232, 100_000, False, "--source 127.0.0.0/8"),
        ),
        (
            Needs(1000, opened_total=100_000, local=False),
            *("ephemeral ports", 28_232, 100_000, False, "--close rst"),
        ),
        (
            Needs(1500, backlog=1024),
            *("backlog", 1024, 1500, False, "--backlog 1500 for the server"),
        ),
    ],
)
def test_problem_names_limit_and_command(
    needs: Needs, limit: str, value: int, needed: int, fatal: bool, command: str
) -> None:
    [problem] = advice(needs, USUAL)
    found = (problem.limit, problem.value, problem.needed, problem.fatal, problem.command)
    assert found == (limit, value, needed, fatal, command)


@pytest.mark.parametrize("backlog", [None, 6000])
def test_somaxconn_below_the_connections_spoils_the_numbers(backlog: int | None) -> None:
    [problem] = advice(Needs(5000, backlog=backlog), USUAL)
    assert (problem.limit, problem.value, problem.needed) == ("net.core.somaxconn", 4096, 5000)
    assert problem.command == "sysctl -w net.core.somaxconn=8192"
    assert not problem.fatal


@pytest.mark.parametrize(("connections", "fits"), [(1536, True), (1537, False)])
def test_syn_backlog_counts_without_syn_cookies(connections: int, fits: bool) -> None:
    problems = advice(Needs(connections), replace(USUAL, syncookies=False))
    assert [(one.limit, one.needed, one.fatal, one.command) for one in problems] == (
        []
        if fits
        else [
            (
                *("net.ipv4.tcp_max_syn_backlog", 2050, False),
                "sysctl -w net.ipv4.tcp_max_syn_backlog=4096",
            )
        ]
    )
    assert advice(Needs(connections), USUAL) == []


def test_queues_of_a_server_elsewhere_are_not_known() -> None:
    assert advice(Needs(20_000, local=False), USUAL) == []


def test_reserved_ports_are_missing() -> None:
    limits = replace(USUAL, reserved_ports=28_000)
    [problem] = advice(Needs(300), limits)
    assert (problem.limit, problem.value, problem.fatal) == ("ephemeral ports", 232, True)


def test_every_source_has_the_ports_again() -> None:
    limits = replace(USUAL, somaxconn=65_536)
    assert advice(Needs(56_464, sources=2), limits) == []
    assert [one.limit for one in advice(Needs(56_465, sources=2), limits)] == ["ephemeral ports"]


def test_more_files_than_the_system_has_are_impossible() -> None:
    limits = replace(USUAL, nofile_soft=20_000, file_max=10_000)
    [problem] = advice(Needs(100, descriptors=12_000), limits)
    assert (problem.limit, problem.fatal) == ("fs.file-max", True)
    assert problem.command == "sysctl -w fs.file-max=24000"


def test_what_makes_a_run_impossible_comes_first() -> None:
    problems = advice(Needs(100_000, descriptors=100_000, backlog=128), USUAL)
    fatal = [problem.fatal for problem in problems]
    assert fatal == sorted(fatal, reverse=True)
    assert len(problems) == 3


def test_every_problem_is_one_line_with_its_command_last() -> None:
    for problem in advice(Needs(100_000, descriptors=100_000, opened_total=10**6), USUAL):
        text = str(problem)
        assert "\n" not in text
        assert text.endswith(problem.command)
        assert f"{problem.value}, this run needs {problem.needed}: " in text
        assert shlex.split(problem.command)


def test_problem_reads_well() -> None:
    [problem] = advice(Needs(100, descriptors=20_000, descriptors_extra=100), USUAL)
    assert str(problem) == (
        "RLIMIT_NOFILE is 20000, this run needs 20100: each connection takes a descriptor, and "
        "this is the hard limit; as root: prlimit --pid $$ --nofile=20100:20100"
    )
    [problem] = advice(Needs(1500, backlog=1024), USUAL)
    assert str(problem) == (
        "backlog is 1024, this run needs 1500: a connect that meets a full queue takes a "
        "second or more; try: --backlog 1500 for the server"
    )
    [problem] = advice(Needs(30_000, local=False), USUAL)
    assert str(problem) == (
        "ephemeral ports are 28232, this run needs 30000: each source address has at most one "
        "connection per port of ip_local_port_range; "
        'as root: sysctl -w net.ipv4.ip_local_port_range="1024 65535"'
    )


def test_limits_are_those_of_this_machine() -> None:
    limits = Limits.read()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert soft in (limits.nofile_soft, resource.RLIM_INFINITY)
    assert hard in (limits.nofile_hard, resource.RLIM_INFINITY)
    assert limits.somaxconn == int(Path("/proc/sys/net/core/somaxconn").read_text())
    assert limits.nr_open == int(Path("/proc/sys/fs/nr_open").read_text())
    first, last = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    assert limits.port_range == (first, last)


@pytest.mark.parametrize(
    ("text", "reserved"),
    [("\n", 0), ("80,8080\n", 0), ("40000\n", 1), ("1-32768,40000-40009,60999-65535\n", 12)],
)
def test_reserved_ports_count_within_the_range(tmp_path: Path, text: str, reserved: int) -> None:
    (tmp_path / "net/ipv4").mkdir(parents=True)
    (tmp_path / "net/ipv4/ip_local_port_range").write_text("32768\t60999\n")
    (tmp_path / "net/ipv4/ip_local_reserved_ports").write_text(text)
    limits = Limits.read(root=tmp_path)
    assert limits.reserved_ports == reserved
    assert limits.ports == 28_232 - reserved


def test_limits_that_cannot_be_read_are_the_kernels_defaults(tmp_path: Path) -> None:
    limits = Limits.read(root=tmp_path)
    assert (limits.somaxconn, limits.port_range, limits.nr_open) == (4096, (32768, 60999), 1048576)
