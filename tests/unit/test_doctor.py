"""What dynacut doctor says of pieces that are there, limited or missing; none of it needs privileges."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dynacut.cli.main import main
from dynacut.handlers import blob
from dynacut.live.admission import yama_scope
from dynacut.live.diagnosis import yama
from dynacut.offline import diagnosis as offline
from dynacut.offline.reaping import service_in
from dynacut.shared import diagnosis
from dynacut.shared.diagnosis import Area, Finding, State, basis, program, works

Capture = pytest.CaptureFixture[str]


def finding(findings: list[Finding], name: str) -> Finding:
    (found,) = [each for each in findings if each.name == name]
    assert (found.costs and found.mend) or found.state is State.OK
    return found


@pytest.mark.parametrize(
    ("content", "may_trace", "state", "costs"),
    [
        (None, False, State.OK, ""),
        ("0\n", False, State.OK, ""),
        ("1\n", True, State.OK, ""),
        ("1\n", False, State.LIMITED, "only descendants"),
        ("2\n", True, State.OK, ""),
        ("2\n", False, State.MISSING, "CAP_SYS_PTRACE"),
        ("3\n", True, State.MISSING, "root's too"),
        ("no number", False, State.OK, ""),
    ],
)
def test_yama(tmp_path: Path, content: str | None, may_trace: bool, state: State, costs: str) -> None:
    setting = tmp_path / "ptrace_scope"
    if content is not None:
        setting.write_text(content)
    found = yama(yama_scope(setting), may_trace=may_trace)
    assert found.state is state and costs in found.costs
    assert works([found], Area.LIVE) is (state is not State.MISSING)


def test_programs_that_are_not_there_or_do_not_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    absent = program("gdb", Area.GDB, costs="no engine", package="gdb")
    assert (absent.state, absent.found, absent.mend) == (State.MISSING, "not in PATH", "apt-get install gdb")
    tool = tmp_path / "gdb"
    tool.write_text("#!/bin/sh\necho GNU gdb '(Some 13.1-3)' 13.1\n")
    tool.chmod(0o755)
    assert program("gdb", Area.GDB, costs="", package="gdb").found == f"13.1, {tool}"
    tool.write_text("#!/bin/sh\nexit 1\n")
    assert program("gdb", Area.GDB, costs="no engine", package="gdb").state is State.MISSING
    tool.write_text("#!/nonexistent/interpreter\n")
    assert "cannot be run" in program("gdb", Area.GDB, costs="no engine", package="gdb").found


def test_the_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.delenv("OBJCOPY", raising=False)
    assert finding(basis(), "compiler").state is State.OK
    monkeypatch.setenv("PATH", str(tmp_path))
    compiler = finding(basis(), "compiler")
    assert (compiler.state, compiler.mend) == (State.LIMITED, "apt-get install gcc binutils")
    assert works(basis(), Area.LIVE)  # what is installed works
    monkeypatch.setenv("CC", "/bin/sh -c")
    assert finding(basis(), "compiler").mend == "apt-get install binutils"


def test_a_handler_that_was_not_built(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert finding(basis(), "handler").state is State.OK
    blob.handler_code.cache_clear()
    monkeypatch.setattr(blob, "__file__", str(tmp_path / "blob.py"))
    missing = finding(basis(), "handler")
    assert missing.state is State.MISSING and "pip install" in missing.mend
    assert not any(works([missing], area) for area in Area)


def test_debug_files_and_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(diagnosis, "DEBUG_ROOT", tmp_path)
    assert finding(basis(), "debug files").state is State.LIMITED
    (tmp_path / ".build-id").mkdir()
    assert finding(basis(), "debug files").state is State.OK
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "not" / "yet"))
    assert finding(basis(), "cache").state is State.OK
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert finding(basis(), "cache").state is State.LIMITED


@pytest.mark.parametrize(("lock", "state"), [("nftables", "ok"), ("iptables", "limited"), ("skip", "limited")])
def test_the_network_lock(lock: str, state: str) -> None:
    assert offline._network_lock(lock).state == state


def test_the_place_of_crius_cache() -> None:
    line = "{} 28 0:25 / {} rw,nosuid shared:5 - {} none rw\n"
    root = line.format(28, "/", "ext4")
    assert offline._kernel_cache(root).state is State.LIMITED
    assert offline._kernel_cache(root + line.format(30, "/run", "tmpfs")).state is State.OK
    assert offline._kernel_cache(root + line.format(30, "/run", "overlay")).found == "/run is overlay, not tmpfs"


def test_the_service_of_a_control_group() -> None:
    assert service_in(["0::/system.slice/redis.service"]) == "redis.service"
    assert service_in(["4:cpu:/other.service", "1:name=systemd:/system.slice/nginx.service"]) == "nginx.service"
    assert service_in(["0::/user.slice/user-0.slice/session-1.scope"]) == ""
    assert service_in(["4:cpu:/a.service", "0::/"]) == ""


def test_the_document(capsys: Capture) -> None:
    status = main(["doctor", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert report["schema"] == 1 and set(report["works"]) == {"live", "gdb", "checkpoint"}
    assert status == (0 if report["works"]["live"] else 1)
    for check in report["checks"]:
        assert set(check) == {"name", "area", "state", "found", "costs", "mend"}
        assert check["state"] == "ok" or (check["costs"] and check["mend"])
