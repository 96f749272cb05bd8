"""Where a group's sockets stand after some of them have died."""

from __future__ import annotations

import random

from kecho.steering import Group


def replace(group: Group, numbers: list[int]) -> bool:
    changed = group.lost(numbers)
    for number in numbers:
        group.joined(number)
    return changed


def test_a_group_knows_where_the_kernel_puts_a_new_socket() -> None:
    group = Group([0, 1, 2, 3], {0: 10, 1: 11, 2: 12, 3: 13})
    assert replace(group, [1])
    assert group.order == [0, 3, 2, 1]
    assert replace(group, [1])  # the last
    assert group.order == [0, 3, 2, 1]
    assert replace(group, [0])
    assert group.order == [1, 3, 2, 0]


def test_a_group_that_is_made_anew_stands_in_its_new_order() -> None:
    group = Group([3, 0, 2], {0: 0, 2: 2, 3: 3})
    assert replace(group, [0, 2, 3])
    assert group.order == [0, 2, 3]


def test_a_socket_that_is_not_replaced_is_missing() -> None:
    group = Group([0, 1, 2], {0: 0, 1: 1, 2: 2})
    assert group.lost([0])
    assert group.order == [2, 1]
    assert not group.lost([0])  # it still is
    group.joined(0)
    assert group.order == [2, 1, 0]


def test_where_two_of_three_stand_is_not_guessed() -> None:
    group = Group([0, 1, 2], {0: 0, 1: 1, 2: 2})
    assert replace(group, [0, 1])
    assert group.order is None
    assert replace(group, [2])
    assert group.order is None
    assert not group.lost([7])  # another group's


def test_a_group_never_loses_a_socket() -> None:
    group = Group(list(range(8)), {number: number for number in range(8)})
    for _ in range(1000):
        assert replace(group, [random.randrange(8)])
        assert group.order is not None
        assert sorted(group.order) == list(range(8))
