"""The names of accounts: which were joined by ``payfold accounts rename``, and which labels would split one.

Note [What splits an account]
    An event that names no account is recorded under the label of the secret that verified it, an object that a job
    reads under the label of its key, and both under '' where there is no label. So a label that is given, changed or
    taken away splits an account in two, unless the names are joined. What can be known of it, with the labels of all
    secrets and keys taken under their newest names:

    - Events are under '', and no secret has no label: the endpoint that they came by was given one.
    - Deliveries are under a name that no secret is labelled with, and did not name it themselves (as those of
      connected accounts and of an organization's destination do): the label was changed or taken away.
    - A key has no label and every secret has one, or the other way round and no delivery ever came under the key's
      label while others came under '': what the key's jobs record is of another account than the deliveries.
    - A rename was begun and not ended.

    Two endpoints of two accounts, one with a label and one without, are no fault as long as both are configured.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Final

import structlog
from msgspec import Struct
from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError

from schemas import background, database, events, inbox
from schemas.database import Cursor
from schemas.errors import ConflictError, DatabaseAway, Refused
from schemas.settings import Settings

LOOKED_AT_MAX: Final = 1_000
"""Events of an account that are looked through for deliveries; there are many where all of them were replayed."""
COUNTED_MAX: Final = 100_000
"""Rows of an account and mode that are counted; where there are more, the count is not known."""
READ_MAX: Final = 20
"""Deliveries of an account that are read for the account that they name."""
DEFAULT_WORDS: Final = ("", "''", '""')
"""What the account without a name is called on a command line; quotes may be lost on their way there, or kept."""

_log = structlog.get_logger()


class Fault(Struct, frozen=True):
    """Something that would split an account: a *code* for programs, a sentence, and the *command* that mends it."""

    code: str
    detail: str
    command: str


def shown(account: str) -> str:
    """Return *account* as it is written in a command."""
    return account or "''"


def names(cursor: Cursor) -> dict[str, str]:
    """Return the newest name of each account by each of its old ones."""
    cursor.execute("SELECT old, new FROM account_names")
    return dict(cursor.fetchall())


def require_settled(cursor: Cursor) -> None:
    """Raise ConflictError where an account is being renamed, so that the inbox has a part of it under either name."""
    cursor.execute("SELECT old, new FROM account_names WHERE finished_at IS NULL")
    if unfinished := cursor.fetchone():
        old, new = map(shown, unfinished)
        raise ConflictError(
            f"The rename of {old} to {new} is not finished: wait for it, or end it with `{_command(old, new)}`."
        )


def known(cursor: Cursor) -> list[str]:
    """Return the accounts that the inbox holds, by one index entry for each."""
    cursor.execute(
        """
        WITH RECURSIVE each AS (
            SELECT min(account) AS account FROM inbox
            UNION ALL
            SELECT (SELECT min(i.account) FROM inbox AS i WHERE i.account > each.account) FROM each
            WHERE each.account IS NOT NULL
        )
        SELECT account FROM each WHERE account IS NOT NULL
        """
    )
    return [account for (account,) in cursor.fetchall()]


@dataclass(frozen=True, slots=True)
class Known:
    """An account and mode of the inbox, and its old names.

    The counts are None beyond ``COUNTED_MAX``. The times of the first and the last that was received are None where so
    many events of others were recorded before, or since.
    """

    account: str
    livemode: bool
    events: int | None
    orders: int | None
    first_received_at: datetime | None
    last_received_at: datetime | None
    renamed_from: list[str]


def overview(cursor: Cursor) -> list[Known]:
    """Return the accounts and modes that the inbox holds, for a bounded cost each."""
    renamed = names(cursor)
    found = []
    for account, livemode in ((account, livemode) for account in known(cursor) for livemode in (False, True)):
        values = {"account": account, "livemode": livemode, "limit": COUNTED_MAX}
        cursor.execute(_OVERVIEW, values)
        events, orders, first, last = cursor.fetchone() or (0, 0, None, None)
        if events and events > COUNTED_MAX:
            first, last = _at_the_ends(cursor, values)
        if events:
            old = sorted(old for old, new in renamed.items() if new == account)
            found.append(Known(account, livemode, _counted(events), _counted(orders), first, last, old))
    return found


def _counted(rows: int) -> int | None:
    return None if rows > COUNTED_MAX else rows


_OVERVIEW: Final = """
SELECT count(*), (
    SELECT count(*) FROM (
        SELECT FROM orders WHERE (account, livemode) = (%(account)s, %(livemode)s) LIMIT %(limit)s + 1
    ) AS counted
), min(received_at), max(received_at)
FROM (
    SELECT received_at FROM inbox WHERE (account, livemode) = (%(account)s, %(livemode)s) LIMIT %(limit)s + 1
) AS counted
"""


def _at_the_ends(cursor: Cursor, values: Mapping[str, object]) -> list[datetime | None]:
    """Return when the first and the last event was received, looking at so many of all events from either end."""
    found: list[datetime | None] = []
    for order in ("seq", "seq DESC"):
        cursor.execute(
            f"SELECT received_at FROM (SELECT * FROM inbox ORDER BY {order} LIMIT %(limit)s) AS near"
            f" WHERE (account, livemode) = (%(account)s, %(livemode)s) ORDER BY {order} LIMIT 1",
            values,
        )
        row = cursor.fetchone()
        found.append(row[0] if row else None)
    return found


def faults(cursor: Cursor, settings: Settings) -> list[Fault]:
    """Return what splits an account, or would: see Note [What splits an account]."""
    renamed = names(cursor)
    labels = sorted({renamed.get(secret.account, secret.account) for secret in settings.signing_secrets})
    keys = sorted({renamed.get(key.account, key.account) for key in settings.api_keys})
    return [*_unfinished(cursor), *(_of_secrets(cursor, labels) if labels else []), *_of_keys(cursor, labels, keys)]


def _unfinished(cursor: Cursor) -> list[Fault]:
    cursor.execute("SELECT old, new FROM account_names WHERE finished_at IS NULL ORDER BY old")
    return [
        Fault(
            "rename_unfinished",
            f"The rename of {shown(old)} to {shown(new)} did not come to its end, and nothing of either is folded.",
            _command(old, new),
        )
        for old, new in cursor.fetchall()
    ]


def _of_secrets(cursor: Cursor, labels: list[str]) -> list[Fault]:
    found = []
    for account in known(cursor):
        if account in labels or (account and not is_labelled(cursor, account)):
            continue
        how = "without an account" if account == "" else f"under the label {account}"
        new, which = _successor(cursor, labels)
        detail = (
            f"Events were recorded {how}, and no secret in STRIPE_WEBHOOK_SECRETS is so labelled any more: what"
            f" arrives now is recorded under {which}, and an order of both times is split in two. If it is another"
            " account, keep its secret configured."
        )
        found.append(Fault("label_splits", detail, _command(account, new)))
    return found


def _of_keys(cursor: Cursor, labels: list[str], keys: list[str]) -> list[Fault]:
    found = []
    if labels and "" in keys and "" not in labels:
        new, which = _successor(cursor, labels)
        detail = (
            "A key in STRIPE_API_KEY has no label, and every secret has one: what is read from Stripe is recorded"
            f" without an account, and what is delivered under {which}. Give the key the same label, or join the names."
        )
        found.append(Fault("key_label_splits", detail, _command("", new)))
    if labels == [""] and len(keys) == 1 and keys[0] and is_labelled(cursor, "") and not has_delivery(cursor, keys[0]):
        detail = (
            f"The key in STRIPE_API_KEY is labelled {keys[0]}, and the secret has no label: what is delivered is"
            f" recorded without an account, and what is read from Stripe under {keys[0]}. Give the secret the same"
            " label, and join the names."
        )
        found.append(Fault("key_label_splits", detail, _command("", keys[0])))
    return found


def _successor(cursor: Cursor, labels: list[str]) -> tuple[str, str]:
    """Return the label that the endpoint of a lost one has now, as far as it can be known, and in words."""
    candidates = labels if len(labels) == 1 else [label for label in labels if not has_delivery(cursor, label)]
    if len(candidates) == 1:
        return shown(candidates[0]), shown(candidates[0])
    return "NEW", f"one of {', '.join(map(shown, labels))} (NEW: only you know which)"


def _command(old: str, new: str) -> str:
    return f"payfold accounts rename {shown(old)} {shown(new)} --yes"


def has_delivery(cursor: Cursor, account: str) -> bool:
    """Return whether a delivery is among the first events of *account*."""
    return bool(_deliveries(cursor, account))


def is_labelled(cursor: Cursor, account: str) -> bool:
    """Return whether a delivery among the first events of *account* names no account itself."""
    return any(
        _own_name(payload) is None for payload in inbox.payloads_of(cursor, _deliveries(cursor, account)).values()
    )


def own_names(cursor: Cursor, account: str) -> set[str]:
    """Return the accounts that deliveries among the first events of *account* name themselves."""
    payloads = inbox.payloads_of(cursor, _deliveries(cursor, account)).values()
    return {name for name in map(_own_name, payloads) if name is not None}


def _deliveries(cursor: Cursor, account: str) -> list[int]:
    cursor.execute(
        "SELECT seq FROM (SELECT seq, source FROM inbox WHERE account = %s LIMIT %s) AS first"
        " WHERE source = 'webhook' LIMIT %s",
        (account, LOOKED_AT_MAX, READ_MAX),
    )
    return [seq for (seq,) in cursor.fetchall()]


def _own_name(payload: bytes) -> str | None:
    try:
        return events.read(payload).account
    except Refused:
        return None


def faults_here(settings: Settings) -> list[Fault]:
    """Return what splits an account in the database of these *settings*."""
    engine = database.engine(settings.postgresql, connections_max=1)
    try:
        with database.transaction(engine) as connection, database.cursor(connection) as cursor:
            return faults(cursor, settings)
    finally:
        engine.dispose()


def log_faults(of: Engine, settings: Settings) -> None:
    """Log what splits an account, once, in a thread: recording goes on all the same."""

    def look() -> None:
        try:
            with database.transaction(of, database.BATCH) as connection, database.cursor(connection) as cursor:
                found = faults(cursor, settings)
        except (DatabaseAway, DBAPIError, database.DriverError) as error:
            _log.warning("accounts.not_looked_at", reason=database.condition(error))
            return
        for fault in found:
            _log.error("accounts.split", code=fault.code, detail=fault.detail, command=fault.command)

    background.start("account-names", look)
