"""Records the anomalies of rows and events, and resolves those that are over."""

import hashlib
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from typing import Any

import msgspec

from schemas import tables
from schemas.database import Cursor, id_arrays, text_array, world_arrays
from schemas.events import Key
from worker import folds
from worker.folding import renderings
from worker.folding.batch import Claimed, Saved
from worker.folding.renderings import Choice
from worker.folds import join
from worker.folds.facts import Anomaly, Row, Subject
from worker.folds.join import Joined


def note_anomalies(cursor: Cursor, saved: Saved, now: datetime) -> None:
    """Write the anomalies of the folded rows, and resolve their earlier ones that are over."""
    found = [row for subject, joined in saved.rows.items() for row in anomaly_rows(subject, joined, now)]
    # A row that is new has no earlier anomalies.
    touched = {row_name(subject): subject for subject in (*saved.rows, *saved.gone) if subject in saved.known}
    if not touched:
        write_anomalies(cursor, found, (), now)
        return
    cursor.execute(
        """
        SELECT a.account, a.livemode, a.subject, a.subject_id, a.id, a.kind
        FROM (SELECT DISTINCT * FROM unnest(%s::text[], %s::boolean[], %s::text[])) AS k (account, livemode, subject_id)
        CROSS JOIN LATERAL (
            SELECT * FROM anomalies AS a WHERE a.resolved_at IS NULL
                AND (a.account, a.livemode, a.subject_id) = (k.account, k.livemode, k.subject_id) OFFSET 0
        ) AS a
        """,
        (*world_arrays([*touched.values()]), text_array([subject_id for *_, subject_id in touched])),
    )
    in_force = cursor.fetchall()
    held = {(row["account"], row["livemode"], row["id"]) for row in found}
    over = [
        (account, livemode, anomaly)
        for account, livemode, subject, subject_id, anomaly, kind in in_force
        if (row := touched.get((account, livemode, subject, subject_id))) is not None
        and (account, livemode, anomaly) not in held
        # A row that was only advanced does not show the anomalies that only all its events show, so those stay.
        and not (row in saved.rows and _keeps(saved.rows[row], kind))
    ]
    write_anomalies(cursor, found, over, now)


def write_anomalies(cursor: Cursor, found: Sequence[Mapping[str, Any]], over: Sequence[Key], now: datetime) -> None:
    """Write the anomalies *found* as unresolved, and resolve those *over*: account, mode and id of each.

    An anomaly that was over and comes back was seen *now*, so that a doubt is read again.
    """
    if over:
        cursor.execute(
            """
            UPDATE anomalies SET resolved_at = %s WHERE (account, livemode, id) IN
                (SELECT * FROM unnest(%s::text[], %s::boolean[], %s::text[]))
            """,
            (now, *map(list, zip(*over, strict=True))),
        )
    if found:
        cursor.execute(
            """
            INSERT INTO anomalies AS known SELECT * FROM json_populate_recordset(NULL::anomalies, %s)
            ON CONFLICT (account, livemode, id) DO UPDATE SET resolved_at = NULL, detail = excluded.detail,
                seen_at = CASE WHEN known.resolved_at IS NULL THEN known.seen_at ELSE excluded.seen_at END
            """,
            (msgspec.json.encode(found).decode(),),
        )


def _keeps(joined: Joined, kind: str) -> bool:
    """Return whether an anomaly of *kind* may persist although *joined* has none, because not all events were read.

    The order of a row at rest stays as ambiguous as its last event left it.
    """
    is_of_order = kind == join.AMBIGUOUS_ORDER and joined.is_at_rest
    return not joined.is_whole and (kind in join.SEEN_IN_ALL or is_of_order)


def note_contradictions(cursor: Cursor, claimed: Sequence[Claimed], now: datetime) -> None:
    """Write the anomalies of events with compared copies, and resolve their earlier ones that are over."""
    choices = [each.choice for each in claimed if each.choice is not None]
    if not choices:
        return
    found = [row for choice in choices for row in contradictions(choice, now)]
    events = [choice.chosen.event for choice in choices]
    cursor.execute(
        """
        SELECT a.account, a.livemode, a.id
        FROM unnest(%s::text[], %s::boolean[], %s::text[]) AS k (account, livemode, subject_id)
        CROSS JOIN LATERAL (
            SELECT * FROM anomalies AS a WHERE a.resolved_at IS NULL AND a.subject = 'event'
                AND (a.account, a.livemode, a.subject_id) = (k.account, k.livemode, k.subject_id) OFFSET 0
        ) AS a
        """,
        id_arrays(events),
    )
    held = {(row["account"], row["livemode"], row["id"]) for row in found}
    write_anomalies(cursor, found, [row for row in cursor.fetchall() if row not in held], now)


def contradictions(choice: Choice, now: datetime) -> list[dict[str, Any]]:
    """Return the rows of ``anomalies`` for copies of one event that contradict each other."""
    event = choice.chosen.event
    return [
        {
            **_identified("events", event.id, anomaly, by=renderings.NAMED_BY),
            "account": event.account,
            "livemode": event.livemode,
            "subject": "event",
            "object_id": event.object_id,
            "event_id": event.id,
            "as_of": event.created,
            "seen_at": now,
            "resolved_at": None,
        }
        for anomaly in choice.anomalies
    ]


def _identified(table: str, name: str, anomaly: Anomaly, *, by: Collection[str] | None = None) -> dict[str, Any]:
    """Return the columns that identify an *anomaly* of the row *name* of *table*.

    Its details are part of the identity: all of them, or only those named *by*.
    """
    detail = {key: value for key, value in anomaly.detail.items() if by is None or key in by}
    identity = msgspec.json.encode([table, name, anomaly.kind, detail], order="sorted")
    return {
        "id": f"anm_{hashlib.blake2b(identity, digest_size=12).hexdigest()}",
        "kind": anomaly.kind,
        "subject_id": name,
        "detail": anomaly.detail,
    }


def row_name(subject: Subject) -> tuple[str, bool, str, str]:
    """Return the name of *subject*'s row in tables that hold names of rows of all tables."""
    return (subject.account, subject.livemode, folds.ROW_SPECS[subject.table].subject, tables.key_name(subject.key))


def anomaly_rows(subject: Subject, joined: Joined, now: datetime) -> list[dict[str, Any]]:
    """Return the rows of ``anomalies`` for the anomalies of *joined*. They were seen *now*."""
    if not joined.anomalies:
        return []
    rows = [_anomaly_row(subject, joined.row, anomaly, now) for anomaly in joined.anomalies]
    # A row may have one anomaly twice: a ledger's chain may be broken by the same amount in two places.
    return list({row["id"]: row for row in rows}.values())


def _anomaly_row(subject: Subject, row: Row, anomaly: Anomaly, now: datetime) -> dict[str, Any]:
    return {
        **_identified(subject.table, tables.key_name(subject.key), anomaly),
        "account": subject.account,
        "livemode": subject.livemode,
        "subject": folds.ROW_SPECS[subject.table].subject,
        "object_id": subject.source,
        "event_id": row["event_id"],
        "as_of": row["as_of"],
        "seen_at": now,
        "resolved_at": None,
    }
