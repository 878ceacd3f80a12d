"""Folds customers' credit balances. A negative amount is credit, and a customer has one balance in each currency.

Source: https://docs.stripe.com/api/customer_balance_transactions/object and
https://docs.stripe.com/billing/customer/balance.

Note [Two witnesses of a balance]
    Stripe sends no event for a balance transaction. ``customer.updated`` carries the balance in the customer's
    default currency, and the balance before the event. The ledger has to be requested; it lists every transaction in
    every currency. So the customer's events decide the balance in the default currency. In the other currencies the
    newer of the two sources decides.

    Neither source affects the order of the other, with one exception. A step that the ledger lists twice was taken
    twice, and is no twin. A ledger that was read after a second also shows how often each step of that second was
    taken, and with which balance that second ended. So a transaction is a witness of the customer as well, because the
    customer's row has the same order. The ledger's own chain shows whether a transaction is missing.

Note [A currency moves no balance]
    When a customer's default currency changes, the customer's events report another balance from then on. That balance
    moved earlier, at times that no event reports. So its changes begin with the amount that the first of these events
    shows. Where the ledger was read they begin with 0, because the ledger lists all of them. Only all the events
    together show where a balance begins, and how much of it was announced depends on the order of their arrival. So
    the first change that is announced of a balance begins with its opening, and each later one with its row.
"""

from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import groupby, pairwise
from typing import Final

from msgspec import UNSET, Struct, UnsetType, structs

from schemas.own_events import observed
from worker.folds import chain
from worker.folds.chain import Path, Rules, Stamp, Testimony
from worker.folds.facts import Anomaly, Change, Event, Facts, Row, Subject, Value, utc
from worker.folds.join import BROKEN_CHAIN, RowSpec
from worker.folds.reading import (
    Name,
    Reader,
    Reference,
    Reported,
    Seconds,
    Whole,
    carried,
    make_facts,
    moment,
    references,
)

TRANSACTION_TYPES: Final = (observed("customer_balance_transaction"),)
_BY_LEDGER, _BY_CUSTOMER = range(2)
LISTED: Final = "_listed "
"""A transaction reports its amount to the credit note that made it, under this name followed by its id."""
# Lower than every rank of a customer's or a credit note's own events, so that a witness decides nothing.
_WITNESS: Final = -1


class Transaction(Struct):
    """The fields of a customer balance transaction that are kept."""

    id: Name
    amount: Whole
    created: Seconds
    currency: Name
    customer: Reference
    ending_balance: Whole
    checkout_session: Reference | UnsetType = UNSET
    credit_note: Reference | UnsetType = UNSET
    description: str | UnsetType | None = UNSET
    invoice: Reference | UnsetType = UNSET
    type: str | UnsetType | None = UNSET


_reader = Reader(Transaction)


def fold_transaction(event: Event) -> tuple[Facts, ...]:
    """Return the facts of *event*, of one of ``TRANSACTION_TYPES``: its transaction, and the balance after it.

    Raises:
        Unfoldable: when the transaction in it cannot be read.
    """
    transaction, _ = _reader.read(event.payload)
    reported = references(
        customer=transaction.customer,
        invoice=transaction.invoice,
        credit_note=transaction.credit_note,
        order_id=transaction.checkout_session,
    )
    columns = carried(
        currency=transaction.currency,
        type=transaction.type,
        amount=transaction.amount,
        ending_balance=transaction.ending_balance,
        description=transaction.description,
        created=moment(transaction.created),
    )
    row = make_facts(event, "balance_transactions", transaction.id, after=Reported(columns, reported), before=None)
    customer, note = reported["customer"], reported.get("credit_note")
    found = [row]
    if customer is not None:
        found += _by_ledger(event, transaction, customer)
    if note is not None:
        found.append(_of_note(event, transaction, note))
    return tuple(found)


def _of_note(event: Event, transaction: Transaction, note: str) -> Facts:
    """Return how much of the credit note that made the *transaction* went to the balance."""
    return Facts(
        subject=Subject("credit_notes", event.account, event.livemode, note),
        event_id=event.id,
        source=event.source,
        created=event.created,
        rank=_WITNESS,
        stamp=(event.created,),
        columns={f"{LISTED}{transaction.id}": {"amount": -transaction.amount, "currency": transaction.currency}},
        is_witness=True,
    )


def _by_ledger(event: Event, transaction: Transaction, customer: str) -> Iterator[Facts]:
    """Yield the *transaction*'s facts about the balance, and the same as a witness of the *customer*."""
    after, before = transaction.ending_balance, transaction.ending_balance - transaction.amount
    listed = make_facts(
        event,
        "balances",
        customer,
        currency=transaction.currency,
        after=Reported({"amount": after, "_transaction": transaction.id}),
        before=Reported({"amount": before}),
        rank=_BY_LEDGER,
        stamp=(utc(transaction.created),),
    )
    yield listed
    columns = {**listed.columns, "_currency": transaction.currency}
    subject = structs.replace(listed.subject, table="customers", currency="")
    yield structs.replace(listed, subject=subject, columns=columns, rank=_WITNESS, is_witness=True)


def by_customer(event: Event, customer: str, currency: str, *, amount: int, before: int | None) -> Facts:
    """Return the facts of a customer's *event* about the balance in its default *currency*, now and *before*."""
    return make_facts(
        event,
        "balances",
        customer,
        currency=currency,
        after=Reported({"amount": amount}),
        before=None if before is None else Reported({"amount": before}),
        rank=_BY_CUSTOMER,
    )


def _change_of(step: Facts) -> Row | None:
    """Return the balance change that a customer's event reports. A step of the ledger is a transaction instead."""
    if step.rank != _BY_CUSTOMER or step.before is None:
        return None
    before, after = step.before["amount"], step.columns["amount"]
    if not isinstance(before, int) or not isinstance(after, int) or before == after:
        return None
    return {
        "account": step.subject.account,
        "livemode": step.subject.livemode,
        "id": step.event_id,
        "customer": step.subject.id,
        "currency": step.subject.currency,
        "amount": after - before,
        "ending_balance": after,
        "event_id": step.event_id,
        "as_of": step.created,
    }


# ---- The order of a balance ----


@dataclass(frozen=True, slots=True)
class _Ledger:
    """A ledger in one currency: *path* holds its transactions in order, *read_at* is the time of the last reading.

    Several readings of one transaction count as one step: the last reading counts, the others are twins in the path. A
    reading that finds a transaction unchanged is not recorded again. So the latest reading of any one transaction is
    taken as the time at which all were read.
    """

    path: Path
    read_at: datetime

    @property
    def listed(self) -> list[Facts]:
        """The transactions in their order, each once."""
        return [step for step in self.path.steps if step.event_id not in self.path.twins]


def _order(facts: Sequence[Facts]) -> Path:
    """Return the *facts* of a balance in their order. The customer's events follow the chain of the customer."""
    own = [each for each in facts if each.subject.table == "balances"]
    ledger = _ledger([each for each in own if each.rank == _BY_LEDGER])
    rules = Rules(
        ("amount",),
        rows={each.event_id: each for each in own if each.rank == _BY_CUSTOMER},
        testimony={} if ledger is None else _testimony(ledger),
        counts=True,
    )
    customer = chain.order([each for each in facts if _is_of_customer(each)], rules)
    reported = chain.of_rows(customer, rules)
    currency = own[0].subject.currency
    path = _with_ledger(customer, reported, ledger, currency)
    if not any(_names_another(step, currency) for step in customer.steps):
        return path
    opening = 0 if ledger is not None else _opening(customer.steps, reported.steps[0], currency)
    return structs.replace(path, opening={"amount": opening})


def _is_of_customer(facts: Facts) -> bool:
    return facts.subject.table == "customers" and not facts.is_witness


def order_of_customer(facts: Sequence[Facts], names: Collection[str]) -> Path:
    """Return the *facts* of a customer in the order of its balances; *names* are the columns of its row."""
    events = [each for each in facts if not each.is_witness]
    listed: dict[Value, list[Facts]] = defaultdict(list)
    for each in facts:
        if each.is_witness:
            listed[each.columns["_currency"]].append(each)
    testimony: dict[Stamp, Testimony] = {}
    rows = {each.event_id: _with_amount(each) for each in events} if listed else {}
    for currency, transactions in listed.items():
        ledger = _ledger(transactions)
        assert ledger is not None, "there are transactions"  # noqa: S101 - for the types alone
        others = {each.stamp for each in events if _names_another(each, currency)}
        testimony |= {stamp: each for stamp, each in _testimony(ledger).items() if stamp not in others}
    return chain.order(events, Rules(names, rows=rows, testimony=testimony))


def _with_amount(step: Facts) -> Facts:
    """Return the customer's event *step* with its balance under the name that the ledger uses."""
    states = [
        None if state is None else {**state, "amount": state.get("_balance")} for state in (step.columns, step.before)
    ]
    return structs.replace(step, columns=states[0], before=states[1])


def _with_ledger(customer: Path, reported: Path, ledger: _Ledger | None, currency: str) -> Path:
    """Return the steps of the balance in *currency*, those *reported* by the customer and the *ledger*'s, in order."""
    if ledger is None:
        return reported
    is_default = _default_currency(customer.steps) == currency
    twins, broken = reported.twins | ledger.path.twins, _broken(ledger.listed)
    if not reported.steps or (not is_default and ledger.read_at > reported.steps[-1].created):
        return Path([*reported.steps, *ledger.path.steps], twins, ledger.path.is_ambiguous, broken)
    differs = _differs(ledger, reported.steps) if is_default else ()
    return Path([*ledger.path.steps, *reported.steps], twins, reported.is_ambiguous, (*broken, *differs))


def _names_another(step: Facts, currency: Value) -> bool:
    """Return whether *step* names a default currency other than *currency*, after the event or before it."""
    before, after = step.before or {}, step.columns
    return after.get("currency") not in (None, currency) or before.get("currency") not in (None, currency)


def _opening(customer: Sequence[Facts], first: Facts, currency: str) -> Value:
    """Return the balance before its first change. *first* is the first of the *customer*'s events that reports it.

    See Note [A currency moves no balance].
    """
    until = next(number for number, step in enumerate(customer) if step.event_id == first.event_id)
    if not any(_names_another(step, currency) for step in customer[: until + 1]):
        return 0
    before, after = _before_and_after(first)
    return after if before is None else before


def _default_currency(steps: Sequence[Facts]) -> Value:
    return next((step.columns["currency"] for step in reversed(steps) if "currency" in step.columns), None)


def _ledger(facts: Sequence[Facts]) -> _Ledger | None:
    if not facts:
        return None
    readings: dict[Value, list[Facts]] = {}
    for each in sorted(facts, key=lambda each: (each.created, each.event_id)):
        readings.setdefault(each.columns["_transaction"], []).append(each)
    rules = Rules(("amount",), start={"amount": 0}, may_repeat=False)
    listed = chain.order([several[-1] for several in readings.values()], rules)
    steps = [each for step in listed.steps for each in readings[step.columns["_transaction"]]]
    earlier = {each.event_id for several in readings.values() for each in several[:-1]}
    return _Ledger(Path(steps, earlier, listed.is_ambiguous), max(step.created for step in steps))


def _testimony(ledger: _Ledger) -> dict[Stamp, Testimony]:
    """Return what the ledger lists of each second, and the last balance of seconds before the ledger was read."""
    found: dict[Stamp, Testimony] = {}
    for stamp, group in groupby(ledger.listed, key=lambda step: step.stamp):
        steps = list(group)
        end = steps[-1].columns["amount"] if stamp[0] < ledger.read_at else None
        found[stamp] = Testimony("amount", Counter(map(_before_and_after, steps)), end)
    return found


def _before_and_after(step: Facts) -> tuple[Value, Value]:
    return (None if step.before is None else step.before["amount"], step.columns["amount"])


def _broken(listed: Sequence[Facts]) -> tuple[Anomaly, ...]:
    """Return the breaks in the ledger's chain, with the exact difference."""
    pairs = [(_amount(step.before or {}), _amount(step.columns)) for step in listed]
    return tuple(
        Anomaly(BROKEN_CHAIN, {"expected": known, "found": before, "difference": before - known})
        for (_, known), (before, _) in pairwise(pairs)
        if known != before
    )


def _amount(state: Mapping[str, Value]) -> int:
    return _whole(state["amount"])


def _differs(ledger: _Ledger, reported: Sequence[Facts]) -> tuple[Anomaly, ...]:
    """Return an anomaly where the two witnesses differ and the ledger is not older than the customer's last event.

    A ledger that was read in the second of that event may show any balance that the customer had in that second.
    """
    last = reported[-1]
    listed, amount = ledger.listed[-1].columns["amount"], last.columns["amount"]
    seen = {amount}
    if ledger.read_at == last.created:
        seen |= {each for step in reported if step.stamp == last.stamp for each in _before_and_after(step)}
    if ledger.read_at < last.created or listed in seen:
        return ()
    return (Anomaly("balance_differs", {"customer_says": amount, "ledger_says": listed}),)


def _changes(before: Row | None, after: Row) -> list[Change]:
    # A customer begins with a balance of 0, so 0 in a first row is no change.
    known = 0 if before is None else before["amount"]
    if known == after["amount"]:
        return []
    reported = {"currency": after["currency"]}
    return [Change("balance.changed", {**reported, "amount": known}, {**reported, "amount": after["amount"]})]


def _steps(before: Row | None, after: Row, children: Sequence[Row]) -> list[Change]:
    """Return a change for each of *children*, if they lead from the balance *before* to the one *after*."""
    amount = 0 if before is None else before["amount"]
    found = []
    for child in children:
        was = _whole(child["ending_balance"]) - _whole(child["amount"])
        if was != amount:
            return []
        found += _changes({**after, "amount": was}, {**after, "amount": child["ending_balance"]})
        amount = child["ending_balance"]
    return found if amount == after["amount"] else []


def _whole(value: Value) -> int:
    assert isinstance(value, int)  # noqa: S101 - neither a transaction nor a change is read without its amounts
    return value


TRANSACTION_SPEC: Final = RowSpec(
    table="balance_transactions",
    subject="balance_transaction",
    empty=dict.fromkeys(
        (
            *("customer", "currency", "type", "amount", "ending_balance"),
            *("invoice", "credit_note", "order_id", "description", "created"),
        )
    ),
)

ROW_SPEC: Final = RowSpec(
    table="balances",
    subject="balance",
    key=("customer", "currency"),
    empty={"amount": None},
    # The deciding event and the anomalies show only in all the events of the customer and its ledger.
    keeps_all=False,
    leader="customers",
    order=_order,
    changes=_changes,
    steps=_steps,
    child="balance_changes",
    child_key=("customer", "currency"),
    child_of=_change_of,
)
