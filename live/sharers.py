"""Who shares a mapping: a process, what it has forked, and what those have, whoever is their parent by now.

A daemon's first process ends at once, and what it has forked belongs to process 1 then; a saving child may outlive the
server. All of them have the shared memory that the first one had mapped. What calls execve has it no more.
"""

from __future__ import annotations

from pathlib import Path

from dynacut.shared.proc import executable, is_alive


def sharers(exe: str, inode: int) -> list[int]:
    """The processes, but for zombies, that run an executable and have shared anonymous memory of an inode mapped.

    exe: as /proc/PID/exe has it. inode: as in /proc/PID/maps; the kernel gives each such mapping one of its own
    (shmem_zero_setup in mm/shmem.c), which lives as long as somebody has it mapped.
    """
    wanted = f" {inode} ".encode()
    found = []
    for pid in sorted(int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()):
        try:
            if executable(pid).removesuffix(" (deleted)") != exe:
                continue
            maps = Path(f"/proc/{pid}/maps").read_bytes()
            if any(wanted in line and b"/dev/zero" in line for line in maps.splitlines()) and is_alive(pid):
                found.append(pid)
        except OSError:
            continue  # it has ended, or is out of reach
    return found
