"""`python -m kecho` as a child process, for tests."""

from __future__ import annotations

import os
import re
import selectors
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Self

DEADLINE_S = 30.0


def processor_time_s(pid: int) -> float:
    """What a process has used of CPUs: proc_pid_stat(5)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def only_child(pid: int) -> int:
    """Of a process with one thread: proc_pid_task(5)."""
    (child,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(child)


class ServerProcess:
    """A server process; `stderr` holds what it has said so far."""

    def __init__(
        self,
        arguments: Sequence[str],
        environment: Mapping[str, str] | None = None,
        *,
        before: Sequence[str] = (),
        pass_fds: Sequence[int] = (),
    ) -> None:
        """before: a command that runs it, such as ["strace", "-f"].

        pass_fds: descriptors that it inherits, under the same numbers.
        """
        arguments = list(arguments)
        if not {"--port", "--uds", "--fd"} & {argument.partition("=")[0] for argument in arguments}:
            arguments += ["--port", "0"]
        clean = {name: text for name, text in os.environ.items() if not name.startswith("KECHO_")}
        self.process = subprocess.Popen(
            [*before, sys.executable, "-m", "kecho", *arguments],
            env={**clean, **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=pass_fds,
        )
        self.stderr = ""

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def port(self) -> int:
        """The first TCP port of the line that says where it listens."""
        found = re.search(r"tcp \S+:(\d+)", self.stderr)
        assert found, self.stderr
        return int(found[1])

    def processor_time_s(self) -> float:
        return processor_time_s(self.pid)

    def wait_until_listening(self) -> None:
        self.wait_until_said(r"listening on ")

    def wait_until_said(self, pattern: str, deadline_s: float = DEADLINE_S) -> re.Match[str]:
        """Reads stderr until it holds a whole line with this pattern; fails if it ends before."""
        assert self.process.stderr is not None
        end = time.monotonic() + deadline_s
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stderr, selectors.EVENT_READ)
            while not (found := re.search(pattern + r".*\n", self.stderr)):
                assert selector.select(end - time.monotonic()), f"no {pattern!r}: {self.stderr}"
                chunk = os.read(self.process.stderr.fileno(), 65536)
                assert chunk, f"ended without {pattern!r}: {self.stderr}"
                self.stderr += chunk.decode()
        return found

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def wait(self, deadline_s: float = DEADLINE_S) -> int:
        """Waits for its end and returns its exit status; `stderr` is then complete."""
        _, rest = self.process.communicate(timeout=deadline_s)
        self.stderr += rest.decode()
        return self.process.returncode

    def stop(self) -> int:
        self.send(signal.SIGTERM)
        return self.wait()

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stopped by SIGSTOP meanwhile: what clients send then, it finds all at once."""
        self.send(signal.SIGSTOP)
        os.waitid(os.P_PID, self.pid, os.WSTOPPED)
        try:
            yield
        finally:
            self.send(signal.SIGCONT)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


def after(statements: str) -> list[str]:
    """For `before`: a Python that runs these statements and then turns into the server."""
    script = f"import os, resource, signal, sys; {statements}; os.execv(sys.argv[1], sys.argv[1:])"
    return [sys.executable, "-c", script]


def refusing(number: int, error: int) -> list[str]:
    """For `before`: a Python under whose filter a system call gives `error`."""
    return after(
        "import ctypes, struct;"
        "p = ctypes.create_string_buffer(b''.join(struct.pack('HBBI', *i) for i in ["
        f"(0x20, 0, 0, 0), (0x15, 0, 1, {number}), (6, 0, 0, 0x50000 | {error}),"
        "(6, 0, 0, 0x7fff0000)]));"
        "f = ctypes.create_string_buffer(struct.pack('HxxxxxxP', 4, ctypes.addressof(p)));"
        "l = ctypes.CDLL(None);"
        "assert l.prctl(38, 1, 0, 0, 0) == 0 and l.prctl(22, 2, f, 0, 0) == 0"
    )


def run_command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`python -m kecho` with exactly these arguments, from its start to its end."""
    return run_python("-m", "kecho", *arguments, **environment)


def run_python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Python with these arguments, such as "-c" and a script; fails after the deadline."""
    clean = {name: text for name, text in os.environ.items() if not name.startswith("KECHO_")}
    return subprocess.run(
        [sys.executable, *arguments],
        env={**clean, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )


def assert_refused(finished: subprocess.CompletedProcess[str], status: int, *words: str) -> None:
    """One line, which has these words, on stderr and nothing else."""
    assert finished.returncode == status, finished.stderr
    assert finished.stdout == ""
    assert re.fullmatch(r"kecho: error: .*\n", finished.stderr), finished.stderr
    for word in words:
        assert word in finished.stderr


def run_script(
    script: str, *arguments: str, warnings: str = "error"
) -> subprocess.CompletedProcess[str]:
    """Python with this script, indented as it may be; its warnings are errors unless told."""
    return run_python("-W", warnings, "-c", textwrap.dedent(script), *arguments)
