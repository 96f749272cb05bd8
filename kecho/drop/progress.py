"""A progress bar on a terminal: rich's, if that is installed, or else a counter."""

from __future__ import annotations

import sys
import time
from contextlib import suppress
from types import TracebackType
from typing import Any, Self

__all__ = ["Progress"]

WORTH_A_BAR = 1000


class Progress:
    """Shown on stderr for more than 1000, if that is a terminal; one that fails stops nothing."""

    def __init__(self, is_off: bool) -> None:
        self._is_off = is_off or sys.stderr is None or not sys.stderr.isatty()
        self._bar: Any = None
        self._task: Any = None
        self._total = self._done = 0
        self._drawn_at = 0.0
        self._lines_too = sys.stdout is not None and sys.stdout.isatty()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with suppress(Exception):
            if self._bar is not None:
                self._bar.update(self._task, completed=self._done)
                self._bar.stop()
            elif self._total:
                sys.stderr.write("\r\033[K")
                sys.stderr.flush()

    def start(self, total: int) -> None:
        # Where the lines scroll by on the same terminal, they are the progress.
        if self._is_off or self._lines_too or total <= WORTH_A_BAR:
            return
        self._total = total
        try:
            from rich.console import Console
            from rich.progress import Progress as Bar
        except ImportError:
            return
        with suppress(Exception):
            # rich would take the lines for stdout, and a stdout that is no terminal would get none.
            self._bar = Bar(
                console=Console(file=sys.stderr),
                transient=True,
                redirect_stdout=False,
                redirect_stderr=False,
            )
            self._task = self._bar.add_task("dropping", total=total)
            self._bar.start()

    def advance(self, count: int) -> None:
        self._done += count
        if not self._total:
            return
        with suppress(Exception):
            if self._bar is not None:
                self._bar.update(self._task, completed=self._done)
            elif time.monotonic() - self._drawn_at > 0.1:
                self._drawn_at = time.monotonic()
                sys.stderr.write(f"\r{self._done:,} of {self._total:,}")
                sys.stderr.flush()
