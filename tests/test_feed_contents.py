"""What the change feed holds: its kinds and subjects are the declared ones, and each change has what one acts on."""

from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from sqlalchemy import Engine

from deploy.sandbox.account import Account
from deploy.sandbox.history import shop_history
from deploy.services import Services
from schemas import database, observations
from schemas.kinds import CHOICES, KINDS, SUBJECTS, chosen
from schemas.own_events import SESSION_OBSERVED, SESSION_REGISTERED
from schemas.tables import ONE_SHOT_KINDS
from tests import ledger
from tests.web import migrated_database

Change = dict[str, Any]


@pytest.fixture(scope="module")
def shop() -> Account:
    """Return a shop that had everything happen to it."""
    return shop_history(seed=61, orders=80, money=True)


@pytest.fixture(scope="module")
def engine(services: Services, shop: Account) -> Iterator[Engine]:
    """Return a database into which all of it was folded, shared by the tests, which leave nothing behind."""
    with migrated_database(services) as database_url:
        engine = database.engine(database_url)
        opened = shop.session(shop.open_session())
        registered = observations.observe(
            SESSION_REGISTERED, opened, account="", livemode=False, created=shop.now, now=ledger.NOW
        )
        invoice = shop.create_invoice(shop.create_customer(currency="usd"), 2_000)
        shop.finalize_invoice(invoice)
        note = shop.issue_credit_note(invoice, 500)
        ledger.record(engine, [*(ledger.delivery(event.body) for event in shop.events), registered])
        # In small batches, so that what opens has a change before it closes.
        ledger.fold(engine, limit=8)
        known = len(shop.events)
        shop.void_credit_note(note)
        (link,) = ledger.rows(engine, "SELECT id FROM payment_links WHERE active LIMIT 1")
        shop.update_payment_link(link["id"], active=False)
        # What was registered turns out to cost less than the page that is open by now.
        cheaper = {**opened, "amount_total": opened["amount_total"] - 1}
        observed = observations.observe(
            SESSION_OBSERVED, cheaper, account="", livemode=False, created=shop.now + 1, now=ledger.NOW
        )
        ledger.record(engine, [observed])
        ledger.take_in(engine, *(event.body for event in shop.events[known:]))
        yield engine
        engine.dispose()


def changes(engine: Engine, kind: str = "") -> list[Change]:
    """Return the changes whose kind begins so."""
    return ledger.rows(engine, "SELECT * FROM changes WHERE kind LIKE :kind || '%' ORDER BY seq", kind=kind)


def test_folds_make_no_other_kind(engine: Engine) -> None:
    """The declared kinds and subjects are those that a shop's history makes."""
    found = changes(engine)

    assert {change["kind"] for change in found} == set(KINDS)
    assert {change["subject"] for change in found} == set(SUBJECTS)
    assert all(change["kind"].startswith(f"{change['subject']}.") for change in found)
    assert set(ONE_SHOT_KINDS) < set(KINDS)


def test_a_star_stands_for_every_kind_of_a_subject() -> None:
    """Each subject has one, and it covers the subject's kinds and no other."""
    assert set(CHOICES) == set(KINDS) | {f"{subject}.*" for subject in SUBJECTS}
    assert chosen(["dispute.*", "order.paid"]) == {"dispute.opened", "dispute.closed", "order.paid"}


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("balance.", {"currency", "amount"}),
        ("credit_note.", {"currency", "amount", "refunded_amount", "to_balance_amount", "invoice", "customer"}),
        ("dispute.", {"status", "currency", "amount", "charge", "payment_intent", "reason"}),
        ("invoice.", {"status", "currency", "total", "amount_paid", "customer", "subscription"}),
        ("order.", {"status", "currency", "amount_total", "client_reference_id", "payment_link", "payment_intent"}),
        ("payment_link.", {"active", "currency"}),
    ],
)
def test_each_change_has_its_money_and_what_it_belongs_to(engine: Engine, kind: str, names: set[str]) -> None:
    """Amounts have a currency, and the ids lead to what the change is about, before as after."""
    found = changes(engine, kind)

    assert found
    for change in found:
        assert names <= change["after"].keys(), change["kind"]
        assert change["before"] is None or change["before"].keys() == change["after"].keys() - {"lines"}


def test_a_change_tells_what_the_table_does(engine: Engine) -> None:
    """The order.paid of an order has the values of its row; a charge may pay it before its session does."""
    for change in changes(engine, "order.paid"):
        later = ("payment_status", "invoice") if change["after"]["payment_status"] == "unpaid" else ()
        held = {name: value for name, value in change["after"].items() if name not in ("lines", "status", *later)}
        (row,) = ledger.rows(engine, "SELECT * FROM orders WHERE id = :id", id=change["subject_id"])
        assert held == {name: row[name] for name in held}


def test_no_change_is_personal(engine: Engine) -> None:
    """No email, no name, no metadata and no description of the history is in any change."""
    personal = ledger.rows(
        engine,
        """
        SELECT customer_email AS held FROM orders UNION SELECT shipping ->> 'name' FROM orders
        UNION SELECT email FROM customers UNION SELECT name FROM customers UNION SELECT memo FROM credit_notes
        UNION SELECT metadata::text FROM orders UNION SELECT description FROM order_lines
        """,
    )
    words = {row["held"] for row in personal} - {None, "", "{}"}
    assert words
    text = msgspec.json.encode([(each["before"], each["after"]) for each in changes(engine)]).decode()

    assert [word for word in words if word in text] == []
    assert '"metadata"' not in text
    assert '"customer_email"' not in text


def test_a_refund_tells_whose_it_is(engine: Engine) -> None:
    """The change of an order's refunds has what finds the order in the shop, and the amount before and after."""
    for change in changes(engine, "order.refund_changed"):
        (row,) = ledger.rows(engine, "SELECT * FROM orders WHERE id = :id", id=change["subject_id"])
        names = ("client_reference_id", "payment_intent", "payment_link", "customer", "currency", "amount_total")
        assert {name: change["after"][name] for name in names} == {name: row[name] for name in names}
        assert change["before"]["refunded_amount"] != change["after"]["refunded_amount"]
