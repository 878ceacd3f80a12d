"""What a set of events must come to: the design's rules as plainly as they can be computed, and as slowly.

Written from the design and Stripe's documentation alone, and independent of the engine: it shares neither its readings
of payloads (those here are in ``tests/reference_readings.py``) nor its way to an order. Here every order of a second is
tried, with every choice of equal steps left out, so a second may hold ``EVENTS_MAX`` events of one object.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, permutations, product
from typing import Any, Final

from schemas import tables
from tests import reference_readings as readings
from tests.reference_readings import PAYMENT, Report, Thing
from worker.folds.facts import Subject

Row = dict[str, Any]
EVENTS_MAX: Final = 6


class TooMany(Exception):
    """A second holds more events of one object than all orders of can be tried."""


@dataclass(frozen=True)
class Known:
    """A row, before charges settle it, with the rows that are parts of it, and whether its order is in doubt."""

    row: Row
    parts: dict[Subject, Row]
    is_ambiguous: bool


def tables_of(bodies: Iterable[bytes], *, account: str = "") -> dict[Subject, Row]:
    """Return the rows that the events in *bodies* come to; the first rendering of each id counts.

    Raises:
        TooMany: a second cannot be tried out.
    """
    found: dict[Subject, Row] = {}
    for subject, known in account_of(bodies, account=account).items():
        found |= {subject: known.row, **known.parts}
    return found | settled(found)


def account_of(bodies: Iterable[bytes], *, account: str = "") -> dict[Subject, Known]:
    """Return what is known of each row that is folded from an object's own events; raises as ``tables_of``."""
    objects = objects_of(bodies, account=account)
    found: dict[Subject, Known] = {}
    for thing in objects:
        for subject in subjects_of(thing, objects):
            known = known_of(subject, objects)
            if known is not None:
                found[subject] = known
    return found


Objects = Mapping[Thing, Sequence[Report]]


def objects_of(bodies: Iterable[bytes], *, account: str = "") -> Objects:
    """Return what is reported of each object, without what an operator set aside."""
    events: dict[tuple[str, bool, str], Report] = {}
    aside = {}
    for body in bodies:
        word = readings.set_aside(body, account)
        report = readings.read(body, account)
        if word is not None:
            aside[word] = True
        if report is not None:
            events.setdefault((*report.thing[:2], report.event_id), report)
    found: dict[Thing, list[Report]] = defaultdict(list)
    for key, report in events.items():
        if key not in aside:
            found[report.thing].append(report)
    return found


# ---- Which rows there are ----

TABLE_OF: Final = {
    "checkout.session": "orders",
    "payment_link": "payment_links",
    "customer": "customers",
    "customer_balance_transaction": "balance_transactions",
    "invoice": "invoices",
    "invoice_payment": "invoice_payments",
    "credit_note": "credit_notes",
    "charge": "charges",
    "refund": "refunds",
    "dispute": "disputes",
    "payment_intent": "payment_intents",
    "billing_portal.configuration": "portal_configurations",
    "billing_portal.session": "portal_sessions",
}


def subjects_of(thing: Thing, objects: Objects) -> Iterator[Subject]:
    """Yield the rows that an object's events are folded into."""
    account, livemode, kind, id_ = thing
    yield Subject(TABLE_OF[kind], account, livemode, id_)
    reports = objects[thing]
    if kind == "invoice" and any(PAYMENT + "status" in report.after for report in reports):
        yield Subject("invoice_payments", account, livemode, id_)
    if kind == "customer":
        for currency in sorted({report.after["currency"] for report in reports if _has_balance(report)}):
            yield Subject("balances", account, livemode, id_, currency=currency)
    if kind == "customer_balance_transaction":
        for report in reports:
            customer, currency = report.after.get("customer"), report.after.get("currency")
            if customer and currency:
                yield Subject("balances", account, livemode, customer, currency=currency)


def _has_balance(report: Report) -> bool:
    return report.after.get("currency") is not None and "balance" in report.after


def known_of(subject: Subject, objects: Objects) -> Known | None:
    """Return what is known of one row."""
    if subject.table == "balances":
        return _balance(subject, objects)
    kind = next(kind for kind, table in TABLE_OF.items() if table == subject.table)
    if subject.table == "invoice_payments" and _thing(subject, kind) not in objects:
        return _payment_of_invoice(subject, objects)
    thing = _thing(subject, kind)
    course = course_of(objects[thing], _ledger_of(thing, objects))
    row = folded(subject, course.reports)
    if subject.table == "credit_notes":
        _split(row, course.reports, _to_balance(subject, objects))
    return Known(_shown(subject, row), _parts(subject, course.reports), course.is_ambiguous)


def _thing(subject: Subject, kind: str) -> Thing:
    return (subject.account, subject.livemode, kind, subject.id)


def _payment_of_invoice(subject: Subject, objects: Objects) -> Known:
    """Return the payment that an invoice of before basil names, in the order of the invoice's events."""
    course = course_of(objects[_thing(subject, "invoice")])
    naming = [report for report in course.reports if PAYMENT + "status" in report.after]
    row = folded(subject, [_of_payment(report) for report in naming])
    return Known(_shown(subject, row | {"invoice": subject.id}), {}, course.is_ambiguous)


def _of_payment(report: Report) -> Report:
    def own(values: Mapping[str, Any]) -> Row:
        return {name.removeprefix(PAYMENT): value for name, value in values.items() if name.startswith(PAYMENT)}

    return Report(
        **{**vars(report), "after": own(report.after), "before": None, "moments": own(report.moments)},
    )


# ---- The order of one object's events (rules 2 to 4) ----


@dataclass(frozen=True)
class Course:
    """An object's events in their order, without twins, and whether another order is as likely."""

    reports: list[Report]
    is_ambiguous: bool


@dataclass(frozen=True)
class Way:
    """One way through a second: the events in an order, those that are left out, and how many do not fit."""

    reports: tuple[Report, ...]
    left_out: tuple[Report, ...]
    gaps: int

    @property
    def last(self) -> Report:
        """The event that ends it."""
        return self.reports[-1]


@dataclass(frozen=True)
class Group:
    """The events of one rank and stamp, which second is before theirs, and the ways that may have been gone.

    ``ways`` has for each of the starts (by the state that the second before ended in) the possible ways.
    """

    number: int
    reports: Sequence[Report]
    previous: "Group | None"
    ways: "Sequence[tuple[Way | None, Sequence[Way]]]"
    is_in_doubt: bool

    @property
    def ends(self) -> list[Way]:
        """The best way to each of the states that it may have ended in."""
        return _best_by_end(way for _, ways in self.ways for way in ways)


Ledger = Mapping[Any, Any]


def course_of(reports: Sequence[Report], ledger: "LedgerView | None" = None) -> Course:
    """Return the order of the events of one object; raises TooMany."""
    groups: list[Group] = []
    by_place: dict[Any, list[Report]] = defaultdict(list)
    for report in sorted(reports, key=lambda each: each.event_id):
        by_place[report.rank, report.stamp].append(report)
    for number, (place, members) in enumerate(sorted(by_place.items())):
        earlier = [group for group in groups if group.reports[0].stamp < place[1]]
        groups.append(_group(number, members, earlier[-1] if earlier else None, ledger))
    return _chosen(groups)


def _group(number: int, members: Sequence[Report], previous: Group | None, ledger: "LedgerView | None") -> Group:
    """Try every way of a second from every state that the second before may have ended in."""
    starts: list[Way | None] = list(previous.ends) if previous else [None]
    tried = [(start, _ways(members, start and start.last, ledger)) for start in starts]
    fewest = min(ways[0].gaps for _, ways in tried)
    kept = [(start, ways) for start, ways in tried if ways[0].gaps == fewest]
    is_decided = len(kept) == 1 or any(report.is_observation for report in members)
    ends = {_state(way.last) for _, ways in kept for way in ways}
    doubt = len(ends) > 1 or (previous is not None and previous.is_in_doubt and not is_decided)
    return Group(number, members, previous, kept, doubt)


def _ways(members: Sequence[Report], start: Report | None, ledger: "LedgerView | None") -> list[Way]:
    """Return all ways of the fewest gaps, without and with equal steps left out, the likeliest first."""
    if len(members) > EVENTS_MAX:
        raise TooMany
    ways = [
        Way(order, left_out, _gaps(order, start))
        for left_out in _leavings(members)
        for order in permutations([each for each in members if each not in left_out])
    ]
    if ledger is not None:
        ways = ledger.supported(ways)
    fewest = min(way.gaps for way in ways)
    return sorted((way for way in ways if way.gaps == fewest), key=_likelihood, reverse=True)


def _leavings(members: Sequence[Report]) -> Iterator[tuple[Report, ...]]:
    """Yield which of equal steps may be left out: of each kind all but one at most, those with the least ids."""
    kinds: dict[Any, list[Report]] = defaultdict(list)
    for report in members:
        kinds[_step(report)].append(report)
    for counts in product(*(range(len(kind)) for kind in kinds.values())):
        chosen = zip(kinds.values(), counts, strict=True)
        yield tuple(report for kind, count in chosen for report in sorted(kind, key=lambda each: each.event_id)[:count])


def _gaps(order: Sequence[Report], start: Report | None) -> int:
    pairs = pairwise(order if start is None else (start, *order))
    return sum(not _follows(report, earlier) for earlier, report in pairs)


def _follows(report: Report, earlier: Report) -> bool:
    """Whether *report* may come right after *earlier*: what was before it is what was after the other."""
    if report.before is None:
        return False
    if report.before is report.after and report.rank > earlier.rank and not report.is_observation:
        # It moved the rank, so that something was another before, which it does not list.
        return all(report.before[name] == earlier.after[name] for name in () if name in earlier.after)
    shared = report.before.keys() & earlier.after.keys()
    return all(report.before[name] == earlier.after[name] for name in shared)


def _step(report: Report) -> str:
    return repr((_sorted(report.before), _sorted(report.after)))


def _state(report: Report) -> str:
    return repr(_sorted(report.after))


def _sorted(value: Any) -> Any:  # noqa: ANN401 - a JSON value
    """Return *value* with its keys in one order, so that equal ones are written alike."""
    if isinstance(value, dict):
        return [(name, _sorted(value[name])) for name in sorted(value)]
    return [_sorted(each) for each in value] if isinstance(value, list) else value


def _likelihood(way: Way) -> tuple[Any, ...]:
    """Return what decides between ways of equally many gaps; of several steps that lose one the greatest id does."""
    left = sorted((report.event_id for report in way.left_out), reverse=True)
    return (-len(way.left_out), _preference(way.last), left, [report.event_id for report in reversed(way.reports)])


def _preference(last: Report) -> tuple[Any, ...]:
    amount = last.after.get("amount_refunded")
    is_closed = last.thing[2] == "dispute" and last.type == "charge.dispute.closed"
    return (-1 if amount is None else amount, is_closed, not last.is_observation, last.event_id)


def _best_by_end(ways: Iterable[Way]) -> list[Way]:
    found: dict[str, Way] = {}
    for way in sorted(ways, key=_likelihood, reverse=True):
        found.setdefault(_state(way.last), way)
    return list(found.values())


def _chosen(groups: Sequence[Group]) -> Course:
    """Go back from the last second: its likeliest end decides where each second before it must have ended."""
    chosen: dict[int, Way] = {}
    for group in reversed(groups):
        if group.number in chosen:
            continue
        _choose(group, group.ends[0], chosen)
    reports = [report for group in groups for report in chosen[group.number].reports]
    return Course(reports, groups[-1].is_in_doubt)


def _choose(group: Group, end: Way, chosen: dict[int, Way]) -> None:
    state = _state(end.last)
    options = [
        (way, start)
        for start, ways in group.ways
        for way in ways
        if _state(way.last) == state
    ]
    best, start = max(options, key=lambda option: (_likelihood(option[0]), option[1] and _likelihood(option[1])))
    chosen[group.number] = best
    if group.previous is not None and start is not None and group.previous.number not in chosen:
        _choose(group.previous, start, chosen)


# ---- The left fold (rules 5 and 6) ----

REFERENCES: Final = {
    "orders": ("customer", "payment_link", "payment_intent", "subscription", "invoice", "recovered_from"),
    "invoices": ("customer", "subscription"),
    "credit_notes": ("customer", "invoice", "customer_balance_transaction"),
    "invoice_payments": ("invoice", "payment_intent", "charge"),
    "charges": ("payment_intent", "invoice"),
    "refunds": ("charge", "payment_intent"),
    "disputes": ("charge", "payment_intent"),
    "balance_transactions": ("customer", "invoice", "credit_note", "order_id"),
    "portal_sessions": ("configuration", "customer"),
}


def folded(subject: Subject, course: Sequence[Report]) -> Row:
    """Return the row of the events of *course*, which are in their order."""
    row: Row = {}
    for report in course:
        kept = REFERENCES.get(subject.table, ())
        row |= {name: value for name, value in report.after.items() if value is not None or name not in kept or name not in row}
        for name, at in report.moments.items():
            row[name] = min(row.get(name) or at, at)
    last = course[-1]
    row |= {"event_id": last.event_id, "as_of": last.created}
    if last.type.endswith(readings.CLOCK):
        row["expired_at"] = last.created
    if subject.table == "orders":
        row["status"] = _order_status(row, last)
        row["lines_complete"] = lines_are_complete(course)
    if subject.table == "credit_notes":
        row["lines_complete"] = any(report.is_whole for report in course)
    return row


def _order_status(row: Row, last: Report) -> str | None:
    session, payment = row.get("session_status"), row.get("payment_status")
    if session == "complete":
        if row.get("mode") == "setup" and payment in (None, "unpaid", *readings.NO_MONEY_OWED):
            return "complete"
        if payment in readings.NO_MONEY_OWED:
            return "paid"
        if last.type == readings.FAILED:
            return "failed"
        return "processing" if payment == "unpaid" else None
    if last.type.endswith(readings.CLOCK):
        return "expired"
    return session if session in ("open", "expired") else None


def lines_are_complete(course: Sequence[Report]) -> bool:
    """Whether the lines that were listed last are those of the totals that came since (rule 11)."""
    listing: Row | None = None
    for report in course:
        if report.is_whole:
            listing = report.after
        elif listing is not None and any(
            name in report.after and name in listing and report.after[name] != listing[name]
            for name in ("amount_subtotal", "amount_total", "currency")
        ):
            listing = None
    return listing is not None


def _shown(subject: Subject, row: Row) -> Row:
    """Return *row* with every column of its table, and no other."""
    names = [column.name for column in tables.metadata.tables[subject.table].columns]
    found = {name: row.get(name) for name in names}
    found |= {"account": subject.account, "livemode": subject.livemode}
    found |= {"customer": subject.id, "currency": subject.currency} if subject.table == "balances" else {"id": subject.id}
    return found


# ---- Lines ----


def _parts(subject: Subject, course: Sequence[Report]) -> dict[Subject, Row]:
    child, parent = {"orders": ("order_lines", "order_id"), "credit_notes": ("credit_note_lines", "credit_note")}.get(
        subject.table, (None, None)
    )
    if child is None or parent is None:
        return {}
    listing = [report for report in course if report.is_whole]
    if not listing and child == "credit_note_lines":
        listing = [report for report in course if report.lines is not None]
    if not listing:
        return {}
    last = listing[-1]
    found = {}
    for line in last.lines or ():
        of = Subject(child, subject.account, subject.livemode, line["id"])
        row = {**line, parent: subject.id, "event_id": last.event_id, "as_of": last.created}
        found[of] = _shown(of, row)
    return found


# ---- What an old credit note does not carry (rule 6) ----


def _to_balance(subject: Subject, objects: Objects) -> int | None:
    """Return what went to the balance by the ledger: the negative of the note's transaction."""
    for thing, reports in objects.items():
        if thing[:2] == (subject.account, subject.livemode) and thing[2] == "customer_balance_transaction":
            row = folded(Subject("balance_transactions", *thing[:2], thing[3]), course_of(reports).reports)
            if row.get("credit_note") == subject.id and row.get("amount") is not None:
                return -int(row["amount"])
    return None


def _split(row: Row, course: Sequence[Report], by_ledger: int | None) -> None:
    """Fill in *row* how the amount of a note is split, where no event carried it; what is not known stays null."""
    amount, type_ = row.get("amount"), row.get("type")
    if "pre_payment_amount" not in row and type_ in ("pre_payment", "post_payment") and amount is not None:
        row["pre_payment_amount"] = amount if type_ == "pre_payment" else 0
    if "post_payment_amount" not in row and type_ in ("pre_payment", "post_payment") and amount is not None:
        row["post_payment_amount"] = amount if type_ == "post_payment" else 0
    post = row.get("post_payment_amount")
    rest = None if post is None else post - (row.get("out_of_band_amount") or 0)
    refunded, to_balance = _of_rest(row, rest, by_ledger)
    row |= {"refunded_amount": refunded, "to_balance_amount": to_balance}


def _of_rest(row: Row, rest: int | None, by_ledger: int | None) -> tuple[int | None, int | None]:
    """Return what of the *rest* was refunded, and what went to the balance."""
    transaction = row.get("customer_balance_transaction")
    if row.get("refunded_amount") is not None:
        left = None if rest is None else rest - row["refunded_amount"]
        is_sound = left is not None and (left > 0 if transaction else left == 0)
        return row["refunded_amount"], left if is_sound else None
    if "refund" not in row:
        return None, by_ledger
    is_known = "customer_balance_transaction" in row and "out_of_band_amount" in row
    if by_ledger is not None and rest is not None:
        return rest - by_ledger, by_ledger
    if row["refund"] is None:
        if not is_known or rest is None:
            return 0, None
        return 0, rest if transaction or rest == 0 else None
    return (rest, 0) if is_known and not transaction else (None, None)


# ---- Balances (rule 9) ----


class LedgerView:
    """TODO"""

    def supported(self, ways: list[Way]) -> list[Way]:
        return ways


def _ledger_of(thing: Thing, objects: Objects) -> LedgerView | None:
    return None


def _balance(subject: Subject, objects: Objects) -> Known | None:
    customer = _thing(subject, "customer")
    course = course_of(objects[customer]) if customer in objects else Course([], False)
    own = [report for report in course.reports if _has_balance(report) and report.after["currency"] == subject.currency]
    listed = _listed(subject, objects)
    default = next((r.after["currency"] for r in reversed(course.reports) if "currency" in r.after), None)
    changes = _balance_changes(subject, course.reports)
    if own and (default == subject.currency or not listed.reports or listed.reports[-1].created <= own[-1].created):
        row = {"amount": own[-1].after["balance"], "event_id": own[-1].event_id, "as_of": own[-1].created}
        return Known(_shown(subject, row), changes, course.is_ambiguous)
    if not listed.reports:
        return None
    last = listed.reports[-1]
    row = {"amount": last.after["ending_balance"], "event_id": last.event_id, "as_of": last.created}
    return Known(_shown(subject, row), changes, listed.is_ambiguous)


def _balance_changes(subject: Subject, course: Sequence[Report]) -> dict[Subject, Row]:
    found = {}
    for report in course:
        if not _has_balance(report) or report.after["currency"] != subject.currency or report.before is None:
            continue
        before, was = report.before.get("balance"), report.before.get("currency")
        if report.after["balance"] is None or before is None or before == report.after["balance"] or was not in (None, subject.currency):
            continue
        of = Subject("balance_changes", subject.account, subject.livemode, report.event_id)
        row = {
            "customer": subject.id,
            "currency": subject.currency,
            "amount": report.after["balance"] - before,
            "ending_balance": report.after["balance"],
            "event_id": report.event_id,
            "as_of": report.created,
        }
        found[of] = _shown(of, row)
    return found


def _listed(subject: Subject, objects: Objects) -> Course:
    """Return the ledger of one currency as a chain of balances: each transaction once, as it was read last."""
    entries = []
    for thing, reports in objects.items():
        if thing[:2] != (subject.account, subject.livemode) or thing[2] != "customer_balance_transaction":
            continue
        last = course_of(reports).reports[-1]
        if (last.after.get("customer"), last.after.get("currency")) == (subject.id, subject.currency):
            entries.append(_entry(last))
    if not entries:
        return Course([], False)
    return course_of(entries)


def _entry(last: Report) -> Report:
    """Return a transaction as a step of its balance, in the second in which it was made."""
    ending, amount = last.after["ending_balance"], last.after["amount"]
    step = {"after": {"ending_balance": ending}, "before": {"ending_balance": ending - amount}}
    return Report(**{**vars(last), **step, "stamp": last.after["created"], "rank": 0})


# ---- What charges say of an order (rule 10) ----


def settled(found: Mapping[Subject, Row]) -> dict[Subject, Row]:
    """Return the orders that are complete and not said to be paid, with what the charges of their intent lay on."""
    return {
        subject: _settled(row, found)
        for subject, row in found.items()
        if subject.table == "orders"
        and row["session_status"] == "complete"
        and row["payment_status"] in (None, "unpaid")
        and row["mode"] != "setup"
        and row["payment_intent"] is not None
    }


def _settled(order: Row, found: Mapping[Subject, Row]) -> Row:
    def of(table: str) -> list[Row]:
        return [row for subject, row in found.items() if subject.table == table and _are_of_one_world(row, order)]

    charges = [row for row in of("charges") if row["payment_intent"] == order["payment_intent"]]
    ids = {row["id"] for row in charges}
    refunds = [
        row
        for row in of("refunds")
        if row["reason"] == "expired_uncaptured_charge"
        and (row["payment_intent"] == order["payment_intent"] or row["charge"] in ids)
    ]
    canceled = [row["canceled_at"] for row in of("payment_intents") if row["id"] == order["payment_intent"]]
    paying = [row for row in charges if row["status"] == "succeeded" and row["captured"]]
    if paying:
        return order | {"status": "paid", "paid_at": order["paid_at"] or min(row["captured_at"] for row in paying)}
    ends = [_released_at(row, refunds, canceled) for row in charges if row["status"] != "failed"]
    if not ends:
        ends = [min([*canceled, *(row["created"] for row in refunds)], default=None)]
    if None in ends:
        return order
    return order | {"status": "failed", "failed_at": order["failed_at"] or max(at for at in ends if at is not None)}


def _released_at(charge: Row, refunds: Sequence[Row], canceled: Sequence[Any]) -> Any:  # noqa: ANN401 - a time
    """Return when a hold was released, None where it is still held, or pending."""
    if charge["status"] == "pending":
        return None
    naming = [row["created"] for row in refunds if row["charge"] in (None, charge["id"])]
    moments = [at for at in (charge["released_at"], *naming, *canceled) if at is not None]
    return min(moments, default=None)


def _are_of_one_world(one: Row, other: Row) -> bool:
    return (one["account"], one["livemode"]) == (other["account"], other["livemode"])
