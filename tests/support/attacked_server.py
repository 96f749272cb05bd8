"""A server with an attacker inside, for tests of the sandbox: see attacker.py."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from support.server_process import ServerProcess, after

ATTACKER = Path(__file__).with_name("attacker.py")
ALLOWED = "what serving takes"
LOGGED = "logged before\n"

Found = dict[str, dict[str, int]]  # effect -> way to it -> errno, 0 where it worked


@contextmanager
def attackable(own: Path, *arguments: str, first: str = "") -> Iterator[ServerProcess]:
    """own: a directory for what is to stay as it is. first: see attacker.py."""
    (own / "kept").write_text("as it was")
    (own / "log").write_text(LOGGED)
    for path in (own, own / "kept", own / "log"):
        path.chmod(0o777)  # what keeps another user from them is the sandbox alone
    given = [str(ATTACKER), str(own), first, *arguments]
    with ServerProcess(["--port=0"], before=after(f"sys.argv[2:] = {given!r}")) as process:
        process.wait_until_listening()
        yield process


def attacked(process: ServerProcess) -> list[Found]:
    """What the main thread and another one found."""
    process.send(signal.SIGUSR2)
    process.wait_until_said(r"found [^\n]*\nfound ")
    return [
        json.loads(line.removeprefix("found "))
        for line in process.stderr.splitlines()
        if line.startswith("found ")
    ]


def what_worked(found: Found) -> set[tuple[str, str]]:
    """(effect, way)"""
    return {(effect, name) for effect, each in found.items() for name in each if not each[name]}
