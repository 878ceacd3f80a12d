"""One page with the result of a reconciliation: to read on any screen, to print, and to keep.

The page is complete in itself: no script runs, nothing is fetched, and the JSON result can be taken out again.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any, Final, TypeAlias

import msgspec

from deploy import charts, output
from deploy.markup import (
    Html,
    amount,
    below,
    code,
    counted,
    cut,
    fault,
    faults,
    figure,
    listed,
    moment,
    nothing,
    section,
    signed,
    table,
    tag,
)

Row: TypeAlias = Mapping[str, Any]
"""An object of the result: its values are any JSON."""

DIFFERENCES_MAX: Final = 1_000
CURRENCIES_MAX: Final = 24
"""At most this many currencies are drawn, those with the most orders."""
VERDICT_CURRENCIES_MAX: Final = 5

_STATUSES_MAX: Final = 4
"""A table of more statuses is printed smaller, so that no amount is cut off."""

_CHECKS: Final = {
    "rules": ("Money rules", "Money by its own arithmetic: the rows of the tables against each other."),
    "rebuild": (
        "Rebuild",
        "The tables against a rebuild with the same folds, which finds lost and changed rows and not a wrong reading.",
    ),
    "log": ("Event logs", "The recorded events against the logs that were given."),
    "stripe": ("Stripe", "The tables against what Stripe's API answers now."),
}
_FAULTS: Final = ("broken", "missing", "extra", "different", "missing_here", "missing_there", "refused")
_AGES: Final = {1: "less than a day", 7: "1 to 6 days", 30: "7 to 29 days", 90: "30 to 89 days"}
_OLDER: Final = "90 days or more"
_FUTURE: Final = "dated after this run"
_NO_AGE: Final = "no date"
_AMOUNT: Final = re.compile(r"(\S+ [A-Z]{3}\b)")

# By this policy a browser only shows the page, and refuses everything else that a value may have smuggled in.
_META: Final = """<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">"""


def html(result: Row) -> str:
    """Return the page of *result*, which is what `payfold reconcile --format json` prints."""
    encoded = msgspec.json.encode(result)
    found: Row = msgspec.json.decode(encoded)
    run = found["run"]
    title = tag("title", f"Reconciliation, run {run['id']}: {_verdict(found)}")
    body = tag(
        "main",
        _head(found),
        _overview(found),
        _money(found["money"], datetime.fromisoformat(run["finished_at"]).astimezone(UTC).date()),
        _drift(found),
        _rules(found.get("rules")),
        _tables(found.get("tables")),
        _logs(found.get("logs")),
        _stripe(found),
        _differences(found),
        _not_provable(found),
        tag(
            "footer",
            tag("p", _PROVEN_MEANS) if output.percent_proven(found.get("rules", ())) is not None else "",
            f"Made from run {run['id']} by Payfold {run.get('version', '')}. The whole result is in this page's "
            "source, as JSON, in the element with the id “result”.",
        ),
    )
    style = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
    # JSON can write this sign as an escape, and without the sign itself no value can end the element.
    data = encoded.decode().replace("<", "\\u003c")
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n{_META}\n{title}\n<style>\n{style}</style>\n</head>\n'
        f'<body>\n{body}\n<script type="application/json" id="result">{data}</script>\n</body>\n</html>\n'
    )


# ---- The verdict ----


def _head(found: Row) -> Html:
    run, events = found["run"], found["events"]
    is_ok = run["outcome"] == "ok"
    parts = _AMOUNT.split(_verdict(found))
    return tag(
        "header",
        tag("p", "Reconciliation", class_="eyebrow"),
        tag("p", _badge(found), class_=f"badge {'ok' if is_ok else 'drift'}"),
        tag("h1", *(_unbroken(part) if place % 2 else part for place, part in enumerate(parts))),
        tag("p", _caveats(found), class_="lead"),
        tag(
            "dl",
            _fact("Finished", moment(run["finished_at"], in_words=True), f"run {run['id']}, took {_took(run)}"),
            _fact("Events", f"{events['recorded']:,}", _span(events)),
            _fact("Parked", f"{events['parked']:,}", "events that could not be folded"),
            _fact("Pending", f"{events['pending']:,}", "events that were not folded yet"),
        ),
    )


# The share of the rows that the money rules checked, each counted once for every rule about it, where the rule holds or
# is broken, rounded down. See ``output.percent_proven``.
_PROVEN_MEANS: Final = (
    "Proven: the share of the rows checked by the money rules where the rule either holds or is broken, rounded down. "
    "A row counts once for each rule that is about it; the others are not provable, for the reasons that are listed."
)


_BADGES: Final = {"ok": "no drift", "incomplete": "no drift found, incomplete"}


def _badge(found: Row) -> str:
    """Return whether there is drift, and how much of what the rules checked is proven."""
    proven = output.percent_proven(found.get("rules", ()))
    words = [_BADGES.get(found["run"]["outcome"], "drift")]
    if proven is not None:
        percent, checked = proven
        words.append(f"proven: {percent} % of {checked:,} checked by rules")
    return "; ".join(words)


def _verdict(found: Row) -> str:
    total = found["drift_total"]
    if found["run"]["outcome"] != "drift" and not total:
        # Only a rebuild proves this sentence; the other checks merely find no difference.
        is_shown = "rebuild" in found["run"]["checks"]
        return "The tables are what the events say." if is_shown else "No difference was found."
    money = [signed(each["amount"], each["currency"]) for each in found["drift_money"] if each["currency"]]
    if (more := len(money) - VERDICT_CURRENCIES_MAX) > 0:
        money[VERDICT_CURRENCIES_MAX:] = [f"amounts in {more:,} more"]
    return f"{counted(total, 'difference')}, {f'in total {listed(money)}' if money else 'none of them in money'}."


def _caveats(found: Row) -> str:
    """Return sentences on what the verdict leaves out."""
    in_part = output.in_part(found)
    left = [name for name in _CHECKS if name not in found["run"]["checks"] and name not in in_part]
    unproven = _unproven(found)
    waiting = found["events"]["parked"] + found["events"]["pending"]
    said = [f"Not checked: {listed(_CHECKS[name][0] for name in left)}."] if left else []
    said += [f"{_CHECKS[name][0]}: only in part ({'; '.join(words)})." for name, words in in_part.items()]
    if not left and not in_part and "left_out" not in found:
        said.append("Everything was checked.")
    if unproven:
        said.append(f"{counted(unproven, 'result')} of the rules could not be proven either way.")
    if "left_out" in found:
        left_out = found["left_out"]
        said.append(
            f"Not rebuilt: {counted(left_out['objects'], 'object')} of {counted(left_out['events'], 'archived event')}."
        )
    if "repaired" in found:
        said.append(f"Before this run's repair there {_were(found['repaired']['drift_total'])}.")
    if waiting:
        said.append(f"{counted(waiting, 'recorded event')} {'is' if waiting == 1 else 'are'} in no table yet.")
    return " ".join(said)


def _were(count: int) -> str:
    return f"{'was' if count == 1 else 'were'} {counted(count, 'difference')}"


def _unproven(found: Row) -> int:
    return sum(rule["not_provable"] for rule in found.get("rules", ()))


def _fact(name: str, value: str, more: str) -> Html:
    return tag("div", tag("dt", name), tag("dd", value, tag("small", more)))


def _took(run: Row) -> str:
    taken = datetime.fromisoformat(run["finished_at"]) - datetime.fromisoformat(run["started_at"])
    minutes, seconds = divmod(round(taken.total_seconds()), 60)
    return f"{minutes:,} min {seconds} s" if minutes else f"{seconds} s"


def _span(events: Row) -> str:
    if events["first_created"] is None or events["last_created"] is None:
        return "none is recorded"
    first, last = (datetime.fromisoformat(events[name]).astimezone(UTC) for name in ("first_created", "last_created"))
    return f"from {charts.period(first.date(), 'day')} to {charts.period(last.date(), 'day')}"


def _overview(found: Row) -> Html:
    results: dict[str, Sequence[Row] | None] = {
        "rules": found.get("rules"),
        "rebuild": found.get("tables"),
        "log": [found["logs"]] if found.get("logs") else None,
        "stripe": found.get("stripe"),
    }
    checked, in_part = found["run"]["checks"], output.in_part(found)
    rows: list[tuple[str, str, str]] = []
    for name in dict.fromkeys((*_CHECKS, *checked)):
        title, compares = _CHECKS.get(name, (name, ""))
        told = results.get(name)
        outcome = nothing("not checked") if name not in checked else _outcome(told) if told is not None else ""
        if name in in_part:
            outcome = tag("span", _outcome(told or ()), ", looked at only in part")
        rows.append((title if told is None else tag("a", title, href=f"#{name}"), compares, outcome))
    return section(
        "checked", "What was checked", table("The checks of this run", ("Check", "Compares", "Result"), rows)
    )


def _outcome(rows: Sequence[Row]) -> Html:
    """Return the sum of the findings of one check."""
    totals = {name: sum(row.get(name) or 0 for row in rows) for name in _FAULTS}
    said = ", ".join(f"{total:,} {name.replace('_', ' ')}" for name, total in totals.items() if total)
    unproven = sum(row.get("not_provable", 0) for row in rows)
    return tag("span", fault(said) if said else "no difference", f", {unproven:,} not provable" if unproven else "")


# ---- Money ----


def _money(rows: Sequence[Row], now: date) -> Html:
    of_currency: dict[str, list[Row]] = {}
    for row in rows:
        if row["day"] and row["currency"]:
            of_currency.setdefault(row["currency"], []).append(row)
    orders = {currency: sum(row["orders"] for row in own) for currency, own in of_currency.items()}
    most_first = sorted(orders, key=lambda currency: (-orders[currency], currency))
    others = most_first[CURRENCIES_MAX:]
    left = sum(row["orders"] for row in rows if not (row["day"] and row["currency"]))
    about = "What orders come to, as the tables hold it, by the day (UTC) they were completed or, until then, made."
    rest = f"{counted(left, 'order')} without a day or a currency {'is' if left == 1 else 'are'} not shown here."
    return section(
        "money",
        "Money by day and status",
        tag("p", about if of_currency else "The tables hold no order with an amount."),
        *(_currency(currency, of_currency[currency], now) for currency in sorted(most_first[:CURRENCIES_MAX])),
        tag("p", _other_currencies(len(others), sum(orders[currency] for currency in others))) if others else "",
        tag("p", rest) if left else "",
    )


def _other_currencies(count: int, orders: int) -> str:
    currencies = "1 more currency" if count == 1 else f"{count:,} more currencies"
    return (
        f"The {CURRENCIES_MAX} currencies of most orders are shown. {counted(orders, 'order')} of {currencies} "
        f"{'is' if orders == 1 else 'are'} in the result alone, in this page's source."
    )


def _currency(currency: str, rows: Sequence[Row], now: date) -> Html:
    first_year, last_year = charts.years_drawn(now)
    days = [date.fromisoformat(row["day"]) for row in rows]
    within = [day for day in days if first_year <= day.year <= last_year]
    unit = charts.unit_of(min(within), max(within)) if within else "year"
    amounts: Counter[tuple[date, str]] = Counter()
    orders: Counter[date] = Counter()
    for day, row in zip(days, rows, strict=True):
        start = _BEFORE if day.year < first_year else _AFTER if day.year > last_year else charts.start_of(day, unit)
        amounts[start, row["status"]] += row["amount"] or 0
        orders[start] += row["orders"]
    drawn = {key: amount for key, amount in amounts.items() if key[0] not in (_BEFORE, _AFTER)}
    not_drawn = orders[_BEFORE] + orders[_AFTER]
    names = {_BEFORE: f"before {first_year}", _AFTER: f"after {last_year}"}
    names |= {start: charts.period(start, unit) for start in orders if start not in names}
    seen = {row["status"] for row in rows}
    statuses = [*(each for each in charts.STATUSES if each in seen), *sorted(seen.difference(charts.STATUSES))]
    title = f"{currency.upper()} by {unit}"
    return tag(
        "figure",
        tag(
            "div",
            tag("figcaption", tag("h3", title), _legend(rows, statuses, currency)),
            charts.stacked(title, currency, unit, statuses, drawn) if any(drawn.values()) else "",
            tag("p", f"The chart is of the years {first_year} to {last_year}, without {counted(not_drawn, 'order')}.")
            if not_drawn
            else "",
            class_="whole",
        ),
        table(
            f"Orders by {f'{unit} from Monday' if unit == 'week' else unit}, amounts in {currency.upper()}",
            (unit, "Orders", *statuses),
            _periods(
                currency,
                statuses,
                amounts,
                {start: (names[start], orders[start]) for start in sorted(orders) if orders[start]},
            ),
            texts=1,
            has_total=True,
            kind="many" if len(statuses) > _STATUSES_MAX else "",
        ),
    )


# Amounts before and after the years of a chart are counted under these dates.
_BEFORE: Final = date.min
_AFTER: Final = date.max


def _periods(
    currency: str,
    statuses: Sequence[str],
    amounts: Mapping[tuple[date, str], int],
    periods: Mapping[date, tuple[str, int]],
) -> list[tuple[str | int, ...]]:
    """Return the lines of a currency's table, one for the name and the orders of each of *periods*, then their sum."""
    lines: list[tuple[str | int, ...]] = [
        (
            name,
            orders,
            *(figure(amounts[start, each], currency) if (start, each) in amounts else "" for each in statuses),
        )
        for start, (name, orders) in periods.items()
    ]
    sums = (sum(amounts.get((start, each), 0) for start in periods) for each in statuses)
    return [
        *lines,
        ("Together", sum(orders for _, orders in periods.values()), *(figure(each, currency) for each in sums)),
    ]


def _legend(rows: Sequence[Row], statuses: Sequence[str], currency: str) -> Html:
    def _entry(status: str) -> Html:
        of_status = [row for row in rows if row["status"] == status]
        return tag(
            "li",
            tag("span", "", class_=f"swatch {charts.colour(status)}", aria_hidden="true"),
            f"{status} ",
            tag("b", amount(sum(row["amount"] or 0 for row in of_status), currency)),
            tag("small", f" {counted(sum(row['orders'] for row in of_status), 'order')}"),
        )

    return tag("ul", *map(_entry, statuses), class_="legend")


# ---- Drift, at a glance ----


def _drift(found: Row) -> Html:
    drift = found["drift"]
    if not drift:
        return Html()
    finished = datetime.fromisoformat(found["run"]["finished_at"])
    most_first = sorted(found["drift_kinds"], key=lambda each: -each["count"])
    kinds = {f"{_check(each['check'])}: {each['kind']}": each["count"] for each in most_first}
    ages = Counter(_age(each["at"], finished) for each in drift)
    shown_ages = [*_AGES.values(), _OLDER, *(name for name in (_FUTURE, _NO_AGE) if ages[name])]
    part = "" if len(drift) == found["drift_total"] else f" (of the first {len(drift):,})"
    money = [
        (each["currency"].upper(), each["count"], signed(each["amount"], each["currency"]))
        for each in found["drift_money"]
        if each["currency"]
    ]
    return section(
        "drift",
        "Where the differences are",
        tag(
            "p",
            "A difference in money is what the tables hold less what is expected: below zero, they hold too little. "
            "A cent that several checks tell of is summed once.",
        ),
        table("Differences in money", ("Currency", "Differences", "Together"), money, texts=1) if money else "",
        tag(
            "div",
            charts.counts("By kind", kinds),
            charts.counts(f"By age{part}", {age: ages[age] for age in shown_ages}),
            class_="pair",
        ),
    )


def _age(at: str | None, finished: datetime) -> str:
    if at is None:
        return _NO_AGE
    days = (finished - datetime.fromisoformat(at)).days
    if days < 0:
        return _FUTURE
    return next((name for below_days, name in _AGES.items() if days < below_days), _OLDER)


# ---- The checks, one by one ----


def _rules(rows: Sequence[Row] | None) -> Html:
    if rows is None:
        return Html()
    return section(
        "rules",
        "Money rules",
        tag(
            "p",
            "A rule holds where its two sides come to the same, and is broken where they do not. It is not provable "
            "where something that it needs is not known, and the line below the rule gives the reason.",
        ),
        table(
            "Money rules and how often they hold",
            ("Rule", "Checked", "Holds", "Broken", "Not provable"),
            [
                (
                    tag("span", row["title"], below(row["rule"]), *map(below, _why_not(row))),
                    row["checked"],
                    row["holds"],
                    *faults(row["broken"]),
                    row["not_provable"],
                )
                for row in rows
            ],
            texts=1,
        ),
    )


def _why_not(rule: Row) -> list[str]:
    """Return the reasons why rows are not provable by *rule*, each with its number of rows."""
    return [f"{each['rows']:,} not provable: {each['reason']}" for each in rule.get("reasons", ())]


def _tables(rows: Sequence[Row] | None) -> Html:
    if rows is None:
        return Html()
    return section(
        "rebuild",
        "Tables against a rebuild",
        tag(
            "p",
            "Every recorded event was folded again into a second set of tables. Missing rows are only in that one, "
            "extra rows only in the live one, and different rows in both, but unlike.",
        ),
        table(
            "Rows of each table, live and rebuilt",
            ("Table", "Live", "Rebuilt", "Missing", "Extra", "Different"),
            [
                (
                    code(row["table"]),
                    row["live"],
                    row["rebuilt"],
                    *faults(row["missing"], row["extra"], row["different"]),
                )
                for row in rows
            ],
            texts=1,
        ),
    )


def _logs(row: Row | None) -> Html:
    if not row:
        return Html()
    return section(
        "log",
        "Events against the logs",
        tag(
            "p",
            "Missing here: an event of the logs that is not recorded. Missing there: one recorded in their time "
            "that is not in them. Refused: a line that is no event.",
        ),
        table(
            "Events in the logs that were given",
            ("Events in the logs", "Missing here", "Missing there", "Different", "Refused"),
            [(row["events"], *faults(row["missing_here"], row["missing_there"], row["different"], row["refused"]))],
            texts=0,
        ),
    )


def _stripe(found: Row) -> Html:
    rows: Sequence[Row] | None = found.get("stripe")
    if rows is None:
        return Html()
    witness, failed = found.get("witnesses", {}).get("stripe"), found.get("stripe_error")
    return section(
        "stripe",
        "Tables against Stripe",
        tag(
            "p",
            f"Compared {witness}. " if witness else "",
            "Missing here: Stripe lists it and no table holds it. Missing there: a table holds what Stripe does not.",
        ),
        tag("p", fault(f"It was not compared in whole: {failed['detail']}"), f" {failed['to_do']}") if failed else "",
        *(tag("p", each) for each in notes_on_stripe(rows)),
        table(
            "Objects that Stripe lists, and how the tables differ",
            ("Object", "Account", "Listed", "Missing here", "Missing there", "Different"),
            [
                (
                    code(row["object"]),
                    _world(row),
                    row["listed"],
                    *faults(row["missing_here"], row["missing_there"], row["different"]),
                )
                for row in rows
            ],
            texts=2,
        ),
    )


def notes_on_stripe(tallies: Sequence[Row]) -> Iterator[str]:
    """Yield sentences on the objects that the comparison with Stripe left out, and on faults that no repair mends."""
    if archived := sum(each.get("archived", 0) for each in tallies):
        yield f"{archived:,} rows could not be folded again with what Stripe lists: their events are archived."
    if unreadable := sum(each.get("unreadable", 0) for each in tallies):
        yield f"{unreadable:,} of Stripe's objects could not be read, and were not compared."
    for each in tallies:
        yield from _notes_on(each)
    if only := sum(each.get("only_by_map", 0) for each in tallies):
        yield (
            f"Different by the map alone: {only:,}. Folding what Stripe lists would leave these rows as they are, and "
            "no repair puts them right: a fold reads a column from the wrong place, or an event in the inbox reports "
            "what Stripe does not."
        )
    if unstated := sum(each.get("unstated", 0) for each in tallies):
        yield f"{unstated:,} values that Stripe lists are not in the recorded events, of an older API version."


def _notes_on(tally: Row) -> Iterator[str]:
    """Yield sentences on the parts of one *tally* that were left out."""
    if tally.get("is_forbidden"):
        yield f"{tally['object']} was not compared: the API key may not list it."
    if tally.get("reason"):
        yield f"{_world(tally)}: {tally['object']}. {tally['reason']}"
    if tally.get("sampled_of"):
        yield f"{tally['object']}: a sample, {_sampled(tally)} were looked at; --seed N chooses another."
    if without := tally.get("without_lines"):
        yield f"{tally['object']}: lines of {without:,} were not compared, since Stripe lists only a part of them."
    if tally.get("cut_short"):
        yield f"{tally['object']}: the list was cut short, and older rows were not compared."


def _sampled(tally: Row) -> str:
    known = tally["sampled_of"]
    if "sampled" in tally:
        return f"the ledgers of {tally['sampled']:,} of {known:,} customers"
    return f"{tally['listed']:,} of {known:,}"


# ---- One by one ----


def _differences(found: Row) -> Html:
    if not found["drift_total"]:
        return Html()
    drift = found["drift"][:DIFFERENCES_MAX]
    left = found["drift_total"] - len(drift)
    rest = (
        f"{counted(left, 'more difference')} {'is' if left == 1 else 'are'} not shown: the whole list is in the CSV, "
    )
    rest += "which the option --csv FILE.csv writes."
    return section(
        "differences",
        "The differences",
        tag("p", rest) if left else "",
        table(
            f"{counted(len(drift), 'difference')}, one a line",
            ("What", "Where", "At", "Held", "Expected", "Difference"),
            [
                (
                    tag("span", _check(each["check"]), below(each["kind"]), *_details(each)),
                    _where(each),
                    moment(each["at"]),
                    _value(each["held"], each),
                    _value(each["expected"], each),
                    _unbroken(signed(each["amount"], each["currency"])) if _is_money(each) else "",
                )
                for each in drift
            ],
            texts=3,
            kind="dense",
        ),
    )


def _details(difference: Row) -> list[Html]:
    """Return why a rule is broken; nothing for the other checks, which only name the difference."""
    return [tag("span", difference["detail"], class_="below why")] if difference.get("detail") else []


def _not_provable(found: Row) -> Html:
    rows, total = found.get("not_provable", ()), _unproven(found)
    if not rows:
        return Html()
    return section(
        "not-provable",
        "What could not be proven",
        tag("p", f"{len(rows):,} of {total:,} are shown here.") if len(rows) < total else "",
        table(
            f"{counted(len(rows), 'result')} that could not be proven",
            ("Rule", "Where", "At", "Why not"),
            [(code(row["rule"]), _where(row), moment(row["at"]), row["detail"] or nothing()) for row in rows],
            kind="dense",
        ),
    )


def _check(name: str) -> str:
    return _CHECKS[name][0] if name in _CHECKS else name


def _where(row: Row) -> Html:
    path = ".".join(filter(None, (row["table"], row.get("column"))))
    return tag("span", code(path), tag("code", row["id"] or "", class_="below"), below(_world(row)))


def _world(row: Row) -> str:
    mode = {True: "live", False: "test"}.get(row["livemode"])
    return ", ".join(filter(None, (row["account"], mode)))


def _is_money(difference: Row) -> bool:
    return difference["amount"] is not None and bool(difference["currency"])


def _value(value: object, difference: Row) -> Html:
    """Return a JSON value of *difference* as its table shows it."""
    if value is None:
        return nothing()
    if isinstance(value, int) and not isinstance(value, bool) and _is_money(difference):
        return _unbroken(amount(value, difference["currency"]))
    return tag("span", cut(output.shown(value)), class_="long")


def _unbroken(text: str) -> Html:
    return tag("span", text, class_="unbroken")
