"""Client processes: each runs a Crew on its share and takes commands through a pipe.

A terminal or an init sends the signals that end a run to every process. The children ignore them,
and the parent handles them. A child ends when its pipe is closed, however the parent has ended.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

from ..system import sysctl
from . import signals
from .crew import SAMPLE_BYTES, Crew, Report, Share, Snapshot
from .target import Target
from .workload import Workload

__all__ = ["ProcessCrew"]

_ANSWER_S = 60.0
_STEP_S = 0.005
_END_S = 5.0
_CHILD = "import sys; sys.path[:] = {path!r}; from kecho.bench.processes import main; main({fd})"


class _EndedError(OSError):
    """A child has ended."""


class ProcessCrew:
    """Does what Crew does, in several processes.

    When a process ends before its time, the others are stopped. What was last seen of it stays in
    the snapshots, and the rest is lost.
    """

    def __init__(
        self,
        workload: Workload,
        target: Target,
        shares: Sequence[list[Share]],
        seed: bytes,
        first: tuple[int, int] | None = None,
    ) -> None:
        """Start the processes. Raise OSError if that fails.

        first: as for Crew, but the caller keeps the descriptor; a child gets a copy.
        """
        self._children: list[tuple[subprocess.Popen[bytes], Connection]] = []
        self._busy: set[int] = set()
        self._ended: dict[int, str] = {}
        self._seen: dict[int, Snapshot] = {}
        self._sizes = [sum(one.connections for one in share) for share in shares]
        try:
            for share in shares:
                self._spawn([] if first is None else [first[0]])
                self._children[-1][1].send((workload.to_dict(), target, share, seed, first))
                first = None
            for index in range(len(self._children)):
                self._answer(index)
        except BaseException:
            self.close()
            raise

    def _spawn(self, more_fds: Sequence[int]) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            command = _CHILD.format(path=sys.path, fd=theirs.fileno())
            child = subprocess.Popen(
                [sys.executable, "-P", "-c", command],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno(), *more_fds],
                process_group=0,
            )
        self._children.append((child, Connection(ours.detach())))

    def _answer(self, index: int) -> Any:
        """Return the next answer of a child; None at the end of a phase."""
        child, pipe = self._children[index]
        try:
            if not pipe.poll(_ANSWER_S):
                raise OSError(f"client process {child.pid} does not answer")
            kind, value = pipe.recv()
        except (EOFError, ConnectionError):
            self._note_end(index)
            raise _EndedError(self._ended[index]) from None
        if kind == "error":
            raise OSError(f"client process {child.pid}: {value}")
        if kind == "done":
            self._busy.discard(index)
        return value

    def _note_end(self, index: int) -> None:
        child = self._children[index][0]
        with suppress(subprocess.TimeoutExpired):
            child.wait(_END_S)
        how = f": {signal.Signals(-code).name}" if (code := child.returncode or 0) < 0 else ""
        self._ended[index] = f"client process {child.pid} has ended{how}"
        self._busy.discard(index)
        self.stop()

    def _tell(self, name: str, arguments: Sequence[object]) -> None:
        for index, (_, pipe) in enumerate(self._children):
            if index not in self._ended:
                try:
                    pipe.send((name, arguments))
                except ConnectionError:
                    self._note_end(index)

    def _ask(self, name: str, *arguments: object) -> dict[int, Any]:
        """Ask every child that has not ended. Return the answers by child.

        Raises OSError if all have ended.
        """
        self._tell(name, arguments)
        answers: dict[int, Any] = {}
        for index in range(len(self._children)):
            with suppress(_EndedError):
                # The message that the phase has ended may come before the answer.
                while index not in self._ended and index not in answers:
                    if (answer := self._answer(index)) is not None:
                        answers[index] = answer
        if not answers:
            raise OSError(next(iter(self._ended.values())))
        return answers

    @property
    def ended(self) -> list[str]:
        """How children have ended before their time."""
        return list(self._ended.values())

    def pids(self) -> list[int]:
        """Return the pids of the children."""
        return [child.pid for child, _ in self._children]

    def begin(self, phase: str, *arguments: int) -> None:
        """Begin a phase on every client, as Crew.begin() does."""
        self._busy = set(range(len(self._children))) - self._ended.keys()
        self._tell("begin", (phase, *arguments))

    def wait(self, seconds: float) -> bool:
        """Wait for the end of the phase. Return True when it has ended."""
        deadline = time.monotonic() + seconds
        for index in sorted(self._busy):
            while index in self._busy and (left := deadline - time.monotonic()) > 0:
                if self._children[index][1].poll(left):
                    with suppress(_EndedError):
                        self._answer(index)
        return not self._busy

    def stop(self) -> None:
        """End the phase soon."""
        for _, pipe in self._children:
            with suppress(OSError):  # the child has ended
                pipe.send(("stop", ()))

    def samples(self) -> bytes:
        """Return the samples of the last burst, by connection; zeros for a child that has ended."""
        answers = self._ask("samples")
        return b"".join(
            answers.get(index, bytes(SAMPLE_BYTES * size)) for index, size in enumerate(self._sizes)
        )

    def take_ends(self) -> bytes:
        """Return what Crew.take_ends() returns, for all children."""
        return b"".join(self._ask("take_ends").values())

    def snapshot(self, latency: str | None) -> Snapshot:
        """Return what has been counted so far. latency: whose histogram to include."""
        for index, one in self._ask("snapshot", latency).items():
            if latency is None and index in self._seen:
                one.latency = self._seen[index].latency
            self._seen[index] = one
        total = Snapshot()
        for one in self._seen.values():
            total.add(one)
        return total

    def report(self) -> Report:
        """Return what has been measured, after the last phase."""
        total = Report()
        for one in self._ask("report").values():
            total.add(one)
        return total

    def close(self) -> None:
        """End the children, which close their connections."""
        for _, pipe in self._children:
            pipe.close()
        for child, _ in self._children:
            try:
                child.wait(_ANSWER_S)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
        self._children = []


def main(fd: int) -> None:
    """Run a child until its pipe is closed."""
    for number in signals.ENDINGS:
        signal.signal(number, signal.SIG_IGN)
    sysctl.raise_descriptor_limit()
    pipe = Connection(fd)
    try:
        options, target, shares, seed, first = pipe.recv()
        lists = {name: tuple(options[name]) for name in ("source", "cpus")}
        crew = Crew(Workload(**{**options, **lists}), target, shares, seed, first)
        pipe.send(("ready", None))
        _obey(pipe, crew)
    except EOFError:
        pass
    except Exception as error:
        with suppress(OSError):
            pipe.send(("error", getattr(error, "strerror", None) or str(error) or repr(error)))
    finally:
        pipe.close()
        os._exit(0)  # without waiting for its threads


def _obey(pipe: Connection, crew: Crew) -> None:
    """Do what the parent asks for, until it closes the pipe (EOFError)."""
    busy = False
    while True:
        if busy and crew.wait(_STEP_S):
            busy = False
            pipe.send(("done", None))
        if not pipe.poll(0 if busy else None):
            continue
        name, arguments = pipe.recv()
        if name == "begin":
            crew.begin(*arguments)
            busy = True
        elif name == "stop":
            crew.stop()
        else:
            pipe.send(("answer", getattr(crew, name)(*arguments)))
