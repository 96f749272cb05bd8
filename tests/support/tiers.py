"""Which variants of a test `make check` runs, and which only `make check-all`.

A variant is a dispatch and an engine. The mechanisms that differ, and the variants that show them:

| mechanism | variants |
| --- | --- |
| all workers wait on one epoll set, any of them may serve a connection | shared epoll |
| each worker has a queue and listeners, connections are steered | percpu epoll, percpu io_uring |
| a ring receives and sends | percpu io_uring, shared io_uring |
| the kernel echoes, and hands connections to a worker | shared sockmap |

A module that tests what the engine does with one connection runs once under each engine. A module
whose tests also depend on the dispatch (`engines(dispatch=True)`: limits, stops, accepting) runs
under all pairs but percpu sockmap: a worker of the sockmap engine accepts and closes connections by
the code of the epoll engine, which percpu epoll runs.
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
    if is_of_unix(item):
        return False
    variants = WHERE_DISPATCH_MATTERS if mark.kwargs.get("dispatch") else ONE_OF_EACH_ENGINE
    return (parameters["dispatch"], parameters["engine"]) not in variants


def is_redundant(item: pytest.Item) -> bool:
    """Whether it tests a Unix socket under another engine than epoll, which serves them all."""
    return is_of_unix(item) and _parameters(item).get("engine", "epoll") != "epoll"


def _parameters(item: pytest.Item) -> dict[str, object]:
    callspec = getattr(item, "callspec", None)
    return {} if callspec is None else callspec.params


def is_of_unix(item: pytest.Item) -> bool:
    """By its name or one of its parameters."""
    return "unix" in item.name or any(
        value in ("unix", "abstract") for value in _parameters(item).values()
    )
