"""Pages are closed without a token; its cookie proves it, ends by itself, and acts for our own pages alone."""

import re
from collections.abc import Iterator
from typing import Any, Final

import httpx
import psycopg
import pytest
from itsdangerous import TimestampSigner

from api.pages import viewers
from api.pages.rendering import PageRoute
from api.pages.routes import ROUTERS
from deploy.local.services import Services
from schemas import tables
from schemas.settings import Settings
from tests.test_scopes import MARK, NAME, PERSONAL, mark, planted
from tests.web import TOKENS, Web, environment_of, event, migrated_database, serving, serving_many, settings_of

WORLDS: Final = (("", False), ("", True), ("acct_2", False), ("acct_2", True))


PAGES: Final = sorted(
    (method, re.sub(r"{\w+:id}", NAME, route.path))
    for router in ROUTERS
    for route in router.routes
    if isinstance(route, PageRoute)
    for method in route.methods or ()
)
"""The method and the address of each page, with an id where it wants one."""


@pytest.fixture(scope="module")
def web(services: Services) -> Iterator[Web]:
    """Return a running web process on an empty database."""
    with serving_many(services) as running:
        yield running


def log_in(web: Web, token: str, **form: str) -> httpx.Response:
    """Exchange *token*."""
    answer = web.client.post("/login", data={"token": token, **form}, headers={"Origin": web.origin})
    web.client.cookies.clear()
    return answer


# ---- The cookie ----


def test_a_token_is_exchanged(web: Web) -> None:
    """The right token leads on with a cookie that scripts cannot read, no other site sends, and ends in 12 hours."""
    answer = log_in(web, TOKENS["read"], next="/orders?status=paid")

    assert (answer.status_code, answer.headers["location"]) == (303, "/orders?status=paid")
    value, *attributes = answer.headers["set-cookie"].split("; ")
    assert value.startswith("payfold=")
    assert {each.lower() for each in attributes} == {"httponly", "max-age=43200", "path=/", "samesite=strict"}
    assert TOKENS["read"] not in value


def test_the_cookie_wants_tls(web: Web) -> None:
    """Anywhere but on loopback a browser sends the cookie over TLS alone."""
    for host, is_secure in (("pay.example.com", True), ("localhost:8000", False), ("[::1]:8000", False)):
        headers = {"Host": host, "Origin": f"https://{host}"}
        answer = httpx.post(f"{web.origin}/login", data={"token": TOKENS["read"]}, headers=headers)
        assert ("secure" in answer.headers["set-cookie"].lower()) == is_secure


@pytest.mark.parametrize("elsewhere", ["https://example.com/", "//example.com/", "/\\example.com", "orders", "/a\r\nb"])
def test_a_login_leads_nowhere_else(web: Web, elsewhere: str) -> None:
    """An address of another host, or one that is none, is not followed after the login."""
    assert log_in(web, TOKENS["read"], next=elsewhere).headers["location"] == "/"


@pytest.fixture
def fresh(services: Services) -> Iterator[Web]:
    """Return a web process that has seen no attempt to log in."""
    with serving_many(services) as running:
        yield running


def test_attempts_are_limited(fresh: Web, capfd: pytest.CaptureFixture[str]) -> None:
    """Ten wrong tokens are refused and logged without their text; then even the right one has to wait."""
    answers = [log_in(fresh, f"wrong-{number}") for number in range(viewers.ATTEMPTS_MAX)]
    late = log_in(fresh, TOKENS["read"])

    assert {answer.status_code for answer in answers} == {401}
    assert not any("set-cookie" in answer.headers for answer in answers)
    assert (late.status_code, late.headers["retry-after"]) == (429, "60")
    logged = capfd.readouterr()
    assert (logged.out + logged.err).count("login.failed") == viewers.ATTEMPTS_MAX
    assert "wrong-" not in logged.out + logged.err


def test_one_person_locks_out_no_other(fresh: Web) -> None:
    """Behind a proxy the attempts of each client count alone, by the address that the proxy noted last."""

    def attempt(token: str, client: str) -> int:
        headers = {"Origin": fresh.origin, "X-Forwarded-For": f"198.51.100.7, {client}"}
        return httpx.post(f"{fresh.origin}/login", data={"token": token}, headers=headers).status_code

    wrong = [attempt("wrong", "192.0.2.1") for _ in range(viewers.ATTEMPTS_MAX + 1)]

    assert (wrong[-1], attempt(TOKENS["read"], "192.0.2.1"), attempt(TOKENS["read"], "192.0.2.2")) == (429, 429, 303)


@pytest.mark.parametrize(
    ("body", "origin", "status"),
    [("a=1&" * 101, None, 422), ("token=x", "http://[", 403), ("token=%ff%00", None, 401), ("x" * 20_000, None, 413)],
)
def test_odd_forms(fresh: Web, body: str, origin: str | None, status: int) -> None:
    """A form that is none is refused with the reason, and nothing is logged as a fault of ours."""
    headers = {"Origin": origin or fresh.origin, "Content-Type": "application/x-www-form-urlencoded"}

    assert httpx.post(f"{fresh.origin}/login", content=body, headers=headers).status_code == status


def test_a_proxy_that_changes_the_host(web: Web) -> None:
    """Where a proxy has changed the Host, the browser's own word that the page is ours is taken; a script has none."""
    headers = {"Origin": "https://pay.example.com"}

    assert httpx.post(f"{web.origin}/login", data={"token": TOKENS["read"]}, headers=headers).status_code == 403
    headers["Sec-Fetch-Site"] = "same-origin"
    assert httpx.post(f"{web.origin}/login", data={"token": TOKENS["read"]}, headers=headers).status_code == 303
    headers["Sec-Fetch-Site"] = "cross-site"
    assert httpx.post(f"{web.origin}/login", data={"token": TOKENS["read"]}, headers=headers).status_code == 403


def test_without_tls_from_another_machine(web: Web) -> None:
    """Over http from another machine the browser would drop the cookie, so the login names the remedy."""
    headers = {"Host": "pay.example.com", "Origin": "http://pay.example.com"}

    answer = httpx.post(f"{web.origin}/login", data={"token": TOKENS["read"]}, headers=headers)

    assert (answer.status_code, "set-cookie" in answer.headers, "by https" in answer.text) == (400, False, True)


def test_the_address_for_stripe(web: Web) -> None:
    """An empty database shows the webhook's address: https, but on this machine."""
    with web.looking() as client:
        assert f"{web.origin}/webhooks/stripe" in client.get("/").text
        assert "https://pay.example.com/webhooks/stripe" in client.get("/", headers={"Host": "pay.example.com"}).text


def test_attempts_remember_few_addresses() -> None:
    """The memory of attempts is bounded, however many addresses fail."""
    attempts = viewers.Attempts()

    for number in range(viewers.ADDRESSES_MAX + 10):
        attempts.add(f"192.0.2.{number}")

    assert len(attempts.failed) == viewers.ADDRESSES_MAX
    assert "192.0.2.0" not in attempts.failed


class TwelveHoursAgo(TimestampSigner):
    """Signs as twelve hours and a second ago."""

    def get_timestamp(self) -> int:
        """Return the time then."""
        return super().get_timestamp() - viewers.COOKIE_SECONDS_MAX - 1


def test_a_cookie_ends(web: Web) -> None:
    """After twelve hours the cookie opens nothing; a younger one of the same token does."""
    (token,) = (each for each in web.settings.tokens if each.name == "read")
    made = viewers.serializer_of(token)
    made.signer = TwelveHoursAgo

    assert viewers.token_of(made.dumps("read"), web.settings.tokens) is None
    assert viewers.token_of(viewers.cookie_of(token), web.settings.tokens) == token


def test_a_removed_token_ends_its_cookies(web: Web) -> None:
    """A cookie opens nothing once its token is gone, replaced under the same name, or its text was changed."""
    tokens = {each.name: each for each in web.settings.tokens}
    cookie = viewers.cookie_of(tokens["admin"])
    others = [each for name, each in tokens.items() if name != "admin"]
    replaced = [*others, type(tokens["admin"])("admin", tokens["admin"].scopes, "0" * 64)]

    assert viewers.token_of(cookie, web.settings.tokens) == tokens["admin"]
    assert viewers.token_of(cookie, others) is None
    assert viewers.token_of(cookie, replaced) is None
    # Any character but the last, of which base64 leaves two bits unused.
    for place in range(len(cookie) - 1):
        changed = cookie[:place] + ("A" if cookie[place] != "A" else "B") + cookie[place + 1 :]
        assert viewers.token_of(changed, web.settings.tokens) is None


def test_a_cookie_of_another_process(web: Web, services: Services) -> None:
    """Each web process reads the cookies that any other made, since the key comes from the tokens."""
    answer = log_in(web, TOKENS["read"])
    with serving(web.settings) as other:
        seen = other.client.get("/", headers={"Cookie": answer.headers["set-cookie"].partition(";")[0]})

    assert seen.status_code == 200


def test_log_out(web: Web) -> None:
    """After logging out the pages are closed again."""
    with web.looking() as client:
        assert client.get("/").status_code == 200
        assert client.post("/logout").status_code == 303
        assert client.get("/").headers["location"] == "/login"


def test_without_tokens(services: Services) -> None:
    """Where no token is configured the login names the remedy."""
    with migrated_database(services) as url:
        environment = environment_of(url, services.redis_url) | {"PAYFOLD_TOKENS": ""}
        with serving(Settings.load(environment)) as closed:
            assert "payfold tokens new" in closed.client.get("/login").text
            assert log_in(closed, "anything").status_code == 401


# ---- All pages ----


def test_pages_are_closed(web: Web) -> None:
    """Without a cookie each page leads to the login and back; no act is done, and none by a bearer token alone."""
    for method, path in PAGES:
        for headers in ({}, {"Authorization": f"Bearer {TOKENS['admin']}"}):
            answer = web.client.request(method, path, headers=headers)
            if path in ("/login", "/logout"):
                assert answer.status_code == (200 if method == "GET" else 403)
            else:
                assert answer.status_code == 303, path
                assert answer.headers["location"].startswith("/login")


def test_acts_want_our_own_page(web: Web) -> None:
    """An act that another site asks for, or a browser that names no site, is refused whatever the cookie."""
    acts = [(method, path) for method, path in PAGES if method != "GET"]
    with web.looking() as client:
        for origin in ("https://example.com", "null", "", f"http://127.0.0.1.example.com:{web.port}"):
            answers = {path: client.request(method, path, headers={"Origin": origin}) for method, path in acts}
            assert {path: answer.status_code for path, answer in answers.items()} == dict.fromkeys(answers, 403)


def test_acts_want_their_scope(web: Web) -> None:
    """A reader sees every page and may do no act but log out."""
    with web.looking(TOKENS["read+personal"]) as client:
        for method, path in PAGES:
            if path not in ("/login", "/logout") and method != "GET":
                assert client.request(method, path).status_code == 403, path


def test_the_policy(web: Web) -> None:
    """Every page, an error too, forbids all that is not ours: no inline script or style, no frame, no other host."""
    with web.looking() as client:
        for method, path in (*PAGES, ("GET", "/orders/none")):
            if method == "GET":
                answer = client.get(path)
                policy = answer.headers["content-security-policy"]
                assert "unsafe" not in policy
                assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'")
                assert answer.headers["cache-control"] == "no-store"
                assert not re.search(r"<[^>]*\s(style|on\w+)=", answer.text), path
                assert re.findall(r"<script[^>]*>", answer.text) == [
                    each for each in re.findall(r"<script[^>]*>", answer.text) if 'src="/static/' in each
                ]


# ---- Worlds and personal data ----


@pytest.fixture(scope="module")
def crowded(services: Services) -> Iterator[Web]:
    """Return a web process on rows of four worlds, each with a mark of its own."""
    with migrated_database(services) as url, serving(settings_of(url, services.redis_url)) as running:
        with psycopg.connect(running.settings.libpq, autocommit=True) as connection:
            for world in WORLDS:
                plant(connection, *world)
        for account, livemode in WORLDS:
            body = event(
                data={"object": {"id": NAME, "object": "thing", "email": own(account, livemode=livemode)}},
                id=NAME,
                livemode=livemode,
                **({"account": account} if account else {}),
            )
            assert running.deliver(body).status_code == 200
        running.query("INSERT INTO outcomes SELECT seq, 'folded', NULL, 1, now(), 1, NULL FROM inbox")
        running.query("DELETE FROM pending")
        yield running


def own(account: str, *, livemode: bool) -> str:
    """Return the mark of a world."""
    return f"{MARK}of{account.replace('_', '')}{'live' if livemode else 'test'}"


def plant(connection: "psycopg.Connection[Any]", account: str, livemode: bool) -> None:  # noqa: FBT001 - a world
    """Fill a row of each projection with the mark of its world wherever it holds text."""
    for table in tables.PROJECTIONS:
        row = {column.name: planted(table, column) for column in table.columns}
        row |= {"account": account, "livemode": livemode}
        for name in {"client_reference_id", "number", "name", "reason", "url", "flow_type", "description"} & row.keys():
            row[name] = own(account, livemode=livemode)
        names = ", ".join(row)
        query = f"INSERT INTO {table.name} ({names}) VALUES ({', '.join(['%s'] * len(row))})"  # noqa: S608
        connection.execute(query.encode(), list(row.values()))


def readable() -> list[str]:
    """Return the addresses of the pages that show rows."""
    found = [path for method, path in PAGES if method == "GET" and not path.startswith("/log")]
    return [f"{path}?q={NAME}" if path == "/search" else path for path in found]


@pytest.mark.parametrize("world", WORLDS)
def test_a_page_shows_one_world(crowded: Web, world: tuple[str, bool]) -> None:
    """Each page shows the rows of the account and mode that it names, and nothing of any other."""
    account, livemode = world
    others = {own(name, livemode=mode) for name, mode in WORLDS} - {own(account, livemode=livemode)}
    shown = set()
    with crowded.looking() as client:
        for path in readable():
            parameters = {"account": account, "livemode": str(livemode).lower()}
            answer = client.get(path, params={**dict(httpx.URL(path).params), **parameters})
            assert answer.status_code == 200, path
            assert [each for each in others if each in answer.text] == [], path
            assert f'<span class="mode {"live" if livemode else "test"}">' in answer.text
            if own(account, livemode=livemode) in answer.text:
                shown.add(path)

    assert f"/orders/{NAME}" in shown


def test_personal_data_wants_its_scope(crowded: Web) -> None:
    """No page shows personal data to a token without the scope, and the pages together show it to one that has it."""
    everything = ""
    for token in ("read", "admin", "admin+personal"):
        with crowded.looking(TOKENS[token]) as client:
            texts = {path: client.get(path).text for path in readable()}
        if "personal" in token:
            everything = "".join(texts.values())
        else:
            assert {path for path, text in texts.items() if f"{MARK}-" in text} == set()

    expected = {mark("orders", name) for name in PERSONAL["orders"]}
    assert {each for each in expected if each not in everything} == set()
