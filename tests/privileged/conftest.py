"""Fixtures that need root; skipped with the reason elsewhere."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from support.namespaces import Namespace
from support.privileges import skip_unless_root


@pytest.fixture
def new_namespace() -> Iterator[Callable[[], Namespace]]:
    """new_namespace() -> one with nothing but a loopback that is up."""
    skip_unless_root()
    if shutil.which("ip") is None:
        pytest.skip("needs ip, which iproute2 has")
    made: list[Namespace] = []

    def make() -> Namespace:
        try:
            made.append(Namespace())
        except OSError as error:
            pytest.skip(f"no network namespace can be made: {error}")
        made[-1].run("ip", "link", "set", "lo", "up")
        return made[-1]

    yield make
    for namespace in made:
        namespace.close()


@pytest.fixture
def namespace(new_namespace: Callable[[], Namespace]) -> Namespace:
    return new_namespace()


@pytest.fixture
def inside(namespace: Namespace) -> Iterator[Namespace]:
    """This thread, and the processes that it starts, are in a namespace of their own."""
    with namespace:
        yield namespace


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack
