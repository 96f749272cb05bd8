"""Results are put away before anybody is told, and whether or not somebody listens."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import kecho
from kecho.bench import Result
from support.clients import wait_for
from support.server_process import run_python

pytestmark = pytest.mark.slow_under_sanitizers

COMMAND = [sys.executable, "-m", "kecho.bench"]
SHORT = ["-c", "5", "--rounds", "1"]


def run_into(stdout: int | str, *arguments: str, **environment: str) -> tuple[int, str]:
    """Status and stderr of the command with this standard output: a descriptor, or a path."""
    fd = os.open(stdout, os.O_WRONLY) if isinstance(stdout, str) else stdout
    try:
        finished = subprocess.run(
            [*COMMAND, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=fd,
            stderr=subprocess.PIPE,
            env={**os.environ, **environment},
            text=True,
            timeout=60,
        )
    finally:
        os.close(fd)
    return finished.returncode, finished.stderr


@pytest.fixture
def port(start_server: Callable[..., kecho.Server]) -> str:
    return str(start_server().port)


@pytest.mark.e2e
def test_a_full_device_for_the_table_costs_no_file(port: str, tmp_path: Path) -> None:
    saved = tmp_path / "result.json"
    status, stderr = run_into("/dev/full", "--port", port, *SHORT, "--json", str(saved))
    assert status == 1
    assert stderr == "kecho.bench: error: standard output: No space left on device\n"
    assert Result.from_json(saved.read_text()).echoes == 5


@pytest.mark.e2e
def test_a_reader_that_has_gone_costs_no_file(port: str, tmp_path: Path) -> None:
    saved = tmp_path / "result.json"
    reader, writer = os.pipe()
    os.close(reader)
    status, stderr = run_into(writer, "--port", port, *SHORT, "--json", str(saved))
    assert (status, stderr) == (1, "")
    assert Result.from_json(saved.read_text()).echoes == 5


@pytest.mark.e2e
def test_a_locale_without_the_micro_sign_gets_another_word(port: str, tmp_path: Path) -> None:
    saved, shown = tmp_path / "result.json", tmp_path / "shown"
    shown.touch()
    status, stderr = run_into(
        *(str(shown), "--port", port, *SHORT, "--json", str(saved)), PYTHONIOENCODING="ascii"
    )
    assert (status, stderr) == (0, "")
    assert "errors      none" in shown.read_text(encoding="ascii")
    assert Result.from_json(saved.read_text()).echoes == 5


@pytest.mark.e2e
@pytest.mark.parametrize("to_files", [False, True])
def test_a_terminal_that_goes_during_a_run_costs_no_file(
    start_server: Callable[..., kecho.Server], tmp_path: Path, to_files: bool
) -> None:
    """With rich, which draws on it meanwhile, and the table elsewhere or there as well."""
    pytest.importorskip("rich")
    server, saved, shown = start_server(), tmp_path / "result.json", tmp_path / "shown"
    ours, theirs = os.openpty()
    with shown.open("w") as out:
        process = subprocess.Popen(
            [
                *(*COMMAND, "--port", str(server.port), "--mode", "closed", "-c", "2"),
                *("-d", "1.5", "--json", str(saved)),
            ],
            stdin=subprocess.DEVNULL,
            stdout=out if to_files else theirs,
            stderr=theirs,
            start_new_session=True,  # nor is it told by SIGHUP
        )
    os.close(theirs)
    try:
        wait_for(lambda: server.stats().echoes > 200, "the run is under way")
        os.close(ours)
        status = process.wait(60)
    finally:
        process.kill()
        process.wait()
    assert status == (0 if to_files else 1)
    assert ("echoes " in shown.read_text()) == to_files
    result = Result.from_json(saved.read_text())
    assert not result.partial
    assert result.duration_s == 1.5


@pytest.mark.e2e
def test_a_condition_that_came_true_is_told_by_the_status_though_nobody_reads(
    port: str, tmp_path: Path
) -> None:
    saved = str(tmp_path / "result.json")
    with open(os.devnull, "w") as null:
        assert run_into(os.dup(null.fileno()), "--port", port, *SHORT, "--json", saved)[0] == 0
    status, _ = run_into("/dev/full", "compare", saved, saved, "--fail-if", "errors<1")
    assert status == 3


@pytest.mark.e2e
@pytest.mark.parametrize("name", ["csv", "hgrm", "hlog", "txt"])
def test_a_file_on_stdout_is_nothing_but_that_file(port: str, name: str) -> None:
    begins = {"csv": "mode,", "hgrm": "       Value", "hlog": "#[", "txt": "0 "}[name]
    finished = run_python("-m", "kecho.bench", "--port", port, *SHORT, f"--{name}", "-")
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.startswith(begins)
    assert "verdict" not in finished.stdout
    assert "verdict" in finished.stderr


@pytest.mark.parametrize("second", ["-", "/dev/fd/1", "/proc/self/fd/1"])
def test_two_files_in_one_place_are_refused(second: str) -> None:
    finished = run_python("-m", "kecho.bench", "--json", "-", "--csv", second)
    assert finished.returncode == 2
    assert finished.stderr == "kecho.bench: error: --csv: goes to the same file as --json\n"


def test_wrong_usage_has_its_status_though_nobody_reads() -> None:
    with open("/dev/full", "w") as full:
        finished = subprocess.run([*COMMAND, "--nonsense"], stderr=full, timeout=60)
    assert finished.returncode == 2
