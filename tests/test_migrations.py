"""The migrations make the schema that the models declare, once, and report whether it is made."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Connection, Engine, Table, inspect, text
from sqlalchemy.dialects import postgresql
from sqlalchemy.exc import IntegrityError

from schemas import database, locks, migrate, tables
from tests import histories, ledger, waiting
from tests.command import payfold


@pytest.fixture
def empty_url(engine: Engine, database_url: str) -> str:
    """Return the URL of an empty database."""
    with database.transaction(engine) as connection:
        connection.execute(text("DROP SCHEMA public CASCADE; CREATE SCHEMA public"))
    return database_url


CATALOGUE = """
SELECT 'column', c.relname, a.attname, format_type(a.atttypid, a.atttypmod), a.attnotnull::text,
    coalesce(pg_get_expr(d.adbin, d.adrelid), a.attidentity::text)
FROM pg_class AS c JOIN pg_attribute AS a ON a.attrelid = c.oid
LEFT JOIN pg_attrdef AS d ON d.adrelid = c.oid AND d.adnum = a.attnum
WHERE c.relnamespace = to_regnamespace(:schema) AND c.relkind IN ('r', 'p') AND NOT c.relispartition
    AND a.attnum > 0 AND NOT a.attisdropped
UNION ALL
SELECT 'constraint', conrelid::regclass::text, '', contype::text, '', pg_get_constraintdef(oid) FROM pg_constraint
WHERE connamespace = to_regnamespace(:schema) AND contype <> 'n'
UNION ALL
SELECT 'index', tablename, '', '', '', substr(indexdef, strpos(indexdef, ' USING ')) FROM pg_indexes
WHERE schemaname = CAST(:schema AS text)
UNION ALL
SELECT 'option', relname, '', '', '', option FROM pg_class, unnest(reloptions) AS option
WHERE relnamespace = to_regnamespace(:schema) AND relkind IN ('r', 'p') AND NOT relispartition
    AND starts_with(option, 'fillfactor=')
"""


def catalogue(connection: Connection, schema: str) -> set[str]:
    """Return PostgreSQL's description of the tables in *schema*: its columns, constraints, indexes and fill factors."""
    rows = connection.execute(text(CATALOGUE), {"schema": schema})
    lines = {" ".join(map(str, row)).replace(f"{schema}.", "") for row in rows}
    # Partitions are left out: they are made as they are needed.
    return {line for line in lines if "alembic_version" not in line and " payloads_" not in line}


def test_models_are_migrations(engine: Engine) -> None:
    """Models and migrations give the same schema, to the last default and index."""
    with engine.begin() as connection:
        migrated = catalogue(connection, "public")
        connection.execute(text("CREATE SCHEMA declared; SET LOCAL search_path = declared"))
        tables.metadata.create_all(connection, checkfirst=False)

        declared = catalogue(connection, "declared")

    assert len(migrated) > 100
    assert declared == migrated


def test_nothing_to_generate(engine: Engine) -> None:
    """Alembic finds no difference between models and migrations."""
    options = {
        "compare_type": True,
        "compare_server_default": True,
        # Alembic misreads equal expressions as different, which the test above compares, and partitions as tables.
        "include_object": lambda _, name, *__: (
            not str(name).endswith("_newest")
            and name not in ("orders_status", "changes_one_shot", "inbox_object_hash")
            and not str(name).startswith("payloads_")
        ),
    }
    with engine.connect() as connection:
        difference = compare_metadata(MigrationContext.configure(connection, opts=options), tables.metadata)

    assert difference == []


@pytest.mark.parametrize(
    "view", [tables.events, tables.order_book, tables.payment_link_funnel], ids=lambda view: view.name
)
def test_views_are_declared(engine: Engine, view: Table) -> None:
    """A declared view has the columns and types of the real one, in its order."""
    dialect = postgresql.dialect()  # type: ignore[no-untyped-call]  # SQLAlchemy's own
    real = inspect(engine).get_columns(view.name)

    found = [(column["name"], column["type"].compile(dialect)) for column in real]
    declared = [(column.name, column.type.compile(dialect)) for column in view.columns]
    assert sorted(found) == sorted(declared)


def test_up_and_status(empty_url: str) -> None:
    """`status` lists what is pending with exit 4, `up` applies it once, and then nothing is pending."""
    behind = payfold("migrate", "status", "--format", "json", DATABASE_URL=empty_url)
    applied = payfold("migrate", "up", DATABASE_URL=empty_url)
    again = payfold("migrate", DATABASE_URL=empty_url)
    level = payfold("migrate", "status", "--format", "json", DATABASE_URL=empty_url)

    assert (behind.code, behind.json[0]) == (4, {"pending": "0001"})
    assert (applied.code, applied.out) == (0, "")
    assert applied.err.startswith("Applied 0001")
    assert (again.code, again.err) == (0, "The schema is up to date.\n")
    assert (level.code, level.json) == (0, [])


@pytest.mark.parametrize(
    "arguments",
    [
        ("digest",),
        ("events", "retry", "evt_1"),
        ("events", "export"),
        ("replay", "-"),
        ("status",),
    ],
    ids=" ".join,
)
def test_pending_stops_commands(empty_url: str, arguments: tuple[str, ...]) -> None:
    """A command on a schema that is behind ends with 4 and names the command to run."""
    ran = payfold(*arguments, DATABASE_URL=empty_url)

    assert ran.code == 4
    assert "payfold migrate up" in ran.err + ran.out
    assert "Traceback" not in ran.err


def test_two_at_once(empty_url: str) -> None:
    """Of several simultaneous migrations one applies everything, and the others find nothing to do."""
    applied: list[list[str]] = []
    barrier = threading.Barrier(4)

    def up() -> None:
        barrier.wait()
        applied.append(migrate.upgrade(empty_url))

    threads = [threading.Thread(target=up) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert sorted(map(len, applied)) == [0, 0, 0, len(max(applied))]


def test_waiting_for_another_migration(empty_url: str) -> None:
    """Who waits for another migration is in no transaction between two looks at its lock."""
    engine = database.engine(empty_url)
    looks: set[object] = set()
    with ThreadPoolExecutor(1) as upgrading:
        with database.transaction(engine) as connection, database.cursor(connection) as cursor:
            assert locks.try_to_keep_others_from_upgrading(cursor)
            known = [row["pid"] for row in ledger.rows(engine, SESSIONS, known=[])]
            applied = upgrading.submit(migrate.upgrade, empty_url)

            def has_looked_often() -> bool:
                found = ledger.rows(engine, SESSIONS, known=known)
                looks.update(row["query_start"] for row in found if row["state"] == "idle")
                return len(looks) >= LOOKS

            waiting.until(has_looked_often)
            assert not applied.done()
        assert applied.result()[0] == "0001"
    engine.dispose()


SESSIONS = """
SELECT pid, state, query_start FROM pg_stat_activity
WHERE datname = current_database() AND pid <> pg_backend_pid() AND pid <> ALL (CAST(:known AS int[]))
"""
LOOKS = 5
"""More than a session needs to begin."""


def test_a_backup_is_under_way(engine: Engine, database_url: str) -> None:
    """Large indexes are made while others read and deliveries are recorded; what was begun before is completed."""
    ledger.downgrade(engine, "0015")
    ledger.record(engine, [ledger.delivery(body) for body in histories.bodies_of(5)])
    with pytest.raises(IntegrityError), engine.execution_options(isolation_level="AUTOCOMMIT").connect() as connection:
        # Of an attempt that was interrupted: it leaves an invalid index.
        connection.execute(text("CREATE UNIQUE INDEX CONCURRENTLY inbox_source ON inbox (livemode)"))

    with ThreadPoolExecutor(1) as upgrading:
        with database.transaction(engine) as backup, database.cursor(backup) as cursor:
            database.take_snapshot(cursor)
            cursor.execute("SELECT count(*) FROM inbox")
            applied = upgrading.submit(migrate.upgrade, database_url)
            waiting.until_locked(engine, kind="virtualxid")
            ledger.record(engine, [ledger.delivery(body) for body in histories.bodies_of(6)])
            assert not applied.done()
        assert applied.result()[0] == "0016"

    test_models_are_migrations(engine)
    assert ledger.rows(engine, "SELECT indexrelid::regclass FROM pg_index WHERE NOT indisvalid") == []


FILLED = """
INSERT INTO changes (account, livemode, subject, subject_id, kind, event_id, source, at)
SELECT '', true, 'order', 'cs_' || number, 'order.paid', 'evt_' || number, 'webhook', now()
FROM generate_series(1, 1000) AS number
"""
DISTINCT = "SELECT n_distinct FROM pg_stats WHERE tablename = 'changes_one_shot'"


def test_an_index_that_is_built_ahead_has_statistics(engine: Engine, database_url: str) -> None:
    """PostgreSQL knows at once how many rows an expression finds in a table that it had looked at before."""
    ledger.downgrade(engine, "0024")
    ledger.execute(engine, FILLED)
    ledger.execute(engine, "ANALYZE changes")

    migrate.upgrade(database_url)

    # Minus one stands for values that are all distinct.
    assert ledger.rows(engine, DISTINCT) == [{"n_distinct": -1}] * 2


def test_newer_schema(engine: Engine, database_url: str) -> None:
    """Old code runs on a schema that a newer release has migrated, and leaves it as it is."""
    with database.transaction(engine) as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))

    assert migrate.upgrade(database_url) == []
    assert payfold("digest", DATABASE_URL=database_url).code == 0
    assert payfold("migrate", "status", DATABASE_URL=database_url).code == 0


def test_down_and_up(engine: Engine, database_url: str) -> None:
    """In a database without events, migrating down removes every table, and migrating up makes them again."""
    ledger.downgrade(engine, "base")
    inspector = inspect(engine)
    assert (inspector.get_table_names(), inspector.get_view_names()) == (["alembic_version"], [])

    migrate.upgrade(database_url)

    test_models_are_migrations(engine)


def test_no_database() -> None:
    """Without PostgreSQL `migrate up` exits 1 with one line that names the fault and not the password."""
    ran = payfold("migrate", "up", DATABASE_URL="postgres://u:hunter2@127.0.0.1:1/d")

    assert ran.code == 1
    assert ran.err.startswith("PostgreSQL does not answer, so check DATABASE_URL: ")
    assert len(ran.err.splitlines()) == 1
    assert "hunter2" not in ran.err


ONE_SHOT = """
INSERT INTO changes (account, livemode, subject, subject_id, kind, event_id, source, at)
VALUES (:account, :livemode, :subject, :subject_id, :kind, 'evt_1', 'webhook', now())
ON CONFLICT DO NOTHING RETURNING seq
"""


def test_a_one_shot_happens_once_to_each_object(engine: Engine) -> None:
    """The index knows an object by hashes; account, mode, subject, id and kind are all in them."""
    first = {"account": "acct_1", "livemode": True, "subject": "order", "subject_id": "a b", "kind": "order.paid"}
    others = (
        {"account": "acct_2"},
        {"livemode": False},
        {"subject": "credit_note"},
        {"subject_id": "b"},
        {"kind": "order.expired"},
        {"account": "acct_1 a", "subject_id": "b"},
    )
    changes = [first, *(first | each for each in others)]

    assert [len(ledger.rows(engine, ONE_SHOT, **each)) for each in changes] == [1] * len(changes)
    assert [len(ledger.rows(engine, ONE_SHOT, **each)) for each in changes] == [0] * len(changes)
