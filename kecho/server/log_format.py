"""Turn log records into lines of text or of JSON, and set up the log of the command."""

from __future__ import annotations

import logging

from ..journal import is_journal, with_priority
from ..printable import json_text, one_line
from .logs import stderr_handler

__all__ = ["JsonFormatter", "TextFormatter", "configure_logging"]

log = logging.getLogger("kecho")


class TextFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        level = "" if record.levelno == logging.INFO else f"{record.levelname.lower()}: "
        return f"kecho: {level}{one_line(record.getMessage())}"


class JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, object] = {
            "time": round(record.created, 3),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
        }
        fields.update(getattr(record, "fields", {}))
        return json_text(fields)


class _JournalFormatter(logging.Formatter):
    """Puts the priority in front of a line; the journal removes it."""

    def __init__(self, inner: logging.Formatter) -> None:
        super().__init__()
        self._inner = inner

    def format(self, record: logging.LogRecord) -> str:
        return with_priority(self._inner.format(record), record.levelno)


def configure_logging(level: str, log_format: str) -> None:
    """Send the log to stderr, from this level on, as lines of text or of JSON."""
    handler = stderr_handler()
    formatter = JsonFormatter() if log_format == "json" else TextFormatter()
    handler.setFormatter(_JournalFormatter(formatter) if is_journal(2) else formatter)
    logging.raiseExceptions = False  # the server goes on when the reader of stderr has gone
    log.handlers[:] = [handler]
    log.setLevel(level.upper())
    log.propagate = False
