"""A plugin of pytest: writes the id of each test that fails to a file, a JSON string a line."""

from __future__ import annotations

import json
import os

import pytest


def _write(node_id: str) -> None:
    with open(os.environ["KECHO_TEST_REPORT"], "a") as report:
        report.write(json.dumps(node_id) + "\n")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    # Under xdist the workers see the reports, too; the controller writes them.
    if report.failed and "PYTEST_XDIST_WORKER" not in os.environ:
        _write(report.nodeid)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.failed and "PYTEST_XDIST_WORKER" not in os.environ:
        _write(report.nodeid)
