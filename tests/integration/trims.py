"""`dynacut trim` for tests: run, what it left running ended, its report checked."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynacut.offline import processes

from .servers import become_subreaper, is_running, wait_until

if TYPE_CHECKING:
    from .conftest import Dynacut

TIMEOUT = 400


class Trims:
    """Runs `dynacut trim`, and ends what it leaves running."""

    def __init__(self, dynacut: Dynacut, directory: Path) -> None:
        self._dynacut = dynacut
        self.directory = directory
        self._pids: list[int] = []

    def __call__(self, *arguments: str | int | Path) -> dict[str, Any]:
        """The report; its process is a child of ours, once trim has ended."""
        become_subreaper()
        done = self._dynacut("trim", "-o", self.directory, "--json", *arguments, timeout=TIMEOUT)
        assert done.returncode == 0, f"{done.stderr}{done.stdout}"
        report = json.loads(done.stdout)
        assert report == json.loads((self.directory / "report.json").read_text())
        self._pids.append(report["target"]["pid"])
        return dict(report)

    def end(self) -> None:
        for pid in filter(is_running, self._pids):
            assert processes.end_tree(pid) == []


def ended(pid: int) -> int:
    """The status of a child that ends by itself: exit status, or minus the signal."""
    statuses: list[int] = []

    def reaped() -> bool:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            statuses.append(os.waitstatus_to_exitcode(status))
        return bool(found)

    wait_until(reaped, f"the end of {pid}")
    return statuses[0]


def assert_trimmed(report: dict[str, Any], share: float = 0.9) -> None:
    """At least so much of the start-up code is gone, and what is not is accounted for."""
    (module,) = report["modules"]
    startup, removed = module["startup"]["blocks"], module["removed"]["blocks"]
    assert removed >= share * startup
    assert removed + module["learned"]["blocks"] + module["standing"]["blocks"] >= startup
    assert module["gadgets"]["after"] < module["gadgets"]["before"]
    assert report["hits"] <= 0.01 * removed
