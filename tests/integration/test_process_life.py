"""Servers inside a process: asyncio, forgotten servers, fork, the interpreter's end, failures."""

from __future__ import annotations

import asyncio
import errno
import gc
import os
import re
import socket
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest

import kecho
import kecho.run
import kecho.steering
from clients import (
    DEADLINE_S,
    connect,
    echo,
    random_bytes,
    receive_until_reset,
    send_until_blocked,
)
from processes import run_python

StartServer = Callable[..., kecho.Server]

MORE_THAN_SOCKETS_HOLD = random_bytes(48 << 20)


def never_reading_client(server: kecho.Server) -> socket.socket:
    """A client that holds up the drain."""
    client = connect(server, receive_buffer=4096, send_buffer=65536)
    send_until_blocked(client, MORE_THAN_SOCKETS_HOLD, quiet_s=0.1)
    return client


def run_script(script: str, *arguments: str, warnings: str = "error") -> CompletedProcess[str]:
    return run_python("-W", warnings, "-c", textwrap.dedent(script), *arguments)


# ---- asyncio ------------------------------------------------------------------------------------


def test_async_with_serves(dispatch: str) -> None:
    async def main() -> kecho.Server:
        async with kecho.Server(port=0, threads=2, dispatch=dispatch) as server:
            reader, writer = await asyncio.open_connection(*server.addresses[0])
            writer.write(b"hello")
            assert await asyncio.wait_for(reader.readexactly(5), DEADLINE_S) == b"hello"
            writer.close()
            await writer.wait_closed()
        return server

    server = asyncio.run(main())
    assert not server.is_running
    assert server.stats().bytes_sent == 5


def test_async_with_does_not_block_the_loop_while_it_stops(dispatch: str) -> None:
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            await asyncio.sleep(0.005)
            ticks += 1

    async def main() -> int:
        server = kecho.Server(port=0, threads=2, dispatch=dispatch, graceful_timeout=0.5)
        ticking = asyncio.create_task(tick())
        async with server:
            client = await asyncio.to_thread(never_reading_client, server)
            before = ticks
        with client:
            receive_until_reset(client)
        ticking.cancel()
        return ticks - before

    # A loop that is blocked until the end ticks once or twice.
    assert asyncio.run(main()) > 10


def test_cancelling_async_with_on_its_way_out_still_stops_the_server(dispatch: str) -> None:
    server = kecho.Server(port=0, threads=2, dispatch=dispatch, graceful_timeout=0.5)

    async def serve(leaving: asyncio.Event, clients: list[socket.socket]) -> None:
        async with server:
            clients.append(await asyncio.to_thread(never_reading_client, server))
            leaving.set()

    async def main() -> None:
        leaving, clients = asyncio.Event(), []
        task = asyncio.create_task(serve(leaving, clients))
        await leaving.wait()  # the task goes on until it waits again, which is in __aexit__
        task.cancel()
        with clients[0]:
            with pytest.raises(asyncio.CancelledError):
                await task
            assert server.is_running
            assert await asyncio.to_thread(server.wait, DEADLINE_S)

    asyncio.run(main())
    assert not server.is_running


def test_an_error_inside_async_with_stops_the_server(dispatch: str) -> None:
    server = kecho.Server(port=0, threads=2, dispatch=dispatch)

    async def main() -> None:
        async with server:
            raise LookupError("mine")

    with pytest.raises(LookupError, match="mine"):
        asyncio.run(main())
    assert not server.is_running


# ---- forgotten servers --------------------------------------------------------------------------


def test_a_forgotten_server_warns_and_leaves_nothing(dispatch: str) -> None:
    server = kecho.Server(port=0, threads=2, dispatch=dispatch)
    server.start()
    with connect(server) as client:
        assert echo(client, b"hello") == b"hello"
        owner = [server]
        del server
        with pytest.warns(ResourceWarning, match="never stopped"):
            owner.clear()
        assert client.recv(1) == b""


def test_a_forgotten_server_in_a_cycle_warns_and_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    server = kecho.Server(uds=path)
    server.start()
    server.myself = server  # type: ignore[attr-defined]
    del server
    with pytest.warns(ResourceWarning, match=re.escape(str(path))):
        gc.collect()
    assert not path.exists()


def test_a_forgotten_server_is_stopped_where_warnings_are_errors() -> None:
    finished = run_script(
        """
        import gc, kecho, os, threading
        server = kecho.Server(port=0, threads=2)
        server.start()
        del server
        gc.collect()
        print(threading.active_count())
        """
    )
    assert finished.stdout == "1\n"
    assert "ResourceWarning" in finished.stderr


def test_a_stopped_or_never_started_server_is_forgotten_in_silence(dispatch: str) -> None:
    server = kecho.Server(port=0, dispatch=dispatch)
    server.start()
    server.stop()
    del server
    kecho.Server(port=0)
    gc.collect()  # a warning is an error


def test_the_threads_of_a_server_are_named(start_server: StartServer, dispatch: str) -> None:
    before = {thread.name for thread in threading.enumerate()}
    start_server(dispatch=dispatch, threads=2)
    named = {thread.name for thread in threading.enumerate()} - before
    assert named == {"kecho-0", "kecho-1", "kecho-watch"}


# ---- the interpreter's end ----------------------------------------------------------------------

RUNNING_IN_A_GLOBAL = """
    import kecho, socket, sys
    server = kecho.Server(port=0, threads=2, dispatch=sys.argv[1], uds=sys.argv[2])
    server.start()
    client = socket.create_connection(("127.0.0.1", server.port))
    client.sendall(b"hello")
    assert client.recv(5) == b"hello"
"""


@pytest.mark.e2e
@pytest.mark.parametrize("warnings", ["default", "ignore", "error"])
def test_the_interpreter_ends_with_a_server_running(
    tmp_path: Path, dispatch: str, warnings: str
) -> None:
    path = tmp_path / "socket"
    script = RUNNING_IN_A_GLOBAL + "    client.close()\n"
    finished = run_script(script, dispatch, str(path), warnings=warnings)
    assert finished.returncode == 0
    assert ("never stopped" in finished.stderr) == (warnings != "ignore"), finished.stderr
    assert not path.exists()


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("last_words", "status", "said"),
    [
        ("raise LookupError('mine')", 1, "LookupError: mine"),
        ("sys.exit(3)", 3, ""),
        ("import os, signal; os.kill(os.getpid(), signal.SIGINT)", -2, "KeyboardInterrupt"),
    ],
)
def test_the_main_thread_takes_the_process_with_it(
    tmp_path: Path, dispatch: str, last_words: str, status: int, said: str
) -> None:
    path = tmp_path / "socket"
    script = f"{RUNNING_IN_A_GLOBAL}    client.close(); {last_words}\n"
    finished = run_script(script, dispatch, str(path), warnings="ignore")
    assert finished.returncode == status, finished.stderr
    assert said in finished.stderr
    assert not path.exists()


@pytest.mark.e2e
def test_the_interpreter_ends_while_clients_hold_up_the_drain(
    tmp_path: Path, dispatch: str
) -> None:
    script = RUNNING_IN_A_GLOBAL + textwrap.indent(
        """
client.settimeout(0.2)
try:
    while True:
        client.sendall(bytes(1 << 20))
except TimeoutError:
    pass
""",
        "    ",
    )
    path = str(tmp_path / "socket")
    finished = run_script(script, dispatch, path, warnings="ignore")
    assert (finished.returncode, finished.stderr) == (0, "")


# ---- fork ---------------------------------------------------------------------------------------

FORK = """
    import kecho, multiprocessing, os, socket, sys

    def echoes(address):
        family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
        with socket.socket(family) as client:
            client.settimeout(30)
            client.connect(address)
            client.sendall(b"hello")
            return client.recv(5) == b"hello"

    server = kecho.Server(port=0, threads=2, dispatch=sys.argv[1], uds=sys.argv[2])
    server.start()
    early = socket.create_connection(("127.0.0.1", server.port), 30)
    early.sendall(b"early")
    assert early.recv(5) == b"early"
    {fork}
    assert os.path.exists(sys.argv[2])
    early.sendall(b"again")
    assert early.recv(5) == b"again"
    assert all(map(echoes, server.addresses))
    early.close()
    server.stop()
    assert not os.path.exists(sys.argv[2])
"""

WAYS_TO_FORK = {
    "os.fork": """
        if (child := os.fork()) == 0:
            assert not server.is_running
            sys.exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    """,
    "os.fork, stopped in the child": """
        if (child := os.fork()) == 0:
            server.stop()
            assert server.wait(0)
            sys.exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    """,
    "os.fork, aborted and dropped in the child": """
        if (child := os.fork()) == 0:
            server.abort()
            del server
            sys.exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    """,
    "os.fork, another server in the child": """
        if (child := os.fork()) == 0:
            with kecho.Server(port=0, threads=2, dispatch=sys.argv[1]) as other:
                assert echoes(other.addresses[0])
            sys.exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    """,
    "os.fork, the same server started again in the child": """
        if (child := os.fork()) == 0:
            server.config = kecho.ServerConfig(port=0, threads=2, dispatch=sys.argv[1])
            server.start()
            assert echoes(server.addresses[0])
            server.stop()
            sys.exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    """,
    "multiprocessing": """
        process = multiprocessing.get_context("fork").Process(target=sys.exit, args=(7,))
        process.start()
        process.join()
        assert process.exitcode == 7
    """,
}


# TSan ends a process that starts threads after such a fork.
STARTS_THREADS = [way for way in WAYS_TO_FORK if "server" in way]


@pytest.mark.e2e
@pytest.mark.parametrize(
    "way",
    [
        pytest.param(way, marks=pytest.mark.slow_under_sanitizers if way in STARTS_THREADS else ())
        for way in WAYS_TO_FORK
    ],
)
def test_a_forked_child_does_not_disturb_the_server(
    tmp_path: Path, dispatch: str, way: str
) -> None:
    fork = textwrap.dedent(WAYS_TO_FORK[way]).strip().replace("\n", "\n    ")
    script = FORK.format(fork=fork)
    # Newer Pythons warn about every fork beside threads.
    finished = run_script(
        script, dispatch, str(tmp_path / "socket"), warnings="ignore::DeprecationWarning"
    )
    assert (finished.returncode, finished.stderr) == (0, "")


@pytest.mark.e2e
def test_a_forked_child_that_lives_on_holds_nothing_open(tmp_path: Path, dispatch: str) -> None:
    finished = run_script(
        """
        import kecho, os, socket, sys
        server = kecho.Server(port=0, threads=2, dispatch=sys.argv[1])
        server.start()
        client = socket.create_connection(("127.0.0.1", server.port), 5)
        client.sendall(b"hello")
        assert client.recv(5) == b"hello"
        read_fd, write_fd = os.pipe()
        if (child := os.fork()) == 0:
            os.close(write_fd)
            os.read(read_fd, 1)
            os._exit(0)
        try:
            client.shutdown(socket.SHUT_WR)
            print("ended", client.recv(1))
        except TimeoutError:
            print("not ended")
        server.stop()
        with socket.socket() as late:
            print("refused" if late.connect_ex(("127.0.0.1", server.port)) else "connected")
        os.close(write_fd)
        os.waitpid(child, 0)
        client.close()
        """,
        dispatch,
        warnings="ignore::DeprecationWarning",
    )
    assert finished.stderr == ""
    assert finished.stdout == "ended b''\nrefused\n"


# ---- a start that fails -------------------------------------------------------------------------


def test_a_port_in_use_leaves_nothing_behind(
    start_server: StartServer, dispatch: str, tmp_path: Path
) -> None:
    held = start_server(host="127.0.0.2")
    path = tmp_path / "socket"
    server = kecho.Server(
        host=["127.0.0.1", "127.0.0.2"], port=held.port, uds=path, dispatch=dispatch, threads=2
    )
    with pytest.raises(OSError, match="in use") as raised:
        server.start()
    assert isinstance(raised.value, kecho.ListenError)
    assert raised.value.errno == errno.EADDRINUSE
    assert raised.value.option == "port"
    assert not server.is_running
    assert not path.exists()
    with socket.socket() as probe:
        # A closed connection of another test may have the same port there, in TIME_WAIT.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", held.port))

    held.stop()
    with server:  # the same one can be started once the port is free
        assert all(is_echoing(address) for address in server.addresses)


def is_echoing(address: object) -> bool:
    family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
    with socket.socket(family) as client:
        client.settimeout(DEADLINE_S)
        client.connect(address)
        return echo(client, b"hello") == b"hello"


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"port": 65536}, "port"),
        ({"port": "1"}, "port"),
        ({"port": True}, "port"),
        ({"host": []}, "host"),
        ({"host": [1]}, "host"),
        ({"uds": "x" * 108}, "uds"),
        ({"backlog": -1}, "backlog"),
        ({"threads": 0}, "threads"),
        ({"dispatch": "both"}, "dispatch"),
        ({"bench": 2}, "bench"),
        ({"bench": 1, "dispatch": "shared"}, "bench"),
        ({"reuse_port": 1}, "reuse_port"),
        ({"max_connections": 0}, "max_connections"),
        ({"idle_timeout": float("nan")}, "idle_timeout"),
        ({"graceful_timeout": -1}, "graceful_timeout"),
    ],
)
def test_an_invalid_option_is_a_value_error_that_names_it(
    options: dict[str, object], name: str
) -> None:
    with pytest.raises(ValueError, match=rf"^{name}: ") as raised:
        kecho.Server(**options)
    assert isinstance(raised.value, kecho.OptionError)
    assert raised.value.option == name


def test_an_unknown_option_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="colour"):
        kecho.Server(port=0, colour="blue")


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"host": "192.0.2.1"}, "host"),
        ({"host": "two..dots"}, "host"),
        ({"uds": "/nonexistent/socket"}, "uds"),
    ],
)
def test_a_refused_listener_is_an_os_error_that_names_its_option(
    options: dict[str, object], name: str, dispatch: str
) -> None:
    server = kecho.Server(**options, dispatch=dispatch)
    with pytest.raises(OSError, match=name) as raised:
        server.start()
    assert isinstance(raised.value, kecho.ListenError)
    assert raised.value.option == name


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_a_thread_that_cannot_be_started_fails_the_start(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, dispatch: str, failing: int
) -> None:
    real_start = threading.Thread.start

    def start(thread: threading.Thread) -> None:
        if thread.name == f"kecho-{failing}":
            raise RuntimeError("can't start new thread")
        real_start(thread)

    path = tmp_path / "socket"
    server = kecho.Server(port=0, uds=path, threads=3, dispatch=dispatch)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        with pytest.raises((OSError, RuntimeError), match="thread"):
            server.start()
    assert not server.is_running
    assert not path.exists()
    with server:
        assert is_echoing(server.addresses[0])


@pytest.mark.e2e
@pytest.mark.slow_under_sanitizers  # their shadow memory is more address space than the limit
def test_a_process_out_of_threads_fails_the_start_and_lives(dispatch: str) -> None:
    finished = run_script(
        """
        import kecho, resource, sys, threading
        threading.stack_size(1 << 30)
        resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
        server = kecho.Server(port=0, threads=8, dispatch=sys.argv[1])
        try:
            server.start()
        except (OSError, RuntimeError) as error:
            print(type(error).__name__, threading.active_count(), server.is_running)
        """,
        dispatch,
        warnings="default",
    )
    assert finished.returncode == 0, finished.stderr
    assert re.fullmatch(r"\w+ 1 False\n", finished.stdout)


def test_a_worker_that_cannot_be_pinned_stops_the_server_and_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # No CPU of that number: the system call itself refuses.
    cpus = [min(os.sched_getaffinity(0)), 1 << 15]
    monkeypatch.setattr(kecho.steering, "usable_cpus", lambda: cpus)
    path = tmp_path / "socket"
    server = kecho.Server(port=0, uds=path, threads=2, dispatch="percpu")
    server.start()
    with pytest.raises(OSError, match="sched_setaffinity") as raised:
        server.wait(DEADLINE_S)
    assert raised.value.errno == errno.EINVAL
    assert not server.is_running
    assert not path.exists()


def test_a_worker_that_cannot_be_pinned_is_reported_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kecho.steering, "usable_cpus", lambda: [1 << 15, (1 << 15) + 1])
    server = kecho.Server(port=0, threads=2, dispatch="percpu")
    server.start()
    with pytest.raises(OSError, match="sched_setaffinity"):
        server.wait(DEADLINE_S)
    assert server.wait(0)
    assert server.stop().active == 0


# ---- the descriptors of a process ---------------------------------------------------------------


@pytest.mark.e2e
def test_descriptors_are_not_inherited_by_programs(start_server: StartServer) -> None:
    server = start_server()
    with connect(server) as client:
        assert echo(client, b"hello") == b"hello"
        listed = run_python("-c", "import os; print(len(os.listdir('/proc/self/fd')))")
        assert listed.stdout == "4\n"  # 0, 1, 2 and the listing


def test_a_hundred_lives_leave_nothing(dispatch: str) -> None:
    server = kecho.Server(port=0, threads=2, dispatch=dispatch)
    for _ in range(100):
        with server:
            assert is_echoing(server.addresses[0])
