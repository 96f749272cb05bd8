"""Real sysctls, in a network namespace of their own: they are put back in each of the endings."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.privileges import skip_unless_root

pytestmark = [pytest.mark.privileged, pytest.mark.python_only]

NAMES = (
    "net.core.somaxconn",
    "net.ipv4.tcp_max_syn_backlog",
    "net.ipv4.ip_local_port_range",
)
CONNECTIONS = 50_000
RAISED = ["65535", "131072", "1024 65535"]
TIMEOUT_S = 30
INTERRUPTIONS = 20

PROLOGUE = f"""
import os, signal, sys, threading, time
from pathlib import Path
from kecho.errors import TuningError
from kecho.bench.tuning.applied import Tuning, restore_leftover
from kecho.system.sysctl import wanted_for

def end(number, frame):
    raise SystemExit(128 + number)

signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGTERM, end)
state_file = Path(sys.argv[1])

def tuned():
    return Tuning(lambda: wanted_for({CONNECTIONS}), state_file=state_file)

def say(what):
    print(what, flush=True)
"""
HOLD = "with tuned(): say('tuned'); sys.stdin.readline()"
RAISE = "with tuned(): say('tuned'); sys.stdin.readline(); raise ValueError('as asked')"
# All the time in one of entering, being within, leaving.
AGAIN_AND_AGAIN = """
for _ in range(int(sys.argv[2])):
    threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
say('tuned')
while True:
    with tuned():
        time.sleep(0.0002)
"""
RESTORE = """
try:
    for one in restore_leftover(state_file): say(one)
except TuningError as error:
    sys.exit(f"error: {error}")
"""
ENTER = """
try:
    with tuned() as tuning:
        for one in tuning.leftover: say(one)
except TuningError as error:
    sys.exit(f"error: {error}")
"""


def values_here() -> list[str]:
    paths = [Path("/proc/sys", name.replace(".", "/")) for name in NAMES]
    return [" ".join(path.read_text().split()) for path in paths]


class Network:
    """A network namespace, which lasts as long as a process that sleeps in it."""

    def __init__(self) -> None:
        self.holder = subprocess.Popen(["unshare", "--net", "sleep", "600"])
        deadline = time.monotonic() + TIMEOUT_S
        while self.holder.poll() is None and time.monotonic() < deadline:
            if self._namespace() != os.readlink("/proc/self/ns/net"):
                break
            time.sleep(0.005)
        if self.holder.poll() is not None:
            pytest.skip("no network namespace can be made")
        self.before = self.values()

    def _namespace(self) -> str:
        return os.readlink(f"/proc/{self.holder.pid}/ns/net")

    def close(self) -> None:
        self.holder.kill()
        self.holder.wait()

    def command(self, *command: object) -> list[str]:
        # No sanitizer's library: they are not about native code, and it is slow to begin.
        in_it = ["env", "-u", "LD_PRELOAD", "nsenter"]
        return [*in_it, f"--net=/proc/{self.holder.pid}/ns/net", *map(str, command)]

    def values(self) -> list[str]:
        paths = ["/proc/sys/" + name.replace(".", "/") for name in NAMES]
        output = subprocess.check_output(self.command("cat", *paths), text=True, timeout=TIMEOUT_S)
        return [" ".join(line.split()) for line in output.splitlines()]

    def set(self, name: str, text: str) -> None:
        script = f'echo "{text}" >/proc/sys/{name.replace(".", "/")}'
        subprocess.run(self.command("sh", "-c", script), check=True, timeout=TIMEOUT_S)

    def run(self, code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        command = self.command(sys.executable, "-c", PROLOGUE + code, *arguments)
        return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)

    def start(self, code: str, *arguments: object) -> subprocess.Popen[str]:
        """A process that has said that it is tuned."""
        process = subprocess.Popen(
            self.command(sys.executable, "-c", PROLOGUE + code, *arguments),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stdout
        line = process.stdout.readline()
        if line != "tuned\n":
            process.kill()
            pytest.fail(f"{line!r} {process.communicate()[1]}")
        return process


@pytest.fixture
def network() -> Iterator[Network]:
    skip_unless_root()
    for tool in ("unshare", "nsenter"):
        if shutil.which(tool) is None:
            pytest.skip(f"needs {tool}, which util-linux has")
    network = Network()
    yield network
    network.close()


@pytest.fixture(autouse=True)
def the_machines_own_values_stay() -> Iterator[None]:
    before, had_states = values_here(), Path("/run/kecho").exists()
    yield
    assert values_here() == before
    assert Path("/run/kecho").exists() == had_states


@pytest.fixture
def state_file(tmp_path: Path) -> Path:
    return tmp_path / "run" / "tuning.json"


@pytest.fixture
def leftover(network: Network, state_file: Path) -> dict[str, object]:
    """What a run that SIGKILL has ended leaves behind: its state."""
    process = network.start(HOLD, state_file)
    process.kill()
    process.communicate(timeout=TIMEOUT_S)
    assert network.values() == RAISED
    state = json.loads(state_file.read_text())
    assert isinstance(state, dict)
    return state


def assert_nothing_is_left(network: Network, state_file: Path) -> None:
    assert network.values() == network.before
    assert not any(state_file.parent.glob("*"))


# ---- the endings ------------------------------------------------------------------------------


def test_a_network_has_its_own_values(network: Network) -> None:
    for name, text in zip(NAMES, ("70000", "70001", "2000 3001"), strict=True):
        network.set(name, text)
    assert network.values() == ["70000", "70001", "2000 3001"]


@pytest.mark.parametrize(
    ("code", "number", "status"),
    [
        (HOLD, None, 0),
        (RAISE, None, 1),
        (HOLD, signal.SIGINT, -signal.SIGINT),
        (HOLD, signal.SIGTERM, 128 + signal.SIGTERM),
    ],
    ids=["end", "exception", "SIGINT", "SIGTERM"],
)
def test_values_are_put_back(
    network: Network, state_file: Path, code: str, number: int | None, status: int
) -> None:
    process = network.start(code, state_file)
    assert network.values() == RAISED
    if number is not None:
        process.send_signal(number)
    _, errors = process.communicate("" if number else "\n", timeout=TIMEOUT_S)
    assert process.returncode == status, errors
    assert_nothing_is_left(network, state_file)


@pytest.mark.parametrize("threads", [0, 3])
@pytest.mark.parametrize("times", [1, 2])
def test_values_are_put_back_whenever_sigint_comes(
    network: Network, state_file: Path, times: int, threads: int
) -> None:
    chance = random.Random(f"{times} {threads}")
    for _ in range(INTERRUPTIONS):
        process = network.start(AGAIN_AND_AGAIN, state_file, threads)
        time.sleep(chance.uniform(0, 0.01))
        process.send_signal(signal.SIGINT)
        if times == 2:
            time.sleep(chance.uniform(0, 0.002))
            process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=TIMEOUT_S)
        assert process.returncode == -signal.SIGINT, errors
        assert_nothing_is_left(network, state_file)


@pytest.mark.parametrize("code", [RESTORE, ENTER], ids=["restore", "next run"])
def test_values_are_put_back_after_sigkill(
    network: Network, state_file: Path, leftover: dict[str, object], code: str
) -> None:
    done = network.run(code, state_file)
    assert done.returncode == 0, done.stderr
    assert [line.partition(":")[0] for line in done.stdout.splitlines()] == list(NAMES)
    assert done.stdout.count("restored") == 3
    assert_nothing_is_left(network, state_file)


def test_values_are_put_back_whenever_sigkill_comes(network: Network, state_file: Path) -> None:
    chance = random.Random(9)
    for _ in range(INTERRUPTIONS):
        process = network.start(AGAIN_AND_AGAIN, state_file, 0)
        time.sleep(chance.uniform(0, 0.01))
        process.kill()
        process.communicate(timeout=TIMEOUT_S)
        done = network.run(RESTORE, state_file)
        assert done.returncode == 0, done.stderr
        assert network.values() == network.before
        assert not state_file.exists()


def test_state_has_its_place_by_the_network_namespace(network: Network) -> None:
    """With a /run of its own, where the machine's is not touched."""
    code = """
state_file = None
child = os.fork()
if child == 0:
    with tuned(): os.kill(os.getpid(), signal.SIGKILL)
os.waitpid(child, 0)
[path] = Path("/run/kecho").iterdir()
assert f"net:[{path.stem.removeprefix('tuning-')}]" == os.readlink("/proc/self/ns/net"), path
assert Path("/run/kecho").stat().st_mode & 0o7777 == 0o700
assert [one.outcome for one in restore_leftover()] == ["restored"] * 3
assert not path.exists()
say("done")
"""
    mounted = 'mount -t tmpfs tmpfs /run && exec "$@"'
    python = [sys.executable, "-c", PROLOGUE + code, ""]
    done = subprocess.run(
        network.command("unshare", "--mount", "sh", "-c", mounted, "sh", *python),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    if "mount:" in done.stderr:
        pytest.skip(f"nothing can be mounted: {done.stderr.strip()}")
    assert done.stdout == "done\n", done.stderr
    assert network.values() == network.before


# ---- other runs, other hands ------------------------------------------------------------------


@pytest.mark.parametrize("code", [ENTER, RESTORE], ids=["next run", "restore"])
def test_second_run_at_the_same_time_is_refused(
    network: Network, state_file: Path, code: str
) -> None:
    first = network.start(HOLD, state_file)
    second = network.run(code, state_file)
    assert second.returncode == 1
    expected = f"error: another tuned run is under way: process {first.pid} ({state_file})\n"
    assert second.stderr == expected
    assert network.values() == RAISED
    first.communicate("\n", timeout=TIMEOUT_S)
    assert_nothing_is_left(network, state_file)


def test_of_runs_that_begin_at_once_one_is_tuned(network: Network, state_file: Path) -> None:
    code = """
sys.stdin.readline()
try:
    with tuned(): time.sleep(2)
except TuningError as error:
    sys.exit(str(error))
"""
    runs = [network.start("say('tuned')" + code, state_file) for _ in range(4)]
    for run in runs:
        assert run.stdin
        run.stdin.write("\n")
        run.stdin.flush()
    errors = [run.communicate(timeout=TIMEOUT_S)[1] for run in runs]
    [first] = [run.pid for run in runs if run.returncode == 0]
    assert sum(f"under way: process {first} " in error for error in errors) == 3, errors
    assert_nothing_is_left(network, state_file)


def test_foreign_change_is_respected(network: Network, state_file: Path) -> None:
    process = network.start(HOLD, state_file)
    network.set(NAMES[0], "1234")
    process.communicate("\n", timeout=TIMEOUT_S)
    assert network.values() == ["1234", *network.before[1:]]
    assert not state_file.exists()


def test_foreign_change_after_sigkill_is_respected(
    network: Network, state_file: Path, leftover: dict[str, object]
) -> None:
    network.set(NAMES[2], "20000 30001")
    done = network.run(RESTORE, state_file)
    assert f"{NAMES[2]}: set to 20000 30001 by another process meanwhile" in done.stdout
    assert network.values() == [*network.before[:2], "20000 30001"]
    assert not state_file.exists()


def test_state_from_before_a_boot_is_removed_only(
    network: Network, state_file: Path, leftover: dict[str, object]
) -> None:
    state_file.write_text(json.dumps(leftover | {"boot_id": "another"}))
    done = network.run(RESTORE, state_file)
    assert (done.returncode, done.stdout) == (0, "")
    assert network.values() == RAISED
    assert not state_file.exists()


def test_state_of_another_network_is_refused(
    network: Network, state_file: Path, leftover: dict[str, object]
) -> None:
    other = Network()
    try:
        done = other.run(RESTORE, state_file)
        assert done.stderr.endswith("; nothing was changed\n")
        assert other.values() == other.before
    finally:
        other.close()
    assert network.run(RESTORE, state_file).returncode == 0
    assert_nothing_is_left(network, state_file)


@pytest.mark.parametrize("how", ["symlink", "writable"])
def test_state_that_others_may_have_made_is_refused(
    network: Network, state_file: Path, leftover: dict[str, object], how: str
) -> None:
    if how == "symlink":
        elsewhere = state_file.rename(state_file.with_name("elsewhere"))
        state_file.symlink_to(elsewhere)
    else:
        state_file.chmod(0o622)
    for code in (RESTORE, ENTER):
        done = network.run(code, state_file)
        assert done.returncode == 1
        assert done.stderr.startswith(f"error: {state_file}: ")
        assert done.stderr.count("\n") == 1
    assert network.values() == RAISED


def test_without_privileges_one_line_says_so(network: Network, tmp_path: Path) -> None:
    if shutil.which("setpriv") is None:
        pytest.skip("needs setpriv, which util-linux has")
    state_file = tmp_path / "run" / "tuning.json"
    python = [sys.executable, "-c", PROLOGUE + ENTER, str(state_file)]
    nobody = ["--reuid=65534", "--regid=65534", "--clear-groups"]
    command = network.command("setpriv", *nobody, *python)
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
    if not done.stderr.startswith("error: "):
        pytest.skip(f"another user cannot run it here: {done.stderr.strip()[-200:]}")
    assert done.stderr.startswith(f"error: {NAMES[0]} cannot be changed: Permission denied; ")
    assert done.stderr.count("\n") == 1
    assert not state_file.parent.exists()
    assert network.values() == network.before
