"""crit's way to a rewritten image: its files turned into JSON, changed there, and turned back.

crit is fetched with CRIU's source (tools/criu.sh crit). Two ways: each file by two runs of it, as in a script around
it, where most of the time is Python's start; and all files by its own functions in a Python that runs already.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.programs import BenchmarkError

_FOLDER = Path(__file__).resolve().parent.parent / "build" / "criu" / "crit"
_TIMEOUT = 300
_AT_ONCE = """
import json, sys, time
import pycriu
image, output, documents = sys.argv[1:]
with open(documents) as file:
    wanted = json.load(file)
started = time.perf_counter()
for name, change in wanted.items():
    with open(f"{image}/{name}", "rb") as file:
        text = json.dumps(pycriu.images.load(file))
    contents = json.loads(text)
    contents.update(change)
    text = json.dumps(contents)
    with open(f"{output}/{name}", "wb") as file:
        pycriu.images.dump(json.loads(text), file)
print((time.perf_counter() - started) * 1000)
"""


def has_crit() -> bool:
    """Whether it has been fetched."""
    return (_FOLDER / "crit" / "__main__.py").exists()


def crit(action: str, source: Path, output: Path) -> None:
    """Decodes an image file to JSON, or encodes it.

    Raises:
        BenchmarkError: it failed.
    """
    _python(f"crit {action} of {source.name}", "-m", "crit", action, "-i", str(source), "-o", str(output))


def _decoded(source: Path, folder: Path) -> Any:
    crit("decode", source, folder / "decoded.json")
    return json.loads((folder / "decoded.json").read_text())


def _python(what: str, *arguments: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(_FOLDER)}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=_TIMEOUT, check=False)
    if done.returncode != 0:
        raise BenchmarkError(f"{what} failed: {done.stderr.strip()}")
    return done.stdout


@dataclass(frozen=True)
class Edit:
    """What crit is to make of an image: the decoded contents of the files that differ, and the pages files.

    folder: for files in passing.
    """

    documents: dict[str, Any]
    pages: tuple[Path, ...]
    folder: Path

    @classmethod
    def of(cls, image: Path, flat: Path, folder: Path) -> Edit:
        """From a flat copy that dynacut has made of the image."""
        changed = [
            path.name
            for path in sorted(flat.glob("*.img"))
            if not path.name.startswith("pages-") and path.read_bytes() != (image / path.name).read_bytes()
        ]
        documents = {name: _decoded(flat / name, folder) for name in changed}
        return cls(documents, tuple(sorted(flat.glob("pages-*.img"))), folder)

    def apply(self, image: Path, output: Path) -> tuple[float, float]:
        """Rewrites an image by crit; returns the milliseconds for the files that differ, and for copying the others.

        The edit of the JSON is an assignment, and so for free.

        Raises:
            BenchmarkError: crit has failed.
        """
        started = time.perf_counter()
        output.mkdir()
        document = output / "document.json"
        for name, wanted in self.documents.items():
            crit("decode", image / name, document)
            contents = json.loads(document.read_text())
            contents.update(wanted)
            document.write_text(json.dumps(contents))
            crit("encode", document, output / name)
        document.unlink()
        changed = time.perf_counter()
        for path in image.glob("*.img"):
            if path.name not in self.documents and not path.name.startswith("pages-"):
                shutil.copyfile(path, output / path.name)
        for path in self.pages:
            shutil.copyfile(path, output / path.name)
        return (changed - started) * 1000, (time.perf_counter() - changed) * 1000

    def apply_at_once(self, image: Path, output: Path) -> float:
        """Makes the files that differ once more, all in one run of Python; returns the milliseconds without its start.

        Raises:
            BenchmarkError: crit has failed.
        """
        documents = self.folder / "documents.json"
        documents.write_text(json.dumps(self.documents))
        return float(_python("crit", "-c", _AT_ONCE, str(image), str(output), str(documents)))

    def check(self, output: Path) -> None:
        """Verifies what crit has written: it says the same as dynacut's flat copy, in whatever order of fields.

        Raises:
            BenchmarkError: it does not.
        """
        for name, wanted in self.documents.items():
            if _decoded(output / name, self.folder) != wanted:
                raise BenchmarkError(f"crit has not written {name} as it should")
