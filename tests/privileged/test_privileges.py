"""--user: who the server is once it listens, and that there is no way back."""

from __future__ import annotations

import errno
import grp
import os
import pwd
import shutil
import socket
import textwrap
from collections import Counter
from pathlib import Path

import pytest

from kecho import OptionError
from kecho.server.confinement.privileges import Identity, find_identity
from support.clients import connect, echo, transfer
from support.connecting_client import load_on
from support.namespaces import Namespace
from support.privileges import is_root, skip_unless_root
from support.server_process import ServerProcess, after, run_command, run_python

pytestmark = [pytest.mark.privileged, pytest.mark.e2e]

NOBODY = pwd.getpwnam("nobody")
BEYOND = 4_000_000_000  # in no password database


@pytest.fixture
def _root() -> None:
    skip_unless_root()


as_root = pytest.mark.usefixtures("_root")


def status_of_every_thread(pid: int, *names: str) -> set[tuple[str, ...]]:
    found = set()
    for path in Path(f"/proc/{pid}/task").glob("*/status"):
        fields = dict(line.split(":", 1) for line in path.read_text().splitlines())
        found.add(tuple(" ".join(fields[name].split()) for name in names))
    return found


@as_root
@pytest.mark.parametrize(
    ("text", "uid", "gid"),
    [
        ("nobody", NOBODY.pw_uid, NOBODY.pw_gid),
        (str(NOBODY.pw_uid), NOBODY.pw_uid, NOBODY.pw_gid),
        ("nobody:daemon", NOBODY.pw_uid, grp.getgrnam("daemon").gr_gid),
        (f"{BEYOND}:{BEYOND + 1}", BEYOND, BEYOND + 1),
    ],
)
@pytest.mark.parametrize("more", [["--no-sandbox"], []], ids=["alone", "sandboxed"])
def test_every_thread_is_that_user_without_capabilities(
    dispatch: str, text: str, uid: int, gid: int, more: list[str]
) -> None:
    arguments = ["--user", text, "--dispatch", dispatch, "--threads=3", *more]
    with ServerProcess(arguments) as process:
        process.wait_until_listening()
        capabilities = ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")
        found = status_of_every_thread(
            process.pid, "Uid", "Gid", "Groups", "NoNewPrivs", *capabilities
        )
        expected = [" ".join([str(number)] * 4) for number in (uid, gid)]
        assert found == {(*expected, str(gid), "1", *["0" * 16] * 5)}
        with connect(process.port) as client:
            assert transfer(client, b"hello" * 100_000) == b"hello" * 100_000
        assert process.stop() == 0
    assert "Traceback" not in process.stderr


@as_root
def test_supplementary_groups_are_the_users_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getgrouplist", lambda name, gid: [gid, 5, 7])
    assert find_identity("nobody").groups == (5, 7)
    assert find_identity("nobody:daemon").groups == ()


@as_root
def test_a_port_that_only_root_may_use_is_bound_before(namespace: Namespace) -> None:
    with namespace, ServerProcess(["--port=7", "--user=nobody"]) as process:
        process.wait_until_listening()
        with connect(7) as client:
            assert echo(client, b"hello") == b"hello"
        assert process.stop() == 0


@as_root
def test_the_limit_on_descriptors_is_raised_before() -> None:
    before = after("resource.setrlimit(resource.RLIMIT_NOFILE, (64, 4096))")
    with ServerProcess(["--user=nobody"], before=before) as process:
        process.wait_until_listening()
        limits = Path(f"/proc/{process.pid}/limits").read_text()
        assert limits.split("Max open files")[1].split()[:2] == ["4096", "4096"]
        assert process.stop() == 0


@as_root
def test_capabilities_go_though_the_kernel_was_told_to_keep_them() -> None:
    setpriv = shutil.which("setpriv")
    if setpriv is None:
        pytest.skip("needs setpriv, which util-linux has")
    before = [setpriv, "--securebits", "+no_setuid_fixup", "--"]
    with ServerProcess(["--user=nobody", "--no-sandbox"], before=before) as process:
        process.wait_until_listening()
        assert status_of_every_thread(process.pid, "CapEff", "CapPrm") == {("0" * 16, "0" * 16)}
        assert process.stop() == 0


# As root with a key in the session's keyring: whether the key can be read, and what @s holds.
KEYS = """
    import ctypes, platform
    libc = ctypes.CDLL(None, use_errno=True)
    ADD_KEY, KEYCTL = {"x86_64": (248, 250), "aarch64": (217, 219)}[platform.machine()]
    JOIN_SESSION_KEYRING, READ, SESSION = 1, 11, -3
    def keyctl(*arguments):
        return libc.syscall(KEYCTL, *arguments)
    def say(key):
        secret, inside = ctypes.create_string_buffer(64), ctypes.create_string_buffer(64)
        print(keyctl(READ, key, secret, 64), keyctl(READ, SESSION, inside, 64), secret.value)
    if keyctl(JOIN_SESSION_KEYRING, None) < 0:
        print("no keyrings")
        sys.exit()
    key = libc.syscall(ADD_KEY, b"user", b"kecho-test", b"secret", 6, SESSION)
    say(key)
"""


@as_root
def test_a_key_of_roots_session_is_not_readable_afterwards() -> None:
    become = """
        from kecho.server.confinement import privileges
        privileges.become(privileges.find_identity("nobody"))
        say(key)
    """
    script = "import sys\n" + textwrap.dedent(KEYS) + textwrap.dedent(become)
    finished = run_python("-c", script)
    assert finished.returncode == 0, finished.stderr
    if finished.stdout == "no keyrings\n":
        pytest.skip("the kernel has no keyrings, or refuses them here")
    assert finished.stdout.splitlines() == ["6 4 b'secret'", "-1 0 b''"]


@as_root
@pytest.mark.parametrize("error", ["ENOSYS", "EPERM"])
def test_a_kernel_without_keyrings_is_no_failure(strace: list[str], error: str) -> None:
    before = [*strace, "-o", os.devnull, "-e", "trace=keyctl", "-e", f"inject=keyctl:error={error}"]
    with ServerProcess(["--user=nobody"], before=before) as process:
        process.wait_until_listening()
        with connect(process.port) as client:
            assert echo(client, b"hello") == b"hello"
        assert process.stop() == 0


@as_root
def test_a_keyring_that_stays_is_an_error(strace: list[str]) -> None:
    before = [*strace, "-o", os.devnull, "-e", "trace=keyctl", "-e", "inject=keyctl:error=EDQUOT"]
    with ServerProcess(["--user=nobody"], before=before) as process:
        assert process.wait() == 1
    assert process.stderr == "kecho: error: keyctl(KEYCTL_JOIN_SESSION_KEYRING): " + (
        f"{os.strerror(errno.EDQUOT)}\n"
    )


@as_root
def test_a_drop_that_does_not_hold_is_an_error() -> None:
    """Something that leaves a way back, here a saved user id, must not go on to serve."""
    script = """
        import os, sys
        from kecho.server import cli
        from kecho.server.confinement import privileges
        os.setresuid = lambda r, e, s: os.seteuid(e)
        privileges._sandbox.drop_capabilities = lambda: None
        sys.exit(cli.main(["--port=0", "--user=nobody"]))
    """
    finished = run_python("-c", textwrap.dedent(script))
    assert finished.returncode == 1
    assert "did not become" in finished.stderr
    script = script.replace("os.setresuid = lambda r, e, s: os.seteuid(e)", "").replace(
        "drop_capabilities", "set_no_new_privileges"
    )
    keep = "resuid = os.getresuid; os.getresuid = lambda: (65534,) * 3; os.setresuid = "
    keep += "lambda *ids: os.seteuid(ids[1]) if ids[1] > 0 else os.seteuid(0)"
    script = script.replace("import os, sys\n", f"import os, sys; {keep}\n")
    finished = run_python("-c", textwrap.dedent(script))
    assert finished.returncode == 1
    assert "could be had back" in finished.stderr


@as_root
def test_the_unix_sockets_file_goes_if_the_user_may_remove_it_and_it_is_said_if_not(
    tmp_path: Path,
) -> None:
    for owner, remains in ((NOBODY.pw_uid, False), (0, True)):
        directory = tmp_path / str(owner)
        directory.mkdir()
        os.chown(directory, owner, -1)
        for parent in (directory, *directory.parents):
            if parent != Path("/"):
                os.chmod(parent, os.stat(parent).st_mode | 0o011)
        path = directory / "socket"
        with ServerProcess(["--uds", str(path), "--user=nobody"]) as process:
            process.wait_until_listening()
            with connect(str(path)) as client:
                assert echo(client, b"hello") == b"hello"
            assert process.stop() == 0
        assert path.exists() == remains
        assert ("left behind" in process.stderr) == remains
        assert "Traceback" not in process.stderr


def run_as_nobody(*arguments: str) -> tuple[int, str]:
    """The command, imported before its process becomes nobody: Python may be in root's home."""
    script = f"""
        import codecs, os, socket, sys
        from kecho.server import cli
        from kecho.server.confinement import sandbox
        socket.getaddrinfo("localhost", 0)
        cli._parser().parse_args([])
        codecs.lookup("ascii")
        sandbox.prepare()
        if {is_root()}:
            os.setgroups([])
            os.setresgid(65534, 65534, 65534)
            os.setresuid(65534, 65534, 65534)
        sys.exit(cli.main({list(arguments)!r}))
    """
    finished = run_python("-c", textwrap.dedent(script))
    return finished.returncode, finished.stderr


def test_without_the_right_to_it_is_one_line_and_status_1() -> None:
    status, said = run_as_nobody("--port=0", "--user=daemon")
    assert status == 1
    assert said.count("\n") == 1
    assert said.startswith("kecho: error: setgroups: Operation not permitted")
    assert "--user takes root" in said


@as_root
def test_without_privileges_it_is_still_confined() -> None:
    script = """
        import codecs, os, socket, sys
        from kecho.server import cli
        from kecho.server.confinement import sandbox
        socket.getaddrinfo("localhost", 0)
        cli._parser().parse_args([])
        codecs.lookup("ascii")
        sandbox.prepare()
        os.setresgid(65534, 65534, 65534)
        os.setresuid(65534, 65534, 65534)
        sys.exit(cli.main(["--port=0"]))
    """
    given = ["-c", textwrap.dedent(script)]
    with ServerProcess(["--port=0"], before=after(f"sys.argv[2:] = {given!r}")) as process:
        process.wait_until_listening()
        found = status_of_every_thread(process.pid, "NoNewPrivs", "CapEff", "CapPrm", "CapAmb")
        assert found == {("1", "0" * 16, "0" * 16, "0" * 16)}
        with connect(process.port) as client:
            assert echo(client, b"hello") == b"hello"
        assert process.stop() == 0


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("no-such-user", "there is no user 'no-such-user'"),
        ("nobody:no-such-group", "there is no group 'no-such-group'"),
        ("nobody:", "there is no group ''"),
        (":daemon", "there is no user ''"),
        ("-1", "there is no user '-1'"),
        ("4294967295:1", "is not between 0 and 4294967294"),
        ("nobody:4294967295", "is not between 0 and 4294967294"),
        ("99999999999999999999", "is not between"),
        (str(BEYOND), "name a group as well"),
        ("root", "is root"),
        ("0:daemon", "is root"),
        ("٣", "there is no user"),
    ],
)
def test_a_user_that_cannot_be_is_wrong_usage(text: str, reason: str) -> None:
    with pytest.raises(OptionError, match=r"^user: ") as refused:
        find_identity(text)
    assert reason in str(refused.value)


def test_it_is_said_before_anything_is_opened() -> None:
    finished = run_command("--port=0", "--user=no-such-user")
    assert finished.returncode == 2
    assert finished.stderr == "kecho: error: --user: there is no user 'no-such-user'\n"
    finished = run_command("--port=0", KECHO_USER="root")
    assert finished.returncode == 2
    assert finished.stderr.startswith("kecho: error: KECHO_USER: root is root")


def test_numbers_need_no_password_database() -> None:
    assert find_identity(f"{BEYOND}:{BEYOND}") == Identity(BEYOND, BEYOND)


# ---- --reuse-port: the old server and the new one ----------------------------------------------

ROUNDS = 5
WARNING = "sysctl -w net.ipv4.tcp_migrate_req=1"


@pytest.mark.engines
@pytest.mark.parametrize("user", [[], ["--user=nobody"]], ids=["root", "nobody"])
def test_a_server_replaced_by_reuse_port_refuses_nobody_if_requests_migrate(
    dispatch: str, engine: str, user: list[str], namespace: Namespace
) -> None:
    if not Path("/proc/sys/net/ipv4/tcp_migrate_req").exists():
        pytest.skip("tcp_migrate_req needs Linux 5.14")
    namespace.set("net.ipv4.tcp_migrate_req", 1)
    arguments = ["--port=12345", "--reuse-port", "--threads=2", "--backlog=1024", *user]
    arguments += ["--dispatch", dispatch, "--engine", engine]
    with namespace:
        server = ServerProcess(arguments)
    try:
        server.wait_until_listening()
        with load_on(("127.0.0.1", 12345), namespace=namespace) as load:
            for _ in range(ROUNDS):
                with namespace:
                    successor = ServerProcess(arguments)
                old, server = server, successor
                with old:
                    successor.wait_until_listening()
                    assert old.stop() == 0
                    assert WARNING not in old.stderr
    finally:
        server.kill()
    assert load.connects > 100
    # An ACK that ends a handshake while the listener closes on another CPU is not migrated: the
    # kernel's inet_csk_reqsk_queue_add() resets its connection, about once in fifty restarts. The
    # client learns of it in connect() or after it.
    lost = Counter(load.failed) + Counter(load.unanswered)
    assert lost in ({}, {"ConnectionResetError": 1})


def test_without_migration_a_stop_says_once_what_can_be_lost(
    dispatch: str, namespace: Namespace
) -> None:
    for arguments, warned in ((["--reuse-port"], 1), ([], 0)):
        with namespace, ServerProcess(["--dispatch", dispatch, *arguments]) as server:
            server.wait_until_listening()
            assert WARNING not in server.stderr
            assert server.stop() == 0
        assert server.stderr.count(WARNING) == warned


def test_a_start_that_fails_warns_of_no_stop(namespace: Namespace) -> None:
    with namespace, socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with ServerProcess([f"--port={port}", "--reuse-port"]) as server:
            assert server.wait() == 1
    assert WARNING not in server.stderr
