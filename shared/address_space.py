"""Whether two processes have one address space, as after vfork. Source: kcmp(2)."""

from __future__ import annotations

import ctypes

_SYS_KCMP = 312
_KCMP_VM = 1


def shares_memory(one: int, other: int) -> bool:
    """Whether two processes have one address space. False where the kernel does not tell."""
    libc = ctypes.CDLL(None, use_errno=True)
    return bool(libc.syscall(_SYS_KCMP, one, other, _KCMP_VM, 0, 0) == 0)
