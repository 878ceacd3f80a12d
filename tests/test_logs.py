"""Logs are one line per unit of work, on stderr, for machines or for people, and hold no secret."""

import msgspec
import pytest

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


if __name__ == "__main__":
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
