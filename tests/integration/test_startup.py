"""What starting the server costs: the modules that it imports."""

from __future__ import annotations

import textwrap

import pytest

from support.clients import connect, echo
from support.server_process import ServerProcess, after, run_python

# It is Python that imports.
pytestmark = [pytest.mark.e2e, pytest.mark.slow_under_sanitizers]

# Each is worth milliseconds, or is not needed to serve.
NOT_NEEDED = {
    "asyncio", "ctypes", "email", "http", "hypothesis", "importlib.metadata", "kecho.bench",
    "matplotlib", "multiprocessing", "numpy", "pytest", "rich", "ssl", "unittest",
    "urllib.request", "xml",
}  # fmt: skip


def imported(arguments: list[str]) -> set[str]:
    """The modules that Python imports when it is run like this."""
    finished = run_python("-X", "importtime", *arguments)
    assert finished.returncode == 0, finished.stderr
    lines = [line for line in finished.stderr.splitlines() if line.startswith("import time:")]
    assert lines
    return {line.rpartition("|")[2].strip() for line in lines}


@pytest.mark.parametrize(
    "arguments",
    [
        ["-c", "import kecho; kecho.Server"],
        ["-m", "kecho", "--version"],
        ["-m", "kecho", "--print-config"],
    ],
    ids=" ".join,
)
def test_nothing_needless_is_imported(arguments: list[str]) -> None:
    modules = imported(arguments)
    assert "kecho.server._engine" in modules
    assert modules & NOT_NEEDED == set()


def test_the_package_alone_does_not_load_the_engine() -> None:
    assert "kecho.server._engine" not in imported(["-c", "import kecho"])


def test_a_server_that_serves_has_imported_nothing_needless(dispatch: str) -> None:
    script = """
        import sys
        from kecho.server import cli
        status = cli.main(sys.argv[1:])
        print("imported", *sys.modules, file=sys.stderr)
        sys.exit(status)
    """
    arguments = ["-c", textwrap.dedent(script), "--port=0", "--dispatch", dispatch]
    before = after(f"sys.argv[2:] = {arguments!r}")
    with ServerProcess([], before=before) as process:
        process.wait_until_listening()
        with connect(process.port) as client:
            assert echo(client, b"hello") == b"hello"
        assert process.stop() == 0
    (modules,) = (
        set(line.split()[1:])
        for line in process.stderr.splitlines()
        if line.startswith("imported ")
    )
    assert "kecho.server._engine" in modules
    assert modules & NOT_NEEDED == set()


def test_importing_kecho_starts_and_opens_nothing() -> None:
    finished = run_python(
        "-c",
        "import os, threading, kecho;"
        "print(threading.active_count(), len(os.listdir('/proc/self/fd')))",
    )
    assert finished.stdout == "1 4\n"  # 0, 1, 2 and the listing
