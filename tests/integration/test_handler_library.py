"""A handler library of the user's own: in the running program, and in a checkpoint of it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dynacut.offline.images.image import Image
from dynacut.shared.region import find_region

from .conftest import Dynacut
from .programs import Program, compile_program, feature
from .servers import Redis, RedisError, become_subreaper, is_gone, wait_until
from .test_kill import symbol
from .untouched import Snapshot

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "skip_traps.c"
PLACE = 0x1234_5000_0000
WALK = """first {0}
signal 5: trap {1} skipped, 1 bytes
behind the first trap {0}
second {0}
signal 5: trap {2} skipped, 2 bytes
behind the second trap {0}
third {0}
signal 5: trap {3} skipped, 5 bytes
behind the third trap {0}
walked {0}"""
Start = Callable[..., Program]


def walk(number: int) -> list[str]:
    """What programs/paths.c says on one walk, with its traps skipped."""
    return WALK.format(number, *range(3 * number - 2, 3 * number + 1)).splitlines()


def build(source: Path, output: Path, *flags: str) -> Path:
    """Builds a handler library as its author would."""
    subprocess.run(["gcc", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", "-o", output, source, *flags], check=True)
    return output


def trap_table(executable: Path) -> str:
    """The table of the example library for a program: each run of int3 with the ud2 behind it, from objdump."""
    text = subprocess.run(["objdump", "-d", executable], check=True, capture_output=True, text=True).stdout
    found = re.findall(r"^ *([0-9a-f]+):\t[0-9a-f ]+\t(int3|ud2)", text, re.MULTILINE)
    runs: list[list[int]] = []
    for address, name in found:
        offset, size = int(address, 16), 2 if name == "ud2" else 1
        if runs and runs[-1][0] + runs[-1][1] == offset:
            runs[-1][1] += size
        elif name == "int3":
            runs.append([offset, size])
    return "".join(f"{{{offset:#x}, {length}}},\n" for offset, length in runs)


@pytest.fixture
def skipping(tmp_path: Path) -> Path:
    """The example library, built for programs/paths.c as this test compiles it."""
    executable = compile_program("paths", tmp_path)
    table = trap_table(executable)
    assert [line.split()[1] for line in table.splitlines()] == ["1},", "2},", "5},"]
    (tmp_path / "traps.h").write_text(table)
    return build(EXAMPLE, tmp_path / "skip_traps.so", f'-DTRAPS="{tmp_path}/traps.h"')


class Walker:
    """programs/paths.c running in its folder, in a session of its own, its output in a file: CRIU takes it as it is."""

    def __init__(self, executable: Path) -> None:
        become_subreaper()
        self.output = executable.parent / "output"
        with self.output.open("w") as output:
            self._process = subprocess.Popen(
                [executable], stdin=subprocess.DEVNULL, stdout=output, cwd=executable.parent, start_new_session=True
            )
        self.pid = self._process.pid
        wait_until(lambda: self.lines() == ["ready"], "the program")

    def lines(self) -> list[str]:
        return self.output.read_text().splitlines()

    def walks(self, number: int) -> None:
        """Makes it walk all of its paths; it must say just what it says when its traps are skipped."""
        os.kill(self.pid, signal.SIGUSR1)
        expected = ["ready", *(line for each in range(1, number + 1) for line in walk(each))]
        wait_until(lambda: is_gone(self.pid) or len(self.lines()) >= len(expected), "the walk")
        assert self.lines() == expected

    def checkpointed(self, dynacut: Dynacut, image: Path) -> None:
        """Dumps it to an image; it is gone then."""
        dynacut.json("checkpoint", "--pid", self.pid, image)
        wait_until(lambda: is_gone(self.pid), "the end of the dumped program")

    def end(self) -> None:
        if not is_gone(self.pid):
            os.kill(self.pid, signal.SIGKILL)
        self._process.poll()
        wait_until(lambda: is_gone(self.pid), "the end of the program")


@contextmanager
def walker(tmp_path: Path) -> Iterator[Walker]:
    running = Walker(tmp_path / "paths")
    try:
        yield running
    finally:
        running.end()


@pytest.mark.usefixtures("skipping")
def test_without_a_library_the_first_trap_ends_the_program(tmp_path: Path) -> None:
    """Or the tests below would show nothing."""
    with walker(tmp_path) as target:
        os.kill(target.pid, signal.SIGUSR1)
        wait_until(lambda: is_gone(target.pid), "the end of the program")
        assert target.lines() == ["ready", "first 1"]


def test_a_running_program_skips_every_trap_and_says_what_it_never_could(
    skipping: Path, tmp_path: Path, dynacut: Dynacut
) -> None:
    with walker(tmp_path) as target:
        report = dynacut.json("live", "--pid", target.pid, "--handler", skipping, "--handler-at", f"{PLACE:#x}")
        assert report["changed"] is True
        assert report["handler"]["library"] == str(skipping)
        assert report["handler"]["at"] == f"{PLACE:#x}"
        target.walks(1)
        target.walks(2)
        logged = (tmp_path / "traps.log").read_text().split()
        assert len(logged) == 6 and logged[:3] == logged[3:]
        shown = dynacut("live", "--pid", target.pid)
        assert f"handler: {skipping} at {PLACE:#x}" in shown.stdout


def test_a_checkpointed_program_skips_every_trap_when_it_is_restored(
    skipping: Path, tmp_path: Path, dynacut: Dynacut
) -> None:
    image, changed = tmp_path / "image", tmp_path / "changed"
    with walker(tmp_path) as target:
        target.checkpointed(dynacut, image)
        what = ("--handler", skipping, "--handler-at", f"{PLACE:#x}", "-o", changed)
        report = dynacut.json("offline", image, *what)
        assert report["changed"] is True
        assert report["handler"]["at"] == f"{PLACE:#x}"
        assert dynacut.json("offline", image)["handler"] is None
        assert dynacut.json("offline", changed)["handler"] == report["handler"]
        dynacut.json("restore", changed)
        target.walks(1)
        target.walks(2)
        assert dynacut.json("live", "--pid", target.pid)["handler"] == report["handler"]

        # The live backend takes it out of force, and finds it again where the image got it.
        assert dynacut.json("live", "--pid", target.pid, "--undo")["handler"] is None
        before = Path(f"/proc/{target.pid}/maps").read_text()
        again = dynacut.json("live", "--pid", target.pid, "--handler", skipping)
        assert again["handler"] == report["handler"]
        assert Path(f"/proc/{target.pid}/maps").read_text() == before
        target.walks(3)


def test_the_example_prints_what_the_program_never_could() -> None:
    """examples/skip_traps.sh, as the guide says to run it."""
    environment = os.environ | {"DYNACUT": str(Path(sys.executable).parent / "dynacut")}
    script = EXAMPLE.with_suffix(".sh")
    done = subprocess.run(["sh", script], env=environment, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    output = done.stdout.splitlines()
    expected = ["waiting"]
    for number in (1, 2, 3):
        expected += [f"to trap {number}", f"signal 5: trap {number} skipped, 1 bytes"]
        expected += [f"behind trap {number}, never printed"]
    assert output[output.index("waiting") :] == [*expected, "done"]
    assert any("at 0x123450000000" in line for line in output)


def test_both_backends_make_the_same_memory_of_a_library(skipping: Path, tmp_path: Path, dynacut: Dynacut) -> None:
    image, live, offline = tmp_path / "image", tmp_path / "live", tmp_path / "offline"
    what = ("--handler", skipping, "--handler-at", f"{PLACE:#x}")
    with walker(tmp_path) as target:
        target.checkpointed(dynacut, image)
        dynacut.json("offline", image, *what, "-o", offline)
        dynacut.json("restore", image)
        dynacut.json("live", "--pid", target.pid, *what)
        target.checkpointed(dynacut, live)
    with Image(offline) as one, Image(live) as other:
        ours, theirs = one.processes[0], other.processes[0]
        mapped = [part for part in ours.mappings if PLACE <= part.start < PLACE + (1 << 24)]
        assert len(mapped) >= 4
        assert mapped == [part for part in theirs.mappings if PLACE <= part.start < PLACE + (1 << 24)]
        for part in mapped:
            assert ours.read(part.start, part.size) == theirs.read(part.start, part.size)
        found = [find_region(each) for each in (ours, theirs)]
        assert found[0] is not None and found[1] is not None
        assert found[0].table is not None and found[1].table is not None
        assert found[0].table.user == found[1].table.user


def test_an_undo_gives_the_traps_back_and_the_library_is_used_again(
    skipping: Path, tmp_path: Path, dynacut: Dynacut
) -> None:
    with walker(tmp_path) as target:
        first = dynacut.json("live", "--pid", target.pid, "--handler", skipping)
        target.walks(1)
        again = dynacut.json("live", "--pid", target.pid, "--handler", skipping)
        assert (again["changed"], again["stopped_us"] >= 0) == (False, True)
        undone = dynacut.json("live", "--pid", target.pid, "--undo")
        assert (undone["changed"], undone["handler"]) == (True, None)
        mapped = Path(f"/proc/{target.pid}/maps").read_text()
        second = dynacut.json("live", "--pid", target.pid, "--handler", skipping)
        assert second["changed"] is True
        assert second["handler"] == first["handler"]
        assert Path(f"/proc/{target.pid}/maps").read_text() == mapped
        target.walks(2)
        dynacut.json("live", "--pid", target.pid, "--undo")
        os.kill(target.pid, signal.SIGUSR1)
        wait_until(lambda: is_gone(target.pid), "the end of the program")
        assert target.lines()[-1] == "first 3"


@pytest.mark.usefixtures("skipping")
def test_a_constructor_does_not_run_and_is_named(tmp_path: Path, dynacut: Dynacut) -> None:
    """DynaCut's own libraries install themselves in one; here that is not needed, nor done."""
    source = tmp_path / "constructed.c"
    source.write_text(
        EXAMPLE.read_text() + '__attribute__((constructor)) static void begin(void) { printf("begun\\n"); }\n'
    )
    library = build(source, tmp_path / "constructed.so", f'-DTRAPS="{tmp_path}/traps.h"')
    with walker(tmp_path) as target:
        done = dynacut("live", "--pid", target.pid, "--handler", library)
        assert done.returncode == 0, done.stderr
        assert "its constructors do not run: begin" in done.stderr
        target.walks(1)


# Hits of sites, and symbols of the program itself.

TO_READONLY = """
#define _GNU_SOURCE
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <ucontext.h>
#include <unistd.h>
extern void readonlyCommand(void *);
static int hits;
void refuse(int signal, siginfo_t *info, void *context)
{
	char line[40];
	(void)signal, (void)info;
	((ucontext_t *)context)->uc_mcontext.gregs[REG_RIP] = (greg_t)readonlyCommand;
	int file = open(LOG, O_WRONLY | O_CREAT | O_APPEND, 0600);
	snprintf(line, sizeof(line), "hit %d\\n", ++hits);
	if (file < 0 || write(file, line, strlen(line)) < 0)
		_exit(9);
	close(file);
}
"""


@pytest.fixture
def refusing(tmp_path: Path) -> Path:
    """A library for redis: a hit goes on at redis's own readonlyCommand, and is logged."""
    (tmp_path / "refuse.c").write_text(TO_READONLY)
    return build(tmp_path / "refuse.c", tmp_path / "refuse.so", f'-DLOG="{tmp_path}/hits"')


def test_hits_in_redis_go_to_the_library_live_and_in_a_checkpoint(
    redis: Redis, refusing: Path, tmp_path: Path, dynacut: Dynacut
) -> None:
    off = ("--disable", "setCommand", "--on-hit", "handler", "--handler", f"{refusing}:refuse", "--as", "set")
    log = tmp_path / "hits"
    with redis.connect() as client:
        assert client.command("SET", "key", "value") == "OK"
        report = dynacut.json("live", "--pid", redis.pid, *off)
        assert report["handler"]["library"] == str(refusing)
        for number in (1, 2):
            assert isinstance(client.command("SET", "key", "other"), RedisError)
            assert log.read_text().splitlines()[-1] == f"hit {number}"
        (entry,) = dynacut.json("live", "--pid", redis.pid)["features"]
        assert (entry["name"], entry["state"], entry["hits"]) == ("set", "disabled", 2)
        dynacut.json("live", "--pid", redis.pid, "--enable", "set")
        assert client.command("SET", "key", "value") == "OK"
        dynacut.json("live", "--pid", redis.pid, "--disable", "set")
        assert isinstance(client.command("SET", "key", "other"), RedisError)
        dynacut.json("live", "--pid", redis.pid, "--undo")
        assert client.command("SET", "key", "value") == "OK"
        assert log.read_text().splitlines()[-1] == "hit 3"

        dynacut.json("checkpoint", "--pid", redis.pid, tmp_path / "image")
        wait_until(lambda: is_gone(redis.pid), "the end of the dumped server")
        dynacut.json("offline", tmp_path / "image", *off, "-o", tmp_path / "changed")
        dynacut.json("restore", tmp_path / "changed")
        assert isinstance(client.command("SET", "key", "other"), RedisError)
        assert client.command("GET", "key") == "value"
        assert log.read_text().splitlines()[-1] == "hit 4", "the library goes on where the live backend had left it"


RETURN_4711 = """
#define _GNU_SOURCE
#include <signal.h>
#include <ucontext.h>
void trap_handler(int signal, siginfo_t *info, void *context)
{
	greg_t *registers = ((ucontext_t *)context)->uc_mcontext.gregs;
	(void)signal, (void)info;
	registers[REG_RAX] = 4711;
	registers[REG_RIP] = *(greg_t *)registers[REG_RSP];
	registers[REG_RSP] += 8;
}
"""


@pytest.fixture
def returning(tmp_path: Path) -> Path:
    """A library that returns from the function whose entry is hit."""
    (tmp_path / "return.c").write_text(RETURN_4711)
    return build(tmp_path / "return.c", tmp_path / "return.so")


def test_the_action_handler_needs_a_library(program: Start, returning: Path, dynacut: Dynacut) -> None:
    target = program("counter")
    off = ("--disable", "feature", "--on-hit", "handler", "--as", "one")
    refused = dynacut("live", "--pid", target.pid, *off)
    assert refused.returncode == 1
    assert "give it by --handler LIB.so" in refused.stderr
    dynacut.json("live", "--pid", target.pid, "--handler", returning)
    dynacut.json("live", "--pid", target.pid, *off)
    assert target.ask("feature 3") == "4711"
    dynacut.json("live", "--pid", target.pid, "--undo")
    assert target.ask("feature 3") == str(feature(3))


def test_whole_blocks_and_many_threads(program: Start, returning: Path, dynacut: Dynacut) -> None:
    """Threads that run the code all the time, while it goes to the library and back."""
    target = program("counter", 4)
    for scope in ("entry", "block"):
        what = ("--disable", "other", "--on-hit", "handler", "--scope", scope, "--handler", returning)
        dynacut.json("live", "--pid", target.pid, *what)
        assert target.ask("other 3") == "4711"
        dynacut.json("live", "--pid", target.pid, "--undo")
        assert target.ask("other 3") == "17"
    assert target.counters()["calls"] > 0


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        (("--handler", "/nonexistent.so"), 1, "/nonexistent.so"),
        (("--handler", "{library}:absent"), 1, "exports no absent"),
        (("--handler", "{library}", "--handler-at", "0x1001"), 1, "is no address for a library"),
        (("--handler", "{library}", "--handler-at", "{text:#x}"), 1, "is not free"),
        (("--handler", "{library}", "--undo"), 2, "do one after the other"),
        (("--handler-at", "0x10000000"), 2, "give the library by --handler"),
    ],
)
def test_what_is_refused_leaves_the_process_as_it_is(
    program: Start, returning: Path, dynacut: Dynacut, options: tuple[str, ...], status: int, message: str
) -> None:
    target = program("counter")
    before, maps = Snapshot.of(target.pid), Path(f"/proc/{target.pid}/maps").read_text()
    text = symbol(target, "feature") & -4096
    filled = [option.format(library=returning, text=text) for option in options]
    done = dynacut("live", "--pid", target.pid, *filled)
    assert done.returncode == status
    assert message in done.stderr and "Traceback" not in done.stderr
    assert Snapshot.of(target.pid) == before
    assert Path(f"/proc/{target.pid}/maps").read_text() == maps
    assert target.ask("feature 3") == str(feature(3))


def test_a_dry_run_maps_nothing(program: Start, returning: Path, dynacut: Dynacut) -> None:
    target = program("counter")
    maps = Path(f"/proc/{target.pid}/maps").read_text()
    report = dynacut.json("live", "--pid", target.pid, "--handler", returning, "--dry-run")
    assert report["handler"] is None
    assert Path(f"/proc/{target.pid}/maps").read_text() == maps
