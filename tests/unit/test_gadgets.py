"""Gadgets, counted by hand: every address that leads straight to a return or an indirect branch, once."""

from __future__ import annotations

import pytest

from dynacut.shared.gadgets import MAX_INSTRUCTIONS, count_gadgets

NOP, RET, INT3 = b"\x90", b"\xc3", b"\xcc"


@pytest.mark.parametrize(
    ("code", "count"),
    [
        (b"", 0),
        (RET, 1),
        (NOP + RET, 2),
        (NOP * 100 + RET, MAX_INSTRUCTIONS),
        (RET + RET, 2),
        (b"\x5f" + RET, 2),  # pop rdi; ret
        (b"\x41\x5f" + RET, 3),  # pop r15; ret holds pop rdi; ret
        (b"\xff\xe0", 1),  # jmp rax
        (b"\xff\x10", 1),  # call [rax]
        (b"\xeb\xfe" + RET, 1),  # a direct jump leads elsewhere; 0xfe 0xc3 is inc bl, without an end
        (b"\xe8\x00\x00\x00\x00", 0),  # a direct call
        (INT3 + RET, 1),
        (INT3 * 64, 0),
        (b"\x0f\x05" + RET, 1),  # syscall
        (b"\xc2\x08\x00", 1),  # ret 8
        (b"\xf3" + RET, 2),  # rep ret
    ],
)
def test_gadgets_of_short_code(code: bytes, count: int) -> None:
    assert count_gadgets(code) == count


def test_each_address_counts_once_across_the_pieces_that_are_decoded_at_once() -> None:
    block = (NOP * 40 + RET) * 50
    assert count_gadgets(block) == 50 * MAX_INSTRUCTIONS


def test_int3_bytes_take_gadgets_away() -> None:
    code = (b"\x48\x89\xe5\x5d" + RET) * 20
    patched = INT3 * 50 + code[50:]
    assert count_gadgets(patched) == count_gadgets(code) // 2
