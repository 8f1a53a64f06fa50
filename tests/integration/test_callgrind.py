"""What callgrind sees executed lies in known blocks: of the real servers, the C library and libcrypto.

callgrind records the address of each instruction that was executed. It is a witness that knows nothing of .eh_frame and
of how blocks are found here.
"""

from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path

import psutil
import pytest

from dynacut.shared.binary.block_cache import cached_block_map
from dynacut.shared.binary.elf import ElfFile
from dynacut.shared.binary.functions import function_at, function_ranges

from .servers import HttpServer, Lighttpd, Nginx, Redis, Server, wait_until

_PATIENCE = 60.0
"""Seconds for what is fifty times slower than usual."""
_START_UP_CODE = 40
"""Instructions: _start, frame_dummy and their like, of the C compiler's start-up files, have no FDE."""
_LATE_LEADERS = {"libc.so.6": 20}
"""Blocks that are entered in their midst as well: vfprintf's computed gotos lead to places that nothing else tells."""


def under_callgrind(command: list[str], folder: Path) -> list[str]:
    valgrind = shutil.which("valgrind")
    assert valgrind is not None
    return [
        valgrind, "--tool=callgrind", "--dump-instr=yes", "--compress-pos=no", "--compress-strings=no",
        f"--callgrind-out-file={folder}/callgrind.%p", *command,
    ]  # fmt: skip


class SlowRedis(Redis):
    def _prepare(self, program: Path) -> list[str]:
        return under_callgrind(super()._prepare(program), self.directory)


class SlowNginx(Nginx):
    def _prepare(self, program: Path) -> list[str]:
        return under_callgrind(super()._prepare(program), self.directory)

    def _is_ready(self) -> bool:
        # Its title shows in the memory that valgrind gave it, but not in /proc.
        return self.request("GET", "/")[0] == 200


class SlowLighttpd(Lighttpd):
    def _prepare(self, program: Path) -> list[str]:
        return under_callgrind(super()._prepare(program), self.directory)


def executed(server: Server) -> dict[str, set[int]]:
    """Ends the server; the addresses of the instructions that it and its children executed, as linked, by file.

    Source of the format: "Callgrind Format Specification" in valgrind's manual. A line of costs begins with the
    instruction's address; `ob=` names the file of those that follow, `cob=` and `calls=` tell of the called one.
    """
    processes = [psutil.Process(server.pid), *psutil.Process(server.pid).children(recursive=True)]
    logs = [server.directory / f"callgrind.{process.pid}" for process in processes]
    processes[0].terminate()
    wait_until(lambda: not any(is_at_work(process) for process in processes), "the end under callgrind", _PATIENCE)
    found: dict[str, set[int]] = defaultdict(set)
    for log in logs:
        file = ""
        for line in log.read_text().splitlines():
            if line.startswith("ob="):
                file = line.removeprefix("ob=")
            elif line.startswith("0x"):
                found[file].add(int(line.split()[0], 16))
    return found


def is_at_work(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def check(file: str, addresses: Iterable[int], *, at_least: int) -> None:
    """Each instruction is a known boundary in a known block, and where a block was executed, so was its head."""
    elf = ElfFile.open(Path(file))
    blocks, ranges = cached_block_map(elf), function_ranges(elf)
    offsets = {address - elf.link_base for address in addresses}
    assert len(offsets) >= at_least, file
    inside = {offset for offset in offsets if function_at(ranges, offset) is not None}
    assert len(offsets - inside) <= _START_UP_CODE, f"{file}: code outside of functions was executed"
    unknown = [offset for offset in inside if not blocks.is_boundary(offset) or blocks.block_at(offset) is None]
    assert [f"{file}+{offset:#x}" for offset in sorted(unknown)] == []
    heads = {block.start for offset in inside if (block := blocks.block_at(offset)) is not None}
    headless = sorted(heads - inside)
    assert len(headless) <= _LATE_LEADERS.get(Path(file).name, 0), [f"{file}+{offset:#x}" for offset in headless]


def ask_redis(redis: Redis) -> None:
    for line in (
        "SET k v",
        "GET k",
        "LPUSH l a b c",
        "LRANGE l 0 -1",
        "SADD s a",
        "ZADD z 1 a",
        "HSET h f v",
        "INCR n",
    ):
        redis.command(*line.split())
    for line in ("EVAL return(1) 0", "XADD x * f v", "SORT l ALPHA", "BITCOUNT k", "INFO", "NONSENSE", "DEL k"):
        redis.command(*line.split())
    redis.command("BGSAVE")
    wait_until(lambda: "bgsave_in_progress:0" in str(redis.command("INFO", "persistence")), "the save", _PATIENCE)


def ask_http(server: HttpServer) -> None:
    for method, path, body in (
        ("GET", "/", None), ("HEAD", "/", None), ("GET", "/missing", None), ("POST", "/", "x"), ("OPTIONS", "/", None),
        ("PUT", "/a.txt", "a"), ("GET", "/a.txt", None), ("DELETE", "/a.txt", None), ("MKCOL", "/folder/", None),
    ):  # fmt: skip
        assert server.request(method, path, body)[0] > 0


@pytest.fixture(autouse=True)
def valgrind() -> None:
    if shutil.which("valgrind") is None:
        pytest.skip("valgrind is not installed (Debian: apt-get install valgrind)")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("server", "ask", "modules"),
    [
        (SlowRedis, ask_redis, ("redis-check-rdb", "libc.so.6", "libcrypto.so.3")),
        (SlowNginx, ask_http, ("nginx", "libc.so.6", "libcrypto.so.3")),
        (SlowLighttpd, ask_http, ("lighttpd", "mod_webdav.so", "libc.so.6")),
    ],
)
def test_what_was_executed_lies_in_known_blocks(
    server: type[Server], ask: Callable[[Server], None], modules: tuple[str, ...]
) -> None:
    with server() as running:
        ask(running)
        found = executed(running)
    for name in modules:
        (file,) = (file for file in found if Path(file).name == name)
        check(file, found[file], at_least=100 if name == "mod_webdav.so" else 3000)
