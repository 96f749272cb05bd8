"""benchmarks/gains.py: each variant changes sources that have moved on since it was written."""

from __future__ import annotations

import importlib
import re
import shutil
from pathlib import Path

import pytest

from benchmarks.compare.contestants import ROOT

pytestmark = pytest.mark.python_only

NAMES = re.findall(r'^    "(.+)": ', (ROOT / "benchmarks" / "gains.py").read_text(), re.M)


@pytest.mark.parametrize("name", NAMES)
def test_a_variant_finds_what_it_is_to_change(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    gains = importlib.import_module("gains")
    assert len(NAMES) == len(gains.VARIANTS)
    changes = gains.VARIANTS[name].changes
    for file in {file for file, _, _ in changes}:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / file, tmp_path / file)
    gains.apply(name, changes, tmp_path)
    for file, _, new in changes:
        assert new in (tmp_path / file).read_text()
