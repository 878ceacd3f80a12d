"""A signed and readable event is kept byte for byte, without the credentials in it."""

import json
import re
from random import Random
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deploy.sandbox.account import START, Account
from schemas import events
from schemas.errors import BodyEmpty, BodyNotJson, BodyNotText, NotAnEvent, Refused
from tests import reference_blanking
from tests.web import event

SECRET = "https://checkout.stripe.com/c/pay/cs_test_a1#fidkdWxOYHwnPyd1"
PLACES = ["data.object", "data.previous_attributes"]
CREDENTIALS = [
    ("checkout.session", "url"),
    ("checkout.session", "client_secret"),
    ("billing_portal.session", "url"),
    ("invoice", "hosted_invoice_url"),
    ("invoice", "invoice_pdf"),
    ("credit_note", "pdf"),
]


def about(kind: str, members: str, previous: str = "{}") -> bytes:
    """Return an event about an object of *kind* with *members*, written as JSON."""
    data = f'{{"object":{{"object":"{kind}","id":"x_1",{members}}},"previous_attributes":{previous}}}'
    return f'{{"id":"evt_1","object":"event","type":"t","created":1,"data":{data}}}'.encode()


def test_envelope() -> None:
    """An event as Stripe sends it is keyed by its own fields, and kept as it is."""
    account = Account(seed=1, account="acct_1", livemode=True)
    account.create_payment_link()
    sent = account.events[0]

    assert events.read(sent.body) == events.Envelope(
        id=sent.id,
        type="payment_link.created",
        created=START,
        livemode=True,
        account="acct_1",
        api_version=sent.api_version,
        object_type="payment_link",
        object_id=sent.object_id,
        payload=sent.body,
        redacted=(),
    )


REFUSED = {
    "empty": (b"", BodyEmpty),
    "not UTF-8": (event(name="é").replace("é".encode(), b"\xe9"), BodyNotText),
    "UTF-16": (event().decode().encode("utf-16"), BodyNotText),
    "half a character": (event() + b"\xc3", BodyNotText),
    "an encoded surrogate": (event(name="é").replace("é".encode(), b"\xed\xa0\x80"), BodyNotText),
    "byte order mark": (b"\xef\xbb\xbf" + event(), BodyNotJson),
    "white space": (b" \n", BodyNotJson),
    "form": (b"id=evt_1&type=t", BodyNotJson),
    "cut off": (event()[:-1], BodyNotJson),
    "two": (event() + event(), BodyNotJson),
    "single quotes": (event().replace(b'"', b"'"), BodyNotJson),
    "not a number": (event(n=1).replace(b'"n":1', b'"n":NaN'), BodyNotJson),
    "infinite": (event(n=1).replace(b'"n":1', b'"n":-Infinity'), BodyNotJson),
    "control character": (event(name="x").replace(b'"x"', b'"\n"'), BodyNotJson),
    "10,000 brackets": (b"[" * 10_000, BodyNotJson),
    "10,000 brackets of another kind": (b"[" * 10_000 + b"}" * 10_000, BodyNotJson),
    "list": (b"[]", NotAnEvent),
    "list of one": (b"[" + event() + b"]", NotAnEvent),
    "null": (b"null", NotAnEvent),
    "text": (b'"evt_1"', NotAnEvent),
    "object": (b"{}", NotAnEvent),
    "no id": (event().replace(b'"id"', b'"di"'), NotAnEvent),
    "no type": (event().replace(b'"type"', b'"kind"'), NotAnEvent),
    "no created": (event().replace(b'"created"', b'"made"'), NotAnEvent),
    "id null": (event(id=None), NotAnEvent),
    "id empty": (event(id=""), NotAnEvent),
    "id a number": (event(id=1), NotAnEvent),
    "id an object": (event(id={"id": "evt_1"}), NotAnEvent),
    "id of 10,000 characters": (event(id="e" * 10_000), NotAnEvent),
    "id with a NUL": (event(id="evt_\0"), NotAnEvent),
    "id with half a surrogate pair": (event(id="x").replace(b'"x"', b'"\\ud800"'), NotAnEvent),
    "type a list": (event(type=["t"]), NotAnEvent),
    "created a text": (event(created="1793491200"), NotAnEvent),
    "created a time in words": (event(created="2026-11-01T00:00:00Z"), NotAnEvent),
    "created true": (event(created=True), NotAnEvent),
    "created a fraction": (event(created=1.5), NotAnEvent),
    "created negative": (event(created=-1), NotAnEvent),
    "created after the year 9999": (event(created=253_402_300_800), NotAnEvent),
    "created beyond 64 bits": (event(created=1).replace(b'"created":1', b'"created":' + b"9" * 30), NotAnEvent),
    "created beyond all bounds": (event(created=1).replace(b'"created":1', b'"created":' + b"9" * 9999), NotAnEvent),
}


@pytest.mark.parametrize(("body", "error"), REFUSED.values(), ids=REFUSED.keys())
def test_refused(body: bytes, error: type[Refused]) -> None:
    """A body without the fields that key an event is refused, with a reason and a clear message of its own."""
    with pytest.raises(error) as raised:
        events.read(body)

    assert str(raised.value)


ODD = {
    "NUL in a name": about("checkout.session", '"name":"a\\u0000b"'),
    "number beyond 64 bits": about("checkout.session", f'"amount_total":{"9" * 40}'),
    "number beyond all bounds": about("checkout.session", f'"amount_total":{"9" * 9999}'),
    "float beyond all bounds": about("checkout.session", '"amount_total":1e9999'),
    "10,000 levels": about("checkout.session", f'"deep":{"[" * 10_000}{"]" * 10_000}'),
    "10,000 levels of objects": about("checkout.session", '"deep":' + '{"a":' * 10_000 + "1" + "}" * 10_000),
    "half a surrogate pair": about("checkout.session", '"name":"\\ud800"'),
    "half a surrogate pair and a long number": about("checkout.session", f'"name":"\\udc00","n":{"9" * 9999}'),
    "amount is a text": about("checkout.session", '"amount_total":"12.50"'),
    "livemode is a text": about("checkout.session", '"a":1').replace(b'"type"', b'"livemode":"true","type"'),
    "account is a number": about("checkout.session", '"a":1').replace(b'"type"', b'"account":7,"type"'),
    "version is a list": about("checkout.session", '"a":1').replace(b'"type"', b'"api_version":[],"type"'),
    "duplicate keys": about("checkout.session", '"a":1,"a":2').replace(b'"type"', b'"type":1,"type"'),
    "unknown type": about("thing", '"a":1'),
    "white space everywhere": json.dumps(json.loads(about("thing", '"a":1')), indent=9).encode(),
}


@pytest.mark.parametrize("body", ODD.values(), ids=ODD.keys())
def test_odd(body: bytes) -> None:
    """An event with an id, a type and a time is kept byte for byte, however odd its other fields are."""
    envelope = events.read(body)

    assert (envelope.id, envelope.type, envelope.created) == ("evt_1", "t", 1)
    assert (envelope.payload, envelope.redacted) == (body, ())


@pytest.mark.parametrize("body", [event(data=1), event(data=None), event(data={"object": []}), event(data={})])
def test_odd_data(body: bytes) -> None:
    """An event without a recognizable object is kept without one."""
    envelope = events.read(body)

    assert (envelope.object_type, envelope.object_id, envelope.payload) == (None, None, body)


def test_odd_objects_are_found() -> None:
    """An event that only the slow reader can read is keyed by the same object as by the quick reader."""
    plain = about("checkout.session", '"amount_total":1')
    odd = plain.replace(b'"id":"evt_1"', b'"id":"evt_1","livemode":"x"')

    assert events.read(odd).object_id == events.read(plain).object_id == "x_1"
    assert events.read(odd).object_type == events.read(plain).object_type == "checkout.session"


@pytest.mark.parametrize(
    ("created", "seconds"),
    [
        ("2026-11-01T00:00:00.999Z", START),
        ("2026-11-01T01:00:00+01:00", START),
        ("2026-11-01T00:00:00", START),
        ("1970-01-01T00:00:00.000Z", 0),
    ],
)
def test_thin(created: str, seconds: int) -> None:
    """A thin event is keyed by its related object and by its whole second."""
    body = event(
        object="v2.core.event", created=created, data=None, related_object={"id": "cs_1", "type": "checkout.session"}
    )
    envelope = events.read(body)

    assert (envelope.created, envelope.object_type, envelope.object_id) == (seconds, "checkout.session", "cs_1")
    assert envelope.payload == body


@pytest.mark.parametrize(
    ("context", "account"),
    [("acct_1", "acct_1"), ("acct_1/acct_2", "acct_2"), ("wksp_1", None), ("", None), (None, None), (7, None)],
)
def test_the_account_of_a_thin_event(context: object, account: str | None) -> None:
    """A thin event's account is the one in its routing context, or none."""
    thin = event(object="v2.core.event", created="2026-11-01T00:00:00.000Z", data=None, context=context)

    assert events.read(thin).account == account


@pytest.mark.parametrize("created", ["yesterday", "", None, [], "99999-01-01T00:00:00Z", "1969-12-31T23:59:59Z"])
def test_thin_without_a_time(created: object) -> None:
    """A thin event with an unreadable time is refused."""
    with pytest.raises(NotAnEvent):
        events.read(event(object="v2.core.event", created=created))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("kind", "key"), CREDENTIALS)
def test_credentials(kind: str, key: str, place: str) -> None:
    """A credential is blanked at its place, the place is reported, and no other byte changes."""
    member = f'"{key}":"{SECRET}"'
    body = about(kind, member) if place == "data.object" else about(kind, '"a":1', f"{{{member}}}")
    envelope = events.read(body)

    assert envelope.payload == body.replace(SECRET.encode(), b"")
    assert envelope.redacted == (f"{place}.{key}",)


def test_credentials_of_others() -> None:
    """The same key of another kind of object is kept, such as a payment link's url."""
    body = about("payment_link", f'"url":"{SECRET}","pdf":"{SECRET}"')

    assert events.read(body).payload == body


def test_all_credentials_of_a_session() -> None:
    """Both of a session's credentials are blanked, also in previous_attributes, and the recovery url is kept."""
    recovery = '"after_expiration":{"recovery":{"url":"https://buy.stripe.com/r/live_a1b2c3"}}'
    both = f'"client_secret":"cs_test_a1_secret_fid","url":"{SECRET}"'
    envelope = events.read(about("checkout.session", f"{both},{recovery}", f"{{{both}}}"))

    assert envelope.payload == about(
        "checkout.session", f'"client_secret":"","url":"",{recovery}', '{"client_secret":"","url":""}'
    )
    assert envelope.redacted == tuple(f"{place}.{key}" for place in PLACES for key in ("client_secret", "url"))


ESCAPED = SECRET.replace("/", "\\/")
RENDERINGS = {
    "escaped slashes": (f'"url":"{ESCAPED}"', '"url":""'),
    "escaped key": (f'"u\\u0072l":"{SECRET}"', '"u\\u0072l":""'),
    "escaped key and a plain one": (f'"url":null,"\\u0075rl":"{SECRET}"', '"url":null,"\\u0075rl":""'),
    "spaces": (f'"url"\t:\n "{SECRET}" ', '"url"\t:\n "" '),
    "the first of two": (f'"url":"{SECRET}","url":null', '"url":"","url":null'),
    "the second of two": (f'"url":"{SECRET}","url":"{SECRET}2"', '"url":"","url":""'),
    "the first of two, with a recovery": (
        f'"url":"{SECRET}","url":null,"after_expiration":{{"recovery":{{"url":"https://buy.stripe.com/r/a"}}}}',
        '"url":"","url":null,"after_expiration":{"recovery":{"url":"https://buy.stripe.com/r/a"}}',
    ),
    "short": ('"url":"s","name":"s"', '"url":"","name":"s"'),
    "a number": ('"url":1234567890123456789', '"url":""'),
    "an object": (f'"url":{{"a":["{SECRET}"]}}', '"url":""'),
    "a list": (f'"url":["{SECRET}"]', '"url":""'),
    "half a surrogate pair": (f'"url":"{SECRET}\\ud800"', '"url":""'),
    "escaped quote": (f'"url":"{SECRET}\\"more"', '"url":""'),
    "escaped quotes, and the same bytes as a member": (
        '"url":"two\\":\\"quotes of 16","x":{"two":"quotes of 16"}',
        '"url":"","x":{"two":"quotes of 16"}',
    ),
    "key given twice": (
        f'"url":"{SECRET}","metadata":{{"link":"{SECRET}"}}',
        '"url":"","metadata":{"link":""}',
    ),
    "key given twice, not readable quickly": (
        f'"url":"{SECRET}","metadata":{{"link":"{SECRET}"}},"\\u0061":1',
        '"url":"","metadata":{"link":""},"\\u0061":1',
    ),
    "with 10,000 levels": (
        f'"url":"{SECRET}","deep":{"[" * 10_000}{"]" * 10_000}',
        f'"url":"","deep":{"[" * 10_000}{"]" * 10_000}',
    ),
    "another object first": (f'"url":"{SECRET}","object":"thing"', '"url":"","object":"thing"'),
}


@pytest.mark.parametrize(("members", "expected"), RENDERINGS.values(), ids=RENDERINGS.keys())
def test_odd_renderings(members: str, expected: str) -> None:
    """A credential is blanked and reported however it is written, and nothing else changes."""
    envelope = events.read(about("checkout.session", members))

    assert envelope.payload == about("checkout.session", expected)
    assert envelope.redacted == ("data.object.url",)


def test_two_data_keys() -> None:
    """A session in the first of two `data` keys has its credential blanked, though the second is read."""
    body = about("checkout.session", f'"url":"{SECRET}"')
    envelope = events.read(body[:-1] + b',"data":{"object":{"object":"thing","id":"y_1"}}}')

    assert SECRET.encode() not in envelope.payload
    assert envelope.object_id == "y_1"


@pytest.mark.parametrize("members", ['"url":null', '"url":""', '"name":"url"', '"x":{"url":"kept, being elsewhere"}'])
def test_nothing_to_blank(members: str) -> None:
    """An event without a credential does not change, and no place is reported."""
    body = about("checkout.session", members)

    assert (events.read(body).payload, events.read(body).redacted) == (body, ())


short_texts = st.text('abé"\\\0', max_size=4)  # too short to be blanked elsewhere, however they are escaped
scalars = st.none() | st.booleans() | st.integers() | short_texts
names = st.sampled_from(["url", "client_secret", "object", "id", "data", "data.object", ""]) | short_texts
values = st.recursive(scalars, lambda inner: st.lists(inner) | st.dictionaries(names, inner), max_leaves=8)
credentials = st.dictionaries(
    st.sampled_from(["url", "client_secret"]), st.sampled_from([None, "", SECRET, 7, [SECRET]])
)
holders = st.builds(dict[str, Any], st.dictionaries(names, values) | credentials)


def blanked(holder: dict[str, Any]) -> dict[str, Any]:
    """Return a session's members as they are stored."""
    secret = [key for key in ("url", "client_secret") if holder.get(key) is not None]
    return holder | dict.fromkeys(secret, "")


@given(members=holders, before=holders, escaped=st.booleans(), indent=st.sampled_from([None, 2]))
def test_any_session(members: dict[str, Any], before: dict[str, Any], escaped: bool, indent: int | None) -> None:  # noqa: FBT001 - a drawn value
    """Only the credentials of a session are blanked, by the quick reader and by the slow one."""
    session = members | {"object": "checkout.session", "id": "cs_1"}
    head = {"id": "evt_1", "type": "t", "created": 1}
    body = json.dumps(
        head | {"data": {"object": session, "previous_attributes": before}}, ensure_ascii=escaped, indent=indent
    )
    envelope = events.read(body.encode())

    stored = {"object": blanked(session), "previous_attributes": blanked(before)}
    assert json.loads(envelope.payload) == head | {"data": stored}
    assert set(envelope.redacted) == {
        f"data.{name}.{key}"
        for name, holder in (("object", session), ("previous_attributes", before))
        for key in ("client_secret", "url")
        if holder.get(key) not in (None, "")
    }


class Members(list[tuple[str, Any]]):
    """The members of an object, of which several may have one key."""


def escaped(character: str) -> str:
    """Return *character* as the escape of its number."""
    return f"\\u{ord(character):04x}"


def written(value: object, random: Random) -> str:
    """Return *value* as JSON with any spaces, and any characters written as escapes."""
    space = random.choice(["", "", "", " \n\t"])
    if isinstance(value, Members):
        members = (f"{written(key, random)}{space}:{space}{written(each, random)}" for key, each in value)
        return f"{{{space}{f',{space}'.join(members)}{space}}}"
    if isinstance(value, list):
        return f"[{','.join(written(each, random) for each in value)}]"
    if isinstance(value, str) and random.random() < 0.05:
        return f'"{"".join(random.choice([json.dumps(each)[1:-1], escaped(each)]) for each in value)}"'
    return json.dumps(value)


KINDS = ["checkout.session", "checkout.session", "invoice", "thing"]
KEYS = ["url", "url", "client_secret", "pdf", "invoice_pdf"]
ODD_VALUES: list[Any] = [SECRET, SECRET, f"{SECRET}2", "x", "", 'two", "quotes of 16', None, 7, [SECRET], "invoice"]


def some(keys: list[str], random: Random) -> Members:
    """Return up to four members, perhaps several under one key, most with a text."""
    return Members((random.choice(keys), random.choice(ODD_VALUES)) for _ in range(random.randint(0, 4)))


def put(members: Members, key: str, values: list[Any], random: Random) -> Members:
    """Put *values* under *key* anywhere among *members*."""
    for value in values:
        members.insert(random.randint(0, len(members)), (key, value))
    return members


def odd_data(random: Random) -> Members:
    """Return an event's data with one session or another object, now and then with several, or with odd keys."""
    rare = random.random() < 0.2
    data = some(["object.url", "object.object", "previous_attributes.url"], random) if rare else Members()
    for _ in range(1 + (random.random() < 0.1)):
        session = put(some([*KEYS, "name", "id"], random), "object", [random.choice(KINDS)], random)
        if random.random() < 0.1:
            put(session, "object", [random.choice(KINDS)], random)
        put(session, "after_expiration", [some(KEYS, random)], random)
        put(data, "object", [session], random)
    return put(data, "previous_attributes", [some(KEYS, random) for _ in range(random.choice([0, 1, 1, 2]))], random)


def odd_event(random: Random) -> Members:
    """Return an event that only a few keys make readable."""
    rare = random.random() < 0.2
    event = some(["data.object.url", "data.object.object", "request"], random) if rare else Members()
    for key, value in (("id", "evt_1"), ("type", "t"), ("created", 1), ("data", odd_data(random))):
        put(event, key, [value], random)
    if random.random() < 0.1:
        place = random.choice(["data.object", "data.previous_attributes"])
        put(event, place, [some([*KEYS, "object"], random)], random)
    return put(event, "data", [odd_data(random)] if random.random() < 0.1 else [], random)


@settings(max_examples=20)
@given(st.randoms(use_true_random=True))
def test_any_odd_event(random: Random) -> None:
    """Any event loses the credentials that the plain reading of the rule names, and no other byte."""
    for _ in range(50):
        body = written(odd_event(random), random).encode()
        envelope = events.read(body)

        assert (envelope.payload, set(envelope.redacted)) == reference_blanking.blanked(body), body


@given(st.binary(max_size=200) | st.text('{}[]:,"\\ idtype1cre', max_size=60).map(str.encode))
def test_any_bytes(body: bytes) -> None:
    """Any bytes are either read or refused."""
    try:
        envelope = events.read(body)
    except Refused:
        return
    assert msgspec.json.decode(body)["id"] == envelope.id


EVENT = {"id": "evt_1", "object": "event", "type": "charge.succeeded", "created": 1, "data": {"object": {"id": "ch_1"}}}
WRAPPED: dict[str, tuple[object, str]] = {
    "n8n": ([{"headers": {}, "query": {}, "body": EVENT}], "[0].body"),
    "EventBridge": ({"version": "0", "id": "0f0f", "detail-type": "charge.succeeded", "detail": EVENT}, "detail"),
    "CloudEvents": ({"specversion": "1.0", "id": "1", "type": "com.example", "data": EVENT}, "data"),
    "Singer": ({"type": "RECORD", "stream": "events", "record": EVENT}, "record"),
    "Airbyte": ({"_airbyte_raw_id": "1", "_airbyte_data": EVENT}, "_airbyte_data"),
    "text": ({"seq": 1, "payload": json.dumps(EVENT)}, "payload (JSON as text)"),
    "a queue's message": ({"Records": [{"messageId": "1", "body": json.dumps({"detail": EVENT})}]}, "Records[0].body"),
    "text in text": (json.dumps(json.dumps(EVENT)), "(JSON as text)"),
    "without its own name": ({"rows": {"1": {k: v for k, v in EVENT.items() if k != "object"}}}, "rows.1"),
    "thin": ({"body": {"id": "evt_1", "object": "v2.core.event", "type": "v1.charge.succeeded"}}, "body"),
}


@pytest.mark.parametrize("tool", WRAPPED)
def test_the_place_of_a_wrapped_event(tool: str) -> None:
    """An event that a tool has wrapped is refused with the place of the event in the body."""
    wrapped, place = WRAPPED[tool]

    with pytest.raises(NotAnEvent, match=re.escape(f"An event stands in it at {place}")):
        events.read(json.dumps(wrapped).encode())


def test_several_wrapped_events() -> None:
    """The refusal of a body with several events advises to pass each of them on."""
    records = {"Records": [{"body": json.dumps(EVENT)}, {"body": json.dumps(EVENT)}]}
    with pytest.raises(NotAnEvent, match=r"2 events stand in it, the first at Records\[0\]\.body"):
        events.read(json.dumps(records).encode())
    with pytest.raises(NotAnEvent, match=r"2 events stand in it, the first at data\[0\]"):
        events.read(json.dumps({"object": "list", "data": [EVENT, EVENT]}).encode())


@pytest.mark.parametrize("key", ["buyer@example.com", "\ud800", "a" * 50, "line\nbreak"])
def test_advice_shows_only_plain_names(key: str) -> None:
    """The path to a wrapped event shows only plain names, and the message is ASCII."""
    with pytest.raises(NotAnEvent, match=r"An event stands in it at \?: pass") as refusal:
        events.read(json.dumps({key: EVENT}).encode())
    assert str(refusal.value).isascii()


@pytest.mark.parametrize("kind", ["checkout.session", "charge", "customer"])
def test_an_object_without_its_event(kind: str) -> None:
    """An object without its event, as the Dashboard shows it, is refused with advice."""
    with pytest.raises(NotAnEvent, match="without its event"):
        events.read(json.dumps({"id": "x_1", "object": kind, "created": 1, "metadata": {}}).encode())


@pytest.mark.parametrize("body", [{}, [], {"object": "event"}, {"a": {"id": "x", "type": "y"}}, {"data": [1, None]}])
def test_no_advice_without_an_event(body: object) -> None:
    """A body that holds no event is refused without advice."""
    with pytest.raises(NotAnEvent) as refusal:
        events.read(json.dumps(body).encode())
    assert "stands in it" not in str(refusal.value)
    assert "without its event" not in str(refusal.value)


def test_advice_has_an_end() -> None:
    """An event below ten thousand levels gets no advice, and is refused all the same."""
    deep = b'{"a":' * 10_000 + json.dumps(EVENT).encode() + b"}" * 10_000
    with pytest.raises(NotAnEvent):
        events.read(deep)


@pytest.mark.parametrize("created", ["1700000000.0", "1.7e9"])
def test_a_whole_float_is_a_time(created: str) -> None:
    """A whole number written as a float, as other languages do, is a time."""
    body = json.dumps(EVENT).replace('"created": 1', f'"created": {created}')
    assert events.read(body.encode()).created == 1_700_000_000
