"""dynacut trace as it is used: keys, conditions, signals, daemons; whatever ends it, no block stays armed."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dynacut.live.process import Process
from dynacut.live.tracing.trace import armed_blocks, has_trace
from dynacut.shared.coverage.drcov import read_log

from .conftest import Dynacut
from .programs import compile_program
from .servers import Redis, become_subreaper, is_gone, is_running, wait_until
from .tracer import Tracer
from .untouched import Snapshot


class Terminal:
    """A dynacut command on a terminal of its own."""

    def __init__(self, *arguments: str | int | Path) -> None:
        self._ours, theirs = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "dynacut.cli.main", *map(str, arguments)],
            stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
            env=os.environ | {"TERM": "xterm"},
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # or Ctrl-C would be a letter
        )  # fmt: skip
        os.close(theirs)
        self.shown = ""

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._ours)

    def type(self, text: str) -> None:
        os.write(self._ours, text.encode())

    def await_text(self, pattern: str) -> str:
        """Waits until what is shown, from here on, has something like that; returns it."""
        until = time.monotonic() + 240
        while (found := re.search(pattern, self.shown)) is None:
            assert select.select([self._ours], [], [], max(0.0, until - time.monotonic()))[0], self.shown
            try:
                self.shown += os.read(self._ours, 65536).decode(errors="replace")
            except OSError:
                raise AssertionError(f"it ended: {self.shown}") from None
        self.shown = self.shown[found.end() :]
        return found[0]


def is_untraced(pid: int) -> bool:
    with Process(pid) as process:
        return not has_trace(process) and armed_blocks(process) == 0


def test_keys_begin_phases_and_the_line_says_what_is_found_where(redis: Redis, tmp_path: Path) -> None:
    log = tmp_path / "redis.drcov"
    options = ("--module", "redis-server", "--module", "libcrypto")
    with Terminal("trace", "--pid", redis.pid, "-o", log, "--phase-name", "warm", *options) as terminal:
        terminal.await_text(r"blocks of process .* armed; phase warm; Ctrl-C ends")
        redis.command("GET", "key")
        terminal.await_text(r"phase warm: [\d,]+ blocks \(redis-[a-z-]+ [\d,]+.*\), [\d,]+ new per second")
        terminal.await_text(r"nothing new for \d+ s")
        terminal.type("with a blank\n")
        terminal.await_text("is no name for a phase")
        terminal.type("wanted\n")
        terminal.await_text("phase wanted begins")
        redis.command("SET", "key", "value")
        terminal.type("\n")
        terminal.await_text(r"phase wanted: [1-9].*; phase phase3 begins")
        terminal.type("\x03")  # what the Ctrl and C keys send
        terminal.await_text("→")
        assert terminal.process.wait(240) == 0
    assert is_untraced(redis.pid)
    counts = {
        phase: read_log(tmp_path / f"redis.{phase}.drcov").coverage.count for phase in ("warm", "wanted", "phase3")
    }
    assert counts["warm"] > 50 and counts["wanted"] > 50


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_it_at_any_instant_with_everything_put_back(redis: Redis, tmp_path: Path, number: int) -> None:
    before = Snapshot.of(redis.pid)
    log = tmp_path / "redis.drcov"
    for armed in (True, False):
        with Tracer("--pid", redis.pid, "-o", log) as tracer:
            if armed:
                tracer.await_line("armed")
            else:  # amid of arming: the table is there, and not all is armed
                wait_until(lambda: _is_begun(redis.pid), "the trace", 240)
            tracer.process.send_signal(number)
            tracer.process.send_signal(number)
            _, errors = tracer.process.communicate(timeout=240)
        assert tracer.process.returncode == 0, errors
        assert is_untraced(redis.pid)
        assert Snapshot.of(redis.pid) == before
        assert read_log(log).coverage.modules[0].path.endswith("redis-check-rdb")
    assert redis.command("PING") == "PONG"


def _is_begun(pid: int) -> bool:
    with Process(pid) as process:
        return has_trace(process)


def test_what_is_asked_for_from_elsewhere_has_begun_when_the_command_returns(
    redis: Redis, dynacut: Dynacut, tmp_path: Path
) -> None:
    """No need to look at the trace's terminal: the next request belongs to the phase."""
    log = tmp_path / "redis.drcov"
    with Tracer("--pid", redis.pid, "-o", log, "--phase-name", "p0") as tracer:
        tracer.await_line("armed")
        for number in range(1, 5):
            done = dynacut("trace", "--pid", redis.pid, "--phase", f"p{number}")
            assert done.returncode == 0, done.stderr
            assert re.fullmatch(rf"phase p{number - 1}: [\d,]+ blocks; phase p{number} begins\n", done.stdout)
            redis.command("OBJECT", "HELP")
        tracer.end()
    (entry,) = (
        int(line.split()[0], 16)
        for line in subprocess.run(
            ["nm", "-D", "/usr/bin/redis-check-rdb"], capture_output=True, text=True, check=True
        ).stdout.splitlines()
        if line.endswith(" objectCommand")
    )
    for number in range(1, 5):
        assert entry in read_log(tmp_path / f"redis.p{number}.drcov").coverage.modules[0].blocks


def test_it_ends_by_itself_when_nothing_new_comes_or_the_time_is_over(
    redis: Redis, dynacut: Dynacut, tmp_path: Path
) -> None:
    log = tmp_path / "redis.drcov"
    for option in (("--until-quiet", "0.5"), ("--for", "0.5")):
        (phase,) = dynacut.json("trace", "--pid", redis.pid, "-o", log, *option)["phases"]
        assert phase["blocks"] == read_log(log).coverage.count > 10, "redis looks at its clients ten times a second"
        assert is_untraced(redis.pid)
    with Tracer("--pid", redis.pid, "-o", log, "--until-exit") as tracer:
        tracer.await_line("armed")
        redis.command("GET", "key")
        redis._process.terminate()  # type: ignore[union-attr]
        tracer.process.communicate(timeout=240)
        assert tracer.process.returncode == 0
    assert read_log(log).coverage.count > 50


@pytest.mark.parametrize("is_named", [True, False])
def test_a_line_of_its_log_says_that_a_program_is_ready(
    files: tuple[Path, Path], tmp_path: Path, is_named: bool
) -> None:
    """Named, or the file that its output goes to; a line of an earlier run does not count."""
    said = tmp_path / "output"
    said.write_text("in the background\n")
    ready = ("--ready-log", said, "^in the back") if is_named else ("--ready-log", "^in the back")
    program = compile_program("daemon", tmp_path)
    told = tmp_path / "told"
    with said.open("a") as output, told.open("w") as errors:  # no pipes: the daemon keeps their other ends open
        status = subprocess.run(
            [sys.executable, "-m", "dynacut.cli.main", "trace", "-o", tmp_path / "log.drcov", *map(str, ready),
             "--until-quiet", "0.5", "--", program, *files],
            stdin=subprocess.DEVNULL, stdout=output, stderr=errors, timeout=240, check=False,
        ).returncode  # fmt: skip
    assert status == 0, told.read_text()
    assert "phase serving begins" in told.read_text()
    start, serving = (read_log(tmp_path / f"log.{phase}.drcov").coverage for phase in ("start", "serving"))
    assert start.count > serving.count > 0


@pytest.fixture
def files(tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """The daemon's PID_FILE and WORK_FILE; it ends with the test."""
    become_subreaper()
    yield tmp_path / "pid", tmp_path / "work"
    end_daemon(tmp_path / "pid")


def end_daemon(pid_file: Path) -> None:
    if pid_file.exists():
        pid = int(pid_file.read_text())
        pid_file.unlink()
        wait_until(lambda: is_gone(pid), "the daemon's end")


def work(file: Path) -> None:
    file.touch()
    wait_until(lambda: not file.exists(), "the daemon's work")


def test_a_daemon_is_traced_when_its_first_process_has_ended(
    files: tuple[Path, Path], dynacut: Dynacut, tmp_path: Path
) -> None:
    """What it leaves is nobody's child that dynacut knows; it shares the counters all the same."""
    program = compile_program("daemon", tmp_path)
    with Tracer("-o", tmp_path / "log.drcov", "--", program, *files) as tracer:
        first = tracer.await_line("armed").partition("process ")[2].split()[0]
        wait_until(files[0].exists, "the daemon", 240)
        pid = int(files[0].read_text())
        work(files[1])
        assert not is_running(int(first))
        assert dynacut("trace", "--pid", first, "--phase", "second").returncode == 0
        assert not is_untraced(pid)
        work(files[1])
        tracer.end()
    assert is_untraced(pid)
    first_log, second = (read_log(tmp_path / f"log.{phase}.drcov").coverage for phase in ("start", "second"))
    worked = first_log.intersection(second)
    assert worked.count > 3, "the blocks of work() are in both"
    work(files[1])


@pytest.mark.parametrize("is_ended", [False, True])
def test_a_program_runs_on_or_is_ended_on_demand(files: tuple[Path, Path], tmp_path: Path, is_ended: bool) -> None:
    """The daemon that the program has become, which no job control of a shell knows."""
    program = compile_program("daemon", tmp_path)
    end = ["--end"] if is_ended else []
    with Tracer("-o", tmp_path / "log.drcov", "--json", *end, "--", program, *files) as tracer:
        wait_until(files[0].exists, "the daemon", 240)
        pid = int(files[0].read_text())
        tracer.process.send_signal(signal.SIGINT)
        output, errors = tracer.process.communicate(timeout=240)
    assert json.loads(output.splitlines()[-1])["left_running"] == ([] if is_ended else [pid])
    assert (f"{program} runs on, no longer traced; to end it: kill {pid}\n" in errors) is not is_ended
    assert is_running(pid) is not is_ended


def test_a_child_outlives_its_traced_parent(files: tuple[Path, Path], tmp_path: Path) -> None:
    """The tracer is killed, the parent has ended: the blocks of the child heal themselves, one by one."""
    program = compile_program("daemon", tmp_path)
    with Tracer("-o", tmp_path / "log.drcov", "--", program, *files) as tracer:
        tracer.await_line("armed")
        wait_until(files[0].exists, "the daemon", 240)
        os.kill(tracer.process.pid, signal.SIGKILL)
        tracer.process.wait()
    pid = int(files[0].read_text())
    for _ in range(3):
        work(files[1])
    assert not is_untraced(pid)


def test_what_a_killed_tracer_left_is_taken_out_however_long_that_takes(
    redis: Redis, dynacut: Dynacut, tmp_path: Path
) -> None:
    """The timeout is for threads that do not stop, not for writing 84,000 bytes on a busy machine."""
    before = Snapshot.of(redis.pid)
    with Tracer("--pid", redis.pid, "-o", tmp_path / "redis.drcov") as tracer:
        tracer.await_line("armed")
    assert not is_untraced(redis.pid)
    report = dynacut.json("live", "--pid", redis.pid, "--undo", "--timeout", "0.5")
    assert report["changed"] is True
    assert is_untraced(redis.pid)
    assert Snapshot.of(redis.pid) == before


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--ready-log", "(["), "is no regular expression"),
        (("--ready-log", "a", "b", "c"), "--ready-log takes a file and a regular expression"),
        (("--ready-port", "70000"), "is no TCP port"),
        (("--until-exit", "--for", "1"), "--until-exit excludes"),
        (("--module", "x", "--all-modules"), "exclude each other"),
        (("--for", "nan"), "seconds from 0 up"),
        (("--normalise",), "--normalise belongs to"),
        (("--phase-name", "a/b"), "is no name for a phase"),
    ],
)
def test_wrong_usage_is_said_before_anything_is_done(
    redis: Redis, dynacut: Dynacut, tmp_path: Path, options: tuple[str, ...], said: str
) -> None:
    done = dynacut("trace", "--pid", redis.pid, "-o", tmp_path / "x", *options)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_a_port_of_somebody_else_does_not_tell_that_a_program_is_ready(
    redis: Redis, dynacut: Dynacut, tmp_path: Path
) -> None:
    started = tmp_path / "started"
    done = dynacut("trace", "-o", tmp_path / "x", "--ready-port", redis.port, "--", "touch", started)
    assert done.returncode == 1
    assert f"TCP port {redis.port} is in use already" in done.stderr
    assert not started.exists()


def test_a_log_that_cannot_be_written_is_refused_before_it_is_recorded(
    redis: Redis, dynacut: Dynacut, tmp_path: Path
) -> None:
    done = dynacut("trace", "--pid", redis.pid, "-o", tmp_path / "missing" / "x.drcov")
    assert done.returncode == 1
    assert "No such file or directory" in done.stderr
    done = dynacut("trace", "--pid", redis.pid, "-o", tmp_path / "x", "--ready-log", "x", "--for", "0")
    assert done.returncode in (0, 1)
    if done.returncode == 1:
        assert "output goes to no file" in done.stderr
