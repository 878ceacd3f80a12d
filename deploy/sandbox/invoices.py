"""Invoices: drafted, finalised, and then paid, given up or voided.

At finalisation the customer's balance in the invoice's currency is applied, and the rest is due. An invoice with
nothing due is paid at once. Voiding gives the balance back. An invoice payment has the part of an invoice that a
payment intent pays, and since basil is the only link between the two. See https://docs.stripe.com/invoicing/overview.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Final

from deploy.sandbox import billing_shapes
from deploy.sandbox.journal import DAY_SECONDS, Object, ParameterError, TransitionError, api_call, merged_metadata
from deploy.sandbox.payments import Payments

_MONTH_SECONDS: Final = 30 * DAY_SECONDS


class Invoices(Payments):
    """Invoices, their payments, and the subscriptions that make them."""

    def __init__(self, **parameters: Any) -> None:  # noqa: ANN401 (those of Journal)
        super().__init__(**parameters)
        # By invoice, all its lines, of which the object holds the first page.
        self._invoice_lines: dict[str, list[Object]] = {}
        # By invoice, the intent that pays it: made at finalisation, and named by the invoice payment.
        self._intents: dict[str, str] = {}
        # By subscription, its customer, price and currency.
        self._subscriptions: dict[str, tuple[str, int, str]] = {}
        # By invoice, the intents that have paid it, and by customer, how many invoices have a number.
        self._paying: dict[str, list[str]] = {}
        self._numbered: Counter[str] = Counter()

    @api_call
    def create_invoice(
        self,
        customer: str,
        amount: int,
        *,
        currency: str | None = None,
        tax: int = 0,
        lines: Sequence[int] | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> str:
        """Draft an invoice of *amount* minor units and *tax* on top, and return its id.

        *lines* are the amounts of its lines, one by default.
        """
        currency = currency or self._customer(customer)["currency"] or "usd"
        return self._draft(customer, amount, currency, tax=tax, lines=lines, metadata=dict(metadata or {}))

    @api_call
    def renew(self, subscription: str, amount: int | None = None) -> str:
        """Draft the next invoice of a *subscription*, of its price by default, and return its id."""
        if subscription not in self._subscriptions:
            raise ParameterError(f"No such subscription: {subscription!r}")
        customer, price, currency = self._subscriptions[subscription]
        return self._draft(
            customer,
            price if amount is None else amount,
            currency,
            subscription=subscription,
            billing_reason="subscription_cycle",
        )

    @api_call
    def update_invoice(self, invoice: str, *, metadata: Mapping[str, str | None]) -> None:
        """Merge an invoice's metadata, which may be done in any state."""
        before = self._find("invoice", invoice)
        after, previous = self._change(before, metadata=merged_metadata(before["metadata"], metadata))
        if previous:
            self._emit("invoice.updated", after, previous)

    @api_call
    def delete_invoice(self, invoice: str) -> None:
        """Delete a draft."""
        draft = self._invoice(invoice, "draft")
        self._emit("invoice.deleted", draft)
        self._store({"id": invoice, "object": "invoice", "deleted": True})

    @api_call
    def finalize_invoice(self, invoice: str) -> None:
        """Finalise a draft: the balance is applied, and the rest is due. Without a rest it is paid at once."""
        self._finalize(invoice)

    @api_call
    def pay_invoice(self, invoice: str) -> None:
        """Pay what remains of an open or uncollectible invoice by card."""
        current = self._invoice(invoice, "open", "uncollectible")
        intent = self._take_payment(
            current["amount_remaining"],
            current["currency"],
            customer=current["customer"],
            invoice=invoice,
            intent=self._intent_for(current),
        )
        self._settle(invoice, intent)

    @api_call
    def fail_invoice_payment(self, invoice: str) -> None:
        """Try to pay an open invoice by a bank debit, which bounces: the customer is late."""
        current = self._invoice(invoice, "open")
        intent = self._take_payment(
            current["amount_remaining"],
            current["currency"],
            customer=current["customer"],
            method="us_bank_account",
            invoice=invoice,
            intent=self._intent_for(current),
            cleared=False,
        )
        self._fail_payment(intent)
        self._report_failure(invoice)

    @api_call
    def mark_uncollectible(self, invoice: str) -> None:
        """Give an open invoice up. It may still be paid or voided."""
        current = self._invoice(invoice, "open")
        self._turn(
            current,
            "invoice.marked_uncollectible",
            status="uncollectible",
            status_details={"uncollectible": {"reason": "user_forgiven"}},
            status_transitions=current["status_transitions"] | {"marked_uncollectible_at": self.now},
        )

    @api_call
    def void_invoice(self, invoice: str) -> None:
        """Void an open or uncollectible invoice. The balance that it had used goes back to the customer."""
        current = self._invoice(invoice, "open", "uncollectible")
        applied = current["ending_balance"] - current["starting_balance"]
        if applied:
            self._post(current["customer"], "unapplied_from_invoice", -applied, current["currency"], invoice=invoice)
        self._turn(
            current,
            "invoice.voided",
            auto_advance=False,
            status="void",
            status_details=None,
            status_transitions=current["status_transitions"] | {"voided_at": self.now},
        )

    def invoice_intents(self, invoice: str) -> list[str]:
        """Return the payment intents that have paid an invoice, as its invoice payments name them."""
        return list(self._paying.get(invoice, []))

    # Shared by Checkout and the public methods.

    def _draft(
        self,
        customer: str,
        amount: int,
        currency: str,
        *,
        tax: int = 0,
        lines: Sequence[int] | None = None,
        subscription: str | None = None,
        invoice: str | None = None,
        **fields: Any,  # noqa: ANN401 (JSON values)
    ) -> str:
        parts = [amount] if lines is None else list(lines)
        if amount < 0 or tax < 0 or sum(parts) != amount:
            raise ParameterError("an invoice and its tax are not negative, and its lines add up to it")
        self._settle_currency(customer, currency)
        invoice = invoice or self._chance.id("in")
        self._untold[invoice] = {"charge": None, "payment_intent": None}
        all_lines = [self._invoice_line(invoice, part, currency, subscription) for part in parts]
        self._invoice_lines[invoice] = all_lines
        balance = self.expected_balance(customer, currency)
        due = max(amount + tax + balance, 0)
        payer = self._find("customer", customer)
        snapshot = billing_shapes.invoice(
            {
                "id": invoice,
                "amount_due": due,
                "amount_remaining": due,
                "created": self.now,
                "currency": currency,
                "customer": customer,
                "customer_email": payer["email"],
                "customer_name": payer["name"],
                "lines": billing_shapes.first_page(all_lines, f"/v1/invoices/{invoice}/lines"),
                "livemode": self.livemode,
                "parent": None if subscription is None else _parent(subscription),
                "period_end": self.now,
                "period_start": self.now - (_MONTH_SECONDS if subscription else 0),
                "starting_balance": balance,
                "subtotal": amount,
                "subtotal_excluding_tax": amount,
                "total": amount + tax,
                "total_excluding_tax": amount,
                "total_taxes": [billing_shapes.tax(tax, amount, self._chance.id("txr"))] if tax else [],
                **fields,
            }
        )
        self._store(snapshot)
        self._emit("invoice.created", snapshot)
        return invoice

    def _invoice_line(self, invoice: str, amount: int, currency: str, subscription: str | None) -> Object:
        return billing_shapes.invoice_line(
            {
                "id": self._chance.id("il"),
                "amount": amount,
                "currency": currency,
                "invoice": invoice,
                "livemode": self.livemode,
                "parent": {
                    "invoice_item_details": None
                    if subscription
                    else {
                        "invoice_item": self._chance.id("ii"),
                        "proration": False,
                        "proration_details": {"credited_items": None},
                        "subscription": None,
                    },
                    "subscription_item_details": {
                        "invoice_item": None,
                        "proration": False,
                        "proration_details": {"credited_items": None},
                        "subscription": subscription,
                        "subscription_item": self._chance.short_id("si"),
                    }
                    if subscription
                    else None,
                    "type": "subscription_item_details" if subscription else "invoice_item_details",
                },
                "period": {"end": self.now + (_MONTH_SECONDS if subscription else 0), "start": self.now},
                "pricing": {
                    "price_details": {"price": self._chance.id("price"), "product": self._chance.short_id("prod")},
                    "type": "price_details",
                    "unit_amount_decimal": str(amount),
                },
                "subtotal": amount,
            }
        )

    def _finalize(self, invoice: str, *, use_balance: bool = True, intent: str | None = None) -> None:
        """Open a draft, or pay it if nothing is due. *intent* pays it, if the intent is known already."""
        draft = self._invoice(invoice, "draft")
        currency, total = draft["currency"], draft["total"]
        balance = self.expected_balance(draft["customer"], currency)
        # A credit pays as much as it can; the customer's debt from before is due with this invoice.
        ending = min(balance + total, 0) if use_balance else balance
        applied = ending - balance
        due = total - applied
        if applied:
            self._post(draft["customer"], "applied_to_invoice", applied, currency, invoice=invoice)
        if due:
            intent = intent or self._new_intent(due, currency, customer=draft["customer"], invoice=invoice)
            self._intents[invoice] = intent
            self._untold[invoice]["payment_intent"] = intent
        kind = "live" if self.livemode else "test"
        url = f"https://invoice.stripe.com/i/acct_sandbox/{kind}_{self._chance.token(40)}"
        changes: dict[str, Any] = {
            "amount_due": due,
            "amount_remaining": due,
            "effective_at": self.now,
            "ending_balance": ending,
            "hosted_invoice_url": url,
            "invoice_pdf": f"{url}/pdf",
            "number": self._number(draft["customer"]),
            "starting_balance": balance,
            "status": "open",
            "status_transitions": draft["status_transitions"] | {"finalized_at": self.now},
        }
        if due:
            self._turn(draft, "invoice.finalized", **changes)
        else:
            changes |= self._paid(changes)
            self._turn(draft, "invoice.finalized", "invoice.paid", "invoice.payment_succeeded", **changes)

    def _number(self, customer: str) -> str:
        self._numbered[customer] += 1
        return f"{self._find('customer', customer)['invoice_prefix']}-{self._numbered[customer]:04d}"

    def _intent_for(self, invoice: Object) -> str:
        """Return the intent that is to pay an invoice, over what remains of it."""
        intent = self._intents[invoice["id"]]
        self._change(self._find("payment_intent", intent), amount=invoice["amount_remaining"])
        return intent

    def _settle(self, invoice: str, intent: str) -> None:
        """Emit the events of a cleared payment that paid all that remained of an invoice."""
        current = self._invoice(invoice, "open", "uncollectible")
        amount = current["amount_remaining"]
        self._untold[invoice] = {
            "charge": self._find("payment_intent", intent)["latest_charge"],
            "payment_intent": intent,
        }
        payment = billing_shapes.invoice_payment(
            {
                "id": self._chance.id("inpay"),
                "amount_paid": amount,
                "amount_requested": amount,
                "created": self.now,
                "currency": current["currency"],
                "invoice": invoice,
                "livemode": self.livemode,
                "payment": {"payment_intent": intent, "type": "payment_intent"},
                "status": "paid",
                "status_transitions": {"canceled_at": None, "paid_at": self.now},
            }
        )
        self._store(payment)
        self._paying.setdefault(invoice, []).append(intent)
        self._emit("invoice_payment.paid", payment)
        self._turn(
            current,
            "invoice.paid",
            "invoice.payment_succeeded",
            **self._paid(current),
            amount_paid=current["amount_paid"] + amount,
            amount_remaining=0,
            attempt_count=current["attempt_count"] + 1,
        )
        self._set_delinquent(current["customer"], late=False)

    def _paid(self, invoice: Object) -> dict[str, Any]:
        return {
            "attempted": True,
            "next_payment_attempt": None,
            "status": "paid",
            "status_details": None,
            "status_transitions": invoice["status_transitions"] | {"paid_at": self.now},
        }

    def _report_failure(self, invoice: str) -> None:
        """Emit the events of a failed payment of an invoice, which makes its customer late."""
        current = self._invoice(invoice, "open")
        self._set_delinquent(current["customer"], late=True)
        self._turn(current, "invoice.payment_failed", attempted=True, attempt_count=current["attempt_count"] + 1)

    def _set_delinquent(self, customer: str, *, late: bool) -> None:
        before = self._find("customer", customer)
        if before.get("delinquent", late) != late:
            after, previous = self._change(before, delinquent=late)
            self._emit("customer.updated", after, previous)

    def _turn(self, invoice: Object, *event_types: str, **changes: Any) -> Object:  # noqa: ANN401 (JSON values)
        """Change an invoice, and emit an update and *event_types*, all with the same snapshot."""
        after, previous = self._change(invoice, **changes)
        self._emit("invoice.updated", after, previous)
        for event_type in event_types:
            self._emit(event_type, after)
        return after

    def _invoice(self, invoice: str, *allowed: str) -> Object:
        current = self._find("invoice", invoice)
        if current.get("status") not in allowed:
            raise TransitionError(f"{invoice} is {current.get('status', 'deleted')}, not {' or '.join(allowed)}")
        return current


def _parent(subscription: str) -> Object:
    return {
        "quote_details": None,
        "subscription_details": {
            "metadata": {},
            "subscription": subscription,
            "subscription_proration_date": None,
        },
        "type": "subscription_details",
    }
