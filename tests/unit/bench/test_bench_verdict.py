"""The verdict of a run on itself."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest

from kecho.bench import Histogram, Verdict, Workload
from kecho.bench.results.pace import is_kept_up
from kecho.bench.results.verdict import judge
from support.faultless_run import QUIET, THREAD

pytestmark = pytest.mark.python_only


def verdict(workload: Workload | None = None, **changes: Any) -> Verdict:
    echoes = 2_000_000
    values: dict[str, Any] = {
        "duration_s": 2.0,
        "echoes": echoes,
        "errors": {},
        "latency": {"service": Histogram({1000: echoes})},  # 1 µs x 1 M/s = 1 outstanding
        "threads": [THREAD],
        "observation": QUIET,
        "ports": 28_000,
        "opened": 1,
    }
    workload = workload or Workload(mode="closed", connections=1)
    return judge(workload, **{**values, **changes})


def test_a_run_with_nothing_to_say_against_it_is_valid() -> None:
    assert verdict() == Verdict()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"errors": {"reset": 2, "short": 1}}, "3 errors: 2 reset, 1 short"),
        ({"threads": [THREAD, {**THREAD, "cpu_ns": 1_950_000_000}]}, "busy 98% of the time"),
        ({"observation": replace(QUIET, others_share=0.2)}, "other processes took 20%"),
        ({"observation": replace(QUIET, stolen_share=0.05)}, "the hypervisor took 5%"),
        ({"observation": replace(QUIET, syn_events={"ListenDrops": 3})}, "ListenDrops 3"),
        ({"opened": 25_000}, "25,000 connections were opened of 28,000"),
        ({"threads": [{**THREAD, "unanswered": 7}]}, "7 messages were not answered"),
        ({"threads": [{**THREAD, "queued_ns": 10**9}]}, "no CPU 50% of the time"),
        ({"threads": [{**THREAD, "away_ns": 60_000_000}]}, "its sockets for 60.0 ms: it was"),
        ({"threads": [{**THREAD, "between_ns": 10**9}]}, "is 1.0 outstanding messages, not 1"),
        ({"echoes": 0, "latency": {}}, "not one reply was measured"),
        ({"latency": {"service": Histogram({2000: 2_000_000})}}, "is 2.0 outstanding messages"),
        (
            {"latency": {"service": Histogram({1000: 50})}, "echoes": 2_000_000},
            "50 samples are too",
        ),
    ],
)
def test_what_spoils_a_run_is_named(changes: dict[str, Any], said: str) -> None:
    judged = verdict(**changes)
    assert not judged.valid
    assert any(said in reason for reason in judged.reasons), judged.reasons


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"errors": {"reset": 1}}, "1 error: 1 reset"),
        ({"threads": [{**THREAD, "unanswered": 1}]}, "1 message was not answered"),
        ({"latency": {"service": Histogram({1000: 1})}}, "1 sample is too few for p90"),
    ],
)
def test_one_is_no_plural(changes: dict[str, Any], said: str) -> None:
    assert any(said in reason for reason in verdict(**changes).reasons)


@pytest.mark.parametrize(
    ("owed_half", "owed", "delays_ms", "is_right"),
    [
        (2500, 5000, range(5000), False),  # served at half of the rate
        (7500, 10_000, range(5000, 10_000), False),  # the same after a warm-up
        (200, 200, [100], True),  # a constant delay
        (5000, 8000, [4000], True),  # one of most of the time
        (0, 90, [1] * 99 + [100], True),  # a hiccup at the end
        (5000, 0, range(5000), True),  # a lag that was made up for
    ],
)
def test_what_is_owed_grows_where_the_server_does_not_keep_up(
    owed_half: int, owed: int, delays_ms: Iterable[int], is_right: bool
) -> None:
    response = Histogram.of([ms * 1_000_000 + 1 for ms in delays_ms])
    assert is_kept_up(2000.0, 5.0, owed_half, owed, response) == is_right


def test_when_every_datagram_is_lost_all_are() -> None:
    counts = dict.fromkeys(("late", "duplicates", "reordered"), 0)
    judged = verdict(
        Workload(mode="closed", udp=True, connections=1),
        echoes=0,
        latency={},
        threads=[{**THREAD, **counts, "lost": 1}],
    )
    assert any("1 datagram was lost (100 % of all)" in reason for reason in judged.reasons)


def test_an_open_loop_blames_late_sends_and_a_saturated_server() -> None:
    workload = Workload(mode="open", rate=1e6, connections=1)
    times = Histogram({1000: 2_000_000})
    late = {"response": times, "service": times, "lateness": Histogram.of([5_000_000] * 1000)}
    assert "sends were late" in verdict(workload, latency=late).reasons[0]
    busy = replace(QUIET, server_cpu_s=3.9)
    on_time = {"response": times, "service": times}
    assert "saturated" in verdict(workload, latency=on_time, observation=busy).reasons[0]
    assert verdict(observation=busy).valid  # a closed loop runs at the server's pace
    assert "saturated" in verdict(observation=busy).notes[0]


@pytest.mark.parametrize(("carried", "is_right"), [(10**9, True), (10**8, False)])
def test_littles_law_is_of_the_measured_time_alone(carried: int, is_right: bool) -> None:
    """Of 3 s of waiting in a time of 2 s, with one message outstanding, 1 s was beyond it."""
    judged = verdict(
        latency={"service": Histogram({1000: 3_000_000})},
        echoes=3_000_000,
        threads=[{**THREAD, "carried_out_ns": carried}],
    )
    assert judged.valid == is_right
    assert any("of the messages' time lies beyond" in note for note in judged.notes) == is_right
    carried_in = [{**THREAD, "carried_in_ns": carried}]
    latency = {"service": Histogram({1000: 1_000_000})}
    assert verdict(latency=latency, echoes=1_000_000, threads=carried_in).valid == is_right


@pytest.mark.parametrize(
    ("rate", "duration_s", "echoes", "is_right"),
    [
        (500.0, 3.0, 1500, True),
        (500.0, 3.0, 1469, False),
        (0.5, 3.0, 1, True),  # due at 2 s of a time from 1 s to 4 s
        (10.0, 1.0, 8, False),
        (0.5, 1.0, 0, False),
    ],
)
def test_what_was_asked_for_is_compared_with_what_was_due_and_answered(
    rate: float, duration_s: float, echoes: int, is_right: bool
) -> None:
    times = Histogram({1000: echoes})
    judged = verdict(
        Workload(mode="open", rate=rate, connections=1),
        duration_s=duration_s,
        echoes=echoes,
        latency={"response": times, "service": times},
    )
    assert is_right != any("were asked for" in reason for reason in judged.reasons)


@pytest.mark.parametrize(
    ("mode", "server_spoils", "client_spoils"),
    [("open", True, True), ("closed", False, True), ("stream", False, False)],
)
def test_a_cgroup_that_has_used_up_its_quota_is_named(
    mode: str, server_spoils: bool, client_spoils: bool
) -> None:
    throttled = replace(QUIET, server_throttled=(37, 100), client_throttled=(1, 1))
    workload = Workload(mode=mode, connections=1, rate=1e6 if mode == "open" else None)
    judged = verdict(workload, observation=throttled)
    server = "the server was throttled: in 37 of 100 periods its cgroup had used up its CPU quota"
    client = "the client was throttled: in 1 of 1 period its cgroup had used up its CPU quota"
    assert server in (judged.reasons if server_spoils else judged.notes)
    assert client in (judged.reasons if client_spoils else judged.notes)
    assert "throttled" not in str(verdict(observation=replace(QUIET, server_throttled=(0, 9))))


def test_a_client_that_waits_for_a_cpu_is_no_reason_against_a_burst_or_a_stream() -> None:
    queued = [{**THREAD, "queued_ns": 10**9}]
    for mode in ("burst", "stream"):
        judged = verdict(Workload(mode=mode), latency={}, threads=queued)
        assert judged.valid, judged.reasons
        assert any("no CPU 50% of the time" in note for note in judged.notes)


def test_a_server_with_one_busy_thread_of_many_is_saturated() -> None:
    busy = replace(QUIET, server_cpu_s=2.0, server_threads=8, cpus=8, server_busiest_s=1.99)
    assert "one of its threads had a CPU 100%" in verdict(observation=busy).notes[0]
    spread = replace(busy, server_busiest_s=1.0)
    assert verdict(observation=spread) == Verdict()


def test_what_could_not_be_judged_is_said() -> None:
    unknown = replace(QUIET, server_cpu_s=None, others_share=None)
    assert "its process was not found" in verdict(observation=unknown).notes[0]
    elsewhere = replace(QUIET, server_cpu_s=None)
    judged = verdict(observation=elsewhere, server_is_local=False)
    assert "is not known: it is on another host" in judged.notes[0]


def test_ports_are_counted_over_the_time_that_they_are_held() -> None:
    long = replace(QUIET, seconds=120.0)
    assert verdict(opened=44_000, observation=long).valid
    assert verdict(opened=44_000, observation=long).notes == ()
    assert not verdict(opened=46_000, observation=long).valid
    reused = verdict(opened=46_000, observation=long, port_hold_s=1.0)
    assert reused.valid
    assert "most ports were in TIME_WAIT" in reused.notes[0]


def test_messages_that_the_client_has_in_hand_do_not_break_littles_law() -> None:
    # 0.8 µs of every 1 µs outstanding; the rest is compared and made: 0.2 x 2 s.
    times = {"service": Histogram({800: 2_000_000})}
    judged = verdict(latency=times, threads=[{**THREAD, "between_ns": 400_000_000}])
    assert judged.valid
    assert "20% of the messages in hand" in judged.notes[0]
    assert "Little" in verdict(latency=times).reasons[0]


def test_lateness_is_judged_at_every_percentile_that_is_founded() -> None:
    workload = Workload(mode="open", rate=1e6, connections=1)
    tail = Histogram.of([53_000_000] * 2200) + Histogram({100: 1_997_800})
    on_time = Histogram({100: 2_000_000})
    late = {"response": tail, "service": on_time, "lateness": tail}
    assert "at p99.99 by 53.0 ms" in verdict(workload, latency=late).reasons[0]
    slow_server = {"response": tail, "service": tail, "lateness": on_time}
    assert verdict(workload, latency=slow_server).valid


def test_a_client_that_was_away_is_blamed_for_the_percentiles_that_it_reaches() -> None:
    away = [{**THREAD, "away_ns": 40_000_000}]
    times = Histogram({1000: 9_999}) + Histogram.of([41_000_000] * 1001)
    few = Workload(mode="closed", connections=1)
    many = Workload(mode="closed", connections=20_000, threads=2)
    values = {"latency": {"service": times}, "echoes": 11_000, "threads": away}
    assert any(
        "at least half of p99.9 is due to that" in r for r in verdict(many, **values).reasons
    )
    said = verdict(few, **values)
    assert not any("is due to that" in reason for reason in said.reasons)
    assert any("the longest time is due to that" in note for note in said.notes)


def test_a_burst_that_lasts_as_long_as_its_connects_is_the_clients() -> None:
    response = Histogram.of([n * 10_000 for n in range(1, 5001)])
    nearly = Histogram.of([n * 9_900 for n in range(1, 5001)])
    half = Histogram.of([n * 5_000 for n in range(1, 5001)])
    burst = Workload(mode="burst", connections=5000)
    judged = verdict(burst, latency={"response": response, "lateness": nearly})
    assert "to call connect: it measured itself" in judged.reasons[0]
    judged = verdict(burst, latency={"response": response, "lateness": half})
    assert judged.valid
    assert "to call connect on all connections" in judged.notes[0]


def test_connections_that_the_server_did_not_end_are_said() -> None:
    judged = verdict(threads=[{**THREAD, "unended": 3}])
    assert "3 connections were not ended by the server" in judged.notes[0]


def test_a_spinning_client_is_busy_only_when_it_has_something_to_do() -> None:
    workload = Workload(mode="closed", connections=1, spin=True)
    idle = {**THREAD, "cpu_ns": 2 * 10**9, "waited_ns": 10**9}
    assert verdict(workload, threads=[idle]).valid
    assert not verdict(workload, threads=[{**idle, "waited_ns": 0}]).valid


def test_what_was_not_verified_is_named() -> None:
    workload = Workload(mode="closed", connections=1, verify=False)
    assert "not compared" in verdict(workload).notes[0]
