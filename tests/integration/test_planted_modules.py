"""The commands do not take modules from the directory that they are run in."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path

import pytest

from support.clients import DEADLINE_S
from support.planted_modules import plant

pytestmark = pytest.mark.e2e

PROJECT = tomllib.loads(Path(__file__, "../../../pyproject.toml").resolve().read_text())
# What pip makes of an entry point, but for its first line.
SCRIPT = """\
import sys
from {module} import {function}
if __name__ == "__main__":
    sys.exit({function}())
"""


def script(name: str, directory: Path) -> list[str]:
    """The console script of that name, as pip would install it."""
    module, _, function = PROJECT["project"]["scripts"][name].partition(":")
    path = directory / name
    path.write_text(SCRIPT.format(module=module, function=function))
    return [sys.executable, str(path)]


def run(command: Sequence[str], where: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=where, stdin=subprocess.DEVNULL, capture_output=True, text=True,
        timeout=2 * DEADLINE_S,
    )  # fmt: skip


BENCH = ("--spawn", "--mode", "closed", "-c", "2", "-d", "0.05")


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("kecho", ["--help"]),
        ("kecho-drop", ["--list", "--peer", ":1"]),
        ("kecho-bench", [*BENCH, "--processes", "2"]),
    ],
)
def test_command_takes_no_module_from_the_current_directory(
    name: str, arguments: list[str], tmp_path: Path
) -> None:
    scripts, hostile = tmp_path / "bin", tmp_path / "hostile"
    scripts.mkdir()
    hostile.mkdir()
    trace = plant(hostile)
    finished = run([*script(name, scripts), *arguments], hostile)
    assert "Traceback" not in finished.stderr
    assert finished.stdout or finished.returncode == 1
    assert not trace.exists(), trace.read_text()


def test_module_takes_none_with_the_option_that_is_documented(tmp_path: Path) -> None:
    trace = plant(tmp_path)
    run([sys.executable, "-P", "-m", "kecho.drop", "--list", "--peer", ":1"], tmp_path)
    assert not trace.exists(), trace.read_text()


def test_what_is_planted_would_be_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    trace = plant(tmp_path)
    run([sys.executable, "-m", "kecho.drop", "--list", "--peer", ":1"], tmp_path)
    assert trace.exists()
