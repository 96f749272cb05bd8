"""Servers inside programs that do not run on asyncio and plain threads: trio, gevent."""

from __future__ import annotations

from collections.abc import Coroutine

import pytest

import kecho
from support.server_process import run_script

# ---- trio ---------------------------------------------------------------------------------------


# In a process of its own: trio keeps its threads for a while.


@pytest.mark.e2e
@pytest.mark.parametrize("library", ["trio", "anyio"])
def test_async_with_serves_under_trio(dispatch: str, library: str) -> None:
    pytest.importorskip("trio")
    pytest.importorskip(library)
    finished = run_script(
        f"""
        import sys, kecho, trio, {library}
        async def main():
            with trio.fail_after(30):
                async with kecho.Server(port=0, threads=2, dispatch=sys.argv[1]) as server:
                    stream = await trio.open_tcp_stream(*server.addresses[0])
                    await stream.send_all(b"hello")
                    print(await stream.receive_some())
                    await stream.aclose()
            print(server.is_running, server.stats().bytes_sent)
        {library}.run(main{', backend="trio"' if library == "anyio" else ""})
        """,
        dispatch,
    )
    assert finished.stdout == "b'hello'\nFalse 5\n", finished.stderr


@pytest.mark.e2e
@pytest.mark.parametrize("when", ["before", "inside"])
def test_a_cancelled_async_with_under_trio_leaves_no_server(dispatch: str, when: str) -> None:
    pytest.importorskip("trio")
    finished = run_script(
        f"""
        import sys, kecho, trio
        server = kecho.Server(port=0, threads=2, dispatch=sys.argv[1])
        async def main():
            with trio.CancelScope() as scope:
                if {when == "before"}:
                    scope.cancel()
                async with server:
                    scope.cancel()
                    await trio.sleep_forever()
            print(scope.cancelled_caught, server.is_running)
        trio.run(main)
        """,
        dispatch,
    )
    assert finished.stdout == "True False\n", finished.stderr


def test_async_with_under_an_unknown_loop_is_refused_in_words() -> None:
    server = kecho.Server(port=0)
    entering: Coroutine[None, None, kecho.Server] = server.__aenter__()
    with pytest.raises(RuntimeError, match="under asyncio and trio"):
        entering.send(None)
    assert not server.is_running


# ---- gevent -------------------------------------------------------------------------------------


@pytest.mark.e2e
def test_a_start_with_gevents_threads_is_refused_in_words() -> None:
    pytest.importorskip("gevent")
    finished = run_script(
        """
        from gevent import monkey
        monkey.patch_all()
        import kecho
        try:
            kecho.Server(port=0).start()
        except RuntimeError as error:
            print(error)
        """,
        warnings="default",
    )
    assert "patch_all(thread=False)" in finished.stdout, finished.stderr


@pytest.mark.e2e
def test_a_server_beside_gevents_sockets_serves() -> None:
    pytest.importorskip("gevent")
    finished = run_script(
        """
        from gevent import monkey
        monkey.patch_all(thread=False)
        import gevent, kecho, socket
        with kecho.Server(host="localhost", port=0, threads=2) as server:
            def ask():
                client = socket.create_connection(server.addresses[0][:2], timeout=30)
                client.sendall(b"hello")
                return client.recv(5)
            asking = [gevent.spawn(ask) for _ in range(10)]
            gevent.joinall(asking, raise_error=True)
            print({one.value for one in asking})
        """,
        warnings="default",
    )
    assert finished.stdout == "{b'hello'}\n", finished.stderr
