"""Small, nasty histories for the property tests: every object, several API versions, twins."""

import random
from collections import defaultdict

from deploy.sandbox.account import LATEST
from deploy.sandbox.history import tangle
from deploy.sandbox.rendering import render, twin
from tests import reference
from worker import folds
from worker.folds.facts import Facts, Subject

VERSIONS = ("2024-06-20", "2025-03-31.basil", "2025-09-30.clover", "2026-03-25.dahlia", LATEST)


def bodies_of(seed: int) -> list[bytes]:
    """Return the events of a small account, at various API versions and some of them told twice under two ids."""
    rng = random.Random(seed)
    events = list(tangle(seed, money=rng.random() < 0.7).events)
    events += [twin(event, seed=seed) for event in rng.sample(events, rng.randint(0, 1))]
    version = rng.choice(VERSIONS)
    return [render(event, rng.choice((version, LATEST))).body for event in events]


def facts_of(bodies: list[bytes]) -> dict[Subject, list[Facts]]:
    """Return what the events in *bodies* say, by the row that it is about."""
    found: dict[Subject, list[Facts]] = defaultdict(list)
    for body in bodies:
        for facts in folds.judge(reference.event_of(body)).facts:
            found[facts.subject].append(facts)
    return found
