"""Brings the live tables to the result of a rebuild, and appends the changes that follow.

Note [A swap writes the difference]
    To rename the rebuilt tables into the place of the live ones would lock out every reader for a moment. A reader
    with an older transaction would see an empty table, or half of the old state and half of the new one, since
    PostgreSQL does not undo a renaming for older snapshots. So only the rows that differ are written, in one
    transaction. No reader waits, and each sees either the old state or the new one. Indexes, views and grants stay as
    they were, including those that others have made. Folding waits for the swap, recording does not.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

import msgspec
from psycopg import sql
from sqlalchemy import Table

from schemas import change_rows, database, tables
from schemas.change_rows import ChangeRow
from schemas.database import Cursor
from schemas.errors import ConflictError
from schemas.locks import keep_others_from_appending, keep_others_from_folding, taken_in_time
from schemas.progress import do_nothing
from worker import folds
from worker.folding import corrections, expired_items, order_refunds, projection, settling
from worker.folds.facts import Subject
from worker.proof import archived, difference, digest, rebuild, shadow, sums
from worker.proof.archived import LeftOut
from worker.proof.difference import Comparison, Difference, Pair
from worker.proof.digest import Digest
from worker.proof.shadow import REPLACED, Shadow

LOCK_SECONDS_MAX: Final = 5
"""How long one try waits for folding to pause: longer than a batch takes."""
TRIES_MAX: Final = 12
CHANGES_AT_ONCE: Final = 500
PROOF_DIFFERENCES_MAX: Final = 20


def compare(made: Shadow, *, on_difference: Callable[[Difference], None]) -> Comparison:
    """Compare the live tables with *made* as of one moment, at which both have folded the same events.

    If *made* has an inbox of its own, its tables are compared as they are. Objects with an archived payload are left
    out, unless *made* has the payload. *on_difference* is called with each difference.
    """
    with database.transaction(made.engine, may_idle=True) as connection, database.cursor(connection) as cursor:
        database.take_snapshot(cursor, read_only=False)
        left = at_one_moment(cursor, made)
        found = difference.compare(cursor, made, on_difference=on_difference)
        sums.compare(cursor, made.live, found, on_difference=on_difference)
        found.objects_left_out, found.events_left_out = left.objects, left.events
        return found


@dataclass(frozen=True, slots=True)
class Proof:
    """The digests of the *live* tables and of those made *again*, as of one moment, and their first *differences*."""

    live: list[Digest]
    again: list[Digest]
    differences: list[Difference]

    @property
    def holds(self) -> bool:
        """Whether both are the same."""
        return self.live == self.again


def prove(made: Shadow) -> Proof:
    """Compare the digests of the live tables with those of *made*, once both have folded the same events."""
    found: list[Difference] = []
    with database.transaction(made.engine, may_idle=True) as connection, database.cursor(connection) as cursor:
        database.take_snapshot(cursor, read_only=False)
        at_one_moment(cursor, made)
        live = digest.digests_seen(cursor, schema=made.live)
        again = digest.digests_seen(cursor, schema=made.schema)
        if live != again:
            difference.compare(cursor, made, on_difference=found.append)
    return Proof(live, again, found[:PROOF_DIFFERENCES_MAX])


def swap(made: Shadow, *, on_difference: Callable[[Difference], None] = do_nothing) -> tuple[Comparison, int]:
    """Bring the live tables to *made*, in one transaction; return what differed, and how many changes were appended.

    *on_difference* is called with each difference that there was.

    Raises:
        ConflictError: folding does not pause in time, or a payload is archived that *made* does not have; nothing has
            changed then.
    """
    with _held(made) as (cursor, left):
        archived.require_none(left)
        implied = _Implied(cursor, made)
        found = difference.compare(cursor, made, on_difference=on_difference, pair=implied.add)
        implied.flush()
        implied.add_refunds()
        are_sums_wrong = sums.compare(cursor, made.live, found, on_difference=on_difference)
        for table in REPLACED:
            _write(cursor, made, table)
        if are_sums_wrong:
            sums.correct(cursor, made.live)
        _settle_anomalies(cursor, made)
        return found, _append(cursor, made)


def at_one_moment(reader: Cursor, made: Shadow) -> LeftOut:
    """Let *reader*, which has read nothing yet, see the live tables and *made* after the same events."""
    for last in range(TRIES_MAX, 0, -1):
        _catch_up_first(made)
        with database.transaction(made.engine, may_idle=True) as connection, database.cursor(connection) as cursor:
            if not _pause(cursor, is_last=last == 1):
                continue
            shadow.require_same_names(cursor, made)
            with database.transaction(made.engine) as folding, database.cursor(folding) as catching_up:
                left = _caught_up(catching_up, made, is_last=last == 1)
            if left is not None:
                # This takes the reader's snapshot, so it sees no event that is folded after the pause.
                reader.execute("SELECT")
                return left
    raise ConflictError(_TOO_BUSY)


@contextmanager
def _held(made: Shadow) -> Iterator[tuple[Cursor, LeftOut]]:
    """Let *made* catch up with the folded events, and let folding pause for as long as the block takes."""
    for last in range(TRIES_MAX, 0, -1):
        _catch_up_first(made)
        with database.transaction(made.engine, may_idle=True) as connection, database.cursor(connection) as cursor:
            if not _pause(cursor, is_last=last == 1):
                continue
            shadow.require_same_names(cursor, made)
            left = _caught_up(cursor, made, is_last=last == 1)
            if left is not None:
                yield cursor, left
                return
    raise ConflictError(_TOO_BUSY)


_TOO_BUSY: Final = "Folding is too busy to be compared with: try again, or at a quieter time."


def _catch_up_first(made: Shadow) -> None:
    """Let *made* catch up with most of the folded events, while folding goes on."""
    if not made.has_inbox:
        rebuild.catch_up(made)


def _caught_up(cursor: Cursor, made: Shadow, *, is_last: bool) -> LeftOut | None:
    """Let *made* catch up while folding pauses, and return what is left out; None if it would take too long."""
    left = archived.leave_out(cursor, made)
    seqs = [] if made.has_inbox else rebuild.lacking(cursor, made)
    if len(seqs) > rebuild.CATCH_UP_EVENTS and not is_last:
        return None
    _catch_up_here(cursor, made, seqs)
    return left


def _pause(cursor: Cursor, *, is_last: bool) -> bool:
    """Keep others from folding until the transaction ends; False if they did not pause in time."""
    if taken_in_time(cursor, lambda: keep_others_from_folding(cursor), seconds_max=LOCK_SECONDS_MAX):
        return True
    if is_last:
        raise ConflictError(
            "Folding did not pause in time: is a transaction left open? Nothing has changed; try again."
        )
    return False


def _catch_up_here(cursor: Cursor, made: Shadow, seqs: list[int]) -> None:
    """Fold *seqs* in *made* within the transaction that keeps others from folding."""
    if not seqs:
        return
    cursor.execute(made.path())
    rebuild.queue(cursor, seqs)
    projection.project_pending(cursor, now=datetime.now(UTC))
    cursor.execute(sql.SQL("SET LOCAL search_path = {}").format(sql.Identifier(made.live)))
    rebuild.take_over_attempts(cursor, made)


class _Implied:
    """The changes that follow from the rows that differ, gathered in a table of their own until they are appended."""

    def __init__(self, cursor: Cursor, made: Shadow) -> None:
        self._cursor = cursor
        self._made = made
        self._found: list[ChangeRow] = []
        cursor.execute(sql.SQL("TRUNCATE {}").format(sql.Identifier(made.schema, "changes")))

    def add(self, pair: Pair) -> None:
        """Gather the changes that a consumer expects when a row appears or changes."""
        spec = folds.ROW_SPECS.get(pair.table.name)
        if spec is None or pair.expected is None:
            return
        self._found += [
            {
                "account": pair.expected["account"],
                "livemode": pair.expected["livemode"],
                "subject": spec.subject,
                "subject_id": difference.owner(pair.table, pair.expected),
                "kind": change.kind,
                "event_id": pair.expected["event_id"],
                "at": pair.expected["as_of"],
                "before": change.before,
                "after": change.after,
            }
            for change in spec.changes(pair.held, pair.expected)
        ]
        if len(self._found) >= CHANGES_AT_ONCE:
            self.flush()

    def flush(self) -> None:
        """Write the gathered changes; those of an event that had been folded before are not new, and are withheld."""
        if not self._found:
            return
        # No one else appends now: appending waits during the pause, as folding does.
        self._found = corrections.against_the_feed(self._cursor, self._found)
        self._within(lambda: expired_items.add_lines(self._cursor, self._found))
        self._within(self._name_deciders)
        self._cursor.execute(
            sql.SQL(
                """
                INSERT INTO {made} ({columns}) SELECT {values}
                FROM json_populate_recordset(NULL::{made}, %s) AS c
                JOIN {inbox} AS i ON (i.account, i.livemode, i.id) = (c.account, c.livemode, c.event_id)
                ON CONFLICT DO NOTHING
                """
            ).format(
                made=sql.Identifier(self._made.schema, "changes"),
                inbox=sql.Identifier(self._made.live, "inbox"),
                columns=sql.SQL(change_rows.LISTED),
                values=sql.SQL(_VALUES).format(outcomes=sql.Identifier(self._made.live, "outcomes")),
            ),
            (msgspec.json.encode(self._found).decode(),),
        )
        self._found.clear()

    def _name_deciders(self) -> None:
        """Where a charge settled an order, let the order's change name the charge's event."""
        orders = {
            Subject("orders", row["account"], row["livemode"], row["subject_id"])
            for row in self._found
            if row["subject"] == "order" and row["kind"] != order_refunds.KIND
        }
        own = {subject: joined for subject, (_, joined) in settling.at_rest(self._cursor, orders).items()}
        settled = settling.settled(self._cursor, own)
        for row in self._found:
            joined = settled.get(Subject("orders", row["account"], row["livemode"], row["subject_id"]))
            if joined is not None and joined.decided_by is not None and row["kind"] != order_refunds.KIND:
                row.update({"event_id": joined.decided_by.event_id, "at": joined.decided_by.at})

    def add_refunds(self) -> None:
        """Gather a change for each order with another refunded amount than the one last announced."""
        self._within(lambda: self._found.extend(order_refunds.unannounced(self._cursor, announced_in=self._made.live)))
        self.flush()

    def _within(self, work: Callable[[], None]) -> None:
        self._cursor.execute(self._made.path())
        work()
        self._cursor.execute(sql.SQL("SET LOCAL search_path = {}").format(sql.Identifier(self._made.live)))


def _write(cursor: Cursor, made: Shadow, table: Table) -> None:
    """Write the rows of *table* that differ, and delete those that are not expected."""
    key = difference.key_of(table)
    names = [column.name for column in table.columns]
    others = [name for name in names if name not in key]
    held, expected = sql.Identifier(made.live, table.name), sql.Identifier(made.schema, table.name)
    keys = sql.SQL(", ").join(map(sql.Identifier, key))
    same = sql.SQL(" AND ").join(sql.SQL("h.{0} = e.{0}").format(sql.Identifier(name)) for name in key)
    cursor.execute(
        sql.SQL("DELETE FROM {held} AS h WHERE NOT EXISTS (SELECT FROM {expected} AS e WHERE {same})").format(
            held=held, expected=expected, same=same
        )
    )
    update = (
        sql.SQL("UPDATE SET ({}) = ROW ({})").format(
            sql.SQL(", ").join(map(sql.Identifier, others)),
            sql.SQL(", ").join(sql.Identifier("excluded", name) for name in others),
        )
        if others
        else sql.SQL("NOTHING")
    )
    cursor.execute(
        sql.SQL(
            "INSERT INTO {held} ({names}) SELECT {values} FROM {expected} AS e LEFT JOIN {held} AS h USING ({keys})"
            " WHERE {distinct} ON CONFLICT ({keys}) DO {update}"
        ).format(
            held=held,
            expected=expected,
            names=sql.SQL(", ").join(map(sql.Identifier, names)),
            values=sql.SQL(", ").join(sql.Identifier("e", name) for name in names),
            keys=keys,
            distinct=difference.distinct(table),
            update=update,
        )
    )


def _settle_anomalies(cursor: Cursor, made: Shadow) -> None:
    """Put the anomalies of *made* in force, and resolve all others."""
    held, expected = sql.Identifier(made.live, "anomalies"), sql.Identifier(made.schema, "anomalies")
    cursor.execute(
        sql.SQL(
            "UPDATE {held} AS h SET resolved_at = now() WHERE resolved_at IS NULL AND NOT EXISTS"
            " (SELECT FROM {expected} AS e WHERE (e.account, e.livemode, e.id) = (h.account, h.livemode, h.id)"
            " AND e.resolved_at IS NULL)"
        ).format(held=held, expected=expected)
    )
    names = sql.SQL(", ").join(sql.Identifier(column.name) for column in tables.anomalies.columns)
    cursor.execute(
        sql.SQL(
            "INSERT INTO {held} AS h ({names}) SELECT {names} FROM {expected} WHERE resolved_at IS NULL"
            " ON CONFLICT (account, livemode, id) DO UPDATE SET resolved_at = NULL, detail = excluded.detail,"
            " seen_at = CASE WHEN h.resolved_at IS NULL THEN h.seen_at ELSE excluded.seen_at END"
            " WHERE h.resolved_at IS NOT NULL OR h.detail <> excluded.detail"
        ).format(held=held, expected=expected, names=names)
    )


_LOOKED_UP: Final = {
    "source": "i.source",
    "withheld": "CASE WHEN EXISTS ("
    "SELECT FROM {outcomes} AS o WHERE o.seq = i.seq AND o.state = 'folded') THEN 'swap' END",
}
_VALUES: Final = ", ".join(_LOOKED_UP.get(name, f"c.{name}") for name in change_rows.COLUMNS)


def _append(cursor: Cursor, made: Shadow) -> int:
    """Append the gathered changes in the order of their times, and return how many there were."""
    keep_others_from_appending(cursor)
    columns = sql.SQL(change_rows.LISTED)
    cursor.execute(
        sql.SQL(
            "INSERT INTO {live} ({columns}) SELECT {columns} FROM {made} ORDER BY at, subject, subject_id, seq"
            " ON CONFLICT DO NOTHING"
        ).format(
            live=sql.Identifier(made.live, "changes"), made=sql.Identifier(made.schema, "changes"), columns=columns
        )
    )
    return cursor.rowcount
