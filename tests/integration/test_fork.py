"""Servers in a process that forks."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

from support.server_process import run_script

FORK = """
    import kecho, multiprocessing, os, socket, sys

    def echoes(address):
        family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
        with socket.socket(family) as client:
            client.settimeout(30)
            client.connect(address)
            client.sendall(b"hello")
            return client.recv(5) == b"hello"

    server = kecho.Server(
        port=0, threads=2, dispatch=sys.argv[1], uds=sys.argv[2], engine=sys.argv[3]
    )
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


# sockmap is for TCP alone.
ENGINES = pytest.mark.parametrize("engine", ["epoll", "io_uring"], indirect=True)
# TSan ends a process that starts threads after such a fork.
STARTS_THREADS = [way for way in WAYS_TO_FORK if "server" in way]


@pytest.mark.e2e
@ENGINES
@pytest.mark.parametrize(
    "way",
    [
        pytest.param(way, marks=pytest.mark.slow_under_sanitizers if way in STARTS_THREADS else ())
        for way in WAYS_TO_FORK
    ],
)
def test_a_forked_child_does_not_disturb_the_server(
    tmp_path: Path, dispatch: str, engine: str, way: str
) -> None:
    fork = textwrap.dedent(WAYS_TO_FORK[way]).strip().replace("\n", "\n    ")
    script = FORK.format(fork=fork)
    # Newer Pythons warn about every fork beside threads.
    finished = run_script(
        *(script, dispatch, str(tmp_path / "socket"), engine), warnings="ignore::DeprecationWarning"
    )
    assert (finished.returncode, finished.stderr) == (0, "")


@pytest.mark.e2e
@ENGINES
def test_a_forked_child_that_lives_on_holds_nothing_open(dispatch: str, engine: str) -> None:
    finished = run_script(
        """
        import kecho, os, socket, sys
        server = kecho.Server(port=0, threads=2, dispatch=sys.argv[1], engine=sys.argv[2])
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
        engine,
        warnings="ignore::DeprecationWarning",
    )
    assert finished.stderr == ""
    assert finished.stdout == "ended b''\nrefused\n"
