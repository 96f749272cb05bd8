"""The dropper and network devices: a name is bytes, may look like an index, and may be gone."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from kecho import drop
from kecho.drop import Result
from support.clients import DEADLINE_S
from support.connections_to_drop import Ends, assert_alive, pair_of, run_drop, started
from support.namespaces import Namespace

pytestmark = pytest.mark.privileged

LOCAL, PEER = ("10.5.0.1", 40001), ("10.5.0.2", 7001)
IPV6_LOCAL, IPV6_PEER = ("fe80::5:1", 40001), ("fe80::5:2", 7001)
ODD_NAMES = ["5", "if5", "a#b", "#", "a]b", "[]", "höß€", "\udcff\udcfe", "a\x1b[7m"]


def add_device(namespace: Namespace, name: str, index: int) -> None:
    """One that nobody answers on: what connects over it stays half-open."""
    other = ("type", "veth", "peer", "name", f"peer{index}")
    namespace.run("ip", "link", "add", "name", name, "index", str(index), *other)
    namespace.run("ip", "address", "add", "10.5.0.1/24", "dev", name)
    namespace.run("ip", "link", "set", "dev", name, "arp", "off", "up")
    namespace.run("ip", "address", "add", "fe80::5:1/64", "dev", name, "nodad")


def connect_over(stack: ExitStack, name: str, *, is_v6: bool = False) -> socket.socket:
    one = stack.enter_context(socket.socket(socket.AF_INET6 if is_v6 else socket.AF_INET))
    one.setblocking(False)
    one.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, os.fsencode(name))
    one.bind(IPV6_LOCAL if is_v6 else LOCAL)
    one.connect_ex(IPV6_PEER if is_v6 else PEER)
    return one


def cookie(one: socket.socket) -> int:
    so_cookie = 57  # <asm-generic/socket.h>
    return struct.unpack("=Q", one.getsockopt(socket.SOL_SOCKET, so_cookie, 8))[0]


def left() -> set[int]:
    return {one.cookie for one in drop.find(states=["syn-sent"])}


def text_over(name: str) -> str:
    return f"10.5.0.1%{name}:40001 10.5.0.2:7001"


def test_device_named_like_the_index_of_another_is_meant_by_its_name(
    inside: Namespace, stack: ExitStack
) -> None:
    add_device(inside, "5", 3)
    add_device(inside, "y0", 5)
    named, other = connect_over(stack, "5"), connect_over(stack, "y0")
    finished = run_drop(*text_over("5").split())
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout == f"dropped    {text_over('5')}  syn-sent\n"
    assert left() == {cookie(other)}
    assert cookie(named) not in left()


def test_kernel_is_not_asked_for_a_device_by_a_name_that_a_line_has_chosen(
    inside: Namespace, stack: ExitStack, tmp_path: Path
) -> None:
    """It would look for a module of that name: dev_load() in net/core/dev_ioctl.c."""
    if shutil.which("strace") is None:
        pytest.skip("needs strace")
    add_device(inside, "x0", 3)
    connect_over(stack, "x0")
    trace = tmp_path / "trace"
    before = ("strace", "-f", "-e", "trace=ioctl", "-o", str(trace))
    finished = run_drop(*text_over("sctp").split(), before=before)
    assert finished.stdout == f"gone       {text_over('sctp')}  (no such socket)\n"
    assert "SIOCGIFNAME" in trace.read_text()
    assert "SIOCGIFINDEX" not in trace.read_text()


@pytest.mark.parametrize("text", ["5", "if5"])
def test_index_is_meant_where_no_device_has_that_name(
    inside: Namespace, stack: ExitStack, text: str
) -> None:
    add_device(inside, "x0", 3)
    add_device(inside, "y0", 5)
    other = connect_over(stack, "x0")
    connect_over(stack, "y0")
    assert run_drop(*text_over(text).split()).returncode == 0
    assert left() == {cookie(other)}


def test_socket_whose_device_is_gone_is_dropped_by_what_is_printed_for_it(
    inside: Namespace, stack: ExitStack
) -> None:
    for name, index in (("x0", 3), ("y0", 5)):
        add_device(inside, name, index)
    gone, other = connect_over(stack, "x0"), connect_over(stack, "y0")
    inside.run("ip", "link", "delete", "x0")
    assert left() == {cookie(gone), cookie(other)}
    (found,) = drop.find([text_over("if3")])
    assert (found.interface, found.interface_index) == ("if3", 3)
    assert text_over("if3").split() in [
        line.split()[1:3] for line in run_drop("--list", "--state", "syn-sent").stdout.split("\n")
    ]
    assert run_drop(text=str(found.pair)).returncode == 0
    assert left() == {cookie(other)}


@pytest.mark.parametrize("is_v6", [False, True], ids=["IPv4", "IPv6"])
@pytest.mark.parametrize("name", ODD_NAMES, ids=ascii)
def test_line_of_ss_is_dropped_whatever_the_device_is_called(
    inside: Namespace, stack: ExitStack, name: str, is_v6: bool
) -> None:
    if shutil.which("ss") is None:
        pytest.skip("needs ss, which iproute2 has")
    add_device(inside, name, 4)
    add_device(inside, "other", 5)
    connect_over(stack, name, is_v6=is_v6)
    other = connect_over(stack, "other", is_v6=is_v6)
    for one in drop.find(states=["syn-sent"]):
        assert drop.parse_pairs(str(one.pair)) == [one.pair]
    raw = os.fsencode(name)
    with inside:
        asked = ("ss", "-tnH", "state", "syn-sent")
        shown = subprocess.run(asked, capture_output=True, timeout=DEADLINE_S, check=True).stdout
    (line,) = (one for one in shown.split(b"\n") if b"%" + raw + b":" in one)
    pair = os.fsdecode(b" ".join(line.split()[2:4]))
    assert run_drop("--dry-run", *pair.split(" ")).returncode == 0
    finished = run_drop(text=pair)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.removesuffix("\n").isprintable()
    assert left() == {cookie(other)}


def test_device_made_anew_under_a_name_is_looked_up_anew(
    inside: Namespace, stack: ExitStack
) -> None:
    with drop.Diag() as diag:
        for index in (3, 4):
            add_device(inside, "x0", index)
            one = connect_over(stack, "x0")
            (found,) = diag.find(drop.filters.Filter(), pairs=drop.parse_pairs(text_over("x0")))
            assert (found.interface_index, found.cookie) == (index, cookie(one))
            ((outcome,),) = diag.drop_pairs([found.pair], drop.filters.Filter())
            assert outcome.result is Result.DROPPED
            inside.run("ip", "link", "delete", "x0")


def test_filter_by_device_is_by_its_name_first(inside: Namespace, stack: ExitStack) -> None:
    for name, index in (("5", 3), ("höß€", 5)):
        add_device(inside, name, index)
    first, second = connect_over(stack, "5"), connect_over(stack, "höß€")
    narrowed = run_drop("--local", "10.5.0.0/24", "--not-local", "%5", "--dry-run")
    assert narrowed.stdout.count("would drop") == 1
    assert "höß€" in narrowed.stdout
    for text, left_over in (("10.5.0.1%5:40001", {cookie(second)}), ("%höß€", set[int]())):
        finished = run_drop("--local", text)
        assert finished.returncode == 0, finished.stderr
        assert left() == left_over
    assert cookie(first) not in left()


@pytest.mark.parametrize("out", ["--not-local", "--not-peer"])
@pytest.mark.parametrize("more", [[], ["--list"], ["--json"], ["--watch", "600"]], ids=" ".join)
def test_device_to_leave_out_that_is_not_there_is_refused_before_a_look(
    inside: Namespace, stack: ExitStack, out: str, more: list[str]
) -> None:
    connection = Ends("127.0.0.1", stack).connect()
    for asked in (["--state", "established"], pair_of(connection[0]).split()):
        for text in ("%eht0", "127.0.0.1%eht0:1"):
            finished = run_drop(*asked, out, "%lo", out, text, *more)
            assert (finished.returncode, finished.stdout) == (2, "")
            assert finished.stderr == (
                "kecho.drop: error: --not-local, --not-peer: there is no device 'eht0',"
                " so that nothing would be left out\n"
            )
    assert_alive(connection)
    with pytest.raises(ValueError, match="no device 'eht0'"):
        drop.find(**{out[2:].replace("-", "_"): ["%eht0"]})


def test_watch_drops_nothing_while_a_device_to_leave_out_is_not_there(
    inside: Namespace, stack: ExitStack
) -> None:
    add_device(inside, "x0", 3)
    ends = Ends("127.0.0.1", stack)
    ends.connect()
    asked = ("--state", "established", "--not-local", "%x0", "--watch", "0.02")
    with started(*asked) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline().startswith("dropped")
        inside.run("ip", "link", "delete", "x0")
        assert "until it is there again" in process.stderr.readline()
        connection = ends.connect()
        assert_alive(connection)
        add_device(inside, "x0", 4)
        with pytest.raises(ConnectionError):
            connection[0].recv(1)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=DEADLINE_S)


def test_only_a_socket_that_is_bound_to_a_device_is_meant_by_it(
    inside: Namespace, stack: ExitStack
) -> None:
    ends = Ends("127.0.0.1", stack)
    ends.connect()  # over lo, as it happens
    for out in ("--not-local", "--not-peer"):
        assert run_drop("--list", "--state", "established", out, "%lo").stdout.count("\n") == 3
    said = " ".join(run_drop("--help").stdout.split())
    assert "the device that the socket is bound to; most sockets are bound to none" in said


def test_a_device_with_controls_in_its_name_is_listed_with_escapes(namespace: Namespace) -> None:
    name = "a\x1b]0;b\x07\u202e"
    namespace.run("ip", "link", "add", "name", name, "type", "veth", "peer", "name", "peer")
    with namespace, socket.socket() as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, name.encode())
        one.bind(("127.0.0.1", 0))
        one.listen()
        for more in ([], ["--json"]):
            listed = subprocess.run(
                [sys.executable, "-m", "kecho.drop", "--list", "--listeners", *more],
                capture_output=True,
                text=True,
                timeout=60,
            )
            assert not [x for x in listed.stdout if not x.isprintable() and x != "\n"]
            assert "a\\x1b]0;b\\x07" in listed.stdout or "a\\u001b]0;b\\u0007" in listed.stdout
