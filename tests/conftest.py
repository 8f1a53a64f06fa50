"""Skipping is for what a machine cannot have: in CI, which sets everything up, any other skipped test has failed."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Generator

import pytest

_CANNOT_BE_HAD = re.compile(r"(Skipped: )?this (machine|kernel|process|linker|file system|pid namespace)\b")


def pytest_configure() -> None:
    """Commands that are tested begin with signals as a terminal has them: CI may have begun with some ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)


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
