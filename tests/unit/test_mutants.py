"""Each planted fault has one place in the code, and suspects that there are."""

from __future__ import annotations

from pathlib import Path

import pytest

from mutants.__main__ import faults

pytestmark = pytest.mark.python_only

TESTS = Path(__file__).resolve().parents[1]


def test_each_fault_can_be_planted() -> None:
    modules = {path.stem for path in TESTS.rglob("test_*.py")}
    found = faults()
    assert len(found) == len({fault.name for fault in found}) >= 60
    for fault in found:
        assert fault.text != fault.replacement
        assert {*fault.suspects} <= modules, fault.name
