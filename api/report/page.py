"""One page with the result of a reconciliation: to read on any screen, to print, and to keep.

The page is complete in itself: no script runs, nothing is fetched, and the JSON result can be taken out again. Its text
and markup are in the template ``page.html.j2``; what this module computes is what the template inserts.
"""

import base64
import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any, Final

import msgspec
from jinja2 import Template

from api.report import charts, results, words
from api.report.money import Money, money
from api.report.templates import environment
from api.report.verdict import CHECKS, Row, badge, caveats, notes_on_stripe, unproven, verdict

DIFFERENCES_MAX: Final = 1_000

_FAULTS: Final = ("broken", "missing", "extra", "different", "missing_here", "missing_there", "refused")
_AGES: Final = {1: "less than a day", 7: "1 to 6 days", 30: "7 to 29 days", 90: "30 to 89 days"}
_OLDER: Final = "90 days or more"
_FUTURE: Final = "dated after this run"
_NO_AGE: Final = "no date"
_AMOUNT: Final = re.compile(r"(\S+ [A-Z]{3}\b)")


@dataclass(frozen=True, slots=True)
class Page:
    """The text of a page, and its Content-Security-Policy, which an answer also has as a header."""

    html: str
    policy: str


def html(result: Row) -> str:
    """Return the page of *result*, which is what `payfold reconcile --format json` prints."""
    return page(result).html


def page(result: Row) -> Page:
    """Return the page of *result* with its policy."""
    found: Row = msgspec.json.decode(msgspec.json.encode(result))
    values = _values(found)
    style = _style(values["money"])
    policy = _policy(style)
    return Page(_template().render(values, style=style, policy=policy), policy)


def _style(shown: Money) -> str:
    """Return the style sheet, with the width that the figures of each chart take."""
    margins = sorted({each.chart.margin for each in shown.currencies if each.chart is not None})
    return _css() + "".join(f".margin-{margin} {{ padding-left: {margin}ch; }}\n" for margin in margins)


@cache
def _css() -> str:
    return (Path(__file__).parent / "page.css").read_text(encoding="utf-8")


def _policy(style: str) -> str:
    """Return the policy by which a browser shows the page with its own *style*, and refuses everything else."""
    hashed = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    return f"default-src 'none'; style-src 'sha256-{hashed}'; img-src data:; base-uri 'none'; form-action 'none'"


def _values(found: Row) -> dict[str, Any]:
    """Return everything that the page shows, by the names in its template."""
    run = found["run"]
    is_proven = results.percent_proven(found.get("rules", ())) is not None
    return {
        "found": found,
        "run": run,
        "events": found["events"],
        "verdict": verdict(found),
        "badge": badge(found),
        "caveats": caveats(found),
        "took": _took(run),
        "span": _span(found["events"]),
        "checks": list(_checks(found)),
        "money": money(found["money"], datetime.fromisoformat(run["finished_at"]).astimezone(UTC).date()),
        "drift": _drift(found) if found["drift"] else None,
        "differences": found["drift"][:DIFFERENCES_MAX],
        "notes_on_stripe": list(notes_on_stripe(found.get("stripe") or ())),
        "unproven": unproven(found),
        "is_proven": is_proven,
    }


def _took(run: Row) -> str:
    taken = datetime.fromisoformat(run["finished_at"]) - datetime.fromisoformat(run["started_at"])
    minutes, seconds = divmod(round(taken.total_seconds()), 60)
    return f"{minutes:,} min {seconds} s" if minutes else f"{seconds} s"


def _span(events: Row) -> str:
    if events["first_created"] is None or events["last_created"] is None:
        return "none is recorded"
    first, last = (datetime.fromisoformat(events[name]).astimezone(UTC) for name in ("first_created", "last_created"))
    return f"from {charts.period(first.date(), 'day')} to {charts.period(last.date(), 'day')}"


# ---- What was checked ----


@dataclass(frozen=True, slots=True)
class Check:
    """A line of the overview; *outcome* is None where the check has no result."""

    name: str
    title: str
    compares: str
    is_linked: bool
    is_made: bool
    outcome: "Outcome | None"
    is_in_part: bool


@dataclass(frozen=True, slots=True)
class Outcome:
    """The sum of the findings of one check."""

    faults: str
    unproven: int


def _checks(found: Row) -> Iterator[Check]:
    by_check: dict[str, Sequence[Row] | None] = {
        "rules": found.get("rules"),
        "rebuild": found.get("tables"),
        "log": [found["logs"]] if found.get("logs") else None,
        "stripe": found.get("stripe"),
    }
    made, in_part = found["run"]["checks"], results.in_part(found)
    for name in dict.fromkeys((*CHECKS, *made)):
        title, compares = CHECKS.get(name, (name, ""))
        rows = by_check.get(name)
        is_known = name in in_part or (name in made and rows is not None)
        yield Check(
            name=name,
            title=title,
            compares=compares,
            is_linked=rows is not None,
            is_made=name in made,
            outcome=_outcome(rows or ()) if is_known else None,
            is_in_part=name in in_part,
        )


def _outcome(rows: Sequence[Row]) -> Outcome:
    totals = {name: sum(row.get(name) or 0 for row in rows) for name in _FAULTS}
    return Outcome(
        faults=", ".join(f"{total:,} {name.replace('_', ' ')}" for name, total in totals.items() if total),
        unproven=sum(row.get("not_provable", 0) for row in rows),
    )


# ---- Drift, at a glance ----


@dataclass(frozen=True, slots=True)
class Drift:
    """The differences by currency, by kind and by age."""

    money: list[Row]
    kinds: charts.Counts
    ages: charts.Counts


def _drift(found: Row) -> Drift:
    finished = datetime.fromisoformat(found["run"]["finished_at"])
    most_first = sorted(found["drift_kinds"], key=lambda each: -each["count"])
    kinds = {f"{_check(each['check'])}: {each['kind']}": each["count"] for each in most_first}
    ages = Counter(_age(each["at"], finished) for each in found["drift"])
    shown_ages = [*_AGES.values(), _OLDER, *(name for name in (_FUTURE, _NO_AGE) if ages[name])]
    listed = len(found["drift"])
    part = "" if listed == found["drift_total"] else f" (of the first {listed:,})"
    return Drift(
        money=[each for each in found["drift_money"] if each["currency"]],
        kinds=charts.counts("By kind", kinds),
        ages=charts.counts(f"By age{part}", {age: ages[age] for age in shown_ages}),
    )


def _age(at: str | None, finished: datetime) -> str:
    if at is None:
        return _NO_AGE
    days = (finished - datetime.fromisoformat(at)).days
    if days < 0:
        return _FUTURE
    return next((name for below_days, name in _AGES.items() if days < below_days), _OLDER)


# ---- The template, and what it asks for ----


@cache
def _template() -> Template:
    templates = environment(Path(__file__).parent)
    templates.policies["json.dumps_kwargs"] = {"ensure_ascii": False}
    templates.filters |= _FILTERS
    return templates.get_template("page.html.j2")


def _check(name: str) -> str:
    return CHECKS[name][0] if name in CHECKS else name


def _place(row: Row) -> str:
    return ".".join(filter(None, (row["table"], row.get("column"))))


def _is_money(difference: Row) -> bool:
    return difference["amount"] is not None and bool(difference["currency"])


_FILTERS: Final[Mapping[str, Any]] = {
    "amount": words.amount,
    "check": _check,
    "counted": words.counted,
    "cut": words.cut,
    "first_up": words.first_up,
    "is_money": _is_money,
    "moment": words.moment,
    "moment_in_words": words.moment_in_words,
    "number": words.number,
    "place": _place,
    "signed": words.signed,
    "split_at_amounts": _AMOUNT.split,
    "world": words.world,
}
