"""The dropper in a namespace of somebody who forges what the kernel would answer."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from kecho import drop
from kecho.drop import Diag, Result
from kecho.drop.filters import Filter
from support.connections_to_drop import run_drop
from support.forged_netlink import CONNECTIONS, KINDS, Attacker
from support.namespaces import Namespace
from support.privileges import skip_unless_root

pytestmark = pytest.mark.privileged


@pytest.fixture
def attacker() -> Iterator[Attacker]:
    skip_unless_root()
    with Attacker() as one:
        yield one


@pytest.mark.parametrize("kind", KINDS)
def test_forged_answers_change_nothing_that_is_seen(attacker: Attacker, kind: str) -> None:
    with Diag(f"pid:{attacker.pid}") as diag:
        with attacker.flooding(kind) as counts:
            attacker.wait_until_it_has_tried()
            found = diag.find(Filter(states=frozenset({"established"})))
        assert len(found) == 2 * CONNECTIONS
        assert {one.local_address for one in found} == {"127.0.0.1"}
    assert counts["delivered"] == 0 < counts["refused"]


@pytest.mark.parametrize("kind", ["acks", "errors"])
def test_forged_acks_do_not_tell_what_became_of_a_socket(attacker: Attacker, kind: str) -> None:
    with Diag(f"pid:{attacker.pid}") as diag:
        clients = [one for one in diag.find(Filter()) if one.local_port > one.peer_port][:10]
        with attacker.flooding(kind) as counts:
            attacker.wait_until_it_has_tried()
            (outcomes,) = diag.drop_sockets(clients)
            (again,) = diag.drop_sockets(clients)
    assert {one.result for one in outcomes} == {Result.DROPPED}
    assert {one.result for one in again} == {Result.GONE}
    assert counts["delivered"] == 0 < counts["refused"]


@pytest.mark.parametrize("kind", ["done", "sockets", "garbage"])
def test_command_finds_in_a_hostile_namespace_what_is_there(attacker: Attacker, kind: str) -> None:
    asked = ("--netns", f"pid:{attacker.pid}", "--state", "established")
    with attacker.flooding(kind):
        finished = run_drop("--list", "--json", *asked)
        assert (finished.returncode, finished.stderr) == (0, "")
        assert len(json.loads(finished.stdout)["sockets"]) == 2 * CONNECTIONS
        finished = run_drop(*asked)
    assert finished.returncode == 0, finished.stderr
    assert drop.find(netns=f"pid:{attacker.pid}", states=["established"]) == []


def test_sequence_numbers_begin_anywhere(inside: Namespace, tmp_path: Path) -> None:
    if shutil.which("strace") is None:
        pytest.skip("needs strace")
    begun = set()
    for count in range(2):
        trace = tmp_path / str(count)
        run_drop("--list", before=("strace", "-f", "-e", "trace=sendto", "-o", str(trace)))
        begun.add(re.findall(r"nlmsg_seq=(\w+)", trace.read_text())[0])
    assert len(begun) == 2
