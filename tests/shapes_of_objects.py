"""Stripe's objects at random, in every shape that its versions gave them, written from its API reference.

No two values of an object are equal, so that a value read from the wrong place is noticed. Money adds up where Stripe
adds it up. Fields that the reference calls nullable are null in some objects; expandable fields are ids, or whole
objects in an answer. The names of the shapes are the API versions that first had them.
"""

import random
from collections.abc import Callable, Sequence
from typing import Any, Final, TypeAlias

Body: TypeAlias = dict[str, Any]

T: Final = 1_600_000_000
CURRENCIES: Final = ("usd", "eur", "jpy", "kwd")
BASIL, BASIL_MAY, ENDIVE = "2025-03-31.basil", "2025-05-28.basil", "2026-10-28.endive"


class Chance(random.Random):
    """A source of values, of which no two are equal."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.taken = 0

    def number(self) -> int:
        """Return a number that is not small, and was not returned before."""
        self.taken += 1
        return self.taken * 1000 + self.randrange(1, 1000)

    def id_(self, prefix: str) -> str:
        """Return a new id."""
        return f"{prefix}_{self.number()}"

    def at(self) -> int:
        """Return a new time."""
        return T + self.number()

    def text(self) -> str:
        """Return a new text that is not all ASCII, and may have half a surrogate pair."""
        return self.choice(("Zoë ☕", "cut \ud83c")) + str(self.number())

    def flag(self) -> bool:
        """Return true or false."""
        return self.random() < 0.5

    def currency(self) -> str:
        """Return the code of a currency."""
        return self.choice(CURRENCIES)

    def maybe(self, value: Any) -> Any:  # noqa: ANN401 - any JSON
        """Return *value*, or null."""
        return value if self.flag() else None

    def metadata(self) -> Any:  # noqa: ANN401 - an object, or PHP's form of an empty one
        """Return metadata, as sent or as written again by PHP."""
        return self.choice(({}, [], {"cart": self.text(), "note": self.text()}))

    def reference(self, prefix: str, kind: str, *, expanded: bool) -> Any:  # noqa: ANN401 - an id or an object
        """Return a nullable reference to an object of the type *kind*, sometimes the whole object if *expanded*."""
        id_ = self.id_(prefix)
        whole = {"id": id_, "object": kind, "created": self.at(), "amount": self.number(), "status": self.text()}
        return self.maybe(whole if expanded and self.flag() else id_)

    def recipient(self) -> Body:
        """Return a name and an address."""
        parts = ("city", "country", "line1", "line2", "postal_code", "state")
        return {"address": {part: self.maybe(self.text()) for part in parts}, "name": self.text()}


Shape: TypeAlias = Callable[[Chance], tuple[str, str | None, Body]]
"""Returns a type of event, the API version (null for an answer, which is an observation) and the object."""


def observed(body: Body) -> tuple[str, None, Body]:
    """Return *body* as an answer of the newest version."""
    return f"payfold.{body['object']}.observed", None, body


def _list_of(chance: Chance, items: Sequence[Body], *, whole: bool) -> Body:
    return {"object": "list", "data": list(items), "has_more": not whole, "url": f"/v1/{chance.number()}"}


# ---- Checkout ----


def _session(chance: Chance, *, expanded: bool = False) -> Body:
    """Return the fields that every version since 2021 has."""
    status, payment_status = chance.choice((("open", "unpaid"), ("complete", "paid"), ("expired", "unpaid")))
    return {
        "id": chance.id_("cs"),
        "object": "checkout.session",
        "after_expiration": chance.choice(
            (None, {"recovery": None}, {"recovery": {"enabled": True, "url": chance.text(), "expires_at": chance.at()}})
        ),
        "amount_subtotal": chance.number(),
        "amount_total": chance.number(),
        "client_reference_id": chance.maybe(chance.text()),
        "created": chance.at(),
        "currency": "usd",
        "customer": chance.reference("cus", "customer", expanded=expanded),
        "customer_details": chance.choice((None, {"email": None}, {"email": chance.text(), "name": chance.text()})),
        "customer_email": chance.maybe(chance.text()),
        "expires_at": chance.at(),
        "invoice": chance.reference("in", "invoice", expanded=expanded),
        "livemode": False,
        "metadata": chance.metadata(),
        "mode": chance.choice(("payment", "subscription")),
        "payment_intent": chance.reference("pi", "payment_intent", expanded=expanded),
        "payment_link": chance.reference("plink", "payment_link", expanded=expanded),
        "payment_status": payment_status,
        "recovered_from": chance.maybe(chance.id_("cs")),
        "shipping_cost": {"amount_subtotal": chance.number(), "amount_tax": chance.number(), "amount_total": 7},
        "status": status,
        "subscription": chance.reference("sub", "subscription", expanded=expanded),
        "total_details": chance.maybe(
            {
                "amount_discount": chance.number(),
                "amount_shipping": chance.maybe(chance.number()),
                "amount_tax": chance.number(),
            }
        ),
    }


_KINDS_OF_SESSIONS: Final = {
    "open": "payfold.checkout.session.registered",
    "complete": "checkout.session.completed",
    "expired": "checkout.session.expired",
}


def session_of_endive(chance: Chance) -> tuple[str, str | None, Body]:
    """Return a session as in events: shipping in collected_information, amounts in the shop's currency."""
    newer = {
        "collected_information": chance.choice(
            (None, {"shipping_details": None}, {"shipping_details": chance.recipient()})
        ),
        "presentment_details": {"presentment_amount": chance.number(), "presentment_currency": "krw"},
    }
    body = {**_session(chance), **newer}
    if chance.flag():
        del body["presentment_details"]
    return _KINDS_OF_SESSIONS[body["status"]], ENDIVE, body


def session_answer(chance: Chance) -> tuple[str, str | None, Body]:
    """Return a session as Stripe answers it, expanded and with its lines."""
    lines = [
        {
            "id": chance.id_("li"),
            "object": "item",
            "amount_discount": chance.number(),
            "amount_subtotal": chance.number(),
            "amount_tax": chance.number(),
            "amount_total": chance.number(),
            "currency": chance.currency(),
            "description": chance.maybe(chance.text()),
            "price": chance.maybe(
                {"id": chance.id_("price"), "object": "price", "product": chance.choice((chance.id_("prod"), product))}
            ),
            "quantity": chance.maybe(chance.number()),
        }
        for product in ({"id": chance.id_("prod"), "object": "product", "name": chance.text()} for _ in range(3))
    ]
    page = _list_of(chance, lines, whole=chance.random() < 0.8)
    return observed({**_session(chance, expanded=True), "collected_information": None, "line_items": page})


def session_of_2022(chance: Chance) -> tuple[str, str | None, Body]:
    """Return a session before basil: shipping at its top, in the buyer's currency where there was a conversion."""
    conversion = {
        "amount_subtotal": chance.number(),
        "amount_total": chance.number(),
        "fx_rate": "1.37",
        "source_currency": "cad",
    }
    name, version = chance.choice((("shipping_details", "2022-08-01"), ("shipping", "2020-08-27")))
    shipping = chance.maybe({**chance.recipient(), "carrier": chance.maybe("post"), "phone": None})
    body = {**_session(chance), name: shipping}
    if version == "2022-08-01":
        body["currency_conversion"] = chance.maybe(conversion)
    return _KINDS_OF_SESSIONS[body["status"]], version, body


def session_of_acacia(chance: Chance) -> tuple[str, str | None, Body]:
    """Return a session of the one version that has shipping in both places."""
    shipping = chance.maybe(chance.recipient())
    both = {"collected_information": {"shipping_details": shipping}, "shipping_details": shipping}
    body = {**_session(chance), **both, "currency_conversion": None}
    return _KINDS_OF_SESSIONS[body["status"]], "2025-02-24.acacia", body


def session_of_2019(chance: Chance) -> tuple[str, str | None, Body]:
    """Return a session without amounts, states and times."""
    keys = ("id", "object", "client_reference_id", "customer", "customer_email", "livemode", "metadata", "mode")
    body = _session(chance)
    kept = {key: body[key] for key in (*keys, "payment_intent", "subscription")}
    kept["metadata"] = {}
    return "checkout.session.completed", "2019-05-16", {**kept, "display_items": [], "shipping": None}


def payment_link(chance: Chance) -> tuple[str, str | None, Body]:
    """Return a payment link."""
    body = {
        "id": chance.id_("plink"),
        "object": "payment_link",
        "active": chance.flag(),
        "currency": chance.currency(),
        "livemode": False,
        "metadata": chance.metadata(),
        "url": chance.text(),
    }
    return chance.choice((("payment_link.updated", ENDIVE, body), observed(body)))


# ---- Customers ----


def customer(chance: Chance) -> tuple[str, str | None, Body]:
    """Return a customer; its balance had another name until 2019-10-17."""
    balance, version = chance.choice((("balance", ENDIVE), ("account_balance", "2017-08-15")))
    body = {
        "id": chance.id_("cus"),
        "object": "customer",
        balance: chance.choice((-1, 1)) * chance.number(),
        "created": chance.at(),
        "currency": chance.maybe(chance.currency()),
        "delinquent": chance.flag(),
        "email": chance.maybe(chance.text()),
        "livemode": False,
        "metadata": chance.metadata(),
        "name": chance.maybe(chance.text()),
        "test_clock": chance.maybe(chance.id_("clock")),
    }
    return chance.choice((("customer.updated", version, body), observed(body)))


def deleted_customer(chance: Chance) -> tuple[str, str | None, Body]:
    """Return the tombstone of a customer."""
    return observed({"id": chance.id_("cus"), "object": "customer", "deleted": True})


def balance_transaction(chance: Chance) -> tuple[str, str | None, Body]:
    """Return a row of a customer's credit ledger, which no event carries."""
    return observed(
        {
            "id": chance.id_("cbtxn"),
            "object": "customer_balance_transaction",
            "amount": -chance.number(),
            "checkout_session": chance.reference("cs", "checkout.session", expanded=True),
            "created": chance.at(),
            "credit_note": chance.reference("cn", "credit_note", expanded=True),
            "currency": chance.currency(),
            "customer": chance.id_("cus"),
            "description": chance.maybe(chance.text()),
            "ending_balance": chance.number(),
            "invoice": chance.reference("in", "invoice", expanded=True),
            "livemode": False,
            "metadata": None,
            "type": chance.choice(("adjustment", "credit_note", "applied_to_invoice", "not_known_yet")),
        }
    )


# ---- Invoices ----


def _invoice(chance: Chance, *, expanded: bool = False) -> Body:
    return {
        "id": chance.id_("in"),
        "object": "invoice",
        "amount_due": chance.number(),
        "amount_paid": chance.number(),
        "amount_remaining": chance.number(),
        "created": chance.at(),
        "currency": chance.currency(),
        "customer": chance.reference("cus", "customer", expanded=expanded),
        "ending_balance": chance.maybe(chance.number()),
        "livemode": False,
        "number": chance.maybe(chance.text()),
        "post_payment_credit_notes_amount": chance.number(),
        "pre_payment_credit_notes_amount": chance.number(),
        "starting_balance": -chance.number(),
        "status": chance.choice(("draft", "open", "uncollectible")),
        "status_transitions": {
            "finalized_at": chance.maybe(chance.at()),
            "marked_uncollectible_at": chance.maybe(chance.at()),
            "paid_at": None,
            "voided_at": None,
        },
        "total": chance.number(),
    }


def _ended(chance: Chance, invoice: Body) -> Body:
    """Return *invoice* as it is, paid or voided, with the time of that."""
    status, moment = chance.choice((("paid", "paid_at"), ("void", "voided_at"), (invoice["status"], None)))
    transitions = {**invoice["status_transitions"], **({moment: chance.at()} if moment else {})}
    return {**invoice, "status": status, "status_transitions": transitions}


def invoice_of_endive(chance: Chance) -> tuple[str, str | None, Body]:
    """Return an invoice as events show it."""
    parent = chance.choice(
        (
            None,
            {"type": "quote_details", "quote_details": {"quote": chance.id_("qt")}, "subscription_details": None},
            {"type": "subscription_details", "subscription_details": {"subscription": chance.id_("sub")}},
        )
    )
    body = {**_ended(chance, _invoice(chance)), "amount_overpaid": chance.number(), "parent": parent}
    return "invoice.updated", ENDIVE, body


def invoice_answer(chance: Chance) -> tuple[str, str | None, Body]:
    """Return an invoice as Stripe answers it, expanded and with its payments."""
    body = {**_ended(chance, _invoice(chance, expanded=True)), "amount_overpaid": chance.number()}
    subscription = chance.reference("sub", "subscription", expanded=True)
    parent = chance.maybe({"type": "subscription_details", "subscription_details": {"subscription": subscription}})
    payments = [_invoice_payment(chance, body["id"]) for _ in range(2)]
    return observed({**body, "parent": parent, "payments": _list_of(chance, payments, whole=True)})


def invoice_before_basil(chance: Chance) -> tuple[str, str | None, Body]:
    """Return an invoice that names its subscription, payment intent and charge itself."""
    names = {"subscription": "sub", "payment_intent": "pi", "charge": "ch"}
    references = {name: chance.maybe(chance.id_(prefix)) for name, prefix in names.items()}
    return "invoice.updated", "2022-11-15", {**_ended(chance, _invoice(chance)), **references, "paid": False}


def invoice_of_2018(chance: Chance) -> tuple[str, str | None, Body]:
    """Return an invoice of 2018-11-08: when it was created is called its date, when it was finalized is at its top."""
    body = _invoice(chance)
    created, transitions = body.pop("created"), body.pop("status_transitions")
    older = {"date": created, "finalized_at": transitions["finalized_at"], "subscription": chance.maybe("sub_2018")}
    return "invoice.updated", "2018-11-08", {**body, **older}


def deleted_invoice(chance: Chance) -> tuple[str, str | None, Body]:
    """Return the tombstone of a draft."""
    return observed({"id": chance.id_("in"), "object": "invoice", "deleted": True})


def _invoice_payment(chance: Chance, invoice: str) -> Body:
    kind, prefix = chance.choice((("payment_intent", "pi"), ("charge", "ch")))
    is_paid = chance.flag()
    return {
        "id": chance.id_("inpay"),
        "object": "invoice_payment",
        "amount_paid": chance.number() if is_paid else None,
        "amount_requested": chance.number(),
        "created": chance.at(),
        "currency": chance.currency(),
        "invoice": invoice,
        "is_default": chance.flag(),
        "livemode": False,
        "payment": {"type": kind, kind: chance.id_(prefix)},
        "status": "paid" if is_paid else chance.choice(("open", "canceled")),
        "status_transitions": {"canceled_at": None, "paid_at": chance.at() if is_paid else None},
    }


def invoice_payment(chance: Chance) -> tuple[str, str | None, Body]:
    """Return the payment of an invoice."""
    body = _invoice_payment(chance, chance.id_("in"))
    return ("invoice_payment.paid", ENDIVE, body) if body["status"] == "paid" else observed(body)


# ---- Credit notes ----


def _credit_note(chance: Chance, *, expanded: bool = False) -> Body:
    status = chance.choice(("issued", "void"))
    return {
        "id": chance.id_("cn"),
        "object": "credit_note",
        "created": chance.at(),
        "currency": chance.currency(),
        "customer": chance.id_("cus"),
        "customer_balance_transaction": None,
        "discount_amount": chance.number(),
        "effective_at": chance.maybe(chance.at()),
        "invoice": chance.reference("in", "invoice", expanded=expanded),
        "lines": _lines_of_note(chance),
        "livemode": False,
        "memo": chance.maybe(chance.text()),
        "number": chance.text(),
        "out_of_band_amount": chance.maybe(chance.number()),
        "reason": chance.maybe("duplicate"),
        "status": status,
        "voided_at": chance.at() if status == "void" else None,
    }


def _lines_of_note(chance: Chance) -> Body:
    lines: list[Body] = [
        {
            "id": chance.id_("cnli"),
            "object": "credit_note_line_item",
            "amount": chance.number(),
            "description": chance.maybe(chance.text()),
            "discount_amount": chance.number(),
            "livemode": False,
            "quantity": chance.maybe(chance.number()),
            "type": chance.choice(("invoice_line_item", "custom_line_item")),
            "unit_amount": chance.number(),
        }
        for _ in range(2)
    ]
    lines[0]["invoice_line_item"] = chance.id_("il")
    return _list_of(chance, lines, whole=chance.flag())


def _refunded(chance: Chance) -> Body:
    by_record = {"amount_refunded": chance.number(), "refund": None, "type": "payment_record_refund"}
    return chance.choice(
        ({"amount_refunded": chance.number(), "refund": chance.id_("re"), "type": "refund"}, by_record)
    )


def credit_note_of_endive(chance: Chance) -> tuple[str, str | None, Body]:
    """Return a credit note with post-payment parts that add up: refunds, out of band, and the customer's balance."""
    body = _credit_note(chance)
    refunds = [_refunded(chance) for _ in range(chance.randrange(3))]
    to_balance = chance.choice((0, chance.number()))
    pre = chance.choice((0, chance.number()))
    post = sum(each["amount_refunded"] for each in refunds) + (body["out_of_band_amount"] or 0) + to_balance
    body |= {"amount": pre + post, "pre_payment_amount": pre, "post_payment_amount": post, "refunds": refunds}
    body["type"] = "mixed" if pre and post else "pre_payment" if pre else "post_payment"
    body["customer_balance_transaction"] = chance.id_("cbtxn") if to_balance else None
    return chance.choice((("credit_note.updated", ENDIVE, body), observed(body)))


def credit_note_of_march(chance: Chance) -> tuple[str, str | None, Body]:
    """Return a credit note of the first basil version, which lists its refunds and not its parts."""
    refunds = [{"amount_refunded": chance.number(), "refund": chance.id_("re")}]
    body = {**_credit_note(chance), "amount": refunds[0]["amount_refunded"], "type": "post_payment", "refunds": refunds}
    return "credit_note.updated", BASIL, {**body, "out_of_band_amount": None}


def credit_note_before_basil(chance: Chance) -> tuple[str, str | None, Body]:
    """Return a credit note that names one refund and no amount of it."""
    older = {"amount": chance.number(), "type": "post_payment", "refund": chance.maybe(chance.id_("re"))}
    body = {**_credit_note(chance), **older, "out_of_band_amount": None}
    return "credit_note.updated", "2022-11-15", body


# ---- Payments ----


def _refund(chance: Chance, *, expanded: bool = False) -> Body:
    status = chance.choice(("pending", "requires_action", "succeeded", "failed", "canceled", None))
    body = {
        "id": chance.id_("re"),
        "object": "refund",
        "amount": chance.number(),
        "charge": chance.reference("ch", "charge", expanded=expanded),
        "created": chance.at(),
        "currency": chance.currency(),
        "metadata": {},
        "payment_intent": chance.reference("pi", "payment_intent", expanded=expanded),
        "reason": chance.maybe("requested_by_customer"),
        "status": status,
    }
    return {**body, "failure_reason": "lost_or_stolen_card"} if status == "failed" else body


def refund(chance: Chance) -> tuple[str, str | None, Body]:
    """Return a refund, also by the older name of its event."""
    kind = chance.choice(("refund.created", "refund.updated", "charge.refund.updated"))
    return chance.choice(((kind, ENDIVE, _refund(chance)), observed(_refund(chance, expanded=True))))


def _charge(chance: Chance, *, expanded: bool = False) -> Body:
    return {
        "id": chance.id_("ch"),
        "object": "charge",
        "amount": chance.number(),
        "amount_captured": chance.number(),
        "amount_refunded": chance.number(),
        "captured": chance.flag(),
        "created": chance.at(),
        "currency": chance.currency(),
        "disputed": chance.flag(),
        "livemode": False,
        "paid": chance.flag(),
        "payment_intent": chance.reference("pi", "payment_intent", expanded=expanded),
        "refunded": chance.flag(),
        "status": chance.choice(("succeeded", "pending", "failed")),
    }


def charge(chance: Chance) -> tuple[str, str | None, Body]:
    """Return a charge, in an event or in an answer."""
    return chance.choice((("charge.updated", ENDIVE, _charge(chance)), observed(_charge(chance, expanded=True))))


def charge_of_2020(chance: Chance) -> tuple[str, str | None, Body]:
    """Return a charge that lists its refunds and names its invoice."""
    body = _charge(chance)
    refunds = [{**_refund(chance), "charge": body["id"]} for _ in range(2)]
    page = _list_of(chance, refunds, whole=chance.flag())
    return "charge.refunded", "2020-08-27", {**body, "invoice": chance.maybe(chance.id_("in")), "refunds": page}


def dispute(chance: Chance) -> tuple[str, str | None, Body]:
    """Return a dispute."""
    body = {
        "id": chance.id_("dp"),
        "object": "dispute",
        "amount": chance.number(),
        "charge": chance.id_("ch"),
        "created": chance.at(),
        "currency": chance.currency(),
        "livemode": False,
        "payment_intent": chance.maybe(chance.id_("pi")),
        "reason": chance.choice(("fraudulent", "general")),
        "status": chance.choice(("warning_needs_response", "needs_response", "under_review", "won", "lost")),
    }
    return chance.choice((("charge.dispute.updated", ENDIVE, body), observed(body)))


def canceled_intent(chance: Chance) -> tuple[str, str | None, Body]:
    """Return a payment intent that was canceled."""
    body = {
        "id": chance.id_("pi"),
        "object": "payment_intent",
        "amount": chance.number(),
        "canceled_at": chance.at(),
        "created": chance.at(),
        "currency": chance.currency(),
        "livemode": False,
        "status": "canceled",
    }
    return "payment_intent.canceled", ENDIVE, body


# ---- The billing portal ----


def portal_configuration(chance: Chance) -> tuple[str, str | None, Body]:
    """Return a configuration of the billing portal; it has a name since 2025-08-27."""
    body = {
        "id": chance.id_("bpc"),
        "object": "billing_portal.configuration",
        "active": chance.flag(),
        "created": chance.at(),
        "features": {"customer_update": {"allowed_updates": ["email"], "enabled": chance.flag()}},
        "is_default": chance.flag(),
        "livemode": False,
        "login_page": {"enabled": True, "url": chance.maybe(chance.text())},
        "name": chance.maybe(chance.text()),
        "updated": chance.at(),
    }
    older = {key: value for key, value in body.items() if key != "name"}
    kind = "billing_portal.configuration.updated"
    return chance.choice(((kind, ENDIVE, body), (kind, BASIL, older), observed(body)))


def portal_session(chance: Chance) -> tuple[str, str | None, Body]:
    """Return a session of the billing portal."""
    body = {
        "id": chance.id_("bps"),
        "object": "billing_portal.session",
        "configuration": chance.id_("bpc"),
        "created": chance.at(),
        "customer": chance.id_("cus"),
        "flow": chance.maybe({"type": chance.choice(("customer_update", "subscription_cancel"))}),
        "livemode": False,
        "return_url": chance.maybe(chance.text()),
    }
    return "billing_portal.session.created", ENDIVE, body


SHAPES: Final[tuple[Shape, ...]] = (
    session_of_endive,
    session_answer,
    session_of_acacia,
    session_of_2022,
    session_of_2019,
    payment_link,
    customer,
    deleted_customer,
    balance_transaction,
    invoice_of_endive,
    invoice_answer,
    invoice_before_basil,
    invoice_of_2018,
    deleted_invoice,
    invoice_payment,
    credit_note_of_endive,
    credit_note_of_march,
    credit_note_before_basil,
    refund,
    charge,
    charge_of_2020,
    dispute,
    canceled_intent,
    portal_configuration,
    portal_session,
)
"""Every shape."""
