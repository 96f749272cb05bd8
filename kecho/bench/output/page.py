"""Results as one self-contained HTML page: the picture is inside."""

from __future__ import annotations

import html
import io
import json
from collections.abc import Iterator, Sequence

from ...printable import one_line
from ..results.result import Result, check_results
from ..results.together import machine_differences, machine_of
from . import report
from .plot import plot

__all__ = ["to_html"]

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem }
pre { background: #f5f5f2; padding: 1rem; overflow-x: auto; font-size: 13px; line-height: 1.4 }
svg { max-width: 100%; height: auto }
td { padding: .1rem 1rem .1rem 0; vertical-align: top; overflow-wrap: anywhere }
.bad { color: #b00020 } .good { color: #1b6e3c }
"""


def to_html(results: Sequence[Result]) -> str:
    """Return the page of some results.

    Raises ValueError if they cannot be combined, ImportError without matplotlib.
    """
    check_results(results)
    valid = all(result.verdict.valid for result in results)
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>",
        "<meta name='viewport' content='width=device-width'>",
        f"<title>kecho.bench: {html.escape(str(results[0].workload['mode']))}</title>",
        f"<style>{_STYLE}</style></head><body>",
        f"<h1>kecho.bench: {html.escape(str(results[0].workload['mode']))}</h1>",
        "<p class='good'>Valid: the run's own checks found nothing wrong.</p>"
        if valid
        else "<p class='bad'>Not valid: the reasons are below.</p>",
        _picture(results),
        *(
            f"{_heading(result, results)}<pre>{html.escape(report.text(result))}</pre>"
            for result in results
        ),
        *_environments(results),
        "</body></html>\n",
    ]
    return "\n".join(parts)


def _heading(result: Result, results: Sequence[Result]) -> str:
    several = len({one.name for one in results}) > 1
    return f"<h2>{_escaped(result.name)}</h2>" if several else ""


def _environments(results: Sequence[Result]) -> Iterator[str]:
    """Yield a table of each machine that results were measured on."""
    differences = machine_differences([result.environment for result in results])
    if differences:
        shown = _escaped("; ".join(differences))
        yield f"<p class='bad'>Measured on different machines: {shown}</p>"
    told: set[tuple[str, ...]] = set()
    for result in results:
        if machine_of(result.environment) in told:
            continue
        told.add(machine_of(result.environment))
        yield f"<h2>Environment{_escaped(f': {result.name}') if differences else ''}</h2><table>"
        for name, value in result.environment.items():
            yield f"<tr><td>{_escaped(name)}</td><td>{_escaped(_shown(value))}</td></tr>"
        yield "</table>"


def _escaped(text: str) -> str:
    return html.escape(one_line(text))


def _picture(results: Sequence[Result]) -> str:
    """Return the picture as SVG; empty if there is nothing to draw."""
    buffer = io.BytesIO()
    try:
        plot(results, buffer, "svg")
    except ValueError:
        return ""
    text = buffer.getvalue().decode()
    return text[text.index("<svg") :]  # without the XML prologue


def _shown(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} = {one}" for name, one in value.items())
    return value if isinstance(value, str) else json.dumps(value)
