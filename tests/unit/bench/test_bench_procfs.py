"""CPU time of a process with its threads and descendants."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from kecho.bench.procfs import parent_of, usage_of
from support.clients import wait_for

pytestmark = pytest.mark.python_only


@contextmanager
def python(script: str) -> Iterator[subprocess.Popen[str]]:
    """Runs it until it has printed a line; ended by the end of its stdin."""
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        try:
            yield process
        finally:
            process.kill()


BURN = """
    import os, sys, threading, time
    def burn(seconds):
        until = time.thread_time() + seconds
        while time.thread_time() < until:
            pass
"""


def test_children_that_have_ended_count() -> None:
    with python(
        BURN
        + """
    child = os.fork()
    if not child:
        burn(0.3)
        os._exit(0)
    os.wait()
    print(flush=True)
    sys.stdin.read()
    """
    ) as process:
        usage = usage_of(process.pid)
        assert usage is not None
        assert usage.total_s >= 0.25


def test_children_that_live_count_and_so_do_their_threads() -> None:
    with python(
        BURN
        + """
    if not os.fork():
        threading.Thread(target=lambda: (burn(0.3), time.sleep(60))).start()
        time.sleep(60)
    print(flush=True)
    sys.stdin.read()
    """
    ) as process:

        def busiest() -> float:
            usage = usage_of(process.pid)
            return 0.0 if usage is None else max(usage.threads_s.values())

        children = f"/proc/{process.pid}/task/{process.pid}/children"
        with open(children) as file:
            child = int(file.read())
        try:
            wait_for(lambda: busiest() >= 0.25, "the child's thread has burnt its time")
            usage = usage_of(process.pid)
            assert usage is not None
            assert usage.total_s >= 0.25
            assert parent_of(child) == process.pid
            without = usage_of(process.pid, without=[child])
            assert without is not None
            assert without.total_s < usage.total_s
        finally:
            os.kill(child, 9)


def test_a_process_that_is_none_has_no_usage() -> None:
    assert usage_of(4_194_304) is None
    assert parent_of(4_194_304) is None
