"""Records the first import of a history, whose changes are kept from the feed.

Note [What is withheld was never to be seen]
    The first import of an old shop's history would announce to its consumers every order that it ever had. With
    *withhold* the changes that the import makes are kept for the record, and hidden from the feed. Each step therefore
    records and folds in one transaction, during which no one else folds: otherwise a worker could find a recorded
    event pending, fold it, and announce the change. Changes by webhooks that arrive during the import, and are folded
    with it, are announced as usual.
"""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Final

from sqlalchemy import Engine

from schemas import accounts, database, inbox
from schemas.database import Cursor
from schemas.errors import ConflictError, Transient
from schemas.events import Key
from schemas.inbox import Delivery, Receipt
from schemas.locks import keep_others_from_folding
from worker.folding import projection, renderings
from worker.folding.batch import Claimed
from worker.folding.claim import claim
from worker.folding.rows import probe_indexes
from worker.logs.recording import EventFolder, Recording


class FirstImport(Recording):
    """Records deliveries and folds them, and keeps the changes that this makes from the feed."""

    def __init__(self, engine: Engine, now: datetime, folder: EventFolder) -> None:
        super().__init__(engine, now, folder)
        # Observations of the log. Nothing else distinguishes them from observations made during the import.
        self._observed: set[Key] = set()
        self._names: Mapping[str, str] = {}
        with database.transaction(engine) as connection, database.cursor(connection) as cursor:
            accounts.require_settled(cursor)
            cursor.execute("SELECT EXISTS (SELECT FROM changes WHERE withheld IS NULL)")
            if cursor.fetchone() != (False,):
                raise ConflictError(
                    "Changes have been announced here, so this is no first import: a consumer that wants none of"
                    " history's starts its cursor after them. Nothing was recorded."
                )

    def take(self, deliveries: Sequence[Delivery]) -> list[str]:
        """Record and fold *deliveries*, and remember the log's observations, even those that the inbox has already."""
        observed = (each.named(self._names) for each in deliveries if each.source == "observation")
        self._observed.update(each.key for each in observed)
        return super().take(deliveries)

    def _record(self, deliveries: Sequence[Delivery], *, is_again: bool = False) -> list[Receipt]:
        claimed: Sequence[Claimed] = ()
        copies, parked = list(self._copies), set(self._parked_before)
        try:
            with database.transaction(self._engine) as connection, database.cursor(connection) as cursor:
                probe_indexes(cursor)
                keep_others_from_folding(cursor)
                # Events that a rename holds back would be folded, and announced, by the worker that folds after it.
                accounts.require_settled(cursor)
                cursor.execute("SELECT coalesce(max(seq), 0) FROM changes")
                (last,) = cursor.fetchone() or (0,)
                receipts = inbox.record(cursor, deliveries)
                self._note_copies(cursor, deliveries, receipts)
                renderings.queue(cursor)
                while claimed := claim(cursor, limit=projection.FOLD_BATCH_MAX):
                    projection.project(cursor, claimed, now=self._now)
                self._withhold(cursor, last)
        except Exception as error:
            self._copies, self._parked_before = copies, parked
            # One event is at fault. It is looked for, since it alone is to be parked, and announces nothing.
            if isinstance(error, Transient) or not claimed or not projection.failure_of(error).is_of_data:
                raise
            half = len(deliveries) // 2
            if not half and not is_again:
                # Another pending event may be at fault, and is parked by this.
                self._folder.end()
                return self._record(deliveries, is_again=True)
            if not half:
                receipts = super()._record(deliveries)
                self._folder.end()  # before the next step meets it
                return receipts
            return [*self._record(deliveries[:half]), *self._record(deliveries[half:])]
        return receipts

    def _withhold(self, cursor: Cursor, last: int) -> None:
        """Withhold the changes numbered above *last* that came from the log's events."""
        names = accounts.names(cursor)
        if names != self._names:
            self._observed = {(names.get(account, account), mode, event) for account, mode, event in self._observed}
            self._names = names
        cursor.execute(_OBSERVED, (last,))
        others = [change for change, *event in cursor.fetchall() if tuple(event) not in self._observed]
        cursor.execute(_WITHHELD, (last, others))
        self.withheld.update(dict(cursor.fetchall()))


_OBSERVED: Final = """
SELECT seq, account, livemode, event_id FROM changes WHERE seq > %s AND source = 'observation'
"""
_WITHHELD: Final = """
WITH hidden AS (
    UPDATE changes SET withheld = 'import'
    WHERE seq > %s AND source IN ('replay', 'observation') AND NOT (seq = ANY (%s::bigint[])) RETURNING kind
)
SELECT kind, count(*) FROM hidden GROUP BY kind
"""
