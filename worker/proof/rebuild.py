"""Folds the whole inbox again, into a second set of tables.

The tables are a function of the events, so a rebuild has to give the same tables; that is the proof. There are two
ways to rebuild, which share nothing but the folds and the join: ``rebuilt`` reads every event once and writes every
row once; ``refolded`` lets the projection fold the events step by step, in a random order.

Note [Every event is read once, every row is written once]
    The facts of an event are kept in a file for its object, one of some hundred files that are chosen by the hash of
    the object's id. Each file then holds all facts of its objects, in so many parts that one fits into memory, however
    long the history is. The facts of a part are joined there, and the rows go into empty tables by COPY, before these
    have an index.
    Reading and joining are divided among processes, and so are the indexes. The tables are filled in the same
    transaction that makes them, so that PostgreSQL need not visit the rows again to mark them as committed. One
    transaction fills the tables of the events and another those of the objects, so that the former get their indexes
    while objects are joined.
"""

import errno
import fcntl
import os
import random
import shutil
import struct
import tempfile
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from itertools import groupby, islice
from operator import itemgetter
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec
import structlog
from psycopg import sql
from sqlalchemy import Engine, Table
from sqlalchemy.exc import DBAPIError

from schemas import accounts, database, inbox, tables
from schemas.database import Cursor, integer_array, text_array
from schemas.errors import ConfigurationError, DatabaseAway, PayfoldError
from schemas.events import Key
from schemas.inbox import RECORD_ROWS_MAX
from schemas.own_events import EVENT_IGNORED
from schemas.progress import Progress, do_nothing
from schemas.settings import SigningSecret
from worker import folds
from worker.folding import copy_rows, projection, renderings
from worker.folding.anomalies import anomaly_rows, contradictions
from worker.folding.batch import shortened
from worker.folding.claim import reason_of
from worker.folds import join
from worker.folds.facts import Event, Facts, Subject
from worker.logs import reader as log_reader
from worker.logs.reader import Entry
from worker.proof import archived, processes, shadow
from worker.proof.processes import PROCESSES_MAX, Crew, ProcessLost
from worker.proof.shadow import Shadow

FACTS_BUFFERED_MAX: Final = 20_000
ROWS_READ: Final = 250
CATCH_UP_EVENTS: Final = 500

Result = TypeVar("Result")

_log = structlog.get_logger()


_NO_ROOM: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class NoRoomForFiles(PayfoldError):
    """A rebuild keeps the facts of all events in files, and there is no room for them."""

    def __init__(self, error: OSError) -> None:
        super().__init__(
            f"There is no room for the rebuild's files in {tempfile.gettempdir()} ({error.strerror})."
            " Free some there, or name a folder on another disk in TMPDIR. The tables are as they were."
        )


@dataclass(frozen=True, slots=True)
class Sizes:
    """How the work is divided, in events.

    Each process has the facts of *per_part* events in memory at once, and reads *per_task* events at a time. Up to
    *alone_max* events are not worth another process. More are divided among *processes*, or one a core. There are
    *files_max* files at most, since every task writes to each of them; what they hold then is in several parts.
    """

    per_part: int = 5_000
    files_max: int = 512
    per_task: int = 5_000
    alone_max: int = 10_000
    processes: int | None = None

    def processes_for(self, events: int) -> int:
        """Return among how many processes so many *events* are divided."""
        return 1 if events <= self.alone_max else self.processes or processes.cores()


USUAL: Final = Sizes()
IN_ONE_PROCESS: Final = Sizes(alone_max=2**63)
"""For a worker, which must not take every core from the processes that fold."""


def sizes_for(count: int | None) -> Sizes:
    """Return the usual sizes, with *count* processes or one a core.

    Raises:
        ConfigurationError: so many processes cannot be.
    """
    if count is not None and not 1 <= count <= PROCESSES_MAX:
        raise ConfigurationError(f"--processes is from 1 to {PROCESSES_MAX}, and not {count}.")
    return Sizes(processes=count)


@contextmanager
def rebuilt(engine: Engine, *, progress: Progress = do_nothing) -> Iterator[Shadow]:
    """Fold every event that has an outcome into a new schema, yield the schema, then drop it."""
    with shadow.shadow(engine) as made:
        rebuild(made, progress=progress)
        yield made


def rebuild(made: Shadow, *, progress: Progress = do_nothing, sizes: Sizes = USUAL) -> None:
    """Fill *made* from its own inbox, or from the events of the live one that have an outcome.

    Raises:
        NoRoomForFiles: the disk of the temporary folder is full.
    """
    try:
        _rebuild_at_once(made, progress, sizes)
    except (DatabaseAway, ProcessLost):
        raise
    except Exception as error:  # if one row is at fault, the projection parks only its event
        # Step by step no files are needed, but it would take many times as long, on a disk that is full.
        if isinstance(error, OSError) and error.errno in _NO_ROOM:
            raise NoRoomForFiles(error) from error
        if isinstance(error, (DBAPIError, database.DriverError)) and not database.is_fault_of_data(error):
            raise
        _log.warning("rebuild.step_by_step", reason=type(error).__name__)
        _make_empty(made)
        seqs = _seqs(made)
        _fold_in_steps(made, [seqs[at : at + CATCH_UP_EVENTS] for at in range(0, len(seqs), CATCH_UP_EVENTS)], progress)
        _take_over_attempts(made)


@contextmanager
def refolded(engine: Engine, *, seed: int, progress: Progress = do_nothing) -> Iterator[Shadow]:
    """Let the projection fold the inbox in an order drawn from *seed*, yield the tables it made, then drop them."""
    chance = random.Random(seed)  # noqa: S311 - an order to be repeated, not a secret
    with shadow.shadow(engine) as made:
        _make_empty(made)
        seqs = _seqs(made)
        chance.shuffle(seqs)
        batches = []
        while seqs:
            batches.append([seqs.pop() for _ in range(min(len(seqs), chance.randint(1, projection.FOLD_BATCH_MAX)))])
        _fold_in_steps(made, batches, progress)
        yield made


def record(
    made: Shadow,
    paths: Sequence[str],
    *,
    account: str,
    now: datetime,
    refuse: Callable[[Entry], None],
    secrets: Sequence[SigningSecret] = (),
) -> int:
    """Record the logs at *paths* in the inbox of *made*, and return how many of their entries could not be read.

    *account* stands for events that name none. *refuse* is called with each entry that cannot be read. A signature
    counts where one of *secrets* verifies it.
    """
    refused = 0
    with database.transaction(made.within) as connection, database.cursor(connection) as cursor:
        names = accounts.names(cursor)
    for path in paths:
        entries = log_reader.read(path, account=account, now=now, secrets=secrets, names=names)
        while chunk := list(islice(entries, RECORD_ROWS_MAX)):
            deliveries = [entry.delivery for entry in chunk if entry.delivery is not None]
            with database.transaction(made.within) as connection, database.cursor(connection) as cursor:
                inbox.record(cursor, deliveries)
            for entry in chunk:
                if entry.delivery is None:
                    refused += 1
                    refuse(entry)
    return refused


def catch_up(made: Shadow) -> int:
    """Fold the events that the live tables have folded since *made* was filled, and return how many those were."""
    with database.transaction(made.engine) as connection, database.cursor(connection) as cursor:
        archived.leave_out(cursor, made)
        seqs = lacking(cursor, made)
    _fold_in_steps(made, [seqs[at : at + CATCH_UP_EVENTS] for at in range(0, len(seqs), CATCH_UP_EVENTS)], do_nothing)
    _take_over_attempts(made)
    return len(seqs)


def lacking(cursor: Cursor, made: Shadow) -> list[int]:
    """Return the events to which the live tables gave an outcome that *made* does not have.

    Events of objects that are left out are not among them (see ``archived.leave_out``): not all of these events can be
    folded.
    """
    cursor.execute(
        sql.SQL(
            """
            SELECT o.seq FROM {live} AS o JOIN {inbox} AS i USING (seq) LEFT JOIN {made} AS m USING (seq)
            WHERE (m.seq IS NULL OR m.attempts <> o.attempts)
                AND (EXISTS (SELECT FROM {payloads} AS b WHERE b.seq = o.seq)
                    OR EXISTS (SELECT FROM {archived} AS b WHERE b.seq = o.seq))
                AND NOT EXISTS (SELECT FROM {left_out} AS l
                    WHERE (l.account, l.livemode, l.object_id) = (i.account, i.livemode, i.object_id))
                AND NOT EXISTS (SELECT FROM {left_out} AS l JOIN {mentions} AS n USING (account, livemode, object_id)
                    WHERE n.seq = o.seq)
            ORDER BY o.seq
            """
        ).format(
            live=sql.Identifier(made.live, "outcomes"),
            made=sql.Identifier(made.schema, "outcomes"),
            archived=sql.Identifier(made.schema, "archived"),
            left_out=sql.Identifier(made.schema, "left_out"),
            **{name: sql.Identifier(made.live, name) for name in ("inbox", "payloads", "mentions")},
        )
    )
    return [seq for (seq,) in cursor.fetchall()]


def _take_over_attempts(made: Shadow) -> None:
    with database.transaction(made.engine) as connection, database.cursor(connection) as cursor:
        take_over_attempts(cursor, made)


def take_over_attempts(cursor: Cursor, made: Shadow) -> None:
    """Copy into the outcomes of *made* when the live tables folded each event, and after how many attempts."""
    cursor.execute(
        sql.SQL(
            "UPDATE {made} AS m SET attempts = o.attempts, folded_at = o.folded_at FROM {live} AS o"
            " WHERE o.seq = m.seq AND (m.attempts, m.folded_at) IS DISTINCT FROM (o.attempts, o.folded_at)"
        ).format(live=sql.Identifier(made.live, "outcomes"), made=sql.Identifier(made.schema, "outcomes"))
    )


def _make_empty(made: Shadow) -> None:
    with database.transaction(made.engine) as connection, database.cursor(connection) as cursor:
        shadow.make_empty(cursor, made)


def _seqs(made: Shadow) -> list[int]:
    with database.transaction(made.within) as connection, database.cursor(connection) as cursor:
        # The live tables do not include events that are only pending.
        cursor.execute(
            sql.SQL("SELECT seq FROM inbox WHERE {} ORDER BY seq").format(
                sql.SQL("true")
                if made.has_inbox
                else sql.SQL("seq IN (SELECT seq FROM {} JOIN payloads USING (seq))").format(
                    sql.Identifier(made.live, "outcomes")
                )
            )
        )
        return [seq for (seq,) in cursor.fetchall()]


def _fold_in_steps(made: Shadow, batches: Sequence[Sequence[int]], progress: Progress) -> None:
    total, folded = sum(map(len, batches)), 0
    for batch in batches:
        with database.transaction(made.within) as connection, database.cursor(connection) as cursor:
            queue(cursor, batch)
        projection.fold_pending(made.within)
        folded += len(batch)
        progress("Folding", folded, total)


def queue(cursor: Cursor, seqs: Sequence[int]) -> None:
    """Queue *seqs*, so that the projection folds them again, in the schema where *cursor* looks first."""
    # When an operator's decision about an event is folded, it queues that event, which may be one of *seqs*.
    cursor.execute(
        "INSERT INTO pending (seq, again) SELECT unnest(%s::bigint[]), true ON CONFLICT DO NOTHING", (list(seqs),)
    )


# ---- At once ----


@dataclass(frozen=True, slots=True)
class _Job:
    """What every process needs; *ignored* maps each event that an operator ignored to the reason."""

    url: str
    path: tuple[str, ...]
    live: str
    snapshot: str
    has_inbox: bool
    has_archive: bool
    ignored: Mapping[Key, str]
    folder: Path
    events: int
    files: int
    parts: int
    now: datetime


def _rebuild_at_once(made: Shadow, progress: Progress, sizes: Sizes) -> None:
    with (
        _folder() as folder,
        database.transaction(made.within, may_idle=True) as reading,
        database.cursor(reading) as reader,
        ExitStack() as opened,
    ):
        database.take_snapshot(reader)
        opened.enter_context(shadow.being_filled(made, reader))
        # A snapshot does not protect from TRUNCATE. This lock keeps archiving out until all is read.
        reader.execute("LOCK TABLE payloads IN ACCESS SHARE MODE")
        ranges, job = _planned(reader, made, folder, sizes)
        with _crew(job, sizes) as crew:
            judged = _shown(crew.each(_judge_range, ranges), progress, "Reading events", len(ranges))
            _load(made, _OF_EVENTS, judged)
            early = [crew.begin(_execute, [each]) for each in shadow.indexes(reader, made, _OF_EVENTS)]
            joined = _shown(crew.each(_join_file, range(job.files)), progress, "Joining", job.files)
            _load(made, tables.PROJECTIONS, joined)
            late = [[each] for each in shadow.indexes(reader, made, tables.PROJECTIONS)]
            keys = shadow.keys(reader, made)
            for _ in _shown(crew.each(_execute, late), progress, "Making indexes", len(late)):
                pass
            for done in early:
                done.result()
            for _ in crew.each(_execute, keys):
                pass
    with database.transaction(made.engine, may_idle=True) as writing, database.cursor(writing) as writer:
        shadow.make_view(writer, made)
        # An order and its charges may have been joined in different files.
        writer.execute(made.path())
        projection.settle_all(writer, now=job.now)


FOLDER_PREFIX: Final = "payfold-rebuild-"
_LOCK: Final = "lock"


@contextmanager
def _folder() -> Iterator[Path]:
    """Yield a folder for the files of a rebuild, and remove it at the end. Those of killed rebuilds are removed now."""
    for left in Path(tempfile.gettempdir()).glob(f"{FOLDER_PREFIX}*"):
        with suppress(OSError), (left / _LOCK).open() as held:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=FOLDER_PREFIX) as name, (Path(name) / "new").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        # It gets its name when it is locked, so that no one takes this folder for one that is left.
        (Path(name) / "new").rename(Path(name) / _LOCK)
        yield Path(name)


_OF_EVENTS: Final = (tables.mentions, tables.outcomes)
"""The tables that are complete when all events are read."""


@contextmanager
def _crew(job: _Job, sizes: Sizes) -> Iterator[Crew]:
    try:
        with processes.crew(sizes.processes_for(job.events), _begin, job) as crew:
            yield crew
    finally:
        _end()


def _shown(parts: Iterable[Result], progress: Progress, step: str, total: int) -> Iterator[Result]:
    """Yield *parts*, and report how many of a *total* have been dealt with."""
    for at, part in enumerate(parts, 1):
        yield part
        progress(step, at, total)


def _load(made: Shadow, several: Sequence[Table], parts: Iterable[Mapping[str, Path]]) -> None:
    """Make *several* tables, and fill them from the files in *parts*."""
    with database.transaction(made.engine, may_idle=True) as writing, database.cursor(writing) as writer:
        shadow.make_tables(writer, made, several)
        for written in parts:
            _copy(writer, made, written)


def _planned(reader: Cursor, made: Shadow, folder: Path, sizes: Sizes) -> tuple[list[tuple[int, int]], _Job]:
    reader.execute("SELECT pg_export_snapshot(), min(seq), max(seq), count(*) FROM inbox")
    snapshot, first, last, count = reader.fetchone() or ("", None, None, 0)
    reader.execute(
        "SELECT DISTINCT ON (account, livemode, object_id) account, livemode, object_id, payload"
        " FROM inbox LEFT JOIN payloads USING (seq) WHERE type = %s ORDER BY account, livemode, object_id, seq",
        (EVENT_IGNORED,),
    )
    ignored = {(row[0], row[1], row[2]): reason_of(row[3]) for row in reader.fetchall()}
    parts = max(1, -(-count // sizes.per_part))
    files = min(sizes.files_max, parts)
    job = _Job(
        url=made.engine.url.render_as_string(hide_password=False),
        path=(made.schema, made.live) if made.has_inbox or made.has_archive else (made.live,),
        live=made.live,
        snapshot=snapshot,
        has_inbox=made.has_inbox,
        has_archive=made.has_archive,
        ignored=ignored,
        folder=folder,
        events=count,
        files=files,
        parts=-(-parts // files),
        now=datetime.now(UTC),
    )
    if first is None:
        return [], job
    # The numbers have gaps, since a duplicate uses one up.
    width = max(1, (last - first + 1) * sizes.per_task // max(count, 1))
    return [(at, min(at + width, last + 1)) for at in range(first, last + 1, width)], job


def _copy(writer: Cursor, made: Shadow, written: Mapping[str, Path]) -> None:
    """Copy the *written* files into their tables, and remove the files."""
    for name, path in written.items():
        table = sql.Identifier(made.schema, name)
        # FREEZE marks the rows as committed for all readers. PostgreSQL allows it, as this transaction made the table.
        frozen = sql.SQL("" if name == tables.anomalies.name else "FREEZE, ")
        columns = copy_rows.Form(tables.metadata.tables[name]).columns
        statement = sql.SQL("COPY {} ({}) FROM STDIN ({}{})").format(table, columns, frozen, copy_rows.FORMAT)
        with path.open("rb") as file, writer.copy(statement) as copy:
            while block := file.read(1024 * 1024):
                copy.write(block)
        path.unlink()


# ---- In each process ----

_JOB: _Job
_ENGINE: Engine | None = None


def _begin(job: _Job) -> None:
    # What a process begins with is the one thing that its tasks share.
    global _JOB, _ENGINE  # noqa: PLW0603
    _JOB = job
    _ENGINE = database.engine(job.url, connections_max=1)


def _end() -> None:
    """Close the connection of this process, if it did tasks itself."""
    global _ENGINE  # noqa: PLW0603 - see _begin
    if _ENGINE is not None:
        _ENGINE.dispose()
    _ENGINE = None


def _engine() -> Engine:
    assert _ENGINE is not None, "a task runs between _begin and _end"  # noqa: S101 - for the types alone
    return _ENGINE


def _execute(statements: Sequence[str]) -> None:
    with database.transaction(_engine()) as connection, database.cursor(connection) as cursor:
        # So that an index is not built on for a process that was ended.
        cursor.execute("SET LOCAL client_connection_check_interval = 1000")
        for statement in statements:
            cursor.execute(statement)


def _judge_range(bounds: tuple[int, int]) -> dict[str, Path]:
    """Judge the events numbered within *bounds*, keep their facts, and write their outcomes."""
    job = _JOB
    outcomes, mentions, anomalies = (
        _Rows(table, job.folder, f"read.{bounds[0]}") for table in (tables.outcomes, tables.mentions, tables.anomalies)
    )
    told: set[tuple[str, bool, str, int]] = set()
    spill = _Spill(job)
    with database.transaction(_engine(), may_idle=True) as connection:
        with database.cursor(connection) as cursor:
            database.take_snapshot(cursor)
            cursor.execute(sql.SQL("SET TRANSACTION SNAPSHOT {}").format(sql.Literal(job.snapshot)))
            path = sql.SQL(", ").join(map(sql.Identifier, job.path))
            cursor.execute(sql.SQL("SET LOCAL search_path = {}").format(path))
            # Copies that the live tables have not compared yet have no effect on them.
            copies = renderings.of_range(cursor, *bounds, with_fresh=job.has_inbox)
        driver = connection.connection.driver_connection
        with driver.cursor("events", binary=True) as rows:  # type: ignore[union-attr]  # the pool does not know the driver's type
            rows.itersize = ROWS_READ
            statement = sql.SQL(
                _OWN_EVENTS if job.has_inbox else _ARCHIVED_EVENTS if job.has_archive else _EVENTS
            ).format(
                columns=sql.SQL(_COLUMNS),
                outcomes=sql.Identifier(job.live, "outcomes"),
                payloads=sql.Identifier(job.live, "payloads"),
            )
            first, end = bounds
            rows.execute(
                statement,
                {"first": first, "end": end, "read": text_array(list(folds.FOLDS)), "copied": integer_array(copies)},
            )
            for row in rows:
                event = Event(*row[:10])
                if event.seq in copies:
                    choice = renderings.choose_with(copies.pop(event.seq), event.payload)
                    event = choice.chosen.event
                    for contradiction in contradictions(choice, job.now):
                        anomalies.add_row(contradiction)
                verdict = _verdict(job, event)
                reason = shortened(verdict.reason)
                folded_at = row[11] or job.now
                outcomes.add((event.seq, verdict.state, reason, row[10], folded_at, folds.FOLD_VERSION, verdict.cause))
                for one in verdict.facts:
                    source = one.subject.root or one.subject.id
                    spill.add(source, one)
                    if source != event.object_id:
                        told.add((event.account, event.livemode, source, event.seq))
    spill.flush()
    for mention in told:
        mentions.add(mention)
    return {**outcomes.written(), **mentions.written(), **anomalies.written()}


# Payloads that no fold reads stay where they are; only copies of one event are compared, of any type.
_COLUMNS: Final = """
i.seq, i.account, i.livemode, i.id, i.type, i.created, i.object_type, i.object_id,
CASE WHEN i.type = ANY (%(read)s::text[]) OR i.seq = ANY (%(copied)s::bigint[]) THEN b.payload ELSE '' END, i.source
"""
# The range is given for the payloads too, so that PostgreSQL reads, and waits for, no other partition of them.
_EVENTS: Final = """
SELECT {columns}, o.attempts, o.folded_at
FROM inbox AS i JOIN payloads AS b USING (seq) JOIN {outcomes} AS o USING (seq)
WHERE i.seq >= %(first)s AND i.seq < %(end)s AND b.seq >= %(first)s AND b.seq < %(end)s ORDER BY i.seq
"""
# If an archived payload has come back since, perhaps as another copy, the one that came back is used.
_ARCHIVED_EVENTS: Final = """
SELECT {columns}, o.attempts, o.folded_at
FROM inbox AS i JOIN {outcomes} AS o USING (seq)
    LEFT JOIN {payloads} AS p ON p.seq = i.seq AND p.seq >= %(first)s AND p.seq < %(end)s
    LEFT JOIN archived AS a ON a.seq = i.seq
    CROSS JOIN LATERAL (SELECT coalesce(p.payload, a.payload) AS payload) AS b
WHERE i.seq >= %(first)s AND i.seq < %(end)s AND b.payload IS NOT NULL ORDER BY i.seq
"""
_OWN_EVENTS: Final = """
SELECT {columns}, 1::smallint, NULL::timestamptz FROM inbox AS i JOIN payloads AS b USING (seq)
WHERE i.seq >= %(first)s AND i.seq < %(end)s AND b.seq >= %(first)s AND b.seq < %(end)s ORDER BY i.seq
"""


def _verdict(job: _Job, event: Event) -> folds.Verdict:
    reason = job.ignored.get((event.account, event.livemode, event.id)) if job.ignored else None
    return folds.judge(event) if reason is None else folds.ignored_by_operator(reason)


class _Spill:
    """Writes facts into the file of their object, in blocks; each block follows its length."""

    def __init__(self, job: _Job) -> None:
        self._job = job
        self._encode = msgspec.msgpack.Encoder().encode
        self._buffered: dict[tuple[int, int], list[Facts]] = defaultdict(list)
        self._count = 0

    def add(self, source: str, one: Facts) -> None:
        """Keep the facts *one* for the file of the object *source*."""
        part, number = divmod(zlib.crc32(source.encode(errors="surrogatepass")), self._job.files)
        self._buffered[number, part % self._job.parts].append(one)
        self._count += 1
        if self._count >= FACTS_BUFFERED_MAX:
            self.flush()

    def flush(self) -> None:
        for number, blocks in groupby(sorted(self._buffered), key=itemgetter(0)):
            with (self._job.folder / f"{number}.{os.getpid()}.facts").open("ab") as file:
                for key in blocks:
                    block = self._encode(self._buffered[key])
                    file.write(_HEAD.pack(key[1], len(block)))
                    file.write(block)
        self._buffered.clear()
        self._count = 0


_HEAD: Final = struct.Struct("<qq")
"""What a block begins with: its part, and the bytes that follow."""


_decode_facts: Final = msgspec.msgpack.Decoder(list[Facts]).decode


def _kept(paths: Iterable[Path], part: int) -> Iterator[Facts]:
    """Yield the facts of one *part* of the files *paths*."""
    for path in paths:
        with path.open("rb") as file:
            while head := file.read(_HEAD.size):
                of_part, length = _HEAD.unpack(head)
                if of_part == part:
                    yield from _decode_facts(file.read(length))
                else:
                    file.seek(length, os.SEEK_CUR)


def _join_file(number: int) -> dict[str, Path]:
    """Join all facts of the objects of one file, part by part, write their rows, and remove the file."""
    job = _JOB
    paths = list(job.folder.glob(f"{number}.*.facts"))
    rows = {table.name: _Rows(table, job.folder, f"joined.{number}") for table in _JOINED}
    written: dict[str, Path] = {}
    for part in range(job.parts):
        _join(_kept(paths, part), rows, job.now)
        for each in rows.values():
            written |= each.written()
    for path in paths:
        path.unlink()
    return written


_JOINED: Final = (*tables.PROJECTIONS, tables.anomalies)


def _join(kept: Iterable[Facts], rows: "Mapping[str, _Rows]", now: datetime) -> None:
    """Add to *rows* what the facts *kept* are joined to."""
    told: dict[Subject, list[Facts]] = defaultdict(list)
    for facts in kept:
        told[facts.subject].append(facts)
    for subject, own in told.items():
        spec = folds.ROW_SPECS[subject.table]
        joined = join.fold_all(spec, join.with_leader(spec, subject, told) if spec.leader else own)
        if joined is None:
            continue
        rows[spec.table].add_row(joined.row)
        for child in joined.children:
            rows[spec.child].add_row(child)
        for anomaly in anomaly_rows(subject, joined, now):
            rows[tables.anomalies.name].add_row(anomaly)


@cache
def _form(table: Table) -> copy_rows.Form:
    return copy_rows.Form(table)


class _Rows:
    """Collects the rows of one table that a *part* of the work makes, to be written into a file in COPY's format."""

    def __init__(self, table: Table, folder: Path, part: str) -> None:
        self._name = table.name
        self._path = folder / f"{part}.{table.name}"
        self._values_of = _form(table).values
        self._rows: list[Sequence[Any]] = []
        self.add = self._rows.append

    def add_row(self, row: Mapping[str, Any]) -> None:
        self._rows.append(self._values_of(row))

    def written(self) -> dict[str, Path]:
        """Add the rows to their file, and return the file by the table's name; nothing where there are none."""
        if not self._rows:
            return {}
        with self._path.open("ab") as file:
            file.write(copy_rows.lines(self._rows))
        self._rows.clear()
        return {self._name: self._path}
