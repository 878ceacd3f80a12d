"""Random requests by the OpenAPI page: every answer is one that the page declares.

Schemathesis makes the requests: for every operation the boundary values of its parameters, and random ones, valid and
invalid. Operations are taken from the page, so a new route is asked without a word here.
"""

import os
import random
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import pytest
import schemathesis
from requests import PreparedRequest
from schemathesis.engine import events, from_schema
from schemathesis.engine.recorder import ScenarioRecorder
from schemathesis.hooks import unregister

from deploy.sandbox.account import Account
from deploy.sandbox.history import shop_history
from schemas import tables
from schemas.settings import Settings
from tests import command, ledger
from tests.stage import Stage, stage
from tests.web import TOKENS, Web, bearer, environment_of, event, serving, signed

SEED: Final = 18
SEED_VARIABLE: Final = "PAYFOLD_TEST_FUZZ_SEED"
"""The environment variable with another seed."""
EXAMPLES: Final = 6
"""Random requests of an operation: valid ones, and as many invalid ones. Those with boundary values come first."""
READER_EXAMPLES: Final = 4
LONG_EXAMPLES: Final = 1000
LONG_SECONDS_MAX: Final = 480
"""The long run shares this time among the operations, and ends with what it has found."""
ORDERS: Final = 40
KNOWN_IDS_MAX: Final = 20
REQUEST_SHOWN_MAX: Final = 2000
"""Characters of a request that a failure prints."""
WAIT_SECONDS_MAX: Final = 0.1
"""A valid request of the change feed waits no longer."""
SUCCESS: Final = range(200, 300)
CHECKS_OFF: Final = {
    # Ids are any text, so that the address of an act with another method is that of an object with such an id: see
    # Note [An id may be any text].
    "unsupported_method",
    # No schema says which texts are cursors, which ids are known, or that two values have to agree.
    "positive_data_acceptance",
}

AnyCase = schemathesis.Case[Any]


# ---- The requests ----


def history() -> Account:
    """Return a shop with every kind of object, some open orders, and a last event that no fold can read."""
    account = shop_history(SEED, ORDERS, money=True)
    account.emit("payment_link.updated", account.payment_link(account.create_payment_link()) | {"active": "maybe"})
    return account


def known_ids(at: Stage, path: str) -> list[str]:
    """Return the newest ids of the objects that the first parameter of *path* names, if they are rows of a table."""
    table = tables.metadata.tables.get(path.split("/")[2].replace("-", "_"))
    if table is None or "id" not in table.c:
        return []
    newest = "seq" if "seq" in table.c else "as_of" if "as_of" in table.c else "id"
    rows = at.rows(f"SELECT id FROM {table.name} ORDER BY {newest} DESC LIMIT {KNOWN_IDS_MAX}")  # noqa: S608 - our own names
    return [row["id"] for row in rows]


@dataclass
class Shaping:
    """Gives some of the valid requests a meaning: no schema knows which ids there are, or how to sign.

    Of four valid requests of an operation one names an object that there is and has no optional parameters (but
    ``limit``), so that it finds something; one names such an object, and two stay as they were made.
    """

    at: Stage
    chance: random.Random
    made: Counter[str] = field(default_factory=Counter)
    known: dict[str, list[str]] = field(default_factory=dict)

    def before_call(self, case: AnyCase, kwargs: dict[str, Any]) -> None:
        """Shape *case*, which is about to be sent with *kwargs*."""
        if case.meta is None or case.meta.generation.mode is not schemathesis.GenerationMode.POSITIVE:
            return
        if "wait" in case.query:
            case.query["wait"] = WAIT_SECONDS_MAX
        if "Stripe-Signature" in case.headers:
            kwargs["auth"] = sign
        turn = self.made[case.operation.label] % 4
        self.made[case.operation.label] += 1
        if turn == 0:
            kept = {"limit", *(each.name for each in case.operation.query if each.is_required)}
            case.query = {name: value for name, value in case.query.items() if name in kept}
        if turn in (0, 1) and case.path_parameters:
            self._name_known(case)

    def _name_known(self, case: AnyCase) -> None:
        if case.path not in self.known:
            self.known[case.path] = known_ids(self.at, case.path)
        parameter = next(iter(case.path_parameters))
        if isinstance(case.body, dict) and "id" in case.body:
            case.path_parameters[parameter] = case.body["id"]
        elif self.known[case.path]:
            case.path_parameters[parameter] = self.chance.choice(self.known[case.path])


def sign(request: PreparedRequest) -> PreparedRequest:
    """Sign a delivery as Stripe does."""
    body = request.body
    assert isinstance(body, bytes)
    request.headers.update(signed(body))
    return request


@contextmanager
def shaped(shaping: Shaping) -> Iterator[None]:
    """Shape every request until the end."""

    @schemathesis.hook
    def before_call(_: schemathesis.HookContext, case: AnyCase, kwargs: dict[str, Any]) -> None:
        shaping.before_call(case, kwargs)

    try:
        yield
    finally:
        unregister(before_call)


# ---- The answers ----


@dataclass
class Run:
    """What came of the requests: the statuses of each operation, and each fault once with a request that shows it."""

    statuses: defaultdict[str, Counter[int]] = field(default_factory=lambda: defaultdict(Counter))
    faults: dict[tuple[str, str, str], str] = field(default_factory=dict)

    def notice(self, happened: events.EngineEvent) -> None:
        """Keep what the engine reports."""
        if isinstance(happened, events.ScenarioFinished) and happened.label is not None:
            self._keep(happened.label, happened.recorder)
        elif isinstance(happened, events.NonFatalError):
            self.faults[(happened.label, type(happened.value).__name__, str(happened.value))] = ""
        elif isinstance(happened, events.FatalError):
            raise happened.exception

    def _keep(self, operation: str, recorder: ScenarioRecorder) -> None:
        answers = (each.response for each in recorder.interactions.values())
        self.statuses[operation].update(answer.status_code for answer in answers if answer is not None)
        for check in (check for checks in recorder.checks.values() for check in checks):
            if check.failure_info is not None:
                failure = check.failure_info.failure
                self.faults.setdefault(
                    (operation, check.name, failure.message or failure.title), check.failure_info.code_sample
                )

    @property
    def answers(self) -> str:
        """The statuses of each operation, as text."""
        return "\n".join(f"{operation} {dict(sorted(seen.items()))}" for operation, seen in self.statuses.items())

    def __str__(self) -> str:
        return "\n\n".join("\n".join((*fault, request[:REQUEST_SHOWN_MAX])) for fault, request in self.faults.items())


def ask(web: Web, token: str, *, examples: int, seed: int) -> Run:
    """Ask every operation of the page with the token of the scopes *token*."""
    off = {check: {"enabled": False} for check in CHECKS_OFF}
    config = schemathesis.Config.from_dict(
        {
            "seed": seed,
            **({"max-time": LONG_SECONDS_MAX} if examples == LONG_EXAMPLES else {}),
            "headers": bearer(TOKENS[token]),
            "continue-on-failure": True,
            "request-timeout": 60,
            "checks": {**off, "not_a_server_error": {"expected-statuses": ["2xx", "4xx", "502", "503"]}},
            "phases": {"stateful": {"enabled": False}, "coverage": {"enabled": token != "read"}},
            "generation": {"max-examples": examples, "no-shrink": True, "database": "none"},
        }
    )
    schema = schemathesis.openapi.from_url(f"{web.client.base_url}/openapi.json", config=config)
    run = Run()
    for happened in from_schema(schema).execute():
        run.notice(happened)
    return run


@pytest.fixture
def at(database_url: str, redis_url: str) -> Iterator[Stage]:
    """Return a shop at the sandbox whose events are folded, but for one that waits, and reconciled once."""
    with stage(database_url, redis_url, history=history) as made:
        made.deliver()
        command.python("deploy", "reconcile", settings=made.environment)
        made.open(KNOWN_IDS_MAX // 2, ago=0)
        ledger.record(made.engine, [ledger.delivery(event())])
        yield made


@pytest.mark.parametrize(
    ("token", "examples"),
    [
        ("admin+personal", EXAMPLES),
        ("read", READER_EXAMPLES),
        pytest.param("admin+personal", LONG_EXAMPLES, marks=pytest.mark.long),
    ],
)
def test_every_answer_is_declared(at: Stage, token: str, examples: int) -> None:
    """No request is answered 500, with an undeclared status, type or header, or with a body of another schema."""
    seed = int(os.environ.get(SEED_VARIABLE) or SEED)
    print(f"repeat these requests with {SEED_VARIABLE}={seed}")  # noqa: T201 - repeats a failure
    settings = Settings.load(environment_of("", "") | at.environment)
    with serving(settings) as web, shaped(Shaping(at, random.Random(seed))):
        listed = web.client.get("/openapi.json").json()["paths"]
        run = ask(web, token, examples=examples, seed=seed)

    print(run.answers)  # noqa: T201 - shows what was asked for
    assert not run.faults, f"{run}"
    operations = {f"{method.upper()} {path}" for path, methods in listed.items() for method in methods}
    assert run.statuses.keys() == operations
    if token != "read":
        assert not [operation for operation, seen in run.statuses.items() if not any(each in SUCCESS for each in seen)]
