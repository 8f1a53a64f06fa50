"""crit's way to a rewritten image: its files turned into JSON, changed there, and turned back.

crit is fetched with CRIU's source (tools/criu.sh crit). Each file is a run of it, as in a script around it.
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


def has_crit() -> bool:
    """Whether it has been fetched."""
    return (_FOLDER / "crit" / "__main__.py").exists()


def crit(action: str, source: Path, output: Path) -> None:
    """Decodes an image file to JSON, or encodes it.

    Raises:
        BenchmarkError: it failed.
    """
    environment = os.environ | {"PYTHONPATH": str(_FOLDER)}
    command = [sys.executable, "-m", "crit", action, "-i", str(source), "-o", str(output)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=_TIMEOUT, check=False)
    if done.returncode != 0:
        raise BenchmarkError(f"crit {action} of {source.name} failed: {done.stderr.strip()}")


@dataclass(frozen=True)
class Edit:
    """What crit is to make of an image: the decoded contents of the files that differ, and the pages files."""

    documents: dict[str, Any]
    pages: tuple[Path, ...]

    @classmethod
    def of(cls, image: Path, flat: Path, folder: Path) -> Edit:
        """From a flat copy that dynacut has made of the image."""
        changed = [
            path.name
            for path in sorted(flat.glob("*.img"))
            if not path.name.startswith("pages-") and path.read_bytes() != (image / path.name).read_bytes()
        ]
        documents = {}
        for name in changed:
            crit("decode", flat / name, folder / "decoded.json")
            documents[name] = json.loads((folder / "decoded.json").read_text())
        return cls(documents, tuple(sorted(flat.glob("pages-*.img"))))

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
