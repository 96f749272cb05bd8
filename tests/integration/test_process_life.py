"""Servers inside a process: asyncio, forgotten servers, the interpreter's end."""

from __future__ import annotations

import asyncio
import gc
import re
import socket
import textwrap
import threading
from pathlib import Path

import pytest

import kecho
import kecho.server.run
import kecho.server.sockets.steering
from support.clients import (
    DEADLINE_S,
    connect,
    echo,
    plenty,
    receive_until_reset,
    send_until_blocked,
)
from support.fixture_types import StartServer
from support.server_process import run_script


def never_reading_client(server: kecho.Server) -> socket.socket:
    """A client that holds up the drain."""
    client = connect(server, receive_buffer=4096, send_buffer=65536)
    send_until_blocked(client, plenty())
    return client


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
