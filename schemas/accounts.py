"""The names of accounts: which were joined by ``payfold accounts rename``, and which labels would split one.

Note [What splits an account]
    An event that names no account is recorded under the label of the secret that verified it, an object that a job
    reads under the label of its key, and both under '' where there is no label. So a label that is given, changed or
    taken away splits an account in two, unless the names are joined. These signs of a split can be found, with the
    labels of all secrets and keys taken under their newest names:

    - Events are under '', and no secret has no label: the endpoint that they came by was given one.
    - Deliveries are under a name that no secret is labelled with, and did not name it themselves (as those of
      connected accounts and of an organization's destination do): the label was changed or taken away.
    - Only what jobs read is under a name that is neither a secret's nor a key's: it was the label of a key.
    - A key has no label and every secret has one, or the other way round and no delivery ever came under the key's
      label while others came under '': what the key's jobs record is of another account than the deliveries.
    - A rename was begun and not ended.

    A name that does not begin as Stripe's names do was a label, even where the payloads of all its deliveries are
    archived. Any other name may be either then. It is reported, unless other accounts here name themselves: these are
    connected accounts, and some of them are silent for long.

    Two endpoints of two accounts, one with a label and one without, are no fault as long as both are configured.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Final

from msgspec import Struct

from schemas import background, database, events, inbox
from schemas.database import Cursor, text_array
from schemas.errors import ConflictError, DatabaseAway, Refused
from schemas.lines import log
from schemas.settings import Settings

if TYPE_CHECKING:
    from sqlalchemy import Engine

ACCOUNTS_LISTED_MAX: Final = 10_000
"""Accounts among which lost labels are looked for."""
ACCOUNTS_READ_MAX: Final = 1_000
"""Accounts of which deliveries are read, names that Stripe does not give first."""
LOOKED_AT_MAX: Final = 1_000
"""Events of an account that are looked through for deliveries; there are many where all of them were replayed."""
LOOKED_AT_TOGETHER_MAX: Final = 20_000
"""Events of all accounts together that are looked through."""
COUNTED_MAX: Final = 100_000
"""Rows of an account and mode that are counted; where there are more, the count is not known."""
READ_MAX: Final = 20
"""Deliveries of an account that are read for the account that they name."""
READ_TOGETHER_MAX: Final = 2_000
"""Deliveries of all accounts together that are read."""
OWN_PREFIX: Final = "acct_"
"""How Stripe's own names of accounts begin."""
DEFAULT_WORDS: Final = ("", "''", '""')
"""What the account without a name is called on a command line; quotes may be lost on their way there, or kept."""


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


# By one index entry for each account.
_ACCOUNTS: Final = """
WITH RECURSIVE each AS (
    SELECT min(account) AS account FROM inbox
    UNION ALL
    SELECT (SELECT min(i.account) FROM inbox AS i WHERE i.account > each.account) FROM each
    WHERE each.account IS NOT NULL
)
"""


def known(cursor: Cursor, *, limit: int | None = None) -> list[str]:
    """Return the accounts that the inbox holds, the first *limit* or all."""
    cursor.execute(f"{_ACCOUNTS} SELECT account FROM each WHERE account IS NOT NULL LIMIT %s", (limit,))
    return [account for (account,) in cursor.fetchall()]


def worlds(cursor: Cursor, *, limit: int) -> list[tuple[str, bool]]:
    """Return the accounts and modes that the inbox holds events of, live ones first, of the first *limit* accounts."""
    cursor.execute(
        f"{_ACCOUNTS}, chosen AS (SELECT account FROM each WHERE account IS NOT NULL LIMIT %s)"
        " SELECT chosen.account, mode.livemode FROM chosen CROSS JOIN (VALUES (true), (false)) AS mode (livemode)"
        # By the order one look at the index is enough; with EXISTS alone, or without the order, all may be read.
        " CROSS JOIN LATERAL (SELECT i.id FROM inbox AS i"
        " WHERE (i.account, i.livemode) = (chosen.account, mode.livemode) ORDER BY i.id LIMIT 1) AS event"
        " ORDER BY mode.livemode DESC, chosen.account",
        (limit,),
    )
    return [(account, livemode) for account, livemode in cursor.fetchall()]


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
    """Return what splits an account, or would, for a bounded cost: see Note [What splits an account]."""
    renamed = names(cursor)
    labels = sorted({renamed.get(secret.account, secret.account) for secret in settings.signing_secrets})
    keys = sorted({renamed.get(key.account, key.account) for key in settings.api_keys})
    found = _unfinished(cursor)
    if labels:
        lost = [account for account in known(cursor, limit=ACCOUNTS_LISTED_MAX) if account not in labels]
        # The accounts beyond the limit, which are not read, are connected accounts, as there may be thousands of them.
        lost.sort(key=lambda account: account.startswith(OWN_PREFIX))
        seen = look(cursor, [*labels, *keys, "", *lost][:ACCOUNTS_READ_MAX])
        found += [*_of_secrets(labels, keys, lost, seen), *_of_keys(labels, keys, seen)]
    return found


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


def _of_secrets(labels: list[str], keys: list[str], lost: list[str], seen: "Mapping[str, Seen]") -> list[Fault]:
    found = []
    new, which = _successor(labels, seen)
    were_labels = {each for each in lost if _was_label(each, keys, seen)}
    for account in sorted(were_labels):
        how = f"under the label {account}" if account else "without an account"
        detail = (
            f"Events were recorded {how}, and no secret in STRIPE_WEBHOOK_SECRETS is so labelled any more: what"
            f" arrives now is recorded under {which}, and an order of both times is split in two. {_KEPT}"
        )
        found.append(Fault("label_splits", detail, _command(account, new)))
    unknown = [each for each in lost if not seen.get(each, NOT_SEEN).is_known and each not in were_labels]
    if unknown and not any(each.own for each in seen.values()):
        more = f" and {len(unknown) - 1:,} more accounts" if len(unknown) > 1 else ""
        detail = (
            f"Events were recorded under {unknown[0]}{more}, and no secret in STRIPE_WEBHOOK_SECRETS is so labelled."
            " Whether that was a label or the name of a connected account is not known, since their payloads are"
            f" archived. If it was a label, what arrives now is recorded under {which}, and an order of both times is"
            f" split in two. {_KEPT}"
        )
        found.append(Fault("label_splits", detail, _command(unknown[0], new)))
    return found


_KEPT: Final = "If it is another account, keep its secret configured."


def _was_label(account: str, keys: list[str], seen: "Mapping[str, Seen]") -> bool:
    """Return whether the events under *account* are known not to name it themselves."""
    its = seen.get(account, NOT_SEEN)
    if account == "" or its.is_labelled:
        return True
    if account.startswith(OWN_PREFIX) or account not in seen:
        return False
    return not its.is_known or not (its.has_delivery or account in keys)


def _of_keys(labels: list[str], keys: list[str], seen: "Mapping[str, Seen]") -> list[Fault]:
    found = []
    if "" in keys and "" not in labels:
        new, which = _successor(labels, seen)
        detail = (
            "A key in STRIPE_API_KEY has no label, and every secret has one: what is read from Stripe is recorded"
            f" without an account, and what is delivered under {which}. Give the key the same label, or join the names."
        )
        found.append(Fault("key_label_splits", detail, _command("", new)))
    unlabelled = seen.get("", NOT_SEEN)
    is_alone = labels == [""] and len(keys) == 1 and keys[0] != ""
    may_be_split = unlabelled.is_labelled or not unlabelled.is_known
    if is_alone and may_be_split and not seen.get(keys[0], NOT_SEEN).has_delivery:
        detail = (
            f"The key in STRIPE_API_KEY is labelled {keys[0]}, and the secret has no label: what is delivered is"
            f" recorded without an account, and what is read from Stripe under {keys[0]}. Give the secret the same"
            " label, and join the names."
        )
        found.append(Fault("key_label_splits", detail, _command("", keys[0])))
    return found


def _successor(labels: list[str], seen: "Mapping[str, Seen]") -> tuple[str, str]:
    """Return the label that the endpoint of a lost label has now, as far as it can be known, and the same in words."""
    unused = [label for label in labels if not seen.get(label, NOT_SEEN).has_delivery]
    candidates = labels if len(labels) == 1 else unused
    if len(candidates) == 1:
        return shown(candidates[0]), shown(candidates[0])
    return "NEW", f"one of {', '.join(map(shown, labels))} (NEW: only you know which)"


def _command(old: str, new: str) -> str:
    return f"payfold accounts rename {shown(old)} {shown(new)} --yes"


class Seen(Struct, frozen=True):
    """What was found in the newest deliveries of an account that could be read.

    They name the accounts *own* themselves, and one that names none *is_labelled*. *archived* are numbers of
    deliveries, given where none could be read.
    """

    own: frozenset[str] = frozenset()
    is_labelled: bool = False
    archived: tuple[int, ...] = ()

    @property
    def is_known(self) -> bool:
        """Whether a delivery could be read, or there is none."""
        return not self.archived

    @property
    def has_delivery(self) -> bool:
        """Whether there is a delivery."""
        return bool(self.own or self.is_labelled or self.archived)


NOT_SEEN: Final = Seen()


def look(cursor: Cursor, accounts: Sequence[str]) -> dict[str, Seen]:
    """Return what deliveries of each of *accounts* name, for a cost that is bounded for all together."""
    each = dict.fromkeys(accounts)
    values = {
        "accounts": text_array(list(each)),
        "near": LOOKED_AT_MAX,
        "ends": min(LOOKED_AT_MAX, LOOKED_AT_TOGETHER_MAX // max(len(each), 1)) // 2,
        "read": min(READ_MAX, READ_TOGETHER_MAX // max(len(each), 1)),
    }
    cursor.execute(_DELIVERIES, values)
    readable, archived = defaultdict[str, list[int]](list), defaultdict[str, list[int]](list)
    for account, seq, is_readable in cursor.fetchall():
        (readable if is_readable else archived)[account].append(seq)
    payloads = inbox.payloads_of(cursor, [seq for seqs in readable.values() for seq in seqs])
    return {account: _seen(payloads, readable[account], archived[account]) for account in each}


def _seen(payloads: Mapping[int, bytes], readable: Sequence[int], archived: Sequence[int]) -> Seen:
    if not readable:
        return Seen(archived=tuple(archived))
    found = {_own_name(payloads[seq]) for seq in readable if seq in payloads}
    return Seen(frozenset(name for name in found if name is not None), None in found)


# The events of an account are found by the inbox's key alone. The oldest and the newest of Stripe's ids are at the ends
# of that key. Our own observations may be there as well, so the newest of all events are looked at too. A payload is
# one probe of an index, no matter what the planner estimates: see the Note on that in worker/folding/rows.py.
_DELIVERIES: Final = """
WITH given AS MATERIALIZED (SELECT unnest(%(accounts)s::text[]) AS account), found AS (
    SELECT given.account, ends.seq FROM given CROSS JOIN LATERAL (
        (SELECT seq, source FROM inbox WHERE account = given.account ORDER BY account, livemode, id LIMIT %(ends)s)
        UNION ALL
        (SELECT seq, source FROM inbox WHERE account = given.account
            ORDER BY account DESC, livemode DESC, id DESC LIMIT %(ends)s)
    ) AS ends WHERE source = 'webhook'
    UNION
    SELECT account, seq FROM (SELECT account, seq, source FROM inbox ORDER BY seq DESC LIMIT %(near)s) AS near
    JOIN given USING (account) WHERE source = 'webhook'
), ranked AS (
    SELECT account, seq, is_readable,
        row_number() OVER (PARTITION BY account ORDER BY is_readable DESC, seq DESC) AS place
    FROM (
        SELECT *, coalesce((SELECT true FROM payloads AS b WHERE b.seq = found.seq), false) AS is_readable FROM found
    ) AS each
)
SELECT account, seq, is_readable FROM ranked WHERE place <= %(read)s
"""


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


def log_faults(of: "Engine", settings: Settings) -> None:
    """Log what splits an account, once, in a thread: recording goes on all the same."""

    def look() -> None:
        try:
            with database.transaction(of, database.BATCH) as connection, database.cursor(connection) as cursor:
                found = faults(cursor, settings)
        except (DatabaseAway, database.DriverError) as error:
            log.warning("accounts.not_looked_at", reason=database.condition(error))
            return
        for fault in found:
            log.error("accounts.split", code=fault.code, detail=fault.detail, command=fault.command)

    background.start("account-names", look)
