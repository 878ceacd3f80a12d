"""With the consumer of api/README.md, killed at any point, the shop acts once on each payment."""

import re
import secrets
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import psycopg
import pytest
from psycopg.sql import SQL, Identifier

from deploy.local.databases import drop_database
from deploy.local.services import Services
from tests.command import ROOT, environment
from tests.waiting import WAITS_FOR_A_LOCK, until
from tests.web import TOKENS, Web, serving, settings_of

PAGE = (ROOT / "api" / "README.md").read_text(encoding="utf-8")
ACTING, COMMITTING = 1, 2
# The shop's own table, which would hold an order twice if the consumer acted twice; and places at which a test can
# hold the consumer: in the middle of its second act, and while its transaction commits.
SHOP = """
CREATE TABLE shipments (number bigint GENERATED ALWAYS AS IDENTITY, order_id text NOT NULL, cart text NOT NULL);
CREATE FUNCTION hold() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF NEW.order_id LIKE '%\\_1' THEN
        PERFORM pg_advisory_xact_lock(TG_ARGV[0]::bigint);
    END IF;
    RETURN NEW;
END
$$;
CREATE TRIGGER acting BEFORE INSERT ON shipments FOR EACH ROW EXECUTE FUNCTION hold(1);
CREATE CONSTRAINT TRIGGER committing AFTER INSERT ON shipments DEFERRABLE INITIALLY DEFERRED
    FOR EACH ROW EXECUTE FUNCTION hold(2);
"""
CHANGE = """INSERT INTO changes (account, livemode, subject, subject_id, kind, event_id, source, at, after)
    VALUES ('', %s, 'order', %s, %s, 'evt_1', 'webhook', now(), jsonb_build_object('client_reference_id', %s::text))"""


def shown(language: str) -> str:
    """Return the page's one block in *language* about the consumer's cursor."""
    (block,) = [each for each in re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL) if "payfold_cursor" in each]
    return str(block)


class Shop:
    """A shop's own database, and the consumer that writes to it."""

    def __init__(self, url: str, web: Web, folder: Path) -> None:
        self.connection = psycopg.connect(url, autocommit=True)
        self.connection.execute(SHOP)
        self.connection.execute(shown("sql").encode())
        self._web = web
        self._program = folder / "consumer.py"
        self._program.write_text(shown("python"), encoding="utf-8")
        self._environment = environment(
            {
                "FEED_URL": f"http://127.0.0.1:{web.port}",
                "FEED_TOKEN": TOKENS["read"],
                "SHOP_DATABASE_URL": url,
            }
        )
        self.sold: list[tuple[str, str]] = []

    @contextmanager
    def consumer(self) -> Iterator[None]:
        """Run the consumer in a process of its own, and kill it at the end."""
        process = subprocess.Popen([sys.executable, str(self._program)], env=self._environment)
        try:
            yield
            assert process.poll() is None, "it ended by itself"
        finally:
            process.kill()
            process.wait()

    def sell(self) -> None:
        """Add two paid live orders, one in test mode, and other changes."""
        of = f"cs_{len(self.sold)}"
        orders = [(f"{of}_{number}", f"cart_{of}_{number}") for number in range(2)]
        for order, cart in orders:
            self._web.query(CHANGE, False, f"{order}_test", "order.paid", "a test")  # noqa: FBT003 - a row's column
            self._web.query(CHANGE, True, order, "order.paid", cart)  # noqa: FBT003 - as above
            self._web.query(CHANGE, True, order, "order.refund_changed", cart)  # noqa: FBT003 - as above
        self.sold += orders

    def shipped(self) -> list[tuple[str, str]]:
        """Return the orders on which the shop acted, in order."""
        return [(order, cart) for order, cart in self.rows("SELECT order_id, cart FROM shipments ORDER BY number")]

    def rows(self, query: str) -> list[tuple[str, ...]]:
        """Return the rows of *query* in the shop's database."""
        return self.connection.execute(query.encode()).fetchall()

    @contextmanager
    def held(self, place: int) -> Iterator[None]:
        """Wait until the consumer is at *place*, and hold it there until the block ends."""
        self.connection.execute("SELECT pg_advisory_lock(%s)", [place])
        try:
            yield
        finally:
            self.connection.execute("SELECT pg_advisory_unlock(%s)", [place])

    def is_held(self) -> bool:
        """Return whether a consumer waits for the test's lock."""
        return bool(self.rows(f"{WAITS_FOR_A_LOCK} AND wait_event = 'advisory'"))

    def is_alone(self) -> bool:
        """Return whether the killed consumer's session and transaction have ended."""
        others = "FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
        return not self.rows(f"SELECT 1 {others} AND backend_type = 'client backend'")


@pytest.fixture
def shop(services: Services, database_url: str, redis_url: str, tmp_path: Path) -> Iterator[Shop]:
    """Return a shop with a database of its own on the same server, and a consumer that follows a web process."""
    name = f"payfold_shop_{secrets.token_hex(4)}"
    with psycopg.connect(services.database_url, autocommit=True) as server:
        server.execute(SQL("CREATE DATABASE {}").format(Identifier(name)))
        try:
            with serving(settings_of(database_url, redis_url)) as web:
                made = Shop(urlsplit(services.database_url)._replace(path=f"/{name}").geturl(), web, tmp_path)
                yield made
                # The web process does not end while a reader waits for a change.
                made.sell()
                made.connection.close()
        finally:
            drop_database(server, name)


def test_each_payment_is_acted_on_once(shop: Shop) -> None:
    """Killed while it acts, while it commits and while it waits, it has acted on every live payment once, in order."""
    shop.sell()
    for place in (ACTING, COMMITTING):
        with shop.held(place):
            with shop.consumer():
                until(shop.is_held, seconds=60)
            # The consumer is dead, but PostgreSQL has not noticed yet.
            assert shop.shipped() == shop.sold[: len(shop.shipped())]
        until(shop.is_alone, seconds=60)
        # A transaction that was committing is committed, another one is rolled back.
        assert len(shop.shipped()) == len(shop.sold) - (0 if place == COMMITTING else 2)
        if place == COMMITTING:
            shop.sell()
    with shop.consumer():
        until(lambda: len(shop.shipped()) == len(shop.sold), seconds=60)
    until(shop.is_alone, seconds=60)
    shop.sell()
    with shop.consumer(), shop.consumer():
        until(lambda: len(shop.shipped()) == len(shop.sold), seconds=60)
        shop.sell()
        until(lambda: len(shop.shipped()) == len(shop.sold), seconds=60)

    assert shop.shipped() == shop.sold
