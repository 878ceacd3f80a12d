"""Payloads have partitions that are made ahead of need, and an event waits for the archive if it needs one."""

import pytest
from sqlalchemy import Engine, text
from structlog.testing import capture_logs

from deploy.sandbox.samples import sample
from schemas import database, inbox
from tests import ledger
from worker.folding.claim import queue_outdated
from worker.folding.rows import probe_indexes

pytestmark = pytest.mark.integration

PARTITIONS = """
SELECT c.relname AS name, pg_get_expr(c.relpartbound, c.oid) AS bound FROM pg_inherits AS p
JOIN pg_class AS c ON c.oid = p.inhrelid WHERE p.inhparent = 'payloads'::regclass ORDER BY length(c.relname), c.relname
"""
FIRST = [
    ("payloads_rest", "DEFAULT"),
    ("payloads_from_0", "FOR VALUES FROM ('0') TO ('1000000')"),
    ("payloads_from_1000000", "FOR VALUES FROM ('1000000') TO ('2000000')"),
]
SECOND = ("payloads_from_2000000", "FOR VALUES FROM ('2000000') TO ('3000000')")
THIRD = ("payloads_from_3000000", "FOR VALUES FROM ('3000000') TO ('4000000')")


def make_room(engine: Engine) -> int | None:
    """Make the partitions that will be needed next."""
    return inbox.make_room(engine)


def partitions(engine: Engine) -> list[tuple[str, str]]:
    """Return the partitions and their bounds."""
    return [(row["name"], row["bound"]) for row in ledger.rows(engine, PARTITIONS)]


def link_event(at: int) -> bytes:
    """Return an event of the one payment link, created *at*."""
    return sample("payment_link.updated", {"id": "plink_1"}, now=at).body


def record_as(engine: Engine, seq: int) -> None:
    """Record an event under the number *seq*."""
    with database.transaction(engine) as connection:
        connection.execute(text(f"ALTER TABLE inbox ALTER COLUMN seq RESTART WITH {seq}"))
    ledger.record(engine, [ledger.delivery(link_event(seq))])


def test_a_partition_is_made_ahead(engine: Engine) -> None:
    """The next partition is made once, as soon as the one before it is in use."""
    begun = partitions(engine)
    record_as(engine, 999_999)
    early = make_room(engine)
    record_as(engine, 1_000_000)
    made, again = make_room(engine), make_room(engine)

    assert (begun, early, made, again) == (FIRST, 0, 1, 0)
    assert partitions(engine) == [*FIRST, SECOND]
    assert ledger.rows(engine, "SELECT count(*) AS found FROM ONLY payloads_rest") == [{"found": 0}]


LOCKED = """
SELECT DISTINCT c.relname FROM pg_locks AS l JOIN pg_class AS c ON c.oid = l.relation
WHERE l.pid = pg_backend_pid() AND c.relname LIKE 'payloads_from_%' AND c.relkind = 'r'
"""


SETTINGS = """
SELECT DISTINCT c.reloptions AS options,
    (SELECT array_agg(a.attstattarget::int ORDER BY a.attnum) FROM pg_attribute AS a
        WHERE a.attrelid = c.oid AND a.attnum > 0) AS samples
FROM pg_inherits AS p JOIN pg_class AS c ON c.oid = p.inhrelid WHERE p.inhparent = 'payloads'::regclass
"""


def test_every_partition_is_vacuumed_soon(engine: Engine) -> None:
    """A partition of any age or size is vacuumed after the same number of rows, and its payloads are not sampled."""
    record_as(engine, 1_000_000)
    made = make_room(engine)

    (same,) = ledger.rows(engine, SETTINGS)

    assert made == 1
    assert {
        "autovacuum_vacuum_insert_threshold=10000",
        "autovacuum_vacuum_insert_scale_factor=0",
    } <= set(same["options"])
    assert same["samples"] == [10, 0]


def test_reading_payloads_locks_no_other_partition(engine: Engine) -> None:
    """A batch that reads payloads locks the partitions of those alone, however its statements are planned."""
    for seq in (5, 1_000_005):
        record_as(engine, seq)
    with database.transaction(engine) as connection, database.cursor(connection) as cursor:
        probe_indexes(cursor)
        found = inbox.payloads_of(cursor, [5])
        locked = [name for (name,) in cursor.execute(LOCKED)]

    assert found == {5: link_event(5)}
    assert locked == ["payloads_from_0"]


def test_a_sweep_with_nothing_outdated_locks_no_partition(engine: Engine) -> None:
    """A pass that finds nothing to fold again does not even plan to read payloads, however many there are."""
    ledger.take_in(engine, link_event(5))
    with database.transaction(engine) as connection, database.cursor(connection) as cursor:
        queued = queue_outdated(cursor)
        locked = cursor.execute(LOCKED).fetchall()

    assert (queued, locked) == (0, [])


def test_a_partition_that_comes_late(engine: Engine) -> None:
    """Payloads without a partition are kept in the default one, and the next partition begins after them."""
    record_as(engine, 2_000_005)
    make_room(engine)
    record_as(engine, 3_000_001)

    assert partitions(engine) == [*FIRST, THIRD]
    assert ledger.rows(engine, "SELECT seq FROM payloads_rest") == [{"seq": 2_000_005}]
    assert ledger.rows(engine, "SELECT seq FROM payloads_from_3000000") == [{"seq": 3_000_001}]
    assert ledger.fold(engine) == 2


def test_too_many_payloads_without_a_partition(engine: Engine) -> None:
    """If more came without a partition than can be scanned in time, no partition is made, and all goes on."""
    record_as(engine, 2_000_005)
    with capture_logs() as logs:
        made = inbox.make_room(engine, rest_bytes_max=8191)
    record_as(engine, 3_000_001)

    assert made is None
    assert [each["event"] for each in logs] == ["payloads.no_room_made"]
    assert partitions(engine) == FIRST
    assert ledger.fold(engine) == 2
    assert inbox.make_room(engine, rest_bytes_max=8192) == 1


def test_making_a_partition_waits_for_no_lock(engine: Engine) -> None:
    """While a session reads all payloads, as a rebuild does, no partition is made, and recording goes on."""
    record_as(engine, 1_000_000)
    with database.transaction(engine) as connection:
        connection.execute(text("LOCK TABLE payloads IN ACCESS SHARE MODE"))
        while_locked = make_room(engine)
        ledger.record(engine, [ledger.delivery(link_event(7))])

    assert (while_locked, make_room(engine)) == (None, 1)
    assert partitions(engine) == [*FIRST, SECOND]


def test_event_of_an_archived_object(engine: Engine) -> None:
    """An event later than all folded ones needs only its own payload; an older one waits for the archive."""
    ledger.take_in(engine, link_event(5), link_event(6))
    with database.transaction(engine) as connection:
        connection.execute(text("DELETE FROM payloads"))

    ledger.take_in(engine, link_event(7))
    ledger.take_in(engine, link_event(4))

    states = ledger.rows(engine, "SELECT id, state, reason FROM events ORDER BY seq")
    assert [row["state"] for row in states] == ["folded", "folded", "folded", "parked"]
    assert "archived: `payfold rebuild --archive DIR --swap`" in states[3]["reason"]
    assert ledger.rows(engine, "SELECT event_id FROM payment_links") == [{"event_id": states[2]["id"]}]
