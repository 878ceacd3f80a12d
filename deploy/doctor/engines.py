"""Checks of PostgreSQL and Redis, from what was read of them."""

from collections.abc import Iterator
from typing import Final
from urllib.parse import parse_qs, urlsplit

from deploy.doctor.findings import Finding, counted, fault, ok, skipped, warning
from deploy.doctor.postgres import Grants, Server, Sessions
from deploy.doctor.redis import VALKEY, Engine, Memory
from schemas.settings import Settings

DATABASE: Final = "database"
MIGRATIONS: Final = "migrations"
GRANTS: Final = "grants"
CONNECTIONS: Final = "connections"
CLOCK: Final = "clock of PostgreSQL"
REDIS: Final = "redis"
MEMORY: Final = "redis memory"

POSTGRESQL: Final = range(15, 19)
"""The releases that Payfold is tested with."""
REDIS_MIN: Final = 7
VALKEY_MIN: Final = 8
WEB_CONNECTIONS: Final = 10
"""Connections that a web process holds at most: five for reads, one that records, and four that watch and count."""
WORKER_CONNECTIONS: Final = 9
"""A worker: three that fold and report it, and six for the jobs at Stripe."""
CLOCK_CONNECTIONS: Final = 1
"""The clock: its heartbeat."""
SPARE_CONNECTIONS: Final = 2
"""For a command and the release phase."""
WORKER_LOCKS: Final = 1_100
"""Entries of the lock table that a worker needs: it folds two batches at once, of 500 objects each at most."""
AHEAD_WARNED_SECONDS: Final = 5.0
AHEAD_SECONDS_MAX: Final = 60.0
"""A signature may be 300 seconds old on its way, so that much less is left for a clock that is wrong."""
MEMORY_SHARE_MAX: Final = 0.9


_BY_ROLE: Final = (
    "Remove `options` from DATABASE_URL, since PgBouncer does not pass it on, and set the same on the role:\n"
    "  ALTER ROLE … SET search_path = …;"
)


def database(server: Server) -> Iterator[Finding]:
    """Judge the server's release, its encoding, and whether it takes writes."""
    release = server.version_num // 10_000
    if release < POSTGRESQL.start:
        yield fault(
            DATABASE,
            f"PostgreSQL {server.version} is too old",
            f"Upgrade it to PostgreSQL {POSTGRESQL.start} to {POSTGRESQL[-1]}.",
        )
    elif release not in POSTGRESQL:
        yield warning(
            DATABASE,
            f"PostgreSQL {server.version} is newer than the releases that Payfold is tested with",
            f"Prefer PostgreSQL {POSTGRESQL[-1]}, or upgrade Payfold.",
        )
    if server.encoding != "UTF8":
        yield fault(
            DATABASE,
            f"the database's encoding is {server.encoding}, and names of buyers need UTF8",
            "Make another database, and name it in DATABASE_URL:\n"
            "  createdb --encoding=UTF8 --template=template0 payfold",
        )
    made, now = server.collation
    if made is not None and made != now:
        yield fault(
            DATABASE,
            f"the machine's order of text is of version {now or 'none'}, and the database was made with {made}, so an"
            " index may miss rows that are there",
            "Build the indexes again while Payfold is stopped, then accept the new version; in psql:\n"
            "  REINDEX DATABASE;\n"
            "  ALTER DATABASE … REFRESH COLLATION VERSION;",
        )
    if server.takes_no_writes:
        yield fault(
            DATABASE,
            "PostgreSQL takes no writes here, so no delivery is recorded",
            "Let DATABASE_URL name the primary, or end the read-only setting of the database or the role.",
        )


def database_in_words(server: Server) -> str:
    """Return the server's version, and how far away it is."""
    return f"PostgreSQL {server.version}, answers in {server.milliseconds:.0f} ms"


def database_away(reason: str) -> Finding:
    """Return the fault that PostgreSQL cannot be reached, or that a pooler in front of it refuses us."""
    fix = next((each for words, each in _POOLER.items() if words in reason), "")
    return fault(
        DATABASE, f"PostgreSQL does not answer: {reason}", fix or "Check DATABASE_URL, and that the server runs."
    )


# Words of PgBouncer, and what to do.
_POOLER: Final = {
    "statement pooling mode": "Let PgBouncer share sessions by transaction:\n  pool_mode = transaction",
    "unsupported startup parameter": _BY_ROLE,
}


def migrations(pending: list[str]) -> Iterator[Finding]:
    """Judge the schema."""
    if pending:
        yield fault(
            MIGRATIONS, f"pending: {', '.join(pending)}", "Bring the schema to this release:\n  payfold migrate up"
        )


# ---- Rights ----


def grants(found: Grants) -> Iterator[Finding]:
    """Judge whether the role may do what the processes and commands do."""
    if found.schema is None:
        yield fault(
            GRANTS,
            f"the role {found.role} may use no schema of its search path",
            f"As the schema's owner:\n  GRANT USAGE ON SCHEMA public TO {found.role};",
        )
        return
    if found.lacks:
        lacking = ", ".join(f"{' and '.join(each.rights)} on {each.relation}" for each in found.lacks[:3])
        more = f", and more on {len(found.lacks) - 3} others" if len(found.lacks) > 3 else ""  # noqa: PLR2004 - as above
        yield fault(GRANTS, f"the role {found.role} lacks {lacking}{more}", _granting(found))
    if not found.makes_partitions:
        yield warning(
            GRANTS,
            f"the role {found.role} may not make partitions of payloads, so that all of them stay in one table",
            f"As the owner of the tables:\n  GRANT CREATE ON SCHEMA {found.schema} TO {found.role};\n"
            f"  ALTER TABLE payloads OWNER TO {found.role};",
        )
    if not found.makes_schemas:
        yield warning(
            GRANTS,
            f"the role {found.role} may not make a schema, so `rebuild` and `reconcile` cannot fold next to the tables",
            f"As the database's owner:\n  GRANT CREATE ON DATABASE {found.database} TO {found.role};",
        )


def _granting(found: Grants) -> str:
    kinds = {each.kind for each in found.lacks}
    lines = [f"  {_statement(kind, found)}" for kind in ("r", "v", "S") if kind in kinds]
    return "\n".join(["As the owner of the tables:", *dict.fromkeys(lines)])


def _statement(kind: str, found: Grants) -> str:
    if kind == "S":
        return f"GRANT USAGE ON ALL SEQUENCES IN SCHEMA {found.schema} TO {found.role};"
    return f"GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA {found.schema} TO {found.role};"


def grants_in_words(found: Grants) -> str:
    """Return the role that was looked at."""
    return f"the role {found.role} may do all that processes and commands do"


# ---- Connections ----


def connections(found: Sessions, settings: Settings, *, is_pooled: bool) -> Iterator[Finding]:
    """Judge whether all processes together may open as many sessions, and take as many locks, as they hold at most."""
    needed, room = _needed(found, settings), _room(found)
    if is_pooled:
        yield skipped(CONNECTIONS, "a pooler stands in front of PostgreSQL and shares its sessions")
        if settings.database_url and "options" in parse_qs(urlsplit(settings.libpq).query):
            yield warning(CONNECTIONS, "a pooler stands in front of PostgreSQL and may drop `options`", _BY_ROLE)
    elif needed > room:
        yield fault(
            CONNECTIONS,
            f"{_in_words(found, settings)} open up to {needed} connections, and PostgreSQL has room for {room}",
            "Run fewer processes (WEB_CONCURRENCY), raise max_connections or the role's CONNECTION LIMIT, or put"
            " PgBouncer in transaction mode in front.",
        )
    elif needed + SPARE_CONNECTIONS > room:
        yield warning(
            CONNECTIONS,
            f"{_in_words(found, settings)} open up to {needed} connections of {room}, which leaves none for a command",
            "Keep two free, as for the release phase: raise the limit, or run fewer processes.",
        )
    else:
        yield ok(CONNECTIONS, f"{_in_words(found, settings)} open up to {needed}, and there is room for {room}")
    yield from _locks(found, settings)


def _processes(found: Sessions, settings: Settings) -> tuple[int, int]:
    """Return how many web processes and workers there are: those seen lately, and one of each at least."""
    return max(settings.web_concurrency, found.processes.get("web", 0)), max(1, found.processes.get("fold", 0))


def _needed(found: Sessions, settings: Settings) -> int:
    web, workers = _processes(found, settings)
    return web * WEB_CONNECTIONS + workers * WORKER_CONNECTIONS + CLOCK_CONNECTIONS


def _room(found: Sessions) -> int:
    limits = (found.server - found.others, found.role, found.database)
    return max(0, min(each for each in limits if each is not None))


def _in_words(found: Sessions, settings: Settings) -> str:
    web, workers = _processes(found, settings)
    return f"{counted(web, 'web process', 'web processes')}, {counted(workers, 'worker')} and the clock"


def _locks(found: Sessions, settings: Settings) -> Iterator[Finding]:
    """Judge whether the lock table has room for the batches of all workers."""
    _, workers = _processes(found, settings)
    needed = workers * WORKER_LOCKS
    if found.locks is not None and needed > found.locks:
        yield warning(
            CONNECTIONS,
            f"{counted(workers, 'worker')} may need {needed:,} locks, and PostgreSQL promises {found.locks:,}:"
            " a batch that finds none is folded in parts",
            "Raise max_locks_per_transaction, which needs a restart of PostgreSQL, or run fewer workers.",
        )


# ---- Clocks ----


def clock(ahead_seconds: float, check: str, owner: str) -> Finding:
    """Judge how far this machine's clock is from the *owner*'s clock."""
    size = abs(ahead_seconds)
    where = f"{size:,.1f} s {'ahead of' if ahead_seconds > 0 else 'behind'} {owner}"
    fix = "Let this machine's clock follow a time server (chrony, systemd-timesyncd), and look at the other one too."
    if size > AHEAD_SECONDS_MAX:
        return fault(check, f"this machine's clock is {where}: signatures are refused when they seem old", fix)
    if size > AHEAD_WARNED_SECONDS:
        return warning(check, f"this machine's clock is {where}", fix)
    return ok(check, f"this machine's clock agrees, to {max(size, 0.1):.1f} s")


# ---- Redis ----


def redis(engine: Engine) -> Finding:
    """Judge the release."""
    least = VALKEY_MIN if engine.name == VALKEY else REDIS_MIN
    if not engine.version:
        return warning(REDIS, "answers, and does not name its version", f"See that it is Redis {REDIS_MIN} or newer.")
    if engine.major < least:
        return fault(
            REDIS, f"{engine.name} {engine.version} is too old", f"Upgrade it to {engine.name} {least} or newer."
        )
    return ok(REDIS, f"{engine.name} {engine.version}, answers in {engine.milliseconds:.0f} ms")


def redis_away(reason: str) -> Finding:
    """Return the fault that Redis cannot be reached."""
    return fault(
        REDIS,
        f"Redis does not answer: {reason}",
        "Check REDIS_URL, and REDIS_TLS_VERIFY where the certificate is self-signed. Until then deliveries are"
        " recorded, and folded by the worker's own timer; nothing is asked of Stripe.",
    )


def memory(found: Memory) -> Iterator[Finding]:
    """Judge what Redis does when its memory is full, and whether it soon is."""
    if found.policy != "noeviction":
        yield fault(
            MEMORY,
            f"the policy is {found.policy}: Redis may drop messages and the budget of calls to Stripe",
            "Set it to noeviction in the host's settings, or by:\n  redis-cli CONFIG SET maxmemory-policy noeviction",
        )
    if found.bytes_max and found.bytes_used > MEMORY_SHARE_MAX * found.bytes_max:
        yield warning(
            MEMORY,
            f"{found.bytes_used / found.bytes_max:.0%} of {_megabytes(found.bytes_max)} are used, and then writes fail",
            "Give Redis more memory, and look for what else is kept there: Payfold needs less than 10 MB.",
        )


def memory_in_words(found: Memory) -> str:
    """Return the policy, and how much memory is used."""
    of = f" of {_megabytes(found.bytes_max)}" if found.bytes_max else ""
    return f"noeviction, {_megabytes(found.bytes_used)}{of} used"


def _megabytes(size: int) -> str:
    return f"{size / 1_000_000:,.1f} MB"
