"""Payfold as it runs in production, with a month of a shop's sales, for those who look at its pages."""

import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import httpx
import psycopg

from deploy.local.ports import free_port
from deploy.local.postgres import Postgres
from deploy.local.processes import Processes
from deploy.local.running import wait_until_ready
from deploy.local.valkey import Valkey
from deploy.sandbox.account import DAY_SECONDS, Account, Event
from deploy.sandbox.history import shop_history
from schemas.migrate import upgrade
from tests.command import payfold
from tests.waiting import until
from tests.web import signed

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

SECRET: Final = "whsec_pages"
TOKEN: Final = "an-owner"
SEED: Final = 7
DAYS: Final = 30
ORDERS_A_DAY: Final = 4
ODD_EVENTS: Final = 5
"""Events that no fold can read."""


@dataclass(frozen=True)
class Payfold:
    """A running Payfold, and the shop's account as it is now."""

    address: str
    processes: Processes
    database_url: str
    shop: Account

    def send(self, events: list[Event]) -> None:
        """Deliver *events* signed, once each."""
        with httpx.Client(base_url=self.address) as client:
            for each in events:
                answer = client.post("/webhooks/stripe", content=each.body, headers=signed(each.body, secret=SECRET))
                assert answer.status_code == 200

    def rows(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        """Return the rows of *query*."""
        with psycopg.connect(self.database_url, autocommit=True) as connection:
            cursor = connection.execute(query.encode(), values)
            return cursor.fetchall() if cursor.description else []

    def until_folded(self) -> None:
        """Wait until nothing is pending."""
        until(lambda: self.rows("SELECT count(*) FROM pending") == [(0,)])

    def addresses(self) -> dict[str, str]:
        """Return the address of each page by its name, on rows that have much to show."""
        events = "(SELECT count(*) FROM inbox AS i WHERE i.object_id = o.id)"
        query = f"SELECT id FROM order_book AS o WHERE status = 'paid' ORDER BY {events} DESC, refunded_amount DESC, id"  # noqa: S608 - no value of another
        order = self.rows(query)[0][0]
        ((parked,),) = self.rows("SELECT id FROM events WHERE state = 'parked' ORDER BY seq DESC LIMIT 1")
        ((customer,),) = self.rows("SELECT customer FROM balance_changes GROUP BY 1 ORDER BY count(*) DESC, 1 LIMIT 1")
        ((link,),) = self.rows("SELECT payment_link FROM payment_link_funnel ORDER BY paid DESC, 1 LIMIT 1")
        return {
            "overview": "/",
            "search": f"/search?q={customer}",
            "nothing found": "/search?q=nothing",
            "orders": "/orders",
            "order": f"/orders/{order}",
            "events": "/events",
            "event": f"/events/{parked}",
            "parked": "/parked",
            "retry": "/retry?state=parked",
            "payment links": "/payment-links",
            "payment link": f"/payment-links/{link}",
            "customers": "/customers",
            "customer": f"/customers/{customer}",
            "anomalies": "/anomalies",
            "reconciliations": "/reconciliations",
            "expiring": "/expiring",
        }


@contextmanager
def running(
    folder: Path, *, postgres_bin: Path | None = None, valkey_bin: Path | None = None
) -> Iterator[Payfold]:  # fmt: skip
    """Run the Procfile's processes on servers of their own, with a month of sales and some odd events."""
    with (
        Postgres(folder / "postgres", durable=False, postgres_bin=postgres_bin) as postgres,
        Valkey(folder / "valkey", valkey_bin=valkey_bin) as valkey,
        (folder / "log").open("w") as log,
    ):
        upgrade(postgres.url)
        _replay(folder / "month.ndjson", postgres.url)
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("PAYFOLD_", "STRIPE_"))},
            "DATABASE_URL": postgres.url,
            "REDIS_URL": valkey.url,
            "STRIPE_WEBHOOK_SECRETS": SECRET,
            "PAYFOLD_TOKENS": f"owner:admin+personal:{hashlib.sha256(TOKEN.encode()).hexdigest()}",
            "PAYFOLD_HOST": "127.0.0.1",
            "PAYFOLD_DATA_DIR": str(folder),
            "PAYFOLD_SWEEP_SECONDS": "1",
            "PORT": str(free_port()),
        }
        with Processes(environment, output=log) as processes:
            address = f"http://127.0.0.1:{environment['PORT']}"
            wait_until_ready(address, processes)
            found = Payfold(address, processes, postgres.url, _odd(int(time.time())))
            found.send(list(found.shop.events))
            found.until_folded()
            yield found


def _replay(log: Path, database_url: str) -> None:
    """Take in a month of sales, as from a log, so that the last webhooks are those of today."""
    now = int(time.time())
    shops = (
        shop_history(SEED + day, ORDERS_A_DAY, start=now - day * DAY_SECONDS, money=True) for day in range(DAYS, 0, -1)
    )
    log.write_bytes(b"".join(event.body + b"\n" for shop in shops for event in shop.events))
    ran = payfold("replay", str(log), DATABASE_URL=database_url)
    assert ran.code == 0, ran.err


def _odd(start: int) -> Account:
    """Return an account of which the last events cannot be read."""
    account = Account(seed=SEED, start=start)
    for _ in range(ODD_EVENTS):
        link = account.create_payment_link()
        account.emit("payment_link.updated", account.payment_link(link) | {"active": "maybe"})
        session = account.open_session(amount=4_900, currency="eur")
        account.complete(session)
    return account


@contextmanager
def logged_in(browser: "Browser", payfold: Payfold, width: int, scheme: str, **more: Any) -> "Iterator[Page]":  # noqa: ANN401 - the browser's own
    """Open a browser that is logged in."""
    context = browser.new_context(
        viewport={"width": width, "height": 900},
        color_scheme=scheme,  # type: ignore[arg-type]  # light or dark
        locale="en-GB",
        **more,
    )
    try:
        page = context.new_page()
        page.goto(f"{payfold.address}/")
        page.get_by_label("Token").fill(TOKEN)
        page.get_by_role("button", name="Log in").click()
        page.wait_for_url(f"{payfold.address}/")
        yield page
    finally:
        context.close()
