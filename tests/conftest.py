"""Fixtures that every test may use, and the check that no test leaves anything behind."""

from __future__ import annotations

import contextlib
import gc
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import settings

import kecho
from support import fuzzing, own_network, tiers
from support.clients import DEADLINE_S
from support.engines import BESIDE_EPOLL, why_no
from support.kernel_log import KernelLog, troubles
from support.server_process import ServerProcess
from support.traced_server import StartTraced, TracedServer

DISPATCHES = ("shared", "percpu")
KERNEL_LOG = pytest.StashKey[KernelLog]()

# An example may take long on a busy machine.
settings.register_profile("kecho", deadline=None)
settings.load_profile("kecho")

# For those who test benchmarks/. At the end: kecho is that of the build in question.
sys.path.append(str(Path(__file__).parents[1]))


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("kecho")
    group.addoption(
        "--everything",
        action="store_true",
        help="every variant of every test, and those marked `release`",
    )
    group.addoption(
        "--host-network",
        action="store_true",
        help="stay in the host's network instead of entering a namespace",
    )
    fuzzing.options(group)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers",
        "engines(sanitized=False, dispatch=False): each test of TCP runs under each engine. "
        "sanitized: `make asan` and `make tsan` run it under each engine, not only epoll. "
        "dispatch: `make check` runs more pairs of dispatch and engine (tests/support/tiers.py)",
    )
    if hasattr(config, "workerinput") or config.getoption("--host-network"):
        return  # own_network.py has started the worker in a namespace
    if config.getoption("tx", None):
        if own_network.can_be_entered():
            program = shlex.join([sys.executable, own_network.__file__])
            config.option.tx = [f"popen//python={program}" for _ in config.option.tx]
        else:
            # In one network, a test would see the ports and counters of the tests beside it.
            config.option.tx, config.option.dist, config.option.numprocesses = [], "no", None
    else:
        with contextlib.suppress(OSError):
            own_network.enter()


def pytest_report_header(config: pytest.Config) -> str:
    if config.getoption("tx", None):
        return "network: a namespace for each worker"
    if own_network.is_entered():
        return "network: a namespace of this run"
    return "network: the host's" + (
        "" if config.getoption("--host-network") else ", serially; namespaces are refused here"
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Modules with the mark `engines`: their tests of TCP run under each engine."""
    mark = metafunc.definition.get_closest_marker("engines")
    if mark is None or "engine" not in metafunc.fixturenames:
        return
    engines: list[object] = ["epoll"]
    if "unix" not in metafunc.function.__name__:
        left_out = [] if mark.kwargs.get("sanitized") else [pytest.mark.slow_under_sanitizers]
        engines += [pytest.param(name, marks=left_out) for name in BESIDE_EPOLL]
    metafunc.parametrize("engine", engines, indirect=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselects what only `make check-all` runs, unless that is asked for."""
    everything = config.getoption("--everything")
    kept, left_out = [], []
    for item in items:
        is_kept = not tiers.is_redundant(item) and (everything or not tiers.is_for_a_release(item))
        (kept if is_kept else left_out).append(item)
    config.hook.pytest_deselected(items=left_out)
    items[:] = kept
    fuzzing.prepare(kept, config)


@pytest.fixture
def engine(request: pytest.FixtureRequest) -> str:
    """Who echoes TCP for start_server() and start_process(); see the mark `engines`."""
    name = str(getattr(request, "param", "epoll"))
    if name in BESIDE_EPOLL and (reason := why_no(name)) is not None:
        pytest.skip(reason)
    return name


@pytest.fixture
def fuzz(request: pytest.FixtureRequest, tmp_path: Path) -> fuzzing.Fuzz:
    """fuzz(target, seeds=..., refusals=...): see support.fuzzing."""
    return fuzzing.make(request, tmp_path)


@pytest.fixture(params=DISPATCHES)
def dispatch(request: pytest.FixtureRequest) -> str:
    """Has a test run under each way of spreading the work."""
    return str(request.param)


@pytest.fixture
def start_server(engine: str) -> Iterator[Callable[..., kecho.Server]]:
    """start_server(**options) -> a running Server on a free port of 127.0.0.1; stopped in the end.

    Two workers unless the test says otherwise, so that hand-over between threads is exercised.
    """
    servers: list[kecho.Server] = []

    def start(**options: object) -> kecho.Server:
        if not {"uds", "fd"} & options.keys():
            options.setdefault("port", 0)
        options.setdefault("threads", 2)
        if not {"uds", "udp"} & options.keys():
            options.setdefault("engine", engine)
        server = kecho.Server(**options)
        server.start()
        servers.append(server)
        return server

    yield start
    for server in servers:
        if server.is_running:
            server.stop(graceful_timeout=0)


@pytest.fixture
def server(start_server: Callable[..., kecho.Server], dispatch: str) -> kecho.Server:
    """A running server, under each dispatch."""
    return start_server(dispatch=dispatch)


@pytest.fixture
def start_process(engine: str) -> Iterator[Callable[..., ServerProcess]]:
    """start_process(*arguments, **environment) -> `python -m kecho` once it listens.

    `--port 0` is added unless the arguments say where to listen. Killed in the end.
    """
    processes: list[ServerProcess] = []

    def start(*arguments: str, **environment: str) -> ServerProcess:
        if engine != "epoll" and not {"--uds", "--udp"} & {*arguments}:
            arguments = ("--engine", engine, *arguments)
        process = ServerProcess(arguments, environment)
        processes.append(process)
        process.wait_until_listening()
        return process

    yield start
    for process in processes:
        process.kill()


@pytest.fixture(scope="session")
def strace() -> list[str]:
    found = shutil.which("strace")
    if found is None:
        pytest.skip("strace is not installed")
    # -D: the server and not strace is the child of this process, which signals it.
    command = [found, "-D", "-f", "-qq"]
    probe = [*command, "-o", os.devnull, "-e", "inject=getppid:error=EPERM", "true"]
    finished = subprocess.run(probe, capture_output=True, text=True, timeout=DEADLINE_S)
    if finished.returncode != 0 or finished.stderr:
        pytest.skip(f"strace cannot trace here: {finished.stderr}")
    return command


@pytest.fixture
def start_traced(strace: list[str], tmp_path: Path, dispatch: str) -> Iterator[StartTraced]:
    """start_traced(syscalls, fault, *arguments): fault is ERRNO, or ERRNO:when=EXPRESSION.

    strace counts the calls of each thread by itself.
    """
    started: list[ServerProcess] = []

    def start(
        syscalls: str, fault: str | None, *arguments: str, pass_fds: Sequence[int] = ()
    ) -> TracedServer:
        log = tmp_path / "strace"
        before = [*strace, "-o", str(log), "-e", f"trace={syscalls}"]
        if fault is not None:
            before += ["-e", f"inject={syscalls}:error={fault}"]
        arguments = ("--dispatch", dispatch, "--threads=1", *arguments)
        server = ServerProcess(arguments, before=before, pass_fds=pass_fds)
        started.append(server)
        server.wait_until_listening()
        return TracedServer(server, log)

    yield start
    for server in started:
        server.kill()


@pytest.fixture
def tcp() -> Iterator[socket.socket]:
    """A listening socket that somebody else has opened."""
    with socket.create_server(("127.0.0.1", 0)) as one:
        yield one


def pytest_sessionstart(session: pytest.Session) -> None:
    """Started in the background (`make check &`, nohup), children would inherit these ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    if not hasattr(session.config, "workerinput"):
        session.config.stash[KERNEL_LOG] = KernelLog()


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fails a run in which the kernel has reported a fault of its own."""
    log = session.config.stash.get(KERNEL_LOG, None)
    if log is None:
        return
    found = troubles(log.new_messages())
    log.close()
    if found:
        print("\nthe kernel's log (dmesg):", *found, sep="\n")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_collection_finish() -> None:
    """What has been imported until now need not be gone through before and after each test."""
    gc.collect()
    gc.freeze()


def _descriptors() -> dict[int, str]:
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:
            pass  # the descriptor that listed them
    return found


def _threads() -> set[int]:
    return {int(name) for name in os.listdir("/proc/self/task")}


@pytest.fixture(autouse=True)
def nothing_is_left_behind() -> Iterator[None]:
    """Fails a test after which there are more descriptors or threads than before, or one of the
    standard streams is closed."""
    gc.collect()
    descriptors, threads = _descriptors(), _threads()
    yield
    gc.collect()
    deadline = time.monotonic() + 5  # a joined thread is still listed for a moment
    while _threads() - threads and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not _threads() - threads, [thread.name for thread in threading.enumerate()]
    now = _descriptors()
    left = {fd: what for fd, what in now.items() if descriptors.get(fd) != what}
    assert not left, f"descriptors left open: {left}"
    assert not [fd for fd in (0, 1, 2) if fd in descriptors and fd not in now]
