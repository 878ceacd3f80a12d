"""``payfold events list|retry`` and ``payfold orders list|search``: rows chosen, followed and acted on."""

import signal
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

import msgspec
import pytest
from sqlalchemy import Engine

from deploy.commands.events_chosen import LATE_SECONDS, Following
from deploy.sandbox.account import Account
from schemas import database, event_filters, inbox, tables
from schemas.event_filters import EventFilters
from tests import ledger
from tests.command import Ran, payfold, started
from tests.waiting import until
from tests.web import event

T: Final = datetime(2026, 11, 22, 12, tzinfo=UTC)


def odd(id_: str, kind: str = "invoice.paid", **fields: object) -> bytes:
    """Return an event that is parked, since its object is not what its type has."""
    return event(type=kind, id=id_, data={"object": {"object": "odd", "id": f"of_{id_}"}}, **fields)


def record(engine: Engine, *bodies: bytes, account: str = "", source: str = "webhook", after: int = 0) -> None:
    """Record events, received *after* so many seconds."""
    found = [ledger.delivery(body, account=account, source=source) for body in bodies]
    at = T + timedelta(seconds=after)
    ledger.record(engine, [msgspec.structs.replace(each, received_at=at) for each in found])


def listed(database_url: str, *options: str) -> list[str]:
    """Return the ids that `events list` prints."""
    ran = payfold("events", "list", *options, "--format", "ndjson", DATABASE_URL=database_url)
    assert (ran.code, ran.err) == (0, "")
    return [msgspec.json.decode(line)["id"] for line in ran.out.splitlines()]


def test_list(engine: Engine, database_url: str) -> None:
    """Events are listed newest received first, by each filter and by several."""
    record(engine, odd("evt_1"), odd("evt_2", "invoice.voided", livemode=True), after=2)
    record(engine, odd("evt_3", "customer.created"), account="acct_1", after=1)
    record(engine, odd("evt_4", "invoiceXpaid"), source="gap", after=3)
    ledger.fold(engine)

    assert listed(database_url) == ["evt_4", "evt_2", "evt_1", "evt_3"]
    assert listed(database_url, "--limit", "2") == ["evt_4", "evt_2"]
    assert listed(database_url, "--type", "invoice.*") == ["evt_2", "evt_1"]
    assert listed(database_url, "--type", "*.paid", "--state", "parked", "--cause", "object_unexpected") == ["evt_1"]
    assert listed(database_url, "--source", "gap") == ["evt_4"]
    assert listed(database_url, "--account", "acct_1") == ["evt_3"]
    assert listed(database_url, "--live") == ["evt_2"]
    assert listed(database_url, "--since", "2026-11-22T12:00:02", "--until", "2026-11-22T12:00:03") == [
        "evt_2",
        "evt_1",
    ]
    assert listed(database_url, "--object", "of_evt_3") == ["evt_3"]


LIKE: Final = {
    # Types that are there, and patterns with the types that they find.
    "invoice.paid": ["invoice.paid"],
    "invoice.*": ["invoice.paid", "invoice.payment_failed"],
    "*paid": ["invoice.paid", "unpaid"],
    "i*p*d": ["invoice.paid", "invoice.payment_failed"],
    "invoice.payment_failed": ["invoice.payment_failed"],
    "invoice_paid": [],
    "invoice%": [],
    "*%*": ["odd%type"],
    "*_*": ["invoice.payment_failed"],
    "*\\*": ["odd\\type"],
    "INVOICE.*": [],
    "**": ["invoice.paid", "invoice.payment_failed", "odd%type", "odd\\type", "unpaid"],
    "": [],
}


@pytest.mark.parametrize("state", [None, "parked"])
def test_patterns_of_types(engine: Engine, state: str | None) -> None:
    """A star stands for any characters, and every other character for itself."""
    kinds = LIKE["**"]
    record(engine, *(odd(f"evt_{number}", kind) for number, kind in enumerate(kinds)))
    ledger.execute(
        engine,
        "WITH gone AS (DELETE FROM pending) INSERT INTO outcomes (seq, state, attempts, folded_at, fold_version)"
        " SELECT seq, 'parked', 1, now(), 1 FROM inbox",
    )
    for pattern, expected in LIKE.items():
        with database.transaction(engine) as connection:
            filters = EventFilters(type=pattern, state=state)
            found = event_filters.latest(connection, filters, [tables.events.c.type], limit=20)
        assert sorted(row["type"] for row in found) == expected, pattern


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("list", "--state", "done"), "--state: it is none of pending, folded, ignored, parked."),
        (("list", "--cause", "novel"), "--cause: it is none of fold_failed"),
        (("list", "--source", "novel"), "--source: it is none of webhook"),
        (("list", "--type", "*" * 6), "--type: it has more than 5 stars"),
        (("list", "--follow", "--format", "json"), "wants an end"),
        (("list", "--follow", "--until", "2026-11-01"), "--until is an end"),
        (("retry",), "--state parked"),
        (("retry", "evt_1", "--state", "parked"), "not both"),
        (("retry", "--state", "folded"), "Only events that are parked or pending"),
        (("retry", "--state", "parked", "--archive", "."), "--archive is for one event"),
    ],
    ids=str,
)
def test_options_that_cannot_be_used(database_url: str, options: tuple[str, ...], words: str) -> None:
    """Such an option is bad usage, and the error names it."""
    ran = payfold("events", *options, DATABASE_URL=database_url)

    assert (ran.code, ran.out) == (2, "")
    assert words in ran.err


def retry(database_url: str, *options: str) -> Ran:
    """Run `events retry` on the parked events."""
    ran = payfold("events", "retry", "--state", "parked", *options, DATABASE_URL=database_url)
    assert ran.out == ""
    return ran


def test_retry_all_that_match(engine: Engine, database_url: str) -> None:
    """Without --yes the events are counted; with it they are folded again, and exit 1 reports what is parked again."""
    ledger.execute(engine, "ALTER TABLE orders ADD CONSTRAINT cheap CHECK (amount_total < 100)")
    account = Account(seed=1)
    account.complete(account.open_session(amount=5_000))
    paid = account.events[-1]
    record(engine, paid.body, odd("evt_1"), odd("evt_2", "customer.created"))
    ledger.fold(engine)
    ledger.execute(engine, "ALTER TABLE orders DROP CONSTRAINT cheap")

    counted = retry(database_url, "--type", "checkout.*")
    assert (counted.code, counted.err) == (
        2,
        "Events to fold again: 1. Nothing has been done: add --yes to do it.\n",
    )
    assert ledger.rows(engine, "SELECT id FROM orders") == []

    done = retry(database_url, "--type", "checkout.*", "--yes")
    assert (done.code, done.err) == (0, "Events tried again: 1. They are now: 1 folded.\n")
    assert ledger.rows(engine, "SELECT status FROM orders") == [{"status": "paid"}]
    again = retry(database_url, "--cause", "object_unexpected", "--yes")
    assert (again.code, again.err) == (1, "Events tried again: 2. They are now: 2 parked.\n")
    none = retry(database_url, "--type", "checkout.*", "--yes")
    assert (none.code, none.err) == (0, "No such event.\n")
    attempts = ledger.rows(engine, "SELECT attempts FROM events ORDER BY seq")
    assert [row["attempts"] for row in attempts] == [2, 2, 2]


# ---- What comes ----


def test_follow(engine: Engine, database_url: str, tmp_path: Path) -> None:
    """Present events are printed oldest first, then each that comes, once, also one that is committed late."""
    record(engine, odd("evt_1"), odd("evt_2"), odd("evt_3", "customer.created"))
    out, err = tmp_path / "out", tmp_path / "err"
    options = ("--type", "invoice.*", "--follow", "--limit", "1", "--format", "ndjson")

    def ids() -> list[Any]:
        return [msgspec.json.decode(line)["id"] for line in out.read_bytes().splitlines()]

    with started("events", "list", *options, stdout=out, stderr=err, DATABASE_URL=database_url) as process:
        until(lambda: ids() == ["evt_2"], seconds=60)
        with database.transaction(engine) as connection, database.cursor(connection) as cursor:
            inbox.record(cursor, [ledger.delivery(odd("evt_late"))])
            record(engine, odd("evt_4"), odd("evt_5", "customer.created"))
            until(lambda: ids() == ["evt_2", "evt_4"])
        until(lambda: ids() == ["evt_2", "evt_4", "evt_late"])
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) == 0
    assert ids() == ["evt_2", "evt_4", "evt_late"]
    assert err.read_text() == ""


def test_follow_as_lines(engine: Engine, database_url: str, tmp_path: Path) -> None:
    """A person reads a line for each event."""
    record(engine, odd("evt_1"))
    out, err = tmp_path / "out", tmp_path / "err"

    with started("events", "list", "--follow", stdout=out, stderr=err, DATABASE_URL=database_url) as process:
        until(lambda: out.read_text().endswith("\n"), seconds=60)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 0
    line = f"{1:>8}  2026-11-22 12:00:00  test  {'invoice.paid':<32}  evt_1  of_evt_1  pending\n"
    assert out.read_text() == line


def test_what_was_printed() -> None:
    """An event is new once; what was printed is forgotten once no lower number can come."""
    state = Following(0)
    rows = [{"seq": 1}, {"seq": 3}]

    assert (state.new(rows), state.new(rows)) == (rows, [])
    state.reach(3, now=100)
    assert state.new([*rows, {"seq": 2}]) == [{"seq": 2}]
    state.reach(5, now=99 + LATE_SECONDS)
    assert state.after == 0
    state.reach(5, now=100 + LATE_SECONDS)
    assert state.after == 3
    assert state.new([{"seq": 4}]) == [{"seq": 4}]


# ---- Orders ----


def test_orders(engine: Engine, database_url: str) -> None:
    """Orders are listed by the filters of the route, newest first, with money as people write it."""
    ledger.execute(
        engine,
        "INSERT INTO orders (account, livemode, id, status, currency, amount_total, customer, customer_email,"
        " client_reference_id, invoice, payment_link, created, event_id, as_of) VALUES"
        " ('', true, 'cs_1', 'paid', 'usd', 1999, 'cus_1', 'Buyer@example.com', 'cart-1', 'in_1', 'plink_1',"
        " '2026-11-01T00:00Z', 'evt_1', now()),"
        " ('', false, 'cs_2', 'open', 'jpy', 500, NULL, NULL, NULL, NULL, NULL, '2026-11-02T00:00Z', 'evt_2', now()),"
        " ('acct_1', true, 'cs_3', 'paid', NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, 'evt_3', now())",
    )

    def found(*options: str) -> list[str]:
        ran = payfold("orders", "list", *options, "--format", "json", DATABASE_URL=database_url)
        assert ran.code == 0
        return [row["id"] for row in ran.json]

    assert found() == ["cs_2", "cs_1", "cs_3"]
    assert found("--limit", "1") == ["cs_2"]
    one = (("--customer", "cus_1"), ("--email", "buyer@EXAMPLE.com"), ("--payment-link", "plink_1"))
    for options in (*one, ("--reference", "cart-1"), ("--invoice", "in_1"), ("--until", "2026-11-02")):
        assert found(*options) == ["cs_1"], options
    assert found("--status", "paid", "--account", "acct_1", "--live") == ["cs_3"]
    assert found("--test", "--since", "2026-11-02") == ["cs_2"]
    table = payfold("orders", "list", "--live", "--account", "", DATABASE_URL=database_url)
    assert "19.99 USD" in table.out
    wrong = payfold("orders", "list", "--status", "refunded", DATABASE_URL=database_url)
    assert (wrong.code, "processing" in wrong.err) == (2, True)


def test_orders_search(engine: Engine, database_url: str) -> None:
    """An email, an amount or an id leads to the order, in one world where one is chosen."""
    ledger.execute(
        engine,
        "INSERT INTO orders (account, livemode, id, status, currency, amount_total, customer_email, created, event_id,"
        " as_of) SELECT '', n = 1, 'cs_' || n, 'paid', 'usd', 1999, 'Buyer@example.com', now(), 'evt_1', now()"
        " FROM generate_series(1, 22) AS n",
    )

    def search(text: str, *options: str) -> Ran:
        return payfold("orders", "search", text, *options, DATABASE_URL=database_url)

    (hit,) = search("buyer@example.com", "--live", "--format", "json").json
    assert (hit["kind"], hit["matched"], hit["orders"][0]["id"]) == ("order", "customer_email", "cs_1")
    assert len(search("19.99 usd", "--format", "ndjson").out.splitlines()) == 20
    assert "Only the newest 20 are shown" in search("19.99 usd").err
    assert "19.99 USD" in search("cs_1").out
    none = search("cs_none")
    assert (none.code, none.out, none.err) == (0, "", "Nothing is found.\n")
