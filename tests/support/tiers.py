"""Which variants of a test `make check` runs, and which only `make check-all`.

A variant is a dispatch and an engine. The mechanisms that differ, and the variants that show them:

| mechanism | variants |
| --- | --- |
| one epoll set, a connection wanders between workers | shared epoll |
| a queue and a listener for each worker, steering | percpu epoll, percpu io_uring |
| a ring receives and sends | percpu io_uring, shared io_uring |
| the kernel echoes; hand-over to the worker | shared sockmap |

Modules about what the engine does with one connection need one variant of each engine. Where the
dispatch matters as well (limits, endings, who accepts), all but percpu sockmap: sockmap's workers
accept and end connections by the same code as epoll's.
"""

from __future__ import annotations

import pytest

ONE_OF_EACH_ENGINE = {("shared", "epoll"), ("percpu", "io_uring"), ("shared", "sockmap")}
WHERE_DISPATCH_MATTERS = ONE_OF_EACH_ENGINE | {("percpu", "epoll"), ("shared", "io_uring")}


def is_for_a_release(item: pytest.Item) -> bool:
    """Whether `make check` leaves it out."""
    if item.get_closest_marker("release") is not None:
        return True
    mark = item.get_closest_marker("engines")
    parameters = _parameters(item)
    if mark is None or not {"dispatch", "engine"} <= parameters.keys():
        return False
    variants = WHERE_DISPATCH_MATTERS if mark.kwargs.get("dispatch") else ONE_OF_EACH_ENGINE
    if is_of_unix(item):
        return False
    return (parameters["dispatch"], parameters["engine"]) not in variants


def tells_nothing_new(item: pytest.Item) -> bool:
    """The engine does not concern Unix sockets: they are epoll's under each."""
    return is_of_unix(item) and _parameters(item).get("engine", "epoll") != "epoll"


def _parameters(item: pytest.Item) -> dict[str, object]:
    callspec = getattr(item, "callspec", None)
    return {} if callspec is None else callspec.params


def is_of_unix(item: pytest.Item) -> bool:
    """By its name or one of its parameters."""
    return "unix" in item.name or any(
        value in ("unix", "abstract") for value in _parameters(item).values()
    )
