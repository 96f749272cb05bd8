"""Write the options of a server as a TypedDict, for editors and type checkers: `make format`.

A test compares the file with the definitions of the options.
"""

from __future__ import annotations

import re
import textwrap
from dataclasses import fields
from pathlib import Path

from kecho.options import option_of
from kecho.server.arguments import BENCH
from kecho.server.config import ServerConfig

FILE = Path(__file__).parents[2] / "kecho/server/keywords.py"

HEAD = '''\
"""The keyword arguments of kecho.Server and kecho.serve, for editors and type checkers.

Generated from the definitions in config.py by `make format`. Do not edit.
"""

from __future__ import annotations

from collections.abc import Iterable
from os import PathLike
from typing import Literal, TypedDict

__all__ = ["ServerOptions"]


class ServerOptions(TypedDict, total=False):
    """The options of kecho.Server and kecho.serve, as keyword arguments."""
'''


def keyword_type(stored: str, metavar: str | None) -> str:
    """What a keyword takes, which may be more than what the configuration stores."""
    if metavar == "PATH":
        return "str | bytes | PathLike[str] | PathLike[bytes] | None"
    several = re.fullmatch(r"tuple\[(\w+), \.\.\.\]", stored)
    kind = f"{several[1]} | Iterable[{several[1]}]" if several else stored
    return kind.replace("'", '"')


def entry(name: str, kind: str, help: str, default: object) -> str:
    if default is not None or "Default" not in help:
        help += f" Default: {default!r}."
    lines = textwrap.wrap(help, 90)
    text = lines[0] if len(lines) == 1 else "\n".join([*lines, ""])
    return textwrap.indent(f'\n{name}: {kind}\n"""{text}"""\n', "    ")


def generated() -> str:
    options = [
        entry(
            one.name,
            keyword_type(str(one.type), option_of(one).metavar),
            option_of(one).help,
            one.default,
        )
        for one in fields(ServerConfig)
    ]
    return HEAD + "".join(options) + entry("bench", "Literal[0, 1]", BENCH.help, 0)


if __name__ == "__main__":
    FILE.write_text(generated())
