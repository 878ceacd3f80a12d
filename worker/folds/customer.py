"""Folds customer events into customers and their balances in the default currency.

Source: https://docs.stripe.com/api/customers/object. Events such as ``customer.subscription.*`` are not folded here:
events are routed by their exact type and the object that they carry.
"""

from collections.abc import Sequence
from typing import Final

from msgspec import UNSET, Struct, UnsetType

from schemas.own_events import observed
from worker.folds import balance
from worker.folds.chain import Path
from worker.folds.facts import Event, Facts
from worker.folds.join import RowSpec
from worker.folds.reading import (
    Metadata,
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

DELETED: Final = "customer.deleted"
TYPES: Final = ("customer.created", "customer.updated", DELETED, observed("customer"))


class Customer(Struct):
    """The fields of a customer that are kept."""

    id: Name
    account_balance: Whole | UnsetType | None = UNSET
    balance: Whole | UnsetType | None = UNSET
    created: Seconds | UnsetType | None = UNSET
    currency: str | UnsetType | None = UNSET
    deleted: bool = False
    delinquent: bool | UnsetType | None = UNSET
    email: str | UnsetType | None = UNSET
    metadata: Metadata | UnsetType | None = UNSET
    name: str | UnsetType | None = UNSET
    test_clock: Reference | UnsetType = UNSET


_reader = Reader(Customer)


def fold(event: Event) -> tuple[Facts, ...]:
    """Return the facts of *event*, of one of ``TYPES``, about its customer.

    Raises:
        Unfoldable: when the customer in it cannot be read.
    """
    customer, before = _reader.read(event.payload)
    is_deleted = customer.deleted or event.type == DELETED
    after = _reported(customer)
    after.columns["deleted"] = is_deleted
    reported = None if before is None else _reported(before)
    facts = make_facts(event, "customers", customer.id, after=after, before=reported, rank=int(is_deleted))
    return (facts, *_balance(event, customer, before))


def _balance(event: Event, customer: Customer, before: Customer | None) -> tuple[Facts, ...]:
    """Return the facts of *event* about the customer's balance, which is in the default currency only."""
    amount = _amount(customer)
    if not isinstance(customer.currency, str) or amount is None:
        return ()
    known = None
    # If the default currency was another one before, the earlier balance belongs to another row.
    if before is not None and before.currency in (None, customer.currency):
        known = _amount(before)
    return (balance.by_customer(event, customer.id, customer.currency, amount=amount, before=known),)


def _amount(customer: Customer) -> int | None:
    amount = _balance_of(customer)
    return amount if isinstance(amount, int) else None


def _balance_of(customer: Customer) -> int | UnsetType | None:
    """Return the balance, which API versions before 2019-10-17 name ``account_balance``."""
    return customer.account_balance if customer.balance is UNSET else customer.balance


def _reported(customer: Customer) -> Reported:
    return Reported(
        carried(
            email=customer.email,
            name=customer.name,
            currency=customer.currency,
            delinquent=customer.delinquent,
            deleted=customer.deleted,
            metadata=customer.metadata,
            created=moment(customer.created),
            # The customer's row has no such column. It is part of the state that orders the customer's events.
            _balance=_balance_of(customer),
        ),
        references(test_clock=customer.test_clock),
    )


def _order(facts: Sequence[Facts]) -> Path:
    return balance.order_of_customer(facts, ROW_SPEC.names)


ROW_SPEC: Final[RowSpec] = RowSpec(
    table="customers",
    subject="customer",
    empty={
        **dict.fromkeys(("email", "name", "currency", "delinquent", "test_clock", "metadata", "created")),
        "deleted": False,
    },
    rank_of=lambda row: int(row["deleted"] is True),
    order=_order,
)
