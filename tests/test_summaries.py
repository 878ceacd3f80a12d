"""What happened in a period, in numbers, and the funnel of each payment link: over the API and in a terminal."""

from collections.abc import Iterator
from datetime import datetime
from typing import Any

import pytest
from sqlalchemy import Engine

from tests import ledger
from tests.command import payfold
from tests.web import READER, Web, serving, settings_of

pytestmark = pytest.mark.integration

# By table: account, mode, id, status, currency, amount, and the time by which it counts.
ORDERS = [
    ("", True, "cs_1", "paid", "usd", 500, "2026-11-01T10:00:00Z"),
    ("", True, "cs_2", "paid", "usd", 250, "2026-11-01T10:59:59Z"),
    ("", True, "cs_3", "paid", "eur", 40, "2026-11-01T11:00:00Z"),
    ("", True, "cs_4", "open", "usd", None, "2026-11-01T11:30:00Z"),
    # In setup mode there is neither an amount nor a currency.
    ("", True, "cs_5", "complete", None, None, "2026-11-01T11:30:00Z"),
    ("", True, "cs_6", None, "usd", 0, "2026-11-01T11:30:00Z"),
    # An amount in a currency that is not known is not known.
    ("", True, "cs_7", "complete", None, 900, "2026-11-01T11:30:00Z"),
    ("", True, "cs_8", "paid", "usd", 10_000, "2026-11-01T12:00:00Z"),
    ("", True, "cs_9", "paid", "usd", 20_000, "2026-11-01T09:59:59Z"),
    ("", True, "cs_10", "paid", "usd", 30_000, None),
    ("", False, "cs_11", "paid", "usd", 7, "2026-11-01T10:30:00Z"),
    ("acct_1", True, "cs_12", "paid", "usd", 9, "2026-11-01T10:30:00Z"),
]
REFUNDS = [
    ("", True, "re_1", "succeeded", "usd", 100, "2026-11-01T10:30:00Z"),
    ("", True, "re_2", "succeeded", "usd", 20, "2026-11-01T11:30:00Z"),
    ("", True, "re_3", "failed", "usd", 3, "2026-11-01T11:30:00Z"),
    ("", True, "re_4", "failed", "usd", 5_000, "2026-11-01T12:00:00Z"),
    ("", True, "re_5", "failed", "usd", 5_000, None),
]
DISPUTES = [
    ("", True, "dp_1", "lost", "usd", 30, "2026-11-01T11:59:59Z"),
    ("", True, "dp_2", "lost", "usd", 4_000, "2026-11-01T12:00:00Z"),
]


def write(engine: Engine, table: str, amount: str, rows: list[Any], *, link: str | None = None) -> None:
    """Insert *rows*; those without a time are decided at another."""
    for account, livemode, id_, status, currency, worth, at in rows:
        values: dict[str, Any] = {"account": account, "livemode": livemode, "id": id_, "status": status}
        values |= {"currency": currency, amount: worth, "event_id": "evt_1", "as_of": at or "2026-11-01T00:00:00Z"}
        values |= {} if table == "disputes" else {"created": at}
        values |= {} if link is None else {"payment_link": link}
        names = ", ".join(values)
        marks = ", ".join(f":{name}" for name in values)
        ledger.execute(engine, f"INSERT INTO {table} ({names}) VALUES ({marks})", **values)  # noqa: S608 - our own names


@pytest.fixture
def shop(engine: Engine) -> Engine:
    """Return an engine on the rows above; some of their sums are added up, and some are not yet."""
    write(engine, "orders", "amount_total", ORDERS[::2])
    write(engine, "refunds", "amount", REFUNDS[::2])
    ledger.rows(engine, "SELECT merge_sums()")
    write(engine, "orders", "amount_total", ORDERS[1::2])
    write(engine, "refunds", "amount", REFUNDS[1::2])
    write(engine, "disputes", "amount", DISPUTES)
    return engine


@pytest.fixture
def web(database_url: str, redis_url: str) -> Iterator[Web]:
    """Return a running web process."""
    with serving(settings_of(database_url, redis_url)) as running:
        yield running


def total(status: str | None, currency: str | None, count: int, amount: int | None, without: int = 0) -> dict[str, Any]:
    """Return a sum as an answer shows it."""
    return {"status": status, "currency": currency, "count": count, "amount": amount, "without_amount": without}


PERIOD = {"since": "2026-11-01T10:20:00Z", "until": "2026-11-01T11:00:01Z"}
LIVE: dict[str, Any] = {
    "account": "",
    "livemode": True,
    "orders_by_status": [
        {"status": "complete", "count": 2},
        {"status": "open", "count": 1},
        {"status": "paid", "count": 3},
        {"status": None, "count": 1},
    ],
    "orders": [
        total("complete", None, 2, None, 2),
        total("open", "usd", 1, None, 1),
        total("paid", "eur", 1, 40),
        total("paid", "usd", 2, 750),
        total(None, "usd", 1, 0),
    ],
    "refunds": [total("failed", "usd", 1, 3), total("succeeded", "usd", 2, 120)],
    "disputes": [total("lost", "usd", 1, 30)],
    "undated_orders": 1,
    "undated_refunds": 1,
}


def other(account: str, livemode: bool, amount: int) -> dict[str, Any]:  # noqa: FBT001 - a part of the key
    """Return the summary of one of the other worlds, which have one order each."""
    counts = [{"status": "paid", "count": 1}]
    sums = {"orders_by_status": counts, "orders": [total("paid", "usd", 1, amount)], "refunds": [], "disputes": []}
    return {"account": account, "livemode": livemode, **sums, "undated_orders": 0, "undated_refunds": 0}


def test_the_summary_of_a_period(shop: Engine, web: Web) -> None:
    """Whole hours are summed by status and currency in each account and mode; what is not known is null or counted."""
    answer = web.client.get("/v1/summary", params=PERIOD, headers=READER)

    assert answer.status_code == 200
    assert answer.json() == {
        "since": "2026-11-01T10:00:00Z",
        "until": "2026-11-01T12:00:00Z",
        "data": [other("", livemode=False, amount=7), LIVE, other("acct_1", livemode=True, amount=9)],
    }

    narrow = web.client.get("/v1/summary", params={**PERIOD, "account": "", "livemode": True}, headers=READER)
    assert narrow.json()["data"] == [LIVE]
    elsewhere: dict[str, Any] = {"since": "2026-11-01T12:00:00+02:00", "until": "2026-11-01T14:00:00+02:00"}
    assert web.client.get("/v1/summary", params={**elsewhere, "livemode": True}, headers=READER).json() == {
        **answer.json(),
        "data": [LIVE, other("acct_1", livemode=True, amount=9)],
    }


def test_the_usual_period(web: Web) -> None:
    """Without a period it is the last day, to the end of this hour; a begin alone lasts until now."""
    usual = web.get("/v1/summary").json()
    late = web.get("/v1/summary?until=2026-11-02T00:00:00Z").json()

    assert (hours(usual), usual["data"]) == (24, [])
    assert (late["since"], late["until"]) == ("2026-11-01T00:00:00Z", "2026-11-02T00:00:00Z")
    assert web.get("/v1/summary?since=2026-11-01T00:00:00Z").json()["until"] == usual["until"]


def hours(answer: dict[str, Any]) -> float:
    """Return the length of the period of *answer*."""
    since, until = (datetime.fromisoformat(answer[name]) for name in ("since", "until"))
    return (until - since).total_seconds() / 3_600


@pytest.mark.parametrize(
    "asked",
    [
        "since=2026-11-02T00:00:00Z&until=2026-11-01T00:00:00Z",
        "since=2026-11-01T00:10:00Z&until=2026-11-01T00:10:00Z",
        "since=2999-11-01T00:00:00Z",
        "since=2026-11-01T00:00:00",
        "until=9999-12-31T23:59:59Z",
        "until=0001-01-01T00:00:00Z",
        "since=0001-01-01T00:00:00%2B23:00",
        "until=yesterday",
        "day=1",
    ],
)
def test_no_period(web: Web, asked: str) -> None:
    """A period that is empty, without a zone or beyond the calendar is refused, as is an unknown parameter."""
    answer = web.get(f"/v1/summary?{asked}")

    assert answer.status_code == 422
    assert answer.headers["content-type"] == "application/problem+json"


def test_the_funnel(engine: Engine, web: Web, database_url: str) -> None:
    """Each link and currency has a row, as the view has it, and a page begins where the one before ended."""
    for link in ("plink_1", "plink_2", "plink_3"):
        rows = [(account, mode, f"{link}_{id_}", *more) for account, mode, id_, *more in ORDERS]
        write(engine, "orders", "amount_total", rows[: {"plink_1": 12, "plink_2": 7, "plink_3": 2}[link]], link=link)
        if link != "plink_3":
            ledger.rows(engine, "SELECT merge_sums()")
    ledger.execute(engine, "UPDATE orders SET completed_at = created WHERE status IN ('paid', 'complete')")
    ledger.execute(engine, "UPDATE orders SET amount_total = NULL, status = 'expired' WHERE id = 'plink_1_cs_9'")
    ledger.execute(engine, "UPDATE orders SET amount_total = NULL WHERE id = 'plink_1_cs_8'")
    names = "account, livemode, payment_link, currency, opened, completed, paid, expired, amount_paid"
    view = ledger.rows(
        engine,
        f"SELECT {names} FROM payment_link_funnel"  # noqa: S608 - our own names
        " ORDER BY account, livemode, payment_link, currency NULLS LAST",
    )

    found: list[dict[str, Any]] = []
    cursor: str | None = ""
    while cursor is not None:
        page = web.get(f"/v1/funnel?limit=2{f'&cursor={cursor}' if cursor else ''}").json()
        assert 0 < len(page["data"]) <= 2
        found += page["data"]
        cursor = page["next_cursor"]

    live = {"account": "", "livemode": True, "payment_link": "plink_1"}
    assert found[1:4] == [
        {**live, "currency": "eur", "opened": 1, "completed": 1, "paid": 1, "expired": 0, "amount_paid": 40}
        | {"without_amount": 0},
        {**live, "currency": "usd", "opened": 7, "completed": 4, "paid": 4, "expired": 1, "amount_paid": 30_750}
        | {"without_amount": 1},
        {**live, "currency": None, "opened": 2, "completed": 2, "paid": 0, "expired": 0, "amount_paid": 0}
        | {"without_amount": 0},
    ]
    assert [{**row, "without_amount": None} for row in found] == [{**row, "without_amount": None} for row in view]
    narrow = web.get("/v1/funnel?payment_link=plink_1&account=acct_1").json()
    assert (narrow["data"], narrow["next_cursor"]) == (found[-1:], None)
    assert web.get("/v1/funnel?livemode=false").json()["data"] == found[:1]

    ran = payfold("funnel", "--live", "--format", "json", DATABASE_URL=database_url)
    assert (ran.code, ran.json) == (0, found[1:])
    assert "307.50 USD" in payfold("funnel", "--payment-link", "plink_1", DATABASE_URL=database_url).out


@pytest.mark.parametrize("cursor", ["x", "WyJhIl0=", "WyJhIiwiYiIsIlx1MDAwMCIsIiJd"])
def test_no_cursor(web: Web, cursor: str) -> None:
    """A text that is no cursor of the funnel is refused."""
    assert web.get(f"/v1/funnel?cursor={cursor}").status_code == 422


def test_the_commands(shop: Engine, database_url: str) -> None:
    """The commands print what the API answers."""
    period = ("--since", "2026-11-01T10:20:00", "--until", "2026-11-01T11:00:01Z")
    whole = payfold("summary", *period, "--format", "json", DATABASE_URL=database_url)
    lines = payfold("summary", *period, "--live", "--account", "", "--format", "ndjson", DATABASE_URL=database_url)
    table = payfold("summary", *period, DATABASE_URL=database_url)
    empty = payfold("summary", "--since", "2026-11-02", "--until", "2026-11-01", DATABASE_URL=database_url)
    nothing = payfold("funnel", DATABASE_URL=database_url)

    assert (whole.code, whole.json["since"], whole.json["until"]) == (0, "2026-11-01T10:00:00Z", "2026-11-01T12:00:00Z")
    assert whole.json["data"] == [other("", livemode=False, amount=7), LIVE, other("acct_1", livemode=True, amount=9)]
    assert lines.out.splitlines()[3] == (
        '{"account":"","livemode":true,"of":"orders","status":"paid","currency":"usd","count":2,"amount":750,'
        '"without_amount":0}'
    )
    assert len(lines.out.splitlines()) == 8
    assert "7.50 USD" in table.out
    assert "2026-11-01 10:00:00 to 2026-11-01 12:00:00 UTC" in table.err
    assert "1 orders" in table.err
    assert (empty.code, empty.out) == (2, "")
    assert (nothing.code, nothing.out) == (0, "")
