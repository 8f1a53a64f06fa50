"""dynacut trim: start-up code removed from a small program and from real servers, which go on doing their work."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from dynacut.offline import processes
from dynacut.shared.drcov import read
from dynacut.shared.keep import without
from dynacut.shared.plan import load

from .checkpoints import the_criu
from .conftest import Dynacut
from .http_workload import reload, requests
from .programs import compile_program, feature
from .servers import Lighttpd, Nginx, Server, become_subreaper, free_port, is_gone, is_running, wait_until

WORKLOAD = Path(__file__).with_name("http_workload.py")
TIMEOUT = 400
QUICK = ("--idle", "0.1", "--linger", "0")
"""For programs without timers."""
ENDED_BY_SIGTRAP = -int(signal.SIGTRAP)


class Trims:
    """Runs `dynacut trim`, and ends what it leaves running."""

    def __init__(self, dynacut: Dynacut, directory: Path) -> None:
        self._dynacut = dynacut
        self.directory = directory
        self._pids: list[int] = []

    def __call__(self, *arguments: str | int | Path) -> dict[str, Any]:
        """The report; its process is a child of ours, once trim has ended."""
        become_subreaper()
        done = self._dynacut("trim", "-o", self.directory, "--json", *arguments, timeout=TIMEOUT)
        assert done.returncode == 0, f"{done.stderr}{done.stdout}"
        report = json.loads(done.stdout)
        assert report == json.loads((self.directory / "report.json").read_text())
        self._pids.append(report["target"]["pid"])
        return dict(report)

    def end(self) -> None:
        for pid in filter(is_running, self._pids):
            assert processes.end(reversed(processes.tree_of(pid))) == []


@pytest.fixture
def trim(dynacut: Dynacut, tmp_path: Path) -> Iterator[Trims]:
    trims = Trims(dynacut, tmp_path / "trim")
    try:
        yield trims
    finally:
        trims.end()


def ended(pid: int) -> int:
    """The status of a child that ends by itself: exit status, or minus the signal."""
    statuses: list[int] = []

    def reaped() -> bool:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            statuses.append(os.waitstatus_to_exitcode(status))
        return bool(found)

    wait_until(reaped, f"the end of {pid}")
    return statuses[0]


def assert_trimmed(report: dict[str, Any], share: float = 0.9) -> None:
    """At least so much of the start-up code is gone, and what is not is accounted for."""
    (module,) = report["modules"]
    startup, removed = module["startup"]["blocks"], module["removed"]["blocks"]
    assert removed >= share * startup
    assert removed + module["learned"]["blocks"] + module["standing"]["blocks"] >= startup
    assert module["gadgets"]["after"] < module["gadgets"]["before"]
    assert report["hits"] <= 0.01 * removed


# The small program.


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
    report = trim(*options, "--ready-log", "^ready", *QUICK, "--workload", work, "--", program, port)
    assert_trimmed(report, 0.8)
    pid = report["target"]["pid"]
    assert [ask(port, f"work {n}") for n in (3, 9)] == [str(feature(3)), str(feature(9))]
    os.kill(pid, signal.SIGINT)
    assert ended(pid) == ENDED_BY_SIGTRAP


def test_the_graceful_end_was_a_phase_and_passes(trim: Trims, tmp_path: Path) -> None:
    port = free_port()
    work = asking(port, "'work 5'", str(feature(5)))
    program = compile_program("startup", tmp_path)
    report = trim("--live", "--ready-log", "^ready", *QUICK, "--workload", work, "--", program, port)
    os.kill(report["target"]["pid"], signal.SIGTERM)
    assert ended(report["target"]["pid"]) == 0
    assert "ended after 1 interrupts" in (trim.directory / "output.log").read_text().splitlines()[-1]


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
    report = trim(
        *options, "--ready-log", "^ready", *QUICK, "--workload", work, "--workload", again, "--", program, port
    )
    (module,) = report["modules"]
    assert module["learned"]["blocks"] >= 3
    assert read(trim.directory / "learned.drcov").count == module["learned"]["blocks"]
    plan = load(trim.directory / "plan.toml")
    assert without(plan, read(trim.directory / "learned.drcov"))[1] == 0
    assert ask(port, "again") == str(checksum)
    os.kill(report["target"]["pid"], signal.SIGINT)
    assert ended(report["target"]["pid"]) == ENDED_BY_SIGTRAP


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
                wait_until(lambda: arrived.exists() or process.poll() is not None, f"step {step}", 60)
                process.send_signal(number)
                _, errors = process.communicate(timeout=60)
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
    return processes.status_of(pid)["TracerPid"] != "0"


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


# Servers. What is removed goes on learning: what their state makes them do only later (redis numbers its clients, in a
# tree whose shape depends on the numbers) is not to fail a test. bench/trim.py removes for good.


def brought_back(dynacut: Dynacut, report: dict[str, Any]) -> int:
    """How many of the removed blocks were needed after all since the report; few."""
    learned = dynacut.json("live", "--tree", "--pid", report["target"]["pid"], "--learned")["learned"]
    (module,) = report["modules"]
    assert module["removed"]["blocks"] - len(learned) >= 0.9 * module["startup"]["blocks"]
    return len(learned)


def answers(port: int) -> bool:
    """Whether a redis-server answers there."""
    asked = subprocess.run(["redis-cli", "-p", str(port), "ping"], capture_output=True, check=False)
    return b"PONG" in asked.stdout


def rate(port: int, test: str) -> float:
    """Requests per second that redis-benchmark sees."""
    done = subprocess.run(
        ["redis-benchmark", "-p", str(port), "-n", "20000", "-t", test, "--csv"],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return float(done.stdout.splitlines()[-1].split(",")[1].strip('"'))


@pytest.mark.slow
def test_redis_serves_its_whole_benchmark(trim: Trims, dynacut: Dynacut, tmp_path: Path) -> None:
    the_criu()
    if shutil.which("redis-server") is None:
        pytest.skip("redis-server is not installed")
    port, other = free_port(), free_port()
    # What redis's replicationCron does every tenth time, once in ten seconds, it is to do every time.
    options = ("--save", "", "--dir", str(tmp_path), "--repl-ping-replica-period", "1")
    work = f"redis-benchmark -p {port} -n 300 -q"
    save = f"redis-cli -p {port} bgsave && until redis-cli -p {port} info | grep -q in_progress:0; do sleep 0.05; done"
    passes = ("--passes", "5", "--quiet-passes", "2", "--idle", "0.1", "--linger", "6", "--on-hit", "learn")
    command = ("redis-server", "--port", str(port), *options)
    report = trim("--ready-port", port, "--workload", work, "--serve", save, *passes, "--", *command)
    assert_trimmed(report)
    pid = report["target"]["pid"]
    subprocess.run(work.split(), check=True, capture_output=True, timeout=120)
    with subprocess.Popen(["redis-server", "--port", str(other), *options], stdout=subprocess.DEVNULL) as untouched:
        wait_until(lambda: answers(other), "the untouched redis")
        pairs = [(rate(port, "get"), rate(other, "get")) for _ in range(3)]
        untouched.terminate()
    assert brought_back(dynacut, report) < 100
    assert max(one for one, _ in pairs) > 0.5 * max(both for _, both in pairs), pairs  # figures: bench/trim.py
    os.kill(pid, signal.SIGTERM)
    assert ended(pid) == 0
    assert "bye bye" in (trim.directory / "output.log").read_text()


def command_of(server: Server) -> list[str]:
    """Its command line, with its port and files; the server itself is ended."""
    command: list[str] = server._process.args  # type: ignore[union-attr, assignment]
    server.end()
    return command


@pytest.mark.slow
def test_nginx_serves_reloads_and_ends(nginx: Nginx, trim: Trims, dynacut: Dynacut) -> None:
    """The master and its workers, by way of a checkpoint; reload and graceful shutdown were traced."""
    the_criu()
    port, command = nginx.port, command_of(nginx)
    work = f"{sys.executable} {WORKLOAD} {port} --reload $DYNACUT_PID"
    report = trim(
        *("--ready-port", port, "--workload", work, "--shutdown", "kill -QUIT $DYNACUT_PID"),
        *(
            "--passes",
            "8",
            "--quiet-passes",
            "2",
            "--idle",
            "0.2",
            "--linger",
            "0",
            "--on-hit",
            "learn",
            "--",
            *command,
        ),
    )
    assert_trimmed(report)
    pid = report["target"]["pid"]
    requests(port)
    reload(pid)
    requests(port)
    assert brought_back(dynacut, report) < 100
    os.kill(pid, signal.SIGQUIT)
    assert ended(pid) == 0


@pytest.mark.slow
def test_lighttpd_serves_and_ends(lighttpd: Lighttpd, trim: Trims, dynacut: Dynacut) -> None:
    """In the running process."""
    port, command = lighttpd.port, command_of(lighttpd)
    work = f"{sys.executable} {WORKLOAD} {port}"
    how = ("--live", "--quiet-passes", "2", "--idle", "0.2", "--linger", "2", "--on-hit", "learn")
    report = trim(*how, "--ready-port", port, "--workload", work, "--", *command)
    assert_trimmed(report)
    pid = report["target"]["pid"]
    requests(port)
    # With a connection left, an untouched lighttpd ends with 1 as well, and by other code than was traced here.
    wait_until(lambda: len(psutil.Process(pid).net_connections("tcp")) == 1, "the end of all connections")
    assert brought_back(dynacut, report) < 100
    os.kill(pid, signal.SIGTERM)
    assert ended(pid) == 0
    assert "server stopped by UID" in (trim.directory / "output.log").read_text().splitlines()[-1]


# What is refused.


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--workload", "true", "--pid", "4711"), "start-up of a process that runs has passed"),
        (("--workload", "true", "--", "sleep", "9"), "when does start-up end"),
        (("--ready-port", "1", "--", "sleep", "9"), "--workload is missing"),
        (("--workload", "true"), "either -- CMD or --pid"),
        (("--workload", "true", "--on-hit", "x", "--ready-port", "1", "--", "sleep", "9"), "is no action"),
    ],
)
def test_wrong_usage_touches_nothing(arguments: tuple[str, ...], says: str, dynacut: Dynacut, tmp_path: Path) -> None:
    done = dynacut("trim", "-o", tmp_path / "trim", *arguments)
    assert done.returncode == 2
    assert says in done.stderr
    assert not (tmp_path / "trim").exists()


def test_a_program_that_is_never_ready_is_named_and_ended(dynacut: Dynacut, tmp_path: Path) -> None:
    common = ("--workload", "true", "--ready-log", "never", "--timeout", "1")
    late = dynacut("trim", "-o", tmp_path / "late", *common, "--", "sleep", "1000")
    assert late.returncode == 1
    assert "not ready within 1 s" in late.stderr
    gone = dynacut("trim", "-o", tmp_path / "gone", *common, "--", "true")
    assert gone.returncode == 1
    assert re.search("ended, or put itself in the background", gone.stderr)
    assert not [pid for pid in processes.tree_of(os.getpid())[1:] if is_running(pid)]
