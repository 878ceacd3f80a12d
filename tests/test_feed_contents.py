"""Contents of the change feed: the declared kinds and subjects, and in each change the values to act on."""

from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from sqlalchemy import Engine

from deploy.local.services import Services
from deploy.sandbox.account import Account
from deploy.sandbox.history import shop_history
from schemas import database, observations
from schemas.kinds import CHOICES, KINDS, SUBJECTS, chosen
from schemas.own_events import SESSION_OBSERVED, SESSION_REGISTERED
from schemas.tables import ONE_SHOT_KINDS
from tests import ledger
from tests.web import migrated_database

Change = dict[str, Any]


@pytest.fixture(scope="module")
def shop() -> Account:
    """Return a shop with every kind of event in its history."""
    return shop_history(seed=61, orders=80, money=True)


@pytest.fixture(scope="module")
def engine(services: Services, shop: Account) -> Iterator[Engine]:
    """Return a database with the shop's history folded, shared by the tests, which change nothing."""
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
        # In small batches, so that an opening is announced before its closing.
        ledger.fold(engine, limit=8)
        known = len(shop.events)
        shop.void_credit_note(note)
        (link,) = ledger.rows(engine, "SELECT id FROM payment_links WHERE active LIMIT 1")
        shop.update_payment_link(link["id"], active=False)
        # The registered session is then read with a smaller amount.
        cheaper = {**opened, "amount_total": opened["amount_total"] - 1}
        observed = observations.observe(
            SESSION_OBSERVED, cheaper, account="", livemode=False, created=shop.now + 1, now=ledger.NOW
        )
        ledger.record(engine, [observed])
        ledger.take_in(engine, *(event.body for event in shop.events[known:]))
        yield engine
        engine.dispose()


def changes(engine: Engine, kind: str = "") -> list[Change]:
    """Return the changes of kinds that begin with *kind*."""
    return ledger.rows(engine, "SELECT * FROM changes WHERE kind LIKE :kind || '%' ORDER BY seq", kind=kind)


def test_folds_make_no_other_kind(engine: Engine) -> None:
    """The declared kinds and subjects are those that a shop's history makes."""
    found = changes(engine)

    assert {change["kind"] for change in found} == set(KINDS)
    assert {change["subject"] for change in found} == set(SUBJECTS)
    assert all(change["kind"].startswith(f"{change['subject']}.") for change in found)
    assert set(ONE_SHOT_KINDS) < set(KINDS)


def test_a_star_stands_for_every_kind_of_a_subject() -> None:
    """Each subject has a star, which covers the subject's kinds and no others."""
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
def test_each_change_has_its_amounts_and_ids(engine: Engine, kind: str, names: set[str]) -> None:
    """A change has its amounts with a currency and the ids of related objects, in before as in after."""
    found = changes(engine, kind)

    assert found
    for change in found:
        assert names <= change["after"].keys(), change["kind"]
        assert change["before"] is None or change["before"].keys() == change["after"].keys() - {"lines"}


def test_a_change_has_the_values_of_its_row(engine: Engine) -> None:
    """An order.paid has the values of the order's row; a charge may pay the order before its session does."""
    for change in changes(engine, "order.paid"):
        later = ("payment_status", "invoice") if change["after"]["payment_status"] == "unpaid" else ()
        held = {name: value for name, value in change["after"].items() if name not in ("lines", "status", *later)}
        (row,) = ledger.rows(engine, "SELECT * FROM orders WHERE id = :id", id=change["subject_id"])
        assert held == {name: row[name] for name in held}


def test_no_change_is_personal(engine: Engine) -> None:
    """No change contains an email, a name, metadata or a description of the history."""
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


def test_a_refund_names_its_order(engine: Engine) -> None:
    """An order.refund_changed has the ids that identify the order in the shop, and the amount before and after."""
    for change in changes(engine, "order.refund_changed"):
        (row,) = ledger.rows(engine, "SELECT * FROM orders WHERE id = :id", id=change["subject_id"])
        names = ("client_reference_id", "payment_intent", "payment_link", "customer", "currency", "amount_total")
        assert {name: change["after"][name] for name in names} == {name: row[name] for name in names}
        assert change["before"]["refunded_amount"] != change["after"]["refunded_amount"]
