"""Addresses that hold for one network device alone."""

from __future__ import annotations

import re
import socket

import pytest

from kecho.server.confinement.sandbox import IS_SANITIZED
from support.clients import DEADLINE_S, echo
from support.namespaces import Namespace
from support.server_process import ServerProcess, assert_refused, run_command

pytestmark = [pytest.mark.e2e, pytest.mark.privileged]


@pytest.fixture
def two_links(inside: Namespace) -> None:
    """Devices a and b, which both have fe80::1."""
    inside.run("ip", "link", "add", "name", "a", "type", "veth", "peer", "name", "b")
    for name in ("a", "b"):
        inside.run("ip", "address", "add", "fe80::1/64", "dev", name, "nodad")
        inside.run("ip", "link", "set", "dev", name, "up")


@pytest.mark.usefixtures("two_links")
@pytest.mark.parametrize("sandbox", [*([] if IS_SANITIZED else ["--sandbox"]), "--no-sandbox"])
def test_a_link_local_address_is_told_with_its_device(sandbox: str, dispatch: str) -> None:
    arguments = ["--host=fe80::1%a", "--host=fe80::1%b", "--dispatch", dispatch, sandbox]
    with ServerProcess(arguments) as process:
        process.wait_until_listening()
        found = re.findall(r"tcp \[(fe80::1%\w)\]:(\d+)", process.stderr)
        assert [host for host, _ in found] == ["fe80::1%a", "fe80::1%b"]
        for host, port in found:
            with socket.create_connection((host, int(port)), timeout=DEADLINE_S) as client:
                assert echo(client, b"hello") == b"hello"
        assert process.stop() == 0


@pytest.mark.usefixtures("two_links")
def test_a_link_local_address_without_its_device_is_refused_in_words() -> None:
    finished = run_command("--host=fe80::1", "--port=0")
    assert_refused(finished, 1, "--host: 'fe80::1' is", "fe80::1%DEVICE")


@pytest.mark.usefixtures("two_links")
def test_a_device_that_is_not_there_is_named() -> None:
    finished = run_command("--host=[fe80::1%eth9]", "--port=0")
    assert_refused(finished, 1, "there is no network device 'eth9'")
