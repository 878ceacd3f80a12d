"""The kinds of change in the feed, and what each is about: the one list of both.

A fold can make no other: ``worker.folds.facts.Change`` and ``Shape.subject`` are held to it by type and by test.
"""

from typing import Final, Literal, TypeAlias, get_args

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
"""Every kind that begins so."""
Subject: TypeAlias = Literal["balance", "credit_note", "dispute", "invoice", "order", "payment_link"]

KINDS: Final[tuple[Kind, ...]] = get_args(Kind)
SUBJECTS: Final[tuple[Subject, ...]] = get_args(Subject)
CHOICES: Final[tuple[Kind | AllOf, ...]] = (*KINDS, *get_args(AllOf))
"""What a reader may ask for."""


def chosen(choices: "list[Kind | AllOf]") -> frozenset[Kind]:
    """Return the kinds that *choices* stand for."""
    return frozenset(
        kind for kind in KINDS for each in choices if kind == each or (each[-1] == "*" and kind.startswith(each[:-1]))
    )
