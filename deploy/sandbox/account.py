"""A Stripe account of a shop: its objects, the changes that may happen to them, and the events that Stripe sends.

A call that Stripe would refuse is refused here, by a :class:`SandboxError`. Each subject is a module of its own, and
each builds on those before it: ``journal`` (clock, objects, events), ``customers``, ``payments``, ``invoices``,
``credit_notes``, ``checkout``, ``portal`` and ``endpoints``. A new kind of object is a shape, and
methods of its subject that change it and end in ``_emit``.
"""

from collections.abc import Iterable

from deploy.sandbox.checkout import Checkout
from deploy.sandbox.credit_notes import CreditNotes
from deploy.sandbox.endpoints import Endpoints
from deploy.sandbox.journal import (
    DAY_SECONDS,
    LATEST,
    START,
    Event,
    Object,
    ParameterError,
    SandboxError,
    TransitionError,
    UnknownObjectError,
    body_of,
    previous_attributes,
)
from deploy.sandbox.payments import REFUND_LOST, holds_money
from deploy.sandbox.portal import Portal

__all__ = [
    "DAY_SECONDS",
    "LATEST",
    "START",
    "Account",
    "Event",
    "ParameterError",
    "SandboxError",
    "TransitionError",
    "UnknownObjectError",
    "body_of",
    "previous_attributes",
]


class Account(Checkout, CreditNotes, Portal, Endpoints):
    """One shop's Stripe account in one mode, with a clock of its own that moves only by a call.

    The same seed and the same calls give the same events, byte by byte. Two accounts of one seed give the same
    ids (apart from the mode in a session's), which no receiver may trip over. Without *payments*, a session names
    its payment and subscription, but these do not exist. With it they are made and have events of their own.
    """

    def __init__(
        self,
        *,
        seed: int,
        start: int = START,
        livemode: bool = False,
        account: str | None = None,
        api_version: str = LATEST,
        payments: bool = False,
    ) -> None:
        super().__init__(
            seed=seed, start=start, livemode=livemode, account=account, api_version=api_version, payments=payments
        )

    # The truth of an order's money. An amount that Stripe gives no way to know is null, never zero.

    def order_intents(self, session: str) -> list[str] | None:
        """Return the payment intents behind an order: its own, or those that paid its own invoice.

        Null where neither is known. Later invoices of an order's subscription are not the order's.
        """
        current = self._session(session)
        if current["payment_intent"] is not None:
            return [current["payment_intent"]]
        return self.invoice_intents(current["invoice"] or "") or None

    def expected_refunded(self, session: str) -> int | None:
        """Return the amount that an order's buyer got back or is to get, in minor units; null without a payment.

        A refund counts unless it failed or was canceled.
        """
        intents = self.order_intents(session)
        if intents is None:
            return None
        refunds = [refund for intent in intents for refund in self.refunds_of(intent)]
        return _total(refund for refund in refunds if refund["status"] not in REFUND_LOST)

    def expected_credited(self, session: str) -> int | None:
        """Return the amount credited of an order's own invoice, in minor units; null without an invoice.

        A credit note counts unless it is void.
        """
        invoice = self._session(session)["invoice"]
        if invoice is None:
            return None
        return _total(note for note in self.credit_notes_of(invoice) if note["status"] != "void")

    def expected_disputed(self, session: str) -> int | None:
        """Return how much of an order is disputed or was lost to disputes, in minor units; null without a payment.

        An inquiry takes no money. A dispute that was won or prevented does not count either.
        """
        intents = self.order_intents(session)
        if intents is None:
            return None
        disputes = [dispute for intent in intents for dispute in self.disputes_of(intent)]
        return _total(dispute for dispute in disputes if holds_money(dispute))


def _total(objects: Iterable[Object]) -> int:
    return sum(counted["amount"] for counted in objects)
