"""Predicts a replay: how many events of each kind it would meet, and which rows would change, by how much money.

Note [What is foreseen is kept in a file]
    A log may be longer than memory, and the events of one order may stand at its two ends. So the facts of the log's
    new events are kept in a temporary SQLite file, by the object that they are about. Then the facts of a few objects
    at once are joined with all facts that the inbox has of them, and compared with their rows. The database is only
    read.

Note [What settles is foreseen last]
    An order that its own events leave open is settled by its charges, and a credit note by its refund: see
    worker/folding/settling.py. The log may have the one at its beginning and the other at its end. So open orders and
    notes are kept in the file, and the charges, refunds and cancellations that the log would make or change as well. At
    the end the open rows, those of the database among them, are settled with both.
"""

import dataclasses
import pickle
import sqlite3
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import datetime
from itertools import groupby, islice
from operator import itemgetter
from typing import Any, Final, NamedTuple, cast

import msgspec
from msgspec.structs import replace
from psycopg import sql
from psycopg.rows import dict_row
from sqlalchemy import Engine

from schemas import contents, database, tables
from schemas.database import Cursor, integer_array
from schemas.events import Key
from schemas.inbox import Delivery, Recorded
from schemas.own_events import EVENT_IGNORED
from worker import folds
from worker.folding import settling
from worker.folding.claim import event_of_delivery
from worker.folding.joining import facts_at_hand, facts_of
from worker.folding.rows import load_rows
from worker.folds import credit_note, join, payment
from worker.folds.facts import Event, Facts, Row, Subject
from worker.folds.join import Joined, RowSpec
from worker.folds.payment import Payment
from worker.logs.recording import MENDED, NEWER, Held, held
from worker.logs.selection import Counts, Reading

OBJECTS_AT_ONCE: Final = 200
APPEAR: Final = "appear"
CHANGE: Final = "change"
DISAPPEAR: Final = "disappear"


@dataclass(frozen=True, slots=True)
class Plan:
    """The predicted result of a replay: its *counts*, and its *rows* in groups.

    A group is a dict of table, rows_would (appear, change, disappear), status (of the rows, before and after),
    currency, rows, and amount: by how much the money of the group would grow, None where it has no money.
    """

    counts: Counts
    rows: list[dict[str, Any]]


def plan(engine: Engine, logs: Reading) -> Plan:
    """Return what a replay of *logs* would do; nothing is written."""
    counts: Counts = Counter()
    logs = logs.named_as_in(engine)
    with closing(_Notes()) as notes:
        for wanted in logs.chunks(counts):
            with database.transaction(engine) as connection, database.cursor(connection) as cursor:
                counts.update(_foresee(cursor, notes, wanted))
        counts.update(notes.outcomes())
        groups = _Groups()
        objects = notes.objects()
        while some := list(islice(objects, OBJECTS_AT_ONCE)):
            with database.transaction(engine) as connection, database.cursor(connection) as cursor:
                _compare(cursor, some, notes, groups)
        for left_open in notes.left_open(OBJECTS_AT_ONCE):
            with database.transaction(engine) as connection, database.cursor(connection) as cursor:
                _settle(cursor, left_open, notes, groups)
    return Plan(counts, groups.rows())


# ---- The events of the log ----


class _Foreseen(NamedTuple):
    """The copy of an event that would be folded: its rank among the copies, and the state that its event would have.

    *first* is what the first copy counts as, None where the inbox has the event. *was_parked* is whether the event is
    parked there, and *is_taken* whether this copy takes the place of another.
    """

    rank: tuple[bool, bool, str, str]
    state: str
    first: str | None
    was_parked: bool = False
    is_taken: bool = False


class _Open(NamedTuple):
    """An order or a note that other objects may settle, as its own events make it.

    *read_at* is the order's time of payment where it is that of a reading, and of no event of Stripe's.
    """

    joined: Joined
    read_at: datetime | None


def _read_at(row: Row, facts: Iterable[Facts]) -> datetime | None:
    """Return the time of payment of *row* where only readings among its *facts* have this time."""
    at = row.get("paid_at")
    sources = {one.source for one in facts if one.created == at}
    return cast("datetime", at) if sources == {"observation"} else None


_LEFT_OPEN: Final = "SELECT subject, own FROM left_open WHERE subject > ? ORDER BY subject LIMIT ?"


class _Notes:
    """The prediction for each event that would be new, and the facts of these events for each object."""

    def __init__(self) -> None:
        self._file = sqlite3.connect("")  # a temporary file, deleted with the connection
        self._file.executescript(
            """
            CREATE TABLE events (key BLOB PRIMARY KEY, foreseen BLOB, state TEXT, times INT) WITHOUT ROWID;
            CREATE TABLE said (object BLOB, key BLOB, stands INT, facts BLOB, PRIMARY KEY (object, key, stands))
                WITHOUT ROWID;
            CREATE INDEX said_by_event ON said (key);
            CREATE TABLE left_open (subject BLOB PRIMARY KEY, own BLOB) WITHOUT ROWID;
            CREATE TABLE settling (subject BLOB PRIMARY KEY, intent BLOB, charge BLOB, row BLOB) WITHOUT ROWID;
            CREATE INDEX settling_by_intent ON settling (intent);
            CREATE INDEX settling_by_charge ON settling (charge);
            """
        )

    def close(self) -> None:
        self._file.close()

    def foreseen(self, key: Key) -> _Foreseen | None:
        """Return the copy of an event that would be folded; None for an event that was not looked at."""
        found = self._file.execute("SELECT foreseen FROM events WHERE key = ?", (_encoded(*key),)).fetchone()
        return None if found is None else pickle.loads(found[0])  # noqa: S301 - our own

    def note(self, key: Key, foreseen: _Foreseen) -> None:
        """Keep the copy of an event that would be folded."""
        times = (foreseen.first is not None) + foreseen.is_taken
        self._file.execute(
            "INSERT OR REPLACE INTO events VALUES (?, ?, ?, ?)",
            (_encoded(*key), pickle.dumps(foreseen, protocol=5), foreseen.state, times),
        )

    def add(self, key: Key, verdict: folds.Verdict) -> None:
        """Keep the facts of the copy that would now be folded, in place of those of earlier copies."""
        self._file.execute("UPDATE OR REPLACE said SET stands = 0 WHERE key = ?", (_encoded(*key),))
        self._add(_encoded(*key), verdict.facts, stands=True)

    def pass_over(self, event: Event) -> None:
        """Note that the facts of *event*, as the inbox has it, would no longer count."""
        self._add(_encoded(event.account, event.livemode, event.id), folds.judge(event).facts, stands=False)

    def leave_out(self, key: Key) -> None:
        """Note that an event of the log would be ignored, since an operator has decided so."""
        self._file.execute("UPDATE events SET state = 'ignored' WHERE key = ?", (_encoded(*key),))
        self._file.execute("UPDATE OR REPLACE said SET stands = 0 WHERE key = ?", (_encoded(*key),))

    def _add(self, key: bytes, facts: Iterable[Facts], *, stands: bool) -> None:
        by_object: dict[bytes, list[Facts]] = defaultdict(list)
        for one in facts:
            by_object[_encoded(one.subject.account, one.subject.livemode, one.subject.source)].append(one)
        self._file.executemany(
            "INSERT OR REPLACE INTO said VALUES (?, ?, ?, ?)",
            [(of, key, stands, pickle.dumps(several, protocol=5)) for of, several in by_object.items()],
        )

    def has_object_of(self, subject: Subject) -> bool:
        """Return whether the log has an event that may change the facts of the object that makes the row *subject*."""
        key = (_encoded(subject.account, subject.livemode, subject.source),)
        return self._file.execute("SELECT 1 FROM said WHERE object = ? LIMIT 1", key).fetchone() is not None

    def leave_open(self, subject: Subject, own: "_Open | None") -> None:
        """Keep the order or the note *subject*, to be settled at the end; *own* is None where it is one at rest."""
        self._file.execute("INSERT OR IGNORE INTO left_open VALUES (?, ?)", (_key(subject), _pickled(own)))

    def left_open(self, limit: int) -> "Iterator[dict[Subject, _Open | None]]":
        """Yield the open orders and notes, *limit* at a time."""
        after = b""
        while found := self._file.execute(_LEFT_OPEN, (after, limit)).fetchall():
            yield {_subject(key): pickle.loads(own) for key, own in found}  # noqa: S301 - our own
            after = found[-1][0]

    def keep_settling(self, subject: Subject, row: Row | None) -> None:
        """Keep a charge, a refund or a canceled intent as it would be; None where it would be gone."""
        found: Row = {} if row is None else {"source": "replay", **row}
        intent = subject.id if subject.table == "payment_intents" else found.get("payment_intent")
        of = (_encoded(subject.account, subject.livemode, str(each or "")) for each in (intent, found.get("charge")))
        self._file.execute(
            "INSERT OR REPLACE INTO settling VALUES (?, ?, ?, ?)", (_key(subject), *of, _pickled(row and found))
        )

    def settling_row(self, subject: Subject) -> tuple[bool, Row | None]:
        """Return whether the log would change the row *subject*, and the row as it would be."""
        found = self._file.execute("SELECT row FROM settling WHERE subject = ?", (_key(subject),)).fetchone()
        return (False, None) if found is None else (True, pickle.loads(found[0]))  # noqa: S301 - our own

    def settling_rows(self, column: str, of: Subject) -> list[tuple[Subject, Row]]:
        """Return the rows that the log would make or change which name *of* in *column*, the intent or the charge."""
        key = _encoded(of.account, of.livemode, of.id)
        found = self._file.execute(f"SELECT subject, row FROM settling WHERE {column} = ? ORDER BY subject", (key,))
        rows = [(_subject(subject), pickle.loads(row)) for subject, row in found]  # noqa: S301 - our own
        return [(subject, row) for subject, row in rows if row is not None]

    def outcomes(self) -> Mapping[str, int]:
        """Return how many of the new events would have which state."""
        found = self._file.execute("SELECT state, sum(times) FROM events WHERE times > 0 GROUP BY state").fetchall()
        return dict(found)

    def objects(self) -> Iterator[list[tuple[bool, list[Facts]]]]:
        """Yield the facts of each object, event by event, and whether they would count."""
        found = self._file.execute("SELECT object, stands, facts FROM said ORDER BY object")
        for _, said in groupby(found, key=itemgetter(0)):
            yield [(bool(stands), pickle.loads(facts)) for _, stands, facts in said]  # noqa: S301 - our own


def _encoded(account: str, livemode: bool, id_: str) -> bytes:  # noqa: FBT001 - the parts of a key
    return msgspec.json.encode([account, livemode, id_])


def _key(subject: Subject) -> bytes:
    return msgspec.json.encode([subject.table, subject.account, subject.livemode, subject.id])


def _subject(key: bytes) -> Subject:
    return Subject(*msgspec.json.decode(key, type=tuple[str, str, bool, str]))


def _pickled(value: object) -> bytes:
    return pickle.dumps(value, protocol=5)


def _foresee(cursor: Cursor, notes: _Notes, deliveries: Sequence[Delivery]) -> Counts:
    """Keep the prediction for *deliveries*, and return how it changes the counts."""
    counts: Counts = Counter()
    inboxed = held(cursor, deliveries)
    copied = {each.key for each in deliveries if each.key in inboxed and inboxed[each.key].may_gain_by(each)}
    known = _known(cursor, {key: inboxed[key] for key in copied})
    news: dict[Key, Delivery] = {}
    for delivery in deliveries:
        key = delivery.key
        if key in inboxed and not inboxed[key].may_gain_by(delivery):
            counts[Recorded.DUPLICATE.value] += 1
            continue
        verdict = folds.judge(event_of_delivery(delivery))
        rank = _rank_of(delivery, verdict)
        before = notes.foreseen(key) or known.get(key)
        if before is None:
            counts[Recorded.NEW.value] += 1
            notes.note(key, _Foreseen(rank, verdict.state, Recorded.NEW.value))
        elif _is_better(rank, before.rank):
            # If several copies would replace each other in turn, only the last one counts.
            counts[Recorded.DUPLICATE.value] += before.is_taken
            counts[_named(before)] -= before.is_taken
            after = before._replace(rank=rank, state=verdict.state, is_taken=True)
            counts[_named(after)] += 1
            notes.note(key, after)
        else:
            counts[Recorded.DUPLICATE.value] += 1
            continue
        notes.add(key, verdict)
        news[key] = delivery
    words = [each for each in news.values() if each.envelope.type == EVENT_IGNORED]
    aside = [(each.account, each.envelope.livemode, str(each.envelope.object_id)) for each in words]
    for event in _held(cursor, [*(key for key in news if key in inboxed), *aside]):
        notes.pass_over(event)
    for key in [*_ignored(cursor, list(news)), *aside]:
        notes.leave_out(key)
    return counts


def _named(foreseen: _Foreseen) -> str:
    """Return what a copy counts as if it takes the place of another."""
    return MENDED if foreseen.was_parked and foreseen.state != "parked" else NEWER


def _rank_of(delivery: Delivery, verdict: folds.Verdict) -> tuple[bool, bool, str, str]:
    envelope = delivery.envelope
    content = contents.hash_of(envelope.payload).hex()
    return (verdict.state != "parked", delivery.signed, (envelope.api_version or "")[:10], content)


def _is_better(one: tuple[bool, bool, str, str], other: tuple[bool, bool, str, str]) -> bool:
    """Return whether the copy with the rank *one* is folded rather than the *other*: see folding/renderings.py."""
    return one > other


def _known(cursor: Cursor, inboxed: Mapping[Key, Held]) -> dict[Key, _Foreseen]:
    """Return the copies of its events that the inbox would fold if no better copy came."""
    numbers = {one.seq: key for key, one in inboxed.items()}
    cursor.execute(_VERSIONS, (integer_array(numbers),))
    about = {seq: (version, content, is_parked) for seq, version, content, is_parked in cursor.fetchall()}
    found = {}
    for event in _held(cursor, list(inboxed)):
        version, _, is_parked = about[event.seq]
        rank = (folds.judge(event).state != "parked", inboxed[numbers[event.seq]].signed, version)
        content = contents.hash_of(event.payload).hex()
        found[numbers[event.seq]] = _Foreseen((*rank, content), "", None, was_parked=is_parked)
    for seq, key in numbers.items():
        version, kept, is_parked = about[seq]
        # The hash stands for an archived payload. It could be folded, so it ranks as not parked; a copy of its version
        # is taken to be the same.
        content = "~" if kept is None else bytes(kept).hex()
        found.setdefault(key, _Foreseen((True, inboxed[key].signed, version, content), "", None, was_parked=is_parked))
    return found


_VERSIONS: Final = """
SELECT i.seq, coalesce(left(i.api_version, 10), ''), c.content_sha256, coalesce(o.state = 'parked', false)
FROM inbox AS i LEFT JOIN contents AS c USING (seq) LEFT JOIN outcomes AS o USING (seq)
WHERE i.seq = ANY (%s::bigint[])
"""
_HELD: Final = """
SELECT i.seq, i.account, i.livemode, i.id, i.type, i.created, i.object_type, i.object_id, b.payload, i.source
FROM unnest(%s::text[], %s::boolean[], %s::text[]) AS k (account, livemode, id)
JOIN inbox AS i USING (account, livemode, id) JOIN payloads AS b USING (seq)
"""
_ASIDE: Final = f"""
SELECT DISTINCT account, livemode, object_id
FROM unnest(%s::text[], %s::boolean[], %s::text[]) AS k (account, livemode, object_id)
JOIN inbox USING (account, livemode, object_id) WHERE type = '{EVENT_IGNORED}'
"""


def _held(cursor: Cursor, keys: Sequence[Key]) -> list[Event]:
    return [Event(*row) for row in _by_key(cursor, _HELD, keys)]


def _ignored(cursor: Cursor, keys: Sequence[Key]) -> list[Key]:
    """Return those of *keys* that an operator has ignored, by the events in the inbox."""
    return [(row[0], row[1], row[2]) for row in _by_key(cursor, _ASIDE, keys)]


def _by_key(cursor: Cursor, statement: str, keys: Sequence[Key]) -> list[Any]:
    if not keys:
        return []
    cursor.execute(statement, [list(column) for column in zip(*keys, strict=True)], binary=True)
    return cursor.fetchall()


# ---- The rows of the tables ----


class _Groups:
    """The rows that would change, counted, with their money by currency."""

    def __init__(self) -> None:
        self._rows: Counter[tuple[str, ...]] = Counter()
        self._amounts: Counter[tuple[str, ...]] = Counter()

    def add(self, table: str, before: Mapping[str, Any] | None, after: Mapping[str, Any] | None) -> None:
        """Add a row as it is, and as it would be."""
        if before == after:
            return
        would = APPEAR if before is None else DISAPPEAR if after is None else CHANGE
        statuses = [str(row["status"]) for row in (before, after) if row is not None and row.get("status") is not None]
        status = " → ".join(dict.fromkeys(statuses))
        row = after or before or {}
        self._rows[table, would, status, row.get("currency") or ""] += 1
        for each, sign in ((before, -1), (after, 1)):
            worth = tables.worth_of(each) if each else None
            if each is not None and worth is not None:
                self._amounts[table, would, status, each.get("currency") or ""] += sign * worth

    def rows(self) -> list[dict[str, Any]]:
        """Return the groups, by table."""
        return [
            {
                "table": table,
                "rows_would": would,
                "status": status or None,
                "currency": currency or None,
                "rows": self._rows[group],
                "amount": self._amounts.get(group) if currency else None,
            }
            for group in sorted(self._rows.keys() | self._amounts.keys())
            for table, would, status, currency in [group]
        ]


def _compare(
    cursor: Cursor, objects: Sequence[Sequence[tuple[bool, list[Facts]]]], notes: _Notes, groups: _Groups
) -> None:  # fmt: skip
    """Join the log's facts of *objects* with those of the inbox, and compare the results with the existing rows.

    Open orders and credit notes are kept for the end: see Note [What settles is foreseen last].
    """
    reported: dict[Subject, list[Facts]] = defaultdict(list)
    replaced: set[tuple[Subject, str]] = set()
    for several in objects:
        for stands, facts in several:
            for one in facts:
                reported[one.subject] += [one] if stands else []
                replaced.add((one.subject, one.event_id))
    known = load_rows(cursor, reported)
    held = facts_of(cursor, set(reported), {}, with_pending=True)
    reported = {
        subject: [
            *join.with_leader(folds.ROW_SPECS[subject.table], subject, reported),
            *(one for one in facts if (one.subject, one.event_id) not in replaced),
        ]
        for subject, facts in held.items()
    }
    children = {table: _children(cursor, folds.ROW_SPECS[table], of) for table, of in _by_table(reported).items()}
    rows = _joined(reported)
    left_open = settling.open_rows(rows)
    ways = settling.moved(rows, known, known.keys() - rows.keys())
    for subject in [*settling.found_by(cursor, ways), *settling.read_by(cursor, ways)]:
        if not notes.has_object_of(subject):
            notes.leave_open(subject, None)
    for subject in reported:
        spec, row, joined = folds.ROW_SPECS[subject.table], known.get(subject), rows.get(subject)
        if subject.table in settling.MOVING:
            notes.keep_settling(subject, None if joined is None else joined.row)
        if joined is not None and subject in left_open:
            notes.leave_open(subject, _Open(joined, _read_at(joined.row, reported[subject])))
        else:
            groups.add(subject.table, row, None if joined is None else joined.row)
        before = children[subject.table].get(subject, {})
        after = {} if joined is None else {each["id"]: each for each in joined.children}
        for id_ in before.keys() | after.keys():
            groups.add(spec.child, before.get(id_), after.get(id_))


def _joined(facts: Mapping[Subject, list[Facts]]) -> dict[Subject, Joined]:
    """Return the rows that their own events make."""
    found = {}
    for subject, several in facts.items():
        joined = join.fold_all(folds.ROW_SPECS[subject.table], several) if several else None
        if joined is not None:
            found[subject] = joined
    return found


def _settle(cursor: Cursor, left_open: Mapping[Subject, _Open | None], notes: _Notes, groups: _Groups) -> None:
    """Settle open orders and credit notes, and compare the results with the existing rows."""
    resting = {subject for subject, each in left_open.items() if each is None}
    # An order with archived events is settled as it is. A note needs all its events, so it stays as it is.
    archived = {subject for subject, facts in facts_at_hand(cursor, resting) if facts is None}
    at_rest = facts_of(cursor, resting - archived, {}, with_pending=True)
    found = {subject: each for subject, each in left_open.items() if each is not None}
    found |= {subject: _Open(each, _read_at(each.row, at_rest[subject])) for subject, each in _joined(at_rest).items()}
    found |= {subject: _Open(each, None) for subject, (_, each) in settling.at_rest(cursor, archived).items()}
    own = {subject: each.joined for subject, each in found.items()}
    known = load_rows(cursor, own)
    is_open = settling.open_rows(own)
    orders = {subject: joined for subject, joined in is_open.items() if subject.table == "orders"}
    payments = {
        subject: dataclasses.replace(
            each, read_at=None if payment.is_open(own[subject].row) else found[subject].read_at
        )
        for subject, each in _payments_then(cursor, orders, notes).items()
    }
    named = {subject: joined for subject, joined in is_open.items() if subject.table == "credit_notes"}
    refunds = settling.refunds_of(cursor, named)
    for subject, joined in own.items():
        row = joined.row
        if subject in payments:
            row = payment.settle(joined, payments[subject]).row
        elif subject in named:
            refund = replace(subject, table="refunds", id=str(joined.row["refund"]))
            is_news, would_be = notes.settling_row(refund)
            row = credit_note.with_refund(joined, would_be if is_news else refunds.get(subject)).row
        groups.add(subject.table, known.get(subject), row)


def _payments_then(cursor: Cursor, orders: Mapping[Subject, Joined], notes: _Notes) -> dict[Subject, Payment]:
    """Return the payments of *orders* as they would be after the replay."""
    intents = {
        subject: replace(subject, table="payment_intents", id=str(joined.row["payment_intent"]))
        for subject, joined in orders.items()
    }
    news = {subject: dict(notes.settling_rows("intent", intent)) for subject, intent in intents.items()}
    # A refund may name its charge alone, and the charge be in the log.
    charges = {each for new in news.values() for each in new if each.table == "charges"}
    releases = settling.releases_of(cursor, charges)
    found = {}
    for subject, known in settling.payments_of(cursor, orders).items():
        more = [row for charge in news[subject] for row in releases.get(charge, [])]
        both = Payment(known.charges, [*known.releases, *more], known.cancellation)
        found[subject] = _with_news(both, intents[subject], news[subject], notes)
    return found


def _with_news(known: Payment, intent: Subject, new: dict[Subject, Row], notes: _Notes) -> Payment:
    """Return the payment *known* of *intent* with the rows *new* that the log would make or change."""
    charges = _laid("charges", known.charges, intent, new, notes)
    charges = [row for row in charges if row["payment_intent"] == intent.id]
    for row in charges:
        new |= notes.settling_rows("charge", replace(intent, table="charges", id=str(row["id"])))
    releases = _laid("refunds", known.releases, intent, new, notes)
    canceled = _laid("payment_intents", [known.cancellation] if known.cancellation else [], intent, new, notes)
    return Payment(charges, [row for row in releases if row["reason"] == payment.RELEASED], next(iter(canceled), None))


def _laid(
    table: str, known: Sequence[Row], intent: Subject, new: Mapping[Subject, Row], notes: _Notes
) -> list[Row]:  # fmt: skip
    """Return the rows *known* of a table, and those that are *new*, each as it would be after the replay."""
    found: dict[str, Row | None] = {}
    for row in known:
        is_news, would_be = notes.settling_row(replace(intent, table=table, id=str(row["id"])))
        found[str(row["id"])] = would_be if is_news else row
    found |= {subject.id: row for subject, row in new.items() if subject.table == table}
    return [row for _, row in sorted(found.items()) if row is not None]


def _by_table(subjects: Iterable[Subject]) -> dict[str, list[Subject]]:
    grouped: dict[str, list[Subject]] = defaultdict(list)
    for subject in subjects:
        grouped[subject.table].append(subject)
    return grouped


def _children(cursor: Cursor, spec: RowSpec, parents: Sequence[Subject]) -> dict[Subject, dict[Any, Row]]:
    """Return the rows that belong to each of *parents*, by their ids."""
    if not spec.child:
        return {}
    names = ("account", "livemode", *spec.child_key)
    wanted = {(each.account, each.livemode, *each.key): each for each in parents}
    found: dict[Subject, dict[Any, Row]] = defaultdict(dict)
    with cursor.connection.cursor(row_factory=dict_row, binary=True) as rows:
        rows.execute(
            sql.SQL("SELECT t.* FROM unnest({arrays}) AS k ({names}) JOIN {table} AS t USING ({names})").format(
                arrays=sql.SQL(", ").join(sql.SQL("%s::boolean[]" if n == "livemode" else "%s::text[]") for n in names),
                names=sql.SQL(", ").join(map(sql.Identifier, names)),
                table=sql.Identifier(tables.metadata.tables[spec.child].name),
            ),
            [list(column) for column in zip(*wanted, strict=True)],
        )
        for row in rows:
            found[wanted[tuple(row[name] for name in names)]][row["id"]] = row
    return found
