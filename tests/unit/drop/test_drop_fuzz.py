"""Fuzzers of what the dropper reads: the kernel's replies, lines of pairs, and the command line."""

from __future__ import annotations

import contextlib
import errno
import io
import ipaddress
import json
import socket
import struct

import pytest

from kecho import command
from kecho.drop import Diag, PairError, _sockdiag, cli, listing, parse_pairs
from kecho.drop.devices import as_name
from kecho.drop.filters import Filter
from kecho.drop.pairs import pairs_in
from kecho.drop.table import PairTable
from support.chosen_kernel import Kernel, row
from support.fuzzing import Fuzz

SEQUENCE, PORT_ID = 7, 77
DUMPED, ERROR, DONE, OVERRUN = 20, 2, 3, 4


# ---- the kernel's replies -----------------------------------------------------------------------


def message(kind: int, payload: bytes, sequence: int = SEQUENCE) -> bytes:
    return struct.pack("=IHHII", 16 + len(payload), kind, 2, sequence, PORT_ID) + payload


def attribute(kind: int, payload: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(payload), kind) + payload + bytes(-len(payload) % 4)


def socket_of(family: int, state: int, attributes: bytes = b"") -> bytes:
    mapped = bytes(10) + b"\xff\xff\x7f\0\0\1"
    end = b"\x7f\0\0\1" + bytes(12) if family == 2 else mapped
    ends = struct.pack("!HH16s16s", 36986, 12345, end, end)
    rest = struct.pack("=IQ5I", 3, 0x123456789, 1000, 5, 6, 1000, 4711)
    return message(DUMPED, bytes([family, state, 1, 2]) + ends + rest + attributes)


INFO = attribute(2, bytes([1]) + bytes(43) + struct.pack("=4I", 70, 0, 30, 0) + bytes(180))
MPTCP = attribute(0x8000 | 19, attribute(1, b"mptcp\0") + attribute(3, bytes(8)))
REPLIES = [
    socket_of(2, 1, INFO) + socket_of(10, 6) + message(DONE, bytes(4)),
    socket_of(2, 10, INFO + MPTCP) + socket_of(10, 3, MPTCP),
    message(ERROR, struct.pack("=i", -errno.ENOENT) + bytes(16)) + message(OVERRUN, b""),
    b"".join(message(ERROR, bytes(20), SEQUENCE + i) for i in range(128)),
]
PARTS = [
    *(INFO, MPTCP, message(DONE, b""), message(ERROR, bytes(4)), message(DUMPED, bytes(72))),
    *(struct.pack("=HH", size, kind) for size in (0, 3, 4, 5, 0xFFFF) for kind in (1, 2, 19)),
    struct.pack("=II", SEQUENCE, PORT_ID),
]


ANY_SOCKET = socket.socket(socket.AF_UNIX)


class KernelWithDevices(Kernel):
    def fileno(self) -> int:
        return ANY_SOCKET.fileno()


def read_dump(data: bytes) -> object:
    """As far as a line of --list."""
    try:
        is_end, rows = _sockdiag.parse_dump(data, SEQUENCE, PORT_ID)
    except OSError:
        return "error"
    assert len(rows) <= len(data) // 88
    found = Diag(handle=KernelWithDevices(*rows)).find(Filter(), listeners=True)
    for one in found:
        ipaddress.ip_address(one.local_address)
        assert 0 <= one.peer_port < 65536
        assert len(one.identity) == _sockdiag.IDENTITY_BYTES
        json.dumps(listing._row(one, None))
        assert all(listing._line(one, None))
    return is_end, len(rows), len(found)


def read_answers(data: bytes) -> object:
    for idle_ms in (0, 50):
        answers = _sockdiag.parse_answers(data, SEQUENCE, 128, idle_ms, PORT_ID)
        assert len(answers) == 128
        assert all(one <= 0xFF | _sockdiag.AWAKE or one == _sockdiag.UNANSWERED for one in answers)
    return sum(one != _sockdiag.UNANSWERED for one in answers)


@pytest.mark.parametrize("target", [read_dump, read_answers])
def test_any_reply_is_read_within_its_bounds(fuzz: Fuzz, target: object) -> None:
    fuzz(target, seeds=REPLIES, words=PARTS, refusals=())  # type: ignore[arg-type]


# ---- lines of pairs -----------------------------------------------------------------------------

LINES = [
    b"127.0.0.1:36986 127.0.0.1:12345 # why\n[::1]:80 [::1]:9\n\n# nothing\n",
    b"::1:80 ::1:9\r\n[::ffff:127.0.0.1]:36986 127.0.0.1:12345",
    b"[fe80::1%eth0]:80 [fe80::2]:9\nfe80::1%a#b:80 fe80::2:9\n[fe80::1]%]:80 [fe80::2]:9",
    b'ESTAB 0 0 127.0.0.1:36986 127.0.0.1:12345 users:(("a b",pid=1,fd=5))\n',
    b"tcp6       0      0 ::1:80                  ::1:9                   TIME_WAIT   -\n",
    b"py 1 root 4u IPv4 49 0t0 TCP 127.0.0.1:36986->127.0.0.1:12345 (ESTABLISHED)\n",
    b"py 1 root 3u IPv6 49 0t0 TCP *:80 (LISTEN)\nLISTEN 0 128 *:80 *:*\n",
    b"  2: 0100007F:907A 0100007F:3039 01 00000000:00000000 00:00000000 00000000 0 0 4 1\n",
    b"10: 00000000000000000000000001000000:0050 00000000000000000000000001000000:0009 06 0\n",
    b"established  127.0.0.1:36986  127.0.0.1:12345  0  0  on 0.2s (1)  1/py\n",
    b"Proto Recv-Q Send-Q Local Address           Foreign Address         State\n",
]
WORDS = [
    *(b"::", b"::ffff:", b"%", b"[", b"]", b":", b"*", b"->", b"#", b" #", b"(LISTEN)", b" TCP "),
    *(b"0.0.0.0:*", b"[::]:*", b":0", b":65535", b":65536", b"/", b"/0", b"/128", b"tcp ", b"udp "),
    *(b"IPv6", b"00000000:0000", b"FFFF0000", b"\xc2\xa0", b"\xd9\xa3", b"fe80::1%eth0"),
]


def read_lines(data: bytes) -> object:
    table = PairTable(pairs_in(cli._lines(io.BytesIO(data))))
    pairs = list(table)
    assert pairs == parse_pairs(data)
    assert parse_pairs("\n".join(map(str, pairs))) == pairs
    assert all(command.one_line(str(pair)).isprintable() for pair in pairs)
    return len(pairs)


@pytest.mark.python_only
def test_any_lines_are_pairs_or_name_the_wrong_one(fuzz: Fuzz) -> None:
    done = fuzz(read_lines, seeds=LINES, words=WORDS, refusals=(PairError,))
    assert done.accepted > 0 < done.refused


# ---- the command line ---------------------------------------------------------------------------

ARGUMENTS = [
    b"--local\n10.0.0.0/8:80-90\n--peer\n[fe80::%eth0]:443\n--not-peer=192.0.2.1\n--state\nestab",
    b"--peer=fe80::%eth0/10\n--local=%eth0:80\n--idle=5m\n--uid\n0\n--pid=1\n--netns=pid:1",
    b"127.0.0.1:36986\n127.0.0.1:12345\n--watch\n1s\n-q\n--json\n-4\n--listeners",
    b"--state=time-wait,fin-wait-1\n--not-local\n:1-65535\n--netns\n/proc/1/ns/net\n--dry-run",
    b"ESTAB 0 0 127.0.0.1:36986 127.0.0.1:12345\n--until-empty\n-6\n--list",
]
PARSER = cli._parser()
SOCKETS = Diag(
    handle=Kernel(
        row("established", "127.0.0.1", 36986, "127.0.0.1", 12345),
        row("time-wait", "fe80::1", 80, "fe80::2", 443, inode=0),
        row("listen", "::", 80, "::", 0),
    )
).find(Filter(), listeners=True)
INDICES = {"eth0": 3}


def read_arguments(data: bytes) -> object:
    words = as_name(data.replace(b"\0", b"")).split("\n")
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        flags = vars(PARSER.parse_args(words))
    given, families = flags.pop("pairs"), {flags.pop("v4"), flags.pop("v6")} - {0}
    wanted = cli._filter(cli._config(flags), families)
    cli._pairs_of_words(given)
    assert isinstance(wanted.narrows, bool)
    assert 0 <= wanted.mask(True) < 1 << 13
    return tuple(wanted.matches(one, INDICES.get) for one in SOCKETS)


@pytest.mark.python_only
def test_any_arguments_are_a_filter_or_wrong_usage(fuzz: Fuzz) -> None:
    # argparse takes time by the square of the number of arguments, which are the caller's own.
    done = fuzz(
        read_arguments,
        seeds=ARGUMENTS,
        words=[*WORDS, b"\n--"],
        refusals=(ValueError, SystemExit),
        most_bytes=2048,
    )
    assert done.accepted > 0 < done.refused
