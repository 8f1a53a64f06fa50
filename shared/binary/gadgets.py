"""How many ROP gadgets code holds, as ROPgadget counts them: its command line, on the bare bytes.

ROPgadget (BSD-3-Clause) finds the short runs of instructions, aligned to the program's own or not, that end in a
return, an indirect jump or call, or a system call. Each text of instructions counts once; at its default, at most ten
bytes lie before the end.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

from dynacut.shared.binary import module_cache
from dynacut.shared.binary.cache_folder import cache_folder
from dynacut.shared.binary.elf import ElfFile
from dynacut.shared.errors import DynacutError

_COMMAND = (sys.executable, "-c", "import ropgadget; ropgadget.main()")
_ARCHITECTURE = ("--rawArch", "x86", "--rawMode", "64")
_COUNT = re.compile(r"^Unique gadgets found: (\d+)$", re.MULTILINE)
_TIMEOUT = 600
_KIND = module_cache.Kind("gadgets", b"dynagdgt", 1)


def gadgets_of_file(elf: ElfFile, folder: Path | None = None) -> int:
    """The number in the executable segments of a file; counted once for each build, and version of ROPgadget.

    Raises:
        DynacutError: ROPgadget does not run.
    """
    folder = cache_folder() if folder is None else folder
    try:
        version = metadata.version("ROPGadget")
    except metadata.PackageNotFoundError:
        version = ""
    known = re.fullmatch(rb"(\S*) (\d{1,18})", module_cache.load(elf, _KIND, folder) or b"")
    if known is not None and version and known[1] == version.encode():
        return int(known[2])
    count = count_gadgets(b"".join(elf.read(part.offset, part.file_size) for part in elf.segments if part.executable))
    module_cache.store(elf, _KIND, f"{version} {count}".encode(), folder)
    return count


def count_gadgets(code: bytes) -> int:
    """The number of unique gadgets in a stretch of code; some seconds for each megabyte.

    Raises:
        DynacutError: ROPgadget does not run.
    """
    with tempfile.NamedTemporaryFile(prefix="dynacut-code-") as file:
        file.write(code)
        file.flush()
        words = [*_COMMAND, "--binary", file.name, *_ARCHITECTURE]
        done = subprocess.run(
            words, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_TIMEOUT, check=False
        )
    found = _COUNT.search(done.stdout)
    if found is None:
        raise DynacutError(
            "ROPgadget does not count",
            "install it: pip install ROPGadget",
            details=(done.stderr or done.stdout).splitlines()[-1:],
        )
    return int(found[1])
