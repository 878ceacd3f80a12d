"""What is sent and folded: the events of a sandbox shop, as bodies, as deliveries and as requests ready to be sent."""

import hashlib
import time
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Final

import msgspec
from msgspec import Struct
from sqlalchemy import Engine

from deploy.sandbox.account import START, Account
from deploy.sandbox.history import stream_shop
from deploy.sandbox.signing import sign
from schemas import database, events, inbox
from schemas.inbox import RECORD_ROWS_MAX, Delivery
from worker.logs.writer import form_of, writing

ACCOUNT: Final = "acct_bench"
PATH: Final = "/webhooks/stripe"
SHOP_INVOICES: Final = 100
INVOICE_NOTES: Final = 8
NOTE_AMOUNT: Final = 500
SHOP_ORDERS: Final = 5_000
SHOP_SECONDS: Final = 4 * SHOP_ORDERS
"""How long the visits of one shop take. A history is shop after shop, since a shop remembers all of its objects."""


def history(seed: int, *, payments: bool, first_shop: int = 0) -> Iterator[bytes]:
    """Yield the bodies of events without end, the same for the same *seed*; *first_shop* skips the shops before it.

    With *payments* they are mixed, and else of checkout sessions and payment links alone.
    """
    for shop in shops(seed, payments=payments, first_shop=first_shop):
        yield from shop


def thinned(bodies: Iterable[bytes]) -> Iterator[bytes]:
    """Yield *bodies* without the white space that Stripe puts between values, which is a third of them."""
    return (msgspec.json.format(body, indent=-1) for body in bodies)


def shops(seed: int, *, payments: bool, first_shop: int = 0) -> Iterator[Iterator[bytes]]:
    """Yield the shops of a history one after the other, each with its bodies."""
    number = first_shop
    while True:
        own_seed = seed * 1_000_003 + number
        start = START + number * SHOP_SECONDS
        account = Account(seed=own_seed, account=ACCOUNT, start=start, payments=payments)
        yield (event.body for event in stream_shop(account, own_seed, SHOP_ORDERS))
        number += 1


def credit_notes(seed: int) -> Iterator[bytes]:
    """Yield the bodies of events of credit notes alone, without end; each fourth note is voided, at once."""
    number = 0
    while True:
        shop = Account(seed=seed * 1_000_003 + number, account=ACCOUNT, start=START + number * SHOP_SECONDS)
        for _ in range(SHOP_INVOICES):
            _credit(shop)
            yield from (event.body for event in shop.take_events() if event.type.startswith("credit_note."))
        number += 1


def _credit(shop: Account) -> None:
    """Issue credit notes of a new open invoice, which is worth more than all of them."""
    invoice = shop.create_invoice(shop.create_customer(), INVOICE_NOTES * NOTE_AMOUNT + 1, currency="usd")
    shop.finalize_invoice(invoice)
    notes = [shop.issue_credit_note(invoice, NOTE_AMOUNT) for _ in range(INVOICE_NOTES)]
    for note in notes[::4]:
        shop.void_credit_note(note)


def take(bodies: Iterator[bytes], count: int) -> list[bytes]:
    """Return the next *count* of *bodies*."""
    return list(islice(bodies, count))


def deliveries(bodies: Iterable[bytes]) -> list[Delivery]:
    """Return *bodies* as the webhook would record them now."""
    now = datetime.now(UTC)
    return [
        Delivery(
            envelope=(envelope := events.read(body)),
            account=envelope.account or ACCOUNT,
            sha256=hashlib.sha256(body).digest(),
            signature=None,
            source="webhook",
            received_at=now,
        )
        for body in bodies
    ]


def record(engine: Engine, bodies: Iterable[bytes]) -> int:
    """Record *bodies* without waking a worker, and return how many there were."""
    waiting, count = iter(bodies), 0
    while chunk := take(waiting, RECORD_ROWS_MAX):
        with database.transaction(engine) as connection, database.cursor(connection) as cursor:
            inbox.record(cursor, deliveries(chunk))
        count += len(chunk)
    return count


def write_log(path: Path, bodies: Iterable[bytes]) -> None:
    """Write *bodies* as a log at *path*, a line each."""
    with writing(path, form_of(path)) as stream:
        stream.writelines(body + b"\n" for body in thinned(bodies))


class _Id(Struct):
    id: str


_decode_id: Final = msgspec.json.Decoder(_Id).decode


def id_of(body: bytes) -> str:
    """Return the id of the event in *body*."""
    return _decode_id(body).id


def write_requests(path: Path, bodies: Sequence[bytes], *, secret: str) -> None:
    """Write *bodies* as signed requests, each behind its length in bytes and a line break."""
    now = int(time.time())  # a signature is good for five minutes
    with path.open("wb") as file:
        for body in bodies:
            head = (
                f"POST {PATH} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json; charset=utf-8\r\n"
                f"Stripe-Signature: {sign(body, secret, now)}\r\nContent-Length: {len(body)}\r\n\r\n"
            ).encode()
            file.write(b"%d\n%b%b\n" % (len(head) + len(body), head, body))


def read_requests(path: Path) -> Iterator[bytes]:
    """Yield the requests that ``write_requests`` wrote."""
    with path.open("rb") as file:
        while size := file.readline():
            yield file.read(int(size))
            file.read(1)
