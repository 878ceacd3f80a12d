"""Audits of lists written out by hand: lines, values that other tables explain, samples, and interruptions."""

import fcntl
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import msgspec
import pytest
from redis import Redis
from sqlalchemy import Engine

from schemas.errors import KeyRefused, StripeAway
from schemas.settings import Settings
from schemas.stripe_api import StripeApi
from tests import ledger, stripe_lists
from tests.envelopes import NEWEST, event
from tests.stripe_payments import Body, T, charge, dispute, hold, refund, session
from worker.proof import against_stripe, kinds, walks
from worker.proof.difference import Difference
from worker.proof.kinds import Listed
from worker.proof.walks import Step
from worker.stripe_jobs.rounds import JobContext

KEY: Final = "sk_test_lists"
DAY: Final = 86_400
PATHS: Final = (
    *("checkout/sessions", "payment_links", "invoices", "credit_notes", "refunds", "charges", "disputes"),
    *("invoice_payments", "customers", "billing_portal/configurations", "events"),
)


@dataclass
class Stripe:
    """A Stripe that lists given objects; it counts the calls and may answer a path with a status."""

    engine: Engine
    redis: Redis
    folder: Path
    address: str = ""
    lists: dict[str, list[Body]] = field(default_factory=lambda: {path: [] for path in PATHS})
    keys: str = KEY
    worlds: dict[str, stripe_lists.Lists] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)
    refuses: Callable[[str], int] = lambda _: 200
    now: int = T + DAY

    def door(self, path: str) -> int:
        """Count a call, and return the status of its answer."""
        self.calls.append(path)
        return self.refuses(path)

    def add(self, path: str, *objects: Body) -> None:
        """Add *objects* to Stripe's lists."""
        self.lists[path] += objects

    @property
    def context(self) -> JobContext:
        """Return a job context with the time a day after the last event."""
        settings = Settings.load(
            {
                "DATABASE_URL": self.engine.url.render_as_string(hide_password=False),
                "REDIS_URL": "redis://127.0.0.1",
                "STRIPE_API_KEY": self.keys,
                "STRIPE_API_BASE": self.address,
                "PAYFOLD_DATA_DIR": str(self.folder),
                "PAYFOLD_STRIPE_CALLS_PER_SECOND": "1000",
            }
        )
        api = StripeApi(settings, self.redis, retries_max=0)
        return JobContext(self.engine, api, settings, now=lambda: datetime.fromtimestamp(self.now, UTC))

    def audited(self, **arguments: Any) -> tuple[dict[str, Listed], list[Difference]]:  # noqa: ANN401 - as audit's own
        """Return the tallies of an audit, by the kind of object, and its differences."""
        sent = list(against_stripe.audit(self.context, **arguments))
        listed = {each.object: each for each in sent if isinstance(each, Listed)}
        return listed, [each for each in sent if isinstance(each, Difference)]

    def called(self, path: str) -> int:
        """Return the number of calls of a path."""
        return sum(call.split("?")[0] == f"/v1/{path}" for call in self.calls)


@pytest.fixture
def at(engine: Engine, redis_url: str, tmp_path: Path) -> Iterator[Stripe]:
    """Return a Stripe with empty lists."""
    with serving(engine, redis_url, tmp_path / "data") as made:
        yield made


@contextmanager
def serving(engine: Engine, redis_url: str, folder: Path) -> Iterator[Stripe]:
    """Serve a Stripe."""
    with Redis.from_url(redis_url) as redis:
        made = Stripe(engine, redis, folder)
        made.worlds[KEY] = made.lists
        with stripe_lists.serving(made.worlds, now=T + DAY, door=made.door) as address:
            made.address = address
            yield made


def named(found: Sequence[Difference]) -> list[tuple[str, str, str, str | None]]:
    """Return table, kind, id and column of each difference."""
    return sorted(((each.table, each.kind, each.id, each.column) for each in found), key=str)


def customer(number: int, /, **fields: object) -> Body:
    """Return a customer, created *number* seconds after ``T``."""
    return {
        "id": f"cus_{number:04}",
        "object": "customer",
        "balance": 0,
        "created": T + number,
        "currency": None,
        "delinquent": False,
        "email": None,
        "livemode": False,
        "metadata": {},
        "name": None,
        **fields,
    }


def sell(at: Stripe, count: int) -> list[Body]:
    """Add so many customers at Stripe, and record the event of each."""
    customers = [customer(number) for number in range(count)]
    bodies = [event(f"evt_{each['id']}", "customer.created", each["created"], each) for each in customers]
    ledger.record(at.engine, map(ledger.delivery, bodies))
    ledger.fold(at.engine)
    at.add("customers", *customers)
    return customers


# ---- Lines, and values that other tables explain ----


def test_lines(at: Stripe) -> None:
    """A line without a row and a row without a line are differences only if all lines are known."""
    line = {"id": "li_1", "object": "item", "currency": "usd", "quantity": 1, "amount_total": 5000}

    def lines(id_: str) -> Body:
        return {"object": "list", "data": [{**line, "id": id_}], "has_more": False}

    known, other = session("cs_1"), session("cs_2")
    at.add("checkout/sessions", {**known, "line_items": lines("li_2")}, {**other, "line_items": lines("li_3")})
    read = event("evt_1", "payfold.checkout.session.observed", T, {**known, "line_items": lines("li_1")})
    ledger.take_in(at.engine, read, event("evt_2", "checkout.session.completed", T, other))

    assert named(at.audited()[1]) == [
        ("order_lines", "extra", "li_1", None),
        ("order_lines", "missing", "li_2", None),
    ]


def test_more_lines_than_a_list_shows(at: Stripe) -> None:
    """Of an order or a note with more than ten lines the rest is read if possible, and counted otherwise."""

    def page(lines: Sequence[Body], *, has_more: bool) -> Body:
        return {"object": "list", "data": list(lines), "has_more": has_more}

    line = {"object": "item", "currency": "usd", "quantity": 1, "amount_total": 100}
    lines = [{**line, "id": f"li_{number:02}"} for number in range(12)]
    note = {"id": "cn_1", "object": "credit_note", "created": T, "currency": "usd", "amount": 12, "status": "issued"}
    of_note = [{"id": f"cnli_{number:02}", "object": "credit_note_line_item", "amount": 1} for number in range(12)]
    for number in (1, 2, 3):
        known = session(f"cs_{number}")
        at.add("checkout/sessions", {**known, "line_items": page(lines[:10], has_more=True)})
        under_names = [{**each, "id": f"{each['id']}_{number}"} for each in lines]
        read = {**known, "line_items": page(under_names, has_more=False)} if number < 3 else known
        kind = "payfold.checkout.session.observed" if number < 3 else "checkout.session.completed"
        ledger.take_in(at.engine, event(f"evt_{number}", kind, T, read))
    at.lists["checkout/sessions"] = [
        {
            **each,
            "line_items": page([{**one, "id": f"{one['id']}_{each['id'][-1]}"} for one in lines[:10]], has_more=True),
        }
        for each in at.lists["checkout/sessions"]
    ]
    at.lists["checkout/sessions/cs_1/line_items"] = [
        *({**each, "id": f"{each['id']}_1"} for each in lines[:11]),
        {**line, "id": "li_new"},
    ]
    at.add("credit_notes", {**note, "lines": page(of_note[:10], has_more=True)})
    at.lists["credit_notes/cn_1/lines"] = [*of_note[:11], {**of_note[11], "amount": 2}]
    whole = {**note, "lines": page(of_note, has_more=False)}
    ledger.take_in(at.engine, event("evt_note", "credit_note.created", T, whole))

    listed, found = at.audited()

    # Stripe declines to list the lines of cs_2, and those of cs_3 are not known here.
    assert named(found) == [
        ("credit_note_lines", "different", "cnli_11", "amount"),
        ("order_lines", "extra", "li_11_1", None),
        ("order_lines", "missing", "li_new", None),
    ]
    assert (listed["checkout.session"].without_lines, listed["credit_note"].without_lines) == (1, 0)
    assert [call for call in at.calls if "cs_3" in call] == []


def test_values_that_refunds_and_disputes_explain(at: Stripe) -> None:
    """A charge's dispute or failed refund is reported by no event of the charge, but explained by another table."""
    moved: tuple[tuple[Body, dict[str, object]], ...] = (
        (charge("ch_1", disputed=True), {"disputed": False}),
        (charge("ch_2", amount_refunded=0), {"amount_refunded": 1500}),
        (charge("ch_3", amount_refunded=5000, refunded=True), {"amount_refunded": 3500, "refunded": False}),
        (charge("ch_4", amount_refunded=700, disputed=True), {"amount_refunded": 0, "disputed": False}),
        # It is not documented whether the refund of a part that was captured alone is a full one.
        (
            charge("ch_5", amount_captured=1500, amount_refunded=1500, refunded=True),
            {"amount_refunded": 0, "refunded": False},
        ),
    )
    bodies = [event(f"evt_{now['id']}", "charge.updated", T + 100, {**now, **before}) for now, before in moved]
    of_others = (
        ("charge.dispute.created", dispute("du_1", charge="ch_1", payment_intent="pi_1")),
        ("refund.failed", refund("re_2", charge="ch_2", created=50, status="failed")),
        ("refund.created", refund("re_3", charge="ch_3", created=150)),
        ("refund.created", refund("re_5", charge="ch_5", created=150)),
    )
    bodies += [event(f"evt_{each['id']}", type_, T + 2000, each) for type_, each in of_others]
    ledger.take_in(at.engine, *bodies)
    at.add("charges", *(now for now, _ in moved))
    at.add("disputes", of_others[0][1])
    at.add("refunds", *(each for _, each in of_others[1:]))

    assert named(at.audited()[1]) == [
        ("charges", "different", "ch_4", "amount_refunded"),
        ("charges", "different", "ch_4", "disputed"),
    ]


def test_a_payment_that_was_captured_by_hand(at: Stripe) -> None:
    """A capture is reported by the charge and by no event of the session, so Stripe's paid session is no difference."""
    for number in range(4):
        of = {"payment_intent": f"pi_{number}"}
        ended = session(f"cs_{number}", **of)
        at.add("checkout/sessions", ended)
        at.add("charges", charge(f"ch_{number}", **of))
        unpaid = {**ended, "payment_status": "unpaid"}
        ledger.take_in(
            at.engine,
            event(f"evt_{number}_1", "checkout.session.completed", T + 10, unpaid),
            event(f"evt_{number}_2", "charge.succeeded", T + 10, hold(f"ch_{number}", **of)),
        )
        if number != 1:
            captured = charge(f"ch_{number}", **of)
            ledger.take_in(at.engine, event(f"evt_{number}_3", "charge.captured", T + 50, captured))
    at.lists["charges"][1] = hold("ch_1", payment_intent="pi_1")
    ledger.execute(at.engine, "UPDATE orders SET amount_total = 1 WHERE id = 'cs_2'")
    ledger.execute(at.engine, "UPDATE orders SET paid_at = paid_at - interval '1 day' WHERE id = 'cs_3'")

    # The hold of cs_1 was not captured, and cs_2 and cs_3 were edited by hand.
    assert named(at.audited()[1]) == [
        ("orders", "different", "cs_1", "paid_at"),
        ("orders", "different", "cs_1", "payment_status"),
        ("orders", "different", "cs_1", "status"),
        ("orders", "different", "cs_2", "amount_total"),
        ("orders", "different", "cs_3", "paid_at"),
    ]
    against_stripe.repair(at.context)
    assert at.audited()[1] == []
    statement = "SELECT amount_total, payment_status, paid_at FROM orders WHERE id <> 'cs_1' ORDER BY id"
    by_charge = (5000, "unpaid", datetime.fromtimestamp(T + 50, UTC))
    assert [tuple(row.values()) for row in ledger.rows(at.engine, statement)] == [by_charge] * 3
    assert ledger.rows(at.engine, "SELECT status, payment_status FROM orders WHERE id = 'cs_1'") == [
        {"status": "paid", "payment_status": "paid"}
    ]


def test_deleted_customers(at: Stripe) -> None:
    """A deleted customer is not listed, which is a difference only if its event is missing."""
    customers = sell(at, 3)
    at.lists["customers"][1:] = [{"id": each["id"], "object": "customer", "deleted": True} for each in customers[1:]]
    ledger.take_in(at.engine, event("evt_deleted", "customer.deleted", T + 60, customers[2]))

    listed, found = at.audited()

    assert named(found) == [("customers", "different", "cus_0001", "deleted")]
    assert listed["customer"].listed == 1
    assert [call for call in at.calls if "cus_" in call] == ["/v1/customers/cus_0001"]
    assert against_stripe.repair(at.context) == 1
    assert at.audited()[1] == []


def test_ledgers(at: Stripe) -> None:
    """A row that no ledger lists is found even if its customer has no balance; a missing ledger is counted."""

    def row(customer: int, amount: int = -500) -> Body:
        return {
            "id": f"cbtxn_{customer}",
            "object": "customer_balance_transaction",
            "amount": amount,
            "created": T,
            "currency": "usd",
            "customer": f"cus_{customer}",
            "ending_balance": amount,
            "type": "adjustment",
        }

    rows = [row(number) for number in (1, 2, 3)]
    ledger.take_in(
        at.engine,
        *(event(f"evt_{each['id']}", "payfold.customer_balance_transaction.observed", T, each) for each in rows),
    )
    for number in (1, 2):
        at.add("customers", {"id": f"cus_{number}", "object": "customer", "deleted": True})
        at.lists[f"customers/cus_{number}/balance_transactions"] = [rows[number - 1]]
    ledger.execute(
        at.engine,
        "INSERT INTO balance_transactions"
        " SELECT (jsonb_populate_record(t, jsonb_build_object('id', id || '_invented'))).*"
        " FROM balance_transactions AS t WHERE customer <> 'cus_3'",
    )
    ledger.execute(at.engine, "DELETE FROM balances WHERE customer = 'cus_2'")

    listed, found = at.audited()

    of_ledgers = [each for each in found if each.table == "balance_transactions"]
    assert named(of_ledgers) == [
        ("balance_transactions", "extra", "cbtxn_1_invented", None),
        ("balance_transactions", "extra", "cbtxn_2_invented", None),
    ]
    assert [(each.amount, each.currency) for each in of_ledgers] == [(-500, "usd")] * 2
    tally = listed["customer_balance_transaction"]
    assert (tally.listed, tally.extra, tally.unreadable) == (2, 2, 1)


def owe(at: Stripe, number: int, *seconds: int) -> None:
    """Let a customer have an entry of a ledger in each of *seconds* after ``T``, and report it and the balance."""
    id_ = f"cus_{number:04}"
    entries = [
        {
            "id": f"cbtxn_{number}_{place}",
            "object": "customer_balance_transaction",
            "amount": -100,
            "created": T + second,
            "currency": "usd",
            "customer": id_,
            "ending_balance": -100 * place,
            "type": "adjustment",
        }
        for place, second in enumerate(seconds, 1)
    ]
    at.lists[f"customers/{id_}/balance_transactions"] = list(entries)
    read = "payfold.customer_balance_transaction.observed"
    ledger.record(
        at.engine,
        [ledger.delivery(event(f"evt_{each['id']}", read, T + seconds[-1] + 1, each)) for each in entries],
    )


def asked_ledgers(at: Stripe) -> list[str]:
    """Return the customers whose ledgers were asked for since the last time."""
    asked = [call.split("/")[3] for call in at.calls if call.split("?")[0].endswith("/balance_transactions")]
    at.calls.clear()
    return asked


def test_a_sample_of_ledgers(at: Stripe) -> None:
    """Of too many ledgers those that moved last and some others are looked at, by the seed, with or without a break."""
    for number in range(40):
        owe(at, number, number)
    ledger.fold(at.engine)
    ledger.execute(at.engine, "UPDATE balance_transactions SET amount = 1 WHERE id = 'cbtxn_39_1'")

    listed, found = at.audited(ledgers_max=10, seed=1)
    asked = asked_ledgers(at)

    tally = listed["customer_balance_transaction"]
    assert (len(asked), tally.sampled, tally.sampled_of, tally.listed) == (10, 10, 40, 10)
    assert {f"cus_{number:04}" for number in range(35, 40)} < set(asked)
    assert named(found) == [("balance_transactions", "different", "cbtxn_39_1", "amount")]
    at.refuses = lambda path: 503 if asked[6] in path else 200
    with pytest.raises(StripeAway):
        at.audited(ledgers_max=10, seed=1)
    at.refuses, at.calls = (lambda _: 200), []
    assert (at.audited(ledgers_max=10, seed=1)[0]["customer_balance_transaction"], asked_ledgers(at)) == (
        tally,
        asked[6:],
    )
    assert any(at.audited(ledgers_max=10, seed=seed) and asked_ledgers(at) != asked for seed in range(2, 5))
    assert at.audited(ledgers_max=40)[0]["customer_balance_transaction"].sampled_of == 0


def test_ledgers_since(at: Stripe) -> None:
    """Only ledgers that moved since are asked for, and only their newer entries count."""
    owe(at, 1, 10, 20)
    owe(at, 2, 10, 600, 700)
    ledger.fold(at.engine)
    ledger.execute(at.engine, "UPDATE balance_transactions SET amount = 1 WHERE id IN ('cbtxn_2_1', 'cbtxn_2_3')")
    at.lists["customers/cus_0002/balance_transactions"].pop(1)
    at.lists["customers/cus_0002/balance_transactions"].insert(
        1, {**at.lists["customers/cus_0002/balance_transactions"][1], "id": "cbtxn_new", "created": T + 650}
    )

    listed, found = at.audited(since=datetime.fromtimestamp(T + 400, UTC))

    assert asked_ledgers(at) == ["cus_0002"]
    assert listed["customer_balance_transaction"].listed == 2
    assert [each for each in named(found) if each[0] == "balance_transactions"] == [
        ("balance_transactions", "different", "cbtxn_2_3", "amount"),
        ("balance_transactions", "extra", "cbtxn_2_2", None),
        ("balance_transactions", "missing", "cbtxn_new", None),
    ]


def test_payments_before_basil(at: Stripe) -> None:
    """Stripe lists the payment of an old invoice under an id of its own, which is no missing row."""
    invoice = {
        "id": "in_1",
        "object": "invoice",
        "amount_paid": 500,
        "charge": "ch_1",
        "created": T,
        "currency": "usd",
        "payment_intent": "pi_1",
        "status": "paid",
        "status_transitions": {"paid_at": T},
    }
    ledger.take_in(at.engine, event("evt_1", "invoice.paid", T, invoice, version="2024-06-20"))
    payment = {"object": "invoice_payment", "created": T, "status": "paid", "amount_paid": 500, "currency": "usd"}
    at.add("invoices", invoice)
    at.add("invoice_payments", {**payment, "id": "inpay_1", "invoice": "in_1"})
    at.add("invoice_payments", {**payment, "id": "inpay_2", "invoice": "in_2"})

    assert named(at.audited()[1]) == [("invoice_payments", "missing", "inpay_2", None)]


def test_an_older_api_version(at: Stripe) -> None:
    """A null in a field that the endpoint's old version lacks is no difference; an edited null is one."""
    invoice = {"id": "in_1", "object": "invoice", "created": T, "currency": "usd", "status": "open", "total": 500}
    configuration = {"id": "bpc_1", "object": "billing_portal.configuration", "created": T, "updated": T}
    features = {"invoice_history": {"enabled": True}}
    ledger.take_in(
        at.engine,
        event("evt_1", "invoice.finalized", T, invoice, version="2022-11-15"),
        event("evt_2", "invoice.finalized", T, {**invoice, "id": "in_2"}, version="2022-11-15"),
        event("evt_3", "invoice.finalized", T, {**invoice, "id": "in_3"}),
        event(
            "evt_4",
            "billing_portal.configuration.created",
            T,
            {**configuration, "features": features},
            version="2022-11-15",
        ),
    )
    for number in (1, 2, 3):
        at.add("invoices", {**invoice, "id": f"in_{number}", "amount_overpaid": 0})
    newer = {"invoice_history": {"enabled": True, "of": "all"}, "cart": {"enabled": False}}
    at.add("billing_portal/configurations", {**configuration, "features": newer})
    ledger.execute(at.engine, "UPDATE invoices SET total = NULL WHERE id = 'in_2'")

    listed, found = at.audited()

    # Events of the newest version have the field, so the same null is a difference.
    assert named(found) == [
        ("invoices", "different", "in_2", "total"),
        ("invoices", "different", "in_3", "amount_overpaid"),
    ]
    assert (listed["invoice"].unstated, listed["billing_portal.configuration"].unstated) == (2, 1)


def test_columns_derived_from_fields_that_an_old_version_lacks(at: Stripe) -> None:
    """A session of 2019 has no payment status, so the status and the paid_at of its order are unknown too."""
    old = session("cs_1")
    del old["status"], old["payment_status"]
    ledger.take_in(
        at.engine,
        *(
            event(f"evt_{number}", "checkout.session.completed", T, {**body, "id": f"cs_{number}"}, version=version)
            for number, body, version in (
                (1, old, "2019-11-05"),
                (2, old, "2019-11-05"),
                (3, session(), "2022-11-15"),
            )
        ),
    )
    at.add("checkout/sessions", *(session(f"cs_{number}") for number in (1, 2, 3)))
    ledger.execute(at.engine, "UPDATE orders SET completed_at = NULL WHERE id = 'cs_2'")
    ledger.execute(at.engine, "UPDATE orders SET status = NULL, paid_at = NULL WHERE id = 'cs_3'")

    # The event's type reports that the session is complete; the other null was edited by hand.
    assert named(at.audited()[1]) == [
        ("orders", "different", "cs_2", "completed_at"),
        ("orders", "different", "cs_3", "paid_at"),
        ("orders", "different", "cs_3", "status"),
    ]


def test_a_repair_of_a_session_of_2019(at: Stripe) -> None:
    """A repair records what Stripe lists now, years later; the order was paid when its charge was captured."""
    old = session("cs_1")
    for name in ("status", "payment_status"):
        del old[name]
    ledger.take_in(
        at.engine,
        event("evt_1", "checkout.session.completed", T + 5, old, version="2019-11-05"),
        event("evt_2", "charge.succeeded", T + 3, charge("ch_1"), version="2019-11-05"),
    )
    read = session("cs_1", client_reference_id="never reported")
    at.add("checkout/sessions", read)
    at.add("charges", charge("ch_1"))
    ledger.take_in(at.engine, event("obs_1", "payfold.checkout.session.observed", T + DAY - 999, read))

    against_stripe.repair(at.context)

    statement = "SELECT status, paid_at, completed_at, client_reference_id FROM orders"
    assert [tuple(row.values()) for row in ledger.rows(at.engine, statement)] == [
        ("paid", datetime.fromtimestamp(T + 3, UTC), datetime.fromtimestamp(T + 5, UTC), "never reported")
    ]
    assert at.audited()[1] == []


def test_features_that_were_removed(at: Stripe) -> None:
    """Only the features that both versions have are compared: pausing was removed 2024-04-10 and is back in 2026."""
    pause, portal = {"enabled": True}, {"object": "billing_portal.configuration", "created": T, "updated": T}
    newer = {"enabled": False, "duration": {"type": "indefinite"}}
    then, now = (
        {"invoice_history": {"enabled": True}},
        {"invoice_history": {"enabled": True}, "cart": {"enabled": False}},
    )
    cases: dict[str, tuple[str, Body, Body]] = {
        "bpc_1": ("2023-10-16", {**then, "subscription_pause": pause}, now),
        "bpc_2": ("2023-10-16", {**then, "subscription_pause": pause}, {**now, "subscription_pause": newer}),
        # Differences: a common feature differs, a feature that was never removed is gone, or both versions have all.
        "bpc_3": ("2023-10-16", {"invoice_history": {"enabled": False}, "subscription_pause": pause}, now),
        "bpc_4": ("2023-10-16", {**then, "customer_update": {"enabled": True}}, now),
        "bpc_5": (NEWEST, {**now, "subscription_pause": pause}, now),
    }
    for id_, (version, before, features) in cases.items():
        body = {**portal, "id": id_, "features": before}
        ledger.take_in(at.engine, event(f"evt_{id_}", "billing_portal.configuration.created", T, body, version=version))
        at.add("billing_portal/configurations", {**portal, "id": id_, "features": features})

    assert named(at.audited()[1]) == [
        ("portal_configurations", "different", id_, "features") for id_ in ("bpc_3", "bpc_4", "bpc_5")
    ]


# ---- On its way ----


def test_young_objects(at: Stripe) -> None:
    """Objects younger than an event or a poll may take are no difference; those that a test clock dates later are."""
    now = T + DAY
    # Open sessions are polled every 120 seconds.
    for number, age in enumerate((0, 170, 200, -DAY)):
        at.add("checkout/sessions", session(f"cs_open_{number}", created=now - age, status="open", mode="payment"))
    for number, age in enumerate((0, 50, 80, -DAY)):
        at.add("checkout/sessions", session(f"cs_paid_{number}", created=now - age))
        at.add("charges", charge(f"ch_{number}", created=now - age))

    assert named(at.audited()[1]) == [
        *(("charges", "missing", f"ch_{number}", None) for number in (2, 3)),
        *(("orders", "missing", f"cs_open_{number}", None) for number in (2, 3)),
        *(("orders", "missing", f"cs_paid_{number}", None) for number in (2, 3)),
    ]


def test_objects_with_young_events(at: Stripe) -> None:
    """An object with an event of the last minute at Stripe is no difference yet; older events are missing."""
    intents = [{"payment_intent": f"pi_{number}"} for number in range(5)]
    held = {**session("cs_3", **intents[3]), "payment_status": "unpaid"}
    opened = session("cs_4", **intents[4], status="open", payment_status="unpaid")
    ledger.take_in(
        at.engine,
        *(event(f"evt_{n}", "charge.succeeded", T + 9, charge(f"ch_{n}", **intents[n])) for n in range(3)),
        event("evt_3", "charge.succeeded", T + 9, hold("ch_3", **intents[3])),
        event("evt_3_1", "checkout.session.completed", T + 9, held),
        event("evt_4", "payfold.checkout.session.observed", T + 9, opened),
    )
    now = T + DAY
    refunded = [charge(f"ch_{number}", **intents[number], amount_refunded=1500) for number in range(3)]
    captured, paid, completed = (
        charge("ch_3", **intents[3]),
        session("cs_3", **intents[3]),
        session("cs_4", **intents[4]),
    )
    at.add("charges", *refunded, captured)
    at.add("checkout/sessions", paid, completed)
    at.add(
        "events",
        *(
            msgspec.json.decode(each)
            for each in (
                event("evt_0_2", "charge.refunded", now - 1, refunded[0]),
                event("evt_1_2", "charge.refunded", now - 90, refunded[1]),
                event("evt_3_2", "charge.captured", now - 1, captured),
                event("evt_4_2", "checkout.session.completed", now - 1, completed),
            )
        ),
    )
    never_came = [("charges", "different", f"ch_{number}", "amount_refunded") for number in (1, 2)]

    assert named(at.audited()[1]) == never_came
    # Without the right to list events, every difference is reported.
    at.refuses = lambda path: 403 if "/v1/events" in path else 200
    assert {each.id for each in at.audited()[1]} == {"ch_0", "ch_1", "ch_2", "ch_3", "cs_3", "cs_4"}
    at.refuses = lambda _: 200
    assert against_stripe.repair(at.context) == len(never_came)
    assert at.audited()[1] == []
    assert [
        row["id"] for row in ledger.rows(at.engine, "SELECT id FROM charges WHERE amount_refunded > 0 ORDER BY id")
    ] == ["ch_1", "ch_2"]


def test_an_entry_of_a_ledger_never_changes(at: Stripe) -> None:
    """A ledger that differs needs no call for events: each change of it is a new entry, with its own time."""
    owner = customer(1, balance=-500, currency="usd")
    entry = {
        "id": "cbtxn_1",
        "object": "customer_balance_transaction",
        "amount": -500,
        "created": T + 1,
        "currency": "usd",
        "customer": owner["id"],
        "ending_balance": -500,
        "livemode": False,
        "type": "adjustment",
    }
    ledger.take_in(at.engine, event("evt_1", "customer.created", T + 1, owner))
    at.add("customers", owner)
    spent = {**entry, "id": "cbtxn_2", "amount": 100, "ending_balance": -400, "created": T + DAY - 1}
    at.lists[f"customers/{owner['id']}/balance_transactions"] = [entry, spent]

    assert named(at.audited()[1]) == [("balance_transactions", "missing", "cbtxn_1", None)]
    assert at.called("events") == 0


# ---- Partial audits ----


def test_since(at: Stripe) -> None:
    """Only objects created since are listed; an older charge that changed since is not read by its id."""
    old, new, edited = charge("ch_1", created=T), charge("ch_2", created=T + 500), charge("ch_3", created=T + 600)
    ledger.take_in(
        at.engine,
        event("evt_1", "charge.succeeded", T, old),
        event("evt_2", "charge.updated", T + 700, old),
        event("evt_3", "charge.succeeded", T + 500, new),
        event("evt_4", "charge.succeeded", T + 600, edited),
    )
    at.add("charges", {**old, "amount": 1}, new, {**edited, "amount": 1})

    listed, found = at.audited(since=datetime.fromtimestamp(T + 400, UTC))

    assert listed["charge"].listed == 2
    assert named(found) == [("charges", "different", "ch_3", "amount")]
    assert not any("/charges/" in call for call in at.calls)


def test_a_sample_of_customers(at: Stripe) -> None:
    """Of too many customers the newest and a random sample are audited; the tally counts both, a seed chooses."""
    customers = sell(at, 900)
    ledger.execute(at.engine, "UPDATE customers SET name = 'edited' WHERE id = 'cus_0899'")

    def sampled(seed: int) -> tuple[Listed, list[Difference], list[str]]:
        at.calls.clear()
        listed, found = at.audited(customers_max=400, seed=seed)
        return listed["customer"], found, [call for call in at.calls if "/customers" in call]

    tally, found, calls = sampled(1)
    assert named(found) == [("customers", "different", "cus_0899", "name")]
    assert tally.sampled_of == len(customers)
    assert tally.listed <= 400
    assert len(calls) == 4
    assert sampled(1)[2] == calls
    assert any(sampled(seed)[2] != calls for seed in range(2, 5))
    assert at.audited(customers_max=900)[0]["customer"].sampled_of == 0


def test_a_kind_that_the_key_may_not_list(at: Stripe) -> None:
    """A restricted key is enough to compare the kinds that it may list; a key that may list nothing is refused."""
    sell(at, 1)
    at.refuses = lambda path: 403 if "/v1/charges" in path else 200

    listed, found = at.audited()

    assert (listed["charge"].is_forbidden, listed["customer"].listed, found) == (True, 1, [])
    at.refuses = lambda _: 403
    with pytest.raises(KeyRefused, match="403"):
        at.audited()


def test_a_restricted_key_without_sessions(at: Stripe) -> None:
    """A key that may not list sessions can still list the kinds that come later."""
    sell(at, 1)
    at.refuses = lambda path: 403 if "/v1/checkout" in path or "/v1/payment_links" in path else 200

    listed, found = at.audited()

    assert [kind for kind, tally in listed.items() if tally.is_forbidden] == ["checkout.session", "payment_link"]
    assert (next(iter(listed)), listed["customer"].listed, found) == ("checkout.session", 1, [])


@pytest.mark.parametrize(
    ("keys", "reason"),
    [(KEY, "The unlabelled key has no access to acct_1"), (f"acct_1=sk_test_revoked,{KEY}", "Stripe answered 401")],
)
def test_a_world_without_access(at: Stripe, keys: str, reason: str) -> None:
    """A disconnected account or a revoked key of one account does not stop the audit of other accounts."""
    at.keys = keys
    sell(at, 1)
    ledger.execute(at.engine, "UPDATE customers SET name = 'edited'")
    ledger.take_in(at.engine, event("evt_2", "charge.succeeded", T, charge("ch_1")), account="acct_1")

    sent = list(against_stripe.audit(at.context))

    (refused,) = [each for each in sent if isinstance(each, Listed) and each.account == "acct_1"]
    assert refused.object == kinds.REFUSED
    assert reason in refused.reason
    assert named([each for each in sent if isinstance(each, Difference)]) == [
        ("customers", "different", "cus_0000", "name")
    ]
    assert list(at.folder.glob("*")) == []
    at.worlds.clear()
    with pytest.raises(KeyRefused, match="401"):
        at.audited()


def test_a_key_of_another_sandbox(at: Stripe) -> None:
    """If Stripe knows none of our sessions, repeated repairs record none of them as missing."""
    ledger.take_in(at.engine, event("evt_1", "checkout.session.completed", T, session("cs_1")))
    at.add("checkout/sessions", session("cs_other"), session("cs_\0"), session("cs_\ud800"))
    at.refuses = lambda path: 503 if "/v1/billing_portal" in path else 200
    with pytest.raises(StripeAway):
        at.audited()
    at.refuses = lambda _: 200
    assert at.audited()[0]["checkout.session"].reason == kinds.ANOTHER_SANDBOX

    for _ in range(2):
        against_stripe.repair(at.context)
    listed, found = at.audited()

    assert named(found) == [("orders", "extra", "cs_1", None)]
    assert "another account or sandbox" in listed["checkout.session"].reason
    assert ledger.rows(at.engine, "SELECT FROM inbox WHERE type = 'payfold.checkout.session.missing'") == []

    at.add("checkout/sessions", session("cs_2"))
    ledger.take_in(at.engine, event("evt_2", "checkout.session.completed", T, session("cs_2")))
    against_stripe.repair(at.context)
    assert at.audited()[0]["checkout.session"].reason == ""
    assert ledger.rows(at.engine, "SELECT object_id FROM inbox WHERE type = 'payfold.checkout.session.missing'") == [
        {"object_id": "cs_1"}
    ]


# ---- Interrupted ----


def test_an_interrupted_audit_continues(at: Stripe) -> None:
    """After an interruption at any call, an audit repeats only pages with differences, and finds the same."""
    sell(at, 250)
    ledger.execute(at.engine, "UPDATE customers SET name = 'edited' WHERE id IN ('cus_0240', 'cus_0100', 'cus_0002')")
    ledger.execute(at.engine, "DELETE FROM customers WHERE id = 'cus_0150'")
    ledger.take_in(at.engine, event("evt_gone", "customer.created", T + 120, customer(120, id="cus_gone")))
    expected = at.audited()
    in_one = sorted(at.calls)
    assert len(expected[1]) == 5

    for number in range(len(in_one)):
        at.calls.clear()
        at.refuses = lambda _, number=number: 503 if len(at.calls) == number + 1 else 200  # type: ignore[misc]
        with pytest.raises(StripeAway):
            at.audited()
        at.refuses = lambda _: 200
        listed, found = at.audited()

        assert (number, listed, named(found)) == (number, expected[0], named(expected[1]))
        assert not Counter(in_one) - Counter(at.calls)
        assert all(
            "/customers" in call or call.startswith("/v1/events")
            for call in again(at.calls, [*in_one, at.calls[number]])
        )
        assert list(at.folder.glob("*")) == []


def again(calls: Sequence[str], expected: Sequence[str]) -> list[str]:
    """Return the *calls* that were not *expected*."""
    return list((Counter(calls) - Counter(expected)).elements())


def test_differences_repaired_during_an_interruption(at: Stripe) -> None:
    """Pages, rows and ledgers with differences before an interruption are audited again after each interruption."""
    customers = sell(at, 150)
    ledger.take_in(at.engine, event("evt_gone", "customer.created", T + 9, customer(9, id="cus_gone")))
    ledger.take_in(at.engine, event("evt_other", "customer.created", T + 8, customer(8, id="cus_other")))
    ledger.execute(at.engine, "UPDATE customers SET name = 'edited' WHERE id IN ('cus_0140', 'cus_0120')")

    def interrupt() -> None:
        at.refuses = lambda path: 503 if "/v1/billing_portal" in path else 200
        with pytest.raises(StripeAway):
            at.audited()
        at.refuses = lambda _: 200

    interrupt()
    ledger.execute(at.engine, "UPDATE customers SET name = NULL WHERE id = 'cus_0140'")
    at.add("customers", customer(9, id="cus_gone"), customer(DAY - 600, id="cus_new"))
    # So the first page has one more object at its top, and one less at its end.
    at.lists["customers"].remove(customers[60])
    at.add("customers", {**customers[60], "deleted": True})
    interrupt()
    at.calls.clear()

    listed, found = at.audited()

    assert named(found) == [
        ("customers", "different", "cus_0060", "deleted"),
        ("customers", "different", "cus_0120", "name"),
        ("customers", "extra", "cus_other", None),
    ]
    assert (listed["customer"].different, listed["customer"].extra, listed["customer"].listed) == (2, 1, 150)
    assert len(at.calls) < 10


def delete(at: Stripe, *numbers: int) -> None:
    """Delete some customers at Stripe."""
    for index, each in enumerate(at.lists["customers"]):
        if each["created"] - T in numbers:
            at.lists["customers"][index] = {**each, "deleted": True}


def test_the_last_object_of_a_page_is_deleted(at: Stripe) -> None:
    """A list continues after the last object of a page that still exists, and no object is listed twice."""
    sell(at, 250)

    def door(path: str) -> int:
        if "starting_after=cus_0150" in path:
            delete(at, 150, 151)
        return 200

    at.refuses = door
    listed, found = at.audited()

    assert (listed["customer"].listed, found) == (250, [])
    assert [call[-8:] for call in at.calls if "/customers" in call] == [
        *("imit=100", "cus_0150", "cus_0151", "cus_0152", "cus_0050"),
    ]


@pytest.mark.parametrize("is_interrupted", [True, False])
def test_a_page_that_is_deleted(at: Stripe, *, is_interrupted: bool) -> None:
    """If all objects of a page are deleted, the list is read from its top, and counted and reported once."""
    customers = sell(at, 250)
    ledger.execute(at.engine, "UPDATE customers SET name = 'edited' WHERE id IN ('cus_0149', 'cus_0200')")

    def door(path: str) -> int:
        if "starting_after=cus_0050" in path:
            delete(at, *range(50, 150))
            bodies = [event(f"evt_{each['id']}_gone", "customer.deleted", T + 900, each) for each in customers[50:150]]
            ledger.record(at.engine, map(ledger.delivery, bodies))
            ledger.fold(at.engine)
            at.refuses = lambda path: 503 if is_interrupted and "starting_after=cus_0050" in path else 200
        return at.refuses(path) if at.refuses is not door else 200

    at.refuses = door
    if is_interrupted:
        with pytest.raises(StripeAway):
            at.audited()
        at.refuses = lambda _: 200
    listed, found = at.audited()

    names = [("customers", "different", "cus_0200", "name")]
    assert named(found) == [*([] if is_interrupted else [("customers", "different", "cus_0149", "name")]), *names]
    assert (listed["customer"].listed, listed["customer"].different) == (150, 1)
    at.calls.clear()
    assert at.audited()[0] == listed


def test_a_list_that_loses_its_pages_twice(at: Stripe) -> None:
    """A list that begins again once is not followed a second time: it is cut short, and the other kinds go on."""
    customers = sell(at, 350)
    ledger.take_in(at.engine, event("evt_gone", "customer.created", T - 60, customer(-60, id="cus_gone")))
    ledger.execute(at.engine, "UPDATE customers SET name = 'edited' WHERE id = 'cus_0000'")

    def door(path: str) -> int:
        for end in (250, 150):
            if f"starting_after=cus_{end:04}" in path and customers[end]["id"] in {
                each["id"] for each in at.lists["customers"] if not each.get("deleted")
            }:
                delete(at, *range(end, end + 100))
        return 200

    at.refuses = door
    listed, found = at.audited()

    tally = listed["customer"]
    assert (tally.listed, tally.cut_short) == (100, 1)
    # Older rows are not asked for one by one, and no row that was not looked at is reported.
    assert named(found) == []
    assert not any("/customers/cus_" in call for call in at.calls if "balance" not in call)
    assert "billing_portal.configuration" in listed
    assert "declined" in tally.reason


def test_a_page_without_ids(at: Stripe) -> None:
    """Behind a page on which nothing has an id a list cannot be followed: that is named, and other kinds are listed."""
    customers = sell(at, 150)
    for each in customers[50:]:
        ledger.execute(at.engine, "UPDATE customers SET name = 'edited' WHERE id = :id", id=each["id"])
    at.add("charges", *(charge(f"ch_{number}", created=T + number) for number in range(150)))
    at.lists["charges"] = [{**each, "id": None} for each in at.lists["charges"]]

    listed, found = at.audited()

    tally = listed["charge"]
    assert (tally.listed, tally.unreadable, tally.cut_short) == (100, 100, 1)
    assert listed["customer"].different == len(found) == 100
    assert listed["customer"].cut_short == 0


def test_a_sample_page_after_an_interruption(at: Stripe) -> None:
    """Pages of a sample are the same after an interruption, and those on which something differed are read again."""
    sell(at, 900)
    ledger.execute(at.engine, "UPDATE customers SET name = 'edited' WHERE id < 'cus_0650'")
    expected = at.audited(customers_max=400, seed=1)
    pages = [call for call in at.calls if "/customers?" in call]
    assert len(pages) == 4
    for broken in pages[2:]:
        at.calls.clear()
        at.refuses = lambda path, broken=broken: 503 if path == broken else 200  # type: ignore[misc]
        with pytest.raises(StripeAway):
            at.audited(customers_max=400, seed=1)
        at.refuses = lambda _: 200

        listed, found = at.audited(customers_max=400, seed=1)

        assert (listed, named(found)) == (expected[0], named(expected[1]))
        asked = Counter(call for call in at.calls if "/customers?" in call)
        expected_calls = Counter(pages)
        # Something differed on the sample pages only.
        expected_calls.update({broken: 1, **dict.fromkeys(pages[2 : pages.index(broken)], 1)})
        assert asked == expected_calls


def test_other_keys_begin_another_audit(at: Stripe) -> None:
    """An audit does not continue one of another key or another Stripe, and no key is written to disk."""
    sell(at, 1)
    ledger.execute(at.engine, "UPDATE customers SET name = 'edited'")
    kept = interrupted(at)
    assert KEY not in kept.name + kept.read_text()
    at.keys = "sk_test_other"
    at.worlds["sk_test_other"] = {**at.lists, "customers": []}
    assert [each.kind for each in at.audited()[1]] == ["extra"]
    at.keys, at.address = KEY, at.address.replace("127.0.0.1", "localhost")
    at.calls.clear()
    at.audited()
    assert (at.called("charges"), kept.exists()) == (1, True)


def test_an_audit_that_is_closed(at: Stripe) -> None:
    """Differences found before Ctrl-C are kept, even with a broken last line; other arguments begin another audit."""
    sell(at, 250)
    ledger.execute(at.engine, "UPDATE customers SET name = 'edited' WHERE id = 'cus_0240'")
    kept = interrupted(at)
    assert kept.stat().st_mode & 0o777 == 0o600
    kept.write_bytes(kept.read_bytes() + b'{"account":"')

    at.calls.clear()
    at.audited(seed=7)
    assert at.called("customers") == 3
    at.calls.clear()
    _, found = at.audited()
    assert (at.called("customers"), at.called("charges")) == (3, 0)
    assert named(found) == [("customers", "different", "cus_0240", "name")]
    assert not kept.exists()


def interrupted(at: Stripe) -> Path:
    """Interrupt an audit at its first difference, and return the file with its state."""
    with closing(against_stripe.audit(at.context)) as begun:
        next(each for each in begun if isinstance(each, Difference))
    (kept,) = at.folder.glob("*")
    return kept


def test_an_audit_of_yesterday(at: Stripe) -> None:
    """After a day an audit begins again; without a usable state file it runs from the start."""
    sell(at, 250)
    ledger.execute(at.engine, "UPDATE customers SET name = 'edited' WHERE id = 'cus_0240'")
    kept = interrupted(at)
    at.now += 2 * DAY
    at.calls.clear()
    at.audited()
    assert (at.called("customers"), kept.exists()) == (3, False)

    kept = interrupted(at)
    with kept.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        at.calls.clear()
        assert len(at.audited()[1]) == 1
    assert (at.called("customers"), kept.exists()) == (3, True)

    kept.unlink()
    at.folder.rmdir()
    at.folder.touch()
    assert len(at.audited()[1]) == 1


def test_a_day_from_the_last_step(at: Stripe) -> None:
    """An audit can be continued within a day of its last page, however long it took, and yields each page at once."""
    sell(at, 250)
    ledger.execute(at.engine, "UPDATE customers SET name = 'edited' WHERE id IN ('cus_0240', 'cus_0010')")
    shown: list[tuple[str, int]] = []

    def audit() -> Iterator[Listed | Difference]:
        return against_stripe.audit(at.context, progress=lambda name, done, _: shown.append((name, done)))

    for expected in ("cus_0240", "cus_0010"):
        with closing(audit()) as begun:  # type: ignore[type-var]  # a generator
            assert any(isinstance(each, Difference) and each.id == expected for each in begun)
        at.now += DAY - 3600

    at.calls.clear()
    assert len([each for each in audit() if isinstance(each, Difference)]) == 2
    assert at.called("charges") == 0
    rows = [done for name, done in shown if name == "Objects listed"]
    assert rows[:3] == [100, 100, 200]
    assert rows[-3:] == [100, 200, 250]


def test_a_disk_that_is_full(tmp_path: Path) -> None:
    """If the state cannot be written, the audit runs without it and does not fail."""
    now = datetime.fromtimestamp(T, UTC)
    kept = walks.opened(tmp_path, [1], seed=1, now=now)
    kept.path.symlink_to("/dev/full")
    kept.add(Step("acct_1", livemode=False, kind="charge", tally={}), [], now=now)

    kept.write()
    assert not kept.is_kept
    kept.add(Step("acct_1", livemode=False, kind="refund", tally={}), [], now=now)
    kept.write()
    kept.end()

    assert list(tmp_path.glob("*")) == []
