"""Rewritten images as crit sees them, CRIU's own tool: every file decodes, and nothing but the edits differs."""

from __future__ import annotations

import copy
from itertools import pairwise
from mmap import PROT_EXEC, PROT_READ, PROT_WRITE
from pathlib import Path
from typing import Any

import pytest

from dynacut.offline.images.image import Image
from dynacut.shared.region import find_region

from .conftest import Dynacut
from .crit import PAGE, decoded, memory_of, the_crit
from .servers import Server
from .test_live_redis import SET_TO_ERROR
from .test_offline import RANGE_TO_200, UPLOAD_TO_403, tree_of

SIGTRAP_BIT = 1 << 4
SIGTRAP_INDEX = 4
"""In core's sigactions, which begin with signal 1."""


def without_traps(core: dict[str, Any]) -> dict[str, Any]:
    """A core without what a patch may change: SIGTRAP's action, and its bit in every mask."""
    core = copy.deepcopy(core)
    (entry,) = core["entries"]
    entry["thread_core"]["blk_sigset"] = entry["thread_core"].get("blk_sigset", 0) & ~SIGTRAP_BIT
    if "tc" in entry:
        entry["tc"]["blk_sigset"] &= ~SIGTRAP_BIT
        for action in entry["tc"]["sigactions"]:
            action["mask"] &= ~SIGTRAP_BIT
        del entry["tc"]["sigactions"][SIGTRAP_INDEX]
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
    rewritten = {f"{part}-{pid}.img" for pid in pids for part in ("mm", "pagemap")}
    assert before.keys() == after.keys()
    for file in before.keys() - rewritten:
        strip = without_traps if file.startswith("core-") else copy.deepcopy
        assert strip(before[file]) == strip(after[file]), file
    with Image(changed) as opened:
        assert sorted(process.pid for process in opened.processes) == sorted(pids)
        for process in opened.processes:
            found = find_region(process)
            assert found is not None and found.table is not None
            region = range(found.region.code, found.region.table + found.region.table_size)
            mm, pagemap = f"mm-{process.pid}.img", f"pagemap-{process.pid}.img"
            check_vmas(before[mm], after[mm], [region.start, found.region.table, region.stop])
            edits = {site.address + at: new for site in found.table.sites for at, new in enumerate(site.new)}
            held = memory_of(image, pagemap, tmp_path / f"{process.pid}-before")
            for page in {address & -PAGE for address in edits} - held.keys():
                held[page] = page_of_file(before[mm], before["files.img"], page)
            for address, new in edits.items():
                data = bytearray(held[address & -PAGE])
                data[address % PAGE] = new
                held[address & -PAGE] = bytes(data)
            now = memory_of(changed, pagemap, tmp_path / f"{process.pid}-after")
            assert {page: data for page, data in now.items() if page not in region} == held
            (core,) = after[f"core-{process.pid}.img"]["entries"]
            assert core["tc"]["sigactions"][SIGTRAP_INDEX]["sigaction"] == found.region.handler


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
