"""The sandbox's seccomp filter, run as the kernel runs it."""

from __future__ import annotations

import errno
import platform
import struct
from typing import NamedTuple

import pytest

from kecho.server import _sandbox

pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64", reason="the numbers below are of x86-64"
)

AUDIT_ARCH = 0xC000003E
ALLOW, ERRNO = 0x7FFF0000, 0x00050000
LD, AND, JEQ, JGE, RET = 0x20, 0x54, 0x15, 0x35, 0x06  # of those that there are
NUMBERS = {
    "read": 0,
    "write": 1,
    "close": 3,
    "sendto": 44,
    "recvfrom": 45,
    "sendmsg": 46,
    "shutdown": 48,
    "listen": 50,
    "setsockopt": 54,
    "fcntl": 72,
    "epoll_wait": 232,
    "epoll_ctl": 233,
    "epoll_pwait": 281,
    "accept4": 288,
    "recvmmsg": 299,
    "sendmmsg": 307,
    "bpf": 321,
    "io_uring_enter": 426,
    "io_uring_register": 427,
}
MODES = {
    "epoll": {},
    "uds": {"for_a_file": True},
    "udp": {"for_datagrams": True},
    "sockmap": {"for_flows": True},
    "io_uring": {"for_rings": True},
}


class Outcome(NamedTuple):
    verdict: int
    instructions: int
    looks_at_arguments: bool


def program_of(mode: str) -> list[tuple[int, ...]]:
    options = dict.fromkeys(("for_a_file", "for_datagrams", "for_flows", "for_rings"), False)
    return list(struct.iter_unpack("HBBI", _sandbox.filter_program(**options | MODES[mode])))


def run(program: list[tuple[int, ...]], call: int, *arguments: int) -> Outcome:
    data = struct.pack("=IIQ6Q", call, AUDIT_ARCH, 0, *arguments, *[0] * (6 - len(arguments)))
    at = loaded = instructions = 0
    looks = False
    while True:
        code, if_true, if_false, value = program[at]
        at, instructions = at + 1, instructions + 1
        if code == LD:
            looks |= value >= 8  # behind the call's number and the architecture
            (loaded,) = struct.unpack_from("=I", data, value)
        elif code == AND:
            loaded &= value
        elif code == RET:
            return Outcome(value, instructions, looks)
        else:
            assert code in (JEQ, JGE)
            holds = loaded == value if code == JEQ else loaded >= value
            at += if_true if holds else if_false


def constant(mode: str) -> set[str]:
    """The calls that the kernel allows by its bitmap, without a run of the filter: those of which
    the filter looks at nothing but the number: seccomp_is_const_allow() in kernel/seccomp.c, since
    Linux 5.11."""
    program = program_of(mode)
    outcomes = {name: run(program, number) for name, number in NUMBERS.items()}
    return {
        name
        for name, outcome in outcomes.items()
        if outcome.verdict == ALLOW and not outcome.looks_at_arguments
    }


@pytest.mark.parametrize(
    ("mode", "more"),
    [
        ("epoll", set()),
        ("uds", set()),
        ("udp", {"recvmmsg"}),
        ("sockmap", set()),
        ("io_uring", {"io_uring_enter"}),
    ],
)
def test_the_calls_of_an_echo_but_sendto_cost_no_run_of_the_filter(
    mode: str, more: set[str]
) -> None:
    expected = {"recvfrom", "epoll_wait", "epoll_pwait", "epoll_ctl", "accept4", "close"}
    assert constant(mode) == expected | {"read", "write"} | more


@pytest.mark.parametrize("mode", MODES)
def test_sendto_is_decided_first(mode: str) -> None:
    """Linux 6.18 runs so many instructions for each echo; 15 before MSG_FASTOPEN went."""
    program = program_of(mode)
    assert run(program, NUMBERS["sendto"], 5, 1, 64, 0x4000) == (ALLOW, 12, True)
    for address in (1, 1 << 32):
        refused = run(program, NUMBERS["sendto"], 5, 1, 64, 0x4000, address, 16)
        assert refused.verdict == ERRNO | errno.EPERM


@pytest.mark.parametrize("mode", MODES)
def test_a_socket_option_is_served_by_level_and_name(mode: str) -> None:
    filter_program = program_of(mode)
    allowed = {
        (level, name)
        for level in (0, 1, 6, 17, 41, 263, 284)
        for name in range(80)
        if run(filter_program, NUMBERS["setsockopt"], 5, level, name).verdict == ALLOW
    }
    linger, inline, filtered, low_water, program = 13, 10, 26, 18, 50
    more = {"udp": {filtered}, "sockmap": {low_water, program}}.get(mode, set())
    assert allowed == {(1, name) for name in {linger, inline} | more}
