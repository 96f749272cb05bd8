"""From a checkout to an installed `kecho`: sdist, wheel, a clean environment."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest

import kecho
from support.clients import DEADLINE_S, echo
from support.planted_modules import plant

# Compiling them with a sanitizer's preloads proves nothing more.
pytestmark = [
    pytest.mark.e2e,
    pytest.mark.outside,
    pytest.mark.release,
    pytest.mark.slow_under_sanitizers,
    pytest.mark.timeout(600),
]

CHECKOUT = Path(__file__).resolve().parents[2]
BUILD_DEADLINE_S = 300
OFFLINE = re.compile(
    r"Temporary failure in name resolution|NewConnectionError|ConnectTimeout|ProxyError"
    r"|No matching distribution found|Network is unreachable"
)


@dataclass(frozen=True)
class Built:
    source: Path
    sdist: Path
    wheel: Path


@dataclass(frozen=True)
class Environment:
    """A virtual environment that holds pip and nothing else."""

    path: Path

    @property
    def python(self) -> str:
        return str(self.path / "bin" / "python")

    @property
    def kecho(self) -> str:
        return str(self.path / "bin" / "kecho")


def run(command: Sequence[str], where: Path) -> subprocess.CompletedProcess[str]:
    """Without what this run of Python passes on to its children."""
    environment = {
        name: text
        for name, text in os.environ.items()
        if not name.startswith(("KECHO_", "PYTHON", "LD_PRELOAD", "VIRTUAL_ENV"))
    }
    return subprocess.run(
        command, cwd=where, env=environment, stdin=subprocess.DEVNULL,
        capture_output=True, text=True, timeout=BUILD_DEADLINE_S,
    )  # fmt: skip


def succeed(command: Sequence[str], where: Path) -> str:
    finished = run(command, where)
    output = finished.stdout + finished.stderr
    if finished.returncode != 0 and OFFLINE.search(output):
        pytest.skip(f"pip cannot get what a build needs: {OFFLINE.search(output)[0]}")
    assert finished.returncode == 0, output[-5000:]
    return finished.stdout


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout without what was built in it."""
    needed = [name for name in ("build", "setuptools", "Cython", "wheel") if not find_spec(name)]
    if needed:
        pytest.skip(f"not installed: {', '.join(needed)}")
    if not shutil.which(os.environ.get("CC", "gcc")):
        pytest.skip("there is no C compiler")
    path = tmp_path_factory.mktemp("packaging") / "source"
    unwanted = shutil.ignore_patterns(
        ".git", ".venv", "build", "dist", "*.so", "*.egg-info", "__pycache__", ".*_cache",
        ".hypothesis",
    )  # fmt: skip
    shutil.copytree(CHECKOUT, path, ignore=unwanted)
    return path


@pytest.fixture(scope="session")
def built(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Built:
    """The sdist, and the wheel built from what is in it, by the build tools that are here."""
    out = tmp_path_factory.mktemp("dist")
    succeed([sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out)], source)
    (sdist,) = out.glob("*.tar.gz")
    (wheel,) = out.glob("*.whl")
    return Built(source, sdist, wheel)


def make_environment(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    path = tmp_path_factory.mktemp("environment") / "venv"
    succeed([sys.executable, "-m", "venv", str(path)], path.parent)
    return Environment(path)


@pytest.fixture(scope="session")
def installed(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """An environment with the wheel, installed without access to anything else."""
    environment = make_environment(tmp_path_factory)
    command = [environment.python, "-m", "pip", "install", "--no-index", str(built.wheel)]
    succeed(command, environment.path)
    return environment


def names_in(archive: Path) -> set[str]:
    """Without the directory that everything in an sdist is in."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            return set(wheel.namelist())
    with tarfile.open(archive) as sdist:
        return {name.partition("/")[2] for name in sdist.getnames()}


def test_the_sdist_holds_all_that_a_build_needs_and_nothing_built(built: Built) -> None:
    names = names_in(built.sdist)
    native = [path for path in (built.source / "ext").rglob("*") if path.is_file()]
    for path in native:
        assert str(path.relative_to(built.source)) in names
    assert {"setup.py", "pyproject.toml", "LICENSE", "Makefile", "kecho/py.typed"} <= names
    assert {"CONTRIBUTING.md", "docs/tutorial.md", "docs/images/burst.png", ".ci/run"} <= names
    assert not [name for name in names if name.endswith((".so", ".pyc"))]
    assert not [name for name in names if name.startswith(("build/", ".venv/"))]
    # Generated C would hide whether Cython and the sources agree.
    assert "ext/engine/engine.c" not in names


def test_the_wheel_holds_the_package_and_nothing_else(built: Built) -> None:
    names = names_in(built.wheel)
    assert {"kecho/server/cli.py", "kecho/server/_engine.pyi", "kecho/py.typed"} <= names
    assert [name for name in names if re.fullmatch(r"kecho/server/_engine\..*\.so", name)]
    assert {name.partition("/")[0] for name in names} == {
        "kecho",
        f"kecho-{kecho.__version__}.dist-info",
    }
    assert not [name for name in names if name.endswith((".c", ".pyx", ".pxd", ".h"))]


@pytest.mark.parametrize("command", ["module", "script"])
def test_the_installed_command_serves_from_an_empty_directory(
    installed: Environment, tmp_path: Path, command: str, dispatch: str
) -> None:
    start = [installed.python, "-m", "kecho"] if command == "module" else [installed.kecho]
    assert succeed([*start, "--version"], tmp_path) == f"kecho {kecho.__version__}\n"
    assert_serves([*start, "--dispatch", dispatch], tmp_path)


def assert_serves(command: Sequence[str], where: Path) -> None:
    environment = {name: text for name, text in os.environ.items() if not name.startswith("PYTHON")}
    process = subprocess.Popen(
        [*command, "--port", "0"], cwd=where, env=environment, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stderr
        found = re.search(r"tcp 127.0.0.1:(\d+)", process.stderr.readline())
        assert found
        with socket.create_connection(("127.0.0.1", int(found[1])), DEADLINE_S) as client:
            assert echo(client, b"hello\n") == b"hello\n"
        process.terminate()
        _, said = process.communicate(timeout=DEADLINE_S)
        assert process.returncode == 0
        assert "1 connection accepted" in said
    finally:
        process.kill()
        process.communicate()


def test_it_is_installed_without_any_dependency(installed: Environment, tmp_path: Path) -> None:
    listed = succeed([installed.python, "-m", "pip", "list", "--format=freeze"], tmp_path)
    names = {line.partition("==")[0] for line in listed.splitlines()}
    assert "kecho" in names
    assert names <= {"kecho", "pip", "setuptools"}  # Python 3.11 puts setuptools in every venv


def test_it_is_the_installed_package_that_is_imported(
    installed: Environment, tmp_path: Path
) -> None:
    script = (
        "import kecho; from kecho.server import _engine; "
        "print(kecho.__file__); print(_engine.__file__)"
    )
    for file in succeed([installed.python, "-c", script], tmp_path).splitlines():
        assert Path(file).is_relative_to(installed.path)


@pytest.mark.parametrize("name", ["kecho", "kecho-bench", "kecho-drop"])
def test_installed_script_takes_no_module_from_the_current_directory(
    installed: Environment, tmp_path: Path, name: str
) -> None:
    trace = plant(tmp_path)
    command = str(installed.path / "bin" / name)
    assert succeed([command, "--version"], tmp_path) == f"kecho {kecho.__version__}\n"
    if name == "kecho-drop":
        assert run([command, "--list", "--peer", ":1"], tmp_path).returncode == 1
    assert not trace.exists(), trace.read_text()


def test_pip_installs_from_a_source_directory_elsewhere(
    source: Path, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    environment = make_environment(tmp_path_factory)
    succeed([environment.python, "-m", "pip", "install", str(source)], tmp_path)
    assert_serves([environment.kecho], tmp_path)
