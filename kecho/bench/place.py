"""The address of a server in one word: ``HOST:PORT``, ``[::1]:7``, ``unix:PATH``, ``udp://HOST``."""

from __future__ import annotations

import ipaddress
import re
from typing import Any

__all__ = ["parse"]

_SCHEME = re.compile(r"(?P<scheme>[a-z][a-z0-9+.-]*)://(?P<rest>.*)", re.ASCII | re.DOTALL)
_BRACKETED = re.compile(r"\[(?P<host>[^\[\]]*)\](?::(?P<port>.*))?", re.DOTALL)


def parse(text: str) -> dict[str, Any]:
    """Return the workload options host, port (as text), uds and udp that the text names.

    Raises ValueError, with a reason of one line, if it names no server.
    """
    if text.startswith("unix:"):
        path = text.removeprefix("unix:")
        return {"uds": path.removeprefix("//") if path.startswith("///") else path}
    found = _SCHEME.fullmatch(text)
    if found is None:
        return _host_and_port(text)
    if found["scheme"] not in ("tcp", "udp"):
        raise ValueError(f"TARGET must be tcp://..., udp://... or unix:PATH (got {text!r})")
    place = _host_and_port(found["rest"].removesuffix("/"))
    return {**place, "udp": found["scheme"] == "udp"}


def _host_and_port(text: str) -> dict[str, Any]:
    if "/" in text:
        raise ValueError(f"TARGET must be a host or unix:PATH (got {text!r})")
    if text.startswith("["):
        found = _BRACKETED.fullmatch(text)
        if found is None or not _is_ipv6(found["host"]):
            raise ValueError(f"TARGET must be [IPV6]:PORT (got {text!r})")
        return _place(found["host"], found["port"])
    if text.count(":") > 1:
        if not _is_ipv6(text):
            raise ValueError(f"TARGET must be an IPv6 address or [IPV6]:PORT (got {text!r})")
        return _place(text, None)
    host, colon, port = text.partition(":")
    return _place(host, port if colon else None)


def _place(host: str, port: str | None) -> dict[str, Any]:
    """Return host and port, without the one that is missing. Raises ValueError if both are."""
    if not host and not port:
        raise ValueError("TARGET must have a host or a port")
    if port == "":
        raise ValueError(f"TARGET must have a port after {host!r}:")
    place = {"host": host, "port": port}
    return {name: value for name, value in place.items() if value}


def _is_ipv6(text: str) -> bool:
    try:
        ipaddress.IPv6Address(text)
    except ValueError:
        return False
    return True
