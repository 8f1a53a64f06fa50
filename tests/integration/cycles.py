"""Switches SET of a redis-server off and on again, many times in one process: python cycles.py PID COUNT [OPTION …]."""

from __future__ import annotations

import io
import json
import sys
from contextlib import redirect_stdout

from dynacut.cli.main import main


def run(*arguments: str) -> list[object]:
    """Runs one dynacut command and returns the features it reports."""
    output = io.StringIO()
    with redirect_stdout(output):
        status = main(["live", *sys.argv[3:], *arguments, "--json"])
    if status != 0:
        sys.exit(f"dynacut live {' '.join(arguments)}: status {status}")
    features = json.loads(output.getvalue())["features"]
    assert isinstance(features, list)
    return features


if __name__ == "__main__":
    pid, count = sys.argv[1], int(sys.argv[2])
    run("--pid", pid, "--disable", "setCommand", "--on-hit", "redirect=readonlyCommand", "--as", "set")
    features = run("--pid", pid, "--enable", "set")
    for _ in range(count - 1):
        run("--pid", pid, "--disable", "set")
        features = run("--pid", pid, "--enable", "set")
    print(json.dumps(features))
