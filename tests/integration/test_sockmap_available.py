"""--engine sockmap where it cannot be had, and behind the sandbox."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

import kecho
from kecho.server.confinement.sandbox import IS_SANITIZED
from support.clients import (
    DEADLINE_S,
    connected,
    receive_exactly,
)
from support.engines import needs_sockmap
from support.fixture_types import StartProcess, StartServer
from support.server_process import ServerProcess, run_command


def said(error: pytest.ExceptionInfo[kecho.EngineError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


def test_a_unix_socket_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(kecho.EngineError) as error:
        kecho.Server(uds=str(tmp_path / "s"), engine="sockmap").start()
    assert said(error) == "engine: TCP alone: the kernel does not echo Unix sockets"


def test_udp_is_refused_in_one_line() -> None:
    with pytest.raises(kecho.EngineError) as error:
        kecho.Server(port=0, udp=True, engine="sockmap").start()
    assert said(error) == "engine: TCP alone: the kernel does not echo UDP"


def test_the_kernels_echo_is_called_experimental() -> None:
    """What its echo waits for is the kernel's shared work queue, which no server can bound."""
    said = " ".join(run_command("--help").stdout.split())
    assert "sockmap the kernel echoes; experimental:" in said
    assert "may stall connections for seconds" in said


def test_epoll_says_nothing_about_engines(
    start_server: StartServer, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("DEBUG", "kecho"):
        assert start_server().engine == "epoll"
    assert not [one for one in caplog.records if "engine" in one.getMessage()]


@pytest.fixture
def unprivileged() -> Iterator[tuple[str, ...]]:
    if os.geteuid() != 0:
        yield ()
    else:
        yield ("setpriv", "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs")


def test_without_privileges_one_line_says_what_is_missing(unprivileged: tuple[str, ...]) -> None:
    process = ServerProcess(["--engine", "sockmap"], before=unprivileged)
    try:
        assert process.process.wait(DEADLINE_S) == 1
        assert process.process.stderr is not None
        lines = process.process.stderr.read().decode().splitlines()
    finally:
        process.kill()
    assert len(lines) == 1
    assert lines[0].startswith("kecho: error: --engine: bpf(BPF_")
    assert lines[0].endswith("Operation not permitted; it takes root, or CAP_BPF and CAP_NET_ADMIN")


@needs_sockmap
@pytest.mark.skipif(IS_SANITIZED, reason="a sanitizer needs more than the sandbox gives")
def test_behind_the_sandbox_and_as_somebody_else_the_kernel_still_echoes(
    start_process: StartProcess,
) -> None:
    process = start_process("--engine", "sockmap", "--user", "65534:65534", "--sandbox")
    with connected(process.port, 5) as clients:
        for client in clients:
            client.sendall(b"before")
            assert receive_exactly(client, 6) == b"before"
        with process.paused():
            for client in clients:
                client.sendall(b"after")
                assert receive_exactly(client, 5) == b"after"


@needs_sockmap
def test_a_program_that_the_kernel_refuses_shows_what_it_says(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """By type information in which a pointer and a number of struct sock have changed places."""
    from kecho.server.engines.sockmap import load

    btf = Path("/sys/kernel/btf/vmlinux").read_bytes()
    for name, other in ((b"sk_sndbuf", b"?"), (b"sk_socket", b"sk_sndbuf"), (b"?", b"sk_socket")):
        padded = (one.ljust(9, b"?") for one in (name, other))
        btf = btf.replace(*(b"\0" + one + b"\0" for one in padded))
    with caplog.at_level("ERROR", "kecho"), pytest.raises(kecho.EngineError) as error:
        load(btf, 1024)
    assert said(error).startswith("engine: bpf(BPF_PROG_LOAD, kecho_echo): ")
    assert "cannot access ptr member" in caplog.text


@needs_sockmap
@pytest.mark.parametrize("btf", [b"", b"\0" * 64, b"\x9f\xeb\x01\0\x18\0\0\0" + b"\xff" * 32])
def test_type_information_that_is_none_is_refused(btf: bytes) -> None:
    from kecho.server.engines.sockmap import load

    with pytest.raises(kecho.EngineError) as error:
        load(btf, 1024)
    assert "is no type information" in said(error)
