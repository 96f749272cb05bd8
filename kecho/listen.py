"""Listening sockets: names to addresses, one socket for each worker that wants its own, and the
Unix socket's file."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from .config import ServerConfig
from .errors import ListenError, naming
from .inherited import Recipe, adopt, recipe_of, set_unless_mptcp
from .names import look_up

__all__ = [
    "FREE_PORT_TRIES",
    "Address",
    "Listener",
    "SocketFile",
    "describe_addresses",
    "listen_again",
    "new_socket",
    "open_listeners",
    "why_refused",
]

Address = tuple[str, int] | tuple[str, int, int, int] | str
EVERY_QUEUE = -1
FREE_PORT_TRIES = 16
_ADDRESS_ERRORS = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT, errno.EINVAL)
_LOCK_TRIES = 100
_LOCK_RETRY_S = 0.01


def describe_addresses(addresses: tuple[Address, ...], protocol: str = "tcp") -> str:
    """As ``tcp 127.0.0.1:12345, tcp [::1]:12345, unix /run/kecho``."""
    return ", ".join(_describe_address(one, protocol) for one in addresses) or "(not started)"


def _describe_address(address: Address, protocol: str) -> str:
    if isinstance(address, str):
        return f"unix {address}"
    host = f"[{address[0]}]" if ":" in address[0] else address[0]
    return f"{protocol} {host}:{address[1]}"


class SocketFile:
    """The file of a Unix socket that this process has bound.

    Holds it open (O_PATH), so that its inode's number cannot go to somebody else's file, which
    remove() would then take for ours.
    """

    def __init__(self, path: str) -> None:
        self.path = os.path.abspath(path)
        self._fd = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)

    def is_in_place(self) -> bool:
        try:
            return os.path.samestat(os.fstat(self._fd), os.lstat(self.path))
        except OSError:
            return False

    def remove(self) -> None:
        if self.is_in_place():
            with suppress(OSError):
                os.unlink(self.path)
        self.forget()

    def forget(self) -> None:
        """Leaves the file where it is."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


@dataclass(frozen=True)
class Listener:
    """A listening socket, non-blocking.

    queue: index of the worker that accepts from it, or EVERY_QUEUE.
    file: the file to remove in the end, of a Unix socket.
    inherited: it was listening before, and others may have it, too; recipe: what it is like.
    """

    socket: socket.socket
    queue: int
    file: SocketFile | None = None
    inherited: bool = False
    recipe: Recipe | None = None

    @property
    def is_unix(self) -> bool:
        return self.socket.family == socket.AF_UNIX

    @property
    def address(self) -> Address:
        with naming("getsockname"):
            address: Address | bytes = self.socket.getsockname()
        if isinstance(address, bytes):  # abstract: a NUL, and any bytes
            return "@" + os.fsdecode(address[1:])
        return address

    def close(self) -> None:
        self.socket.close()
        if self.file is not None:
            self.file.remove()


def open_listeners(config: ServerConfig, worker_count: int) -> list[Listener]:
    """Opens every socket that `config` asks for. Raises ListenError; none is left open then.

    Under percpu, the `worker_count` sockets of one address stand in the list in the order of
    the workers, which is their order in the kernel's SO_REUSEPORT group.
    """
    opened: list[Listener] = []
    try:
        if config.fd:  # before any of our own could get such a number
            _adopt(config, worker_count, opened)
        if config.uds is not None:
            opened.append(_listen_unix(config.uds, config.backlog))
        if config.host:
            _open_tcp(config, worker_count, opened)
    except BaseException:
        for listener in opened:
            listener.close()
        raise
    return opened


def _adopt(config: ServerConfig, worker_count: int, opened: list[Listener]) -> None:
    """Inherited sockets. Those of one address are dealt out if there is one for each worker, as
    in a SO_REUSEPORT group; otherwise every worker accepts from each."""
    adopted: list[socket.socket] = []
    try:
        adopt(config.fd, adopted, _user_timeout_ms(config))
        addresses = [one.getsockname() for one in adopted]
        recipes = [recipe_of(one) for one in adopted]
    except BaseException:
        for one in adopted:
            one.close()
        raise
    dealt: Counter[object] = Counter()
    for one, address, recipe in zip(adopted, addresses, recipes, strict=True):
        enough = addresses.count(address) >= worker_count
        queue = dealt[address] % worker_count if enough else EVERY_QUEUE
        dealt[address] += 1
        opened.append(Listener(one, queue, inherited=True, recipe=recipe))


# ---- TCP ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Target:
    """One address to listen on."""

    family: int
    sockaddr: tuple[str, int] | tuple[str, int, int, int]

    def with_port(self, port: int) -> _Target:
        address = self.sockaddr
        return _Target(self.family, (address[0], port, *address[2:]))

    def __str__(self) -> str:
        host = f"[{self.sockaddr[0]}]" if self.family == socket.AF_INET6 else self.sockaddr[0]
        return f"{host}:{self.sockaddr[1]}"


def _open_tcp(config: ServerConfig, worker_count: int, opened: list[Listener]) -> None:
    targets = _resolve(config.host, config.port)
    for _ in range(FREE_PORT_TRIES):
        attempt: list[Listener] = []
        try:
            _listen_everywhere(config, targets, worker_count, attempt)
        except BaseException as error:
            for listener in attempt:
                listener.close()
            # A port that is free on one address may be taken on another: try the next one.
            if config.port == 0 and attempt and _is_in_use(error):
                continue
            raise
        opened.extend(attempt)
        return
    raise ListenError("port", errno.EADDRINUSE, "no port is free on all of the addresses")


def _is_in_use(error: BaseException) -> bool:
    return isinstance(error, ListenError) and error.errno == errno.EADDRINUSE


def _resolve(hosts: Sequence[str], port: int) -> dict[_Target, list[str]]:
    """The addresses, without repeats, and the names that stand for each."""
    targets: dict[_Target, list[str]] = {}
    for host in hosts:
        try:
            found = look_up(host, port, socket.AI_PASSIVE)
        except (OSError, UnicodeError) as error:
            number = error.errno if isinstance(error, OSError) else None
            reason = error.strerror if isinstance(error, OSError) else "not a name"
            raise ListenError("host", number, f"{host!r} cannot be resolved: {reason}") from None
        for family, _, _, _, sockaddr in found:
            if family in (socket.AF_INET, socket.AF_INET6):
                target = _Target(family, sockaddr)
                targets.setdefault(target, []).append(host)
    return targets


def listen_again(
    family: int,
    address: Address,
    config: ServerConfig,
    shares: bool,
    recipe: Recipe | None = None,
    spare: socket.socket | None = None,
) -> socket.socket:
    """A listener where one has been closed from outside. Raises OSError.

    shares: others of its SO_REUSEPORT group may still listen there. recipe: of an inherited one.
    spare: a new socket of this family, to make it of; closed when that fails.
    """
    assert not isinstance(address, str)
    sockets: list[socket.socket] = []
    try:
        _bind_tcp(config, _Target(family, address), shares, sockets, recipe, spare)
        sockets[0].listen(config.backlog if recipe is None else recipe.backlog)
    except OSError:
        for one in sockets:
            one.close()
        raise
    return sockets[0]


def _listen_everywhere(
    config: ServerConfig,
    targets: dict[_Target, list[str]],
    worker_count: int,
    opened: list[Listener],
) -> None:
    port = config.port
    # A name may stand for addresses that this host does not have (::1 without IPv6, say): one
    # of them is enough.
    served: set[str] = set()
    absent: dict[str, ListenError] = {}
    for target, hosts in targets.items():
        try:
            _listen_tcp(config, target.with_port(port), worker_count, opened)
        except ListenError as error:
            if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                raise
            absent |= {host: error for host in hosts if host not in absent}
            continue
        served.update(hosts)
        port = int(opened[-1].address[1])
    for host, refusal in absent.items():
        if host not in served:
            raise refusal


def _listen_tcp(
    config: ServerConfig, target: _Target, worker_count: int, opened: list[Listener]
) -> None:
    sockets: list[socket.socket] = []
    try:
        if config.dispatch == "shared":
            _bind_tcp(config, target, config.reuse_port, sockets)
        else:
            # The first one is bound without SO_REUSEPORT, so that a port which another server
            # holds is found to be in use instead of being shared with it.
            _bind_tcp(config, target, config.reuse_port, sockets)
            sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            bound = target.with_port(sockets[0].getsockname()[1])
            for _ in range(1, worker_count):
                _bind_tcp(config, bound, True, sockets)
        for one in sockets:
            one.listen(config.backlog)
    except OSError as error:
        for one in sockets:
            one.close()
        option = "host" if error.errno in _ADDRESS_ERRORS else "port"
        raise ListenError(option, error.errno, why_refused(str(target), error)) from None
    opened.extend(Listener(one, queue) for queue, one in enumerate(sockets))


def new_socket(family: int, recipe: Recipe | None) -> socket.socket:
    """Neither bound nor with any option set."""
    protocol = 0 if recipe is None else recipe.protocol
    return socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK, protocol)


def _user_timeout_ms(config: ServerConfig) -> int:
    """What the kernel knows of write_timeout: it ends a connection whose peer has not acknowledged
    data, or kept its window shut, for so long: tcp(7). 0: not before it gives up by itself."""
    return round((config.write_timeout or 0) * 1000)


def _bind_tcp(
    config: ServerConfig,
    target: _Target,
    reuse_port: bool,
    sockets: list[socket.socket],
    recipe: Recipe | None = None,
    one: socket.socket | None = None,
) -> None:
    if one is None:
        one = new_socket(target.family, recipe)
    sockets.append(one)
    # Accepted sockets inherit the options below. TCP_NODELAY: an echo must not wait for the
    # acknowledgement of the one before. SO_OOBINLINE: an urgent byte is a byte of the stream.
    one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    set_unless_mptcp(one, _user_timeout_ms(config))
    if reuse_port:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    if target.family == socket.AF_INET6:
        # So that 0.0.0.0 and :: can be served side by side: ipv6(7).
        one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    if recipe is not None:
        recipe.apply(one)
    one.bind(target.sockaddr)


def why_refused(where: str, error: OSError) -> str:
    """For a person: `where` is an address and port."""
    if error.errno == errno.EADDRINUSE:
        return f"{where} is in use by another socket"
    if error.errno == errno.EACCES:
        return (
            f"no permission to listen on {where}; ports below "
            "net.ipv4.ip_unprivileged_port_start need CAP_NET_BIND_SERVICE"
        )
    if error.errno == errno.EADDRNOTAVAIL:
        return f"{where} is not an address of this host"
    return f"cannot listen on {where}: {error.strerror}"


# ---- Unix -----------------------------------------------------------------------------------


def _listen_unix(path: str, backlog: int) -> Listener:
    one = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        with _locked(os.path.dirname(path) or "."):
            try:
                one.bind(path)
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
                _remove_stale(path)
                one.bind(path)
            one.listen(backlog)
            file = SocketFile(path)
    except OSError as error:
        one.close()
        if isinstance(error, ListenError):
            raise
        reason = f"cannot listen on {path!r}: {error.strerror}"
        raise ListenError("uds", error.errno, reason) from None
    except BaseException:
        one.close()
        raise
    return Listener(one, EVERY_QUEUE, file)


@contextmanager
def _locked(directory: str) -> Iterator[None]:
    """Keeps other kecho servers from replacing files in a directory at the same time.

    Between two servers that find the same stale file, the second would remove what the first
    has put in its place. Where the lock cannot be had within a second (somebody else's, or a
    file system without), things go on as if it could.
    """
    try:
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        yield  # bind will say what is wrong with it
        return
    try:
        for _ in range(_LOCK_TRIES):
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(_LOCK_RETRY_S)
            except OSError:
                break
        yield
    finally:
        os.close(fd)


def _remove_stale(path: str) -> None:
    """Removes the file of a Unix socket that nobody listens on any more."""
    if not stat.S_ISSOCK(os.lstat(path).st_mode):
        raise ListenError("uds", errno.EADDRINUSE, f"{path!r} exists and is not a socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        refused = probe.connect_ex(path)
    if refused != errno.ECONNREFUSED:
        raise ListenError("uds", errno.EADDRINUSE, f"{path!r} is in use by another process")
    os.unlink(path)
