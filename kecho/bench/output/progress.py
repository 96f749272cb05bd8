"""How far a run is, on a terminal: rich's bar, if that is installed."""

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
    """A context that gives a callback for run(); one that does nothing off a terminal."""
    from contextlib import nullcontext

    if sys.stderr is None or not sys.stderr.isatty():
        return nullcontext()
    try:
        import rich.progress
    except ImportError:
        return nullcontext()
    return _RichProgress(rich.progress)


class _RichProgress:
    """A bar with the current rate and p99, for a run that lasts. A terminal that has gone, or whose
    encoding lacks a character, ends the bar and nothing else."""

    def __init__(self, library: Any) -> None:
        from rich.console import Console

        self._bar = library.Progress(
            library.TextColumn("{task.description}"),
            library.BarColumn(),
            library.TextColumn("{task.fields[figures]}"),
            library.TimeElapsedColumn(),
            console=Console(stderr=True),
            transient=True,
            auto_refresh=False,  # by a thread of its own, which would fail by itself
            redirect_stdout=False,  # otherwise lines for a file are taken for the terminal's
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
