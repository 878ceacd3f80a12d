"""Whole explanations of small histories: every column with the event that set it, every event with its verdict.

In process, so that a change of ``worker.proof.explain`` shows within a second. Each event is received a minute after
the one before it in its list, from 12:00 on. What follows from the events is worked out by hand from the rules of
README.md; ``previous_attributes`` orders the events of one second (docs.stripe.com/api/events/object).
"""

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace
from sqlalchemy import Engine, text

from deploy.local.services import Services
from schemas import database
from schemas.errors import NotFoundError
from tests import envelopes, ledger
from tests.literals import at
from tests.stripe_payments import Body, T, canceled_intent, charge, event, hold, refund, released, session
from tests.web import migrated_database
from worker.folds.facts import Subject
from worker.logs import archive
from worker.proof import explain
from worker.proof.explain import Explanation

LINK: Body = {
    "id": "plink_l",
    "object": "payment_link",
    "active": True,
    "currency": "usd",
    "livemode": True,
    "metadata": {"a": "1"},
    "url": "https://buy.stripe.com/l",
}
OFF: Body = {**LINK, "active": False}
ON_BEFORE, OFF_BEFORE = {"active": True}, {"active": False}
OLD = -9_000_000
"""What Stripe created before then is archived, in seconds from T."""


def link(id_: str, created: int, object_: Body, before: Body | None = None, *, kind: str = "updated") -> bytes:
    """Return an event of a payment link: of plink_l in live mode of account acct_1, of others in test mode."""
    is_live = object_["id"] == "plink_l"
    type_, account = f"payment_link.{kind}", "acct_1" if is_live else None
    return event(id_, type_, created, object_, previous=before, account=account, livemode=is_live)


def read(id_: str, type_: str, created: int, object_: Body) -> bytes:
    """Return an observation, made *created* seconds after T."""
    return envelopes.event(id_, type_, T + created, object_, version=None)


def unpaid(name: str) -> bytes:
    """Return the completion of a session by a method that is captured later."""
    return event(
        f"evt_{name}1",
        "checkout.session.completed",
        10,
        session(f"cs_{name}", payment_intent=f"pi_{name}", payment_status="unpaid"),
    )


ORDER: Body = session(
    "cs_o",
    amount_subtotal=5200,
    amount_total=5004,
    client_reference_id="cart_o",
    customer="cus_o",
    customer_email="buyer@example.com",
    metadata={"shelf": "7"},
    payment_intent="pi_o",
    payment_status="unpaid",
    total_details={"amount_discount": 250, "amount_shipping": 50, "amount_tax": 4},
)
PAID: Body = {**ORDER, "payment_status": "paid"}
LATER: Body = {
    **{name: value for name, value in PAID.items() if name != "client_reference_id"},
    "amount_total": 4004,
    "payment_intent": None,
}
CUSTOMER: Body = {
    "id": "cus_c",
    "object": "customer",
    "balance": 0,
    "created": T,
    "currency": "usd",
    "delinquent": False,
    "email": "buyer@example.com",
    "livemode": False,
    "metadata": {},
    "name": "Buyer",
    "test_clock": "clock_1",
}
OWED: Body = {**CUSTOMER, "balance": -500, "delinquent": True}
NOTE: Body = {
    "id": "cn_n",
    "object": "credit_note",
    "amount": 300,
    "created": T + 20,
    "currency": "usd",
    "customer": "cus_n",
    "customer_balance_transaction": None,
    "effective_at": T + 19,
    "invoice": "in_n",
    "livemode": False,
    "memo": None,
    "number": "R-1-CN-1",
    "out_of_band_amount": None,
    "post_payment_amount": None,
    "pre_payment_amount": None,
    "reason": "order_change",
    "refund": "re_n",
    "status": "issued",
    "type": "post_payment",
    "voided_at": None,
}
BALANCED: Body = {"id": "cn_m", "invoice": "in_m", "refund": "re_m", "customer_balance_transaction": "cbtxn_m"}
VOID: Body = {**NOTE, "status": "void", "voided_at": T + 25}
RELEASE: Body = refund(
    "re_r", created=500, amount=5000, charge="ch_r", payment_intent="pi_r", reason="expired_uncaptured_charge"
)
INVOICE: Body = {
    "id": "in_i",
    "object": "invoice",
    "amount_due": 100,
    "amount_paid": 0,
    "amount_remaining": 100,
    "created": T,
    "currency": "usd",
    "customer": "cus_i",
    "livemode": False,
    "status": "draft",
    "total": 100,
}


A, B, Z = ({**LINK, "id": f"plink_{name}", "livemode": False} for name in "abz")

# Each list is of one object and what belongs to it, received a minute after each other from 12:00 on. What Stripe
# created before OLD is archived afterwards.
ARRIVALS: Sequence[Sequence[bytes]] = (
    # Off; in one second on and, by two events for one step, off; in another second on and off.
    [
        link("evt_l0", OLD - 5, LINK, kind="viewed"),
        link("evt_l1", 2, OFF, kind="created"),
        link("evt_l3", 4, OFF, ON_BEFORE),
        link("evt_l4", 4, OFF, ON_BEFORE),
        link("evt_l2", 4, LINK, OFF_BEFORE),
        link("evt_l6", 6, LINK, OFF_BEFORE),
        link("evt_l5", 6, OFF, ON_BEFORE),
    ],
    # The same id in another account.
    [event("evt_w1", "payment_link.created", 1, LINK, account="acct_2", livemode=True)],
    # Off and on in one second, and nothing shows which was first.
    [link("evt_z1", 7, {**Z, "active": False}, ON_BEFORE), link("evt_z2", 7, Z, OFF_BEFORE)],
    # Archived as a whole, and in part.
    [link("evt_a1", OLD - 20, A, kind="created"), link("evt_a2", OLD - 10, A)],
    [link("evt_b1", OLD - 10, B, kind="created"), link("evt_b2", 1, B), link("evt_b3", 2, B)],
    [
        event("evt_o1", "checkout.session.completed", 10, ORDER),
        event("evt_o2", "checkout.session.async_payment_succeeded", 400, PAID),
        event("evt_o3", "checkout.session.async_payment_succeeded", 403, LATER),
        read("obs_o4", "payfold.checkout.session.observed", 500, {**ORDER, "status": "open", "payment_intent": None}),
    ],
    [
        event("evt_c1", "customer.created", 30, CUSTOMER),
        event("evt_c2", "customer.updated", 40, OWED, previous={"balance": 0, "delinquent": False}),
        event("evt_c3", "customer.deleted", 50, OWED),
        event("evt_c4", "customer.updated", 60, {**OWED, "name": "Late"}, previous={"name": "Buyer"}),
    ],
    [
        event("evt_d1", "customer.created", 30, {**CUSTOMER, "id": "cus_d"}),
        event("evt_d2", "customer.updated", 40, {**OWED, "id": "cus_d"}, previous={"balance": 0, "delinquent": False}),
        event("evt_d3", "customer.updated", 50, {"id": "cus_d", "object": "customer", "name": "B"}),
    ],
    # A note from before basil, of which nothing went to the balance: its refund shows nothing new.
    [
        event("evt_n1", "credit_note.created", 20, NOTE),
        event("evt_n2", "credit_note.voided", 25, VOID),
        event("evt_n3", "credit_note.updated", 30, {**VOID, "memo": "m"}, previous={"memo": None}),
        event("evt_n4", "refund.created", 22, refund("re_n", created=22, amount=300, charge=None, payment_intent=None)),
    ],
    # One that names a balance transaction as well: its refund shows both parts.
    [
        event("evt_m1", "credit_note.created", 20, {**NOTE, **BALANCED}),
        event("evt_m2", "refund.created", 22, refund("re_m", created=22, amount=120, charge=None, payment_intent=None)),
    ],
    [event("evt_i1", "invoice.created", 1, INVOICE)],
    # Captured in a second in which the charge is refunded in part and a capture is parked.
    [
        unpaid("s"),
        event("evt_s2", "charge.succeeded", 10, hold("ch_s", payment_intent="pi_s")),
        event("evt_s3", "charge.refunded", 900, charge("ch_s", payment_intent="pi_s", amount_refunded=1)),
        event("evt_s5", "charge.captured", 900, charge("ch_s", payment_intent="pi_s")),
        event("evt_s4", "charge.captured", 900, {**charge("ch_s", payment_intent="pi_s"), "object": "item"}),
    ],
    # Reported in one second by an update, a reading and its own event.
    [
        unpaid("t"),
        event("evt_t2", "charge.updated", 900, charge("ch_t", payment_intent="pi_t")),
        read("evt_t3", "payfold.charge.observed", 900, charge("ch_t", payment_intent="pi_t")),
        event("evt_t4", "charge.succeeded", 900, charge("ch_t", payment_intent="pi_t")),
    ],
    # Released, in a second in which the charge is reported as refunded.
    [
        unpaid("x"),
        event("evt_x2", "charge.succeeded", 10, hold("ch_x", payment_intent="pi_x")),
        event("evt_x3", "charge.refunded", 800, released("ch_x", payment_intent="pi_x")),
        event("evt_x4", "charge.expired", 800, released("ch_x", payment_intent="pi_x")),
        event("evt_x5", "charge.updated", 850, {**released("ch_x", payment_intent="pi_x"), "disputed": True}),
    ],
    [unpaid("k"), event("evt_k2", "payment_intent.canceled", 700, canceled_intent("pi_k", at=700))],
    # A refund that turns out to release the hold.
    [
        unpaid("r"),
        event("evt_r2", "charge.succeeded", 10, hold("ch_r", payment_intent="pi_r")),
        event("evt_r3", "refund.created", 500, {**RELEASE, "reason": None}),
        event("evt_r4", "refund.updated", 600, RELEASE),
    ],
    # A charge that names its intent later.
    [
        unpaid("p"),
        event("evt_p2", "charge.succeeded", 20, charge("ch_p", payment_intent=None)),
        event("evt_p3", "charge.updated", 30, charge("ch_p", payment_intent="pi_p")),
    ],
    # Without a payment.
    [event("evt_f1", "checkout.session.completed", 10, session("cs_f", payment_intent=None))],
    # A charge that is archived in part.
    [
        unpaid("v"),
        event("evt_v2", "charge.succeeded", OLD - 10, hold("ch_v", payment_intent="pi_v")),
        event("evt_v3", "charge.captured", 900, charge("ch_v", payment_intent="pi_v")),
    ],
)
# Received at 12:30 and not folded.
PENDING: Sequence[bytes] = (
    link("evt_l9", 9, LINK, OFF_BEFORE),
    link("evt_b9", 9, B),
    event("evt_q1", "checkout.session.completed", 10, session("cs_q")),
)


def sent() -> dict[str, tuple[str, datetime, datetime, str | None]]:
    """Return the type, the creation, the receipt and the version of each event."""
    minutes = [(body, minute) for bodies in ARRIVALS for minute, body in enumerate(bodies)]
    events = [(json.loads(body), minute) for body, minute in (*minutes, *((body, 30) for body in PENDING))]
    return {
        each["id"]: (each["type"], at(each["created"]), received_at(minute), each["api_version"])
        for each, minute in events
    }


def received_at(minute: int) -> datetime:
    """Return a minute after 12:00."""
    return ledger.NOW + timedelta(minutes=minute)


@pytest.fixture(scope="module")
def explained(services: Services, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """Return a database with the arrivals and what stays pending, in which what is old was archived."""
    with migrated_database(services) as database_url:
        engine = database.engine(database_url)
        take_in(engine, tmp_path_factory.mktemp("archive"))
        yield engine
        engine.dispose()


def take_in(engine: Engine, folder: Path) -> None:
    """Take in the arrivals and what stays pending, and archive what is old."""
    for bodies in ARRIVALS:
        for minute, body in enumerate(bodies):
            ledger.record(engine, [replace(ledger.delivery(body), received_at=received_at(minute))])
            ledger.fold(engine)
    ledger.record(engine, [replace(ledger.delivery(body), received_at=received_at(30)) for body in PENDING])
    for part in archive.plan(engine, before=at(T + OLD)):
        archive.archive(engine, part, before=at(T + OLD), folder=folder)


WORLDS = {"plink_l": ("acct_1", True)}


def subject(id_: str) -> Subject:
    """Return the row that is explained under *id_*, of which a prefix names the table."""
    table = "balances" if " " in id_ else TABLES_OF_PREFIX[id_.partition("_")[0]]
    account, is_live = WORLDS.get(id_, ("", False))
    return Subject(table, account, is_live, id_.partition(" ")[0], currency=id_.partition(" ")[2])


def by_event(found: Explanation) -> dict[str, dict[str, Any]]:
    """Return the columns by the event that set them and how, or by how alone; that an event told them is not named."""
    grouped: dict[str, dict[str, Any]] = defaultdict(dict)
    for each in found.columns:
        how = "" if each["how"] == "reported" else each["how"]
        grouped[f"{each['event_id'] or ''} {how}".strip()][each["column"]] = each["value"]
    return dict(grouped)


def lines(found: Explanation) -> list[tuple[str, str, str]]:
    """Return of each event the id, the verdict and the columns that it set."""
    return [(each["event_id"], each["verdict"], " ".join(each["sets"])) for each in found.timeline]


TABLES_OF_PREFIX = {
    "cn": "credit_notes",
    "cs": "orders",
    "cus": "customers",
    "in": "invoices",
    "plink": "payment_links",
    "re": "refunds",
}
KEY, NOT_TOLD = "the key", "no event reports it"
INFERRED, ARCHIVED = "inferred from the other columns", "not known: events are archived"
SHOWN: Body = {"active": False, "currency": "usd", "metadata": {"a": "1"}, "url": "https://buy.stripe.com/l"}
SHOWN_ON: Body = {**SHOWN, "active": True}
OF_A_NOTE: Body = {
    "amount": 300,
    "created": at(T + 20),
    "currency": "usd",
    "customer": "cus_n",
    "effective_at": at(T + 19),
    "invoice": "in_m",
    "memo": None,
    "number": "R-1-CN-1",
    "out_of_band_amount": None,
    "reason": "order_change",
    "refund": "re_m",
    "status": "issued",
    "type": "post_payment",
}

# By row: its columns by the event that set them, or by how else they came about.
COLUMNS: dict[str, dict[str, Body]] = {
    "plink_l": {KEY: {"id": "plink_l"}, "evt_l5": SHOWN, "evt_l1": {"created": at(T + 2)}},
    "plink_z": {KEY: {"id": "plink_z"}, "evt_z2": SHOWN_ON, NOT_TOLD: {"created": None}},
    "plink_a": {KEY: {"id": "plink_a"}, ARCHIVED: {**SHOWN_ON, "created": at(T + OLD - 20)}},
    "plink_b": {KEY: {"id": "plink_b"}, ARCHIVED: {**SHOWN_ON, "created": at(T + OLD - 10)}},
    "cs_q": {},
    "cs_o": {
        KEY: {"id": "cs_o"},
        INFERRED: {"status": "paid"},
        "evt_o1": {"completed_at": at(T + 10)},
        "evt_o2": {"client_reference_id": "cart_o", "paid_at": at(T + 400), "payment_intent": "pi_o"},
        "evt_o3": {
            "amount_discount": 250,
            "amount_shipping": 50,
            "amount_subtotal": 5200,
            "amount_tax": 4,
            "amount_total": 4004,
            "created": at(T),
            "currency": "usd",
            "customer": "cus_o",
            "customer_email": "buyer@example.com",
            "expires_at": at(T + 86_400),
            "metadata": {"shelf": "7"},
            "mode": "payment",
            "payment_status": "paid",
            "session_status": "complete",
        },
        NOT_TOLD: {
            **dict.fromkeys(("expired_at", "failed_at", "invoice", "payment_link", "presentment_amount")),
            **dict.fromkeys(("presentment_currency", "recovered_from", "recovery_url", "shipping", "subscription")),
            "lines_complete": False,
        },
    },
    "cus_c": {
        KEY: {"id": "cus_c"},
        "evt_c3": {
            "created": at(T),
            "currency": "usd",
            "deleted": True,
            "delinquent": True,
            "email": "buyer@example.com",
            "metadata": {},
            "name": "Buyer",
            "test_clock": "clock_1",
        },
    },
    "cus_d usd": {KEY: {"customer": "cus_d", "currency": "usd"}, "evt_d2": {"amount": -500}},
    # Before basil a note is wholly before or after the payment; without a balance transaction all was refunded.
    "cn_n": {
        KEY: {"id": "cn_n"},
        "evt_n2": {"voided_at": at(T + 25)},
        "evt_n3": {**OF_A_NOTE, "invoice": "in_n", "memo": "m", "refund": "re_n", "status": "void"},
        INFERRED: {"post_payment_amount": 300, "pre_payment_amount": 0, "refunded_amount": 300, "to_balance_amount": 0},
        NOT_TOLD: {"customer_balance_transaction": None, "lines_complete": False},
    },
    # 300 after the payment: 120 were refunded, so 180 went to the balance.
    "cn_m": {
        KEY: {"id": "cn_m"},
        "evt_m1": {**OF_A_NOTE, "customer_balance_transaction": "cbtxn_m"},
        "evt_m2 by its refund": {"refunded_amount": 120, "to_balance_amount": 180},
        INFERRED: {"post_payment_amount": 300, "pre_payment_amount": 0},
        NOT_TOLD: {"lines_complete": False, "voided_at": None},
    },
}


@pytest.mark.parametrize("id_", COLUMNS)
def test_every_column(explained: Engine, id_: str) -> None:
    """Each column has its value, the event that set it with its type and time, or how else it came about."""
    found = explain.explain(explained, subject(id_))

    assert by_event(found) == COLUMNS[id_]
    assert (found.row is None) == (COLUMNS[id_] == {})
    known = {each["event_id"]: each for each in map(dict, found.columns) if each["event_id"] is not None}
    assert {id_: (each["type"], each["created"]) for id_, each in known.items()} == {
        id_: sent()[id_][:2] for id_ in known
    }
    assert (found.id, found.account, found.livemode) == (id_, *WORLDS.get(id_, ("", False)))


SETTLES = "it settles the payment, which the session leaves open"
OLDER = "an older state, which evt_{} has left behind"
OF_A_LINK = " ".join(sorted(SHOWN))

# By row: its events, each with the verdict and the columns that it set.
TIMELINES: dict[str, list[tuple[str, str, str]]] = {
    "plink_l": [
        ("evt_l0", "ignored: no fold wants the type payment_link.viewed", ""),
        ("evt_l1", "it still stands, in part", "created"),
        ("evt_l2", "a tie in one second, in which evt_l3 comes after it", ""),
        ("evt_l3", "a duplicate: evt_l4 reports the same step", ""),
        ("evt_l4", "overtaken by evt_l6", ""),
        ("evt_l6", "a tie in one second, in which evt_l5 comes after it", ""),
        ("evt_l5", "it decides", OF_A_LINK),
        ("evt_l9", "pending", ""),
    ],
    "plink_z": [
        ("evt_z1", "a tie in one second, in which evt_z2 comes after it", ""),
        ("evt_z2", "it decides, by a choice between several that may be the last", OF_A_LINK),
    ],
    "plink_a": [("evt_a1", "archived", ""), ("evt_a2", "it decides; archived", "")],
    "plink_b": [
        ("evt_b1", "archived", ""),
        ("evt_b2", "at hand, beside archived ones", ""),
        ("evt_b3", "it decides; at hand, beside archived ones", ""),
        ("evt_b9", "pending", ""),
    ],
    "cs_q": [("evt_q1", "pending", "")],
    "cs_o": [
        ("obs_o4", OLDER.format("o3"), ""),
        ("evt_o1", "it still stands, in part", "completed_at"),
        ("evt_o2", "it still stands, in part", "client_reference_id paid_at payment_intent"),
        ("evt_o3", "it decides", " ".join(COLUMNS["cs_o"]["evt_o3"])),
    ],
    "cus_c": [
        ("evt_c1", OLDER.format("c3"), ""),
        ("evt_c2", OLDER.format("c3"), ""),
        ("evt_c4", OLDER.format("c3"), ""),
        ("evt_c3", "it decides", " ".join(COLUMNS["cus_c"]["evt_c3"])),
    ],
    "cus_d usd": [
        ("evt_d1", "overtaken by evt_d2", ""),
        ("evt_d2", "it decides", "amount"),
        ("evt_d3", "it reports nothing of this row", ""),
    ],
    "cn_n": [
        ("evt_n1", OLDER.format("n3"), ""),
        ("evt_n2", "it still stands, in part", "voided_at"),
        ("evt_n3", "it decides", " ".join(OF_A_NOTE)),
    ],
    "cn_m": [
        ("evt_m1", "it decides", " ".join(sorted(COLUMNS["cn_m"]["evt_m1"]))),
        (
            "evt_m2",
            "it reports the amount of the refund, which the note only names",
            "refunded_amount to_balance_amount",
        ),
    ],
    "in_i": [
        (
            "evt_i1",
            "it decides",
            "amount_due amount_paid amount_remaining created currency customer status total",
        )
    ],
    "re_n": [("evt_n4", "it decides", "amount created currency reason status")],
}
STATES = {"evt_l0": "ignored", "evt_l9": "pending", "evt_b9": "pending", "evt_q1": "pending"}


@pytest.mark.parametrize("id_", TIMELINES)
def test_every_event(explained: Engine, id_: str) -> None:
    """Each event has its verdict, what it set, and where, when and in which version it came."""
    found = explain.explain(explained, subject(id_))

    assert lines(found) == TIMELINES[id_]
    for each in found.timeline:
        type_, created, received, version = sent()[each["event_id"]]
        assert (each["type"], each["created"], each["received_at"]) == (type_, created, received)
        assert (each["api_version"], each["state"]) == (version, STATES.get(each["event_id"], "folded"))
        assert each["source"] == ("observation" if type_.startswith("payfold.") else "webhook")


# By order and minute, None for now: its status, and the event that decided it, how, and what it set.
SETTLED: dict[tuple[str, int | None], tuple[str, str, Body]] = {
    ("cs_s", 0): ("processing", "", {}),
    ("cs_s", 1): ("processing", "", {}),
    ("cs_s", 2): ("paid", "evt_s3 by its charge", {"paid_at": at(T + 900)}),
    ("cs_s", 4): ("paid", "evt_s5 by its charge", {"paid_at": at(T + 900)}),
    ("cs_s", None): ("paid", "evt_s5 by its charge", {"paid_at": at(T + 900)}),
    ("cs_t", 1): ("paid", "evt_t2 by its charge", {"paid_at": at(T + 900)}),
    ("cs_t", 2): ("paid", "evt_t3 by its charge", {"paid_at": at(T + 900)}),
    ("cs_t", 3): ("paid", "evt_t4 by its charge", {"paid_at": at(T + 900)}),
    ("cs_t", None): ("paid", "evt_t4 by its charge", {"paid_at": at(T + 900)}),
    ("cs_x", 1): ("processing", "", {}),
    ("cs_x", 2): ("failed", "evt_x3 by its charge", {"failed_at": at(T + 800)}),
    ("cs_x", 3): ("failed", "evt_x4 by its charge", {"failed_at": at(T + 800)}),
    ("cs_x", 4): ("failed", "evt_x4 by its charge", {"failed_at": at(T + 800)}),
    ("cs_x", None): ("failed", "evt_x4 by its charge", {"failed_at": at(T + 800)}),
    ("cs_k", 0): ("processing", "", {}),
    ("cs_k", 1): ("failed", "evt_k2 by its payment intent", {"failed_at": at(T + 700)}),
    ("cs_k", None): ("failed", "evt_k2 by its payment intent", {"failed_at": at(T + 700)}),
    ("cs_r", 2): ("processing", "", {}),
    ("cs_r", 3): ("failed", "evt_r4 by its refund", {"failed_at": at(T + 500)}),
    ("cs_r", None): ("failed", "evt_r4 by its refund", {"failed_at": at(T + 500)}),
    ("cs_p", 1): ("processing", "", {}),
    ("cs_p", 2): ("paid", "evt_p2 by its charge", {"paid_at": at(T + 20)}),
    ("cs_p", None): ("paid", "evt_p2 by its charge", {"paid_at": at(T + 20)}),
    # As of an earlier time an archived charge is not known.
    ("cs_v", 2): ("processing", "", {}),
    ("cs_v", None): ("paid", "evt_v3 by its charge", {"paid_at": at(T + 900)}),
}


@pytest.mark.parametrize(("id_", "minute"), SETTLED)
def test_what_another_object_settled(explained: Engine, id_: str, minute: int | None) -> None:
    """Of an order that its session leaves open the charges, refunds or intent decide, by what was received by then."""
    found = explain.explain(explained, subject(id_), as_of=None if minute is None else received_at(minute))
    status, by, moment = SETTLED[id_, minute]
    first = f"evt_{id_[-1]}1"

    assert found.row is not None
    assert (found.row["status"], found.row["event_id"]) == (status, first)
    assert by_event(found)[by or INFERRED] == {"status": status, **moment}
    assert lines(found)[1:] == ([(by[:6], SETTLES, " ".join(sorted({"status", *moment})))] if by else [])
    assert [each["event_id"] for each in found.timeline] == [first, *([by[:6]] if by else [])]


def test_a_note_before_its_refund(explained: Engine) -> None:
    """As of a time before its refund was received the parts of a note are not known."""
    before, then = (explain.explain(explained, subject("cn_m"), as_of=received_at(minute)) for minute in (0, 1))

    assert by_event(before)[NOT_TOLD] == {
        **COLUMNS["cn_m"][NOT_TOLD],
        "refunded_amount": None,
        "to_balance_amount": None,
    }
    assert lines(before) == TIMELINES["cn_m"][:1]
    assert (by_event(then), lines(then)) == (COLUMNS["cn_m"], TIMELINES["cn_m"])


def test_an_archived_row_as_of_a_time(explained: Engine) -> None:
    """Without the payloads there is no row as of an earlier time, and no event that decides."""
    found = explain.explain(explained, subject("plink_a"), as_of=received_at(59))

    assert (found.row, found.columns, found.dashboard) == (None, [], None)
    assert lines(found) == [("evt_a1", "archived", ""), ("evt_a2", "archived", "")]


def test_what_is_in_doubt(explained: Engine) -> None:
    """An explanation has the row's anomalies as they are now, and none as of a time."""
    now, then, first = (
        explain.explain(explained, subject("plink_z"), as_of=as_of) for as_of in (None, received_at(1), received_at(0))
    )

    assert now.anomalies == [
        {"kind": "ambiguous_order", "detail": {"as_of": "2023-11-14T22:13:27Z"}, "seen_at": ledger.NOW}
    ]
    assert (then.anomalies, lines(then)) == ([], TIMELINES["plink_z"])
    assert lines(first) == [("evt_z1", "it decides", OF_A_LINK)]


def test_worlds_are_apart(explained: Engine) -> None:
    """Of one id in two accounts each has its own events."""
    found = explain.explain(explained, Subject("payment_links", "acct_2", True, "plink_l"))  # noqa: FBT003 - the mode

    assert lines(found) == [("evt_w1", "it decides", "active created currency metadata url")]


DASHBOARD = {
    "plink_l": "https://dashboard.stripe.com/acct_1/payment-links/plink_l",
    "plink_z": "https://dashboard.stripe.com/test/payment-links/plink_z",
    "plink_a": "https://dashboard.stripe.com/test/payment-links/plink_a",
    "cs_o": "https://dashboard.stripe.com/test/payments/pi_o",
    "cs_q": None,
    "cs_f": None,
    "cus_c": "https://dashboard.stripe.com/test/customers/cus_c",
    "cus_d usd": "https://dashboard.stripe.com/test/customers/cus_d",
    "cn_n": "https://dashboard.stripe.com/test/invoices/in_n",
    "in_i": "https://dashboard.stripe.com/test/invoices/in_i",
    "re_n": None,
}


def test_where_stripe_shows_it(explained: Engine) -> None:
    """The Dashboard's address has the account and the mode; an order is shown by its payment, if it has one."""
    assert {id_: explain.explain(explained, subject(id_)).dashboard for id_ in DASHBOARD} == DASHBOARD


def test_what_is_behind_the_money(explained: Engine) -> None:
    """Only an order has charges and refunds behind it, those that were received by then."""
    of_order = {
        minute: explain.explain(explained, subject("cs_s"), as_of=None if minute is None else received_at(minute)).money
        for minute in (None, 0, 1)
    }

    assert {
        minute: [(each["id"], each["amount_captured"]) for each in money] for minute, money in of_order.items()
    } == {
        None: [("ch_s", 5000)],
        0: [],
        1: [("ch_s", 0)],
    }
    assert [explain.explain(explained, subject(id_)).money for id_ in ("cs_o", "cs_q", "cn_n", "plink_l")] == [[]] * 4


def test_what_no_event_is_about(explained: Engine) -> None:
    """A row without events is not found, and the time is named where one was asked for."""
    long_ago = datetime(2001, 1, 1, tzinfo=UTC)
    with pytest.raises(NotFoundError) as never:
        explain.explain(explained, subject("plink_none"))
    with pytest.raises(NotFoundError) as not_yet:
        explain.explain(explained, subject("plink_z"), as_of=long_ago)

    assert str(never.value) == "No event is about plink_none."
    assert str(not_yet.value) == "No event is about plink_z, or none had been received by 2001-01-01 00:00:00+00:00."


WAITING = """
SELECT FROM pg_locks JOIN pg_database AS d ON d.oid = database
WHERE d.datname = current_database() AND relation = 'anomalies'::regclass AND NOT granted
"""


def test_an_explanation_is_of_one_moment(explained: Engine) -> None:
    """What is committed after the events were read, and before the rest, does not show."""
    with ThreadPoolExecutor(1) as thread:
        with database.transaction(explained) as connection:
            connection.execute(text("LOCK TABLE anomalies"))
            waiting = thread.submit(explain.explain, explained, subject("plink_z"))
            while not ledger.rows(explained, WAITING):
                assert not waiting.done()
            connection.execute(text("UPDATE anomalies SET resolved_at = now() WHERE subject_id = 'plink_z'"))
        found = waiting.result()
    after = explain.explain(explained, subject("plink_z"))
    ledger.execute(explained, "UPDATE anomalies SET resolved_at = NULL WHERE subject_id = 'plink_z'")

    assert ([each["kind"] for each in found.anomalies], after.anomalies) == (["ambiguous_order"], [])
