"""The common parts of the commands: options, the database with this release's schema, and exit codes."""

import glob
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, TypeVar

import typer

from deploy.local import discovery
from deploy.output import Format, err
from schemas import database, files, lines, migrate, single
from schemas.database import Bounds
from schemas.errors import (
    ConfigurationError,
    ConflictError,
    DatabaseAway,
    MigrationsPendingError,
    NotFoundError,
    PayfoldError,
)
from schemas.settings import Settings

if TYPE_CHECKING:
    from sqlalchemy import Engine, Table

FAILED: Final = PayfoldError.exit_code
USAGE: Final = ConfigurationError.exit_code
DRIFT: Final = 3
MIGRATIONS_PENDING: Final = MigrationsPendingError.exit_code

STANDARD_INPUT: Final = "-"
LOOK_SECONDS: Final = 0.5
"""The pause between two looks for what is new, of a command that follows."""
PAGE_BOUNDS: Final = Bounds(statement=5, lock=5, whole=8)
"""For reading a page; a connection that takes longer is taken for silent."""
Result = TypeVar("Result")
Found = TypeVar("Found")

FormatOption = Annotated[Format, typer.Option("--format", help="How rows are printed.")]
AccountOption = Annotated[str | None, typer.Option("--account", help="Only this Stripe account.")]
ModeOption = Annotated[bool | None, typer.Option("--live/--test", help="Only this mode.", show_default=False)]
ArchiveOption = Annotated[
    Path | None, typer.Option("--archive", metavar="DIR", help="The folder to which payloads were archived.")
]
TIMES: Final = ["%Y-%m-%d", "%Y-%m-%dT%H:%M:%S", "%Y-%m-%dT%H:%M:%S%z"]
Since = Annotated[
    datetime | None,
    typer.Option(formats=TIMES, metavar="TIME", help="Only events created from then on: 2026-01-31T12:00:00, UTC."),
]
Until = Annotated[
    datetime | None,
    typer.Option(formats=TIMES, metavar="TIME", help="Only events created before then: 2026-02-01, UTC."),
]


def settings_here() -> Settings:
    """Return the settings, with the embedded servers that run here if they name none, and set up logging by them."""
    from schemas import logs

    settings = discovery.here(discovery.settings())
    logs.configure(settings)
    return settings


def settings_of_reader() -> Settings:
    """Return the settings likewise, for a command that logs by ``schemas.lines`` alone, and hardly ever."""
    settings = discovery.here(discovery.settings())

    def configure() -> None:
        from schemas import logs

        logs.configure(settings)

    lines.configure_later(configure)
    return settings


def logs_named(given: Sequence[str]) -> list[str]:
    """Return the files that are *given*, by their names or as patterns, once it is known that they can be read.

    Raises:
        ConfigurationError: one cannot, or a pattern is that of no file.
    """
    found: list[str] = []
    for each in given:
        is_pattern = each != "-" and not Path(each).exists() and glob.has_magic(each)
        files = sorted(glob.glob(each, recursive=True)) if is_pattern else [each]  # noqa: PTH207 - absolute or not
        if not files:
            raise ConfigurationError(f"No file is named like {each}.")
        for file in files:
            _require_readable(file)
        found += files
    return found


def _require_readable(file: str) -> None:
    if file == STANDARD_INPUT:
        _require_input()
        return
    path = Path(file)
    if not path.exists():
        raise ConfigurationError(f"There is no file {file}.")
    kind = files.irregular(path)
    if kind == "a folder":
        raise ConfigurationError(f"{file} is a folder: name the files in it, as {file}/*.")
    if kind == "a pipe":
        raise ConfigurationError(
            f"{file} is a pipe, and only files are opened: pipe it in, and name it {STANDARD_INPUT}."
        )
    if kind is not None:
        raise ConfigurationError(f"{file} is {kind}, and only files are read.")
    if not os.access(path, os.R_OK):
        raise ConfigurationError(f"{file} may not be read by this user.")


def _require_input() -> None:
    """Raise ConfigurationError where standard input is closed, or may have no end, as a device but a terminal."""
    if sys.stdin is None:
        raise ConfigurationError("Standard input is closed: give it a file, or pipe something into it.")
    descriptor = sys.stdin.fileno()
    kind = files.irregular(descriptor)
    is_empty = os.path.samestat(os.fstat(descriptor), Path(os.devnull).stat())
    if kind == "a folder" or (kind == "a device" and not (is_empty or os.isatty(descriptor))):
        raise ConfigurationError(f"Standard input is {kind}: give it a file, or pipe something into it.")


def require_writable(path: Path, option: str, *, is_replaced: bool = False) -> None:
    """Find out before long work is done whether *path*, which *option* names, can be written at the end of it.

    The null device is allowed, and discards the output, unless the file *is_replaced* by a new one of its name.

    Raises:
        ConfigurationError: it cannot, or it is there and no file.
    """
    try:
        kind = files.irregular(path) if path.exists() else None
    except OSError as error:
        raise ConfigurationError(f"Cannot write {path}: {error.strerror}.") from None
    if kind is not None and (is_replaced or path != Path(os.devnull)):
        raise ConfigurationError(f"Cannot write {path}: it is {kind}. {option} wants the name of a file.")
    if not path.parent.is_dir():
        raise ConfigurationError(f"Cannot write {path}: there is no folder {path.parent}.")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ConfigurationError(f"Cannot write {path}: this user may not.")


@contextmanager
def opened_database(*, behind_is_fine: bool = False, connections_max: int = 5) -> "Iterator[Engine]":
    """Yield an engine on the database, after checking that its schema is this release's."""
    engine = database.engine(settings_here().postgresql, connections_max=connections_max)
    try:
        if not behind_is_fine:
            with database.transaction(engine) as connection:
                if migrate.pending(connection):
                    raise MigrationsPendingError
        yield engine
    finally:
        engine.dispose()


def patiently(read: Callable[[], Result], *, waits: bool) -> Result:
    """Return what *read* reads; a command that *waits* also waits for a database that is away, silent or busy."""
    is_away = False
    while True:
        try:
            return read()
        except Exception as error:
            if not waits or not (isinstance(error, DatabaseAway) or database.is_busy(error)):
                raise
            if not is_away:
                err.print("PostgreSQL does not answer; going on once it does.")
            is_away = True
            time.sleep(LOOK_SECONDS)


def utc(moment: datetime | None) -> datetime | None:
    """Return *moment* as aware, in UTC where it names no zone."""
    return moment if moment is None or moment.tzinfo else moment.replace(tzinfo=UTC)


def one_row(
    engine: "Engine", table: "Table", key: str, *, account: str | None, livemode: bool | None
) -> dict[str, Any]:
    """Return the row of *table* with the id *key*.

    Raises:
        NotFoundError: there is none.
        ConflictError: several accounts or modes have one.
    """
    from schemas import lookup

    with database.transaction(engine) as connection:
        found = lookup.by_id(connection, table, key, account=account, livemode=livemode)
    return dict(_only(found, key))


def one_order(key: str, *, account: str | None, livemode: bool | None) -> dict[str, Any]:
    """Return the order with the id *key*, likewise, by the driver alone.

    Raises:
        MigrationsPendingError: the schema is not this release's.
    """
    with database.reading(settings_of_reader().libpq) as driver:
        with driver.cursor() as cursor:
            if migrate.pending_for(cursor):
                raise MigrationsPendingError
        return _only(single.by_id(driver, "orders", single.ORDER, key, account=account, livemode=livemode), key)


def _only(found: Sequence[Found], key: str) -> Found:
    if not found:
        raise NotFoundError(f"There is no {key} here.")
    if len(found) > 1:
        raise ConflictError(f"Several accounts or modes have {key}: say which (--account, --live, --test).")
    return found[0]
