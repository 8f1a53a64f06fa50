"""A user's handler library: bound as the real dynamic linker binds it, and refused where that is not possible."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from mmap import PROT_EXEC, PROT_READ, PROT_WRITE
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dynacut.handlers.table import MAGIC, KernelAction, Layout, Table, UserLibrary, Write
from dynacut.live.process import Process
from dynacut.shared.binary.dynamic import Dynamic, Rela
from dynacut.shared.binary.elf import ElfFile
from dynacut.shared.errors import DynacutError
from dynacut.shared.library.file import MAX_MEMORY_SIZE, LibraryFile
from dynacut.shared.library.library import Library
from dynacut.shared.region import new_table
from dynacut.shared.target import PAGE_SIZE

pytestmark = pytest.mark.skipif(not shutil.which("gcc"), reason="gcc is not installed")

FREE = 0x1000_0000_0000
HANDLER = "void trap_handler(int signal, void *info, void *context) { (void)signal, (void)info, (void)context; }\n"
CALLS = """
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>
char text[100] = "text";
static int own;
int *place = &own;
FILE **stream = &stdout;
void *(*copy)(void *, const void *, size_t) = memcpy;
extern void nobody_defines_this(void) __attribute__((weak));
void other(int n) { printf("%d %s\\n", n, text); }
void trap_handler(int signal, void *info, void *context)
{
	(void)info;
	memset(text, signal, sizeof(text));
	copy(text, context, strlen(text));
	if (strchr(text, 'x') && memcmp(text, context, 9) && strcmp(text, "y") && nobody_defines_this)
		nobody_defines_this();
	int file = open("/dev/null", O_WRONLY);
	if (file < 0)
		perror(getenv("HOME"));
	write(file, text, errno + time(NULL) % 2);
	close(file);
	other(*place);
	fflush(*stream);
}
"""


def build(folder: Path, source: str, *flags: str, name: str = "handler.so") -> Path:
    """Compiles a shared object, without warnings' being errors: some of what is refused is warned of."""
    code = folder / f"{name}.c"
    code.write_text(source)
    output = folder / name
    command = ["gcc", "-shared", "-fPIC", "-w", "-O1", "-o", str(output), str(code), *flags]
    subprocess.run(command, check=True, capture_output=True, stdin=subprocess.DEVNULL)
    return output


@pytest.fixture
def own() -> Iterator[Process]:
    """This process as a target: it has the C library, and a real dynamic linker to compare with."""
    with Process(os.getpid()) as process:
        yield process


def words(library: Library) -> dict[int, int]:
    """Every aligned word of the library's memory, by its offset from the start."""
    found = {}
    for segment in library.segments:
        contents = segment.contents.ljust(segment.size, b"\0")
        for at in range(0, segment.size, 8):
            found[segment.address - library.record.start + at] = int.from_bytes(contents[at : at + 8], "little")
    return found


def problem(path: Path, own: Process, symbol: str = "trap_handler") -> str:
    """What a library is refused for: problem, details and advice."""
    with pytest.raises(DynacutError) as caught:
        LibraryFile(path, symbol).load(own, None)
    error = caught.value
    assert error.advice
    return "\n".join([error.problem, *error.details, error.advice])


# What fits: compared with the dynamic linker's own work.


@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("-Wl,-z,now",),
        ("-Wl,-z,norelro",),
        ("-Wl,-z,pack-relative-relocs",),
        ("-Wl,-z,noseparate-code",),
        ("-Wl,--hash-style=sysv",),
        ("-s",),
        ("-g", "-O2", "-fcf-protection=full"),
    ],
)
def test_it_is_bound_as_the_dynamic_linker_binds_it(tmp_path: Path, own: Process, flags: tuple[str, ...]) -> None:
    path = build(tmp_path, CALLS, *flags)
    file = LibraryFile(path, "trap_handler")
    library = file.load(own, None)
    loaded = ctypes.CDLL(str(path), mode=os.RTLD_NOW | os.RTLD_LOCAL | os.RTLD_DEEPBIND)
    base = ctypes.cast(loaded.trap_handler, ctypes.c_void_p).value - file.handler  # type: ignore[operator]
    dynamic = Dynamic(file.elf)
    places = [each.place for each in dynamic.relocations()] + list(dynamic.packed_places())
    assert len(places) > 20
    ours = words(library)
    end = library.range.stop - library.record.start
    compared_own = compared_foreign = 0
    for place in places:
        theirs = int.from_bytes(own.read(base + place, 8), "little")
        value = ours[place]
        if base <= theirs < base + end:
            assert value - library.record.start == theirs - base, f"{place:#x}"
            compared_own += 1
        else:
            assert value == theirs, f"{place:#x}"
            compared_foreign += theirs != 0
    assert compared_own >= 5 and compared_foreign >= 12


def test_indirect_functions_are_those_that_were_chosen_for_this_processor(tmp_path: Path, own: Process) -> None:
    """The comparison above has them; here it is made sure that none is left at its resolver."""
    file = LibraryFile(build(tmp_path, CALLS), "trap_handler")
    library = file.load(own, None)
    libc = next(module for module in own.modules if module.name.startswith("libc.so"))
    resolvers = {
        libc.base + symbol.offset
        for name in ("memcpy", "strlen", "memset", "strchr")
        for symbol in Dynamic(ElfFile.open(libc.file)).exported[name]
    }
    assert resolvers.isdisjoint(words(library).values())
    assert libc.base in library.bound_to


def test_a_version_that_is_not_the_default_one_is_found(tmp_path: Path, own: Process) -> None:
    old = '__asm__(".symver realpath, realpath@GLIBC_2.2.5");\n'
    source = "char *realpath(const char *, char *);\nchar *(*function)(const char *, char *) = realpath;\n" + HANDLER
    values = []
    for name, text in (("old.so", old + source), ("new.so", source)):
        file = LibraryFile(build(tmp_path, text, name=name), "trap_handler")
        place = Dynamic(file.elf).exported["function"][0].offset
        values.append(words(file.load(own, None))[place])
        loaded = ctypes.CDLL(str(file.path), mode=os.RTLD_NOW)
        assert ctypes.c_void_p.in_dll(loaded, "function").value == values[-1]
    assert values[0] != values[1]


def test_its_own_symbols_come_before_those_of_the_program(tmp_path: Path, own: Process) -> None:
    source = "int atoi(const char *t) { return *t; }\nint (*function)(const char *) = atoi;\n" + HANDLER
    file = LibraryFile(build(tmp_path, source), "trap_handler")
    library = file.load(own, None)
    exported = Dynamic(file.elf).exported
    assert words(library)[exported["function"][0].offset] == library.record.start + exported["atoi"][0].offset


def test_no_page_is_writable_and_executable_and_what_is_bound_is_sealed(tmp_path: Path, own: Process) -> None:
    path = build(tmp_path, CALLS, "-Wl,-z,now")
    library = LibraryFile(path, "trap_handler").load(own, None)
    for before, after in pairwise(library.segments):
        assert before.address + before.size <= after.address
    for segment in library.segments:
        assert segment.address % PAGE_SIZE == segment.size % PAGE_SIZE == 0
        assert len(segment.contents) <= segment.size
        assert segment.protection in (PROT_READ, PROT_READ | PROT_EXEC, PROT_READ | PROT_WRITE)
    (code,) = [segment for segment in library.segments if segment.protection & PROT_EXEC]
    assert code.address <= library.record.action.handler < code.address + code.size
    (data,) = [segment for segment in library.segments if segment.is_writable]
    dynamic = Dynamic(LibraryFile(path, "trap_handler").elf)
    slots = [each.place for each in dynamic.relocations() if each.kind in (Rela.GLOB_DAT, Rela.JUMP_SLOT)]
    assert slots and all(library.record.start + place < data.address for place in slots)


def test_memory_without_contents_costs_no_file(tmp_path: Path, own: Process) -> None:
    library = LibraryFile(build(tmp_path, HANDLER + "char large[1 << 24];\n"), "trap_handler").load(own, None)
    assert sum(segment.size for segment in library.segments) > 1 << 24
    assert sum(len(segment.contents) for segment in library.segments) < 1 << 15


def test_it_is_placed_where_nothing_is_with_a_page_on_either_side(tmp_path: Path, own: Process) -> None:
    library = LibraryFile(build(tmp_path, CALLS), "trap_handler").load(own, None)
    assert not any(part.start < library.range.stop and library.range.start < part.end for part in own.mappings)


def test_it_is_placed_where_it_is_told_to(tmp_path: Path, own: Process) -> None:
    file = LibraryFile(build(tmp_path, CALLS), "trap_handler")
    library = file.load(own, None, FREE)
    assert library.record.start == library.segments[0].address == FREE
    assert library.record.action.handler == FREE + file.handler


@pytest.mark.parametrize(
    ("address", "message"),
    [(FREE + 1, "no address"), (0, "no address"), ((1 << 47) - 2 * PAGE_SIZE, "no address"), (1 << 63, "no address")],
)
def test_an_impossible_address_is_refused(tmp_path: Path, own: Process, address: int, message: str) -> None:
    with pytest.raises(DynacutError, match=message):
        LibraryFile(build(tmp_path, HANDLER), "trap_handler").load(own, None, address)


def test_an_address_that_is_not_free_is_refused_and_so_is_the_page_beside(tmp_path: Path, own: Process) -> None:
    file = LibraryFile(build(tmp_path, HANDLER), "trap_handler")
    for address in (own.mappings[0].start, own.mappings[0].start - 4 * PAGE_SIZE):
        with pytest.raises(DynacutError, match="is not free"):
            file.load(own, None, address)


def test_what_is_mapped_already_is_used_again_if_it_is_the_same(tmp_path: Path, own: Process) -> None:
    file = LibraryFile(build(tmp_path, "int data = 5;\n" + HANDLER), "trap_handler")
    library = file.load(own, None, FREE)
    table = replace(Table.empty(Layout.for_contents(1, 1)), user=library.record)
    assert not file.load(own, table).is_mapped, "nothing of it is there yet"
    map_segments(library)
    own.refresh()
    again = file.load(own, table)
    assert again == replace(library, is_mapped=True)
    assert file.load(own, table, FREE).is_mapped
    assert not file.load(own, table, 2 * FREE).is_mapped, "it is wanted elsewhere"
    other = LibraryFile(build(tmp_path, "int data = 6;\n" + HANDLER, name="other.so"), "trap_handler")
    assert not other.load(own, table).is_mapped
    forged = replace(table, user=replace(library.record, digest=other.digest))
    assert not other.load(own, forged).is_mapped, "another one lies there"


def test_a_larger_table_takes_the_library_over() -> None:
    old, new = Layout.for_contents(1, 1), Layout.for_contents(10_000, 1)
    library = UserLibrary(KernelAction(0x1234, 4), 0x1000, bytes(range(32)), "/srv/handler.so")
    data = bytearray(new.size)
    for write in [Write(0, MAGIC), *new_table(new, replace(Table.empty(old), user=library), (), ())]:
        data[write.offset : write.offset + len(write.data)] = write.data
    assert Table.parse(bytes(data), FREE).user == library


def map_segments(library: Library) -> None:
    """Maps a library into this process, where it stays."""
    libc = ctypes.CDLL(None)
    libc.mmap.restype = ctypes.c_void_p
    for segment in library.segments:
        private_anonymous_fixed = 0x100022
        arguments = (ctypes.c_void_p(segment.address), ctypes.c_size_t(segment.size), PROT_READ | PROT_WRITE)
        assert libc.mmap(*arguments, private_anonymous_fixed, -1, ctypes.c_long(0)) == segment.address
        ctypes.memmove(segment.address, segment.contents, len(segment.contents))


# Constructors.


@pytest.mark.parametrize("flags", [(), ("-s",), ("-O0", "-fcf-protection=full"), ("-Wl,-z,pack-relative-relocs",)])
def test_gccs_own_constructor_is_none(tmp_path: Path, flags: tuple[str, ...]) -> None:
    assert LibraryFile(build(tmp_path, HANDLER, *flags), "trap_handler").constructors == ()


def test_constructors_are_named(tmp_path: Path, own: Process) -> None:
    source = "int n;\n__attribute__((constructor)) void begin(void) { n = 1; }\n" + HANDLER
    assert LibraryFile(build(tmp_path, source), "trap_handler").constructors == ("begin",)
    packed = LibraryFile(build(tmp_path, source, "-Wl,-z,pack-relative-relocs", name="packed.so"), "trap_handler")
    assert packed.constructors == ("begin",)
    assert packed.load(own, None).segments
    hidden = LibraryFile(build(tmp_path, source.replace("void begin", "static void begin"), "-s"), "trap_handler")
    (name,) = hidden.constructors
    assert name.startswith("0x")


# What is refused.

REFUSED = {
    "no handler": ("void trap_handle(int n) {}", (), "exports no trap_handler\nit has trap_handle"),
    "hidden": ('__attribute__((visibility("hidden"))) ' + HANDLER, (), "it exports nothing"),
    "data": ("int trap_handler = 5;", (), "not as a function"),
    "thread-local": ("__thread int n = 5; int get(void) { return n; }" + HANDLER, (), "thread-local variables"),
    "foreign thread-local": (
        "extern __thread int errno; int get(void) { return errno; }" + HANDLER,
        (),
        "thread-local",
    ),
    "text relocations": (
        "extern int n; " + HANDLER + '__asm__(".text; movabs $nobody, %rax; .weak nobody");',
        ("-Wl,-z,notext",),
        "needs its code relocated",
    ),
    "executable stack": (HANDLER, ("-Wl,-z,execstack",), "executable stacks"),
    "writable code": (
        HANDLER + '__asm__(".section .both, \\"awx\\"; .byte 1; .text");',
        (),
        "writable and executable",
    ),
    "missing": (
        "void no_such_function(void); void f(void) { no_such_function(); }" + HANDLER,
        (),
        "defines no_such_function",
    ),
    "near": ("void strndupp(void); void f(void) { strndupp(); }" + HANDLER, (), "near matches: strndup"),
    "indirect": (
        'static void f(void) {} static void *g(void) { return f; } void h(void) __attribute__((ifunc("g"))); '
        "void i(void) { h(); }" + HANDLER,
        (),
        "indirect function",
    ),
    "too large": (HANDLER + f"char large[{MAX_MEMORY_SIZE}];", (), "takes up more than"),
}


@pytest.mark.parametrize(("source", "flags", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_done_is_refused(
    tmp_path: Path, own: Process, source: str, flags: tuple[str, ...], message: str
) -> None:
    assert message in problem(build(tmp_path, source, *flags), own)


def test_every_symbol_that_is_missing_is_named(tmp_path: Path, own: Process) -> None:
    source = "void one_missing(void); void two_missing(void); void f(void) { one_missing(); two_missing(); }" + HANDLER
    text = problem(build(tmp_path, source), own)
    assert "one_missing" in text and "two_missing" in text


def test_a_library_that_is_not_loaded_is_refused(tmp_path: Path, own: Process) -> None:
    build(tmp_path, "void stranger(void) {}", name="libstranger.so")
    source = "void stranger(void); void f(void) { stranger(); }" + HANDLER
    text = problem(build(tmp_path, source, f"-L{tmp_path}", "-lstranger"), own)
    assert "needs libstranger.so, which" in text and "libc.so.6" in text


def test_a_version_that_the_target_does_not_have_is_refused(tmp_path: Path, own: Process) -> None:
    """As of a library built on a newer system: the versions that there are are named."""
    (tmp_path / "map").write_text("GLIBC_9.9 { global: strdup; local: *; };")
    stub = build(
        tmp_path, "void strdup(void) {}", "-nostdlib", "-Wl,-soname,libc.so.6", f"-Wl,--version-script={tmp_path}/map"
    )
    stub = stub.rename(tmp_path / "libc.so.6")
    source = "void strdup(void); void f(void) { strdup(); }" + HANDLER
    text = problem(build(tmp_path, source, "-nostdlib", str(stub)), own)
    assert "defines strdup@GLIBC_9.9; there is strdup@GLIBC_2.2.5" in text


def test_programs_are_no_libraries(tmp_path: Path, own: Process) -> None:
    source = HANDLER + "int main(void) { return 0; }"
    for name, flags in (("pie", ("-pie", "-fPIE")), ("fixed", ("-no-pie",)), ("static", ("-static",))):
        code = tmp_path / "program.c"
        code.write_text(source)
        path = tmp_path / name
        command = ["gcc", "-w", "-rdynamic", *flags, "-o", path, code]
        subprocess.run(command, check=True, capture_output=True)
        assert "is a program" in problem(path, own)


def test_what_is_no_elf_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no library")
    os.mkfifo(tmp_path / "fifo")
    for name in ("text", "fifo", "absent", "."):
        with pytest.raises(DynacutError):
            LibraryFile(tmp_path / name, "trap_handler")


def test_how_it_is_written(tmp_path: Path) -> None:
    path = build(tmp_path, HANDLER + "void other(void) {}")
    assert LibraryFile.parse(str(path)).handler == LibraryFile(path, "trap_handler").handler
    assert LibraryFile.parse(f"{path}:other").handler == LibraryFile(path, "other").handler
    colon = path.rename(tmp_path / "with:colon.so")
    assert LibraryFile.parse(str(colon)).path == colon
    with pytest.raises(DynacutError, match="exports no absent"):
        LibraryFile.parse(f"{colon}:absent")


@pytest.mark.slow
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_file_is_refused_or_bound_but_never_a_crash(
    tmp_path: Path, own: Process, data: st.DataObject
) -> None:
    whole = tmp_path / "handler.so"
    if not whole.exists():
        build(tmp_path, CALLS, "-Wl,-z,pack-relative-relocs")
    content = bytearray(whole.read_bytes())
    changes = data.draw(st.lists(st.tuples(st.integers(0, 0x800), st.integers(0, 255)), min_size=1, max_size=8))
    for position, value in changes:
        content[position] = value
    # What it is bound by: program headers, hash and symbol tables, relocations; near the end, the dynamic section.
    dynamic = ElfFile.open(whole).program_header(2)
    assert dynamic is not None
    for position, value in data.draw(
        st.lists(st.tuples(st.integers(0, dynamic.size - 1), st.integers(0, 255)), max_size=4)
    ):
        content[dynamic.file_offset + position] = value
    damaged = tmp_path / "damaged.so"
    damaged.write_bytes(content)
    try:
        library = LibraryFile(damaged, "trap_handler").load(own, None)
    except DynacutError as error:
        assert "\n" not in error.problem
    else:
        assert all(segment.protection & 3 != 3 or not segment.protection & PROT_EXEC for segment in library.segments)
