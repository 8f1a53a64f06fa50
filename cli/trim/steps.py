"""The steps of `dynacut trim`: each takes files of the directory, and leaves files there."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynacut.cli.plan_startup import read_union, with_features, write_plan
from dynacut.cli.trim.service import Service, end, is_alive, memory_of
from dynacut.cli.trim.state import State
from dynacut.cli.trim.tracer import PhaseTracer
from dynacut.shared.errors import DynacutError, ExitStatus
from dynacut.shared.plan import Plan, load

if TYPE_CHECKING:
    from dynacut.handlers.table import Table
    from dynacut.offline.images.image import Image
    from dynacut.shared.coverage import Coverage
    from dynacut.shared.patch_set import PatchSet
    from dynacut.shared.report import Inspection
    from dynacut.shared.target import Target

Tell = Callable[[str], None]
Details = dict[str, Any]


@dataclass
class Trim:
    """One trim in one directory.

    pid: of a service that runs already, with init: logs of its start-up. serving: logs of later phases that the
    workload does not have. on_hit, scope: of the final plan. criu: the one to use; None for live.
    """

    service: Service
    state: State
    tracer: PhaseTracer
    tell: Tell
    pid: int | None
    init: tuple[Path, ...]
    serving: tuple[Path, ...]
    on_hit: str
    scope: str
    criu: Path | None

    def path(self, name: str) -> Path:
        """A file of the directory."""
        return self.service.directory / name

    # What ran, and the plan.

    def trace(self) -> Details:
        """→ init.drcov, serving.drcov: traces an instance for each way to end it, or the one that runs."""
        from dynacut.shared.drcov import write
        from dynacut.shared.keep import union_of_all

        if self.pid is None:
            traced = [self.tracer.from_start(shutdown) for shutdown in self.service.shutdown]
        else:
            traced = [self.tracer.running(self.pid)]
        init = union_of_all([read_union(self.init), *(phases.init for phases in traced if phases.init is not None)])
        serving = union_of_all([read_union(self.serving), *(phases.serving for phases in traced)])
        write(self.path("init.drcov"), init)
        write(self.path("serving.drcov"), serving)
        return {
            "init_blocks": init.count,
            "serving_blocks": serving.count,
            "passes": sum(phases.passes for phases in traced),
        }

    def plan(self) -> Details:
        """→ plan-learn.toml."""
        from dynacut.shared.on_hit import OnHit
        from dynacut.shared.plan import Scope
        from dynacut.shared.startup import startup_code, startup_plan

        init, serving = read_union([self.path("init.drcov")]), read_union([self.path("serving.drcov")])
        parts = startup_code(init, [serving], self.tracer.modules)
        # The handler puts bytes back, but cannot map pages: those wait for the final plan.
        scope = Scope.BLOCK if self.scope == Scope.PAGE else Scope(self.scope)
        plan = startup_plan(parts, OnHit.parse("learn"), scope)
        write_plan(self.path("plan-learn.toml"), plan, ["Start-up code, to be learned from."])
        return {"blocks": sum(len(part.only) for part in parts)}

    # By way of a checkpoint.

    def checkpoint(self) -> Details:
        """→ image/: of the untouched service, when the workload has passed once."""
        pid = self.pid if self.pid is not None else self._started()
        with self._guarded(pid):
            self.tell("workload on the untouched program")
            self.service.work(pid)
            memory = memory_of(pid)
            self._dump(pid, "image")
        return {"memory": memory}

    def learn(self) -> Details:
        """image/ → image-learn/, standing.drcov; restored and put to work → learned.drcov, image-learned/."""
        from dynacut.offline.images.image import Image
        from dynacut.shared import resolve
        from dynacut.shared.drcov import write
        from dynacut.shared.keep import without

        with Image(self.path("image")) as image:
            stay = _standing_in(image)
            write(self.path("standing.drcov"), stay)
            plan, left_out = without(load(self.path("plan-learn.toml")), stay)
            self._rewrite(image, "image-learn", lambda target, table: resolve.disable(plan, target, table))
        with self._restored("image-learn") as pid:
            passes, found = self._work_until_learned(pid)
            write(self.path("learned.drcov"), found)
            self._dump(pid, "image-learned")
            learned_count = found.count
        return {"passes": passes, "learned": learned_count, "standing": left_out}

    def remove(self) -> Details:
        """image-learned/ → plan.toml, image-final/."""
        from dynacut.offline import patcher
        from dynacut.offline.images.image import Image
        from dynacut.offline.images.process import ImageProcess
        from dynacut.shared import resolve
        from dynacut.shared.region import find_region

        with Image(self.path("image-learned")) as image:
            plan = self._final_plan(_standing_in(image))

            def learn_no_more(target: Target, table: Table | None) -> PatchSet:
                assert isinstance(target, ImageProcess)
                patcher.apply(target, resolve.undo(target, table))
                found = find_region(target)
                return resolve.disable(plan, target, found.table if found else None)

            self._rewrite(image, "image-final", learn_no_more)
        return {"sites": _site_count(plan)}

    def check(self) -> Details:
        """image-final/ → the service runs, without its start-up code; the workload passes."""
        from dynacut.live.change import look

        with self._restored("image-final") as pid:
            self.tell("workload on the trimmed program")
            self.service.work(pid)
            details = self._looked_at(pid, look(pid, tree=True).processes)
            self._note_process(pid)
        return {"memory_before": (self.state.details("checkpoint") or {})["memory"], **details}

    # Live.

    def live(self) -> Details:
        """The same without a checkpoint → standing.drcov, learned.drcov, plan.toml; the service runs on, trimmed."""
        from dynacut.live.change import change, look
        from dynacut.live.learned import standing
        from dynacut.shared import resolve
        from dynacut.shared.drcov import write
        from dynacut.shared.keep import union_of_all, without

        timeout = 30.0
        pid = self.pid if self.pid is not None else self._started()
        with self._guarded(pid):
            self.tell("workload on the untouched program")
            self.service.work(pid)
            memory = memory_of(pid)
            stay = standing(pid, tree=True)
            write(self.path("standing.drcov"), stay)
            plan, left_out = without(load(self.path("plan-learn.toml")), stay)
            change(pid, lambda *where: resolve.disable(plan, *where), tree=True, dry_run=False, timeout=timeout)
            passes, found = self._work_until_learned(pid)
            write(self.path("learned.drcov"), found)
            self.tell("removing for good")
            change(pid, resolve.undo, tree=True, dry_run=False, timeout=timeout)
            final = self._final_plan(union_of_all([stay, standing(pid, tree=True)]))
            change(pid, lambda *where: resolve.disable(final, *where), tree=True, dry_run=False, timeout=timeout)
            self.tell("workload on the trimmed program")
            self.service.work(pid)
            details = self._looked_at(pid, look(pid, tree=True).processes)
            self._note_process(pid)
        counts = {"passes": passes, "learned": found.count, "standing": left_out, "sites": _site_count(final)}
        return {"memory_before": memory, **counts, **details}

    # What the steps have in common.

    def _started(self) -> int:
        self.tell("starting the program")
        return self.service.start()

    def _note_process(self, pid: int) -> None:
        from dynacut.offline import processes

        started = processes.start_time(pid)
        self.state.process = (pid, started) if started is not None and self.pid is None else None

    @contextmanager
    def _guarded(self, pid: int) -> Iterator[None]:
        """If something fails: an instance of our own is ended, a service that ran before is put back as it was."""
        from dynacut.live.change import change
        from dynacut.shared import resolve

        self._note_process(pid)
        try:
            yield
        except BaseException:
            if self.pid is None:
                end(pid)
                self.state.process = None
            elif is_alive(pid):
                change(pid, resolve.undo, tree=True, dry_run=False, timeout=30.0)
            raise

    @contextmanager
    def _restored(self, name: str) -> Iterator[int]:
        """An image's service runs. If something fails it is ended; one that ran before goes on from its first image."""
        from dynacut.offline.restore import restore

        pid = self._restore(name)
        self._note_process(pid)
        try:
            yield pid
        except BaseException:
            end(pid)
            self.state.process = None
            if self.pid is not None:
                self.tell("it failed; restoring the untouched service")
                restore(self.path("image"), criu=self._criu(), tcp_close=True)
            raise

    def _restore(self, name: str) -> int:
        from dynacut.offline.restore import restore

        restored = restore(self.path(name), criu=self._criu(), rollback=False, progress=self.tell)
        return restored.pid

    def _criu(self) -> Any:
        from dynacut.offline.criu import find_criu

        return find_criu(self.criu)

    def _dump(self, pid: int, name: str) -> None:
        from dynacut.offline.checkpoint import checkpoint

        directory = self._removed(name)
        done = checkpoint(pid, directory, criu=self._criu(), progress=self.tell)
        if done.remaining:
            raise DynacutError(
                f"process {done.remaining[0]} was dumped, but its parent has not reaped it, so nothing can be restored",
                f"let the parent reap it, then `dynacut restore {directory}`; or use --live, which needs no checkpoint",
                status=ExitStatus.CHECK_FAILED,
            )
        self.state.process = None

    def _rewrite(self, image: Image, name: str, resolve: Callable[[Target, Table | None], PatchSet]) -> None:
        from dynacut.offline.change import change

        self.tell("rewriting the image")
        change(image, resolve, self._removed(name), dry_run=False, flat=False)

    def _removed(self, name: str) -> Path:
        """The path of a directory that is to be made; what an earlier attempt has left there is removed."""
        directory = self.path(name)
        if directory.exists():
            shutil.rmtree(directory)
        return directory

    def _work_until_learned(self, pid: int) -> tuple[int, Coverage]:
        """Runs the workload until enough passes learn nothing more: how many it were, and what was learned."""
        from dynacut.live.learned import learned

        before = quiet = 0
        for number in range(1, self.tracer.passes + 1):
            self.tell(f"learning, pass {number}: {before:,} blocks so far")
            self.service.work(pid)
            time.sleep(self.tracer.idle)
            found = learned(pid, tree=True)
            quiet = quiet + 1 if found.count == before else 0
            before = found.count
            if quiet == self.tracer.quiet:
                break
        return number, found

    def _final_plan(self, stay: Coverage) -> Plan:
        """→ plan.toml, standing.drcov. stay: where threads are now."""
        from dynacut.shared.drcov import write
        from dynacut.shared.keep import union_of_all, without

        stay = union_of_all([read_union([self.path("standing.drcov")]), stay])
        write(self.path("standing.drcov"), stay)
        learned = read_union([self.path("learned.drcov")])
        plan, _ = without(load(self.path("plan-learn.toml")), union_of_all([stay, learned]))
        plan = with_features(plan, self.on_hit, self.scope)
        write_plan(self.path("plan.toml"), plan, ["Start-up code, without what was learned or in use."])
        return plan

    def _looked_at(self, pid: int, inspected: list[Inspection]) -> Details:
        """What is to be known of the trimmed service while it runs."""
        features = [feature for each in inspected for feature in each.features]
        self.tell("counting gadgets")
        return {
            "pid": pid,
            "exe": inspected[0].exe,
            "processes": len(inspected),
            "memory_after": memory_of(pid),
            "unmapped_pages": sum(feature.unmapped_pages for feature in inspected[0].features),
            "hits": sum(feature.hits for feature in features),
            "gadgets": _gadgets(pid, load(self.path("plan.toml"))),
        }


def _standing_in(image: Image) -> Coverage:
    """Where the threads of an image are, of all processes that run the root's program."""
    from dynacut.shared.keep import union_of_all
    from dynacut.shared.standing import standing_of

    root = image.processes[0]
    return union_of_all(
        standing_of(process, [(thread.rip, thread.rsp) for thread in process.threads])
        for process in image.processes
        if process.exe == root.exe
    )


def _site_count(plan: Plan) -> int:
    return sum(len(feature.sites) for feature in plan.features)


def _gadgets(pid: int, plan: Plan) -> dict[str, list[int]]:
    """The gadgets of each module of the plan, by its path: in the file, and in memory."""
    from dynacut.live.process import Process
    from dynacut.shared.code import Code
    from dynacut.shared.gadgets import count_gadgets
    from dynacut.shared.holes import Patched
    from dynacut.shared.region import find_region

    counts: dict[str, list[int]] = {}
    paths = {module.path for module in plan.modules.values()}
    with Process(pid) as process:
        found = find_region(process)
        view = Patched(process, found.table if found else None)
        for module in process.modules:
            if module.path in paths:
                elf = Code(module).elf
                texts = [segment for segment in elf.segments if segment.executable]
                before = sum(count_gadgets(elf.read(text.offset, text.file_size)) for text in texts)
                after = sum(count_gadgets(view.read(module.base + text.offset, text.file_size)) for text in texts)
                counts[module.path] = [before, after]
    return counts
