"""Compares the tables with Stripe itself: lists Stripe's objects, and finds the rows that differ from them.

proof/kinds.py names the objects that are listed, proof/lists.py follows a list, and proof/comparison.py compares an
object with its row.
"""

import hashlib
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, suppress
from datetime import datetime

import structlog

from schemas.errors import CallDeclined, KeyRefused, MissingAtStripe, NotServed
from schemas.observations import World
from schemas.progress import Progress, do_nothing
from schemas.version import version
from worker.folding import projection
from worker.proof import audits, kinds, ledgers, lists, matching, walks
from worker.proof.audits import Audit, Shown, Walk
from worker.proof.difference import Difference
from worker.proof.kinds import Kind, Listed
from worker.proof.walks import Step
from worker.stripe_jobs import rounds
from worker.stripe_jobs.rounds import JobContext

_log = structlog.get_logger()


def audit(
    context: JobContext,
    *,
    since: datetime | None = None,
    progress: Progress = do_nothing,
    repair: bool = False,
    seed: int | None = None,
    customers_max: int = audits.CUSTOMERS_MAX,
    ledgers_max: int = audits.LEDGERS_MAX,
) -> Generator[Listed | Difference, None, None]:
    """List Stripe's objects that were created *since*, and yield each difference, and a tally of each kind of object.

    An interrupted audit goes on where it was: see Note [An audit goes on where it was]. *seed* chooses the samples
    of *customers_max* customers and of *ledgers_max* ledgers; without a seed the date does.

    With *repair* differing objects are recorded as they were listed, their rows are folded again, and sessions that
    Stripe does not know are recorded as missing. The map is then not used, since a repair cannot correct what only the
    map finds.

    Raises:
        KeyRefused, NotServed: Stripe refuses every world; differences that were yielded until then are valid.
        Transient: Stripe cannot be asked now; the same holds.
    """
    projection.fold_pending(context.engine)
    for world in rounds.unserved(context):
        yield Listed(world.account, world.livemode, kinds.NOT_ASKED)
    worlds = rounds.served(context)
    place = context.engine.url
    arguments = [
        *(version(), place.host, place.port, place.database, [str(world) for world in worlds]),
        *(context.settings.stripe_api_base, _fingerprint(context)),
        *(since, repair, seed, customers_max, ledgers_max),
    ]
    kept = walks.opened(
        context.settings.payfold_data_dir,
        arguments,
        seed=context.now().toordinal() if seed is None else seed,
        now=context.now(),
    )
    if kept.taken:
        _log.info("audit.resumed", begun=kept.begun.isoformat(), steps=sum(map(len, kept.taken.values())))
    try:
        shown = Shown(progress, len(worlds) * len(kinds.WALKED))
        yield from _run(Audit(context, since, repair, customers_max, ledgers_max, kept, shown), worlds)
        kept.end()
    finally:
        kept.write()
        if kept.is_kept:
            _log.warning("audit.interrupted", reason="the same command goes on from here, within a day")
        kept.close()


def _fingerprint(context: JobContext) -> str:
    """Return a hash of the set of keys, which reveals none of them."""
    keys = ((key.account, key.livemode, key.secret) for key in context.settings.api_keys)
    return hashlib.sha256(repr(sorted(keys)).encode()).hexdigest()


def repair(
    context: JobContext, *, since: datetime | None = None, progress: Progress = do_nothing, seed: int | None = None
) -> int:
    """Correct the differences that an audit finds, and return how many there were."""
    with closing(audit(context, since=since, progress=progress, repair=True, seed=seed)) as found:
        return sum(isinstance(each, Difference) for each in found)


def _run(audit: Audit, worlds: Sequence[World]) -> Iterator[Listed | Difference]:
    """Audit each of the *worlds*. If Stripe refuses one, the others go on; if it refuses all, the audit ends."""
    refusals: list[KeyRefused | NotServed] = []
    for number, world in enumerate(worlds):
        try:
            yield from _audit_world(audit, world, number * len(kinds.WALKED))
        except (KeyRefused, NotServed) as error:
            refusals.append(error)
            _log.warning("audit.refused", account=world.account, livemode=world.livemode, reason=str(error))
            yield Listed(world.account, world.livemode, kinds.REFUSED, reason=str(error))
    if refusals and len(refusals) == len(worlds):
        raise refusals[0]
    audit.shown.kinds(audit.shown.count)


def _audit_world(audit: Audit, world: World, done: int) -> Iterator[Listed | Difference]:
    """Audit each kind that the key of *world* may list, after so many kinds that were *done* in others.

    Raises:
        KeyRefused, NotServed: the key may list nothing, or is not let in any more.
    """
    tallies: list[Listed] = []
    refusals: list[KeyRefused] = []
    is_let_in = False
    for number, kind in enumerate(kinds.WALKED, start=done):
        audit.shown.kinds(number)
        walk = audits.begun(audit, world, kind)
        try:
            yield from _kept_of(audit, world, kind, walk)
            yield from _audited(audit, world, kind, walk)
        except KeyRefused as error:
            if not error.is_forbidden:
                raise
            refusals.append(error)
            walk.tally.is_forbidden = True
        else:
            # The ledgers prove no access: if no customer has a ledger, Stripe was not asked.
            is_let_in = is_let_in or kind is not kinds.LEDGERS
        tallies.append(walk.tally)
        if is_let_in:
            yield from tallies
            tallies = []
    if not is_let_in:
        raise refusals[0]


def _kept_of(audit: Audit, world: World, kind: Kind, walk: Walk) -> Iterator[Difference]:
    """Let *walk* go on by the steps that an interrupted audit kept of it, and yield their differences that remain."""
    for step in walks.since_restart(audit.kept.taken.get(walk.place, [])):
        if not step.differences or audit.repair:
            # A repair has corrected what it found.
            found = walks.found_in(step)
        else:
            again = Listed(*walk.place)
            found = _looked_again(audit, world, kind, walk, again, step)
            audits.add_up(again, found)
            step.tally = {
                **step.tally,
                **{name: getattr(again, name) for name in kinds.COUNTS if name not in kinds.OF_PAGES},
            }
        yield from walk.news(found)
        walk.count(step.tally)
        audit.shown.listed(step.tally.get("listed", 0))
        walk.take(step)


def _looked_again(audit: Audit, world: World, kind: Kind, walk: Walk, tally: Listed, step: Step) -> list[Difference]:
    """Ask again for all objects of the next *step* of *walk*, and return the differences that there are now."""
    if kind is kinds.LEDGERS:
        return ledgers.differing_in_ledger(audit, world, tally, str(step.after))
    ids, found = set(step.ids), []
    if not step.is_listed:
        with suppress(CallDeclined, MissingAtStripe):
            page = next(lists.pages_after(audit, world, kind, walk.behind(step)))
            objects = [each for each in page.objects if each.id in ids]
            ids.difference_update(str(each.id) for each in objects)
            found = matching.compared(audit, world, tally, objects)
    # The page may have other objects by now, or no longer exist, so the rest are asked for one by one.
    return [*found, *(each for id_ in sorted(ids) for each in lists.asked_for(audit, world, kind, walk, tally, id_))]


def _audited(audit: Audit, world: World, kind: Kind, walk: Walk) -> Iterator[Difference]:
    if not walk.is_done:
        yield from (
            ledgers.audit_ledgers(audit, world, walk)
            if kind is kinds.LEDGERS
            else lists.audit_kind(audit, world, kind, walk)
        )
    if kind is kinds.SESSIONS and walk.tally.extra and not walk.is_known:
        walk.tally.reason = kinds.ANOTHER_SANDBOX
