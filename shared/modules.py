"""From the VMAs of a target to its modules."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from dynacut.shared.binary.elf import ElfFile
from dynacut.shared.errors import DynacutError
from dynacut.shared.target import PAGE_SIZE, Mapping, Module, Target


def modules_of(
    mappings: Sequence[Mapping],
    exe: str,
    aliases: Sequence[str],
    root: Path,
    file_of: Callable[[Mapping, str], Path],
) -> tuple[Module, ...]:
    """Every ELF file that is mapped with code, once for each time that it is, the executable first.

    exe: the path of the executable. aliases: what it was called by, argv[0] before comm; one that exists beside the
    executable names it: Debian's redis-server is a link to redis-check-rdb. root: the root of the target's file system.
    file_of: where the file of a mapping, with its path, can be read.
    """
    by_path: dict[str, list[Mapping]] = {}
    for mapping in mappings:
        if mapping.is_file:
            by_path.setdefault(mapping.path, []).append(mapping)
    modules = []
    loads = [(path, parts) for path, together in by_path.items() for parts in _loads(together, path, file_of)]
    for path, parts in loads:
        plain_path = path.removesuffix(" (deleted)")
        is_executable = plain_path == exe
        file_name = Path(plain_path).name
        names = {file_name, file_name.split(".so", 1)[0] if ".so" in file_name else file_name}
        name = file_name
        if is_executable:
            names |= set(aliases)
            name = next((alias for alias in aliases if _exists(Path(plain_path).parent / alias)), name)
        modules.append(
            Module(
                name=name,
                names=frozenset(names),
                path=plain_path,
                file=file_of(parts[0], plain_path),
                root=root,
                base=parts[0].start - parts[0].file_offset,
                end=parts[-1].end,
                is_executable=is_executable,
                mappings=tuple(parts),
            )
        )
    modules.sort(key=lambda module: (not module.is_executable, module.base))
    return tuple(modules)


def chosen_modules(target: Target, names: Sequence[str]) -> list[Module]:
    """The modules of a target that have one of the names, or are at one of the paths, each once; by default the first.

    Raises:
        DynacutError: the target has none of a name.
    """
    if not names:
        return list(target.modules[:1])
    chosen: list[Module] = []
    for name in names:
        found = [module for module in target.modules if name in module.names or name == module.path]
        if not found:
            known = ", ".join(module.name for module in target.modules)
            raise DynacutError(f"{target.label} has no module {name!r}", f"it has {known}")
        chosen += (module for module in found if module not in chosen)
    return chosen


def _loads(parts: list[Mapping], path: str, file_of: Callable[[Mapping, str], Path]) -> Iterator[list[Mapping]]:
    """The mappings of a file, ascending, apart for each time that it was loaded with code.

    It may be loaded more than once, by dlmopen(3) for one, or a program may have mapped it to read it.
    """
    if not any(part.executable for part in parts):
        return
    spans = {(parts[0].start, parts[-1].end)}
    if any(part.file_offset <= parts[0].file_offset for part in parts[1:]):  # else it was mapped once
        with suppress(DynacutError):
            elf = ElfFile.open(file_of(parts[0], path.removesuffix(" (deleted)")))
            spans = {span for part in parts if part.executable and (span := _span(elf, part))} or spans
    for start, end in sorted(spans):
        yield [part for part in parts if start <= part.start and part.end <= end]


def _span(elf: ElfFile, code: Mapping) -> tuple[int, int] | None:
    """From the first to the last address of a module that was loaded with a mapping of its code; None if with none."""
    for segment in elf.segments:
        first = segment.file_offset & -PAGE_SIZE
        if segment.executable and first <= code.file_offset < segment.file_offset + segment.file_size:
            base = code.start - (code.file_offset - first) - (segment.offset & -PAGE_SIZE)
            last = elf.segments[-1]
            return base, base + (-(-(last.offset + last.memory_size) // PAGE_SIZE) * PAGE_SIZE)
    return None


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:
        return False  # in a folder that may not be searched


def called_name(arguments: Sequence[str]) -> str:
    """The file name in argv[0], without what a program has appended to it (``nginx: worker process``)."""
    words = arguments[0].split() if arguments else []
    return Path(words[0].rstrip(":")).name if words else ""
