"""Conditions on results, and comparisons of two."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kecho.bench import Histogram, Result, Verdict, Workload
from kecho.bench.results import compare, condition
from kecho.bench.results.result import dump
from kecho.bench.subcommands import COMMANDS
from support.faultless_run import result

pytestmark = pytest.mark.python_only


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        ("p50<3us", True),
        ("p50 >= 3µs", False),
        ("max<0.003ms", True),
        ("rate>999", True),
        ("rate>1000/s", False),
        ("rate<0.95x", False),
        ("rate>=1x", True),
        ("p99.9<=1x", True),
        ("errors>0", False),
        ("mean>1us", True),
        ("p95<2900ns", True),
        ("p99.95>2997ns", True),
        ("p0.5<2us", True),
    ],
)
def test_conditions_mean_what_they_say(text: str, holds: bool) -> None:
    one = result()
    assert condition.parse(text).holds(one, one) is holds


@pytest.mark.parametrize(
    "text",
    [
        *("", "p99", "p99<1", "p99<1/s", "rate<1ms", "p99=1ms", "p99<-1ms", "errors>1s"),
        *("p<1ms", "p0<1ms", "p100<1ms", "p99.<1ms", "p99.99999<1ms", "p.9<1ms", "p999<1ms"),
    ],
)
def test_what_is_no_condition_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]+$"):
        condition.parse(text)


@given(st.text(max_size=20))
def test_any_text_is_a_condition_or_a_value_error(text: str) -> None:
    try:
        metric = condition.parse(text).metric
        assert metric in condition.METRICS or 0 < float(metric[1:]) < 100
    except ValueError:
        pass


@pytest.mark.parametrize(
    ("condition_text", "status"),
    [("rate<0.95x", 3), ("rate>0.95x", 0), ("p99>1ms", 3), ("rate>900/s", 0)],
)
def test_the_command_fails_if_the_second_is_what_it_must_not_be(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], condition_text: str, status: int
) -> None:
    paths = [str(tmp_path / "before.json"), str(tmp_path / "after.json")]
    slower = result([2_000_000] * 1000)
    for path, one in zip(paths, (result([1000] * 2000), slower), strict=True):
        Path(path).write_text(dump([one]))
    assert COMMANDS["compare"]([*paths, "--fail-if", condition_text]) == status
    said = capsys.readouterr().err
    assert said == (f"kecho.bench: failed: {condition_text}\n" if status else "")


def test_each_condition_is_told_by_itself(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One has no data; that another one came true is said all the same."""
    held = result(
        workload=Workload(mode="idle", connections=1).to_dict(), latency={}, errors={"reset": 1}
    )
    path = str(tmp_path / "held.json")
    Path(path).write_text(dump([held]))
    impossible = ["--fail-if", "p95>1ms", "--fail-if", "rate<1"]
    assert COMMANDS["compare"]([path, path, *impossible, "--fail-if", "errors>0"]) == 3
    assert capsys.readouterr().err == (
        "kecho.bench: failed: errors>0\n"
        "kecho.bench: error: --fail-if p95>1ms: a run of mode idle has no p95\n"
        "kecho.bench: error: --fail-if rate<1: a run of mode idle has no rate\n"
    )
    assert COMMANDS["compare"]([path, path, *impossible, "--fail-if", "errors>1"]) == 1


def test_a_percentile_of_a_condition_is_in_the_table_of_a_comparison(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(tmp_path / "one.json")
    Path(path).write_text(dump([result()]))
    assert COMMANDS["compare"]([path, path, "--fail-if", "p99.95>1.1x"]) == 0
    assert "\np99.95 " in capsys.readouterr().out


def repeated(rates: list[int]) -> Result:
    return Result.merge([result([1000] * rate) for rate in rates])


def comparison_of_rates(first: Result, second: Result) -> compare.Comparison:
    return next(one for one in compare.compare(first, second) if one.metric == "rate")


def test_a_clear_difference_is_told_from_noise() -> None:
    clear = comparison_of_rates(
        repeated([100, 102, 98, 101, 99]), repeated([120, 122, 118, 121, 119])
    )
    assert clear.ratio == pytest.approx(1.2)
    assert clear.differs is True
    assert clear.low is not None and clear.high is not None  # noqa: PT018
    assert 1.1 < clear.low < 1.2 < clear.high < 1.3
    noise = comparison_of_rates(repeated([100, 150, 50, 120, 80]), repeated([90, 160, 70, 110, 85]))
    assert noise.differs is False


def test_a_single_run_has_no_interval() -> None:
    alone = comparison_of_rates(result(), result())
    assert (alone.ratio, alone.low, alone.differs) == (1.0, None, None)
    assert "A is one run: no interval" in compare.text(result(), result())


@pytest.mark.parametrize("repeats", [5, 10])
def test_the_interval_holds_the_truth_about_as_often_as_it_says(
    repeats: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare, "_RESAMPLES", 400)
    draw = random.Random(5)
    missed = 0
    for _ in range(200):
        samples = [[draw.gauss(100, 5) for _ in range(repeats)] for _ in range(2)]
        low, high = compare.interval(*samples)
        assert low is not None and high is not None  # noqa: PT018
        missed += not low <= 1 <= high
    assert missed <= 18  # 10 are expected; the percentiles of the draws alone miss 23 and 16 to 20


@pytest.mark.parametrize("repeats", [2, 3])
def test_too_few_repeats_have_no_interval(repeats: int) -> None:
    few = comparison_of_rates(repeated([100, 90, 95][:repeats]), repeated([200, 210, 220, 230]))
    assert few.differs is None
    said = compare.text(repeated([100, 90, 95][:repeats]), repeated([200, 210, 220, 230]))
    assert f"A is {repeats} runs: no interval" in said


def test_times_of_different_latencies_are_not_compared() -> None:
    opened = result(latency={"response": Histogram.of([1000]), "service": Histogram.of([500])})
    with pytest.raises(ValueError, match="A measured service times, B measured response times"):
        compare.text(result(), opened)
    assert compare.text(result(), result()).startswith("service ")


def of_mode(mode: str) -> Result:
    return result(workload=Workload(mode=mode).to_dict(), latency={"response": Histogram.of([9])})


@pytest.mark.parametrize("use", [compare.text, lambda *pair: Result.merge(pair)])
def test_runs_of_different_modes_cannot_be_combined(use: Callable[..., object]) -> None:
    """Their times count from different moments, though they are all called response times."""
    with pytest.raises(ValueError, match=r"mode burst, .* is of mode connect: they cannot be"):
        use(of_mode("burst"), of_mode("connect"))


def test_a_run_without_a_reply_stands_beside_one_that_has_some() -> None:
    assert Result.merge([result(latency={}), result()]).echoes == 2 * result().echoes


def test_a_comparison_names_machine_differences() -> None:
    machine = {"cpu": "A", "kernel": "6.1", "cpus": 8, "usable_cpus": 4}
    other = {"cpu": "B", "kernel": "6.18", "cpus": 8, "usable_cpus": 2}
    said = compare.text(result(environment=machine), result(environment=other))
    assert "different machines: CPU: A, B" in said
    assert "different machines: kernel: 6.1, 6.18" in said
    assert "number of CPUs that may be used: 4, 2" in said
    assert "number of CPUs: " not in said
    assert "different machines" not in compare.text(
        result(environment=machine), result(environment=machine)
    )


def test_the_time_to_connect_stands_for_no_stream() -> None:
    stream = result(
        workload=Workload(mode="stream").to_dict(), latency={"connect": Histogram.of([1000])}
    )
    assert stream.main_latency is None
    assert [one.metric for one in compare.compare(stream, stream)] == ["rate"]
    with pytest.raises(ValueError, match="a run of mode stream has no p99"):
        condition.parse("p99>5ms").holds(stream)


def test_a_comparison_says_what_is_not_comparable() -> None:
    other = result(
        workload=Workload(mode="closed", connections=2).to_dict(), verdict=Verdict(("noise",))
    )
    said = compare.text(result(), other)
    assert "the workloads differ: connections" in said
    assert "B is NOT VALID: noise" in said


def test_an_interval_of_very_many_repeats_takes_no_time_and_is_nearly_the_bootstraps() -> None:
    draw = random.Random(1)
    first, second = ([draw.gauss(100, 10) for _ in range(10_000)] for _ in range(2))
    low, high = compare.interval(first, [2 * one for one in second])
    assert low is not None
    assert high is not None
    assert 1.99 < low < 2 < high < 2.01
    few = compare.interval(first[:100], second[:100])
    more = compare.interval(first[:101], second[:101])
    assert few == pytest.approx(more, rel=0.02)


@pytest.mark.parametrize("wrong", [math.nan, math.inf, 0.0, -1.0])
def test_there_is_no_interval_of_what_is_no_figure(wrong: float) -> None:
    assert compare.interval([1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, wrong]) == (None, None)


def test_figures_that_hardly_differ_have_an_interval_or_none_and_soon() -> None:
    compare.interval([1.0, 1.0, 1.0, 1.0 + 2**-52], [1.0] * 4)
    compare.interval([5e-324, 5e-324, 5e-324, 1e-323], [5e-324] * 4)
