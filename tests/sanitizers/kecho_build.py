"""Pytest plugin of the sanitizer runs: stops unless kecho is the build that is meant."""

import os
import sys
from pathlib import Path

import pytest


def check() -> str:
    """Import the engine, which also keeps a later change of sys.path from mattering."""
    from kecho.server import _engine

    expected = Path(os.environ["KECHO_EXPECT_BUILD"]).resolve()
    found = Path(_engine.__file__).resolve()
    if expected not in found.parents:
        raise RuntimeError(f"kecho.server._engine is {found}, not in {expected}")
    return str(found)


def pytest_configure(config: pytest.Config) -> None:
    try:
        check()
    except (ImportError, KeyError, RuntimeError) as error:
        raise pytest.UsageError(f"wrong build under test: {error!r}") from error
    if "hypothesis" in sys.modules or config.pluginmanager.hasplugin("hypothesispytest"):
        from hypothesis import HealthCheck, settings

        # Sanitized code is slower than any deadline meant for a release build.
        settings.register_profile(
            "sanitizers", deadline=None, suppress_health_check=[HealthCheck.too_slow]
        )
        settings.load_profile("sanitizers")


def pytest_report_header() -> str:
    return f"kecho build: {check()}"
