"""The same event at another API version, or under another id.

Every webhook endpoint may pin a version of its own, so one change reaches different receivers in different shapes.
:data:`DRIFTS` lists how a version differs from the one before; an older rendering undoes them from the newest on.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Any, Final

from deploy.sandbox.chance import Chance
from deploy.sandbox.journal import Event, body_of, copy_of, previous_attributes

_UI_MODES_BEFORE_DAHLIA: Final = {"hosted_page": "hosted", "embedded_page": "embedded", "elements": "custom"}


_BASIL: Final = "2025-03-31"


@dataclass(frozen=True, slots=True)
class Drift:
    """A change of one kind of object's shape by one version, and how to undo it."""

    since: str
    """The first version with the new shape, as its date (versions sort by nothing else)."""
    object_type: str
    undo: Callable[[dict[str, Any]], None]
    """Turns an object into the older shape in place."""


def render(event: Event, api_version: str) -> Event:
    """Return *event* as an endpoint pinned to *api_version*, the same or an older one, receives it.

    The object before the change is turned into the older shape too; the event's changes are the differences then.

    Raises:
        ValueError: the version is newer than the event's; what a newer version adds cannot be known.
    """
    if _date(api_version) > _date(event.api_version):
        raise ValueError(f"{event.id} was rendered at {event.api_version}, which is older than {api_version}")
    payload = event.payload()
    data = payload["data"]
    undone = [drift for drift in DRIFTS if _date(api_version) < drift.since <= _date(event.api_version)]
    linked = _date(api_version) < _BASIL <= _date(event.api_version)
    snapshots = [data["object"]]
    if data.get("previous_attributes"):
        snapshots.append(copy_of(before_change(data["object"], data["previous_attributes"])))
    for snapshot in snapshots:
        if linked:
            snapshot.update(_links(snapshot, dict(event.untold)))
        for drift in undone:
            if drift.object_type == snapshot.get("object"):
                drift.undo(snapshot)
    if len(snapshots) > 1:
        data["previous_attributes"] = previous_attributes(snapshots[1], snapshots[0])
    for drift in undone:
        if drift.object_type == "event":
            drift.undo(payload)
    payload["api_version"] = api_version
    return replace(event, api_version=api_version, body=body_of(payload))


def before_change(snapshot: Mapping[str, Any], previous: Mapping[str, Any]) -> dict[str, Any]:
    """Return an object before the change that ``previous_attributes`` describe: nested objects are partial there.

    A null value of metadata means that there was none; elsewhere a key that was absent comes out as null.
    """
    before = dict(snapshot)
    for key, value in previous.items():
        if isinstance(value, dict) and isinstance(before.get(key), dict):
            before[key] = before_change(before[key], value)
        else:
            before[key] = value
    if before.get("metadata"):
        before["metadata"] = {key: value for key, value in before["metadata"].items() if value is not None}
    return before


def twin(event: Event, *, seed: int = 0) -> Event:
    """Return another Event object for the same change: a new id, and all else the same.

    Stripe makes these rarely: https://docs.stripe.com/webhooks#handle-duplicate-events.
    """
    new_id = Chance(f"twin {seed} {event.id}", now=lambda: event.created).twin_id(event.id)
    # The event's id is the first value in the body.
    return replace(event, id=new_id, body=event.body.replace(event.id.encode(), new_id.encode(), 1))


def _date(api_version: str) -> str:
    return api_version[:10]


def _without(*keys: str) -> Callable[[dict[str, Any]], None]:
    def undo(snapshot: dict[str, Any]) -> None:
        for key in keys:
            snapshot.pop(key, None)

    return undo


def _links(snapshot: dict[str, Any], untold: dict[str, str | None]) -> dict[str, str | None]:
    """Return the links that *snapshot* had before basil; an invoice got its own one after the other."""
    if snapshot.get("object") != "invoice" or not untold:
        return untold
    return {
        "charge": untold["charge"] if snapshot["status"] == "paid" else None,
        "payment_intent": None if snapshot["status"] == "draft" else untold["payment_intent"],
    }


def _name_ui_modes_as_before_dahlia(session: dict[str, Any]) -> None:
    if "ui_mode" in session:
        session["ui_mode"] = _UI_MODES_BEFORE_DAHLIA.get(session["ui_mode"], session["ui_mode"])


def _lift_shipping_details(session: dict[str, Any]) -> None:
    """Put the shipping details to the top level, where they were before basil.

    Acacia had them in both places in its last month, so the newer one stays for now.
    """
    if "collected_information" in session:
        collected = session["collected_information"] or {}
        session["shipping_details"] = collected.get("shipping_details")


def _convert_currency(session: dict[str, Any]) -> None:
    """Show adaptive pricing as before basil: amounts in the buyer's currency, the shop's in a conversion."""
    presentment = session.pop("presentment_details", None)
    if presentment is None:
        return  # not shown in another currency
    total = session["amount_total"]
    rate = Decimal(presentment["presentment_amount"]) / Decimal(total) if total else Decimal(1)
    session["currency_conversion"] = {
        "amount_subtotal": session["amount_subtotal"],
        "amount_total": total,
        "fx_rate": f"{round(rate, 12).normalize():f}",
        "source_currency": session["currency"],
    }
    session["currency"] = presentment["presentment_currency"]
    session["amount_total"] = presentment["presentment_amount"]
    session["amount_subtotal"] = round(session["amount_subtotal"] * rate)
    for key in ("shipping_cost", "total_details"):
        session[key] = _converted(session[key], rate)


def _converted(amounts: dict[str, Any] | None, rate: Decimal) -> dict[str, Any] | None:
    if amounts is None:
        return None
    return {key: round(value * rate) if isinstance(value, int) else value for key, value in amounts.items()}


def _without_in(key: str, *keys: str) -> Callable[[dict[str, Any]], None]:
    """Return an undoing of *keys* in the object, or in the items of the array or list, that *key* holds."""

    def undo(snapshot: dict[str, Any]) -> None:
        held = snapshot[key]
        if isinstance(held, dict):
            held = held.get("data", [held])
        for part in held or []:
            for lost in keys:
                part.pop(lost, None)

    return undo


def _keep_one_type(note: dict[str, Any]) -> None:
    """Name a credit note by the state that its invoice was in, as long as there was no mixed one."""
    del note["pre_payment_amount"], note["post_payment_amount"]
    if note["type"] == "mixed":
        note["type"] = "pre_payment"


def _refund_once(note: dict[str, Any]) -> None:
    """Show a credit note as before basil: with one refund at most, and taxes by amount."""
    refunds = note.pop("refunds")
    note["refund"] = refunds[0]["refund"] if refunds else None
    note["tax_amounts"] = _tax_amounts(note.pop("total_taxes"))
    for line in note["lines"]["data"]:
        line["tax_amounts"] = _tax_amounts(line.pop("taxes"))


def _flatten_invoice(invoice: dict[str, Any]) -> None:
    """Show an invoice as before basil: whether it is paid, its subscription, and taxes by amount."""
    parent = invoice.pop("parent")
    taxes = _tax_amounts(invoice.pop("total_taxes"))
    del invoice["amount_overpaid"]
    invoice |= {
        "discount": None,
        "paid": invoice["status"] == "paid",
        "paid_out_of_band": False,
        "quote": None,
        "subscription": parent["subscription_details"]["subscription"] if parent else None,
        "tax": sum(tax["amount"] for tax in taxes) if taxes else None,
        "total_tax_amounts": taxes,
    }
    for line in invoice["lines"]["data"]:
        _flatten_line(line)


def _flatten_line(line: dict[str, Any]) -> None:
    parent = line.pop("parent")
    pricing = line.pop("pricing")
    item = parent["subscription_item_details"] or parent["invoice_item_details"]
    del line["subtotal"], line["quantity_decimal"]
    line |= {
        "invoice_item": item["invoice_item"],
        "price": {
            "id": pricing["price_details"]["price"],
            "object": "price",
            "product": pricing["price_details"]["product"],
            "unit_amount_decimal": pricing["unit_amount_decimal"],
        },
        "proration": item["proration"],
        "proration_details": item["proration_details"],
        "subscription": item["subscription"],
        "tax_amounts": _tax_amounts(line.pop("taxes")),
        "type": "subscription" if parent["subscription_item_details"] else "invoiceitem",
    }
    if parent["subscription_item_details"]:
        line["subscription_item"] = item["subscription_item"]


def _tax_amounts(taxes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            "amount": tax["amount"],
            "inclusive": tax["tax_behavior"] == "inclusive",
            "tax_rate": tax["tax_rate_details"]["tax_rate"],
            "taxability_reason": tax["taxability_reason"],
            "taxable_amount": tax["taxable_amount"],
        }
        for tax in taxes
    ]


# Newest first: each undoing finds the shape that the one before it left.
DRIFTS: Final = (
    Drift("2026-10-28", "billing_portal.configuration", _without_in("features", "subscription_pause")),
    Drift("2026-10-28", "billing_portal.session", _without("after_expiration")),
    Drift("2026-10-28", "billing_portal.session", _without_in("flow", "subscription_pause")),
    Drift("2026-09-30", "checkout.session", _without("allowed_payment_method_types")),
    Drift("2026-09-30", "invoice", _without("status_details")),
    Drift("2026-09-30", "payment_intent", _without("allowed_payment_method_types")),
    Drift("2026-08-26", "billing_portal.session", _without_in("flow", "customer_update")),
    Drift("2026-07-29", "refund", _without("customer", "customer_account", "payment_method")),
    Drift("2026-05-27", "invoice", _without("amount_paid_off_stripe")),
    Drift("2026-03-25", "checkout.session", _name_ui_modes_as_before_dahlia),
    Drift("2026-03-25", "credit_note", _without_in("lines", "metadata")),
    Drift("2025-12-15", "billing_portal.session", _without("customer_account")),
    Drift("2025-12-15", "checkout.session", _without("customer_account")),
    Drift("2025-12-15", "credit_note", _without("customer_account")),
    Drift("2025-12-15", "customer", _without("customer_account")),
    Drift("2025-12-15", "invoice", _without("customer_account")),
    Drift("2025-12-15", "payment_intent", _without("customer_account")),
    Drift("2025-10-29", "credit_note", _without_in("refunds", "type", "payment_record_refund")),
    Drift("2025-08-27", "billing_portal.configuration", _without("name")),
    Drift("2025-05-28", "credit_note", _keep_one_type),
    Drift("2025-04-30", "event", _without("context")),
    Drift("2025-04-30", "refund", _without("pending_reason")),
    Drift(_BASIL, "checkout.session", _lift_shipping_details),
    Drift(_BASIL, "checkout.session", _convert_currency),
    Drift(_BASIL, "credit_note", _refund_once),
    Drift(_BASIL, "invoice", _flatten_invoice),
    Drift("2025-02-24", "checkout.session", _without("collected_information")),
)
