"""Finds the payloads of an archive again in its logs, and brings them back into the database."""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any, Final

from msgspec.structs import replace
from psycopg import sql
from sqlalchemy import Engine

from schemas import accounts, database, files
from schemas.database import Cursor
from schemas.errors import ConfigurationError, ConflictError
from schemas.events import Key
from schemas.inbox import Delivery
from worker.logs import reader

ROWS_READ: Final = 500
EVENTS_NAMED_MAX: Final = 3
SUFFIX: Final = ".ndjson.zst"
NAME: Final = re.compile(r"payfold-events-([0-9]+)-([0-9]+)(?:-[0-9]+)?\.ndjson(?:\.zst|\.gz)?")
"""The name of a log, with the numbers of its first and its last event."""


def logs_in(folder: Path) -> list[Path]:
    """Return the logs of the archive in *folder*.

    Raises:
        ConfigurationError: there is no such folder, or no log in it.
    """
    if not folder.is_dir():
        raise ConfigurationError(f"--archive: there is no folder {folder}.")
    found = sorted(path for path in folder.iterdir() if NAME.fullmatch(path.name))
    for path in found:
        if kind := files.irregular(path):
            raise ConfigurationError(f"--archive: {path} is {kind}, and only files are read.")
    if not found:
        raise ConfigurationError(f"--archive: {folder} has no log by a name as payfold-events-1-1000{SUFFIX}.")
    return found


def names_in(engine: Engine) -> dict[str, str]:
    """Return the newest name of each account by each of its old ones."""
    with database.transaction(engine) as connection, database.cursor(connection) as cursor:
        return accounts.names(cursor)


def deliveries_in(path: Path, names: Mapping[str, str]) -> Iterator[list[Delivery]]:
    """Yield the deliveries of the log at *path*, with the newest name of each account by *names*.

    Raises:
        ConflictError: the log is damaged.
    """
    entries = reader.read(str(path), account="", now=datetime.now(UTC))
    while chunk := list(islice(entries, ROWS_READ)):
        for entry in chunk:
            if entry.delivery is None:
                raise ConflictError(f"The archive is damaged. {entry.place}: {entry.fault}")
        yield [entry.delivery.named(names) for entry in chunk if entry.delivery is not None]


MATCHED: Final = """
SELECT i.seq, t.payload
FROM unnest(%b::text[], %b::boolean[], %b::text[], %b::bytea[], %b::bytea[])
    AS t (account, livemode, id, payload_sha256, payload)
JOIN {inbox} AS i USING (account, livemode, id)
WHERE i.payload_sha256 = t.payload_sha256
    AND NOT EXISTS (SELECT FROM {payloads} AS b WHERE b.seq = i.seq)
"""
"""Selects the lacking payloads by their hash: of several copies only the one that the inbox has."""


def arguments(deliveries: Sequence[Delivery]) -> list[list[Any]]:
    """Return *deliveries* as the arrays that ``MATCHED`` takes."""
    return [
        [each.account for each in deliveries],
        [each.envelope.livemode for each in deliveries],
        [each.envelope.id for each in deliveries],
        [each.sha256 for each in deliveries],
        [each.envelope.payload for each in deliveries],
    ]


def require_none_lacking(cursor: Cursor, lacking: sql.Composable, folder: Path) -> None:
    """Raise ConflictError where events are *lacking*, as rows ``i``, that the archive in *folder* should have."""
    cursor.execute(sql.SQL("SELECT count(*) {}").format(lacking))
    (count,) = cursor.fetchone() or (0,)
    if count:
        cursor.execute(sql.SQL("SELECT i.id {} ORDER BY i.seq LIMIT {}").format(lacking, sql.Literal(EVENTS_NAMED_MAX)))
        named = ", ".join(event for (event,) in cursor.fetchall()) + (", …" if count > EVENTS_NAMED_MAX else "")
        raise ConflictError(f"The archive in {folder} lacks the payloads of {count:,} events: {named}.")


def bring_back(engine: Engine, seqs: Sequence[int], folder: Path) -> None:
    """Bring the payloads of the events numbered *seqs* from the archive in *folder* back into the database.

    Raises:
        ConflictError: the archive is damaged, or lacks one of them.
    """
    statement = sql.SQL("INSERT INTO payloads (seq, payload)" + MATCHED + "ON CONFLICT DO NOTHING").format(
        inbox=sql.Identifier("inbox"), payloads=sql.Identifier("payloads")
    )
    lacking = sql.SQL("FROM inbox AS i LEFT JOIN payloads AS b USING (seq) WHERE i.seq = ANY ({}) AND b.seq IS NULL")
    with database.transaction(engine) as connection, database.cursor(connection) as cursor:
        names = accounts.names(cursor)
        cursor.execute("SELECT account, livemode, id FROM inbox WHERE seq = ANY (%s)", (list(seqs),))
        # During a rename the inbox has the account's old name too, and the log may have an even older one.
        wanted = defaultdict[Key, list[str]](list)
        for account, livemode, event in cursor.fetchall():
            wanted[names.get(account, account), livemode, event].append(account)
    for path in sorted(logs_in(folder), key=lambda each: not _may_hold(each, seqs)):
        for deliveries in deliveries_in(path, names):
            found = [replace(each, account=name) for each in deliveries for name in wanted.get(each.key, ())]
            if found:
                with database.transaction(engine) as connection, database.cursor(connection) as cursor:
                    cursor.execute(statement, arguments(found))
        with database.transaction(engine) as connection, database.cursor(connection) as cursor:
            cursor.execute(sql.SQL("SELECT count(*) {}").format(lacking.format(sql.Literal(list(seqs)))))
            if cursor.fetchone() == (0,):
                return
    with database.transaction(engine) as connection, database.cursor(connection) as cursor:
        require_none_lacking(cursor, lacking.format(sql.Literal(list(seqs))), folder)


def _may_hold(path: Path, seqs: Iterable[int]) -> bool:
    """Return whether *path* holds one of *seqs* by its name; in a log of another database the numbers are others."""
    found = NAME.fullmatch(path.name)
    return found is not None and any(int(found[1]) <= seq <= int(found[2]) for seq in seqs)
