"""Fuzzers of what the server reads: access rules, options, and bytes of clients."""

from __future__ import annotations

import functools
import ipaddress
import socket

import pytest

import kecho
from kecho.server.access import parse_prefixes, rules_of
from kecho.server.arguments import check_options
from kecho.server.config import environment_variable
from kecho.server.settings import OPTIONS, CommandConfig, gather
from support.clients import connect, receive_exactly
from support.fuzzing import Fuzz

# ---- rules --------------------------------------------------------------------------------------

RULES = [
    b"10.0.0.0/8,192.0.2.1\n10.1.0.0/16",
    b"::1, fe80::/10,2001:db8::/32\n2001:db8:1::/48,::ffff:10.0.0.0/104",
    b"0.0.0.0/0,::/0\n127.0.0.1/32",
    b"10.0.0.1/8\n1.2.3.4/255.255.255.0",
]
RULE_WORDS = [*(b"/", b",", b":", b"::", b"%eth0", b"/128", b"/129", b"/-1", b"/0", b"::ffff:")]


def read_rules(data: bytes) -> object:
    allow, _, deny = data.decode("latin-1").partition("\n")
    config = kecho.ServerConfig(
        allow=parse_prefixes(allow) if allow else (), deny=parse_prefixes(deny) if deny else ()
    )
    rules = rules_of(config.allow, config.deny)
    assert [length for _, length, _ in rules] == sorted((one[1] for one in rules), reverse=True)
    for prefix, length, _ in rules:
        ipaddress.IPv6Network((prefix, length))
    return len(rules)


@pytest.mark.python_only
def test_any_text_is_rules_or_wrong_usage(fuzz: Fuzz) -> None:
    done = fuzz(read_rules, seeds=RULES, words=RULE_WORDS, refusals=(ValueError,))
    assert done.accepted > 0 < done.refused


# ---- options ------------------------------------------------------------------------------------

NAMES = [environment_variable(name).encode() for name in OPTIONS]
TEXTS = [
    *(
        b"0",
        b"1",
        b"-1",
        b"65536",
        b"1e999",
        b"nan",
        b"0x10",
        b"64K",
        b"2G",
        b"1e-9",
        b"99999999999",
    ),
    *(
        b"yes",
        b"no",
        b"auto",
        b"forever",
        b"epoll",
        b"percpu",
        b"127.0.0.1",
        b"::",
        b"@name",
        b"/x",
    ),
    *(b"10.0.0.0/8", b"nobody:nogroup", b"0666", b"tcp://10.0.0.1:1", b"\xc2\xb5", b"\n", b"="),
]


def read_options(data: bytes) -> object:
    pairs = (line.split("=", 1) for line in data.decode("latin-1").split("\n") if "=" in line)
    environment = {name: text.replace("\0", "") for name, text in pairs}
    config = CommandConfig(**check_options(CommandConfig, gather({}, environment, {})))
    return str(config.engine), len(environment)


@pytest.mark.python_only
def test_any_variables_are_options_or_wrong_usage(fuzz: Fuzz) -> None:
    seeds = [name + b"=" + text for name, text in zip(NAMES, TEXTS * 3, strict=False)]
    words = [*(b"\n" + name + b"=" for name in NAMES), *TEXTS]
    done = fuzz(read_options, seeds=seeds, words=words, refusals=(ValueError,), most_bytes=4096)
    assert done.accepted > 0 < done.refused


# ---- clients ------------------------------------------------------------------------------------

# The first bytes of protocols that other servers understand, of which an echo knows none.
MESSAGES = [
    b"PROXY TCP4 192.0.2.1 192.0.2.2 36986 12345\r\nhello",
    b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c\xc0\0\2\1\xc0\0\2\2\x90\x7a\x30\x39hello",
    b"GET / HTTP/1.1\r\nHost: echo\r\n\r\n",
    b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03",
    b"\xff\xfd\x01\xff\xfb\x1f hello\r\n",
]


@functools.cache
def server() -> kecho.Server:
    """One for all inputs of a process."""
    one = kecho.Server(port=0, threads=1)
    one.start()
    return one


def send(data: bytes) -> object:
    with connect(server()) as client:
        begin = data[: len(data) // 3]
        client.sendall(begin)
        got = receive_exactly(client, len(begin))
        client.sendall(data[len(begin) :])
        client.shutdown(socket.SHUT_WR)
        while chunk := client.recv(1 << 16):
            got += chunk
    assert got == data
    return len(data).bit_length()


def test_any_bytes_come_back_as_they_were(fuzz: Fuzz) -> None:
    assert fuzz(send, seeds=MESSAGES, words=[b"PROXY ", b"\r\n"]).accepted > 0
