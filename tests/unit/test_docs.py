"""What the documentation refers to exists: files, headings, options."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from kecho.bench.cli import main as bench
from kecho.drop.cli import main as drop
from kecho.server.cli import main as server

pytestmark = pytest.mark.python_only

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), ROOT / "benchmarks" / "README.md"])
CODE = re.compile(r"^ *```.*?^ *```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*(?![\w-])")

# The commands that a page describes. --spawn of the benchmark takes options of the server.
HELP: dict[str, list[Any]] = {
    "server": [(server,)],
    "bench": [(bench,), (bench, "compare"), (server,)],
    "drop": [(drop,)],
}


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", CODE.sub("", page.read_text()), re.MULTILINE)
    plain = [re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings]
    return {heading.replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    for link in LINK.findall(CODE.sub("", page.read_text())):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("name", HELP)
def test_a_reference_names_only_options_that_exist(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for main, *words in HELP[name]:
        with pytest.raises(SystemExit):
            main([*words, "--help"])
    flags = set(FLAG.findall(capsys.readouterr().out))
    known = flags | {one.replace("--", "--no-", 1) for one in flags}
    text = (ROOT / "docs" / "reference" / f"{name}.md").read_text()
    assert set(FLAG.findall(text)) <= known


def test_the_readme_is_short_and_names_the_command_that_runs_the_tests() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 150
    assert any(line.startswith("make check ") for line in lines)
