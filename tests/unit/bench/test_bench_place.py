"""Where a server is, in a word."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kecho.bench.place import parse

pytestmark = pytest.mark.python_only


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("echo.example", {"host": "echo.example"}),
        ("echo.example:7", {"host": "echo.example", "port": "7"}),
        ("10.0.0.1:7", {"host": "10.0.0.1", "port": "7"}),
        (":7", {"port": "7"}),
        ("::1", {"host": "::1"}),
        ("::1:7", {"host": "::1:7"}),  # an address, too
        ("[::1]", {"host": "::1"}),
        ("[::1]:7", {"host": "::1", "port": "7"}),
        ("[fe80::1%eth0]:7", {"host": "fe80::1%eth0", "port": "7"}),
        ("fe80::1%eth0", {"host": "fe80::1%eth0"}),
        ("unix:/run/echo", {"uds": "/run/echo"}),
        ("unix:echo", {"uds": "echo"}),
        ("unix:///run/echo", {"uds": "/run/echo"}),
        ("tcp://echo.example:7", {"host": "echo.example", "port": "7", "udp": False}),
        ("tcp://echo.example:7/", {"host": "echo.example", "port": "7", "udp": False}),
        ("udp://[::1]:7", {"host": "::1", "port": "7", "udp": True}),
        ("udp://echo.example", {"host": "echo.example", "udp": True}),
    ],
)
def test_a_place_is_understood(text: str, place: dict[str, Any]) -> None:
    assert parse(text) == place


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "must have a host or a port"),
        (":", "must have a host or a port"),
        ("tcp://", "must have a host or a port"),
        ("host:", "must have a port after 'host':"),
        ("[::1", "must be [IPV6]:PORT"),
        ("[host]:7", "must be [IPV6]:PORT"),
        ("[::1]7", "must be [IPV6]:PORT"),
        ("a:b:c", "must be an IPv6 address or [IPV6]:PORT"),
        ("/run/echo", "must be a host or unix:PATH"),
        ("http://host", "must be tcp://..., udp://... or unix:PATH"),
    ],
)
def test_what_is_no_place_is_told_why(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]+$") as caught:
        parse(text)
    assert said in str(caught.value)


@given(st.text(max_size=30))
def test_any_text_is_a_place_or_a_value_error(text: str) -> None:
    try:
        place = parse(text)
    except ValueError:
        return
    assert place.keys() <= {"host", "port", "uds", "udp"}
    assert place
