"""The soak itself: it ends, it finds what goes wrong, it can be interrupted."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from support.clients import wait_for

pytestmark = [pytest.mark.e2e, pytest.mark.release, pytest.mark.slow_under_sanitizers]

SOAK = Path(__file__).resolve().parents[1] / "soak.py"


@contextmanager
def soak(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, str(SOAK), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def children(pid: int) -> dict[int, str]:
    """Children of a process and how they were called: proc_tid_children(5)."""
    found = {}
    for number in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        with contextlib.suppress(FileNotFoundError):  # it has ended since
            words = Path(f"/proc/{number}/cmdline").read_bytes().split(b"\0")
            found[int(number)] = b" ".join(words).decode()
    return found


def one_that(process: subprocess.Popen[str], called: str) -> int:
    """The child of the soak that was called so, once it is there."""
    wait_for(lambda: any(called in one for one in children(process.pid).values()), called)
    return next(pid for pid, one in children(process.pid).items() if called in one)


def test_a_short_soak_ends_well() -> None:
    with soak("--minutes", "0.1", "--seed", "3") as process:
        out, err = process.communicate(timeout=90)
    assert process.returncode == 0, err
    found = json.loads(out)
    assert found["seed"] == 3
    assert found["violation"] is None
    assert found["bytes_verified"] > 0
    assert found["ping_pong"]["echoes"] > 0
    assert found["lives"] >= 1
    assert "SEED=3" in err


@pytest.mark.parametrize(
    ("victim", "said"),
    [
        ("-m kecho", "the server ended with status -9"),
        ("storms.py stream", "stream: status -9"),
        ("storms.py ping", "ping: status -9"),
    ],
)
def test_a_soak_tells_what_went_wrong_and_the_seed(victim: str, said: str) -> None:
    with soak("--minutes", "5", "--seed", "4") as process:
        one_that(process, "storms.py ping")
        os.kill(one_that(process, victim), signal.SIGKILL)
        left = children(process.pid)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert said in json.loads(out)["violation"]
    assert said in err
    assert "SEED=4" in err
    assert not any(Path(f"/proc/{pid}").exists() for pid in left)


def test_an_interrupted_soak_ends_in_order() -> None:
    with soak("--minutes", "5") as process:
        one_that(process, "storms.py ping")
        left = children(process.pid)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert json.loads(out)["violation"] == "interrupted"
    assert "Traceback" not in err
    assert not any(Path(f"/proc/{pid}").exists() for pid in left)
