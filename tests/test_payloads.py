"""Payloads have partitions of their own, made ahead of need, and an event without one waits for it."""

import pytest
from sqlalchemy import Engine, text

from deploy.sandbox.samples import sample
from schemas import database, inbox
from tests import ledger

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
    """Make the partitions that are needed next."""
    return inbox.make_room(engine)


def partitions(engine: Engine) -> list[tuple[str, str]]:
    """Return the partitions and their bounds."""
    return [(row["name"], row["bound"]) for row in ledger.rows(engine, PARTITIONS)]


def told(at: int) -> bytes:
    """Return an event of the one payment link, created *at*."""
    return sample("payment_link.updated", {"id": "plink_1"}, now=at).body


def record_as(engine: Engine, seq: int) -> None:
    """Record an event under the number *seq*."""
    with database.transaction(engine) as connection:
        connection.execute(text(f"ALTER TABLE inbox ALTER COLUMN seq RESTART WITH {seq}"))
    ledger.record(engine, [ledger.delivery(told(seq))])


def test_room_is_made_ahead(engine: Engine) -> None:
    """A partition is made while the one before it is still empty, once, and whatever stands in the one in use."""
    begun = partitions(engine)
    record_as(engine, 999_999)
    early = make_room(engine)
    record_as(engine, 1_000_000)
    made, again = make_room(engine), make_room(engine)

    assert (begun, early, made, again) == (FIRST, 0, 1, 0)
    assert partitions(engine) == [*FIRST, SECOND]
    assert ledger.rows(engine, "SELECT count(*) AS found FROM ONLY payloads_rest") == [{"found": 0}]


def test_room_that_comes_late(engine: Engine) -> None:
    """What was recorded before anybody made room for it is kept with the rest, and the next partition begins after."""
    record_as(engine, 2_000_005)
    make_room(engine)
    record_as(engine, 3_000_001)

    assert partitions(engine) == [*FIRST, THIRD]
    assert ledger.rows(engine, "SELECT seq FROM payloads_rest") == [{"seq": 2_000_005}]
    assert ledger.rows(engine, "SELECT seq FROM payloads_from_3000000") == [{"seq": 3_000_001}]
    assert ledger.fold(engine) == 2


def test_room_waits_for_nobody_for_long(engine: Engine) -> None:
    """While somebody reads all payloads, as a rebuild does, no room is made, and nobody is kept from anything else."""
    record_as(engine, 1_000_000)
    with database.transaction(engine) as connection:
        connection.execute(text("LOCK TABLE payloads IN ACCESS SHARE MODE"))
        meanwhile = make_room(engine)
        ledger.record(engine, [ledger.delivery(told(7))])

    assert (meanwhile, make_room(engine)) == (None, 1)
    assert partitions(engine) == [*FIRST, SECOND]


def test_event_whose_past_is_archived(engine: Engine) -> None:
    """An event later than all that is folded needs no payload but its own; an older one waits for the archive."""
    ledger.take_in(engine, told(5), told(6))
    with database.transaction(engine) as connection:
        connection.execute(text("DELETE FROM payloads"))

    ledger.take_in(engine, told(7))
    ledger.take_in(engine, told(4))

    states = ledger.rows(engine, "SELECT id, state, reason FROM events ORDER BY seq")
    assert [row["state"] for row in states] == ["folded", "folded", "folded", "parked"]
    assert "archived: `payfold rebuild --archive DIR --swap`" in states[3]["reason"]
    assert ledger.rows(engine, "SELECT event_id FROM payment_links") == [{"event_id": states[2]["id"]}]
