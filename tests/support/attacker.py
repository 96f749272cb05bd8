"""The server's command with an attacker inside, for tests of the sandbox: a program of its own.

    python attacker.py DIRECTORY FIRST ARGUMENTS...

Runs `kecho ARGUMENTS`. SIGUSR2 has the main thread, and one that is started for it, try everything,
and write a line of JSON to stderr: errno of each way to each effect, 0 where it worked. FIRST is
executed before, with this module's names.

Whatever it takes is opened before the sandbox is entered, as a server that was taken over may find
it open.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import errno
import fcntl
import json
import mmap
import os
import platform
import select
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kecho.server import _sandbox, cli, server

Effects = dict[str, dict[str, Callable[[], object]]]  # effect -> ways to it

LIBC = ctypes.CDLL(None, use_errno=True)
NAMES = ("mprotect", "prctl", "prlimit64", "io_uring_setup", "bpf", "perf_event_open")
CALLS = dict(
    zip(
        NAMES,
        {"x86_64": (10, 157, 302, 425, 321, 298), "aarch64": (226, 167, 261, 425, 280, 241)}[
            platform.machine()
        ],
        strict=True,
    )
)
# 335 and 336 on x86-64, uretprobe and uprobe: only the kernel's own trampolines may make them, no
# filter sees them (Linux 6.14), and SIGILL is for anybody else.
NUMBERS = [
    number
    for number in range(600)
    if number
    not in {335, 336}
    | _sandbox.PERMITTED_CALLS
    | _sandbox.PERMITTED_CALLS_OF_A_FILE
    | _sandbox.PERMITTED_CALLS_OF_DATAGRAMS
]

WITHOUT_ADDRESS = "sendto without address"
FASTOPEN = 0x20000000  # MSG_FASTOPEN: sending that connects
MPTCP = 262
TCP_ULP, TCP_REPAIR, TCP_FASTOPEN_CONNECT, SO_ATTACH_FILTER, SO_MARK = 31, 19, 30, 26, 36
RWF_NOAPPEND = 0x20
LOCALHOST = ("127.0.0.1", 0)


def checked(result: int) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), "")
    return result


def raw(number: int, *arguments: int) -> None:
    arguments += (0,) * (6 - len(arguments))
    checked(LIBC.syscall(ctypes.c_long(number), *map(ctypes.c_long, arguments)))


def disconnect(one: socket.socket) -> None:
    """connect(2), AF_UNSPEC: upon which it could be connected anew."""
    checked(LIBC.connect(one.fileno(), bytes(16), 16))


def twice(way: Callable[[], object]) -> None:
    """What works at the second time."""
    with contextlib.suppress(OSError):
        way()
    way()


class Messages:
    """One message for sendmmsg() or recvmmsg()."""

    def __init__(self, address: bytes = b"", descriptor: int = -1) -> None:
        self._kept = [ctypes.create_string_buffer(text, len(text) or 1) for text in (address, b"x")]
        rights = b"" if descriptor < 0 else struct.pack("Nii i 4x", 20, 1, 1, descriptor)
        self._kept.append(ctypes.create_string_buffer(rights, 64))
        name, data, control = map(ctypes.addressof, self._kept)
        self._kept.append(ctypes.create_string_buffer(struct.pack("PN", data, 1)))
        self.headers = ctypes.create_string_buffer(
            struct.pack(
                "PIxxxxPNPNixxxxIxxxx",
                name if address else 0,
                len(address),
                ctypes.addressof(self._kept[-1]),
                1,
                control if rights else 0,
                len(rights),
                0,
                0,
            )
        )

    def send(self, one: socket.socket, flags: int = 0) -> None:
        checked(LIBC.sendmmsg(one.fileno(), self.headers, 1, flags))

    def receive(self, one: socket.socket) -> None:
        checked(LIBC.recvmmsg(one.fileno(), self.headers, 1, socket.MSG_DONTWAIT, None))


def sockaddr(address: tuple[str, int]) -> bytes:
    packed = struct.pack("=H", socket.AF_INET) + struct.pack("!H", address[1])
    return packed + socket.inet_aton(address[0]) + bytes(8)


def listener(protocol: int = 0) -> socket.socket:
    one = socket.socket(socket.AF_INET, socket.SOCK_STREAM, protocol)
    one.bind(LOCALHOST)
    one.listen()
    one.setblocking(False)
    return one


def accepted_and_reset(protocol: int = 0) -> socket.socket:
    """A connection that its client has reset."""
    with listener(protocol) as one, socket.socket(proto=protocol) as client:
        client.connect(one.getsockname())
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        accepted, _ = one.accept()
    accepted.setblocking(False)
    return accepted


def bound() -> socket.socket:
    one = socket.socket()
    one.bind(LOCALHOST)
    return one


KEPT: list[object] = []  # open, or mapped
PORTS: list[int] = []  # of the server, once it has started


def own_listeners() -> list[socket.socket]:
    """The server's, to be detached."""
    found = []
    for fd in range(3, 256):
        with contextlib.suppress(OSError):
            one = socket.socket(fileno=fd)
            if one.family == socket.AF_INET and one.getsockname()[1] in PORTS:
                found.append(one)
            else:
                one.detach()
    return found


def is_reached(one: socket.socket) -> None:
    """Raises unless a client waits there."""
    poll = select.poll()
    poll.register(one, select.POLLIN)
    if not poll.poll(20):
        raise PermissionError(errno.EPERM, "")


def ways(own: Path) -> Effects:
    free, at_a_port, datagram, target = socket.socket(), bound(), socket.socket(type=2), listener()
    mptcp: list[socket.socket] = []
    with contextlib.suppress(OSError):  # the kernel has none
        mptcp = [listener(MPTCP), accepted_and_reset(MPTCP)]
    # As SOCK_DESTROY leaves it, or another holder of an inherited one.
    dead = listener()
    dead.shutdown(socket.SHUT_RD)
    connected = [accepted_and_reset(), dead, free, *mptcp]
    here, there = socket.socketpair()
    there.setblocking(False)
    KEPT.append(there)
    for _ in range(2):  # attacks
        there.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [2]))])
    log_fd = os.open(own / "log", os.O_RDWR | os.O_APPEND)
    file_fd = os.open(own / "kept", os.O_RDWR)
    page = mmap.mmap(-1, mmap.PAGESIZE)
    page[0] = 6  # BPF_RET
    KEPT.append(page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(page))
    at = target.getsockname()
    parent = os.getppid()
    new = str(own / "new")
    kept = str(own / "kept")

    def option(level: int, name: int, value: int | bytes) -> Callable[[], None]:
        return lambda: free.setsockopt(level, name, value)

    def of_own(way: Callable[[socket.socket], object]) -> Callable[[], None]:
        def each() -> None:
            mine = own_listeners()
            errors = set()
            for one in mine:
                errors.add(errno_of(lambda one=one: way(one)))  # type: ignore[misc]
                one.detach()
            if errors - {0}:
                raise OSError(min(errors), "")

        return each

    return {
        "a new listener": {
            "socket": socket.socket,
            "of IPv6": lambda: socket.socket(socket.AF_INET6),
            "bind": lambda: free.bind(LOCALHOST),
            "listen, and the kernel chooses a port": free.listen,
            "listen on a bound one": at_a_port.listen,
            "listen on a dead one": dead.listen,
            "listen on one that listens": target.listen,
        },
        "a TCP connection to any address": {
            **{f"connect {n}": lambda one=one: one.connect(at) for n, one in enumerate(connected)},
            **{
                f"disconnect {n}": lambda one=one: disconnect(one)
                for n, one in enumerate([*connected, target])
            },
            **{
                f"{name} {n}": lambda one=one, way=way: twice(lambda: way(one))
                for n, one in enumerate([*connected, target])
                for name, way in {
                    "sendto": lambda one: one.sendto(b"x", FASTOPEN, at),
                    "sendto later": lambda one: one.sendto(b"x", FASTOPEN | 0x40, at),
                    WITHOUT_ADDRESS: lambda one: one.send(b"x", FASTOPEN),
                    "sendmsg": lambda one: one.sendmsg([b"x"], [], FASTOPEN, at),
                    "sendmmsg": lambda one: Messages(sockaddr(at)).send(one, FASTOPEN),
                }.items()
            },
            "own listener, sendto": of_own(lambda one: one.sendto(b"x", FASTOPEN, at)),
            "own listener, shut down": of_own(lambda one: one.shutdown(socket.SHUT_RD)),
            "own listener, shut down both ways": of_own(lambda one: one.shutdown(2)),
            "connect at once": option(socket.IPPROTO_TCP, TCP_FASTOPEN_CONNECT, 1),
            "a client is there": lambda: is_reached(target),
        },
        "a datagram to any address": {
            "socket": lambda: socket.socket(type=socket.SOCK_DGRAM),
            "connect": lambda: datagram.connect(at),
            "sendto": lambda: datagram.sendto(b"x", at),
            "sendmsg": lambda: datagram.sendmsg([b"x"], [], 0, at),
            "sendmmsg": lambda: Messages(sockaddr(at)).send(datagram),
        },
        "any other socket": {
            "Unix": lambda: socket.socket(socket.AF_UNIX),
            "a pair": socket.socketpair,
            "raw": lambda: socket.socket(type=socket.SOCK_RAW, proto=1),
            "netlink": lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW),
            "of packets": lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW),
            "of a hypervisor": lambda: socket.socket(socket.AF_VSOCK),
            "SCTP": lambda: socket.socket(proto=132),
        },
        "a descriptor passed": {
            "sendmsg": lambda: here.sendmsg(
                [b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [2]))]
            ),
            "sendmmsg": lambda: Messages(descriptor=2).send(here),
            "recvmsg": lambda: here.recvmsg(1, 64),
            "recvmmsg": lambda: Messages().receive(here),
        },
        "what was logged changed": {
            "no append mode": lambda: fcntl.fcntl(log_fd, fcntl.F_SETFL, os.O_RDWR),
            "lseek": lambda: os.lseek(log_fd, 0, os.SEEK_SET),
            "pwrite": lambda: os.pwrite(log_fd, b"!", 0),
            "pwritev": lambda: os.pwritev(log_fd, [b"!"], 0),
            "pwritev2": lambda: os.pwritev(log_fd, [b"!"], 0, RWF_NOAPPEND),
            "ftruncate": lambda: os.ftruncate(log_fd, 0),
            "fallocate": lambda: os.posix_fallocate(log_fd, 0, 1 << 20),
            "mmap": lambda: mmap.mmap(log_fd, 1),
            "sendfile": lambda: os.sendfile(log_fd, file_fd, 0, 1),
            "copy_file_range": lambda: os.copy_file_range(file_fd, log_fd, 1, 0, 0),
            "splice": lambda: os.splice(file_fd, log_fd, 1),
        },
        "a socket option that serving does not need": {
            "TCP_ULP": option(socket.IPPROTO_TCP, TCP_ULP, b"tls\0"),
            "TCP_CONGESTION": option(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"cubic\0"),
            "TCP_REPAIR": option(socket.IPPROTO_TCP, TCP_REPAIR, 1),
            "SO_ATTACH_FILTER": lambda: datagram.setsockopt(
                socket.SOL_SOCKET, SO_ATTACH_FILTER, struct.pack("HxxxxxxP", 1, address)
            ),
            "SO_BINDTODEVICE": option(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"lo"),
            "SO_MARK": option(socket.SOL_SOCKET, SO_MARK, 1),
            "the same number elsewhere": option(socket.IPPROTO_TCP, socket.SO_LINGER, 1),
            "for others, too": lambda: fcntl.ioctl(free, 0x5421, struct.pack("i", 1)),  # FIONBIO
        },
        "a file opened, made or changed": {
            "open to read": lambda: os.open("/etc/passwd", os.O_RDONLY),
            "open to write": lambda: os.open(new, os.O_WRONLY | os.O_CREAT),
            "open a device": lambda: os.open("/dev/null", os.O_RDWR),
            "open a directory": lambda: os.listdir("/"),
            "open O_PATH": lambda: os.open("/", os.O_PATH),
            "in memory": lambda: os.memfd_create("x"),
            "unlink": lambda: os.unlink(kept),
            "unlinkat": lambda: os.unlink(kept, dir_fd=0),  # of which an absolute path is none
            "rename": lambda: os.rename(kept, new),
            "link": lambda: os.link(kept, new),
            "symlink": lambda: os.symlink("x", new),
            "mkdir": lambda: os.mkdir(new),
            "mknod": lambda: os.mknod(new),
            "chmod": lambda: os.chmod(kept, 0o777),
            "fchmod": lambda: os.fchmod(file_fd, 0o777),
            "truncate": lambda: os.truncate(kept, 0),
            "ftruncate": lambda: os.ftruncate(file_fd, 0),
            "chdir": lambda: os.chdir("/"),
            "chroot": lambda: os.chroot("/"),
            "mount": lambda: checked(LIBC.mount(b"x", b"/tmp", b"tmpfs", 0, None)),
        },
        "a program run or a process made": {
            "execve": lambda: os.execv("/bin/true", ["true"]),
            "fork": lambda: os.fork() or os._exit(0),
            "vfork": lambda: os.posix_spawn("/bin/true", ["true"], {}),
            "code in memory": lambda: mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_EXEC),
            "memory made code": lambda: raw(CALLS["mprotect"], address, 4096, 5),
        },
        "another process traced, read or signalled": {
            "ptrace": lambda: checked(LIBC.ptrace(16, parent, 0, 0)),  # PTRACE_ATTACH
            "process_vm_readv": lambda: checked(LIBC.process_vm_readv(parent, 0, 0, 0, 0, 0)),
            "process_vm_writev": lambda: checked(LIBC.process_vm_writev(parent, 0, 0, 0, 0, 0)),
            "pidfd_open": lambda: os.pidfd_open(parent),
            "kill the parent": lambda: os.kill(parent, 0),
            "kill everybody": lambda: os.kill(-1, 0),
            "kill the group": lambda: os.kill(0, 0),
            "sigqueue": lambda: checked(LIBC.sigqueue(parent, 0, 0)),
            "affinity": lambda: os.sched_setaffinity(parent, {0}),
            "priority": lambda: os.setpriority(os.PRIO_PROCESS, parent, 1),
            "limits": lambda: raw(CALLS["prlimit64"], parent, 7, address, 0),
        },
        "more rights": {
            "setuid": lambda: os.setuid(0),
            "setrlimit": lambda: raw(CALLS["prlimit64"], 0, 7, address, 0),
            "dumpable": lambda: raw(CALLS["prctl"], 4, 1),
            "unshare": lambda: checked(LIBC.unshare(0x10000000)),  # CLONE_NEWUSER
            "setns": lambda: checked(LIBC.setns(0, 0)),
            "a ring": lambda: raw(CALLS["io_uring_setup"], 1, address),
            "a BPF map": lambda: raw(CALLS["bpf"], 0, address, 64),
            "a BPF program": lambda: raw(CALLS["bpf"], 5, address, 64),
            "a BPF object by path": lambda: raw(CALLS["bpf"], 7, address, 64),
            "perf_event_open": lambda: raw(CALLS["perf_event_open"], address, 0, -1, -1),
        },
        "no call that is not on the list": {
            f"call {number}": lambda number=number: raw(number) for number in NUMBERS
        },
        ALLOWED: {
            "getpid": os.getpid,
            "kill itself": lambda: os.kill(os.getpid(), 0),
            "dup": lambda: os.close(os.dup(2)),
            "fstat": lambda: os.fstat(2),
            "append": lambda: os.write(log_fd, b"appended\n"),
            "sleep": lambda: time.sleep(0.001),
            "memory": lambda: bytearray(50_000_000),
            "random": lambda: os.urandom(8),
            "affinity": lambda: os.sched_setaffinity(0, os.sched_getaffinity(0)),
        },
    }


ALLOWED = "what serving takes"


def errno_of(way: Callable[[], object]) -> int:
    try:
        way()
    except OSError as error:
        return error.errno or -1
    return 0


def attack(effects: Effects) -> None:
    found = {
        effect: {name: errno_of(way) for name, way in each.items()}
        for effect, each in effects.items()
    }
    os.write(2, f"found {json.dumps(found)}\n".encode())


def main(own: str, first: str, *arguments: str) -> int:
    start = server.Server.start

    def start_and_look(self: server.Server, *given: Any) -> None:
        start(self, *given)
        PORTS[:] = [at[1] for at in self.addresses if not isinstance(at, str)]

    def on_signal(*_: object) -> None:
        attack(effects)
        thread = threading.Thread(target=attack, args=(effects,))
        thread.start()
        thread.join()

    server.Server.start = start_and_look  # type: ignore[method-assign]
    exec(first, globals())  # may set `chosen`
    effects = chosen(ways(Path(own)))
    signal.signal(signal.SIGUSR2, on_signal)
    return cli.main(arguments)


def of_names(*names: str) -> Callable[[Effects], Effects]:
    """For `chosen`: these ways alone."""
    return lambda effects: {
        effect: {name: way for name, way in each.items() if name in names}
        for effect, each in effects.items()
    }


chosen: Callable[[Effects], Effects] = dict  # FIRST may take some

if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
