"""Which engines this machine can have."""

from __future__ import annotations

import functools

import pytest

import kecho


@functools.cache
def why_no_sockmap() -> str | None:
    """Why this machine cannot have the engine; None: it can."""
    try:
        with kecho.Server(port=0, threads=1, engine="sockmap"):
            return None
    except kecho.EngineError as error:
        return str(error)


needs_sockmap = pytest.mark.skipif(
    why_no_sockmap() is not None, reason=why_no_sockmap() or "there is sockmap"
)
HANDED_OVER_BYTES = 100_000  # at once: more than the least that the kernel may hold of a flow
