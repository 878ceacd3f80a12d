"""Busy seconds of a customer: balance changes, twins and ledger reads, made without the sandbox and the folds."""

import json
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

CUSTOMER = "cus_1"
BEGAN = 1_762_000_000
"""The second, in Unix time, in which the customer is created."""

_READ = "payfold.customer_balance_transaction.observed"


@dataclass(frozen=True)
class Life:
    """The events of a customer, the balance after them, and the amounts by which it changed, in order."""

    bodies: list[bytes]
    amount: int
    changes: list[int]


def body(name: str, kind: str, at: int, about: Mapping[str, Any], before: Mapping[str, Any] | None = None) -> bytes:
    """Return an event of the type *kind* about an object, with its previous attributes where *before* has any."""
    data = {"object": about} if before is None else {"object": about, "previous_attributes": before}
    event = {"id": name, "object": "event", "type": kind, "created": at, "livemode": False, "data": data}
    return json.dumps(event).encode()


def customer(
    event: str,
    at: int,
    balance: int,
    before: Mapping[str, Any] | None = None,
    **fields: Any,  # noqa: ANN401 - JSON values
) -> bytes:
    """Return an *event* of a customer *at* so many seconds; without *before* it is the event of the creation."""
    about: dict[str, Any] = {
        "id": CUSTOMER,
        "object": "customer",
        "created": BEGAN,
        "currency": "usd",
        "name": "A",
        "balance": balance,
    }
    kind = "customer.created" if before is None else "customer.updated"
    return body(event, kind, BEGAN + at, about | fields, before)


def transaction(name: str, amount: int, ending: int, at: int, *, read_at: int, **fields: Any) -> bytes:  # noqa: ANN401 - as above
    """Return the observation, at *read_at* seconds, of a transaction that was made *at* so many seconds."""
    about: dict[str, Any] = {"id": name, "object": "customer_balance_transaction", "type": "adjustment"}
    about |= {
        "customer": CUSTOMER,
        "currency": "usd",
        "amount": amount,
        "ending_balance": ending,
        "created": BEGAN + at,
    }
    return body(f"obs_{name}_{read_at}", _READ, BEGAN + read_at, about | fields)


def live(rng: random.Random, *, twins: float, read: bool) -> Life:
    """Return a life of up to three busy seconds, of up to four changes each; a share of them has *twins*.

    If *read*, the ledger is read at random times between the seconds or in them, and at the end.
    """
    bodies = [customer("evt_0", 0, 0)] if rng.random() < 0.8 else []
    ledger: list[tuple[str, int, int, int]] = []
    changes: list[int] = []
    balance, name, at, number = 0, "A", 0, 0
    for _ in range(rng.randint(1, 3)):
        at += rng.choice((1, 2) if number else (0, 1, 2))
        for _ in range(rng.randint(1, 4)):
            before: dict[str, Any] = {}
            if rng.random() < 0.8:
                before["balance"] = balance
                balance = rng.choice([each for each in (0, 250, -500) if each != balance])
                changes.append(balance - before["balance"])
                ledger.append((f"cbtxn_{number}", changes[-1], balance, at))
            else:
                before["name"], name = name, "B" if name == "A" else "A"
            for _ in range(1 + (rng.random() < twins)):
                number += 1
                bodies.append(customer(f"evt_{rng.randrange(10**6):06}_{number}", at, balance, before, name=name))
        if read and rng.random() < 0.4:
            bodies += [transaction(*each, read_at=at + rng.choice((0, 1))) for each in ledger]
            ledger = []
    if read:
        bodies += [transaction(*each, read_at=at + 1) for each in ledger]
    return Life(bodies, balance, changes)
