"""Candidates on small programs: found from what the programs really execute, and tried on them."""

from __future__ import annotations

import random
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from one_shot import run

from dynacut.shared.code import Code
from dynacut.shared.coverage.candidate import Candidate, CandidateKind
from dynacut.shared.coverage.candidates import MAX_CANDIDATES, find_candidates
from dynacut.shared.coverage.flow import Flow
from dynacut.shared.coverage.live_registers import Clobbered, clobbers
from dynacut.shared.disassembly import disassembly
from dynacut.shared.plan import Plan
from dynacut.shared.plan_file import dumps, loads
from dynacut.shared.target import Module

PROGRAMS = Path(__file__).with_name("programs")
SERVERS = ["/usr/sbin/nginx", "/usr/lib/lighttpd/mod_webdav.so"]

pytestmark = pytest.mark.skipif(not shutil.which("gcc"), reason="gcc is not installed")


def code_of(path: Path) -> Code:
    """A module that is no process's."""
    return Code(Module(path.name, frozenset({path.name}), str(path), path, Path("/"), 0, 0, True, ()))


@dataclass
class Built:
    path: Path
    code: Code

    def run(self, *words: str, redirect: tuple[int, int] | None = None) -> tuple[int, dict[int, int]]:
        return run(self.path, self.code.blocks, words, redirect)

    def blocks(self, *requests: Sequence[str]) -> dict[int, int]:
        found: dict[int, int] = {}
        for request in requests:
            found |= self.run(*request)[1]
        return found

    def symbol(self, name: str) -> int:
        return self.code.symbols.lookup(name)[0].offset


@pytest.fixture
def built(tmp_path: Path) -> Callable[..., Built]:
    def build(name: str, *options: str) -> Built:
        path = tmp_path / name
        source = PROGRAMS / f"{name}.c"
        subprocess.run(["gcc", "-O2", "-fcf-protection=none", *options, source, "-o", path], check=True)
        return Built(path, code_of(path))

    return build


def check_applied(program: Built, candidate: Candidate, unwanted: str, others: dict[str, int]) -> None:
    """With the candidate the program refuses the unwanted request (45), and does all others as before."""
    redirect = (candidate.entry, candidate.destination)
    assert program.run(unwanted, redirect=redirect)[0] == 45
    for word, status in others.items():
        assert program.run(word, redirect=redirect)[0] == status


@pytest.mark.parametrize("with_error", [True, False])
@pytest.mark.parametrize("kind", [(), ("-no-pie",)], ids=["pie", "fixed"])
def test_chain_of_ifs(built: Callable[..., Built], kind: tuple[str, ...], with_error: bool) -> None:
    program = built("chain", *kind)
    wanted, unwanted = program.blocks(["GET"], ["DELETE"], ["BAD"]), program.blocks(["PUT"])
    error = program.blocks(["PUT", "readonly"]) if with_error else None
    candidates = find_candidates(program.code, wanted, unwanted, error)
    best = candidates[0]
    assert best.kind is CandidateKind.JUMP
    dispatch = program.code.function_at(program.symbol("dispatch"))
    assert dispatch is not None and dispatch.start <= best.entry < dispatch.end
    check_applied(program, best, "PUT", {"GET": 10, "DELETE": 30, "BAD": 45})
    assert best.jump is not None
    jump = program.code.blocks.instruction_at(best.jump)
    assert jump is not None and jump.mnemonic.startswith("j")


@pytest.mark.parametrize("kind", [(), ("-no-pie", "-fno-pie")], ids=["pie", "fixed"])
def test_switch(built: Callable[..., Built], kind: tuple[str, ...]) -> None:
    program = built("switched", *kind)
    wanted, unwanted = program.blocks(["0"], ["1"], ["4"], ["6"]), program.blocks(["2"])
    best = find_candidates(program.code, wanted, unwanted)[0]
    assert best.kind is CandidateKind.CASE
    assert "default" in best.reason
    assert best.jump is None
    redirect = (best.entry, best.destination)
    statuses = {word: program.run(word, redirect=redirect)[0] for word in "0124679"}
    assert statuses == {"0": 10, "1": 30, "2": 45, "4": 50, "6": 40, "7": 45, "9": 45}


@pytest.mark.parametrize("kind", [(), ("-no-pie", "-fno-pie"), ("-Wl,-z,pack-relative-relocs",)])
def test_table_of_functions(built: Callable[..., Built], kind: tuple[str, ...]) -> None:
    try:
        program = built("table", *kind)
    except subprocess.CalledProcessError:
        pytest.skip("this linker does not pack relocations")
    wanted = program.blocks(["get", "k"], ["delete", "k"], ["unknown"], ["container"])
    unwanted = program.blocks(["set", "k"])
    best = find_candidates(program.code, wanted, unwanted)[0]
    assert best.kind is CandidateKind.FUNCTION
    assert (best.entry, best.destination) == (program.symbol("set_command"), program.symbol("join_command"))
    assert '("set")' in best.reason and '("join")' in best.reason
    check_applied(program, best, "set", {"get": 10, "delete": 30, "unknown": 45})


def test_candidates_become_plans(built: Callable[..., Built]) -> None:
    program = built("table")
    best = find_candidates(program.code, program.blocks(["get", "k"]), program.blocks(["set", "k"]))[0]
    feature = best.as_feature("set", "table", program.code.elf)
    plan = Plan("table without set", (feature,))
    assert loads(dumps(plan)) == plan
    assert feature.sites[0].at == f"table+{best.entry:#x}"
    assert feature.sites[0].size == best.size
    assert program.code.elf.read(best.entry, len(feature.sites[0].old)) == feature.sites[0].old
    assert str(feature.on_hit) == f"redirect=table+{best.destination:#x}"


def check_sound(flow: Flow, candidates: list[Candidate]) -> None:
    """Each is a redirect that leaves the stack as it must be, between certain instructions."""
    assert len(candidates) <= MAX_CANDIDATES
    assert len({(one.entry, one.destination) for one in candidates}) == len(candidates)
    assert [one.score for one in candidates] == sorted((one.score for one in candidates), reverse=True)
    for one in candidates:
        function = flow.function_at(one.entry)
        block = flow.blocks.block_at(one.entry)
        assert function is not None and block is not None
        assert (block.start, block.size) == (one.entry, one.size)
        assert flow.blocks.is_boundary(one.destination) and one.destination != one.entry
        if not function.start <= one.destination < function.end:
            assert flow.is_entry(one.entry) and flow.is_entry(one.destination)
        if one.jump is not None:
            assert flow.blocks.is_boundary(one.jump)


@pytest.mark.slow
@pytest.mark.parametrize("path", SERVERS)
def test_any_coverage_gives_sound_candidates_in_the_same_order(path: str) -> None:
    if not Path(path).exists():
        pytest.skip(f"{path} is not installed")
    code = code_of(Path(path))
    flow = Flow.of(code)
    chance = random.Random(1)
    for share in (0.1, 0.3):
        executed = [offset for offset in code.blocks.block_starts if chance.random() < share]
        chance.shuffle(executed)
        wanted, error = set(executed[: len(executed) // 2]), set(chance.sample(executed, len(executed) // 5))
        unwanted = executed[len(executed) // 4 :]
        candidates = find_candidates(code, wanted, unwanted, error, flow=flow)
        assert candidates
        check_sound(flow, candidates)
        again = find_candidates(code, sorted(wanted), unwanted, sorted(error), flow=flow)
        assert again == candidates


def test_nothing_to_find(built: Callable[..., Built]) -> None:
    program = built("chain")
    wanted = program.blocks(["GET"])
    assert find_candidates(program.code, wanted, wanted) == []
    assert find_candidates(program.code, wanted, {}) == []
    assert find_candidates(program.code, (), [1, 2, 3, 1 << 40]) == []


def test_disassembly_names_what_is_called(built: Callable[..., Built]) -> None:
    program = built("chain")
    lines = disassembly(program.code, program.symbol("main"), 60)
    assert lines[0].startswith(f"{program.symbol('main'):#x}: ")
    assert any(line.endswith("; dispatch") for line in lines)
    assert len(disassembly(program.code, program.symbol("main"), 2)) == 2
    assert disassembly(program.code, 3) == []


@pytest.mark.parametrize(
    ("first", "expected"),
    [
        ("mov %edx, %eax", Clobbered.YES),
        ("xor %edx, %edx; mov %edx, %eax", Clobbered.NO),
        ("test %esi, %esi; je 1f; xor %eax, %eax; ret; 1: mov (%rdx), %eax", Clobbered.YES),
        ("call g; mov %edx, %eax", Clobbered.PERHAPS),
        ("mov $1, %edx; mov $1, %edi; call g", Clobbered.NO),
    ],
)
def test_a_default_that_reads_what_the_switch_overwrites(tmp_path: Path, first: str, expected: Clobbered) -> None:
    """The table's address goes into rdx, which the default may still need."""
    (tmp_path / "code.s").write_text(f"""
        .globl f
        .type f, @function
    f:  .cfi_startproc
        cmp $1, %edi
        ja default
        lea table(%rip), %rdx
        movslq (%rdx,%rdi,4), %rdi
        add %rdx, %rdi
        jmp *%rdi
    one: mov $1, %eax
        ret
    two: mov $2, %eax
        ret
    default: {first}
        ret
        .cfi_endproc
        .globl g
        .hidden g
        .type g, @function
    g:  .cfi_startproc
        ret
        .cfi_endproc
        .section .rodata
    table: .long one - table, two - table
    """)
    path = tmp_path / "code.so"
    subprocess.run(["gcc", "-shared", "-nostdlib", tmp_path / "code.s", "-o", path], check=True)
    flow = Flow.of(code_of(path))
    (table,) = [table for start in flow.blocks.block_starts if (table := flow.jump_table(start)) is not None]
    block = flow.blocks.block_at(table.jump)
    assert block is not None and table.default is not None
    assert clobbers(flow, block.start, table.default) is expected


def test_a_function_that_others_call_too_but_not_now(built: Callable[..., Built]) -> None:
    """append_command tail-calls set_command: it is no less the entry of `set` where nothing executed that call."""
    program = built("table", "-DAPPEND_SETS")
    wanted, unwanted = program.blocks(["get", "k"], ["unknown"]), program.blocks(["set", "k"])
    assert program.symbol("set_command") not in Flow.of(program.code).indirect_only
    best = find_candidates(program.code, wanted, unwanted)[0]
    assert (best.entry, best.destination) == (program.symbol("set_command"), program.symbol("join_command"))
