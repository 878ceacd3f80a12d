"""Small, nasty histories for the property tests: every object, several API versions, twins, and observations."""

import random
from collections import defaultdict
from datetime import UTC, datetime
from typing import Any

from deploy.sandbox.account import LATEST, Account
from deploy.sandbox.history import tangle
from deploy.sandbox.line_items import line_items
from deploy.sandbox.rendering import render, twin
from schemas import observations
from schemas.own_events import SESSION_MISSING, SESSION_OBSERVED, SESSION_REGISTERED
from tests import ledger
from worker import folds
from worker.folding.claim import event_of_delivery
from worker.folds.facts import Event, Facts, Subject

VERSIONS = ("2024-06-20", "2025-03-31.basil", "2025-09-30.clover", "2026-03-25.dahlia", LATEST)
NOW = datetime(2026, 11, 22, tzinfo=UTC)


def bodies_of(seed: int) -> list[bytes]:
    """Return the events of a small account, at various API versions, some of them sent twice under two ids.

    Some histories also contain observations: answers of Stripe to our own calls.
    """
    rng = random.Random(seed)
    account = tangle(seed, money=rng.random() < 0.7)
    sent = list(account.events)
    sent += [twin(event, seed=seed) for event in rng.sample(sent, rng.randint(0, 1))]
    version = rng.choice(VERSIONS)
    rendered = [render(event, rng.choice((version, LATEST))).body for event in sent]
    return rendered + (observed(account, rng) if rng.random() < 0.5 else [])


def observed(account: Account, rng: random.Random) -> list[bytes]:
    """Return observations of *account*: sessions with all or some of their lines, missing ones, tombstones."""
    found = []
    for _ in range(rng.randint(1, 3)):
        event = rng.choice(account.events).payload()
        about: dict[str, Any] = event["data"]["object"]
        created = event["created"] + rng.choice((-1, 0, 0, 1))
        if about["object"] == "checkout.session":
            kind = rng.choice((SESSION_OBSERVED, SESSION_OBSERVED, SESSION_REGISTERED, SESSION_MISSING))
            missing = {"id": about["id"], "object": "checkout.session"}
            found.append(_observation(kind, missing if kind == SESSION_MISSING else _with_lines(about, rng), created))
        elif about["object"] == "customer":
            tombstone = {"id": about["id"], "object": "customer", "deleted": True}
            found.append(_observation("payfold.customer.observed", rng.choice((about, tombstone)), created))
        else:
            found.append(_observation(f"payfold.{about['object']}.observed", about, created))
    return found


def _with_lines(session: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    lines = rng.choice((line_items(session), line_items(session)[:1], []))
    return {**session, "line_items": {"object": "list", "data": lines, "has_more": rng.random() < 0.3}}


def _observation(kind: str, about: dict[str, Any], created: int) -> bytes:
    seen = observations.observe(kind, about, account="", livemode=False, created=created, now=NOW)
    return seen.envelope.payload


def event_of(body: bytes, *, account: str = "", source: str | None = None) -> Event:
    """Return the event in *body* as it comes out of the inbox."""
    return event_of_delivery(ledger.delivery(body, account=account, source=source))


def facts_of(bodies: list[bytes]) -> dict[Subject, list[Facts]]:
    """Return the facts of the events in *bodies*, by the row that they are about."""
    found: dict[Subject, list[Facts]] = defaultdict(list)
    for body in bodies:
        for facts in folds.judge(event_of(body)).facts:
            found[facts.subject].append(facts)
    return found
