"""A server process on CPUs of its own, and the CPU time that it takes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Serving", "StartError", "cpu_ns", "kernel_threads_ns", "serving"]

_START_S = 30.0
_STOP_S = 10.0
_STEP_S = 0.005
_KTHREADD = 2  # the parent of every kernel thread

# The kernel ends the server with the thread that started it, however that ends; execve(2) keeps
# that, and the affinity.
_LAUNCH = """
import ctypes, os, signal, sys
parent, cpus = int(sys.argv[1]), sys.argv[2]
ctypes.CDLL(None).prctl(1, signal.SIGKILL)
if os.getppid() != parent:
    sys.exit("whoever started this is gone")
os.sched_setaffinity(0, map(int, cpus.split(",")))
os.execv(sys.argv[3], sys.argv[3:])
"""


class StartError(OSError):
    """The server did not start: its own words, one line."""


@dataclass(frozen=True)
class Serving:
    pid: int
    port: int
    process: subprocess.Popen[bytes]

    @property
    def has_ended(self) -> bool:
        return self.process.poll() is not None


@contextmanager
def serving(command: Sequence[str], cpus: Collection[int]) -> Iterator[Serving]:
    """From the line "listening ..." to the process's end. Raises StartError."""
    clean = {name: text for name, text in os.environ.items() if not name.startswith("KECHO_")}
    listed = ",".join(map(str, sorted(cpus)))
    # A file, not a pipe: nobody has to read along.
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            [sys.executable, "-c", _LAUNCH, str(os.getpid()), listed, *command],
            env=clean,
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=said,
            process_group=0,  # Ctrl-C is for the client
        )
        try:
            yield Serving(process.pid, _port_of(process, said.fileno()), process)
        finally:
            process.terminate()
            try:
                process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _port_of(process: subprocess.Popen[bytes], said_fd: int) -> int:
    deadline = time.monotonic() + _START_S
    while True:
        has_ended = process.poll() is not None
        said = os.pread(said_fd, 1 << 16, 0).decode(errors="replace")
        if found := re.search(r"listening (?:on tcp \S+:)?(\d+)\b.*\n", said):
            return int(found[1])
        if has_ended or time.monotonic() > deadline:
            lines = said.strip().splitlines() or ["it said nothing"]
            raise StartError(lines[-1].removeprefix("kecho: error: ")[:200])
        time.sleep(_STEP_S)


def cpu_ns(pid: int) -> int:
    """What its threads have run so far, in user space and kernel: schedstat, sched-stats.rst.

    Interrupts that hit them are in it, too: on loopback, the peer's half of TCP.
    """
    total = 0
    with suppress(OSError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            total += _run_ns(f"/proc/{pid}/task/{thread}/schedstat")
    return total


def kernel_threads_ns() -> int:
    """The same of all kernel threads; 0 where they cannot be seen."""
    total = 0
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        with suppress(OSError, ValueError, IndexError):
            stat = Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()
            if int(stat[1]) == _KTHREADD:
                total += _run_ns(f"/proc/{name}/schedstat")
    return total


def _run_ns(path: str) -> int:
    try:
        return int(Path(path).read_text().split()[0])
    except (OSError, ValueError, IndexError):  # it has ended
        return 0
