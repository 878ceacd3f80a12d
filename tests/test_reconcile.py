"""Reconciliation finds exactly the errors, states them in money, repairs them on request, and keeps its result."""

import csv
import random
import re
from pathlib import Path

import msgspec
import pytest
from sqlalchemy import Engine, text

from deploy.sandbox.history import shop_history
from schemas import database
from tests import command, ledger
from tests.command import payfold
from worker.proof.digest import digests

SHOP = shop_history(21, 120, money=True)


@pytest.fixture
def shop(engine: Engine) -> Engine:
    """Return an engine on the tables of a shop."""
    ledger.record(engine, [ledger.delivery(event.body) for event in SHOP.events])
    ledger.fold(engine)
    return engine


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """Return a log of all events of the shop."""
    path = tmp_path / "shop.ndjson"
    path.write_bytes(b"\n".join(event.body.replace(b"\n", b"") for event in SHOP.events))
    return path


def run(engine: Engine, statement: str, **values: object) -> None:
    """Execute a statement."""
    with database.transaction(engine) as connection:
        connection.execute(text(statement), values)


def reconcile(database_url: str, *arguments: str, **settings: str) -> command.Ran:
    """Run the command with its result as JSON."""
    named = {"DATABASE_URL": database_url, **settings}
    ran = command.python("deploy", "reconcile", *arguments, "--format", "json", settings=named)
    assert "Traceback" not in ran.err
    return ran


def test_right_tables(shop: Engine, database_url: str) -> None:
    """Every check passes on right tables, and the run is kept."""
    ran = reconcile(database_url)

    assert (ran.code, ran.json["drift"], ran.json["drift_total"], ran.json["drift_money"]) == (0, [], 0, [])
    assert ran.json["run"]["outcome"] == "ok"
    assert ran.json["run"]["checks"] == ["rules", "rebuild"]
    assert (ran.json["run"]["since"], ran.json["run"]["seed"]) == (None, None)
    assert {each["broken"] for each in ran.json["rules"]} == {0}
    for each in ran.json["rules"]:
        assert each["not_provable"] == sum(reason["rows"] for reason in each["reasons"])
    (lines,) = (each for each in ran.json["rules"] if each["rule"] == "order-lines")
    # No session was read, and events have no lines; all sessions ended.
    assert lines["reasons"] == [{"reason": "not all lines are known", "rows": lines["checked"]}]
    assert ran.json["events"]["recorded"] == len(SHOP.events)
    sold = sum(each["amount"] for each in ran.json["money"] if (each["status"], each["currency"]) == ("paid", "usd"))
    (held,) = ledger.rows(
        shop, "SELECT sum(amount_total) AS usd FROM orders WHERE status = 'paid' AND currency = 'usd'"
    )
    assert sold == held["usd"]

    history = payfold("reconcile", "history", "--format", "json", DATABASE_URL=database_url).json
    assert [(each["id"], each["outcome"], each["drift"]) for each in history] == [(ran.json["run"]["id"], "ok", 0)]


def test_a_cent(shop: Engine, database_url: str, tmp_path: Path) -> None:
    """A cent too much is found by the rebuild and by a rule, is counted once in money, and exits 3."""
    (order,) = ledger.rows(
        shop,
        "SELECT id, amount_total FROM orders WHERE currency = 'usd' AND status = 'paid' AND amount_total > 0 LIMIT 1",
    )
    run(shop, "UPDATE orders SET amount_total = amount_total + 1 WHERE id = :id", id=order["id"])

    ran = reconcile(database_url, "--csv", str(tmp_path / "all.csv"))

    assert ran.code == 3
    found = {(each["check"], each["kind"], each["id"], each["column"], each["amount"]) for each in ran.json["drift"]}
    assert ("rebuild", "different", order["id"], "amount_total", 1) in found
    assert ("rules", "order-total") in {each[:2] for each in found}
    assert {each[2] for each in found} == {order["id"]}
    assert ran.json["drift_money"] == [{"currency": "usd", "amount": 1, "count": 1}]
    with (tmp_path / "all.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [(each["check"], each["id"], each["amount"]) for each in lines] == [
        (each["check"], each["id"], "" if each["amount"] is None else str(each["amount"])) for each in ran.json["drift"]
    ]

    repaired = reconcile(database_url, "--repair")
    assert (repaired.code, repaired.json["drift_total"]) == (0, 0)
    assert repaired.json["repaired"]["drift_total"] == ran.json["drift_total"]
    assert reconcile(database_url).code == 0


def test_personal_data_is_not_shown(shop: Engine, database_url: str) -> None:
    """A different address is reported without the address."""
    run(shop, "UPDATE orders SET customer_email = 'someone@example.com' WHERE customer_email IS NOT NULL")
    ran = reconcile(database_url)

    assert ran.code == 3
    assert {(each["column"], each["held"], each["expected"]) for each in ran.json["drift"]} == {
        ("customer_email", "(hidden)", "(hidden)")
    }
    assert "example.com" not in ran.out + ran.err


@pytest.mark.parametrize("seed", range(3))
def test_events_that_never_came(engine: Engine, database_url: str, log: Path, seed: int) -> None:
    """A comparison with a log finds exactly the lost events, a repair restores them, and then no error is left."""
    chance = random.Random(seed)
    lost = set(chance.sample([event.id for event in SHOP.events[1:-1]], chance.randint(1, 40)))
    ledger.record(engine, [ledger.delivery(event.body) for event in SHOP.events if event.id not in lost])
    ledger.fold(engine)

    ran = reconcile(database_url, "--log", str(log))
    assert ran.code == 3
    assert {each["id"] for each in ran.json["drift"]} == lost
    assert {(each["check"], each["kind"]) for each in ran.json["drift"]} == {("log", "missing")}
    assert ran.json["logs"] == {
        "events": len(SHOP.events),
        "missing_here": len(lost),
        "missing_there": 0,
        "different": 0,
        "refused": 0,
    }

    repaired = reconcile(database_url, "--log", str(log), "--repair")
    assert (repaired.code, repaired.json["drift_total"]) == (0, 0)
    assert repaired.json["repaired"]["events_recorded"] == len(lost)


def test_an_incomplete_log(shop: Engine, database_url: str, tmp_path: Path) -> None:
    """Events that a log lacks or holds differently are reported, and a broken line exits with 1 or 3."""
    events = [event.payload() for event in SHOP.events]
    changed = next(event for event in events if event["type"] == "checkout.session.completed")
    changed["data"]["object"]["amount_total"] += 1
    changed["pending_webhooks"] = 0
    lines = [msgspec.json.encode(event) for event in events if event is not events[5]]
    path = tmp_path / "theirs.ndjson"
    path.write_bytes(b"\n".join([*lines, b"{broken"]))

    ran = reconcile(database_url, "--log", str(path))

    assert ran.code == 3
    assert {(each["kind"], each["id"]) for each in ran.json["drift"]} == {
        ("extra", events[5]["id"]),
        ("different", changed["id"]),
    }
    assert ran.json["logs"]["refused"] == 1
    assert f"{path}: line {len(lines) + 1}" in ran.err


def test_an_export_is_complete(shop: Engine, database_url: str, another_database_url: str, tmp_path: Path) -> None:
    """An export replayed into an empty database gives the same digest, and reconciles with the first database."""
    path = tmp_path / "all.zst"
    assert payfold("events", "export", "-o", str(path), DATABASE_URL=database_url).code == 0
    assert payfold("replay", str(path), DATABASE_URL=another_database_url).code == 0

    engine = database.engine(another_database_url)
    assert digests(engine) == digests(shop)
    engine.dispose()
    assert reconcile(another_database_url, "--log", str(path)).code == 0
    assert payfold("rebuild", "--from", str(path), DATABASE_URL=database_url).code == 0


def test_the_page(shop: Engine, database_url: str, tmp_path: Path) -> None:
    """The report is written, agrees with the command's output, and loads nothing from elsewhere."""
    run(shop, "DELETE FROM orders WHERE status = 'expired'")
    page = tmp_path / "report.html"

    ran = reconcile(database_url, "--report", str(page), "--since", "2026-01-02", "--seed", "7")

    html = page.read_text()
    assert ran.code == 3
    assert (ran.json["run"]["since"], ran.json["run"]["seed"]) == ("2026-01-02T00:00:00Z", 7)
    assert f"{ran.json['drift_total']:,}" in html
    held = re.search(r'<script[^>]*id="result"[^>]*>(.*?)</script>', html, re.DOTALL)
    assert held is not None
    assert msgspec.json.decode(held[1]) == ran.json
    assert "<script src" not in html
    assert 'rel="stylesheet"' not in html


def test_a_page_of_odd_orders(shop: Engine, database_url: str, tmp_path: Path) -> None:
    """Orders of the year 9999 or without a date, and sums beyond a bigint, have a page."""
    run(shop, "UPDATE orders SET completed_at = '9999-12-31T23:59:59Z' WHERE status = 'paid'")
    run(shop, "UPDATE orders SET created = NULL, completed_at = NULL WHERE status = 'expired'")
    run(
        shop,
        "UPDATE orders SET currency = 'usd', amount_total = 2::numeric ^ 62, amount_subtotal = 2::numeric ^ 63 - 1,"
        " amount_tax = 2::numeric ^ 63 - 1, amount_shipping = 2::numeric ^ 63 - 1 WHERE status = 'paid'",
    )
    counted = ledger.rows(
        shop,
        "SELECT count(*) FILTER (WHERE status = 'paid') AS odd,"
        " count(*) FILTER (WHERE created IS NULL AND completed_at IS NULL OR currency IS NULL) AS undated FROM orders",
    )
    page = tmp_path / "report.html"

    ran = reconcile(database_url, "--report", str(page))

    assert ran.code == 3
    (odd,) = (row for row in ran.json["money"] if row["status"] == "paid")
    assert (odd["day"], odd["orders"], odd["amount"]) == ("9999-12-31", counted[0]["odd"], counted[0]["odd"] * 2**62)
    html = page.read_text()
    assert f"without {counted[0]['odd']} order" in html
    assert f"{counted[0]['undated']} orders without a day or a currency" in html
    assert len(html) < 2_000_000


def test_errors(shop: Engine, database_url: str, tmp_path: Path) -> None:
    """A missing log, Stripe without a key, and a folder as output file are refused before any check runs."""
    for arguments, words in (
        (("--log", str(tmp_path / "none.ndjson")), "There is no file"),
        (("--stripe",), "STRIPE_API_KEY"),
        (("--csv", str(tmp_path)), "Cannot write"),
    ):
        ran = payfold("reconcile", *arguments, DATABASE_URL=database_url)
        assert (ran.code, ran.out) == (2, "")
        assert words in ran.err
    ran = payfold("rebuild", "--swap", "--from", str(Path(__file__)), DATABASE_URL=database_url)
    assert ran.code == 2
    assert "payfold replay" in ran.err


def test_as_a_person_reads_it(shop: Engine, database_url: str) -> None:
    """A terminal shows the tables and the sentence that sums them up."""
    well = payfold("reconcile", DATABASE_URL=database_url)
    assert "The tables are what the events say." in well.err
    assert re.search(r"Of [\d,]+ rows: \d+ % of what the money rules checked is proven\.", well.err)
    assert "order-lines: " in well.out
    assert "same folds" in well.out
    run(
        shop,
        "UPDATE orders SET amount_total = amount_total + 250 WHERE id ="
        " (SELECT min(id) FROM orders WHERE currency = 'usd' AND status = 'paid')",
    )

    ran = payfold("reconcile", DATABASE_URL=database_url)
    rebuilt = payfold("rebuild", DATABASE_URL=database_url)

    assert "in total 2.50 USD too much" in ran.err
    assert "Rebuild: against a rebuild with the same folds, which finds lost and changed rows and not a" in ran.out
    assert "amount_total" in ran.out
    assert "the total is not subtotal - discount + shipping, nor that and the tax" in ran.out
    assert rebuilt.code == 3
    assert "2.50 USD" in rebuilt.out
    assert payfold("rebuild", "--swap", DATABASE_URL=database_url).code == 0
    assert payfold("rebuild", DATABASE_URL=database_url).code == 0
