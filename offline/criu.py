"""CRIU: found, tried out once, and run. Driven by its command line; see criu(8)."""

from __future__ import annotations

import json
import os
import re
import select
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any

from dynacut.offline import processes
from dynacut.shared.binary.cache_folder import cache_folder
from dynacut.shared.errors import DynacutError, printable
from dynacut.shared.proc import tree_of

VARIABLE = "DYNACUT_CRIU"
"""The environment variable that names the CRIU to use."""
_BUILT = Path(__file__).resolve().parents[1] / "build" / "criu" / "criu"  # by `make criu`
_SYSTEM_FOLDERS = ("/usr/local/sbin", "/usr/sbin", "/sbin")  # not in everybody's PATH
_ADVICE = "run `make criu` in dynacut's source folder, or give a CRIU that works by --criu"
_PROBE_TIMEOUT = 30.0
_POLL_SECONDS = 0.2
_CACHE_NAME = "criu.json"
_MAX_CACHE_SIZE = 1 << 16
_MAX_LOG_SIZE = 64 << 20
_MAX_ERRORS = 8
_LOG_ERROR = re.compile(r"^(?:\(\d+\.\d+\))?\s*(?:pie: )?(?:\d+:)?\s*Error (\(.*)$")
_HARMLESS = ("Can't setup RLIMIT_NOFILE for self",)
"""Called errors, but CRIU goes on: without CAP_SYS_RESOURCE it cannot raise its own limit."""
_LOCKS = ("nftables", "iptables", "skip")


@dataclass(frozen=True)
class CriuRun:
    """How a run of CRIU ended. wall_ms: how long it took. errors: the first errors in its log, one a line."""

    succeeded: bool
    timed_out: bool
    interrupted: bool
    wall_ms: float
    errors: tuple[str, ...]

    def says(self, text: str) -> bool:
        """Whether one of the errors has this text."""
        return any(text in error for error in self.errors)


@dataclass(frozen=True)
class Criu:
    """A CRIU that works on this kernel. network_lock: how it keeps packets away while TCP connections are dumped."""

    path: Path
    version: str
    network_lock: str

    def run(
        self,
        action: str,
        directory: Path,
        options: Sequence[str],
        *,
        log: Path,
        timeout: float | None,
        keep_terminal: bool = False,
        on_wait: Callable[[], None] | None = None,
    ) -> CriuRun:
        """Runs ``criu ACTION`` (dump or restore) on an image directory and waits until it ends.

        log: where it writes its log, and beside it its statistics. timeout: seconds; after them, or when interrupted
        (Ctrl-C), it is killed with what it has started. None: it is left to finish in any case, as a dump must be:
        half of one leaves connections blocked, and CRIU's code in the process. keep_terminal: leave it in this
        session with this standard input, as --shell-job needs. on_wait: called now and then meanwhile.

        Raises:
            DynacutError: CRIU cannot be started.
        """
        command = [str(self.path), action, "-D", str(directory.absolute()), "-W", str(log.parent.absolute())]
        command += ["-o", log.name, "-v2", *options]
        started = time.perf_counter()
        process = self._start(command, keep_terminal)
        timed_out, interrupted = _wait(process, timeout, on_wait)
        wall_ms = (time.perf_counter() - started) * 1000
        succeeded = process.returncode == 0 and not timed_out
        errors = () if succeeded else log_errors(log)
        if process.returncode < 0 and not timed_out and not interrupted:
            errors = (*errors, f"CRIU was ended by signal {-process.returncode}")
        return CriuRun(succeeded, timed_out, interrupted, wall_ms, errors)

    def _start(self, command: list[str], keep_terminal: bool) -> subprocess.Popen[bytes]:
        try:
            return subprocess.Popen(
                command,
                stdin=None if keep_terminal else subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=not keep_terminal,
            )
        except OSError as error:
            raise DynacutError(f"{self.path} cannot be started: {error.strerror}", _ADVICE) from None


def _wait(
    process: subprocess.Popen[bytes], timeout: float | None, on_wait: Callable[[], None] | None
) -> tuple[bool, bool]:
    """Waits for a process; returns whether it took too long, and whether somebody pressed Ctrl-C."""
    deadline = time.monotonic() + (inf if timeout is None else timeout)
    timed_out = interrupted = False
    descriptor = os.pidfd_open(process.pid)  # Popen.wait() sleeps up to 50 ms too long
    try:
        while not (timed_out or (interrupted and timeout is not None)):
            try:
                left = max(0.0, deadline - time.monotonic())
                if select.select([descriptor], [], [], min(_POLL_SECONDS, left))[0]:
                    process.wait()
                    return False, interrupted
                timed_out = time.monotonic() >= deadline
                if on_wait is not None:
                    on_wait()
            except KeyboardInterrupt:
                interrupted = True
    finally:
        os.close(descriptor)
    _kill(process)
    return timed_out, interrupted


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Ends CRIU with all that it has started so far: the halves of processes that it was restoring."""
    descendants = tree_of(process.pid)[1:]
    process.kill()
    process.wait()
    processes.end(descendants)


def log_errors(log: Path) -> tuple[str, ...]:
    """The first errors in a log of CRIU's: the causes; what follows are consequences."""
    found: dict[str, None] = {}
    try:
        with log.open(errors="replace") as file:
            for line in file.read(_MAX_LOG_SIZE).splitlines():
                if (match := _LOG_ERROR.match(line)) and not any(text in line for text in _HARMLESS):
                    found[printable(match[1])[:300]] = None
    except OSError:
        return ()
    return tuple(found)[:_MAX_ERRORS]


def find_criu(explicit: Path | None = None) -> Criu:
    """The CRIU to use: the explicit one; else DYNACUT_CRIU's; else the first that works of PATH and `make criu`.

    Whether it works is found out by ``criu check``, once for each binary and kernel.

    Raises:
        DynacutError: there is none that works, with what is wrong with each; or this process is not root's.
    """
    processes.require_root("CRIU")
    problems = []
    for path, origin in _candidates(explicit):
        try:
            return _tried(path)
        except DynacutError as error:
            problems.append(f"{path} ({origin}): {error.problem}")
    if not problems:
        raise DynacutError("there is no CRIU in PATH, nor one made by `make criu`", _ADVICE)
    raise DynacutError("no CRIU works on this machine", _ADVICE, details=problems)


def _candidates(explicit: Path | None) -> Iterator[tuple[Path, str]]:
    named = os.environ.get(VARIABLE)
    if explicit is not None:
        yield _located(str(explicit)), "--criu"
    elif named:
        yield _located(named), VARIABLE
    else:
        folders = os.pathsep.join([os.environ.get("PATH", ""), *_SYSTEM_FOLDERS])
        installed = shutil.which("criu", path=folders)
        if installed is not None:
            yield Path(installed).absolute(), "PATH"
        if _BUILT.exists():
            yield _BUILT, "make criu"


def _located(name: str) -> Path:
    return Path(shutil.which(name) or name).absolute()


def _tried(path: Path) -> Criu:
    """Tries a CRIU out, or remembers that it worked.

    Raises:
        DynacutError: it does not work.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise DynacutError(error.strerror or str(error)) from None
    identity = {"mtime_ns": status.st_mtime_ns, "size": status.st_size, "kernel": os.uname().release}
    known = _read_cache()
    entry = known.get(str(path))
    if isinstance(entry, dict) and identity.items() <= entry.items():
        version, lock = entry.get("version"), entry.get("network_lock")
        if isinstance(version, str) and lock in _LOCKS:
            return Criu(path, version, lock)
    criu = _probe(path)
    _write_cache({**known, str(path): {**identity, "version": criu.version, "network_lock": criu.network_lock}})
    return criu


def _probe(path: Path) -> Criu:
    version = re.search(r"^Version:\s*(\S+)", _output(path, "--version"), re.MULTILINE)
    if version is None:
        raise DynacutError("it does not say its version, as CRIU does")
    _output(path, "check")
    lock = "nftables"
    try:
        _output(path, "check", "--feature", "network_lock_nftables")
    except DynacutError:
        lock = "iptables" if shutil.which("iptables-restore") else "skip"
    return Criu(path, version[1], lock)


def _output(path: Path, *arguments: str) -> str:
    """What CRIU prints.

    Raises:
        DynacutError: it cannot be run, or says that something is wrong.
    """
    try:
        done = subprocess.run(
            [path, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=_PROBE_TIMEOUT,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise DynacutError(f"`criu {' '.join(arguments)}` does not end") from None
    except OSError as error:
        raise DynacutError(f"it cannot be run: {error.strerror}") from None
    output = done.stdout.decode(errors="replace")
    if done.returncode != 0:
        lines = [line.strip() for line in output.splitlines() if line.strip()]
        errors = [match[1] for line in lines if (match := _LOG_ERROR.match(line))]
        reason = (errors or lines[-1:] or [_ending(done.returncode)])[0]
        raise DynacutError(f"`criu {' '.join(arguments)}` fails: {reason}")
    return output


def _ending(code: int) -> str:
    return f"exit status {code}" if code >= 0 else f"ended by {signal.Signals(-code).name}"


def _read_cache() -> dict[str, Any]:
    """What is remembered, by path; nothing if there is nothing to be trusted."""
    try:
        descriptor = os.open(cache_folder() / _CACHE_NAME, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if status.st_uid != os.geteuid() or status.st_mode & 0o022:
                return {}
            known = json.loads(file.read(_MAX_CACHE_SIZE))
    except (OSError, ValueError, RecursionError):
        return {}
    return known if isinstance(known, dict) else {}


def _write_cache(known: dict[str, Any]) -> None:
    """Remembers; a folder that cannot be written to is no error."""
    folder = cache_folder()
    with suppress(OSError):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=f".{_CACHE_NAME}.", dir=folder)
        try:
            with os.fdopen(descriptor, "w") as file:
                json.dump(known, file)
            Path(name).replace(folder / _CACHE_NAME)
        except OSError:
            Path(name).unlink(missing_ok=True)
