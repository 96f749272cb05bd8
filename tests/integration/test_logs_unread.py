"""Log lines that nobody reads: they cost a moment, and not the clients or the end."""

from __future__ import annotations

import fcntl
import logging
import os
import pty
import signal
import threading
import time

import pytest

from kecho.server.logs import PATIENCE_S, PatientHandler
from support.clients import connect, echo
from support.fixture_types import StartProcess
from support.server_process import ServerProcess

# What waits for readers is Python.
pytestmark = [pytest.mark.e2e, pytest.mark.slow_under_sanitizers]

F_SETPIPE_SZ = 1031  # fcntl(2)


def stuff(process: ServerProcess) -> None:
    """More lines than the pipe holds."""
    for _ in range(100):
        process.send(signal.SIGUSR1)
        time.sleep(0.01)


def set_pipe_size(process: ServerProcess, size: int) -> None:
    assert process.process.stderr is not None
    fcntl.fcntl(process.process.stderr, F_SETPIPE_SZ, size)


def with_a_small_pipe(start_process: StartProcess, *arguments: str) -> ServerProcess:
    process = start_process(*arguments)
    set_pipe_size(process, 4096)
    return process


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_a_command_whose_lines_nobody_reads_serves_and_ends(
    start_process: StartProcess, dispatch: str, log_format: str
) -> None:
    process = with_a_small_pipe(
        start_process, "--dispatch", dispatch, "--threads=2", "--log-format", log_format
    )
    stuff(process)
    with connect(process.port) as client:
        assert echo(client, b"hello") == b"hello"
        begun = time.monotonic()
        process.send(signal.SIGTERM)
        assert process.process.wait(60) == 0  # without reading anything meanwhile
        assert time.monotonic() - begun < PATIENCE_S + 5
        assert client.recv(1) == b""


@pytest.mark.parametrize("length", [60, 200, 3000])
def test_a_terminal_that_nobody_reads_is_waited_for_no_longer(length: int) -> None:
    """It takes the beginning of a line, and a write would wait until it takes the rest."""
    controller, terminal = pty.openpty()
    with os.fdopen(terminal, "w") as stream:
        handler = PatientHandler(stream)
        record = logging.makeLogRecord({"msg": "x" * length})
        lines = 100_000 // length  # a terminal holds 64 KiB
        writing = threading.Thread(target=lambda: [handler.emit(record) for _ in range(lines)])
        writing.start()
        writing.join(PATIENCE_S + 10)
        was_held_up = writing.is_alive()
        os.close(controller)  # ends whatever waits
        writing.join()
        handler.close()
    assert not was_held_up


def test_a_reader_who_comes_back_is_told_how_many_lines_it_missed(
    start_process: StartProcess, dispatch: str
) -> None:
    process = with_a_small_pipe(start_process, "--dispatch", dispatch, "--threads=2")
    stuff(process)
    time.sleep(PATIENCE_S + 1)
    process.stderr = ""
    process.send(signal.SIGUSR1)  # goes nowhere: the pipe is full
    process.wait_until_said("echoes/s")
    set_pipe_size(process, 65_536)  # of one page, each line would have to be read before the next
    process.send(signal.SIGUSR1)
    found = process.wait_until_said(r"\nkecho: warning: lines lost because nobody read them: (\d+)")
    assert int(found[1]) >= 1
    process.stderr = ""
    assert process.stop() == 0
    assert "draining" in process.stderr
    assert "stopped after" in process.stderr
