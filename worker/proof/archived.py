"""Makes a schema to rebuild in, with the payloads of an archive; without an archive, finds the objects to leave out.

Payloads that are read out of the archive are kept in the schema, and are dropped with it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from psycopg import sql
from sqlalchemy import Engine

from schemas import database
from schemas.database import Cursor
from schemas.errors import ConflictError
from schemas.progress import Progress
from worker.folds.payment import OF_ORDER_OPEN
from worker.logs.restore import MATCHED, arguments, deliveries_in, logs_in, names_in, require_none_lacking
from worker.proof import shadow
from worker.proof.shadow import Shadow


@contextmanager
def with_archived(engine: Engine, folder: Path | None, *, progress: Progress) -> Iterator[Shadow]:
    """Make a schema to rebuild in, with the payloads of the archive in *folder* where one is given; see ``shadow``.

    Raises:
        ConflictError: the archive is damaged, or lacks an archived payload.
    """
    with shadow.shadow(engine, has_archive=folder is not None) as made:
        if folder is not None:
            bring(made, folder, progress=progress)
        yield made


@contextmanager
def within(engine: Engine, folder: Path, *, progress: Progress) -> Iterator[Engine]:
    """Yield an engine on the live tables that also finds payloads of the archive in *folder*.

    Raises:
        ConflictError: the archive is damaged, or lacks an archived payload.
    """
    with with_archived(engine, folder, progress=progress) as made:
        yield made.within


def bring(made: Shadow, folder: Path, *, progress: Progress) -> None:
    """Read the payloads that the database lacks from the archive in *folder* into *made*.

    Raises:
        ConflictError: the archive is damaged, or lacks an archived payload.
    """
    statement = sql.SQL("INSERT INTO {archived} (seq, payload)" + MATCHED + "ON CONFLICT DO NOTHING").format(
        archived=sql.Identifier(made.schema, "archived"),
        inbox=sql.Identifier(made.live, "inbox"),
        payloads=sql.Identifier(made.live, "payloads"),
    )
    logs, names = logs_in(folder), names_in(made.engine)
    for number, path in enumerate(logs):
        progress("Reading the archive", number, len(logs))
        for deliveries in deliveries_in(path, names):
            with database.transaction(made.engine) as connection, database.cursor(connection) as cursor:
                cursor.execute(statement, arguments(deliveries))
    progress("Reading the archive", len(logs), len(logs))
    with database.transaction(made.engine) as connection, database.cursor(connection) as cursor:
        cursor.execute(sql.SQL("ANALYZE {}").format(sql.Identifier(made.schema, "archived")))
        lacking = sql.SQL("FROM {} AS i WHERE {}").format(sql.Identifier(made.live, "inbox"), _absent(made, "i"))
        require_none_lacking(cursor, lacking, folder)


# ---- Objects left out without an archive ----


@dataclass(frozen=True, slots=True)
class LeftOut:
    """How many *objects* cannot be rebuilt, since the payloads of so many *events* are archived."""

    objects: int
    events: int


def _absent(made: Shadow, alias: str) -> sql.Composed:
    """Return the condition that the payload of an event is neither in the database nor in *made*."""
    return sql.SQL(
        "NOT EXISTS (SELECT FROM {live} AS b WHERE b.seq = {seq})"
        " AND NOT EXISTS (SELECT FROM {made} AS b WHERE b.seq = {seq})"
    ).format(
        live=sql.Identifier(made.live, "payloads"),
        made=sql.Identifier(made.schema, "archived"),
        seq=sql.Identifier(alias, "seq"),
    )


def leave_out(cursor: Cursor, made: Shadow) -> LeftOut:
    """Note in *made* the objects of which it does not have every payload, and return how many those are.

    If *made* has its own inbox, it has all payloads of that.
    """
    if made.has_inbox:
        return LeftOut(0, 0)
    names = {
        "left_out": sql.Identifier(made.schema, "left_out"),
        "inbox": sql.Identifier(made.live, "inbox"),
        "mentions": sql.Identifier(made.live, "mentions"),
        "lines": sql.Identifier(made.live, "credit_note_lines"),
        "absent": _absent(made, "i"),
    }
    cursor.execute(sql.SQL("TRUNCATE {left_out}").format(**names))
    cursor.execute(
        sql.SQL(
            """
            WITH absent AS MATERIALIZED (
                SELECT i.seq, i.account, i.livemode, i.object_id FROM {inbox} AS i WHERE {absent}
            ), noted AS (
                INSERT INTO {left_out} (account, livemode, object_id)
                SELECT account, livemode, object_id FROM absent WHERE object_id IS NOT NULL
                UNION
                SELECT m.account, m.livemode, m.object_id FROM absent JOIN {mentions} AS m USING (seq)
                RETURNING 1
            )
            SELECT (SELECT count(*) FROM noted), (SELECT count(*) FROM absent)
            """
        ).format(**names)
    )
    objects, events = cursor.fetchone() or (0, 0)
    # An anomaly of a credit note's line names only the line.
    cursor.execute(
        sql.SQL(
            "INSERT INTO {left_out} (account, livemode, object_id) SELECT n.account, n.livemode, n.id"
            " FROM {lines} AS n JOIN {left_out} AS o ON (o.account, o.livemode, o.object_id)"
            " = (n.account, n.livemode, n.credit_note) ON CONFLICT DO NOTHING"
        ).format(**names)
    )
    if objects:
        cursor.execute(sql.SQL(_LEAVE_OUT_ORDERS).format(**names, **_tables_of_payments(made)))
        cursor.execute(sql.SQL(_LEAVE_OUT_NOTES).format(**names, notes=sql.Identifier(made.live, "credit_notes")))
    return LeftOut(objects, events)


def _tables_of_payments(made: Shadow) -> dict[str, sql.Identifier]:
    return {name: sql.Identifier(made.live, name) for name in ("orders", "charges", "refunds")}


# An order that is settled by its charges needs the payloads of its intent, of its charges and of their refunds.
_LEAVE_OUT_ORDERS: Final = f"""
INSERT INTO {{left_out}} (account, livemode, object_id)
SELECT o.account, o.livemode, o.id FROM (SELECT * FROM {{orders}} WHERE {OF_ORDER_OPEN}) AS o
WHERE EXISTS (
    SELECT FROM {{left_out}} AS l
    WHERE (l.account, l.livemode, l.object_id) = (o.account, o.livemode, o.payment_intent)
    UNION ALL
    SELECT FROM {{charges}} AS c JOIN {{left_out}} AS l
        ON (l.account, l.livemode, l.object_id) = (c.account, c.livemode, c.id)
    WHERE (c.account, c.livemode, c.payment_intent) = (o.account, o.livemode, o.payment_intent)
    UNION ALL
    SELECT FROM {{refunds}} AS r JOIN {{left_out}} AS l
        ON (l.account, l.livemode, l.object_id) = (r.account, r.livemode, r.id)
    WHERE (r.account, r.livemode, r.payment_intent) = (o.account, o.livemode, o.payment_intent)
    UNION ALL
    SELECT FROM {{charges}} AS c
    JOIN {{refunds}} AS r ON (r.account, r.livemode, r.charge) = (c.account, c.livemode, c.id)
    JOIN {{left_out}} AS l ON (l.account, l.livemode, l.object_id) = (r.account, r.livemode, r.id)
    WHERE (c.account, c.livemode, c.payment_intent) = (o.account, o.livemode, o.payment_intent)
)
ON CONFLICT DO NOTHING
"""
# A credit note that is settled by its refund needs the payloads of that refund.
_LEAVE_OUT_NOTES: Final = """
INSERT INTO {left_out} (account, livemode, object_id)
SELECT n.account, n.livemode, n.id FROM {notes} AS n JOIN {left_out} AS l
    ON (l.account, l.livemode, l.object_id) = (n.account, n.livemode, n.refund)
ON CONFLICT DO NOTHING
"""


def require_all(made: Shadow) -> None:
    """Check, before the work is done, that *made* has every payload.

    Raises:
        ConflictError: it has not, so the tables cannot be brought to it.
    """
    with database.transaction(made.engine) as connection, database.cursor(connection) as cursor:
        require_none(leave_out(cursor, made))


def require_none(left: LeftOut) -> None:
    """Raise ConflictError where something is left out."""
    if left.events:
        raise ConflictError(
            f"{left.events:,} events of {left.objects:,} objects are archived, so the tables cannot be brought to what"
            " the others say. Nothing has changed: give --archive DIR too."
        )
