"""Which threads share their descriptors, by the kernel."""

from __future__ import annotations

import os
import threading

import pytest

from kecho.drop import descriptor_tables
from kecho.drop.descriptor_tables import one_of_each_table
from support.clients import DEADLINE_S
from support.own_network import LIBC, checked

pytestmark = pytest.mark.python_only

CLONE_FILES = 0x400


def test_threads_that_share_a_table_are_one_and_every_other_is_there() -> None:
    compare = descriptor_tables._kcmp()
    if compare is None or compare(os.getpid(), os.getpid()):
        pytest.skip("no kcmp(2) here")
    is_over = threading.Event()
    are_ready = threading.Barrier(9)

    def run(has_own: bool) -> None:
        if has_own:
            checked(LIBC.unshare(CLONE_FILES))
        are_ready.wait(DEADLINE_S)
        is_over.wait(DEADLINE_S)

    own = [threading.Thread(target=run, args=[True]) for _ in range(3)]
    sharing = [threading.Thread(target=run, args=[False]) for _ in range(5)]
    for thread in own + sharing:
        thread.start()
    try:
        are_ready.wait(DEADLINE_S)
        tasks = [os.getpid(), *(one.native_id for one in own + sharing if one.native_id)]
        for order in (tasks, tasks[::-1]):
            found = set(one_of_each_table(order))
            assert len(found) == 4
            assert {one.native_id for one in own} < found
    finally:
        is_over.set()
        for thread in own + sharing:
            thread.join(DEADLINE_S)


@pytest.mark.parametrize("count", [0, 1, 2, 50])
def test_threads_that_are_not_there_are_told_apart(count: int) -> None:
    tasks = [(1 << 22) + i for i in range(count)]  # beyond PID_MAX_LIMIT
    assert sorted(one_of_each_table(tasks)) == tasks
