"""Checks whether the tables are right: by the rules of money, a rebuild, another program's log, and Stripe itself.

The result of a run is one object (see ``run``), which the command prints, the report draws and the history keeps.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any, Final

from psycopg.rows import dict_row
from sqlalchemy import Engine

from schemas import database, reconciliations, tables
from schemas.database import Cursor
from schemas.errors import BrokerAway, DatabaseAway, KeyRefused, NotServed, PayfoldError
from schemas.progress import Progress, do_nothing
from schemas.settings import SigningSecret
from schemas.version import version
from worker.folding import projection
from worker.logs.reader import Entry
from worker.proof import against_logs, against_stripe, archived, money_rules, rebuild, shadow, swap, witness
from worker.proof.difference import Difference, shown_value
from worker.proof.kinds import REFUSED, Listed
from worker.proof.rebuild import USUAL, Sizes
from worker.stripe_jobs.rounds import JobContext

RULES: Final = reconciliations.RULES
REBUILD: Final = reconciliations.REBUILD
LOG: Final = "log"
STRIPE: Final = reconciliations.STRIPE
# Stripe is not asked for the objects of these tables: see proof/kinds.py.
_NOT_ASKED: Final = ("payment_intents", "portal_sessions")
_COLUMNS: Final = sum(each.table not in _NOT_ASKED for each in witness.MAP)
WITNESSES: Final = {
    RULES: "by its own arithmetic",
    REBUILD: "against a rebuild with the same folds, which finds lost and changed rows and not a wrong reading",
    STRIPE: f"against Stripe, by a map of {_COLUMNS} columns",
}
"""By check, the thing that the tables were compared with."""
DRIFT_LISTED_MAX: Final = 1_000
"""A result lists up to so many differences; ``ReconcileRequest.each`` is called with all of them."""


@dataclass(frozen=True, slots=True)
class ReconcileRequest:
    """The things that a run checks, and how.

    *logs* are files of events. In them *account* stands for events that name none, and a signature counts where one of
    *secrets* verifies it. Through *context* Stripe is asked for objects that were created *since*, and *seed* chooses
    the sample where there are too many customers to ask for all. *archive* is the folder of archived payloads. With
    *repair* the run corrects what it can, and then checks again. *each* is called with every difference, *refuse* with
    every entry of a log that cannot be read. *number* is that of the request, where the run was asked for.
    """

    number: int | None = None

    logs: Sequence[str] = ()
    account: str = ""
    secrets: Sequence[SigningSecret] = ()
    context: JobContext | None = None
    since: datetime | None = None
    seed: int | None = None
    archive: Path | None = None
    repair: bool = False
    each: Callable[[dict[str, Any]], None] = do_nothing
    refuse: Callable[[Entry], None] = do_nothing
    progress: Progress = do_nothing
    sizes: Sizes = USUAL


@dataclass(slots=True)
class _Drift:
    """Collects the differences: counts all of them, and lists some."""

    each: Callable[[dict[str, Any]], None]
    listed: list[dict[str, Any]] = field(default_factory=list)
    total: int = 0
    kinds: Counter[tuple[str, str]] = field(default_factory=Counter)
    money: dict[str, Counter[str]] = field(default_factory=dict)
    rows: dict[str, Counter[str]] = field(default_factory=dict)

    def add(self, check: str, found: Difference) -> None:
        """Add a difference that *check* found."""
        row = {
            "check": check,
            "kind": found.kind,
            "account": found.account,
            "livemode": found.livemode,
            "table": found.table,
            "id": found.id,
            "column": found.column,
            "held": shown_value(found.column, found.held),
            "expected": shown_value(found.column, found.expected),
            "currency": found.currency,
            "amount": found.amount,
            "at": found.at,
            "detail": found.detail,
        }
        self.total += 1
        self.kinds[check, found.kind] += 1
        if found.currency is not None and found.amount is not None and found.column in (None, *tables.MAIN_AMOUNTS):
            self.money.setdefault(check, Counter())[found.currency] += found.amount
            self.rows.setdefault(check, Counter())[found.currency] += 1
        if len(self.listed) < DRIFT_LISTED_MAX:
            self.listed.append(row)
        self.each(row)

    def summed(self) -> list[dict[str, Any]]:
        """Return the money held less the money expected, by currency, as the first check that found any reports it.

        Several checks can find the same cent, so their amounts are not added up.
        """
        check = next((each for each in (REBUILD, STRIPE, RULES) if each in self.money), None)
        if check is None:
            return []
        return [
            {"currency": currency, "amount": amount, "count": self.rows[check][currency]}
            for currency, amount in sorted(self.money[check].items())
        ]


def run(engine: Engine, checks: Sequence[str], wanted: ReconcileRequest) -> dict[str, Any]:
    """Make the *checks*, keep their result, and return it.

    The result holds ``run``, ``witnesses``, ``events``, ``money``, ``drift``, ``drift_total``, ``drift_money`` and, of
    each check that was made, ``rules`` (each with the ``reasons`` of what it could not prove) with ``not_provable``,
    ``tables``, ``logs`` or ``stripe``; after a repair also ``repaired``, which counts what had to be corrected; and
    where objects are archived, and no archive is given, how many objects and events are ``left_out`` of the rebuild.
    If Stripe refuses or fails, all that was found until then is kept: the check is not among those of ``run``, and
    ``stripe_error`` holds the *kind* of the failure, its *detail*, and what is *to_do*. The ``outcome`` of the run is
    drift if there is any; else incomplete if a part that was asked for could not be looked at; else ok.

    Raises:
        ConflictError: folding did not pause in time, the archive lacks payloads that it should have, or no archive is
            given where a repair needs one; nothing has changed.
    """
    if wanted.repair and wanted.archive is None:
        with shadow.shadow(engine) as made:
            archived.require_all(made)
    started = datetime.now(UTC)
    drift = _Drift(wanted.each)
    parts = _parts(engine, checks, wanted, drift)
    repaired = None
    if wanted.repair and drift.total:
        repaired = {"drift_total": drift.total, "kinds": _kinds(drift)}
        repaired |= _repair(engine, [each for each in checks if each != STRIPE or "stripe_error" not in parts], wanted)
        drift = _Drift(wanted.each)
        parts = _parts(engine, checks, wanted, drift)
    result = {
        "run": {
            "id": 0,
            "started_at": started,
            "finished_at": datetime.now(UTC),
            "outcome": "drift" if drift.total else "incomplete" if _is_cut(parts) else "ok",
            "version": version(),
            "since": wanted.since,
            "seed": wanted.seed,
            "checks": [check for check in checks if check != STRIPE or "stripe_error" not in parts],
        },
        "witnesses": {check: WITNESSES[check] for check in checks if check in WITNESSES},
        **_of_the_shop(engine),
        **parts,
        "drift": drift.listed,
        "drift_total": drift.total,
        "drift_kinds": _kinds(drift),
        "drift_money": drift.summed(),
    }
    if repaired is not None:
        result["repaired"] = repaired
    with database.transaction(engine) as connection, database.cursor(connection) as cursor:
        reconciliations.keep(cursor, result, number=wanted.number)
    return result


def _is_cut(parts: dict[str, Any]) -> bool:
    """Return whether a part that was asked for could not be looked at.

    The rest is by choice: worlds without a key, kinds that a restricted key may not list, samples.
    """
    is_cut_at_stripe = any(each["object"] == REFUSED or "cut_short" in each for each in parts.get("stripe", ()))
    return "stripe_error" in parts or is_cut_at_stripe or bool(parts.get("logs", {}).get("refused"))


def _kinds(drift: _Drift) -> list[dict[str, Any]]:
    return [{"check": check, "kind": kind, "count": count} for (check, kind), count in sorted(drift.kinds.items())]


def _parts(engine: Engine, checks: Sequence[str], wanted: ReconcileRequest, drift: _Drift) -> dict[str, Any]:
    made = {RULES: _by_rules, REBUILD: _by_rebuild, LOG: _by_logs, STRIPE: _by_stripe}
    parts: dict[str, Any] = {}
    for check in checks:
        parts |= made[check](engine, wanted, drift)
    return parts


def _by_rules(engine: Engine, wanted: ReconcileRequest, drift: _Drift) -> dict[str, Any]:
    wanted.progress("Money rules", 0, 1)
    with _at_one_moment(engine) as cursor:
        tallies, findings = money_rules.check(cursor)
    titles = {rule.name: rule.title for rule in money_rules.RULES}
    unproven = [finding for finding in findings if finding.state != "broken"]
    for finding in findings:
        if finding.state == "broken":
            drift.add(RULES, _broken(finding))
    wanted.progress("Money rules", 1, 1)
    names = ("rule", "account", "livemode", "table", "id", "detail", "at")
    return {
        "rules": [{**asdict(tally), "title": titles[tally.rule]} for tally in tallies],
        "not_provable": [{name: getattr(each, name) for name in names} for each in unproven],
    }


def _broken(finding: money_rules.Finding) -> Difference:
    held, expected = finding.held, finding.expected
    is_money = finding.currency is not None and held is not None and expected is not None
    return Difference(
        finding.table,
        finding.rule,
        finding.account,
        finding.livemode,
        finding.id,
        held=held,
        expected=expected,
        currency=finding.currency,
        amount=held - expected if is_money and held is not None and expected is not None else None,
        at=finding.at,
        detail=finding.detail,
    )


def _by_rebuild(engine: Engine, wanted: ReconcileRequest, drift: _Drift) -> dict[str, Any]:
    with archived.with_archived(engine, wanted.archive, progress=wanted.progress) as made:
        rebuild.rebuild(made, progress=wanted.progress, sizes=wanted.sizes)
        found = swap.compare(made, on_difference=lambda difference: drift.add(REBUILD, difference))
    left_out = {"objects": found.objects_left_out, "events": found.events_left_out}
    return ({"left_out": left_out} if found.events_left_out else {}) | {"tables": found.rows}


def _by_logs(engine: Engine, wanted: ReconcileRequest, drift: _Drift) -> dict[str, Any]:
    with shadow.shadow(engine, has_inbox=True) as made:
        wanted.progress("Reading the log", 0, 1)
        refused = rebuild.record(
            made,
            wanted.logs,
            account=wanted.account,
            now=datetime.now(UTC),
            refuse=wanted.refuse,
            secrets=wanted.secrets,
        )
        wanted.progress("Reading the log", 1, 1)
        if wanted.archive is not None:
            archived.bring(made, wanted.archive, progress=wanted.progress)
        counts = against_logs.compare(made, on_difference=lambda difference: drift.add(LOG, difference))
    return {"logs": {**counts, "refused": refused}}


def _by_stripe(_: Engine, wanted: ReconcileRequest, drift: _Drift) -> dict[str, Any]:
    if wanted.context is None:
        raise ValueError("a context is needed where Stripe is to be asked")
    tallies: list[dict[str, Any]] = []
    failed: dict[str, Any] = {}
    auditing = against_stripe.audit(wanted.context, since=wanted.since, progress=wanted.progress, seed=wanted.seed)
    # If this is interrupted the audit is closed at once, so that its progress is kept.
    with _kept_in(failed), closing(auditing) as found:
        for each in found:
            if isinstance(each, Listed):
                tallies.append(_shown_tally(asdict(each)))
            else:
                drift.add(STRIPE, each)
    return {"stripe": tallies, **failed}


_TO_DO: Final = (
    (KeyRefused, "Check STRIPE_API_KEY, and what a restricted key may do, and run the command again."),
    (NotServed, "Add a key that serves it to STRIPE_API_KEY, and run the command again."),
    (BrokerAway, "Check REDIS_URL, and run the command again: within a day it goes on where it was."),
    (PayfoldError, "Run the command again: within a day it goes on where it was."),
)


@contextmanager
def _kept_in(failed: dict[str, Any]) -> Iterator[None]:
    """Keep in *failed* why Stripe could not be asked, so that the findings of the other checks are not lost."""
    try:
        yield
    except DatabaseAway:
        raise
    except PayfoldError as error:
        to_do = next(words for kind, words in _TO_DO if isinstance(error, kind))
        failed["stripe_error"] = {"kind": type(error).__name__, "detail": str(error), "to_do": to_do}


def _shown_tally(tally: dict[str, Any]) -> dict[str, Any]:
    renamed = {"missing": "missing_here", "extra": "missing_there"}
    always = ("account", "livemode", "object", "listed", "missing", "extra", "different")
    return {renamed.get(name, name): value for name, value in tally.items() if value or name in always}


def _repair(engine: Engine, checks: Sequence[str], wanted: ReconcileRequest) -> dict[str, Any]:
    """Correct what can be corrected: record the missing events, and bring the tables to what the inbox then implies."""
    done: dict[str, Any] = {}
    if LOG in checks:
        done["events_recorded"], done["events_mended"] = against_logs.record_missing(
            engine, wanted.logs, account=wanted.account, secrets=wanted.secrets
        )
    if STRIPE in checks and wanted.context is not None:
        with _kept_in(done):
            done["objects_put_right"] = against_stripe.repair(
                wanted.context, since=wanted.since, progress=wanted.progress, seed=wanted.seed
            )
    projection.fold_pending(engine)
    if REBUILD in checks or RULES in checks:
        with archived.with_archived(engine, wanted.archive, progress=wanted.progress) as made:
            rebuild.rebuild(made, progress=wanted.progress, sizes=wanted.sizes)
            found, changes = swap.swap(made)
        done |= {"rows_swapped": found.drift, "changes": changes}
    return done


# ---- The shop as a whole ----


@contextmanager
def _at_one_moment(engine: Engine) -> Iterator[Cursor]:
    with database.transaction(engine) as connection, database.cursor(connection) as cursor:
        database.take_snapshot(cursor)
        yield cursor


_EVENTS: Final = """
SELECT
    (SELECT count(*) FROM inbox) AS recorded,
    (SELECT min(created) FROM inbox) AS first_created,
    (SELECT max(created) FROM inbox) AS last_created,
    (SELECT count(*) FROM outcomes WHERE state = 'parked') AS parked,
    (SELECT count(*) FROM pending) AS pending
"""
_MONEY: Final = """
SELECT to_char(coalesce(completed_at, created) AT TIME ZONE 'UTC', 'YYYY-MM-DD') AS day, status, currency,
    count(*) AS orders, CASE WHEN currency IS NOT NULL THEN coalesce(sum(amount_total), 0) END AS amount
FROM orders GROUP BY 1, 2, 3 ORDER BY 1, 2, 3
"""


def _of_the_shop(engine: Engine) -> dict[str, Any]:
    with _at_one_moment(engine) as cursor, cursor.connection.cursor(row_factory=dict_row) as rows:
        events = rows.execute(_EVENTS).fetchone()
        money = rows.execute(_MONEY).fetchall()
    # A sum may be larger than a bigint holds, so PostgreSQL returns a decimal.
    return {"events": events, "money": [{**row, "amount": _whole(row["amount"])} for row in money]}


def _whole(amount: Decimal | None) -> int | None:
    return None if amount is None else int(amount)


# ---- History ----


def history(engine: Engine, *, limit: int) -> list[dict[str, Any]]:
    """Return the last runs, newest first."""
    with _at_one_moment(engine) as cursor, cursor.connection.cursor(row_factory=dict_row) as rows:
        rows.execute(
            "SELECT id, started_at, finished_at, outcome, checks, drift FROM reconciliations ORDER BY id DESC LIMIT %s",
            (limit,),
        )
        return rows.fetchall()
