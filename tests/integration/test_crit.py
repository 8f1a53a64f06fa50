"""Rewritten images as crit sees them, CRIU's own tool: every file decodes, and nothing but the edits differs."""

from __future__ import annotations

import copy
from itertools import pairwise
from mmap import PROT_EXEC, PROT_READ, PROT_WRITE
from pathlib import Path
from typing import Any

import pytest

from dynacut.offline.images.image import Image
from dynacut.shared.region import Region, find_region

from .conftest import Dynacut
from .crit import PAGE, decoded, memory_of, the_crit
from .servers import Server
from .test_live_redis import SET_TO_ERROR
from .test_offline import RANGE_TO_200, UPLOAD_TO_403, tree_of

SIGTRAP_BIT = 1 << 4
HANDLER_FLAGS = 0x5C000004
"""SA_SIGINFO, SA_RESTORER, SA_ONSTACK, SA_RESTART, SA_NODEFER."""
SIGTRAP_INDEX = 4
"""In core's sigactions, which begin with signal 1."""


def patched_core(core: dict[str, Any], region: Region) -> dict[str, Any]:
    """A core as a patch must make it: SIGTRAP goes to its handler, and no mask blocks it; all else as it was."""
    core = copy.deepcopy(core)
    (entry,) = core["entries"]
    if "blk_sigset" in entry["thread_core"]:
        entry["thread_core"]["blk_sigset"] &= ~SIGTRAP_BIT
    if "tc" in entry:
        entry["tc"]["blk_sigset"] &= ~SIGTRAP_BIT
        for action in entry["tc"]["sigactions"]:
            action["mask"] &= ~SIGTRAP_BIT
        trap = entry["tc"]["sigactions"][SIGTRAP_INDEX]
        assert trap["sigaction"] == 0
        trap |= {"sigaction": region.handler, "flags": HANDLER_FLAGS, "restorer": region.restorer, "mask": 0}
    return core


@pytest.mark.parametrize(
    ("name", "what"), [("redis", SET_TO_ERROR), ("nginx", UPLOAD_TO_403), ("lighttpd", RANGE_TO_200)]
)
@pytest.mark.parametrize("kind", ["layer", "flat"])
def test_every_file_decodes_and_nothing_but_the_edits_differs(
    name: str, what: tuple[str, ...], kind: str, request: pytest.FixtureRequest, dynacut: Dynacut, tmp_path: Path
) -> None:
    the_crit()
    server: Server = request.getfixturevalue(name)
    image, changed = tmp_path / "image", tmp_path / "changed"
    dynacut.json("checkpoint", "--pid", server.pid, image, "--leave-running")
    dynacut.json("offline", image, *what, "-o", changed, *(["--flat"] if kind == "flat" else []))
    before, after = decoded(image, tmp_path / "before"), decoded(changed, tmp_path / "after")
    assert (changed / "parent").exists() is (kind == "layer")

    pids = tree_of(server)
    pagemaps = {file for file in before if file.startswith("pagemap-")}
    assert before.keys() == after.keys()
    for file in before.keys() - pagemaps - {f"mm-{pid}.img" for pid in pids}:
        if not file.startswith("core-"):
            assert before[file] == after[file], file
    memory = {file: memory_of(image, file, tmp_path / f"{file}-before") for file in pagemaps}
    now = {file: memory_of(changed, file, tmp_path / f"{file}-after") for file in pagemaps}
    threads = {entry["pid"]: entry["threads"] for entry in before["pstree.img"]["entries"]}
    cores = set[str]()
    with Image(changed) as opened:
        assert sorted(process.pid for process in opened.processes) == sorted(pids)
        for process in opened.processes:
            found = find_region(process)
            assert found is not None and found.table is not None
            region = range(found.region.code, found.region.table + found.region.table_size)
            mm, pagemap = f"mm-{process.pid}.img", f"pagemap-{process.pid}.img"
            check_vmas(before[mm], after[mm], [region.start, found.region.table, region.stop])
            edits = {site.address + at: new for site in found.table.sites for at, new in enumerate(site.new)}
            assert edits
            held = memory[pagemap]
            for page in {address & -PAGE for address in edits} - held.keys():
                held[page] = page_of_file(before[mm], before["files.img"], page)
            for address, new in edits.items():
                data = bytearray(held[address & -PAGE])
                assert data[address % PAGE] != new
                data[address % PAGE] = new
                held[address & -PAGE] = bytes(data)
            assert any(page in region for page in now[pagemap])
            now[pagemap] = {page: data for page, data in now[pagemap].items() if page not in region}
            for core in (f"core-{tid}.img" for tid in threads[process.pid]):
                assert after[core] == patched_core(before[core], found.region), core
                cores.add(core)
    assert cores == {file for file in before if file.startswith("core-")}
    assert now == memory


def page_of_file(mm: dict[str, Any], files: dict[str, Any], page: int) -> bytes:
    """A page that was not dumped, from the file that the image says is mapped there."""
    (vma,) = (vma for vma in mm["entries"][0]["vmas"] if vma["start"] <= page < vma["end"])
    (name,) = (entry["reg"]["name"] for entry in files["entries"] if entry["id"] == vma["shmid"])
    with Path(name).open("rb") as file:
        file.seek(vma["pgoff"] + page - vma["start"])
        return file.read(PAGE)


def check_vmas(before: dict[str, Any], after: dict[str, Any], limits: list[int]) -> None:
    """The handler's two VMAs are new, all else is as it was. limits: where they begin and end."""
    (old,), (new,) = before["entries"], after["entries"]
    added = [vma for vma in new["vmas"] if vma not in old["vmas"]]
    assert [vma for vma in new["vmas"] if vma in old["vmas"]] == old["vmas"]
    assert [(vma["start"], vma["end"]) for vma in added] == list(pairwise(limits))
    assert [vma["prot"] for vma in added] == [PROT_READ | PROT_EXEC, PROT_READ | PROT_WRITE]
    assert old | {"vmas": []} == new | {"vmas": []}
