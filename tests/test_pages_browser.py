"""In a browser, against the Procfile's own processes: the two questions of the night, and every page at two widths."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

from deploy.sandbox.account import Account
from tests.browser import chromium
from tests.looking import SEED, TOKEN, Payfold, logged_in, running
from tests.waiting import until

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = pytest.mark.browser

SEEN_SECONDS_MAX: Final = 15
"""A worker that has stopped is on the overview within this: the issue of a page that is looked at in trouble."""
_SILENT: Final = "The worker has given no sign of life"
SIZES: Final = {"wide": (1280, "light"), "phone": (400, "dark")}


@pytest.fixture(scope="module")
def browser() -> "Iterator[Browser]":
    """Return a running Chromium, the machine's own; without one the tests are skipped."""
    with chromium() as running:
        yield running


@pytest.fixture(scope="module")
def payfold(
    browser: "Browser", tmp_path_factory: pytest.TempPathFactory, postgres_bin: Path | None, valkey_bin: Path | None
) -> Iterator[Payfold]:
    """Return a running Payfold with a month of sales, and some events that no fold can read."""
    with running(tmp_path_factory.mktemp("pages"), postgres_bin=postgres_bin, valkey_bin=valkey_bin) as found:
        yield found


@contextlib.contextmanager
def looking(browser: "Browser", payfold: Payfold, width: int, scheme: str) -> "Iterator[Page]":
    """Open a browser that is logged in; from then on it must log nothing, and load nothing from elsewhere."""
    messages: list[str] = []
    elsewhere: list[str] = []
    with logged_in(browser, payfold, width, scheme, timezone_id="Asia/Kolkata") as page:
        page.on("console", lambda message: messages.append(message.text))
        page.on("pageerror", lambda error: messages.append(str(error)))
        page.on("request", lambda asked: elsewhere.append(asked.url))
        yield page
    assert [each for each in messages if "Password forms should have" not in each] == []
    assert [each for each in elsewhere if not each.startswith((payfold.address, "data:"))] == []


@pytest.fixture
def page(browser: "Browser", payfold: Payfold) -> "Iterator[Page]":
    """Return a browser that is logged in."""
    with looking(browser, payfold, *SIZES["wide"]) as opened:
        yield opened


# ---- Where is the order? ----


@pytest.fixture
def refused_payment(payfold: Payfold) -> tuple[str, str]:
    """Return a session and its buyer's email; the database refused the payment, for a cause that is over by now."""
    shop = Account(seed=SEED + 100)
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


def serious(page: "Page", name: str) -> dict[str, list[str]]:
    """Return what axe calls serious on *page*, or critical, and that it is broader than the screen."""
    from axe_playwright_python.sync_playwright import Axe  # noqa: PLC0415 - only where there is a browser

    found = {
        f"{name}: {each['id']}": [node["html"] for node in each["nodes"]]
        for each in Axe().run(page).response["violations"]
        if each["impact"] in ("serious", "critical")
    }
    if page.evaluate("document.documentElement.scrollWidth > innerWidth"):
        found[f"{name}: broad"] = []
    return found


@pytest.mark.parametrize("size", SIZES)
def test_pages_are_good(browser: "Browser", payfold: Payfold, size: str) -> None:
    """No page is broader than the screen, has a fault that axe calls serious, or breaks the policy."""
    found: dict[str, list[str]] = {}
    with looking(browser, payfold, *SIZES[size]) as page:
        for name, address in payfold.addresses().items():
            answer = page.goto(f"{payfold.address}{address}")
            assert answer is not None
            assert answer.status == 200, name
            found |= serious(page, name)
        page.get_by_text("owner", exact=True).click()
        page.get_by_role("button", name="Log out").click()
        page.wait_for_url(f"{payfold.address}/login")
        found |= serious(page, "login")

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
        page.get_by_label("Search").fill(payfold.addresses()["order"].removeprefix("/orders/"))
        page.get_by_label("Search").press("Enter")
        page.locator(".leads a").first.click()

        assert page.locator("#timeline time").first.inner_text().endswith("UTC")


def test_a_table_that_was_clicked_stays_live(payfold: Payfold, page: "Page") -> None:
    """A click into a table, or a link from another site to a page, stops nothing: it refreshes, and the login holds."""
    from playwright.sync_api import expect  # noqa: PLC0415 - only where there is a browser

    page.goto(f"{payfold.address}/events")
    page.locator("tbody td").first.click()
    shop = Account(seed=SEED + 200)
    link = shop.create_payment_link()
    payfold.send(list(shop.events))

    expect(page.locator("tbody")).to_contain_text(link[:10], timeout=20_000)
    # Firefox and Chromium send no strict cookie with a navigation from another site, so the login is shown first.
    page.goto(f"data:text/html,<a href='{payfold.address}/orders?status=paid'>look</a>")
    page.get_by_role("link").click()
    page.wait_for_url(f"{payfold.address}/orders?status=paid")
    assert "Orders" in page.title()
