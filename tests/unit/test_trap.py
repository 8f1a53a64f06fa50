"""The handler that is mapped into targets, run here in a small program of our own: no ptrace, no privilege."""

from __future__ import annotations

import mmap
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import pytest

from dynacut.handlers.blob import HANDLER_ENTRY, HANDLER_RESTORER, handler_code
from dynacut.handlers.table import (
    CODE_SIZE,
    MAGIC,
    OBSERVED_OFFSET,
    PREVIOUS_OFFSET,
    Action,
    KernelAction,
    Layout,
    Table,
    TableSite,
    UserLibrary,
    Write,
)
from dynacut.shared.on_hit import DIE_BY_SIGTRAP
from dynacut.shared.region import Region

SOURCE = Path(__file__).parent / "programs" / "trapped.c"
HANDLERS = Path(__file__).resolve().parents[2] / "handlers"
ADDRESS = 0x2000_0000_0000
SA_SIGINFO, SA_RESETHAND, SA_NODEFER = 0x4, 0x80000000, 0x40000000
SIGTRAP_BIT, SIGUSR1_BIT = 1 << (signal.SIGTRAP - 1), 1 << (signal.SIGUSR1 - 1)
SI_KERNEL, SI_USER = 0x80, 0

pytestmark = pytest.mark.skipif(not (shutil.which("gcc") and shutil.which("nm")), reason="gcc or nm is not installed")


class Died(Exception):  # noqa: N818 - it is what is asked for as often as not
    """The program ended instead of answering; status as subprocess gives it, negative for a signal."""

    def __init__(self, status: int) -> None:
        super().__init__(f"it ended with {status}")
        self.status = status


class Program:
    """tests/unit/programs/trapped.c, running: told by commands what to do, with a table that is written from here."""

    def __init__(self, executable: Path, file: Path, layout: Layout) -> None:
        self.functions = _functions(executable)
        self._process = subprocess.Popen(
            [executable, file, f"{ADDRESS:x}", str(layout.size)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )
        with file.open("r+b") as opened:
            self.memory = mmap.mmap(opened.fileno(), CODE_SIZE + layout.size)
        self.region = Region(ADDRESS, layout.size)
        assert self._pipe(self._process.stdout).readline() == "ready\n"

    def __enter__(self) -> Program:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()
        self._pipe(self._process.stdout).close()
        with suppress(BrokenPipeError):
            self._pipe(self._process.stdin).close()
        self.memory.close()

    def tell(self, command: str) -> None:
        with suppress(BrokenPipeError):
            print(command, file=self._pipe(self._process.stdin), flush=True)

    def answer(self) -> str:
        line = self._pipe(self._process.stdout).readline()
        if not line:
            raise Died(self._process.wait(timeout=10))
        return line.rstrip("\n")

    def ask(self, command: str) -> str:
        self.tell(command)
        return self.answer()

    def call(self, address: int, argument: int = 0) -> int:
        """What the function there returns; the signal mask must be as it was."""
        value, blocked = self.ask(f"call {address:x} {argument}").split()
        assert int(blocked, 16) == 0
        return int(value)

    def direct(self, rip: int, code: int = SI_KERNEL) -> tuple[int, int, int]:
        """Calls the handler with the context of a trap; rip, rax and the growth of rsp afterwards."""
        rip, rax, rsp = self.ask(f"direct {rip:x} {code}").split()  # type: ignore[assignment]
        return int(str(rip), 16), int(str(rax), 16), int(str(rsp))

    def peek(self, address: int, size: int) -> bytes:
        return bytes.fromhex(self.ask(f"peek {address:x} {size}"))

    def poke(self, address: int, data: bytes) -> None:
        assert self.ask(f"poke {address:x} {data.hex()}") == "ok"

    def install(self) -> None:
        """As live/ptrace/patcher.py does, but that the kernel writes the replaced action where table.h says."""
        action = self.region.action(KernelAction())
        handler, restorer = action.handler - ADDRESS, action.restorer - ADDRESS
        assert self.ask(f"install {handler:x} {action.flags:x} {restorer:x}") == "0"

    def write(self, write: Write) -> None:
        start = CODE_SIZE + write.offset
        self.memory[start : start + len(write.data)] = write.data

    def table(self) -> Table:
        return Table.parse(self.memory[CODE_SIZE:], self.region.table)

    def set_sites(self, *sites: TableSite) -> None:
        for write in self.table().update(["feature"], sites):
            self.write(write)

    def plant(self, *sites: TableSite) -> None:
        """Makes the table hold just these sites, and patches them."""
        self.set_sites(*sites)
        for site in sites:
            self.poke(site.address, site.new)

    def site(
        self, name: str, action: Action, argument: int = 0, *, at: int = 0, length: int = 1, new: bytes | None = None
    ) -> TableSite:
        address = self.functions[name] + at
        old = self.peek(address, length)
        return TableSite(address, "feature", action, argument, length, old, new or b"\xcc" * length)

    def hits(self) -> list[int]:
        return [site.hits for site in self.table().sites]

    def hammered(self) -> list[set[int]]:
        """Stops the threads; which values the function of each has returned."""
        parts = [part.split(":") for part in self.ask("stop").split()]
        assert all(int(calls) > 0 for calls, _ in parts)
        return [{int(value) for value in values.split(",")} for _, values in parts]

    @staticmethod
    def _pipe(pipe: IO[str] | None) -> IO[str]:
        assert pipe is not None
        return pipe


def _functions(executable: Path) -> dict[str, int]:
    text = subprocess.run(["nm", executable], check=True, capture_output=True, text=True).stdout
    return {
        name: int(value, 16) for value, kind, name in (line.split()[-3:] for line in text.splitlines() if " T " in line)
    }


@pytest.fixture(scope="session")
def executable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    program = tmp_path_factory.mktemp("trapped") / "trapped"
    options = ["-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-no-pie", "-pthread"]
    subprocess.run(["gcc", *options, SOURCE, "-o", program], check=True)
    return program


@pytest.fixture
def started(executable: Path, tmp_path: Path) -> Iterator[Callable[[], Program]]:
    """Starts programs whose table is there, but not yet the handler as SIGTRAP's action."""
    programs: list[Program] = []

    def start() -> Program:
        layout = Layout.for_contents(5000, 5000)
        file = tmp_path / f"region{len(programs)}"
        table = Table.empty(layout)
        with file.open("wb") as opened:
            opened.write(handler_code())
            opened.truncate(CODE_SIZE + layout.size)
            opened.seek(CODE_SIZE)
            opened.write(MAGIC + table.header().data)
        programs.append(Program(executable, file, layout))
        return programs[-1]

    yield start
    for program in programs:
        program.__exit__(None, None, None)


@pytest.fixture
def program(started: Callable[[], Program]) -> Program:
    ready = started()
    ready.install()
    return ready


def death(program: Program, command: str) -> int:
    with pytest.raises(Died) as died:
        program.ask(command)
    return died.value.status


# The blob.


def test_the_blob_begins_with_the_restorer_of_glibc_and_fits_its_page() -> None:
    code = handler_code()
    assert code[HANDLER_RESTORER:][:9] == bytes.fromhex("48 c7 c0 0f 00 00 00 0f 05")
    assert len(code) <= 4096
    assert HANDLER_ENTRY == 16


def test_the_blob_has_no_relocations_and_no_data(tmp_path: Path) -> None:
    spec = spec_from_file_location("handler_build", HANDLERS / "build.py")
    assert spec is not None and spec.loader is not None
    build = module_from_spec(spec)
    spec.loader.exec_module(build)
    linked = tmp_path / "trap.elf"
    script = f"-Wl,-T,{HANDLERS / 'trap.ld'}"
    subprocess.run(["gcc", *build.COMPILE, *build.LINK, script, "-o", linked, HANDLERS / "trap.c"], check=True)
    sections = subprocess.run(["readelf", "-SW", linked], check=True, capture_output=True, text=True).stdout
    loaded = [line.split("]")[1].split()[:2] for line in sections.splitlines() if "] ." in line and " A" in line]
    assert loaded == [[".text", "PROGBITS"]]
    relocations = subprocess.run(["readelf", "-rW", linked], check=True, capture_output=True, text=True).stdout
    assert "There are no relocations" in relocations


def test_the_blob_uses_no_vector_registers_and_no_red_zone() -> None:
    capstone: Any = import_module("capstone")
    decoder = capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_64)
    decoder.detail = True
    code = handler_code()
    end = code.index(b"/proc") if b"/proc" in code else len(code)
    for instruction in decoder.disasm(code[HANDLER_ENTRY:end], HANDLER_ENTRY):
        assert not any(
            instruction.reg_name(register).startswith(("xmm", "ymm", "st(", "mm"))
            for register in (*instruction.regs_access()[0], *instruction.regs_access()[1])
        ), f"{instruction.mnemonic} {instruction.op_str}"


# Actions.


def test_redirect_goes_on_at_its_destination(program: Program) -> None:
    program.plant(program.site("plain", Action.REDIRECT, program.functions["other"]))
    assert program.call(program.functions["plain"], 40) == 42
    assert program.hits() == [1]


@pytest.mark.parametrize("value", [0, 7, -1, -(1 << 63)])
def test_return_gives_its_value_to_the_caller(program: Program, value: int) -> None:
    program.plant(program.site("plain", Action.RETURN, value % (1 << 64)))
    assert program.call(program.functions["plain"], 40) == value
    assert program.hits() == [1]


def test_skip_goes_on_behind_the_site(program: Program) -> None:
    program.plant(program.site("steps", Action.SKIP, 4, at=3))
    assert program.call(program.functions["steps"], 100) == 106
    program.plant(program.site("steps", Action.SKIP, 8, at=3))
    assert program.call(program.functions["steps"], 100) == 104


def test_a_hit_leaves_the_red_zone_alone(program: Program) -> None:
    program.plant(program.site("redzone", Action.SKIP, 1, at=5))
    assert program.call(program.functions["redzone"], 4711) == 4711


def test_terminate_ends_the_process_by_sigtrap(program: Program) -> None:
    program.plant(program.site("plain", Action.TERMINATE, DIE_BY_SIGTRAP))
    assert death(program, f"call {program.functions['plain']:x} 1") == -signal.SIGTRAP
    assert program.hits() == [1]


@pytest.mark.parametrize("code", [0, 3, 255])
def test_terminate_with_a_code_exits_with_it(program: Program, code: int) -> None:
    program.plant(program.site("plain", Action.TERMINATE, code))
    assert death(program, f"call {program.functions['plain']:x} 1") == code
    assert program.hits() == [1]


@pytest.mark.parametrize("memory", ["proc", "mprotect"])
@pytest.mark.parametrize("length", [1, 15])
def test_learn_puts_the_bytes_back_and_goes_on(program: Program, memory: str, length: int) -> None:
    site = program.site("steps", Action.LEARN, length=length)
    program.plant(site)
    if memory == "mprotect":
        assert program.ask("nofile") == "ok"
    for argument in (100, 200):
        assert program.call(site.address, argument) == argument + 7
    assert program.peek(site.address, length) == site.old
    assert program.hits() == [1]  # the second call met the original code


def test_learn_sees_that_a_plain_file_in_a_chroot_is_not_its_memory(program: Program, tmp_path: Path) -> None:
    site = program.site("steps", Action.LEARN, length=15)
    program.plant(site)
    memory = tmp_path / "jail" / "proc" / "self" / "mem"
    memory.parent.mkdir(parents=True)
    memory.touch(0o666)
    if program.ask(f"jail {tmp_path / 'jail'}") != "ok":
        pytest.skip("neither root nor allowed to make a user namespace")
    assert program.call(site.address, 100) == 107
    assert memory.stat().st_size > site.address
    assert program.peek(site.address, 15) == site.old
    assert program.hits() == [1]


@pytest.mark.parametrize("memory", ["proc", "mprotect"])
def test_learn_puts_a_whole_block_back_when_it_is_entered_in_its_midst(program: Program, memory: str) -> None:
    site = program.site("steps", Action.LEARN, length=15)
    program.plant(site)
    if memory == "mprotect":
        assert program.ask("nofile") == "ok"
    assert program.call(site.address + 7, 100) == 106
    assert program.peek(site.address, 15) == site.old
    assert program.call(site.address, 100) == 107
    assert program.hits() == [1]


def test_learned_code_is_not_writable_afterwards(program: Program) -> None:
    program.plant(program.site("plain", Action.LEARN))
    assert program.ask("nofile") == "ok"
    program.call(program.functions["plain"], 1)
    permissions = [
        line.split()[1]
        for line in Path(f"/proc/{program._process.pid}/maps").read_text().splitlines()
        if int(line.split("-")[0], 16) <= program.functions["plain"] < int(line.split("-")[1].split()[0], 16)
    ]
    assert permissions == ["r-xp"]


@pytest.mark.parametrize(
    ("action", "argument"), [(Action.REDIRECT, 0x1000), (Action.RETURN, 5), (Action.SKIP, 15), (Action.HANDLER, 0)]
)
def test_a_block_entered_in_its_midst_ends_the_process_there(program: Program, action: Action, argument: int) -> None:
    site = program.site("steps", action, argument, length=15)
    program.plant(site)
    assert death(program, f"call {site.address + 7:x} 100") == -signal.SIGTRAP
    assert program.hits() == [1]


def test_terminate_with_a_code_holds_in_the_midst_of_a_block_too(program: Program) -> None:
    site = program.site("steps", Action.TERMINATE, 9, length=15)
    program.plant(site)
    assert death(program, f"call {site.address + 14:x} 100") == 9


def test_every_byte_of_a_block_belongs_to_its_site_and_the_next_one_does_not(started: Callable[[], Program]) -> None:
    program = started()
    assert program.ask(f"own handler {SA_SIGINFO:x}") == "ok"
    program.install()
    site = program.site("steps", Action.TERMINATE, DIE_BY_SIGTRAP, at=3, length=8)
    program.plant(site)
    for position in range(8):
        trap = site.address + position
        assert program.direct(trap + 1) == (trap, 0x77, 0)  # to die there, once it goes on
        assert program.hits() == [position + 1]
    for trap in (site.address - 1, site.end):
        program.poke(trap, b"\xcc")
        assert program.direct(trap + 1) == (trap + 1, 0x77, 0)
    assert program.hits() == [8]
    assert program.ask("handled").startswith("2 ")


def test_an_edit_is_no_trap(program: Program) -> None:
    edit = program.site("steps", Action.EDIT, at=3, length=4, new=b"\x48\x83\xc0\x05")
    program.plant(edit)
    assert program.call(program.functions["steps"], 100) == 111
    own = program.site("plain", Action.EDIT, length=4, new=b"\xcc\x90\x90\x90")
    program.plant(own)
    assert death(program, f"call {own.address:x} 1") == -signal.SIGTRAP
    assert program.hits() == [0]


def test_hits_are_counted_for_each_site(program: Program) -> None:
    program.plant(
        program.site("plain", Action.RETURN, 1),
        program.site("other", Action.RETURN, 2),
        program.site("steps", Action.SKIP, 4, at=3),
    )
    for name, times in (("plain", 3), ("steps", 5)):
        for _ in range(times):
            program.call(program.functions[name])
    assert program.hits() == [3, 0, 5]


@pytest.mark.parametrize("count", [1, 2, 3, 4096, 10_000])
def test_each_site_is_found_among_many(program: Program, count: int) -> None:
    names = ["plain", "other", "steps"]
    real = [program.site(name, Action.RETURN, 1000 + index) for index, name in enumerate(names)][:count]
    below = [TableSite(0x1000 + 16 * i, "feature", Action.TERMINATE, 1, 1, b"\x90", b"\xcc") for i in range(count // 2)]
    above = [
        TableSite(0x7000_0000 + 16 * i, "feature", Action.TERMINATE, 1, 1, b"\x90", b"\xcc")
        for i in range(count - count // 2 - len(real))
    ]
    program.set_sites(*below, *real, *above)
    for site in real:
        program.poke(site.address, b"\xcc")
        assert program.call(site.address) == site.argument


# Traps that are stale: the byte was put back between the trap and the handler.


def test_a_stale_hit_goes_on_at_the_original_instruction(program: Program) -> None:
    site = program.site("plain", Action.RETURN, 5)
    program.set_sites(site)  # in the table, but not patched
    assert program.direct(site.address + 1) == (site.address, 0x77, 0)
    program.set_sites()  # nor in the table
    assert program.direct(site.address + 1) == (site.address, 0x77, 0)
    assert program.hits() == []


def test_a_hit_that_is_not_stale_is_acted_upon(program: Program) -> None:
    site = program.site("plain", Action.RETURN, 5)
    program.plant(site)
    assert program.direct(site.address + 1) == (0x1234, 5, 8)


def test_a_stale_hit_is_not_taken_for_an_int_3_by_the_bytes_around_it(program: Program) -> None:
    """The site's instruction begins with 03, and the one before ends in cd: together they read as int $3."""
    site = program.site("lookalike", Action.RETURN, 5, at=5)
    assert program.peek(site.address - 1, 2) == b"\xcd\x03"
    program.set_sites(site)
    assert program.direct(site.address + 1) == (site.address, 0x77, 0)
    assert program.ask("handled").startswith("0 ")


def test_the_byte_may_come_and_go_while_threads_hit_it(program: Program) -> None:
    site = program.site("plain", Action.RETURN, 5)
    program.set_sites(site)
    for _ in range(2):
        assert program.ask(f"hammer {site.address:x}") == "ok"
    assert program.ask(f"toggle 200 {site.address:x} cc {site.old.hex()}") == "ok"
    assert all(values <= {1, 5} for values in program.hammered())
    assert program.call(site.address) == 1


def test_learn_by_many_threads_at_once_is_no_crash(program: Program) -> None:
    learn_by_threads(program)


def test_learn_by_many_threads_at_once_is_no_crash_where_proc_cannot_be_opened(program: Program) -> None:
    """Two threads make the same page writable, and the first makes it read-only again before the second has written."""
    assert program.ask("nofile") == "ok"
    learn_by_threads(program)


def learn_by_threads(program: Program) -> None:
    sites = [program.site(name, Action.LEARN) for name in ("plain", "other", "redzone")]
    steps = program.site("steps", Action.LEARN, length=3)
    sites.append(steps)
    program.set_sites(*sites)
    for name in ("plain", "other", "redzone"):
        assert program.ask(f"hammer {program.functions[name]:x}") == "ok"
    assert program.ask(f"hammer {program.functions['plain']:x}") == "ok"
    addresses = " ".join(f"{site.address:x}" for site in sites[:3])
    assert program.ask(f"plant 20000 {addresses}") == "ok"
    assert program.hammered() == [{1}, {2}, {0}, {1}]


@pytest.mark.slow
def test_the_banks_may_turn_while_threads_hit(program: Program) -> None:
    names = ("plain", "other", "steps")
    sites = {name: program.site(name, Action.RETURN, 0) for name in names}

    def with_arguments(base: int) -> list[TableSite]:
        real = [
            TableSite(site.address, "feature", Action.RETURN, base + index, 1, site.old, site.new)
            for index, site in enumerate(sites.values())
        ]
        # Sites below move the real ones to other places of the bank.
        below = [
            TableSite(0x1000 + 16 * i, "feature", Action.TERMINATE, 99, 1, b"\x90", b"\xcc") for i in range(base * 7)
        ]
        return below + real

    contents = [with_arguments(base) for base in (10, 20, 50)]
    program.plant(*contents[0][-3:])
    for name in names:
        assert program.ask(f"hammer {program.functions[name]:x}") == "ok"
    for turn in range(300):
        program.set_sites(*contents[turn % 3])
    seen = program.hammered()
    assert seen[0] <= {10, 20, 50} and seen[1] <= {11, 21, 51} and seen[2] <= {12, 22, 52}
    assert any(len(values) > 1 for values in seen)


def test_no_hit_of_a_site_that_stays_is_lost_while_others_change(program: Program) -> None:
    stays = program.site("plain", Action.RETURN, 5)
    changes = [program.site("other", Action.RETURN, value) for value in range(50)]
    program.plant(stays, changes[0])
    for name in ("plain", "plain", "other"):
        assert program.ask(f"hammer {program.functions[name]:x}") == "ok"
    for turn in range(200):
        program.set_sites(stays, changes[turn % 50])
    calls = [int(part.split(":")[0]) for part in program.ask("stop").split()]
    assert program.hits()[0] == calls[0] + calls[1]


# SIGTRAP that is none of ours.


def installed_as(program: Program, how: str) -> None:
    """After the installation: the table as the kernel left it, or as the patcher does."""
    program.install()
    if how == "patcher":
        observed = program.memory[CODE_SIZE + OBSERVED_OFFSET :][: len(KernelAction().pack())]
        program.write(Write(PREVIOUS_OFFSET, observed))
        program.write(Write(OBSERVED_OFFSET, program.region.action(KernelAction()).pack()))


both_tables = pytest.mark.parametrize("how", ["kernel", "patcher"])


@both_tables
@pytest.mark.parametrize("name", ["breakpoint", "software"])
def test_a_breakpoint_of_the_program_reaches_its_own_handler(
    started: Callable[[], Program], how: str, name: str
) -> None:
    program = started()
    assert program.ask(f"own handler {SA_SIGINFO:x}") == "ok"
    installed_as(program, how)
    program.plant(program.site("plain", Action.RETURN, 5))
    for times in (1, 2):
        assert program.call(program.functions[name]) == (7 if name == "breakpoint" else 8)
        count, code, mask = program.ask("handled").split()
        assert (int(count), int(code)) == (times, SI_KERNEL)
        assert int(mask, 16) == SIGUSR1_BIT | SIGTRAP_BIT
    assert program.call(program.functions["plain"]) == 5
    assert program.hits() == [1]


def test_a_handler_that_does_not_defer_sigtrap_gets_it_unblocked(started: Callable[[], Program]) -> None:
    program = started()
    assert program.ask(f"own handler {SA_SIGINFO | SA_NODEFER:x}") == "ok"
    program.install()
    program.call(program.functions["breakpoint"])
    assert int(program.ask("handled").split()[2], 16) == SIGUSR1_BIT


@both_tables
def test_a_handler_for_one_shot_is_called_once(started: Callable[[], Program], how: str) -> None:
    program = started()
    assert program.ask(f"own handler {SA_SIGINFO | SA_RESETHAND:x}") == "ok"
    installed_as(program, how)
    program.plant(program.site("plain", Action.RETURN, 5))
    assert program.call(program.functions["breakpoint"]) == 7
    assert program.call(program.functions["plain"]) == 5
    assert program.ask("handled").startswith("1 ")
    assert death(program, f"call {program.functions['breakpoint']:x} 0") == -signal.SIGTRAP


@both_tables
@pytest.mark.parametrize("name", ["breakpoint", "software"])
@pytest.mark.parametrize("own", ["default", "ignore"])
def test_a_breakpoint_kills_where_the_program_has_no_handler(
    started: Callable[[], Program], how: str, name: str, own: str
) -> None:
    program = started()
    assert program.ask(f"own {own} 0") == "ok"
    installed_as(program, how)
    assert death(program, f"call {program.functions[name]:x} 0") == -signal.SIGTRAP


@both_tables
def test_a_kill_by_a_user_does_what_it_would_have_done(started: Callable[[], Program], how: str) -> None:
    for own in ("default", "ignore", "handler"):
        program = started()
        assert program.ask(f"own {own} {SA_SIGINFO if own == 'handler' else 0:x}") == "ok"
        installed_as(program, how)
        program.plant(program.site("plain", Action.RETURN, 5))
        if own == "default":
            assert death(program, "kill") == -signal.SIGTRAP
            continue
        assert program.ask("kill") == "alive"
        assert program.call(program.functions["plain"]) == 5
        assert program.ask("handled").split()[:2] == (["0", "0"] if own == "ignore" else ["1", str(SI_USER)])
        assert program.hits() == [1]


def test_a_kill_by_a_user_is_no_hit_even_right_behind_a_patched_byte(program: Program) -> None:
    assert program.ask("own ignore 0") == "ok"
    program.install()
    site = program.site("plain", Action.RETURN, 5)
    program.plant(site)
    assert program.direct(site.address + 1, SI_USER) == (site.address + 1, 0x77, 0)
    assert program.hits() == [0]


# The handler of a user's library.


def use(program: Program, step: int, flags: int = SA_SIGINFO | SA_NODEFER) -> None:
    """Puts the program's user_handler in force: it goes on `step` bytes behind each trap."""
    assert program.ask(f"step {step}") == "ok"
    for write in UserLibrary(KernelAction(program.functions["user_handler"], flags), 0x1000).writes():
        program.write(write)


@pytest.mark.parametrize(("flags", "mask"), [(SA_SIGINFO | SA_NODEFER, 0), (SA_SIGINFO, SIGTRAP_BIT)])
@pytest.mark.parametrize("name", ["breakpoint", "software"])
def test_a_users_handler_gets_the_programs_own_traps(
    started: Callable[[], Program], name: str, flags: int, mask: int
) -> None:
    program = started()
    assert program.ask(f"own handler {SA_SIGINFO:x}") == "ok"
    program.install()
    use(program, 1, flags)
    assert program.call(program.functions[name]) == (7 if name == "breakpoint" else 8)
    assert program.ask("used") == f"1 {mask:x}"
    assert program.ask("handled").startswith("0 "), "it comes before the program's own handler"
    for write in program.table().user.out_of_force().writes():
        program.write(write)
    assert program.call(program.functions[name]) == (7 if name == "breakpoint" else 8)
    assert program.ask("used").startswith("1 ")
    assert program.ask("handled").startswith("1 ")


def test_a_users_handler_gets_the_hits_of_its_sites_and_no_others(program: Program) -> None:
    use(program, 4)
    program.plant(
        program.site("plain", Action.RETURN, 5),
        program.site("steps", Action.HANDLER, at=3),
    )
    assert program.call(program.functions["plain"]) == 5
    assert program.ask("used").startswith("0 ")
    assert program.call(program.functions["steps"], 100) == 106, "the handler left out one instruction"
    assert program.ask("used").startswith("1 ")
    assert program.hits() == [1, 1]


def test_a_users_handler_sees_hits_in_the_midst_of_a_block(program: Program) -> None:
    use(program, 4)
    site = program.site("steps", Action.HANDLER, length=15)
    program.plant(site)
    program.poke(site.address + 11, site.old[11:])
    assert program.call(site.address + 7, 100) == 104
    assert program.hits() == [1]


def test_a_hit_for_a_handler_that_is_not_there_ends_the_process(program: Program) -> None:
    program.plant(program.site("plain", Action.HANDLER))
    assert death(program, f"call {program.functions['plain']:x} 1") == -signal.SIGTRAP
    assert program.hits() == [1]


def test_a_users_handler_gets_kills_too(program: Program) -> None:
    use(program, 1)
    assert program.ask("kill") == "alive"
    assert program.ask("used").startswith("1 ")


def test_without_sites_every_breakpoint_is_the_programs(started: Callable[[], Program]) -> None:
    program = started()
    assert program.ask(f"own handler {SA_SIGINFO:x}") == "ok"
    program.install()
    assert program.table().sites == ()
    assert program.call(program.functions["breakpoint"], 1) == 8
    assert program.ask("handled").startswith("1 ")
