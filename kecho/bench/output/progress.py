"""The progress of a run on a terminal: a bar of rich, if that is installed."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from ...command import plural
from ..amounts import duration_text, rate_text
from ..runner import Progress

__all__ = ["live_progress"]


def live_progress() -> Any:
    """Return a context that gives a callback for run(); without a terminal, it gives None."""
    from contextlib import nullcontext

    if sys.stderr is None or not sys.stderr.isatty():
        return nullcontext()
    try:
        import rich.progress
    except ImportError:
        return nullcontext()
    return _RichProgress(rich.progress)


class _RichProgress:
    """Show a bar with the current rate and p99.

    If the terminal is gone, or its encoding lacks a character, the bar ends and the run goes on.
    """

    def __init__(self, library: Any) -> None:
        from rich.console import Console

        self._bar = library.Progress(
            library.TextColumn("{task.description}"),
            library.BarColumn(),
            library.TextColumn("{task.fields[figures]}"),
            library.TimeElapsedColumn(),
            console=Console(stderr=True),
            transient=True,
            auto_refresh=False,  # it would use a thread, whose errors could not be caught here
            redirect_stdout=False,  # otherwise lines for a file would go to the terminal
            redirect_stderr=False,
        )
        self._task = self._bar.add_task("", total=1.0, figures="")

    def __enter__(self) -> Callable[[Progress], None]:
        with suppress(OSError, ValueError):
            self._bar.start()
        return self._show

    def __exit__(self, *_: object) -> None:
        with suppress(OSError, ValueError):
            self._bar.stop()

    def _show(self, now: Progress) -> None:
        parts = [f"{now.connections:,} open", plural(now.echoes, "echo", "echoes")]
        if now.rate_per_s is not None:
            parts.append(f"{rate_text(now.rate_per_s)}/s")
        if now.p99_ns is not None:
            parts.append(f"p99 {duration_text(now.p99_ns)}")
        if now.errors:
            parts.append(plural(now.errors, "error"))
        with suppress(OSError, ValueError):
            self._bar.update(
                self._task,
                completed=now.done,
                description=now.phase,
                figures=", ".join(parts),
                refresh=True,
            )
