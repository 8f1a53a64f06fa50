"""Builds trap.bin, the handler that is mapped into targets, from trap.c and trap.ld.

Run by setup.py, by `make`, or by hand (`python3 handlers/build.py`): it needs gcc and binutils, nothing of
dynacut.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

COMPILE = [
    "-std=c11",
    "-Os",
    # Code that stands alone, wherever it is mapped.
    "-ffreestanding",
    "-nostdlib",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-stack-protector",
    "-fno-asynchronous-unwind-tables",
    # It runs on other code's stack and leaves the floating-point and vector registers alone.
    "-mno-red-zone",
    "-mgeneral-regs-only",
    "-fcf-protection=none",
    "-Wall",
    "-Wextra",
    "-Werror",
]
LINK = ["-static", "-Wl,--build-id=none", "-Wl,-z,noexecstack"]


class BuildError(Exception):
    """The handler cannot be built; the message is one line, or the compiler's own words."""


def _run(command: list[str], package: str) -> None:
    try:
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    except FileNotFoundError:
        raise BuildError(f"{command[0]} is missing: install it (Debian: apt-get install {package})") from None
    except subprocess.CalledProcessError as error:
        raise BuildError(f"{shlex.join(command)} failed:\n{error.stderr.rstrip()}") from None


def build(source_dir: Path, output: Path) -> None:
    """Compiles source_dir/trap.c, links it by trap.ld there and writes the flat binary to output, atomically.

    $CC names another compiler than gcc, $OBJCOPY another objcopy; either may hold options.

    Raises:
        BuildError: a tool is missing or reports an error; output is as it was.
    """
    compiler = shlex.split(os.environ.get("CC", "")) or ["gcc"]
    objcopy = shlex.split(os.environ.get("OBJCOPY", "")) or ["objcopy"]
    source_dir = source_dir.resolve()
    with tempfile.TemporaryDirectory(prefix="dynacut-build-") as name:
        program, flat = Path(name, "trap.elf"), Path(name, "trap.bin")
        script = f"-Wl,-T,{source_dir / 'trap.ld'}"
        source = str(source_dir / "trap.c")
        _run([*compiler, *COMPILE, *LINK, script, "-o", str(program), source], "gcc libc6-dev")
        _run([*objcopy, "-O", "binary", str(program), str(flat)], "binutils")
        code = flat.read_bytes()
    output.parent.mkdir(parents=True, exist_ok=True)
    # Renaming is atomic within one file system only, so the last step starts beside the output.
    descriptor, beside = tempfile.mkstemp(prefix=f".{output.name}.", dir=output.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(code)
            os.fchmod(file.fileno(), 0o644)
        Path(beside).replace(output)
    except BaseException:
        Path(beside).unlink(missing_ok=True)
        raise


def main() -> int:
    """Builds trap.bin beside its sources."""
    here = Path(__file__).resolve().parent
    try:
        build(here, here / "trap.bin")
    except (BuildError, OSError) as error:
        print(f"handlers/build.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
