"""The pages of events: listed by filters, shown with what is known of each, retried and ignored, and parked ones."""

import html
import re
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any, Final
from urllib.parse import quote

import httpx
import msgspec
import pytest
from sqlalchemy import Engine

from deploy.sandbox.account import Account
from tests import ledger
from tests.web import TOKENS, Web, event, serving, settings_of, signed
from worker.folding import projection

HOME: Final = {"account": "", "livemode": "false"}
"""The account and mode of most events here."""
ODD_IDS: Final = ("evt_a/b", "evt_a/retry", "retry", 'evt_"><i>&', "evt_ü%2F ?#", "parked")


@pytest.fixture
def web(database_url: str, redis_url: str) -> Iterator[Web]:
    """Return a web process on a database of its own, with two signing secrets."""
    with serving(settings_of(database_url, redis_url, STRIPE_WEBHOOK_SECRETS="whsec_old,whsec_test")) as running:
        yield running


@pytest.fixture
def owner(web: Web) -> Iterator[httpx.Client]:
    """Return the browser of a person who may see and do all."""
    with web.looking() as client:
        yield client


def odd(id_: str, kind: str = "invoice.paid", object_id: str = "in_1", **fields: Any) -> bytes:  # noqa: ANN401 - any JSON
    """Return an event that is parked, since its object is not what its type has."""
    return event(type=kind, id=id_, livemode=False, data={"object": {"object": "odd", "id": object_id, **fields}})


def park(engine: Engine, *bodies: bytes, account: str = "") -> None:
    """Record and park events."""
    ledger.record(engine, [ledger.delivery(body, account=account) for body in bodies])
    ledger.fold(engine)


def text_of(answer: httpx.Response, status: int = 200) -> str:
    """Return what a person reads on a page, on one line."""
    assert answer.status_code == status, answer.text
    main = answer.text[answer.text.index("<main") :]
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", main)).split())


def look(client: httpx.Client, path: str, **parameters: str) -> httpx.Response:
    """Return a page of the account without a name, in test mode."""
    return client.get(path, params=HOME | parameters)


def listed(client: httpx.Client, **parameters: str) -> list[str]:
    """Return the ids of the events on the list, in its order."""
    answer = look(client, "/events", **parameters)
    assert answer.status_code == 200, answer.text
    rows = answer.text[answer.text.index('<div id="list"') :]
    return [html.unescape(id_) for id_ in re.findall(r"<small><code>(.*?)</code>", rows)]


def state_of(engine: Engine, id_: str) -> str:
    """Return the state of an event."""
    (row,) = ledger.rows(engine, "SELECT state FROM events WHERE id = :id AND account = ''", id=id_)
    return str(row["state"])


# ---- The list ----


def test_filters(engine: Engine, owner: httpx.Client) -> None:
    """Events are found by each filter, newest received first, and those of other accounts and modes by none."""
    park(engine, odd("evt_1"), odd("evt_2", "invoice.voided", "in_2"), odd("evt_3", "customer.created", "cus_1"))
    park(engine, event(type="topup.created", id="evt_4", livemode=False))
    park(engine, odd("evt_other"), account="acct_2")
    park(engine, event(type="invoice.paid", id="evt_live", livemode=True))
    ledger.execute(engine, "UPDATE inbox SET received_at = '2026-11-22T12:00:00Z'::timestamptz + seq * interval '1 h'")

    found = {
        "": "evt_4 evt_3 evt_2 evt_1",
        "state=parked": "evt_3 evt_2 evt_1",
        "cause=type_unwanted": "evt_4",
        "type=invoice.*": "evt_2 evt_1",
        "type=customer.created": "evt_3",
        "object_id=in_2": "evt_2",
        "source=webhook&state=ignored": "evt_4",
        "source=observation": "",
        # The third event was received at 15:00 UTC; a time without an offset is in UTC.
        "received_from=2026-11-22T15:00": "evt_4 evt_3",
        "received_before=2026-11-22T16:00:00%2B01:00": "evt_2 evt_1",
        "type=%20invoice.*%20&state=&cause=": "evt_2 evt_1",
    }
    assert {asked: " ".join(listed(owner, **dict(httpx.QueryParams(asked)))) for asked in found} == found


def test_the_address_keeps_the_filters(engine: Engine, owner: httpx.Client) -> None:
    """The form and the links to older events and to retry all have the filters; an older page is not live."""
    park(engine, *(odd(f"evt_{number:02}") for number in range(60)))

    first = look(owner, "/events", type="invoice.*", state="parked", received_from="2026-11-22T11:00:00+00:00")
    (older,) = re.findall(r'rel="next" href="([^"]*)"', first.text)
    second = owner.get(html.unescape(older))

    assert 'name="type" value="invoice.*"' in first.text
    assert 'value="2026-11-22T11:00:00"' in first.text
    assert "<option selected>parked</option>" in first.text
    assert "Retry all parked that match" in text_of(first)
    assert ['<div id="list" data-live>' in page.text for page in (first, second)] == [True, False]
    ids = [re.findall(r"<small><code>(evt_\d+)</code>", page.text) for page in (first, second)]
    assert [len(each) for each in ids] == [50, 10]
    assert sorted([*ids[0], *ids[1]]) == [f"evt_{number:02}" for number in range(60)]
    assert 'name="type" value="invoice.*"' in second.text


@pytest.mark.parametrize(
    "asked",
    ["type=******", "state=odd", "cause=odd", "source=odd", "received_from=soon", "cursor=odd", "object_id=a%00b"],
)
def test_odd_filters(owner: httpx.Client, asked: str) -> None:
    """A filter that cannot be used is named on an error's page, wherever it is asked for."""
    name = asked.partition("=")[0]
    for page in ("/events", "/retry", "/retry/progress"):
        if page == "/events" or name not in ("cursor", "state"):
            assert name in text_of(owner.get(f"{page}?{asked}"), 422)


def test_odd_filters_of_orders(owner: httpx.Client) -> None:
    """The list of orders names them too."""
    for asked in ("status=odd", "cursor=odd", "customer=a%00b"):
        assert asked.partition("=")[0] in text_of(owner.get(f"/orders?{asked}"), 422)


def test_empty_lists_teach(owner: httpx.Client) -> None:
    """Lists without rows have the next step: how events come here, what parking means, and all events."""
    assert "stripe listen --forward-to 127.0.0.1" in text_of(look(owner, "/events"))
    assert "No event is like that" in text_of(look(owner, "/events", state="parked"))
    assert "An event that cannot be folded into its row is parked" in text_of(look(owner, "/parked"))
    assert "Nothing to retry" in text_of(look(owner, "/retry"))


# ---- One event ----


def test_what_an_event_did(web: Web, engine: Engine, owner: httpx.Client) -> None:
    """The page has the columns that an event set, its changes with amounts, and its order, also that of a refund."""
    account = Account(seed=1, payments=True)
    session = account.open_session(amount=5_000, currency="usd")
    account.complete(session)
    intent = str(account.order_intents(session)[0])  # type: ignore[index]  # it is paid
    account.refund(intent, 1_200)
    for each in account.events:
        assert web.deliver(each.body).status_code == 200
    ledger.fold(engine)
    by_type = {each.type: each.id for each in account.events}

    paid = look(owner, f"/events/{by_type['checkout.session.completed']}")
    refunded = look(owner, f"/events/{by_type['refund.created']}")

    assert "order.paid" in text_of(paid)
    assert "amount_total 50.00 USD" in text_of(paid)
    assert "The row in orders : it decides." in text_of(paid)
    assert "Its order" in text_of(refunded)
    assert "refunded_amount 0.00 USD → 12.00 USD" in text_of(refunded)
    for page in (paid, refunded):
        assert f'href="/orders/{session}?account=&amp;livemode=false"' in page.text


def test_which_secret_signed(web: Web, engine: Engine, owner: httpx.Client, redis_url: str) -> None:
    """The page names the secret by its place and never its text, and owns up where that cannot be known any more."""
    for number, secret in ((1, "whsec_old"), (2, "whsec_test")):
        body = event(number, livemode=False)
        assert web.deliver(body, **signed(body, secret=secret)).status_code == 200
    blanked = event(
        3,
        livemode=False,
        data={"object": {"object": "checkout.session", "id": "cs_1", "url": "https://example.com/pay"}},
    )
    web.deliver(blanked)
    park(engine, event(4, livemode=False, type="test.event"))
    ledger.execute(engine, "UPDATE inbox SET source = 'gap' WHERE id = 'evt_4'")

    pages = {number: text_of(look(owner, f"/events/evt_{number}")) for number in (1, 2, 3, 4)}

    assert "verified signed at" in pages[1]
    assert "by secret 1 of the 2 in STRIPE_WEBHOOK_SECRETS" in pages[1]
    assert "by secret 2 of the 2 in STRIPE_WEBHOOK_SECRETS" in pages[2]
    assert "by which secret is not known now: credentials in the payload are blanked" in pages[3]
    assert "none: fetched with our key" in pages[4]
    assert not any("whsec" in page or "v1=" in page for page in pages.values())
    with serving(settings_of(web.settings.postgresql, redis_url)) as later, later.looking() as client:
        assert "by a secret that is not set any more" in text_of(look(client, "/events/evt_1"))
        assert "by the one secret in STRIPE_WEBHOOK_SECRETS" in text_of(look(client, "/events/evt_2"))


def test_personal_data(web: Web, engine: Engine, owner: httpx.Client) -> None:
    """Payloads, those of other contents, and an operator's words are shown with the scope personal alone."""
    first, second = (odd("evt_1", note=f"buyer{number}@example.com <b>") for number in (1, 2))
    park(engine, first)
    park(engine, second)
    park(engine, odd("evt_2"))
    ignored = owner.post("/events/evt_2/ignore", params=HOME, data={"reason": "ask buyer3@example.com"})
    assert ignored.status_code == 303
    ledger.fold(engine)

    seen = [look(owner, f"/events/evt_{number}") for number in (1, 2)]
    with web.looking(TOKENS["admin"]) as client:
        hidden = [look(client, f"/events/evt_{number}") for number in (1, 2)]

    assert "buyer1@example.com &lt;b&gt;" in seen[0].text
    assert "buyer2@example.com" in seen[0].text
    assert '"object": "odd"' in text_of(seen[0])
    assert '<details class="copy">' in seen[0].text
    assert "set aside by the token admin_personal: ask buyer3@example.com" in text_of(seen[1]).replace("Set", "set")
    for page in hidden:
        assert "@example.com" not in page.text
        assert "It is hidden: it wants a token of the scope personal." in text_of(page)
    assert "The operator's reason is hidden" in text_of(hidden[1])


def test_an_archived_payload(engine: Engine, owner: httpx.Client) -> None:
    """An archived payload is reported as such, with the command that brings it back."""
    park(engine, odd("evt_1"))
    ledger.execute(engine, "DELETE FROM payloads")

    shown = text_of(look(owner, "/events/evt_1"))

    assert "payfold events retry evt_1 --archive DIR brings it back" in shown


def test_ids_of_any_text(engine: Engine, owner: httpx.Client) -> None:
    """Events of odd ids are listed, shown, retried and ignored; nothing in an id becomes markup."""
    park(engine, *(odd(id_, object_id=f"in_{id_}") for id_ in ODD_IDS))

    shown = look(owner, "/events")
    for id_ in ODD_IDS:
        address = f"/events/{quote(id_, safe='')}"
        assert f'href="{html.escape(address, quote=True)}?' in shown.text
        page = look(owner, address)
        assert id_ in text_of(page)
        assert owner.post(f"{address}/retry", params=HOME).status_code == 303
        assert state_of(engine, id_) == "pending"
        answer = owner.post(f"{address}/ignore", params=HOME, data={"reason": "odd"})
        assert answer.headers["location"].startswith(f"{address}?")
        assert owner.get(answer.headers["location"]).status_code == 200
        assert "<i>" not in page.text
    ledger.fold(engine)
    assert {state_of(engine, id_) for id_ in ODD_IDS} == {"ignored"}


def test_another_world(engine: Engine, owner: httpx.Client) -> None:
    """An event of another account is not shown; the page leads to it. One that no account has leads to a search."""
    park(engine, odd("evt_1", note="of-two"), account="acct_2")

    missing = look(owner, "/events/evt_1")

    assert "It is in test, acct_2" in text_of(missing, 404)
    assert "of-two" not in missing.text
    (address,) = re.findall(r'<a href="(/events/evt_1[^"]*acct_2[^"]*)"', missing.text)
    assert "of-two" in owner.get(html.unescape(address)).text
    assert "Nor is it in another one" in text_of(look(owner, "/events/evt_none"), 404)
    for act in ("retry", "ignore"):
        assert owner.post(f"/events/evt_1/{act}", params=HOME, data={"reason": "x"}).status_code == 404


# ---- Acts ----


def test_park_retry_fold(web: Web, engine: Engine, owner: httpx.Client) -> None:
    """An event that a constraint had parked is retried once that is gone, and its order stands."""
    ledger.execute(engine, "ALTER TABLE orders ADD CONSTRAINT cheap CHECK (amount_total < 100)")
    account = Account(seed=1)
    session = account.open_session(amount=5_000)
    account.complete(session)
    (body,) = (each.body for each in account.events)
    id_ = account.events[0].id
    park(engine, body)
    parked = text_of(look(owner, f"/events/{id_}"))
    ledger.execute(engine, "ALTER TABLE orders DROP CONSTRAINT cheap")

    answer = owner.post(f"/events/{id_}/retry", params=HOME)
    waiting = owner.get(answer.headers["location"])
    ledger.fold(engine)
    folded = owner.get(answer.headers["location"])

    assert "Row refused. PostgreSQL refuses the row" in parked
    assert "Attempts to fold it 1" in parked
    assert answer.status_code == 303
    assert "It is queued: a worker folds it again at once." in text_of(waiting)
    assert "data-live" in waiting.text
    assert "It was tried again, and is folded." in text_of(folded)
    assert "order.paid" in text_of(folded)
    assert "paid" in text_of(look(owner, f"/orders/{session}"))
    # An act on a folded event is refused, and not offered.
    assert f'action="/events/{id_}/retry' in waiting.text
    assert f'action="/events/{id_}/retry' not in folded.text
    for act in ("retry", "ignore"):
        refused = owner.post(f"/events/{id_}/{act}", params=HOME, data={"reason": "x"})
        assert f"{id_} is folded" in text_of(refused, 409)


def test_ignore_wants_a_reason(engine: Engine, owner: httpx.Client) -> None:
    """Without a reason, or with one that is too long, nothing is recorded."""
    park(engine, odd("evt_1"))

    for form in ({}, {"reason": ""}, {"reason": " \t"}, {"reason": "x" * 1_001}, {"reason": "a\0b"}):
        assert text_of(owner.post("/events/evt_1/ignore", params=HOME, data=form), 422)

    assert ledger.rows(engine, "SELECT count(*) AS count FROM inbox") == [{"count": 1}]
    assert state_of(engine, "evt_1") == "parked"


@pytest.mark.parametrize("path", ["/events/evt_1/retry", "/events/evt_1/ignore", "/retry"])
def test_who_may_act(web: Web, engine: Engine, owner: httpx.Client, path: str) -> None:
    """Acts want the scope admin and a page of this address; a reader is offered none."""
    park(engine, odd("evt_1"))
    form = {"reason": "x", "confirm": "1", "until": "1"}

    with web.looking(TOKENS["read+personal"]) as reader:
        assert reader.post(path, params=HOME, data=form).status_code == 403
        for page in ("/events/evt_1", "/events?state=parked", "/parked"):
            assert 'method="post"' not in text_of_main(reader.get(page, params=HOME | query_of(page)))
            assert "/retry" not in text_of_main(reader.get(page, params=HOME | query_of(page)))
        assert look(reader, "/retry").status_code == 403
    for origin in ("https://example.com", ""):
        assert owner.post(path, params=HOME, data=form, headers={"Origin": origin}).status_code == 403
    assert web.client.post(path, params=HOME, data=form).status_code == 303

    assert state_of(engine, "evt_1") == "parked"
    assert ledger.rows(engine, "SELECT attempts FROM events") == [{"attempts": 1}]


def text_of_main(answer: httpx.Response) -> str:
    """Return the page's own markup, without the head that all pages have."""
    return answer.text[answer.text.index("<main") :]


def query_of(address: str) -> dict[str, str]:
    """Return the parameters of an address."""
    return dict(httpx.URL(address).params)


# ---- Retry all, and what is parked ----


def test_retry_all_that_match(engine: Engine, owner: httpx.Client) -> None:
    """The count that was confirmed is what is retried, in one world, and the page shows how far it has come."""
    park(engine, odd("evt_1"), odd("evt_2", "invoice.voided"), odd("evt_3", "customer.created"))
    park(engine, odd("evt_1"), account="acct_2")
    filters = {"state": "parked", "type": "invoice.*"}

    page = look(owner, "/retry", **filters)
    fields = dict(re.findall(r'name="(confirm|until)" value="(\d+)"', page.text))
    (action,) = re.findall(r'<form method="post" action="(/retry[^"]*)"', page.text)
    address = html.unescape(action)
    park(engine, odd("evt_4"))
    late = owner.post(address, data={**fields, "confirm": "1"})
    done = owner.post(address, data=fields)
    waiting = owner.get(done.headers["location"])
    again = ledger.rows(engine, "SELECT account, id FROM events WHERE state = 'pending' ORDER BY id")
    projection.fold_pending(engine, now=datetime.now(UTC))
    parked = owner.get(done.headers["location"])

    assert "Retry 2 parked events?" in text_of(page)
    assert fields["confirm"] == "2"
    assert "Nothing was done: 1 matched when you looked, and 3 match now." in text_of(late, 409)
    assert "Retry 3 parked events?" in text_of(late, 409)
    assert done.status_code == 303
    assert again == [{"account": "", "id": "evt_1"}, {"account": "", "id": "evt_2"}]
    assert "2 of 2 still wait" in text_of(waiting)
    assert "data-live" in waiting.text
    assert "2 of 2 are parked again" in text_of(parked)
    assert "Still wait 0 Folded, or ignored 0 Parked again 2" in text_of(parked)
    assert "data-live" not in parked.text


def test_progress_to_the_end(engine: Engine, owner: httpx.Client) -> None:
    """Events that are folded, or ignored, by then are done."""
    park(engine, odd("evt_1"), odd("evt_2"))
    page = look(owner, "/retry", state="parked")
    fields = dict(re.findall(r'name="(confirm|until)" value="(\d+)"', page.text))
    done = owner.post("/retry", params=HOME | {"state": "parked"}, data=fields)
    for id_ in ("evt_1", "evt_2"):
        owner.post(f"/events/{id_}/ignore", params=HOME, data={"reason": "a test"})
    ledger.fold(engine)

    ended = owner.get(done.headers["location"])

    assert "All 2 are done" in text_of(ended)
    assert "Still wait 0 Folded, or ignored 2 Parked again 0" in text_of(ended)
    assert "Nothing was queued" in text_of(look(owner, "/retry/progress"))


def test_parked_by_cause(engine: Engine, owner: httpx.Client) -> None:
    """Parked events stand by cause and type with their count, times and money, each with its list and its act."""
    park(
        engine,
        odd("evt_1", amount_total=1_250, currency="eur"),
        odd("evt_2", object_id="in_2", amount_total=750, currency="eur"),
        odd("evt_3", object_id="in_3", amount_total=300, currency="jpy"),
        odd("evt_4", object_id="in_4"),
        msgspec.json.encode(
            msgspec.json.decode(odd("evt_5", "customer.created"))
            | {"data": {"object": {"object": "customer", "id": "cus_1", "created": "soon"}}}
        ),
    )
    park(engine, odd("evt_9", "topup.failed"), odd("evt_other", amount_total=99, currency="usd"), account="acct_2")

    page = look(owner, "/parked")
    shown = text_of(page)

    assert "Object unexpected 4" in shown
    assert "4 \u00d7 invoice.paid received from 2026-11-22 12:00:00 UTC to 2026-11-22 12:00:00 UTC" in shown
    assert "20.00 EUR of 2 objects 300 JPY of 1 object of 1 more no amount is known" in shown
    assert "Payload unreadable 1" in shown
    assert "1 \u00d7 customer.created received 2026-11-22 12:00:00 UTC No amount is known Show it" in shown
    assert "USD" not in shown
    links = [html.unescape(each) for each in re.findall(r'href="(/(?:events|retry)\?[^"]*cause[^"]*)"', page.text)]
    assert len(links) == 4
    for link in links:
        answer = owner.get(link)
        count = 4 if "invoice" in link else 1
        if link.startswith("/retry"):
            assert f"Retry {count} parked event" in text_of(answer)
        else:
            assert len(re.findall(r"<small><code>evt_", answer.text)) == count
