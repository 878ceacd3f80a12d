"""The change feed: whoever follows it with the cursor sees every change once, and soon."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psycopg
import pytest

from deploy.services import Postgres
from schemas.migrate import upgrade
from tests.web import Web, serving, settings_of

CHANGE = """INSERT INTO changes (account, livemode, subject, subject_id, kind, event_id, source, at)
    VALUES ('', false, 'payment_link', %s, 'payment_link.activated', 'evt_1', 'webhook', now())"""


@pytest.fixture
def web(database_url: str, redis_url: str) -> Iterator[Web]:
    """Return a running web process."""
    with serving(settings_of(database_url, redis_url)) as running:
        yield running


def changes(web: Web, **parameters: object) -> dict[str, Any]:
    """Ask the feed."""
    query = "&".join(f"{name}={value}" for name, value in parameters.items())
    response = web.get(f"/v1/changes?{query}")
    assert response.status_code == 200
    answer: dict[str, Any] = response.json()
    return answer


def subjects(answer: dict[str, Any]) -> list[str]:
    """Return what an answer is about."""
    return [change["subject_id"] for change in answer["data"]]


def test_pages(web: Web) -> None:
    """The cursor leads through all changes in their order, and stays where it is at the end."""
    for number in range(5):
        web.query(CHANGE, f"plink_{number}")
    seen, after, more = [], 0, True
    while more:
        answer = changes(web, after=after, limit=2)
        seen += subjects(answer)
        after, more = answer["next_after"], answer["has_more"]

    assert seen == [f"plink_{number}" for number in range(5)]
    assert changes(web, after=after) == {"data": [], "next_after": after, "has_more": False}


def test_what_is_withheld(web: Web) -> None:
    """What is withheld is not in the feed, and is no news for who waits."""
    web.query(CHANGE, "plink_1")
    web.query(CHANGE, "plink_2")
    web.query("UPDATE changes SET withheld = 'import' WHERE subject_id = %s", "plink_2")

    answer = changes(web)
    assert subjects(answer) == ["plink_1"]
    started = time.monotonic()
    assert subjects(changes(web, after=answer["next_after"], wait=1)) == []
    assert time.monotonic() - started >= 1


def test_there_already(web: Web) -> None:
    """Who asks for what is there does not wait."""
    web.query(CHANGE, "plink_1")
    started = time.monotonic()

    assert subjects(changes(web, wait=25)) == ["plink_1"]
    assert time.monotonic() - started < 10


def test_told_at_once(web: Web) -> None:
    """All who wait are told as soon as there is a change, and only those who have not seen it."""
    with ThreadPoolExecutor(11) as readers:
        started = time.monotonic()
        waiting = [readers.submit(changes, web, wait=25) for _ in range(10)]
        further = readers.submit(changes, web, after=5, wait=1)
        # Who came last has waited by then, and so have the others.
        assert changes(web, wait=0.3)["data"] == []
        web.query(CHANGE, "plink_1")

        assert [subjects(each.result()) for each in waiting] == [["plink_1"]] * 10
        assert further.result() == {"data": [], "next_after": 5, "has_more": False}
        assert time.monotonic() - started < 10


def test_nothing_to_tell(web: Web) -> None:
    """Where nothing changes the answer comes when the wait is over."""
    started = time.monotonic()

    assert changes(web, after=7, wait=0.3) == {"data": [], "next_after": 7, "has_more": False}
    assert 0.3 <= time.monotonic() - started < 10


def test_misses_nothing(web: Web) -> None:
    """A reader who follows while changes are made sees each of them, once, in their order."""
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
    """Who waits while PostgreSQL is restarted is told of the change that comes after."""
    upgrade(own_postgres.url)
    with serving(settings_of(own_postgres.url, redis_url)) as web, ThreadPoolExecutor(1) as reader:
        waiting = reader.submit(changes, web, wait=25)
        # Who came last has waited by then, and so has the other.
        assert changes(web, wait=0.3)["data"] == []
        own_postgres.restart()
        web.query(CHANGE, "plink_1")

        assert subjects(waiting.result()) == ["plink_1"]


@pytest.mark.parametrize(
    "query",
    ["after=-1", f"after={2**63}", "after=x", "wait=26", "wait=-1", "wait=nan", "wait=inf", "limit=0", "limit=101"],
)
def test_bad_values(web: Web, query: str) -> None:
    """A cursor, wait or limit that cannot be meant is told so."""
    response = web.get(f"/v1/changes?{query}")

    assert response.status_code == 422
    assert response.headers["content-type"] == "application/problem+json"
    assert response.json()["errors"][0]["place"] == f"query.{query.partition('=')[0]}"
