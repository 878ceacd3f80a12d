"""An audit lists all objects at Stripe, through its own SDK, and finds every row that differs."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from deploy.sandbox.account import Account
from deploy.sandbox.history import shop_history
from deploy.sandbox.rendering import render
from deploy.sandbox.server import Fault
from schemas.errors import KeyRefused
from schemas.inbox import Delivery
from tests import command, ledger
from tests.envelopes import event
from tests.stage import KEY, Stage, stage
from worker.proof import against_stripe, kinds, money_rules, witness
from worker.proof.difference import Difference
from worker.proof.kinds import Listed

ORDERS = 60


@pytest.fixture
def at(database_url: str, redis_url: str) -> Iterator[Stage]:
    """Return a shop at the sandbox's Stripe; no event was delivered yet."""
    with stage(database_url, redis_url, history=lambda: shop_history(17, ORDERS, money=True)) as made:
        yield made


def deliver(at: Stage, lost: set[str] = frozenset()) -> None:  # type: ignore[assignment]  # an empty one is a set
    """Take in every event of the account but the *lost*."""
    delivered: list[Delivery] = [ledger.delivery(event.body) for event in at.account.events if event.id not in lost]
    ledger.record(at.engine, delivered)
    at.fold()


def audited(at: Stage, **arguments: Any) -> tuple[dict[str, Listed], list[Difference]]:  # noqa: ANN401 - as audit's own
    """Return the tallies of an audit, by the kind of object, and its differences."""
    results = list(against_stripe.audit(at.context(), **arguments))
    listed = {each.object: each for each in results if isinstance(each, Listed)}
    found = [each for each in results if isinstance(each, Difference)]
    for tally in listed.values():
        assert min(tally.missing, tally.extra, tally.different) >= 0
    return listed, found


def test_a_shop_with_all_events_delivered(at: Stage) -> None:
    """With all events delivered, only open sessions and the ledger differ, which no event reports."""
    deliver(at)
    against_stripe.repair(at.context())

    listed, found = audited(at)

    assert found == []
    assert listed["checkout.session"].listed == len(at.account.session_ids())
    assert listed["payment_link"].listed == len(at.account.payment_link_ids())
    for kind in ("invoice", "credit_note", "refund", "charge", "dispute", "invoice_payment"):
        assert listed[kind].listed == len(at.account.object_ids(kind)) > 0
    for kind in ("customer", "billing_portal.configuration"):
        assert listed[kind].listed == len([each for each in at.account.newest(kind) if not each.get("deleted")]) > 0
    assert listed["customer_balance_transaction"].listed > 0


def test_an_audit_costs_its_pages(at: Stage) -> None:
    """An audit needs one call for each hundred objects of a kind, and one for each customer with a balance."""
    deliver(at)
    against_stripe.repair(at.context())
    at.api.calls.clear()

    listed, _ = audited(at)

    (row,) = at.rows("SELECT count(DISTINCT customer) AS customers FROM balances")
    kinds = [each for each in listed if each != "customer_balance_transaction"]
    pages = sum(len(at.account.object_ids(kind)) // 100 + 1 for kind in kinds)
    assert len(at.api.calls) <= pages + row["customers"]
    assert {made.method for made in at.api.calls} == {"GET"}


@pytest.mark.parametrize("seed", range(3))
def test_events_that_never_came(at: Stage, seed: int) -> None:
    """Lost events of sessions, links, invoices, notes and refunds are found and repaired, and then nothing differs."""
    chance = random.Random(seed)
    asked = ("checkout.session.", "payment_link.", "invoice.", "credit_note.", "refund.")
    candidates = [event.id for event in at.account.events if event.type.startswith(asked)]
    deliver(at, set(chance.sample(candidates, 25)))

    _, found = audited(at)
    repaired = against_stripe.repair(at.context())
    _, left = audited(at)

    assert len(found) > 5
    assert repaired >= len(found) > 0
    assert left == []
    for session in at.account.session_ids():
        expected = at.account.expected_status(session)
        # Only an event reports that a delayed payment has failed; no list shows it.
        assert at.status(session) in ({"failed", "processing"} if expected == "failed" else {expected})


EDITS = {
    "a cent": "UPDATE orders SET amount_total = amount_total + 1 WHERE id = :id",
    "a status": "UPDATE orders SET status = 'open', session_status = 'open' WHERE id = :id",
    "a currency": "UPDATE orders SET currency = 'xaf' WHERE id = :id",
    "a row less": "DELETE FROM orders WHERE id = :id",
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_row(at: Stage, edit: str) -> None:
    """A row that was edited by hand is found although all its events are there, and a repair folds them again."""
    deliver(at)
    against_stripe.repair(at.context())
    paid = next(session for session in at.account.session_ids() if at.account.expected_status(session) == "paid")
    before = at.rows("SELECT * FROM orders WHERE id = :id", id=paid)
    ledger.execute(at.engine, EDITS[edit], id=paid)

    _, found = audited(at)
    assert {each.id for each in found} == {paid}
    assert {each.kind for each in found} == {"missing" if edit == "a row less" else "different"}

    against_stripe.repair(at.context())
    assert audited(at)[1] == []
    assert at.rows("SELECT * FROM orders WHERE id = :id", id=paid) == before


def test_a_row_that_stripe_does_not_know(at: Stage) -> None:
    """A row that Stripe neither lists nor knows is extra; a repair records that the object is missing at Stripe."""
    deliver(at)
    against_stripe.repair(at.context())
    other = shop_history(18, 3)
    paid = next(event for event in other.events if event.type == "checkout.session.completed")
    ledger.record(at.engine, [ledger.delivery(paid.body)])
    at.fold()

    listed, found = audited(at, repair=True)

    assert [(each.kind, each.table, each.id) for each in found] == [("extra", "orders", paid.object_id)]
    assert listed["checkout.session"].extra == 1
    assert [row["kind"] for row in at.rows("SELECT kind FROM anomalies WHERE resolved_at IS NULL")] == [
        "missing_at_stripe"
    ]


def test_a_draft_that_was_deleted(at: Stage) -> None:
    """A draft that was deleted at Stripe, and is unknown there now, is no difference."""
    deliver(at)
    against_stripe.repair(at.context())
    other = Account(seed=20)
    draft = other.create_invoice(other.create_customer(), 500)
    ledger.record(at.engine, [ledger.delivery(each.body) for each in other.events if each.type == "invoice.created"])
    at.fold()

    assert at.rows("SELECT status FROM invoices WHERE id = :id", id=draft) == [{"status": "draft"}]
    assert audited(at)[1] == []


def test_rows_without_a_key(at: Stage) -> None:
    """Rows of a mode or account without a key are reported, and cause no call."""
    deliver(at)
    against_stripe.repair(at.context())
    live = shop_history(19, 5, livemode=True)
    ledger.record(at.engine, [ledger.delivery(event.body) for event in live.events])
    at.fold()

    listed, found = audited(at)

    assert found == []
    assert listed[kinds.NOT_ASKED].livemode
    assert not any(session in made.path for made in at.api.calls for session in live.session_ids())


def test_a_key_that_stripe_refuses(database_url: str, redis_url: str) -> None:
    """A refused key stops the audit with Stripe's message, and changes nothing."""
    with stage(database_url, redis_url, STRIPE_API_KEY="sk_test_unknown") as at:
        at.account.create_payment_link()
        deliver(at)
        with pytest.raises(KeyRefused, match="401"):
            list(against_stripe.audit(at.context(), repair=True))
        assert at.rows("SELECT FROM inbox WHERE source = 'observation'") == []


def test_the_command(at: Stage) -> None:
    """`reconcile --stripe --repair` finds a difference, repairs it, audits again, and prints no key."""
    lost = {event.id for event in at.account.events if event.type.startswith("checkout.session.")}
    deliver(at, set(sorted(lost)[:10]))
    arguments = ("deploy", "reconcile", "--stripe", "--format", "json")

    found = command.python(*arguments, settings=at.environment)
    repaired = command.python(*arguments, "--repair", settings=at.environment)

    assert found.code == 3
    assert {each["check"] for each in found.json["drift"]} == {"stripe"}
    asked = {each["object"] for each in found.json["stripe"]}
    stated = {each.table for each in witness.LISTED if each.object in asked}
    columns = sum(each.table in stated for each in witness.MAP)
    assert found.json["witnesses"]["stripe"] == f"against Stripe, by a map of {columns} columns"
    assert columns == 139
    assert repaired.code == 0, repaired.err
    assert repaired.json["repaired"]["drift_total"] == found.json["drift_total"]
    sessions = next(each for each in repaired.json["stripe"] if each["object"] == "checkout.session")
    assert (sessions["listed"], sessions["missing_here"]) == (len(at.account.session_ids()), 0)
    assert KEY not in found.out + found.err + repaired.out + repaired.err


@pytest.mark.parametrize(
    ("key", "kind", "to_do", "code", "listed"),
    [
        # Objects listed before the failure are compared with the tables.
        (KEY, "StripeAway", "again", 3, ["checkout.session", "payment_link"]),
        ("sk_test_unknown", "KeyRefused", "STRIPE_API_KEY", 1, [kinds.REFUSED]),
    ],
)
def test_a_failure_keeps_the_other_checks(
    at: Stage, tmp_path: Path, key: str, kind: str, to_do: str, code: int, listed: list[str]
) -> None:
    """If Stripe fails, the differences found so far are kept and shown with the failure and the remedy."""
    lost = {event.id for event in at.account.events if event.type.startswith("checkout.session.")}
    deliver(at, set(sorted(lost)[:10]))
    at.faults.add(Fault.UNAVAILABLE, "/v1/invoices", times=99)
    page, lines = tmp_path / "page.html", tmp_path / "all.csv"
    settings = at.environment | {"STRIPE_API_KEY": key}

    ran = command.python(
        *("deploy", "reconcile", "--stripe", "--format", "json", "--report", str(page), "--csv", str(lines)),
        settings=settings,
    )
    read = command.python("deploy", "reconcile", "--stripe", settings=settings)

    assert (ran.code, read.code, ran.json["drift_total"] > 0) == (code, code, code == 3)
    assert ran.json["stripe_error"]["kind"] == kind
    assert to_do in ran.json["stripe_error"]["to_do"]
    assert {each["rule"] for each in ran.json["rules"]} == {each.name for each in money_rules.RULES}
    assert ran.json["tables"]
    assert [each["object"] for each in ran.json["stripe"]] == listed
    assert ran.json["run"]["checks"] == ["rules", "rebuild"]
    assert ran.json["run"]["outcome"] == ("drift" if code == 3 else "incomplete")
    for shown in (page.read_text(), read.err):
        assert ran.json["stripe_error"]["to_do"] in shown
        assert "Stripe: only in part" in shown
    assert lines.read_text().count("\n") == 1 + ran.json["drift_total"]
    kept = at.rows("SELECT id, checks, drift, result FROM reconciliations ORDER BY id")[0]
    assert (kept["id"], kept["checks"], kept["drift"]) == (
        ran.json["run"]["id"],
        ["rules", "rebuild"],
        ran.json["drift_total"],
    )
    assert kept["result"]["stripe_error"] == ran.json["stripe_error"]
    assert key not in ran.out + ran.err + page.read_text() + read.out + read.err


def test_an_account_that_is_not_let_in(at: Stage, tmp_path: Path) -> None:
    """Where one account refuses its key, and nothing differs elsewhere, the run is incomplete, and ends with 1."""
    deliver(at)
    against_stripe.repair(at.context())
    other = shop_history(23, 3)
    ledger.record(at.engine, [ledger.delivery(each.body, account="acct_gone") for each in other.events])
    at.fold()
    page, keys = tmp_path / "page.html", f"{KEY},acct_gone=sk_test_revoked"

    ran = command.python(
        *("deploy", "reconcile", "--stripe", "--format", "json", "--report", str(page)),
        settings=at.environment | {"STRIPE_API_KEY": keys},
    )

    assert (ran.code, ran.json["drift_total"], ran.json["run"]["outcome"]) == (1, 0, "incomplete")
    assert kinds.REFUSED in {each["object"] for each in ran.json["stripe"]}
    assert "no drift found, incomplete" in page.read_text()
    (kept,) = at.rows("SELECT outcome, drift FROM reconciliations")
    assert kept == {"outcome": "incomplete", "drift": 0}


def test_a_repair_without_stripe(at: Stage) -> None:
    """If Stripe fails, a repair fixes the differences that the inbox shows, and names the others."""
    deliver(at)
    ledger.execute(at.engine, "DELETE FROM orders WHERE id = (SELECT min(id) FROM orders)")
    settings = at.environment | {"STRIPE_API_KEY": "sk_test_unknown"}

    ran = command.python("deploy", "reconcile", "--stripe", "--repair", "--format", "json", settings=settings)

    assert (ran.code, ran.json["drift_total"], ran.json["repaired"]["drift_total"]) == (1, 0, 1)
    assert ran.json["stripe_error"]["kind"] == "KeyRefused"
    assert "objects_put_right" not in ran.json["repaired"]


def test_archived_events(at: Stage) -> None:
    """A row with archived events is compared with Stripe's list, except for values that need all its events."""
    deliver(at)
    against_stripe.repair(at.context())
    ledger.execute(at.engine, "DELETE FROM payloads")
    (order,) = at.rows("SELECT id FROM orders WHERE amount_total > 0 AND status = 'paid' LIMIT 1")

    listed, found = audited(at)
    ledger.execute(at.engine, "UPDATE orders SET amount_total = amount_total + 1 WHERE id = :id", id=order["id"])
    _, edited = audited(at)

    assert found == []
    assert listed["checkout.session"].archived < listed["checkout.session"].listed
    assert listed["credit_note"].archived == listed["credit_note"].listed > 0
    assert [(each.table, each.id, each.column) for each in edited] == [("orders", order["id"], "amount_total")]


@pytest.mark.parametrize(
    ("account", "livemode", "is_found"),
    [("acct_2", False, True), ("", True, True), ("acct_2", True, True), ("", False, False)],
)
def test_pending_events_of_this_and_other_worlds(at: Stage, account: str, *, livemode: bool, is_found: bool) -> None:
    """A row is not compared while an event of its object is pending; an event of another world does not matter."""
    deliver(at)
    against_stripe.repair(at.context())
    paid = next(event for event in at.account.events if event.type == "checkout.session.completed")
    ledger.execute(at.engine, "UPDATE orders SET amount_total = 1 WHERE id = :id", id=paid.object_id)
    arriving = paid.payload() | {"id": "evt_on_the_way", "livemode": livemode}

    def arrive() -> None:
        ledger.record(at.engine, [ledger.delivery(msgspec.json.encode(arriving), account=account)])

    at.faults.add(None, "/v1/checkout/sessions", before=arrive)
    _, found = audited(at)

    assert [each.id for each in found if each.column == "amount_total"] == [paid.object_id] * is_found


# ---- The second witness ----


def test_a_difference_that_only_the_map_finds(at: Stage) -> None:
    """A false event of a failed refund outranks Stripe's list in the fold, so only a comparison by the map finds it."""
    deliver(at)
    against_stripe.repair(at.context())
    refund = next(each for each in at.account.newest("refund") if each["status"] == "succeeded")
    false = event("evt_false", "refund.failed", refund["created"] + 1, {**refund, "status": "failed"})
    ledger.take_in(at.engine, false)
    at.account.advance(60)

    listed, found = audited(at)
    ran = command.python("deploy", "reconcile", "--stripe", settings=at.environment)

    assert [(each.table, each.id, each.column, each.held, each.expected) for each in found] == [
        ("refunds", refund["id"], "status", "failed", "succeeded")
    ]
    assert (listed["refund"].different, listed["refund"].only_by_map) == (1, 1)
    assert ran.code == 3
    assert "Different by the map alone: 1." in ran.err
    assert "Stripe: against Stripe, by a map of" in ran.out
    assert against_stripe.repair(at.context()) == 0


@pytest.mark.parametrize("version", ["2024-09-30.acacia", "2025-05-28.basil"])
def test_an_endpoint_of_an_older_version(at: Stage, version: str) -> None:
    """Fields that events of an older API version lack are counted, and are no differences."""
    ledger.record(at.engine, [ledger.delivery(render(each, version).body) for each in at.account.events])
    at.fold()
    at.account.advance(3600)

    listed, found = audited(at)

    # No event reports an open session, its lines or a ledger.
    unreported = {"orders", "balance_transactions", "balances"}
    others = [str(each) for each in found if each.kind != "missing" or each.table not in unreported]
    assert not others, "\n".join(others)
    assert sum(each.unstated for each in listed.values()) > 0
