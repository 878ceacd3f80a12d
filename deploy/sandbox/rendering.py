"""The same event at another API version, or under another id.

Every webhook endpoint may pin a version of its own, so one change reaches different receivers in different shapes.
:data:`DRIFTS` lists how a version differs from the one before; an older rendering undoes them from the newest on.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Any, Final

from deploy.sandbox.chance import Chance
from deploy.sandbox.journal import Event, body_of

_UI_MODES_BEFORE_DAHLIA: Final = {"hosted_page": "hosted", "embedded_page": "embedded", "elements": "custom"}


@dataclass(frozen=True, slots=True)
class Drift:
    """What changed about one kind of object with one version, and how to undo it."""

    since: str
    """The first version with the new shape, as its date (versions sort by nothing else)."""
    object_type: str
    undo: Callable[[dict[str, Any]], None]
    """Turns an object, or the part of one that ``previous_attributes`` holds, into the older shape in place."""


def render(event: Event, api_version: str) -> Event:
    """Return *event* as an endpoint pinned to *api_version*, the same or an older one, receives it.

    Raises:
        ValueError: the version is newer than the event's; what a newer version adds cannot be known.
    """
    if _date(api_version) > _date(event.api_version):
        raise ValueError(f"{event.id} was rendered at {event.api_version}, which is older than {api_version}")
    payload = event.payload()
    undone = [drift for drift in DRIFTS if _date(api_version) < drift.since <= _date(event.api_version)]
    parts = [payload["data"]["object"]]
    if payload["data"].get("previous_attributes"):
        parts.append(payload["data"]["previous_attributes"])
    object_type = payload["data"]["object"].get("object")
    for drift in undone:
        if drift.object_type == "event":
            drift.undo(payload)
        elif drift.object_type == object_type:
            for part in parts:
                drift.undo(part)
    payload["api_version"] = api_version
    return replace(event, api_version=api_version, body=body_of(payload))


def twin(event: Event, *, seed: int = 0) -> Event:
    """Return another Event object for the same change: a new id, and all else the same.

    Stripe makes these rarely, and says so in https://docs.stripe.com/webhooks#handle-duplicate-events.
    """
    new_id = Chance(f"twin {seed} {event.id}").event_id()
    # The event's id is the first value in the body.
    return replace(event, id=new_id, body=event.body.replace(event.id.encode(), new_id.encode(), 1))


def _date(api_version: str) -> str:
    return api_version[:10]


def _without(*keys: str) -> Callable[[dict[str, Any]], None]:
    def undo(part: dict[str, Any]) -> None:
        for key in keys:
            part.pop(key, None)

    return undo


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
    """Tell adaptive pricing as before basil: amounts in the buyer's currency, the shop's in a conversion."""
    presentment = session.pop("presentment_details", None)
    if presentment is None or "amount_total" not in session:
        return  # not shown in another currency, or only a part of a session
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


# Newest first: each undoing finds the shape that the one before it left.
DRIFTS: Final = (
    Drift("2026-09-30", "checkout.session", _without("allowed_payment_method_types")),
    Drift("2026-03-25", "checkout.session", _name_ui_modes_as_before_dahlia),
    Drift("2025-12-15", "checkout.session", _without("customer_account")),
    Drift("2025-04-30", "event", _without("context")),
    Drift("2025-03-31", "checkout.session", _lift_shipping_details),
    Drift("2025-03-31", "checkout.session", _convert_currency),
    Drift("2025-02-24", "checkout.session", _without("collected_information")),
)
