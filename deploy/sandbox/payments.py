"""Payments, and the ways to take them back: payment intents, charges, refunds and disputes.

A charge is pending, succeeded or failed. A succeeded charge may have refunds. Each refund goes from pending to
succeeded, failed or canceled, and a succeeded refund may still fail. A dispute takes the money at once, unless it is
only an inquiry, and gives it back when it is won.
"""

from typing import Any, Final, Literal

from deploy.sandbox import billing_shapes
from deploy.sandbox.customers import Customers
from deploy.sandbox.journal import DAY_SECONDS, Object, ParameterError, TransitionError, api_call, copy_of

RefundStatus = Literal["pending", "requires_action", "succeeded"]
DisputeEnd = Literal["won", "lost", "warning_closed"]

REFUND_LOST: Final = frozenset({"failed", "canceled"})
"""States of a refund in which the buyer does not get the money."""
DISPUTE_OVER: Final = frozenset({"won", "lost", "warning_closed", "prevented"})
DISPUTE_HARMLESS: Final = DISPUTE_OVER - {"lost"}
"""States of a dispute in which the shop has, or has again, its money for good."""
_EVIDENCE_SECONDS: Final = 20 * DAY_SECONDS
_DISPUTE_FEE: Final = 1_500


class Payments(Customers):
    """Payment intents, charges, refunds and disputes."""

    def __init__(self, **parameters: Any) -> None:  # noqa: ANN401 (those of Journal)
        super().__init__(**parameters)
        self._refunds: dict[str, list[str]] = {}  # by payment intent
        self._disputes: dict[str, list[str]] = {}  # by payment intent

    # Payments.

    def _take_payment(
        self,
        amount: int,
        currency: str,
        *,
        customer: str | None = None,
        method: str = "card",
        invoice: str | None = None,
        intent: str | None = None,
        cleared: bool = True,
    ) -> str:
        """Pay *amount* by a new charge of *intent* (or a new one) and return the intent.

        A payment that is not *cleared* is processing. Since basil neither the charge nor the intent names its
        *invoice*.
        """
        intent = intent or self._new_intent(amount, currency, customer=customer, method=method, invoice=invoice)
        asked = self._find("payment_intent", intent)
        charge = self._chance.id_beside("ch" if method == "card" else "py", intent)
        self._untold[charge] = {"invoice": invoice}
        payment_method = self._chance.id("pm")
        snapshot = billing_shapes.charge(
            {
                "id": charge,
                "amount": amount,
                "created": self.now,
                "currency": currency,
                "customer": customer,
                "livemode": self.livemode,
                "payment_intent": intent,
                "payment_method": payment_method,
                "payment_method_details": billing_shapes.payment_method_details(method),
                "receipt_url": f"https://pay.stripe.com/receipts/payment/{self._chance.token(40)}",
            }
        )
        self._store(snapshot)
        self._change(asked, latest_charge=charge, payment_method=payment_method)
        if cleared:
            self._clear_payment(intent)
        else:
            processing, _ = self._change(self._find("payment_intent", intent), status="processing")
            self._emit("charge.pending", snapshot)
            self._emit("payment_intent.processing", processing)
        return intent

    def _new_intent(
        self, amount: int, currency: str, *, customer: str | None, method: str = "card", invoice: str | None = None
    ) -> str:
        """Make a payment intent without any attempt to pay it, emit no event, and return its id."""
        intent = self._chance.intent_id()
        self._untold[intent] = {"invoice": invoice}
        self._store(
            billing_shapes.payment_intent(
                {
                    "id": intent,
                    "amount": amount,
                    "client_secret": f"{intent}_secret_{self._chance.token(25)}",
                    "created": self.now,
                    "currency": currency,
                    "customer": customer,
                    "livemode": self.livemode,
                    "payment_method_types": [method],
                }
            )
        )
        return intent

    def _clear_payment(self, intent: str) -> None:
        asked = self._find("payment_intent", intent)
        charge = self._find("charge", asked["latest_charge"])
        paid, _ = self._change(
            charge,
            amount_captured=charge["amount"],
            balance_transaction=self._chance.id("txn"),
            captured=True,
            paid=True,
            status="succeeded",
        )
        self._emit("charge.succeeded", paid)
        done, _ = self._change(asked, amount_received=asked["amount"], status="succeeded")
        self._emit("payment_intent.succeeded", done)

    def _fail_payment(self, intent: str) -> None:
        asked = self._find("payment_intent", intent)
        reason = {"failure_code": "generic_decline", "failure_message": "The payment was declined."}
        failed, _ = self._change(self._find("charge", asked["latest_charge"]), **reason, status="failed")
        self._emit("charge.failed", failed)
        wanting, _ = self._change(asked, status="requires_payment_method")
        self._emit("payment_intent.payment_failed", wanting)

    def charge_of(self, payment: str) -> Object:
        """Return a copy of a charge, by its own id or as the latest of a payment intent's."""
        return copy_of(self._charge_of(payment))

    def _charge_of(self, payment: str) -> Object:
        """Return a charge by its own id, or as the latest of a payment intent's."""
        if self._knows("payment_intent", payment):
            payment = str(self._find("payment_intent", payment)["latest_charge"])
        return self._find("charge", payment)

    # Refunds.

    @api_call
    def refund(
        self, payment: str, amount: int | None = None, *, status: RefundStatus | None = None, reason: str | None = None
    ) -> str:
        """Refund *amount* minor units (all that is left by default) of a charge or payment intent; return the refund.

        Without *status* it succeeds at once where the buyer paid by card, and is pending elsewhere.
        """
        return self._refund(payment, amount, status, reason)

    def _refund(
        self, payment: str, amount: int | None, status: RefundStatus | None = None, reason: str | None = None
    ) -> str:
        charge = self._charge_of(payment)
        if charge["status"] != "succeeded":
            raise TransitionError(f"{charge['id']} is {charge['status']} and cannot be refunded")
        if any(holds_money(dispute) for dispute in self.disputes_of(charge["payment_intent"])):
            raise TransitionError(f"{charge['id']} is disputed and cannot be refunded")
        left = charge["amount"] - charge["amount_refunded"]
        amount = left if amount is None else amount
        if not 0 < amount <= left:
            raise ParameterError(f"{charge['id']} has {left} left to refund, not {amount}")
        by_card = _paid_by_card(charge)
        status = status or ("succeeded" if by_card else "pending")
        refund = billing_shapes.refund(
            {
                "id": self._chance.id_beside("re" if by_card else "pyr", charge["payment_intent"]),
                "amount": amount,
                "balance_transaction": self._chance.id("txn"),
                "charge": charge["id"],
                "created": self.now,
                "currency": charge["currency"],
                "customer": charge["customer"],
                "payment_intent": charge["payment_intent"],
                "payment_method": charge["payment_method"],
                "reason": reason,
                "status": status,
                **({"pending_reason": "processing"} if status == "pending" else {}),
            }
        )
        self._store(refund)
        self._refunds.setdefault(charge["payment_intent"], []).append(refund["id"])
        self._emit("refund.created", refund)
        self._move_refunded(charge, charge["amount_refunded"] + amount, "charge.refunded")
        return str(refund["id"])

    @api_call
    def succeed_refund(self, refund: str) -> None:
        """Let a pending refund reach the buyer."""
        self._end_refund(refund, ("pending", "requires_action"), {"status": "succeeded"})

    @api_call
    def fail_refund(self, refund: str, *, charge_falls: bool = True) -> None:
        """Let a refund fail, which one that succeeded may still do: the bank sends the money back to the shop.

        Whether the charge's ``amount_refunded`` falls then is documented nowhere, so *charge_falls* decides.
        """
        reason = {
            "failure_balance_transaction": self._chance.id("txn"),
            "failure_reason": "lost_or_stolen_card",
            "status": "failed",
        }
        failed = self._end_refund(refund, ("pending", "requires_action", "succeeded"), reason)
        self._emit("refund.failed", failed)
        if charge_falls:
            self._give_back(failed)

    @api_call
    def cancel_refund(self, refund: str) -> None:
        """Cancel a refund that waits for the buyer or the bank."""
        self._give_back(self._end_refund(refund, ("pending", "requires_action"), {"status": "canceled"}))

    def _end_refund(self, refund: str, allowed: tuple[str, ...], changes: dict[str, Any]) -> Object:
        before = self._find("refund", refund)
        if before["status"] not in allowed:
            raise TransitionError(f"{refund} is {before['status']} and cannot become {changes['status']}")
        if "pending_reason" in before:
            changes = changes | {"pending_reason": None}
        after, previous = self._change(before, **changes)
        self._emit("refund.updated", after, previous)
        if not _paid_by_card(self._find("charge", after["charge"])):
            self._emit("charge.refund.updated", after, previous)
        return after

    def _give_back(self, refund: Object) -> None:
        charge = self._find("charge", refund["charge"])
        self._move_refunded(charge, charge["amount_refunded"] - refund["amount"], "charge.updated")

    def _move_refunded(self, charge: Object, amount: int, event_type: str) -> None:
        after, previous = self._change(charge, amount_refunded=amount, refunded=amount == charge["amount"])
        self._emit(event_type, after, previous)

    def refunds_of(self, intent: str) -> list[Object]:
        """Return the refunds of a payment intent in any status, oldest first."""
        return [self.object("refund", refund) for refund in self._refunds.get(intent, [])]

    def disputes_of(self, intent: str) -> list[Object]:
        """Return the disputes of a payment intent in any status, oldest first."""
        return [self.object("dispute", dispute) for dispute in self._disputes.get(intent, [])]

    # Disputes.

    def open_dispute(
        self, payment: str, amount: int | None = None, *, reason: str = "product_not_received", inquiry: bool = False
    ) -> str:
        """Let the buyer's bank dispute *amount* (all by default) of a charge or payment intent; return the dispute.

        An *inquiry* takes no money yet; its states are those of a warning.
        """
        charge = self._charge_of(payment)
        amount = charge["amount"] if amount is None else amount
        if charge["status"] != "succeeded":
            raise TransitionError(f"{charge['id']} is {charge['status']} and cannot be disputed")
        if not 0 < amount <= charge["amount"]:
            raise ParameterError(f"{charge['id']} is of {charge['amount']}, of which {amount} cannot be disputed")
        dispute = billing_shapes.dispute(
            {
                "id": self._chance.id("du"),
                "amount": amount,
                "charge": charge["id"],
                "created": self.now,
                "currency": charge["currency"],
                "evidence_details": billing_shapes.evidence_details(self.now + _EVIDENCE_SECONDS, 0),
                "is_charge_refundable": inquiry,
                "livemode": self.livemode,
                "payment_intent": charge["payment_intent"],
                "reason": reason,
                "status": "warning_needs_response" if inquiry else "needs_response",
            }
        )
        if not inquiry:
            dispute["balance_transactions"] = [self._movement(dispute, -amount, _DISPUTE_FEE)]
        self._store(dispute)
        self._disputes.setdefault(charge["payment_intent"], []).append(dispute["id"])
        self._emit("charge.dispute.created", dispute)
        if not charge["disputed"]:
            disputed, previous = self._change(charge, disputed=True)
            self._emit("charge.updated", disputed, previous)
        if not inquiry:
            self._emit("charge.dispute.funds_withdrawn", dispute)
        return str(dispute["id"])

    @api_call
    def submit_evidence(self, dispute: str) -> None:
        """Answer a dispute: it is under review from now on."""
        before = self._find("dispute", dispute)
        answered = {"needs_response": "under_review", "warning_needs_response": "warning_under_review"}
        if before["status"] not in answered:
            raise TransitionError(f"{dispute} is {before['status']} and wants no response")
        details = billing_shapes.evidence_details(before["evidence_details"]["due_by"], 1)
        after, previous = self._change(before, evidence_details=details, status=answered[before["status"]])
        self._emit("charge.dispute.updated", after, previous)

    def close_dispute(self, dispute: str, end: DisputeEnd) -> None:
        """Let the bank decide. A dispute that is *won* gives its money back; an inquiry ends as *warning_closed*."""
        before = self._find("dispute", dispute)
        warned = before["status"].startswith("warning_")
        if before["status"] in DISPUTE_OVER or warned != (end == "warning_closed"):
            raise TransitionError(f"{dispute} is {before['status']} and cannot end as {end}")
        after, _ = self._change(before, status=end)
        self._emit("charge.dispute.closed", after)
        if end == "won":
            given_back = self._movement(after, after["amount"], -_DISPUTE_FEE)
            after, _ = self._change(after, balance_transactions=[*after["balance_transactions"], given_back])
            self._emit("charge.dispute.funds_reinstated", after)

    def _movement(self, dispute: Object, amount: int, fee: int) -> Object:
        return billing_shapes.balance_transaction(
            {
                "id": self._chance.id("txn"),
                "amount": amount,
                "available_on": self.now,
                "created": self.now,
                "currency": dispute["currency"],
                "description": f"Chargeback {'withdrawal' if amount < 0 else 'reversal'} for {dispute['charge']}",
                "fee": fee,
                "net": amount - fee,
                "reporting_category": "dispute" if amount < 0 else "dispute_reversal",
                "source": dispute["id"],
            }
        )


def holds_money(dispute: Object) -> bool:
    """Return whether the shop lacks a dispute's money now: for good, or until it wins."""
    return dispute["status"] not in DISPUTE_HARMLESS and not dispute["status"].startswith("warning_")


def _paid_by_card(charge: Object) -> bool:
    return bool(charge["payment_method_details"]["type"] == "card")
