"""Says what a replay would do: what it would meet, and which rows would appear and change, by how much money.

Note [What is foreseen is kept in a file]
    A log may be longer than memory, and what it says of an order may stand at its two ends. So what its news say is
    kept in a temporary file of SQLite's, by the object that they speak of. Then a few objects at once are joined with
    all that the inbox says of them, and compared with their rows. The database is only read.
"""

import pickle
import sqlite3
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import groupby, islice
from operator import itemgetter
from typing import Any, Final

import msgspec
from psycopg import sql
from psycopg.rows import dict_row
from sqlalchemy import Engine

from schemas import database, inbox, tables
from schemas.database import Cursor
from schemas.inbox import Delivery, Recorded
from worker import folds, projection, settling
from worker.difference import MAIN_AMOUNTS
from worker.folds import join
from worker.folds.facts import Event, Facts, Row, Subject
from worker.folds.join import Joined, Shape
from worker.replay import Counts, Key, Reading, renderings

OBJECTS_AT_ONCE: Final = 200
APPEAR: Final = "appear"
CHANGE: Final = "change"
DISAPPEAR: Final = "disappear"


@dataclass(frozen=True, slots=True)
class Plan:
    """What a replay would come to: its *counts*, and its *rows* in groups.

    A group is a dict of table, rows_would (appear, change, disappear), status (of what changes it, before and after),
    currency, rows, and amount: by how much the groups' money would grow, None where it has none.
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
                _compare(cursor, some, groups)
    return Plan(counts, groups.rows())


# ---- What the log says ----


class _Notes:
    """What is foreseen of each event that would be news, and what those say of each object."""

    def __init__(self) -> None:
        self._file = sqlite3.connect("")  # a temporary file, which goes with the connection
        self._file.executescript(
            """
            CREATE TABLE events (key BLOB PRIMARY KEY, rendering TEXT, state TEXT, times INT) WITHOUT ROWID;
            CREATE TABLE said (object BLOB, key BLOB, stands INT, facts BLOB, PRIMARY KEY (object, key, stands))
                WITHOUT ROWID;
            CREATE INDEX said_by_event ON said (key);
            """
        )

    def close(self) -> None:
        self._file.close()

    def rendering(self, key: Key) -> str | None:
        """Return the rendering in which an event would be recorded last; None where it would not."""
        found = self._file.execute("SELECT rendering FROM events WHERE key = ?", (_encoded(*key),)).fetchone()
        return None if found is None else str(found[0])

    def add(self, delivery: Delivery, verdict: folds.Verdict) -> None:
        """Note that *delivery* would be recorded, perhaps once more, and come to *verdict*."""
        key = _encoded(*delivery.key)
        self._file.execute(
            "INSERT INTO events VALUES (?, ?, ?, 1) ON CONFLICT DO UPDATE SET"
            " rendering = excluded.rendering, state = excluded.state, times = times + 1",
            (key, delivery.rendering, verdict.state),
        )
        self._file.execute("UPDATE OR REPLACE said SET stands = 0 WHERE key = ?", (key,))
        self._say(key, verdict.facts, stands=True)

    def pass_over(self, event: Event) -> None:
        """Note that what *event* says in the inbox would no longer stand."""
        self._say(_encoded(event.account, event.livemode, event.id), folds.judge(event).facts, stands=False)

    def set_aside(self, key: Key) -> None:
        """Note that an event of the log would be set aside by an operator's word."""
        self._file.execute("UPDATE events SET state = 'ignored' WHERE key = ?", (_encoded(*key),))
        self._file.execute("UPDATE OR REPLACE said SET stands = 0 WHERE key = ?", (_encoded(*key),))

    def _say(self, key: bytes, facts: Iterable[Facts], *, stands: bool) -> None:
        by_object: dict[bytes, list[Facts]] = defaultdict(list)
        for one in facts:
            by_object[_encoded(one.subject.account, one.subject.livemode, one.subject.source)].append(one)
        self._file.executemany(
            "INSERT OR REPLACE INTO said VALUES (?, ?, ?, ?)",
            [(of, key, stands, pickle.dumps(several, protocol=5)) for of, several in by_object.items()],
        )

    def outcomes(self) -> Mapping[str, int]:
        """Return how many of what would be new would have which state."""
        return dict(self._file.execute("SELECT state, sum(times) FROM events GROUP BY state").fetchall())

    def objects(self) -> Iterator[list[tuple[bool, list[Facts]]]]:
        """Yield for each object what is said of it, event by event, and whether that would stand."""
        found = self._file.execute("SELECT object, stands, facts FROM said ORDER BY object")
        for _, said in groupby(found, key=itemgetter(0)):
            yield [(bool(stands), pickle.loads(facts)) for _, stands, facts in said]  # noqa: S301 - our own


def _encoded(account: str, livemode: bool, id_: str) -> bytes:  # noqa: FBT001 - the parts of a key
    return msgspec.json.encode([account, livemode, id_])


def _foresee(cursor: Cursor, notes: _Notes, deliveries: Sequence[Delivery]) -> Iterator[str]:
    """Note what would become of *deliveries*, and yield that of each."""
    newest = inbox.newest_of_each(deliveries)
    held = renderings(cursor, newest)
    for _ in range(len(deliveries) - len(newest)):
        yield Recorded.DUPLICATE.value
    news: list[Delivery] = []
    for delivery in newest:
        foreseen = notes.rendering(delivery.key)
        known = held.get(delivery.key) if foreseen is None else foreseen
        if known is not None and delivery.rendering <= known:
            yield Recorded.DUPLICATE.value
        else:
            yield (Recorded.NEW if known is None else Recorded.NEWER_RENDERING).value
            notes.add(delivery, folds.judge(projection.event_of(delivery)))
            news.append(delivery)
    words = [each for each in news if each.envelope.type == folds.EVENT_IGNORED]
    aside = [(each.account, each.envelope.livemode, str(each.envelope.object_id)) for each in words]
    for event in _held(cursor, [*(each.key for each in news if each.key in held), *aside]):
        notes.pass_over(event)
    for key in [*_set_aside(cursor, [each.key for each in news]), *aside]:
        notes.set_aside(key)


_HELD: Final = """
SELECT i.seq, i.account, i.livemode, i.id, i.type, i.created, i.object_type, i.object_id, b.payload, i.source
FROM unnest(%s::text[], %s::boolean[], %s::text[]) AS k (account, livemode, id)
JOIN inbox AS i USING (account, livemode, id) JOIN payloads AS b USING (seq)
"""
_ASIDE: Final = """
SELECT DISTINCT account, livemode, object_id
FROM unnest(%s::text[], %s::boolean[], %s::text[]) AS k (account, livemode, object_id)
JOIN inbox USING (account, livemode, object_id) WHERE type = 'payfold.event.ignored'
"""


def _held(cursor: Cursor, keys: Sequence[Key]) -> list[Event]:
    return [Event(*row) for row in _by_key(cursor, _HELD, keys)]


def _set_aside(cursor: Cursor, keys: Sequence[Key]) -> list[Key]:
    """Return those of *keys* that the inbox has an operator's word on."""
    return [(row[0], row[1], row[2]) for row in _by_key(cursor, _ASIDE, keys)]


def _by_key(cursor: Cursor, statement: str, keys: Sequence[Key]) -> list[Any]:
    if not keys:
        return []
    cursor.execute(statement, [list(column) for column in zip(*keys, strict=True)], binary=True)
    return cursor.fetchall()


# ---- What the tables would say ----


class _Groups:
    """The rows that would not be as they are, counted, with their money by currency."""

    def __init__(self) -> None:
        self._rows: Counter[tuple[str, ...]] = Counter()
        self._amounts: Counter[tuple[str, ...]] = Counter()

    def add(self, table: str, before: Mapping[str, Any] | None, after: Mapping[str, Any] | None) -> None:
        """Take in a row as it is, and as it would be."""
        if before == after:
            return
        would = APPEAR if before is None else DISAPPEAR if after is None else CHANGE
        statuses = [str(row["status"]) for row in (before, after) if row is not None and row.get("status") is not None]
        status = " → ".join(dict.fromkeys(statuses))
        row = after or before or {}
        self._rows[table, would, status, row.get("currency") or ""] += 1
        for each, sign in ((before, -1), (after, 1)):
            worth = next((each[name] for name in MAIN_AMOUNTS if each.get(name) is not None), None) if each else None
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


def _compare(cursor: Cursor, objects: Sequence[Sequence[tuple[bool, list[Facts]]]], groups: _Groups) -> None:
    """Join what the log says of *objects* with what the inbox does, and compare with the rows that are there."""
    told: dict[Subject, list[Facts]] = defaultdict(list)
    replaced: set[tuple[Subject, str]] = set()
    for several in objects:
        for stands, facts in several:
            for one in facts:
                told[one.subject] += [one] if stands else []
                replaced.add((one.subject, one.event_id))
    known = projection.load(cursor, told)
    for subject, facts in projection.facts_of(cursor, set(told), {}, with_pending=True).items():
        told[subject] += [one for one in facts if (subject, one.event_id) not in replaced]
    children = {table: _children(cursor, folds.SHAPES[table], of) for table, of in _by_table(told).items()}
    rows = _joined(cursor, told)
    for subject in told:
        shape, row, joined = folds.SHAPES[subject.table], known.get(subject), rows.get(subject)
        groups.add(subject.table, row, None if joined is None else joined.row)
        before = children[subject.table].get(subject, {})
        after = {} if joined is None else {each["id"]: each for each in joined.children}
        for id_ in before.keys() | after.keys():
            groups.add(shape.child, before.get(id_), after.get(id_))


def _joined(cursor: Cursor, facts: Mapping[Subject, list[Facts]]) -> dict[Subject, Joined]:
    """Return the joined rows; charges that only the log has settle no order yet."""
    found = {}
    for subject, several in facts.items():
        joined = join.fold_all(folds.SHAPES[subject.table], several) if several else None
        if joined is not None:
            found[subject] = joined
    return found | settling.settled(cursor, settling.open_orders(found))


def _by_table(subjects: Iterable[Subject]) -> dict[str, list[Subject]]:
    grouped: dict[str, list[Subject]] = defaultdict(list)
    for subject in subjects:
        grouped[subject.table].append(subject)
    return grouped


def _children(cursor: Cursor, shape: Shape, parents: Sequence[Subject]) -> dict[Subject, dict[Any, Row]]:
    """Return the rows that belong to each of *parents*, by their ids."""
    if not shape.child:
        return {}
    names = ("account", "livemode", *shape.child_key)
    wanted = {(each.account, each.livemode, *each.key): each for each in parents}
    found: dict[Subject, dict[Any, Row]] = defaultdict(dict)
    with cursor.connection.cursor(row_factory=dict_row, binary=True) as rows:
        rows.execute(
            sql.SQL("SELECT t.* FROM unnest({arrays}) AS k ({names}) JOIN {table} AS t USING ({names})").format(
                arrays=sql.SQL(", ").join(sql.SQL("%s::boolean[]" if n == "livemode" else "%s::text[]") for n in names),
                names=sql.SQL(", ").join(map(sql.Identifier, names)),
                table=sql.Identifier(tables.metadata.tables[shape.child].name),
            ),
            [list(column) for column in zip(*wanted, strict=True)],
        )
        for row in rows:
            found[wanted[tuple(row[name] for name in names)]][row["id"]] = row
    return found
