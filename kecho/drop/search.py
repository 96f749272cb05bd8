"""The sockets that the command is about: by pairs, filter and processes, looked up each time."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from .. import command
from . import outcome as outcomes
from .config import DropConfig
from .diag import Diag
from .failure import Absent, Failure, of_kernel
from .filters import Filter
from .pairs import Pair
from .process import Process, namespace_of
from .socket import Socket

__all__ = ["PROGRAM", "Search"]

PROGRAM = "kecho.drop"


class Search:
    """pairs: None if the filter says it all. wanted: the filter but for --pid."""

    def __init__(self, config: DropConfig, pairs: Collection[Pair] | None, wanted: Filter) -> None:
        self._config, self.pairs, self.wanted = config, pairs, wanted
        self._processes = [Process(int(pid)) for pid in dict.fromkeys(config.pid)]
        self._told: set[int] = set()  # processes of which it was said that they are not there

    def check_devices(self, diag: Diag) -> None:
        """Raises Absent if a device that is to be left out is not there, or Failure."""
        try:
            diag.check_devices(self.wanted)
        except ValueError as error:
            raise Absent(f"--not-local, --not-peer: {error}", command.EXIT_USAGE) from None
        except OSError as error:
            raise of_kernel(error) from None

    def find(self, diag: Diag) -> list[Socket]:
        """Raises Failure."""
        wanted = self.filter_now()
        try:
            found = diag.find(
                wanted,
                pairs=self.pairs,
                listeners=self._config.listeners
                or (self._config.list and "listen" in self.wanted.states),
            )
        except OSError as error:
            raise of_kernel(error) from None
        self.check_namespaces(diag, bool(found))
        return found

    def filter_now(self) -> Filter:
        """With the sockets that the processes hold now. Raises Failure if one may not be seen;
        one that is not there, or has ended since the first look, holds nothing, which is said once.
        """
        if not self._processes:
            return self.wanted
        inodes: set[int] = set()
        for process in self._processes:
            pid = process.pid
            try:
                inodes |= process.inodes()
            except ProcessLookupError as error:
                if pid not in self._told:
                    self._told.add(pid)
                    command.say_error(PROGRAM, f"--pid {pid}: {error.strerror}")
            except PermissionError as error:
                text = f"--pid {pid}: {error.strerror}"
                raise Failure(text, outcomes.EXIT_NO_PERMISSION) from None
            except OSError as error:
                raise of_kernel(error) from None
        return replace(self.wanted, inodes=frozenset(inodes))

    def check_namespaces(self, diag: Diag, is_anything_found: bool) -> None:
        """Raises Failure if nothing was found as a process is in another network namespace: its
        sockets there are not seen from here."""
        if is_anything_found or diag.namespace is None:
            return
        for process in self._processes:
            pid = process.pid
            if not process.has_ended and namespace_of(pid) not in (None, diag.namespace):
                raise Failure(
                    f"--pid {pid}: the process is in another network namespace, whose sockets are"
                    f" seen with --netns pid:{pid}",
                    outcomes.EXIT_NO_PERMISSION,
                )
