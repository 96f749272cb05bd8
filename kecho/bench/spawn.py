"""A kecho server for the length of a run: a child process (--spawn)."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from ..system import background

__all__ = ["SpawnError", "Spawned", "spawned_server"]

_BACKLOG_DEFAULT = 128
_STOP_S = 15.0


class SpawnError(OSError):
    """The server did not start. The text is its own error, in one line."""


@dataclass(frozen=True)
class Spawned:
    """A server that listens. uds: its Unix socket; None if it listens on host and port."""

    pid: int
    host: str
    port: int
    uds: str | None


@contextmanager
def spawned_server(options: str, connections: int, *, udp: bool = False) -> Iterator[Spawned]:
    """Run ``python -m kecho OPTIONS`` on a free port, until the end of `with`.

    connections: its backlog is long enough for a burst of so many, unless the options set it.
    udp: it also echoes datagrams, without a limit to their rate.

    Raises SpawnError if it does not start, ValueError for options with an unbalanced quote.
    """
    arguments = shlex.split(options)
    given = {one.partition("=")[0] for one in arguments}
    if not given & {"--port", "--uds"}:
        arguments += ["--port", "0"]
    if "--backlog" not in given:
        arguments += ["--backlog", str(max(connections, _BACKLOG_DEFAULT))]
    if udp:
        arguments.append("--udp")
        arguments += [one for one in ("--udp-rate=0", "--udp-rate-total=0") if not _has(given, one)]
    # In a process group of its own: Ctrl-C ends the client, which then stops the server.
    watched, held = os.pipe()
    try:
        child = subprocess.Popen(
            [*_command(watched), *arguments, "--log-format", "json", "--log-level", "info"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,  # the client's stdout is for results
            stderr=subprocess.PIPE,
            text=True,
            process_group=0,
            pass_fds=[watched],
        )
    except BaseException:
        os.close(held)
        raise
    finally:
        os.close(watched)
    try:
        server = _wait_until_listening(child)
        # Its log is read and discarded from now on: a full pipe would stop it.
        reader = threading.Thread(target=_throw_away, args=(child,), daemon=True)
        background.start(reader)
        yield server
        child.terminate()
        child.wait(_STOP_S)
        reader.join(_STOP_S)
    except subprocess.TimeoutExpired:
        pass
    finally:
        os.close(held)
        child.kill()
        child.communicate()


def _has(given: set[str], argument: str) -> bool:
    return argument.partition("=")[0] in given


def _throw_away(child: subprocess.Popen[str]) -> None:
    assert child.stderr is not None
    with suppress(OSError, ValueError):
        while child.stderr.read(4096):
            pass


# The pipe is closed when this process ends, even by SIGKILL. Then the server stops.
_SCRIPT = """
import os, signal, sys, threading
def stop_with_the_client():
    os.read({fd}, 1)
    os.kill(os.getpid(), signal.SIGTERM)
threading.Thread(target=stop_with_the_client, daemon=True).start()
sys.path[:] = {path!r}
from kecho.server.cli import main
sys.exit(main())
"""


def _command(watched_fd: int) -> Sequence[str]:
    # -P: no imports from the current directory, until sys.path is ours.
    return [sys.executable, "-P", "-c", _SCRIPT.format(fd=watched_fd, path=sys.path)]


def _wait_until_listening(child: subprocess.Popen[str]) -> Spawned:
    """Read the log until the server listens. Raise SpawnError if it ends before."""
    assert child.stderr is not None
    said = ""
    for line in child.stderr:
        try:
            record = json.loads(line)
        except ValueError:
            said = line.strip().removeprefix("kecho: error: ")
            continue
        said = str(record.get("message", ""))
        if record.get("event") == "listening":
            first = record["addresses"][0]
            if isinstance(first, str):
                return Spawned(child.pid, "", 0, first)
            return Spawned(child.pid, first[0], first[1], None)
    raise SpawnError(f"the server did not start: {said or 'it wrote no error'}")
