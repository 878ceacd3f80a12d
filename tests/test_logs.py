"""Logs are one line per unit of work, on stderr, for machines or for people, and hold no secret."""

import logging
import os
import sys

import msgspec
import pytest
import structlog

from schemas import database, logs
from schemas.settings import Settings
from tests.command import Ran, python

PROGRAM = """
import logging, sys, warnings
import structlog
from schemas import logs
from schemas.settings import Settings
logs.configure(Settings.load())
log = structlog.get_logger()
with structlog.contextvars.bound_contextvars(batch=7):
    log.info("events.folded", events=3)
log.debug("unit.detail")
log.warning("unit.odd", text="two\\nlines")
try:
    1 / 0
except ZeroDivisionError:
    log.exception("unit.failed")
logging.getLogger("library").info("chatter")
logging.getLogger("library").warning("heed %s", "this")
"""


def said(**settings: str) -> Ran:
    """Return what a process says whose settings are these."""
    return python("tests.test_logs", settings=settings)


ROW = "a-buyer@example.com"


def copy_a_row() -> None:
    """Copy a row that takes too long, so that the COPY is canceled."""
    engine = database.engine(os.environ["DATABASE_URL"])
    with database.transaction(engine) as connection, database.cursor(connection) as cursor:
        cursor.execute(
            "CREATE TEMP TABLE buyers (email text); SET LOCAL statement_timeout = 100;"
            " CREATE FUNCTION pg_temp.wait() RETURNS trigger LANGUAGE plpgsql AS"
            " $$ BEGIN PERFORM pg_sleep(60); RETURN NEW; END $$;"
            " CREATE TRIGGER wait BEFORE INSERT ON buyers FOR EACH ROW EXECUTE FUNCTION pg_temp.wait()"
        )
        with cursor.copy("COPY buyers FROM STDIN") as copy:
            copy.write_row((ROW,))


def log_driver_errors() -> None:
    """Log a COPY that is canceled in the midst of a row, in each way in which that is done."""
    logs.configure(Settings.load())
    with pytest.raises(database.DriverError) as raised:
        copy_a_row()
    error, library, ours = raised.value, logging.getLogger("library"), structlog.get_logger()
    assert ROW in str(error)
    caused = RuntimeError(f"so did this: {error}")
    caused.__cause__ = error
    for each in (error, caused):
        library.error("it failed: %r", each, exc_info=each)
        ours.error("unit.failed", exc_info=each)
    library.error("of many: %s", ExceptionGroup("all", [error]))


if __name__ == "__main__":
    if sys.argv[1:] == ["driver"]:
        log_driver_errors()
    else:
        exec(PROGRAM)  # noqa: S102 - this file is its own small process


def test_json() -> None:
    """By default each line on stderr is one JSON object with level, time and what was bound; stdout has none."""
    ran = said()

    lines = [msgspec.json.decode(line) for line in ran.err.splitlines()]
    assert (ran.code, ran.out) == (0, "")
    assert [line["event"] for line in lines] == ["events.folded", "unit.odd", "unit.failed", "heed this"]
    assert (lines[0]["batch"], lines[0]["events"], lines[0]["level"]) == (7, 3, "info")
    assert all(line["timestamp"].endswith("Z") for line in lines)
    assert "batch" not in lines[1]
    assert "ZeroDivisionError" in lines[2]["exception"]
    assert (lines[3]["level"], lines[3]["logger"]) == ("warning", "library")


@pytest.mark.parametrize(
    ("level", "events"),
    [("debug", ["events.folded", "unit.detail", "unit.odd", "unit.failed", "heed this"]), ("error", ["unit.failed"])],
)
def test_level(level: str, events: list[str]) -> None:
    """What is less severe than the level is not said; libraries say no more than warnings."""
    lines = said(PAYFOLD_LOG_LEVEL=level).err.splitlines()

    assert [msgspec.json.decode(line)["event"] for line in lines] == events


def test_console() -> None:
    """For people a line is a sentence, without colour where nobody sees it."""
    ran = said(PAYFOLD_LOG_FORMAT="console")

    assert (ran.code, ran.out) == (0, "")
    assert "events.folded" in ran.err.splitlines()[0]
    assert "events=3" in ran.err.splitlines()[0]
    assert "\x1b" not in ran.err


@pytest.mark.integration
def test_no_row_of_a_drivers_error(database_url: str) -> None:
    """What the driver says of a COPY that was canceled quotes the row: only the kind and the place are logged."""
    ran = python("tests.test_logs", "driver", settings={"DATABASE_URL": database_url})

    lines = [msgspec.json.decode(line) for line in ran.err.splitlines()]
    assert ran.code == 0, ran.err
    assert [line["event"] for line in lines] == [
        "it failed: 'QueryCanceled'",
        "unit.failed",
        "it failed: 'RuntimeError'",
        "unit.failed",
        "of many: ExceptionGroup",
    ]
    assert all("psycopg.errors.QueryCanceled" in line["exception"] for line in lines[:4])
    assert all("copy_a_row" in line["exception"] for line in lines[:4])
    assert ROW not in ran.err
