"""The command as a process that ends at once: its streams, odd bytes, its exit status."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.python_only


def run_process(
    *arguments: str | bytes, stdout: int = subprocess.PIPE, **environment: str
) -> subprocess.CompletedProcess[bytes]:
    clean = {
        name: text
        for name, text in os.environ.items()
        if not name.startswith("KECHO_") and name != "PYTHONUNBUFFERED"
    }
    return subprocess.run(
        [sys.executable, "-m", "kecho", *arguments],
        env={**clean, **environment},
        stdout=stdout,
        stderr=subprocess.PIPE,
        timeout=30,
    )


@pytest.mark.e2e
@pytest.mark.parametrize("log_format", ["text", "json"])
def test_print_config_survives_a_path_of_odd_bytes(log_format: str) -> None:
    # As in most locales; C and C.UTF-8 are more lenient.
    ended = run_process(
        "--print-config",
        f"--log-format={log_format}",
        "--uds",
        b"/run/\xff",
        PYTHONIOENCODING="utf-8:strict",
    )
    assert (ended.returncode, ended.stderr) == (0, b"")
    assert b"/run/" in ended.stdout


@pytest.mark.e2e
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("argument", ["--help", "--version", "--print-config"])
def test_reader_of_stdout_that_has_gone_is_passed_over_in_silence(
    argument: str, unbuffered: str
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        ended = run_process(argument, stdout=writer, PYTHONUNBUFFERED=unbuffered)
    finally:
        os.close(writer)
    assert ended.stderr == b""
    assert ended.returncode in (0, 1)


@pytest.mark.e2e
def test_arguments_of_odd_bytes_are_refused_in_one_line() -> None:
    ended = run_process(b"--\xff\xfe", PYTHONIOENCODING="utf-8")
    assert ended.returncode == 2
    assert ended.stderr.startswith(b"kecho: error: ")
    assert ended.stderr.count(b"\n") == 1


@pytest.mark.e2e
def test_port_in_use_ends_with_status_1_and_names_the_source() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        by_flag, by_variable = run_process("--port", port), run_process(KECHO_PORT=port)
    for ended, source in ((by_flag, b"--port"), (by_variable, b"KECHO_PORT")):
        assert (ended.returncode, ended.stdout) == (1, b"")
        assert ended.stderr.startswith(b"kecho: error: " + source + b": ")
        assert ended.stderr.count(b"\n") == 1


@pytest.mark.e2e
def test_unusable_path_ends_with_status_1_also_as_json(tmp_path: Path) -> None:
    ended = run_process("--uds", str(tmp_path / "missing/socket"), "--log-format", "json")
    assert (ended.returncode, ended.stdout) == (1, b"")
    record = json.loads(ended.stderr)
    assert record["level"] == "error"
    assert record["message"].startswith("--uds: ")
