"""Flow compared with objdump, and what is found on the servers."""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from dynacut.shared.binary.blocks import BlockMap
from dynacut.shared.binary.branches import BranchKind
from dynacut.shared.binary.elf import ElfFile
from dynacut.shared.binary.functions import function_ranges
from dynacut.shared.binary.symbols import SymbolTable
from dynacut.shared.coverage.flow import Flow

PROGRAMS = Path(__file__).with_name("programs")
REDIS = Path("/usr/bin/redis-server")

needs_gcc = pytest.mark.skipif(
    not (shutil.which("gcc") and shutil.which("objdump")), reason="gcc or objdump is not installed"
)


def flow_of(path: Path) -> Flow:
    elf = ElfFile.open(path)
    return Flow(elf, BlockMap.of(elf), function_ranges(elf))


def built(folder: Path, name: str, *options: str) -> tuple[Flow, dict[str, int]]:
    path = folder / name
    subprocess.run(["gcc", "-O2", *options, PROGRAMS / f"{name}.c", "-o", path], check=True)
    flow = flow_of(path)
    table = SymbolTable.of(flow.elf, path)
    names = ("main", "dispatch", "put", "set_command", "get_command", "delete_command", "join_command", "say", "keys")
    return flow, {name: found[0].offset for name in names if (found := table.lookup(name))}


def instructions_of(path: Path, link_base: int) -> Iterator[tuple[int, str]]:
    """What objdump says: module offset and text."""
    listing = subprocess.run(["objdump", "-dw", "--no-show-raw-insn", path], check=True, capture_output=True, text=True)
    for line in listing.stdout.splitlines():
        if match := re.match(r" +([0-9a-f]+):\t(.*)", line):
            yield int(match[1], 16) - link_base, match[2]


def check_against_objdump(flow: Flow, path: Path) -> int:
    """Every block's successors are those that objdump's text of its last instruction tells; how many were checked."""
    theirs = dict(instructions_of(path, flow.elf.link_base))
    ordered = sorted(theirs)
    following = dict(pairwise(ordered))
    checked = 0
    for index in range(len(flow.blocks)):
        block = flow.blocks.block(index)
        last = max(offset for offset in range(block.start, block.end) if offset in theirs)
        text = theirs[last]
        function = flow.function_at(block.start)
        assert function is not None
        after = {following[last]} if last in following and following[last] < function.end else set()
        match = re.match(r"(?:(?:bnd|notrack|rep|repz) )*(\w+)(?:,p[nt])? *(\*)?(?:([0-9a-f]+)\b)?", text)
        assert match is not None, text
        target = {int(match[3], 16) - flow.elf.link_base} if match[3] and not match[2] else set()
        if match[1].startswith("ret") or match[1] in ("hlt", "ud2"):
            expected: set[int] = set()
        elif match[1] == "jmp":
            if match[2]:
                continue  # checked by the tests of tables
            expected = target
        elif match[1].startswith("j"):
            expected = target | after
        else:
            expected = after
        assert set(flow.successors(block.start)) == expected, f"{block.start:#x}: {text}"
        for successor in expected:
            if function.start <= successor < function.end:
                assert block.start in flow.predecessors(successor)
        checked += 1
    return checked


@needs_gcc
@pytest.mark.parametrize("name", ["chain", "switched", "table"])
@pytest.mark.parametrize("kind", ["-pie", "-no-pie"])
def test_successors_are_objdumps(tmp_path: Path, name: str, kind: str) -> None:
    flow, _ = built(tmp_path, name, kind)
    assert check_against_objdump(flow, tmp_path / name) > 20


@needs_gcc
def test_successors_of_a_server_are_objdumps() -> None:
    path = Path("/usr/lib/lighttpd/mod_webdav.so")
    if not path.exists():
        pytest.skip(f"{path} is not installed")
    assert check_against_objdump(flow_of(path), path) > 2000


@needs_gcc
def test_the_resolver_of_an_ifunc_is_pointed_at(tmp_path: Path) -> None:
    """Nothing calls it, and only DT_JMPREL tells of it."""
    source, path = tmp_path / "picked.c", tmp_path / "picked.so"
    source.write_text(
        "static int one(void) { return 1; }\nstatic void *pick(void) { return one; }\n"
        'static int picked(void) __attribute__((ifunc("pick")));\nint call(void) { return picked() + 1; }\n'
    )
    subprocess.run(["gcc", "-O1", "-shared", "-fPIC", source, "-o", path], check=True)
    flow = flow_of(path)
    (pick,) = SymbolTable.of(flow.elf, path).lookup("pick")
    assert pick.offset in flow.indirect_only
    assert pick.offset not in flow.pointers.pointers.values()  # the word becomes what it returns


@needs_gcc
@pytest.mark.parametrize("kind", [("-pie",), ("-no-pie", "-fno-pie")])
def test_a_switch(tmp_path: Path, kind: tuple[str, ...]) -> None:
    flow, at = built(tmp_path, "switched", *kind)
    function = flow.function_at(at["dispatch"])
    assert function is not None
    blocks = [block.start for block in flow.blocks.blocks_in(*function)]
    jumps = [start for start in blocks if (branch := flow.branch_of(start)) and branch.kind is BranchKind.INDIRECT_JUMP]
    assert len(jumps) == 1
    table = flow.jump_table(jumps[0])
    assert table is not None
    assert len(table.targets) == 7
    assert table.targets[5] == table.default  # the hole in the cases
    assert table.targets.count(table.targets[5]) == 1
    assert set(flow.successors(jumps[0])) == set(table.targets)
    (put,) = flow.callers(at["put"])[:1]
    block = flow.blocks.block_at(put)
    assert block is not None and at["put"] in flow.callees(function)


@needs_gcc
@pytest.mark.parametrize("kind", [("-pie",), ("-no-pie", "-fno-pie")])
def test_a_table_of_records(tmp_path: Path, kind: tuple[str, ...]) -> None:
    flow, at = built(tmp_path, "table", *kind)
    pointers = flow.pointers
    (place,) = pointers.places_of[at["set_command"]]
    table = pointers.table_at(place)
    assert table is not None
    assert table.stride == 48
    assert at["keys"] not in table.functions
    assert {at[name] for name in ("set_command", "get_command", "delete_command", "join_command")} < set(
        table.functions
    )
    assert len(table.functions) == 5
    assert [pointers.name_beside(other) for other in table.places] == ["append", "delete", "get", "join", "set"]
    assert at["set_command"] in flow.indirect_only
    assert at["say"] not in flow.indirect_only


def test_redis() -> None:
    if not REDIS.exists():
        pytest.skip(f"{REDIS} is not installed")
    flow = flow_of(REDIS)
    table = SymbolTable.of(flow.elf, REDIS)
    began = time.process_time()
    (command,) = table.lookup("setCommand")
    assert command.offset in flow.indirect_only
    (place,) = flow.pointers.places_of[command.offset]
    assert flow.pointers.name_beside(place) == "set"
    commands = flow.pointers.table_at(place)
    assert commands is not None and len(commands.functions) > 200
    assert {"get", "lpush", "ping"} < {flow.pointers.name_beside(other, commands) for other in commands.places}
    (generic,) = table.lookup("setGenericCommand")
    assert generic.offset not in flow.indirect_only
    assert len(flow.callers(generic.offset)) >= 4
    for start in flow.blocks.block_starts:
        flow.successors(start)
    assert time.process_time() - began < 10
