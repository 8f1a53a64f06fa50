"""The steps of `dynacut trim`: each takes files of the directory, and leaves files there."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynacut.handlers.table import Action
from dynacut.jobs.trim.instance import TIMEOUT, Instance, put_back
from dynacut.jobs.trim.measured import resident_memory, trimmed_facts
from dynacut.jobs.trim.rounds import run_round
from dynacut.jobs.trim.tracer import PhaseTracer
from dynacut.shared import plan_file, resolve
from dynacut.shared.coverage.coverage import union_of_all
from dynacut.shared.coverage.drcov import read_union, write
from dynacut.shared.coverage.keep import without
from dynacut.shared.coverage.standing import standing_of
from dynacut.shared.coverage.startup import startup_code, startup_plan
from dynacut.shared.errors import DynacutError
from dynacut.shared.on_hit import OnHit
from dynacut.shared.plan import Plan, Scope
from dynacut.shared.region import find_region

if TYPE_CHECKING:
    from dynacut.handlers.table import Table
    from dynacut.offline.images.image import Image
    from dynacut.shared.coverage.coverage import Coverage
    from dynacut.shared.patch_set import PatchSet, Resolve
    from dynacut.shared.target import Target

Details = dict[str, Any]
_LINGERS = 5
"""How often the service is left to its timers when it learns, if they go on bringing something."""


@dataclass(frozen=True)
class Trim:
    """One trim in one directory.

    init: logs of the start-up of a given process. serving: logs of later phases that the workload does not have.
    learn_for: seconds that learning takes at least. on_hit, scope: of the final plan. warn: is told what a user should
    know.
    """

    instance: Instance
    tracer: PhaseTracer
    init: tuple[Path, ...]
    serving: tuple[Path, ...]
    learn_for: float
    on_hit: OnHit
    scope: Scope
    warn: Callable[[str], None]

    def path(self, name: str) -> Path:
        """A file of the directory."""
        return self.instance.path(name)

    @property
    def modules(self) -> tuple[str, ...]:
        """The paths of the modules that were traced, where some were chosen: by whatever name, logs have the paths."""
        traced = self.instance.state.details("trace") if self.tracer.modules else None
        return tuple(traced["modules"]) if traced else ()

    # What ran, and the plan.

    def trace(self) -> Details:
        """→ init.drcov, serving.drcov: traces an instance for each way to end it, or the one that runs."""

        given = self.instance.given
        if given is None:
            traced = [self.tracer.from_start(shutdown) for shutdown in self.tracer.service.shutdown]
        else:
            with self.instance.running():
                traced = [self.tracer.running(given)]
        if not all(phases.round.quiet_passes for phases in traced):
            self.warn(
                f"after {self.tracer.patience.passes} passes the workload still reached new code now and then: some "
                "paths may not be known yet; allow more by --passes"
            )
        init = union_of_all(
            [read_union(self.init, self.warn), *(phases.init for phases in traced if phases.init is not None)]
        )
        serving = union_of_all([read_union(self.serving, self.warn), *(phases.serving for phases in traced)])
        write(self.path("init.drcov"), init)
        write(self.path("serving.drcov"), serving)
        return {
            "init_blocks": init.count,
            "serving_blocks": serving.count,
            "passes": sum(phases.round.passes for phases in traced),
            "rounds": [phases.round.as_json() for phases in traced],
            "modules": list(dict.fromkeys(module.path for phases in traced for module in phases.serving.modules)),
        }

    def plan(self) -> Details:
        """→ plan-learn.toml."""

        init, serving = (
            read_union([self.path("init.drcov")], self.warn),
            read_union([self.path("serving.drcov")], self.warn),
        )
        parts = startup_code(init, [serving], self.modules)
        # The handler puts bytes back, but cannot map pages: those wait for the final plan.
        scope = Scope.BLOCK if self.scope is Scope.PAGE else self.scope
        plan = startup_plan(parts, OnHit(Action.LEARN), scope)
        plan_file.write(self.path("plan-learn.toml"), plan, ["Start-up code, to be learned from."])
        return {"blocks": sum(len(part.only) for part in parts)}

    # By way of a checkpoint.

    def checkpoint(self) -> Details:
        """→ image/: of the untouched service, when the workload has passed once."""
        state = self.instance.state
        if not (self.instance.was_dumped and self.instance.has_image("image")):
            with self.instance.running() as pid:
                self.tracer.tell("workload on the untouched program")
                self.tracer.service.work(pid)
                state.note("memory", resident_memory(pid))
                self.instance.cleared("image-learned")
                self.instance.dump(pid, "image")
        return {"memory": state.noted("memory")}

    def learn(self) -> Details:
        """image/ → image-learn/, standing.drcov; restored and put to work → learned.drcov, image-learned/."""
        from dynacut.offline.images.image import Image

        was_learned = self.instance.was_dumped and self.instance.has_image("image-learned")
        with Image(self.path("image")) as image:
            stay = _standing_in(image)
            write(self.path("standing.drcov"), stay)
            plan, left_out = without(plan_file.load(self.path("plan-learn.toml")), stay)
            if not was_learned:
                self._rewrite(image, "image-learn", lambda target, table: resolve.disable(plan, target, table))
        if not was_learned:
            with self.instance.restored("image-learn") as pid:
                self.instance.state.note("learned", self._work_until_learned(pid))
                self.instance.dump(pid, "image-learned")
        return {**self.instance.state.noted("learned"), "standing": left_out}

    def remove(self) -> Details:
        """image-learned/ → plan.toml, image-final/."""
        from dynacut.offline import patcher
        from dynacut.offline.images.image import Image
        from dynacut.offline.images.process import ImageProcess

        with Image(self.path("image-learned")) as image:
            plan = self._final_plan(_standing_in(image))

            def learn_no_more(target: Target, table: Table | None) -> PatchSet:
                assert isinstance(target, ImageProcess)
                patcher.apply(target, put_back(target, table))
                found = find_region(target)
                return resolve.disable(plan, target, found.table if found else None)

            self._rewrite(image, "image-final", learn_no_more)
        return {"sites": _site_count(plan)}

    def check(self) -> Details:
        """image-final/ → the service runs, without its start-up code; the workload passes."""
        with self.instance.restored("image-final") as pid:
            self.tracer.tell("workload on the trimmed program")
            self.tracer.service.work(pid)
            details = self._facts(pid)
        memory = (self.instance.state.details("checkpoint") or {})["memory"]
        return {"memory_before": memory, **details}

    def _rewrite(self, image: Image, name: str, decide: Resolve) -> None:
        from dynacut.offline.change import change

        self.tracer.tell("rewriting the image")
        change(image, decide, self.instance.cleared(name), dry_run=False, flat=False)

    # Live.

    def live(self) -> Details:
        """The same without a checkpoint → standing.drcov, learned.drcov, plan.toml; the service runs on, trimmed."""
        from dynacut.live.change import change
        from dynacut.live.learned import standing

        def apply(decide: Resolve) -> None:
            change(pid, decide, tree=True, dry_run=False, timeout=TIMEOUT)

        with self.instance.running() as pid:
            self.tracer.tell("workload on the untouched program")
            self.tracer.service.work(pid)
            memory = resident_memory(pid)
            stay = standing(pid, tree=True)
            write(self.path("standing.drcov"), stay)
            plan, left_out = without(plan_file.load(self.path("plan-learn.toml")), stay)
            apply(lambda *where: resolve.disable(plan, *where))
            learned = self._work_until_learned(pid)
            self.tracer.tell("removing for good")
            apply(put_back)
            final = self._final_plan(union_of_all([stay, standing(pid, tree=True)]))
            apply(lambda *where: resolve.disable(final, *where))
            self.tracer.tell("workload on the trimmed program")
            self.tracer.service.work(pid)
            details = self._facts(pid)
        return {"memory_before": memory, **learned, "standing": left_out, "sites": _site_count(final), **details}

    # What both have in common.

    def _work_until_learned(self, pid: int) -> Details:
        """→ learned.drcov: runs the workload until nothing more is learned.

        Raises:
            DynacutError: a command fails; or blocks came to the end, and the final plan could not put them back.
        """
        from dynacut.live.learned import learned

        tracer = self.tracer
        found: list[Coverage] = []

        def work() -> None:
            tracer.service.work(pid)
            time.sleep(tracer.idle)

        def poll() -> int:
            # A worker that has ended takes its table along: what it had learned by the last look counts.
            found[:] = [union_of_all([*found, learned(pid, tree=True)])]
            return found[0].count

        patience = replace(tracer.patience, lingers=_LINGERS, least=self.learn_for)
        done = run_round(patience, work, poll, tracer.tell, "learning")
        write(self.path("learned.drcov"), union_of_all(found))
        if not done.is_quiet and self.on_hit.action is not Action.LEARN:
            raise DynacutError(
                f"{done.blocks:,} blocks had to come back, the last after {done.last_new:.0f} s of {done.seconds:.0f}: "
                f"more would, and {self.on_hit} would not let them",
                "give it longer by --learn-for, --linger or --passes; or take --on-hit learn, in a new directory",
            )
        return {"passes": done.passes, "learned": done.blocks, "round": done.as_json()}

    def _final_plan(self, stay: Coverage) -> Plan:
        """→ plan.toml, standing.drcov. stay: where threads are now."""

        stay = union_of_all([read_union([self.path("standing.drcov")], self.warn), stay])
        write(self.path("standing.drcov"), stay)
        learned = read_union([self.path("learned.drcov")], self.warn)
        plan, _ = without(plan_file.load(self.path("plan-learn.toml")), union_of_all([stay, learned]))
        plan = plan.with_action(self.on_hit, self.scope)
        plan_file.write(self.path("plan.toml"), plan, ["Start-up code, without what was learned or in use."])
        return plan

    def _facts(self, pid: int) -> Details:
        self.tracer.tell("counting gadgets")
        details = trimmed_facts(pid, plan_file.load(self.path("plan.toml")))
        self.instance.note(pid)
        return details


def _standing_in(image: Image) -> Coverage:
    """Where the threads of an image are, of all processes that run the root's program."""

    root = image.processes[0]
    return union_of_all(
        standing_of(process, [(thread.rip, thread.rsp) for thread in process.threads])
        for process in image.processes
        if process.exe == root.exe
    )


def _site_count(plan: Plan) -> int:
    return sum(len(feature.sites) for feature in plan.features)
