"""Checkout: payment links and Checkout Sessions.

Sessions go from open to complete or to expired and never back; links are switched on and off. Stripe sends no event
when a session opens.
"""

from collections.abc import Mapping
from typing import Any, Final, Literal

from deploy.sandbox import shapes
from deploy.sandbox.invoices import Invoices
from deploy.sandbox.journal import (
    DAY_SECONDS,
    NO_REQUEST,
    Object,
    ParameterError,
    TransitionError,
    copy_of,
    merged_metadata,
    previous_attributes,
)

SESSION_SECONDS_MIN: Final = 1_800
SESSION_SECONDS_MAX: Final = DAY_SECONDS
RECOVERY_SECONDS: Final = 30 * DAY_SECONDS

Mode = Literal["payment", "setup", "subscription"]
PaymentStatus = Literal["paid", "unpaid", "no_payment_required"]

_AMOUNT = 2_000
_CURRENCY = "usd"


class Checkout(Invoices):
    """Payment links and Checkout Sessions."""

    payments: bool
    """Whether a session's payment is made, with its intent, charge, invoice and customer, or only named."""

    def __init__(self, *, payments: bool = False, **parameters: Any) -> None:  # noqa: ANN401 (those of Journal)
        super().__init__(**parameters)
        self.payments = payments
        self._link_amounts: dict[str, int] = {}
        # Facts that are not in a session's object: that its payment failed, and the amount that its buyer is shown.
        self._failed: set[str] = set()
        self._presentments: dict[str, tuple[str, int]] = {}
        # The invoice that a session's payment will have.
        self._reserved: dict[str, str] = {}

    # Payment links.

    def create_payment_link(
        self, *, currency: str = _CURRENCY, amount: int = _AMOUNT, metadata: Mapping[str, str] | None = None
    ) -> str:
        """Create an active link that sells one thing for *amount* minor units, and return its id."""
        link = self._chance.id("plink")
        self._link_amounts[link] = amount
        snapshot = shapes.payment_link(
            {
                "id": link,
                "currency": currency,
                "livemode": self.livemode,
                "metadata": dict(metadata or {}),
                "url": f"https://buy.stripe.com/{'' if self.livemode else 'test_'}{self._chance.token(18)}",
            }
        )
        self._store(snapshot)
        self._emit("payment_link.created", snapshot, request=self._request())
        return link

    def update_payment_link(
        self, link: str, *, active: bool | None = None, metadata: Mapping[str, str | None] | None = None
    ) -> None:
        """Change a link; metadata is merged, and a null or empty value removes its key.

        An update that changes nothing has no event.
        """
        before = self._link(link)
        after = dict(before)
        if active is not None:
            after["active"] = active
        if metadata is not None:
            after["metadata"] = merged_metadata(before["metadata"], metadata)
        previous = previous_attributes(before, after)
        if previous:
            self._store(after)
            self._emit("payment_link.updated", after, previous, request=self._request())

    def payment_link(self, link: str) -> dict[str, Any]:
        """Return a link as the API does now."""
        return copy_of(self._link(link))

    # Checkout Sessions.

    def open_session(  # noqa: PLR0913 (each is one of Stripe's own parameters, and all have defaults)
        self,
        *,
        mode: Mode = "payment",
        amount: int | None = None,
        currency: str | None = None,
        payment_link: str | None = None,
        customer: str | None = None,
        client_reference_id: str | None = None,
        metadata: Mapping[str, str] | None = None,
        discount: int = 0,
        shipping: int = 0,
        tax: int = 0,
        expires_in: int = SESSION_SECONDS_MAX,
        recoverable: bool = False,
        recovered_from: str | None = None,
        presentment: tuple[str, int] | None = None,
        invoice_creation: bool = False,
    ) -> str:
        """Open a session and return its id. Stripe sends no event of it.

        *amount* is the subtotal, to which *shipping* and *tax* are added and from which *discount* is taken, all
        in minor units; amount and currency default to the payment link's, or to 20 dollars. *expires_in* is in
        seconds. *presentment* is the currency and the total that the buyer is shown; the session has it once
        complete. With *invoice_creation* a paid session gets an invoice, and its customer must be known.
        """
        if not SESSION_SECONDS_MIN <= expires_in <= SESSION_SECONDS_MAX:
            raise ParameterError("a session expires between 30 minutes and 24 hours after its creation")
        if recovered_from is not None:
            self._require_status(recovered_from, "expired", "recovered")
        self._check_parties(mode, customer, invoiced=invoice_creation)
        sold, copied = self._sold_by(payment_link)
        fields: dict[str, Any] = {
            "mode": mode,
            "payment_link": payment_link,
            "customer": customer,
            "client_reference_id": client_reference_id,
            "metadata": copied | dict(metadata or {}),
            "recovered_from": recovered_from,
        }
        if customer is not None:
            fields["customer_details"] = shapes.customer_details(self._chance.email(), None, None)
            fields["customer_creation"] = None
        if recoverable:
            fields["after_expiration"] = shapes.recovery(None, None)
        if invoice_creation:
            fields["invoice_creation"] = shapes.INVOICE_CREATION
        if mode == "setup":
            fields |= self._setup_fields()
        else:
            sold_amount = sold["amount"] if amount is None else amount
            fields |= self._priced_fields(sold_amount, discount, shipping, tax)
            fields["currency"] = currency or sold["currency"]
            if mode == "subscription" and fields["amount_total"] == 0:
                fields["payment_status"] = "no_payment_required"  # a trial
        session = self._open(fields, expires_in)
        if presentment is not None:
            self._presentments[session] = presentment
        return session

    def complete(self, session: str, *, payment_status: PaymentStatus | None = None) -> None:
        """Let the buyer finish the page.

        *payment_status* is paid, unpaid (a delayed method, still processing) or, exactly when nothing is due,
        no_payment_required; by default what an instant method gives.
        """
        current = self._require_status(session, "open", "completed")
        if self.now > current["expires_at"]:
            raise TransitionError(f"{session} is past its expires_at and can only expire")
        due = current["amount_total"]
        if payment_status is None:
            payment_status = "paid" if due else "no_payment_required"
        if (payment_status == "no_payment_required") == bool(due):
            raise TransitionError(f"{session} has {due} due, so it cannot complete as {payment_status}")
        name, address = self._chance.person()
        email = (current["customer_details"] or {}).get("email") or self._chance.email()
        current |= {
            "collected_information": {
                "business_name": None,
                "individual_name": None,
                "shipping_details": {"address": address, "name": name} if current["shipping_cost"] else None,
            },
            "customer_details": shapes.customer_details(email, name, address),
            "payment_status": payment_status,
            "status": "complete",
            "url": None,
        }
        if self._pays(current):
            self._pay_for(current)
        elif current["mode"] == "subscription":
            current["customer"] = current["customer"] or self._chance.short_id("cus")
            current["subscription"] = self._chance.id("sub")
            current["invoice"] = self._chance.id("in")
        elif due:
            current["payment_intent"] = self._chance.intent_id()
        if session in self._presentments:
            shown_currency, shown_amount = self._presentments[session]
            current["presentment_details"] = {
                "presentment_amount": shown_amount,
                "presentment_currency": shown_currency,
            }
        self._emit("checkout.session.completed", current)

    def async_payment_succeeded(self, session: str) -> None:
        """Let a delayed payment clear."""
        current = self._require_processing(session)
        current["payment_status"] = "paid"
        if self._pays(current):
            self._clear_order(current)
        self._emit("checkout.session.async_payment_succeeded", current)

    def async_payment_failed(self, session: str) -> None:
        """Let a delayed payment fail. The object does not show it: only the event's type does."""
        current = self._require_processing(session)
        self._failed.add(session)
        if self._pays(current):
            self._fail_order(current)
        self._emit("checkout.session.async_payment_failed", current)

    def expire(self, session: str) -> None:
        """Expire a session: Stripe's timer if its time has come, else a call of the shop.

        ``expires_at`` stays as it was. A recoverable session gets its recovery url for 30 days. It also has its
        buyer's email, if the buyer has consented to be written to, as some do.
        """
        current = self._require_status(session, "open", "expired")
        current["status"] = "expired"
        current["url"] = None
        if current["after_expiration"] is not None:
            kind = "live" if self.livemode else "test"
            url = f"https://buy.stripe.com/r/{kind}_{self._chance.token(60)}"
            current["after_expiration"] = shapes.recovery(url, self.now + RECOVERY_SECONDS)
            if current["customer_details"] is None and self._chance.flip(0.5):
                current["consent"] = {"promotions": "opt_in", "terms_of_service": None}
                current["customer_details"] = shapes.customer_details(self._chance.email(), None, None)
        by_timer = self.now >= current["expires_at"]
        self._emit("checkout.session.expired", current, request=NO_REQUEST if by_timer else self._request())

    def recover(self, session: str) -> str:
        """Let a buyer follow an expired session's recovery url, and return the new session that this opens.

        The original stays expired for ever, and may be recovered again.
        """
        original = self._require_status(session, "expired", "recovered")
        after_expiration = original["after_expiration"]
        if after_expiration is None:
            raise TransitionError(f"{session} was not opened as recoverable")
        if self.now > after_expiration["recovery"]["expires_at"]:
            raise TransitionError(f"the recovery url of {session} is no longer valid")
        # A guest may type another address this time.
        guest = original["customer"] is None
        copy = original | {
            "after_expiration": shapes.recovery(None, None),
            "consent": None,
            "customer_details": None if guest else original["customer_details"],
            "recovered_from": session,
            "status": "open",
        }
        return self._open(copy, original["expires_at"] - original["created"])

    def session(self, session: str) -> dict[str, Any]:
        """Return a session as the API does now, without the line items, which want expanding."""
        return copy_of(self._session(session))

    def session_ids(self) -> list[str]:
        """Return all sessions, in the order in which they were opened."""
        return self.object_ids("checkout.session")

    def payment_link_ids(self) -> list[str]:
        """Return all payment links, in the order of their creation."""
        return self.object_ids("payment_link")

    def expected_status(self, session: str) -> str:
        """Return the status an order really has: open, processing, paid, failed, expired, or complete in setup mode.

        Events made with :meth:`emit` do not change it.
        """
        current = self._session(session)
        if current["status"] != "complete":
            return str(current["status"])
        if current["mode"] == "setup":
            return "complete"
        if current["payment_status"] == "unpaid":
            return "failed" if session in self._failed else "processing"
        return "paid"

    # How sessions begin.

    def _open(self, fields: dict[str, Any], expires_in: int) -> str:
        session = self._chance.session_id(livemode=self.livemode)
        # The fragment is what lets its holder see the page: a credential, here as long as a real one.
        url = f"https://checkout.stripe.com/c/pay/{session}#fid{self._chance.token(180)}"
        timed = {"created": self.now, "expires_at": self.now + expires_in, "livemode": self.livemode}
        self._store(shapes.checkout_session(fields | {"id": session, "url": url} | timed))
        return session

    def _check_parties(self, mode: Mode, customer: str | None, *, invoiced: bool) -> None:
        if invoiced and mode != "payment":
            raise ParameterError("invoice_creation is for payment mode: a subscription makes its invoices anyway")
        if customer is not None and (invoiced or self.payments):
            self._customer(customer)

    def _sold_by(self, link: str | None) -> tuple[dict[str, Any], dict[str, str]]:
        """Return the price (amount, currency) and the metadata that a session takes from its link."""
        if link is None:
            return {"amount": _AMOUNT, "currency": _CURRENCY}, {}
        definition = self._link(link)
        if not definition["active"]:
            raise TransitionError(f"{link} is not active")
        price = {"amount": self._link_amounts[link], "currency": definition["currency"]}
        return price, definition["metadata"]

    def _priced_fields(self, amount: int, discount: int, shipping: int, tax: int) -> dict[str, Any]:
        if min(amount, discount, shipping, tax, amount - discount) < 0:
            raise ParameterError("amounts are not negative, and a discount is at most the subtotal")
        fields: dict[str, Any] = {
            "amount_subtotal": amount,
            "amount_total": amount - discount + shipping + tax,
            "total_details": {"amount_discount": discount, "amount_shipping": shipping, "amount_tax": tax},
        }
        if discount:
            fields["discounts"] = [{"coupon": self._chance.token(8), "promotion_code": None}]
        if shipping:
            fields["shipping_address_collection"] = shapes.SHIPPING_COUNTRIES
            fields["shipping_cost"] = {
                "amount_subtotal": shipping,
                "amount_tax": 0,
                "amount_total": shipping,
                "shipping_rate": self._chance.id("shr"),
            }
        return fields

    def _setup_fields(self) -> dict[str, Any]:
        return {
            "payment_method_collection": "always",
            "payment_status": "no_payment_required",
            "setup_intent": self._chance.id("seti"),
        }

    # How sessions are paid.

    def _pays(self, current: Object) -> bool:
        """Return whether a session's payment is made: where the account makes all of them, or an invoice needs it."""
        return current["mode"] != "setup" and (self.payments or current["invoice_creation"]["enabled"])

    def _pay_for(self, current: Object) -> None:
        """Take the payment of a session that completes, according to its ``payment_status``.

        A subscription names its invoice at once. A payment that is to have an invoice gets it when it has cleared.
        """
        subscribed = current["mode"] == "subscription"
        if current["customer"] is None and (subscribed or current["invoice_creation"]["enabled"]):
            buyer = current["customer_details"]
            current["customer"] = self._new_customer(buyer["email"], buyer["name"])
        cleared = current["payment_status"] == "paid"
        if subscribed:
            self._subscribe(current)
        elif current["amount_total"]:
            current["payment_intent"] = self._take_payment(
                current["amount_total"],
                current["currency"],
                customer=current["customer"],
                method=_method(current),
                invoice=self._reserve_invoice(current),
                cleared=cleared,
            )
            if cleared:
                self._invoice_order(current)

    def _subscribe(self, current: Object) -> None:
        """Begin a subscription; the session pays its first invoice."""
        subscription, customer = self._chance.id("sub"), current["customer"]
        currency, total = current["currency"], current["amount_total"]
        self._subscriptions[subscription] = (customer, total, currency)
        invoice = self._draft(
            customer, total, currency, subscription=subscription, billing_reason="subscription_create"
        )
        # What the buyer saw is what the buyer pays: the page has shown the price without the balance.
        self._finalize(invoice, use_balance=False)
        if total:
            cleared = current["payment_status"] == "paid"
            intent = self._take_payment(
                total,
                currency,
                customer=customer,
                method=_method(current),
                invoice=invoice,
                intent=self._intents[invoice],
                cleared=cleared,
            )
            if cleared:
                self._settle(invoice, intent)
        current["subscription"], current["invoice"] = subscription, invoice

    def _reserve_invoice(self, current: Object) -> str | None:
        """Return the id of the invoice that is to be made of a payment; its charge knew it, before basil."""
        if not current["invoice_creation"]["enabled"]:
            return None
        invoice = self._reserved[current["id"]] = self._chance.id("in")
        return invoice

    def _invoice_order(self, current: Object) -> None:
        """Make the invoice of a session that has been paid, where it is to have one. It uses no balance."""
        invoice = self._reserved.get(current["id"])
        if invoice is None:
            return
        total, intent = current["amount_total"], current["payment_intent"]
        tax = current["total_details"]["amount_tax"]
        self._draft(current["customer"], total - tax, current["currency"], tax=tax, invoice=invoice)
        self._finalize(invoice, use_balance=False, intent=intent)
        self._settle(invoice, intent)
        current["invoice"] = invoice

    def _clear_order(self, current: Object) -> None:
        if current["mode"] == "subscription":
            intent = self._intents[current["invoice"]]
            self._clear_payment(intent)
            self._settle(current["invoice"], intent)
        else:
            self._clear_payment(current["payment_intent"])
            self._invoice_order(current)

    def _fail_order(self, current: Object) -> None:
        if current["mode"] == "subscription":
            self._fail_payment(self._intents[current["invoice"]])
            self._report_failure(current["invoice"])
        else:
            self._fail_payment(current["payment_intent"])

    # What may happen when.

    def _link(self, link: str) -> Object:
        return self._find("payment_link", link)

    def _session(self, session: str) -> Object:
        return self._find("checkout.session", session)

    def _require_status(self, session: str, status: str, wish: str) -> dict[str, Any]:
        current = self._session(session)
        if current["status"] != status:
            raise TransitionError(
                f'Only Checkout Sessions with a status in ["{status}"] can be {wish}. '
                f"This Checkout Session has a status of `{current['status']}`."
            )
        return current

    def _require_processing(self, session: str) -> dict[str, Any]:
        current = self._session(session)
        if self.expected_status(session) != "processing":
            raise TransitionError(f"{session} is {self.expected_status(session)}, no payment is processing")
        return current


def _method(current: Object) -> str:
    """Return how a session is paid: by card, or where that takes its time by a debit of a bank account."""
    if current["payment_status"] == "paid":
        return "card"
    return "us_bank_account" if current["currency"] == "usd" else "sepa_debit"
