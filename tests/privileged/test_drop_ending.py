"""The dropper and the signals that ask to end: SIGINT, SIGTERM, SIGHUP."""

from __future__ import annotations

import os
import select
import shutil
import signal
import subprocess
from contextlib import ExitStack
from pathlib import Path

import pytest

from kecho import drop
from support.clients import DEADLINE_S, wait_for
from support.connections_to_drop import COMMAND, Ends, make_time_wait, pair_of, started
from support.namespaces import Namespace
from support.server_process import after

pytestmark = pytest.mark.privileged

ENDINGS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


@pytest.fixture
def ends(inside: Namespace, stack: ExitStack) -> Ends:
    return Ends("127.0.0.1", stack)


@pytest.mark.parametrize("number", ENDINGS, ids=lambda one: one.name)
def test_fate_of_every_socket_is_told_whichever_signal_ends_it(
    ends: Ends, number: signal.Signals
) -> None:
    make_time_wait(ends, 3000)
    there = len(drop.find(states=["time-wait"]))
    unbuffered = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with started("--state", "time-wait", env=unbuffered, pipesize=4096) as process:
        assert process.stdout is not None
        first = process.stdout.readline()  # unread, the rest fills the pipe and makes it wait
        wait_for(lambda: writes_to_stdout(process.pid), "the pipe is full")
        process.send_signal(number)
        assert process.stderr is not None
        rest, said = process.stdout.read(), process.stderr.read()
        process.wait(DEADLINE_S)
    told = (first + rest).count("\n")
    assert process.returncode == 128 + number
    assert said == f"kecho.drop: interrupted: {told:,} dropped, {there - told:,} not tried\n"
    assert len(drop.find(states=["time-wait"])) == there - told > 0


def writes_to_stdout(pid: int) -> bool:
    """It waits in write(2), whose first argument is 1: proc_pid_syscall(5)."""
    return Path(f"/proc/{pid}/syscall").read_text().split()[1:2] == ["0x1"]


@pytest.mark.parametrize("number", ENDINGS, ids=lambda one: one.name)
def test_watch_ends_well_whichever_signal_ends_it(ends: Ends, number: signal.Signals) -> None:
    client, _ = ends.connect()
    with started("--watch", "600", *pair_of(client).split()) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("dropped")
        process.send_signal(number)
        _, said = process.communicate(timeout=DEADLINE_S)
    assert (process.returncode, said) == (0, "kecho.drop: 1 dropped\n")


@pytest.mark.parametrize("number", ENDINGS, ids=lambda one: one.name)
@pytest.mark.parametrize("waits_for", ["pairs", "the next look"])
def test_first_process_of_a_container_ends_by_a_signal(
    ends: Ends, number: signal.Signals, waits_for: str
) -> None:
    if shutil.which("unshare") is None:
        pytest.skip("needs unshare, which util-linux has")
    client, _ = ends.connect()
    asked = ["-"] if waits_for == "pairs" else ["--watch", "600", *pair_of(client).split()]
    pipe = subprocess.PIPE
    with subprocess.Popen(
        ["unshare", "--pid", "--fork", "--kill-child", *COMMAND, *asked],
        stdin=pipe, stdout=pipe, stderr=pipe, text=True,
    ) as process:  # fmt: skip
        try:
            assert process.stdout is not None
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
            wait_for(lambda: children.read_text(), "the first process")
            first = int(children.read_text())
            if waits_for == "pairs":
                caught = f"/proc/{first}/status"
                wait_for(lambda: catches(Path(caught), signal.SIGTERM), "signals are handled")
            else:
                assert process.stdout.readline().startswith("dropped")
            os.kill(first, number)
            process.wait(DEADLINE_S)
        finally:
            process.kill()
    assert process.returncode == (128 + number if waits_for == "pairs" else 0)


def catches(status: Path, number: int) -> bool:
    (mask,) = (line for line in status.read_text().split("\n") if line.startswith("SigCgt:"))
    return bool(int(mask.split()[1], 16) >> (number - 1) & 1)


def test_hangup_that_nohup_ignores_does_not_end_it(ends: Ends) -> None:
    nohup = after("import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)")
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [*nohup, *COMMAND, "--watch", "0.02", "--state", "time-wait"],
        stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True,
    ) as process:  # fmt: skip
        try:
            assert process.stdout is not None
            for _ in range(2):
                make_time_wait(ends, 1)
                wait_for(lambda: not drop.find(states=["time-wait"]), "dropped")
                process.send_signal(signal.SIGHUP)
            process.send_signal(signal.SIGTERM)
            _, said = process.communicate(timeout=DEADLINE_S)
        finally:
            process.kill()
    assert (process.returncode, said) == (0, "kecho.drop: 2 dropped\n")


@pytest.mark.parametrize("form", [[], ["--json"]], ids=["lines", "json"])
def test_summary_is_told_though_nobody_reads_the_outcomes(ends: Ends, form: list[str]) -> None:
    make_time_wait(ends, 600)
    with started(*form, "--state", "time-wait", pipesize=4096) as process:
        wait_for(lambda: len(drop.find(states=["time-wait"])) < 500, "dropped")
        is_told: list[object] = []
        while not is_told:  # it waits for a reader
            process.send_signal(signal.SIGTERM)
            is_told = select.select([process.stderr], [], [], 0.1)[0]
        assert process.stderr is not None
        said = process.stderr.read()
        process.wait(DEADLINE_S)
    left = len(drop.find(states=["time-wait"]))
    assert process.returncode == 128 + signal.SIGTERM
    rest = f", {left:,} not tried" if left else ""
    assert said == f"kecho.drop: interrupted: {600 - left:,} dropped{rest}\n"
