"""Who takes part: kecho in its variants, and the peers that can be built here."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from kecho import ServerConfig

__all__ = ["ABSENT_OPTION", "KECHO", "PEERS", "ROOT", "Contestant", "available"]

ROOT = Path(__file__).resolve().parents[2]
PEERS_BUILT = ROOT / "build" / "peers"
PEERS_SOURCE = ROOT / "benchmarks" / "peers"
_BUILD_S = 300.0
ABSENT_OPTION = "this kecho has no --{}"


@dataclass(frozen=True)
class Contestant:
    """A server, and what the client does towards it beside the workload.

    command: its port and backlog follow, by options or by place. in_kernel: kernel threads echo,
    whose CPU time is then the server's. target: what `make` builds it as, needs: server options
    that this kecho has to know. bench: options of the client's workload.
    """

    name: str
    command: tuple[str, ...]
    is_kecho: bool = False
    in_kernel: bool = False
    target: str | None = None
    needs: tuple[str, ...] = ()
    bench: Mapping[str, Any] = field(default_factory=dict)

    def command_line(self, backlog: int, threads: int) -> list[str]:
        if not self.is_kecho:
            return [*self.command, "0", str(backlog)]
        more = () if "--threads" in self.command else ("--threads", str(threads))
        return [*self.command, "--port", "0", "--backlog", str(backlog), *more]


def _kecho(name: str, *options: str, **more: Any) -> Contestant:
    return Contestant(name, (sys.executable, "-m", "kecho", *options), True, **more)


_ENGINE_EPOLL = ("--engine", "epoll")
_BUSY = {"needs": ("busy_poll",)}
KECHO = {
    one.name: one
    for one in (
        _kecho("kecho", *_ENGINE_EPOLL),
        _kecho("kecho, no sandbox", *_ENGINE_EPOLL, "--no-sandbox"),
        _kecho("kecho, spinning client", *_ENGINE_EPOLL, bench={"spin": True}),
        _kecho("kecho io_uring", "--engine", "io_uring", needs=("engine",)),
        _kecho("kecho sockmap", "--engine", "sockmap", in_kernel=True, needs=("engine",)),
        _kecho("kecho busy-poll", *_ENGINE_EPOLL, "--busy-poll", "200", **_BUSY),
        _kecho(
            "kecho busy-poll, spinning client",
            *_ENGINE_EPOLL,
            *("--busy-poll", "200"),
            bench={"spin": True},
            **_BUSY,
        ),
        _kecho("kecho shared", *_ENGINE_EPOLL, "--dispatch", "shared"),
        _kecho("kecho percpu", *_ENGINE_EPOLL, "--dispatch", "percpu"),
    )
}


def _built(name: str, target: str) -> Contestant:
    return Contestant(name, (str(PEERS_BUILT / target),), target=target)


_VENV = str(PEERS_BUILT / "venv" / "bin" / "python")
_ASYNCIO = str(PEERS_SOURCE / "asyncio_echo.py")
PEERS = {
    one.name: one
    for one in (
        _built("epoll_echo", "epoll_echo"),
        _built("user_echo_server", "user_echo_server"),
        _built("uring_echo", "uring_echo/uring_echo"),
        Contestant("asyncio", (sys.executable, _ASYNCIO)),
        Contestant("uvloop", (_VENV, _ASYNCIO, "--uvloop"), target="venv/.made"),
        _built("go", "go_echo/go_echo"),
        _built("tokio", "tokio_echo/tokio_echo"),
    )
}


def available(
    names: Iterable[str], chosen_peers: Sequence[str] | None = None
) -> tuple[list[Contestant], dict[str, str]]:
    """Those that can start here, and of the others why not. Builds the peers among them."""
    found: list[Contestant] = []
    absent: dict[str, str] = {}
    for name in names:
        one = KECHO.get(name) or PEERS[name]
        if one.is_kecho:
            why_not = _unknown_option(one)
            one = replace(one, command=_as_known(one.command))
        elif chosen_peers is not None and name not in chosen_peers:
            why_not = "left out by --peers"
        else:
            why_not = _build(one)
        if why_not is None:
            found.append(one)
        else:
            absent[name] = why_not
    return found, absent


def _known_options() -> set[str]:
    return {one.name for one in fields(ServerConfig)}


def _unknown_option(one: Contestant) -> str | None:
    missing = [name for name in one.needs if name not in _known_options()]
    return ABSENT_OPTION.format(missing[0].replace("_", "-")) if missing else None


def _as_known(command: tuple[str, ...]) -> tuple[str, ...]:
    """Before there was a choice of engines, there was epoll."""
    if "engine" in _known_options() or _ENGINE_EPOLL[0] not in command:
        return command
    at = command.index(_ENGINE_EPOLL[0])
    return command[:at] + command[at + len(_ENGINE_EPOLL) :]


def _build(one: Contestant) -> str | None:
    """None, or in one line why it cannot be had; the Makefile knows how each is built."""
    if one.target is None:
        return None
    try:
        made = subprocess.run(
            ["make", "-s", "-C", str(ROOT), f"build/peers/{one.target}"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_BUILD_S,
        )
    except FileNotFoundError:
        return "make is not installed"
    except subprocess.TimeoutExpired:
        return f"not built within {_BUILD_S:.0f} s"
    if made.returncode == 0:
        return None
    said = [line for line in (made.stdout + made.stderr).splitlines() if line.strip()]
    telling = [line for line in said if not line.startswith("make")] or said or ["make failed"]
    return telling[-1].strip()[:200]
