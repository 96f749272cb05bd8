"""`python -m kecho`: where its options come from, and wrong usage."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable

import pytest

from kecho.options import defaults_of, flag
from kecho.server.cli import main
from kecho.server.config import environment_variable
from kecho.server.settings import OPTIONS, CommandConfig
from support.clients import DEADLINE_S
from support.option_samples import sample_of
from support.server_process import ServerProcess, after, assert_refused, run_command

# What the command says; what it does under the sanitizers is in test_process_life.py and others.
pytestmark = [pytest.mark.e2e, pytest.mark.slow_under_sanitizers]

DEFAULTS = defaults_of(CommandConfig)
SAMPLES = {name: sample_of(spec, DEFAULTS.get(name)) for name, spec in OPTIONS.items()}


def as_json(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


def as_flag(name: str, text: str) -> str:
    return flag(name) if OPTIONS[name].metavar is None else f"{flag(name)}={text}"


RunHere = Callable[..., "subprocess.CompletedProcess[str]"]
Rows = dict[str, dict[str, object]]
ConfigOf = Callable[..., Rows]


@pytest.fixture
def run_here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> RunHere:
    """run_command() without a process for each of many cases; --print-config keeps it short."""

    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        for name in list(os.environ):
            if name.startswith("KECHO_"):
                monkeypatch.delenv(name)
        for name, text in environment.items():
            monkeypatch.setenv(name, text)
        try:
            status: object = main(["--print-config", *arguments])
        except SystemExit as ended:
            status = ended.code
        assert isinstance(status, int)
        return subprocess.CompletedProcess(arguments, status, *capsys.readouterr())

    return run


@pytest.fixture
def config_of(run_here: RunHere) -> ConfigOf:
    def read(*arguments: str, **environment: str) -> Rows:
        finished = run_here("--log-format=json", *arguments, **environment)
        assert finished.returncode == 0, finished.stderr
        rows: Rows = json.loads(finished.stdout)
        return rows

    return read


# ---- flag over environment over default ---------------------------------------------------------

# In JSON, which --print-config prints only if --log-format says so.
PRINTED = [name for name in OPTIONS if name != "log_format"]


def test_without_flags_and_variables_every_option_has_its_default(config_of: ConfigOf) -> None:
    rows = config_of()
    for name in DEFAULTS.keys() - {"log_format"}:
        assert rows[name] == {"value": as_json(DEFAULTS[name]), "source": "default"}


@pytest.mark.parametrize("name", PRINTED)
def test_a_variable_wins_over_the_default(config_of: ConfigOf, name: str) -> None:
    _, _, text, value, _ = SAMPLES[name]
    row = config_of(**{environment_variable(name): text})["dispatch" if name == "bench" else name]
    assert row == {"value": as_json(value), "source": environment_variable(name)}


@pytest.mark.parametrize("name", PRINTED)
def test_a_flag_wins_over_the_variable(config_of: ConfigOf, name: str) -> None:
    text, value, other, other_value, _ = SAMPLES[name]
    assert value != other_value
    row = config_of(as_flag(name, text), **{environment_variable(name): other})
    expected = {"value": as_json(value), "source": flag(name)}
    assert row["dispatch" if name == "bench" else name] == expected


def test_a_process_takes_flags_variables_and_defaults_in_this_order() -> None:
    finished = run_command(
        "--print-config", "--log-format=json", "--port=1", KECHO_PORT="2", KECHO_BACKLOG="3"
    )
    rows = json.loads(finished.stdout)
    assert rows["port"] == {"value": 1, "source": "--port"}
    assert rows["backlog"] == {"value": 3, "source": "KECHO_BACKLOG"}
    assert rows["threads"] == {"value": None, "source": "default"}


def test_a_variable_that_cannot_be_read_ends_the_process() -> None:
    assert_refused(run_command(KECHO_PORT="abc"), 2, "KECHO_PORT")


def test_the_log_format_follows_the_same_order() -> None:
    default = run_command("--print-config").stdout
    assert re.search(r"^log-format +text +default$", default, re.MULTILINE)
    variable = run_command("--print-config", KECHO_LOG_FORMAT="json").stdout
    assert json.loads(variable)["log_format"]["source"] == "KECHO_LOG_FORMAT"
    by_flag = run_command("--print-config", "--log-format=text", KECHO_LOG_FORMAT="json").stdout
    assert re.search(r"^log-format +text +--log-format$", by_flag, re.MULTILINE)


def test_an_empty_variable_counts_as_not_set(config_of: ConfigOf) -> None:
    empty = {environment_variable(name): "" for name in OPTIONS}
    assert {row["source"] for name, row in config_of(**empty).items() if name != "log_format"} == {
        "default"
    }


def test_a_switch_can_be_switched_off_by_flag(config_of: ConfigOf) -> None:
    row = config_of("--no-reuse-port", KECHO_REUSE_PORT="1")["reuse_port"]
    assert row["value"] is False


@pytest.mark.parametrize(
    ("arguments", "environment", "expected"),
    [
        (["--bench=1"], {"KECHO_DISPATCH": "shared"}, ("percpu", "--bench")),
        (["--bench"], {}, ("percpu", "--bench")),
        (["--bench=0"], {"KECHO_DISPATCH": "percpu"}, ("shared", "--bench")),
        (["--dispatch=shared"], {"KECHO_BENCH": "1"}, ("shared", "--dispatch")),
        (["--dispatch=percpu"], {"KECHO_BENCH": "0"}, ("percpu", "--dispatch")),
    ],
)
def test_bench_and_dispatch_are_one_option(
    config_of: ConfigOf,
    arguments: list[str],
    environment: dict[str, str],
    expected: tuple[str, str],
) -> None:
    row = config_of(*arguments, **environment)["dispatch"]
    assert (row["value"], row["source"]) == expected


# ---- wrong usage --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--port", "70000"], "--port"),
        (["--port", "abc"], "--port"),
        (["--port", "-1"], "--port"),
        (["--port", "1_0"], "--port"),
        (["--port", "9" * 5000], "--port"),
        (["--port"], "--port"),
        (["--prot", "1"], "--prot"),
        (["--thread", "1"], "--thread"),
        (["surplus"], "surplus"),
        (["--bench", "2"], "--bench"),
        (["--bench", "1", "--dispatch", "shared"], "--bench"),
        (["--dispatch", "other"], "--dispatch"),
        (["--threads", "0"], "--threads"),
        (["--backlog", "-1"], "--backlog"),
        (["--host", ""], "--host"),
        (["--uds", ""], "--uds"),
        (["--uds", "\udcff" * 108], "--uds"),
        (["--idle-timeout", "nan"], "--idle-timeout"),
        (["--idle-timeout", "inf"], "--idle-timeout"),
        (["--idle-timeout=-1"], "--idle-timeout"),
        (["--graceful-timeout", "-inf"], "--graceful-timeout"),
        (["--graceful-timeout=-0.001"], "--graceful-timeout"),
        (["--stats-interval", "1e400"], "--stats-interval"),
        (["--host", "two\nlines", "--port", "\n"], "--port"),
    ],
    ids=lambda value: (
        " ".join(value)[:30].encode("ascii", "replace").decode().replace("\n", "_")
        if isinstance(value, list)
        else ""
    ),
)
def test_wrong_usage_is_one_line_that_names_the_flag(arguments: list[str], word: str) -> None:
    assert_refused(run_command(*arguments), 2, word)


# A flag for a host takes any text that is not empty: see above.
@pytest.mark.parametrize("name", [name for name in OPTIONS if name != "host"])
def test_a_flag_that_cannot_be_read_is_named(run_here: RunHere, name: str) -> None:
    assert_refused(run_here(f"{flag(name)}={SAMPLES[name].refused}"), 2, flag(name))


@pytest.mark.parametrize("name", OPTIONS)
def test_a_variable_that_cannot_be_read_is_named(run_here: RunHere, name: str) -> None:
    variable = environment_variable(name)
    assert_refused(run_here(**{variable: SAMPLES[name].refused}), 2, variable)


def test_variables_that_contradict_each_other_are_refused() -> None:
    finished = run_command(KECHO_BENCH="1", KECHO_DISPATCH="shared")
    assert_refused(finished, 2, "KECHO_BENCH")


def test_wrong_usage_keeps_off_stdout_when_stderr_is_closed() -> None:
    process = ServerProcess(["--port", "abc"], before=after("os.close(2)"))
    with process:
        stdout, _ = process.process.communicate(timeout=DEADLINE_S)
        assert process.process.returncode == 2
        assert stdout == b""
