"""Reads the logs of a replay: chooses the wanted events, and hands them on by pieces that fit into memory."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from fnmatch import fnmatchcase
from typing import Final, TypeAlias

from sqlalchemy import Engine

from schemas import accounts, database
from schemas.inbox import RECORD_ROWS_MAX, Delivery
from schemas.progress import do_nothing
from schemas.settings import SigningSecret
from worker.folds.facts import utc
from worker.logs import reader
from worker.logs.reader import Entry

RECORD_BYTES_MAX: Final = 16 * 1024 * 1024
Counts: TypeAlias = Counter[str]
"""What a replay met.

``seen`` is the sum of ``filtered``, ``new``, ``newer``, ``mended``, ``duplicate`` and ``refused``. The sum of ``new``,
``newer`` and ``mended`` is that of ``folded``, ``ignored``, ``parked`` and ``pending``, which count their outcomes. A
copy counts as newer when it is now folded in place of another copy, and as mended when its event was parked and no
longer is.
"""


@dataclass(frozen=True, slots=True)
class LogFilters:
    """Which events of a log are wanted.

    Created from *since* up to but not at *until*, of a type like *type*, of one *account*, of one mode.
    """

    since: datetime | None = None
    until: datetime | None = None
    type: str | None = None
    account: str | None = None
    livemode: bool | None = None

    def wants(self, delivery: Delivery) -> bool:
        """Return whether *delivery* passes the filters."""
        envelope = delivery.envelope
        return (
            (self.since is None or utc(envelope.created) >= self.since)
            and (self.until is None or utc(envelope.created) < self.until)
            and (self.type is None or fnmatchcase(envelope.type, self.type))
            and (self.account is None or delivery.account == self.account)
            and (self.livemode is None or envelope.livemode == self.livemode)
        )


ALL_EVENTS: Final = LogFilters()


@dataclass(frozen=True, slots=True)
class Reading:
    """Which logs are read, and how that is reported.

    *filters* choose the events that are wanted, *account* stands for events that name none, and *now* is when events
    are received. *names* maps the old names of accounts to their newest, for the events and for the filter. *refuse* is
    called with each entry that cannot be read, *warn* with a text about anything odd in a file, and *progress* with how
    many entries were read so far, and how many bytes of the files since its last call. A signature counts where one of
    *secrets* verifies it.
    """

    paths: Sequence[str]
    now: datetime
    filters: LogFilters = ALL_EVENTS
    account: str = ""
    refuse: Callable[[Entry], None] = do_nothing
    progress: Callable[[int, int], None] = do_nothing
    warn: Callable[[str], None] = do_nothing
    names: Mapping[str, str] = field(default_factory=dict)
    secrets: Sequence[SigningSecret] = ()

    def named_as_in(self, engine: Engine) -> "Reading":
        """Return the same logs, with the names that accounts have in the database of *engine*."""
        with database.transaction(engine) as connection, database.cursor(connection) as cursor:
            names = accounts.names(cursor)
        account = None if self.filters.account is None else names.get(self.filters.account, self.filters.account)
        return replace(self, names=names, filters=replace(self.filters, account=account))

    def chunks(self, counts: Counts) -> Iterator[list[Delivery]]:
        """Yield the wanted deliveries of the logs, several at once, and count all entries."""
        wanted: list[Delivery] = []
        size = 0
        for entry in self._entries(counts):
            counts["seen"] += 1
            if entry.delivery is None:
                counts["refused"] += 1
                self.refuse(entry)
                continue
            delivery = entry.delivery.named(self.names)
            if self.filters.wants(delivery):
                wanted.append(delivery)
                size += len(delivery.envelope.payload)
            else:
                counts["filtered"] += 1
            if len(wanted) == RECORD_ROWS_MAX or size >= RECORD_BYTES_MAX:
                yield wanted
                self.progress(counts["seen"], 0)
                wanted, size = [], 0
        if wanted:
            yield wanted

    def _entries(self, counts: Counts) -> Iterator[Entry]:
        for path in self.paths:
            yield from reader.read(
                path,
                account=self.account,
                now=self.now,
                progress=lambda read: self.progress(counts["seen"], read),
                warn=self.warn,
                secrets=self.secrets,
                names=self.names,
            )
