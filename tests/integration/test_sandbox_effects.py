"""--sandbox, by effect: an attacker inside the server tries everything in every way, and fails."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from support.attacked_server import ALLOWED, LOGGED, attackable, attacked, what_worked
from support.clients import connect, echo, transfer
from support.engines import needs_io_uring, needs_sockmap
from support.privileges import needs_root

pytestmark = [
    pytest.mark.e2e,
    # Their runtimes need more than the sandbox gives, so their builds have none.
    pytest.mark.slow_under_sanitizers,
]

# SECURITY.md has a line for each.
EFFECTS = (
    "a new listener",
    "a TCP connection to any address",
    "a datagram to any address",
    "any other socket",
    "a descriptor passed",
    "what was logged changed",
    "a socket option that serving does not need",
    "a file opened, made or changed",
    "a program run or a process made",
    "another process traced, read or signalled",
    "more rights",
)
CLONE3 = "call 435"
# MSG_FASTOPEN without an address: EINVAL or EISCONN; io_uring_enter() without a ring: EOPNOTSUPP.
BY_THE_KERNEL = {CLONE3, "call 426", *(f"sendto without address {number}" for number in range(8))}
REST = "no call that is not on the list"

# In memory, where seccomp does not look, stands whom a datagram is for and what goes with it.
NOT_PROMISED = {
    "--udp": {
        ("a datagram to any address", "sendmmsg"),
        ("a descriptor passed", "sendmmsg"),
        ("a descriptor passed", "recvmmsg"),
        # Has the kernel drop what comes during a stop.
        ("a socket option that serving does not need", "SO_ATTACH_FILTER"),
    },
}
MODES = [
    pytest.param(["--engine=epoll"], id="epoll"),
    pytest.param(["--engine=epoll", "--udp"], id="epoll-udp"),
    pytest.param(["--engine=epoll", "--dispatch=percpu", "--uds"], id="epoll-uds"),
    pytest.param(["--engine=epoll", "--user=nobody"], id="epoll-user", marks=needs_root),
    pytest.param(["--engine=io_uring"], id="io_uring", marks=needs_io_uring),
    pytest.param(["--engine=io_uring", "--udp", "--uds"], id="io_uring-all", marks=needs_io_uring),
    pytest.param(["--engine=sockmap"], id="sockmap", marks=needs_sockmap),
    pytest.param(
        ["--engine=sockmap", "--user=nobody"],
        id="sockmap-user",
        marks=[needs_sockmap, needs_root],
    ),
]


@pytest.mark.parametrize("options", MODES)
def test_no_effect_is_had_in_any_way_while_echoing_goes_on(
    options: list[str], tmp_path: Path
) -> None:
    own, directory = tmp_path / "own", tmp_path / "uds"
    own.mkdir()
    directory.mkdir()
    arguments = [f"--uds={directory / 'socket'}" if one == "--uds" else one for one in options]
    with attackable(own, "--port=0", "--sandbox", *arguments) as process:
        with connect(process.port) as client:
            assert echo(client, b"before") == b"before"
            found = attacked(process)
            assert transfer(client, b"after" * 100_000) == b"after" * 100_000
        with connect(process.port) as client:
            assert echo(client, b"another") == b"another"
        assert process.stop() == 0
    assert len(found) == 2
    for one in found:
        assert {*EFFECTS, REST, ALLOWED} == one.keys()
        expected = {(ALLOWED, name) for name in one[ALLOWED]}
        for option in options:
            expected |= NOT_PROMISED.get(option, set())
        assert what_worked(one) == expected
        for effect in (*EFFECTS, REST):
            errors = {number for name, number in one[effect].items() if name not in BY_THE_KERNEL}
            assert errors <= {0, errno.EPERM, errno.EACCES}, effect
        assert one[REST][CLONE3] == errno.ENOSYS  # the C library falls back to clone
    assert (own / "kept").read_text() == "as it was"
    assert (own / "log").read_text() == LOGGED + "appended\n" * 2
    assert sorted(path.name for path in own.iterdir()) == ["kept", "log"]


def test_every_effect_has_its_line_in_the_document() -> None:
    text = (Path(__file__).parents[2] / "SECURITY.md").read_text()
    assert [effect for effect in EFFECTS if f"\n| {effect} |" not in text] == []
