"""An odd object in Stripe's answer affects no other object, ends no job, and is never dropped silently."""

import hashlib
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, Final

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deploy.sandbox.server import Fault
from schemas import listing
from schemas.budget import Lane
from schemas.errors import StripeAway
from schemas.observations import World
from tests import ledger
from tests.stage import Stage, stage
from worker.proof import against_stripe, kinds
from worker.stripe_jobs import discovery, fetches, gaps

HERE: Final = World("", livemode=False)
ALWAYS: Final = 10**9

# Values of one member that JSON allows, or that a decoder may meet.
ODD: Final = {
    "half a surrogate pair": rb'"\ud800"',
    "a NUL": rb'"\u0000"',
    "more than 64 bits": b"9" * 40,
    "more digits than Python converts": b"9" * 5_000,
    "no such float": b"1e999999",
    "deep": b"[" * 5_000 + b"]" * 5_000,
    "the key twice": b'1,"note":2',
}


@pytest.fixture
def at(database_url: str, redis_url: str) -> Iterator[Stage]:
    """Return an empty shop at the sandbox."""
    with stage(database_url, redis_url) as made:
        yield made


def noted(value: bytes) -> Callable[[bytes], bytes]:
    """Return a function that adds a note with *value*, written as JSON, to an object."""
    return lambda item: item[:-1] + b',"note":' + value + b"}"


def with_odd(object_id: str, odd: Callable[[bytes], bytes]) -> Callable[[bytes], bytes]:
    """Return a function that makes the object *object_id* of a list page, or of an answer, *odd*."""

    def rewrite(body: bytes) -> bytes:
        found = msgspec.json.decode(body)
        if found.get("object") != "list":
            return odd(msgspec.json.encode(found)) if found["id"] == object_id else body
        items = [msgspec.json.encode(each) for each in found.pop("data")]
        items = [odd(item) if msgspec.json.decode(item)["id"] == object_id else item for item in items]
        return msgspec.json.encode(found)[:-1] + b',"data":[' + b",".join(items) + b"]}"

    return rewrite


def make_odd(at: Stage, path: str, object_id: str, odd: Callable[[bytes], bytes]) -> None:
    """Make the object *object_id* *odd* in every answer of *path*."""
    at.faults.add(None, path, times=ALWAYS, rewrite=with_odd(object_id, odd))


def job(at: Stage) -> dict[str, Any]:
    """Return the state of the only job."""
    (row,) = at.rows("SELECT reached_at, leased_until, done_at, failed_at, failure FROM stripe_jobs")
    return row


# Events that never came.


def sold(at: Stage) -> list[str]:
    """Sell to five buyers, and return the ids of the events."""
    for _ in range(5):
        at.account.complete(at.account.open_session())
        at.account.advance(60)
    at.account.advance(120)
    return [event.id for event in at.account.events if event.type in gaps.wanted_types()]


@pytest.mark.parametrize("value", ODD.values(), ids=ODD.keys())
def test_an_odd_event_is_recorded_with_its_page(at: Stage, value: bytes) -> None:
    """An odd event of a page is recorded as it was listed, so are all others, and the checkpoint moves."""
    sent = sold(at)
    make_odd(at, "/v1/events", sent[3], noted(value))

    found = gaps.run_once(at.context(), since=at.now - timedelta(days=1))

    assert {row["id"] for row in at.rows("SELECT id FROM inbox")} == set(sent)
    assert found.recorded == len(sent)
    assert found.failed == []
    assert job(at)["reached_at"] == at.now - gaps.SETTLED
    ((row,)) = at.rows("SELECT payload, payload_sha256 FROM events WHERE id = :id", id=sent[3])
    assert value in bytes(row["payload"])
    at.fold()
    assert (
        at.rows("SELECT FROM outcomes JOIN inbox USING (seq) WHERE state <> 'folded' AND id <> :id", id=sent[3]) == []
    )


@pytest.mark.parametrize(
    ("old", "new"), [(b'"evt_', b'"evt a_'), (b'"currency":"usd"', b'"currency":"us d"'), (b'"cs_', b'"cs \\u2028_')]
)
def test_an_event_with_an_odd_name_is_recorded(at: Stage, old: bytes, new: bytes) -> None:
    """A page is recorded with any text in an id or a code."""
    sent = sold(at)
    odd = next(
        each.id for each in at.account.events if each.id in sent and old in msgspec.json.format(each.body, indent=-1)
    )
    make_odd(at, "/v1/events", odd, lambda item: item.replace(old, new))

    assert gaps.run_once(at.context(), since=at.now - timedelta(days=1)).recorded == len(sent)


def test_an_event_is_kept_byte_for_byte(at: Stage) -> None:
    """A listed event is recorded as from a webhook: its bytes, without credentials, and the hash of the original."""
    at.account.finalize_invoice(at.account.create_invoice(at.account.create_customer(currency="usd"), 500))
    at.account.advance(120)
    listed: list[bytes] = []

    def keep(body: bytes) -> bytes:
        page = listing.cut(body)
        listed.extend(page.items if page is not None else [])
        return body

    at.faults.add(None, "/v1/events", times=ALWAYS, rewrite=keep)
    gaps.run_once(at.context(), since=at.now - timedelta(days=1))

    rows = at.rows("SELECT payload, payload_sha256, redacted FROM events")
    assert {row["payload_sha256"] for row in rows} == {hashlib.sha256(item).hexdigest() for item in listed}
    assert {bytes(row["payload"]) for row in rows if not row["redacted"]} <= set(listed)
    blanked = [bytes(row["payload"]) for row in rows if row["redacted"]]
    assert blanked
    assert any(b"https://invoice.stripe.com" in item for item in listed)
    assert not any(b"https://invoice.stripe.com" in payload for payload in blanked)


UNREADABLE: Final = {
    "no id": lambda item: item.replace(b'"id":"evt_', b'"no":"evt_', 1),
    "half an id": lambda item: item.replace(b'"id":"evt_', rb'"id":"\ud800', 1),
    "an id that is a number": lambda _: b'{"id":5,"type":"x","created":1,"data":{"object":{}}}',
    "no object at all": lambda _: b"null",
    "a number": lambda _: b"17",
    "not UTF-8": lambda item: item[:-1] + b',"note":"\xff"}',
    "a bare line break": lambda item: item[:-1] + b',"note":"\n"}',
    "not a number": lambda item: item[:-1] + b',"note":NaN}',
}


@pytest.mark.parametrize("odd", UNREADABLE.values(), ids=UNREADABLE.keys())
@pytest.mark.parametrize("place", [0, -1])
def test_an_event_without_a_name_is_counted(
    at: Stage, capsys: pytest.CaptureFixture[str], odd: Callable[[bytes], bytes], place: int
) -> None:
    """An event without a readable id, type and created is counted and logged; the rest of the page is recorded."""
    sent = sold(at)
    make_odd(at, "/v1/events", sent[place], odd)

    found = gaps.run_once(at.context(), since=at.now - timedelta(days=1))

    assert {row["id"] for row in at.rows("SELECT id FROM inbox")} == set(sent) - {sent[place]}
    assert found.counted["unreadable"] == 1
    assert found.failed == []
    assert job(at)["reached_at"] == at.now - gaps.SETTLED
    assert "stripe.unreadable" in "".join(capsys.readouterr())


def test_the_last_of_a_page_may_have_no_name(at: Stage) -> None:
    """If the last object of a page has no id, the next page is requested after the object before it."""
    sessions = [at.account.open_session() for _ in range(130)]
    hundredth = sessions[30]  # the newest are listed first
    make_odd(at, "/v1/checkout/sessions", hundredth, UNREADABLE["no object at all"])

    found = discovery.run_once(at.context())

    assert found.recorded == 129
    assert found.failed == []


def test_an_odd_twin_is_read(at: Stage) -> None:
    """The event that a thin event names is recorded however odd; one without an id is given up, with the reason."""
    session = at.account.open_session()
    at.account.complete(session)
    first, second = at.account.events[-2:]
    thin = {"object": "v2.core.event", "livemode": False, "created": "2026-11-01T00:00:01.000Z"}
    about = {"id": session, "type": "checkout.session", "url": "/v1/x"}
    for number, twin in enumerate((first, second)):
        body = thin | {"id": f"evt_thin_{number}", "type": f"v1.{twin.type}", "related_object": about}
        ledger.record(at.engine, [ledger.delivery(msgspec.json.encode(body | {"snapshot_event": twin.id}))])
    at.fold()
    make_odd(at, f"/v1/events/{first.id}", first.id, noted(rb'"\ud800"'))
    make_odd(at, f"/v1/events/{second.id}", second.id, UNREADABLE["no id"])

    fetches.run_once(at.context(later=timedelta(days=20)))

    assert at.rows("SELECT source FROM inbox WHERE id = :id", id=first.id) == [{"source": "gap"}]
    ((call,)) = at.rows("SELECT object_id, given_up FROM stripe_calls")
    assert call["object_id"] == second.id
    assert "no id" in call["given_up"]


# Objects that are polled and read.


@pytest.mark.parametrize("value", ODD.values(), ids=ODD.keys())
def test_an_odd_session_is_found_with_its_page(at: Stage, value: bytes) -> None:
    """An odd open session is recorded once, and so are the others of its page."""
    sessions = [at.account.open_session() for _ in range(5)]
    make_odd(at, "/v1/checkout/sessions", sessions[2], noted(value))

    found = discovery.run_once(at.context())

    assert found.failed == []
    assert {row["object_id"] for row in at.rows("SELECT object_id FROM inbox")} == set(sessions)
    at.fold()
    assert {at.status(session) for session in sessions if session != sessions[2]} == {"open"}
    at.account.advance(30)
    assert discovery.run_once(at.context()).recorded == 0


def test_an_odd_session_that_changes_is_recorded(at: Stage) -> None:
    """An odd object that changes is recorded again, odd or not."""
    session = at.account.open_session()
    for value in (rb'"\ud800"', rb'"\udfff"', b'"whole"', rb'"\ud800"'):
        at.faults.add(None, "/v1/checkout/sessions", rewrite=with_odd(session, noted(value)))
        at.account.advance(30)
        assert discovery.run_once(at.context()).recorded == 1


def test_a_session_without_a_name_is_counted(at: Stage) -> None:
    """An open session without an id is counted, and the others are found."""
    sessions = [at.account.open_session() for _ in range(3)]
    make_odd(at, "/v1/checkout/sessions", sessions[1], lambda item: item.replace(b'"id":"cs_', b'"no":"cs_', 1))

    found = discovery.run_once(at.context())

    assert (found.recorded, found.counted["unreadable"], found.failed) == (2, 1, [])


@pytest.mark.parametrize("value", ODD.values(), ids=ODD.keys())
def test_an_odd_transaction_is_read_with_its_ledger(at: Stage, value: bytes) -> None:
    """A ledger with an odd transaction is recorded whole."""
    customer = at.account.create_customer(currency="usd")
    transactions = [at.account.adjust_balance(customer, amount) for amount in (-300, 100, -50)]
    at.deliver()
    make_odd(at, "*/balance_transactions", transactions[1], noted(value))

    found = fetches.run_once(at.context())

    assert found.counted == {"ledgers": 1}
    assert at.rows("SELECT count(*) AS events FROM inbox WHERE object_id LIKE 'cbtxn_%'") == [{"events": 3}]
    assert at.rows("SELECT FROM stripe_calls") == []


def test_a_transaction_without_a_name_is_given_up(at: Stage) -> None:
    """The other transactions of the ledger are recorded, and the call is given up with the reason."""
    customer = at.account.create_customer(currency="usd")
    transactions = [at.account.adjust_balance(customer, amount) for amount in (-300, 100, -50)]
    at.deliver()
    make_odd(at, "*/balance_transactions", transactions[1], lambda _: b"{}")

    fetches.run_once(at.context())

    assert at.rows("SELECT count(*) AS events FROM inbox WHERE object_id LIKE 'cbtxn_%'") == [{"events": 2}]
    assert at.rows("SELECT given_up FROM stripe_calls") == [
        {"given_up": "1 of its transactions have no readable id and type."}
    ]


def test_an_odd_line_leaves_its_note_incomplete(at: Stage) -> None:
    """A long credit note with an odd line keeps its first page, and delays no other call."""
    customer = at.account.create_customer(currency="usd")
    invoice = at.account.create_invoice(customer, 5_000)
    at.account.finalize_invoice(invoice)
    note = at.account.issue_credit_note(invoice, 2_300, lines=[100] * 23)
    at.account.complete(session := at.account.open_session())
    at.deliver()
    at.faults.add(
        None,
        f"/v1/credit_notes/{note}/lines",
        times=ALWAYS,
        rewrite=lambda body: body.replace(b'"data": [', b'"data": [{"note":"\\ud800"},', 1),
    )

    found = fetches.run_once(at.context())

    assert found.failed == []
    assert found.counted == {"credit_notes": 1, "sessions": 1}
    at.fold()
    assert at.rows("SELECT lines_complete FROM orders WHERE id = :id", id=session) == [{"lines_complete": True}]


def test_an_odd_answer_to_an_expire_call_is_recorded(at: Stage) -> None:
    """The session is expired, its odd answer is recorded, and the other sessions are expired too."""
    sessions = at.open(3)
    make_odd(at, f"/v1/checkout/sessions/{sessions[0]}/expire", sessions[0], noted(rb'"\ud800"'))

    found = at.expire()

    assert found.counted == {"expired": 3}
    assert {at.account.expected_status(session) for session in sessions} == {"expired"}
    assert at.rows("SELECT count(*) AS events FROM inbox WHERE type = 'payfold.checkout.session.observed'") == [
        {"events": 3}
    ]


def test_an_answer_without_an_object_is_given_up(at: Stage) -> None:
    """A call whose answer holds no object to record is given up, with the reason."""
    sessions = at.open(3)
    make_odd(at, f"/v1/checkout/sessions/{sessions[0]}/expire", sessions[0], lambda _: b'{"deleted":true}')

    found = at.expire()

    assert found.counted == {"expired": 2, "unreadable": 1}
    ((call,)) = at.rows("SELECT object_id, given_up FROM stripe_calls")
    assert call["object_id"] == sessions[0]
    assert "nothing to record it by" in call["given_up"]


def test_a_proxys_page_is_no_answer(at: Stage) -> None:
    """A proxy's page in place of Stripe's answer is tried again, and nothing is concluded from it."""
    (session,) = at.open()
    at.faults.add(None, "*/expire", rewrite=lambda _: b"<html>Sign in to this network</html>")

    assert at.expire().counted == {"postponed": 1}
    assert at.expire(at.context(later=timedelta(minutes=1))).counted == {"was_over": 1}
    assert at.status(session) == "expired"


# The comparison with Stripe.


@pytest.mark.parametrize("odd", [lambda item: item[:-1] + b',"amount_total":{}}', lambda _: b"{}"])
def test_an_odd_object_ends_no_comparison(at: Stage, odd: Callable[[bytes], bytes]) -> None:
    """An odd object is counted as not compared; the others are compared, and their differences are found."""
    sessions = [at.account.open_session() for _ in range(3)]
    for session in sessions:
        at.account.complete(session)
    at.deliver()
    at.account.advance(120)
    ledger.execute(at.engine, "UPDATE orders SET amount_total = 1 WHERE id = :id", id=sessions[0])
    make_odd(at, "/v1/checkout/sessions", sessions[1], odd)
    make_odd(at, f"/v1/checkout/sessions/{sessions[1]}", sessions[1], odd)

    sent = list(against_stripe.audit(at.context()))

    tally = next(each for each in sent if isinstance(each, kinds.Listed) and each.object == "checkout.session")
    assert (tally.listed, tally.different) == (3, 1)
    assert tally.unreadable >= 1


# How an answer comes in.


def test_an_answer_that_comes_in_drops_ends(at: Stage) -> None:
    """An answer that is too slow as a whole, although each byte is in time, ends the call with an unknown outcome."""
    session = at.account.open_session()
    at.faults.add(None, "*", times=ALWAYS, trickle_seconds=0.05)
    context = at.context(body_seconds_max=0.5)
    ended = threading.Event()

    def read() -> None:
        with pytest.raises(StripeAway):
            context.api.call(HERE, "get", "checkout", "sessions", session, lane=Lane.EXPIRY)
        ended.set()

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    # The whole answer would take more than a minute.
    assert ended.wait(20)


def test_an_answer_that_breaks_off_is_no_answer(at: Stage) -> None:
    """An answer shorter than its announced length is not taken for a whole one."""
    session = at.account.open_session()
    at.faults.add(Fault.CUT_SHORT, "*")

    with pytest.raises(StripeAway):
        at.context().api.call(HERE, "get", "checkout", "sessions", session, lane=Lane.EXPIRY)


# The cutter.


def test_a_page_is_cut_where_its_items_are() -> None:
    """An odd item changes neither the other items nor the flag for more pages."""
    for value in ODD.values():
        items = [b'{"id":"a"}', b'{"id": "b", "note":' + value + b"}", b'"]},{["', b"17", b"[[],[1]]", b'{"c":"\\""}']
        page = b'{"object":"list", "data": [' + b" ,\n ".join(items) + b' ], "has_more":true,"url":"/v1/x"}'
        assert listing.cut(page) == listing.Page(items, has_more=True)
        assert listing.cut(b" [" + b",".join(items) + b"]") == listing.Page(items)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.text(),
            lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        )
    ),
    st.sampled_from([b'{"x":"\\ud800"}', b'"\\udfff"', b"[" * 2_000 + b"]" * 2_000]),
)
def test_the_slow_cut_equals_the_quick_one(items: list[Any], odd: bytes) -> None:
    """With an item that the decoder refuses, all items are cut as they were written."""
    texts = [msgspec.json.encode(item) for item in items if not _is_surrogate(item)]

    assert listing.cut(b'{"data":[' + b",".join([*texts, odd]) + b"]}") == listing.Page([*texts, odd])


def _is_surrogate(item: object) -> bool:
    try:
        msgspec.json.encode(item)
    except (UnicodeEncodeError, OverflowError):
        return True
    return False


@pytest.mark.parametrize(
    "text",
    [b"", b"{}", b'"data"', b'{"object":"event","data":[1]}', b'{"data":{"object":1}}', b'{"data":[1', b"<html>"],
)
def test_a_body_that_is_no_page_is_not_cut(text: bytes) -> None:
    """An event, a text or a truncated page has no items."""
    assert listing.cut(text) is None
