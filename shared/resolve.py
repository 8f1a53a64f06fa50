"""From a plan and a target to a patch set: every site found and verified, every misfit named, nothing guessed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from dynacut.handlers.table import MAX_RANGES, Action, Table, TableSite
from dynacut.shared.added import in_place, is_mapped
from dynacut.shared.code import KnownFiles
from dynacut.shared.errors import DynacutError
from dynacut.shared.holes import Patched, holes_to_make
from dynacut.shared.library.library import Library
from dynacut.shared.patch_set import ByteEdit, HandlerChange, PatchSet, outside
from dynacut.shared.plan import Plan
from dynacut.shared.region import layout_for, user_of
from dynacut.shared.resolver import Resolver
from dynacut.shared.restoring import check_believable, restoring, unloaded
from dynacut.shared.sites import Ask
from dynacut.shared.target import Target

_MAX_DETAILS = 40


def disable(
    plan: Plan,
    target: Target,
    table: Table | None,
    library: Library | None = None,
    ask: Ask | None = None,
    known: KnownFiles | None = None,
) -> PatchSet:
    """The patch set that switches the plan's features off.

    table: what the target's table says, if it has one. Sites that are patched already are left alone. library: the
    user's, loaded for this target, that the action ``handler`` passes hits to; where one is in force, it may do.
    ask: knows further names for sites. known: what is known of files, by which a second target costs less.

    Raises:
        DynacutError: the plan does not fit; every misfit is named, and nothing may be applied.
    """
    target = Patched(target, table)
    known_features = table.features if table else ()
    known_sites = table.sites if table else ()
    has_library = library is not None or user_of(table).is_in_force
    resolver = Resolver(plan, target, known_sites, has_library=has_library, ask=ask, known=known)
    wanted = resolver.sites()
    wanted += resolver.idle_pages(wanted)
    wanted += resolver.removed_pages()
    added = resolver.added()
    wanted += [part.entry for part in added]
    replaced = set(plan.feature_names)
    stay = [site for site in known_sites if site.feature not in replaced]
    resolver.check_replaced([site for site in known_sites if site.feature in replaced], wanted)
    sites = tuple(sorted([*stay, *wanted], key=TableSite.key))
    resolver.check_overlaps(sites)
    resolver.check_destinations(sites)
    if resolver.misfits:
        raise _misfitting(target, resolver)
    if sum(site.is_range for site in sites) > MAX_RANGES:
        raise DynacutError(f"the plan takes away or adds more than {MAX_RANGES} runs of pages", "use scope block")
    edits = tuple(_edits(target, [site for site in sites if site.feature in replaced]))
    features = (*known_features, *(name for name in plan.feature_names if name not in known_features))
    layout_for(features, sites)
    return PatchSet(
        edits,
        HandlerChange.INSTALL,
        features,
        sites,
        known_features,
        known_sites,
        user_of(table),
        _new(library, table),
        unmap=holes_to_make(target, [site for site in sites if site.feature in replaced]),
        add=tuple(part.memory for part in added if not is_mapped(target, part.entry)),
    )


def _edits(target: Target, sites: Iterable[TableSite]) -> Iterator[ByteEdit]:
    """The edits that patch sites, but for those that are patched already."""
    for site in sites:
        found = target.read(site.address, len(site.old))
        if found != site.new:
            yield ByteEdit(site.address, found, site.new)


def _misfitting(target: Target, resolver: Resolver) -> DynacutError:
    """The error for a plan that does not fit: one misfit as such, several a line each."""
    shown = resolver.misfits[:_MAX_DETAILS]
    if len(resolver.misfits) > len(shown):
        shown.append(f"… and {len(resolver.misfits) - len(shown)} more")
    if len(shown) == 1:
        return DynacutError(shown[0], resolver.advice)
    return DynacutError(f"the plan does not fit {target.label}", resolver.advice, details=shown)


def install(library: Library, table: Table | None) -> PatchSet:
    """The patch set that puts a user's library in force and changes no code: for traps that the program has itself."""
    features = table.features if table else ()
    sites = table.sites if table else ()
    return PatchSet((), HandlerChange.INSTALL, features, sites, features, sites, user_of(table), _new(library, table))


def _new(library: Library | None, table: Table | None) -> Library | None:
    """The library if it is not just so in force already."""
    if library is not None and library.is_mapped and library.record.action == user_of(table).action:
        return None
    return library


def disable_again(names: Sequence[str], target: Target, table: Table) -> PatchSet:
    """The patch set that switches features off that the table knows, as they were before.

    Raises:
        DynacutError: the bytes at a site are neither old nor new, or its module is not loaded any more.
    """
    target = Patched(target, table)
    chosen = [site for site in table.sites if site.feature in names]
    if any(site.action is Action.MAP and not is_mapped(target, site) for site in chosen):
        raise DynacutError("the feature adds memory, whose contents only its plan has", "give the plan again by --plan")
    if gone := unloaded(target, chosen):
        raise DynacutError(
            f"feature {gone[0].feature!r} is of a module that is not loaded any more ({len(gone)} sites)",
            "when the module is loaded again, give the plan or the sites anew",
        )
    check_believable(target, chosen)
    inverse = {edit.address: edit for edit in restoring(target, chosen)}
    edits = []
    for site in chosen:
        found = inverse[site.address].old if site.address in inverse else site.old
        if found != site.new:
            edits.append(ByteEdit(site.address, found, site.new))
    features, sites = table.features, table.sites
    unmap = holes_to_make(target, chosen)
    return PatchSet(tuple(edits), HandlerChange.INSTALL, features, sites, features, sites, table.user, unmap=unmap)


def enable(names: Sequence[str], target: Target, table: Table | None) -> PatchSet:
    """The patch set that puts these features' bytes back; they stay in the table, and can be switched off again.

    Raises:
        DynacutError: one of them is not in the table, or the bytes at a site are neither old nor new.
    """
    features = table.features if table else ()
    for name in names:
        if name not in features:
            raise DynacutError(
                f"{target.label} has no feature {name!r}",
                f"it has {', '.join(features)}" if features else "nothing is patched in it",
            )
    sites = table.sites if table else ()
    chosen = [site for site in sites if site.feature in names]
    target = Patched(target, table)
    fill, drop = target.holes_of(chosen), in_place(target, chosen)
    edits = outside(restoring(target, chosen), fill)
    return PatchSet(edits, HandlerChange.KEEP, features, sites, features, sites, user_of(table), fill=fill, drop=drop)


def undo(target: Target, table: Table | None) -> PatchSet:
    """The patch set that puts everything back.

    Raises:
        DynacutError: the bytes at a site are neither old nor new, or the old ones are not those of the mapped file.
    """
    features = table.features if table else ()
    sites = table.sites if table else ()
    handler = HandlerChange.REMOVE if table else HandlerChange.KEEP
    target = Patched(target, table)
    edits = outside(restoring(target, sites), target.holes)
    drop = in_place(target, sites)
    return PatchSet(edits, handler, (), (), features, sites, user_of(table), fill=target.holes, drop=drop)
