"""dynacut doctor with each piece taken away in turn: it names it, what that costs, and how to mend it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import dynacut.cli.doctor
import dynacut.offline.diagnosis
import dynacut.shared.diagnosis  # what dynacut imports when it is needed, somebody else may not be able to read
from dynacut.handlers.blob import handler_code
from dynacut.live import admission, diagnosis
from dynacut.offline.criu import VARIABLE

from .checkpoints import NOBODY, the_criu
from .conftest import Dynacut
from .programs import compile_program
from .test_kill import start


def piece(report: dict[str, Any], name: str) -> dict[str, str]:
    (check,) = [each for each in report["checks"] if each["name"] == name]
    return dict(check)


def lacks(report: dict[str, Any], name: str, state: str, costs: str, mend: str) -> dict[str, str]:
    """The piece has this state, with these words."""
    check = piece(report, name)
    assert check["state"] == state
    assert costs in check["costs"] and mend in check["mend"]
    return check


def run_as(*wrapper: str | Path) -> tuple[int, dict[str, Any]]:
    """Runs `dynacut doctor` by another command; its exit status and document."""
    command = [*wrapper, sys.executable, "-m", "dynacut.cli.main", "doctor", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout, done.stderr
    report = json.loads(done.stdout)
    assert isinstance(report, dict)
    return done.returncode, report


def folder_with(path: Path, *names: str) -> str:
    """A PATH with these programs only."""
    path.mkdir()
    for name in names:
        found = shutil.which(name)
        assert found is not None
        (path / name).symlink_to(found)
    return str(path)


def test_a_machine_with_all_of_it(dynacut: Dynacut) -> None:
    criu = the_criu()
    started = time.perf_counter()
    report = dynacut.json("doctor")
    assert time.perf_counter() - started < 10  # well below one second on a machine that does nothing else
    assert report["works"]["live"] and report["works"]["checkpoint"]
    for name in ("kernel", "ptrace", "/proc/PID/mem", "user", "gdb", "CRIU", "handler", "compiler"):
        assert piece(report, name)["state"] == "ok"
    assert piece(report, "CRIU")["found"] == f"{criu.version}, {criu.path}; criu check passed"
    version = subprocess.run(["gdb", "--version"], capture_output=True, text=True, check=True).stdout.split("\n")[0]
    assert version.split()[-1] in piece(report, "gdb")["found"]
    shown = dynacut("doctor")
    assert shown.returncode == 0
    assert shown.stdout.splitlines()[0] == "FOR\tPIECE\tSTATE\tFOUND"
    assert "live: works" in shown.stdout.splitlines()[-1]


def test_without_gdb(dynacut: Dynacut, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", folder_with(tmp_path / "bin", "gcc", "objcopy"))
    report = dynacut.json("doctor")
    lacks(report, "gdb", "missing", "--engine gdb", "apt-get install gdb")
    lacks(report, "gdbserver", "missing", "--remote", "apt-get install gdbserver")
    assert report["works"]["live"] is True and report["works"]["gdb"] is False
    shown = dynacut("doctor")
    assert shown.returncode == 0
    assert "gdb (missing): `--engine gdb` does not work\n  to mend: apt-get install gdb\n" in shown.stdout
    assert "gdb: does not work" in shown.stdout.splitlines()[-1]


def test_with_a_gdb_of_old(dynacut: Dynacut, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It says its version, and knows nothing of the machine interface that is spoken with it."""
    folder = folder_with(tmp_path / "bin", "gcc", "objcopy")
    old = Path(folder, "gdb")
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo GNU gdb 7.2 || exit 1\n')
    old.chmod(0o755)
    monkeypatch.setenv("PATH", folder)
    report = dynacut.json("doctor")
    check = lacks(report, "gdb", "missing", "--engine gdb", "install gdb 9 or newer")
    assert check["found"] == f"7.2, {old}: too old"
    assert report["works"]["live"] is True and report["works"]["gdb"] is False


def test_without_a_compiler(dynacut: Dynacut, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", folder_with(tmp_path / "bin", "objcopy"))
    check = lacks(dynacut.json("doctor"), "compiler", "limited", "cannot be installed from source", "install gcc")
    assert check["found"] == "no gcc in PATH"


def test_without_criu(dynacut: Dynacut, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No PATH and no `make criu`; then one that is there, and does not work."""
    monkeypatch.setattr("dynacut.offline.criu._BUILT", tmp_path / "criu")
    monkeypatch.setattr("dynacut.offline.criu._SYSTEM_FOLDERS", ())
    monkeypatch.setenv("PATH", folder_with(tmp_path / "bin", "gcc", "objcopy"))
    monkeypatch.delenv(VARIABLE, raising=False)
    status, out, _ = start("doctor", "--json").result()
    report = json.loads(out)
    check = lacks(report, "CRIU", "missing", "no checkpoint can be made", "make criu")
    assert check["found"].startswith("there is no CRIU in PATH")
    assert (status, report["works"]["live"], report["works"]["checkpoint"]) == (0, True, False)
    monkeypatch.setenv(VARIABLE, "/bin/true")
    check = lacks(dynacut.json("doctor"), "CRIU", "missing", "no checkpoint can be made", "make criu")
    assert f"/bin/true ({VARIABLE}): it does not say its version" in check["found"]


def test_as_somebody_else() -> None:
    assert dynacut.cli.doctor and dynacut.offline.diagnosis and dynacut.shared.diagnosis and handler_code()
    status, out, errors = start("doctor", "--json", uid=NOBODY).result()
    assert status == 0, errors  # patching processes of one's own works
    report = json.loads(out)
    check = lacks(report, "user", "limited", "only processes of this user", "as root")
    assert check["found"] == f"uid {NOBODY}, not root"
    for name in ("CAP_SYS_PTRACE", "CAP_SYS_ADMIN", "CAP_SYS_RESOURCE", "CAP_CHECKPOINT_RESTORE"):
        lacks(report, name, "limited", "", "as root")
    lacks(report, "/proc/PID/map_files", "limited", "was replaced", "as root")
    lacks(report, "real-time priority", "limited", "a stop may take", "CAP_SYS_NICE")
    assert "needs root" in piece(report, "CRIU")["found"]
    assert report["works"] | {"gdb": None} == {"live": True, "checkpoint": False, "gdb": None}


@pytest.mark.parametrize(
    ("name", "costs"),
    [
        ("CAP_SYS_PTRACE", "other users"),
        ("CAP_SYS_ADMIN", "neither dump nor restore"),
        ("CAP_SYS_RESOURCE", "only root's own"),
        ("CAP_CHECKPOINT_RESTORE", "CAP_SYS_ADMIN"),
    ],
)
def test_without_a_capability(name: str, costs: str) -> None:
    short = name.removeprefix("CAP_").lower()
    _, report = run_as("setpriv", "--bounding-set", f"-{short}", "--inh-caps", f"-{short}")
    lacks(report, name, "limited", costs, "dynacut")


def test_under_a_seccomp_filter_that_forbids_ptrace(tmp_path: Path) -> None:
    status, report = run_as(compile_program("confined", tmp_path))
    assert (status, report["works"]["live"]) == (1, False)
    check = lacks(report, "ptrace", "missing", "nothing can be patched live", "outside of the container")
    assert os.strerror(1) in check["found"]
    lacks(report, "seccomp", "limited", "may forbid ptrace", "outside of the container")


@pytest.mark.parametrize("scope", [1, 2, 3])
def test_yamas_refusal(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, scope: int) -> None:
    """No Yama in the test machine's kernel: its setting is a file of ours."""
    setting = tmp_path / "ptrace_scope"
    setting.write_text(f"{scope}\n")
    tmp_path.chmod(0o755)
    real = admission.yama_scope
    monkeypatch.setattr(diagnosis, "yama_scope", lambda: real(setting))
    status, out, _ = start("doctor", "--json").result()
    check = piece(json.loads(out), "Yama")
    assert check["found"] == f"ptrace_scope {scope}"
    if scope == 3:
        assert status == 1
        lacks(json.loads(out), "Yama", "missing", "root's too", "/etc/sysctl.d")
    else:
        assert (status, check["state"]) == (0, "ok")  # root may
