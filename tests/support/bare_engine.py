"""The native engine with threads of its own, without the Server around it."""

from __future__ import annotations

import ast
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kecho import ServerConfig
from kecho.server._engine import Engine
from kecho.server.sockets.listen import Listener, open_listeners
from support.clients import (
    DEADLINE_S,
)

DECLARATION = Path(__file__).parents[2] / "kecho/server/_engine.pyi"


def _needed_options() -> dict[str, Any]:
    """Of the declaration, every option without a default: off, or a number that limits nothing."""
    declared = ast.parse(DECLARATION.read_text())
    (init,) = (
        one
        for one in ast.walk(declared)
        if isinstance(one, ast.FunctionDef) and one.name == "__init__"
    )
    off: dict[str, object] = {"bool": False, "int": 0}
    pairs = zip(init.args.kwonlyargs, init.args.kw_defaults, strict=True)
    return {
        one.arg: off.get(ast.unparse(one.annotation or init), [])
        for one, default in pairs
        if default is None
    }


OPTIONS: dict[str, Any] = _needed_options() | {
    "worker_count": 1,
    "finish_timeout_ms": 60_000,
    "buffer_bytes": 1 << 28,
    "is_allowed_otherwise": True,
}


def open_tcp(dispatch: str, worker_count: int = 2) -> tuple[list[Listener], int]:
    """Listeners on a free port, and the port."""
    listeners = open_listeners(ServerConfig(port=0, dispatch=dispatch), worker_count)
    return listeners, listeners[0].address[1]


def described(listeners: list[Listener]) -> list[tuple[int, int, bool, bool]]:
    return [(one.socket.fileno(), one.queue, one.is_unix, one.inherited) for one in listeners]


def engine_on(listeners: list[Listener], dispatch: str, worker_count: int = 2) -> Engine:
    options = OPTIONS | {"percpu": dispatch == "percpu", "worker_count": worker_count}
    engine = Engine(described(listeners), **options)
    for listener in listeners:
        listener.socket.detach()
    return engine


class Workers:
    """The threads of an engine."""

    def __init__(self, engine: Engine, count: int = 2) -> None:
        self.failures: list[BaseException] = []
        self._threads = [
            threading.Thread(target=self._work, args=(engine, index)) for index in range(count)
        ]
        for thread in self._threads:
            thread.start()

    def _work(self, engine: Engine, index: int) -> None:
        try:
            engine.run_worker(index)
        except BaseException as error:
            self.failures.append(error)

    def have_ended(self, deadline_s: float = DEADLINE_S) -> bool:
        """Waits for the end of all of them; says whether it came."""
        end = time.monotonic() + deadline_s
        for thread in self._threads:
            thread.join(max(0, end - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)


@contextmanager
def running(engine: Engine, count: int = 2) -> Iterator[Workers]:
    """With workers; in the end they have been stopped, if they still ran, and had no failure."""
    workers = Workers(engine, count)
    try:
        yield workers
    finally:
        engine.abort()
        assert workers.have_ended()
    assert not workers.failures
