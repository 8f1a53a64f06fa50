"""What dynacut refuses: with a line that says why, one that says what to do, and the target as it was."""

from __future__ import annotations

import errno
import json
import os
import signal
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import capstone  # noqa: F401 - what dynacut imports when it is needed, somebody else may not be able to read
import elftools.elf.elffile  # noqa: F401
import psutil  # noqa: F401
import pytest

from dynacut.live import admission
from dynacut.live.freezer import freezing_cgroup
from dynacut.live.lock import locked
from dynacut.live.ptrace.tracee import Tracee
from dynacut.shared.proc import task_status, thread_ids

from .conftest import Dynacut
from .programs import Program, compile_program, feature
from .servers import wait_until
from .test_kill import bytes_at, run_json, start, symbol
from .untouched import Snapshot

Start = Callable[..., Program]
Compile = Callable[..., Path]
_NOBODY = 65534
_DISABLE = ("--disable", "feature", "--on-hit", "return=-1")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Compile:
    """compile_program() that compiles each program once."""
    known: dict[tuple[str, ...], Path] = {}

    def compile_once(name: str, *flags: str) -> Path:
        if (name, *flags) not in known:
            known[name, *flags] = compile_program(name, tmp_path_factory.mktemp(name), *flags)
        return known[name, *flags]

    return compile_once


@pytest.fixture
def program(compiled: Compile) -> Iterator[Start]:
    """As in conftest.py, with programs that are compiled once."""
    with ExitStack() as stack:
        yield lambda name, *arguments, flags=(): stack.enter_context(Program(compiled(name, *flags), *arguments))


def _refused(
    *arguments: str | int | Path, says: str, advises: str = "", status: int = 1, uid: int = 0, timeout: float = 30
) -> None:
    """Runs the command, which must be refused with these words, in two lines or with details in between."""
    code, out, errors = start("live", *arguments, uid=uid).result(timeout)
    assert code == status, errors
    assert ("error" in json.loads(out)) if "--json" in arguments else out == "", errors
    problem, *details, advice = errors.splitlines()
    assert problem.startswith("dynacut: "), errors
    assert advice.startswith("dynacut: "), errors
    assert all(line.startswith("  - ") for line in details), errors
    assert says in "\n".join([problem, *details]), errors
    assert advises in advice, errors


@contextmanager
def _untouched(program: Program) -> Iterator[None]:
    """Checks that the program's mappings, code and masks stay the same, and that it goes on working."""
    maps = Path(f"/proc/{program.pid}/maps")
    before, mapped = Snapshot.of(program.pid), maps.read_text()
    yield
    assert maps.read_text() == mapped
    assert Snapshot.of(program.pid) == before
    assert program.ask("feature 3") == str(feature(3))


def _refused_for(program: Program, *arguments: str | int | Path, says: str, advises: str = "", uid: int = 0) -> None:
    with _untouched(program):
        _refused("--pid", program.pid, *arguments, says=says, advises=advises, uid=uid)


# Which process


def test_there_is_no_such_process() -> None:
    for pid in (1 << 22, 0, -5, 10**30):
        _refused(f"--pid={pid}", *_DISABLE, says="there is no process", advises="ps -e")


def test_another_users_process(program: Start) -> None:
    target = program("counter")
    _refused_for(target, *_DISABLE, uid=_NOBODY, says="belongs to another user (uid 0)", advises="as root, by sudo")
    _refused_for(target, uid=_NOBODY, says="belongs to another user")


@contextmanager
def _as_nobody(*command: str | Path) -> Iterator[int]:
    with subprocess.Popen(command, user=_NOBODY, group=_NOBODY, extra_groups=[], stdin=subprocess.PIPE) as process:
        try:
            yield process.pid
        finally:
            process.kill()


def test_an_undumpable_process_of_the_same_user(tmp_path: Path) -> None:
    executable = _readable_by_all(compile_program("nondumpable", tmp_path))
    with _as_nobody(executable) as pid:
        wait_until(lambda: Path(f"/proc/{pid}/status").stat().st_uid == 0, "the program is undumpable")
        _refused("--pid", pid, *_DISABLE, uid=_NOBODY, says="is not dumpable", advises="as root, by sudo")


def test_a_user_patches_a_process_of_his_own(tmp_path: Path) -> None:
    """No refusal: the counterpart of the two above."""
    executable = _readable_by_all(compile_program("counter", tmp_path))
    with _as_nobody(executable) as pid:
        wait_until(lambda: task_status(pid).state == "S", "the program waits")
        for arguments in ((*_DISABLE,), (), ("--undo",)):
            status, _, errors = start("live", "--pid", pid, *arguments, uid=_NOBODY).result()
            assert status == 0, errors
        assert task_status(pid).state == "S"


def _readable_by_all(executable: Path) -> Path:
    """The same program where everybody may run it: pytest's folders are its user's alone."""
    for folder in executable.parents:
        if folder.owner() == Path.home().owner() and folder.is_relative_to("/tmp") and folder != Path("/tmp"):
            folder.chmod(0o755)
    executable.chmod(0o755)
    return executable


@pytest.mark.parametrize(("scope", "says"), [(1, "parents only"), (2, "root only"), (3, "forbids all tracing")])
def test_yama_forbids_it(monkeypatch: pytest.MonkeyPatch, scope: int, says: str) -> None:
    """No Yama in the test machine's kernel: the refusal to open the memory and the setting are played."""
    opened = os.open

    def refusing(path: str, *arguments: int, **options: int) -> int:
        if str(path).endswith("/mem"):
            raise PermissionError(13, "Permission denied")
        return opened(path, *arguments, **options)

    monkeypatch.setattr(os, "open", refusing)
    monkeypatch.setattr(admission, "yama_scope", lambda: scope)
    with _as_nobody("sleep", "1000") as pid:
        wait_until(lambda: task_status(pid).name == "sleep", "sleep runs")
        _refused("--pid", pid, *_DISABLE, uid=_NOBODY, says=says)


def test_a_traced_process_belongs_to_its_tracer(program: Start) -> None:
    target = program("counter")
    ready, done = os.pipe(), os.pipe()
    tracer = os.fork()
    if tracer == 0:
        os.close(done[1])
        Tracee(target.pid)
        os.write(ready[1], b"x")
        os.read(done[0], 1)  # killing the tracer lets the target go
        os._exit(0)
    try:
        assert os.read(ready[0], 1) == b"x"
        _refused_for(target, *_DISABLE, says=f"is traced already, by process {tracer}", advises="end that debugger")
        # Looking needs no ptrace.
        assert start("live", "--pid", target.pid).result()[0] == 0
    finally:
        os.kill(tracer, signal.SIGKILL)
        os.waitpid(tracer, 0)
        for end in (*ready, *done):
            os.close(end)


def test_a_zombie() -> None:
    with subprocess.Popen(["true"]) as process:
        wait_until(lambda: task_status(process.pid).state == "Z", "it has ended")
        _refused("--pid", process.pid, *_DISABLE, says="is a zombie")
        _refused("--pid", process.pid, says="is a zombie")


def test_a_kernel_thread() -> None:
    if not Path("/proc/2").exists() or task_status(2).name != "kthreadd":
        pytest.skip("this pid namespace has no kernel threads")
    _refused("--pid", 2, *_DISABLE, says="process 2 (kthreadd) is a kernel thread")


def test_itself_and_process_1() -> None:
    _refused("--pid", 1, *_DISABLE, says="process 1 keeps the whole system")
    command = f'exec "{sys.executable}" -m dynacut.cli.main live --pid $$ --disable main'
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "dynacut does not patch itself" in done.stderr


def test_a_32_bit_program(tmp_path: Path) -> None:
    """An ELF file of one segment that does nothing but pause(2): mov eax, 29; int 0x80; jmp -."""
    code = b"\xb8\x1d\0\0\0\xcd\x80\xeb\xf7"
    base, size = 0x8048000, 52 + 32 + len(code)
    header = struct.pack("<16sHHIIIIIHHHHHH", b"\x7fELF\1\1\1", 2, 3, 1, base + 84, 52, 0, 0, 52, 32, 1, 0, 0, 0)
    segment = struct.pack("<8I", 1, 0, base, base, size, size, 5, 4096)
    executable = tmp_path / "pause32"
    executable.write_bytes(header + segment + code)
    executable.chmod(0o755)
    try:
        process = subprocess.Popen([executable])
    except OSError as error:
        if error.errno != errno.ENOEXEC:
            raise
        pytest.skip("this kernel runs no 32-bit programs")
    try:
        wait_until(lambda: task_status(process.pid).state == "S", "it pauses")
        before = Path(f"/proc/{process.pid}/maps").read_text()
        _refused("--pid", process.pid, "--disable", "0x8048054", says="is a 32-bit program")
        assert Path(f"/proc/{process.pid}/maps").read_text() == before
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("kind", ["allow", "errno", "kill"])
def test_a_seccomp_filter(program: Start, kind: str) -> None:
    _refused_for(program("seccomp", kind), *_DISABLE, says="runs under seccomp (a filter)", advises="dynacut offline")


def test_a_stopped_process_stays_stopped(program: Start) -> None:
    target = program("counter")
    before = Snapshot.of(target.pid)
    os.kill(target.pid, signal.SIGSTOP)
    wait_until(lambda: task_status(target.pid).state == "T", "it is stopped")
    _refused("--pid", target.pid, *_DISABLE, says="is stopped by a signal", advises=f"kill -CONT {target.pid}")
    assert task_status(target.pid).state == "T"
    assert Snapshot.of(target.pid) == before
    os.kill(target.pid, signal.SIGCONT)
    assert target.ask("feature 3") == str(feature(3))


@pytest.mark.parametrize(
    ("kind", "state", "on", "off"),
    [("cgroup2", "cgroup.freeze", "1", "0"), ("cgroup", "freezer.state", "FROZEN", "THAWED")],
)
def test_a_frozen_process(program: Start, kind: str, state: str, on: str, off: str) -> None:
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    roots = [Path(mount[1]) for mount in mounts if mount[2] == kind and (kind == "cgroup2" or "freezer" in mount[3])]
    if not roots:
        pytest.skip(f"this machine has no freezer of {kind}")
    target = program("counter")
    group = roots[0] / f"dynacut-test-{target.pid}"
    inside = group / "inside"
    try:
        inside.mkdir(parents=True)
    except OSError as error:
        if error.errno not in (errno.EROFS, errno.EPERM, errno.EACCES):
            raise
        pytest.skip(f"this machine lets nobody make a {kind}")
    try:
        (inside / "cgroup.procs").write_text(str(target.pid))
        (group / state).write_text(on)
        wait_until(lambda: freezing_cgroup(target.pid) == inside, "it is frozen")
        before = Snapshot.of(target.pid)
        _refused("--pid", target.pid, *_DISABLE, says="is frozen by its cgroup", advises="thaw")
        assert Snapshot.of(target.pid) == before
        (group / state).write_text(off)
        assert target.ask("feature 3") == str(feature(3))
        assert freezing_cgroup(target.pid) is None
    finally:
        (group / state).write_text(off)
        target.end()
        inside.rmdir()
        group.rmdir()


def test_a_thread_id_is_no_process_id(program: Start) -> None:
    target = program("callers", 1)
    (thread,) = set(thread_ids(target.pid)) - {target.pid}
    wait_until(lambda: not task_status(target.pid, thread).blocked, "the mask with which a thread begins is gone")
    with _untouched(target):
        says = f"{thread} is a thread of process {target.pid}"
        _refused("--pid", thread, *_DISABLE, says=says, advises=f"--pid {target.pid}")


def test_a_name_that_several_processes_have(tmp_path: Path) -> None:
    executable = compile_program("counter", tmp_path).rename(tmp_path / f"twins-{os.getpid()}")
    with Program(executable) as one, Program(executable) as other, _untouched(one), _untouched(other):
        for pid in (one.pid, other.pid):
            _refused("--name", executable.name, *_DISABLE, says=f"{pid} (/", advises="--pid")
    _refused("--name", executable.name, *_DISABLE, says="no process is called", advises="ps -e")


def test_two_changes_at_once(program: Start) -> None:
    target = program("inside")
    with locked(target.pid):
        _refused("--pid", target.pid, *_DISABLE, says=f"another dynacut is changing process {target.pid}")
    assert run_json("live", "--pid", target.pid, *_DISABLE)["changed"] is True


# Which place


@pytest.mark.parametrize(
    ("site", "says", "advises"),
    [
        ("feature+1", "is not the first byte of an instruction", ""),
        ("choose+17", "lies outside known code", ""),
        ("stdin", "no function 'stdin'", ""),
        ("featur", "no function 'featur'", "near matches: feature"),
        ("nowhere!feature", "has no module 'nowhere'", "it has steps"),
        ("steps+0xffffffff", "is not in the code of", ""),
        ("0x10", "0x10 lies in no module", "shows the modules"),
        ("0xffffffffffffffffffff", "lies in no module", "shows the modules"),
        ("steps.c:1", "there is no code on that line", "lines with code"),
        ("feature+010", "", ""),
        ("feature+" + "9" * 5000, "", ""),
        ("!", "'!' is not a site", "a site is"),
    ],
)
def test_a_site_that_is_none(program: Start, site: str, says: str, advises: str) -> None:
    _refused_for(program("steps"), "--disable", site, "--as", "x", says=says, advises=advises)


@pytest.mark.parametrize(
    ("sites", "on_hit", "says"),
    [
        (("steps!steps+4",), "return=1", "return needs the entry of a function"),
        (("steps!steps",), "redirect=choose+5", "into the midst of another function"),
        (("steps!steps+4",), "redirect=choose", "only from a function's entry"),
        (("steps!steps",), "redirect=choose+1", "is not the first byte of an instruction"),
        (("steps!steps",), "redirect=nowhere", "no function 'nowhere'"),
        (("steps!steps",), "redirect=steps!steps", "which is disabled itself"),
        (("steps!steps+4",), "skip=3", "leads to no instruction"),
        (("steps!steps+4",), "skip=60", "leads to no instruction"),
        (("steps!steps", "steps!steps+4"), "skip=4", "which is disabled itself"),
        (("steps!steps", "steps!steps"), "terminate", "overlaps"),
    ],
)
def test_an_action_that_does_not_fit_its_place(program: Start, sites: tuple[str, ...], on_hit: str, says: str) -> None:
    _refused_for(program("steps"), "--disable", *sites, "--on-hit", on_hit, "--as", "x", says=says)


@pytest.mark.parametrize(
    ("site", "on_hit", "says"),
    [
        ("apart.cold", "return=1", "this is a part of one that lies apart"),
        ("apart.cold", "redirect=complain", "only from a function's entry"),
        ("apart", "redirect=apart.cold", "into the midst of another function"),
    ],
)
def test_a_part_of_a_function_that_lies_apart_is_no_entry(program: Start, site: str, on_hit: str, says: str) -> None:
    _refused_for(program("apart"), "--disable", site, "--on-hit", on_hit, "--as", "x", says=says)


def test_a_block_while_a_stack_lies_amid_other_memory(program: Start) -> None:
    """To search all that may be the stack would take seconds, in which every thread stands still."""
    target = program("amid")
    says = "has its stack amid other memory"
    what = ("--disable", "feature", "--on-hit", "return=-1", "--as", "f", "--scope", "block")
    before = Snapshot.of(target.pid)
    _refused("--pid", target.pid, *what, says=says, advises="--scope entry")
    assert Snapshot.of(target.pid) == before
    assert target.ask("feature 3") == str(feature(3))
    code, _, errors = start("live", "--pid", target.pid, *what[:-1], "entry").result()
    assert code == 0, errors
    assert target.ask("feature 3") == "-1"


def test_an_ambiguous_symbol_is_listed_with_its_places(program: Start, tmp_path: Path) -> None:
    sources = []
    for number in (1, 2):
        source = tmp_path / f"twin{number}.c"
        source.write_text(f"static __attribute__((noipa, used)) int twin(void) {{ return {number}; }}\n")
        sources.append(str(source))
    target = program("steps", flags=tuple(sources))
    _refused_for(target, "--disable", "twin", says="twin: ambiguous: steps+0x", advises="use one of these")


def test_bytes_that_another_tool_has_patched(program: Start) -> None:
    target = program("counter")
    address = symbol(target, "feature")
    original = bytes_at(target, address, 1)
    with Path(f"/proc/{target.pid}/mem").open("r+b", buffering=0) as memory:
        memory.seek(address)
        memory.write(b"\xcc")
        before = Snapshot.of(target.pid)
        _refused("--pid", target.pid, *_DISABLE, says="another tool has patched it")
        assert Snapshot.of(target.pid) == before
        memory.seek(address)
        memory.write(original)
    assert target.ask("feature 3") == str(feature(3))


def test_an_undo_that_would_overwrite_somebody_elses_bytes(program: Start) -> None:
    target = program("counter")
    assert start("live", "--pid", target.pid, *_DISABLE).result()[0] == 0
    address = symbol(target, "feature")
    with Path(f"/proc/{target.pid}/mem").open("r+b", buffering=0) as memory:
        memory.seek(address)
        memory.write(b"\x90")
        before = Snapshot.of(target.pid)
        for what in (("--undo",), ("--enable", "feature")):
            _refused("--pid", target.pid, *what, says="neither ours nor the original", advises="take its change back")
        assert Snapshot.of(target.pid) == before
        memory.seek(address)
        memory.write(b"\xcc")
    assert start("live", "--pid", target.pid, "--undo").result()[0] == 0
    assert target.ask("feature 3") == str(feature(3))


def test_a_feature_that_is_not_there(program: Start) -> None:
    target = program("counter")
    _refused_for(target, "--enable", "nothing", says="has no feature 'nothing'", advises="nothing is patched in it")
    assert start("live", "--pid", target.pid, *_DISABLE).result()[0] == 0
    _refused("--pid", target.pid, "--enable", "nothing", says="has no feature 'nothing'", advises="it has feature")


# Which plan

_FEATURE = '[[feature]]\nname = "f"\n'
_SITES = 'sites = [{ at = "feature" }]\n'


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("this is no plan", "not TOML"),
        ("", "format is None"),
        ("format = 2\n" + _FEATURE + _SITES, "format is 2"),
        ("format = true\n" + _FEATURE + _SITES, "format is True"),
        ("format = 1\n", "neither a [[feature]] nor an [[edit]]"),
        ("format = 1\n" + _FEATURE, "has no sites"),
        ("format = 1\nfeature = 3\n", "feature is not a list of tables"),
        ("format = 1\n" + _FEATURE + "sites = 3\n", "sites is not a list of tables"),
        ("format = 1\n" + _FEATURE + "sites = [3]\n", "sites is not a list of tables"),
        ("format = 1\n" + _FEATURE + "sites = [{ at = 3 }]\n", "at is not a text"),
        ("format = 1\n" + _FEATURE + _SITES + "on_hot = 'learn'\n", "unknown key 'on_hot'"),
        ("format = 1\n" + _FEATURE + _SITES + "on_hit = 'explode'\n", "'explode' is no action"),
        ("format = 1\n" + _FEATURE + _SITES + "on_hit = 'handler'\n", "handler"),
        ("format = 1\n" + _FEATURE + _SITES + "scope = 'all'\n", "scope is one of"),
        ("format = 1\n" + 2 * (_FEATURE + _SITES), "occurs twice"),
        ("format = 1\n" + _FEATURE.replace("f", "f" * 64, 1).replace('"f"', f'"{"f" * 64}"') + _SITES, "f"),
        ("format = 1\n" + _FEATURE + 'sites = [{ at = "feature", size = 0 }]', "size 0 is not a number"),
        ("format = 1\n" + _FEATURE + 'sites = [{ at = "feature", size = -1 }]', "size -1 is not a number"),
        ("format = 1\n" + _FEATURE + f'sites = [{{ at = "feature", size = {1 << 40} }}]', "is not a number"),
        ("format = 1\n" + _FEATURE + f'sites = [{{ at = "feature", size = {"9" * 5000} }}]', ""),
        ("format = 1\n" + _FEATURE + 'sites = [{ at = "feature", size = true }]', "size True is not a number"),
        ("format = 1\n" + _FEATURE + 'sites = [{ at = "feature", size = 65000 }]', "reach beyond its function"),
        ("format = 1\n" + _FEATURE + 'sites = [{ at = "feature", old = "xy" }]', "not bytes in hexadecimal"),
        (
            "format = 1\n" + _FEATURE + 'sites = [{ at = "feature", old = "90 90" }]',
            "the plan says 90 90, the file has",
        ),
        ("format = 1\n" + _FEATURE + 'sites = [{ at = "fea\\nture" }]', "no function"),
        ("format = 1\n[[edit]]\nat = 'feature'\nold = '55'\nnew = '55 90'\n", "must be equally long"),
        (
            "format = 1\n[[edit]]\nat = 'feature'\nold = '90 90 90'\nnew = '91 90 90'\n",
            "the plan says 90 90 90, the file has",
        ),
        ("format = 1\n[module.m]\nbuild_id = 'XYZ'\n" + _FEATURE + _SITES, "not lower-case hexadecimal"),
        (
            "format = 1\n[module.counter]\npath = '/x'\nbuild_id = 'abcdef'\n"
            + _FEATURE
            + "sites = [{ at = 'counter+0x1400' }]",
            "build-id abcdef is not in",
        ),
        ("format = 1\n" + _FEATURE + "sites = " + "[" * 5000, "not TOML"),
        (
            "format = 1\n" + _FEATURE + 'scope = "block"\nsites = [{ at = "work", size = 3 }, { at = "work" }]',
            "",
        ),
    ],
)
def test_a_plan_that_is_none_or_does_not_fit(program: Start, tmp_path: Path, text: str, says: str) -> None:
    plan = tmp_path / "plan.toml"
    plan.write_text(text)
    _refused_for(program("counter"), "--plan", plan, says=says)


def test_a_plan_that_cannot_be_read(program: Start, tmp_path: Path) -> None:
    target = program("counter")
    latin = tmp_path / "latin.toml"
    latin.write_bytes(b'format = 1\nname = "\xe4"\n')
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    _refused_for(target, "--plan", latin, says="is not UTF-8 text")
    _refused_for(target, "--plan", "/dev/zero", says="is not a regular file")
    for path in (tmp_path, tmp_path / "missing", Path("/dev/null/x")):
        _refused_for(target, "--plan", path, says=f"the plan {path} cannot be read")
    # A named pipe that nobody writes to: not a wait for ever.
    with _untouched(target):
        _refused("--pid", target.pid, "--plan", fifo, says=str(fifo), timeout=5)


def test_all_misfits_of_a_plan_are_named_and_nothing_of_it_is_done(program: Start, tmp_path: Path) -> None:
    target = program("counter")
    plan = tmp_path / "plan.toml"
    plan.write_text(
        'format = 1\n[[feature]]\nname = "f"\n'
        'sites = [{ at = "feature", old = "90" }, { at = "other+1" }, { at = "nope" }, { at = "work" }]\n'
    )
    with _untouched(target):
        status, _, errors = start("live", "--pid", target.pid, "--plan", plan).result()
    assert status == 1
    problem, *misfits, _ = errors.splitlines()
    assert "does not fit" in problem
    assert len(misfits) == 3
    assert [next(word for word in ("90", "boundary", "first byte", "nope") if word in each) for each in misfits]


# Which options


@pytest.mark.parametrize(
    "arguments",
    [
        ("--undo", "--enable", "x"),
        ("--plan", "p.toml", "--disable", "feature"),
        ("--feature", "x"),
        ("--on-hit", "learn"),
        ("--as", "x", "--undo"),
        ("--dry-run",),
        ("--disable", "feature", "--on-hit", "explode"),
        ("--disable", "feature", "--on-hit", "terminate=256"),
        ("--disable", "feature", "--on-hit", "skip=0"),
        ("--disable", "feature", "--on-hit", "return=" + "9" * 30),
        ("--disable", "feature", "--as", "x" * 64),
        ("--disable", "feature", "--as", "a\nb"),
    ],
)
def test_options_that_make_no_sense_are_wrong_usage(program: Start, arguments: tuple[str, ...]) -> None:
    target = program("counter")
    with _untouched(target):
        _refused("--pid", target.pid, *arguments, says="", status=2)


@pytest.mark.parametrize("arguments", [(), _DISABLE, ("--undo",), ("--tree", "--json")])
def test_no_process_is_wrong_usage(arguments: tuple[str, ...]) -> None:
    _refused(*arguments, says="no process is given", advises="add --pid P, --name N or --remote HOST:PORT", status=2)


@pytest.mark.parametrize(
    "arguments",
    [("--pid", "1", "--name", "x"), ("--pid", "x"), ("--pid", "1", "--timeout", "0"), ("--pid", "1", "--nothing")],
)
def test_a_command_line_that_cannot_be_parsed_is_wrong_usage(dynacut: Dynacut, arguments: tuple[str, ...]) -> None:
    done = dynacut("live", *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("dynacut: ")
    assert "Traceback" not in done.stderr
