"""The machine code that runs for one shot in a stopped thread: decoded, and run."""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynacut.live.ptrace.resumption import SYSCALL_SIZE
from dynacut.live.ptrace.stub import Stub, restarting_stub, restoring_tail

capstone: Any = import_module("capstone")

SOURCE = Path(__file__).parent / "programs" / "stubbed.c"
CLOBBERED = ("rax", "rcx", "rdx", "rsi", "rdi", "r8", "r9", "r10", "r11")
VALUES = {name: 0xF000_0000_0000_0000 + index for index, name in enumerate(CLOBBERED)}
AREA = 0x3000_0000_0000
RESUME_AT = 0x5555_4444_3333
needs_gcc = pytest.mark.skipif(not (shutil.which("gcc") and shutil.which("nm")), reason="gcc or nm is not installed")


def decoded(code: bytes) -> list[Any]:
    decoder = capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_64)
    decoder.detail = True
    found = list(decoder.disasm(code, 0))
    assert sum(instruction.size for instruction in found) == len(code), "it is not decoded to its end"
    return found


def text(code: bytes) -> list[str]:
    return [f"{instruction.mnemonic} {instruction.op_str}".strip() for instruction in decoded(code)]


def everything() -> Stub:
    stub = Stub()
    stub.syscall(9, 0x3000_0010_0000, 4096, 3, 0x100022, -1, 0)
    stub.require(0x3000_0010_0000)
    stub.store(AREA, 0x1122_3344_5566_7788)
    stub.syscall(39)
    stub.require(-38)
    stub.set_byte(AREA + 8)
    return stub


def test_a_system_call_is_its_arguments_and_syscall() -> None:
    stub = Stub()
    stub.syscall(13, 5, 1 << 40, -1, 8, 0xFFFF_FFFF, 1 << 32)
    assert text(stub.body()) == [
        "mov eax, 0xd",
        "mov edi, 5",
        "movabs rsi, 0x10000000000",
        "movabs rdx, 0xffffffffffffffff",
        "mov r10d, 8",
        "mov r8d, 0xffffffff",
        "movabs r9, 0x100000000",
        "syscall",
    ]


def test_a_call_is_made_only_otherwise_without_flags() -> None:
    stub = Stub()
    stub.otherwise(0x1000, 11, 0x3000_0010_0000, 0x20000)
    stub.set_byte(0x2000)
    assert text(stub.body()) == [
        "movabs rcx, 0xfffffffffffff000",
        "lea rcx, [rax + rcx]",
        "jrcxz 0x26",
        "mov eax, 0xb",
        "movabs rdi, 0x300000100000",
        "mov esi, 0x20000",
        "syscall",
        "mov ecx, 0x2000",
        "mov byte ptr [rcx], 1",
    ]


def test_a_condition_leaves_the_rest_out_without_flags() -> None:
    stub = Stub()
    stub.require(0x1000)
    stub.set_byte(0x2000)
    body = stub.body()
    assert text(body) == [
        "movabs rcx, 0xfffffffffffff000",
        "lea rcx, [rax + rcx]",
        "jrcxz 0x15",
        f"jmp {len(body):#x}",
        "mov ecx, 0x2000",
        "mov byte ptr [rcx], 1",
    ]


def test_a_store_writes_eight_bytes() -> None:
    stub = Stub()
    stub.store(0x7FFF_0000_1000, 5)
    assert text(stub.body()) == ["movabs rcx, 0x7fff00001000", "movabs rax, 5", "mov qword ptr [rcx], rax"]


def test_the_tail_sets_each_clobbered_register_and_jumps() -> None:
    tail = restoring_tail(VALUES, VALUES["rax"], RESUME_AT)
    assert tail[-8:] == struct.pack("<Q", RESUME_AT)
    assert text(tail[:-8]) == [
        *(f"movabs {name}, {value:#x}" for name, value in VALUES.items()),
        "jmp qword ptr [rip]",
    ]


def test_the_size_is_that_of_a_stub_with_two_entries() -> None:
    for stub in (everything(), Stub()):
        whole = restarting_stub(stub.body(), VALUES | {"rbx": 0x1111}, (1, RESUME_AT), (2, RESUME_AT))
        assert stub.size == len(whole)
        assert stub.size > len(stub.body()) + len(restoring_tail(VALUES, 1, RESUME_AT))


def test_nothing_touches_the_stack_or_flags_but_syscall() -> None:
    stub = everything()
    for instruction in decoded(stub.body() + restoring_tail(VALUES, VALUES["rax"], RESUME_AT)[:-8]):
        line = f"{instruction.mnemonic} {instruction.op_str}"
        read, written = (
            [instruction.reg_name(register) for register in registers] for registers in instruction.regs_access()
        )
        assert not re.search(r"\b[re]?sp\b|\b[re]?bp\b|rbx|r1[2-5]", " ".join([line, *read, *written])), line
        if instruction.mnemonic != "syscall":
            assert "rflags" not in read + written, line
            assert instruction.eflags == 0, line
            assert not set(written) - {"rip", *CLOBBERED, "eax", "ecx", "edx", "esi", "edi", *_halves()}, line


def _halves() -> list[str]:
    return [f"r{number}d" for number in range(8, 12)]


@given(st.lists(st.integers(-(1 << 63), (1 << 64) - 1), max_size=6), st.integers(0, 500))
def test_any_argument_is_loaded_as_it_is(arguments: list[int], number: int) -> None:
    stub = Stub()
    stub.syscall(number, *arguments)
    loads = text(stub.body())[:-1]
    assert [int(load.rpartition(" ")[2], 0) for load in loads] == [
        number,
        *(argument % (1 << 64) for argument in arguments),
    ]


@pytest.fixture(scope="module")
def executable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    program = tmp_path_factory.mktemp("stubbed") / "stubbed"
    subprocess.run(["gcc", "-O1", "-Wall", "-Wextra", "-Werror", "-no-pie", SOURCE, "-o", program], check=True)
    return program


def run(executable: Path, stub: Stub, flags: int) -> dict[str, int]:
    """Runs a stub; registers, flags and memory where it resumes."""
    return run_code(executable, stub.body() + restoring_tail(VALUES, VALUES["rax"], resumed(executable)), flags)


def resumed(executable: Path) -> int:
    """The address at which the program prints what it finds."""
    symbols = subprocess.run(["nm", executable], check=True, capture_output=True, text=True).stdout
    return next(int(line.split()[0], 16) for line in symbols.splitlines() if line.endswith(" T resumed"))


def run_code(executable: Path, content: bytes, flags: int) -> dict[str, int]:
    code = executable.parent / "stub.bin"
    code.write_bytes(content)
    done = subprocess.run([executable, code, f"{flags:x}"], check=True, capture_output=True, text=True, timeout=10)
    return {name: int(value, 16) for name, value in (line.split() for line in done.stdout.splitlines())}


@needs_gcc
@pytest.mark.parametrize("flags", [0x202, 0xED7, 0x246, 0xA93])
def test_the_interrupted_code_notices_nothing(executable: Path, flags: int) -> None:
    found = run(executable, everything(), flags)
    assert {name: found[name] for name in CLOBBERED} == VALUES
    kept = ("rbx", "rbp", "r12", "r13", "r14", "r15", "redzone8", "redzone128")
    assert [found[name] for name in kept] == [0x1111, 0x2222, 0x3333, 0x4444, 0x5555, 0x6666, 0x7777, 0x8888]
    assert found["rsp"] == 1
    assert found["flags"] == flags
    assert found["area0"] == 0x1122_3344_5566_7788, "the first condition holds: mmap gave the address asked for"
    assert found["area1"] == 0, "the second does not: getpid is not -38"


@needs_gcc
@pytest.mark.parametrize(("skipped", "rax"), [(0, 0x5151), (SYSCALL_SIZE, 0xE1E1)])
def test_each_entry_leads_to_an_end_of_its_own(executable: Path, skipped: int, rax: int) -> None:
    """All jumps in a stub are relative: without what lies before the second entry, that is where it begins."""
    stub = everything()
    address, nowhere = resumed(executable), 0x1000
    ends = [(0x5151, address), (0xE1E1, nowhere)]
    if skipped:
        ends = [(0x5151, nowhere), (0xE1E1, address)]
    code = restarting_stub(stub.body(), VALUES | {"rbx": 0x1111}, ends[0], ends[1])
    found = run_code(executable, code[skipped:], 0xED7)
    assert {name: found[name] for name in CLOBBERED} == VALUES | {"rax": rax}
    kept = ("rbx", "rbp", "r12", "r13", "r14", "r15", "redzone8", "redzone128", "rsp", "flags")
    assert [found[name] for name in kept] == [0x1111, 0x2222, 0x3333, 0x4444, 0x5555, 0x6666, 0x7777, 0x8888, 1, 0xED7]
    assert found["area0"] == 0x1122_3344_5566_7788, "the body has run"


@needs_gcc
def test_a_condition_on_an_error_holds(executable: Path) -> None:
    stub = Stub()
    stub.syscall(100_000)
    stub.require(-38)
    stub.set_byte(AREA + 8)
    assert run(executable, stub, 0x202)["area1"] == 1


@needs_gcc
def test_a_condition_that_fails_leaves_out_all_that_follows(executable: Path) -> None:
    stub = Stub()
    stub.syscall(100_000)
    stub.require(0)
    stub.store(AREA, 1)
    stub.require(0)
    stub.set_byte(AREA + 8)
    found = run(executable, stub, 0x202)
    assert (found["area0"], found["area1"]) == (0, 0)
    assert {name: found[name] for name in CLOBBERED} == VALUES
