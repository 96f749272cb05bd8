from __future__ import annotations

import copy
import ctypes
import errno
import fcntl
import json
import logging
import os
import pickle
import select
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kecho import ListenError, OptionError, ServerConfig
from kecho.server.sockets.listen import EVERY_QUEUE, Listener, open_listeners
from kecho.server.sockets.unix import SocketFile, _own
from kecho.system.directories import open_directory
from support.clients import DEADLINE_S, connect
from support.privileges import skip_unless_root

Open = Callable[..., list[Listener]]

# Set aside for documentation: RFC 5737, RFC 3849.
NOT_HERE_V4 = "203.0.113.7"
NOT_HERE_V6 = "2001:db8::7"
SO_ATTACH_REUSEPORT_CBPF = 51
BPF_RETURN = 0x06
TCPI_SACKED = 28  # of struct tcp_info; a listening socket has its backlog there


def _has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


needs_ipv6 = pytest.mark.skipif(not _has_ipv6(), reason="::1 is not an address of this host")


@pytest.fixture
def listen() -> Iterator[Open]:
    """listen(worker_count=2, **options of the server) -> listeners, closed in the end."""
    opened: list[Listener] = []

    def open_them(worker_count: int = 2, **options: object) -> list[Listener]:
        if "uds" not in options:
            options.setdefault("port", 0)
        listeners = open_listeners(ServerConfig.from_options(options), worker_count)
        opened.extend(listeners)
        return listeners

    yield open_them
    for listener in opened:
        listener.close()


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """names(somewhere=[address, ...]): what a host name stands for."""
    real = socket.getaddrinfo

    def stand_for(**addresses: list[str]) -> None:
        def resolve(host: str, *arguments: object, **options: object) -> list[object]:
            return [
                found
                for address in addresses.get(host, [host])
                for found in real(address, *arguments, **options)  # type: ignore[arg-type]
            ]

        monkeypatch.setattr(socket, "getaddrinfo", resolve)

    return stand_for


def port_of(listener: Listener) -> int:
    return int(listener.address[1])


def hosts_of(listeners: list[Listener]) -> list[str]:
    return [str(listener.address[0]) for listener in listeners]


def accept(listener: Listener) -> socket.socket:
    """Accepts the client that has connected, or is about to have."""
    assert select.select([listener.socket], [], [], DEADLINE_S)[0], "nobody came"
    return listener.socket.accept()[0]


def assert_serves(listener: Listener) -> None:
    address = listener.address
    client = connect(address if isinstance(address, str) else port_of(listener))
    with client, accept(listener) as accepted:
        accepted.sendall(b"here")
        assert client.recv(4) == b"here"


# ---- TCP --------------------------------------------------------------------------------------


def test_shared_has_one_socket_for_an_address(listen: Open) -> None:
    (listener,) = listen(4, dispatch="shared")
    assert listener.queue == 0
    assert_serves(listener)


def test_percpu_has_a_socket_for_each_worker_on_the_same_port(listen: Open) -> None:
    listeners = listen(4, dispatch="percpu")
    assert [listener.queue for listener in listeners] == [0, 1, 2, 3]
    assert len({listener.address for listener in listeners}) == 1


def test_percpu_sockets_stand_in_the_kernels_group_in_worker_order(listen: Open) -> None:
    listeners = listen(4, dispatch="percpu")
    for chosen in (2, 0, 3, 1):
        # A program that picks the socket of this index, whoever comes.
        program = ctypes.create_string_buffer(struct.pack("=HBBI", BPF_RETURN, 0, 0, chosen))
        listeners[0].socket.setsockopt(
            socket.SOL_SOCKET,
            SO_ATTACH_REUSEPORT_CBPF,
            struct.pack("@HP", 1, ctypes.addressof(program)),
        )
        with connect(port_of(listeners[0])):
            accept(listeners[chosen]).close()
        assert not select.select([listener.socket for listener in listeners], [], [], 0)[0]


def test_listeners_are_non_blocking_and_not_inherited(
    listen: Open, dispatch: str, tmp_path: Path
) -> None:
    for listener in listen(dispatch=dispatch, port=0, uds=tmp_path / "socket"):
        assert not listener.socket.getblocking()
        assert not listener.socket.get_inheritable()


def test_accepted_connections_have_no_nagle_and_urgent_bytes_inline(
    listen: Open, dispatch: str
) -> None:
    for listener in listen(1, dispatch=dispatch):
        with connect(port_of(listener)), accept(listener) as accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE)


@pytest.mark.parametrize("backlog", [0, 7])
def test_every_socket_has_the_backlog(listen: Open, dispatch: str, backlog: int) -> None:
    for listener in listen(dispatch=dispatch, backlog=backlog):
        info = listener.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
        assert struct.unpack_from("=I", info, TCPI_SACKED)[0] == backlog


def test_two_addresses_share_the_port_that_was_free(listen: Open, dispatch: str) -> None:
    listeners = listen(2, dispatch=dispatch, host=("127.0.0.1", "127.0.0.2"))
    each = 2 if dispatch == "percpu" else 1
    assert hosts_of(listeners) == ["127.0.0.1"] * each + ["127.0.0.2"] * each
    assert len({port_of(listener) for listener in listeners}) == 1
    assert [listener.queue for listener in listeners] == [*range(each)] * 2


def test_address_given_twice_is_listened_on_once(listen: Open) -> None:
    assert hosts_of(listen(host=("127.0.0.1", "127.0.0.1"))) == ["127.0.0.1"]


@needs_ipv6
def test_wildcards_of_both_families_are_served_side_by_side(listen: Open, dispatch: str) -> None:
    listeners = listen(1, dispatch=dispatch, host=("::", "0.0.0.0"))
    assert hosts_of(listeners) == ["::", "0.0.0.0"]
    for listener, host in zip(listeners, ("::1", "127.0.0.1"), strict=True):
        with socket.create_connection((host, port_of(listener)), timeout=DEADLINE_S):
            accept(listener).close()


@pytest.mark.parametrize("reuse_port", [False, True])
def test_port_of_a_plain_listener_is_refused(listen: Open, dispatch: str, reuse_port: bool) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ListenError, match=f"^port: .*:{port} is in use") as refused:
            listen(dispatch=dispatch, port=port, reuse_port=reuse_port)
    assert refused.value.errno == errno.EADDRINUSE
    assert refused.value.option == "port"


@pytest.mark.parametrize("other", ["shared", "percpu"])
def test_port_of_another_server_is_refused(listen: Open, dispatch: str, other: str) -> None:
    first = listen(dispatch=other)
    with pytest.raises(ListenError, match=r"^port: .*in use"):
        listen(dispatch=dispatch, port=port_of(first[0]))


def test_port_of_a_server_that_shares_is_refused_to_one_that_does_not(
    listen: Open, dispatch: str
) -> None:
    first = listen(dispatch=dispatch, reuse_port=True)
    with pytest.raises(ListenError, match=r"^port: .*in use"):
        listen(dispatch=dispatch, port=port_of(first[0]))


def test_servers_that_share_listen_on_the_same_port(listen: Open, dispatch: str) -> None:
    first = listen(dispatch=dispatch, reuse_port=True)
    second = listen(dispatch=dispatch, reuse_port=True, port=port_of(first[0]))
    assert {one.address for one in first} == {one.address for one in second}


def test_port_is_free_again_after_close(listen: Open, dispatch: str) -> None:
    first = listen(dispatch=dispatch)
    port = port_of(first[0])
    for listener in first:
        listener.close()
    assert port_of(listen(dispatch=dispatch, port=port)[0]) == port


def test_nothing_is_left_after_a_refusal_at_the_third_address(
    listen: Open, dispatch: str, tmp_path: Path
) -> None:
    path = tmp_path / "socket"
    hosts = ("127.0.0.1", "127.0.0.2", "127.0.0.3")
    with socket.create_server((hosts[2], 0)) as taken:
        port = taken.getsockname()[1]
        before = os.listdir("/proc/self/fd")
        with pytest.raises(ListenError, match=f"^port: {hosts[2]}:{port} is in use"):
            listen(3, dispatch=dispatch, host=hosts, port=port, uds=path)
        assert os.listdir("/proc/self/fd") == before
        assert not os.path.lexists(path)
        for host in hosts[:2]:
            # With SO_REUSEADDR: a connection of another test may be in TIME_WAIT on this port.
            socket.create_server((host, port)).close()


WITHOUT_DESCRIPTORS = """
import os, resource, sys
from kecho import ListenError, ServerConfig
from kecho.server.sockets.listen import open_listeners
before = os.listdir("/proc/self/fd")
most = max(map(int, before)) + 5  # the one that listed them is free again
resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
try:
    open_listeners(ServerConfig(port=0, uds=sys.argv[1], dispatch=sys.argv[2]), 4)
except ListenError as error:
    print(error.option, error.errno)
print(before == os.listdir("/proc/self/fd"), os.path.lexists(sys.argv[1]))
"""


def test_nothing_is_left_when_descriptors_run_out_within_a_group(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WITHOUT_DESCRIPTORS, str(tmp_path / "socket"), "percpu"]
    child = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    assert child.stdout.splitlines() == [f"port {errno.EMFILE}", "True False"]


# ---- names and addresses ----------------------------------------------------------------------


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("missing", [NOT_HERE_V4, NOT_HERE_V6])
def test_name_is_served_where_its_addresses_are_of_this_host(
    listen: Open, names: Callable[..., None], dispatch: str, missing: str, order: int
) -> None:
    names(somewhere=[missing, "127.0.0.1"][::order])
    listeners = listen(dispatch=dispatch, host="somewhere")
    assert set(hosts_of(listeners)) == {"127.0.0.1"}


def test_name_with_two_addresses_of_this_host_is_served_on_both(
    listen: Open, names: Callable[..., None]
) -> None:
    names(somewhere=["127.0.0.1", NOT_HERE_V4, "127.0.0.2"])
    listeners = listen(host="somewhere")
    assert hosts_of(listeners) == ["127.0.0.1", "127.0.0.2"]
    assert port_of(listeners[0]) == port_of(listeners[1])


def test_name_without_an_address_of_this_host_is_refused(
    listen: Open, names: Callable[..., None], dispatch: str, tmp_path: Path
) -> None:
    names(somewhere=[NOT_HERE_V4, NOT_HERE_V6])
    with pytest.raises(ListenError, match=f"^host: {NOT_HERE_V4}.* not an address of this host"):
        listen(dispatch=dispatch, host=("127.0.0.1", "somewhere"), uds=tmp_path / "socket")
    assert not os.path.lexists(tmp_path / "socket")


def test_address_of_another_host_is_refused_also_beside_one_of_this(
    listen: Open, dispatch: str
) -> None:
    with pytest.raises(ListenError, match=f"^host: {NOT_HERE_V4}") as refused:
        listen(dispatch=dispatch, host=("127.0.0.1", NOT_HERE_V4))
    assert refused.value.errno == errno.EADDRNOTAVAIL
    assert refused.value.option == "host"


def test_first_of_several_unusable_addresses_is_named(listen: Open) -> None:
    with pytest.raises(ListenError, match=r"^host: 203\.0\.113\.1:"):
        listen(host=[f"203.0.113.{last}" for last in range(1, 9)])


@pytest.mark.parametrize("hosts", [("127.0.0.1", "somewhere"), ("somewhere", "127.0.0.1")])
def test_name_beside_its_one_address_of_this_host_is_served(
    listen: Open, names: Callable[..., None], hosts: tuple[str, str]
) -> None:
    names(somewhere=[NOT_HERE_V6, "127.0.0.1"])
    assert hosts_of(listen(host=hosts)) == ["127.0.0.1"]


def test_port_in_use_is_refused_though_the_name_has_other_addresses(
    listen: Open, names: Callable[..., None]
) -> None:
    names(somewhere=["127.0.0.1", "127.0.0.2"])
    with (
        socket.create_server(("127.0.0.2", 0)) as taken,
        pytest.raises(ListenError, match=r"^port: 127\.0\.0\.2:"),
    ):
        listen(host="somewhere", port=taken.getsockname()[1])


@pytest.mark.parametrize("host", ["x" * 64 + ".test", "fe80::1%no-such-link", "a..b", "\udcff"])
def test_host_that_cannot_be_resolved_is_refused(listen: Open, host: str) -> None:
    with pytest.raises(ListenError, match=r"^host: .*cannot be resolved") as refused:
        listen(host=("127.0.0.1", host))
    assert refused.value.option == "host"


def test_address_of_a_name_that_is_not_there_is_left_out_with_a_line(
    listen: Open, names: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "kecho")
    names(somewhere=["192.0.2.1", "127.0.0.1"])
    assert hosts_of(listen(host="somewhere")) == ["127.0.0.1"]
    (line,) = caplog.records
    assert line.levelno == logging.WARNING
    assert "somewhere: 192.0.2.1:0 is not an address of this host; left out" in line.getMessage()


def test_error_number_of_the_resolver_is_kept(
    listen: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    with pytest.raises(ListenError, match=r"^host: 'nobody' .*not known") as refused:
        listen(host="nobody")
    assert refused.value.errno == socket.EAI_NONAME


def test_listen_error_survives_pickle_and_copy() -> None:
    error = ListenError("port", errno.EADDRINUSE, "127.0.0.1:1 is in use")
    assert isinstance(error, OSError)
    for twin in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):
        assert type(twin) is ListenError
        assert (twin.option, twin.errno, twin.reason) == (error.option, error.errno, error.reason)
        assert str(twin) == str(error) == "port: 127.0.0.1:1 is in use"


# ---- Unix sockets -----------------------------------------------------------------------------


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "socket")


def bind_unix(path: str, kind: socket.SocketKind = socket.SOCK_STREAM) -> socket.socket:
    one = socket.socket(socket.AF_UNIX, kind)
    one.bind(path)
    return one


def snapshot(path: str) -> tuple[object, ...]:
    """What the file is, so that it can be told whether somebody touched it."""
    found = os.lstat(path)
    is_link = os.path.islink(path)
    content = Path(path).read_bytes() if os.path.isfile(path) and not is_link else None
    return found.st_ino, found.st_mode, found.st_ctime_ns, is_link and os.readlink(path), content


def assert_refused(listen: Open, path: str, pattern: str) -> ListenError:
    """That listening there is refused with such a reason, and the file is left as it is."""
    before = snapshot(path)
    with pytest.raises(ListenError, match=f"^uds: .*{pattern}") as refused:
        listen(uds=path)
    assert refused.value.option == "uds"
    assert snapshot(path) == before
    return refused.value


def test_unix_socket_is_for_every_worker(listen: Open, path: str, dispatch: str) -> None:
    (listener,) = listen(4, uds=path, dispatch=dispatch)
    assert listener.is_unix
    assert listener.queue == EVERY_QUEUE
    assert listener.address == path
    assert_serves(listener)


def test_unix_socket_and_tcp_are_served_together(listen: Open, path: str) -> None:
    unix, tcp = listen(uds=path, port=0)
    assert (unix.is_unix, tcp.is_unix) == (True, False)
    assert_serves(unix)
    assert_serves(tcp)


def test_stale_socket_file_is_replaced(listen: Open, path: str) -> None:
    bind_unix(path).close()
    (listener,) = listen(uds=path)
    assert_serves(listener)


@pytest.mark.parametrize("is_stale", [False, True])
def test_one_of_several_servers_gets_the_file(path: str, is_stale: bool) -> None:
    for _ in range(10):
        if is_stale:
            bind_unix(path).close()
        outcomes: list[list[Listener] | BaseException] = []
        together = threading.Barrier(4)

        def start(
            outcomes: list[object] = outcomes, together: threading.Barrier = together
        ) -> None:
            together.wait(DEADLINE_S)
            try:
                outcomes.append(open_listeners(ServerConfig.from_options({"uds": path}), 1))
            except BaseException as error:
                outcomes.append(error)

        threads = [threading.Thread(target=start) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(DEADLINE_S)
        winners = [outcome for outcome in outcomes if isinstance(outcome, list)]
        assert len(winners) == 1
        assert [type(one) for one in outcomes if one not in winners] == [ListenError] * 3
        (listener,) = winners[0]
        client = connect(path)
        client.close()
        listener.close()
        assert not os.path.lexists(path)


def test_directory_that_somebody_has_locked_is_used_all_the_same(listen: Open, path: str) -> None:
    bind_unix(path).close()
    directory = os.open(os.path.dirname(path), os.O_RDONLY)
    try:
        fcntl.flock(directory, fcntl.LOCK_EX)
        (listener,) = listen(uds=path)
    finally:
        os.close(directory)
    assert_serves(listener)


def test_file_of_a_server_that_listens_is_refused(listen: Open, path: str) -> None:
    (listener,) = listen(uds=path)
    error = assert_refused(listen, path, "in use")
    assert error.errno == errno.EADDRINUSE
    assert_serves(listener)


def test_file_of_a_server_whose_backlog_is_full_is_refused(listen: Open, path: str) -> None:
    listen(uds=path, backlog=0)
    with connect(path), socket.socket(socket.AF_UNIX) as turned_away:
        turned_away.setblocking(False)
        assert turned_away.connect_ex(path) == errno.EAGAIN
        assert_refused(listen, path, "in use")


def test_file_of_a_datagram_socket_in_use_is_refused(listen: Open, path: str) -> None:
    with bind_unix(path, socket.SOCK_DGRAM):
        assert_refused(listen, path, "in use")


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_SEQPACKET])
def test_file_of_a_socket_that_does_not_listen_yet_is_refused(
    listen: Open, path: str, kind: socket.SocketKind
) -> None:
    with bind_unix(path, kind):
        assert_refused(listen, path, "in use")
    (listener,) = listen(uds=path)
    assert_serves(listener)


def test_nobody_is_disturbed_by_the_question_whether_a_file_is_in_use(
    listen: Open, path: str
) -> None:
    (listener,) = listen(uds=path)
    assert_refused(listen, path, "in use")
    with pytest.raises(BlockingIOError):
        listener.socket.accept()


@pytest.mark.parametrize("kind", ["file", "hard link"])
def test_what_has_been_put_in_the_files_place_gets_no_owner(tmp_path: Path, kind: str) -> None:
    if kind == "file":
        (tmp_path / "s").touch()
    else:
        bind_unix(str(tmp_path / "other")).close()
        (tmp_path / "s").hardlink_to(tmp_path / "other")
    file = SocketFile(open_directory(str(tmp_path)), "s")
    try:
        with pytest.raises(ListenError, match="replaced by another process"):
            _own(file, None, "0")
    finally:
        file.forget()


def test_file_that_is_not_a_socket_is_refused(listen: Open, path: str) -> None:
    Path(path).write_text("precious")
    assert_refused(listen, path, "not a socket")


def test_fifo_is_refused(listen: Open, path: str) -> None:
    os.mkfifo(path)
    assert_refused(listen, path, "not a socket")


def test_directory_is_refused(listen: Open, path: str) -> None:
    os.mkdir(path)
    assert_refused(listen, path, "not a socket")


def test_symlink_to_a_stale_socket_is_refused(listen: Open, path: str) -> None:
    bind_unix(path).close()
    os.symlink(path, path + ".link")
    before = snapshot(path)
    assert_refused(listen, path + ".link", "not a socket")
    assert snapshot(path) == before


def test_symlink_to_a_socket_in_use_is_refused(listen: Open, path: str) -> None:
    (listener,) = listen(uds=path)
    os.symlink(path, path + ".link")
    assert_refused(listen, path + ".link", "not a socket")
    assert_serves(listener)


def test_dangling_symlink_is_refused(listen: Open, path: str) -> None:
    os.symlink(path + ".nowhere", path)
    assert_refused(listen, path, "not a socket")
    assert not os.path.lexists(path + ".nowhere")


def test_missing_directory_is_refused(listen: Open, tmp_path: Path) -> None:
    with pytest.raises(ListenError, match=r"^uds: .*No such file") as refused:
        listen(uds=tmp_path / "missing/socket")
    assert refused.value.errno == errno.ENOENT
    assert not (tmp_path / "missing").exists()


def test_file_in_the_place_of_a_directory_is_refused(listen: Open, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ListenError, match=r"^uds: ") as refused:
        listen(uds=tmp_path / "file/socket")
    assert refused.value.errno == errno.ENOTDIR


def test_file_is_removed_when_closed(listen: Open, path: str) -> None:
    (listener,) = listen(uds=path)
    listener.close()
    assert not os.path.lexists(path)


def test_file_that_is_gone_when_closed_is_no_error(listen: Open, path: str) -> None:
    (listener,) = listen(uds=path)
    os.unlink(path)
    listener.close()


@pytest.mark.parametrize("replacement", ["socket", "file", "symlink"])
def test_file_that_somebody_replaced_is_left_alone(
    listen: Open, path: str, replacement: str
) -> None:
    (listener,) = listen(uds=path)
    os.rename(path, path + ".old")
    if replacement == "socket":
        bind_unix(path).close()
    elif replacement == "file":
        Path(path).touch()
    else:
        os.symlink(path + ".old", path)
    before = snapshot(path)
    listener.close()
    assert snapshot(path) == before


def test_replacing_server_keeps_its_file_when_the_first_one_ends(listen: Open, path: str) -> None:
    (first,) = listen(uds=path)
    os.unlink(path)
    (second,) = listen(uds=path)
    first.close()
    assert_serves(second)


def test_relative_path_is_removed_after_a_change_of_directory(
    listen: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(tmp_path)
    (listener,) = listen(uds="socket")
    assert listener.address == "socket"
    monkeypatch.chdir(elsewhere)
    bind_unix("socket").close()
    listener.close()
    assert not os.path.lexists(tmp_path / "socket")
    assert os.path.lexists(elsewhere / "socket")


@pytest.mark.parametrize("name", ["a" * 107, "ü" * 53, "\udcff\udc80", "line\nbreak", " "])
def test_path_of_odd_or_many_bytes_works(
    listen: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)  # so that the path is the name, and not a byte longer
    (listener,) = listen(uds=name)
    assert listener.address == name
    assert os.listdir() == [name]
    assert_serves(listener)
    listener.close()
    assert os.listdir() == []


def test_path_of_108_bytes_is_refused(
    listen: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OptionError, match=r"^uds: must have at most 107 bytes.*got 108"):
        listen(uds="a" * 108)
    assert os.listdir() == []


# ---- as an ordinary user ----------------------------------------------------------------------

LISTEN_AS_NOBODY = """
import json, os, sys
from kecho import ListenError, ServerConfig
from kecho.server.sockets.listen import open_listeners
"".encode("idna")  # loaded when first used, which Python's directory may not allow to nobody
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
try:
    open_listeners(ServerConfig.from_options(json.loads(sys.argv[1])), 2)
except ListenError as error:
    print(json.dumps([error.option, error.errno, error.reason]))
"""


def refusal_to_nobody(**options: object) -> tuple[str, int, str]:
    command = [sys.executable, "-c", LISTEN_AS_NOBODY, json.dumps(options)]
    child = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert child.returncode == 0, child.stderr
    option, number, reason = json.loads(child.stdout or '[null, null, "it was not refused"]')
    return option, number, reason


@pytest.fixture
def public_directory() -> Iterator[Path]:
    """A directory that everybody may look into, which pytest's are not."""
    skip_unless_root()
    directory = Path(tempfile.mkdtemp(prefix="kecho-test-"))
    directory.chmod(0o755)
    yield directory
    shutil.rmtree(directory)


@pytest.mark.privileged
def test_directory_without_write_permission_is_refused(public_directory: Path) -> None:
    option, number, reason = refusal_to_nobody(uds=str(public_directory / "socket"))
    assert (option, number) == ("uds", errno.EACCES)
    assert "ermission" in reason


@pytest.mark.privileged
@pytest.mark.parametrize("mode", [0o600, 0o666])
def test_stale_file_of_another_user_is_refused_and_left(public_directory: Path, mode: int) -> None:
    path = str(public_directory / "socket")
    public_directory.chmod(0o1777)
    bind_unix(path).close()
    os.chmod(path, mode)
    before = snapshot(path)
    option, number, _ = refusal_to_nobody(uds=path)
    assert option == "uds"
    assert number in (errno.EACCES, errno.EPERM, errno.EADDRINUSE)
    assert snapshot(path) == before


@pytest.mark.privileged
@pytest.mark.parametrize("mode", [0o600, 0o666])
def test_file_in_use_by_another_user_is_refused_and_left(
    listen: Open, public_directory: Path, mode: int
) -> None:
    path = str(public_directory / "socket")
    public_directory.chmod(0o777)
    listen(uds=path)
    os.chmod(path, mode)
    before = snapshot(path)
    option, number, _ = refusal_to_nobody(uds=path)
    assert (option, number) == ("uds", errno.EADDRINUSE)
    assert snapshot(path) == before


@pytest.mark.privileged
@pytest.mark.usefixtures("public_directory")
def test_low_port_is_refused_to_an_ordinary_user(dispatch: str) -> None:
    lowest = int(Path("/proc/sys/net/ipv4/ip_unprivileged_port_start").read_text())
    if lowest <= 1:
        pytest.skip("every port is open to everybody here: ip_unprivileged_port_start")
    option, number, reason = refusal_to_nobody(port=1, dispatch=dispatch)
    assert (option, number) == ("port", errno.EACCES)
    assert "CAP_NET_BIND_SERVICE" in reason
