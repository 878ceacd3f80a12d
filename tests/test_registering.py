"""``PUT /v1/orders/{id}``: the shop registers the session that it has just opened."""

from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from deploy.local.services import Services
from deploy.sandbox.account import Account
from tests.web import OPERATOR, READER, TOKENS, Web, bearer, serving, serving_many, settings_of

SHOP = bearer(TOKENS["register"])


@pytest.fixture(scope="module")
def web(services: Services) -> Iterator[Web]:
    """Return a web process that the tests of this file share."""
    with serving_many(services) as running:
        yield running


def opened(seed: int, **fields: Any) -> dict[str, Any]:  # noqa: ANN401 - JSON values
    """Return a session as Stripe returns it on creation, with *fields* laid over it."""
    account = Account(seed=seed)
    return account.session(account.open_session(amount=700)) | fields


def put(web: Web, session: object, path: str | None = None, headers: dict[str, str] = SHOP) -> Any:  # noqa: ANN401 - a response
    """Register *session*, at *path* or else at its own id."""
    where = path or f"/v1/orders/{session['id']}"  # type: ignore[index]  # a session
    return web.client.put(where, content=msgspec.json.encode(session), headers=headers)


def test_an_open_session_is_recorded_once(web: Web) -> None:
    """The first registration is a 201 and recorded as an observation; the second is a 200 and records nothing."""
    session = opened(101)

    first, second = put(web, session), put(web, session)

    assert (first.status_code, second.status_code) == (201, 200)
    assert (first.json()["recorded"], second.json()["recorded"]) == (True, False)
    query = "SELECT type, source, extract(epoch FROM created)::bigint FROM events WHERE object_id = %s"
    assert web.query(query, session["id"]) == [
        ("payfold.checkout.session.registered", "observation", session["created"])
    ]


def test_an_old_name_of_its_account(web: Web) -> None:
    """A session registered under an old name of its account belongs to the new name, and is answered so."""
    web.query("INSERT INTO account_names VALUES ('acct_old', 'acct_new', now(), now())")
    session = opened(109)

    first, second = (
        put(web, session, f"/v1/orders/{session['id']}?account={name}") for name in ("acct_old", "acct_new")
    )

    assert (first.json()["account"], second.json()["recorded"]) == ("acct_new", False)
    assert web.query("SELECT account FROM inbox WHERE object_id = %s", session["id"]) == [("acct_new",)]


def test_its_credentials_are_not_kept(web: Web) -> None:
    """Neither the url nor the client secret of the session reaches the inbox."""
    secret = "cs_test_a1_secret_" + "fidkdWxOYHwn" * 4
    session = opened(102, client_secret=secret)

    put(web, session)

    ((payload, redacted),) = web.query("SELECT payload, redacted FROM events WHERE object_id = %s", session["id"])
    assert secret.encode() not in payload
    assert session["url"].encode() not in payload
    assert redacted == ["data.object.client_secret", "data.object.url"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"status": "complete", "payment_status": "paid"}, "wait for its webhook"),
        ({"status": "expired"}, "wait for its webhook"),
        ({"payment_status": "paid"}, "wait for its webhook"),
        ({"object": "payment_intent"}, "checkout.session"),
        ({"id": "cs_test_another"}, "not the id in the address"),
        ({"amount_total": "700"}, "valid integer"),
        ({"created": -1}, "greater than or equal to 0"),
        ({"livemode": "false"}, "valid boolean"),
        ({"expires_at": None}, "valid integer"),
        ({"client_reference_id": "a\0b"}, "NUL"),
    ],
)
def test_anything_more_is_refused(web: Web, change: dict[str, Any], words: str) -> None:
    """Anything but an open, unpaid session is a 422 with advice, and is not recorded."""
    session = opened(103)

    answer = put(web, session | change, f"/v1/orders/{session['id']}")

    assert answer.status_code == 422
    assert words in answer.text
    assert web.query("SELECT FROM events WHERE object_id = %s", session["id"]) == []


def test_a_session_in_setup_mode_owes_nothing_and_is_open(web: Web) -> None:
    """An open session that requires no payment is registered like any other."""
    account = Account(seed=104)
    session = account.session(account.open_session(mode="setup"))

    assert session["payment_status"] == "no_payment_required"
    assert put(web, session).status_code == 201


@pytest.mark.parametrize("body", [b"", b"not json", b"[]", b"null", b"\xff\xfe", b'{"object":'])
def test_a_body_that_is_no_session_is_refused(web: Web, body: bytes) -> None:
    """An unreadable body is a 422 and not a 500."""
    answer = web.client.put("/v1/orders/cs_test_x", content=body, headers=SHOP)

    assert answer.status_code == 422
    assert answer.headers["content-type"] == "application/problem+json"


def test_an_endless_body_is_not_read(web: Web) -> None:
    """A body of hundreds of thousands of bytes is a 413, since a session has a few thousand."""
    session = opened(105, metadata={"long": "x" * 300_000})

    assert put(web, session).status_code == 413


def test_a_reader_may_not_register(web: Web) -> None:
    """Registering needs a scope of its own, which an operator's token includes."""
    session = opened(106)

    assert put(web, session, headers=dict(READER)).status_code == 403
    assert put(web, session, headers={}).status_code == 401
    assert put(web, session, headers=dict(OPERATOR)).status_code == 201


def test_a_session_gets_the_label_of_its_webhooks(database_url: str, redis_url: str) -> None:
    """If all deliveries have one label, a registered session gets the same label, and both give one order."""
    settings = settings_of(database_url, redis_url, STRIPE_WEBHOOK_SECRETS="acct_1=whsec_a,acct_1=whsec_b")
    session = opened(107)
    with serving(settings) as web:
        assert put(web, session).json()["account"] == "acct_1"
        named = put(web, session, f"/v1/orders/{session['id']}?account=acct_2")
        assert named.json()["account"] == "acct_2"


def test_one_of_several_accounts_has_to_be_named(database_url: str, redis_url: str) -> None:
    """If webhooks have labels of several accounts, and none is the shop's own, the request must name one."""
    settings = settings_of(database_url, redis_url, STRIPE_WEBHOOK_SECRETS="acct_1=whsec_a,acct_2=whsec_b")
    session = opened(109)
    with serving(settings) as web:
        unnamed = put(web, session)
        named = put(web, session, f"/v1/orders/{session['id']}?account=acct_2")

    assert (unnamed.status_code, "acct_1, acct_2" in unnamed.text) == (422, True)
    assert (named.status_code, named.json()["account"]) == (201, "acct_2")


def test_nothing_is_done_at_stripe_without_a_key(web: Web) -> None:
    """Without a key no order is expired and no portal session created, and the answer names the reason."""
    session = opened(108)
    put(web, session)

    expired = web.client.post(f"/v1/orders/{session['id']}/expire", headers=OPERATOR)
    portal = web.client.post("/v1/customers/cus_none/portal-sessions", headers=OPERATOR, json={})

    # The order is not folded here, and the customer does not exist.
    assert expired.status_code == 404
    assert portal.status_code == 404
    assert "STRIPE_API_KEY" in portal.text
