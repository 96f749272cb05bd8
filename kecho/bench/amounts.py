"""Amounts as text, with three significant digits."""

from __future__ import annotations

__all__ = ["duration_text", "rate_text", "size_text"]


def duration_text(ns: float) -> str:
    """Return a time with three digits and a unit: ``12.3 µs``."""
    for unit, size in (("s", 1e9), ("ms", 1e6), ("µs", 1e3)):
        if ns >= size:
            value = ns / size
            return f"{value:.{2 if value < 9.995 else 1 if value < 99.95 else 0}f} {unit}"
    return f"{ns:.0f} ns"


def size_text(size: float) -> str:
    """Return a number of bytes with one decimal and a unit: ``1.5 kB``."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{rate_text(size)} B"


def rate_text(rate: float) -> str:
    """Return a rate: below a hundred with three digits, otherwise as a whole number.

    For instance ``20,000``, ``2.5``, ``0.05``.
    """
    return f"{rate:,.0f}" if rate >= 99.95 else f"{rate:.3g}"
