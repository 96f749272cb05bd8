"""Which engines this machine can have."""

from __future__ import annotations

import functools

import pytest

import kecho

BESIDE_EPOLL = ("io_uring", "sockmap")


@functools.cache
def why_no(engine: str) -> str | None:
    """Why this machine cannot have the engine; None: it can."""
    try:
        with kecho.Server(port=0, threads=1, engine=engine):
            return None
    except kecho.EngineError as error:
        return str(error)


def _needs(engine: str) -> pytest.MarkDecorator:
    reason = why_no(engine)
    return pytest.mark.skipif(reason is not None, reason=reason or f"there is {engine}")


needs_io_uring = _needs("io_uring")
needs_sockmap = _needs("sockmap")
HANDED_OVER_BYTES = 100_000  # at once: more than the least that the kernel may hold of a flow
