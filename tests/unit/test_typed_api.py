"""The options as type checkers and editors see them: held to what the checks accept."""

from __future__ import annotations

import inspect
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import pytest

import kecho
from kecho.bench import Workload
from kecho.drop.config import DropConfig
from kecho.options import defaults_of, options_of
from kecho.server.settings import CommandConfig
from support import keywords

pytestmark = pytest.mark.python_only

CONFIGURATIONS = (CommandConfig, Workload, DropConfig)
FIELDS = [(one, name) for one in CONFIGURATIONS for name in options_of(one)]


def is_of(value: object, kind: Any) -> bool:
    """Whether a type checker would take the value for this type."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Literal:
        return value in arguments
    if origin is tuple:
        return isinstance(value, tuple) and all(is_of(one, arguments[0]) for one in value)
    if origin in (Union, UnionType):
        return any(is_of(value, one) for one in arguments)
    return type(value) is kind


def test_keywords_are_made_from_the_definitions() -> None:
    assert keywords.FILE.read_text() == keywords.generated(), "run `make format`"


def test_every_keyword_is_an_option_and_every_option_a_keyword() -> None:
    names = get_type_hints(kecho.ServerOptions).keys()
    assert names == options_of(kecho.ServerConfig).keys() | {"bench"}
    with pytest.raises(TypeError, match="unknown option: colour"):
        kecho.Server(colour=1)  # type: ignore[call-arg]


def test_server_and_serve_take_the_keywords() -> None:
    for function in (kecho.Server.__init__, kecho.serve):
        assert inspect.signature(function).parameters["options"].annotation == (
            "Unpack[ServerOptions]"
        )


@pytest.mark.parametrize(("config", "name"), FIELDS)
def test_type_of_an_option_is_what_its_check_accepts(config: type, name: str) -> None:
    spec, kind = options_of(config)[name], get_type_hints(config)[name]
    default = defaults_of(config)[name]
    assert is_of(default, kind)
    assert spec.check(default) == default
    if spec.choices:
        assert get_args(kind) == spec.choices
    try:
        takes_none = spec.check(None) is None
    except (ValueError, AssertionError):
        takes_none = False
    assert takes_none == (NoneType in get_args(kind))


def test_help_of_the_server_is_its_manual() -> None:
    manual = inspect.getdoc(kecho.Server) or ""
    for name, spec in options_of(kecho.ServerConfig).items():
        assert f"\n{name}: " in manual
        assert " ".join(spec.help.split()) in " ".join(manual.split())
    assert max(len(line) for line in manual.splitlines()) <= 100
