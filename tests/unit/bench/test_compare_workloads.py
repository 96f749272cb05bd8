"""`make compare`: workloads, who takes part in them, in which order and on which CPUs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from benchmarks.compare import contestants
from benchmarks.compare.contestants import Contestant
from benchmarks.compare.measure import Placement, _turns
from benchmarks.compare.workloads import METRICS, SCENARIOS, Scenario
from kecho.bench import Workload

pytestmark = pytest.mark.python_only


@pytest.mark.parametrize("scenario", SCENARIOS.values(), ids=SCENARIOS)
def test_a_workload_is_possible_and_names_who_takes_part_in_it(scenario: Scenario) -> None:
    Workload(**scenario.bench)
    names = set(scenario.contestants)
    assert names <= contestants.KECHO.keys() | contestants.PEERS.keys()
    assert scenario.reference in names
    assert set(scenario.metrics) <= METRICS.keys()
    for goal in scenario.goals:
        assert {goal.subject, goal.reference} <= names
        assert goal.metric in scenario.metrics


def test_an_option_that_this_kecho_does_not_know_leaves_its_contestant_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    strange = Contestant("strange", ("kecho", "--no-such-thing"), True, needs=("no_such_thing",))
    monkeypatch.setitem(contestants.KECHO, "strange", strange)
    found, absent = contestants.available(["strange", "kecho", "go"], chosen_peers=[])
    assert [one.name for one in found] == ["kecho"]
    assert absent == {
        "strange": "this kecho has no --no-such-thing",
        "go": "left out by --peers",
    }


@pytest.mark.slow_under_sanitizers
def test_a_peer_that_cannot_be_built_is_absent_with_what_the_builder_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(contestants.PEERS, "none", Contestant("none", (), target="no_such_peer"))
    found, absent = contestants.available(["none"])
    assert not found
    assert "No rule to make target" in absent["none"]


def test_each_round_has_an_order_of_its_own_which_the_seed_repeats() -> None:
    names = ["a", "b", "c", "d"]
    servers: Any = [(Contestant(name, ()), None) for name in names]

    def orders(seed: int) -> list[str]:
        turns = [
            (number, one.name) for number, _, one, _ in _turns(SCENARIOS["two"], servers, 8, seed)
        ]
        return ["".join(name for at, name in turns if at == number) for number in range(8)]

    assert {"".join(sorted(order)) for order in orders(1)} == {"abcd"}
    assert len(set(orders(1))) > 3
    assert orders(1) == orders(1) != orders(2)
    short = replace(SCENARIOS["two"], most_rounds=2)
    assert len(list(_turns(short, servers, 8, 1))) == 8


def test_the_client_is_on_other_cpus_than_the_server() -> None:
    assert Placement.of([2, 5, 7]) == Placement((2,), (5, 7), (2, 5))
    with pytest.raises(ValueError, match="a CPU each"):
        Placement.of([3])
