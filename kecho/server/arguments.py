"""Turn the options that were given into the fields of a configuration.

Here are the effects of one option on another: bench on dispatch, uds and fd on host.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..errors import OptionError
from ..options import integer, options_of

__all__ = ["BENCH", "SERVING", "check_options"]

SERVING = "Serving"  # a heading of --help

BENCH = replace(
    integer("The same as --dispatch: 0 is shared, 1 is percpu.", 0, 1, metavar="0|1"),
    value_if_bare="1",
    group=SERVING,
)
_DISPATCH_OF_BENCH = ("shared", "percpu")


def check_options(config_class: type[Any], options: Mapping[str, object]) -> dict[str, Any]:
    """Return the fields of `config_class` for these options: see ServerConfig.from_options()."""
    given = dict(options)
    unknown = given.keys() - options_of(config_class).keys() - {"bench"}
    if unknown:
        raise TypeError(f"unknown option: {', '.join(sorted(unknown))}")
    if "bench" in given:
        try:
            dispatch = _DISPATCH_OF_BENCH[BENCH.check(given.pop("bench"))]
        except ValueError as error:
            raise OptionError("bench", str(error)) from None
        if given.setdefault("dispatch", dispatch) != dispatch:
            raise OptionError(
                "bench", f"contradicts dispatch {given['dispatch']}: it is {dispatch}"
            )
    elsewhere = given.get("uds") is not None or given.get("fd") not in (None, ())
    if elsewhere and not given.keys() & {"host", "port"}:
        given["host"] = ()
    return given
