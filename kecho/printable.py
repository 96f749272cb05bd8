"""Text that does nothing to a terminal but stand there, whoever chose it.

Names of files, devices and processes, replies of servers and files of results may hold any
character: ESC begins a sequence that moves the cursor or changes a title, CR overwrites a line, C1
controls do what ESC does, and bidi overrides show text in another order. What str.isprintable()
does not count among the printable ones is written as an escape of Python's.
"""

from __future__ import annotations

import json

__all__ = ["json_text", "one_line", "printable"]


def one_line(text: str) -> str:
    """Without anything that would break or garble the line."""
    return text if text.isprintable() else "".join(map(_escaped, text))


def printable(text: str) -> str:
    """As one_line(), but with newlines and tabs."""
    return "\n".join("\t".join(map(one_line, line.split("\t"))) for line in text.split("\n"))


def _escaped(one: str) -> str:
    return one if one.isprintable() else one.encode("unicode_escape").decode()


def json_text(value: object, indent: int | None = None) -> str:
    """JSON, all of it printable: json.dumps() escapes every control character but DEL."""
    return json.dumps(value, indent=indent).replace("\x7f", "\\u007f")
