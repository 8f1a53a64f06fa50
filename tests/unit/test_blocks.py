"""Basic blocks and instruction boundaries, compared with objdump."""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from bisect import bisect_left
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest

from dynacut.shared.binary.blocks import (
    Block,
    BlockMap,
    is_instruction_boundary,
)
from dynacut.shared.binary.decode import function_boundaries, instructions
from dynacut.shared.binary.elf import ElfFile
from dynacut.shared.binary.functions import FunctionRange, function_at, function_ranges, landing_pads
from dynacut.shared.binary.symbols import SymbolTable

needs_gcc = pytest.mark.skipif(
    not (shutil.which("gcc") and shutil.which("objdump")), reason="gcc or objdump is not installed"
)
LIBC = "/lib/x86_64-linux-gnu/libc.so.6"
LIBCRYPTO = "/usr/lib/x86_64-linux-gnu/libcrypto.so.3"
SERVERS = [
    "/usr/bin/redis-server",
    "/usr/sbin/nginx",
    "/usr/sbin/lighttpd",
    "/usr/lib/lighttpd/mod_webdav.so",
]


def run(*command: object) -> str:
    return subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True).stdout


def disassembly(elf: ElfFile, path: Path) -> dict[int, str]:
    """What objdump says, by module offset."""
    return _disassembly(path, elf.link_base)


@cache
def _disassembly(path: Path, link_base: int) -> dict[int, str]:
    found = {}
    for line in run("objdump", "-dw", "--no-show-raw-insn", path).splitlines():
        match = re.match(r" +([0-9a-f]+):\t(.*)", line)
        if match:
            found[int(match[1], 16) - link_base] = match[2]
    return found


def with_function_symbols(path: Path, folder: Path) -> Path:
    """A copy that has a symbol where each FDE's code begins, as readelf reads them: there objdump decodes anew.

    libcrypto has strings between its functions. objdump decodes them too, and would get out of step.
    """
    text = re.search(r"\] \.text +PROGBITS +([0-9a-f]+) [0-9a-f]+ ([0-9a-f]+)", run("readelf", "-SW", path))
    assert text
    first, size = int(text[1], 16), int(text[2], 16)
    starts = {int(start, 16) for start in re.findall(r" FDE .* pc=([0-9a-f]+)\.\.", run("readelf", "-wf", path))}
    options = [
        f"--add-symbol fde_{start:x}=.text:{start - first:#x},function,local"
        for start in sorted(starts)
        if first <= start < first + size
    ]
    assert len(options) > 1000
    (folder / "options").write_text("\n".join(options))
    run("objcopy", f"@{folder / 'options'}", path, folder / path.name)
    return folder / path.name


def boundaries(blocks: BlockMap) -> list[int]:
    return [
        offset
        for offset in range(blocks.base, blocks.base + 8 * len(blocks.boundary_bits))
        if blocks.is_boundary(offset)
    ]


def check_sound(elf: ElfFile, blocks: BlockMap, theirs: dict[int, str]) -> None:
    """No boundary differs from objdump's, blocks are whole instructions, branches lead to leaders only."""
    ours = boundaries(blocks)
    assert [offset for offset in ours if offset not in theirs] == []
    starts = list(blocks.block_starts)
    known = set(starts)
    assert starts == sorted(known)
    ordered = sorted(theirs)
    ranges = function_ranges(elf)
    everything = [blocks.block(index) for index in range(len(blocks))]
    assert all(one.end <= other.start for one, other in pairwise(everything))
    for block in everything:
        assert blocks.is_boundary(block.start) and block.size > 0
        function = function_at(ranges, block.start)
        assert function is not None and block.end <= function.end
        inside = ordered[bisect_left(ordered, block.start) : bisect_left(ordered, block.end)]
        for offset in inside[:-1]:
            assert not re.match(r"(\w+ )?(j|call|ret|ud2|hlt|int3)", theirs[offset]), hex(offset)
    covered: set[int] = set()
    for block in everything:
        covered.update(range(block.start, block.end))
    assert set(ours) <= covered
    for offset, text in theirs.items():
        match = re.match(r"(?:\w+ )?(?:j\w+|call) +([0-9a-f]+)\b", text)
        if match and blocks.is_boundary(offset):
            target = int(match[1], 16) - elf.link_base
            assert target in known or not blocks.is_boundary(target), f"{offset:#x} {text}"


@pytest.mark.slow
@pytest.mark.parametrize("path", [*SERVERS, LIBC, LIBCRYPTO])
def test_same_as_objdump(path: str, tmp_path: Path) -> None:
    if not Path(path).exists() or not shutil.which("objdump"):
        pytest.skip(f"{path} or objdump is not installed")
    elf = ElfFile.open(Path(path))
    began = time.perf_counter()
    blocks = BlockMap.of(elf)
    assert time.perf_counter() - began < 10
    theirs = disassembly(elf, with_function_symbols(Path(path), tmp_path) if path == LIBCRYPTO else Path(path))
    check_sound(elf, blocks, theirs)
    # And nothing is missing, but for the instructions that libc enters in their middle.
    ranges = function_ranges(elf)
    missing = [
        offset for offset in theirs if function_at(ranges, offset) is not None and not blocks.is_boundary(offset)
    ]
    assert len(missing) <= (20 if path == LIBC else 0)


def test_libc_is_not_patched_where_a_lock_prefix_is_jumped_over() -> None:
    if not Path(LIBC).exists():
        pytest.skip(f"{LIBC} is not installed")
    elf = ElfFile.open(Path(LIBC))
    blocks = BlockMap.of(elf)
    theirs = disassembly(elf, Path(LIBC))
    locked = [offset for offset, text in theirs.items() if text.startswith("lock ")]
    entered = {int(match[1], 16) for text in theirs.values() if (match := re.match(r"j\w+ +([0-9a-f]+)\b", text))}
    traps = [offset for offset in locked if offset + 1 in entered]
    for offset in traps:
        assert not blocks.is_boundary(offset) and not blocks.is_boundary(offset + 1)
        assert blocks.block_at(offset) is None and blocks.block_at(offset + 1) is None
    assert any(blocks.is_boundary(offset) for offset in locked)


def assembled(folder: Path, text: str, *options: str) -> tuple[ElfFile, dict[str, int]]:
    """Assemble a shared object; its labels by name."""
    (folder / "code.s").write_text(text)
    run("gcc", "-shared", "-nostdlib", *options, folder / "code.s", "-o", folder / "code.so")
    elf = ElfFile.open(folder / "code.so")
    found = re.findall(r"^ +\d+: (\w+) .* (\w+)$", run("readelf", "-sW", folder / "code.so"), re.M)
    return elf, {name: int(value, 16) - elf.link_base for value, name in found}


@needs_gcc
def test_lock_prefix(tmp_path: Path) -> None:
    elf, at = assembled(
        tmp_path,
        """
f:  .cfi_startproc
    cmpl $0, %fs:0x18
    je unlocked
prefix: lock
unlocked: cmpxchg %esi, (%rdi)
after: nop
    lock cmpxchg %esi, (%rdi)
    jne after
end: ret
    .cfi_endproc
""",
    )
    blocks = BlockMap.of(elf)
    function = function_ranges(elf)[0]
    for offset in range(at["prefix"], at["after"]):
        assert not blocks.is_boundary(offset) and blocks.block_at(offset) is None
        assert not is_instruction_boundary(elf, offset)
        assert blocks.instruction_at(offset) is None and blocks.instruction_size(offset) is None
    assert blocks.block_at(at["after"]) == Block(at["after"], at["end"])
    assert blocks.block_at(at["f"]) == Block(at["f"], at["prefix"])
    assert list(function_boundaries(elf, function)) == boundaries(blocks)
    assert blocks.instruction_at(at["after"] + 1) == (
        at["after"] + 1,
        4,
        "lock cmpxchg",
        "dword ptr [rdi], esi",
    )


@needs_gcc
def test_undecodable_bytes_end_certainty(tmp_path: Path) -> None:
    elf, at = assembled(
        tmp_path,
        """
f:  .cfi_startproc
    xor %eax, %eax
    jmp last
bad: .byte 0x06, 0x06
last: ret
    .cfi_endproc
g:  .cfi_startproc
    ret
    .cfi_endproc
""",
    )
    blocks = BlockMap.of(elf)
    assert list(blocks.block_starts) == [at["f"], at["g"]]
    assert blocks.block_at(at["f"]) == Block(at["f"], at["bad"])
    assert not blocks.is_boundary(at["last"]) and blocks.block_at(at["last"]) is None
    decoded = instructions(elf, function_ranges(elf)[0])
    assert len(decoded) == 2 and decoded[-1].offset + decoded[-1].size == at["bad"]
    assert not is_instruction_boundary(elf, at["last"]) and is_instruction_boundary(elf, at["f"] + 2)


@needs_gcc
def test_data_outside_functions_is_never_decoded(tmp_path: Path) -> None:
    elf, at = assembled(
        tmp_path,
        """
    .ascii "not code at all"
f:  .cfi_startproc
    call g
    ret
    .cfi_endproc
data: .byte 0x48, 0xb8
g:  .cfi_startproc
    ret
    .cfi_endproc
    nop
""",
    )
    blocks = BlockMap.of(elf)
    assert list(blocks.block_starts) == [at["f"], at["f"] + 5, at["g"]]
    assert boundaries(blocks) == [at["f"], at["f"] + 5, at["g"]]
    for offset in (at["f"] - 1, at["data"], at["g"] + 1, -1, 1 << 50):
        assert not blocks.is_boundary(offset) and blocks.block_at(offset) is None
        assert not is_instruction_boundary(elf, offset)


@needs_gcc
def test_stubs_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "p.c").write_text('#include <stdio.h>\nint main(void) { return puts("x"); }\n')
    for options in ((), ("-Wl,-z,lazy", "-fcf-protection=full"), ("-no-pie",)):
        run("gcc", *options, tmp_path / "p.c", "-o", tmp_path / "p")
        elf = ElfFile.open(tmp_path / "p")
        blocks = BlockMap.of(elf)
        stubs = [section for section in elf.sections if section.name.startswith(".plt")]
        assert stubs and len(blocks)
        for section in stubs:
            start = section.address - elf.link_base
            assert blocks.blocks_in(start, start + section.size) == []


@needs_gcc
def test_leaders(tmp_path: Path) -> None:
    """Each kind of leader, and ends at the next one."""
    elf, at = assembled(
        tmp_path,
        """
    .globl exported
    .type exported, @function
f:  .cfi_startproc
    test %edi, %edi
    je target
cond: call g
called: lea taken(%rip), %rax
    lea inner(%rip), %rcx
    notrack jmp *%rax
jumped: nop
target: nop
taken: nop
pointed: nop
exported: ud2
trapped: nop
    .byte 0xeb, 0xfd        # jmp trapped
short: syscall
    ret
    .cfi_endproc
g:  .cfi_startproc
    nop
inner: nop
    jrcxz inner
loops: loop g
    rep ret
g_end: .cfi_endproc
    .data
    .quad pointed
""",
    )
    names = [
        "f",
        "cond",
        "called",
        "jumped",
        "target",
        "taken",
        "pointed",
        "exported",
        "trapped",
        "short",
        "g",
    ]
    names += ["inner", "loops"]
    expected = sorted({at[name] for name in names} | {at["loops"] + 2})
    blocks = BlockMap.of(elf)
    assert list(blocks.block_starts) == expected
    assert blocks.block_at(at["g_end"] - 1) == Block(at["loops"] + 2, at["g_end"])
    assert blocks.blocks_in(at["f"], at["cond"]) == [Block(at["f"], at["cond"])]
    assert blocks.block_at(at["target"]) == Block(at["target"], at["taken"])


SWITCH = """
int g(int); int h(int);
int f(int x, int y)
{
    switch (x) {
    case 0: return g(y) + 1;
    case 1: return h(y) + 2;
    case 2: y = g(y + 3); break;
    case 3: return g(h(y)) * 7;
    case 4: y = h(y) ^ 5; break;
    case 5: return h(g(y)) / 3;
    case 7: y = g(y) * 11; break;
    default: return -1;
    }
    return y * h(y);
}
int g(int x) { __asm__ volatile(""); return x * 3; }
int h(int x) { __asm__ volatile(""); return x ^ 3; }
static void *where;
int computed(int x)
{
    static void *const labels[] = {&&zero, &&one, &&two};
    goto *labels[x];
zero: return g(x);
one: x += h(x);
two: return x * 5;
}
int main(int c, char **v) { return f(c, c) + computed(c % 3); }
"""


@needs_gcc
@pytest.mark.parametrize("level", ["-O0", "-O2"])
@pytest.mark.parametrize(
    "kind",
    [
        ("-fPIE", "-pie"),
        ("-fPIC", "-shared"),
        ("-fno-pie", "-no-pie"),
        ("-fPIE", "-no-pie"),
        ("-fno-pie", "-no-pie", "-static"),
        ("-fPIE", "-static-pie"),
        ("-fPIE", "-pie", "-Wl,-z,pack-relative-relocs"),
        ("-fPIE", "-pie", "-fcf-protection=full"),
        ("-fPIE", "-pie", "-Wl,-z,noseparate-code"),
    ],
)
def test_jump_tables_lead_to_blocks(tmp_path: Path, level: str, kind: tuple[str, ...]) -> None:
    """The truth is gcc's own: the labels in its tables, which -Wa,-L keeps in the symbol table."""
    (tmp_path / "p.c").write_text(SWITCH)
    program = tmp_path / "p"
    run("gcc", level, *kind, "-fno-inline", "-Wa,-L", "-g0", tmp_path / "p.c", "-o", program)
    elf = ElfFile.open(program)
    (tmp_path / "stripped").write_bytes(program.read_bytes())
    run("strip", tmp_path / "stripped")
    stripped = ElfFile.open(tmp_path / "stripped")
    blocks = BlockMap.of(stripped)
    starts = set(blocks.block_starts)
    table = SymbolTable.of(elf, program)
    (f,) = table.lookup("f")
    (computed,) = table.lookup("computed")
    assembly = run("gcc", level, *kind[:1], *kind[2:], "-fno-inline", "-S", "-o", "-", tmp_path / "p.c")
    labels = set(re.findall(r"^\s+\.(?:long|quad)\s+(\.L\d+)(?:-\.L\d+)?$", assembly, re.M))
    assert len(labels) >= 9
    for label in labels:
        inside = [s for s in table.lookup(label) if any(0 <= s.offset - x.offset < x.size for x in (f, computed))]
        assert inside and all(symbol.offset in starts for symbol in inside), label
    # None but real instructions start blocks, also when code and tables share a segment.
    theirs = disassembly(elf, program)
    ranges = (FunctionRange(x.offset, x.offset + x.size) for x in (f, computed))
    for function in ranges:
        assert all(block.start in theirs for block in blocks.blocks_in(function.start, function.end))


@needs_gcc
@pytest.mark.skipif(not shutil.which("g++"), reason="g++ is not installed")
def test_landing_pads_are_leaders(tmp_path: Path) -> None:
    code = "int g(int x) { if (x > 3) throw x; return 1; }\n"
    code += "int f(int x) { try { return g(x); } catch (int y) { return y; } catch (...) { return 5; } }\n"
    (tmp_path / "p.cc").write_text(code + "int main() { return f(1); }\n")
    run("g++", "-O2", tmp_path / "p.cc", "-o", tmp_path / "p")
    elf = ElfFile.open(tmp_path / "p")
    assert set(landing_pads(elf)) <= set(BlockMap.of(elf).block_starts)


@needs_gcc
def test_sizes_and_instructions_agree_with_decoding(tmp_path: Path) -> None:
    (tmp_path / "p.c").write_text(SWITCH)
    run("gcc", "-O2", tmp_path / "p.c", "-o", tmp_path / "p")
    elf = ElfFile.open(tmp_path / "p")
    blocks = BlockMap.of(elf)
    for function in function_ranges(elf):
        decoded = instructions(elf, function)
        assert decoded[-1].offset + decoded[-1].size == function.end
        for instruction in decoded:
            offset = instruction.offset
            assert blocks.is_boundary(offset) and is_instruction_boundary(elf, offset)
            assert blocks.instruction_at(offset) == instruction
            assert blocks.instruction_size(offset) == instruction.size
            assert not any(blocks.is_boundary(offset + n) for n in range(1, instruction.size))
        assert sum(block.size for block in blocks.blocks_in(*function)) == function.end - function.start


def test_without_functions(tmp_path: Path) -> None:
    if not shutil.which("gcc"):
        pytest.skip("gcc is not installed")
    (tmp_path / "code.s").write_text("f: ret\n")
    run("gcc", "-shared", "-nostdlib", tmp_path / "code.s", "-o", tmp_path / "code.so")
    blocks = BlockMap.of(ElfFile.open(tmp_path / "code.so"))
    assert len(blocks) == 0 and not blocks.is_boundary(0) and blocks.block_at(0x1000) is None
