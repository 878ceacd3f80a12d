"""A newer release migrates the database while workers of the running one still fold."""

from sqlalchemy import Engine, event, text

from schemas import database, tables
from tests import ledger
from tests.histories import bodies_of

SEEDS = range(200, 212)


def test_columns_of_a_newer_release(engine: Engine, database_url: str) -> None:
    """Columns that a newer release adds end no transaction of a worker that has prepared its statements."""
    worker = database.engine(database_url, connections_max=1)
    ended: list[str] = []
    event.listen(worker, "rollback", lambda _: ended.append("rolled back"))
    histories = [bodies_of(seed) for seed in SEEDS]
    for half in (0, 1):
        for seed, bodies in zip(SEEDS, histories, strict=True):
            middle = len(bodies) // 2
            some = (bodies[:middle], bodies[middle:])[half]
            ledger.record(worker, [ledger.delivery(body, account=f"acct_{seed}") for body in some])
            ledger.fold(worker, limit=8)
        if half == 0:
            with database.transaction(worker) as connection:
                prepared = connection.execute(text("SELECT count(*) FROM pg_prepared_statements")).scalar_one()
            assert prepared > 10
            _add_columns(engine)

    assert ended == []
    with database.transaction(engine) as connection:
        assert connection.execute(text("SELECT count(*) FROM pending")).scalar_one() == 0
    worker.dispose()


def _add_columns(engine: Engine) -> None:
    with database.transaction(engine) as connection:
        for name in tables.metadata.tables:
            connection.execute(text(f'ALTER TABLE "{name}" ADD COLUMN of_a_newer_release text'))
