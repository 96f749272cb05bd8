"""What was logged."""

from __future__ import annotations

import re

import pytest


def said(caplog: pytest.LogCaptureFixture, pattern: str) -> list[re.Match[str]]:
    """Where the pattern is found, one message after the other."""
    return [found for one in caplog.records if (found := re.search(pattern, one.getMessage()))]
