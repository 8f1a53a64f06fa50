"""dynacut live --check-seccomp: what filters allow is done; what they may not leaves the process as it was."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from dynacut.handlers.table import Action, TableSite
from dynacut.live.confinement import calls_of
from dynacut.shared.patch_set import HandlerChange, PatchSet
from dynacut.shared.proc import blocked_in, task_status, thread_ids

from .conftest import Dynacut
from .programs import Program, compile_program, feature
from .servers import Redis, RedisError, wait_until
from .test_live_redis import set_plan
from .test_pages import joined, sentinel_plan, text_pages
from .untouched import Snapshot

CHECK = "--check-seccomp"
DISABLE = ("--disable", "feature", "--on-hit", "return=-1", "--as", "f")
# x86-64's numbers of those that no server makes: mount, umount2, reboot, swapon, init_module, delete_module,
# kexec_load, ptrace, add_key, keyctl, bpf, userfaultfd, perf_event_open, process_vm_readv, process_vm_writev.
DENIED = (165, 166, 169, 167, 175, 176, 246, 101, 248, 250, 321, 323, 298, 310, 311)
# What the program `seccomp none` needs from execve to its end: execve, brk, arch_prctl, set_tid_address,
# set_robust_list, rseq, mprotect, prlimit64, getrandom, openat, newfstatat, fstat, close, pread64, access, mmap,
# munmap, read, write, exit_group.
OWN = (59, 12, 158, 218, 273, 334, 10, 302, 318, 257, 262, 5, 3, 17, 21, 9, 11, 0, 1, 231)


@pytest.fixture
def sandboxed(tmp_path: Path) -> Iterator[Callable[..., Program]]:
    """sandboxed(mode, numbers, *arguments): the program `seccomp` with arguments, started by sandbox.c."""
    launcher, executable = compile_program("sandbox", tmp_path), compile_program("seccomp", tmp_path)
    with ExitStack() as stack:

        def start(mode: str, numbers: tuple[int, ...], *arguments: str) -> Program:
            return stack.enter_context(Program(launcher, mode, *numbers, "--", str(executable), *arguments))

        yield start


def asked_for(action: Action, argument: int) -> set[int]:
    """The numbers of the calls that a change with a site of this action needs, and of its undo."""
    site = TableSite(0, "f", action, argument, 1, b"\x55", b"\xcc")
    return {each.number for each in calls_of(PatchSet((), HandlerChange.INSTALL, ("f",), (site,)))}


def refused(dynacut: Dynacut, target: Program, *what: str, says: str, advises: str = "--fallback checkpoint") -> None:
    """The change is refused in two lines, and the process is as it was."""
    before = Snapshot.of(target.pid)
    done = dynacut("live", "--pid", target.pid, *what, CHECK)
    assert (done.returncode, done.stdout) == (1, ""), done.stderr
    problem, advice = done.stderr.splitlines()
    assert says in problem and advises in advice, done.stderr
    assert Snapshot.of(target.pid) == before
    assert target.ask("feature 3") == str(feature(3))


def goes_on_and_off(dynacut: Dynacut, target: Program) -> None:
    """The feature is disabled, hit, enabled, disabled and undone, each time with the option."""
    live = ("live", "--pid", target.pid)
    before = Snapshot.of(target.pid)
    assert dynacut.json(*live, *DISABLE, CHECK)["changed"] is True
    assert target.ask("feature 3") == "-1"
    (shown,) = dynacut.json(*live)["features"]  # to look needs no option
    assert (shown["state"], shown["hits"]) == ("disabled", 1)
    if task_status(target.pid).seccomp:
        assert dynacut(*live, "--undo").returncode == 1
        assert target.ask("feature 3") == "-1"
    dynacut.json(*live, "--enable", "f", CHECK)
    assert target.ask("feature 3") == str(feature(3))
    dynacut.json(*live, "--disable", "f", CHECK)
    assert target.ask("feature 4") == "-1"
    dynacut.json(*live, "--undo", CHECK)
    assert target.ask("feature 4") == str(feature(4))
    assert Snapshot.of(target.pid) == before


def test_a_filter_that_allows(program: Callable[..., Program], dynacut: Dynacut) -> None:
    goes_on_and_off(dynacut, program("seccomp", "allow"))


def test_without_the_option_it_is_named_first(program: Callable[..., Program], dynacut: Dynacut) -> None:
    done = dynacut("live", "--pid", program("seccomp", "allow").pid, *DISABLE)
    problem, advice = done.stderr.splitlines()
    assert done.returncode == 1 and "runs under seccomp (a filter)" in problem
    assert 0 < advice.index("--check-seccomp") < advice.index("--fallback checkpoint")


def test_it_is_named_only_where_it_helps(program: Callable[..., Program], dynacut: Dynacut, tmp_path: Path) -> None:
    target = program("seccomp", "allow")
    by_gdb = dynacut("live", "--pid", target.pid, *DISABLE, "--engine", "gdb").stderr.splitlines()
    assert "--check-seccomp, which asks the filter first, without --engine gdb" in by_gdb[1]
    traced = dynacut("trace", "--pid", target.pid, "-o", tmp_path / "log").stderr.splitlines()
    assert "runs under seccomp (a filter)" in traced[0] and CHECK not in traced[1] and "checkpoint" not in traced[1]


@pytest.mark.parametrize(("kind", "says"), [("errno", "gives an error"), ("kill", "ends the process")])
def test_a_filter_that_does_not(program: Callable[..., Program], dynacut: Dynacut, kind: str, says: str) -> None:
    target = program("seccomp", kind)
    refused(dynacut, target, *DISABLE, says=f"seccomp filter that {says} at rt_sigaction")
    refused(dynacut, target, *DISABLE, "--dry-run", says="rt_sigaction")


def test_threads_with_filters_of_their_own(program: Callable[..., Program], dynacut: Dynacut) -> None:
    goes_on_and_off(dynacut, program("seccomp", "allow", "allow"))


@pytest.mark.parametrize("kinds", [("allow", "errno"), ("none", "kill"), ("errno", "allow")])
def test_one_thread_of_several(program: Callable[..., Program], dynacut: Dynacut, kinds: tuple[str, str]) -> None:
    target = program("seccomp", *kinds)
    assert len(thread_ids(target.pid)) == 2
    refused(dynacut, target, *DISABLE, says="at rt_sigaction")


def test_strict_mode(program: Callable[..., Program], dynacut: Dynacut) -> None:
    target = program("seccomp", "strict")
    wait_until(lambda: task_status(target.pid).seccomp == 1, "strict mode")
    done = dynacut("live", "--pid", target.pid, *DISABLE, CHECK)
    assert done.returncode == 1 and "runs under seccomp (strict mode)" in done.stderr and CHECK not in done.stderr
    assert target.is_running() and task_status(target.pid).state == "S"


def test_no_filter_at_all(program: Callable[..., Program], dynacut: Dynacut) -> None:
    goes_on_and_off(dynacut, program("seccomp", "none"))


def test_a_sandbox_as_systemds(sandboxed: Callable[..., Program], dynacut: Dynacut, tmp_path: Path) -> None:
    target = sandboxed("deny", DENIED, "allow")
    goes_on_and_off(dynacut, target)
    refused(dynacut, target, *DISABLE[:2], "--on-hit", "learn", says="gives an error at mprotect")
    library = tmp_path / "library.so"
    code = "void trap_handler(int signal, void *info, void *context) { (void)signal, (void)info, (void)context; }"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, "-xc", "-"], input=code.encode(), check=True)
    refused(dynacut, target, *DISABLE, "--handler", str(library), says="what system calls a handler library makes")


@pytest.mark.parametrize("action", [Action.RETURN, Action.TERMINATE, Action.LEARN])
def test_only_what_was_asked_for_is_needed(sandboxed: Callable[..., Program], dynacut: Dynacut, action: Action) -> None:
    """The filter ends the process at any other call, so the list of what dynacut asks for is complete."""
    on_hit, number = {Action.RETURN: ("return=-1", 0), Action.TERMINATE: ("terminate=3", 3)}.get(action, ("learn", 0))
    target = sandboxed("only", (*OWN, *asked_for(action, number)), "none")
    live = ("live", "--pid", target.pid)
    what = ("--disable", "feature", "--on-hit", on_hit, "--scope", "block", CHECK)
    dynacut.json(*live, *what)
    dynacut.json(*live, "--undo", CHECK)
    assert target.ask("feature 3") == str(feature(3))
    dynacut.json(*live, *what)
    if action is Action.TERMINATE:
        target.send("feature 3")
        assert target.wait() == 3
        return
    assert target.ask("feature 3") == ("-1" if action is Action.RETURN else str(feature(3)))
    dynacut.json(*live, "--undo", CHECK)


def test_a_tree(dynacut: Dynacut, tmp_path: Path) -> None:
    launcher, executable = compile_program("sandbox", tmp_path), compile_program("forker", tmp_path)
    with Program(launcher, "deny", *DENIED, "--", str(executable)) as target:
        child = int(target.ask("spawn"))
        live = ("live", "--pid", target.pid, "--tree")
        assert len(dynacut.json(*live, *DISABLE, CHECK)["processes"]) == 2
        assert target.ask("each 4") == "-1"
        assert task_status(child).seccomp == 2
        dynacut.json(*live, "--undo", CHECK)
        assert target.ask("each 4") == str(feature(4))


def test_a_call_that_cannot_go_on_by_restart_syscall(tmp_path: Path, dynacut: Dynacut) -> None:
    """Reading the filters stops the thread; its sleep would go on by a system call that ends it."""
    launcher = compile_program("sandbox", tmp_path)
    process = subprocess.Popen([launcher, "kill", "219", "--", "/bin/sleep", "1000"])
    try:
        wait_until(lambda: (waits := blocked_in(process.pid, process.pid)) is not None and waits.number == 230, "sleep")
        for _ in range(3):
            done = dynacut("live", "--pid", process.pid, "--disable", "malloc", CHECK)
            assert done.returncode == 1 and "ends the process at restart_syscall" in done.stderr, done.stderr
        wait_until(lambda: (waits := blocked_in(process.pid, process.pid)) is not None and waits.number == 230, "sleep")
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("wrapper", ["sandbox", "capability"])
def test_filters_that_cannot_be_read(program: Callable[..., Program], tmp_path: Path, wrapper: str) -> None:
    target = program("seccomp", "allow")
    before = Snapshot.of(target.pid)
    within = {
        "sandbox": [str(compile_program("sandbox", tmp_path)), "deny", "169", "--"],
        "capability": ["/usr/bin/setpriv", "--bounding-set", "-sys_admin", "--inh-caps", "-sys_admin"],
    }[wrapper]
    command = [*within, sys.executable, "-m", "dynacut.cli.main", "live", "--pid", str(target.pid), *DISABLE, CHECK]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1, done.stderr
    problem, advice = done.stderr.splitlines()
    assert "cannot be read: Permission denied" in problem and "CAP_SYS_ADMIN" in advice
    assert Snapshot.of(target.pid) == before
    assert target.ask("feature 3") == str(feature(3))


@pytest.mark.parametrize(
    ("further", "says"),
    [
        ((), "--check-seccomp is for a change"),
        (("--undo", "--engine", "gdb"), "--check-seccomp does not go with --engine gdb"),
        (("--undo", "--remote", "localhost:1"), "--check-seccomp does not go with --remote"),
    ],
)
def test_usage(dynacut: Dynacut, further: tuple[str, ...], says: str) -> None:
    done = dynacut("live", "--pid", 2, CHECK, *further)
    assert (done.returncode, done.stdout) == (2, "")
    assert says in done.stderr and len(done.stderr.splitlines()) == 2


class SandboxedRedis(Redis):
    """redis-server with several I/O threads, under filters as systemd makes them."""

    def __init__(self, launcher: Path, mode: str, numbers: tuple[int, ...]) -> None:
        super().__init__({"io-threads": 3})
        self._launcher = [str(launcher), mode, *map(str, numbers), "--"]

    def _prepare(self, program: Path) -> list[str]:
        return [*self._launcher, *super()._prepare(program)]


def test_redis(dynacut: Dynacut, tmp_path: Path) -> None:
    plan = set_plan(tmp_path / "plan.toml")
    with SandboxedRedis(compile_program("sandbox", tmp_path), "deny", DENIED) as redis:
        assert all(task_status(redis.pid, tid).seccomp == 2 for tid in thread_ids(redis.pid))
        live = ("live", "--pid", redis.pid)
        before = Snapshot.of(redis.pid)
        assert redis.command("SET", "key", "before") == "OK"
        assert dynacut(*live, "--plan", plan).returncode == 1
        assert Snapshot.of(redis.pid) == before
        dynacut.json(*live, "--plan", plan, CHECK)
        answer = redis.command("SET", "key", "after")
        assert isinstance(answer, RedisError)
        assert redis.command("GET", "key") == "before"
        (shown,) = dynacut.json(*live)["features"]
        assert (shown["state"], shown["hits"]) == ("disabled", 1)
        dynacut.json(*live, "--undo", CHECK)
        assert redis.command("SET", "key", "after") == "OK"
        assert Snapshot.of(redis.pid) == before


def test_pages_go_and_come_back(dynacut: Dynacut, tmp_path: Path) -> None:
    """The undo is asked for beforehand: a sandbox that would not let pages come back does not let them go."""
    plan = sentinel_plan(tmp_path / "plan.toml")
    with SandboxedRedis(compile_program("sandbox", tmp_path), "kill", DENIED) as redis:
        live = ("live", "--pid", redis.pid)
        before, pages = Snapshot.of(redis.pid), text_pages(redis.pid)
        (shown,) = dynacut.json(*live, "--plan", plan, CHECK)["features"]
        assert text_pages(redis.pid) == pages - shown["unmapped_pages"] < pages
        dynacut.json(*live, "--undo", CHECK)
        assert text_pages(redis.pid) == pages and joined(Snapshot.of(redis.pid)) == joined(before)
    with SandboxedRedis(compile_program("sandbox", tmp_path), "deny", (*DENIED, 2)) as redis:
        done = dynacut("live", "--pid", redis.pid, "--plan", plan, CHECK)
        assert done.returncode == 1 and "gives an error at open" in done.stderr
        assert text_pages(redis.pid) == pages


def test_redis_whose_sandbox_denies_a_call(dynacut: Dynacut, tmp_path: Path) -> None:
    plan = set_plan(tmp_path / "plan.toml")
    with SandboxedRedis(compile_program("sandbox", tmp_path), "deny", (*DENIED, 234)) as redis:
        before = Snapshot.of(redis.pid)
        done = dynacut("live", "--pid", redis.pid, "--plan", plan, CHECK)
        assert done.returncode == 1 and "gives an error at tgkill" in done.stderr
        assert Snapshot.of(redis.pid) == before
        assert redis.command("SET", "key", "x") == "OK"
