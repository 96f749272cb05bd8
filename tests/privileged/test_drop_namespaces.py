"""The dropper in another network namespace, by name, path or process; and without netlink."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest

from kecho import drop
from support.clients import DEADLINE_S, wait_for
from support.connections_to_drop import (
    Ends,
    as_ordinary_user,
    assert_alive,
    run_drop,
    run_injected,
    started,
)
from support.namespaces import Namespace

pytestmark = pytest.mark.privileged


@pytest.fixture
def ends(inside: Namespace, stack: ExitStack) -> Ends:
    return Ends("127.0.0.1", stack)


@pytest.fixture
def process(namespace: Namespace) -> Iterator[subprocess.Popen[bytes]]:
    """One that is in the namespace."""
    with namespace, subprocess.Popen(["cat"], stdin=subprocess.PIPE) as process:
        try:
            yield process
        finally:
            process.kill()


def add_name(namespace: Namespace, name: str, stack: ExitStack) -> None:
    """A name of ip-netns(8) for it."""
    pid = os.getpid()
    with namespace:
        attach = subprocess.run(
            ["ip", "netns", "attach", name, str(pid)], capture_output=True, text=True
        )
    if attach.returncode:
        pytest.skip(f"no named namespace can be made: {attach.stderr}")
    stack.callback(subprocess.run, ["ip", "netns", "delete", name], check=True)


@pytest.mark.parametrize("form", ["{}", "pid:{}", "/proc/{}/ns/net"])
def test_namespace_is_that_of_a_process_or_of_a_path(
    namespace: Namespace, process: subprocess.Popen[bytes], stack: ExitStack, form: str
) -> None:
    with namespace:
        client, _ = Ends("127.0.0.1", stack).connect()
    before = os.readlink("/proc/thread-self/ns/net")
    text = form.format(process.pid)
    (found,) = drop.find(netns=text, peer=[f":{client.getpeername()[1]}"])
    assert found.local_port == client.getsockname()[1]
    assert os.readlink("/proc/thread-self/ns/net") == before
    finished = run_drop("--netns", text, "--local", f":{found.local_port}")
    assert finished.returncode == 0, finished.stderr
    with pytest.raises(ConnectionAbortedError):
        client.recv(1)


def test_number_is_a_name_first_and_pid_forces_the_process(
    new_namespace: Callable[[], Namespace], process: subprocess.Popen[bytes], stack: ExitStack
) -> None:
    named = new_namespace()
    with named:
        by_name, _ = Ends("127.0.0.1", stack).connect()
        add_name(named, str(process.pid), stack)
    assert {one.local_port for one in drop.find(netns=str(process.pid))} == {
        by_name.getsockname()[1],
        by_name.getpeername()[1],
    }
    assert drop.find(netns=f"pid:{process.pid}") == []


def fifo(path: Path) -> None:
    os.mkfifo(path)


def unix_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(str(path))


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (Path.touch, "a file"),
        (Path.mkdir, "a directory"),
        (fifo, "a FIFO"),
        (unix_socket, "a socket"),
        (lambda path: path.symlink_to("/dev/null"), "a device"),
        (lambda path: path.symlink_to("/proc/self/ns/pid"), "a namespace of another kind"),
    ],
)
@pytest.mark.parametrize("is_named", [False, True], ids=["path", "name"])
def test_what_is_no_network_namespace_is_named_for_what_it_is(
    ends: Ends, stack: ExitStack, tmp_path: Path, make: Callable[[Path], None], kind: str,
    is_named: bool,
) -> None:  # fmt: skip
    name = f"kecho-test-{os.getpid()}"
    path = Path("/run/netns", name) if is_named else tmp_path / name
    if is_named and not path.parent.exists():
        pytest.skip("no named namespace has been made here")
    make(path)
    stack.callback(path.rmdir if kind == "a directory" else path.unlink)
    text = name if is_named else str(path)
    finished = run_drop("--netns", text, "--peer", ":1")
    assert finished.returncode == 2
    assert finished.stderr == (
        f"kecho.drop: error: --netns {text}: '{path}' is {kind}, not a network namespace\n"
    )


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("kecho-absent", "there is no network namespace 'kecho-absent' in /run/netns"),
        ("/kecho/absent", "there is no '/kecho/absent'"),
        ("/dev/null/x", "there is no '/dev/null/x'"),
        ("{pid}", "there is no network namespace '{pid}' in /run/netns, and there is no process"),
        ("pid:{pid}", "there is no process {pid}"),
    ],
)
def test_namespace_that_is_not_there_is_wrong_usage(text: str, reason: str) -> None:
    with subprocess.Popen(["true"]) as ended:
        ended.wait(DEADLINE_S)
    finished = run_drop("--netns", text.format(pid=ended.pid), "--peer", ":1")
    assert finished.returncode == 2
    assert reason.format(pid=ended.pid) in finished.stderr
    assert finished.stderr.count("\n") == 1


def test_namespace_that_may_not_be_entered_is_status_4(process: subprocess.Popen[bytes]) -> None:
    status, said = as_ordinary_user("--list", "--peer", ":1", "--netns", f"pid:{process.pid}")
    assert status == 4, said
    assert said.startswith(f"kecho.drop: error: --netns pid:{process.pid}: ")
    assert "use sudo" in said


@pytest.mark.parametrize("error", ["EAFNOSUPPORT", "EPERM", "EACCES"])
def test_netlink_that_a_sandbox_refuses_is_not_blamed_on_the_kernel(ends: Ends, error: str) -> None:
    connection = ends.connect()
    for form in ([], ["--list"]):
        finished = run_injected(f"socket:error={error}", *form, "--peer", f":{ends.port}")
        assert finished.returncode == 4
        assert "RestrictAddressFamilies=" in finished.stderr
        assert "CONFIG" not in finished.stderr
        assert "CAP_NET_ADMIN" not in finished.stderr
    assert_alive(connection)


def test_kernel_without_sock_diag_is_still_status_5(ends: Ends) -> None:
    finished = run_injected("socket:error=EPROTONOSUPPORT", "--list", "--peer", ":1")
    assert finished.returncode == 5
    assert "tcp_diag" in finished.stderr


# ---- --watch ------------------------------------------------------------------------------------


class Named:
    """A network namespace with a name, which can be deleted and made again."""

    def __init__(self, stack: ExitStack) -> None:
        self.name = f"kecho-test-{os.getpid()}"
        stack.callback(lambda: self._ip("netns", "delete", self.name, check=False))

    def _ip(self, *arguments: str, check: bool = True) -> None:
        subprocess.run(["ip", *arguments], check=check, capture_output=True, timeout=DEADLINE_S)

    def make(self, device: str) -> None:
        """device: one end of it is here, and goes when the namespace does."""
        try:
            self._ip("netns", "add", self.name)
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no named namespace can be made: {error.stderr!r}")
        self._ip("-n", self.name, "link", "set", "lo", "up")
        other = ("type", "veth", "peer", "name", "inside", "netns", self.name)
        self._ip("link", "add", "name", device, *other)

    def delete(self) -> None:
        self._ip("netns", "delete", self.name)

    def connect(self) -> None:
        """A connection in it, which is dropped before this returns."""
        namespace = Namespace.__new__(Namespace)
        namespace._outside, namespace.fd = [], os.open(f"/run/netns/{self.name}", os.O_RDONLY)
        try:
            with namespace, ExitStack() as stack:
                ends = Ends("127.0.0.1", stack)
                with pytest.raises(ConnectionError):  # of connect(2), where the look comes first
                    ends.connect()[0].recv(1)
        finally:
            namespace.close()


def test_watch_follows_a_name_and_keeps_no_namespace_alive(ends: Ends, stack: ExitStack) -> None:
    spared = ends.connect()
    named = Named(stack)
    named.make("kecho0")
    asked = ("--netns", named.name, "--watch", "0.02", "--state", "established")
    with started(*asked) as process:
        assert process.stderr is not None
        for count in range(3):
            named.connect()
            named.delete()
            assert "until it is there again" in process.stderr.readline()
            wait_for(partial(is_gone, f"kecho{count}"), "the namespace is gone")
            named.make(f"kecho{count + 1}")
        named.connect()
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0, said
    assert "Traceback" not in said
    assert_alive(spared)


def is_gone(device: str) -> bool:
    return device not in (name for _, name in socket.if_nameindex())


@pytest.mark.parametrize("form", ["{}", "pid:{}", "/proc/{}/ns/net"])
@pytest.mark.parametrize("is_reaped", [True, False], ids=["reaped", "zombie"])
def test_watch_of_a_process_that_has_ended_is_no_wrong_usage(
    process: subprocess.Popen[bytes], namespace: Namespace, stack: ExitStack, form: str,
    is_reaped: bool,
) -> None:  # fmt: skip
    with namespace:
        client, _ = Ends("127.0.0.1", stack).connect()
    asked = ("--netns", form.format(process.pid), "--watch", "0.02", "--state", "established")
    with started(*asked) as watch:
        with pytest.raises(ConnectionError):
            client.recv(1)
        process.kill()
        if is_reaped:
            process.wait(DEADLINE_S)
        _, said = watch.communicate(timeout=DEADLINE_S)
    ended = "the process has ended, or left the namespace"
    assert said.endswith(f" dropped\nkecho.drop: error: --netns {asked[1]}: {ended}\n")
    assert watch.returncode == 3


def test_watch_of_a_name_that_is_a_number_does_not_turn_to_a_process(
    ends: Ends, stack: ExitStack
) -> None:
    connection = ends.connect()
    named = Named(stack)
    named.name = str(os.getpid())  # which is here, in the namespace of the connection
    named.make("kecho0")
    asked = ("--netns", named.name, "--watch", "0.02", "--state", "established")
    with started(*asked) as process:
        named.connect()
        named.delete()
        assert process.stderr is not None
        assert "until it is there again" in process.stderr.readline()
        assert_alive(connection)
        named.make("kecho1")
        named.connect()
    assert_alive(connection)
