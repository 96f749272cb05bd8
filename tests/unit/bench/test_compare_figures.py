"""`make compare`: which figures a verdict spoils, what ratios and goals come to, how it is told."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.compare import pictures, summary, table, validity
from benchmarks.compare.measure import Measured, Run
from benchmarks.compare.workloads import SCENARIOS, Goal, Scenario
from kecho.bench import Histogram, Result, Verdict, Workload
from kecho.bench.results.verdict import judge
from support import faultless_run
from support.faultless_run import THREAD

pytestmark = pytest.mark.python_only

FIGURES = ("rate", "cpu", "p50", "p99")
ECHOES = 1_000_000
QUIET = replace(faultless_run.QUIET, client_cpu_s=1.0, server_cpu_s=1.0, server_threads=1)


def result(rate: float = 500_000.0, ns: int = 2000, **changes: Any) -> Result:
    """ns: of every echo, below 2048; above it is a bucket's index."""
    values: dict[str, Any] = {
        "workload": Workload(mode="closed", connections=1, threads=1).to_dict(),
        "environment": {"kernel": "6.1", "machine": "x", "cpu": "y", "usable_cpus": 2},
        "started_at": 0.0,
        "duration_s": ECHOES / rate,
        "connections": 1,
        "echoes": ECHOES,
        "bytes_sent": 0,
        "bytes_received": 0,
        "latency": {"service": Histogram({ns: ECHOES})},
    }
    return Result(**{**values, **changes})


def judged(connections: int = 1, **changes: Any) -> Result:
    """A result that kecho.bench itself has judged, from what its client and witness saw."""
    workload = Workload(mode="closed", connections=connections, threads=1)
    latency = {"service": Histogram({1000: ECHOES})}
    values: dict[str, Any] = {
        "duration_s": 2.0,
        "echoes": ECHOES,
        "errors": {},
        "latency": latency,
        "threads": [THREAD],
        "observation": QUIET,
        "ports": 0,
        "opened": 1,
    }
    values = {**values, **changes}
    # As many outstanding as Little's law wants.
    values["duration_s"] = ECHOES * values["latency"]["service"].mean / 1e9 / connections
    return result(
        workload=workload.to_dict(),
        verdict=judge(workload, **values),
        latency=values["latency"],
    )


def spoilt(one: Result, set_aside: tuple[validity.Explained, ...] = ()) -> set[str]:
    return {name for name in FIGURES if validity.invalid_because(name, one, set_aside)}


# ---- which figures a reason spoils --------------------------------------------------------------


def test_a_valid_run_spoils_nothing() -> None:
    assert judged().verdict.valid
    assert spoilt(judged()) == set()


@pytest.mark.parametrize(
    "changes",
    [
        {"threads": [{**THREAD, "cpu_ns": 2 * 10**9}]},
        {"threads": [{**THREAD, "queued_ns": 10**9}]},
        {"threads": [{**THREAD, "away_ns": 10**9}]},
    ],
)
def test_a_client_that_could_not_keep_up_spoils_all_but_the_servers_cpu_time(
    changes: dict[str, Any],
) -> None:
    one = judged(**changes)
    assert not one.verdict.valid
    assert spoilt(one) == {"rate", "p50", "p99"}


@pytest.mark.parametrize(
    "changes",
    [
        {"errors": {"reset": 1}},
        {"observation": replace(QUIET, others_share=0.2)},
        {"observation": replace(QUIET, stolen_share=0.2)},
        {"observation": replace(QUIET, syn_events={"ListenDrops": 5})},
    ],
    ids=["errors", "others", "stolen", "full queue"],
)
def test_what_happened_to_machine_or_connections_spoils_everything(changes: dict[str, Any]) -> None:
    assert spoilt(judged(**changes)) == set(FIGURES)


def test_an_absence_spoils_the_percentiles_that_it_may_reach() -> None:
    away = [{**THREAD, "away_ns": 40_000_000}]
    # 300 of a million are slow: p99.99 is the client's own, and p99 is not.
    times = Histogram({1000: ECHOES - 300}) + Histogram.of([41_000_000] * 300)
    few = judged(200, threads=away, latency={"service": times})
    assert "at least half of p99.99 is due to that" in few.verdict.reasons[0]
    assert spoilt(few) == set()
    # With 20,000 messages outstanding on one thread, its absence may reach p99.
    many = judged(20_000, threads=away, latency={"service": times})
    assert "is due to that" in many.verdict.reasons[0]
    assert spoilt(many) == {"p99"}


def test_too_few_samples_spoil_the_percentile_alone() -> None:
    few = replace(result(), verdict=judged(latency={"service": Histogram({1000: 500})}).verdict)
    assert "too few for p99" in few.verdict.reasons[0]
    assert spoilt(few) == {"p99"}


# ---- what is set aside --------------------------------------------------------------------------


def explain(one: Result, **changes: Any) -> tuple[validity.Explained, ...]:
    values: dict[str, Any] = {
        "seconds": 2.0,
        "cpus": 2,
        "server_ns": 0,
        "kernel_ns": None,
        "client_cpus": 1,
        "shares_cpus": False,
    }
    return validity.explained(one, **{**values, **changes})


def test_the_time_of_kernel_threads_that_echo_is_not_that_of_others() -> None:
    one = judged(
        observation=replace(QUIET, others_share=0.25),
        threads=[{**THREAD, "queued_ns": 800_000_000}],
    )
    assert len(one.verdict.reasons) == 2
    echoing = {"kernel_ns": 10**9, "server_ns": 10**9}
    aside = explain(one, **echoing)
    assert len(aside) == 2
    assert "kernel threads, which echo, ran 50% of the time" in aside[0].why
    assert spoilt(one, aside) == set()


def test_only_what_kernel_threads_took_is_set_aside() -> None:
    one = judged(
        observation=replace(QUIET, others_share=0.45),
        threads=[{**THREAD, "queued_ns": 1_200_000_000}],
    )
    assert explain(one, kernel_ns=10**9, server_ns=10**9) == ()


def test_another_servers_kernel_threads_explain_nothing() -> None:
    one = judged(observation=replace(QUIET, others_share=0.2))
    assert explain(one, server_ns=2 * 10**9) == ()


def test_a_client_beside_the_server_by_intention_may_wait_for_it_and_no_longer() -> None:
    waiting = judged(threads=[{**THREAD, "queued_ns": 700_000_000}])
    sharing = {"shares_cpus": True, "client_cpus": 2}
    assert len(explain(waiting, server_ns=1_300_000_000, **sharing)) == 1
    assert explain(waiting, server_ns=1_000_000_000, **sharing) == ()
    assert explain(waiting, server_ns=1_300_000_000) == ()


@pytest.mark.parametrize(
    ("mode", "overflows", "is_aside"),
    [
        ("burst", True, True),
        ("burst", False, False),
        ("connect", False, False),
        ("closed", False, True),
        ("stream", False, True),
    ],
)
def test_a_full_queue_is_set_aside_where_it_is_wanted_or_was_before(
    mode: str, overflows: bool, is_aside: bool
) -> None:
    one = judged(observation=replace(QUIET, syn_events={"ListenDrops": 5}))
    one = replace(one, workload=Workload(mode=mode, threads=1).to_dict())
    assert spoilt(one, explain(one, overflows=overflows)) == (set() if is_aside else set(FIGURES))


def test_only_a_backlog_shorter_than_the_burst_is_to_overflow() -> None:
    assert SCENARIOS["burst128"].overflows
    assert not SCENARIOS["burst4096"].overflows


# ---- ratios and goals ---------------------------------------------------------------------------

SCENARIO = Scenario(
    "small",
    "a | small one",
    ("kecho", "epoll_echo"),
    "epoll_echo",
    ("rate", "cpu", "p50", "p99"),
    {"mode": "closed", "connections": 1},
    (Goal("kecho", "epoll_echo", "rate", 1.0), Goal("kecho", "epoll_echo", "p50", 0.8)),
)
BUSY = Verdict(("a client thread was busy 97% of the time: the client is part of what",))


def run(name: str, number: int, one: Result | None, **changes: Any) -> Run:
    values: dict[str, Any] = {"server_ns": 5 * 10**9, "echoes": ECHOES}
    return Run(name, number, 0, one, **{**values, **changes})


def measured(kecho: Sequence[Result], peer: Sequence[Result], **changes: Any) -> Measured:
    runs = [run("kecho", number, one) for number, one in enumerate(kecho)]
    runs += [run("epoll_echo", number, one) for number, one in enumerate(peer)]
    return Measured(SCENARIO, tuple(runs), **changes)


def test_a_ratio_is_of_the_means_with_an_interval_from_four_runs_on() -> None:
    rates = [400_000.0, 410_000.0, 390_000.0, 405_000.0]
    found = summary.ratio(
        measured([result(2 * rate) for rate in rates], [result(rate) for rate in rates]),
        *("kecho", "epoll_echo", "rate"),
    ).comparison
    assert found is not None
    assert found.ratio == pytest.approx(2)
    assert found.low < 2 < found.high
    few = summary.ratio(measured([result()] * 3, [result()] * 3), "kecho", "epoll_echo", "rate")
    assert few.comparison is not None
    assert (few.value, few.comparison.low) == (1.0, None)


def test_a_run_with_a_bad_verdict_yields_no_ratio() -> None:
    bad = result(verdict=BUSY)
    one = measured([result()] * 3 + [bad], [result()] * 4)
    refused = summary.ratio(one, "kecho", "epoll_echo", "rate")
    assert refused.comparison is None
    assert refused.why_not is not None
    assert refused.why_not.startswith("invalid (kecho: a client thread was busy 97%")
    # The server's CPU time is its own, whatever the client's was.
    assert summary.ratio(one, "kecho", "epoll_echo", "cpu").value == 1.0


def test_four_valid_runs_are_enough_and_the_others_are_in_no_figure() -> None:
    bad = result(1.0, verdict=BUSY)
    one = measured([result()] * 4 + [bad], [result()] * 5)
    assert summary.ratio(one, "kecho", "epoll_echo", "rate").value == pytest.approx(1)
    figure = summary.figure(one, "kecho", "rate")
    assert (figure.valid, figure.runs) == (4, 5)
    assert figure.reasons == BUSY.reasons


def test_a_ratio_is_of_the_rounds_that_both_were_in() -> None:
    one = measured([result()] * 4 + [result(5e6)], [result()] * 4)
    assert summary.ratio(one, "kecho", "epoll_echo", "rate").value == pytest.approx(1)
    bad = result(verdict=BUSY)
    late = measured([bad] + [result()] * 4, [result()] * 4)
    assert summary.figure(late, "kecho", "rate").is_valid
    assert summary.ratio(late, "kecho", "epoll_echo", "rate").value is None


def test_a_run_that_failed_or_whose_cpu_time_was_not_seen_is_not_valid() -> None:
    failed = Run("kecho", 0, 0, None, "nothing listens")
    assert failed.invalid_because("rate") == ["nothing listens"]
    unseen = run("kecho", 0, result(), server_ns=0)
    assert unseen.invalid_because("cpu") == ["the server's CPU time was not seen"]
    assert unseen.invalid_because("rate") == []


def test_whom_the_cap_does_not_hold_has_no_rate_to_compare() -> None:
    one = run("kecho sockmap", 0, result(), escapes_cap=True)
    assert one.invalid_because("rate") == [validity.ESCAPES_CAP]
    assert one.invalid_because("cpu") == []


def test_the_title_says_that_servers_were_held_to_half_a_cpu() -> None:
    free = measured([result()], [result()])
    held = replace(free, is_capped=True)
    assert free.title == "a | small one"
    assert held.title == "a | small one, server on half a CPU"
    assert "server on half a CPU: echoes/s" in table.summary([held])
    assert "half a CPU" not in table.summary([free])


def test_who_is_absent_has_no_ratio_and_the_reason_is_told() -> None:
    one = measured([result()], [], absent={"epoll_echo": "gcc is not installed"})
    found = summary.ratio(one, "kecho", "epoll_echo", "rate")
    assert found.why_not == "epoll_echo is absent: gcc is not installed"
    assert [outcome.met for outcome in summary.goals(one)] == [None, None]


def test_goals_are_met_or_not_or_too_close_to_say() -> None:
    fast = [result(rate, 1000) for rate in (500e3, 501e3, 499e3, 500e3)]
    slow = [result(rate, 2000) for rate in (400e3, 401e3, 399e3, 400e3)]
    assert [one.text for one in summary.goals(measured(fast, slow))] == ["met", "met"]
    assert [one.text for one in summary.goals(measured(slow, fast))] == ["not met", "not met"]
    noisy = [result(rate) for rate in (300e3, 500e3, 450e3, 399e3)]
    assert summary.goals(measured(noisy, slow))[0].text == "met, within the noise"


def test_more_is_better_for_rates_and_less_for_times() -> None:
    assert Goal("a", "b", "rate", 1.0).is_met_by(1.0)
    assert not Goal("a", "b", "rate", 1.0).is_met_by(0.99)
    assert Goal("a", "b", "p50", 0.2).is_met_by(0.2)
    assert not Goal("a", "b", "p50", 0.2).is_met_by(0.21)


# ---- Markdown, JSON, README, pictures -----------------------------------------------------------

ABOUT = {
    "date": "2026-01-01",
    "rounds": 4,
    "seconds": 2.0,
    "environment": {
        "kernel": "6.1",
        "machine": "x86_64",
        "cpu": "a CPU",
        "usable_cpus": 2,
        "kecho": "0",
        "python": "3.11",
    },
}


def test_markdown_says_invalid_where_a_ratio_would_stand_and_why_below() -> None:
    one = measured([result(verdict=BUSY)] * 4, [result()] * 4, absent={"go": "not installed"})
    text = table.markdown([one], ABOUT)
    rows = [line for line in text.splitlines() if line.startswith("| kecho |")]
    assert len(rows) == 1
    assert "| invalid (kecho: the client was busy) |" in rows[0]
    assert "- kecho, 4 of 4 runs: a client thread was busy …% of the time" in text
    assert "- absent: go: not installed" in text
    assert "**not to be told**" in text
    widths = {line.count(" | ") for line in rows}
    assert widths == {6}


def test_json_holds_every_run_and_reads_back_as_results() -> None:
    one = measured([result()], [result(verdict=BUSY)])
    data = table.to_dict([one], ABOUT)
    assert data["schema"] == "kecho.compare/1"
    (workload,) = data["workloads"]
    assert [entry["contestant"] for entry in workload["runs"]] == ["kecho", "epoll_echo"]
    assert Result.from_dict(workload["runs"][0]["result"]) == result()
    assert set(workload["runs"][1]["invalid"]) == {"rate", "p50", "p99"}
    ratios = {entry["metric"]: entry["ratio"] for entry in workload["ratios"]}
    assert ratios == {"rate": None, "p50": None, "p99": None, "cpu": 1.0}
    assert [goal["met"] for goal in workload["goals"]] == [None, None]


def test_the_readme_is_changed_between_its_markers_alone() -> None:
    text = f"before\n{table.BEGIN}\nold\n{table.END}\nafter\n"
    once = table.replace_between(text, "new")
    assert once == f"before\n{table.BEGIN}\nnew\n{table.END}\nafter\n"
    assert table.replace_between(once, "new") == once


@pytest.mark.parametrize(
    "text", ["", table.BEGIN, f"{table.END} {table.BEGIN}", f"{table.BEGIN} {table.END}" * 2]
)
def test_a_text_without_its_markers_is_left_alone(text: str) -> None:
    with pytest.raises(ValueError, match="markers"):
        table.replace_between(text, "new")


def test_the_readme_of_the_benchmarks_has_the_markers() -> None:
    readme = (Path(__file__).resolve().parents[3] / "benchmarks" / "README.md").read_text()
    assert table.replace_between(readme, "new") != readme


@pytest.fixture(scope="module")
def pyplot() -> Any:
    """matplotlib never closes a font that it has drawn with, and begins a thread to look for them:
    done before descriptors and threads are counted."""
    found = pytest.importorskip("matplotlib.pyplot", reason="matplotlib is not installed")
    pictures.draw(measured([result()], [result()]), io.BytesIO(), "")
    return found


def test_a_picture_is_drawn_of_what_was_measured(pyplot: Any) -> None:
    drawn = io.BytesIO()
    slow_and_fast = measured([result(verdict=BUSY)] * 2, [result(5000.0, 30_000)])
    pictures.draw(slow_and_fast, drawn, "a $footer")
    assert drawn.getvalue().startswith(b"\x89PNG")
    assert not pyplot.get_fignums()


def test_a_picture_has_a_dot_for_each_run(pyplot: Any) -> None:
    one = measured([result(), result(verdict=BUSY)], [result(), result()])
    figure, axis = pyplot.subplots()
    try:
        pictures._panel(axis, one, ["kecho", "epoll_echo"], "rate")
        dots = [line for line in axis.lines if line.get_marker() == "o"]
        assert [dot.get_markerfacecolor() == "none" for dot in dots] == [False, True, False, False]
    finally:
        pyplot.close(figure)


def test_nothing_measured_is_no_picture() -> None:
    with pytest.raises(ValueError, match="nothing was measured"):
        pictures.draw(measured([], []), io.BytesIO(), "")
