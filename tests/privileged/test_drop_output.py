"""The dropper's output: what the kernel names is printed, and what was dropped is told."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from kecho import drop
from support.clients import DEADLINE_S
from support.connections_to_drop import Ends, pair_of, started
from support.namespaces import Namespace

pytestmark = pytest.mark.privileged

NAME = "d€v"
LOCALES = [
    {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    {"PYTHONIOENCODING": "ascii"},
    {"PYTHONIOENCODING": "latin-1:strict"},
]


@pytest.fixture
def client(inside: Namespace, stack: ExitStack) -> socket.socket:
    """Connected over a device whose name is beyond Latin-1."""
    ends = Ends("127.0.0.1", stack)
    inside.run("ip", "link", "add", "name", NAME, "type", "veth", "peer", "name", "other")
    inside.run("ip", "link", "set", "lo", "down")
    inside.run("ip", "link", "set", "lo", "name", NAME + "lo")
    inside.run("ip", "link", "set", NAME + "lo", "up")
    one = stack.enter_context(socket.socket())
    one.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, f"{NAME}lo".encode())
    one.settimeout(DEADLINE_S)
    one.connect((ends.address, ends.port))
    stack.enter_context(ends.listener.accept()[0])
    return one


@pytest.fixture
def process_name() -> Iterator[None]:
    comm = Path("/proc/thread-self/comm")
    before = comm.read_bytes().removesuffix(b"\n")
    comm.write_bytes("pröcess€\x1b[7m".encode())
    yield
    comm.write_bytes(before)


@pytest.mark.parametrize("locale", LOCALES, ids=str)
def test_name_beyond_the_locale_is_printed_as_escapes(
    client: socket.socket, process_name: None, locale: dict[str, str]
) -> None:
    port = client.getsockname()[1]
    for arguments in (["--list"], []):
        with started(
            *arguments, "--local", f":{port}", env={**os.environ, **locale}, errors="replace"
        ) as process:
            out, said = process.communicate(timeout=DEADLINE_S)
        assert process.returncode == 0, said
        assert "d\\u20acvlo" in out
        assert "Traceback" not in said
        assert ("\\u20ac\\x1b[7m" in out) == bool(arguments)
    assert said == "kecho.drop: 1 dropped\n"
    assert drop.find(local=[f":{port}"]) == []


def test_name_in_json_is_read_back(client: socket.socket, process_name: None) -> None:
    with started("--list", "--json", *pair_of(client).split()) as process:
        out, _ = process.communicate(timeout=DEADLINE_S)
    (told,) = json.loads(out)["sockets"]
    assert told["interface"] == NAME + "lo"
    assert told["process"]["name"].startswith("pröcess€")
