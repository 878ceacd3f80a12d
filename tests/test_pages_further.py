"""Pages of payment links, customers, anomalies, reconciliations, and sessions about to expire."""

import html
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import httpx
import pytest
from sqlalchemy import Engine

from deploy.local.services import Services
from deploy.sandbox.account import Account
from schemas import broker, database, tables
from tests import ledger
from tests.web import CLERK, READER, TOKENS, Web, migrated_database, serving, settings_of
from worker import app

pytestmark = pytest.mark.integration

ONE, TWO, MANY, EMPTY = ("acct_1", False), ("acct_2", False), ("acct_3", False), ("acct_9", True)
EMAILS: Final = {"acct_1": "First.Buyer@example.com", "acct_2": "second.buyer@example.com"}
NAME: Final = "A Name Of A Buyer"
LISTS: Final = ("/payment-links", "/customers", "/anomalies", "/expiring")
Scope = tuple[str, bool]


@dataclass(frozen=True)
class Shop:
    """A running web process, and the ids of a link and a customer that two accounts share."""

    web: Web
    link: str
    customer: str
    order: str

    def see(self, path: str, world: Scope = ONE, token: str = TOKENS["admin+personal"], **more: str) -> httpx.Response:
        """Return the page at *path* in *world*."""
        with self.web.looking(token) as client:
            return client.get(path, params={"account": world[0], "livemode": str(world[1]).lower(), **more})

    def texts(self, world: Scope, token: str) -> dict[str, str]:
        """Return every page of *world* by its address."""
        paths = (*LISTS, f"/payment-links/{self.link}", f"/customers/{self.customer}")
        return {path: self.see(path, world, token, resolved="all").text for path in paths}


@pytest.fixture(scope="module")
def shop(services: Services) -> Iterator[Shop]:
    """Return a web process on two accounts with objects of the same ids, and a third with many rows."""
    with migrated_database(services) as url:
        engine = database.engine(url)
        sold = [sell(engine, name, paid=paid) for name, paid in (("acct_1", 2), ("acct_2", 1))]
        assert sold[0] == sold[1]
        for statement in (_LEDGER, _ANOMALIES, _OPEN, _MANY):
            ledger.execute(engine, statement, customer=sold[0][1], order=sold[0][2], balance=f"{sold[0][1]} eur")
        engine.dispose()
        with serving(settings_of(url, services.redis_url, STRIPE_API_KEY="acct_1=sk_test_1")) as web:
            yield Shop(web, *sold[0])


def sell(engine: Engine, name: str, *, paid: int) -> tuple[str, str, str]:
    """Fold the events of a shop: a customer with a credit, and a link that *paid* of three sessions pay by."""
    account = Account(seed=5)
    customer = account.create_customer(email=EMAILS[name], name=NAME, currency="eur")
    account.adjust_balance(customer, -500)
    link = account.create_payment_link(amount=1_000, currency="eur", metadata={"note": f"of {name}"})
    sessions = [account.open_session(payment_link=link, customer=customer) for _ in range(3)]
    for number, session in enumerate(sessions):
        if number < paid:
            account.complete(session)
        elif name == "acct_1":
            account.expire(session)
    ledger.take_in(engine, *(each.body for each in account.events), account=name)
    return link, customer, sessions[0]


# Stripe's ledger of the customer: 3 were given, then 2 more, so that 5.00 are left.
_LEDGER: Final = """
INSERT INTO balance_transactions (account, livemode, id, customer, currency, type, amount, ending_balance, description,
    created, event_id, as_of)
SELECT 'acct_1', false, id, :customer, 'eur', 'adjustment', amount, ending, description, now() + later, 'evt', now()
FROM (VALUES ('cbtxn_1', -300, -300, 'for a late parcel', interval '0'),
    ('cbtxn_2', -200, -500, NULL, interval '1 second')) AS given (id, amount, ending, description, later)
"""
_ANOMALIES: Final = """
INSERT INTO anomalies (account, livemode, id, kind, subject, subject_id, detail, object_id, event_id, as_of, seen_at,
    resolved_at)
SELECT *, CASE subject WHEN 'balance' THEN :customer END, 'evt_1', now(), now(), NULL FROM (VALUES
    ('acct_1', false, 'an_1', 'two_references', 'order', :order,
        '{"column": "customer", "values": ["cus_a", "cus_b"]}'::jsonb),
    ('acct_1', false, 'an_2', 'broken_chain', 'balance', :balance,
        '{"expected": -300, "found": -450, "difference": -150}'::jsonb),
    ('acct_1', false, 'an_3', 'paid_and_void', 'invoice', 'in_1', '{}'::jsonb),
    ('acct_2', false, 'an_1', 'id_reused', 'event', 'evt_other', '{"events": ["charge ch_1"]}'::jsonb)
) AS found (account, livemode, id, kind, subject, subject_id, detail)
UNION ALL
SELECT 'acct_1', false, 'an_4', 'ambiguous_order', 'customer', :customer,
    '{"as_of": "2026-11-01T00:00:00Z"}'::jsonb, NULL, 'evt_2', now(), now() - interval '1 day', now()
"""
# One at Stripe's own time, one by the limit of an hour, one of a link with a limit, one of a link without; one is due.
_OPEN: Final = """
WITH links AS (
    INSERT INTO payment_links (account, livemode, id, active, currency, metadata, created, event_id, as_of)
    SELECT account, false, id, false, 'usd', metadata::jsonb, '2020-01-01T00:00:00Z', 'evt', now()
    FROM (VALUES ('acct_4', 'plink_90', '{"payfold_session_ttl_minutes": "90"}'),
        ('acct_4', 'plink_off', '{"payfold_session_ttl_minutes": "off"}')) AS given (account, id, metadata)
)
INSERT INTO orders (account, livemode, id, status, mode, currency, amount_total, customer_email, payment_link, created,
    expires_at, event_id, as_of)
SELECT account, false, id, status, 'payment', 'usd', 4999, 'waiting@example.com', link, now() - opened, now() + ends,
    'evt', now()
FROM (VALUES
    ('acct_4', 'cs_due', 'open', NULL, interval '3 hours', interval '21 hours'),
    ('acct_4', 'cs_stripe', 'open', NULL, interval '10 minutes', interval '20 minutes'),
    ('acct_4', 'cs_limit', 'open', NULL, interval '30 minutes', interval '23 hours'),
    ('acct_4', 'cs_link', 'open', 'plink_90', interval '15 minutes', interval '23 hours'),
    ('acct_4', 'cs_off', 'open', 'plink_off', interval '20 hours', interval '4 hours'),
    ('acct_4', 'cs_over', 'expired', NULL, interval '3 hours', interval '1 minute'),
    ('acct_2', 'cs_elsewhere', 'open', NULL, interval '3 hours', interval '21 hours')
) AS given (account, id, status, link, opened, ends)
"""
_MANY: Final = """
INSERT INTO customers (account, livemode, id, email, created, event_id, as_of)
SELECT 'acct_3', false, 'cus_' || n, 'buyer' || n || '@example.com', to_timestamp(1793491200 + n), 'evt', now()
FROM generate_series(1, 45) AS n
"""


def rows(text: str) -> list[str]:
    """Return the rows of the tables of a page, as the text that a person reads, without tags."""
    found = re.findall(r"<tr>(.*?)</tr>", text.partition("<main")[2], re.DOTALL)
    return [" ".join(html.unescape(re.sub(r"<[^>]+>", " ", row)).split()) for row in found]


# ---- Payment links ----


def test_the_funnel_is_drawn(shop: Shop) -> None:
    """Each link has bars for its sessions, as shares of those that were opened, and what was paid in its currency."""
    page = shop.see("/payment-links")

    # Two of three sessions paid 10.00 each, and one expired.
    assert 'aria-label="3 opened, 2 completed, 2 paid, 1 expired"' in page.text
    assert re.findall(r'<rect [^>]*width="([\d.]+)%"', page.text) == ["100.0", "66.7", "66.7", "33.3"]
    assert [row.partition("expired ")[2][:17] for row in rows(page.text)[1:]] == ["3 2 2 1 20.00 EUR"]
    assert 'aria-label="1 opened, 1 completed, 1 paid, 0 expired"' in shop.see("/payment-links", TWO).text


def test_a_payment_link(shop: Shop) -> None:
    """The page of a link has its funnel, its orders and its timeline; its metadata wants the scope personal."""
    path = f"/payment-links/{shop.link}"
    page = shop.see(path)

    assert "20.00 EUR paid" in " ".join(re.sub(r"<[^>]+>", " ", page.text).split())
    assert {"Opened 3 100 %", "Completed 2 66.7 %", "Paid 2 66.7 %", "Expired 1 33.3 %"} <= set(rows(page.text))
    assert len(re.findall(r'<th scope="row"><a href="/orders/cs_', page.text)) == 3
    assert "<h3>payment_link.created</h3>" in page.text
    assert "of acct_1" in page.text
    assert "of acct_" not in shop.see(path, ONE, TOKENS["read"]).text


def test_links_that_are_not_active(shop: Shop) -> None:
    """A filter is kept in the address, and a value that is none is refused on a page."""
    found = shop.see("/payment-links", ("acct_4", False), active="false")
    refused = shop.see("/payment-links", active="perhaps")

    assert [row.partition(" ")[0] for row in rows(found.text)[1:]] == ["plink_off", "plink_90"]
    assert '<option value="false" selected>' in found.text
    assert (refused.status_code, "query.active" in refused.text) == (422, True)


def test_a_row_that_no_event_makes(shop: Shop) -> None:
    """A row without events is shown, and the page names the fault and the command that looks into it."""
    page = shop.see("/payment-links/plink_90", ("acct_4", False))

    assert (page.status_code, "its events make none" in page.text) == (200, True)
    assert "its events make none" not in shop.see(f"/payment-links/{shop.link}").text


# ---- Customers ----


def test_customers(shop: Shop) -> None:
    """A customer is listed with its balance, and found by its email in any case."""
    found = shop.see("/customers", email="first.BUYER@example.com").text

    assert len(rows(found)[1:]) == 1
    assert f'href="/customers/{shop.customer}?account=acct_1&amp;livemode=false"' in found
    assert "−5.00 EUR" in rows(found)[1]  # noqa: RUF001 - a minus
    assert "No customer is like that" in shop.see("/customers", email="second.buyer@example.com").text


def test_customers_are_paged(shop: Shop) -> None:
    """Each customer is on one page, newest first, and a page leads to the next with the filters kept."""
    seen: list[str] = []
    sizes, following = [], "/customers?account=acct_3&livemode=false&deleted=false"
    with shop.web.looking() as client:
        while following:
            text = client.get(following).text
            seen += (found := re.findall(r'<th scope="row"><a href="/customers/(cus_\d+)', text))
            sizes.append(len(found))
            following = html.unescape("".join(re.findall(r'rel="next" href="([^"]+)"', text)))
            assert not following or "deleted=false" in following

    assert sizes == [20, 20, 5]
    assert seen == [f"cus_{number}" for number in range(45, 0, -1)]


def test_a_customer(shop: Shop) -> None:
    """The page of a customer has the balance with Stripe's ledger, its orders, and its timeline."""
    page = shop.see(f"/customers/{shop.customer}")
    listed = rows(page.text)

    assert f"<h1>{EMAILS['acct_1']}" in page.text
    assert "credit: taken off the next invoice" in page.text
    assert [row.partition("adjustment ")[2] for row in listed if "adjustment" in row] == [
        "−2.00 EUR −5.00 EUR – –",  # noqa: RUF001 - a minus
        "−3.00 EUR −3.00 EUR – for a late parcel",  # noqa: RUF001
    ]
    assert "The ledger has a gap" in page.text
    assert len(re.findall(r'<th scope="row"><a href="/orders/cs_', page.text)) == 3
    assert re.findall(r"<h3>(customer\.\w+)</h3>", page.text) == ["customer.created", "customer.updated"]


def test_a_ledger_that_was_not_read(shop: Shop) -> None:
    """Without Stripe's ledger the changes are shown that the customer's events report, and what the ledger wants."""
    page = shop.see(f"/customers/{shop.customer}", TWO)

    assert "STRIPE_API_KEY" in page.text
    assert [row for row in rows(page.text) if "−5.00 EUR −5.00 EUR" in row]  # noqa: RUF001 - a minus
    assert "late parcel" not in page.text


def test_a_customer_as_it_was_known(shop: Shop) -> None:
    """As of a time the page has what was known then, and not what belongs to now."""
    page = shop.see(f"/customers/{shop.customer}", as_of=ledger.NOW.isoformat())

    assert "As it was known at" in page.text
    assert "<h3>customer.created</h3>" in page.text
    assert "credit: taken off" not in page.text


def test_a_customer_that_only_orders_name(shop: Shop) -> None:
    """A customer without an event of its own is shown with its orders; one that nothing names is 404."""
    shop.web.query(
        "INSERT INTO orders (account, livemode, id, customer, status, event_id, as_of)"
        " VALUES ('acct_5', true, 'cs_5', 'cus_5', 'paid', 'evt', now())"
    )

    page = shop.see("/customers/cus_5", ("acct_5", True))

    assert (page.status_code, "/orders/cs_5" in page.text) == (200, True)
    assert "payfold endpoints check" in page.text
    assert shop.see("/customers/cus_5", ("acct_5", False)).status_code == 404
    assert shop.see("/customers/cus_none").status_code == shop.see("/payment-links/plink_none").status_code == 404


# ---- Anomalies ----


def test_anomalies_in_force(shop: Shop) -> None:
    """Those in force are listed with what they mean and readable details, and lead to the page of their subject."""
    page = shop.see("/anomalies")
    listed = rows(page.text)[1:]

    assert len(listed) == 3
    for kind in ("two_references", "broken_chain", "paid_and_void"):
        assert html.escape(tables.ANOMALY_MEANINGS[kind], quote=False).replace("'", "&#39;") in page.text
    assert any("column customer values cus_a , cus_b" in row for row in listed)
    assert any("found −4.50 EUR expected −3.00 EUR difference −1.50 EUR" in row for row in listed)  # noqa: RUF001
    for address in (f"/orders/{shop.order}", f"/customers/{shop.customer}"):
        assert f'href="{address}?account=acct_1&amp;livemode=false"' in page.text
    assert 'href="/search?account=acct_1&amp;livemode=false&amp;q=in_1"' in page.text


@pytest.mark.parametrize(
    ("asked", "count"),
    [
        ({"resolved": "true"}, 1),
        ({"resolved": "all"}, 4),
        ({"kind": "broken_chain"}, 1),
        ({"kind": "ambiguous_order"}, 0),
        ({"subject": "invoice", "resolved": "all"}, 1),
    ],
)
def test_filters_of_anomalies(shop: Shop, asked: dict[str, Any], count: int) -> None:
    """Anomalies are found by kind, by subject, and by whether they are over."""
    assert len(rows(shop.see("/anomalies", **asked).text)[1:]) == count


def test_an_unknown_kind(shop: Shop) -> None:
    """A kind that is none is refused with the list of kinds."""
    refused = shop.see("/anomalies", kind="odd")

    assert (refused.status_code, "two_references" in refused.text) == (422, True)


# ---- Sessions about to expire ----


@pytest.fixture(scope="module")
def served(shop: Shop, services: Services) -> Iterator[Shop]:
    """Return a web process with a key for the account whose sessions are open."""
    url = shop.web.settings.database_url
    assert url is not None
    settings = settings_of(url.get_secret_value(), services.redis_url, STRIPE_API_KEY="acct_4=sk_test_4")
    with serving(settings) as web:
        yield Shop(web, shop.link, shop.customer, shop.order)


WAITING: Final = ("acct_4", False)


def test_the_next_to_end_come_first(served: Shop) -> None:
    """Open sessions end at Stripe's time or at our limit, which a payment link may set, whichever comes first."""
    page = served.see("/expiring", WAITING)
    listed = [row.replace(" Expire now", "") for row in rows(page.text)[1:]]

    assert [row.partition(" ")[0] for row in listed] == ["cs_due", "cs_stripe", "cs_limit", "cs_link", "cs_off"]
    assert [row.partition(" UTC ")[0].split(" 20")[0] for row in listed] == [
        "cs_due due for 2 hours",
        # Some moments have passed since they were planted.
        "cs_stripe in 19 minutes",
        "cs_limit in 29 minutes",
        "cs_link in 1 hour",
        "cs_off in 3 hours",
    ]
    ends = ["our limit of 1 hour", "Stripe", "our limit of 1 hour", "our limit of 1 hour", "Stripe"]
    assert [row.endswith(end) for row, end in zip(listed, ends, strict=True)] == [True] * 5
    assert "No key in" not in page.text


def test_without_a_key_there_is_no_limit(shop: Shop) -> None:
    """Where no key serves the account, nothing is expired at Stripe before its own time, and the page explains it."""
    page = shop.see("/expiring", WAITING)

    assert [row.partition(" ")[0] for row in rows(page.text)[1:]] == [
        *("cs_stripe", "cs_off", "cs_due", "cs_limit", "cs_link"),
    ]
    assert "STRIPE_API_KEY" in page.text


def test_expiring_over_the_api(served: Shop) -> None:
    """The route answers what the page shows, bounded, and an email to the scope personal alone."""
    path = "/v1/orders/expiring?account=acct_4"
    whole, some = served.web.get(path, CLERK).json(), served.web.get(f"{path}&limit=2", READER).json()
    everywhere = served.web.get("/v1/orders/expiring").json()

    assert [each["id"] for each in whole["data"]] == ["cs_due", "cs_stripe", "cs_limit", "cs_link", "cs_off"]
    assert {each["customer_email"] for each in whole["data"]} == {"waiting@example.com"}
    assert [each["allowed_until"] == each["ends_at"] for each in whole["data"]] == [True, False, True, True, False]
    assert ([each["id"] for each in some["data"]], some["has_more"]) == (["cs_due", "cs_stripe"], True)
    assert all("customer_email" not in each for each in some["data"])
    assert served.web.get(f"{path}&livemode=true").json() == {"data": [], "has_more": False}
    # The accounts that events have come for.
    assert [each["id"] for each in everywhere["data"]] == ["cs_elsewhere"]


def test_who_may_expire(served: Shop) -> None:
    """The act is offered to an operator and not to a reader."""
    assert 'action="/orders/cs_off/expire?account=acct_4&amp;livemode=false"' in served.see("/expiring", WAITING).text
    assert "/expire" not in served.see("/expiring", WAITING, TOKENS["read+personal"]).text


# ---- Reconciliations ----


def test_a_reconciliation_is_started(shop: Shop) -> None:
    """An operator starts one on the page, which shows that it waits, then its outcome with a link to its report."""
    engine = database.engine(shop.web.settings.postgresql)
    with shop.web.looking() as client:
        empty = client.get("/reconciliations").text
        started = client.post("/reconciliations", data={})
        again = client.post("/reconciliations", data={})
        waiting = client.get(started.headers["location"]).text
        app.create(shop.web.settings, engine).tasks[broker.RECONCILE_ASKED]()
        done = client.get("/reconciliations?outcome=drift").text
        (address,) = re.findall(r'href="(/reconciliations/\d+/report[^"]*)"', done)
        report = client.get(html.unescape(address))
        missing = client.get("/reconciliations/999999/report")
        unknown = client.get("/reconciliations?outcome=odd")
    engine.dispose()

    assert ("payfold reconcile" in empty, ">Start one</button>" in empty) == (True, True)
    assert (started.status_code, again.status_code) == (303, 409)
    assert "A worker begins it within a minute." in waiting
    assert re.fullmatch(r"\d+ waiting . . not yet . rules, rebuild admin.personal .* UTC", rows(waiting)[1])
    # Rows were planted that no event makes.
    assert " drift " in rows(done)[1]
    assert (report.status_code, "<h1>" in report.text) == (200, True)
    assert "default-src 'none'" in report.headers["content-security-policy"]
    assert (missing.status_code, unknown.status_code) == (404, 422)
    assert shop.web.client.get(address).status_code == 303


def test_a_reader_starts_no_reconciliation(shop: Shop) -> None:
    """Without the scope admin there is no button, and the act is refused."""
    with shop.web.looking(TOKENS["read+personal"]) as client:
        assert "Start one</button>" not in client.get("/reconciliations").text
        assert client.post("/reconciliations", data={}).status_code == 403


# ---- All of them ----


def test_personal_data_is_hidden(shop: Shop) -> None:
    """Without the scope personal no page has an email, a name or a description, and none is searched by."""
    personal = [*EMAILS.values(), NAME, "late parcel", "waiting@example.com", "of acct_1"]

    seen = "".join(shop.texts(ONE, TOKENS["admin+personal"]).values())
    hidden = "".join(shop.texts(ONE, TOKENS["admin"]).values())
    hidden += shop.see("/expiring", WAITING, TOKENS["admin"]).text

    assert [each for each in personal if each in seen] == [EMAILS["acct_1"], NAME, "late parcel", "of acct_1"]
    assert [each for each in personal if each in hidden] == []
    assert shop.see("/customers", ONE, TOKENS["admin"], email=EMAILS["acct_1"]).status_code == 403


def test_worlds_are_never_mixed(shop: Shop) -> None:
    """Objects of the same ids in two accounts are shown each in its own, and neither in the other's mode."""
    first, second = ("".join(shop.texts(world, TOKENS["admin+personal"]).values()) for world in (ONE, TWO))

    assert (EMAILS["acct_1"] in first, EMAILS["acct_2"] in first) == (True, False)
    assert (EMAILS["acct_1"] in second, EMAILS["acct_2"] in second) == (False, True)
    assert ("cs_elsewhere" in first, "cs_elsewhere" in second) == (False, True)
    assert ("evt_other" in first, "evt_other" in second) == (False, True)
    for path in (f"/payment-links/{shop.link}", f"/customers/{shop.customer}"):
        assert shop.see(path, ("acct_1", True)).status_code == 404


@pytest.mark.parametrize("path", LISTS)
def test_empty_pages_teach(shop: Shop, path: str) -> None:
    """A page without rows explains what would bring some."""
    page = shop.see(path, EMPTY)

    assert (page.status_code, rows(page.text)) == (200, [])
    (words,) = re.findall(r'<p class="empty">(.*?)</p>', page.text)
    assert "<a href=" in words or "<code>" in words


@pytest.mark.parametrize("path", [*LISTS, "/reconciliations"])
def test_pages_want_a_login(shop: Shop, path: str) -> None:
    """Without a cookie a page leads to the login."""
    answer = shop.web.client.get(path)

    assert (answer.status_code, answer.headers["location"]) == (303, f"/login?next={path.replace('/', '%2F')}")


# ---- The routes below ----


def test_customers_over_the_api(shop: Shop) -> None:
    """Customers are listed newest first, found by email in any case, by time and state, and shown by id."""

    def ids(filters: str, headers: dict[str, str] = CLERK) -> list[str]:
        found: list[dict[str, Any]] = shop.web.get(f"/v1/customers?{filters}", headers).json()["data"]
        return [each["id"] for each in found]

    assert ids("account=acct_3&limit=2") == ["cus_45", "cus_44"]
    assert ids("email=BUYER7@Example.com") == ["cus_7"]
    # The first was created at 2026-11-01T00:00:01Z.
    assert ids("account=acct_3&created_before=2026-11-01T00:00:03Z") == ["cus_2", "cus_1"]
    assert ids("account=acct_3&deleted=true") == []
    assert shop.web.get("/v1/customers?email=buyer7@example.com").status_code == 403
    shown = shop.web.get(f"/v1/customers/{shop.customer}?account=acct_2", CLERK).json()
    assert (shown["email"], shown["currency"]) == (EMAILS["acct_2"], "eur")
    assert "email" not in shop.web.get(f"/v1/customers/{shop.customer}?account=acct_2").json()
    assert shop.web.get(f"/v1/customers/{shop.customer}").status_code == 409
    assert shop.web.get("/v1/customers/cus_none").status_code == 404
