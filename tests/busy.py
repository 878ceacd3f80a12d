"""Busy seconds of a customer: changes, twins and readings of its ledger, made without the sandbox and the folds."""

import json
import random
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

CUSTOMER = "cus_1"
BEGAN = 1_762_000_000
"""The second, in Unix time, in which the customer is created."""

_READ = "payfold.customer_balance_transaction.observed"


@dataclass(frozen=True)
class Life:
    """The events of a customer, the balance at their end, and the amounts by which it changed, in their order."""

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
    """Return an *event* of a customer *at* so many seconds: that of its creation where there is nothing *before*."""
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
    """Return the observation, at *read_at*, of a transaction that was made *at* so many seconds, too."""
    about: dict[str, Any] = {"id": name, "object": "customer_balance_transaction", "type": "adjustment"}
    about |= {
        "customer": CUSTOMER,
        "currency": "usd",
        "amount": amount,
        "ending_balance": ending,
        "created": BEGAN + at,
    }
    return body(f"obs_{name}_{read_at}", _READ, BEGAN + read_at, about | fields)


@dataclass
class _Second:
    """What the events and the ledger of a customer report of one second."""

    steps: list[tuple[object, object]] = field(default_factory=list)
    read_at: dict[str, int] = field(default_factory=dict)

    @property
    def has_twins_around(self) -> bool:
        """Whether steps are reported twice that lead around, so that they may have been taken twice."""
        around = set(self.steps)
        while True:
            befores = {before for before, _ in around}
            rest = {step for step in around if step[1] in befores}
            if rest == around:
                return bool(around) and len(set(self.steps)) < len(self.steps)
            around = rest


def may_have_gone_around_twice(bodies: Iterable[bytes]) -> bool:
    """Return whether steps of one second lead around and are reported twice, and the ledger does not show how often.

    It does where the last of its transactions was read after that second.
    """
    seconds: dict[int, _Second] = defaultdict(_Second)
    for event in map(json.loads, bodies):
        about, before = event["data"]["object"], event["data"].get("previous_attributes")
        if event["type"] == _READ:
            seen = seconds[about["created"]].read_at
            seen[about["id"]] = max(event["created"], seen.get(about["id"], 0))
        elif before is not None:
            after = {name: about[name] for name in ("balance", "name")}
            seconds[event["created"]].steps.append((tuple({**after, **before}.values()), tuple(after.values())))
    # Which of the transactions of a second is the last may not be known.
    listed = max((at for at, second in seconds.items() if second.read_at), default=0)
    read_at = min(seconds[listed].read_at.values()) if listed else 0
    return any(second.has_twins_around for at, second in seconds.items() if at >= read_at)


def live(rng: random.Random, *, twins: float, read: bool) -> Life:
    """Return a life of up to three busy seconds, of up to four changes each; a share of them has *twins*.

    Where the ledger is *read*, it is so now and then between the seconds or in them, and at the end.
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
