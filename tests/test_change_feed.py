"""A reader that follows the change feed by its cursor sees every change once, and soon."""

import hashlib
import random
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase
from typing import Any

import psycopg
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import Engine

from deploy.local.postgres import Postgres
from deploy.local.services import Services
from deploy.sandbox.history import shop_history
from schemas import answers, database, feed, tables
from schemas.change_rows import COLUMNS, IN_FEED, ChangeRow
from schemas.kinds import CHOICES, KINDS, SUBJECTS, chosen
from schemas.migrate import upgrade
from tests import ledger
from tests.envelopes import event
from tests.web import Web, bearer, serving, serving_many, settings_of

CHANGE = """INSERT INTO changes (account, livemode, subject, subject_id, kind, event_id, source, at)
    VALUES ('', false, 'payment_link', %s, 'payment_link.activated', 'evt_1', 'webhook', now())"""
NUMBERED = """INSERT INTO changes (seq, account, livemode, subject, subject_id, kind, event_id, source, at)
    OVERRIDING SYSTEM VALUE
    VALUES (%s, '', false, 'payment_link', %s, 'payment_link.activated', 'evt_1', 'webhook', now())"""
OF_A_WORLD = """INSERT INTO changes (account, livemode, subject, subject_id, kind, event_id, source, at, withheld)
    VALUES (%s, %s, %s, %s, %s, 'evt_1', 'webhook', now(), %s)"""
TEST, LIVE = ("", False), ("", True)
GIVEN = "SELECT nextval('changes_seq_seq') FROM generate_series(1, %s)"


@pytest.fixture
def web(database_url: str, redis_url: str) -> Iterator[Web]:
    """Return a running web process."""
    with serving(settings_of(database_url, redis_url)) as running:
        yield running


def changes(web: Web, **parameters: object) -> dict[str, Any]:
    """Return a page of the feed."""
    query = "&".join(f"{name}={value}" for name, value in parameters.items())
    response = web.get(f"/v1/changes?{query}")
    assert response.status_code == 200
    answer: dict[str, Any] = response.json()
    return answer


def subjects(answer: dict[str, Any]) -> list[str]:
    """Return the subject ids of the changes in an answer."""
    return [change["subject_id"] for change in answer["data"]]


def test_a_row_of_changes_has_one_form() -> None:
    """What is appended to the feed, what a reader is shown and what the API answers have the columns of the table."""
    columns = {column.name for column in tables.changes.columns}
    assert ChangeRow.__required_keys__ | ChangeRow.__optional_keys__ == {*COLUMNS} == columns - {"seq"}
    assert {"seq", *IN_FEED} == columns - {"withheld"} == answers.Change.model_fields.keys() - {"personal"}


def test_pages(web: Web) -> None:
    """The cursor leads through all changes in order, and does not move at the end."""
    for number in range(5):
        web.query(CHANGE, f"plink_{number}")
    seen, after, more = [], 0, True
    while more:
        answer = changes(web, after=after, limit=2)
        seen += subjects(answer)
        after, more = answer["next_after"], answer["has_more"]

    assert seen == [f"plink_{number}" for number in range(5)]
    assert changes(web, after=after) == {"data": [], "next_after": after, "has_more": False}


def test_withheld_changes(web: Web) -> None:
    """A withheld change is not in the feed, and does not wake a waiting reader."""
    web.query(CHANGE, "plink_1")
    web.query(CHANGE, "plink_2")
    web.query("UPDATE changes SET withheld = 'import' WHERE subject_id = %s", "plink_2")

    answer = changes(web)
    assert subjects(answer) == ["plink_1"]
    started = time.monotonic()
    assert subjects(changes(web, after=answer["next_after"], wait=1)) == []
    assert time.monotonic() - started >= 1


def test_present_changes_are_returned_at_once(web: Web) -> None:
    """A reader does not wait if there are changes after its cursor."""
    web.query(CHANGE, "plink_1")
    started = time.monotonic()

    assert subjects(changes(web, wait=25)) == ["plink_1"]
    assert time.monotonic() - started < 10


def test_waiting_readers_are_woken(web: Web) -> None:
    """A new change wakes all waiting readers that have not seen it, and no others."""
    web.query(GIVEN, 6)
    with ThreadPoolExecutor(11) as readers:
        started = time.monotonic()
        waiting = [readers.submit(changes, web, wait=25) for _ in range(10)]
        further = readers.submit(changes, web, after=6, wait=1)
        # The last reader has begun to wait by then, and so have the others.
        assert changes(web, wait=0.3)["data"] == []
        # The change gets a number below the cursor of one reader.
        web.query(NUMBERED, 3, "plink_1")

        assert [subjects(each.result()) for each in waiting] == [["plink_1"]] * 10
        assert further.result() == {"data": [], "next_after": 6, "has_more": False}
        assert time.monotonic() - started < 10


def test_a_wait_without_changes(web: Web) -> None:
    """Without a change the answer comes at the end of the wait."""
    web.query(GIVEN, 7)
    started = time.monotonic()

    assert changes(web, after=7, wait=0.3) == {"data": [], "next_after": 7, "has_more": False}
    assert 0.3 <= time.monotonic() - started < 10


def test_misses_nothing(web: Web) -> None:
    """A reader that follows while changes are made sees each of them once, in order."""
    count = 400

    def write() -> None:
        with psycopg.connect(web.settings.libpq, autocommit=True) as connection:
            for number in range(count):
                connection.execute(CHANGE, [str(number)])

    writing = threading.Thread(target=write)
    writing.start()
    seen: list[str] = []
    after = 0
    while len(seen) < count:
        answer = changes(web, after=after, wait=20, limit=7)
        assert answer["data"], "nothing came, though more was written"
        seen += subjects(answer)
        after = answer["next_after"]
    writing.join()

    assert seen == [str(number) for number in range(count)]


def test_postgresql_restarted(own_postgres: Postgres, redis_url: str) -> None:
    """A reader that waits during a restart of PostgreSQL gets the next change."""
    upgrade(own_postgres.url)
    with serving(settings_of(own_postgres.url, redis_url)) as web, ThreadPoolExecutor(1) as reader:
        waiting = reader.submit(changes, web, wait=25)
        # The last reader has begun to wait by then, and so has the other.
        assert changes(web, wait=0.3)["data"] == []
        own_postgres.restart()
        web.query(CHANGE, "plink_1")

        assert subjects(waiting.result()) == ["plink_1"]


@pytest.mark.parametrize(
    "query",
    ["after=-1", f"after={2**63}", "after=x", "wait=26", "wait=-1", "wait=nan", "wait=inf", "limit=0", "limit=101"],
)
def test_bad_values(web: Web, query: str) -> None:
    """An invalid cursor, wait or limit is refused by its name."""
    response = web.get(f"/v1/changes?{query}")

    assert response.status_code == 422
    assert response.headers["content-type"] == "application/problem+json"
    assert response.json()["errors"][0]["place"] == f"query.{query.partition('=')[0]}"


# ---- Filters ----


@pytest.fixture(scope="module")
def mixed(services: Services) -> Iterator[Web]:
    """Return a web process and a feed with changes of every kind, account and mode in turn, some of them withheld."""
    rng = random.Random(17)
    with serving_many(services) as running:
        with psycopg.connect(running.settings.libpq) as connection:
            for number in range(200):
                kind = rng.choice(KINDS)
                subject = kind.partition(".")[0]
                withheld = rng.choice((None, None, None, "import"))
                world = (rng.choice(("", "acct_1")), rng.random() < 0.5)
                # Some numbers are given and never seen, as where a transaction is rolled back.
                connection.execute(GIVEN, [rng.choice((0, 0, 1))])
                connection.execute(OF_A_WORLD, [*world, subject, f"{subject}_{number}", kind, withheld])
        yield running


@pytest.fixture(scope="module")
def engine_of_mixed(mixed: Web) -> Iterator[Engine]:
    """Return an engine on that feed's database."""
    engine = database.engine(mixed.settings.postgresql)
    yield engine
    engine.dispose()


def read_all(web: Web, **filters: object) -> tuple[list[dict[str, Any]], int]:
    """Return the changes that a reader sees with *filters*, page by page, and where the cursor ends."""
    seen: list[dict[str, Any]] = []
    after, more = 0, True
    while more:
        answer = changes(web, **{**filters, "after": after})
        seen += answer["data"]
        assert answer["next_after"] >= after
        assert not answer["data"] or answer["next_after"] >= answer["data"][-1]["seq"]
        after, more = answer["next_after"], answer["has_more"]
    return seen, after


def a_filter(rng: random.Random) -> dict[str, Any]:
    """Return a random filter."""
    wanted: dict[str, Any] = {}
    if rng.random() < 0.6:
        wanted["livemode"] = rng.random() < 0.5
    if rng.random() < 0.4:
        wanted["account"] = rng.choice(("acct_1", "acct_unknown", ""))
    if rng.random() < 0.4:
        wanted["subject"] = rng.choice(SUBJECTS)
    if rng.random() < 0.6:
        wanted["kind"] = rng.sample(CHOICES, rng.choice((1, 3)))
    return wanted


def is_wanted(change: Mapping[str, Any], wanted: dict[str, Any]) -> bool:
    """Return whether *change* matches the filter *wanted*, without the product's code."""
    kinds = wanted.get("kind", ["*"])
    return all(change[name] == value for name, value in wanted.items() if name != "kind") and any(
        fnmatchcase(change["kind"], kind) for kind in kinds
    )


@settings(max_examples=30)
@given(rng=st.randoms(use_true_random=False), scanned=st.sampled_from((5, 40, feed.SCAN_ROWS_MAX)))
def test_a_filter_is_the_feed_filtered(engine_of_mixed: Engine, rng: random.Random, scanned: int) -> None:
    """A filtered feed, read page by page, has the matching changes of the whole feed and the same last cursor."""
    wanted, limit = a_filter(rng), rng.choice((3, 100))
    kinds = chosen(wanted["kind"]) if "kind" in wanted else None
    selected = feed.selection(**{**wanted, "kind": kinds})
    with database.transaction(engine_of_mixed) as connection:
        whole = feed.page(connection, 0, 1_000)
        found: list[Mapping[str, Any]] = []
        page, pages = feed.FeedPage([], 0, has_more=True), 0
        while page.has_more:
            page = feed.page(connection, page.next_after, limit, selected, scan_rows_max=scanned)
            found += page.rows
            pages += 1

    assert found == [change for change in whole.rows if is_wanted(change, wanted)]
    assert page.next_after == whole.next_after
    assert pages <= len(whole.rows) // min(scanned, limit) + 1


def test_filters_over_http(mixed: Web) -> None:
    """Filters work as query parameters: kinds are repeated parameters, and a star is every kind of a subject."""
    whole, end = read_all(mixed)
    wanted = {"livemode": True, "account": "acct_1", "kind": ["order.paid", "dispute.*"]}

    found, reached = read_all(mixed, livemode="true", account="acct_1", kind="order.paid&kind=dispute.*", limit=2)
    assert found == [change for change in whole if is_wanted(change, wanted)]
    assert {change["kind"] for change in found} == {"order.paid", "dispute.opened", "dispute.closed"}
    assert reached == end


def test_one_subject(mixed: Web) -> None:
    """A filter by id finds the changes of one object."""
    whole, _ = read_all(mixed)
    last = whole[-1]

    assert changes(mixed, subject=last["subject"], subject_id=last["subject_id"])["data"] == [last]


def test_a_live_reader_sees_no_test_payment(web: Web) -> None:
    """A reader of live payments gets no payment of test mode."""
    live, test = (shop_history(seed=seed, orders=15, livemode=seed == 1) for seed in (1, 2))
    engine = database.engine(web.settings.postgresql)
    both = [ledger.delivery(event.body) for pair in zip(live.events, test.events, strict=False) for event in pair]
    ledger.record(engine, both)
    ledger.fold(engine, limit=9)
    engine.dispose()

    found, _ = read_all(web, livemode="true", kind="order.paid", limit=3)
    paid = {order for (order,) in web.query("SELECT id FROM orders WHERE livemode AND status = 'paid'")}
    assert sorted(subjects({"data": found})) == sorted(paid)
    assert paid <= set(live.session_ids())
    assert paid
    in_test, _ = read_all(web, livemode="false", kind="order.paid")
    assert in_test
    assert not set(subjects({"data": in_test})) & set(live.session_ids())


@pytest.mark.parametrize(
    ("query", "place", "named"),
    [
        ("kind=order.payed", "query.kind.0", "'order.paid'"),
        ("kind=order.paid&kind=order", "query.kind.1", "'order.*'"),
        ("kind=*", "query.kind.0", "'balance.changed'"),
        ("kind=", "query.kind.0", "'invoice.changed'"),
        ("subject=charge", "query.subject", "'payment_link'"),
        ("livemode=live", "query.livemode", "boolean"),
        ("live_mode=true", "query.live_mode", "no parameter of this route"),
        ("kinds=order.paid", "query.kinds", "no parameter of this route"),
    ],
)
def test_bad_filters(mixed: Web, query: str, place: str, named: str) -> None:
    """An invalid filter is refused with the allowed values, since a shop must not read more than it asked for."""
    response = mixed.get(f"/v1/changes?{query}")

    assert response.status_code == 422
    (error,) = response.json()["errors"]
    assert error["place"] == place
    assert named in error["fault"]


def test_kinds_are_declared(mixed: Web) -> None:
    """The OpenAPI page lists every kind and subject that a filter may have."""
    operation = mixed.client.get("/openapi.json").json()["paths"]["/v1/changes"]["get"]
    declared = {each["name"]: str(each["schema"]) for each in operation["parameters"]}

    assert all(f"'{kind}'" in declared["kind"] for kind in CHOICES)
    assert all(f"'{subject}'" in declared["subject"] for subject in SUBJECTS)


def test_a_filtered_reader_is_woken_by_matching_changes(web: Web) -> None:
    """A waiting reader with a filter sleeps through other changes, and gets a matching one at once."""
    with ThreadPoolExecutor(2) as readers:
        started = time.monotonic()
        waiting = readers.submit(changes, web, wait=25, livemode="true", kind="order.*")
        in_vain = readers.submit(changes, web, wait=1.5, livemode="true", account="acct_1")
        for number in range(5):
            web.query(OF_A_WORLD, *TEST, "order", f"cs_{number}", "order.paid", None)
            # A reader without a filter has the change, so the filtered readers have seen it too.
            assert changes(web, after=number, wait=20)["next_after"] == number + 1
        assert not waiting.done()
        web.query(OF_A_WORLD, *LIVE, "order", "cs_live", "order.opened", None)

        answer = waiting.result()
        assert subjects(answer) == ["cs_live"]
        assert time.monotonic() - started < 20
        # A reader that waited in vain gets a cursor behind the changes that did not match.
        assert in_vain.result() == {"data": [], "next_after": 6, "has_more": False}


# ---- A cursor beyond the last number ----


def test_a_cursor_beyond_the_last_number(web: Web) -> None:
    """A cursor beyond the last number is ahead of this database and is refused, instead of waiting for ever."""
    assert changes(web, after=0)["data"] == []
    for filters in ("", "&livemode=true", "&wait=20"):
        response = web.get(f"/v1/changes?after=5{filters}")
        assert response.status_code == 410
        assert response.headers["content-type"] == "application/problem+json"
        problem = response.json()
        assert (problem["type"], problem["last"]) == ("urn:payfold:problem:cursor_beyond", 0)
        assert "older backup" in problem["detail"]
        assert "Go on after 0" in problem["detail"]

    web.query(CHANGE, "plink_1")
    web.query(CHANGE, "plink_2")
    web.query("UPDATE changes SET withheld = 'import' WHERE subject_id = %s", "plink_2")
    web.query(GIVEN, 1)  # as a transaction that is rolled back does
    assert changes(web, after=3) == {"data": [], "next_after": 3, "has_more": False}
    assert web.get("/v1/changes?after=4").json()["last"] == 3


def test_a_restored_backup(web: Web) -> None:
    """The last number follows the sequence, after a restored backup as after a restart by hand."""
    for number in range(9):
        web.query(CHANGE, f"plink_{number}")
    web.query("DELETE FROM changes WHERE seq > 4")
    web.query("SELECT setval('changes_seq_seq', 4)")
    assert changes(web, after=4)["data"] == []
    assert web.get("/v1/changes?after=9").json()["last"] == 4

    web.query("ALTER TABLE changes ALTER COLUMN seq RESTART WITH 100")
    assert changes(web, after=99)["data"] == []
    assert web.get("/v1/changes?after=100").status_code == 410


# ---- Personal data ----


def test_personal_data_is_joined_for_its_scope_alone(database_url: str, redis_url: str) -> None:
    """A token with the scope gets email, metadata, address and descriptions of the present rows; others do not."""
    tokens = {"a-reader": "read", "an-operator": "admin", "a-shop": "read+personal"}
    hashed = (f"t{n}:{scope}:{hashlib.sha256(t.encode()).hexdigest()}" for n, (t, scope) in enumerate(tokens.items()))
    with serving(settings_of(database_url, redis_url, PAYFOLD_TOKENS=",".join(hashed))) as web:
        fill_with_people(web)
        for token in ("a-reader", "an-operator"):
            answer = web.get("/v1/changes", bearer(token))
            assert len(answer.json()["data"]) == 8
            assert not any("personal" in change for change in answer.json()["data"])
            assert not any(word in answer.text for word in ("kim@example.com", "A gift", "Mug", "As agreed"))

        found = {
            each["subject_id"]: each["personal"] for each in web.get("/v1/changes", bearer("a-shop")).json()["data"]
        }
    nothing = {"customer_email": None, "metadata": None, "shipping": None, "memo": None, "lines": None}
    mug = {"id": "li_1", "description": "Mug", "price": "price_1", "product": "prod_1", "quantity": 2}
    shipping = {"name": "Kim", "address": {"city": "Graz"}}
    assert found == {
        "cs_1": {
            **nothing,
            "customer_email": "kim@example.com",
            "metadata": {"note": "A gift"},
            "shipping": shipping,
            "lines": [mug],
        },
        "cs_2": nothing,
        "cs_gone": nothing,
        "plink_1": {**nothing, "metadata": {"note": "A gift"}},
        "cus_1": {**nothing, "customer_email": "kim@example.com", "metadata": {"note": "A gift"}},
        "in_1": {**nothing, "customer_email": "kim@example.com"},
        "cn_1": {
            **nothing,
            "customer_email": "kim@example.com",
            "memo": "As agreed",
            "lines": [{**mug, "id": "cnli_1", "price": None, "product": None}],
        },
        "dp_1": nothing,
    }


PEOPLE = """
INSERT INTO orders (account, livemode, id, customer_email, metadata, shipping, lines_complete, event_id, as_of) VALUES
    ('', true, 'cs_1', 'kim@example.com', '{"note": "A gift"}', '{"name": "Kim", "address": {"city": "Graz"}}', true,
        'evt_1', now()),
    ('', true, 'cs_2', NULL, NULL, NULL, false, 'evt_1', now()),
    -- Of another world.
    ('', false, 'cs_2', 'kim@example.com', NULL, NULL, false, 'evt_1', now());
INSERT INTO order_lines (account, livemode, id, order_id, description, price, product, quantity, event_id, as_of) VALUES
    ('', true, 'li_1', 'cs_1', 'Mug', 'price_1', 'prod_1', 2, 'evt_1', now()),
    ('', true, 'li_2', 'cs_2', 'Mug', 'price_1', 'prod_1', 2, 'evt_1', now());
INSERT INTO payment_links (account, livemode, id, metadata, event_id, as_of)
    VALUES ('', true, 'plink_1', '{"note": "A gift"}', 'evt_1', now());
INSERT INTO customers (account, livemode, id, email, metadata, event_id, as_of)
    VALUES ('', true, 'cus_1', 'kim@example.com', '{"note": "A gift"}', 'evt_1', now());
INSERT INTO invoices (account, livemode, id, customer, event_id, as_of)
    VALUES ('', true, 'in_1', 'cus_1', 'evt_1', now());
INSERT INTO credit_notes (account, livemode, id, customer, memo, lines_complete, event_id, as_of)
    VALUES ('', true, 'cn_1', 'cus_1', 'As agreed', true, 'evt_1', now());
INSERT INTO credit_note_lines (account, livemode, id, credit_note, description, quantity, event_id, as_of)
    VALUES ('', true, 'cnli_1', 'cn_1', 'Mug', 2, 'evt_1', now());
"""


def fill_with_people(web: Web) -> None:
    """Insert rows with personal data, and a change of each."""
    web.query(PEOPLE)
    for subject, subject_id, kind in (
        ("order", "cs_1", "order.paid"),
        ("order", "cs_2", "order.paid"),
        ("order", "cs_gone", "order.paid"),
        ("payment_link", "plink_1", "payment_link.activated"),
        ("balance", "cus_1", "balance.changed"),
        ("invoice", "in_1", "invoice.changed"),
        ("credit_note", "cn_1", "credit_note.issued"),
        ("dispute", "dp_1", "dispute.opened"),
    ):
        web.query(OF_A_WORLD, *LIVE, subject, subject_id, kind, None)


def moves(engine: Engine, customer: str) -> list[tuple[str, int, int]]:
    """Return the balance changes of *customer*: event, balance before, balance after."""
    found = ledger.rows(
        engine,
        "SELECT event_id, before, after FROM changes WHERE subject_id = :id AND kind = 'balance.changed' ORDER BY seq",
        id=customer,
    )
    return [(row["event_id"], row["before"]["amount"], row["after"]["amount"]) for row in found]


def moved(number: int, before: int, after: int) -> bytes:
    """Return the event with this number, which moves a customer's balance."""
    about = {"id": "cus_1", "object": "customer", "currency": "usd", "balance": after}
    return event(f"evt_{number}", "customer.updated", 1000 + number, about, before={"balance": before})


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_each_step_of_a_balance_is_announced(engine: Engine, size: int) -> None:
    """Each step of a balance is announced by its own event, in batches of any size."""
    steps = [("evt_1", 0, -500), ("evt_2", -500, -200), ("evt_3", -200, 300), ("evt_4", 300, -100)]
    bodies = [moved(number, before, after) for number, (_, before, after) in enumerate(steps, 1)]
    for at in range(0, len(bodies), size):
        ledger.record(engine, [ledger.delivery(body) for body in reversed(bodies[at : at + size])])
        ledger.fold(engine)

    assert moves(engine, "cus_1") == steps


def test_steps_of_a_balance_that_are_not_all_known(engine: Engine) -> None:
    """Around a missing step the net difference is one change; the late step, and a net of 0, add no change."""
    ledger.take_in(engine, moved(1, 0, -500))
    ledger.record(engine, [ledger.delivery(moved(3, -200, 300)), ledger.delivery(moved(4, 300, -100))])
    ledger.fold(engine)
    ledger.take_in(engine, moved(2, -500, -200))
    ledger.record(engine, [ledger.delivery(moved(5, -100, 700)), ledger.delivery(moved(6, 700, -100))])
    ledger.fold(engine)

    assert moves(engine, "cus_1") == [("evt_1", 0, -500), ("evt_4", -500, -100)]
