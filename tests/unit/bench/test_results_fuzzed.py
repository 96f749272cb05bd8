"""Files of results and encoded histograms, mutated: each is used or refused in 5 s and 256 MB."""

from __future__ import annotations

import io
import json
from importlib.util import find_spec

import pytest

from kecho.bench import Histogram, Result
from kecho.bench.output import page, plot, report
from kecho.bench.results import compare
from kecho.bench.results.buckets import COUNTS_LENGTH
from kecho.bench.results.result import dump, load
from support.fuzzing import Fuzz
from support.hostile_results import (
    attacks,
    document,
    full_histogram,
    histogram_of,
    large_attacks,
    many,
)

pytestmark = pytest.mark.python_only

WORDS = [
    *(json.dumps(name).encode() for name in document()),
    *(b'"hdr"', b'"reasons"', b'"lost"', b'"mode": "burst"', b'"udp": true', b"null", b"true"),
    *(b"[", b"]", b"{", b"}", b",", b":", b'"', b"[[[[[[[[", b"\\u001b[2J", b"\\u202e"),
    *(b"5e-324", b"1e-200", b"1e-9", b"1e12", b"NaN", b"Infinity", b"1e999"),
]


def use(data: bytes) -> object:
    """All that is made of a file, but for pictures."""
    results = load(data)
    texts = [report.text(one) for one in results[:20]]
    if len(results) == 1:
        texts.append(compare.text(results[0], results[0], ["p99.95"]))
        texts += [f"{one.low} {one.high}" for one in compare.compare(results[0], results[0])]
    texts += [report.to_csv(results), report.to_hlog(results)]
    for one in results[:20]:
        texts += [report.to_hgrm(one)] if one.main_latency else []
        texts += [report.to_txt(one)] if one.rounds else []
    assert "nan" not in "".join(texts).split()
    assert load(dump(results)) == results
    Result.merge(results[:20])
    return len(results), len(results[0].repeats), len(results[0].rounds)


def show(data: bytes) -> None:
    """What `report` and `compare` do."""
    results = load(data)
    for one in results:
        report.text(one)
    if len(results) == 1:
        compare.text(results[0], results[0])


def draw(data: bytes) -> None:
    plot.plot(load(data), io.BytesIO(), "png")


def make_page(data: bytes) -> None:
    page.to_html(load(data))


def decode(data: bytes) -> int:
    """A histogram's counts, as they are within their compression."""
    one = Histogram.decode(histogram_of(data))
    assert Histogram.decode(one.encode()) == one
    assert one.summary()["count"] == one.count
    one.to_hgrm()
    return one.count.bit_length()


def decode_text(data: bytes) -> int:
    return Histogram.decode(data.decode("latin-1")).count.bit_length()


def seeds() -> list[bytes]:
    two = {"schema": document()["schema"], "results": [document(), document()]}
    return [*attacks().values(), json.dumps(document()).encode(), many(5), json.dumps(two).encode()]


def test_any_file_of_results_is_used_or_refused(fuzz: Fuzz) -> None:
    fuzzed = fuzz(use, seeds=seeds(), words=WORDS)
    assert fuzzed.accepted
    assert fuzzed.refused


@pytest.fixture
def drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    """numpy's OpenBLAS reserves memory for each thread, which counts though nothing is in it."""
    if find_spec("matplotlib") is None:  # not imported: numpy begins threads
        pytest.skip("needs matplotlib")
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "1")


@pytest.mark.release
@pytest.mark.usefixtures("drawing")
def test_any_file_of_results_is_drawn_or_refused(fuzz: Fuzz) -> None:
    assert fuzz(make_page, seeds=seeds(), words=WORDS).accepted


def test_any_counts_are_a_histogram_or_refused(fuzz: Fuzz) -> None:
    full = b"\x02" * COUNTS_LENGTH
    ones = [full, b"\x80" * 9, b"\xff" * 9, b"\0" * 99, b"\xfe" * 9 + b"\x02", b"\x01" * 5]
    fuzzed = fuzz(decode, seeds=ones)
    assert fuzzed.accepted
    assert fuzzed.refused


def test_any_text_is_a_histogram_or_refused(fuzz: Fuzz) -> None:
    texts = [full_histogram(), Histogram.of([1, 10**6, 10**12]).encode()]
    assert fuzz(decode_text, seeds=[text.encode() for text in texts]).accepted


@pytest.mark.release
@pytest.mark.usefixtures("drawing")
@pytest.mark.parametrize("name", large_attacks())
@pytest.mark.parametrize("target", [show, draw])
def test_a_large_file_is_used_or_refused_within_the_bounds(
    fuzz: Fuzz, name: str, target: object
) -> None:
    fuzz.seconds = 0
    done = fuzz(target, seeds=[large_attacks()[name]()])  # type: ignore[arg-type]
    assert (done.accepted, done.refused) == ((1, 0) if "as may be" in name else (0, 1))
