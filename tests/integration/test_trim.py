"""dynacut trim: start-up code removed from a small program, which goes on doing its work."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from dynacut.offline import processes
from dynacut.shared.coverage.drcov import read_log
from dynacut.shared.coverage.keep import without
from dynacut.shared.plan_file import load
from dynacut.shared.proc import task_status, tree_of

from .checkpoints import the_criu
from .conftest import Dynacut
from .programs import compile_program, feature
from .servers import become_subreaper, free_port, is_gone, is_running, wait_until
from .trims import Trims, assert_trimmed, ended

QUICK = ("--idle", "0.1", "--linger", "0")
"""For programs without timers."""
REMOVED = ("--on-hit", "terminate")
"""For good: by default, what is needed after all comes back."""
ENDED_BY_SIGTRAP = -int(signal.SIGTRAP)


def ask(port: int, line: str) -> str:
    with socket.create_connection(("127.0.0.1", port), 10.0) as connection, connection.makefile("rw") as stream:
        stream.write(line + "\n")
        stream.flush()
        return stream.readline().strip()


def asking(port: int, line: str, answer: str) -> str:
    """A shell command that asks and compares."""
    script = f"exec 3<>/dev/tcp/127.0.0.1/{port}; echo {line} >&3; read answer <&3; test \\$answer = {answer}"
    return f'bash -c "{script}"'


@pytest.mark.parametrize("way", ["checkpoint", "live"])
def test_a_signal_handler_of_start_up_is_gone_and_the_work_goes_on(way: str, trim: Trims, tmp_path: Path) -> None:
    if way == "checkpoint":
        the_criu()
    port = free_port()
    program = compile_program("startup", tmp_path)
    options = ("--live",) if way == "live" else ()
    work = asking(port, "'work 5'", str(feature(5)))
    report = trim(*options, *REMOVED, "--ready-log", "^ready", *QUICK, "--workload", work, "--", program, port)
    assert_trimmed(report, 0.8)
    pid = report["target"]["pid"]
    assert [ask(port, f"work {n}") for n in (3, 9)] == [str(feature(3)), str(feature(9))]
    os.kill(pid, signal.SIGINT)
    assert ended(pid) == ENDED_BY_SIGTRAP


def test_the_graceful_end_was_a_phase_and_passes(trim: Trims, dynacut: Dynacut, tmp_path: Path) -> None:
    port = free_port()
    work = asking(port, "'work 5'", str(feature(5)))
    alias = tmp_path / "served"  # as redis-server is one of redis-check-rdb
    alias.symlink_to(compile_program("startup", tmp_path))
    options = ("--live", "--module", "served", "--ready-log", "^ready", *QUICK, "--workload", work, "--", alias, port)
    report = trim(*options)
    os.kill(report["target"]["pid"], signal.SIGTERM)
    assert ended(report["target"]["pid"]) == 0
    assert "ended after 1 interrupts" in (trim.directory / "output.log").read_text().splitlines()[-1]
    later = dynacut("trim", "-o", trim.directory, *options)
    assert later.returncode == 0, later.stderr
    assert f"process {report['target']['pid']}, trimmed, has ended since" in later.stdout


@pytest.mark.parametrize("way", ["checkpoint", "live"])
def test_a_service_that_runs_keeps_its_pid_and_its_state(
    way: str, trim: Trims, dynacut: Dynacut, tmp_path: Path
) -> None:
    """Its start-up is known from a log of another instance; a command that fails leaves it untouched."""
    if way == "checkpoint":
        the_criu()
    port = free_port()
    program = compile_program("startup", tmp_path)
    work = asking(port, "'work 5'", str(feature(5)))
    trim("--live", "--ready-log", "^ready", *QUICK, "--workload", work, "--end", "--", program, port)
    init = trim.directory.rename(tmp_path / "first") / "init.drcov"
    become_subreaper()
    options = ["--live"] if way == "live" else []
    with service(program, port, tmp_path / "log") as pid:
        dynacut.json("live", "--pid", pid, "--disable", "on_end", "--on-hit", "return=0", "--as", "end")
        before = text_of(pid, program)
        options += ["--pid", str(pid), "--init", str(init), *QUICK]
        failed = dynacut("trim", "-o", tmp_path / "failed", *options, "--workload", "false")
        assert failed.returncode == 3
        assert text_of(pid, program) == before
        report = trim(*options, "--workload", work)
        assert report["target"]["pid"] == pid
        assert_trimmed(report, 0.8)
        assert ask(port, "work 7") == str(feature(7))
        features = {each["name"]: each["state"] for each in dynacut.json("live", "--pid", pid)["features"]}
        assert features == {"end": "disabled", "startup": "disabled"}
        os.kill(pid, signal.SIGTERM)
        assert ask(port, "work 7") == str(feature(7))


def test_each_way_to_shut_down_is_traced_on_an_instance_of_its_own(trim: Trims, tmp_path: Path) -> None:
    """The second one needs start-up code, which therefore has to stay."""
    port = free_port()
    program = compile_program("startup", tmp_path)
    work = asking(port, "'work 5'", str(feature(5)))
    plain = "kill -TERM $DYNACUT_PID"
    again = f"bash -c 'exec 3<>/dev/tcp/127.0.0.1/{port}; echo again >&3; read sum <&3' && {plain}"
    ways = ("--shutdown", plain, "--shutdown", again)
    report = trim("--live", "--ready-log", "^ready", *QUICK, "--workload", work, *ways, "--", program, port)
    assert_trimmed(report, 0.7)
    output = (trim.directory / "output.log").read_text()
    assert (output.count("ready"), output.count("ended after")) == (3, 2)
    ask(port, "again")
    os.kill(report["target"]["pid"], signal.SIGTERM)
    assert ended(report["target"]["pid"]) == 0


@pytest.mark.parametrize("way", ["checkpoint", "live"])
def test_a_path_left_out_of_the_serving_phases_is_learned(way: str, trim: Trims, tmp_path: Path) -> None:
    """`again` is asked for from the learn round on only: start-up code is needed after all."""
    if way == "checkpoint":
        the_criu()
    port = free_port()
    program = compile_program("startup", tmp_path)
    options = ("--live",) if way == "live" else ()
    with subprocess.Popen([program, str(port)], stdout=subprocess.PIPE, text=True) as plain:
        assert plain.stdout is not None
        assert plain.stdout.readline() == "ready\n"
        checksum = int(ask(port, "again"))
        plain.terminate()
    work = asking(port, "'work 5'", str(feature(5)))
    again = f"test ! -e {trim.directory}/standing.drcov || {asking(port, 'again', str(checksum))}"
    works = ("--workload", work, "--workload", again)
    report = trim(*options, *REMOVED, "--ready-log", "^ready", *QUICK, *works, "--", program, port)
    (module,) = report["modules"]
    assert module["learned"]["blocks"] >= 3
    assert read_log(trim.directory / "learned.drcov").coverage.count == module["learned"]["blocks"]
    plan = load(trim.directory / "plan.toml")
    assert without(plan, read_log(trim.directory / "learned.drcov").coverage)[1] == 0
    assert ask(port, "again") == str(checksum)
    os.kill(report["target"]["pid"], signal.SIGINT)
    assert ended(report["target"]["pid"]) == ENDED_BY_SIGTRAP


@pytest.mark.parametrize("way", ["checkpoint", "live"])
def test_by_default_what_is_needed_after_all_comes_back(
    way: str, trim: Trims, dynacut: Dynacut, tmp_path: Path
) -> None:
    """The SIGINT handler, which no phase had, and `again`, after the trim: nothing ends."""
    if way == "checkpoint":
        the_criu()
    port = free_port()
    program = compile_program("startup", tmp_path)
    options = ("--live",) if way == "live" else ()
    work = asking(port, "'work 5'", str(feature(5)))
    report = trim(*options, "--ready-log", "^ready", *QUICK, "--workload", work, "--", program, port)
    assert_trimmed(report, 0.8)
    pid = report["target"]["pid"]
    assert dynacut.json("live", "--pid", pid, "--learned")["learned"] == []
    os.kill(pid, signal.SIGINT)
    assert int(ask(port, "again")) > 0
    assert len(dynacut.json("live", "--pid", pid, "--learned")["learned"]) >= 4
    os.kill(pid, signal.SIGTERM)
    assert ended(pid) == 0
    assert "ended after 2 interrupts" in (trim.directory / "output.log").read_text().splitlines()[-1]


def test_nothing_is_removed_for_good_while_blocks_still_come_back(
    trim: Trims, dynacut: Dynacut, tmp_path: Path
) -> None:
    """In the only pass of the learn round a block comes back: the service is ended, and a longer round goes through."""
    port = free_port()
    program = compile_program("startup", tmp_path)
    work = asking(port, "'work 5'", str(feature(5)))
    learning = f"test ! -e {trim.directory}/standing.drcov || kill -INT $DYNACUT_PID"
    common = ("--live", *REMOVED, "--ready-log", "^ready", *QUICK, "--workload", work, "--serve", learning)
    command = ("--", str(program), str(port))
    short = dynacut("trim", "-o", trim.directory, *common, "--passes", "1", "--quiet-passes", "1", *command)
    assert short.returncode == 1
    assert re.search(r"blocks had to come back, .* terminate would not let them", short.stderr)
    assert "--learn-for" in short.stderr
    with pytest.raises(OSError):
        ask(port, "work 1")
    report = trim(*common, "--learn-for", "0.5", *command)
    traced, learned = report["rounds"]
    assert (traced["round"], learned["round"]) == ("trace", "learn")
    assert learned["blocks"] == report["modules"][0]["learned"]["blocks"] > 0
    assert learned["seconds"] >= 0.5 > learned["last_new_seconds"]
    assert learned["quiet"]
    os.kill(report["target"]["pid"], signal.SIGINT)
    assert ask(port, "work 4") == str(feature(4))


def test_an_interrupted_trim_goes_on_with_the_step_that_is_not_done(
    trim: Trims, dynacut: Dynacut, tmp_path: Path
) -> None:
    port = free_port()
    program = compile_program("startup", tmp_path)
    permission = tmp_path / "go"
    work = asking(port, "'work 5'", str(feature(5)))
    # Fails from the second instance on, until there is permission.
    serve = f"test ! -e {trim.directory}/plan-learn.toml -o -e {permission}"
    common = [
        "--live",
        "--ready-log",
        "^ready",
        *QUICK,
        "--workload",
        work,
        "--serve",
        serve,
        "--",
        str(program),
        str(port),
    ]
    failed = dynacut("trim", "-o", trim.directory, *common)
    assert failed.returncode == 3
    assert f"status 1 of: {serve}" in failed.stderr
    with pytest.raises(OSError):
        ask(port, "work 1")
    traced = (trim.directory / "init.drcov").stat().st_mtime_ns
    permission.touch()
    other = dynacut("trim", "-o", trim.directory, "--scope", "entry", *common)
    assert other.returncode == 2
    assert "another command or other options" in other.stderr
    report = trim(*common)
    assert (trim.directory / "init.drcov").stat().st_mtime_ns == traced
    assert ask(port, "work 4") == str(feature(4))
    assert trim(*common)["target"] == report["target"], "all is done: the report is made again, nothing else"


KILL, INTERRUPT = signal.SIGKILL, signal.SIGINT


@pytest.mark.parametrize(
    ("given", "signals"),
    [(False, (KILL, INTERRUPT, KILL, KILL)), (True, (KILL, INTERRUPT, INTERRUPT, KILL))],
)
def test_a_trim_may_be_ended_in_every_step_and_goes_on(
    given: bool, signals: tuple[signal.Signals, ...], trim: Trims, tmp_path: Path
) -> None:
    """An instance of its own is not in the way of the next one; a service that ran before runs on, whatever happens."""
    the_criu()
    port = free_port()
    program = compile_program("startup", tmp_path)
    become_subreaper()
    gate, arrived = tmp_path / "gate.sh", tmp_path / "arrived"
    gate.write_text("false")
    # Each pass waits while the gate says so.
    asked = asking(port, "'work 5'", str(feature(5)))
    work = f"while sh {gate}; do touch {arrived}; sleep 0.02; done; {asked}"
    options = ["--idle", "0.05", "--quiet-passes", "1", "--linger", "0", "--workload", work]
    with ExitStack() as stack:
        left = stack.enter_context(reaped())
        if given:
            trim("--live", "--ready-log", "^ready", *QUICK, "--workload", "true", "--end", "--", program, port)
            init = trim.directory.rename(tmp_path / "first") / "init.drcov"
            pid = stack.enter_context(service(program, port, tmp_path / "log"))
            before = text_of(pid, program)
            options += ["--pid", str(pid), "--init", str(init)]
        else:
            options += ["--ready-log", "^ready", "--", str(program), str(port)]
        images = {name: f"-e {trim.directory}/{name}" for name in ("plan-learn.toml", "image-learn", "image-final")}
        steps = {
            "trace": f"test ! {images['plan-learn.toml']}",
            "checkpoint": f"test {images['plan-learn.toml']} -a ! {images['image-learn']}",
            "learn": f"test {images['image-learn']} -a ! {images['image-final']}",
            "check": f"test {images['image-final']}",
        }
        for (step, condition), number in zip(steps.items(), signals, strict=True):
            gate.write_text(condition)
            arrived.unlink(missing_ok=True)
            words = [sys.executable, "-m", "dynacut.cli.main", "trim", "-o", str(trim.directory), *options]
            with subprocess.Popen(words, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
                wait_until(lambda: arrived.exists() or process.poll() is not None, f"step {step}", 240)
                process.send_signal(number)
                _, errors = process.communicate(timeout=240)
            assert arrived.exists(), errors
            gate.write_text("false")
            if (noted := json.loads((trim.directory / "state.json").read_text())["process"]) is not None:
                left.add(noted["pid"])
            assert process.returncode == (-KILL if number is KILL else 1), errors
            if number is INTERRUPT:
                assert "the same command again goes on with step" in errors
            if given:
                wait_until(lambda: not is_traced(pid), "the end of the trace")
                assert ask(port, "work 3") == str(feature(3))
                assert number is KILL or text_of(pid, program) == before
            elif number is INTERRUPT:
                with pytest.raises(OSError):
                    ask(port, "work 1")
        report = trim(*options)
        assert_trimmed(report, 0.8)
        assert not given or report["target"]["pid"] == pid
        assert ask(port, "work 9") == str(feature(9))


def is_traced(pid: int) -> bool:
    return task_status(pid).tracer != 0


@contextmanager
def reaped() -> Iterator[set[int]]:
    """A set of pids that are reaped whenever they have ended: what the parent of a daemon does."""
    pids: set[int] = set()
    stop = threading.Event()

    def reap() -> None:
        while not stop.wait(0.002):
            for pid in list(pids):
                is_gone(pid)

    thread = threading.Thread(target=reap, daemon=True)
    thread.start()
    try:
        yield pids
    finally:
        stop.set()
        thread.join()


@contextmanager
def service(program: Path, port: int, log: Path) -> Iterator[int]:
    """An instance that runs already, as a daemon."""
    with log.open("ab") as output:
        quiet = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": output}
        pid = int(subprocess.Popen([program, str(port)], start_new_session=True, **quiet).pid)  # type: ignore[call-overload]
    try:
        with reaped() as pids:
            pids.add(pid)
            wait_until(lambda: "ready" in log.read_text(), "the service")
            yield pid
    finally:
        assert processes.end([pid]) == []


def test_both_ways_leave_the_same_bytes(dynacut: Dynacut, trim: Trims, tmp_path: Path) -> None:
    """The final plan of a trim, applied live to a fresh instance and to an image of it."""
    the_criu()
    port = free_port()
    program = compile_program("startup", tmp_path)
    work = asking(port, "'work 5'", str(feature(5)))
    report = trim("--ready-log", "^ready", *QUICK, "--workload", work, "--", program, port)
    trimmed = text_of(report["target"]["pid"], program)
    trim.end()
    with subprocess.Popen([program, str(port)], stdout=subprocess.PIPE, text=True) as fresh:
        assert fresh.stdout is not None
        assert fresh.stdout.readline() == "ready\n"
        assert text_of(fresh.pid, program) != trimmed
        done = dynacut("live", "--pid", fresh.pid, "--plan", trim.directory / "plan.toml")
        assert done.returncode == 0, done.stderr
        assert text_of(fresh.pid, program) == trimmed
        fresh.kill()


def text_of(pid: int, program: Path) -> bytes:
    """The executable's code in memory."""
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        place, protection, _, _, _, *path = line.split(maxsplit=5)
        if "x" in protection and path == [str(program)]:
            start, end = (int(word, 16) for word in place.split("-"))
            with Path(f"/proc/{pid}/mem").open("rb") as memory:
                memory.seek(start)
                return memory.read(end - start)
    raise AssertionError(f"{pid} has no code of {program}")


# What is refused.


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--workload", "true", "--pid", "4711"), "start-up of a process that runs has passed"),
        (("--workload", "true", "--", "sleep", "9"), "when does start-up end"),
        (("--ready-port", "1", "--", "sleep", "9"), "--workload is missing"),
        (("--workload", "true"), "either -- CMD or --pid"),
        (("--workload", "true", "--on-hit", "x", "--ready-port", "1", "--", "sleep", "9"), "is no action"),
        (("--workload", "true", "--scope", "page", "--ready-port", "1", "--", "sleep", "9"), "cannot come back"),
    ],
)
def test_wrong_usage_touches_nothing(arguments: tuple[str, ...], says: str, dynacut: Dynacut, tmp_path: Path) -> None:
    done = dynacut("trim", "-o", tmp_path / "trim", *arguments)
    assert done.returncode == 2
    assert says in done.stderr
    assert not (tmp_path / "trim").exists()


def test_a_program_that_is_never_ready_is_named_and_ended(dynacut: Dynacut, tmp_path: Path) -> None:
    common = ("--workload", "true", "--ready-log", "never", "--timeout", "1")
    before = {pid for pid in tree_of(os.getpid()) if is_running(pid)}
    late = dynacut("trim", "-o", tmp_path / "late", *common, "--", "sleep", "1000")
    assert late.returncode == 1
    assert "not ready within 1 s" in late.stderr
    gone = dynacut("trim", "-o", tmp_path / "gone", *common, "--", "true")
    assert gone.returncode == 1
    assert re.search("ended, or put itself in the background", gone.stderr)
    assert not [pid for pid in tree_of(os.getpid()) if pid not in before and is_running(pid)]


def test_a_port_of_somebody_else_does_not_tell_that_it_is_ready(dynacut: Dynacut, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        common = ("--workload", "true", "--ready-port", port)
        done = dynacut("trim", "-o", tmp_path / "trim", *common, "--", "touch", tmp_path / "started")
    assert done.returncode == 1
    assert f"TCP port {port} is in use already" in done.stderr
    assert not (tmp_path / "started").exists()
