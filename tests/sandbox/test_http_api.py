"""The sandbox's HTTP API answers as Stripe does, and refuses every call that Stripe would refuse."""

from typing import Any

import msgspec
import pytest

from deploy.sandbox.account import Account
from deploy.sandbox.http_api import Call, StripeApi

KEY = "sk_test_1"
SESSIONS = "/v1/checkout/sessions"


@pytest.fixture
def account() -> Account:
    """Return an account in which nothing has happened."""
    return Account(seed=31)


def ask(account: Account, method: str, path: str, **params: Any) -> tuple[int, Any]:  # noqa: ANN401 - Stripe's own
    """Return the status and the JSON of Stripe's answer."""
    answer = StripeApi({KEY: account}).answer(Call(method, path, params, {"authorization": f"Bearer {KEY}"}))
    return answer.status, msgspec.json.decode(answer.body)


@pytest.mark.parametrize("status", ["complete", "expired"])
def test_only_an_open_session_is_expired(account: Account, status: str) -> None:
    """To expire any other session is a 400 without a code, with the session's status in the message."""
    session = account.open_session()
    (account.complete if status == "complete" else account.expire)(session)

    answered, body = ask(account, "POST", f"{SESSIONS}/{session}/expire")

    assert answered == 400
    assert body["error"] == {
        "type": "invalid_request_error",
        "message": 'Only Checkout Sessions with a status in ["open"] can be expired. '
        f"This Checkout Session has a status of `{status}`.",
    }


def test_an_open_session_is_expired(account: Account) -> None:
    """Expiring an open session answers with the session, without its url, and with its original expires_at."""
    session = account.open_session()
    ends = account.session(session)["expires_at"]

    answered, body = ask(account, "POST", f"{SESSIONS}/{session}/expire")

    assert answered == 200
    assert (body["status"], body["payment_status"], body["url"], body["expires_at"]) == (
        "expired",
        "unpaid",
        None,
        ends,
    )


@pytest.mark.parametrize(("method", "path"), [("POST", f"{SESSIONS}/cs_none/expire"), ("GET", f"{SESSIONS}/cs_none")])
def test_an_unknown_session(account: Account, method: str, path: str) -> None:
    """An unknown session is a 404 with the code resource_missing."""
    answered, body = ask(account, method, path)

    assert answered == 404
    assert (body["error"]["type"], body["error"]["code"]) == ("invalid_request_error", "resource_missing")
    assert body["error"]["message"] == "No such checkout.session: cs_none"


@pytest.mark.parametrize(
    ("path", "params"),
    [
        (SESSIONS, {"state": "open"}),
        (SESSIONS, {"status": "opened"}),
        (SESSIONS, {"limit": "101"}),
        (SESSIONS, {"created": {"since": "1"}}),
        (SESSIONS, {"created": {"gte": "1.5"}}),
        (SESSIONS, {"expand": {"0": "line_items"}}),
        ("/v1/events", {"type": "charge.*", "types": {"0": "charge.failed"}}),
        ("/v1/events", {"types": {str(number): "charge.failed" for number in range(21)}}),
    ],
)
def test_a_wrong_call_is_noticed(account: Account, path: str, params: dict[str, Any]) -> None:
    """An unknown parameter, or a wrong value of a known one, is a 400."""
    answered, body = ask(account, "GET", path, **params)

    assert answered == 400
    assert body["error"]["type"] == "invalid_request_error"


def test_a_list_is_filtered_and_paged(account: Account) -> None:
    """A list is newest first, is paged in both directions, and is limited to its times."""
    sessions = []
    for _ in range(5):
        sessions.append(account.open_session())
        account.advance(10)
    account.expire(sessions[4])
    first = account.session(sessions[0])["created"]

    _, page = ask(account, "GET", SESSIONS, status="open", limit="2")
    _, following = ask(account, "GET", SESSIONS, status="open", limit="2", starting_after=sessions[2])
    _, back = ask(account, "GET", SESSIONS, status="open", limit="1", ending_before=sessions[0])
    _, later = ask(account, "GET", SESSIONS, created={"gt": str(first), "lt": str(first + 20)})

    assert ([each["id"] for each in page["data"]], page["has_more"]) == ([sessions[3], sessions[2]], True)
    assert ([each["id"] for each in following["data"]], following["has_more"]) == ([sessions[1], sessions[0]], False)
    assert [each["id"] for each in back["data"]] == [sessions[1]]
    assert [each["id"] for each in later["data"]] == [sessions[1]]


def test_an_idempotency_key_answers_once(account: Account) -> None:
    """A repeated key returns the stored answer; with another call it is a 400."""
    api, session, other = StripeApi({KEY: account}), account.open_session(), account.open_session()
    headers = {"authorization": f"Bearer {KEY}", "idempotency-key": "once"}
    first, again, wrong = (
        api.answer(Call("POST", f"{SESSIONS}/{each}/expire", {}, headers)) for each in (session, session, other)
    )

    assert (first.status, again.status, again.body) == (200, 200, first.body)
    assert wrong.status == 400
    assert b"idempotency_error" in wrong.body
    assert account.expected_status(other) == "open"
