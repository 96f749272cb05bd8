"""Texts and values of an option, made from its definition: an option of a kind that exists needs no
entry here."""

from __future__ import annotations

from typing import Any, NamedTuple

from kecho.options import Option


class Sample(NamedTuple):
    """Two texts with the values that they stand for, of which the first is not the default, and a
    text that is refused."""

    text: str
    value: Any
    other_text: str
    other_value: Any
    refused: str


# Kinds with a parser of their own, by metavar.
_OWN_KINDS = {
    "0|1": Sample("1", "percpu", "0", "shared", "2"),
    "ADDRESS": Sample("127.0.0.2", ("127.0.0.2",), "127.0.0.3,::1", ("127.0.0.3", "::1"), ","),
    "PATH": Sample("flag.sock", "flag.sock", "variable.sock", "variable.sock", "x" * 108),
    "MODE": Sample("660", 0o660, "0", 0, "1777"),
    "USER[:GROUP]": Sample("0:0", "0:0", ":0", ":0", ":"),
    "NAME[:GROUP]": Sample("65534:65533", "65534:65533", "65534:1", "65534:1", "65534:none"),
    "CIDR": Sample(
        "127.0.0.0/8", ("127.0.0.0/8",), "127.0.0.1,::1", ("127.0.0.1/32", "::1/128"), "10.0.0.1/8"
    ),
    "MICROSECONDS|auto|forever": Sample("auto", "auto", "200", 200, "-1"),
}


def sample_of(spec: Option, default: object) -> Sample:
    if spec.metavar in _OWN_KINDS:
        return _OWN_KINDS[spec.metavar]
    if spec.metavar is None:
        return Sample("1", True, "off", False, "perhaps")
    if spec.choices:
        first = next(one for one in spec.choices if one != default)
        other = next(one for one in reversed(spec.choices) if one != first)
        return Sample(first, first, other, other, first.upper())
    if spec.repeatable:
        return Sample("9", (9,), "7,8", (7, 8), "0,-1")
    assert spec.between is not None, f"a kind of option that has no sample: {spec.metavar}"
    low, high = spec.between
    if spec.metavar == "BYTES":
        return Sample("1M", 1 << 20, str(low), low, str(high + 1))
    if isinstance(spec.check(high), float):
        return Sample(f"{low + 2.5}", low + 2.5, "1e3", 1000.0, "soon")
    return Sample(str(low + 1), low + 1, str(high), high, str(high + 1))
