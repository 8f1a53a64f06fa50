"""dynacut checkpoint on real processes: what it dumps, which options it finds, and what it refuses."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from dynacut.live.ptrace.tracee import Tracee
from dynacut.offline import processes
from dynacut.offline.checkpoint import checkpoint
from dynacut.offline.criu import Criu
from dynacut.offline.criu_options import CriuOptions, read_record
from dynacut.offline.dumpable import admit
from dynacut.offline.restore import restore
from dynacut.offline.wanted_options import look
from dynacut.shared.errors import DynacutError, ExitStatus
from dynacut.shared.proc import children, task_status, thread_ids

from .checkpoints import NOBODY, job, python_job, reaping, shell_job, the_criu, wait_for_state
from .conftest import Dynacut
from .programs import Program
from .servers import Lighttpd, Nginx, Redis, is_running, wait_until
from .test_kill import start


@pytest.fixture
def criu() -> Criu:
    return the_criu()


def refused(pid: int, directory: Path, says: str, advises: str = "") -> None:
    """The process is refused, and goes on."""
    began = processes.start_time(pid)
    with pytest.raises(DynacutError) as caught:
        checkpoint(pid, directory)
    assert says in "\n".join([caught.value.problem, *caught.value.details])
    assert advises in caught.value.advice
    assert caught.value.status is ExitStatus.REFUSED
    assert processes.start_time(pid) == began


# What it makes.


def test_the_process_goes_on(criu: Criu, redis: Redis, tmp_path: Path) -> None:
    with redis.connect() as connection:
        connection.command("SET", "key", "x" * 100_000)
        steps: list[str] = []
        done = checkpoint(redis.pid, tmp_path / "image", leave_running=True, criu=criu, progress=steps.append)
        assert connection.command("STRLEN", "key") == 100_000
    assert done.pids == (redis.pid,) and done.left_running and done.remaining == ()
    assert done.options == CriuOptions(tcp_established=True)
    assert 0 < done.frozen_us / 1000 < done.criu_ms < done.wall_ms
    pages = sum(path.stat().st_size for path in done.directory.glob("pages-*.img"))
    assert 1 << 20 < done.dumped_bytes == pages < done.size_bytes
    assert done.directory.stat().st_mode & 0o777 == 0o700
    assert steps[:2] == ["looking at the process", "dumping"]
    record = read_record(done.directory)
    assert record is not None and record.options == done.options and record.original is None


def test_the_statistics_are_those_that_crit_would_show(criu: Criu, redis: Redis, tmp_path: Path) -> None:
    """By protobuf's own decoder, with the field numbers of CRIU's stats.proto."""
    done = checkpoint(redis.pid, tmp_path / "image", leave_running=True, criu=criu)
    message = (done.directory / "stats-dump").read_bytes()[12:]
    raw = subprocess.run(["protoc", "--decode_raw"], input=message, capture_output=True, check=True).stdout.decode()
    fields = dict(line.split(": ") for line in map(str.strip, raw.splitlines()) if ": " in line)
    assert done.frozen_us == int(fields["2"])
    assert done.dumped_bytes == (int(fields["7"]) + int(fields.get("14", "0"))) * 4096


def test_a_tree(criu: Criu, nginx: Nginx, tmp_path: Path) -> None:
    workers = nginx.workers
    done = checkpoint(nginx.pid, tmp_path / "image", criu=criu)
    assert done.pid == nginx.pid and sorted(done.pids[1:]) == workers
    assert not any(Path(f"/proc/{pid}").exists() for pid in done.pids)
    restore(done.directory, criu=criu)
    assert nginx.workers == workers


def test_the_command(criu: Criu, lighttpd: Lighttpd, dynacut: Dynacut, tmp_path: Path) -> None:
    assert criu
    report = dynacut.json("checkpoint", "--pid", lighttpd.pid, "--leave-running", tmp_path / "a")
    assert report["target"] == {"pid": lighttpd.pid, "exe": "/usr/sbin/lighttpd"}
    assert report["image"] == str(tmp_path / "a") and report["left_running"]
    assert report["frozen_us"] > 0 and report["dumped_bytes"] > 0 and report["pids"] == [lighttpd.pid]
    with reaping([lighttpd.pid]):
        done = dynacut("checkpoint", "--pid", lighttpd.pid, tmp_path / "b")
    assert (done.returncode, done.stderr) == (0, "")
    assert f"process {lighttpd.pid} (/usr/sbin/lighttpd): dumped to {tmp_path / 'b'}" in done.stdout
    assert "frozen for" in done.stdout and f"back by: dynacut restore {tmp_path / 'b'}" in done.stdout
    assert not Path(f"/proc/{lighttpd.pid}").exists()
    assert dynacut.json("restore", tmp_path / "b")["restored"]


def test_a_parent_that_does_not_reap_is_named(criu: Criu, redis: Redis, tmp_path: Path, dynacut: Dynacut) -> None:
    assert criu
    report = dynacut.json("checkpoint", "--pid", redis.pid, tmp_path / "image")
    assert report["remaining"] == [redis.pid]
    assert f"its parent, process {os.getpid()}" in report["warnings"][0]
    assert restore(tmp_path / "image", criu=criu).pid == redis.pid  # it reaps what is its own


# The options, found by looking.


def test_a_service_without_sockets_needs_none(criu: Criu, tmp_path: Path) -> None:
    with job("sleep", "1000") as pid:
        assert checkpoint(pid, tmp_path / "image", criu=criu).options == CriuOptions()
        assert restore(tmp_path / "image", criu=criu).pid == pid


def test_a_job_of_a_shell(criu: Criu, tmp_path: Path) -> None:
    with shell_job("sleep", "1000") as pid:
        assert checkpoint(pid, tmp_path / "image", criu=criu).options == CriuOptions(shell_job=True)
        assert restore(tmp_path / "image", criu=criu).pid == pid
        assert is_running(pid)


def test_a_lock_is_kept(criu: Criu, tmp_path: Path) -> None:
    def is_locked() -> bool:
        return subprocess.run(["flock", "--nonblock", tmp_path / "lock", "true"], check=False).returncode == 1

    with job("flock", "--no-fork", tmp_path / "lock", "sleep", "1000") as pid:
        wait_until(is_locked, "the lock")
        assert checkpoint(pid, tmp_path / "image", criu=criu).options == CriuOptions(file_locks=True)
        assert not is_locked()
        restore(tmp_path / "image", criu=criu)
        assert is_locked()


def test_a_logger_outside(criu: Criu, tmp_path: Path) -> None:
    """As syslog's clients: connected to a datagram socket of another process."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as logger:
        logger.bind(str(tmp_path / "log"))
        logger.settimeout(10)
        code = (
            "import socket, time; s = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)\n"
            f"s.connect({str(tmp_path / 'log')!r})\n"
            "while True: s.send(b'line'); time.sleep(0.05)"
        )
        with job(*python_job(code)) as pid:
            assert logger.recv(10) == b"line"
            assert checkpoint(pid, tmp_path / "image", criu=criu).options == CriuOptions(ext_unix_sk=True)
            logger.setblocking(False)
            with pytest.raises(BlockingIOError):
                while True:
                    logger.recv(10)
            restore(tmp_path / "image", criu=criu)
            logger.settimeout(10)
            assert logger.recv(10) == b"line"


def test_a_large_deleted_file(criu: Criu, tmp_path: Path) -> None:
    """As a library that was replaced by an upgrade, or a temporary file."""
    path = tmp_path / "large"
    path.write_bytes(os.urandom(3 << 20))
    with path.open("rb") as file, job("sleep", "1000", pass_fds=[file.fileno()]) as pid:
        path.unlink()
        assert look([pid]).for_dump == ("--ghost-limit", str(3 << 20))
        checkpoint(pid, tmp_path / "image", criu=criu)
        restore(tmp_path / "image", criu=criu)
        assert Path(f"/proc/{pid}/fd/{file.fileno()}").read_bytes() == os.pread(file.fileno(), 4 << 20, 0)


def test_a_pipe_to_the_outside_is_warned_of(criu: Criu, tmp_path: Path) -> None:
    read_end, write_end = os.pipe()
    try:
        with job("sleep", "1000", pass_fds=[write_end]) as pid:
            (warning,) = checkpoint(pid, tmp_path / "image", leave_running=True, criu=criu).warnings
            assert f"descriptor {write_end} of process {pid} (sleep) is a pipe" in warning
    finally:
        os.close(read_end)
        os.close(write_end)


def test_connections_that_wait_to_be_accepted(criu: Criu, tmp_path: Path) -> None:
    """CRIU does not dump them: after some tries they are left out, which is said."""
    code = "import socket, time; s = socket.create_server(('127.0.0.1', 0)); print(s.getsockname()[1], flush=True)\n"
    output = tmp_path / "port"
    with output.open("wb") as file, job(*python_job(code + "time.sleep(1000)"), stdout=file) as pid:
        wait_until(lambda: output.read_text().endswith("\n"), "the port")
        with socket.create_connection(("127.0.0.1", int(output.read_text()))):
            done = checkpoint(pid, tmp_path / "image", leave_running=True, criu=criu)
            assert "not yet accepted are not in the image" in done.warnings[-1]
            assert is_running(pid)


# What is refused, before anything is frozen.


def test_processes_that_are_none(tmp_path: Path) -> None:
    for pid in (1 << 22, 0, -5, 10**30):
        with pytest.raises(DynacutError, match="there is no process"):
            admit(pid)
    with pytest.raises(DynacutError, match="process 1 keeps the whole system"):
        admit(1)
    with pytest.raises(DynacutError, match="is a kernel thread"):
        admit(2)
    with pytest.raises(DynacutError, match="dynacut descends from process"):
        admit(os.getpid())
    assert list(tmp_path.iterdir()) == []


def test_a_thread(redis: Redis, tmp_path: Path) -> None:
    thread = thread_ids(redis.pid)[-1]
    assert thread != redis.pid
    refused(thread, tmp_path / "image", f"{thread} is a thread of process {redis.pid}", f"--pid {redis.pid}")


def test_a_zombie(tmp_path: Path) -> None:
    with subprocess.Popen(["true"]) as process:
        wait_for_state(process.pid, "Z")
        refused(process.pid, tmp_path / "image", "is a zombie: it has ended", "reap")


def test_a_traced_process(redis: Redis, tmp_path: Path) -> None:
    ready, done = os.pipe(), os.pipe()
    tracer = os.fork()
    if tracer == 0:
        os.close(done[1])
        Tracee(redis.pid)
        os.write(ready[1], b"x")
        os.read(done[0], 1)
        os._exit(0)
    try:
        assert os.read(ready[0], 1) == b"x"
        refused(redis.pid, tmp_path / "image", f"is traced by process {tracer}", "end that debugger")
    finally:
        os.kill(tracer, signal.SIGKILL)
        os.waitpid(tracer, 0)
        for end in (*ready, *done):
            os.close(end)


def test_a_parent_amid_vfork(program: Callable[..., Program], tmp_path: Path) -> None:
    target = program("vforker")
    child = int(target.read_line().split()[1])
    refused(target.pid, tmp_path / "image", f"process {target.pid} (vforker) has just started process {child}", "again")
    refused(child, tmp_path / "image", "by vfork")
    target.send("wake")
    target.expect("resumed 0")


def test_another_users_process_without_the_capability(tmp_path: Path) -> None:
    """The command may have the capability on this machine, and is run without it."""
    without = ["setpriv", "--bounding-set=-sys_resource", sys.executable, "-m", "dynacut.cli.main", "checkpoint"]
    with job("sleep", "1000", user=NOBODY) as pid:
        began = processes.start_time(pid)
        done = subprocess.run([*without, "--pid", str(pid), tmp_path / "image"], capture_output=True, text=True)
        assert done.returncode == 1, done.stderr
        first, second = done.stderr.splitlines()
        assert f"runs as uid {NOBODY}, and dynacut lacks CAP_SYS_RESOURCE" in first
        assert "dynacut live" in second
        assert processes.start_time(pid) == began
        assert not (tmp_path / "image").exists()


LEADERLESS = """
import ctypes, os, sys, time
ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
child = os.fork()
if child == 0:
    {begin}
    if os.fork() == 0:
        time.sleep(1000)
    os._exit(0)
os.waitpid(child, 0)
time.sleep(1000)
"""


def leaderless(pid: int, leader_of: Callable[[int], int]) -> int:
    """The child of a process that has an ended leader, as soon as there is one."""
    found: list[int] = []

    def look_for_it() -> bool:
        with suppress(ProcessLookupError):
            found[:] = [each for each in children(pid) if not Path(f"/proc/{leader_of(each)}").exists()]
        return bool(found)

    wait_until(look_for_it, "a leader's end")
    return found[0]


def test_a_session_whose_leader_has_ended(tmp_path: Path) -> None:
    """CRIU would restore its processes as children of somebody else."""
    with job(*python_job(LEADERLESS.format(begin="os.setsid()"))) as pid:
        assert leaderless(pid, os.getsid)
        refused(pid, tmp_path / "image", "has ended: a restore would take it away from its parent", "--tree")


def test_a_process_group_whose_leader_has_ended(criu: Criu, tmp_path: Path) -> None:
    with job(*python_job(LEADERLESS.format(begin="os.setpgid(0, 0)"))) as pid:
        child = leaderless(pid, os.getpgid)
        group = os.getpgid(child)
        checkpoint(pid, tmp_path / "image", criu=criu)
        restore(tmp_path / "image", criu=criu)
        assert (list(children(pid)), os.getpgid(child)) == ([child], group)


def test_a_session_outside_of_the_pid_namespace(tmp_path: Path) -> None:
    """As of what a container's runtime starts in it. The namespace's first process forks one that is to be dumped."""
    code = """
import os, subprocess, sys
child = subprocess.Popen(["sleep", "1000"], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
assert os.getsid(child.pid) == 0
subprocess.run([sys.executable, "-m", "dynacut.cli.main", "checkpoint", "--pid", str(child.pid), sys.argv[1]])
assert child.poll() is None
child.kill()
"""
    words = ["unshare", "--pid", "--fork", "--mount-proc", sys.executable, "-c", code, str(tmp_path / "image")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=100, check=True)
    problem, advice = done.stderr.splitlines()
    assert "(sleep) belongs to a session that was begun outside of its pid namespace" in problem
    assert "setsid" in advice and not (tmp_path / "image").exists()


def test_half_of_a_unix_connection(tmp_path: Path) -> None:
    mine, others = socket.socketpair()
    with mine, others, job("sleep", "1000", pass_fds=[others.fileno()]) as pid:
        mine.setblocking(True)
        number = others.fileno()
        others.close()
        refused(pid, tmp_path / "image", f"by a unix socket (descriptor {number})", "end that connection")


def test_a_pending_trap(tmp_path: Path) -> None:
    code = "import signal, time; signal.pthread_sigmask(signal.SIG_BLOCK, [5]); signal.raise_signal(5); time.sleep(999)"
    with job(*python_job(code)) as pid:
        wait_until(lambda: task_status(pid).thread_pending != 0, "the signal")
        refused(pid, tmp_path / "image", f"a SIGTRAP waits for thread {pid}", "blocks the signal")


# Where it is to be written.


def test_directories_that_are_not_free(redis: Redis, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    refused(redis.pid, tmp_path / "file", "is no directory", "new or empty")
    refused(redis.pid, tmp_path, "is not empty", "new or empty")
    refused(redis.pid, tmp_path / "no" / "such", "cannot be made: No such file or directory")
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    refused(redis.pid, tmp_path / "open", "can be written by, others", "new or empty")


def test_a_dump_that_fails_leaves_its_log_only(criu: Criu, tmp_path: Path) -> None:
    """CRIU itself refuses an open file whose name is gone while another name is left."""
    path, directory = tmp_path / "name", tmp_path / "image"
    path.write_text("text")
    (tmp_path / "other").hardlink_to(path)
    with path.open() as file, job("sleep", "1000", pass_fds=[file.fileno()]) as pid:
        path.unlink()
        refused(pid, directory, "(criu/files-reg.c", f"see {directory / 'dump.log'}")
        assert [path.name for path in directory.iterdir()] == ["dump.log"]
        assert is_running(pid)
    with job("sleep", "1000") as pid:
        checkpoint(pid, directory, leave_running=True, criu=criu)  # the same directory again


def test_it_needs_root(tmp_path: Path) -> None:
    for arguments in (("checkpoint", "--pid", os.getppid()), ("restore",)):
        status, out, errors = start(*arguments, tmp_path, uid=NOBODY).result()
        assert (status, out) == (1, "")
        assert "needs root" in errors and "sudo" in errors


def test_without_a_criu(dynacut: Dynacut, redis: Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DYNACUT_CRIU", str(tmp_path / "criu"))
    done = dynacut("checkpoint", "--pid", redis.pid, tmp_path / "image")
    assert done.returncode == 1
    problem, detail, advice = done.stderr.splitlines()
    assert problem == "dynacut: no CRIU works on this machine"
    assert detail == f"  - {tmp_path / 'criu'} (DYNACUT_CRIU): No such file or directory"
    assert "make criu" in advice
    assert not (tmp_path / "image").exists() and redis.is_running()


@pytest.mark.parametrize("delay", [0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4])
def test_an_interrupt_does_not_cut_a_dump_short(criu: Criu, redis: Redis, tmp_path: Path, delay: float) -> None:
    """Ctrl-C goes to all processes of the terminal; CRIU, amid a dump, is to finish."""
    assert criu
    command = [sys.executable, "-m", "dynacut.cli.main", "checkpoint", "--leave-running", "--pid", str(redis.pid)]
    with subprocess.Popen([*command, tmp_path / "image"], stderr=subprocess.PIPE, start_new_session=True) as process:
        until = time.monotonic() + delay
        wait_until(lambda: time.monotonic() > until, "the instant")
        os.killpg(process.pid, signal.SIGINT)
        process.communicate(timeout=60)
    with redis.connect() as connection:
        assert connection.command("PING") == "PONG"
    assert redis.is_running()
