"""Network namespaces of our own, for tests."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from support.own_network import CLONE_NEWNET, LIBC, checked


class Namespace:
    """A network namespace. Within `with`, this thread is in it, and the processes it starts.

    It has no name, and so ends with its last socket and process and with close(), or with the
    tests' process, whatever happens to that.
    """

    def __init__(self) -> None:
        self._outside: list[int] = []
        outside = self._present()
        try:
            checked(LIBC.unshare(CLONE_NEWNET))
            try:
                self.fd = self._present()
            finally:
                checked(LIBC.setns(outside, CLONE_NEWNET))
        finally:
            os.close(outside)

    @staticmethod
    def _present() -> int:
        return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)

    def __enter__(self) -> None:
        self._outside.append(self._present())
        checked(LIBC.setns(self.fd, CLONE_NEWNET))

    def __exit__(self, *_: object) -> None:
        outside = self._outside.pop()
        try:
            checked(LIBC.setns(outside, CLONE_NEWNET))
        finally:
            os.close(outside)

    def close(self) -> None:
        os.close(self.fd)

    def run(self, *command: str) -> str:
        """Runs a command in it and returns what it prints; CalledProcessError if it fails."""
        environment = {name: text for name, text in os.environ.items() if name != "LD_PRELOAD"}
        with self:
            return subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=30, check=True
            ).stdout

    def set(self, name: str, value: object) -> None:
        """Sets a sysctl of the network, such as net.core.somaxconn, in it."""
        with self:
            Path("/proc/sys", name.replace(".", "/")).write_text(f"{value}\n")
