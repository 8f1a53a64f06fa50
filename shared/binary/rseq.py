"""Restartable sequences in a module's code, in which an int3 does not work.

A trap amid one makes the kernel abort it before the signal is delivered: the saved rip is the abort handler's, and what
was hit can no longer be told. An abort handler is known by the signature in front of it, and a sequence by the
descriptor that points to its abort handler; so no section headers are needed.

Source: rseq(2); struct rseq_cs in include/uapi/linux/rseq.h.
"""

from __future__ import annotations

import re
import struct

from dynacut.shared.binary.elf import ElfFile

_SIGNATURE_BYTES = b"\x53\x30\x05\x53"
"""RSEQ_SIG of x86, as glibc registers it (sysdeps/unix/sysv/linux/x86/bits/rseq.h)."""
_SIGNATURE = re.compile(re.escape(_SIGNATURE_BYTES))
_SIZE = struct.Struct("<Q")
# struct rseq_cs: version and flags, start_ip, post_commit_offset, abort_ip
_START, _LENGTH, _ABORT = 8, 16, 24
_LONGEST = 1 << 16


def restartable_sequences(elf: ElfFile) -> tuple[range, ...]:
    """The module offsets at which no int3 may be, two ranges for each sequence: its own, and that of the signature,
    without which the kernel ends the program.

    Raises:
        DynacutError: a table of the file is malformed.
    """
    aborts = {
        segment.offset + found.end()
        for segment in elf.segments
        if segment.executable
        for found in _SIGNATURE.finditer(elf.view(segment.offset, segment.file_size))
    }
    if not aborts:
        return ()
    from dynacut.shared.binary.pointer_tables import PointerTables

    pointers = PointerTables(elf, frozenset()).pointers
    found = []
    for place, value in pointers.items():
        start = pointers.get(place - _ABORT + _START) if value in aborts else None
        if start is None:
            continue
        (length,) = _SIZE.unpack(elf.view(place - _ABORT + _LENGTH, _SIZE.size))
        if 0 < length <= _LONGEST:
            # Behind an int3 right in front of it, of one byte, rip is in the sequence.
            found += [range(start - 1, start + length), range(value - len(_SIGNATURE_BYTES), value)]
    return tuple(found)
