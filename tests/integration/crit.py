"""crit, CRIU's own tool that decodes images: what our reading and writing of them is compared with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

_FOLDER = Path(__file__).resolve().parents[2] / "build" / "criu" / "crit"
# All files by one process: crit takes one file at a time, and most of its time to start.
_SCRIPT = """
import sys
from crit.__main__ import main
source, target, *names = sys.argv[1:]
for name in names:
    sys.argv = ["crit", "decode", "-i", f"{source}/{name}", "-o", f"{target}/{name}.json"]
    main()
"""
PAGE = 4096
PARENT = 1
"""Flag of a pagemap entry, CRIU's criu/include/image.h."""


def the_crit() -> Path:
    """The folder that crit runs from; without it the tests are skipped."""
    if not (_FOLDER / "crit" / "__main__.py").exists():
        pytest.skip("there is no crit: tools/criu.sh crit")
    return _FOLDER


def decoded(directory: Path, output: Path) -> dict[str, Any]:
    """Every file of an image but the raw pages, as crit decodes it, by name. output: a folder for its JSON."""
    output.mkdir()
    names = sorted(path.name for path in directory.glob("*.img") if not path.name.startswith("pages-"))
    environment = os.environ | {"PYTHONPATH": str(the_crit())}
    command = [sys.executable, "-c", _SCRIPT, str(directory), str(output), *names]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return {name: json.loads((output / f"{name}.json").read_text()) for name in names}


def memory_of(directory: Path, pagemap: str, output: Path) -> dict[int, bytes]:
    """The pages that an image holds of one pagemap, by address: by crit's decoding, parents included."""
    if not directory.exists():
        return {}
    head, *entries = decoded(directory, output)[pagemap]["entries"]
    pages: dict[int, bytes] = {}
    below: dict[int, bytes] | None = None
    with (directory / f"pages-{head['pages_id']}.img").open("rb") as file:
        for entry in entries:
            first, count = entry["vaddr"], entry["nr_pages"]
            for address in range(first, first + count * PAGE, PAGE):
                if entry["flags"] & PARENT:
                    if below is None:
                        below = memory_of(directory / "parent", pagemap, output / "parent")
                    pages[address] = below[address]
                else:
                    pages[address] = file.read(PAGE)
        assert file.read() == b""
    return pages
