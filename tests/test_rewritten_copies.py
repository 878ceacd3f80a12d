"""Events that another language has written again: equal values are read alike, and impossible ones are refused.

Source: https://www.php.net/manual/en/function.json-encode.php (an empty array is ``[]``), RFC 8259 section 6 (1500.0
and 1500 are one number) and section 8.2 (half of a surrogate pair).
"""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import Engine

from deploy.sandbox.account import Account
from tests import histories, ledger
from tests.web import serving, settings_of
from worker import folds
from worker.folds.facts import Facts

HALF = "\ud83c"


def rewritten(value: Any, *, inside: str = "") -> Any:  # noqa: ANN401 - any JSON
    """Return *value* with empty objects as lists, and whole numbers as floats or texts."""
    if isinstance(value, dict):
        return {key: rewritten(each, inside=key) for key, each in value.items()} or []
    if isinstance(value, list):
        return [rewritten(each) for each in value]
    if isinstance(value, int) and not isinstance(value, bool):
        return float(value) if value % 2 else str(value) if inside.startswith("amount") else float(value)
    return value


def facts_of(event: dict[str, Any]) -> list[Facts]:
    """Return the facts that the folds read in *event*."""
    verdict = folds.judge(histories.event_of(json.dumps(event).encode()))
    assert verdict.state == "folded", verdict.reason
    return list(verdict.facts)


@given(st.integers(0, 2**32))
def test_rewritten_events_give_the_same_facts(seed: int) -> None:
    """The rewritten copy of an event gives the same facts, for any object and any previous attributes."""
    for body in histories.bodies_of(seed)[:20]:
        event = json.loads(body)
        copy = {**event, "data": rewritten(event["data"])}
        if folds.judge(histories.event_of(body)).state == "folded":
            assert facts_of(copy) == facts_of(event)


def customer(**fields: object) -> dict[str, Any]:
    """Return an event of a customer with *fields*."""
    of = {"id": "cus_1", "object": "customer", "currency": "usd", **fields}
    return {"id": "evt_1", "object": "event", "type": "customer.updated", "created": 1, "data": {"object": of}}


@pytest.mark.parametrize("balance", [1500.5, 1e300, "15.0", "1,500", "0x10", "", True, [], [1], {}, 2.0**63, "9" * 19])
def test_an_invalid_amount_is_refused(balance: object) -> None:
    """A fractional or too large number, a text without a number and an empty list are refused as amounts."""
    with pytest.raises(AssertionError, match="cannot be read"):
        facts_of(customer(balance=balance))


@pytest.mark.parametrize("field", ["name", "email", "description", "phone"])
def test_half_a_surrogate_pair(field: str) -> None:
    """Half a surrogate pair becomes U+FFFD in a kept text, and is ignored elsewhere."""
    (facts,) = facts_of(customer(**{field: f"cut {HALF}"}, metadata={"note": HALF, HALF: "x"}))

    assert facts.columns["metadata"] == {"note": "\ufffd", "\ufffd": "x"}
    assert facts.columns.get(field, "cut \ufffd") == "cut \ufffd"


def test_a_number_without_end() -> None:
    """A number of ten thousand digits is refused in a kept field, and ignored elsewhere."""
    digits = "9" * 10_000
    body = json.dumps(customer(balance=-500, unknown=0, name=HALF)).replace('"unknown": 0', f'"unknown": {digits}')
    assert folds.judge(histories.event_of(body.encode())).state == "folded"

    body = json.dumps(customer(balance=0)).replace('"balance": 0', f'"balance": {digits}')
    verdict = folds.judge(histories.event_of(body.encode()))
    assert (verdict.state, verdict.cause) == ("parked", "payload_unreadable")
    assert verdict.reason is not None
    assert "balance" in verdict.reason


def test_a_signed_rewritten_event(engine: Engine, database_url: str, redis_url: str) -> None:
    """A signed event is kept as it came and folded, however it is written."""
    account = Account(seed=3, payments=True)
    account.complete(account.open_session())
    with serving(settings_of(database_url, redis_url)) as web:
        for sent in account.events:
            event = json.loads(sent.body)
            copy = {**event, "created": float(event["created"]), "data": rewritten(event["data"])}
            assert web.deliver(json.dumps(copy).encode()).status_code == 200
    ledger.fold(engine)

    assert ledger.rows(engine, "SELECT id FROM events WHERE state = 'parked'") == []
    assert ledger.rows(engine, "SELECT status FROM orders") == [{"status": "paid"}]
