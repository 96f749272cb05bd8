from __future__ import annotations

import copy
import dataclasses
import json
import pickle
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kecho import AcceptQueue, Counters, NamedCounts, Stats, UdpCounters
from kecho.server._engine import CLOSE_REASONS, ERROR_KINDS, REFUSALS

PLAIN = ("accepted", "bytes_received", "bytes_sent", "echoes", "backpressure", "accept_pauses")
COUNT = st.integers(0, 2**64 - 1)


def named(names: Mapping[str, int]) -> st.SearchStrategy[dict[str, int]]:
    return st.fixed_dictionaries(dict.fromkeys(names, COUNT))


WORKER = st.fixed_dictionaries(
    dict.fromkeys((*PLAIN, "active"), COUNT)
    | {"closed": named(CLOSE_REASONS), "errors": named(ERROR_KINDS), "refused": named(REFUSALS)}
)
WORKERS = st.lists(WORKER, min_size=1, max_size=3)


def worker(factor: int) -> dict[str, Any]:
    """What the engine's counters() has for a worker; each count differs from all others."""
    plain = {name: factor * number for number, name in enumerate((*PLAIN, "active"), 1)}
    closed = {name: factor * number for number, name in enumerate(CLOSE_REASONS, 10)}
    errors = {name: factor * number for number, name in enumerate(ERROR_KINDS, 20)}
    refused = {name: factor * number for number, name in enumerate(REFUSALS, 30)}
    return {**plain, "closed": closed, "errors": errors, "refused": refused}


def two_workers(factor: int = 1, seconds: float = 2.0) -> Stats:
    return Stats.of_workers([worker(factor), worker(100 * factor)], seconds)


def everything(counters: Counters) -> dict[str, int]:
    """All that is counted, flat."""
    flat = {name: getattr(counters, name) for name in (*PLAIN, "active")}
    flat |= {f"closed {name}": count for name, count in counters.closed.items()}
    flat |= {f"refused {name}": count for name, count in counters.refused.items()}
    return flat | {f"errors {name}": count for name, count in counters.errors.items()}


# ---- of workers -------------------------------------------------------------------------------


def test_every_worker_keeps_its_own_counts() -> None:
    stats = two_workers()
    assert [one.accepted for one in stats.workers] == [1, 100]
    assert [one.active for one in stats.workers] == [7, 700]
    assert [one.closed["eof"] for one in stats.workers] == [10, 1000]
    assert [one.errors["accept"] for one in stats.workers] == [20, 2000]
    assert stats.seconds == 2.0


@given(WORKERS)
def test_total_is_the_sum_over_the_workers(workers: list[dict[str, Any]]) -> None:
    stats = Stats.of_workers(workers, 1.0)
    for name, total in everything(stats).items():
        assert total == sum(everything(one)[name] for one in stats.workers), name


def test_snapshot_does_not_follow_what_it_was_made_of() -> None:
    source = worker(1)
    stats = Stats.of_workers([source], 1.0)
    source["closed"]["eof"] = source["accepted"] = 999
    assert stats.closed["eof"] == stats.workers[0].closed["eof"] == 10
    assert stats.accepted == 1


def test_no_workers_are_all_zero() -> None:
    stats = Stats.of_workers([], 0.0)
    assert stats == Stats()
    assert set(everything(stats).values()) == {0}


# ---- arithmetic -------------------------------------------------------------------------------


@given(WORKER, WORKER)
def test_counters_add_up_name_by_name(left: dict[str, Any], right: dict[str, Any]) -> None:
    one, other = (Stats.of_workers([counts], 1.0).workers[0] for counts in (left, right))
    total = one + other
    assert type(total) is Counters
    assert total == other + one
    mine, theirs = everything(one), everything(other)
    assert everything(total) == {name: mine[name] + theirs[name] for name in mine}


@given(WORKER, WORKER)
def test_counters_subtract_name_by_name_but_active_is_the_later(
    left: dict[str, Any], right: dict[str, Any]
) -> None:
    later, earlier = (Stats.of_workers([counts], 1.0).workers[0] for counts in (left, right))
    expected = {
        name: count - everything(earlier)[name] for name, count in everything(later).items()
    }
    expected["active"] = later.active
    assert everything(later - earlier) == expected


def test_names_of_either_side_are_kept() -> None:
    one = Counters(closed=NamedCounts({"eof": 3}))
    other = Counters(closed=NamedCounts({"reset": 2}))
    assert (one + other).closed == {"eof": 3, "reset": 2}
    assert (one - other).closed == {"eof": 3, "reset": -2}


def test_interval_has_its_length_the_difference_and_the_later_active() -> None:
    earlier, later = two_workers(1, 2.0), two_workers(3, 5.5)
    interval = later - earlier
    assert type(interval) is Stats
    assert interval.seconds == 3.5
    assert interval.accepted == 2 * 1 + 2 * 100
    assert interval.active == later.active == 3 * 7 + 3 * 700
    assert [one.echoes for one in interval.workers] == [2 * 4, 2 * 400]
    assert [one.active for one in interval.workers] == [one.active for one in later.workers]
    assert interval.closed["reset"] == 2 * 11 + 2 * 1100


def test_interval_of_a_snapshot_with_itself_is_empty() -> None:
    stats = two_workers()
    counts = everything(stats - stats)
    assert counts.pop("active") == stats.active
    assert set(counts.values()) == {0}
    assert (stats - stats).seconds == 0


@pytest.mark.parametrize("other", [Stats.of_workers([worker(1)], 1.0), Stats(), Counters()])
def test_interval_of_different_runs_is_refused(other: Counters) -> None:
    with pytest.raises(ValueError, match="same run"):
        two_workers() - other


# ---- as data ----------------------------------------------------------------------------------


@given(WORKERS, st.floats(0, 1e9))
def test_dict_goes_through_json_and_holds_everything(
    workers: list[dict[str, Any]], seconds: float
) -> None:
    stats = Stats.of_workers(workers, seconds)
    plain = json.loads(json.dumps(stats.to_dict(), allow_nan=False))
    assert plain.pop("workers") == workers
    assert plain.pop("seconds") == seconds
    assert plain.pop("accept_queues") == []
    assert plain.pop("udp") is None
    assert everything(stats) == {name: plain[name] for name in (*PLAIN, "active")} | {
        f"{kind} {name}": count
        for kind in ("closed", "errors", "refused")
        for name, count in plain[kind].items()
    }


def udp_worker(base: int) -> dict[str, Any]:
    return {
        **{name: base + place for place, name in enumerate(UDP_PLAIN)},
        "refused": {"port": base, "rate": 0},
        "errors": {"full": 2 * base},
    }


UDP_PLAIN = ("received", "sent", "bytes_received", "bytes_sent", "dropped")


def test_udp_counters_add_up_subtract_and_go_through_json() -> None:
    stats = Stats.of_workers([worker(1)], 2.0, udp=[udp_worker(10), udp_worker(100)])
    assert stats.udp is not None
    assert stats.udp.received == 110
    assert stats.udp.refused == {"port": 110, "rate": 0}
    plain = json.loads(json.dumps(stats.to_dict()))["udp"]
    assert plain.keys() == {field.name for field in dataclasses.fields(UdpCounters)}
    assert {name: plain[name] for name in UDP_PLAIN} == {
        name: 110 + 2 * place for place, name in enumerate(UDP_PLAIN)
    }
    later = Stats.of_workers([worker(1)], 3.0, udp=[udp_worker(20), udp_worker(100)])
    interval = (later - stats).udp
    assert interval is not None
    assert (interval.received, interval.errors["full"]) == (10, 20)


def test_without_udp_there_are_no_counters_of_it() -> None:
    stats = two_workers()
    assert stats.udp is None
    assert (stats - stats).udp is None
    assert stats.to_dict()["udp"] is None


def test_every_field_is_in_the_dict() -> None:
    assert two_workers().to_dict().keys() == {field.name for field in dataclasses.fields(Stats)}


def test_dict_is_no_way_into_the_snapshot() -> None:
    stats = two_workers()
    plain = stats.to_dict()
    plain["closed"]["eof"] = plain["workers"][0]["closed"]["eof"] = -1
    plain["workers"].clear()
    assert stats == two_workers()


@given(WORKERS)
def test_stats_survive_pickle_and_deepcopy(workers: list[dict[str, Any]]) -> None:
    stats = Stats.of_workers(workers, 1.5)
    for twin in (pickle.loads(pickle.dumps(stats)), copy.deepcopy(stats)):
        assert type(twin) is Stats
        assert twin == stats
        assert hash(twin) == hash(stats)
        assert twin.to_dict() == stats.to_dict()


def test_equal_when_all_is_equal() -> None:
    stats = two_workers()
    assert stats == two_workers()
    assert hash(stats) == hash(two_workers())
    assert len({stats, two_workers(), two_workers(2)}) == 2
    for change in ({"seconds": 3.0}, {"echoes": 0}, {"workers": ()}, {"closed": NamedCounts({})}):
        assert dataclasses.replace(stats, **change) != stats


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Stats)])
def test_fields_cannot_be_set(name: str) -> None:
    stats = two_workers()
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(stats, name, 0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        delattr(stats, name)


# ---- counts by name ---------------------------------------------------------------------------


def test_named_counts_are_a_mapping_without_a_way_to_write() -> None:
    counts = NamedCounts({"eof": 2, "reset": 3})
    assert isinstance(counts, Mapping)
    assert list(counts) == ["eof", "reset"]
    assert (counts["eof"], counts.get("idle", 0), len(counts), counts.total) == (2, 0, 2, 5)
    with pytest.raises(KeyError):
        counts["idle"]
    with pytest.raises(TypeError):
        counts["eof"] = 1  # type: ignore[index]
    with pytest.raises(TypeError):
        del counts["eof"]  # type: ignore[attr-defined]
    assert repr(counts) == "{'eof': 2, 'reset': 3}"


def test_named_counts_do_not_follow_the_dict_they_were_made_of() -> None:
    source = {"eof": 1}
    counts = NamedCounts(source)
    source["eof"] = 2
    assert counts == {"eof": 1}


def test_named_counts_compare_and_hash_by_content() -> None:
    one, other = NamedCounts({"a": 1, "b": 2}), NamedCounts({"b": 2, "a": 1})
    assert one == other == {"a": 1, "b": 2}
    assert hash(one) == hash(other)
    assert one != NamedCounts({"a": 1})
    assert one != NamedCounts({"a": 1, "b": 3})


def test_accept_queues_count_drops_and_show_their_length_now() -> None:
    def queues(*figures: tuple[int, int]) -> tuple[AcceptQueue, ...]:
        return tuple(AcceptQueue(("127.0.0.1", 80), *one, 128) for one in figures)

    earlier = Stats.of_workers([worker(1)], 1.0, queues((5, 128), (7, 0)))
    later = Stats.of_workers([worker(1)], 2.0, queues((9, 3), (7, 0)))
    assert later.dropped_syns == 16
    between = later - earlier
    assert between.dropped_syns == 4
    assert [one.length for one in between.accept_queues] == [3, 0]
    assert json.loads(json.dumps(later.to_dict()))["accept_queues"][0] == {
        "address": ["127.0.0.1", 80],
        "dropped": 9,
        "length": 3,
        "length_most": 128,
    }
