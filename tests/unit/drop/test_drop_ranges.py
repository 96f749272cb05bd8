"""Ranges of addresses and ports: what their text means, and many of them at once."""

from __future__ import annotations

import contextlib
import ipaddress
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kecho.drop.ranges import Range, Ranges, parse_range

pytestmark = pytest.mark.python_only

# Few enough that addresses are often in a network.
addresses = st.one_of(
    st.integers(0, 63).map(lambda number: ipaddress.IPv4Address(0x0A000000 + number)),
    st.integers(0, 63).map(lambda number: ipaddress.IPv6Address((0xFE80 << 112) + number)),
)
networks = st.tuples(addresses, st.sampled_from([0, 1, 2, 3, 4, 6, 32])).map(
    lambda one: ipaddress.ip_network((one[0], one[0].max_prefixlen - one[1]), strict=False)
)
ports = st.tuples(st.integers(1, 40), st.integers(0, 5)).map(lambda one: (one[0], sum(one)))


INDICES = {"eth0": 2, "a]b": 3, "80": 4}


def holds(ranges: list[Range], address: str, port: int, device: int = 0) -> bool:
    return Ranges(ranges).hold(address, port, device, INDICES.get)


def one_by_one(ranges: list[Range], address: str, port: int) -> bool:
    return any(
        one.low_port <= port <= one.high_port
        and (one.network is None or ipaddress.ip_address(address) in one.network)
        for one in ranges
    )


@given(
    st.lists(st.builds(lambda network, ports: Range(network, *ports), st.none() | networks, ports)),
    addresses.map(str),
    st.integers(0, 50),
)
def test_many_ranges_hold_what_any_of_them_holds(
    ranges: list[Range], address: str, port: int
) -> None:
    assert holds(ranges, address, port) == one_by_one(ranges, address, port)


def calls_of_a_look(count: int) -> int:
    """How many functions are called to look an end up among so many ranges."""
    ranges = Ranges(
        [parse_range(f"10.{one >> 8}.{one & 255}.0/24:{one + 1}") for one in range(count)]
    )
    seen = 0

    def see(frame: object, event: str, argument: object) -> None:
        nonlocal seen
        seen += event in ("call", "c_call")

    sys.setprofile(see)
    try:
        ranges.hold("10.200.1.1", 9, 0, INDICES.get)
    finally:
        sys.setprofile(None)
    return seen


def test_look_among_a_thousand_ranges_takes_no_more_than_among_ten() -> None:
    assert calls_of_a_look(1000) == calls_of_a_look(10) < 20


@pytest.mark.parametrize(
    ("text", "inside", "outside"),
    [
        (":80", ("1.2.3.4", 80), ("1.2.3.4", 81)),
        ("80", ("::1", 80), ("::1", 8)),
        ("80-90", ("::1", 90), ("::1", 91)),
        (":80-90", ("::1", 80), ("::1", 79)),
        ("10.0.0.0/8", ("10.255.0.1", 1), ("11.0.0.1", 1)),
        ("10.0.0.0/8:80", ("10.255.0.1", 80), ("10.255.0.1", 81)),
        ("127.0.0.1", ("127.0.0.1", 9), ("127.0.0.2", 9)),
        ("::ffff:127.0.0.1", ("127.0.0.1", 9), ("::1", 9)),
        ("::1", ("::1", 9), ("127.0.0.1", 9)),
        ("[::1]:80", ("::1", 80), ("::1", 81)),
        ("[fe80::]/10:80-81", ("fe80::5", 81), ("2001::5", 81)),
        ("fe80::/10", ("fe80::5", 81), ("2001::5", 81)),
        ("*:80", ("::1", 80), ("::1", 81)),
    ],
)
def test_range_holds_what_it_says(
    text: str, inside: tuple[str, int], outside: tuple[str, int]
) -> None:
    assert holds([parse_range(text)], *inside)
    assert not holds([parse_range(text)], *outside)


@pytest.mark.parametrize(
    ("text", "inside", "outside"),
    [
        ("fe80::1%eth0", ("fe80::1", 9, 2), ("fe80::1", 9, 3)),
        ("fe80::1%eth0", ("fe80::1", 9, 2), ("fe80::1", 9, 0)),
        ("fe80::1%eth0", ("fe80::1", 9, 2), ("fe80::2", 9, 2)),
        ("fe80::1%eth0:80", ("fe80::1", 80, 2), ("fe80::1", 81, 2)),
        ("[fe80::1%eth0]:80", ("fe80::1", 80, 2), ("fe80::1", 80, 3)),
        ("[fe80::1]%eth0:80-81", ("fe80::1", 81, 2), ("fe80::1", 82, 2)),
        ("[fe80::1%a]b]:80", ("fe80::1", 80, 3), ("fe80::1", 80, 2)),
        ("[fe80::1]%a]b", ("fe80::1", 80, 3), ("fe80::1", 80, 2)),
        ("fe80::/10%eth0", ("fe80::5", 80, 2), ("fe80::5", 80, 3)),
        ("fe80::%eth0/10", ("fe80::5", 80, 2), ("2001::5", 80, 2)),
        ("fe80::/10%eth0:80", ("fe80::5", 80, 2), ("fe80::5", 81, 2)),
        ("10.0.0.0/8%eth0:80", ("10.0.0.1", 80, 2), ("10.0.0.1", 80, 4)),
        ("10.0.0.1%80:90", ("10.0.0.1", 90, 4), ("10.0.0.1", 80, 4)),
        ("%eth0", ("10.0.0.1", 80, 2), ("10.0.0.1", 80, 0)),
        ("*%eth0:80", ("::1", 80, 2), ("::1", 81, 2)),
        ("%eth0:80", ("::1", 80, 2), ("::1", 80, 3)),
    ],
)
def test_range_over_a_device_holds_what_it_says(
    text: str, inside: tuple[str, int, int], outside: tuple[str, int, int]
) -> None:
    for more in ([], [parse_range("%nodev:80"), parse_range("192.0.2.1")]):
        assert holds([parse_range(text), *more], *inside)
        assert not holds([parse_range(text), *more], *outside)
    assert parse_range(text).narrows


@pytest.mark.parametrize(
    "text",
    ["fe80::1%", "%", "[fe80::1%eth0:80", "[fe80::1]80%eth0", "%eth0:", "%a b", "x%eth0",
     "fe80::1%sixteen-letters-", "*%/8", "fe80::1%eth0:80%eth1", "::" + "%e:" * 20_000],
)  # fmt: skip
def test_wrong_range_over_a_device_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse_range(text)


@pytest.mark.parametrize(
    "text",
    ["", "*", ":", ":0", ":65536", ":9-8", ":1-", "10.0.0.1/8", "10.0.0.0/33", "::ffff:1.2.3.0/24",
     "[::1", "[1.2.3.4]:5", "[::1]5", "x", "1.2.3.4:", "-", "--", "1.2.3.4/", "[::1]/129"],
)  # fmt: skip
def test_wrong_range_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse_range(text)


@given(st.one_of(st.text(), st.text("0123456789abcdef:.[]/*-%\0")))
def test_any_text_is_a_range_or_an_error(text: str) -> None:
    with contextlib.suppress(ValueError):
        holds([parse_range(text)], "127.0.0.1", 80, 1)
