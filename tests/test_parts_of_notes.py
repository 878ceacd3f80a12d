"""The parts of old API versions' credit notes, which name a refund only by its id.

Before basil "the sum of refund, credit and outside of Stripe amounts must equal the credit note total"
(https://docs.stripe.com/api/credit_notes/create); which fields a version has is in stripe-facts sections 2.4 to 2.6.
"""

import random
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from sqlalchemy import Engine

from schemas import database, observations
from schemas.own_events import EVENT_IGNORED
from schemas.progress import do_nothing
from tests import ledger
from tests.test_settling import DAY, Json, T, bodies, body, claim_one, take_in_all_ways
from tests.waiting import until_locked
from worker import folds
from worker.folding import projection
from worker.folding.claim import claim, lock_objects, queue_outdated
from worker.folds.facts import Subject
from worker.logs import renaming
from worker.logs.dry_run import plan
from worker.logs.selection import Reading
from worker.proof import explain, swap
from worker.proof.explain import Explanation
from worker.proof.rebuild import rebuilt

Parts = tuple[int | None, int | None]
"""The refunded amount, and the amount to the balance."""
NOT_KNOWN: Final = (None, None)
SPLIT: Final = ("credit_note_split",)


def about(kind: str, created: int, fields: Json) -> Json:
    """Return an event as Stripe renders it, without its id."""
    return {"object": "event", "type": kind, "created": created, "livemode": False, "data": {"object": fields}}


def note(created: int = T, kind: str = "created", *, without: Sequence[str] = (), **fields: object) -> Json:
    """Return the event of a note of 1009 after the payment, 31 of it out of band, that names both other parts."""
    money = {"amount": 1009, "currency": "usd", "out_of_band_amount": 31, "type": "post_payment"}
    named = {"refund": "re_#", "customer_balance_transaction": "cbtxn_#"}
    usual = {"id": "cn_#", "object": "credit_note", "status": "issued", **money, **named, **fields}
    return about(f"credit_note.{kind}", created, {name: usual[name] for name in usual if name not in without})


def refund(amount: int | None = 615, created: int = T + 5, kind: str = "created", **fields: object) -> Json:
    """Return an event of the refund that the note names."""
    usual = {"id": "re_#", "object": "refund", "amount": amount, "currency": "usd", "status": "succeeded"}
    return about(f"refund.{kind}", created, {**usual, **fields})


def listed(amount: int = -363, **fields: object) -> Json:
    """Return an observation of the ledger: the note's transaction; a credit is negative."""
    usual = {"id": "cbtxn_#", "object": "customer_balance_transaction", "credit_note": "cn_#", "customer": "cus_#"}
    money = {"amount": amount, "ending_balance": amount, "currency": "usd", "type": "credit_note", "created": T}
    return about("payfold.customer_balance_transaction.observed", T + 50, {**usual, **money, **fields})


@dataclass(frozen=True)
class Case:
    """A history, the parts of its note at the end, and the anomalies in force then."""

    events: Sequence[Json]
    parts: Parts
    anomalies: tuple[str, ...] = ()


OF_2019: Final = ("customer_balance_transaction", "out_of_band_amount")
CASES: Final = {
    "nothing else is known": Case([note()], NOT_KNOWN),
    # 1009 - 31 - 615
    "the refund": Case([note(), refund()], (615, 363)),
    # 1009 - 31 - 363
    "the ledger": Case([note(), listed()], (615, 363)),
    "both": Case([note(), refund(), listed()], (615, 363)),
    "the refund is pending, then fails": Case(
        [note(), refund(status="pending"), refund(created=T + 9, kind="failed", status="failed")], (615, 363)
    ),
    "the refund is canceled": Case([note(), refund(kind="updated", status="canceled"), listed()], (615, 363)),
    "the refund's first event has no amount": Case(
        [note(), refund(None), refund(created=T + 9, kind="updated")], (615, 363)
    ),
    "an update of the note": Case([note(), note(T + 9, "updated", memo="Another"), refund()], (615, 363)),
    "a refund in another currency": Case([note(), refund(currency="eur")], NOT_KNOWN),
    "a refund in another currency, and the ledger": Case([note(), refund(currency="eur"), listed()], (615, 363)),
    "a ledger in another currency": Case([note(), listed(currency="eur")], NOT_KNOWN),
    "a ledger in another currency, and the refund": Case([note(), refund(), listed(currency="eur")], (615, 363)),
    "a note without a currency": Case([note(without=["currency"]), refund(), listed()], NOT_KNOWN),
    "a ledger of another transaction": Case([note(), listed(id="cbtxn_other_#"), refund(700)], (700, 278)),
    "a ledger of another transaction, too": Case(
        [note(), listed(), listed(-9, id="cbtxn_other_#"), refund()], (615, 363)
    ),
    "a refund of another id": Case([note(), refund(id="re_other_#")], NOT_KNOWN),
    # 700 + 363 + 31 is 85 too many.
    "the refund and the ledger are too many": Case([note(), refund(700), listed()], NOT_KNOWN, SPLIT),
    "the refund and the ledger are too few": Case([note(), refund(600), listed()], NOT_KNOWN, SPLIT),
    # No amount is left for the transaction that the note names.
    "the refund is all": Case([note(), refund(978)], NOT_KNOWN, SPLIT),
    "the refund is more than all": Case([note(), refund(2000)], NOT_KNOWN, SPLIT),
    "the refund is more than all, and the ledger": Case([note(), refund(2000), listed()], NOT_KNOWN, SPLIT),
    # No amount is left for the refund that the note names.
    "the ledger is all": Case([note(), listed(-978)], NOT_KNOWN, SPLIT),
    "the ledger is more than all, and the refund": Case([note(), refund(), listed(-2000)], NOT_KNOWN, SPLIT),
    "the ledger lists a debit": Case([note(), refund(), listed(363)], NOT_KNOWN, SPLIT),
    "more went out of band than there was": Case(
        [note(out_of_band_amount=1200, customer_balance_transaction=None), refund()], NOT_KNOWN, SPLIT
    ),
    "no transaction": Case([note(customer_balance_transaction=None), refund(978)], (978, 0)),
    "no transaction, and no refund is known": Case([note(customer_balance_transaction=None)], (978, 0)),
    "no transaction, and a refund of less": Case(
        [note(customer_balance_transaction=None), refund(500)], NOT_KNOWN, SPLIT
    ),
    "no refund": Case([note(refund=None), refund(), listed(-978)], (0, 978)),
    "no refund, and a ledger of less": Case([note(refund=None), listed()], (0, None), SPLIT),
    "2019": Case([note(without=OF_2019)], NOT_KNOWN),
    "2019, a refund of all": Case([note(without=OF_2019), refund(1009)], (1009, 0)),
    # The note does not name where the other 394 went.
    "2019, a refund of less": Case([note(without=OF_2019), refund()], (615, None), SPLIT),
    "2019, a refund of less, and the ledger": Case([note(without=OF_2019), refund(), listed(-394)], (615, 394)),
    "2019, a refund of more": Case([note(without=OF_2019), refund(1010)], NOT_KNOWN, SPLIT),
    "the sides are not known": Case([note(without=["type"]), refund(), listed()], (615, 363)),
    "the sides are not known, nor the ledger": Case([note(without=["type"]), refund()], (615, None)),
    # A version since basil lists the parts of its refunds: 1009 - 31 - 600.
    "a newer version of the note": Case(
        [
            note(),
            note(T + 9, "updated", without=["refund"], refunds=[{"refund": "re_#", "amount_refunded": 600}]),
            refund(),
        ],
        (600, 378),
    ),
}


def parts_of(engine: Engine) -> dict[str, Parts]:
    """Return the parts of the notes, by their ids."""
    found = ledger.rows(engine, "SELECT id, refunded_amount, to_balance_amount FROM credit_notes")
    return {row["id"]: (row["refunded_amount"], row["to_balance_amount"]) for row in found}


def wrong_notes(engine: Engine) -> list[tuple[str, str]]:
    """Return the anomalies in force of notes: each note's id, and the kind."""
    asked = "SELECT subject_id, kind FROM anomalies WHERE subject = 'credit_note' AND resolved_at IS NULL"
    return sorted((row["subject_id"], row["kind"]) for row in ledger.rows(engine, asked))


def assert_rebuilt(engine: Engine) -> None:
    """Assert that a rebuild gives the same rows, and the same anomalies in force."""
    in_force = "SELECT account, livemode, id FROM {}anomalies WHERE resolved_at IS NULL ORDER BY 1, 2, 3"
    with rebuilt(engine) as made:
        assert ledger.digest_of(engine, made.schema) == ledger.digest_of(engine)
        assert ledger.rows(engine, in_force.format(f"{made.schema}.")) == ledger.rows(engine, in_force.format(""))


@pytest.mark.parametrize("name", CASES)
def test_every_arrival_of_a_history(engine: Engine, name: str) -> None:
    """In every order and every split the note gets the same parts and is issued once, and a rebuild gives the same."""
    case = CASES[name]
    numbers = take_in_all_ways(engine, case.events, "h")

    notes = [f"cn_{number}" for number in numbers]
    assert parts_of(engine) == dict.fromkeys(notes, case.parts)
    assert wrong_notes(engine) == sorted((id_, kind) for id_ in notes for kind in case.anomalies)
    issued = ledger.rows(engine, "SELECT subject_id, kind FROM changes WHERE subject = 'credit_note'")
    assert sorted(map(str, issued)) == sorted(str({"subject_id": id_, "kind": "credit_note.issued"}) for id_ in notes)
    assert_rebuilt(engine)


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(names=st.lists(st.sampled_from(sorted(CASES)), min_size=1, max_size=8), chance=st.randoms())
def test_arrival_changes_nothing(engine: Engine, names: list[str], chance: random.Random) -> None:
    """Any mixture of histories, permuted, duplicated, split and folded by several workers, gives each its parts."""
    ledger.clear(engine)
    sent = [each for place, name in enumerate(names) for each in bodies(CASES[name].events, str(place))]
    deliveries = [ledger.delivery(each) for each in [*sent, *chance.sample(sent, len(sent) // 2)]]
    chance.shuffle(deliveries)
    for batch in ledger.batches(deliveries, iter(lambda: chance.randint(1, 6), 0)):
        ledger.record(engine, batch)
        ledger.fold_with_workers(engine, chance.randint(1, 3), limit=2)

    assert parts_of(engine) == {f"cn_{place}": CASES[name].parts for place, name in enumerate(names)}
    assert wrong_notes(engine) == sorted(
        (f"cn_{place}", kind) for place, name in enumerate(names) for kind in CASES[name].anomalies
    )
    assert ledger.rows(engine, "SELECT FROM unsettled") == []


def test_worlds_never_meet(engine: Engine) -> None:
    """A refund with the same id in another account or mode does not count for the note."""
    sent, gave = bodies([note(), refund()], "1")
    ledger.take_in(engine, sent, account="acct_1")
    ledger.take_in(engine, gave, account="acct_2")
    ledger.take_in(engine, gave.replace(b'"livemode": false', b'"livemode": true').replace(b"evt_", b"evt_l"))
    ledger.take_in(engine, body(note(), "1", 7), account="acct_2")

    found = ledger.rows(engine, "SELECT account, refunded_amount FROM credit_notes ORDER BY account")
    assert [tuple(row.values()) for row in found] == [("acct_1", None), ("acct_2", 615)]


def test_a_refund_that_several_notes_name(engine: Engine) -> None:
    """A refund that arrives completes every stored note that names it."""
    ledger.take_in(engine, *(body(note(id=f"cn_{at}", refund="re_1"), f"1_{at}", 0) for at in range(3)))
    ledger.take_in(engine, body(refund(), "1", 1))

    assert parts_of(engine) == {f"cn_{at}": (615, 363) for at in range(3)}


@pytest.mark.parametrize("first", [0, 1])
def test_two_transactions_at_once(engine: Engine, first: int) -> None:
    """Of the batches of a note and of its refund the one that commits last sets the parts."""
    ledger.record(engine, [ledger.delivery(each) for each in bodies([note(), refund()], "1")])
    other = threading.Thread(target=lambda: projection.run_once(engine, now=ledger.NOW))

    with database.transaction(engine) as connection, database.cursor(connection) as cursor:
        projection.project(cursor, claim_one(cursor, f"evt_{first}_1"), now=ledger.NOW)
        other.start()
        until_locked(engine)
    other.join()

    assert parts_of(engine) == {"cn_1": (615, 363)}


NOTE: Final = Subject("credit_notes", "", False, "cn_1")  # noqa: FBT003 - the mode


@pytest.mark.parametrize("fails", [False, True])
def test_a_note_that_another_session_locks(engine: Engine, *, fails: bool) -> None:
    """A refund's batch skips a locked note, which gets its parts whether the locking session commits or not."""
    ledger.take_in(engine, body(note(), "1", 0))
    ledger.record(engine, [ledger.delivery(body(refund(), "1", 1))])
    refunded = threading.Thread(target=lambda: projection.run_once(engine, now=ledger.NOW))

    with database.transaction(engine) as connection, database.cursor(connection) as cursor:
        lock_objects(cursor, [NOTE], ())  # as a batch of the note holds it
        refunded.start()
        until_locked(engine)
        assert ledger.rows(engine, "SELECT state FROM events WHERE id = 'evt_1_1'") == [{"state": "folded"}]
        assert parts_of(engine) == {"cn_1": NOT_KNOWN}
        if fails:
            connection.rollback()
        else:
            ledger.record(engine, [ledger.delivery(body(note(T + 9, "updated", memo="Another"), "1", 2))])
            projection.project(cursor, claim_one(cursor, "evt_2_1"), now=ledger.NOW)
    refunded.join()

    assert parts_of(engine) == {"cn_1": (615, 363)}
    assert ledger.rows(engine, "SELECT FROM unsettled") == []


def test_a_skipped_note_gets_its_parts_later(engine: Engine) -> None:
    """A skipped note gets its parts in a later run, though no event is pending."""
    ledger.take_in(engine, body(note(), "1", 0))
    ledger.record(engine, [ledger.delivery(body(refund(), "1", 1))])
    with database.transaction(engine) as other, database.cursor(other) as holding:
        lock_objects(holding, [NOTE], ())
        with database.transaction(engine) as connection, database.cursor(connection) as cursor:
            # The process ends after this commit.
            projection.project(cursor, claim(cursor, limit=9), now=ledger.NOW)
    assert parts_of(engine) == {"cn_1": NOT_KNOWN}

    assert projection.run_once(engine, now=ledger.NOW) == 0

    assert parts_of(engine) == {"cn_1": (615, 363)}
    assert ledger.rows(engine, "SELECT FROM unsettled") == []


@pytest.mark.parametrize("others", [[], [listed()]], ids=["the refund alone", "the ledger too"])
@pytest.mark.parametrize("amount", [615, 700])
def test_a_refund_that_is_ignored(engine: Engine, amount: int, others: list[Json]) -> None:
    """After an operator ignores the refund the note is as if the refund had never come."""
    ledger.take_in(engine, *bodies([note(), refund(amount), *others], "1"))
    word = {"object": "event", "id": "evt_1_1", "reason": "a test"}
    ignored = observations.observe(EVENT_IGNORED, word, account="", livemode=False, created=T + DAY, now=ledger.NOW)
    ledger.record(engine, [ignored])
    ledger.fold(engine)

    assert parts_of(engine) == {"cn_1": (615, 363) if others else NOT_KNOWN}
    assert wrong_notes(engine) == []
    assert_rebuilt(engine)


@pytest.mark.parametrize("is_known", [True, False])
def test_a_note_that_an_older_release_folded(engine: Engine, *, is_known: bool) -> None:
    """A stored note without its refund's id gets its parts when the clock folds it again, and is issued once."""
    sent, gave = bodies([note(), refund()], "1")
    ledger.take_in(engine, sent, *([gave] if is_known else []))
    ledger.execute(engine, "UPDATE credit_notes SET refund = NULL, refunded_amount = NULL, to_balance_amount = NULL")
    ledger.execute(engine, "UPDATE outcomes SET fold_version = :older", older=folds.FOLD_VERSION - 1)
    ledger.take_in(engine, gave)
    with database.transaction(engine) as connection, database.cursor(connection) as cursor:
        queue_outdated(cursor)
    ledger.fold(engine)

    assert parts_of(engine) == {"cn_1": (615, 363)}
    assert ledger.kinds(engine, "cn_1") == ["credit_note.issued"]


def explained(engine: Engine, *, hours: int | None = None) -> tuple[Explanation, dict[str, dict[str, Any]]]:
    """Return the explanation of the note cn_1, now or as of some *hours* later, and its columns by name."""
    as_of = None if hours is None else ledger.NOW + timedelta(hours=hours)
    found = explain.explain(engine, NOTE, as_of=as_of)
    return found, {each["column"]: each for each in found.columns}


def test_an_explanation_names_the_refund(engine: Engine) -> None:
    """The refund's event set the parts, now and as of any time since it was received; before, they are null."""
    rows = []
    history = [note(), refund(status="pending"), refund(created=T + 9, kind="updated")]
    for hour, each in enumerate(bodies(history, "1")):
        received = ledger.NOW + timedelta(hours=hour)
        ledger.record(engine, [replace(ledger.delivery(each), received_at=received)])
        ledger.fold(engine)
        rows += ledger.rows(engine, "SELECT * FROM credit_notes")

    for hours, row, by in ((None, rows[2], "evt_2_1"), (2, rows[2], "evt_2_1"), (1, rows[1], "evt_1_1")):
        found, columns = explained(engine, hours=hours)
        assert found.row == row
        for name, amount in (("refunded_amount", 615), ("to_balance_amount", 363)):
            column = columns[name]
            assert (column["value"], column["how"], column["event_id"]) == (amount, "by its refund", by)
        assert [(line["event_id"], line["sets"]) for line in found.timeline][1:] == [
            (by, ["refunded_amount", "to_balance_amount"])
        ]
    found, columns = explained(engine, hours=0)
    assert (found.row, columns["refunded_amount"]["event_id"]) == (rows[0], None)


def test_a_rename_joins_a_note_and_its_refund(engine: Engine) -> None:
    """After a rename of accounts a note of one name gets its parts from the refund of the other."""
    sent, gave = bodies([note(), refund()], "1")
    ledger.record(engine, [ledger.delivery(sent, account="shop"), ledger.delivery(gave, account="acct_1")])
    ledger.fold(engine)

    renaming.rename(engine, "shop", "acct_1", now=ledger.NOW, is_one=True)

    assert parts_of(engine) == {"cn_1": (615, 363)}
    assert_rebuilt(engine)


def test_a_swap_lays_the_parts_on(engine: Engine) -> None:
    """A swap writes the parts that a refund sets, and announces nothing."""
    ledger.take_in(engine, *bodies([note(), refund()], "1"))
    ledger.execute(engine, "UPDATE credit_notes SET refunded_amount = NULL, to_balance_amount = NULL")

    with rebuilt(engine) as made:
        found, appended = swap.swap(made)

    assert (found.drift, appended) == (1, 0)
    assert parts_of(engine) == {"cn_1": (615, 363)}


def test_a_dry_run_knows_the_refund(engine: Engine, tmp_path: Path) -> None:
    """A dry run of an older event of a note with its parts foresees no change."""
    ledger.take_in(engine, *bodies([note(), refund()], "1"))
    path = tmp_path / "log.ndjson"
    path.write_bytes(body(note(T - 9), "1", 2) + b"\n")

    foreseen = plan(engine, Reading((str(path),), ledger.NOW))

    assert (foreseen.counts["new"], foreseen.rows) == (1, [])


@pytest.mark.parametrize("archived", ["refund", "credit_note"])
def test_an_archived_event_is_no_drift(engine: Engine, archived: str) -> None:
    """A note is left out of a comparison, and is no drift, if its own or its refund's payload is archived."""
    ledger.take_in(engine, *bodies([note(), refund()], "1"))
    ledger.execute(
        engine, "DELETE FROM payloads WHERE seq IN (SELECT seq FROM inbox WHERE object_type = :type)", type=archived
    )

    with rebuilt(engine) as made:
        found = swap.compare(made, on_difference=do_nothing)

    assert (found.drift, found.events_left_out) == (0, 1)


def test_a_refund_of_an_archived_note(engine: Engine) -> None:
    """A refund of an archived note is folded, and the note stays as it is."""
    ledger.take_in(engine, body(note(), "1", 0), *bodies([note(), refund()], "2"))
    ledger.execute(engine, "DELETE FROM payloads WHERE seq = (SELECT seq FROM inbox WHERE object_id = 'cn_1')")
    ledger.take_in(engine, body(refund(), "1", 1))

    assert ledger.rows(engine, "SELECT state FROM events WHERE id = 'evt_1_1'") == [{"state": "folded"}]
    assert parts_of(engine) == {"cn_1": NOT_KNOWN, "cn_2": (615, 363)}
