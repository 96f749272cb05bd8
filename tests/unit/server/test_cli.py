"""The command: where the values of its options come from, wrong usage, --print-config."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import kecho
from kecho import OptionError
from kecho.options import defaults_of, flag
from kecho.server import cli
from kecho.server.arguments import check_options
from kecho.server.config import environment_variable
from kecho.server.settings import OPTIONS, CommandConfig, gather
from support.option_samples import sample_of

pytestmark = pytest.mark.python_only

DEFAULTS = defaults_of(CommandConfig)
SAMPLES = {name: sample_of(spec, DEFAULTS.get(name)) for name, spec in OPTIONS.items()}
NAMES = sorted(OPTIONS)


def configured(*arguments: str, **environment: str) -> tuple[CommandConfig, dict[str, str]]:
    """What the command makes of its arguments and variables, and where each value is from."""
    flags = vars(cli._parser().parse_args(arguments))
    flags.pop("print_config")
    sources: dict[str, str] = {}
    values = gather(flags, environment, sources)
    return CommandConfig(**check_options(CommandConfig, values)), sources


def value_of(config: CommandConfig, name: str) -> object:
    return config.dispatch if name == "bench" else getattr(config, name)


def as_flag(name: str, text: str) -> list[str]:
    return [flag(name)] if OPTIONS[name].metavar is None else [flag(name), text]


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Without the variables of whoever runs the tests; setenv() adds some."""
    for name in [name for name in os.environ if name.startswith("KECHO_")]:
        monkeypatch.delenv(name)
    return monkeypatch


@pytest.fixture
def run(
    environment: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """run(*arguments) -> exit status, stdout, stderr, of a command that does not serve."""

    def run_it(*arguments: str) -> tuple[int, str, str]:
        try:
            status = cli.main(arguments)
        except SystemExit as end:  # argparse
            status = int(end.code or 0)
        said = capsys.readouterr()
        return status, said.out, said.err

    return run_it


# ---- where the values come from ---------------------------------------------------------------


def test_nothing_given_means_the_defaults() -> None:
    assert configured() == (CommandConfig(), {})


@pytest.mark.parametrize("name", NAMES)
def test_flag_sets_the_option(name: str) -> None:
    text, value, *_ = SAMPLES[name]
    config, sources = configured(*as_flag(name, text))
    assert value_of(config, name) == value
    assert value_of(CommandConfig(), name) != value
    assert sources == {name: flag(name)}


@pytest.mark.parametrize("name", NAMES)
def test_variable_sets_the_option(name: str) -> None:
    text, value, *_ = SAMPLES[name]
    config, sources = configured(**{environment_variable(name): text})
    assert value_of(config, name) == value
    assert sources == {name: environment_variable(name)}


@pytest.mark.parametrize("name", NAMES)
def test_empty_variable_counts_as_not_set(name: str) -> None:
    assert configured(**{environment_variable(name): ""}) == (CommandConfig(), {})


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("text", ["tcp://10.0.0.7:12345", "UDP://[fd00::1]:7"])
def test_variable_that_an_orchestrator_has_set_to_a_url_counts_as_not_set(
    name: str, text: str
) -> None:
    assert configured(**{environment_variable(name): text}) == (CommandConfig(), {})
    text, value, *_ = SAMPLES[name]
    config, _ = configured(*as_flag(name, text), **{environment_variable(name): "tcp://1.2.3.4:5"})
    assert value_of(config, name) == value


def test_path_that_has_a_url_in_it_is_a_path() -> None:
    assert configured(KECHO_UDS="./tcp://kecho")[0].uds == "./tcp://kecho"


@pytest.mark.parametrize("name", [name for name in NAMES if OPTIONS[name].metavar is not None])
@pytest.mark.parametrize("other", ["0", "\0 not a value of any option"])
def test_flag_wins_over_its_variable_which_is_not_even_looked_at(name: str, other: str) -> None:
    text, value, *_ = SAMPLES[name]
    config, sources = configured(flag(name), text, **{environment_variable(name): other})
    assert value_of(config, name) == value
    assert sources == {name: flag(name)}


@pytest.mark.parametrize(
    ("arguments", "variable", "expected"),
    [
        ([], None, False),
        ([], "1", True),
        ([], "0", False),
        (["--reuse-port"], None, True),
        (["--reuse-port"], "0", True),
        (["--no-reuse-port"], None, False),
        (["--no-reuse-port"], "1", False),
        (["--reuse-port", "--no-reuse-port"], None, False),
        (["--no-reuse-port", "--reuse-port"], None, True),
    ],
)
def test_switch_can_be_set_and_unset(
    arguments: list[str], variable: str | None, expected: bool
) -> None:
    config, _ = configured(*arguments, **({"KECHO_REUSE_PORT": variable} if variable else {}))
    assert config.reuse_port is expected


@pytest.mark.parametrize("word", ["1", "true", "yes", "on", "True", "YES", "oN"])
def test_words_that_switch_on(word: str) -> None:
    assert configured(KECHO_REUSE_PORT=word)[0].reuse_port is True


@pytest.mark.parametrize("word", ["0", "false", "no", "off", "False", "NO", "oFf"])
def test_words_that_switch_off(word: str) -> None:
    assert configured(KECHO_REUSE_PORT=word)[0].reuse_port is False


def test_each_host_flag_is_one_address() -> None:
    config, _ = configured("--host", "::1", "--host=a,b", "--host", " c")
    assert config.host == ("::1", "a,b", " c")


def test_hosts_in_the_variable_are_parted_by_commas() -> None:
    assert configured(KECHO_HOST="::1, 127.0.0.1,c")[0].host == ("::1", "127.0.0.1", "c")
    assert configured("--host", "::1", KECHO_HOST="a,b")[0].host == ("::1",)
    with pytest.raises(OptionError, match=r"^KECHO_HOST: "):
        configured(KECHO_HOST="a,,b")


def test_last_of_several_flags_counts() -> None:
    assert configured("--port", "1", "--port=2")[0].port == 2


@pytest.mark.parametrize(
    ("arguments", "variables", "expected"),
    [
        (["--bench"], {}, "percpu"),
        (["--bench", "1"], {}, "percpu"),
        (["--bench=0"], {}, "shared"),
        (["--bench", "--port", "1"], {}, "percpu"),
        ([], {"KECHO_BENCH": "1"}, "percpu"),
        (["--dispatch", "shared"], {"KECHO_BENCH": "1"}, "shared"),
        (["--dispatch", "percpu"], {"KECHO_BENCH": "0"}, "percpu"),
        (["--dispatch", "percpu"], {"KECHO_BENCH": "1"}, "percpu"),
        (["--bench", "0"], {"KECHO_DISPATCH": "percpu"}, "shared"),
        (["--bench", "1"], {"KECHO_DISPATCH": "shared"}, "percpu"),
        (["--bench", "1"], {"KECHO_DISPATCH": "shared", "KECHO_BENCH": "0"}, "percpu"),
        (["--dispatch", "shared"], {"KECHO_DISPATCH": "percpu", "KECHO_BENCH": "1"}, "shared"),
        (["--bench", "1", "--dispatch", "percpu"], {}, "percpu"),
        (["--bench", "1", "--dispatch", "percpu"], {"KECHO_BENCH": "0"}, "percpu"),
        ([], {"KECHO_BENCH": "0", "KECHO_DISPATCH": "shared"}, "shared"),
        (["--bench", "1"], {"KECHO_DISPATCH": "nonsense"}, "percpu"),
        (["--dispatch", "shared"], {"KECHO_BENCH": "nonsense"}, "shared"),
    ],
)
def test_bench_and_dispatch_are_one_option(
    arguments: list[str], variables: Mapping[str, str], expected: str
) -> None:
    assert configured(*arguments, **variables)[0].dispatch == expected


@pytest.mark.parametrize(
    ("arguments", "variables"),
    [
        (["--bench", "1", "--dispatch", "shared"], {}),
        (["--bench", "0", "--dispatch", "percpu"], {}),
        ([], {"KECHO_BENCH": "1", "KECHO_DISPATCH": "shared"}),
    ],
)
def test_bench_against_dispatch_from_the_same_place_is_refused(
    arguments: list[str], variables: Mapping[str, str]
) -> None:
    with pytest.raises(OptionError, match=r"^bench: .*dispatch"):
        configured(*arguments, **variables)


def test_uds_takes_the_place_of_tcp_unless_host_or_port_is_given_somewhere() -> None:
    assert configured("--uds", "/s")[0].host == ()
    assert configured(KECHO_UDS="/s")[0].host == ()
    assert configured("--uds", "/s", KECHO_PORT="80")[0].host == ("127.0.0.1",)
    assert configured("--host", "::1", KECHO_UDS="/s")[0].host == ("::1",)
    assert configured("--uds", "/s", KECHO_HOST="")[0].host == ()


def test_variables_of_others_are_left_alone() -> None:
    assert configured(KECHO_NONSENSE="1", PORT="80", kecho_port="80") == (CommandConfig(), {})


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("port", "65536"),
        ("port", "-1"),
        ("port", "1_000"),
        ("port", " 80"),
        ("port", "+80"),
        ("port", "٨٠"),
        ("port", "0x50"),
        ("port", "80.0"),
        ("port", "9" * 5000),
        ("backlog", "--5"),
        ("threads", "0"),
        ("max_connections", "many"),
        ("idle_timeout", "nan"),
        ("idle_timeout", "inf"),
        ("idle_timeout", "-1"),
        ("idle_timeout", "soon"),
        ("idle_timeout", "1_0"),
        ("idle_timeout", " 1"),
        ("idle_timeout", "٣"),
        ("graceful_timeout", "1e999"),
        ("dispatch", "Shared"),
        ("reuse_port", "maybe"),
        ("log_level", "loud"),
        ("uds", "a" * 108),
        ("bench", "2"),
        ("bench", "true"),
    ],
)
def test_text_is_refused_by_flag_and_by_variable(name: str, text: str) -> None:
    with pytest.raises(OptionError, match=f"^{environment_variable(name)}: "):
        configured(**{environment_variable(name): text})
    if OPTIONS[name].metavar is not None:
        with pytest.raises(OptionError, match=f"^{flag(name)}: "):
            configured(f"{flag(name)}={text}")


@given(
    st.sampled_from(NAMES),
    st.text(st.characters() | st.sampled_from("-+., _0123456789e\0\n\udc80"), min_size=1),
    st.booleans(),
)
@example("port", "²", True)
@example("idle_timeout", "1_0\udcff", False)
@example("uds", "\ud800", True)
def test_any_text_is_a_value_or_refused_under_the_name_it_was_given(
    name: str, text: str, by_flag: bool
) -> None:
    source = flag(name) if by_flag else environment_variable(name)
    flags: dict[str, Any] = {}
    if by_flag:
        flags[name] = [text] if OPTIONS[name].repeatable else text
    refusal = None
    try:
        values = gather(flags, {} if by_flag else {source: text}, {})
        CommandConfig(**check_options(CommandConfig, values))
    except OptionError as error:
        refusal = error
    if refusal is not None:
        assert str(refusal).startswith(f"{source}: ")
        assert refusal.option == source
        assert refusal.reason


# ---- wrong usage ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ["--colour"],
        ["--por", "80"],
        ["--port"],
        ["--port", "--host", "::1"],
        ["--reuse-port=1"],
        ["extra"],
        ["--no-port"],
        ["--", "extra"],
        ["--two\nlines"],
        ["two\nlines"],
    ],
)
def test_wrong_arguments_are_one_line_on_stderr(
    run: Callable[..., tuple[int, str, str]], arguments: list[str]
) -> None:
    status, out, err = run("--print-config", *arguments)
    assert (status, out) == (2, "")
    assert err.startswith("kecho: error: ")
    assert err.count("\n") == 1
    assert err.endswith("\n")
    assert "--help" in err


@pytest.mark.parametrize(
    ("arguments", "variables", "source"),
    [
        (["--port", "x"], {}, "--port"),
        ([], {"KECHO_PORT": "x"}, "KECHO_PORT"),
        (["--uds", "two\nlines" * 20], {}, "--uds"),
        (["--host", ""], {}, "--host"),
        (["--bench", "2"], {}, "--bench"),
        (["--bench", "1", "--dispatch", "shared"], {}, "--bench"),
        ([], {"KECHO_BENCH": "1", "KECHO_DISPATCH": "shared"}, "KECHO_BENCH"),
        (["--log-format", "two\nlines"], {}, "--log-format"),
    ],
)
def test_wrong_values_are_one_line_that_names_the_source(
    run: Callable[..., tuple[int, str, str]],
    environment: pytest.MonkeyPatch,
    arguments: list[str],
    variables: Mapping[str, str],
    source: str,
) -> None:
    for name, text in variables.items():
        environment.setenv(name, text)
    status, out, err = run("--print-config", *arguments)
    assert (status, out) == (2, "")
    assert err.startswith(f"kecho: error: {source}: ")
    assert err.count("\n") == 1


def test_help_names_every_flag_and_default(
    run: Callable[..., tuple[int, str, str]], environment: pytest.MonkeyPatch
) -> None:
    environment.setenv("COLUMNS", "200")
    status, out, err = run("--help")
    assert (status, err) == (0, "")
    for name in OPTIONS:
        assert flag(name) in out
    for default in ("127.0.0.1", "12345", "128", "shared", "5", "info", "text"):
        assert f"default {default}" in out


def test_version_is_printed(run: Callable[..., tuple[int, str, str]]) -> None:
    assert run("--version") == (0, f"kecho {kecho.__version__}\n", "")


# ---- --print-config ---------------------------------------------------------------------------


def rows_of(out: str) -> dict[str, list[str]]:
    return {line.split()[0]: line.split()[1:] for line in out.splitlines()}


def test_print_config_shows_every_option_its_value_and_source(
    run: Callable[..., tuple[int, str, str]], environment: pytest.MonkeyPatch
) -> None:
    environment.setenv("KECHO_HOST", "::1,127.0.0.1")
    status, out, err = run("--print-config", "--reuse-port", "--graceful-timeout", "2")
    assert (status, err) == (0, "")
    rows = rows_of(out)
    assert rows.keys() == {name.replace("_", "-") for name in OPTIONS} - {"bench"}
    assert rows["host"] == ["::1", "127.0.0.1", "KECHO_HOST"]
    assert rows["port"] == ["12345", "default"]
    assert rows["uds"] == ["-", "default"]
    assert rows["reuse-port"] == ["on", "--reuse-port"]
    assert rows["graceful-timeout"] == ["2.0", "--graceful-timeout"]
    assert rows["idle-timeout"] == ["-", "default"]


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [("port", "0", "0"), ("port", "1", "1"), ("threads", "1", "1"), ("idle_timeout", "1", "1.0")],
)
def test_print_config_shows_numbers_as_numbers(
    run: Callable[..., tuple[int, str, str]], name: str, value: str, shown: str
) -> None:
    _, out, _ = run("--print-config", flag(name), value)
    assert rows_of(out)[name.replace("_", "-")] == [shown, flag(name)]


def test_print_config_as_json(
    run: Callable[..., tuple[int, str, str]], environment: pytest.MonkeyPatch
) -> None:
    environment.setenv("KECHO_BENCH", "1")
    status, out, err = run("--print-config", "--log-format=json", "--uds", "/run/\udcff")
    assert (status, err) == (0, "")
    rows = json.loads(out)
    assert rows.keys() == OPTIONS.keys() - {"bench"}
    assert rows["dispatch"] == {"value": "percpu", "source": "KECHO_BENCH"}
    assert rows["uds"] == {"value": "/run/\udcff", "source": "--uds"}
    assert rows["host"] == {"value": [], "source": "default"}
    assert rows["threads"] == {"value": None, "source": "default"}
    assert rows["log_format"] == {"value": "json", "source": "--log-format"}
