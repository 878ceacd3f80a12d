"""The view `payment_link_funnel` counts sessions by status, per link and currency."""

from collections.abc import Sequence

from sqlalchemy import Engine

from tests.envelopes import Json, event
from tests.ledger import rows, take_in

MADE = 1_760_000_000
COMPLETED, EXPIRED, OBSERVED = (
    "checkout.session.completed",
    "checkout.session.expired",
    "payfold.checkout.session.observed",
)
FAILED = "checkout.session.async_payment_failed"

SESSION: Json = {
    "object": "checkout.session",
    "amount_subtotal": 1,
    "created": MADE,
    "currency": "usd",
    "livemode": False,
    "metadata": {},
    "mode": "payment",
    "payment_link": "plink_a",
    "payment_status": "paid",
    "status": "complete",
}
UNPAID: Json = {"payment_status": "unpaid"}
OPEN: Json = {"status": "open", **UNPAID}
GONE: Json = {"status": "expired", **UNPAID}
FREE: Json = {"payment_status": "no_payment_required"}
EURO: Json = {"currency": "eur"}
OTHER: Json = {"payment_link": "plink_b"}
SETUP: Json = {"mode": "setup", **FREE, "currency": None}

# By session: its event's type, its total, and its differences from SESSION. No total is part of another sum.
SESSIONS: Sequence[tuple[str, int | None, Json]] = (
    (OBSERVED, 1, OPEN),
    (OBSERVED, 2, OPEN),
    (OBSERVED, 4, OPEN),
    (COMPLETED, 8, UNPAID),
    (COMPLETED, 16, UNPAID),
    (COMPLETED, 32, {}),
    (COMPLETED, 64, {}),
    (COMPLETED, 0, FREE),
    (FAILED, 128, UNPAID),
    (EXPIRED, 256, GONE),
    (EXPIRED, 512, GONE),
    (COMPLETED, 1024, EURO),
    (EXPIRED, 2048, {**GONE, **EURO}),
    (COMPLETED, None, SETUP),
    (COMPLETED, 4096, OTHER),
    (OBSERVED, 8192, {**OPEN, **OTHER}),
    (COMPLETED, 16384, {"payment_link": None}),
    (COMPLETED, 32768, {"livemode": True}),
)


def test_the_funnel_of_a_payment_link(engine: Engine) -> None:
    """Every session is opened, every finished one completed, paid or not; the money is of the paid ones."""
    for number, (type_, total, fields) in enumerate(SESSIONS):
        object_ = {**SESSION, "id": f"cs_{number}", "amount_total": total, **fields}
        livemode = bool(object_["livemode"])
        take_in(engine, event(f"evt_{number}", type_, MADE + number, object_, livemode=livemode))

    columns = "livemode, payment_link, currency, opened, completed, paid, expired, amount_paid"
    found = rows(engine, f"SELECT {columns} FROM payment_link_funnel WHERE account = ''")  # noqa: S608 - our own names
    assert sorted((tuple(row.values()) for row in found), key=repr) == [
        (False, "plink_a", "eur", 2, 1, 1, 1, 1024),
        (False, "plink_a", "usd", 11, 6, 3, 2, 96),
        (False, "plink_a", None, 1, 1, 0, 0, 0),
        (False, "plink_b", "usd", 2, 1, 1, 0, 4096),
        (True, "plink_a", "usd", 1, 1, 1, 0, 32768),
    ]
