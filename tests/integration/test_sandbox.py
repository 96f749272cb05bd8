"""--sandbox: what is refused within, what works all the same, and kernels that lack it."""

from __future__ import annotations

import errno
import json
import os
import platform
import signal
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kecho import _sandbox
from support.clients import (
    DEADLINE_S,
    connect,
    echo,
    plenty,
    send_until_blocked,
    transfer,
    wait_for,
)
from support.privileges import is_root
from support.server_process import ServerProcess, after, run_command

pytestmark = [
    pytest.mark.e2e,
    # Their runtimes need more than the sandbox gives, so their builds have none.
    pytest.mark.slow_under_sanitizers,
]


@pytest.fixture(scope="module")
def landlock_abi() -> int:
    try:
        return _sandbox.landlock_abi()
    except OSError as error:
        pytest.skip(f"this kernel has no Landlock: {error.strerror}")


def fields_of_every_thread(pid: int) -> dict[str, set[str]]:
    """Field of /proc/PID/task/*/status -> its values."""
    found: dict[str, set[str]] = {}
    for status in Path(f"/proc/{pid}/task").glob("*/status"):
        for line in status.read_text().splitlines():
            name, _, value = line.partition(":")
            found.setdefault(name, set()).add(value.strip())
    return found


# In the server's process: SIGUSR2 has every attack tried on the main thread and on one that is
# started for it, and the results written to stderr.
ATTACKER = """
    import ctypes, json, mmap, os, signal, socket, sys, threading, time

    LIBC = ctypes.CDLL(None, use_errno=True)
    OWN = {own!r}

    def raw(number, *arguments):
        arguments += (0,) * (6 - len(arguments))
        if LIBC.syscall(ctypes.c_long(number), *map(ctypes.c_long, arguments)) < 0:
            raise OSError(ctypes.get_errno(), "")

    def over(sending):
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as one:
            sending(one)

    def bind(port, host="127.0.0.2"):
        with socket.socket() as one:
            one.bind((host, port))
            one.listen()
            one.setblocking(False)

    LISTENER = socket.create_server(("127.0.0.1", 0))
    TARGET = LISTENER.getsockname()
    PAGES = mmap.mmap(-1, 4096)
    PAGE = ctypes.addressof(ctypes.c_char.from_buffer(PAGES))
    ATTACKS = {{
        "open to read": lambda: os.open("/etc/passwd", os.O_RDONLY),
        "open to write": lambda: os.open(OWN + "/new", os.O_WRONLY | os.O_CREAT),
        "open a device": lambda: os.open("/dev/null", os.O_RDWR),
        "open a directory": lambda: os.listdir("/"),
        "open O_PATH": lambda: os.open("/", os.O_PATH),
        "execve": lambda: os.execv("/bin/true", ["true"]),
        "fork": lambda: os.fork() or os._exit(0),
        "vfork, spawn": lambda: os.posix_spawn("/bin/true", ["true"], {{}}),
        "unlink": lambda: os.unlink(OWN + "/kept"),
        "rename": lambda: os.rename(OWN + "/kept", OWN + "/other"),
        "mkdir": lambda: os.mkdir(OWN + "/new"),
        "symlink": lambda: os.symlink("x", OWN + "/new"),
        "chmod": lambda: os.chmod(OWN + "/kept", 0o777),
        "truncate": lambda: os.truncate(OWN + "/kept", 0),
        "chdir": lambda: os.chdir("/"),
        "connect": lambda: over(lambda one: one.connect(TARGET)),
        "send that connects": lambda: over(lambda one: one.sendto(b"x", 0x20000000, TARGET)),
        "sendmsg that connects": lambda: over(
            lambda one: one.sendmsg([b"x"], [], 0x20000000, TARGET)),
        "sendto": lambda: over(lambda one: one.sendto(b"x", TARGET)),
        "a Unix socket": lambda: socket.socket(socket.AF_UNIX),
        "a pair of sockets": socket.socketpair,
        "a datagram socket": lambda: socket.socket(type=socket.SOCK_DGRAM),
        "a raw socket": lambda: socket.socket(type=socket.SOCK_RAW, proto=1),
        "a netlink socket": lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW),
        "SCTP": lambda: socket.socket(proto=132),
        "code in memory": lambda: mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_EXEC),
        "memory made code": lambda: raw({mprotect}, PAGE, 4096, mmap.PROT_READ | mmap.PROT_EXEC),
        "kill the parent": lambda: os.kill(os.getppid(), 0),
        "kill everybody": lambda: os.kill(-1, 0),
        "kill the group": lambda: os.kill(0, 0),
        "setuid": lambda: os.setuid(0),
        "setrlimit": lambda: raw({prlimit}, 0, 7, 8, 0),
        "affinity of the parent": lambda: os.sched_setaffinity(os.getppid(), {{0}}),
        "dumpable": lambda: raw({prctl}, 4, 1),
    }}
    ALLOWED = {{
        "getpid": os.getpid,
        "kill itself": lambda: os.kill(os.getpid(), 0),
        "dup": lambda: os.close(os.dup(2)),
        "fstat": lambda: os.fstat(2),
        "a listener at its own port": lambda: bind(PORT),
        "sleep": lambda: time.sleep(0.001),
        "memory": lambda: bytearray(50_000_000),
        "random": lambda: os.urandom(8),
        "affinity": lambda: os.sched_setaffinity(0, os.sched_getaffinity(0)),
    }}

    def errno_of(attack):
        try:
            attack()
        except OSError as error:
            return error.errno
        return 0

    def attack():
        global PORT
        found = {{name: errno_of(one) for name, one in (ATTACKS | ALLOWED).items()}}
        found["bind another port"] = errno_of(lambda: bind(TARGET[1]))
        for number in NUMBERS:
            found[f"call {{number}}"] = errno_of(lambda: raw(number))
        os.write(2, ("found " + json.dumps(found) + "\\n").encode())

    def on_signal(*_):
        attack()
        thread = threading.Thread(target=attack)
        thread.start()
        thread.join()

    from kecho import _sandbox, cli, server
    # 335 and 336 on x86-64, uretprobe and uprobe: only the kernel's own trampolines may make
    # them, no filter sees them (Linux 6.14), and SIGILL is for anybody else.
    NUMBERS = [
        number for number in range(600)
        if number not in
        {{335, 336}} | _sandbox.PERMITTED_CALLS | _sandbox.PERMITTED_CALLS_OF_A_FILE
    ]
    start = server.Server.start
    def start_and_look(self, *arguments):
        global PORT
        start(self, *arguments)
        PORT = next((at[1] for at in self.addresses if not isinstance(at, str)), 0)
    server.Server.start = start_and_look
    signal.signal(signal.SIGUSR2, on_signal)
    {first}
    sys.exit(cli.main(sys.argv[1:]))
"""


@contextmanager
def attackable(own: Path, *arguments: str, first: str = "") -> Iterator[ServerProcess]:
    names = ("mprotect", "prctl", "prlimit")
    numbers = {"x86_64": (10, 157, 302), "aarch64": (226, 167, 261)}[platform.machine()]
    values = {"own": str(own), "first": first, **dict(zip(names, numbers, strict=True))}
    script = textwrap.dedent(ATTACKER).format(**values)
    given = ["-c", script, *arguments]
    with ServerProcess(["--port=0"], before=after(f"sys.argv[2:] = {given!r}")) as process:
        process.wait_until_listening()
        yield process


def attacked(process: ServerProcess) -> list[dict[str, int]]:
    """What the main thread and another one found."""
    process.send(signal.SIGUSR2)
    process.wait_until_said(r"found [^\n]*\nfound ")
    return [
        json.loads(line.removeprefix("found "))
        for line in process.stderr.splitlines()
        if line.startswith("found ")
    ]


def test_files_programs_and_connections_are_refused_while_echoing_goes_on(
    dispatch: str, tmp_path: Path, landlock_abi: int
) -> None:
    (tmp_path / "kept").write_text("as it was")
    with attackable(tmp_path, "--port=0", "--sandbox", "--dispatch", dispatch) as process:
        with connect(process.port) as client:
            assert echo(client, b"before") == b"before"
            found = attacked(process)
            assert transfer(client, b"after" * 100_000) == b"after" * 100_000
        with connect(process.port) as client:
            assert echo(client, b"another") == b"another"
        assert process.stop() == 0
    assert len(found) == 2
    for one in found:
        allowed = {name for name, number in one.items() if number == 0}
        assert allowed == {
            *("getpid", "kill itself", "dup", "fstat", "a listener at its own port", "sleep"),
            *("memory", "random", "affinity"),
            *(["bind another port"] if landlock_abi < 4 else []),
        }
        if landlock_abi >= 4:
            assert one["bind another port"] == errno.EACCES
        assert one["call 435"] == errno.ENOSYS  # clone3: the C library falls back to clone
        refusals = {number for name, number in one.items() if name != "call 435"}
        assert refusals <= {0, errno.EPERM, errno.EACCES}
    assert (tmp_path / "kept").read_text() == "as it was"
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


@pytest.mark.skipif(platform.machine() != "x86_64", reason="x32 is of x86-64")
def test_the_other_numbers_of_the_same_calls_are_refused(tmp_path: Path) -> None:
    first = "NUMBERS[:] = [0x40000000 + 39, 0x40000000 + 0]"  # getpid, read
    with attackable(tmp_path, "--port=0", "--sandbox", first=first) as process:
        for found in attacked(process):
            assert found[f"call {0x40000000 + 39}"] == errno.EPERM
            assert found[f"call {0x40000000}"] == errno.EPERM
        assert process.stop() == 0


def test_without_the_filter_landlock_still_refuses_files_and_connections(
    tmp_path: Path, landlock_abi: int
) -> None:
    """Each is tried alone, so that one does not hide what the other lets through."""
    (tmp_path / "kept").touch()
    first = "_sandbox.filter_calls = lambda **_: None; NUMBERS.clear()"
    first += "; [ATTACKS.pop(name) for name in list(ATTACKS) if name not in KEPT]"
    kept = ["open to read", "open to write", "open a directory", "execve", "unlink", "mkdir"]
    kept += ["symlink", *(["truncate"] if landlock_abi >= 3 else [])]
    kept += ["connect"] * (landlock_abi >= 4) + ["kill the parent"] * (landlock_abi >= 6)
    with attackable(tmp_path, "--port=0", first=f"KEPT = {kept}; {first}") as process:
        for found in attacked(process):
            assert {name: found[name] in (errno.EACCES, errno.EPERM) for name in kept} == (
                dict.fromkeys(kept, True)
            )
        assert process.stop() == 0


def test_without_landlock_the_filter_still_refuses_files_programs_and_connections(
    tmp_path: Path,
) -> None:
    first = "_sandbox.restrict_access = lambda *_: None; NUMBERS.clear()"
    with attackable(tmp_path, "--port=0", "--sandbox", first=first) as process:
        for found in attacked(process):
            refused = {name for name, number in found.items() if number == errno.EPERM}
            allowed = {name for name, number in found.items() if number == 0}
            assert refused | allowed == found.keys()
            assert {"open to read", "open to write", "execve", "fork", "connect"} <= refused
            # Which port is bound stands in memory, where only Landlock looks.
            assert len(allowed) == 10
        assert process.stop() == 0


def test_it_is_in_force_in_every_thread(dispatch: str) -> None:
    arguments = ["--sandbox", "--threads=3", "--dispatch", dispatch]
    with ServerProcess(arguments) as process:
        process.wait_until_listening()
        assert len(os.listdir(f"/proc/{process.pid}/task")) >= 4
        fields = fields_of_every_thread(process.pid)
        assert fields["Seccomp"] == {"2"}
        assert fields["NoNewPrivs"] == {"1"}
        names = ["CapInh", "CapPrm", "CapEff", "CapAmb"]
        names += ["CapBnd"] * is_root()  # reducing it takes CAP_SETPCAP
        for name in names:
            assert fields[name] == {"0" * 16}, name
        assert process.stop() == 0


def test_it_is_the_default_and_can_be_left_out() -> None:
    for arguments, mode in (([], "2"), (["--no-sandbox"], "0")):
        with ServerProcess(arguments) as process:
            process.wait_until_listening()
            outside = Path("/proc/self/status").read_text()
            expected = {mode} if "Seccomp:\t0" in outside else {"2"}
            assert fields_of_every_thread(process.pid)["Seccomp"] == expected
            assert process.stop() == 0


@pytest.mark.parametrize("form", ["text", "json"])
def test_counters_logs_and_both_signals_work_within(dispatch: str, form: str) -> None:
    arguments = ["--sandbox", "--dispatch", dispatch, "--log-format", form, "--log-level=debug"]
    with ServerProcess([*arguments, "--stats-interval=0.1", "--graceful-timeout=60"]) as process:
        process.wait_until_said("listening on ")
        with connect(process.port) as client:
            assert echo(client, b"hello") == b"hello"
            process.wait_until_said(r"1 connection accepted")
            process.send(signal.SIGUSR1)
            # Backpressure: this one is not done when the drain begins.
            send_until_blocked(client, plenty())
            process.send(signal.SIGTERM)
            process.wait_until_said("draining")
            process.send(signal.SIGTERM)
            assert process.wait() == 0
    assert "stopping at once" in process.stderr
    assert "Traceback" not in process.stderr


def test_a_defect_is_reported_with_its_traceback_within(tmp_path: Path) -> None:
    first = "cli._say_counters = lambda: lambda server: cli.log.exception('x') or [][1]"
    with attackable(tmp_path, "--port=0", "--sandbox", first=first) as process:
        process.send(signal.SIGUSR1)
        assert process.wait() == 1
    assert "IndexError: list index out of range" in process.stderr
    assert "ModuleNotFoundError" not in process.stderr
    assert "Permission" not in process.stderr


def test_threads_that_outlive_the_interpreter_end_quietly(tmp_path: Path) -> None:
    """glibc's pthread_exit() loads a library when it is first called, and aborts without it."""
    first = (
        "spin = lambda: [None for _ in iter(int, 1)];"
        "old = cli._say_where;"
        "cli._say_where = lambda *a: (old(*a),"
        " threading.Thread(target=spin, daemon=True).start())"
    )
    with attackable(tmp_path, "--port=0", "--sandbox", first=first) as process:
        assert process.stop() == 0
    assert "libgcc_s" not in process.stderr


def test_the_unix_sockets_file_is_removed_and_no_other(dispatch: str, tmp_path: Path) -> None:
    path = tmp_path / "inside" / "socket"
    path.parent.mkdir()
    (tmp_path / "kept").touch()
    first = "ATTACKS.clear(); ATTACKS['unlink'] = lambda: os.unlink(OWN + '/kept')"
    arguments = ["--uds", str(path), "--sandbox", "--dispatch", dispatch]
    with attackable(tmp_path, *arguments, first=first + "; NUMBERS.clear()") as process:
        with connect(str(path)) as client:
            assert echo(client, b"hello") == b"hello"
        if _has_landlock():
            for found in attacked(process):
                assert found["unlink"] == errno.EACCES
        assert process.stop() == 0
    assert not path.exists()
    assert (tmp_path / "kept").exists()


def _has_landlock() -> bool:
    try:
        return _sandbox.landlock_abi() > 0
    except OSError:
        return False


def test_output_whose_reader_is_gone_changes_no_exit_status() -> None:
    with ServerProcess(["--sandbox"]) as process:
        process.wait_until_listening()
        assert process.process.stderr is not None
        process.process.stderr.close()
        process.send(signal.SIGTERM)
        assert process.process.wait(DEADLINE_S) == 0
        process.process.stderr = None


# ---- kernels that lack it ----------------------------------------------------------------------

SECCOMP = {"x86_64": 317, "aarch64": 277}[platform.machine()]
LANDLOCK_CREATE_RULESET = 444


def refusing(number: int, error: int) -> list[str]:
    """For ServerProcess: a command that runs it under a filter by which a call gives `error`."""
    return after(
        "import ctypes, struct;"
        "p = ctypes.create_string_buffer(b''.join(struct.pack('HBBI', *i) for i in ["
        f"(0x20, 0, 0, 0), (0x15, 0, 1, {number}), (6, 0, 0, 0x50000 | {error}),"
        "(6, 0, 0, 0x7fff0000)]));"
        "f = ctypes.create_string_buffer(struct.pack('HxxxxxxP', 4, ctypes.addressof(p)));"
        "l = ctypes.CDLL(None);"
        "assert l.prctl(38, 1, 0, 0, 0) == 0 and l.prctl(22, 2, f, 0, 0) == 0"
    )


LACKS = [
    (SECCOMP, errno.ENOSYS, "no seccomp"),
    (SECCOMP, errno.EPERM, "no seccomp"),
    (SECCOMP, errno.EINVAL, "no seccomp"),
    (LANDLOCK_CREATE_RULESET, errno.ENOSYS, "no Landlock"),
    (LANDLOCK_CREATE_RULESET, errno.EOPNOTSUPP, "no Landlock"),
]


@pytest.mark.parametrize(("number", "error", "said"), LACKS)
def test_what_the_kernel_lacks_is_said_in_one_line_and_left_out(
    number: int, error: int, said: str
) -> None:
    with ServerProcess([], before=refusing(number, error)) as process:
        process.wait_until_listening()
        with connect(process.port) as client:
            assert echo(client, b"hello") == b"hello"
        assert process.stop() == 0
    lines = [line for line in process.stderr.splitlines() if "warning" in line]
    assert len(lines) == 1
    assert said in lines[0]
    assert "Traceback" not in process.stderr


@pytest.mark.parametrize(("number", "error", "said"), LACKS)
def test_what_the_kernel_lacks_is_an_error_if_it_was_asked_for(
    number: int, error: int, said: str
) -> None:
    with ServerProcess(["--sandbox"], before=refusing(number, error)) as process:
        assert process.wait() == 1
    lines = process.stderr.splitlines()
    assert len(lines) == 1
    assert "--sandbox" in lines[0]
    assert said in lines[0]


def test_a_process_with_other_threads_is_not_confined_by_halves() -> None:
    first = "import threading; threading.Thread(target=threading.Event().wait, daemon=True).start()"
    script = f"{first}; import sys; from kecho import cli; sys.exit(cli.main(sys.argv[1:]))"
    given = ["-c", script, "--port=0", "--sandbox"]
    with ServerProcess(["--port=0"], before=after(f"sys.argv[2:] = {given!r}")) as process:
        assert process.wait() == 1
    assert "other threads" in process.stderr


def test_values_that_are_no_switch_are_wrong_usage() -> None:
    finished = run_command("--port=0", KECHO_SANDBOX="maybe")
    assert finished.returncode == 2
    assert "KECHO_SANDBOX" in finished.stderr


def test_many_threads_start_within(dispatch: str) -> None:
    with ServerProcess(["--sandbox", "--threads=64", "--dispatch", dispatch]) as process:
        process.wait_until_listening()
        wait_for(lambda: len(os.listdir(f"/proc/{process.pid}/task")) == 66, "64 workers, two more")
        for _ in range(20):
            with connect(process.port) as client:
                assert echo(client, b"hello") == b"hello"
        assert process.stop() == 0
