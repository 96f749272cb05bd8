from __future__ import annotations

import copy
import dataclasses
import math
import os
import pickle
from fractions import Fraction
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kecho import OptionError, ServerConfig
from kecho.options import defaults_of, flag, options_of
from kecho.server.arguments import BENCH, check_options
from kecho.server.config import check_timeout, environment_variable
from kecho.server.settings import CommandConfig

pytestmark = pytest.mark.python_only

OPTIONS = options_of(CommandConfig)
NAMES = sorted(OPTIONS)
# A number's type tells a count from a time.
TYPES = get_type_hints(CommandConfig)
IS_TIME = {name: float in (TYPES[name], *get_args(TYPES[name])) for name in NAMES}
LIMITS = {name: spec.between for name, spec in OPTIONS.items() if spec.between is not None}
RANGES = {name: limits for name, limits in LIMITS.items() if not IS_TIME[name]}
SECONDS = {name: limits[0] for name, limits in LIMITS.items() if IS_TIME[name]}
NONE_MEANS_UNSET = {name for name in NAMES if type(None) in get_args(TYPES[name])}
LONGEST_S = 2_000_000


def checked(name: str, value: object) -> Any:
    """The value of the option after the command's or the server's configuration has seen it."""
    config_class = ServerConfig if name in options_of(ServerConfig) else CommandConfig
    return getattr(config_class(**{name: value}), name)


class BytesPath:
    def __fspath__(self) -> bytes:
        return b"/run/\xff"


# ---- one option at a time ---------------------------------------------------------------------


def test_defaults_are_valid_and_loopback() -> None:
    assert dataclasses.asdict(ServerConfig()) == defaults_of(ServerConfig)
    assert ServerConfig().host == ("127.0.0.1",)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("host", "::1", ("::1",)),
        ("host", ["0.0.0.0", "::"], ("0.0.0.0", "::")),
        ("host", ("a", "a"), ("a", "a")),
        ("host", (name for name in ("a", "b")), ("a", "b")),
        ("host", "fe80::1%lo", ("fe80::1%lo",)),
        ("port", 0, 0),
        ("port", 65535, 65535),
        ("uds", "relative", "relative"),
        ("uds", Path("/run/kecho"), "/run/kecho"),
        ("uds", b"/run/kecho", "/run/kecho"),
        ("uds", BytesPath(), "/run/\udcff"),
        ("uds", "a" * 107, "a" * 107),
        ("uds", "ä" * 53, "ä" * 53),
        ("uds", None, None),
        ("backlog", 0, 0),
        ("backlog", 2**31 - 1, 2**31 - 1),
        ("dispatch", "shared", "shared"),
        ("dispatch", "percpu", "percpu"),
        ("engine", "io_uring", "io_uring"),
        ("engine", "sockmap", "sockmap"),
        ("engine", "auto", "auto"),
        ("threads", 1, 1),
        ("threads", 1024, 1024),
        ("threads", None, None),
        ("busy_poll", 0, 0),
        ("busy_poll", 1_000_000, 1_000_000),
        ("busy_poll", "auto", "auto"),
        ("busy_poll", "forever", "forever"),
        ("reuse_port", True, True),
        ("reuse_port", False, False),
        ("max_connections", 1, 1),
        ("max_connections", 2**32 - 2, 2**32 - 2),
        ("max_connections", None, None),
        ("idle_timeout", 0.001, 0.001),
        ("idle_timeout", LONGEST_S, 2_000_000.0),
        ("idle_timeout", None, None),
        ("graceful_timeout", 0, 0.0),
        ("graceful_timeout", 1.5, 1.5),
        ("stats_interval", 3, 3.0),
        ("stats_interval", None, None),
        ("log_level", "debug", "debug"),
        ("log_level", "error", "error"),
        ("log_format", "json", "json"),
    ],
)
def test_value_is_accepted(name: str, value: object, expected: object) -> None:
    result = checked(name, value)
    assert result == expected
    assert type(result) is type(expected)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("host", ()),
        ("host", ""),
        ("host", ("127.0.0.1", "")),
        ("host", "a\0b"),
        ("host", None),
        ("host", 5),
        ("fd", -1),
        ("fd", True),
        ("fd", None),
        ("fd", "3"),
        ("fd", (3, 3)),
        ("fd", {3: 4}),
        ("fd", 2**31),
        ("user", ""),
        ("user", "a\0b"),
        ("user", 0),
        ("sandbox", 1),
        ("host", (5,)),
        ("host", b"127.0.0.1"),
        ("port", -1),
        ("port", 65536),
        ("port", "80"),
        ("port", 80.0),
        ("port", None),
        ("port", True),
        ("uds", ""),
        ("uds", b""),
        ("uds", "\0abstract"),
        ("uds", "a\0b"),
        ("uds", "a" * 108),
        ("uds", "ä" * 54),
        ("uds", 5),
        ("uds", "\ud800"),
        ("backlog", -1),
        ("backlog", 2**31),
        ("backlog", None),
        ("backlog", False),
        ("dispatch", "PERCPU"),
        ("engine", "bpf"),
        ("engine", None),
        ("dispatch", ""),
        ("dispatch", None),
        ("dispatch", ["shared"]),
        ("dispatch", 1),
        ("threads", 0),
        ("threads", 1025),
        ("threads", True),
        ("busy_poll", -1),
        ("busy_poll", 1_000_001),
        ("busy_poll", "200"),
        ("busy_poll", "Auto"),
        ("busy_poll", ""),
        ("busy_poll", None),
        ("busy_poll", True),
        ("busy_poll", 0.5),
        ("reuse_port", 1),
        ("reuse_port", "yes"),
        ("reuse_port", None),
        ("max_connections", 0),
        ("max_connections", 2**32 - 1),
        ("max_connections", True),
        ("idle_timeout", 0),
        ("idle_timeout", 0.0009),
        ("idle_timeout", LONGEST_S + 1),
        ("idle_timeout", True),
        ("idle_timeout", "1"),
        ("idle_timeout", math.inf),
        ("idle_timeout", math.nan),
        ("idle_timeout", Fraction(1)),
        ("graceful_timeout", -0.001),
        ("graceful_timeout", None),
        ("graceful_timeout", math.nan),
        pytest.param("port", 10**5000, id="port-of_5001_digits"),
        pytest.param("idle_timeout", 10**400, id="idle_timeout-larger_than_any_float"),
        pytest.param("graceful_timeout", -(10**400), id="graceful_timeout-smaller_than_any_float"),
        ("stats_interval", 0),
        ("log_level", "loud"),
        ("log_level", "INFO"),
        ("log_format", None),
    ],
)
def test_value_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(OptionError) as refused:
        checked(name, value)
    assert str(refused.value).startswith(f"{name}: ")
    assert refused.value.option == name
    assert refused.value.reason
    assert isinstance(refused.value, ValueError)


@given(st.sampled_from(sorted(RANGES)), st.integers() | st.integers(-2, 70_000))
def test_integers_are_accepted_exactly_within_their_range(name: str, value: int) -> None:
    low, high = RANGES[name]
    if low <= value <= high:
        assert checked(name, value) == value
    else:
        with pytest.raises(OptionError, match=f"^{name}: .*between {low} and {high}"):
            checked(name, value)


@given(st.sampled_from(sorted(SECONDS)), st.floats() | st.floats(-1, 3e6) | st.integers())
def test_seconds_are_accepted_exactly_within_their_range(name: str, value: float) -> None:
    if SECONDS[name] <= value <= LONGEST_S:
        result = checked(name, value)
        assert result == value
        assert type(result) is float
    else:
        with pytest.raises(OptionError, match=f"^{name}: "):
            checked(name, value)


ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.complex_numbers()
    | st.text(st.characters())
    | st.binary()
    | st.just(object()),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=2),
    max_leaves=4,
)


@given(st.sampled_from(NAMES), ANYTHING)
def test_no_value_gets_past_the_check_or_raises_anything_else(name: str, value: object) -> None:
    try:
        result = checked(name, value)
    except OptionError as error:
        refused = error
    else:
        refused = None
    if refused is not None:
        assert str(refused).startswith(f"{name}: ")
        return
    assert checked(name, result) == result
    if result is None:
        assert name in NONE_MEANS_UNSET
    elif name in RANGES:
        assert RANGES[name][0] <= result <= RANGES[name][1]
        assert not isinstance(result, bool)
    elif name in SECONDS:
        assert SECONDS[name] <= result <= LONGEST_S
    elif name == "uds":
        assert 0 < len(os.fsencode(result)) <= 107
        assert "\0" not in result
    elif name == "fd":
        assert len(set(result)) == len(result)
        assert all(type(fd) is int and 0 <= fd < 2**31 for fd in result)
    elif name == "host":
        assert result
        assert all(isinstance(host, str) and host for host in result)


# ---- options together -------------------------------------------------------------------------


@pytest.mark.parametrize(("bench", "dispatch"), [(0, "shared"), (1, "percpu")])
def test_bench_stands_for_dispatch(bench: int, dispatch: str) -> None:
    assert ServerConfig.from_options({"bench": bench}).dispatch == dispatch
    both = {"bench": bench, "dispatch": dispatch}
    assert ServerConfig.from_options(both).dispatch == dispatch


@pytest.mark.parametrize(("bench", "dispatch"), [(0, "percpu"), (1, "shared"), (1, "none")])
def test_bench_against_another_dispatch_is_refused(bench: int, dispatch: str) -> None:
    with pytest.raises(OptionError, match=f"^bench: .*{dispatch}"):
        ServerConfig.from_options({"bench": bench, "dispatch": dispatch})


@pytest.mark.parametrize("bench", [2, -1, True, "1", None, 1.0])
def test_bench_is_0_or_1(bench: object) -> None:
    with pytest.raises(OptionError, match=r"^bench: "):
        ServerConfig.from_options({"bench": bench})


def test_uds_alone_leaves_tcp_out() -> None:
    config = ServerConfig.from_options({"uds": "/run/kecho"})
    assert config.host == ()
    assert config.uds == "/run/kecho"


@pytest.mark.parametrize("tcp", [{"host": "::1"}, {"port": 80}, {"host": "::1", "port": 80}])
def test_uds_with_host_or_port_keeps_tcp(tcp: dict[str, object]) -> None:
    config = ServerConfig.from_options({"uds": "/run/kecho", **tcp})
    assert config.uds == "/run/kecho"
    assert config.host == (("::1",) if "host" in tcp else ("127.0.0.1",))
    assert config.port == tcp.get("port", 12345)


def test_no_uds_keeps_tcp() -> None:
    assert ServerConfig.from_options({"uds": None}).host == ("127.0.0.1",)


def test_udp_beside_a_unix_socket_alone_is_refused() -> None:
    with pytest.raises(OptionError, match=r"^udp: needs a host or a port"):
        ServerConfig.from_options({"uds": "/run/kecho", "udp": True})
    assert ServerConfig.from_options({"uds": "/run/kecho", "udp": True, "port": 1}).udp


def test_nowhere_to_listen_is_refused() -> None:
    with pytest.raises(OptionError, match=r"^host: "):
        ServerConfig(host=())
    assert ServerConfig(host=(), uds="/run/kecho").host == ()


def test_unknown_options_are_a_type_error_that_names_them() -> None:
    with pytest.raises(TypeError, match=r"colour.*shape"):
        ServerConfig.from_options({"shape": 1, "port": 0, "colour": 2})
    with pytest.raises(TypeError, match="log_level"):
        ServerConfig.from_options({"log_level": "info"})
    with pytest.raises(TypeError, match="bench"):
        ServerConfig(bench=1)  # type: ignore[call-arg]


def test_options_that_were_given_are_left_as_they_are() -> None:
    given_options = {"bench": 1, "uds": "/run/kecho"}
    before = dict(given_options)
    check_options(ServerConfig, given_options)
    assert given_options == before


@pytest.mark.parametrize("value", [-1, math.nan, None, "1"])
def test_timeout_of_a_method_is_checked_like_the_option(value: object) -> None:
    assert check_timeout("graceful_timeout", 2) == 2.0
    with pytest.raises(OptionError, match=r"^graceful_timeout: "):
        check_timeout("graceful_timeout", value)


# ---- the classes ------------------------------------------------------------------------------


def test_config_is_frozen_and_hashable() -> None:
    config = ServerConfig(port=1, host=["a", "b"])
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.port = 2  # type: ignore[misc]
    assert config == ServerConfig(port=1, host=("a", "b"))
    assert hash(config) == hash(ServerConfig(port=1, host=("a", "b")))
    assert config != ServerConfig(port=2, host=("a", "b"))


def test_changed_copy_is_checked_too() -> None:
    config = ServerConfig()
    assert dataclasses.replace(config, port=1).port == 1
    with pytest.raises(OptionError, match=r"^port: "):
        dataclasses.replace(config, port=-1)


def test_config_survives_pickle_and_copy() -> None:
    config = ServerConfig(port=1, uds="/run/\udcff", idle_timeout=3)
    assert pickle.loads(pickle.dumps(config)) == config
    assert copy.deepcopy(config) == config


def test_option_error_survives_pickle_and_copy() -> None:
    error = OptionError("port", "must be between 0 and 65535 (got 99999)")
    for twin in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):
        assert type(twin) is OptionError
        assert (twin.option, twin.reason, str(twin)) == (error.option, error.reason, str(error))


@pytest.mark.parametrize("name", [*NAMES, "bench"])
def test_option_has_a_help_text(name: str) -> None:
    spec = BENCH if name == "bench" else options_of(CommandConfig)[name]
    assert len(spec.help.split()) >= 5
    assert "\n" not in spec.help


def test_command_has_all_options_of_the_server() -> None:
    server, command = options_of(ServerConfig), options_of(CommandConfig)
    assert {name: command[name] for name in server} == server


@pytest.mark.parametrize(
    ("name", "its_flag", "variable"),
    [
        ("host", "--host", "KECHO_HOST"),
        ("max_connections", "--max-connections", "KECHO_MAX_CONNECTIONS"),
        ("reuse_port", "--reuse-port", "KECHO_REUSE_PORT"),
        ("log_format", "--log-format", "KECHO_LOG_FORMAT"),
        ("bench", "--bench", "KECHO_BENCH"),
    ],
)
def test_flag_and_variable_follow_from_the_name(name: str, its_flag: str, variable: str) -> None:
    assert flag(name) == its_flag
    assert environment_variable(name) == variable


def test_many_descriptors_are_checked_at_once() -> None:
    assert len(ServerConfig(fd=range(3, 60_000)).fd) == 59_997
    with pytest.raises(OptionError, match="got 5 twice"):
        ServerConfig(fd=[*range(3, 60_000), 5])
