"""The result of a check: a level, what was found, and the fix."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Final, TypeVar
from urllib.parse import urlsplit

from sqlalchemy.exc import DBAPIError

from deploy.output import shown
from schemas import database
from schemas.errors import DatabaseAway, PayfoldError

Known = TypeVar("Known")


class Level(StrEnum):
    """How bad a finding is. Only a fault changes the exit code."""

    OK = "ok"
    WARNING = "warning"
    FAULT = "fault"
    SKIPPED = "skipped"


@dataclass(frozen=True, slots=True)
class Finding:
    """What a check *found*, and the *fix*, which is empty where nothing is to be done.

    A line of the fix that begins with two spaces is a command to copy.
    """

    check: str
    level: Level
    found: str
    fix: str = ""


@dataclass(frozen=True, slots=True)
class Unread:
    """Stands for a value that could not be read, for a *reason*."""

    reason: str


NOT_IN_TIME: Final = Unread("there was no answer in time")


def give_up(part: object, why: Unread) -> None:
    """Let each value of *part*, a dataclass, that is not read yet be unread for the reason *why*."""
    for each in fields(part):  # type: ignore[arg-type]  # it is a dataclass
        if getattr(part, each.name) is NOT_IN_TIME:
            setattr(part, each.name, why)


def ok(check: str, found: str) -> Finding:
    """Return the finding that all is well."""
    return Finding(check, Level.OK, found)


def warning(check: str, found: str, fix: str) -> Finding:
    """Return the finding that something may go wrong, or is not as it should be."""
    return Finding(check, Level.WARNING, found, fix)


def fault(check: str, found: str, fix: str) -> Finding:
    """Return the finding that something is wrong."""
    return Finding(check, Level.FAULT, found, fix)


def skipped(check: str, reason: str, fix: str = "") -> Finding:
    """Return the finding that a check was not made, for a *reason*."""
    return Finding(check, Level.SKIPPED, f"not looked at: {reason}", fix)


def judged(
    check: str,
    value: Known | Unread,
    judge: Callable[[Known], Finding | Iterable[Finding]],
    *,
    well: Callable[[Known], str] = str,
    unread: Callable[[str], Finding] | None = None,
) -> Iterator[Finding]:
    """Yield the findings of *judge* about *value*; a failure of *judge* is a fault.

    Where there is none, *well* puts in words what was looked at. A value that could not be read is skipped, or is
    itself the finding that *unread* makes of the reason.
    """
    if isinstance(value, Unread):
        yield skipped(check, value.reason) if unread is None else unread(value.reason)
        return
    try:
        found = judge(value)
        found = [found] if isinstance(found, Finding) else list(found)
        found = found or [ok(check, well(value))]
    except Exception as error:  # noqa: BLE001 - no check may stop the others
        found = [fault(check, f"the check itself failed: {type(error).__name__}", "Report this as a bug of Payfold.")]
    yield from found


def public(url: str) -> str:
    """Return *url* as it may be shown: without a user and a password."""
    parts = urlsplit(url)
    return shown(parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl())


def counted(number: int, one: str, several: str = "") -> str:
    """Return *number* with its noun: *one*, or *several*, which is *one* and an s unless it is given."""
    return f"{number:,} {one if number == 1 else several or f'{one}s'}"


def attempt(read: Callable[[], Known]) -> Known | Unread:
    """Return what *read* returns, or the reason why it could not be read."""
    try:
        return read()
    except Exception as error:  # noqa: BLE001 - whatever it is, the other values are read all the same
        return Unread(reason_of(error))


def reason_of(error: BaseException) -> str:
    """Return in one line why something could not be read, without data and without a secret."""
    if isinstance(error, DatabaseAway) and error.__cause__ is not None:
        return database.first_line(error.__cause__)
    if isinstance(error, (DBAPIError, database.DriverError)):
        return f"PostgreSQL refused it ({database.condition(error)})"
    return str(error) if isinstance(error, PayfoldError) else type(error).__name__
