"""Skipping is for what a machine cannot have: in CI, which sets everything up, any other skipped test has failed."""

from __future__ import annotations

import os
import re
from collections.abc import Generator

import pytest

_CANNOT_BE_HAD = re.compile(r"(Skipped: )?this (machine|kernel|process|linker|file system|pid namespace)\b")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if os.environ.get("CI") == "true" and report.skipped and isinstance(report.longrepr, tuple):
        reason = report.longrepr[2]
        if not _CANNOT_BE_HAD.match(reason):
            report.outcome = "failed"
            report.longrepr = f"{item.nodeid} must not be skipped in CI ({call.when}): {reason}"
    return report
