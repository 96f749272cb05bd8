"""--engine io_uring where it cannot be had, and --engine auto."""

from __future__ import annotations

import errno
import os

import pytest

import kecho
from kecho.server.engines.io_uring import ring_entries
from support.clients import connect, echo
from support.engines import needs_io_uring
from support.fixture_types import StartServer
from support.server_process import ServerProcess, assert_refused, refusing, run_command, run_script


def test_it_does_not_poll() -> None:
    with pytest.raises(
        kecho.OptionError, match="busy_poll: is not supported by the io_uring engine"
    ):
        kecho.Server(engine="io_uring", busy_poll="auto")
    finished = run_command("--port", "0", "--engine", "io_uring", "--busy-poll", "200")
    assert_refused(finished, 2, "--busy-poll", "io_uring")


@needs_io_uring
def test_a_process_that_may_not_make_rings_says_so() -> None:
    io_uring_setup = 425  # on every architecture
    before = refusing(io_uring_setup, errno.EPERM)
    with ServerProcess(["--engine=io_uring"], before=before) as process:
        assert process.wait() == 1
    assert "io_uring_setup: Operation not permitted" in process.stderr
    assert "kernel.io_uring_disabled" in process.stderr


@pytest.mark.parametrize(
    ("number", "advice"), [(errno.ENOSYS, "CONFIG_IO_URING"), (errno.EMFILE, "io_uring_setup")]
)
def test_what_is_missing_is_said(number: int, advice: str) -> None:
    def fail(_: int) -> None:
        raise OSError(number, f"io_uring_setup: {os.strerror(number)}")

    with pytest.raises(kecho.EngineError, match=advice) as raised:
        ring_entries(kecho.ServerConfig(engine="io_uring"), fail)
    assert raised.value.errno == number


def test_an_older_kernel_is_told_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kecho.server.engines.io_uring.VERSION", (6, 0))
    with pytest.raises(kecho.EngineError, match=r"takes Linux 6\.1 or newer"):
        ring_entries(kecho.ServerConfig(engine="io_uring"), lambda _: None)


@needs_io_uring
@pytest.mark.slow_under_sanitizers  # their runtime needs the memory
def test_rings_that_were_closed_a_moment_ago_keep_no_memory_from_new_ones() -> None:
    """Without CAP_IPC_LOCK they count against RLIMIT_MEMLOCK until the kernel has freed them."""
    finished = run_script(
        """
        import resource
        import kecho
        from kecho.server import _sandbox
        _sandbox.drop_capabilities()
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (1 << 20, 1 << 20))
        server = kecho.Server(port=0, engine="io_uring", threads=2)
        for _ in range(20):
            server.start()
            server.stop()
        """
    )
    assert finished.stderr == ""
    assert finished.returncode == 0


# ---- auto ---------------------------------------------------------------------------------------


@needs_io_uring
@pytest.mark.parametrize("options", [{}, {"udp": True}])
def test_auto_is_io_uring_where_it_is_available(
    start_server: StartServer, options: dict[str, bool]
) -> None:
    server = start_server(engine="auto", **options)
    assert server.engine == "io_uring"
    with connect(server.addresses[0][1]) as client:
        assert echo(client, b"x") == b"x"


def test_auto_is_epoll_where_it_is_to_poll_and_says_so(
    start_server: StartServer, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", "kecho"):
        server = start_server(engine="auto", busy_poll=10)
    assert server.engine == "epoll"
    lines = [one.getMessage() for one in caplog.records if "engine" in one.getMessage()]
    assert lines == [
        "engine: epoll, since io_uring is not available: it does not poll (--busy-poll)"
    ]


def test_auto_is_epoll_where_rings_are_refused(caplog: pytest.LogCaptureFixture) -> None:
    def fail(_: int) -> None:
        raise OSError(errno.EPERM, f"io_uring_setup: {os.strerror(errno.EPERM)}")

    with caplog.at_level("INFO", "kecho"):
        assert ring_entries(kecho.ServerConfig(engine="auto"), fail) == 0
    assert "engine: epoll, since io_uring is not available: io_uring_setup" in caplog.text
    assert "kernel.io_uring_disabled" in caplog.text
