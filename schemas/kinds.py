"""The kinds of change in the feed, and the subject of each: the one list of both. And the states of an order.

A fold can make no other: types and a test hold ``worker.folds.facts.Change`` and ``Shape.subject`` to this list.
"""

from collections.abc import Collection
from typing import Final, Literal, TypeAlias, get_args

ORDER_STATUSES: Final = ("open", "processing", "paid", "failed", "expired", "complete")
"""The kinds of state that an order may be in."""

Kind: TypeAlias = Literal[
    "balance.changed",
    "credit_note.issued",
    "credit_note.voided",
    "dispute.closed",
    "dispute.opened",
    "invoice.changed",
    "order.completed",
    "order.corrected",
    "order.expired",
    "order.failed",
    "order.opened",
    "order.paid",
    "order.processing",
    "order.refund_changed",
    "payment_link.activated",
    "payment_link.deactivated",
]
AllOf: TypeAlias = Literal["balance.*", "credit_note.*", "dispute.*", "invoice.*", "order.*", "payment_link.*"]
"""Stands for every kind with this beginning."""
Choice: TypeAlias = Literal[Kind, AllOf]
"""The kinds, and groups of kinds, that a reader may ask for."""
Subject: TypeAlias = Literal["balance", "credit_note", "dispute", "invoice", "order", "payment_link"]

KINDS: Final[tuple[Kind, ...]] = get_args(Kind)
SUBJECTS: Final[tuple[Subject, ...]] = get_args(Subject)
CHOICES: Final[tuple[Choice, ...]] = get_args(Choice)


def chosen(choices: Collection[Choice]) -> frozenset[Kind]:
    """Return the kinds that *choices* stand for."""
    prefixes = tuple(each[:-1] for each in choices if each.endswith("*"))
    return frozenset(kind for kind in KINDS if kind in choices or kind.startswith(prefixes))
