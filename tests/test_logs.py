"""Logs are one line per unit of work, on stderr, for machines or for people, and hold no secret."""

import logging
import os
import select
import subprocess
import sys
from io import FileIO

import msgspec
import pytest
import structlog

from schemas import database, logs
from schemas.settings import Settings
from tests.command import SECONDS_MAX, Ran, environment, python

LINES = 100
LINE_CHARACTERS = 10_000
PIPE_BYTES = 64 * 1024

log = structlog.get_logger()
library = logging.getLogger("library")


def work() -> None:
    """Log the lines of a unit of work."""
    logs.configure(Settings.load())
    with structlog.contextvars.bound_contextvars(batch=7):
        log.info("events.folded", events=3)
    log.debug("unit.detail")
    log.warning("unit.odd", text="two\nlines")
    fail()
    library.info("chatter")
    library.warning("heed %s", "this")


def fail() -> None:
    """Log an error with its traceback."""
    try:
        int("no number")
    except ValueError:
        log.exception("unit.failed")


def work_without_log() -> None:
    """Log to a standard error that cannot be written, before and after the set-up."""
    UNWRITABLE[sys.argv[2]]()
    log.error("before.configured")
    library.error("before %s", "configured")
    logs.configure(Settings.load())
    for _ in range(3):
        log.error("unit.done", text="x" * LINE_CHARACTERS)
        library.error("heed %s", "this")
        library.error("heed %s %s", "this")
    fail()
    print("worked on")  # noqa: T201 - what the test reads


def work_without_reader() -> None:
    """Log more than a pipe holds, and once more after the test has read the pipe."""
    logs.configure(Settings.load())
    for _ in range(LINES):
        log.error("unit.done", text="x" * LINE_CHARACTERS)
    print("done", flush=True)  # noqa: T201 - what the test reads
    sys.stdin.read()
    log.error("unit.last")


def _pipe_without_reader() -> None:
    reads, writes = os.pipe()
    os.dup2(writes, 2)
    os.close(reads)


UNWRITABLE = {
    "full": lambda: os.dup2(os.open("/dev/full", os.O_WRONLY), 2),
    "no reader": _pipe_without_reader,
    "descriptor closed": lambda: os.close(2),
    "stream closed": sys.stderr.close,
    "none": lambda: setattr(sys, "stderr", None),
}


def logged_by(**settings: str) -> Ran:
    """Return the output of a process that logs with *settings*."""
    return python("tests.test_logs", "work", settings=settings)


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
    """Log a COPY that is canceled in the midst of a row, in each way in which errors are logged."""
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
    globals()[sys.argv[1]]()


def test_json() -> None:
    """By default each line on stderr is one JSON object with level, time and bound values; stdout is empty."""
    ran = logged_by()

    lines = [msgspec.json.decode(line) for line in ran.err.splitlines()]
    assert (ran.code, ran.out) == (0, "")
    assert [line["event"] for line in lines] == ["events.folded", "unit.odd", "unit.failed", "heed this"]
    assert (lines[0]["batch"], lines[0]["events"], lines[0]["level"]) == (7, 3, "info")
    assert all(line["timestamp"].endswith("Z") for line in lines)
    assert "batch" not in lines[1]
    assert "ValueError" in lines[2]["exception"]
    assert (lines[3]["level"], lines[3]["logger"]) == ("warning", "library")


@pytest.mark.parametrize(
    ("level", "events"),
    [("debug", ["events.folded", "unit.detail", "unit.odd", "unit.failed", "heed this"]), ("error", ["unit.failed"])],
)
def test_level(level: str, events: list[str]) -> None:
    """Lines below the level are not logged; libraries log nothing below warnings."""
    lines = logged_by(PAYFOLD_LOG_LEVEL=level).err.splitlines()

    assert [msgspec.json.decode(line)["event"] for line in lines] == events


def test_console() -> None:
    """The console format is readable, and has no colour outside a terminal."""
    ran = logged_by(PAYFOLD_LOG_FORMAT="console")

    assert (ran.code, ran.out) == (0, "")
    assert "events.folded" in ran.err.splitlines()[0]
    assert "events=3" in ran.err.splitlines()[0]
    assert "\x1b" not in ran.err


@pytest.mark.integration
def test_no_row_of_a_drivers_error(database_url: str) -> None:
    """The driver's message about a canceled COPY quotes the row: only the kind and the place are logged."""
    ran = python("tests.test_logs", "log_driver_errors", settings={"DATABASE_URL": database_url})

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


# ---- Logging never stops work ----


@pytest.mark.parametrize("form", ["json", "console"])
@pytest.mark.parametrize("case", UNWRITABLE)
def test_unwritable(case: str, form: str) -> None:
    """While standard error cannot be written each logging call returns normally, before and after the set-up."""
    ran = python("tests.test_logs", "work_without_log", case, settings={"PAYFOLD_LOG_FORMAT": form})

    assert (ran.code, ran.out) == (0, "worked on\n")


def test_reader_stops() -> None:
    """A reader that stops reading does not stop the work; when it reads again, a line counts the lines it missed."""
    reads, writes = os.pipe()
    command = [sys.executable, "-m", "tests.test_logs", "work_without_reader"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=environment({}), stdin=pipe, stdout=pipe, stderr=writes) as running:
        os.close(writes)
        assert running.stdout is not None
        assert running.stdin is not None
        if not select.select([running.stdout], [], [], SECONDS_MAX)[0]:
            running.kill()
        assert running.stdout.readline() == b"done\n"
        with os.fdopen(reads, "rb", buffering=0) as log_lines:
            text = drain(log_lines)
            running.stdin.close()
            text += log_lines.readall()
        assert running.wait(SECONDS_MAX) == 0

    whole, torn = [], 0
    for line in text.splitlines():
        try:
            whole.append(msgspec.json.decode(line))
        except msgspec.DecodeError:
            torn += 1
    written = [line["event"] for line in whole]
    assert torn <= 1
    assert written[-2:] == ["unit.last", "log.lines_lost"]
    assert written.count("unit.done") + whole[-1]["lines"] == LINES
    assert PIPE_BYTES // LINE_CHARACTERS - 1 <= written.count("unit.done") <= PIPE_BYTES // LINE_CHARACTERS


def drain(pipe: FileIO) -> bytes:
    """Return what *pipe* holds now."""
    os.set_blocking(pipe.fileno(), False)
    text = b""
    while (read := pipe.read(PIPE_BYTES)) is not None:
        text += read
    os.set_blocking(pipe.fileno(), True)
    return text


def test_seldom() -> None:
    """One line a second of each kind is logged, the first at once, and each counts the lines left out."""
    now = 0.0
    seldom = logs.Seldom(seconds=1.0, now=lambda: now)
    first = [seldom.left_out("slow") for _ in range(1000)]
    other = seldom.left_out("large")
    now = 1.0
    second = [seldom.left_out("slow") for _ in range(2)]
    now = 2.5

    assert (first, other) == ([0] + [None] * 999, 0)
    assert (second, seldom.left_out("slow"), seldom.left_out("large")) == ([999, None], 1, 0)
