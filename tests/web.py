"""The real application on a real server, for the tests that speak HTTP."""

import hashlib
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, LiteralString
from urllib.parse import urlsplit

import httpx
import msgspec
import psycopg
import redis
import uvicorn
from prometheus_client.parser import text_string_to_metric_families
from psycopg.sql import SQL, Identifier

from api import app
from api.__main__ import BoundedHttp, server_options
from deploy.local.databases import drop_database
from deploy.local.services import Services
from deploy.sandbox.signing import sign
from schemas.broker import FOLD_QUEUE
from schemas.migrate import upgrade
from schemas.settings import Settings
from tests.databases import TEMPLATE_VARIABLE
from tests.waiting import until

SECRET: Final = "whsec_test"
TOKENS: Final = {
    "read": "a-reader",
    "personal": "a-pair-of-eyes",
    "register": "a-shop",
    "admin": "an-operator",
    "read+personal": "a-clerk",
    "register+personal": "a-shop-that-writes",
    "admin+personal": "an-owner",
}
PATH: Final = "/webhooks/stripe"


def bearer(token: str) -> dict[str, str]:
    """Return the header that shows *token*."""
    return {"Authorization": f"Bearer {token}"}


READER: Final = bearer(TOKENS["read"])
OPERATOR: Final = bearer(TOKENS["admin"])
CLERK: Final = bearer(TOKENS["read+personal"])


def environment_of(database_url: str, redis_url: str) -> dict[str, str]:
    """Return an environment with one signing secret and a token of each scope, and of some together."""
    hashed = (
        f"{scope.replace('+', '_')}:{scope}:{hashlib.sha256(token.encode()).hexdigest()}"
        for scope, token in TOKENS.items()
    )
    return {
        "DATABASE_URL": database_url,
        "REDIS_URL": redis_url,
        "STRIPE_WEBHOOK_SECRETS": SECRET,
        "PAYFOLD_TOKENS": ",".join(hashed),
    }


def settings_of(database_url: str, redis_url: str, **more: str) -> Settings:
    """Return the settings of that environment with *more* laid over it."""
    return Settings.load(environment_of(database_url, redis_url) | more)


def signed(body: bytes, *, secret: str = SECRET, age: int = 0) -> dict[str, str]:
    """Return the header that Stripe would have sent with *body*, *age* seconds ago."""
    return {"Stripe-Signature": sign(body, secret, int(time.time()) - age)}


def event(number: object = 1, **fields: Any) -> bytes:  # noqa: ANN401 - any JSON
    """Return the smallest event that the inbox keeps, with *fields* laid over it."""
    least = {"id": f"evt_{number}", "type": "test.event", "created": 1_793_491_200, "data": {"object": {}}}
    return msgspec.json.encode(least | fields)


@dataclass(frozen=True)
class Web:
    """A running web process: its address, its database and its broker."""

    port: int
    settings: Settings
    client: httpx.Client

    def deliver(self, body: bytes, **headers: str) -> httpx.Response:
        """Post *body*, signed now unless *headers* are given."""
        return self.client.post(PATH, content=body, headers=signed(body) | headers)

    def get(self, path: str, headers: Mapping[str, str] = READER) -> httpx.Response:
        """Request *path* with the token of a reader."""
        return self.client.get(path, headers=headers)

    @contextmanager
    def looking(self, token: str = TOKENS["admin+personal"]) -> Iterator[httpx.Client]:
        """Open a browser's session that is logged in with *token*, and names its origin."""
        with httpx.Client(base_url=self.client.base_url, timeout=60, headers={"Origin": self.origin}) as client:
            assert client.post("/login", data={"token": token}).status_code == 303
            yield client

    @property
    def origin(self) -> str:
        """The origin of the pages, as a browser names it."""
        return f"http://127.0.0.1:{self.port}"

    def query(self, query: LiteralString, *values: object) -> list[tuple[Any, ...]]:
        """Return the rows of *query*, read over a connection of its own."""
        with psycopg.connect(self.settings.libpq, autocommit=True) as connection:
            cursor = connection.execute(query, values)
            return cursor.fetchall() if cursor.description else []

    def inbox(self) -> list[str]:
        """Return the ids in the inbox, sorted."""
        return [row[0] for row in self.query("SELECT id FROM inbox ORDER BY id")]

    def fold_messages(self) -> int:
        """Return the number of wake-ups that wait for a worker."""
        with redis.Redis.from_url(self.settings.broker) as client:
            return int(client.llen(FOLD_QUEUE))

    def forget_messages(self) -> None:
        """Empty the broker, as its restart without a disk would."""
        with redis.Redis.from_url(self.settings.broker) as client:
            client.flushdb()

    def counters(self) -> dict[str, float]:
        """Return the counters at /metrics, by the value of their label."""
        families = text_string_to_metric_families(self.get("/metrics").text)
        samples = [sample for family in families for sample in family.samples if sample.name.endswith("_total")]
        return {next(iter(sample.labels.values())): sample.value for sample in samples if sample.labels}

    def send_raw(self, *parts: bytes) -> "Raw":
        """Open a connection and send *parts* over it."""
        raw = Raw(socket.create_connection(("127.0.0.1", self.port), timeout=20))
        for part in parts:
            raw.connection.sendall(part)
        return raw


@dataclass(frozen=True)
class Raw:
    """A connection on which the test decides every byte that is sent."""

    connection: socket.socket

    def answer_until(self, end: bytes) -> bytes:
        """Return what the server sends until *end* has come, and keep the connection open."""
        answer = b""
        while not answer.endswith(end):
            received = self.connection.recv(65_536)
            assert received, f"closed after {answer!r}"
            answer += received
        return answer

    def answer(self) -> bytes:
        """Return everything the server sends until it closes the connection, and close our side."""
        answer = b""
        with self.connection:
            while True:
                try:
                    received = self.connection.recv(65_536)
                except ConnectionResetError:
                    return answer
                if not received:
                    return answer
                answer += received


@contextmanager
def migrated_database(services: Services) -> Iterator[str]:
    """Make a database for all tests of a file, and return its URL."""
    name = f"payfold_web_{secrets.token_hex(4)}"
    with psycopg.connect(services.database_url, autocommit=True) as connection:
        template = Identifier(os.environ.get(TEMPLATE_VARIABLE, "template1"))
        connection.execute(SQL("CREATE DATABASE {} TEMPLATE {}").format(Identifier(name), template))
    database_url = urlsplit(services.database_url)._replace(path=f"/{name}").geturl()
    try:
        upgrade(database_url)
        yield database_url
    finally:
        with psycopg.connect(services.database_url, autocommit=True) as connection:
            drop_database(connection, name)


@contextmanager
def serving_many(services: Services) -> Iterator[Web]:
    """Serve on one database for all tests of a file that leave nothing behind."""
    with migrated_database(services) as database_url, serving(settings_of(database_url, services.redis_url)) as web:
        yield web


@contextmanager
def serving(
    settings: Settings,
    *,
    http: type[BoundedHttp] = BoundedHttp,
    body_seconds_max: float = 10,
    answer_seconds_max: float = 10,
    request_seconds_max: float = 60,
) -> Iterator[Web]:
    """Serve the application as its own process would, in a thread and on a free port."""
    application = app.create(
        settings,
        body_seconds_max=body_seconds_max,
        answer_seconds_max=answer_seconds_max,
        request_seconds_max=request_seconds_max,
    )
    options = server_options(settings) | {"http": http}
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = uvicorn.Server(uvicorn.Config(application, **options))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        port = listening.getsockname()[1]
        try:
            until(lambda: server.started or not thread.is_alive())
            assert server.started
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
                yield Web(port, settings, client)
        finally:
            server.should_exit = True
            thread.join()
