"""Which CRIU is taken, and what is said of those that are not. The programs here only begin as CRIU does."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dynacut.offline import criu as criu_module
from dynacut.offline import processes
from dynacut.offline.criu import VARIABLE, find_criu, log_errors
from dynacut.shared.binary.cache_folder import cache_folder
from dynacut.shared.errors import DynacutError

VDSO = "Error (criu/vdso.c:269): vdso: Unexpected rt vDSO area bounds"


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No CRIU anywhere, nothing remembered, and no root needed: nothing here is more than a shell script."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(criu_module, "_BUILT", tmp_path / "no" / "criu")
    monkeypatch.setattr(criu_module, "_SYSTEM_FOLDERS", ())
    monkeypatch.setattr(processes, "require_root", lambda _: None)


def script(path: Path, *, check: str = "exit 0", lock: str = "exit 0", version: str = "Version: 4.2.1") -> Path:
    """A program; each time it is asked whether it works, it writes a line to NAME.calls."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(
        f"""#!/bin/sh
case "$*" in
--version) echo '{version}' ;;
check) echo check >>{path}.calls; {check} ;;
*) {lock} ;;
esac
"""
    )
    path.chmod(0o755)
    return path


def calls(path: Path) -> int:
    return len(Path(f"{path}.calls").read_text().splitlines())


def refusal(explicit: Path | None = None) -> DynacutError:
    with pytest.raises(DynacutError) as caught:
        find_criu(explicit)
    assert "make criu" in caught.value.advice
    return caught.value


def test_the_order(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    explicit, named, installed, built = (script(tmp_path / name / "criu") for name in ("a", "b", "c", "d"))
    assert "there is no CRIU" in refusal().problem
    monkeypatch.setattr(criu_module, "_BUILT", built)
    assert find_criu().path == built
    monkeypatch.setenv("PATH", str(installed.parent))
    assert find_criu().path == installed
    monkeypatch.setenv(VARIABLE, str(named))
    assert find_criu().path == named
    assert find_criu(explicit).path == explicit


def test_one_that_does_not_work_is_passed_over(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = script(tmp_path / "old" / "criu", check=f"echo '{VDSO}'; echo 'later error'; exit 1")
    monkeypatch.setenv("PATH", str(broken.parent))
    error = refusal()
    assert error.details == (f"{broken} (PATH): `criu check` fails: {VDSO.removeprefix('Error ')}",)
    built = script(tmp_path / "built" / "criu")
    monkeypatch.setattr(criu_module, "_BUILT", built)
    assert find_criu().path == built


def test_what_was_asked_for_is_not_replaced(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(criu_module, "_BUILT", script(tmp_path / "built" / "criu"))
    missing = tmp_path / "missing"
    assert refusal(missing).details == (f"{missing} (--criu): No such file or directory",)
    monkeypatch.setenv(VARIABLE, str(missing))
    assert refusal().details == (f"{missing} ({VARIABLE}): No such file or directory",)


def test_every_problem_is_told(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("not a program")
    assert "it cannot be run: Permission denied" in refusal(text).details[0]
    assert "it cannot be run: " in refusal(tmp_path).details[0]
    other = script(tmp_path / "other", version="another program 1.0")
    assert "does not say its version" in refusal(other).details[0]
    silent = script(tmp_path / "silent", check="exit 3")
    assert "`criu check` fails: exit status 3" in refusal(silent).details[0]
    killed = script(tmp_path / "killed", check="kill -SEGV $$")
    assert "`criu check` fails: ended by SIGSEGV" in refusal(killed).details[0]


def test_the_network_lock(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert find_criu(script(tmp_path / "with")).network_lock == "nftables"
    without = script(tmp_path / "without", lock="exit 1")
    assert find_criu(without).network_lock == "skip"
    script(tmp_path / "bin" / "iptables-restore")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert find_criu(script(tmp_path / "third", lock="exit 1")).network_lock == "iptables"


def test_it_is_tried_once_for_each_binary_and_kernel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = script(tmp_path / "criu")
    other = script(tmp_path / "other", version="Version: 5.0")
    found = find_criu(path)
    assert (found.version, calls(path)) == ("4.2.1", 1)
    assert find_criu(other).version == "5.0"
    assert find_criu(path) == found
    assert calls(path) == 1
    os.utime(path, (1, 1))
    find_criu(path)
    assert calls(path) == 2
    kernel = os.uname()
    monkeypatch.setattr(os, "uname", lambda: os.uname_result((kernel[0], kernel[1], "9.0.0", kernel[3], kernel[4])))
    find_criu(path)
    assert calls(path) == 3


def test_a_failure_is_not_remembered(tmp_path: Path) -> None:
    path = script(tmp_path / "criu", check="exit 1")
    refusal(path)
    refusal(path)
    assert calls(path) == 2


@pytest.mark.parametrize(
    "damage", [b"", b"[]", b"{", b"\xff", b"[" * 20000, b'{"PATH": {"version": 1}}', b'{"PATH": 5}']
)
def test_a_damaged_memory_is_no_error(tmp_path: Path, damage: bytes) -> None:
    path = script(tmp_path / "criu")
    find_criu(path)
    memory = cache_folder() / "criu.json"
    memory.write_bytes(damage.replace(b"PATH", bytes(path)))
    assert find_criu(path).version == "4.2.1"
    assert calls(path) == 2
    find_criu(path)
    assert calls(path) == 2  # and it was replaced


def test_what_others_could_have_written_is_not_believed(tmp_path: Path) -> None:
    path = script(tmp_path / "criu")
    find_criu(path)
    (cache_folder() / "criu.json").chmod(0o666)
    find_criu(path)
    assert calls(path) == 2


def test_without_a_cache_folder_it_is_tried_each_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    path = script(tmp_path / "criu")
    find_criu(path)
    find_criu(path)
    assert calls(path) == 2


def test_the_first_errors_of_a_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert log_errors(log) == ()
    lines = [
        "(00.000001) Warn  (criu/x.c:1): no",
        "(00.018209)  24507: Error (criu/v.c:9): timed",
        " 24507: Error (criu/y.c:2): bad\x1b[2J thing",
    ]
    lines += ["Error (criu/z.c:3): without a time", *(f"(00.1) Error (criu/w.c:{n}): more" for n in range(20))]
    log.write_text("\n".join(lines))
    errors = log_errors(log)
    assert errors[:3] == ("(criu/v.c:9): timed", "(criu/y.c:2): bad\\x1b[2J thing", "(criu/z.c:3): without a time")
    assert len(errors) == 8


def test_it_needs_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(DynacutError, match="CRIU needs root"):
        find_criu()
