"""--help of the three commands: groups, and texts that a person reads to the end."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest

import kecho.bench.cli
import kecho.drop.cli
import kecho.server.cli
from kecho.bench import Workload
from kecho.command import Parser, help_text
from kecho.drop.config import DropConfig
from kecho.options import Option, defaults_of, flag
from kecho.server.settings import OPTIONS, CommandConfig

pytestmark = pytest.mark.python_only

COLUMNS = 100
TEXT_COLUMNS = COLUMNS - 2 - 28  # argparse leaves two free; the texts begin at the same column

Command = tuple[Callable[[], Parser], Mapping[str, Option], Mapping[str, object], list[str]]
COMMANDS: dict[str, Command] = {
    "kecho": (
        kecho.server.cli._parser,
        OPTIONS,
        defaults_of(CommandConfig),
        ["Listening", "Serving", "Limits", "UDP", "Security", "Logging", "Other"],
    ),
    "kecho.bench": (
        kecho.bench.cli._parser,
        kecho.bench.cli._WORKLOAD_OPTIONS | kecho.bench.cli._RUN_OPTIONS,
        defaults_of(Workload) | kecho.bench.cli._RUN_DEFAULTS,
        ["Target", "Load", "Runs", "Output", "Replies", "Client", "Other"],
    ),
    "kecho.drop": (
        kecho.drop.cli._parser,
        kecho.drop.cli.OPTIONS,
        defaults_of(DropConfig),
        ["Pairs", "Filters", "Running", "Output", "Other"],
    ),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_options_are_in_groups(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(COLUMNS))
    make_parser, options, _, groups = COMMANDS[command]
    text = make_parser().format_help()
    titles = [line[:-1] for line in text.splitlines() if line.endswith(":") and line[0] != " "]
    assert [title for title in titles if title in groups] == groups
    assert "options:" not in text
    for name in options:
        assert f" {flag(name)}" in text
    assert max(len(line) for line in text.splitlines()) <= COLUMNS


@pytest.mark.parametrize(
    ("command", "name"), [(command, name) for command in COMMANDS for name in COMMANDS[command][1]]
)
def test_text_of_an_option_takes_a_line_and_a_half(command: str, name: str) -> None:
    _, options, defaults, _ = COMMANDS[command]
    text = help_text(options[name], defaults.get(name))
    assert len(text) <= 1.5 * TEXT_COLUMNS
    assert text[0] != " "
    assert options[name].help.endswith(".")
