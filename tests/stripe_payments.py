"""Payments as Stripe reports them, written out by hand: sessions, charges, refunds, disputes and cancellations.

Ids end in ``@``, which stands for the history that they belong to, so that one history can arrive in every order within
one database. The fields are those of Stripe's API reference (its pages "The Event object", "The Checkout Session
object", "The Charge object", "The Refund object", "The Dispute object", "The PaymentIntent object").
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import permutations, zip_longest
from math import factorial
from typing import Any, Final

from sqlalchemy import Engine

from deploy.local.services import Services
from schemas import database
from tests import envelopes, ledger
from tests.web import migrated_database

Body = dict[str, Any]

ENDIVE: Final = envelopes.NEWEST
T: Final = 1_700_000_000


def event(
    id_: str,
    type_: str,
    created: int,
    object_: Body,
    *,
    version: str = ENDIVE,
    previous: Body | None = None,
    account: str | None = None,
    livemode: bool = False,
) -> bytes:
    """Return the delivery of an event, which Stripe created *created* seconds after ``T``."""
    return envelopes.event(
        id_, type_, T + created, object_, version=version, before=previous, account=account, livemode=livemode
    )


def session(id_: str = "cs@", /, **fields: object) -> Body:
    """Return a session that was completed and paid by a delayed method or by a capture."""
    return {
        "id": id_,
        "object": "checkout.session",
        "amount_subtotal": 5000,
        "amount_total": 5000,
        "client_reference_id": "cart@",
        "created": T,
        "currency": "usd",
        "customer": None,
        "expires_at": T + 86_400,
        "invoice": None,
        "livemode": False,
        "metadata": {},
        "mode": "payment",
        "payment_intent": "pi@",
        "payment_link": None,
        "payment_status": "paid",
        "recovered_from": None,
        "status": "complete",
        "subscription": None,
        "total_details": {"amount_discount": 0, "amount_shipping": 0, "amount_tax": 0},
        "url": None,
        **fields,
    }


def charge(id_: str = "ch@", /, **fields: object) -> Body:
    """Return a charge of 5000 that succeeded, was captured in whole, and was not refunded."""
    return {
        "id": id_,
        "object": "charge",
        "amount": 5000,
        "amount_captured": 5000,
        "amount_refunded": 0,
        "captured": True,
        "created": T + 9,
        "currency": "usd",
        "disputed": False,
        "livemode": False,
        "metadata": {},
        "paid": True,
        "payment_intent": "pi@",
        "refunded": False,
        "status": "succeeded",
        **fields,
    }


def hold(id_: str = "ch@", /, **fields: object) -> Body:
    """Return a charge that was authorized and not captured, as ``capture_method=manual`` makes it."""
    return charge(id_, captured=False, amount_captured=0, **fields)


def released(id_: str = "ch@", /, **fields: object) -> Body:
    """Return a charge with a released hold: refunded in whole without a capture."""
    return hold(id_, amount_refunded=5000, refunded=True, **fields)


def refund(id_: str = "re@", /, *, created: int, **fields: object) -> Body:
    """Return a refund of 1500 that succeeded; the object has no ``livemode``."""
    return {
        "id": id_,
        "object": "refund",
        "amount": 1500,
        "charge": "ch@",
        "created": T + created,
        "currency": "usd",
        "metadata": {},
        "payment_intent": "pi@",
        "reason": "requested_by_customer",
        "status": "succeeded",
        **fields,
    }


def dispute(id_: str = "du@", /, **fields: object) -> Body:
    """Return a dispute about 1000 that waits for the shop's answer."""
    return {
        "id": id_,
        "object": "dispute",
        "amount": 1000,
        "charge": "ch@",
        "created": T + 2000,
        "currency": "usd",
        "livemode": False,
        "metadata": {},
        "payment_intent": "pi@",
        "reason": "fraudulent",
        "status": "needs_response",
        **fields,
    }


def canceled_intent(id_: str = "pi@", /, *, at: int, **fields: object) -> Body:
    """Return a payment intent that was canceled *at* seconds after ``T``."""
    return {
        "id": id_,
        "object": "payment_intent",
        "amount": 5000,
        "canceled_at": T + at,
        "cancellation_reason": "abandoned",
        "created": T + 8,
        "currency": "usd",
        "livemode": False,
        "metadata": {},
        "status": "canceled",
        **fields,
    }


@contextmanager
def arrived_in_every_order(
    services: Services, histories: Mapping[str, Sequence[bytes]], *first: bytes
) -> Iterator[Engine]:
    """Yield a database that took in each history once for every order of its events, as objects of their own.

    The arrivals go side by side, one event of each at a time; the events *first* come before, in every arrival.
    """
    with migrated_database(services) as database_url:
        engine = database.engine(database_url)
        _arrive(engine, histories, first)
        yield engine
        engine.dispose()


def _arrive(engine: Engine, histories: Mapping[str, Sequence[bytes]], first: Sequence[bytes]) -> None:
    arrivals = [
        [named(body, name, number) for body in (*first, *order)]
        for name, bodies in histories.items()
        for number, order in enumerate(permutations(bodies))
    ]
    for step in zip_longest(*arrivals):
        ledger.record(engine, [ledger.delivery(body) for body in step if body is not None])
        ledger.fold(engine)


@contextmanager
def arrived_in_every_way(services: Services, histories: Mapping[str, Sequence[bytes]]) -> Iterator[Engine]:
    """Yield a database that took in each history once for each of its ``ways``, as objects of their own.

    The arrivals go side by side, one batch of each at a time, which are folded together.
    """
    arrivals = [
        [[named(body, name, number) for body in batch] for batch in batches]
        for name, bodies in histories.items()
        for number, batches in enumerate(ledger.splits(bodies))
    ]
    with migrated_database(services) as database_url:
        engine = database.engine(database_url)
        for step in zip_longest(*arrivals, fillvalue=()):
            together = [ledger.delivery(body) for batch in step for body in batch]
            ledger.record(engine, together)
            ledger.fold(engine, limit=len(together))
        yield engine
        engine.dispose()


def ways(name: str, bodies: Sequence[bytes]) -> Iterator[tuple[str, list[list[bytes]]]]:
    """Yield the ways in which a history may arrive, each as the suffix of its ids and its batches in order."""
    for number, batches in enumerate(ledger.splits(bodies)):
        yield suffix(name, number), batches


def named(body: bytes, name: str, number: int = 0) -> bytes:
    """Return *body* with the ids of the arrival *number* of the history *name*."""
    return body.replace(b"@", suffix(name, number).encode())


def suffix(name: str, number: int = 0) -> str:
    """Return the suffix of the ids in the arrival *number* of the history *name*; 0 is the order as written."""
    return f".{name}.{number}"


def suffixes(name: str, bodies: Sequence[bytes]) -> Iterator[str]:
    """Yield the suffix of the ids of every arrival of a history."""
    return (suffix(name, number) for number in range(factorial(len(bodies))))
