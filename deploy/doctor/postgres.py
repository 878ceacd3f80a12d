"""What is read from PostgreSQL: the server, the role's rights, its connections, and the state of Payfold."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from sqlalchemy import Connection, Engine

from deploy.doctor.findings import NOT_IN_TIME, Known, Unread, attempt, give_up
from schemas import accounts, database, migrate, status, tables
from schemas.database import Bounds, Cursor
from schemas.heartbeats import Kind
from schemas.settings import Settings
from schemas.status import Broker, Status
from worker.folds import FOLD_VERSION

BOUNDS: Final = Bounds(statement=2, lock=1, whole=5)
"""Of each read."""
SEQS_MAX: Final = status.WEBHOOK_SEQS_MAX
"""Last arrivals are looked for among this many of the newest events."""
UNSET: Final = Unread("DATABASE_URL is not set")
TEST_DELIVERY: Final = "payfold_doctor.test_delivery"
"""The type of the events that `doctor --send` sends."""


@dataclass(frozen=True, slots=True)
class Server:
    """The server and this session. *ahead_seconds* is this machine's clock less the server's.

    *collation* has the versions of the order of text: that with which the database was made, and today's. None for an
    order that has no versions, as that of bytes.
    """

    version_num: int
    version: str
    encoding: str
    takes_no_writes: bool
    is_pooled: bool
    milliseconds: float
    ahead_seconds: float
    collation: tuple[str | None, str | None] = (None, None)


@dataclass(frozen=True, slots=True)
class Lack:
    """Rights that the role lacks on one *relation*, as ``INSERT``; *kind* is PostgreSQL's letter for what it is."""

    relation: str
    kind: str
    rights: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Grants:
    """The rights of the role. Names are quoted as SQL wants them; *schema* is None where it may use none."""

    role: str
    database: str
    schema: str | None
    lacks: tuple[Lack, ...]
    makes_partitions: bool
    makes_schemas: bool


@dataclass(frozen=True, slots=True)
class Sessions:
    """How many sessions PostgreSQL allows, and how many others hold; None for a limit that is not set.

    The *server* allows so many to a role without privileges. *others* are sessions of other databases and roles.
    *locks* is the size of the lock table that all sessions share, None where it is not known.
    """

    server: int
    role: int | None
    database: int | None
    others: int
    processes: Mapping[Kind, int]
    locks: int | None = None


@dataclass(frozen=True, slots=True)
class Arrivals:
    """When the last event came, by its source; None where there is none among the newest ``SEQS_MAX`` *events*.

    *gaps* is how many were ever fetched since they never came.
    """

    now: datetime
    webhook: datetime | None
    gap: datetime | None
    gaps: int
    events: int


@dataclass(slots=True)
class Postgres:
    """All of it, each value as it is read: see Note [A part that hangs is left behind]."""

    server: Server | Unread = NOT_IN_TIME
    ahead_seconds: float | Unread = NOT_IN_TIME
    grants: Grants | Unread = NOT_IN_TIME
    migrations: list[str] | Unread = NOT_IN_TIME
    sessions: Sessions | Unread = NOT_IN_TIME
    status: Status | Unread = NOT_IN_TIME
    renamed: dict[str, str] | Unread = NOT_IN_TIME
    arrivals: Arrivals | Unread = NOT_IN_TIME


def fill(settings: Settings, found: Postgres) -> None:
    """Read everything into *found*, one after the other over one connection."""
    if settings.database_url is None:
        give_up(found, UNSET)
        return
    engine = database.engine(settings.postgresql, connections_max=1)
    try:
        found.server = attempt(lambda: _server(engine))
        if isinstance(found.server, Unread):
            give_up(found, Unread("PostgreSQL cannot be reached"))
            return
        found.ahead_seconds = found.server.ahead_seconds
        found.grants = attempt(lambda: _within(engine, _grants))
        found.migrations = attempt(lambda: _transacted(engine, migrate.pending))
        found.sessions = attempt(lambda: _within(engine, _sessions))
        if found.migrations != []:
            found.status = found.renamed = found.arrivals = Unread(_why_behind(found.migrations))
            return
        found.status = attempt(lambda: _transacted(engine, lambda opened: _status(opened, settings)))
        found.renamed = attempt(lambda: _within(engine, accounts.names))
        found.arrivals = attempt(lambda: _within(engine, _arrivals))
    finally:
        engine.dispose()


def _why_behind(migrations: list[str] | Unread) -> str:
    return migrations.reason if isinstance(migrations, Unread) else "migrations are pending"


@contextmanager
def _opened(engine: Engine) -> Iterator[Connection]:
    with database.transaction(engine, BOUNDS) as connection:
        yield connection


def _transacted(engine: Engine, read: Callable[[Connection], Known]) -> Known:
    with _opened(engine) as connection:
        return read(connection)


def _within(engine: Engine, read: Callable[[Cursor], Known]) -> Known:
    with _opened(engine) as connection, database.cursor(connection) as cursor:
        return read(cursor)


def _one(cursor: Cursor, statement: str, values: Mapping[str, object] | None = None) -> tuple[Any, ...]:
    cursor.execute(statement, values)
    row = cursor.fetchone()
    return () if row is None else row


# ---- The server ----

_SERVER: Final = """
SELECT current_setting('server_version_num')::int, current_setting('server_version'),
    current_setting('server_encoding'), pg_is_in_recovery() OR current_setting('transaction_read_only')::boolean,
    datcollversion, pg_database_collation_actual_version(oid)
FROM pg_database WHERE datname = current_database()
"""


def _server(engine: Engine) -> Server:
    def read(cursor: Cursor) -> Server:
        version_num, version, encoding, takes_no_writes, *collation = _one(cursor, _SERVER)
        before, began = time.time(), time.monotonic()
        (now,) = _one(cursor, "SELECT extract(epoch FROM clock_timestamp())::float8")
        duration = time.monotonic() - began
        is_pooled = not database.is_direct(cursor.connection)
        ahead = before + duration / 2 - now
        return Server(
            version_num,
            version.split()[0],
            encoding,
            takes_no_writes,
            is_pooled,
            duration * 1000,
            ahead,
            (collation[0], collation[1]),
        )

    return _within(engine, read)


# ---- Rights ----

_SCHEMA: Final = """
SELECT quote_ident(current_user), quote_ident(current_database()), quote_ident(current_schema()),
    coalesce(has_schema_privilege(current_schema(), 'CREATE'), false),
    has_database_privilege(current_database(), 'CREATE')
"""
_LACKS: Final = """
WITH ours AS (
    SELECT c.oid, c.relname, c.relkind, c.relowner FROM pg_class AS c
    WHERE c.relnamespace = current_schema()::regnamespace AND c.relname = ANY (%(names)s::text[])
), wanted (kind, right_name) AS (
    VALUES ('r', 'SELECT'), ('r', 'INSERT'), ('r', 'UPDATE'), ('r', 'DELETE'), ('v', 'SELECT')
)
SELECT quote_ident(relname), kind, array_agg(right_name) FROM ours
JOIN wanted ON kind = CASE relkind WHEN 'v' THEN 'v' ELSE 'r' END
WHERE relkind IN ('r', 'p', 'v') AND (relname <> ALL (%(read)s::text[]) OR right_name = 'SELECT')
    AND (relname <> ALL (%(added_to)s::text[]) OR right_name IN ('SELECT', 'INSERT'))
    AND NOT has_table_privilege(oid, right_name)
GROUP BY relname, kind
UNION ALL
SELECT quote_ident(s.relname), 'S', ARRAY['USAGE'] FROM pg_class AS s
JOIN pg_depend AS d ON d.classid = 'pg_class'::regclass AND d.objid = s.oid AND d.refclassid = 'pg_class'::regclass
JOIN ours ON ours.oid = d.refobjid
-- The planner may look at the rights of an index first, which has none.
WHERE CASE s.relkind WHEN 'S' THEN NOT has_sequence_privilege(s.oid, 'USAGE') ELSE false END
ORDER BY 1
"""
_OWNS: Final = """
SELECT coalesce(
    (SELECT pg_has_role(relowner, 'USAGE') FROM pg_class
     WHERE relnamespace = current_schema()::regnamespace AND relname = 'payloads'), true)
"""
# Triggers write these as the owner. A swap that corrects sums is the one other who adds to them.
_SUMS: Final = [str(table.name) for table in (tables.hourly_sums, tables.link_sums)]
_DELTAS: Final = [str(table.name) for table in (tables.hourly_deltas, tables.link_deltas)]


def _grants(cursor: Cursor) -> Grants:
    role, name, schema, makes_tables, makes_schemas = _one(cursor, _SCHEMA)
    if schema is None:
        return Grants(role, name, None, (), makes_partitions=False, makes_schemas=makes_schemas)
    lists = {"names": _relations(), "read": ["alembic_version", *_SUMS], "added_to": _DELTAS}
    cursor.execute(_LACKS, {name: database.text_array(each) for name, each in lists.items()})
    lacks = tuple(Lack(relation, kind, tuple(rights)) for relation, kind, rights in cursor.fetchall())
    (owns,) = _one(cursor, _OWNS)
    return Grants(role, name, schema, lacks, makes_partitions=makes_tables and owns, makes_schemas=makes_schemas)


def _relations() -> list[str]:
    views = (tables.events, tables.order_book, tables.payment_link_funnel)
    return [*tables.metadata.tables, *(view.name for view in views), "payloads_rest", "alembic_version"]


# ---- Connections ----

_LIMITS: Final = """
SELECT current_setting('max_connections')::int - current_setting('superuser_reserved_connections')::int
        - coalesce(nullif(current_setting('reserved_connections', true), '')::int, 0),
    (SELECT nullif(rolconnlimit, -1) FROM pg_roles WHERE rolname = current_user),
    (SELECT nullif(datconnlimit, -1) FROM pg_database WHERE datname = current_database()),
    (SELECT count(*) FROM pg_stat_activity WHERE datid IS NOT NULL AND usesysid IS NOT NULL
        AND (datname, usename) IS DISTINCT FROM (current_database(), current_user)),
    current_setting('max_locks_per_transaction')::int
        * (current_setting('max_connections')::int + current_setting('max_prepared_transactions')::int)
"""
_PROCESSES: Final = """
SELECT kind, count(DISTINCT instance) FROM heartbeats
WHERE kind IN ('web', 'clock', 'fold') AND at > now() - make_interval(secs => %(seconds)s) GROUP BY kind
"""


def _sessions(cursor: Cursor) -> Sessions:
    server, role, of_database, others, locks = _one(cursor, _LIMITS)
    processes = attempt(lambda: _processes(cursor))
    return Sessions(server, role, of_database, others, {} if isinstance(processes, Unread) else processes, locks)


def _processes(cursor: Cursor) -> dict[Kind, int]:
    """Return how many processes of each kind beat lately; raises where the role may not read that."""
    cursor.execute(_PROCESSES, {"seconds": status.WEB_SECONDS})
    return dict(cursor.fetchall())


# ---- Payfold ----


def _status(connection: Connection, settings: Settings) -> Status:
    unset = Broker(state="unset")  # Redis is looked at apart.
    return status.read(connection, settings, broker=unset, fold_version=FOLD_VERSION)


# A delivery of our own making proves nothing about Stripe's.
_ARRIVALS: Final = f"""
WITH newest AS (SELECT coalesce(max(seq), 0) - {SEQS_MAX} AS seq FROM inbox)
SELECT now(), (
    SELECT received_at FROM inbox
    WHERE source = 'webhook' AND type <> %(test)s AND seq > (SELECT seq FROM newest) ORDER BY seq DESC LIMIT 1
), (
    SELECT received_at FROM inbox WHERE source = 'gap' AND seq > (SELECT seq FROM newest) ORDER BY seq DESC LIMIT 1
), (SELECT coalesce(sum(found), 0)::bigint FROM stripe_jobs WHERE job = 'fill_gaps'),
    (SELECT coalesce(max(seq), 0) FROM inbox)
"""


def _arrivals(cursor: Cursor) -> Arrivals:
    return Arrivals(*_one(cursor, _ARRIVALS, {"test": TEST_DELIVERY}))
