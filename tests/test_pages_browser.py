"""In a browser, against the Procfile's own processes: the two questions of the night, and every page at two widths."""

import contextlib
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import httpx
import psycopg
import pytest

from deploy.local.ports import free_port
from deploy.local.postgres import Postgres
from deploy.local.processes import Processes
from deploy.local.running import wait_until_ready
from deploy.local.valkey import Valkey
from deploy.sandbox.account import Account, Event
from deploy.sandbox.history import shop_history
from schemas.migrate import upgrade
from tests.browser import chromium
from tests.waiting import until
from tests.web import signed

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, Page

pytestmark = pytest.mark.browser

SECRET: Final = "whsec_pages"
TOKEN: Final = "an-owner"
SEED: Final = 7
SEEN_SECONDS_MAX: Final = 15
"""A worker that has stopped is on the overview within this: the issue of a page that is looked at in trouble."""
_SILENT: Final = "The worker has given no sign of life"
SIZES: Final = {"wide": (1280, "light"), "phone": (400, "dark")}


@dataclass(frozen=True)
class Payfold:
    """Payfold as it runs in production, with a history, and the token of its owner."""

    address: str
    processes: Processes
    database_url: str

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


@pytest.fixture(scope="module")
def browser() -> "Iterator[Browser]":
    """Return a running Chromium, the machine's own; without one the tests are skipped."""
    with chromium() as running:
        yield running


@pytest.fixture(scope="module")
def payfold(
    browser: "Browser", tmp_path_factory: pytest.TempPathFactory, postgres_bin: Path | None, valkey_bin: Path | None
) -> Iterator[Payfold]:
    """Return a running Payfold with a shop's history, and one event that no fold can read."""
    folder = tmp_path_factory.mktemp("pages")
    with (
        Postgres(folder / "postgres", durable=False, postgres_bin=postgres_bin) as postgres,
        Valkey(folder / "valkey", valkey_bin=valkey_bin) as valkey,
        (folder / "log").open("w") as log,
    ):
        upgrade(postgres.url)
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
            running = Payfold(address, processes, postgres.url)
            shop = shop_history(SEED, 40, money=True)
            link = shop.create_payment_link()
            shop.emit("payment_link.updated", shop.payment_link(link) | {"active": "maybe"})
            running.send(list(shop.events))
            running.until_folded()
            yield running


@contextlib.contextmanager
def looking(browser: "Browser", payfold: Payfold, width: int, scheme: str) -> "Iterator[Page]":
    """Open a browser that is logged in; it must log nothing, and load nothing from elsewhere."""
    messages: list[str] = []
    elsewhere: list[str] = []
    context: BrowserContext = browser.new_context(
        viewport={"width": width, "height": 900},
        color_scheme=scheme,  # type: ignore[arg-type]  # a literal of SIZES
        timezone_id="Asia/Kolkata",
        locale="en-GB",
    )
    page = context.new_page()
    page.on("console", lambda message: messages.append(message.text))
    page.on("pageerror", lambda error: messages.append(str(error)))
    page.on("request", lambda asked: elsewhere.append(asked.url) if not asked.url.startswith(payfold.address) else None)
    page.goto(f"{payfold.address}/")
    page.get_by_label("Token").fill(TOKEN)
    page.get_by_role("button", name="Log in").click()
    page.wait_for_url(f"{payfold.address}/")
    yield page
    context.close()
    assert [each for each in messages if "Password forms should have" not in each] == []
    assert elsewhere == []


@pytest.fixture
def page(browser: "Browser", payfold: Payfold) -> "Iterator[Page]":
    """Return a browser that is logged in."""
    with looking(browser, payfold, *SIZES["wide"]) as opened:
        yield opened


# ---- Where is the order? ----


@pytest.fixture
def refused_payment(payfold: Payfold) -> tuple[str, str]:
    """Return a session and its buyer's email; the database refused the payment, for a cause that is over by now."""
    shop = Account(seed=SEED + 1)
    session = shop.open_session(amount=4_999, currency="eur")
    payfold.rows("ALTER TABLE orders ADD CONSTRAINT unpaid CHECK (payment_status <> 'paid') NOT VALID")
    shop.complete(session)
    payfold.send(list(shop.events))
    until(lambda: payfold.rows("SELECT count(*) FROM events WHERE cause = 'row_refused'") == [(1,)])
    payfold.rows("ALTER TABLE orders DROP CONSTRAINT unpaid")
    return session, shop.session(session)["customer_details"]["email"]


def test_she_says_she_paid(payfold: Payfold, page: "Page", refused_payment: tuple[str, str]) -> None:
    """One search by email leads to the order; its timeline names the parked payment, and a retry pays the order."""
    session, email = refused_payment
    page.keyboard.press("/")
    page.keyboard.type(email.upper())
    page.keyboard.press("Enter")
    page.get_by_role("link", name=session[:14]).first.click()

    timeline = page.locator("#timeline")
    assert "checkout.session.completed" in timeline.inner_text()
    assert "parked" in timeline.locator("li.is-parked").inner_text()
    assert "open" in page.locator("h1").inner_text() or "no order" in page.locator("h1").inner_text()

    timeline.locator("li.is-parked").get_by_role("link").first.click()
    page.get_by_role("button", name="Retry").click()
    payfold.until_folded()
    page.goto(f"{payfold.address}/orders/{session}")

    assert "49.99 EUR" in page.locator("h1").inner_text()
    assert "paid" in page.locator("h1").inner_text()
    assert page.locator("li.is-parked").count() == 0


# ---- Are webhooks arriving at all? ----


def test_the_worker_stops(payfold: Payfold, page: "Page") -> None:
    """The overview answers in one line, and shows by itself that the worker has stopped, and that it is back."""
    from playwright.sync_api import expect  # noqa: PLC0415 - only where there is a browser

    verdict = page.locator("#verdict")
    expect(verdict).to_contain_text("Last webhook")
    expect(verdict).not_to_contain_text(_SILENT)

    payfold.processes.kill("worker")
    expect(verdict).to_contain_text(_SILENT, timeout=SEEN_SECONDS_MAX * 1000)
    payfold.processes.start_one("worker")
    expect(verdict).not_to_contain_text(_SILENT, timeout=60_000)


# ---- Every page ----


def addresses(payfold: Payfold) -> dict[str, str]:
    """Return the address of each page, on rows that have much to show."""
    ((order,),) = payfold.rows(
        "SELECT id FROM order_book WHERE status = 'paid' ORDER BY refunded_amount DESC NULLS LAST, id LIMIT 1"
    )
    ((parked,),) = payfold.rows("SELECT id FROM events WHERE state = 'parked' ORDER BY seq LIMIT 1")
    return {
        "login": "/login",
        "overview": "/",
        "search": "/search?q=20.00+usd",
        "nothing found": "/search?q=nothing",
        "orders": "/orders",
        "order": f"/orders/{order}",
        "event": f"/events/{parked}",
        "no such order": "/orders/none",
    }


@pytest.mark.parametrize("size", SIZES)
def test_pages_are_good(browser: "Browser", payfold: Payfold, size: str) -> None:
    """No page is broader than the screen, has a fault that axe calls serious, or breaks the policy."""
    from axe_playwright_python.sync_playwright import Axe  # noqa: PLC0415 - only where there is a browser

    axe = Axe()
    found: dict[str, list[str]] = {}
    with looking(browser, payfold, *SIZES[size]) as page:
        for name, address in addresses(payfold).items():
            answer = page.request.get(f"{payfold.address}{address}")
            assert answer.status in ((404,) if "no such" in name else (200,)), name
            if answer.status == 404:
                continue
            page.goto(f"{payfold.address}{address}")
            assert not page.evaluate("document.documentElement.scrollWidth > innerWidth"), name
            faults = axe.run(page).response["violations"]
            found |= {
                f"{name}: {each['id']}": [node["html"] for node in each["nodes"]]
                for each in faults
                if each["impact"] in ("serious", "critical")
            }

    assert found == {}


def test_times_are_local(payfold: Payfold, page: "Page") -> None:
    """A time is shown in the zone of the browser, with UTC on hover."""
    page.goto(f"{payfold.address}/orders")
    time = page.locator("tbody time").first

    utc = time.get_attribute("title")
    assert utc is not None
    assert utc.endswith(" UTC")
    there = page.evaluate(
        "at => new Date(at).toLocaleString('en-GB', {timeZone: 'Asia/Kolkata', hour: '2-digit', minute: '2-digit'})",
        time.get_attribute("datetime"),
    )
    assert there in time.inner_text()


def test_without_scripts(browser: "Browser", payfold: Payfold) -> None:
    """Without the script one can log in, search, and read an order, in UTC."""
    with contextlib.closing(browser.new_context(java_script_enabled=False)) as context:
        page = context.new_page()
        page.goto(f"{payfold.address}/login")
        page.get_by_label("Token").fill(TOKEN)
        page.get_by_role("button", name="Log in").click()
        page.get_by_label("Search").fill(addresses(payfold)["order"].removeprefix("/orders/"))
        page.get_by_label("Search").press("Enter")
        page.locator(".leads a").first.click()

        assert page.locator("#timeline time").first.inner_text().endswith("UTC")
