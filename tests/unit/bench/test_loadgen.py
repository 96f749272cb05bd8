"""The native client: its payload, its histogram's mapping, its arguments."""

from __future__ import annotations

import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kecho.bench import _loadgen
from kecho.bench.results.buckets import HIGHEST, index_of

ARGUMENTS = {
    "mode": _loadgen.MODES.index("closed"),
    "family": socket.AF_INET,
    "address": bytes([127, 0, 0, 1]),
    "port": 9,
    "scope": 0,
    "sources": b"",
    "first_number": 0,
    "connections": 1,
    "connects_at_once": 1,
    "seed": bytes(20),
    "length": 64,
    "depth": 1,
    "timeout_ns": 10**9,
    "interval_ns": 0.0,
    "schedule_first": 0,
    "schedule_step": 1,
    "datagrams": False,
    "line": False,
    "verify": True,
    "spin": False,
    "close_by_reset": False,
    "reconnect": False,
    "keep_ends": False,
}


SEED = bytes(range(20))
SEEDS = st.binary(min_size=20, max_size=20)


@pytest.mark.parametrize(("length", "line"), [(64, False), (8, False), (64, True)])
def test_the_header_does_not_tell_the_rest(length: int, line: bool) -> None:
    """Half of the bits differ with another key, in every word that is no header."""
    hidden = SEED[:4] + bytes(16)
    one = _loadgen.payload(SEED, 3, 5, length, line)
    other = _loadgen.payload(hidden, 3, 5, length, line)
    begin = 16 if length > 16 and not line else 1
    assert one[:begin] == other[:begin]
    different = int.from_bytes(one[begin:]) ^ int.from_bytes(other[begin:])
    bits = (length - begin) * (6 if line else 8)
    assert 0.3 * bits < different.bit_count() < 0.7 * bits


@given(st.integers(0, 2**64 - 1))
def test_both_halves_put_a_value_into_the_same_counter(value: int) -> None:
    assert _loadgen.histogram_index(value) == index_of(min(value, HIGHEST))


@given(SEEDS, st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1), st.integers(16))
def test_a_message_says_whose_and_which_it_is(
    seed: bytes, connection: int, sequence: int, length: int
) -> None:
    message = _loadgen.payload(seed, connection, sequence, length % 3000 + 16)
    assert int.from_bytes(message[:8], "little") == sequence
    assert int.from_bytes(message[8:12], "little") == connection
    assert message[12:16] == seed[:4]


@given(SEEDS, st.integers(0, 1000), st.integers(0, 2**60), st.integers(1, 300))
def test_neighbouring_messages_differ_from_their_first_byte(
    seed: bytes, connection: int, sequence: int, length: int
) -> None:
    one = _loadgen.payload(seed, connection, sequence, length)
    for step in range(1, 256):
        assert _loadgen.payload(seed, connection, sequence + step, length)[0] != one[0]


def test_messages_of_other_connections_differ_throughout() -> None:
    messages = {_loadgen.payload(SEED, connection, 5, 64) for connection in range(10_000)}
    assert len(messages) == 10_000
    tails = {_loadgen.payload(SEED, connection, 5, 64)[16:24] for connection in range(10_000)}
    assert len(tails) == 10_000


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("mode", 6),
        ("mode", -1),
        ("connections", 0),
        ("connects_at_once", 0),
        ("length", 0),
        ("length", 2**31),
        ("depth", 0),
        ("schedule_step", 0),
        ("interval_ns", float("nan")),
        ("address", b"123"),
        ("seed", bytes(19)),
        ("sources", b"12345"),
    ],
)
def test_arguments_out_of_range_are_refused(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=r"out of range|does not fit|do not fit"):
        _loadgen.Client(**{**ARGUMENTS, name: value})


@pytest.mark.parametrize(
    "wrong",
    [
        {"mode": _loadgen.MODES.index("stream")},
        {"mode": _loadgen.MODES.index("burst")},
        {"length": 15},
        {"length": 65537},
    ],
)
def test_datagrams_are_for_two_modes_and_lengths_that_fit(wrong: dict[str, int]) -> None:
    fine = {"datagrams": True, "mode": _loadgen.MODES.index("closed"), "length": 64}
    _loadgen.Client(**{**ARGUMENTS, **fine})
    with pytest.raises(ValueError, match="out of range"):
        _loadgen.Client(**{**ARGUMENTS, **fine, **wrong})


def test_a_client_that_is_set_up_twice_says_so() -> None:
    client = _loadgen.Client(**ARGUMENTS)
    with pytest.raises(RuntimeError, match="initialised once"):
        client.__init__(**ARGUMENTS)  # type: ignore[misc]


def test_a_client_that_was_never_set_up_does_nothing() -> None:
    client = _loadgen.Client.__new__(_loadgen.Client)
    with pytest.raises(RuntimeError, match="not initialised"):
        client.open()
    assert client.counters()["opened"] == 0
    with pytest.raises(ValueError, match="no latency"):
        client.histogram("service")
    client.stop()


def test_unknown_latencies_and_the_burst_of_another_mode_are_refused() -> None:
    client = _loadgen.Client(**ARGUMENTS)
    with pytest.raises(ValueError, match="there is no latency 'nonsense'"):
        client.histogram("nonsense")
    with pytest.raises(ValueError, match="mode is not burst"):
        client.burst(0, True)
    assert client.samples() == b""
    assert client.first_error() is None


def test_a_refused_connect_is_an_error_of_its_kind() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        client = _loadgen.Client(
            **{**ARGUMENTS, "port": taken.getsockname()[1], "connections": 100}
        )
        client.open()
    assert client.counters()["errors"] == {"refused": 100}
    first = client.first_error()
    assert first is not None
    assert first["kind"] == "refused"


@given(SEEDS, st.integers(0, 1000), st.integers(0, 2**60), st.integers(1, 300))
def test_a_line_is_printable_and_ends_in_the_only_newline(
    seed: bytes, connection: int, sequence: int, length: int
) -> None:
    line = _loadgen.payload(seed, connection, sequence, length, True)
    assert len(line) == length
    assert line[-1:] == b"\n"
    assert all(ord("0") <= byte <= ord("o") for byte in line[:-1])
    if length > 1:
        assert _loadgen.payload(seed, connection, sequence + 1, length, True)[0] != line[0]


def test_datagrams_are_no_lines() -> None:
    with pytest.raises(ValueError, match="line is out of range"):
        _loadgen.Client(**{**ARGUMENTS, "datagrams": True, "line": True})
