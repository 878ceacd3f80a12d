"""The report shows the result, to the unit; no foreign text is markup; in a browser the page is whole."""

import itertools
import random
from collections import Counter, defaultdict
from collections.abc import Iterator
from datetime import date, timedelta
from decimal import Decimal
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from api.report import charts, results
from api.report import page as report
from api.report.money import CURRENCIES_MAX
from deploy.commands.reconcile import verdict
from deploy.output import money
from tests.browser import chromium

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>&\"'\x1b[2J\u202e"
DECIMALS = {"usd": 2, "eur": 2, "gbp": 2, "jpy": 0, "krw": 0, "kwd": 3, "bhd": 3}
VOID = {"meta", "link"}

Result = dict[str, Any]
Table = list[dict[str, str]]


# ---- Results ----


def result(drift: list[dict[str, Any]] | None = None, **changes: object) -> Result:
    """Return a result without faults and events, but for *changes*."""
    return {
        "run": {
            "id": 7,
            "started_at": "2026-01-31T12:00:00Z",
            "finished_at": "2026-01-31T12:03:04Z",
            "outcome": "drift" if changes.get("drift_total") else "ok",
            "version": "0.1.0",
            "checks": ["rules", "rebuild"],
        },
        "events": {"recorded": 0, "first_created": None, "last_created": None, "parked": 0, "pending": 0},
        "rules": [],
        "money": [],
        "drift": drift or [],
        "drift_total": 0,
        "drift_kinds": kinds_of(drift or []),
        "drift_money": [],
        "not_provable": [],
        **changes,
    }


def difference(**changes: object) -> dict[str, Any]:
    """Return the difference of an order that lacks a cent, but for *changes*."""
    return {
        "check": "rebuild",
        "kind": "different",
        "account": "",
        "livemode": True,
        "table": "orders",
        "id": "cs_live_1",
        "column": "amount_total",
        "held": 1999,
        "expected": 2000,
        "currency": "usd",
        "amount": -1,
        "at": "2026-01-30T10:00:00Z",
        **changes,
    }


def kinds_of(drift: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the number of differences of each kind."""
    kinds = Counter((each["check"], each["kind"]) for each in drift)
    return [{"check": check, "kind": kind, "count": count} for (check, kind), count in sorted(kinds.items())]


def sold(chance: random.Random, days: int, currencies: list[str]) -> list[dict[str, Any]]:
    """Return the sums of orders of *days*, some of them without orders."""
    return [
        {
            "day": str(date(2026, 1, 31) - timedelta(days=back)),
            "status": status,
            "currency": currency,
            "orders": chance.randint(1, 40),
            "amount": chance.randint(0, 10 ** chance.randint(1, 12)),
        }
        for back in {0, days - 1, *chance.sample(range(days), days * 3 // 4)}
        for currency in currencies
        for status in chance.sample([*charts.STATUSES, "novel"], chance.randint(1, 7))
    ]


def busy() -> Result:
    """Return a result that fills every part of the page."""
    chance = random.Random(8)
    drift = [
        difference(id=f"cs_live_{number:058}", at=f"2026-01-{1 + number % 30:02}T00:00:00Z", livemode=number % 2 > 0)
        for number in range(40)
    ]
    drift += [
        difference(check="rules", kind="order-total", held=None, account="acct_1", detail="the total is not the sum"),
        difference(
            check="log", kind="missing", table=None, column=None, held=None, expected=None, amount=None, at=None
        ),
        difference(
            check="stripe", kind="different", column="metadata", held={"note": "x" * 900}, expected=[], amount=None
        ),
    ]
    full = result(
        events={
            "recorded": 123_456,
            "first_created": "2025-01-02T00:00:00Z",
            "last_created": "2026-01-31T11:00:00+02:00",
            "parked": 2,
            "pending": 1,
        },
        rules=[
            {
                "rule": "order-total",
                "title": "Lines come to totals",
                "checked": 10,
                "holds": 8,
                "broken": 1,
                "not_provable": 1,
                "reasons": [{"reason": "an amount is not known", "rows": 1}],
            }
        ],
        tables=[{"table": "orders", "live": 1100, "rebuilt": 1101, "missing": 1, "extra": 0, "different": 41}],
        logs={"events": 10, "missing_here": 1, "missing_there": 2, "different": 0, "refused": 0},
        stripe=[
            {
                "account": "acct_1",
                "livemode": False,
                "object": "checkout.session",
                "listed": 5,
                "missing_here": 0,
                "missing_there": 0,
                "different": 1,
            }
        ],
        money=sold(chance, 370, ["usd", "jpy", "kwd"]),
        drift=drift,
        drift_total=43,
        drift_money=[{"currency": "usd", "amount": -41, "count": 41}],
        not_provable=[
            {
                "rule": "order-total",
                "account": "",
                "livemode": True,
                "table": "orders",
                "id": "cs_2",
                "detail": "Its lines were never told.",
                "at": None,
            }
        ],
    )
    full["run"]["checks"] = ["rules", "rebuild", "log", "stripe"]
    return full


# ---- Reading the page ----


class Reader(HTMLParser):
    """Reads a page into its elements, text and tables, and fails if an element is not closed by its own end."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text_of: defaultdict[str, list[str]] = defaultdict(list)
        self.rows: defaultdict[str, list[list[str]]] = defaultdict(list)
        self._open: list[str] = []
        self.feed(page)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Begin an element, and with it a row, a cell or a part of one."""
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self._open.append(tag)
        if tag in {"h1", "p", "caption", "text", "title", "script", "style", "li"}:
            self.text_of[tag].append("")
        elif tag == "tr":
            self.rows[self.text_of["caption"][-1]].append([])
        elif tag in {"th", "td"}:
            self.rows[self.text_of["caption"][-1]][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        """End the innermost element, which must be *tag*."""
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        """Add *data* to the open elements."""
        for tag in self._open:
            if tag in {"th", "td"}:
                self.rows[self.text_of["caption"][-1]][-1][-1] += data
            elif tag in self.text_of:
                self.text_of[tag][-1] += data

    def table(self, caption: str) -> Table:
        """Return the lines of the one table with a caption that begins with *caption*, each by its columns."""
        (name,) = (each for each in self.rows if each.startswith(caption))
        heads, *lines = self.rows[name]
        return [dict(zip(heads, line, strict=True)) for line in lines]

    def all(self, tag: str, **attributes: str) -> list[dict[str, str]]:
        """Return the attributes of each element *tag* that has *attributes*."""
        return [held for name, held in self.elements if name == tag and attributes.items() <= held.items()]

    def embedded(self) -> Result:
        """Return the result that the page embeds."""
        (script,) = self.text_of["script"]
        decoded: Result = msgspec.json.decode(script)
        return decoded


def read(of: Result) -> Reader:
    """Return the page of a result."""
    return Reader(report.html(of))


def minor(shown: str, currency: str) -> int:
    """Return an amount as a page shows it in the smallest unit."""
    number = shown.removesuffix(f" {currency.upper()}").replace(",", "").replace("−", "-") or "0"  # noqa: RUF001
    scaled = Decimal(number).scaleb(DECIMALS[currency])
    assert scaled == int(scaled)
    return int(scaled)


# ---- The verdict ----


def test_no_drift() -> None:
    """If a rebuild found no difference, the page states what that proves, and which checks did not run."""
    page = read(result())

    assert page.text_of["h1"] == ["The tables are what the events say."]
    assert "Not checked: Event logs and Stripe." in page.text_of["p"]


def rule(**changes: object) -> dict[str, Any]:
    """Return the tally of a rule that holds for all of its ten rows, but for *changes*."""
    named = {"rule": "order-lines", "title": "Lines come to totals", "checked": 10, "holds": 10}
    return {**named, "broken": 0, "not_provable": 0, "reasons": [], **changes}


@pytest.mark.parametrize(
    ("rows", "badge"),
    [
        ([rule()], "no drift; proven: 100 % of 10 checked by rules"),
        # Of 10 + 1,000 rows 7 + 1,000 are proven, which is 99.7 %.
        (
            [rule(holds=7, not_provable=3), rule(checked=1000, holds=1000)],
            "no drift; proven: 99 % of 1,010 checked by rules",
        ),
        ([rule(holds=0, not_provable=10)], "no drift; proven: 0 % of 10 checked by rules"),
        ([rule(checked=0, holds=0)], "no drift"),
        ([], "no drift"),
    ],
)
def test_how_much_is_proven(rows: list[dict[str, Any]], badge: str) -> None:
    """The badge has the proven share of the rows that the rules checked, rounded down; the footnote defines it."""
    page = read(result(rules=rows))

    assert badge in page.text_of["p"]
    assert any(text.startswith("Proven: the share of the rows checked") for text in page.text_of["p"]) == ("%" in badge)


def test_a_broken_row_is_proven() -> None:
    """A broken rule counts as proven: drift without an open row is proven in whole."""
    page = read(result(rules=[rule(holds=9, broken=1)], drift_total=1, drift=[difference()]))

    assert "drift; proven: 100 % of 10 checked by rules" in page.text_of["p"]


LISTED = {"account": "acct_1", "livemode": True, "listed": 400, "missing_here": 0, "missing_there": 0, "different": 0}
LEFT_OUT: list[tuple[dict[str, Any], str]] = [
    ({"object": "customer", "sampled_of": 900}, "customer: 400 of 900"),
    ({"object": "charge", "is_forbidden": True}, "charge: forbidden"),
    ({"object": "charge", "is_not_served": True}, "charge: not served"),
    ({"object": "charge", "why": "not asked, since it is late"}, "charge: not asked, since it is late"),
    ({"object": "charge", "unreadable": 3}, "charge: without 3 that could not be read"),
    ({"object": "not asked, since no key serves it"}, "acct_1, live: not asked, since no key serves it"),
    ({"object": "not asked, as of today", "livemode": False, "account": ""}, "test mode: not asked, as of today"),
]


@pytest.mark.parametrize(("tally", "words"), LEFT_OUT)
def test_stripe_was_compared_in_part(tally: dict[str, Any], words: str) -> None:
    """The parts not compared with Stripe are named next to the verdict, on the page and in the terminal."""
    found = result(stripe=[{**LISTED, "object": "dispute"}, {**LISTED, **tally}])
    found["run"]["checks"] = ["rules", "rebuild", "log", "stripe"]
    page = read(found)

    assert f"Stripe: only in part ({words})." in page.text_of["p"]
    assert verdict(found) == f"The tables are what the events say. Stripe: only in part ({words})."
    (line,) = (row for row in page.table("The checks of this run") if row["Check"] == "Stripe")
    assert line["Result"] == "no difference, looked at only in part"


def test_stripe_was_compared_since() -> None:
    """Objects created before `--since` were not compared; one sentence names everything left out, each once."""
    tallies = [{**LISTED, **tally} for tally, _ in LEFT_OUT]
    found = result(stripe=[*tallies, *tallies])
    found["run"] |= {"checks": ["rules", "rebuild", "log", "stripe"], "since": "2026-01-02T00:00:00Z", "seed": None}
    words = "; ".join(["only what was created since 2026-01-02 00:00:00 UTC", *(words for _, words in LEFT_OUT)])

    assert f"Stripe: only in part ({words})." in read(found).text_of["p"]
    assert "Everything was checked." not in report.html(found)
    # Without --stripe the page names Stripe as not checked.
    del found["stripe"]
    found["run"]["checks"] = ["rules", "rebuild", "log"]
    assert "Not checked: Stripe." in read(found).text_of["p"]


def test_everything_was_checked() -> None:
    """The page claims that everything was checked only if the run left out no object and no event of the logs."""
    whole = {**LISTED, "object": "customer"}
    found = result(
        stripe=[whole], logs={"events": 9, "missing_here": 0, "missing_there": 0, "different": 0, "refused": 0}
    )
    found["run"]["checks"] = ["rules", "rebuild", "log", "stripe"]
    assert "Everything was checked." in read(found).text_of["p"]
    assert verdict(found) == "The tables are what the events say."

    found["left_out"] = {"objects": 2, "events": 5}
    assert "Everything was checked." not in report.html(found)
    del found["left_out"]
    found["logs"]["archived"] = 4
    assert "Event logs: only in part (4 events of the logs are archived here)." in read(found).text_of["p"]


def test_why_not() -> None:
    """Below each rule the page counts the rows that could not be proven, by reason, and explains each broken row."""
    reasons = [
        {"reason": "lines of open sessions were not read", "rows": 900},
        {"reason": "an amount is not known", "rows": 74},
    ]
    of_lines = rule(checked=1058, holds=84, not_provable=974, reasons=reasons)
    (found,) = read(result(rules=[of_lines])).table("Money rules")

    assert found["Rule"].endswith(
        "900 not provable: lines of open sessions were not read74 not provable: an amount is not known"
    )
    assert results.why_not_provable(of_lines) == (
        "974 of 1,058 not provable: 900 lines of open sessions were not read, 74 an amount is not known"
    )
    assert [row["What"] for row in read(busy()).table("43 differences") if "not the sum" in row["What"]] == [
        "Money rulesorder-totalthe total is not the sum"
    ]


def test_each_check_names_its_witness() -> None:
    """The page states that rules check arithmetic, and that a rebuild cannot find wrong folds, since it uses them."""
    compares = {row["Check"]: row["Compares"] for row in read(result()).table("The checks of this run")}

    assert compares["Money rules"].startswith("Money by its own arithmetic")
    assert compares["Rebuild"] == (
        "The tables against a rebuild with the same folds, which finds lost and changed rows and not a wrong reading."
    )


def test_no_rebuild() -> None:
    """Without a rebuild the page claims only that no difference was found."""
    found = result(logs={"events": 9, "missing_here": 0, "missing_there": 0, "different": 0, "refused": 0})
    found["run"]["checks"] = ["log"]
    for name in ("rules", "not_provable"):
        del found[name]

    assert read(found).text_of["h1"] == ["No difference was found."]


@pytest.mark.parametrize(
    ("total", "money", "sentence"),
    [
        (1, [("usd", -1)], "1 difference, in total −0.01 USD."),  # noqa: RUF001
        (1200, [("usd", 250), ("jpy", -5)], "1,200 differences, in total +2.50 USD and −5 JPY."),  # noqa: RUF001
        (9, [("usd", 1), ("kwd", -1500), ("eur", 0)], "9 differences, in total +0.01 USD, −1.500 KWD and 0.00 EUR."),  # noqa: RUF001
        (2, [], "2 differences, none of them in money."),
    ],
)
def test_drift(total: int, money: list[tuple[str, int]], sentence: str) -> None:
    """The verdict counts the differences and gives the sum of each currency in its own units."""
    sums = [{"currency": currency, "amount": amount, "count": 1} for currency, amount in money]

    page = read(result(drift_total=total, drift_money=sums, drift=[difference()]))

    assert page.text_of["h1"] == [sentence]
    assert page.text_of["title"][0].endswith(sentence)


def test_caveats() -> None:
    """Next to any verdict the page names events in no table and results that prove nothing."""
    page = read({**busy(), "repaired": {"drift_total": 50}})

    assert (
        "Everything was checked. 1 result of the rules could not be proven either way. "
        "Before this run's repair there were 50 differences. 3 recorded events are in no table yet."
        in page.text_of["p"]
    )


# ---- Foreign text ----


def hostile(value: object, name: str = "") -> object:
    """Return *value* with a hostile prefix on every text in it that a stranger could have chosen."""
    if isinstance(value, dict):
        return {key: hostile(each, key) for key, each in value.items()}
    if isinstance(value, list):
        return [hostile(each, name) for each in value]
    ours = name in {"day", "currency", "outcome", "checks"} or name.endswith(("at", "created"))
    return f"{HOSTILE}{value}" if isinstance(value, str) and not ours else value


def test_no_foreign_text_is_markup() -> None:
    """The page has the same elements with hostile text as without it."""
    (tame, wild) = (read(each) for each in (busy(), hostile(busy())) if isinstance(each, dict))

    assert [name for name, _ in wild.elements] == [name for name, _ in tame.elements]
    assert {name for _, held in wild.elements for name in held} == {name for _, held in tame.elements for name in held}
    assert wild.embedded() == hostile(busy())
    assert "\\x1b[2J\\u202e" in wild.table("1 result that could not be proven")[0]["Why not"]


def test_the_page_embeds_the_result() -> None:
    """The page embeds the result unchanged."""
    assert read(busy()).embedded() == busy()


def test_the_page_loads_nothing() -> None:
    """The page refers to no file elsewhere, and its policy makes the browser refuse any."""
    page = report.html(busy())
    reader = Reader(page)

    assert not any(each in page for each in ("http:", "https:", "//", "url(", "@import", "javascript:"))
    assert {held["href"] for held in reader.all("a")} <= {f"#{held['id']}" for held in reader.all("section")}
    assert reader.all("script") == [{"type": "application/json", "id": "result"}]
    (policy,) = reader.all("meta", **{"http-equiv": "Content-Security-Policy"})
    assert policy["content"].startswith("default-src 'none'; style-src 'sha256-")
    assert "unsafe" not in policy["content"]
    assert not [tag for tag, held in reader.elements if "style" in held]


# ---- Money ----


@given(seed=st.integers(0, 2**32), days=st.sampled_from([1, 2, 36, 37, 200, 366, 1_200, 9_000]))
def test_money_is_the_sum_of_rows(seed: int, days: int) -> None:
    """Each cell is the sum of the result's rows of that period, status and currency; the last line sums all."""
    rows = sold(random.Random(seed), days, list(DECIMALS)) if days < 400 else sold(random.Random(seed), days, ["kwd"])
    page = read(result(money=rows))

    for currency in {row["currency"] for row in rows}:
        own = [row for row in rows if row["currency"] == currency]
        of_days = [date.fromisoformat(row["day"]) for row in own]
        unit = charts.unit_of(min(of_days), max(of_days))
        (caption,) = (name for name in page.rows if name.endswith(f"amounts in {currency.upper()}"))
        *lines, together = page.table(caption)
        wanted: Counter[tuple[str, str]] = Counter()
        for day, row in zip(of_days, own, strict=True):
            start = charts.period(charts.start_of(day, unit), unit)
            for period in (start, "Together"):
                wanted[period, row["status"].capitalize()] += row["amount"]
                wanted[period, "Orders"] += row["orders"]
        shown = {
            (line[unit.capitalize()], column): int(cell.replace(",", ""))
            if column == "Orders"
            else minor(cell, currency)
            for line in (*lines, together)
            for column, cell in line.items()
            if column != unit.capitalize()
        }
        assert {key: amount for key, amount in shown.items() if amount} == {
            key: amount for key, amount in wanted.items() if amount
        }


@pytest.mark.parametrize(
    ("days", "unit", "bars"), [(1, "day", 1), (36, "day", 36), (37, "week", 6), (366, "month", 13), (4_000, "year", 12)]
)
def test_many_days_are_grouped(days: int, unit: str, bars: int) -> None:
    """A year of days is drawn by month, and no span of time has more bars than a reader can distinguish."""
    last = date(2026, 1, 31)
    money = [
        {"day": str(last - timedelta(days=back)), "status": "paid", "currency": "usd", "orders": 1, "amount": 100}
        for back in range(days)
    ]
    page = read(result(money=money))

    assert len(page.all("rect")) == bars <= charts.PERIODS_MAX
    assert len(page.table(f"Orders by {unit}")) == bars + 1


def of_days(*days: str | None, **changes: object) -> list[dict[str, Any]]:
    """Return the sums of one order of a dollar on each of *days*."""
    row = {"status": "paid", "currency": "usd", "orders": 1, "amount": 100, **changes}
    return [{**row, "day": day} for day in days]


@pytest.mark.parametrize(
    ("days", "bars", "names"),
    [
        (["9999-12-31"], 0, ["after 2027"]),
        (["0001-01-01"], 0, ["before 1992"]),
        (["0001-01-01", "9999-12-31"], 0, ["before 1992", "after 2027"]),
        (
            ["0001-01-01", "1991-12-31", "2026-01-30", "2026-01-31", "2028-01-01", "9999-12-31"],
            2,
            ["before 1992", "30 Jan 2026", "31 Jan 2026", "after 2027"],
        ),
        (["1992-01-01", "2027-12-31"], 2, ["1992", "2027"]),
        (["2026-01-31", None], 1, ["31 Jan 2026"]),
    ],
    ids=str,
)
def test_a_distant_date_is_not_drawn(days: list[str | None], bars: int, names: list[str]) -> None:
    """A chart covers 36 years, up to the next one; the table has all dates, and a sentence counts those not drawn."""
    page = read(result(money=of_days(*days)))

    table = page.table("Orders by ")
    assert len(page.all("rect")) == bars
    assert [next(iter(line.values())) for line in table] == [*names, "Together"]
    assert sum(int(line["Orders"]) for line in table[:-1]) == int(table[-1]["Orders"]) == sum(map(bool, days))
    far = sum(day is not None and day[:4] not in ("1992", "2026", "2027") for day in days)
    words = f"The chart is of the years 1992 to 2027, without {far} order{'s' if far > 1 else ''}."
    assert (words in page.text_of["p"]) == (far > 0)


@given(first=st.dates(), last=st.dates())
def test_any_dates_have_a_unit(first: date, last: date) -> None:
    """For any dates the unit is the shortest that makes no more bars than a reader can distinguish."""
    first, last = sorted((first, last))
    unit = charts.unit_of(first, last)

    assert unit == "year" or len(charts.starts_of(first, last, unit)) <= charts.PERIODS_MAX
    if unit != "day":
        shorter = {"week": "day", "month": "week", "year": "month"}[unit]
        near = min(last, date.fromordinal(min(first.toordinal() + 1_200, date.max.toordinal())))
        assert len(charts.starts_of(first, near, shorter)) > charts.PERIODS_MAX


def test_many_currencies_are_counted() -> None:
    """Of thousands of currencies those with most orders are drawn, the rest counted, and the verdict names a few."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    names = [f"{first}{second}{third}" for first in letters for second in letters for third in "xyz"]
    money = [row for name in names for row in of_days("2026-01-31", currency=name)]
    money += of_days("2026-01-31", currency="usd", orders=9, amount=2**62)
    drifted = [{"currency": name, "amount": 1, "count": 1} for name in names]
    page = read(result(money=money, drift_total=len(names), drift_money=drifted, drift=[difference()]))

    drawn = [name for name in page.rows if name.startswith("Orders by day")]
    assert len(drawn) == CURRENCIES_MAX
    assert page.table("Orders by day, amounts in USD")[0]["Paid"] == "46,116,860,184,273,879.04"
    assert any("2,005 orders of 2,005 more currencies are in the result alone" in words for words in page.text_of["p"])
    assert page.text_of["h1"][0].endswith(" and amounts in 2,023 more.")


def test_a_bar_is_as_high_as_its_amount() -> None:
    """Heights are in proportion, parts of a bar are stacked, and a day without orders keeps its place."""
    amounts = [("2026-01-01", "paid", 3000), ("2026-01-01", "open", 1500), ("2026-01-05", "paid", 4500)]
    money = [
        {"day": day, "status": status, "currency": "usd", "orders": 1, "amount": amount}
        for day, status, amount in amounts
    ]
    paid, still_open, later = read(result(money=money)).all("rect")

    heights = [float(each["height"]) for each in (paid, still_open, later)]
    assert heights == pytest.approx([heights[2] * 2 / 3, heights[2] / 3, heights[2]], abs=0.02)
    assert float(still_open["y"]) + heights[1] == pytest.approx(float(paid["y"]), abs=0.02)
    assert float(later["x"].rstrip("%")) - float(paid["x"].rstrip("%")) == pytest.approx(80, abs=0.01)


@pytest.mark.parametrize(
    ("currency", "amount", "ticks"),
    [
        ("usd", 1_999_00, ["0", "500", "1,000", "1,500", "2,000"]),
        ("usd", 3, ["0.00", "0.01", "0.02", "0.03"]),
        ("jpy", 3, ["0", "1", "2", "3"]),
        ("kwd", 900, ["0.000", "0.500", "1.000"]),
        ("krw", 8_100_000_000_000, ["0", "5,000,000,000,000", "10,000,000,000,000"]),
    ],
)
def test_an_axis_has_units_of_its_currency(currency: str, amount: int, ticks: list[str]) -> None:
    """An axis has round amounts in its currency's units, with its decimals, or none if all amounts are whole."""
    row = {"day": "2026-01-31", "status": "paid", "currency": currency, "orders": 1, "amount": amount}

    assert read(result(money=[row])).text_of["text"] == [*ticks, "31 Jan"]


@given(low=st.integers(-(10**15), 0), high=st.integers(0, 10**15))
def test_an_axis_spans_its_amounts(low: int, high: int) -> None:
    """For any amounts the axis has a few round steps that span them and zero."""
    ticks = charts._ticks(low, high)

    steps = {after - before for before, after in itertools.pairwise(ticks)}
    assert len(steps) == 1
    assert str(steps.pop()).rstrip("0") in {"1", "2", "5"}
    assert ticks[0] <= low <= 0 <= high <= ticks[-1]
    assert 0 in ticks
    assert len(ticks) <= charts._TICKS_MAX + 2


def test_orders_without_a_day_or_currency_are_counted() -> None:
    """A sentence counts the orders that cannot be drawn, and an order without an amount counts as an order."""
    row = {"day": "2026-01-31", "status": "complete", "currency": "usd", "orders": 3, "amount": None}
    page = read(result(money=[row, {**row, "currency": None}, {**row, "day": None, "orders": 1, "amount": 5}]))

    assert "4 orders without a day or a currency are not shown here." in page.text_of["p"]
    assert page.table("Orders by day, amounts in USD") == [
        {"Day": "31 Jan 2026", "Orders": "3", "Complete": "0.00"},
        {"Day": "Together", "Orders": "3", "Complete": "0.00"},
    ]
    assert page.all("svg") == []


# ---- Checks ----


def test_each_check_is_shown() -> None:
    """Every number of every check is in its table, and the overview sums them up."""
    found = busy()
    page = read(found)

    assert [line["Result"] for line in page.table("The checks of this run")] == [
        "1 broken, 1 not provable",
        "1 missing, 41 different",
        "1 missing here, 2 missing there",
        "1 different",
    ]
    assert page.table("Money rules and how often") == [
        {
            "Rule": "Lines come to totalsorder-total1 not provable: an amount is not known",
            "Checked": "10",
            "Holds": "8",
            "Broken": "1",
            "Not provable": "1",
        }
    ]
    assert page.table("Rows of each table") == [
        {"Table": "orders", "Live": "1,100", "Rebuilt": "1,101", "Missing": "1", "Extra": "0", "Different": "41"}
    ]
    assert page.table("Events in the logs") == [
        {"Events in the logs": "10", "Missing here": "1", "Missing there": "2", "Different": "0", "Refused": "0"}
    ]
    (stripe,) = page.table("Objects that Stripe lists")
    assert (stripe["Object"], stripe["Account"], stripe["Listed"], stripe["Different"]) == (
        "checkout.session",
        "acct_1, test",
        "5",
        "1",
    )


def test_how_stripe_was_compared() -> None:
    """The page names the independent reading, and the objects left out of the comparison with Stripe."""
    tally = {"account": "", "livemode": True, "listed": 400, "missing_here": 0, "missing_there": 0, "different": 2}
    page = read(
        result(
            witnesses={"stripe": "against Stripe, by a map of 120 columns"},
            stripe=[
                {**tally, "object": "customer", "sampled_of": 900, "only_by_map": 2},
                {**tally, "object": "charge", "is_forbidden": True},
                {**tally, "object": "not asked", "account": "acct_1", "reason": "Stripe answered 401."},
            ],
        )
    )
    words = " ".join(page.text_of["p"])

    assert "Compared against Stripe, by a map of 120 columns." in words
    assert "customer: a sample, 400 of 900 were looked at" in words
    assert "charge was not compared: the API key may not list it." in words
    assert "acct_1, live: not asked. Stripe answered 401." in words
    assert "Different by the map alone: 2." in words


def test_a_check_that_did_not_run() -> None:
    """A check that did not run has no table, and the overview names it as not run."""
    page = read(result(tables=[]))

    assert [line["Result"] for line in page.table("The checks of this run")] == [
        "no difference",
        "no difference",
        "not checked",
        "not checked",
    ]
    assert not any(caption.startswith(("Events in", "Objects that")) for caption in page.rows)


def test_an_empty_inbox() -> None:
    """An empty inbox has a page too."""
    page = read(result())

    assert "The tables hold no order with an amount." in page.text_of["p"]
    assert page.all("svg") == []


# ---- The differences ----


def test_a_difference() -> None:
    """Money is shown as money, null as a dash, other values as they are, and a long one is cut with its length."""
    drift = [
        difference(),
        difference(held=None, amount=2000, currency="jpy"),
        difference(column="quantity", held=2, expected=3, amount=None, currency="usd"),
        difference(
            column="metadata", held={"a": "x" * 400}, expected=True, amount=None, account="acct_1", livemode=False
        ),
    ]
    lines = read(result(drift=drift, drift_total=4)).table("4 differences")

    assert [(line["Held"], line["Expected"], line["Difference"]) for line in lines] == [
        ("19.99 USD", "20.00 USD", "−0.01 USD"),  # noqa: RUF001
        ("–", "2,000 JPY", "+2,000 JPY"),  # noqa: RUF001
        ("2", "3", ""),
        (f'{{"a":"{"x" * 294}… (of 408 characters)', "yes", ""),
    ]
    assert lines[0]["Where"] == "orders.amount_totalcs_live_1live"
    assert lines[3]["Where"].endswith("acct_1, test")
    assert lines[0]["At"] == "2026-01-30 10:00:00"


def test_more_differences_than_are_shown() -> None:
    """The first thousand differences are shown, and a sentence counts the others and names the full list."""
    kinds = [{"check": "rebuild", "kind": "different", "count": 5_000}]
    page = read(result(drift=[difference()] * 1_200, drift_total=5_000, drift_kinds=kinds))

    assert len(page.table("1,000 differences")) == report.DIFFERENCES_MAX
    assert (
        "4,000 more differences are not shown: the whole list is in the CSV, which the option --csv FILE.csv writes."
        in page.text_of["p"]
    )
    assert page.all("svg")[0]["aria-label"] == "By kind. Rebuild: different 5,000"
    assert page.all("svg")[1]["aria-label"].startswith("By age (of the first 1,200). ")


def test_drift_by_kind_and_by_age() -> None:
    """Both charts count every difference of the result once, and describe themselves in words."""
    ages = ["2026-01-31T12:00:00Z", "2026-01-30T12:03:04Z", "2026-01-24T13:00:00Z", "2026-01-01T00:00:00Z", None]
    ages += ["2025-12-01T00:00:00Z", "2020-01-01T00:00:00Z"]
    drift = [difference(at=at) for at in ages]
    drift[0] |= {"check": "rules", "kind": "order-total"}
    found = result(drift=drift, drift_total=7)

    kinds, by_age = (each["aria-label"] for each in read(found).all("svg", role="img"))

    assert kinds == "By kind. Rebuild: different 6 and Money rules: order-total 1"
    assert by_age == (
        "By age. less than a day 1, 1 to 6 days 2, 7 to 29 days 0, 30 to 89 days 2, 90 days or more 1 and no date 1"
    )


# ---- In a browser ----

A4_PIXELS = round((210 - 2 * 16) / 25.4 * 96)

# The texts of charts that overflow the page's sides.
CUT_OFF = """() => [...document.querySelectorAll("svg text")].filter(each => {
    const box = each.getBoundingClientRect();
    return box.left < 0 || box.right > innerWidth;
}).map(each => each.textContent)"""

# The contrast of each text and each bar with the page, as WCAG 2 computes it.
FAINT = """() => {
    const light = colour => {
        const [r, g, b] = colour.match(/[0-9.]+/g).slice(0, 3).map(Number).map(each => each / 255)
            .map(each => each <= 0.04045 ? each / 12.92 : ((each + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const paper = light(getComputedStyle(document.body).backgroundColor);
    const contrast = colour => {
        const [low, high] = [light(colour), paper].sort((a, b) => a - b);
        return (high + 0.05) / (low + 0.05);
    };
    const found = [];
    for (const each of document.querySelectorAll("body *:not(script)")) {
        const style = getComputedStyle(each), isDrawn = each.closest("svg") !== null;
        const [colour, least] = each.matches("rect") ? [style.fill, 3] : [isDrawn ? style.fill : style.color, 4.5];
        const speaks = [...each.childNodes].some(node => node.nodeType === 3 && node.data.trim());
        if ((each.matches("rect") || (speaks && !each.matches("title"))) && contrast(colour) < least)
            found.push([each.outerHTML.slice(0, 90), colour, contrast(colour)]);
    }
    return found;
}"""


@pytest.fixture(scope="module")
def browser() -> "Iterator[Browser]":
    """Return a running Chromium, the machine's own; without one the test is skipped."""
    with chromium() as running:
        yield running


@pytest.fixture(params=["light", "dark"])
def scheme(request: pytest.FixtureRequest) -> str:
    """Return the color scheme that the reader prefers."""
    return str(request.param)


@pytest.fixture(params=[1280, 400])
def page(request: pytest.FixtureRequest, browser: "Browser", scheme: str, tmp_path: Path) -> "Iterator[Page]":
    """Return the busy report with hostile texts, opened as a file; it logs, fetches and runs nothing."""
    where = tmp_path / "report.html"
    found = busy()
    found["drift"].append(difference(id=HOSTILE, held=HOSTILE, expected=None, amount=None))
    where.write_text(report.html(found), encoding="utf-8")
    messages: list[str] = []
    fetched: list[str] = []
    opened = browser.new_page(viewport={"width": request.param, "height": 900}, color_scheme=scheme)  # type: ignore[arg-type]  # a literal of the fixture's
    opened.on("console", lambda message: messages.append(message.text))
    opened.on("pageerror", lambda error: messages.append(str(error)))
    opened.on("dialog", lambda dialog: messages.append(dialog.message))
    opened.on("request", lambda request: fetched.append(request.url))
    opened.goto(where.as_uri())
    yield opened
    opened.close()
    assert messages == []
    assert [each for each in fetched if not each.startswith("data:")] == [where.as_uri()]


@pytest.mark.browser
def test_bars_are_drawn(page: "Page") -> None:
    """Every bar has a size on the screen and lies inside its chart, and every chart has a bar and text."""
    sizes = page.evaluate(
        """() => [...document.querySelectorAll("svg")].map(svg => {
            const whole = svg.getBoundingClientRect();
            const bars = [...svg.querySelectorAll("rect")].map(bar => bar.getBoundingClientRect());
            return {
                drawn: bars.filter(bar => bar.width > 1 && bar.height > 0).length,
                outside: bars.filter(bar => bar.left < whole.left - 1 || bar.right > whole.right + 1
                    || bar.top < whole.top - 1 || bar.bottom > whole.bottom + 1).length,
                words: svg.getAttribute("aria-label").length,
            };
        })"""
    )

    assert len(sizes) == 5  # three currencies, kind, age
    assert all(each["drawn"] and each["words"] and not each["outside"] for each in sizes)


@pytest.mark.browser
def test_the_screen_shows_the_result(page: "Page") -> None:
    """The figures that a reader sees are those of the page's embedded JSON."""
    held = page.evaluate("() => JSON.parse(document.getElementById('result').textContent)")
    seen = page.locator("#money tfoot tr").evaluate_all(
        "rows => rows.map(row => [...row.cells].map(cell => cell.innerText))"
    )

    currencies = sorted({row["currency"] for row in held["money"]})
    assert len(seen) == len(currencies) == 3
    for currency, (_, orders, *sums) in zip(currencies, seen, strict=True):
        own = [row for row in held["money"] if row["currency"] == currency]
        assert int(orders.replace(",", "")) == sum(row["orders"] for row in own)
        assert sum(minor(each, currency) for each in sums) == sum(row["amount"] for row in own)
    of_lines = page.locator("#differences tbody tr")
    assert of_lines.count() == len(held["drift"])
    assert money(held["drift"][0]["held"], "usd") in of_lines.first.inner_text()
    assert page.locator("h1").inner_text() == "43 differences, in total −0.41 USD."  # noqa: RUF001


@pytest.mark.browser
def test_the_page_fits(page: "Page") -> None:
    """The page never scrolls sideways; a wide table scrolls on its own, and can be reached by keyboard."""
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.evaluate(CUT_OFF) == []
    assert page.locator(".wide:not([tabindex='0'])").count() == 0


@pytest.mark.browser
def test_the_page_can_be_read(page: "Page") -> None:
    """Text has a contrast of 4.5 to 1 with the page, and bars of 3 to 1, in light and in dark."""
    assert page.evaluate(FAINT) == []


@pytest.mark.browser
def test_the_page_prints(page: "Page") -> None:
    """On A4 nothing is cut off at the side, and ink is dark on white in any color scheme."""
    page.emulate_media(media="print")
    page.set_viewport_size({"width": A4_PIXELS, "height": 900})

    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.evaluate(CUT_OFF) == []
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.evaluate(FAINT) == []
    assert page.pdf(prefer_css_page_size=True).startswith(b"%PDF")
