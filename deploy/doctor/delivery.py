"""A signed test delivery through the webhook's address, followed to its row in the inbox and to its outcome.

Note [What a test delivery leaves]
    The event has a type that no fold reads, so it ends ignored and touches no table. Its row stays in the inbox: events
    are never deleted. It has the account and mode of the deliveries there, so that it makes no world of its own, which
    jobs would look after.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from secrets import token_hex
from threading import Event
from typing import Final, TypeVar
from urllib.parse import urlsplit

import httpx
import msgspec
from sqlalchemy import Engine

from deploy.doctor.findings import Finding, fault, ok, public, skipped, warning
from deploy.doctor.postgres import TEST_DELIVERY
from deploy.endpoints import PATH
from deploy.local.ports import LOOPBACK
from deploy.output import shown
from deploy.sandbox.signing import sign
from schemas import accounts, database
from schemas.database import Bounds, Cursor
from schemas.errors import ConfigurationError, SignatureExpired, SignatureMismatch, SignatureMissing
from schemas.observations import World
from schemas.settings import Settings
from worker.folds import API_VERSION

DELIVERY: Final = "test delivery"
ANSWER_SECONDS_MAX: Final = 10.0
"""For each step of the request: to connect, to send, and to wait for bytes."""
FOLDED_SECONDS_MAX: Final = 20.0
"""Until the event has an outcome: the worker's own timer needs 15 where no message reaches it."""
PAUSE_SECONDS: Final = 0.1
BOUNDS: Final = Bounds(statement=2, lock=1, whole=4)
DETAIL_CHARACTERS_MAX: Final = 200

Found = TypeVar("Found")


@dataclass(frozen=True, slots=True)
class Sent:
    """What was sent, and how it was answered after so many *seconds*.

    *reason* and *detail* are those of our own problem documents, else empty.
    """

    event: str
    url: str
    status: int
    reason: str
    detail: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Outcome:
    """The row of an event in the inbox, and its state, None while it is pending; *seconds* is how long that took."""

    seq: int
    state: str | None
    seconds: float


def address(to: str | None, settings: Settings) -> str:
    """Return the whole address of the webhook: *to*, with the path where it names none, else the one here.

    Raises:
        ConfigurationError: *to* is no address.
    """
    if to is None:
        return f"http://{LOOPBACK}:{settings.port}{PATH}"
    try:
        parts = urlsplit(to)
        is_address = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_address = False
    if not is_address:
        raise ConfigurationError(f"--to is no address to post to. Example: --to https://shop.example.com{PATH}")
    return to if parts.path.strip("/") else f"{to.rstrip('/')}{PATH}"


def check(settings: Settings, url: str, *, livemode: bool | None) -> Finding:
    """Send a test delivery to *url*, follow it, and judge what became of it. See Note [What a test delivery leaves].

    It is of the mode *livemode*, of which None is the mode of what is there.
    """
    if not settings.signing_secrets:
        return skipped(DELIVERY, "STRIPE_WEBHOOK_SECRETS is not set, so nothing can be signed")
    engine = database.engine(settings.postgresql, connections_max=1)
    try:
        account = settings.signing_secrets[0].account
        world = _within(engine, lambda cursor: _world(cursor, account, settings))
        if livemode is not None:
            world = World(world.account, livemode)
        sent = _send(settings, url, world)
        if isinstance(sent, Finding):
            return sent
        if not 200 <= sent.status < 300:  # noqa: PLR2004 - HTTP's numbers
            return refused(sent)
        return followed(sent, world, _follow(engine, world, sent.event))
    finally:
        engine.dispose()


def _within(engine: Engine, read: Callable[[Cursor], Found]) -> Found:
    with database.transaction(engine, BOUNDS) as connection, database.cursor(connection) as cursor:
        return read(cursor)


def _world(cursor: Cursor, label: str, settings: Settings) -> World:
    """Return the world of the event: its label's newest name, and a mode that is there, in the inbox or by a key."""
    account = accounts.names(cursor).get(label, label)
    cursor.execute(
        "SELECT livemode FROM inbox WHERE account = %s ORDER BY account DESC, livemode DESC LIMIT 1", (account,)
    )
    if row := cursor.fetchone():
        return World(account, row[0])
    return World(account, any(key.livemode for key in settings.api_keys))


def _send(settings: Settings, url: str, world: World) -> Sent | Finding:
    event = f"evt_payfold_doctor_{token_hex(12)}"
    body = _body(event, world)
    header = sign(body, settings.signing_secrets[0].secret.decode(), int(time.time()))
    began = time.monotonic()
    try:
        answer = httpx.post(
            url, content=body, headers={"Stripe-Signature": header, **_JSON}, timeout=ANSWER_SECONDS_MAX
        )  # fmt: skip
    except httpx.HTTPError as error:
        return unanswered(url, error)
    return Sent(event, url, answer.status_code, *_problem(answer), time.monotonic() - began)


_JSON: Final = {"Content-Type": "application/json; charset=utf-8", "User-Agent": "Payfold doctor"}


def _body(event: str, world: World) -> bytes:
    return msgspec.json.encode(
        {
            "id": event,
            "object": "event",
            "api_version": API_VERSION,
            "created": int(time.time()),
            "data": {"object": {"id": event.removeprefix("evt_"), "object": "payfold_doctor"}},
            "livemode": world.livemode,
            "pending_webhooks": 1,
            "request": {"id": None, "idempotency_key": None},
            "type": TEST_DELIVERY,
        }
    )


def _problem(answer: httpx.Response) -> tuple[str, str]:
    """Return the word and the detail of our problem document, or nothing: another server may answer anything."""
    try:
        found = msgspec.json.decode(answer.content, type=_Problem)
    except msgspec.DecodeError:
        return "", ""
    return shown(found.type.rpartition(":")[2]), shown(found.detail)[:DETAIL_CHARACTERS_MAX]


class _Problem(msgspec.Struct):
    type: str = ""
    detail: str = ""


# ---- Its row ----

_OUTCOME: Final = """
SELECT i.seq, o.state FROM inbox AS i LEFT JOIN outcomes AS o USING (seq)
WHERE (i.account, i.livemode, i.id) = (%s, %s, %s)
"""


def _follow(engine: Engine, world: World, event: str) -> Outcome | None:
    """Return the event's row once it has an outcome, or as it is when the time is over; None where it has no row."""
    began, pause = time.monotonic(), Event()
    while True:
        row = _within(engine, lambda cursor: _row(cursor, world, event))
        passed = time.monotonic() - began
        if row is None or row[1] is not None or passed > FOLDED_SECONDS_MAX:
            return None if row is None else Outcome(*row, passed)
        pause.wait(PAUSE_SECONDS)


def _row(cursor: Cursor, world: World, event: str) -> tuple[int, str | None] | None:
    cursor.execute(_OUTCOME, (world.account, world.livemode, event))
    return cursor.fetchone()


# ---- What it shows ----


def unanswered(url: str, error: httpx.HTTPError) -> Finding:
    """Return the fault that no answer came."""
    kind = type(error).__name__
    fix = "Check that the web process runs there, and that its host, its port and the firewall let it be reached."
    if "CERTIFICATE" in str(error).upper() or "SSL" in str(error).upper():
        fix = "Check the certificate of this host: Stripe delivers only where it is valid."
    if urlsplit(url).hostname == LOOPBACK:
        fix = (
            f"{fix} From another machine name the public address:\n  payfold doctor --send --to https://YOUR-HOST{PATH}"
        )
    return fault(DELIVERY, f"{public(url)} does not answer ({kind})", fix)


def refused(sent: Sent) -> Finding:
    """Judge an answer other than a 2xx."""
    words = f" ({sent.detail})" if sent.detail else ""
    return fault(DELIVERY, f"{public(sent.url)} answered {sent.status}{words}", _remedy(sent))


_BY_REASON: Final = {
    SignatureMismatch.reason: "The web process knows other secrets than this command: give it the same"
    " STRIPE_WEBHOOK_SECRETS, and restart it. If they are the same, something on the way changes the body.",
    SignatureExpired.reason: "The clocks of this machine and of the web process differ: let both follow a time server.",
    SignatureMissing.reason: "Something on the way takes the header Stripe-Signature away: let the proxy pass it on.",
}
_BY_STATUS: Final = {
    3: "Name the address that it leads to, at Stripe as well: Stripe follows no redirect.",
    4: "Look at what answers there: a proxy or a firewall may stand in front of the web process.",
    5: "Look at the log of the web process and of the proxy in front of it; /health/ready names the obstacle.",
}
_ELSEWHERE: Final = (404, 405)


def _remedy(sent: Sent) -> str:
    if sent.status in _ELSEWHERE:
        return f"The address does not lead to the web process: it wants the path {PATH}."
    return _BY_REASON.get(sent.reason) or _BY_STATUS.get(sent.status // 100, _BY_STATUS[4])


def followed(sent: Sent, world: World, row: Outcome | None) -> Finding:
    """Judge what became of a delivery that was acknowledged."""
    took = f"{sent.status} after {sent.seconds * 1000:.0f} ms"
    if row is None:
        return fault(
            DELIVERY,
            f"{public(sent.url)} answered {took}, and the event is not in this database",
            "The web process there has another DATABASE_URL, or another server answers in its place.",
        )
    mode = "live" if world.livemode else "test"
    left = f"it leaves the ignored event {sent.event} in the inbox ({mode} mode), and nothing in the tables"
    if row.state is None:
        return fault(
            DELIVERY,
            f"{public(sent.url)} answered {took}, and the event still waits after {row.seconds:.0f} s; {left}",
            "The worker does not fold: look at its log, and start it:\n  python -m worker",
        )
    words = f"answered {took}; seq {row.seq}, {row.state} after {row.seconds:.1f} s; {left}"
    if row.state != "ignored":
        return warning(DELIVERY, words, "The event ought to be ignored: look at it by `payfold events show`.")
    return ok(DELIVERY, words)
