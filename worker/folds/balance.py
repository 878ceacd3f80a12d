"""What is known of customers' credit balances: negative is credit, and each currency has one of its own.

Source: https://docs.stripe.com/api/customer_balance_transactions/object and
https://docs.stripe.com/billing/customer/balance.

Note [Two witnesses of a balance]
    Stripe sends no event for a balance transaction. ``customer.updated`` tells the balance in the customer's
    default currency, and what it was before; the ledger, which has to be asked for, tells every transaction in
    every currency. So the customer's events decide in the currency that they tell, the ledger in the others,
    and the ledger's chain shows whether a transaction is missing.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Final

from msgspec import UNSET, Struct, UnsetType

from worker.folds.facts import Anomaly, Change, Event, Facts, Row, Subject, Value, utc
from worker.folds.join import BROKEN_CHAIN, Shape
from worker.folds.reading import Name, Reader, Reference, Seconds, Told, Whole, carried, moment, references, say

TRANSACTION_TYPES: Final = ("payfold.customer_balance_transaction.observed",)
_BY_LEDGER, _BY_CUSTOMER = range(2)
# Before anything that a credit note itself says, so that it decides nothing.
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
    """Return what *event*, of one of ``TRANSACTION_TYPES``, says of its transaction and of the balance after it.

    Raises:
        Unfoldable: when the transaction in it cannot be read.
    """
    transaction, _ = _reader.read(event.payload)
    told = references(
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
    row = say(event, "balance_transactions", transaction.id, after=Told(columns, told), before=None)
    customer, note = told["customer"], told.get("credit_note")
    found = [row]
    if customer is not None:
        found.append(_by_ledger(event, transaction, customer))
    if note is not None:
        found.append(_of_note(event, transaction, note))
    return tuple(found)


def _of_note(event: Event, transaction: Transaction, note: str) -> Facts:
    """Return what a transaction knows of the credit note that made it: how much of the note went to the balance."""
    return Facts(
        subject=Subject("credit_notes", event.account, event.livemode, note),
        event_id=event.id,
        source=event.source,
        created=event.created,
        rank=_WITNESS,
        stamp=(event.created,),
        columns={"_to_balance": -transaction.amount},
        is_witness=True,
    )


def _by_ledger(event: Event, transaction: Transaction, customer: str) -> Facts:
    after, before = transaction.ending_balance, transaction.ending_balance - transaction.amount
    return say(
        event,
        "balances",
        customer,
        currency=transaction.currency,
        after=Told({"amount": after, "_listed": after, "_listed_at": event.created}),
        before=Told({"amount": before}),
        rank=_BY_LEDGER,
        stamp=(utc(transaction.created),),
    )


def by_customer(
    event: Event, customer: str, currency: str, *, amount: int, before: int | None, is_first: bool
) -> Facts:
    """Return what a customer's *event* says of the balance in its default *currency*.

    It *is_first* where it gave the customer its currency: before that there was no balance in it.
    """
    return say(
        event,
        "balances",
        customer,
        currency=currency,
        after=Told({"amount": amount}),
        before=None if before is None else Told({"amount": before}),
        rank=_BY_CUSTOMER,
        is_first=is_first,
    )


def _change_of(step: Facts) -> Row | None:
    """Return the balance change that a customer's event tells; the ledger's are transactions of their own."""
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


def _review(steps: Sequence[Facts]) -> list[Anomaly]:
    """Return the breaks in the ledger's chain, with the exact difference."""
    listed = [(_amount(step.before or {}), _amount(step.columns)) for step in steps if step.rank == _BY_LEDGER]
    return [
        Anomaly(BROKEN_CHAIN, {"expected": known, "found": before, "difference": before - known})
        for (_, known), (before, _) in pairwise(listed)
        if known != before
    ]


def _amount(state: Mapping[str, Value]) -> int:
    amount = state["amount"]
    assert isinstance(amount, int)  # noqa: S101 - a transaction without its amounts is not read
    return amount


def _anomalies(row: Row) -> list[Anomaly]:
    """The two witnesses differ, although the ledger was read after the customer's last word."""
    listed, listed_at, amount = row.get("_listed"), row.get("_listed_at"), row["amount"]
    if listed is None or listed == amount or not listed_at > row["as_of"]:  # type: ignore[operator]  # both are times
        return []
    return [Anomaly("balance_differs", {"customer_says": amount, "ledger_says": listed})]


def _changes(before: Row | None, after: Row) -> list[Change]:
    # A customer begins with nothing, which is nothing to tell.
    known = 0 if before is None else before["amount"]
    if known == after["amount"]:
        return []
    told = {"currency": after["currency"]}
    return [Change("balance.changed", {**told, "amount": known}, {**told, "amount": after["amount"]})]


TRANSACTION_SHAPE: Final = Shape(
    table="balance_transactions",
    subject="balance_transaction",
    empty=dict.fromkeys(
        (
            *("customer", "currency", "type", "amount", "ending_balance"),
            *("invoice", "credit_note", "order_id", "description", "created"),
        )
    ),
)

SHAPE: Final = Shape(
    table="balances",
    subject="balance",
    key=("customer", "currency"),
    empty={"amount": None},
    # Never below the true rank: a transaction is always folded anew, since it may come from the past of the ledger.
    rank_of=lambda _: _BY_CUSTOMER,
    anomalies=_anomalies,
    changes=_changes,
    child="balance_changes",
    child_key=("customer", "currency"),
    child_of=_change_of,
    review=_review,
)
