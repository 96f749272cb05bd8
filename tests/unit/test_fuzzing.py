"""The harness of the fuzzers finds what is planted for it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kecho.server.confinement.sandbox import IS_SANITIZED
from support.fuzzing import DATA_MOST_BYTES, Fuzz

pytestmark = pytest.mark.python_only

SEEDS = [b"one", b"two"]


def choosy(data: bytes) -> int:
    if b"NaN" in data:
        raise ValueError(data)
    return len(data) % 3


def wrong(data: bytes) -> None:
    if b"\x1b" in data:
        raise KeyError(data)


def slow(data: bytes) -> None:
    while b"\x1b" in data:
        pass


def large(data: bytes) -> int:
    return len(bytes(DATA_MOST_BYTES if b"\x1b" in data else 1))


def deadly(data: bytes) -> None:
    if b"\x1b" in data:
        os.abort()


@pytest.fixture
def short(tmp_path: Path) -> Fuzz:
    return Fuzz(60, 7, tmp_path, cpu_most_s=0.2)


def test_inputs_that_are_taken_or_refused_are_counted(tmp_path: Path) -> None:
    found = Fuzz(0.2, 7, tmp_path)(choosy, seeds=SEEDS)
    assert found.accepted > found.refused > 0


@pytest.mark.parametrize(
    ("target", "why"),
    [
        (wrong, "KeyError"),
        (slow, "more than 0.2 s"),
        pytest.param(
            large, "MemoryError", marks=pytest.mark.skipif(IS_SANITIZED, reason="no bound there")
        ),
        (deadly, "status -6"),
    ],
)
def test_input_that_fails_is_kept(short: Fuzz, target: object, why: str) -> None:
    with pytest.raises(AssertionError, match="--fuzz-seed 7") as caught:
        short(target, seeds=SEEDS, refusals=(ValueError, MemoryError))  # type: ignore[arg-type]
    assert why in str(caught.value)
    assert b"\x1b" in (short.directory / "failing-input").read_bytes()


def test_same_seed_goes_through_the_same_inputs(short: Fuzz) -> None:
    kept = []
    for _ in range(2):
        with pytest.raises(AssertionError):
            short(wrong, seeds=SEEDS)
        kept.append((short.directory / "failing-input").read_bytes())
    assert kept[0] == kept[1]
