"""`python -m kecho` as a child process, for tests."""

from __future__ import annotations

import os
import re
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence

DEADLINE_S = 30.0


class ServerProcess:
    """A server process; `stderr` holds what it has said so far."""

    def __init__(
        self,
        arguments: Sequence[str],
        environment: Mapping[str, str] | None = None,
        *,
        before: Sequence[str] = (),
    ) -> None:
        """before: a command that runs it, such as ["strace", "-f"]."""
        arguments = list(arguments)
        if not {"--port", "--uds"} & {argument.partition("=")[0] for argument in arguments}:
            arguments += ["--port", "0"]
        clean = {name: text for name, text in os.environ.items() if not name.startswith("KECHO_")}
        self.process = subprocess.Popen(
            [*before, sys.executable, "-m", "kecho", *arguments],
            env={**clean, **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
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
