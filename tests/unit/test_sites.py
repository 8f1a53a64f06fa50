"""SITE: every form finds its place, and what is not found or ambiguous is said."""

from __future__ import annotations

import atexit
import shutil
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynacut.shared.binary.elf import ElfFile
from dynacut.shared.code import CodeOf
from dynacut.shared.errors import DynacutError
from dynacut.shared.plan import PlannedModule
from dynacut.shared.sites import Locator
from dynacut.shared.target import PAGE_SIZE, Mapping, Module

PROGRAMS = Path(__file__).parent / "programs"
BASE, LIBRARY_BASE = 0x5555_5555_4000, 0x7FFF_F7C0_0000
pytestmark = pytest.mark.skipif(not shutil.which("gcc"), reason="gcc is not installed")

SECOND = "static __attribute__((noinline, used)) int twice(int value) { return 2 * value; }\n"
EXTRA = "int extra(int value) { return value + 1; }\nint beta(void) { return 6; }\n"


@cache
def built() -> tuple[Path, Path]:
    """The server and its library, built once for all tests that need them."""
    folder = Path(mkdtemp(prefix="dynacut-test-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    (folder / "second.c").write_text(SECOND)
    (folder / "extra.c").write_text(EXTRA)
    server, library = folder / "server", folder / "libextra.so.1"
    common = ["gcc", "-O1", "-g", "-Wl,--build-id"]
    subprocess.run([*common, "-fPIE", "-pie", PROGRAMS / "server.c", folder / "second.c", "-o", server], check=True)
    subprocess.run([*common, "-fPIC", "-shared", folder / "extra.c", "-o", library], check=True)
    return server, library


class MemoryTarget:
    """A Target whose memory is this process's own: ELF files laid out as a kernel would."""

    def __init__(self, *files: tuple[Path, int]) -> None:
        self.label = "process 4711 (server)"
        self.exe = str(files[0][0])
        self.has_shadow_stack = False
        self._memory: dict[int, bytearray] = {}
        self.written: set[int] = set()
        self.modules: Sequence[Module] = tuple(self._mapped(path, base, path is files[0][0]) for path, base in files)

    @property
    def mappings(self) -> Sequence[Mapping]:
        return sorted((part for module in self.modules for part in module.mappings), key=lambda part: part.start)

    def _mapped(self, path: Path, base: int, is_executable: bool) -> Module:
        elf = ElfFile.open(path)
        mappings = []
        for segment in elf.segments:
            start = segment.offset & -PAGE_SIZE
            size = -(-(segment.offset + segment.memory_size - start) // PAGE_SIZE) * PAGE_SIZE
            file_start = segment.file_offset & -PAGE_SIZE
            memory = bytearray(bytes(elf.data[file_start : file_start + size]).ljust(size, b"\0"))
            self._memory[base + start] = memory
            mappings.append(
                Mapping(
                    base + start,
                    base + start + size,
                    True,
                    segment.writable,
                    segment.executable,
                    True,
                    file_start,
                    str(path),
                    1,
                )
            )
        names = frozenset({path.name, path.name.split(".so")[0]})
        end = mappings[-1].end
        return Module(path.name, names, str(path), path, Path("/"), base, end, is_executable, tuple(mappings))

    def private_pages(self, mapping: Mapping) -> Sequence[int]:
        return sorted(page for page in self.written if mapping.start <= page < mapping.end)

    def read(self, address: int, size: int) -> bytes:
        for start, memory in self._memory.items():
            if start <= address and address + size <= start + len(memory):
                return bytes(memory[address - start : address - start + size])
        raise DynacutError(f"{size} bytes at {address:#x} of {self.label} cannot be read")

    def write(self, address: int, data: bytes) -> None:
        start = next(start for start, memory in self._memory.items() if start <= address < start + len(memory))
        self._memory[start][address - start : address - start + len(data)] = data
        self.written |= {page & -PAGE_SIZE for page in range(address, address + len(data))}

    @property
    def everything(self) -> dict[int, bytes]:
        """All memory, to compare."""
        return {start: bytes(memory) for start, memory in self._memory.items()}

    def address(self, symbol: str) -> int:
        """Where a symbol of any module lies, as nm says."""
        for module in self.modules:
            for line in _nm(module.file):
                value, _, name = line.split()[-3:]
                if name == symbol:
                    return module.base + int(value, 16)
        raise KeyError(symbol)

    def offset(self, symbol: str) -> int:
        """The module offset of a symbol of the executable."""
        return self.address(symbol) - BASE


@cache
def _nm(path: Path) -> list[str]:
    text = subprocess.run(["nm", "--defined-only", path], check=True, capture_output=True, text=True).stdout
    return [line for line in text.splitlines() if len(line.split()) == 3]


def new_target() -> MemoryTarget:
    server, library = built()
    return MemoryTarget((server, BASE), (library, LIBRARY_BASE))


@pytest.fixture
def target() -> MemoryTarget:
    return new_target()


def locate(target: MemoryTarget, site: str, modules: dict[str, PlannedModule] | None = None) -> int:
    return Locator(CodeOf(target), modules).locate(site).address


def refused(target: MemoryTarget, site: str, modules: dict[str, PlannedModule] | None = None) -> DynacutError:
    with pytest.raises(DynacutError) as caught:
        locate(target, site, modules)
    assert "\n" not in caught.value.problem + caught.value.advice
    return caught.value


def test_every_form_of_a_site_finds_the_same_place(target: MemoryTarget) -> None:
    address = target.address("alpha")
    offset = target.offset("alpha")
    for site in ("alpha", "server!alpha", f"server+{offset:#x}", f"server+{offset}", f"{address:#x}", "alpha+0"):
        assert locate(target, site) == address
        assert locate(target, f"  {site} ") == address
    assert locate(target, "alpha+0x4") == locate(target, "server!alpha+4") == address + 4


def test_a_line_finds_its_first_instruction(target: MemoryTarget) -> None:
    lines = (PROGRAMS / "server.c").read_text().splitlines()
    (number,) = [index for index, line in enumerate(lines, 1) if "the line with the call" in line]
    assert target.address("main") <= locate(target, f"server.c:{number}") < target.address("main") + 64


def test_a_module_is_known_by_any_of_its_names(target: MemoryTarget) -> None:
    assert locate(target, "libextra!extra") == locate(target, "libextra.so.1!extra") == target.address("extra")
    assert locate(target, "libextra.so.1+0x10") == LIBRARY_BASE + 0x10


def test_an_ambiguous_symbol_names_its_candidates(target: MemoryTarget) -> None:
    error = refused(target, "twice")
    assert error.problem.count("server+0x") == 2
    assert "ambiguous" in error.problem
    error = refused(target, "beta")
    assert "server+0x" in error.problem and "libextra.so.1+0x" in error.problem
    assert locate(target, "server!beta") == target.address("beta")


def test_what_is_not_found_is_said_with_what_is_near(target: MemoryTarget) -> None:
    assert "no function 'alpa' in process 4711 (server)" in refused(target, "alpa").problem
    assert "alpha" in refused(target, "alpa").advice
    error = refused(target, "libnone!extra")
    assert "no module 'libnone'" in error.problem and "libextra.so.1" in error.advice
    assert "no function 'alpha' in libextra.so.1" in refused(target, "libextra!alpha").problem
    assert "lies in no module" in refused(target, "0x1000").problem
    assert "no code on that line" in refused(target, "server.c:1").problem
    assert "no code on that line" in refused(target, "other.c:10").problem


def test_data_is_no_function(target: MemoryTarget) -> None:
    assert "no function 'counter'" in refused(target, "counter").problem


@pytest.mark.parametrize("site", ["", " ", "!", "a!", "!a", "a!b!c"])
def test_what_is_no_site_is_said(target: MemoryTarget, site: str) -> None:
    assert "is not a site" in refused(target, site).problem


@pytest.mark.parametrize("site", ["alpha+010", "server+010", "server!alpha+00", "alpha+" + "1" * 5000])
def test_an_offset_in_an_odd_form_is_no_crash(target: MemoryTarget, site: str) -> None:
    try:
        locate(target, site)
    except DynacutError as error:
        assert "\n" not in error.problem


def test_a_line_number_that_is_too_long_is_no_crash(target: MemoryTarget) -> None:
    refused(target, "server.c:" + "1" * 5000)


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="ab!+0x19.:c \t-", max_size=12))
def test_any_text_is_a_place_or_refused_in_one_line(text: str) -> None:
    target = new_target()
    try:
        locate(target, text)
    except DynacutError as error:
        assert "\n" not in error.problem


@pytest.mark.parametrize("site", ["al\npha", "server+0x10\nbeta", "a\x1b[2Jb"])
def test_a_site_with_control_characters_is_refused_in_one_line_without_them(target: MemoryTarget, site: str) -> None:
    assert refused(target, site).problem.isprintable()


def test_the_plans_module_is_found_by_its_build_id_whatever_its_name(target: MemoryTarget) -> None:
    build_id = ElfFile.open(built()[1]).build_id
    modules = {"libold": PlannedModule("/usr/lib/libold.so", build_id)}
    assert locate(target, "libold+0x10", modules) == LIBRARY_BASE + 0x10
    assert locate(target, "libold!extra", modules) == target.address("extra")


def test_another_build_id_is_refused_and_the_one_there_named(target: MemoryTarget) -> None:
    there = ElfFile.open(built()[0]).build_id
    error = refused(target, "server+0x10", {"server": PlannedModule("", "ab" * 20)})
    assert "ab" * 20 in error.problem
    assert f"has {there}" in error.problem
    assert "anew" in error.advice
