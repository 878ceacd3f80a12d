"""Every index serves a query that Payfold makes, and PostgreSQL answers the query by that index."""

import re
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Final, NamedTuple

import msgspec
import psycopg
import pytest
from sqlalchemy import Engine, Row, Select, Table, event, select, text
from sqlalchemy.dialects import postgresql

from api import trace
from api.reads import OrderFilters
from deploy.bench import figures
from deploy.sandbox.account import Account
from deploy.sandbox.history import shop_history
from schemas import accounts, database, event_filters, feed, lookup, observations, parked, summary, tables
from schemas.change_rows import ChangeRow
from schemas.event_filters import EventFilters, EventPage, Position
from tests import ledger
from worker.folding import corrections, order_refunds, projection
from worker.folding.claim import claim
from worker.folding.joining import facts_of
from worker.folding.rows import load_rows, probe_indexes
from worker.folds import payment
from worker.folds.facts import Subject
from worker.folds.join import Joined

pytestmark = pytest.mark.integration

WORLD: Final = "account = '' AND livemode = true"
HAS_CS_1: Final = f"{tables.id_hash('subject_id')} = {tables.id_hash('$$cs_1$$')}"
PAGE: Final = f"ORDER BY {tables.NEWEST} DESC, id DESC, account DESC, livemode DESC LIMIT 21"

ASKED: Final = {
    "renderings_fresh": (
        "copies that were not compared yet (renderings.queue)",
        "SELECT EXISTS (SELECT FROM renderings WHERE content_sha256 IS NULL)",
    ),
    "inbox_received": (
        "GET /v1/events, and how many webhooks came within an hour (status)",
        "SELECT seq FROM inbox WHERE received_at < now() ORDER BY received_at DESC, seq DESC LIMIT 21",
    ),
    "inbox_type": (
        "GET /v1/events?type=",
        "SELECT seq FROM inbox WHERE type = 'charge.succeeded' ORDER BY received_at DESC, seq DESC LIMIT 21",
    ),
    "inbox_source": (
        "GET /v1/events?source= of those that no webhook brought",
        "SELECT seq FROM inbox WHERE source = 'gap' ORDER BY received_at DESC, seq DESC LIMIT 21",
    ),
    "inbox_object_hash": (
        "all events of an object (facts_of, explain, observations.news)",
        f"SELECT seq FROM inbox WHERE {tables.of_object('inbox', '$$$$', 'true', '$$cs_1$$')}",
    ),
    "inbox_thin": (
        "events that only name their object (fetches)",
        "SELECT seq FROM inbox WHERE type LIKE 'v_.%' AND received_at >= now()",
    ),
    "inbox_set_aside": (
        "whether an operator has ignored an event (claim)",
        f"SELECT seq FROM inbox WHERE type = 'payfold.event.ignored' AND {WORLD} AND object_id = 'evt_1'",
    ),
    "outcomes_fold_version": (
        "outcomes of an older fold version (queue_outdated, status)",
        "SELECT seq FROM outcomes WHERE fold_version = 1 AND seq >= 1 ORDER BY seq LIMIT 500",
    ),
    "outcomes_parked": (
        "how much is parked (status, reconcile), and which events wait for an archive (operator.retry)",
        "SELECT count(*) FROM outcomes WHERE state = 'parked'",
    ),
    "outcomes_ignored": (
        "GET /v1/events?state=ignored",
        "SELECT seq FROM outcomes WHERE state = 'ignored' ORDER BY seq LIMIT 1000",
    ),
    "stripe_calls_due": (
        "the calls that are due (worker.stripe_jobs.queue)",
        "SELECT object_id FROM stripe_calls WHERE given_up IS NULL AND lane = 1 AND due_at <= now() ORDER BY due_at",
    ),
    "reconciliation_requests_open": (
        "the reconciliation that waits, or that a worker has (reconciliations)",
        "SELECT id FROM reconciliation_requests WHERE state = 'waiting'",
    ),
    "orders_newest": ("GET /v1/orders", f"SELECT * FROM orders {PAGE}"),
    "orders_status": (
        "GET /v1/orders?status=",
        f"SELECT id FROM orders WHERE status = ANY ('{{failed}}') {PAGE.replace('BY', 'BY status,')}",
    ),
    "orders_open": (
        "sessions that have been open for too long (expiry)",
        f"SELECT id FROM orders WHERE status = 'open' AND {WORLD} AND created < now() ORDER BY created",
    ),
    "orders_undecided": (
        "the order that a charge may settle (settling)",
        f"SELECT id FROM orders WHERE {WORLD} AND payment_intent = 'pi_1' AND {payment.OF_ORDER_OPEN}",
    ),
    "orders_payment_link": (
        "GET /v1/orders?payment_link=",
        f"SELECT * FROM orders WHERE {WORLD} AND payment_link = 'plink_1'",
    ),
    "orders_customer": ("GET /v1/orders?customer=", f"SELECT * FROM orders WHERE {WORLD} AND customer = 'cus_1'"),
    "orders_payment_intent": (
        "the order that a refund is of (refunding)",
        f"SELECT id FROM orders WHERE {WORLD} AND payment_intent = 'pi_1'",
    ),
    "orders_client_reference_id": (
        "GET /v1/orders?client_reference_id=",
        "SELECT * FROM orders WHERE client_reference_id = 'cart-1'",
    ),
    "orders_customer_email": (
        "GET /v1/orders?customer_email=",
        "SELECT * FROM orders WHERE lower(customer_email) = lower('Buyer@example.com')",
    ),
    "orders_amount": (
        "an amount in GET /v1/search",
        f"SELECT * FROM orders WHERE currency = 'eur' AND amount_total = 4999 ORDER BY {tables.NEWEST} DESC LIMIT 21",
    ),
    "customers_email": (
        "an email in GET /v1/search",
        "SELECT * FROM customers WHERE lower(email) = lower('Buyer@example.com')",
    ),
    "customers_newest": ("GET /v1/customers", f"SELECT * FROM customers {PAGE}"),
    "invoices_number": ("a number in GET /v1/search", "SELECT * FROM invoices WHERE number = 'AB-0001'"),
    "credit_notes_number": ("a number in GET /v1/search", "SELECT * FROM credit_notes WHERE number = 'AB-0001-CN-01'"),
    "orders_invoice": (
        "the order that an invoice's refund is of (refunding)",
        f"SELECT id FROM orders WHERE {WORLD} AND invoice = 'in_1'",
    ),
    "order_lines_order_id": (
        "the lines of an order (GET /v1/orders/{id}, projection)",
        f"SELECT * FROM order_lines WHERE {WORLD} AND order_id = 'cs_1'",
    ),
    "balance_changes_customer": (
        "GET /v1/customers/{id}/balance, projection",
        f"SELECT * FROM balance_changes WHERE {WORLD} AND customer = 'cus_1'",
    ),
    "balance_transactions_customer": (
        "GET /v1/customers/{id}/balance, and what of a ledger is known (fetches)",
        f"SELECT * FROM balance_transactions WHERE {WORLD} AND customer = 'cus_1'",
    ),
    "invoices_customer": ("GET /v1/invoices?customer=", f"SELECT * FROM invoices WHERE {WORLD} AND customer = 'cus_1'"),
    "invoices_newest": ("GET /v1/invoices", f"SELECT * FROM invoices {PAGE}"),
    "credit_notes_invoice": (
        "what of an order is credited (order_book), GET /v1/credit-notes?invoice=",
        f"SELECT * FROM credit_notes WHERE {WORLD} AND invoice = 'in_1'",
    ),
    "credit_notes_customer": (
        "GET /v1/credit-notes?customer=",
        f"SELECT * FROM credit_notes WHERE {WORLD} AND customer = 'cus_1'",
    ),
    "credit_notes_refund": (
        "the note of which a refund is a part (settling)",
        f"SELECT id FROM credit_notes WHERE {WORLD} AND refund = 're_1'",
    ),
    "credit_notes_newest": ("GET /v1/credit-notes", f"SELECT * FROM credit_notes {PAGE}"),
    "credit_note_lines_credit_note": (
        "the lines of a note (GET /v1/credit-notes/{id}, projection)",
        f"SELECT * FROM credit_note_lines WHERE {WORLD} AND credit_note = 'cn_1'",
    ),
    "invoice_payments_invoice": (
        "how an order's invoice was paid (order_book)",
        f"SELECT * FROM invoice_payments WHERE {WORLD} AND invoice = 'in_1'",
    ),
    "invoice_payments_payment_intent": (
        "the invoice that a refund is of (refunding)",
        f"SELECT * FROM invoice_payments WHERE {WORLD} AND payment_intent = 'pi_1'",
    ),
    "invoice_payments_charge": (
        "the invoice that a charge's refund is of (refunding)",
        f"SELECT * FROM invoice_payments WHERE {WORLD} AND charge = 'ch_1'",
    ),
    "refunds_payment_intent": (
        "the refunds of an order (order_book, refunding)",
        f"SELECT * FROM refunds WHERE {WORLD} AND payment_intent = 'pi_1'",
    ),
    "refunds_charge": (
        "the refunds of a charge (order_book, refunding, rules)",
        f"SELECT * FROM refunds WHERE {WORLD} AND charge = 'ch_1'",
    ),
    "refunds_newest": ("GET /v1/refunds", f"SELECT * FROM refunds {PAGE}"),
    "charges_payment_intent": (
        "the charges of an order (order_book, rules)",
        f"SELECT id FROM charges WHERE {WORLD} AND payment_intent = 'pi_1'",
    ),
    "charges_invoice": (
        "the charges of an order's invoice (order_book, refunding)",
        f"SELECT id FROM charges WHERE {WORLD} AND invoice = 'in_1'",
    ),
    "disputes_payment_intent": (
        "the disputes of an order (order_book)",
        f"SELECT amount FROM disputes WHERE {WORLD} AND payment_intent = 'pi_1'",
    ),
    "disputes_charge": (
        "the disputes of an order's charge (order_book)",
        f"SELECT amount FROM disputes WHERE {WORLD} AND charge = 'ch_1'",
    ),
    "portal_sessions_newest": ("GET /v1/portal/sessions", f"SELECT * FROM portal_sessions {PAGE}"),
    "portal_sessions_open": (
        "portal sessions that have expired (timekeeping)",
        "SELECT id FROM portal_sessions WHERE expired_at IS NULL AND created < now() ORDER BY created LIMIT 500",
    ),
    "hourly_sums_key": (
        "the sums of a period (GET /v1/summary)",
        "SELECT * FROM hourly_sums WHERE hour >= now() - interval '1 day' AND hour < now()",
    ),
    "link_sums_key": (
        "the funnel of a payment link (GET /v1/funnel)",
        f"SELECT * FROM link_sums WHERE {WORLD} AND payment_link = 'plink_1'",
    ),
    "changes_one_shot": (
        "a change that is announced once (projection, swap: ON CONFLICT)",
        f"SELECT seq FROM changes WHERE {WORLD} AND {HAS_CS_1} AND subject_id = 'cs_1' AND kind = 'order.paid'",
    ),
    "changes_dispute_closed": (
        "how a dispute was closed (projection, swap: ON CONFLICT)",
        f"SELECT seq FROM changes WHERE {WORLD} AND kind = 'dispute.closed' AND subject_id = 'dp_1' AND after IS NULL",
    ),
    "changes_corrected": (
        "the last correction of an order (correcting)",
        f"SELECT seq FROM changes WHERE kind = 'order.corrected' AND {WORLD} AND subject_id = 'cs_1' ORDER BY seq",
    ),
    "changes_balance": (
        "whether a balance has an announced change (correcting)",
        f"SELECT seq FROM changes WHERE kind = 'balance.changed' AND {WORLD} AND subject_id = 'cus_1'",
    ),
    "changes_refund": (
        "the last announced change of an order's refunds (refunding)",
        f"SELECT seq FROM changes WHERE kind = 'order.refund_changed' AND {WORLD} AND subject_id = 'cs_1' ORDER BY seq",
    ),
    "changes_shown": (
        "the change feed (GET /v1/changes)",
        "SELECT seq FROM changes WHERE withheld IS NULL AND seq > 0 ORDER BY seq LIMIT 100",
    ),
    "changes_withheld": (
        "how many changes are withheld, by kind (status, changes withheld)",
        "SELECT count(*) FROM changes WHERE withheld IS NOT NULL AND kind = 'invoice.changed'",
    ),
    "anomalies_in_force": (
        "what is wrong with an object (projection)",
        f"SELECT id FROM anomalies WHERE {WORLD} AND subject_id = 'cs_1' AND resolved_at IS NULL",
    ),
}
"""By index: its purpose (and the module or route that needs it), and a query that it answers."""


def test_every_index_has_a_query() -> None:
    """Every index has a query that needs it, and every query listed here has an index."""
    assert {index.name for table in tables.metadata.tables.values() for index in table.indexes} == set(ASKED)


@pytest.mark.parametrize("index", ASKED)
def test_the_index_answers_its_query(database_url: str, index: str) -> None:
    """With sequential scans disabled, PostgreSQL chooses the index for its query."""
    _, query = ASKED[index]
    engine = database.engine(database_url)
    with database.transaction(engine) as connection:
        # Of tables without rows the planner only sees the shapes.
        connection.execute(text("SET LOCAL enable_seqscan = off; SET LOCAL enable_sort = off"))
        plan = "\n".join(line for (line,) in connection.execute(text(f"EXPLAIN {query}")))
    engine.dispose()

    assert f" {index} " in plan or plan.rstrip().endswith(f" {index}") or f" {index}\n" in plan, plan


@pytest.mark.parametrize(
    "table", [tables.order_book, tables.events, tables.payment_links, tables.credit_notes], ids=str
)
@pytest.mark.parametrize("account", [None, "acct_1"])
def test_an_id_is_found_by_the_key(engine: Engine, table: Table, account: str | None) -> None:
    """A query by id without an account reads one index entry in each account, on any PostgreSQL."""
    asked = {"id": "id_1", "modes": [True, False]} | ({} if account is None else {"account": account})
    query = lookup.query_of(table, of_account=account is not None).params(asked)
    plan = explained(engine, query, "SET LOCAL enable_seqscan = off; SET LOCAL enable_bitmapscan = off")

    conditions = [line for line in plan if "Index Cond" in line and "id_1" in line]
    assert len(conditions) == 1, plan
    assert all(column in conditions[0] for column in ("account", "livemode", "id")), plan


ROWS: Final = 20_000
PAGES_MAX: Final = 100


@pytest.mark.parametrize("world", [{}, {"account": "acct_1"}, {"livemode": True}], ids=str)
def test_a_filter_without_a_world_looks_at_no_others(engine: Engine, world: dict[str, object]) -> None:
    """Listing a customer's orders reads no other orders, with or without an account, on any PostgreSQL."""
    fill(engine, _MANY_ORDERS)
    orders = tables.orders
    given = {"customer": "cus_8", "account": None, "livemode": None, **world}
    query = select(orders.c.id).where(*lookup.where(orders, given)).order_by(text(f"{tables.NEWEST} DESC")).limit(21)

    found, pages = rows_and_pages(engine, query)

    assert [row.id for row in found] == ["cs_8"]
    assert pages < PAGES_MAX


@pytest.mark.parametrize("field", ["created_from", "created_before"])
def test_a_time_is_found_by_the_index_that_a_list_pages_by(engine: Engine, field: str) -> None:
    """Listing orders of the distant past or of the future reads no other orders."""
    fill(engine, _MANY_ORDERS)
    orders, far = tables.orders, timedelta(days=36_500)
    at = datetime.now(UTC) + (far if field == "created_from" else -far)
    filters = OrderFilters.model_validate({field: at})
    query = select(orders.c.id).where(*filters.wanted(orders)).order_by(text(f"{tables.NEWEST} DESC")).limit(21)

    found, pages = rows_and_pages(engine, query)

    assert found == []
    assert pages < PAGES_MAX


@pytest.mark.parametrize("last_paid", [ROWS * 3 // 4, 30], ids=["usual status", "rare status"])
def test_orders_of_a_status_are_found_behind_many_of_another(engine: Engine, last_paid: int) -> None:
    """A page of orders of one status reads none of another, also where thousands of those are newer."""
    paid = f"n <= {last_paid} AND n %% 5 > 0"
    fill(engine, _MANY_ORDERS.replace("'paid'", f"CASE WHEN {paid} THEN 'paid' ELSE 'failed' END"))

    found, pages = rows_and_pages(engine, lookup.newest_keys([], status="paid", limit=20))

    assert [row.id for row in found] == [f"cs_{n}" for n in range(last_paid, 0, -1) if n % 5][:20]
    # A page of the index or of the table for each order at most, and few more to get there.
    assert pages < 30


OLDEST: Final = datetime(2026, 1, 1, tzinfo=UTC)
RARE: Final[dict[str, tuple[EventFilters, list[int]]]] = {
    # Filters that find a few of the oldest events, and their numbers, newest received first.
    "state pending": (EventFilters(state="pending"), [2, 1]),
    "state parked": (EventFilters(state="parked"), [4, 3]),
    "state ignored": (EventFilters(state="ignored"), [13, 7, 5]),
    "cause ignored": (EventFilters(cause="type_unwanted"), [13]),
    "cause parked": (EventFilters(cause="row_refused"), [4, 3]),
    "cause pending": (EventFilters(cause="machine_short"), [1]),
    "cause of an operator": (EventFilters(cause="set_aside"), [5]),
    "cause thin": (EventFilters(cause="thin_event"), [7]),
    "type": (EventFilters(type="charge.dispute.closed"), [6]),
    "types": (EventFilters(type="*.dispute.*"), [6]),
    "no type": (EventFilters(type="invoice.*"), []),
    "source": (EventFilters(source="gap"), [9, 8]),
    "account": (EventFilters(account="acct_rare"), [10]),
    "mode": (EventFilters(livemode=False), [11]),
    "object": (EventFilters(object_id="cus_12"), [12]),
    "received before": (EventFilters(received_before=OLDEST + timedelta(seconds=3)), [2, 1]),
    "received within": (
        EventFilters(received_from=OLDEST + timedelta(seconds=5), received_before=OLDEST + timedelta(seconds=7)),
        [6, 5],
    ),
    "several": (EventFilters(type="customer.*", source="gap", livemode=True, account="acct_1"), [8]),
}
ROWS_READ_MAX: Final = 2_500
"""Of all tables, where a page looks at a thousand events at most."""


@pytest.mark.parametrize("rare", RARE)
def test_few_events_of_many_are_found_without_looking_at_the_others(engine: Engine, rare: str) -> None:
    """Listing events by any filter that an index serves reads no other events, however long the inbox is."""
    fill(engine, _LONG_INBOX)
    filters, expected = RARE[rare]

    found, read = _page_and_rows_read(engine, filters, None)

    assert ([row["seq"] for row in found.rows], found.following) == (expected, None)
    assert read < ROWS_READ_MAX


@pytest.mark.parametrize("world", [{}, {"account": "acct_0", "livemode": True}], ids=str)
def test_a_page_of_events_looks_at_a_bounded_part_of_them(engine: Engine, world: dict[str, Any]) -> None:
    """Where no index leads to few events, a page looks at a bounded number, and the pages lead to all that match."""
    fill(engine, _LONG_INBOX)
    with database.transaction(engine) as connection:
        connection.execute(text("UPDATE outcomes SET state = 'ignored' WHERE seq > 100 AND seq % 7 = 0"))
    filters = EventFilters(type="*", cause="thin_event", **world)
    seen: list[int] = []
    after: Position | None = None
    for page in range(ROWS // 1_000 + 1):
        found, read = _page_and_rows_read(engine, filters, after)
        # Of each event the outcome and what is pending are read, too.
        assert read < ROWS_READ_MAX * 4
        seen += [row["seq"] for row in found.rows]
        after = found.following
        assert (after is None) == (page == ROWS // 1_000)

    assert seen == [7]


@pytest.mark.parametrize("state", ["parked", "pending"])
def test_a_page_of_events_that_wait_looks_at_a_bounded_part_of_them(engine: Engine, state: str) -> None:
    """Where most events are parked or pending, the newest are found without looking at the others."""
    fill(engine, _LONG_INBOX)
    with database.transaction(engine) as connection:
        connection.execute(text(_MOST_WAIT[state]))
        connection.execute(text("ANALYZE"))
    seen: list[int] = []
    after: Position | None = None
    for _ in range(3):
        found, read = _page_and_rows_read(engine, EventFilters(state=state, type="customer.*"), after)
        # Those of the index are counted until there are too many, and of each event the outcome is read, too.
        assert read < ROWS_READ_MAX * 4
        seen += [row["seq"] for row in found.rows]
        after = found.following

    # The last of all is of another type.
    assert seen == list(range(ROWS - 1, ROWS - 64, -1))


def test_the_groups_of_parked_events_look_at_a_bounded_part_of_them(engine: Engine) -> None:
    """Of many parked events a bounded number is looked at, also where all of them are to be folded again."""
    fill(engine, _LONG_INBOX)
    with database.transaction(engine) as connection:
        connection.execute(text(_MOST_WAIT["parked"]))
        connection.execute(text("INSERT INTO pending (seq, again) SELECT seq, true FROM outcomes"))
        connection.execute(text("ANALYZE"))
    with database.transaction(engine) as connection, database.cursor(connection) as cursor:
        scanned_before, read_before = cursor.execute(_ROWS_READ).fetchall()[0]
        found = parked.groups(connection, events_max=500)
        scanned, read = cursor.execute(_ROWS_READ).fetchall()[0]

    assert (found.groups, found.is_cut, scanned) == ([], True, scanned_before)
    assert read - read_before < ROWS_READ_MAX * 2


_MOST_WAIT: Final = {
    "parked": "UPDATE outcomes SET state = 'parked', cause = 'row_refused'",
    "pending": "WITH gone AS (DELETE FROM outcomes RETURNING seq) INSERT INTO pending (seq) SELECT seq FROM gone",
}


def test_the_worlds_are_found_without_reading_the_inbox(engine: Engine) -> None:
    """The accounts and modes cost a look at the index each, also a mode of which there is no event."""
    fill(engine, _LONG_INBOX)
    with database.transaction(engine) as connection:
        connection.execute(text("DELETE FROM inbox WHERE NOT livemode"))
        connection.execute(text("ANALYZE inbox"))

    with database.transaction(engine) as connection, database.cursor(connection) as cursor:
        scanned_before, read_before = cursor.execute(_ROWS_READ).fetchall()[0]
        found = accounts.worlds(cursor, limit=2)
        scanned, read = cursor.execute(_ROWS_READ).fetchall()[0]

    assert found == [("acct_0", True), ("acct_1", True)]
    assert (scanned - scanned_before, read - read_before < 20) == (0, True)


def _page_and_rows_read(engine: Engine, filters: EventFilters, after: Position | None) -> tuple[EventPage, int]:
    """Return a page of events, and how many rows were read for it, none of them by a scan of the inbox."""
    columns = [tables.events.c.seq]
    with database.transaction(engine) as connection, database.cursor(connection) as cursor:
        # The counters may still have what earlier transactions of this session read.
        scanned_before, read_before = cursor.execute(_ROWS_READ).fetchall()[0]
        found = event_filters.page(connection, filters, columns, after=after, limit=21, scan_rows_max=1_000)
        scanned, read = cursor.execute(_ROWS_READ).fetchall()[0]
    assert scanned == scanned_before
    return found, read - read_before


_ROWS_READ: Final = """
SELECT coalesce(sum(seq_tup_read) FILTER (WHERE relname IN ('inbox', 'payloads')), 0)::bigint,
    sum(coalesce(seq_tup_read, 0) + coalesce(idx_tup_fetch, 0))::bigint
FROM pg_stat_xact_user_tables
"""


def test_the_changes_of_an_event_are_found_without_looking_at_others(engine: Engine) -> None:
    """What an event changed of its object and its orders costs the same in a feed of any length."""
    fill(engine, _CHANGES_OF_MANY)
    event = {"account": "", "livemode": True, "id": "evt_8", "object_id": "ch_8"}

    with database.transaction(engine) as connection, database.cursor(connection) as cursor:
        scanned_before, read_before = cursor.execute(_CHANGES_READ).fetchall()[0]
        found = trace.changes_of(connection, event, ["cs_8"])
        scanned, read = cursor.execute(_CHANGES_READ).fetchall()[0]

    # The balance is that of a customer whom the event does not name.
    assert {row["kind"] for row in found} == {"order.paid", "order.refund_changed", "order.corrected", "dispute.closed"}
    assert scanned == scanned_before
    assert read - read_before < PAGES_MAX


_CHANGES_READ: Final = """
SELECT coalesce(sum(seq_tup_read), 0)::bigint, sum(coalesce(seq_tup_read, 0) + coalesce(idx_tup_fetch, 0))::bigint
FROM pg_stat_xact_user_tables WHERE relname = 'changes'
"""
_CHANGES_OF_MANY: Final = """
INSERT INTO changes (account, livemode, subject, subject_id, kind, event_id, source, at, after)
SELECT '', true, subject, name || '_' || n, kind, 'evt_' || n, 'webhook', now(), '{"status": "lost"}'
FROM (VALUES ('order', 'cs', 'order.paid'), ('order', 'cs', 'order.refund_changed'), ('order', 'cs', 'order.corrected'),
    ('balance', 'cus', 'balance.changed'), ('dispute', 'ch', 'dispute.closed')) AS kinds (subject, name, kind),
    generate_series(1, %(rows)s) AS n
"""


def test_a_page_of_the_feed_looks_at_a_bounded_part_of_it(engine: Engine) -> None:
    """A filter without matches scans a bounded part of the feed, however long the feed and its withheld part are."""
    fill(engine, _LONG_FEED)
    wanted = feed.selection(livemode=False, kind=frozenset(("order.paid", "order.expired")))

    with database.transaction(engine) as connection:
        page = feed.page(connection, 0, 100, wanted, scan_rows_max=200)
    found, pages = rows_and_pages(engine, feed.query_of(wanted, 0, page.next_after, 101, 200))

    # The first half is withheld.
    assert (page.rows, page.next_after, page.has_more) == ([], ROWS // 2 + 200, True)
    assert found == []
    assert pages < PAGES_MAX


@pytest.mark.parametrize("order", ["cs_7", "cs_8"], ids=["by its intent", "by its invoice"])
def test_an_order_s_money_is_found_without_looking_at_others(engine: Engine, order: str) -> None:
    """An order's refunded amount costs the same however many charges, refunds and payments there are."""
    fill(engine, _MUCH_MONEY)
    book = tables.order_book
    where = (book.c.account == "", book.c.livemode.is_(True), book.c.id == order)
    shown = select(book.c.refunded_amount, book.c.disputed_amount, book.c.refund_status).where(*where)

    found, pages = rows_and_pages(engine, shown)

    assert [tuple(row) for row in found] == [(500, 0, "partial")]
    assert pages < PAGES_MAX


@pytest.mark.parametrize("table", ["orders", "charges", "refunds", "invoice_payments"])
def test_a_batch_finds_its_refunds_without_looking_at_others(engine: Engine, table: str) -> None:
    """Finding the orders that a batch's rows refund reads no table whole, whichever side came last."""
    fill(engine, _MUCH_MONEY)
    prefix = {"orders": "cs", "charges": "ch", "refunds": "re", "invoice_payments": "inpay"}[table]
    subjects = [Subject(table, "", True, f"{prefix}_{number}") for number in (7, 8)]  # noqa: FBT003 - the mode
    with database.transaction(engine) as connection, database.cursor(connection) as cursor:
        # The counters may still have what earlier transactions of this session read.
        read_before = cursor.execute(_READ_WHOLE).fetchall()
        rows = load_rows(cursor, subjects)
        joined = {
            subject: Joined(row, (), (), "webhook", is_whole=True, replace_all=False) for subject, row in rows.items()
        }
        found = order_refunds.changes(cursor, order_refunds.moved(joined, {}))
        read_whole = cursor.execute(_READ_WHOLE).fetchall()

    refunded = {row["subject_id"]: row["after"]["refunded_amount"] for row in found}
    assert refunded == ({"cs_8": 500} if table == "invoice_payments" else {"cs_7": 500, "cs_8": 500})
    assert read_whole == read_before


# Tables without rows are scanned too, which costs nothing.
_READ_WHOLE: Final = """
SELECT relname, seq_tup_read FROM pg_stat_xact_user_tables WHERE seq_tup_read > 0 ORDER BY relname
"""


def test_a_batch_finds_its_facts_without_looking_at_others(engine: Engine) -> None:
    """Looking for the facts of some objects reads no other events, also by a plan of an empty inbox."""
    subjects = {Subject("orders", "acct_1", True, f"cs_none_{number}") for number in range(200)}  # noqa: FBT003 - the mode
    with database.transaction(engine) as connection, database.cursor(connection) as cursor:
        cursor.execute("ANALYZE")
        probe_indexes(cursor)
        for _ in range(10):  # so that the statement is prepared
            facts_of(cursor, subjects, {})
        cursor.execute(_LONG_INBOX, {"rows": ROWS})
        cursor.execute(_INBOX_FETCHED)
        before = cursor.fetchone()
        found = facts_of(cursor, subjects, {})
        cursor.execute(_INBOX_FETCHED)
        after = cursor.fetchone()

    assert found == {subject: [] for subject in subjects}
    assert after == before


_INBOX_FETCHED: Final = """
SELECT coalesce(sum(seq_tup_read), 0)::bigint, coalesce(sum(idx_tup_fetch), 0)::bigint
FROM pg_stat_xact_user_tables WHERE relname IN ('inbox', 'outcomes')
"""


def test_events_of_an_object_are_those_of_its_world(engine: Engine) -> None:
    """Two accounts have an object of one id, in both modes: each has its own event, by either form of the look-up."""
    worlds = [(account, livemode) for account in ("acct_1", "acct_2") for livemode in (True, False)]
    for account, livemode in worlds:
        body = {
            "id": f"evt_{account}_{livemode}",
            "object": "event",
            "type": "checkout.session.completed",
            "created": 1_760_000_000,
            "livemode": livemode,
            "data": {"object": {"id": "cs_1", "object": "checkout.session"}},
        }
        ledger.record(engine, [ledger.delivery(msgspec.json.encode(body), account=account)])
    found = {(row["account"], row["livemode"]) for row in ledger.rows(engine, "SELECT account, livemode FROM inbox")}
    assert found == set(worlds)

    inbox = tables.inbox
    for account, livemode in worlds:
        own = tables.of_object("inbox", f"'{account}'", str(livemode), "'cs_1'")
        rows = ledger.rows(engine, f"SELECT account, livemode FROM inbox WHERE {own}")
        assert [(row["account"], row["livemode"]) for row in rows] == [(account, livemode)]
    with engine.connect() as connection:
        for asked in [*worlds, ("acct_1", None), (None, False), (None, None)]:
            wanted = lookup.of_object("cs_1", account=asked[0], livemode=asked[1])
            seen = connection.execute(select(inbox.c.account, inbox.c.livemode).where(*wanted)).all()
            assert {tuple(row) for row in seen} == {
                world for world in worlds if asked[0] in (None, world[0]) and asked[1] in (None, world[1])
            }


def test_the_bench_warms_indexes_and_not_tables(engine: Engine) -> None:
    """What the bench reads before it writes into a long history is these indexes, and the rows of one of them alone."""
    with database.transaction(engine) as connection, database.cursor(connection) as cursor:
        cursor.execute(figures.BY_INDEX)
        scans = [
            re.search(r"(Index.* Scan) using (\w+)", "\n".join(line for (line,) in cursor.fetchall()))
            for statement in figures.ANYWHERE
            if cursor.execute(f"EXPLAIN {statement}")
        ]

    assert [scan and scan.groups() for scan in scans] == [
        ("Index Only Scan", "changes_one_shot"),
        ("Index Only Scan", "inbox_object_hash"),
        ("Index Scan", "orders_customer_email"),
        ("Index Only Scan", "orders_pkey"),
        ("Index Only Scan", "charges_pkey"),
        ("Index Only Scan", "orders_amount"),
        ("Index Only Scan", "orders_payment_intent"),
        ("Index Only Scan", "charges_payment_intent"),
    ]


def test_events_of_an_object_are_found_by_a_plan_for_all_objects(engine: Engine) -> None:
    """What people look for by an object's id is found by its hash, also where one plan is kept for all parameters."""
    wanted = lookup.of_object("cs_1", account="acct_1", livemode=True)
    query = select(tables.inbox.c.seq).where(*wanted).order_by(tables.inbox.c.seq.desc()).limit(21)
    compiled = query.compile(dialect=postgresql.dialect(paramstyle="numeric_dollar"))  # type: ignore[no-untyped-call]  # SQLAlchemy's own
    values = ", ".join(f"'{compiled.params[name]}'" for name in compiled.positiontup or ())
    with database.transaction(engine) as connection, database.cursor(connection) as cursor:
        probe_indexes(cursor)
        cursor.execute(f"PREPARE look AS {compiled}")
        plan = "\n".join(line for (line,) in cursor.execute(f"EXPLAIN EXECUTE look ({values})").fetchall())
        cursor.execute("DEALLOCATE look")

    assert "Index Cond: (hashtextextended(object_id" in plan, plan


@pytest.mark.parametrize("known", ["ANALYZE", "TRUNCATE {tables}"], ids=["small", "empty"])
def test_no_statement_of_a_fold_reads_an_index_by_half_a_key(database_url: str, known: str) -> None:
    """A plan that was made of empty tables, or of small ones, finds each row by the whole of its key."""
    folding = database.engine(database_url, connections_max=1, prepare_after=0)
    account = shop_history(4, 60, money=True)
    kind = "payfold.checkout.session.observed"
    seen = [
        observations.observe(kind, each, account="", livemode=False, created=account.now, now=ledger.NOW)
        for each in map(account.session, account.session_ids())
    ]
    bodies = [event.body for event in account.events]
    copies = [body.replace(b'"usd"', b'"eur"') if at % 2 else body + b" " for at, body in enumerate(bodies)]
    with database.transaction(folding) as connection, database.cursor(connection) as cursor:
        every = [name for (name,) in cursor.execute(_TABLES).fetchall()]
        for name in every:  # else PostgreSQL may look at them by itself within a slow test
            cursor.execute(f"ALTER TABLE {name} SET (autovacuum_enabled = false)")
    for several in (seen, map(ledger.delivery, bodies), map(ledger.delivery, copies)):
        ledger.record(folding, several)
        ledger.fold(folding, limit=20)

    with database.transaction(folding) as connection, database.cursor(connection) as cursor:
        prepared = cursor.execute(_PREPARED).fetchall()
        # So that the planner knows as much as of the tables of a first hour, or of new ones.
        cursor.execute(known.format(tables=", ".join(every)))
        probe_indexes(cursor)
        plans = [
            (" ".join(statement.split()), cursor.execute(f"EXPLAIN (FORMAT json) EXECUTE {call}").fetchall()[0][0])
            for statement, call in prepared
        ]
    folding.dispose()

    found = {
        statement: scans for statement, [plan] in plans if (scans := half_keyed(plan["Plan"]) - WITHOUT_A_KEY.keys())
    }
    assert [each for each in EXPECTED if not any(each in statement for statement, _ in plans)] == []
    assert found == {}


EXPECTED: Final = (
    "bool_or(EXISTS (SELECT FROM charges",
    "own_failed_at",
    "i.source = 'observation'",
    "SET content_sha256 =",
    'DELETE FROM "order_lines"',
    'DELETE FROM "balance_changes"',
    "FROM charges AS c WHERE (c.account, c.livemode, c.id)",
)
"""Some of the statements, which shows that a fold prepares them here."""
WITHOUT_A_KEY: Final = {
    **dict.fromkeys(("account_names", "account_names_pkey"), "a row for each account that was renamed"),
    "inbox_set_aside": "the first entry alone",
    "pending_pkey": "the first entries of a queue",
    "renderings_fresh": "the copies that came and are to be compared",
    "unsettled_pkey": "the first entries of a queue",
}
_PREPARED: Final = """
SELECT statement, name || coalesce('(' || (SELECT string_agg('NULL', ', ') FROM unnest(parameter_types)) || ')', '')
FROM pg_prepared_statements WHERE statement ~* '^\\s*(SELECT|WITH|INSERT|UPDATE|DELETE)'
"""
_OF_MANY: Final = {"account", "livemode", "fold_version", "kind", "source", "state", "status", "subject", "type"}
"""Columns of which one value is in many rows."""


def half_keyed(plan: dict[str, Any]) -> set[str]:
    """Return the indexes, or the tables, from which *plan* reads more than some keys: all, or all of an account."""
    found = set[str]().union(*map(half_keyed, plan.get("Plans", [])))
    if plan["Node Type"] in _SCANS:
        asked = set(re.findall(r"\((\w+)(?:\(\w+, '0'::bigint\))? = ", plan.get("Index Cond", "")))
        if not asked - _OF_MANY:
            found.add(plan.get("Index Name", plan.get("Relation Name", "")))
    return found


_SCANS: Final = ("Seq Scan", "Index Scan", "Index Only Scan", "Bitmap Index Scan")


def test_a_batch_reads_as_much_after_a_first_import(engine: Engine) -> None:
    """Without statistics, as in a first import, a batch reads no more rows of any table than in empty tables.

    An index that holds only the id of the other object looks worse then than any that begins with account and mode.
    """
    for row in ledger.rows(engine, _TABLES):  # else PostgreSQL may look at them by itself within a slow test
        ledger.execute(engine, f"ALTER TABLE {row['relname']} SET (autovacuum_enabled = false)")
    few, many, as_few = (shop_history(seed, orders, money=True) for seed, orders in ((1, 40), (2, 1_000), (3, 40)))

    at_first = read_by_folding(engine, few)
    ledger.record(engine, [ledger.delivery(event.body) for event in many.events])
    ledger.fold(engine)
    later = read_by_folding(engine, as_few)

    assert ledger.rows(engine, "SELECT reltuples FROM pg_class WHERE relname = 'orders'") == [{"reltuples": -1}]
    assert later.others / len(as_few.events) < 2 * at_first.others / len(few.events)
    # What was deleted is passed over as long as any transaction may see it, which others decide: once, at most.
    assert later.pending < 2 * at_first.pending + len(many.events)


class _Read(NamedTuple):
    """Entries of indexes, and rows, of `pending` and of all other tables."""

    pending: int
    others: int


def read_by_folding(engine: Engine, account: Account) -> _Read:
    """Fold the events of *account* in one batch, and return what that read."""
    ledger.record(engine, [ledger.delivery(event.body) for event in account.events])
    with database.transaction(engine) as connection, database.cursor(connection) as cursor:
        probe_indexes(cursor)
        before = cursor.execute(_ENTRIES_READ).fetchall()[0]
        claimed = claim(cursor, limit=len(account.events))
        projection.project(cursor, claimed, now=ledger.NOW)
        after = cursor.execute(_ENTRIES_READ).fetchall()[0]
    assert len(claimed) == len(account.events)
    return _Read(after[0] - before[0], after[1] - before[1])


_TABLES: Final = """
SELECT c.relname FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace
WHERE c.relkind = 'r' AND n.nspname = 'public'
"""
_ENTRIES_READ: Final = """
SELECT sum(entries) FILTER (WHERE relname LIKE 'pending%')::bigint,
    sum(entries) FILTER (WHERE relname NOT LIKE 'pending%')::bigint
FROM (
    SELECT c.relname, pg_stat_get_xact_tuples_returned(c.oid) + pg_stat_get_xact_tuples_fetched(c.oid) AS entries
    FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace
    WHERE c.relkind IN ('r', 'i') AND n.nspname = 'public'
) AS counted
"""


@pytest.mark.parametrize("world", [{}, {"account": "acct_1"}, {"livemode": True}], ids=str)
def test_a_summary_reads_the_sums_of_its_hours(engine: Engine, world: dict[str, Any]) -> None:
    """The summary of 30 days reads its sums, and no row of another table or hour, in a history of two years."""
    fill(engine, _LONG_HISTORY)
    vacuum(engine)
    until = datetime(2026, 11, 1, tzinfo=UTC)
    period = summary.Period(until - timedelta(days=30), until)
    asked = {"account": None, "livemode": None, **world}

    found, pages = rows_and_pages(engine, summary.query_of(period, **asked))
    plan = "\n".join(explained(engine, summary.query_of(period, **asked), "SELECT"))

    # Of each hour there is an order in usd and one in eur, of one account and mode.
    assert sum(row.counted for row in found if not row.is_undated) == 2 * 30 * 24
    assert set(re.findall(r" on (\w+)", plan)) - {"rows"} == {"hourly_sums", "hourly_deltas", "hourly_sums_key"}
    assert pages < PAGES_MAX


@pytest.mark.parametrize("world", [{}, {"account": "acct_1", "livemode": True}], ids=str)
@pytest.mark.parametrize("after", [None, summary.LinkKey("acct_1", True, "plink_8", "usd")])  # noqa: FBT003 - live
def test_a_page_of_the_funnel_reads_the_sums_of_its_links(
    engine: Engine, world: dict[str, Any], after: summary.LinkKey | None
) -> None:
    """The end of a page is found without looking at other links, and a page sums no more than the links on it."""
    fill(engine, _MANY_LINKS)
    vacuum(engine)

    (end, _), pages = rows_and_pages(engine, summary.end_query_of(world, after, 20))
    query = summary.funnel_query_of(world, after, summary.LinkKey._make(end))
    found, _ = rows_and_pages(engine, query)
    plan = "\n".join(explained(engine, query, "SELECT"))

    assert len(found) == 20
    assert pages < PAGES_MAX
    assert set(re.findall(r" on (\w+)", plan)) - {"rows"} <= {"link_sums", "link_deltas", "link_sums_key"}


# The last of the hours are before November 2026.
_LONG_HISTORY: Final = """
INSERT INTO orders (account, livemode, id, status, currency, amount_total, created, as_of, event_id)
SELECT 'acct_1', true, 'cs_' || n || currency, 'paid', currency, 1500,
    '2026-11-01 00:00Z'::timestamptz - n * interval '1 hour', now(), 'evt_' || n
FROM generate_series(1, %(rows)s) AS n CROSS JOIN unnest(ARRAY['usd', 'eur']) AS currency;
SELECT merge_sums()
"""
_MANY_LINKS: Final = """
INSERT INTO orders (account, livemode, id, status, currency, amount_total, payment_link, created, as_of, event_id)
SELECT 'acct_1', true, 'cs_' || n, 'paid', 'usd', 1500, 'plink_' || n, now(), now(), 'evt_' || n
FROM generate_series(1, %(rows)s) AS n;
SELECT merge_sums()
"""
# Orders with an even number have an invoice. Each was paid 1500, of which 500 were refunded.
_MUCH_MONEY: Final = """
INSERT INTO orders (account, livemode, id, status, currency, amount_total, payment_intent, invoice, as_of, event_id)
SELECT '', true, 'cs_' || n, 'paid', 'usd', 1500, CASE WHEN n %% 2 = 1 THEN 'pi_' || n END,
    CASE WHEN n %% 2 = 0 THEN 'in_' || n END, now(), 'evt_' || n
FROM generate_series(1, %(rows)s) AS n;
INSERT INTO charges (account, livemode, id, payment_intent, status, currency, amount, captured, amount_captured,
    captured_at, amount_refunded, as_of, event_id)
SELECT '', true, 'ch_' || n, 'pi_' || n, 'succeeded', 'usd', 1500, true, 1500, now(), 500, now(),
    'evt_' || n
FROM generate_series(1, %(rows)s) AS n;
INSERT INTO refunds (account, livemode, id, charge, status, currency, amount, created, as_of, event_id)
SELECT '', true, 're_' || n, 'ch_' || n, 'succeeded', 'usd', 500, now(), now(), 'evt_' || n
FROM generate_series(1, %(rows)s) AS n;
INSERT INTO disputes (account, livemode, id, charge, status, currency, amount, as_of, event_id)
SELECT '', true, 'dp_' || n, 'ch_' || n, 'won', 'usd', 1500, now(), 'evt_' || n
FROM generate_series(1, %(rows)s) AS n;
INSERT INTO invoice_payments (account, livemode, id, invoice, payment_intent, as_of, event_id)
SELECT '', true, 'inpay_' || n, 'in_' || n, 'pi_' || n, now(), 'evt_' || n
FROM generate_series(2, %(rows)s, 2) AS n
"""
_MANY_ORDERS: Final = """
INSERT INTO orders (account, livemode, id, status, customer, payment_intent, created, as_of, event_id)
SELECT 'acct_' || n %% 7, true, 'cs_' || n, 'paid', 'cus_' || n, 'pi_' || n, now() + n * interval '1 second', now(),
    'evt_' || n
FROM generate_series(1, %(rows)s) AS n
"""
_LONG_FEED: Final = """
INSERT INTO changes (account, livemode, subject, subject_id, kind, event_id, source, at, withheld)
SELECT '', true, 'order', 'cs_' || n, 'order.paid', 'evt_' || n, 'webhook', now(),
    CASE WHEN n <= %(rows)s / 2 THEN 'import' END
FROM generate_series(1, %(rows)s) AS n
"""
# The queries look for the first events, so that reading from the newest finds nothing early.
_LONG_INBOX: Final = """
WITH recorded AS (
    INSERT INTO inbox (account, livemode, id, seq, type, created, object_id, redacted, payload_sha256, source,
        received_at)
    OVERRIDING SYSTEM VALUE
    SELECT CASE n WHEN 10 THEN 'acct_rare' WHEN 20000 THEN 'acct_5' ELSE 'acct_' || n %% 7 END, n <> 11, 'evt_' || n, n,
        CASE n WHEN 6 THEN 'charge.dispute.closed' WHEN 7 THEN 'v1.thin' WHEN 20000 THEN 'payfold.event.ignored'
            ELSE 'customer.updated' END,
        now(), CASE n WHEN 20000 THEN 'evt_5' ELSE 'cus_' || n END, '{}', '',
        CASE WHEN n IN (8, 9) THEN 'gap' ELSE 'webhook' END,
        timestamptz '2026-01-01T00:00:00Z' + n * interval '1 second'
    FROM generate_series(1, %(rows)s) AS n
    RETURNING seq
), waiting AS (
    INSERT INTO pending (seq, again, cause)
    SELECT seq, false, CASE seq WHEN 1 THEN 'machine_short' END FROM recorded WHERE seq <= 2
)
INSERT INTO outcomes (seq, state, cause, attempts, folded_at, fold_version)
SELECT seq, CASE WHEN seq <= 4 THEN 'parked' WHEN seq IN (5, 7, 13) THEN 'ignored' ELSE 'folded' END,
    CASE WHEN seq <= 4 THEN 'row_refused' WHEN seq = 5 THEN 'set_aside' WHEN seq = 7 THEN 'thin_event'
        WHEN seq = 13 THEN 'type_unwanted' END, 1, now(), 1
FROM recorded WHERE seq > 2
"""


def fill(engine: Engine, statement: str) -> None:
    """Insert enough rows for plans to differ, and update the planner's statistics."""
    with database.transaction(engine) as connection, database.cursor(connection) as cursor:
        for each in statement.split(";"):
            cursor.execute(each, {"rows": ROWS})
        cursor.execute("ANALYZE")


def vacuum(engine: Engine) -> None:
    """Remove the deltas that were added to the sums, as PostgreSQL does within a minute."""
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("VACUUM ANALYZE hourly_deltas, hourly_sums, link_deltas, link_sums"))


def rows_and_pages(engine: Engine, query: Select[Any]) -> tuple[Sequence[Row[Any]], int]:
    """Return the rows of *query*, and how many pages it read."""
    with database.transaction(engine) as connection:
        found = connection.execute(query).all()
    plan = explained(engine, query, "SELECT", options="(ANALYZE, BUFFERS)")
    pages = next(line for line in plan if "Buffers: shared hit=" in line)
    return found, int(pages.partition("hit=")[2].split(" ")[0])


def explained(engine: Engine, query: Select[Any], settings: str, *, options: str = "") -> list[str]:
    """Return the plan of *query*, made under *settings*."""
    statement = query.compile(engine, compile_kwargs={"literal_binds": True})
    with database.transaction(engine) as connection, database.cursor(connection) as cursor:
        cursor.execute(settings)
        cursor.execute(f"EXPLAIN {options} {statement}")
        return [line for (line,) in cursor.fetchall()]


def test_a_page_that_was_planned_for_one_order_reads_no_table(database_url: str) -> None:
    """The rows of a page are found by their keys, though the one plan for them was made while there was one order."""
    reader = database.engine(database_url, connections_max=1, prepare_after=database.NEVER)
    fill(reader, _MANY_ORDERS.replace("%(rows)s", "1"))
    with database.transaction(reader) as connection:
        assert len(lookup.newest_orders(connection, [], status=None, limit=20)) == 1
    with database.transaction(reader) as connection, database.cursor(connection) as cursor:
        cursor.execute(_MANY_ORDERS.replace("generate_series(1,", "generate_series(2,"), {"rows": ROWS})
        cursor.execute(_MANY_CHARGES, {"rows": ROWS})

    with database.transaction(reader) as connection:
        found = lookup.newest_orders(connection, [], status=None, limit=20)
        scanned, read = connection.execute(text(_READ_OF_ALL)).one()
    reader.dispose()

    assert [row["id"] for row in found] == [f"cs_{ROWS - n}" for n in range(20)]
    # The counters may still have what earlier transactions of this session read, which is one order.
    assert scanned < PAGES_MAX
    assert read < PAGES_MAX


_MANY_CHARGES: Final = """
INSERT INTO charges (account, livemode, id, payment_intent, as_of, event_id)
SELECT 'acct_' || n %% 7, true, 'ch_' || n, 'pi_' || n, now(), 'evt_' || n FROM generate_series(1, %(rows)s) AS n
"""
_READ_OF_ALL: Final = """
SELECT coalesce(sum(seq_tup_read), 0)::bigint, coalesce(sum(idx_tup_fetch), 0)::bigint FROM pg_stat_xact_user_tables
"""


def test_the_lines_of_an_order_are_found_whenever_they_were_first_asked_for(database_url: str) -> None:
    """The lines of an order cost as much after a first import as before it, when no order had any."""
    reader = database.engine(database_url, connections_max=1, prepare_after=database.NEVER)
    order = {"account": "", "livemode": True, "id": "cs_8"}
    with database.transaction(reader, by_keys=True) as connection:
        assert lookup.lines_of(connection, tables.order_lines, "order_id", order) == []
    with database.transaction(reader) as connection, database.cursor(connection) as cursor:
        cursor.execute(_MANY_LINES, {"rows": ROWS})

    with database.transaction(reader, by_keys=True) as connection:
        found = lookup.lines_of(connection, tables.order_lines, "order_id", order)
        scanned, read = connection.execute(text(_READ_OF_ALL)).one()
    reader.dispose()

    assert [row["id"] for row in found] == ["li_8"]
    assert (scanned, read < PAGES_MAX) == (0, True)


_MANY_LINES: Final = """
INSERT INTO order_lines (account, livemode, id, order_id, as_of, event_id)
SELECT '', true, 'li_' || n, 'cs_' || n, now(), 'evt_' || n FROM generate_series(1, %(rows)s) AS n
"""


def test_what_was_announced_of_an_order_is_found_by_its_id(engine: Engine) -> None:
    """A step of an order is compared with what the feed has of it, and no change of another order is read."""
    step: ChangeRow = {
        "account": "",
        "livemode": True,
        "subject": "order",
        "subject_id": "cs_8",
        "kind": "order.paid",
        "event_id": "evt_0",
        "source": "webhook",
        "at": ledger.NOW,
        "before": None,
        "after": {"status": "paid", "amount_total": 100, "currency": "usd"},
    }
    with database.transaction(engine) as connection, database.cursor(connection) as cursor:
        cursor.execute(_MANY_PAID, {"rows": ROWS})
        probe_indexes(cursor)
        before = connection.execute(text(_READ_OF_ALL)).one()
        found = corrections.against_the_feed(cursor, [step])
        after = connection.execute(text(_READ_OF_ALL)).one()

    assert found == []
    assert (after[0] - before[0], after[1] - before[1]) == (0, 1)


_MANY_PAID: Final = """
INSERT INTO changes (account, livemode, subject, subject_id, kind, event_id, source, at, after)
SELECT '', true, 'order', 'cs_' || n, 'order.paid', 'evt_' || n, 'webhook', now(),
    '{"status": "paid", "amount_total": 100, "currency": "usd"}'
FROM generate_series(1, %(rows)s) AS n
"""


def test_a_page_of_orders_is_of_one_moment(database_url: str) -> None:
    """An order that changes while its page is read is shown as it was when it was found."""
    reader = database.engine(database_url, connections_max=1)
    with psycopg.connect(database_url, autocommit=True) as writer:
        writer.execute(
            "INSERT INTO orders (account, livemode, id, status, as_of, event_id)"
            " SELECT '', true, 'cs_' || n, 'open', now(), 'evt_1' FROM generate_series(1, 3) AS n"
        )

        @event.listens_for(reader, "after_cursor_execute")
        def changes(*_: object) -> None:
            writer.execute("UPDATE orders SET status = 'paid' WHERE id = 'cs_2'")

        with database.transaction(reader) as connection:
            # Several orders without a time follow each other by their ids.
            found = lookup.newest_orders(connection, [], status="open", limit=9)
            later = connection.execute(text("SELECT status FROM orders WHERE id = 'cs_2'")).scalar_one()
        now = writer.execute("SELECT status FROM orders WHERE id = 'cs_2'").fetchone()
    reader.dispose()

    assert [(row["id"], row["status"]) for row in found] == [("cs_3", "open"), ("cs_2", "open"), ("cs_1", "open")]
    assert (later, now) == ("open", ("paid",))
