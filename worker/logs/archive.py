"""Moves old payloads into log files: writes them, reads them back, and drops them from the database.

Note [An archive loses nothing]
    The inbox keeps for ever what identifies an event: its id, by which a duplicate is recognized, its number, its
    outcome, and the hash of its body. Its payload moves, a partition at a time, in steps. The process may be killed
    after any of them:

    1. A log of the payloads is written under a draft's name and forced to disk. No one takes a draft for an archive.
    2. It is read back from the disk, by the same reader that ``replay`` uses. The count of its events, and the hash
       over them in their order with every byte of their payloads, have to equal those of the database. Only then does
       the file get its name, and the folder is forced to disk.
    3. The hash of each event's content (see schemas/contents.py) is kept: a copy that comes later is compared with it.
    4. Folding pauses, and no one else can write to the partition. The payload of an event is dropped if the event's
       hash in the inbox is still the one that was written, and it is neither pending nor parked. Others stay.

    A run that is killed before the fourth step leaves a file too many. The next run reads that file, and uses it if it
    has the same count and hash. A run that is killed within the fourth step leaves its transaction undone. An existing
    file is never written to. An archived payload is as good as one in the database: the file is matched with the
    inbox by account, mode, id and hash, so that it may be copied, renamed or replayed into an empty database.
"""

import fcntl
import hashlib
import os
import shutil
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import IO, Final

from psycopg import sql
from sqlalchemy import Engine

from schemas import accounts, contents, database, inbox, locks
from schemas.database import Cursor
from schemas.errors import ConfigurationError, ConflictError
from schemas.progress import do_nothing
from worker.logs import reader, writer
from worker.logs.restore import NAME, ROWS_READ, SUFFIX

ROWS_DELETED_MAX: Final = 5_000
"""Payloads that one transaction deletes, if the partition is not emptied as a whole."""
ROWS_KEPT_MAX: Final = 1_000
"""A partition is emptied, and up to so many payloads put back. If more stay, the others are deleted instead."""
LOCK_SECONDS_MAX: Final = 1
"""How long one try waits for a partition; others wait behind it for as long."""
TRIES_MAX: Final = 40
ROOM_SHARE: Final = 4
"""A log takes a tenth of the size of its payloads, or less; room for a fourth is required."""


@dataclass(frozen=True, slots=True)
class Part:
    """The part of a *partition* that can be archived: *events* numbered from *first* to *last*, of so many *bytes*."""

    partition: str
    first: int
    last: int
    events: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Done:
    """The result for a part: its file, how many payloads were *dropped*, and how many changed and stay.

    Another run had dropped the payloads of *gone* events before. *is_known* is whether the file was there already, from
    a run that did not finish.
    """

    part: Part
    path: Path
    dropped: int
    stayed: int
    gone: int
    is_known: bool


# ---- What there is to archive ----

# Parked events are not archived: their payloads are needed to fold them later.
_ARCHIVABLE: Final = """
FROM {partition} AS b JOIN inbox AS i USING (seq) JOIN outcomes AS o USING (seq)
WHERE i.created < %(before)s AND o.state <> 'parked' AND NOT EXISTS (SELECT FROM pending AS p WHERE p.seq = b.seq)
    AND b.seq BETWEEN %(first)s AND %(last)s AND i.seq BETWEEN %(first)s AND %(last)s
    AND o.seq BETWEEN %(first)s AND %(last)s
"""
_SUMMED: Final = f"SELECT min(b.seq), max(b.seq), count(*), sum(octet_length(b.payload)) {_ARCHIVABLE}"
_READ: Final = f"""
SELECT b.seq, i.account, i.livemode, i.id, i.source, i.received_at, i.signature, i.payload_sha256, i.redacted, b.payload
{_ARCHIVABLE} ORDER BY b.seq LIMIT {ROWS_READ}
"""


def plan(engine: Engine, *, before: datetime) -> list[Part]:
    """Return the parts of partitions that can be archived, of events created before *before*.

    Raises:
        ConflictError: the rename of an account is not finished, and may need any payload.
    """
    with database.transaction(engine) as connection, database.cursor(connection) as cursor:
        accounts.require_settled(cursor)
        found = [_part(cursor, name, before) for name in inbox.partitions(cursor)]
    return [part for part in found if part is not None]


def _part(cursor: Cursor, partition: str, before: datetime) -> Part | None:
    named = sql.Identifier(partition)
    cursor.execute(sql.SQL("SELECT min(seq), max(seq) FROM {}").format(named))
    first, last = cursor.fetchone() or (None, None)
    if first is None:
        return None
    cursor.execute(sql.SQL(_SUMMED).format(partition=named), {"before": before, "first": first, "last": last})
    first, last, events, size = cursor.fetchone() or (None, None, 0, 0)
    return Part(partition, first, last, events, int(size)) if events else None


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keep others from archiving into *folder*, which has to exist, for as long as the block takes.

    The lock is on the folder. In the database it would be a transaction that waits for a disk, and that the database's
    host may end. Runs into different folders do no harm: at worst they write a second copy.

    Raises:
        ConflictError: another run archives into it.
    """
    opened = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConflictError(f"Events are being archived already, into {folder}.") from None
        except OSError:
            # Not every file system has such locks. Without one, two runs at once end with an error and lose nothing.
            pass
        yield
    finally:
        os.close(opened)


def clear_drafts(folder: Path) -> None:
    """Remove the drafts of killed runs: no payload has been dropped for a draft."""
    for path in folder.glob("payfold-events-*.part"):
        path.unlink(missing_ok=True)


def require_room(parts: Iterable[Part], folder: Path) -> None:
    """Check that *folder* has room, before anything is written.

    Raises:
        ConfigurationError: it has too little.
    """
    wanted, free = sum(part.bytes for part in parts) // ROOM_SHARE, shutil.disk_usage(folder).free
    if wanted > free:
        raise ConfigurationError(
            f"{folder} has {free:,} bytes left, and the archive may want {wanted:,}. Nothing has been written. Name a"
            " folder with more room, or an earlier date."
        )


# ---- Writing ----


class _Fingerprint:
    """Count and hash of events in their order: of account, mode, id and body hash, and every byte of the payloads."""

    def __init__(self) -> None:
        self.events = 0
        self._hash = hashlib.sha256()

    def add(self, account: str, livemode: object, event: str, sha256: bytes, payload: bytes) -> None:
        self.events += 1
        for each in (account.encode(), b"live" if livemode else b"test", event.encode(), sha256, payload):
            self._hash.update(len(each).to_bytes(8, "big"))
            self._hash.update(each)

    @property
    def value(self) -> tuple[int, bytes]:
        return self.events, self._hash.digest()


@dataclass(slots=True)
class _Held:
    """The contents of a file: the numbers of its events, the hashes of their bodies, and its fingerprint."""

    seqs: "array[int]" = field(default_factory=lambda: array("q"))
    hashes: bytearray = field(default_factory=bytearray)
    fingerprint: tuple[int, bytes] = (0, b"")

    def rows(self) -> Iterator[tuple[int, bytes]]:
        size = hashlib.sha256().digest_size
        for number, seq in enumerate(self.seqs):
            yield seq, bytes(self.hashes[number * size : (number + 1) * size])


def archive(
    engine: Engine, part: Part, *, before: datetime, folder: Path, progress: Callable[[int], None] = do_nothing
) -> Done:
    """Write a log of *part* into *folder*, read it back, and then drop its payloads.

    *progress* is called with the number of events of each step. See Note [An archive loses nothing].

    Raises:
        ConfigurationError: the log cannot be written; nothing has changed.
        ConflictError: the log does not read back as it was written, or the partition is in use for too long; only
            payloads of earlier steps have been dropped.
    """
    held, path = _known(engine, part, before, folder)
    is_known = path is not None
    if path is None:
        held, path = _written(engine, part, before, folder, progress)
    return _concluded(engine, part, held, path, is_known=is_known)


def _concluded(engine: Engine, part: Part, held: _Held, path: Path, *, is_known: bool) -> Done:
    dropped = _drop(engine, part.partition, held)
    stayed = _at_hand(engine, part.partition, held) if dropped < len(held.seqs) else 0
    return Done(part, path, dropped, stayed, len(held.seqs) - dropped - stayed, is_known)


def _at_hand(engine: Engine, partition: str, held: _Held) -> int:
    """Return how many of the payloads that are *held* the database still has."""
    statement = sql.SQL("SELECT count(*) FROM {} WHERE seq = ANY (%s::bigint[])").format(sql.Identifier(partition))
    with database.transaction(engine) as connection, database.cursor(connection) as cursor:
        cursor.execute(statement, (database.integer_array(held.seqs),))
        (count,) = cursor.fetchone() or (0,)
        return int(count)


def _known(engine: Engine, part: Part, before: datetime, folder: Path) -> tuple[_Held, Path | None]:
    """Return the log that an unfinished run has left, with its contents; None where there is none."""
    named = [(path, NAME.fullmatch(path.name)) for path in sorted(folder.iterdir()) if path.is_file()]
    paths = [path for path, found in named if found and (int(found[1]), int(found[2])) == (part.first, part.last)]
    if not paths:
        return _Held(), None
    held = _read(engine, part, before, None, do_nothing)
    return held, next((path for path in paths if _fingerprint_of(path) == held.fingerprint), None)


def _written(
    engine: Engine, part: Part, before: datetime, folder: Path, progress: Callable[[int], None]
) -> tuple[_Held, Path]:
    """Write a log, read it back before it gets its name, and return it with its contents."""
    path, held = _free_name(folder, part), _Held()

    def check(draft: Path) -> None:
        if _fingerprint_of(draft) != held.fingerprint:
            raise ConflictError(
                f"{path} does not read back as it was written, so it was removed, and no payload has gone. Is the disk"
                " sound?"
            )

    with writer.writing(path, "Zstandard", check=check) as stream:
        held = _read(engine, part, before, stream, progress)
    return held, path


def _free_name(folder: Path, part: Part) -> Path:
    """Return the name of no existing file, since existing files are never written to."""
    name, number = f"payfold-events-{part.first}-{part.last}", 1
    path = folder / f"{name}{SUFFIX}"
    while path.exists():
        number += 1
        path = folder / f"{name}-{number}{SUFFIX}"
    return path


def _read(
    engine: Engine, part: Part, before: datetime, stream: IO[bytes] | None, progress: Callable[[int], None]
) -> _Held:
    """Read the events of *part*, write each to *stream*, and return the contents.

    Each transaction reads a few events, so that none stays open for long. Events that change between reading and
    dropping are noticed before their payloads are dropped.
    """
    held, fingerprint = _Held(), _Fingerprint()
    statement = sql.SQL(_READ).format(partition=sql.Identifier(part.partition))
    first = part.first
    while True:
        with database.transaction(engine) as connection, database.cursor(connection) as cursor:
            cursor.execute(statement, {"before": before, "first": first, "last": part.last}, binary=True)
            rows = cursor.fetchall()
            _note_contents(cursor, {row[0]: row[9] for row in rows})
        for seq, account, livemode, event, source, received_at, signature, sha256, redacted, payload in rows:
            if stream is not None:
                stream.write(writer.line_of(account, source, received_at, signature, sha256.hex(), redacted, payload))
            held.seqs.append(seq)
            held.hashes += sha256
            fingerprint.add(account, livemode, event, sha256, payload)
        if len(rows) < ROWS_READ:
            held.fingerprint = fingerprint.value
            return held
        first = rows[-1][0] + 1
        progress(len(rows))


def _note_contents(cursor: Cursor, payloads: Mapping[int, bytes]) -> None:
    """Keep the hashes of the contents of *payloads*, by number; they are used once the payload is gone."""
    hashes = [contents.hash_of(bytes(payload)).hex() for payload in payloads.values()]
    cursor.execute(
        "INSERT INTO contents (seq, content_sha256)"
        " SELECT seq, decode(sha256, 'hex') FROM unnest(%s::bigint[], %s::text[]) AS k (seq, sha256)"
        " ON CONFLICT (seq) DO UPDATE SET content_sha256 = excluded.content_sha256",
        (database.integer_array(payloads), database.text_array(hashes)),
    )


def _fingerprint_of(path: Path) -> tuple[int, bytes] | None:
    """Return count and hash of the log at *path*, read from the disk; None where it cannot be read."""
    _forget(path)
    found = _Fingerprint()
    for entry in reader.read(str(path), account="", now=datetime.now(UTC)):
        if entry.delivery is None:
            return None
        logged = entry.delivery
        found.add(logged.account, logged.envelope.livemode, logged.envelope.id, logged.sha256, logged.envelope.payload)
    return found.value


def _forget(path: Path) -> None:
    """Drop *path* from the system's cache, where that is possible, so that it is read from the disk itself."""
    if hasattr(os, "posix_fadvise"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


# ---- Dropping ----

_UNCHANGED: Final = """
FROM {logged} AS a (seq, payload_sha256) JOIN inbox AS i USING (seq) JOIN outcomes AS o USING (seq)
WHERE i.payload_sha256 = a.payload_sha256 AND o.state <> 'parked'
    AND NOT EXISTS (SELECT FROM pending AS p WHERE p.seq = a.seq)
"""


def _drop(engine: Engine, partition: str, held: _Held) -> int:
    """Drop the *held* payloads, except those that have changed since they were read; return how many were dropped."""
    dropped = _empty(engine, partition, held)
    return _delete(engine, partition, held) if dropped is None else dropped


def _empty(engine: Engine, partition: str, held: _Held) -> int | None:
    """Empty *partition* and put back the payloads that stay, which is cheap; None, and no change, where many stay."""
    named = sql.Identifier(partition)
    with database.transaction(engine) as connection, database.cursor(connection) as cursor:
        cursor.execute("CREATE TEMPORARY TABLE logged (seq bigint PRIMARY KEY, payload_sha256 bytea) ON COMMIT DROP")
        with cursor.copy("COPY logged FROM STDIN (FORMAT binary)") as copy:
            copy.set_types(["int8", "bytea"])
            for row in held.rows():
                copy.write_row(row)
        cursor.execute("ANALYZE logged")
        _lock(cursor, partition, "ACCESS EXCLUSIVE")
        cursor.execute(
            sql.SQL(
                "CREATE TEMPORARY TABLE going ON COMMIT DROP AS SELECT b.seq FROM {partition} AS b WHERE b.seq IN"
                f" (SELECT a.seq {_UNCHANGED})"
            ).format(partition=named, logged=sql.Identifier("logged"))
        )
        cursor.execute(
            sql.SQL(
                "CREATE TEMPORARY TABLE staying ON COMMIT DROP AS SELECT b.* FROM {} AS b"
                " WHERE NOT EXISTS (SELECT FROM going AS g WHERE g.seq = b.seq) LIMIT {}"
            ).format(named, sql.Literal(ROWS_KEPT_MAX + 1))
        )
        if cursor.rowcount > ROWS_KEPT_MAX:
            return None
        cursor.execute("SELECT count(*) FROM going")
        (dropped,) = cursor.fetchone() or (0,)
        cursor.execute(sql.SQL("TRUNCATE ONLY {0}; INSERT INTO {0} SELECT * FROM staying ORDER BY seq").format(named))
        return int(dropped)


def _delete(engine: Engine, partition: str, held: _Held) -> int:
    """Delete payloads from *partition*, some at a time; their space is used again, and freed once it is emptied."""
    statement = sql.SQL("DELETE FROM {partition} AS b WHERE b.seq IN (SELECT a.seq " + _UNCHANGED + ")").format(
        partition=sql.Identifier(partition), logged=sql.SQL("unnest(%b::bigint[], %b::bytea[])")
    )
    dropped, rows = 0, held.rows()
    while chunk := list(islice(rows, ROWS_DELETED_MAX)):
        with database.transaction(engine) as connection, database.cursor(connection) as cursor:
            # Others may still read the partition, but neither fold nor write to it.
            _lock(cursor, partition, "SHARE ROW EXCLUSIVE")
            cursor.execute(statement, ([seq for seq, _ in chunk], [sha256 for _, sha256 in chunk]))
            dropped += cursor.rowcount
    return dropped


def _lock(cursor: Cursor, partition: str, mode: str) -> None:
    """Keep others from folding, and from writing to *partition*, until the transaction ends.

    All that others wrote before is then visible.

    Raises:
        ConflictError: it is locked for too long, or a rename has begun, which may need any payload.
    """

    def take() -> None:
        locks.keep_others_from_folding(cursor)
        cursor.execute(sql.SQL("LOCK TABLE ONLY {} IN {} MODE").format(sql.Identifier(partition), sql.SQL(mode)))

    for _ in range(TRIES_MAX):
        if locks.taken_in_time(cursor, take, seconds_max=LOCK_SECONDS_MAX):
            # A rename writes its name, and takes each of its steps, under the lock on folding.
            accounts.require_settled(cursor)
            return
    raise ConflictError(
        f"{partition} is in use: does a rebuild go on, or is a transaction left open? Its payloads stay for now. Run"
        " the same command again: it takes the log that is written for its own."
    )
