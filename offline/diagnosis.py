"""Whether checkpoints can be made and restored on this machine."""

from __future__ import annotations

import os
from pathlib import Path

from dynacut.offline.criu import find_criu
from dynacut.shared.diagnosis import Area, Finding, State, capability
from dynacut.shared.errors import DynacutError

_ELSEWHERE = "run dynacut outside of the container, with all of root's capabilities"
_CACHE_PLACE = "/run"
"""Where CRIU keeps what it has found out of the kernel (criu.kdat), if that is a tmpfs."""


def diagnose() -> list[Finding]:
    """All that `dynacut checkpoint` and `restore` need; rewriting images needs none of it."""
    return [
        *_criu(),
        _kernel_cache(os.fsdecode(Path("/proc/self/mountinfo").read_bytes())),
        capability("CAP_SYS_ADMIN", Area.CHECKPOINT, "CRIU can neither dump nor restore", _ELSEWHERE),
        capability("CAP_SYS_RESOURCE", Area.CHECKPOINT, "only root's own processes can be dumped", _ELSEWHERE),
        capability("CAP_CHECKPOINT_RESTORE", Area.CHECKPOINT, "CRIU then needs CAP_SYS_ADMIN", _ELSEWHERE),
    ]


def _criu() -> list[Finding]:
    try:
        criu = find_criu()
    except DynacutError as error:
        costs = "no checkpoint can be made or restored; images can be looked at and rewritten"
        found = "; ".join([error.problem, *error.details])
        return [Finding("CRIU", Area.CHECKPOINT, State.MISSING, found, costs, error.advice, essential=True)]
    found = f"{criu.version}, {criu.path}; criu check passed"
    return [Finding("CRIU", Area.CHECKPOINT, State.OK, found), _network_lock(criu.network_lock)]


def _network_lock(lock: str) -> Finding:
    name = "network lock"
    if lock == "nftables":
        return Finding(name, Area.CHECKPOINT, State.OK, lock)
    if lock == "iptables":
        costs = "connections stand still for longer during a checkpoint than with nftables"
        mend = "a kernel with nf_tables, and a CRIU built with libnftables: make criu"
        return Finding(name, Area.CHECKPOINT, State.LIMITED, lock, costs, mend)
    costs = "open connections may break during a checkpoint: packets are not kept away meanwhile"
    mend = "a kernel with nf_tables, and a CRIU built with libnftables: make criu; or apt-get install iptables"
    return Finding(name, Area.CHECKPOINT, State.LIMITED, "neither nftables nor iptables", costs, mend)


def _kernel_cache(mountinfo: str) -> Finding:
    """mountinfo: the contents of /proc/self/mountinfo (proc_pid_mountinfo(5))."""
    name = "CRIU's kernel cache"
    kinds = {line.split()[4]: line.partition(" - ")[2].split()[0] for line in mountinfo.split("\n") if line}
    kind = kinds.get(_CACHE_PLACE, "no mount")
    if kind == "tmpfs":
        return Finding(name, Area.CHECKPOINT, State.OK, f"{_CACHE_PLACE}, {kind}")
    costs = "each run of CRIU looks at the kernel anew: about 30 ms"
    found = f"{_CACHE_PLACE} is {kind}, not tmpfs"
    return Finding(name, Area.CHECKPOINT, State.LIMITED, found, costs, f"mount a tmpfs on {_CACHE_PLACE}")
