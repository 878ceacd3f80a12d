"""`doctor` finds what is wrong with a deployment, each fault with its fix, and finds nothing where all is well."""

import os
import re
import secrets
import subprocess
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import LiteralString
from urllib.parse import urlsplit

import msgspec
import psycopg
import pytest
import redis
from psycopg.sql import SQL, Identifier
from sqlalchemy import Engine

from api import app as web_application
from deploy.doctor import delivery, engines, examination, postgres
from deploy.doctor.delivery import Outcome, Sent
from deploy.doctor.findings import Finding, Unread, judged
from deploy.doctor.postgres import TEST_DELIVERY, Arrivals, Postgres, Server, Sessions
from deploy.doctor.reading import Reading
from deploy.doctor.redis import Engine as RedisEngine
from deploy.doctor.redis import Memory
from deploy.endpoints import PATH
from deploy.local.databases import drop_database
from deploy.local.valkey import Valkey
from deploy.sandbox.account import Account
from deploy.sandbox.http_api import StripeApi as SandboxApi
from deploy.sandbox.server import Fault, Faults
from deploy.sandbox.server import serving as serving_stripe
from schemas.errors import ConfigurationError
from schemas.observations import World
from schemas.settings import Settings
from tests import ledger
from tests.command import Ran, python
from tests.faults import Proxy
from tests.test_status import beat_all
from tests.waiting import until
from tests.web import serving
from worker import app as worker_application
from worker.folding.parallel import FOLD_PROCESSES
from worker.folding.projection import FOLD_BATCH_MAX
from worker.folds import API_VERSION, STRIPE_TYPES

KEY = "sk_test_a_key_that_must_stay_hidden"
RESTRICTED = "rk_test_another_that_must_stay_hidden"
SECRET = "whsec_a_secret_that_must_stay_hidden"
URL = f"https://shop.example.com{PATH}"
HIDDEN = "that_must_stay_hidden"
SHA256 = "0" * 64
CHECKS = (
    "settings",
    "signing secrets",
    "API keys",
    "tokens",
    "labels",
    "accounts",
    "database",
    "migrations",
    "grants",
    "connections",
    "clock of PostgreSQL",
    "redis",
    "redis memory",
    "key (default account, test)",
    "clock of Stripe",
    "endpoint (default account, test)",
    "jobs at Stripe",
    "processes",
    "webhooks",
)


@dataclass(frozen=True)
class Deployment:
    """A deployment next to a sandbox Stripe that has the time of day."""

    engine: Engine
    account: Account
    api: SandboxApi
    faults: Faults
    environment: dict[str, str] = field(repr=False)

    def look(self, *, url: str | None = None, **settings: str) -> dict[str, list[tuple[str, str, str]]]:
        """Return level, finding and fix by the check, with *settings* laid over the usual ones."""
        return by_check(examination.of_system(Settings.load(self.environment | settings), url=url))

    def doctor(self, *arguments: str, **settings: str) -> Ran:
        """Run the command."""
        ran = python("deploy", "doctor", *arguments, settings=self.environment | settings)
        assert HIDDEN not in ran.out + ran.err
        assert "Traceback" not in ran.err
        return ran


def by_check(findings: Iterable[Finding]) -> dict[str, list[tuple[str, str, str]]]:
    """Return level, finding and fix of *findings* by their check."""
    found: dict[str, list[tuple[str, str, str]]] = {}
    for each in findings:
        assert HIDDEN not in f"{each.found}{each.fix}"
        found.setdefault(each.check, []).append((each.level.value, each.found, each.fix))
    return found


def only(findings: Iterable[Finding]) -> tuple[str, str, str]:
    """Return level, finding and fix of the one finding."""
    (found,) = findings
    return (found.level.value, found.found, found.fix)


@pytest.fixture
def deployment(engine: Engine, database_url: str, redis_url: str) -> Iterator[Deployment]:
    """Return a deployment without a fault: its endpoint exists, its processes beat, and a webhook came."""
    account, faults = Account(seed=1, payments=True), Faults()
    forbidden = {RESTRICTED: ("/v1/disputes", "/v1/events", "/v1/webhook_endpoints")}
    api = SandboxApi({KEY: account, RESTRICTED: account}, forbidden=forbidden, clock=lambda: int(time.time()))
    account.create_webhook_endpoint(URL, STRIPE_TYPES, api_version=API_VERSION)
    with serving_stripe(api, faults) as address:
        settings = {
            "DATABASE_URL": database_url,
            "REDIS_URL": redis_url,
            "STRIPE_WEBHOOK_SECRETS": SECRET,
            "STRIPE_API_KEY": KEY,
            "STRIPE_API_BASE": address,
            "PAYFOLD_TOKENS": f"operator:admin+personal:{SHA256}",
        }
        beat_all(engine)
        receive(engine, account)
        yield Deployment(engine, account, api, faults, settings)


def receive(engine: Engine, account: Account, *, source: str = "webhook", age: float = 60, label: str = "") -> None:
    """Record and fold an event that came *age* seconds ago."""
    account.create_payment_link()
    came = ledger.delivery(account.events[-1].body, source=source, account=label)
    at = datetime.now(UTC) - timedelta(seconds=age)
    ledger.record(engine, [msgspec.structs.replace(came, received_at=at)])
    ledger.fold(engine)


# ---- The whole ----


def test_all_is_well(deployment: Deployment) -> None:
    """A deployment without a fault has one ok finding for each check, and exit 0."""
    ran = deployment.doctor("--format", "json")

    assert [(row["check"], row["level"], row["fix"]) for row in ran.json] == [(each, "ok", "") for each in CHECKS]
    assert (ran.code, ran.err) == (0, "")


def test_the_screen(deployment: Deployment) -> None:
    """The table has a line for each check, the fix indented beneath it, and a count at the end; a fault is exit 1."""
    ran = deployment.doctor(STRIPE_WEBHOOK_SECRETS="", PAYFOLD_TOKENS="")

    lines = ran.out.splitlines()
    at = next(number for number, line in enumerate(lines) if line.startswith("fault    signing secrets"))
    assert ran.code == 1
    assert lines[at].endswith("STRIPE_WEBHOOK_SECRETS is not set, so every delivery is refused")
    assert lines[at + 1].startswith("         fix: Set it to the endpoint's signing secret")
    assert lines[at + 2].strip() == "payfold endpoints create --url https://YOUR-HOST/webhooks/stripe --yes"
    assert lines[-1] == "19 findings: 1 fault, 1 warning, 17 ok"


def test_warnings_are_no_failure(deployment: Deployment) -> None:
    """A warning alone exits with 0."""
    ran = deployment.doctor("--format", "ndjson", PAYFOLD_TOKENS="")

    levels = {row["check"]: row["level"] for row in map(msgspec.json.decode, ran.out.splitlines())}
    assert (ran.code, levels["tokens"]) == (0, "warning")
    assert [check for check, level in levels.items() if level != "ok"] == ["tokens"]


def test_a_part_that_hangs_is_left_behind() -> None:
    """A part that never ends costs its time, and what it has read until then counts."""
    never = threading.Event()
    found = {"read": 0}

    def fill(part: dict[str, int]) -> None:
        part["read"] = 1
        never.wait()

    reading = Reading(found, fill, seconds_max=0.2)

    assert reading.result() == {"read": 1}
    never.set()


def test_a_check_that_fails_stops_no_other() -> None:
    """A check that raises is a fault of its own, without the error's words, which may quote data."""

    def judge(value: int) -> Finding:
        raise ValueError(f"{HIDDEN} {value}")

    assert only(judged("any", 1, judge)) == (
        "fault",
        "the check itself failed: ValueError",
        "Report this as a bug of Payfold.",
    )
    assert only(judged("any", Unread("a reason"), judge)) == ("skipped", "not looked at: a reason", "")


# ---- Settings ----


def test_unknown_names(deployment: Deployment) -> None:
    """A name that is no setting is a fault of configuration, with the nearest name, and the other checks go on."""
    ran = deployment.doctor("--format", "json", PAYFOLD_TOKEN="x", PAYFOLD_DATABASE="y")

    rows = [row for row in ran.json if row["check"] == "settings"]
    assert ran.code == 2
    assert [(row["level"], row["found"]) for row in rows] == [
        ("fault", "PAYFOLD_DATABASE: there is no such setting"),
        ("fault", "PAYFOLD_TOKEN: there is no such setting"),
    ]
    assert rows[1]["fix"] == "Take it away, or correct its name: the nearest is PAYFOLD_TOKENS."
    assert {row["level"] for row in ran.json if row["check"] != "settings"} == {"ok"}


def test_bad_values(deployment: Deployment) -> None:
    """A value that cannot be used is a fault with an example, without the value, and exit 2."""
    ran = deployment.doctor("--format", "json", STRIPE_WEBHOOK_SECRETS="that_must_stay_hidden", PORT="0")

    assert (ran.code, ran.err) == (2, "")
    assert {(row["check"], row["level"]) for row in ran.json} == {("settings", "fault")}
    assert "STRIPE_WEBHOOK_SECRETS: each signing secret begins with whsec_" in ran.out
    assert [row["fix"] for row in ran.json] == [
        "Write it as PORT=8000",
        "Write it as STRIPE_WEBHOOK_SECRETS=whsec_a,acct_1=whsec_b",
    ]


def test_nothing_is_set() -> None:
    """Without any setting the missing ones are named with exit 2; what cannot be looked at then shares a line."""
    ran = python("deploy", "doctor")

    assert ran.code == 2
    assert "DATABASE_URL is not set, and no process starts without it" in ran.out
    assert "REDIS_URL is not set, and no process starts without it" in ran.out
    (line,) = (line for line in ran.out.splitlines() if "not looked at: DATABASE_URL is not set" in line)
    assert line.endswith(
        "; nor database, migrations, grants, connections, clock of PostgreSQL, jobs at Stripe, processes, webhooks"
    )


def test_the_form_of_secrets_and_keys(deployment: Deployment) -> None:
    """Examples in place of secrets, one secret under two labels, and live and test keys together are reported."""
    found = deployment.look(
        STRIPE_WEBHOOK_SECRETS=f"whsec_a,acct_1={SECRET},acct_2={SECRET}", STRIPE_API_KEY=f"{KEY},sk_live_b"
    )

    assert [each[:2] for each in found["signing secrets"]] == [
        ("warning", "1 of 3 in STRIPE_WEBHOOK_SECRETS is shorter than any that Stripe makes"),
        ("warning", "one secret is given twice: what it signs is recorded under the first label alone"),
    ]
    assert [each[:2] for each in found["API keys"]] == [
        ("warning", "1 of 2 in STRIPE_API_KEY is shorter than any that Stripe makes"),
        (
            "warning",
            "live and test keys are together, so that test and live rows share a database, each under its mode",
        ),
    ]


def test_tokens(deployment: Deployment) -> None:
    """Without a token the pages are closed; a token of the scope personal alone opens nothing."""
    (none,) = deployment.look(PAYFOLD_TOKENS="")["tokens"]
    (personal,) = deployment.look(PAYFOLD_TOKENS=f"clerk:personal:{SHA256}")["tokens"]

    assert none[:2] == (
        "warning",
        "none is configured, so the pages and all routes but the webhook and health are closed",
    )
    assert none[2].endswith("\n  payfold tokens new operator --scope admin+personal")
    assert personal[:2] == ("warning", "clerk has the scope personal alone, which opens no route")


def test_labels(deployment: Deployment) -> None:
    """Labels that are mixed, or were renamed, are reported; so is a label that the inbox shows was taken away."""
    receive(deployment.engine, deployment.account, label="acct_9")
    ledger.execute(
        deployment.engine,
        "INSERT INTO account_names (old, new, renamed_at, finished_at) VALUES ('acct_2', 'acct_3', now(), now())",
    )

    found = deployment.look(STRIPE_WEBHOOK_SECRETS=f"{SECRET},acct_2={SECRET}2", STRIPE_API_KEY="")

    mixed, renamed = found["labels"]
    assert mixed[:2] == ("warning", "a secret in STRIPE_WEBHOOK_SECRETS has no label, and others have (acct_2)")
    assert renamed[:2] == ("warning", "the label acct_2 was renamed to acct_3, and is still in the settings")
    ledger.execute(deployment.engine, "UPDATE account_names SET finished_at = NULL")
    (unfinished, _) = deployment.look(STRIPE_WEBHOOK_SECRETS=SECRET, STRIPE_API_KEY="")["accounts"]
    assert unfinished[2] == "Let the rename come to its end:\n  payfold accounts rename acct_2 acct_3 --yes"
    (split,) = found["accounts"]
    assert split[0] == "fault"
    assert "Events were recorded under the label acct_9, and no secret" in split[1]
    assert "\n  payfold accounts rename acct_9 " in split[2]


# ---- PostgreSQL ----


@pytest.mark.parametrize(
    ("number", "version", "expected"),
    [(140_019, "14.19", ["fault"]), (150_000, "15.0", []), (180_009, "18.9", []), (190_000, "19.0", ["warning"])],
)
def test_releases_of_postgresql(number: int, version: str, expected: list[str]) -> None:
    """PostgreSQL 15 to 18 are fine, an older one is a fault, and a newer one a warning."""
    server = Server(number, version, "UTF8", takes_no_writes=False, is_pooled=False, milliseconds=1, ahead_seconds=0)

    assert [each.level.value for each in engines.database(server)] == expected


def test_a_database_that_is_away(deployment: Deployment) -> None:
    """A database that does not answer is one fault; what needs it is skipped, and the rest is looked at."""
    found = deployment.look(DATABASE_URL=f"postgres://shop:{HIDDEN}@127.0.0.1:1/shop")

    (database,) = found["database"]
    assert database[0] == "fault"
    assert "Connection refused" in database[1]
    for check in ("migrations", "clock of PostgreSQL", "webhooks"):
        assert found[check] == [("skipped", "not looked at: PostgreSQL cannot be reached", "")]
    assert [found[check][0][0] for check in ("redis", "key (default account, test)")] == ["ok", "ok"]


def test_a_database_that_is_silent(deployment: Deployment) -> None:
    """A database that accepts a connection and never answers costs seconds, and no other check."""
    with closing(Proxy(deployment.environment["DATABASE_URL"])) as way:
        way.silences_new = True
        began = time.monotonic()
        found = deployment.look(DATABASE_URL=way.url)

    assert time.monotonic() - began < 25
    assert (found["database"][0][0], found["redis"][0][0]) == ("fault", "ok")


def test_nothing_is_changed(deployment: Deployment) -> None:
    """A database that takes no writes is a fault, and all other checks work there; Stripe is only asked."""
    name = urlsplit(deployment.environment["DATABASE_URL"]).path.strip("/")
    ledger.execute(deployment.engine, f"ALTER DATABASE {name} SET default_transaction_read_only = on")

    found = deployment.look()

    assert found.pop("database")[0][:2] == ("fault", "PostgreSQL takes no writes here, so no delivery is recorded")
    assert {level for findings in found.values() for level, _, _ in findings} == {"ok"}
    assert {call.method for call in deployment.api.calls} == {"GET"}


@contextmanager
def empty_database(url: str, options: LiteralString) -> Iterator[str]:
    """Make an empty database with *options*, and yield its URL."""
    name = f"payfold_test_{secrets.token_hex(4)}"
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(SQL("CREATE DATABASE {} TEMPLATE template0 {}").format(Identifier(name), SQL(options)))
        try:
            yield urlsplit(url)._replace(path=f"/{name}").geturl()
        finally:
            drop_database(connection, name)


def test_migrations_and_encoding(deployment: Deployment) -> None:
    """An empty database has every migration pending, which is exit 4; one in LATIN1 cannot hold every name."""
    with empty_database(deployment.environment["DATABASE_URL"], "ENCODING LATIN1 LOCALE 'C'") as url:
        ran = deployment.doctor("--format", "json", DATABASE_URL=url)

    rows = {row["check"]: row for row in ran.json}
    assert ran.code == 4
    assert rows["migrations"]["level"] == "fault"
    assert rows["migrations"]["found"].startswith("pending: 0001, 0002, ")
    assert rows["migrations"]["fix"].endswith("\n  payfold migrate up")
    assert rows["database"]["found"] == "the database's encoding is LATIN1, and names of buyers need UTF8"
    assert rows["webhooks"]["found"] == "not looked at: migrations are pending"


def test_another_order_of_text(deployment: Deployment) -> None:
    """A database that was made with another version of the machine's order of text has indexes that may be wrong."""
    options: LiteralString = "ENCODING UTF8 LOCALE 'C.UTF-8' COLLATION_VERSION '1.0'"
    with empty_database(deployment.environment["DATABASE_URL"], options) as url:
        ran = deployment.doctor("--format", "json", DATABASE_URL=url)

    found = {row["check"]: row for row in ran.json}["database"]
    assert found["level"] == "fault"
    assert "the database was made with 1.0, so an index may miss rows" in found["found"]
    assert commands(found["fix"]) == ["REINDEX DATABASE;", "ALTER DATABASE … REFRESH COLLATION VERSION;"]


def commands(fix: str) -> list[str]:
    """Return the commands of a fix."""
    return [line.strip() for line in fix.splitlines() if line.startswith("  ")]


def test_grants(deployment: Deployment) -> None:
    """Missing rights are named, and the printed statements grant what is missing: then nothing is found."""
    name = urlsplit(deployment.environment["DATABASE_URL"]).path.strip("/")
    for statement in (
        "REVOKE INSERT, UPDATE ON orders FROM payfold",
        "REVOKE SELECT ON events FROM payfold",
        # Triggers alone write the sums, as the owner.
        "REVOKE INSERT, UPDATE, DELETE ON hourly_sums, link_sums FROM payfold",
        "REVOKE UPDATE, DELETE ON hourly_deltas, link_deltas FROM payfold",
        "REVOKE USAGE ON SEQUENCE inbox_seq_seq FROM payfold",
        "REVOKE CREATE ON SCHEMA public FROM pg_database_owner",
        f"REVOKE CREATE ON DATABASE {name} FROM payfold",
    ):
        ledger.execute(deployment.engine, statement)

    before = deployment.look()["grants"]
    for command in [each for _, _, fix in before for each in commands(fix)]:
        ledger.execute(deployment.engine, command)
    after = deployment.look()["grants"]

    assert [finding[:2] for finding in before] == [
        (
            "fault",
            "the role payfold lacks SELECT on events, USAGE on inbox_seq_seq, INSERT and UPDATE on orders",
        ),
        ("warning", "the role payfold may not make partitions of payloads, so that all of them stay in one table"),
        (
            "warning",
            "the role payfold may not make a schema, so `rebuild` and `reconcile` cannot fold next to the tables",
        ),
    ]
    assert after == [("ok", "the role payfold may do all that processes and commands do", "")]


def test_rights_that_keep_the_state_hidden(deployment: Deployment) -> None:
    """Where the role may not read a table, the checks that need it are skipped with the reason."""
    ledger.execute(deployment.engine, "REVOKE SELECT ON heartbeats FROM payfold")

    found = deployment.look()

    assert found["processes"] == [("skipped", "not looked at: PostgreSQL refused it (InsufficientPrivilege)", "")]
    assert found["webhooks"][0][0] == "skipped"
    assert found["grants"][0][:2] == ("fault", "the role payfold lacks SELECT on heartbeats")


def test_connections(deployment: Deployment) -> None:
    """Processes that may open more sessions than the database allows are a fault; web processes that beat count."""
    name = urlsplit(deployment.environment["DATABASE_URL"]).path.strip("/")
    ledger.execute(deployment.engine, f"ALTER DATABASE {name} CONNECTION LIMIT 19")
    one = deployment.look()["connections"]
    ledger.execute(
        deployment.engine,
        "INSERT INTO heartbeats (kind, name, instance, at, since) SELECT 'web', '', 'host:' || n, now(), now()"
        " FROM generate_series(2, 3) AS n",
    )
    three = deployment.look()["connections"]

    assert [each[:2] for each in one] == [
        ("fault", "1 web process, 1 worker and the clock open up to 20 connections, and PostgreSQL has room for 19")
    ]
    # 3 * 10 + 9 + 1.
    assert three[0][1].startswith("3 web processes, 1 worker and the clock open up to 40 connections")


def test_connections_behind_a_pooler_and_without_a_spare_one() -> None:
    """Behind a pooler PostgreSQL's own limit is no measure; a limit that is just reached is a warning."""
    settings, found = Settings.load({}), Sessions(server=100, role=None, database=21, others=79, processes={})

    assert only(engines.connections(found, settings, is_pooled=True))[0] == "skipped"
    # 10 for the web process, 9 for the worker and 1 for the clock, of min(100 - 79, 21) = 21.
    assert only(engines.connections(found, settings, is_pooled=False))[:2] == (
        "warning",
        "1 web process, 1 worker and the clock open up to 20 connections of 21, which leaves none for a command",
    )


def test_a_pooler_and_options() -> None:
    """PgBouncer refuses `options`, or drops them where it is configured to ignore them: the role can have them."""
    settings = Settings.load({"DATABASE_URL": "postgres://shop@db/shop?options=-csearch_path%3Dshop"})
    found = Sessions(server=100, role=None, database=None, others=0, processes={})

    _, dropped = engines.connections(found, settings, is_pooled=True)
    refused = engines.database_away("FATAL: unsupported startup parameter: options")

    assert (dropped.level.value, refused.level.value) == ("warning", "fault")
    assert all("ALTER ROLE … SET search_path" in each.fix for each in (dropped, refused))
    assert only(engines.connections(found, settings, is_pooled=False))[0] == "ok"


def test_a_small_lock_table() -> None:
    """A worker folds two batches of 500 objects at once, and a small server's lock table may have no room for them."""
    settings = Settings.load({})
    # PostgreSQL's default is 64 for each connection: 64 * 100 and 64 * 25.
    large = Sessions(server=100, role=None, database=None, others=0, processes={}, locks=6_400)
    small = Sessions(server=100, role=None, database=None, others=0, processes={"fold": 2}, locks=1_600)

    assert engines.WORKER_LOCKS > FOLD_PROCESSES * FOLD_BATCH_MAX
    assert only(engines.connections(large, settings, is_pooled=False))[0] == "ok"
    _, found = engines.connections(small, settings, is_pooled=False)
    assert (found.level.value, found.found) == (
        "warning",
        "2 workers may need 2,200 locks, and PostgreSQL promises 1,600: a batch that finds none is folded in parts",
    )
    assert "max_locks_per_transaction" in found.fix


def test_connections_are_those_of_the_processes() -> None:
    """The numbers follow from the pools: in a web process 5 more sessions than the pool, in a worker 3 more."""
    assert engines.WEB_CONNECTIONS == web_application.DATABASE_CONNECTIONS_MAX + 5
    assert engines.WORKER_CONNECTIONS == worker_application.DATABASE_CONNECTIONS_MAX + 3


@pytest.mark.parametrize(
    ("ahead", "level"),
    [(0.2, "ok"), (-4.9, "ok"), (5.1, "warning"), (-59.0, "warning"), (61.0, "fault"), (-400.0, "fault")],
)
def test_clocks(ahead: float, level: str) -> None:
    """A clock that is five seconds off is a warning, and one that is a minute off a fault, in either direction."""
    found = engines.clock(ahead, "clock of PostgreSQL", "PostgreSQL's")

    assert found.level.value == level
    assert level == "ok" or f"{abs(ahead):.1f} s {'ahead of' if ahead > 0 else 'behind'} PostgreSQL's" in found.found


# ---- Redis ----


@pytest.mark.parametrize(
    ("name", "version", "level"),
    [
        ("Redis", "6.2.14", "fault"),
        ("Redis", "7.0.0", "ok"),
        ("Redis", "8.4.0", "ok"),
        ("Valkey", "7.2.5", "fault"),
        ("Valkey", "8.0.1", "ok"),
        ("Redis", "", "warning"),
    ],
)
def test_releases_of_redis(name: str, version: str, level: str) -> None:
    """Redis 7 and Valkey 8 are the oldest that serve."""
    assert engines.redis(RedisEngine(name, version, 1)).level.value == level


def test_a_policy_that_evicts(deployment: Deployment, own_valkey: Valkey) -> None:
    """A policy that evicts is a fault, found by CONFIG or without it; the printed command mends it."""
    with redis.Redis.from_url(own_valkey.url) as client:
        client.config_set("maxmemory-policy", "allkeys-lru")
        client.execute_command("ACL", "SETUSER", "guest", "on", f">{HIDDEN}", "~*", "+@all", "-config")
        client.execute_command("ACL", "SETUSER", "stranger", "on", f">{HIDDEN}", "~*", "+@all", "-config", "-info")
        place = own_valkey.url.rpartition("@")[2]
        guest, stranger = (f"redis://{name}:{HIDDEN}@{place}" for name in ("guest", "stranger"))
        found = deployment.look(REDIS_URL=own_valkey.url)["redis memory"]
        by_guest = deployment.look(REDIS_URL=guest)["redis memory"]
        by_stranger = deployment.look(REDIS_URL=stranger)
        client.execute_command(*commands(found[0][2])[0].split()[1:])
        mended = deployment.look(REDIS_URL=own_valkey.url)["redis memory"]

    assert found[0][:2] == (
        "fault",
        "the policy is allkeys-lru: Redis may drop messages and the budget of calls to Stripe",
    )
    assert by_guest == found
    assert by_stranger["redis memory"][0][0] == "skipped"
    assert "neither INFO nor CONFIG GET" in by_stranger["redis memory"][0][1]
    assert by_stranger["redis"][0][0] == "warning"
    assert mended[0][0] == "ok"


def test_memory_that_is_nearly_full() -> None:
    """Memory that is used to more than nine tenths is a warning; without a limit it is never full."""
    # 91 of 100 MB.
    assert only(engines.memory(Memory("noeviction", 100_000_000, 91_000_000)))[:2] == (
        "warning",
        "91% of 100.0 MB are used, and then writes fail",
    )
    assert list(engines.memory(Memory("noeviction", 0, 91_000_000))) == []


def test_a_redis_that_is_away(deployment: Deployment) -> None:
    """A Redis that does not answer is one fault, without its password."""
    found = deployment.look(REDIS_URL=f"redis://:{HIDDEN}@127.0.0.1:1/0")

    assert found["redis"][0][0] == "fault"
    assert "ConnectionError" in found["redis"][0][1]
    assert found["redis memory"] == [("skipped", "not looked at: Redis cannot be reached", "")]
    assert found["webhooks"][0][0] == "ok"
    unreadable = deployment.look(REDIS_URL="redis://127.0.0.1:1/0?db=that_must_stay_hidden")
    assert [unreadable[check][0][0] for check in ("redis", "redis memory", "webhooks")] == ["fault", "skipped", "ok"]


# ---- Stripe ----


def test_what_a_restricted_key_may_not_read(deployment: Deployment) -> None:
    """The lists that a restricted key may not read are named; what it cannot show is skipped, with the reason."""
    found = deployment.look(STRIPE_API_KEY=RESTRICTED)

    (key,) = found["key (default account, test)"]
    assert key[:2] == ("fault", "the key may not read events, disputes")
    (endpoint,) = found["endpoint (default account, test)"]
    assert endpoint[0] == "skipped"
    assert endpoint[1] == "not looked at: the key may not read webhook endpoints"
    assert found["clock of Stripe"][0][0] == "ok"


def test_a_key_that_is_refused(deployment: Deployment) -> None:
    """A key that Stripe does not know is a fault, and is not shown."""
    found = deployment.look(STRIPE_API_KEY=f"acct_1=sk_live_{HIDDEN}")

    assert found["key (acct_1, live)"][0][:2] == ("fault", "Stripe refuses the key")
    assert found["endpoint (acct_1, live)"][0][0] == "skipped"


def test_a_stripe_that_is_away(deployment: Deployment) -> None:
    """A Stripe that does not answer is a fault, and is asked once."""
    deployment.faults.add(Fault.UNAVAILABLE, times=3)

    found = deployment.look()

    assert found["key (default account, test)"][0][0] == "fault"
    assert found["key (default account, test)"][0][1] == "the key cannot be tried: Stripe answered 503"


def test_a_connected_account_without_access(deployment: Deployment) -> None:
    """A label for which a key acts is asked for access alone; an account that refuses it is a fault."""
    found = deployment.look(STRIPE_API_KEY=f"{KEY},acct_other={KEY}")

    assert found["key (default account, test)"][0][0] == "ok"
    assert found["key (acct_other, test)"][0][:2] == ("fault", "Stripe refuses the key")
    assert "endpoint (acct_other, test)" not in found


def test_stripes_clock(engine: Engine, deployment: Deployment) -> None:
    """A machine that is two minutes ahead of Stripe is a fault."""
    api = SandboxApi({KEY: Account(seed=2)}, clock=lambda: int(time.time()) - 120)
    with serving_stripe(api) as address:
        (found,) = deployment.look(STRIPE_API_BASE=address)["clock of Stripe"]

    assert found[0] == "fault"
    assert re.search(r"1(19|20|21)\.\d s ahead of Stripe's", found[1])


def test_an_endpoint_that_lacks_types(deployment: Deployment) -> None:
    """Missing types are named, and the printed call adds them and keeps the others; then the endpoint is fine."""
    url = "https://other.example.com/webhooks/stripe"
    made = deployment.account.create_webhook_endpoint(url, [*STRIPE_TYPES[2:], "payout.paid"], api_version=API_VERSION)

    (before,) = deployment.look(url=url)["endpoint (default account, test)"]
    (call,) = commands(before[2])
    subprocess.run(
        ["/bin/sh", "-c", call], env={"KEY": KEY, "PATH": os.environ["PATH"]}, check=True, capture_output=True
    )
    (after,) = deployment.look(url=url)["endpoint (default account, test)"]

    assert before[:2] == ("fault", f"{made['id']} lacks {STRIPE_TYPES[0]}, {STRIPE_TYPES[1]}")
    assert after[:2] == ("ok", f"{made['id']} sends all {len(STRIPE_TYPES)} event types to {url}")
    chosen = deployment.account.object("webhook_endpoint", made["id"])["enabled_events"]
    assert set(chosen) == {*STRIPE_TYPES, "payout.paid"}


def test_endpoints_that_do_not_serve(deployment: Deployment) -> None:
    """A disabled endpoint, an old version and a second one are warnings next to a good one; none at all is a fault."""
    account = deployment.account
    account.create_webhook_endpoint(URL, ["*"], api_version="2020-08-27")
    resting = account.create_webhook_endpoint(URL, ["*"], api_version=API_VERSION)["id"]
    account.disable_webhook_endpoint(resting)
    elsewhere = "https://nowhere.example.com/webhooks/stripe"

    found = deployment.look()["endpoint (default account, test)"]
    (none,) = deployment.look(url=elsewhere)["endpoint (default account, test)"]
    ledger.execute(deployment.engine, "UPDATE inbox SET received_at = received_at - interval '2 days'")
    (quiet,) = deployment.look(url=elsewhere)["endpoint (default account, test)"]

    assert ("warning", f"{resting} is disabled, so Stripe sends it nothing") in [each[:2] for each in found]
    assert any(level == "warning" and "sends objects as of 2020-08-27" in words for level, words, _ in found)
    assert ("warning", "2 endpoints send here, so each event comes as often") in [each[:2] for each in found]
    assert (none[0], quiet[0]) == ("warning", "fault")
    assert commands(quiet[2]) == [f"payfold endpoints create --url {elsewhere} --test --yes"]


# ---- What runs ----


def test_silent_processes(deployment: Deployment) -> None:
    """A silent worker or clock is a fault, with the command that starts it; so is a missing web process."""
    ledger.execute(deployment.engine, "UPDATE heartbeats SET at = now() - interval '10 minutes' WHERE kind <> 'web'")
    without_worker = deployment.look()["processes"]
    ledger.execute(deployment.engine, "UPDATE heartbeats SET at = now() - interval '10 minutes'")
    without_any = deployment.look()["processes"]
    ledger.execute(deployment.engine, "DELETE FROM heartbeats")
    never = deployment.look()["processes"]

    assert [(level, words, commands(fix)) for level, words, fix in without_worker] == [
        ("fault", "the worker is silent for 10 min", ["python -m worker"]),
        ("fault", "the clock is silent for 10 min", ["python -m worker.clock"]),
    ]
    assert [words for _, words, _ in without_any] == [
        "no web process runs: it is silent for 10 min",
        "the worker is silent for 10 min",
        "the clock is silent for 10 min",
    ]
    assert [words for _, words, _ in never] == [
        "no web process runs: it was never seen",
        "the worker was never seen",
        "the clock was never seen",
    ]


def test_jobs_that_stripe_refuses(deployment: Deployment) -> None:
    """A stopped job is a fault with its cause; calls that were given up are a warning."""
    ledger.execute(
        deployment.engine,
        "INSERT INTO stripe_jobs (account, livemode, job, stopped, stopped_until, failed_at)"
        " VALUES ('', false, 'expire_sessions', 'Stripe answered 403.', now() + interval '5 minutes', now())",
    )

    (job,) = deployment.look()["jobs at Stripe"]

    assert job[:2] == ("fault", "expire_sessions of the default account (test) is stopped: Stripe answered 403.")


def test_webhooks_next_to_gaps(deployment: Deployment) -> None:
    """Events that had to be fetched since the last webhook are a warning; without any webhook the address is wrong."""
    engine, account = deployment.engine, deployment.account
    receive(engine, account, source="gap", age=30)
    ledger.execute(engine, "INSERT INTO stripe_jobs (account, livemode, job, found) VALUES ('', false, 'fill_gaps', 1)")
    (since,) = deployment.look()["webhooks"]
    ledger.execute(engine, "UPDATE inbox SET source = 'gap'")
    (never,) = deployment.look()["webhooks"]

    assert since[0] == "warning"
    assert re.match(
        r"since the last one, \d+ s ago .*, events had to be fetched from Stripe \(the last \d+ s ago", since[1]
    )
    assert never[:2] == (
        "fault",
        "1 event was fetched from Stripe, and no webhook came ever: the address is wrong",
    )
    assert "payfold endpoints check" in commands(never[2])


def test_webhooks_that_are_refused(deployment: Deployment) -> None:
    """Deliveries that were refused for a wrong signature are a fault while none was ever accepted, else a warning."""
    ledger.execute(
        deployment.engine,
        "INSERT INTO delivery_counts (outcome, reason, count, since, last_at)"
        " VALUES ('refused', 'signature_mismatch', 7, now(), now())",
    )
    (since,) = deployment.look()["webhooks"]
    ledger.execute(deployment.engine, "UPDATE inbox SET source = 'replay'")
    (never,) = deployment.look()["webhooks"]

    assert (since[0], never[0]) == ("warning", "fault")
    assert re.match(
        r"7 deliveries were refused for a wrong signature, the last \d s ago .*, and none was accepted ever", never[1]
    )


def test_no_webhook_yet(deployment: Deployment) -> None:
    """Where nothing has come yet, a test delivery is suggested."""
    ledger.execute(deployment.engine, "UPDATE inbox SET source = 'replay'")

    assert deployment.look()["webhooks"][0][:2] == ("warning", "none has come yet")


def test_an_unusually_quiet_hour(deployment: Deployment) -> None:
    """An hour without a webhook is a warning where the same hour of at least two weeks before had some."""
    engine, account = deployment.engine, deployment.account
    ledger.execute(engine, "UPDATE inbox SET received_at = now() - interval '14 days 2 hours'")
    receive(engine, account, age=timedelta(days=14, minutes=10).total_seconds())
    receive(engine, account, age=timedelta(days=7, minutes=10).total_seconds())

    (found,) = deployment.look()["webhooks"]

    assert found[:2][0] == "warning"
    assert found[1].startswith(
        "none in the last hour, and in the same hour of the weeks before 1, 1; the last came 7 d ago"
    )


# ---- A test delivery ----


def test_a_test_delivery(deployment: Deployment) -> None:
    """A test delivery is followed to its outcome; it leaves an ignored event and no row, and is no sign of Stripe's."""
    before = ledger.digest_of(deployment.engine)
    ((received,),) = [tuple(row.values()) for row in ledger.rows(deployment.engine, "SELECT received_at FROM inbox")]
    with serving(Settings.load(deployment.environment)) as web, ThreadPoolExecutor(1) as threads:
        address = f"http://127.0.0.1:{web.port}"
        sending = threads.submit(deployment.doctor, "--send", "--to", address, "--format", "json")
        until(lambda: ledger.fold(deployment.engine) or sending.done())
        ran = sending.result()
        unsigned = examination.of_delivery(
            Settings.load({**deployment.environment, "STRIPE_WEBHOOK_SECRETS": "whsec_other"}), f"{address}{PATH}"
        )
        lost = examination.of_delivery(Settings.load(deployment.environment), f"{address}/elsewhere")

    sent = ran.json[-1]
    assert (sent["check"], sent["level"]) == ("test delivery", "ok"), ran.out
    (row,) = ledger.rows(
        deployment.engine, "SELECT id, state, livemode FROM events WHERE type = :type", type=TEST_DELIVERY
    )
    assert (row["state"], row["livemode"]) == ("ignored", False)
    assert (
        f"it leaves the ignored event {row['id']} in the inbox (test mode), and nothing in the tables" in sent["found"]
    )
    assert ledger.digest_of(deployment.engine) == before
    arrivals = Postgres()
    postgres.fill(Settings.load(deployment.environment), arrivals)
    assert isinstance(arrivals.arrivals, Arrivals)
    assert arrivals.arrivals.webhook == received
    assert unsigned.level == "fault"
    assert "answered 400 (No v1 signature matches the body" in unsigned.found
    assert "give it the same STRIPE_WEBHOOK_SECRETS" in unsigned.fix
    assert "answered 404" in lost.found
    assert PATH in lost.fix


def test_deliveries_that_get_lost(deployment: Deployment, another_database_url: str) -> None:
    """An acknowledged event that is in another database is a fault, and so is an address without an answer."""
    settings = Settings.load(deployment.environment)
    elsewhere = Settings.load(deployment.environment | {"DATABASE_URL": another_database_url})
    with serving(elsewhere) as web:
        address = f"http://user:{HIDDEN}@127.0.0.1:{web.port}{PATH}"
        lost = examination.of_delivery(settings, address, livemode=True)
    away = examination.of_delivery(settings, f"http://127.0.0.1:1{PATH}")

    assert lost.level == "fault"
    assert re.match(
        rf"http://127.0.0.1:\d+{PATH} answered 200 after \d+ ms, and the event is not in this database", lost.found
    )
    with psycopg.connect(elsewhere.libpq) as connection:
        assert connection.execute("SELECT type, livemode FROM inbox").fetchall() == [(TEST_DELIVERY, True)]
    assert "another DATABASE_URL" in lost.fix
    assert (away.level, away.found) == ("fault", f"http://127.0.0.1:1{PATH} does not answer (ConnectError)")
    assert commands(away.fix) == [f"payfold doctor --send --to https://YOUR-HOST{PATH}"]


def test_a_delivery_that_waits() -> None:
    """An event that is recorded and not folded in time points to the worker."""
    sent = Sent("evt_1", URL, 200, "", "", seconds=0.034)

    found = delivery.followed(sent, World("", livemode=False), Outcome(7, None, 20.4))

    assert found.level == "fault"
    assert found.found.startswith(f"{URL} answered 200 after 34 ms, and the event still waits after 20 s")
    assert commands(found.fix) == ["python -m worker"]


@pytest.mark.parametrize(
    ("status", "reason", "fix"),
    [
        (301, "", "Stripe follows no redirect"),
        (405, "", f"it wants the path {PATH}"),
        (400, "signature_expired", "let both follow a time server"),
        (400, "signature_missing", "Stripe-Signature"),
        (403, "", "a proxy or a firewall"),
        (503, "", "/health/ready names the obstacle"),
    ],
)
def test_answers_to_a_test_delivery(status: int, reason: str, fix: str) -> None:
    """Each answer other than 2xx is a fault with a fix of its own."""
    found = delivery.refused(Sent("evt_1", URL, status, reason, "", seconds=1))

    assert (found.level, found.found) == ("fault", f"{URL} answered {status}")
    assert fix in found.fix


@pytest.mark.parametrize(
    ("to", "address"),
    [
        (None, f"http://127.0.0.1:8123{PATH}"),
        ("https://shop.example.com", URL),
        ("https://shop.example.com/", URL),
        ("https://shop.example.com/hooks", "https://shop.example.com/hooks"),
    ],
)
def test_the_address_of_a_test_delivery(to: str | None, address: str) -> None:
    """An address without a path gets the webhook's; without any it is the process on this machine."""
    assert delivery.address(to, Settings.load({"PORT": "8123"})) == address


@pytest.mark.parametrize("to", ["shop.example.com", "ftp://shop.example.com", "https://", "http://[::1"])
def test_no_address(to: str) -> None:
    """What is no address is an error of usage."""
    with pytest.raises(ConfigurationError, match="Example: --to https://"):
        delivery.address(to, Settings.load({}))
