"""Every table and view at rest. The migrations make them; a test holds the two against each other.

``tests/test_indexes.py`` names the query that each index serves, and shows that it does.

Note [The inbox is append-only]
    The envelope of an event is written once, into ``inbox``, and its bytes once, into ``payloads``. Neither is updated
    when the event is folded: a waiting event has a narrow row in ``pending``, which is deleted, and its outcome is a
    narrow row in ``outcomes``. ``events`` is the view over the four that people and commands read. The bytes may be
    archived (see Note [An archive loses nothing]); the envelope stays. The one exception is an event that came in
    copies with several contents: the copy that is folded stands in ``inbox``, the others in ``renderings``, and when
    another one is chosen the projection exchanges the two (see Note [One content is folded] in
    worker/folding/renderings.py).

Note [A one-shot is found by a hash]
    The ids of sessions are long and random, so each order that is opened or paid gets an entry of its own somewhere in
    the index that lets it happen only once. With the ids themselves that was the largest of the indexes with such
    entries, and seldom in memory as a whole. Two hashes, of 64 bits each, stand for mode, account, subject and id; a
    change would be lost only where both are those of another object. Who looks for changes compares the first of them,
    and then the columns.

Note [Events of an object are found by a hash]
    Every event has an entry for its object, and with account, mode and id it was the largest index of all, read from
    disk at most of its entries once there were millions. One hash of the id stands there now, and who looks for
    events compares it first (``of_object``). The columns are then compared in a way that no index serves: the key of
    the inbox begins with account and mode too, and without statistics PostgreSQL takes it for the better index, and
    reads all of an account.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    DateTime,
    Identity,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Numeric,
    PrimaryKeyConstraint,
    SmallInteger,
    Table,
    Text,
    false,
    text,
    true,
)
from sqlalchemy.dialects.postgresql import ARRAY, JSONB

from schemas import kinds
from schemas.kinds import Kind
from schemas.own_events import EVENT_IGNORED

metadata = MetaData()

SOURCES: Final = ("webhook", "replay", "gap", "observation")
OUTCOMES: Final = ("folded", "ignored", "parked")
STATES: Final = ("pending", *OUTCOMES)
PARKED_CAUSES: Final = (
    "fold_failed",
    "object_unexpected",
    "payload_archived",
    "payload_unreadable",
    "row_refused",
)
IGNORED_CAUSES: Final = ("set_aside", "thin_event", "type_unwanted")
PENDING_CAUSES: Final = ("database_refused", "database_busy", "machine_short")
"""Of a pending event that failed and is tried again."""
CAUSES: Final = (*PARKED_CAUSES, *IGNORED_CAUSES, *PENDING_CAUSES)
"""Why an event has the state that it has, for programs; its ``reason`` is for people."""
ORDER_STATUSES: Final = kinds.ORDER_STATUSES
REFUND_STATUSES: Final = ("none", "partial", "full")
CALL_PURPOSES: Final = ("expire", "session", "ledger", "credit_note", "object", "event")
RECONCILED: Final = ("ok", "drift", "incomplete")
"""Incomplete: no difference was found, and a part that was asked for could not be looked at."""
REQUEST_STATES: Final = ("waiting", "running", "failed", "done")
"""Of a reconciliation that was asked for."""
WITHHELD: Final = ("import", "fold_version", "rename", "rendering", "swap")
"""Why a change is not in the feed: history that became known or was folded again is no news."""
BEATS: Final = ("web", "clock", "fold", "consumer", "job")
"""The kinds of loop that write heartbeats."""
ANOMALY_SUBJECTS: Final = (
    "balance",
    "balance_transaction",
    "charge",
    "credit_note",
    "credit_note_line",
    "customer",
    "dispute",
    "event",
    "invoice",
    "invoice_payment",
    "order",
    "payment_intent",
    "payment_link",
    "portal_configuration",
    "portal_session",
    "refund",
)
"""The kinds of subject that an anomaly may be about."""
ANOMALY_KINDS: Final = (
    "ambiguous_order",
    "balance_differs",
    "broken_chain",
    "contents_differ",
    "credit_note_sides",
    "credit_note_split",
    "deleted_and_final",
    "expired_and_complete",
    "id_reused",
    "lines_differ",
    "missing_at_stripe",
    "paid_and_void",
    "released_and_captured",
    "two_references",
    "unknown_status",
)
ANOMALY_MEANINGS: Final[Mapping[str, str]] = {
    "ambiguous_order": (
        "Several of its events are of the same second, and nothing in them decides which came last, or how often a"
        " balance moved. Until something does, the row may be an older state than Stripe's, or list too many changes."
    ),
    "balance_differs": "The customer and the ledger that Stripe lists report different balances.",
    "broken_chain": (
        "A transaction of the ledger does not begin with the balance that the one before left: one between them is"
        " missing."
    ),
    "contents_differ": "One event was received with different contents of the same API version. One of them is used.",
    "credit_note_sides": "What the note took off the invoice and what it gave back do not add up to its amount.",
    "credit_note_split": "What the note gave back is not explained by its refunds and the credit on the balance.",
    "deleted_and_final": "An event reports the invoice as deleted, another as finalized. Only a draft can be deleted.",
    "expired_and_complete": "Events report the session both as expired and as completed. Only one can have happened.",
    "id_reused": "Different events were received under one id. One of them is used.",
    "lines_differ": "The lines that were listed last do not add up to the order's total, or have another currency.",
    "missing_at_stripe": "Stripe knows no such session in this account and mode, although it was reported here.",
    "paid_and_void": "Events report the invoice both as paid and as void. Only one can be final.",
    "released_and_captured": "Events report the held money both as released and as captured. The capture is believed.",
    "two_references": "Events name two different objects where only one can be, such as two customers of an order.",
    "unknown_status": "Stripe reports a status that this release does not know, so what follows from it is not known.",
}
"""What each kind of anomaly means, for people."""
STRIPE_JOBS: Final = ("expire_sessions", "poll_sessions", "fetch", "fill_gaps")


NEWEST: Final = "(COALESCE(created, '-infinity'::timestamp with time zone))"
"""Lists are sorted by this. An object without a creation time comes last."""


def key_name(key: Sequence[str]) -> str:
    """Return the one text that stands for *key*, the values of a row's key beyond its world, and for no other.

    An id alone is its own name. Of a balance it is the customer and the currency with a space between, where a space
    within one of them is written as %20.
    """
    if len(key) == 1:
        return key[0]
    return " ".join(value.replace("%", "%25").replace(" ", "%20") for value in key)


def key_of_name(name: str) -> list[str]:
    """Return the values of a key of several that ``key_name`` gave the *name*."""
    return [value.replace("%20", " ").replace("%25", "%") for value in name.split(" ")]


def _one_of(column: str, values: tuple[str, ...]) -> CheckConstraint:
    listed = ", ".join(f"'{value}'" for value in values)
    return CheckConstraint(f"{column} IN ({listed})", name=f"{column}_is_known")


def _moment(name: str, *, nullable: bool = True) -> Column[object]:
    return Column(name, DateTime(timezone=True), nullable=nullable)


def _of_one(table: str, column: str) -> Index:
    """Return the index that finds the rows of one other object."""
    return Index(f"{table}_{column}", "account", "livemode", column, postgresql_where=text(f"{column} IS NOT NULL"))


def _of_any_world(table: str, column: str) -> Index:
    """Return the index that finds rows by a name that people write down, which is seldom in several worlds."""
    return Index(f"{table}_{column}", column, postgresql_where=text(f"{column} IS NOT NULL"))


def _by_email(table: str, column: str) -> Index:
    """Return the index that finds rows by an email address in any case."""
    return Index(f"{table}_{column}", text(f"lower({column})"), postgresql_where=text(f"{column} IS NOT NULL"))


def _newest(table: str) -> Index:
    """Return the index by which lists page, newest first."""
    return Index(f"{table}_newest", text(f"{NEWEST} DESC"), text("id DESC"))


def _world() -> list[Column[object]]:
    """Return the columns that begin every key, so that test and live, or two accounts, never mix."""
    return [Column("account", Text, nullable=False), Column("livemode", Boolean, nullable=False)]


def _projection(name: str, *columns: Column[object] | CheckConstraint | Index, **options: Any) -> Table:  # noqa: ANN401 - SQLAlchemy's own
    """Return a table that only the projection writes."""
    return Table(
        name,
        metadata,
        *_world(),
        Column("id", Text, nullable=False),
        *columns,
        Column("event_id", Text, nullable=False),
        _moment("as_of", nullable=False),
        PrimaryKeyConstraint("account", "livemode", "id"),
        **options,
    )


# Of rows that later events update without touching an index. With room on its page, the new version of a row needs no
# index entries. An order's status, payment and email are indexed, so its updates always need them.
_UPDATED: Final[dict[str, Any]] = {"postgresql_with": {"fillfactor": 90}}

inbox = Table(
    "inbox",
    metadata,
    *_world(),
    Column("id", Text, nullable=False),
    Column("seq", BigInteger, Identity(always=True), nullable=False, unique=True),
    Column("type", Text, nullable=False),
    Column("api_version", Text),
    _moment("created", nullable=False),
    Column("object_type", Text),
    Column("object_id", Text),
    Column("redacted", ARRAY(Text), nullable=False),
    Column("payload_sha256", LargeBinary, nullable=False),
    Column("signature", Text),
    Column("source", Text, nullable=False),
    _moment("received_at", nullable=False),
    # False where the signature is only quoted by a log, and no secret of ours made it.
    Column("verified", Boolean, nullable=False, server_default=true()),
    _one_of("source", SOURCES),
    PrimaryKeyConstraint("account", "livemode", "id"),
    # When webhooks were received. The list of events, newest received first: all, of a type, or not from a webhook.
    Index("inbox_received", "received_at", "seq"),
    Index("inbox_type", "type", "received_at", "seq"),
    Index("inbox_source", "source", "received_at", "seq", postgresql_where=text("source <> 'webhook'")),
    # Refolding an object reads all its events. Most have a place of their own, so each page has room for some.
    Index(
        "inbox_object_hash",
        text("hashtextextended(object_id, 0)"),
        postgresql_with={"fillfactor": 70},
        postgresql_where=text("object_id IS NOT NULL"),
    ),
    # The clock looks for events that only name their object.
    Index("inbox_thin", "received_at", postgresql_where=text("type LIKE 'v_.%'")),
    # A claim asks of each event whether an operator has set it aside.
    Index(
        "inbox_set_aside",
        "account",
        "livemode",
        "object_id",
        postgresql_where=text(f"type = '{EVENT_IGNORED}'"),
    ),
)

# Apart from `inbox`, since the bytes of old events may be archived. `schemas.inbox` makes the partitions, by number.
payloads = Table(
    "payloads",
    metadata,
    Column("seq", BigInteger, primary_key=True, autoincrement=False),
    Column("payload", LargeBinary, nullable=False),
    postgresql_partition_by="RANGE (seq)",
)
# The hash of an archived payload's content (see schemas/contents.py), which stands for the payload.
contents = Table(
    "contents",
    metadata,
    Column("seq", BigInteger, primary_key=True, autoincrement=False),
    Column("content_sha256", LargeBinary, nullable=False),
)

# The copies of an event that have another content than the one in the inbox, and those that just arrived and are not
# compared yet.
renderings = Table(
    "renderings",
    metadata,
    *_world(),
    Column("id", Text, nullable=False),
    # Null until the fold has compared it.
    Column("content_sha256", LargeBinary),
    Column("type", Text, nullable=False),
    Column("api_version", Text),
    _moment("created", nullable=False),
    Column("object_type", Text),
    Column("object_id", Text),
    Column("redacted", ARRAY(Text), nullable=False),
    Column("payload_sha256", LargeBinary, nullable=False),
    Column("signature", Text),
    Column("source", Text, nullable=False),
    _moment("received_at", nullable=False),
    Column("verified", Boolean, nullable=False, server_default=true()),
    # Null where it was archived before another took its place.
    Column("payload", LargeBinary),
    _one_of("source", SOURCES),
    PrimaryKeyConstraint("account", "livemode", "id", "payload_sha256"),
    # What is to be compared.
    Index("renderings_fresh", "account", "livemode", "id", postgresql_where=text("content_sha256 IS NULL")),
)

pending = Table(
    "pending",
    metadata,
    Column("seq", BigInteger, primary_key=True, autoincrement=False),
    # True where the event had an outcome before, so that no result of it may be built upon.
    Column("again", Boolean, nullable=False, server_default=false()),
    # How often the event failed alone, without a fault in its data; with which error; and when it is tried again.
    Column("attempts", SmallInteger, nullable=False, server_default=text("0")),
    _moment("due_at"),
    Column("cause", Text),
    Column("reason", Text),
    # True where copies came, which are to be compared; without ``again`` the outcome stands unless another is chosen.
    Column("copies", Boolean, nullable=False, server_default=false()),
    _one_of("cause", CAUSES),
)

mentions = Table(
    "mentions",
    metadata,
    *_world(),
    # An object that an event of another object is about as well, as a balance transaction is about its customer.
    Column("object_id", Text, nullable=False),
    Column("seq", BigInteger, nullable=False),
    PrimaryKeyConstraint("account", "livemode", "object_id", "seq"),
)

outcomes = Table(
    "outcomes",
    metadata,
    Column("seq", BigInteger, primary_key=True, autoincrement=False),
    Column("state", Text, nullable=False),
    Column("reason", Text),
    Column("attempts", SmallInteger, nullable=False),
    _moment("folded_at", nullable=False),
    Column("fold_version", Integer, nullable=False),
    # The code of *reason*, one of ``CAUSES``; null where it was folded, and where a release before kept none.
    Column("cause", Text),
    _one_of("state", OUTCOMES),
    _one_of("cause", CAUSES),
    # The clock looks for outcomes of an older fold version.
    Index("outcomes_fold_version", "fold_version", "seq"),
    # How much is parked, and what waits for an archive.
    Index("outcomes_parked", "seq", postgresql_where=text("state = 'parked'")),
    # The list of ignored events, which are few where an endpoint's types were chosen.
    Index("outcomes_ignored", "seq", postgresql_where=text("state = 'ignored'")),
)

# Orders and credit notes that another transaction held while their charges or refunds changed, until they are settled:
# see worker/folding/settling.py.
unsettled = Table(
    "unsettled",
    metadata,
    *_world(),
    Column("id", Text, nullable=False),
    # Why the change that this makes is not in the feed.
    Column("withheld", Text),
    _one_of("withheld", WITHHELD),
    PrimaryKeyConstraint("account", "livemode", "id"),
)

stripe_calls = Table(
    "stripe_calls",
    metadata,
    *_world(),
    # The call to make at Stripe, and the object that it is for.
    Column("purpose", Text, nullable=False),
    Column("object_id", Text, nullable=False),
    Column("object_type", Text, nullable=False),
    Column("lane", SmallInteger, nullable=False),
    _moment("asked_at", nullable=False),
    _moment("due_at", nullable=False),
    # Attempts with an unknown outcome, or without an answer.
    Column("attempts", SmallInteger, nullable=False, server_default=text("0")),
    # Until then one worker has the call. A worker that takes it after that must find out what the first one did.
    _moment("leased_until"),
    # Why it is not tried again.
    Column("given_up", Text),
    _one_of("purpose", CALL_PURPOSES),
    PrimaryKeyConstraint("account", "livemode", "purpose", "object_id"),
    # A worker takes what is due, by lane.
    Index("stripe_calls_due", "lane", "due_at", postgresql_where=text("given_up IS NULL")),
)

stripe_jobs = Table(
    "stripe_jobs",
    metadata,
    *_world(),
    Column("job", Text, nullable=False),
    # How far the job has come: a time at Stripe, or a number of the change feed.
    _moment("reached_at"),
    Column("reached_seq", BigInteger),
    _moment("leased_until"),
    _moment("done_at"),
    # Why Stripe refused the job, and when it is tried again.
    Column("stopped", Text),
    _moment("stopped_until"),
    # How many events or objects the job found that no delivery had brought.
    Column("found", BigInteger, nullable=False, server_default=text("0")),
    # Since when no round of it has ended well, and why; see Note [What ended a job is kept].
    _moment("failed_at"),
    Column("failure", Text),
    _one_of("job", STRIPE_JOBS),
    PrimaryKeyConstraint("account", "livemode", "job"),
)

heartbeats = Table(
    "heartbeats",
    metadata,
    Column("kind", Text, nullable=False),
    # Of a consumer its queue, of a job its name, else empty.
    Column("name", Text, nullable=False),
    # The process that wrote it.
    Column("instance", Text, nullable=False),
    _moment("at", nullable=False),
    # When this process began to write it.
    _moment("since", nullable=False),
    # Of a job, how it ended.
    Column("outcome", Text),
    _one_of("kind", BEATS),
    PrimaryKeyConstraint("kind", "name", "instance"),
    # Rewritten every few seconds, in place.
    postgresql_with={"fillfactor": 50},
)

delivery_counts = Table(
    "delivery_counts",
    metadata,
    Column("outcome", Text, nullable=False),
    # Why the delivery was refused, else empty.
    Column("reason", Text, nullable=False),
    Column("count", BigInteger, nullable=False),
    _moment("since", nullable=False),
    _moment("last_at", nullable=False),
    PrimaryKeyConstraint("outcome", "reason"),
    postgresql_with={"fillfactor": 50},
)

account_names = Table(
    "account_names",
    metadata,
    Column("old", Text, primary_key=True),
    Column("new", Text, nullable=False),
    _moment("renamed_at", nullable=False),
    # Null until all that was recorded under the old name is under the new one.
    _moment("finished_at"),
    CheckConstraint("old <> new", name="names_differ"),
)

orders = _projection(
    "orders",
    Column("status", Text),
    Column("session_status", Text),
    Column("payment_status", Text),
    Column("mode", Text),
    Column("currency", Text),
    Column("amount_subtotal", BigInteger),
    Column("amount_discount", BigInteger),
    Column("amount_shipping", BigInteger),
    Column("amount_tax", BigInteger),
    Column("amount_total", BigInteger),
    Column("presentment_currency", Text),
    Column("presentment_amount", BigInteger),
    Column("customer", Text),
    Column("customer_email", Text),
    Column("client_reference_id", Text),
    Column("payment_link", Text),
    Column("payment_intent", Text),
    Column("subscription", Text),
    Column("invoice", Text),
    Column("recovered_from", Text),
    Column("recovery_url", Text),
    Column("shipping", JSONB(none_as_null=True)),
    Column("metadata", JSONB(none_as_null=True)),
    _moment("created"),
    _moment("expires_at"),
    _moment("completed_at"),
    _moment("paid_at"),
    _moment("failed_at"),
    _moment("expired_at"),
    Column("lines_complete", Boolean, nullable=False, server_default=false()),
    _one_of("status", ORDER_STATUSES),
    _newest("orders"),
    Index("orders_status", "status", text(f"{NEWEST} DESC"), text("id DESC")),
    # The clock looks for sessions that have been open for too long.
    Index("orders_open", "account", "livemode", "created", postgresql_where=text("status = 'open'")),
    # Orders of which their session leaves open whether they are paid, found by their charges.
    Index(
        "orders_undecided",
        "account",
        "livemode",
        "payment_intent",
        postgresql_where=text(
            "session_status = 'complete' AND payment_intent IS NOT NULL"
            " AND (payment_status IS NULL OR payment_status = 'unpaid')"
        ),
    ),
    _of_one("orders", "payment_link"),
    _of_one("orders", "customer"),
    _of_one("orders", "payment_intent"),
    _of_one("orders", "invoice"),
    # A person finds an order by the shop's own key, by its buyer, and by its amount, the newest first.
    _of_any_world("orders", "client_reference_id"),
    _by_email("orders", "customer_email"),
    Index("orders_amount", "currency", "amount_total", text(NEWEST)),
)

payment_links = _projection(
    "payment_links",
    Column("active", Boolean),
    Column("url", Text),
    Column("currency", Text),
    Column("metadata", JSONB(none_as_null=True)),
    _moment("created"),
)

order_lines = _projection(
    "order_lines",
    Column("order_id", Text),
    Column("description", Text),
    Column("price", Text),
    Column("product", Text),
    Column("quantity", BigInteger),
    Column("currency", Text),
    Column("amount_subtotal", BigInteger),
    Column("amount_discount", BigInteger),
    Column("amount_tax", BigInteger),
    Column("amount_total", BigInteger),
    _of_one("order_lines", "order_id"),
)

customers = _projection(
    "customers",
    Column("email", Text),
    Column("name", Text),
    Column("currency", Text),
    Column("delinquent", Boolean),
    Column("deleted", Boolean, nullable=False, server_default=false()),
    Column("test_clock", Text),
    Column("metadata", JSONB(none_as_null=True)),
    _moment("created"),
    _by_email("customers", "email"),
    _newest("customers"),
    **_UPDATED,
)

balances = Table(
    "balances",
    metadata,
    *_world(),
    Column("customer", Text, nullable=False),
    Column("currency", Text, nullable=False),
    Column("amount", BigInteger),
    Column("event_id", Text, nullable=False),
    _moment("as_of", nullable=False),
    PrimaryKeyConstraint("account", "livemode", "customer", "currency"),
    **_UPDATED,
)

balance_changes = _projection(
    "balance_changes",
    Column("customer", Text, nullable=False),
    Column("currency", Text, nullable=False),
    Column("amount", BigInteger, nullable=False),
    Column("ending_balance", BigInteger, nullable=False),
    _of_one("balance_changes", "customer"),
)

balance_transactions = _projection(
    "balance_transactions",
    Column("customer", Text),
    Column("currency", Text),
    Column("type", Text),
    Column("amount", BigInteger),
    Column("ending_balance", BigInteger),
    Column("invoice", Text),
    Column("credit_note", Text),
    Column("order_id", Text),
    Column("description", Text),
    _moment("created"),
    _of_one("balance_transactions", "customer"),
)

invoices = _projection(
    "invoices",
    Column("number", Text),
    Column("status", Text),
    Column("currency", Text),
    Column("total", BigInteger),
    Column("amount_due", BigInteger),
    Column("amount_paid", BigInteger),
    Column("amount_remaining", BigInteger),
    Column("amount_overpaid", BigInteger),
    Column("starting_balance", BigInteger),
    Column("ending_balance", BigInteger),
    Column("pre_payment_credit_notes_amount", BigInteger),
    Column("post_payment_credit_notes_amount", BigInteger),
    Column("customer", Text),
    Column("subscription", Text),
    Column("deleted", Boolean, nullable=False, server_default=false()),
    _moment("created"),
    _moment("finalized_at"),
    _moment("paid_at"),
    _moment("voided_at"),
    _of_one("invoices", "customer"),
    _of_any_world("invoices", "number"),
    _newest("invoices"),
    **_UPDATED,
)

credit_notes = _projection(
    "credit_notes",
    Column("number", Text),
    Column("status", Text),
    Column("type", Text),
    Column("reason", Text),
    Column("currency", Text),
    Column("amount", BigInteger),
    Column("pre_payment_amount", BigInteger),
    Column("post_payment_amount", BigInteger),
    Column("refunded_amount", BigInteger),
    Column("out_of_band_amount", BigInteger),
    Column("to_balance_amount", BigInteger),
    Column("customer", Text),
    Column("invoice", Text),
    Column("customer_balance_transaction", Text),
    Column("memo", Text),
    _moment("created"),
    _moment("effective_at"),
    _moment("voided_at"),
    Column("lines_complete", Boolean, nullable=False, server_default=false()),
    # The refund that a version before basil names by its id alone; null where the note reports what was refunded.
    Column("refund", Text),
    _of_one("credit_notes", "invoice"),
    _of_one("credit_notes", "customer"),
    _of_one("credit_notes", "refund"),
    _of_any_world("credit_notes", "number"),
    _newest("credit_notes"),
    **_UPDATED,
)

credit_note_lines = _projection(
    "credit_note_lines",
    Column("credit_note", Text),
    Column("type", Text),
    Column("invoice_line_item", Text),
    Column("description", Text),
    Column("quantity", BigInteger),
    Column("amount", BigInteger),
    Column("discount_amount", BigInteger),
    _of_one("credit_note_lines", "credit_note"),
)

invoice_payments = _projection(
    "invoice_payments",
    Column("invoice", Text),
    Column("payment_intent", Text),
    Column("charge", Text),
    Column("status", Text),
    Column("currency", Text),
    Column("amount_paid", BigInteger),
    _moment("paid_at"),
    _of_one("invoice_payments", "invoice"),
    _of_one("invoice_payments", "payment_intent"),
    _of_one("invoice_payments", "charge"),
)

refunds = _projection(
    "refunds",
    Column("status", Text),
    Column("currency", Text),
    Column("amount", BigInteger),
    Column("charge", Text),
    Column("payment_intent", Text),
    Column("reason", Text),
    Column("failure_reason", Text),
    _moment("created"),
    # When it failed or was canceled: from then on no money comes back.
    _moment("failed_at"),
    _of_one("refunds", "payment_intent"),
    _of_one("refunds", "charge"),
    _newest("refunds"),
    **_UPDATED,
)

payment_intents = _projection(
    "payment_intents",
    Column("status", Text),
    _moment("canceled_at"),
)

charges = _projection(
    "charges",
    Column("payment_intent", Text),
    Column("invoice", Text),
    Column("status", Text),
    Column("currency", Text),
    Column("amount", BigInteger),
    Column("captured", Boolean),
    Column("amount_captured", BigInteger),
    # When an event first reported it as succeeded and captured, and when as released: held, and never captured.
    _moment("captured_at"),
    _moment("released_at"),
    Column("amount_refunded", BigInteger),
    Column("refunded", Boolean),
    Column("disputed", Boolean),
    _of_one("charges", "payment_intent"),
    _of_one("charges", "invoice"),
    **_UPDATED,
)

disputes = _projection(
    "disputes",
    Column("charge", Text),
    Column("payment_intent", Text),
    Column("status", Text),
    Column("reason", Text),
    Column("currency", Text),
    Column("amount", BigInteger),
    _of_one("disputes", "payment_intent"),
    _of_one("disputes", "charge"),
    **_UPDATED,
)

portal_configurations = _projection(
    "portal_configurations",
    Column("active", Boolean),
    Column("is_default", Boolean),
    Column("name", Text),
    Column("features", JSONB(none_as_null=True)),
    Column("login_page_url", Text),
    _moment("created"),
    _moment("updated"),
)

portal_sessions = _projection(
    "portal_sessions",
    Column("configuration", Text),
    Column("customer", Text),
    Column("flow_type", Text),
    Column("return_url", Text),
    _moment("created"),
    _moment("expired_at"),
    _newest("portal_sessions"),
    # The clock looks for sessions that are past their time.
    Index("portal_sessions_open", "created", postgresql_where=text("expired_at IS NULL")),
)

changes = Table(
    "changes",
    metadata,
    Column("seq", BigInteger, Identity(always=True), primary_key=True),
    *_world(),
    Column("subject", Text, nullable=False),
    Column("subject_id", Text, nullable=False),
    Column("kind", Text, nullable=False),
    Column("event_id", Text, nullable=False),
    Column("source", Text, nullable=False),
    _moment("at", nullable=False),
    Column("before", JSONB(none_as_null=True)),
    Column("after", JSONB(none_as_null=True)),
    # Why it is not in the feed; null where it is.
    Column("withheld", Text),
    _one_of("source", SOURCES),
    _one_of("withheld", WITHHELD),
)

ONE_SHOT_KINDS: Final[tuple[Kind, ...]] = (
    "order.opened",
    "order.processing",
    "order.paid",
    "order.completed",
    "order.failed",
    "order.expired",
    "credit_note.issued",
    "credit_note.voided",
    "dispute.opened",
)
"""A subject has at most one change of each of these kinds; the unique index enforces that."""
DISPUTE_CLOSED: Final[Kind] = "dispute.closed"
"""A dispute is closed once by each closing status: one that was lost may be won on appeal."""


def id_hash(subject_id: str) -> str:
    """Return SQL for the hash of *subject_id*, an expression: see Note [A one-shot is found by a hash]."""
    return f"hashtextextended({subject_id}, 0)"


def of_object(events: str, account: str, livemode: str, object_id: str) -> str:
    """Return SQL for that a row of the inbox, by the name of *events*, is about the object of three expressions.

    See Note [Events of an object are found by a hash].
    """
    return (
        f"({id_hash(f'{events}.object_id')} = {id_hash(object_id)}"
        f" AND ({events}.account, {events}.livemode, {events}.object_id)"
        f" IS NOT DISTINCT FROM ({account}, {livemode}, {object_id}))"
    )


Index(
    "changes_one_shot",
    text(id_hash("subject_id")),
    text("hashtextextended(subject || ' ' || account || ' ' || subject_id, 1 + livemode::integer)"),
    changes.c.kind,
    unique=True,
    # New entries come everywhere, so each page has room for some.
    postgresql_with={"fillfactor": 70},
    postgresql_where=changes.c.kind.in_(ONE_SHOT_KINDS),
)

Index(
    "changes_dispute_closed",
    changes.c.account,
    changes.c.livemode,
    changes.c.subject_id,
    text("(after ->> 'status'::text)"),
    unique=True,
    postgresql_where=changes.c.kind == DISPUTE_CLOSED,
)

# The newest correction of an order.
Index(
    "changes_corrected",
    changes.c.account,
    changes.c.livemode,
    changes.c.subject_id,
    changes.c.seq,
    postgresql_where=changes.c.kind == "order.corrected",
)

# Whether anything was announced of a balance.
Index(
    "changes_balance",
    changes.c.account,
    changes.c.livemode,
    changes.c.subject_id,
    postgresql_where=changes.c.kind == "balance.changed",
)

# The feed, which may have a long history of withheld changes before it.
Index("changes_shown", changes.c.seq, postgresql_where=changes.c.withheld.is_(None))

# How many are withheld, by kind.
Index("changes_withheld", changes.c.kind, postgresql_where=changes.c.withheld.is_not(None))

# The newest change of an order's refunds.
Index(
    "changes_refund",
    changes.c.account,
    changes.c.livemode,
    changes.c.subject_id,
    changes.c.seq,
    postgresql_where=changes.c.kind == "order.refund_changed",
)

anomalies = Table(
    "anomalies",
    metadata,
    *_world(),
    Column("id", Text, nullable=False),
    Column("kind", Text, nullable=False),
    Column("subject", Text, nullable=False),
    # What names the row: see ``key_name``.
    Column("subject_id", Text, nullable=False),
    Column("detail", JSONB(none_as_null=True), nullable=False),
    Column("event_id", Text, nullable=False),
    _moment("as_of", nullable=False),
    _moment("seen_at", nullable=False),
    _moment("resolved_at"),
    # The row is folded from the events of this object: for a balance, its customer.
    Column("object_id", Text),
    PrimaryKeyConstraint("account", "livemode", "id"),
    # A batch looks for the anomalies in force of the objects that it folds.
    Index(
        "anomalies_in_force",
        "account",
        "livemode",
        "subject_id",
        postgresql_where=text("resolved_at IS NULL"),
    ),
)

# The views are declared apart, since they are made by statements and not by the metadata.
_views = MetaData()

events = Table(
    "events",
    _views,
    *(Column(column.name, column.type) for column in inbox.c if column.name not in ("payload_sha256", "verified")),
    # Null where it is archived.
    Column("payload", LargeBinary),
    Column("payload_sha256", Text),
    Column("state", Text),
    Column("reason", Text),
    Column("attempts", SmallInteger),
    _moment("folded_at"),
    Column("fold_version", Integer),
    Column("cause", Text),
    _moment("due_at"),
)

payment_link_funnel = Table(
    "payment_link_funnel",
    _views,
    *_world(),
    Column("payment_link", Text),
    Column("currency", Text),
    Column("opened", BigInteger),
    Column("completed", BigInteger),
    Column("paid", BigInteger),
    Column("expired", BigInteger),
    Column("amount_paid", BigInteger),
)

order_book = Table(
    "order_book",
    _views,
    *(Column(column.name, column.type) for column in orders.c),
    Column("refunded_amount", BigInteger),
    Column("credited_amount", BigInteger),
    Column("disputed_amount", BigInteger),
    Column("refund_status", Text),
)

reconciliations = Table(
    "reconciliations",
    metadata,
    Column("id", BigInteger, Identity(always=True), primary_key=True),
    _moment("started_at", nullable=False),
    _moment("finished_at", nullable=False),
    Column("outcome", Text, nullable=False),
    Column("checks", ARRAY(Text), nullable=False),
    # How many differences there were.
    Column("drift", BigInteger, nullable=False),
    Column("result", JSONB, nullable=False),
    # The rest of the result, in JSON: which they were, up to a thousand. Null of older runs. It is no JSONB, since a
    # value of Stripe's may hold characters that PostgreSQL's texts do not.
    Column("details", Text),
    _one_of("outcome", RECONCILED),
)

# A reconciliation that was asked for; ``reconciliations`` has its result under the same number.
reconciliation_requests = Table(
    "reconciliation_requests",
    metadata,
    Column("id", BigInteger, primary_key=True, autoincrement=False),
    Column("state", Text, nullable=False),
    _moment("asked_at", nullable=False),
    # The name of a token.
    Column("asked_by", Text, nullable=False),
    Column("checks", ARRAY(Text), nullable=False),
    _moment("begun_at"),
    # Until then a worker has it. One that does not extend this has ended.
    _moment("leased_until"),
    # Why there is no result: a code, and words of ours.
    _moment("failed_at"),
    Column("failure", Text),
    Column("detail", Text),
    _one_of("state", REQUEST_STATES),
    # At most one waits or runs: all such rows have the same value.
    Index(
        "reconciliation_requests_open",
        text("(asked_by IS NOT NULL)"),
        unique=True,
        postgresql_where=text("state IN ('waiting', 'running')"),
    ),
)

# What summaries and the funnel read, kept by triggers on the tables of rows: see Note [Sums follow the rows] in
# schemas/summary.py. Each table of sums has one with the deltas that are not added to it yet.
SUMMED: Final = ("order", "refund", "dispute")


def _hourly(name: str, *more: Index, **options: Any) -> Table:  # noqa: ANN401 - SQLAlchemy's own
    return Table(
        name,
        metadata,
        *_world(),
        Column("subject", Text, nullable=False),
        # Of an order and a refund the hour in which it was created, null where that is not known; of a dispute the
        # hour of its deciding event.
        _moment("hour"),
        Column("status", Text),
        Column("currency", Text),
        Column("counted", BigInteger, nullable=False),
        # Of the rows with an amount and a currency. It may be more than a bigint can hold.
        Column("amount", Numeric, nullable=False),
        Column("without_amount", BigInteger, nullable=False),
        _one_of("subject", SUMMED),
        *more,
        **options,
    )


def _of_links(name: str, *more: Index, **options: Any) -> Table:  # noqa: ANN401 - SQLAlchemy's own
    return Table(
        name,
        metadata,
        *_world(),
        Column("payment_link", Text, nullable=False),
        Column("currency", Text),
        Column("opened", BigInteger, nullable=False),
        Column("completed", BigInteger, nullable=False),
        Column("paid", BigInteger, nullable=False),
        Column("expired", BigInteger, nullable=False),
        Column("amount_paid", Numeric, nullable=False),
        # How many of the paid have no amount.
        Column("without_amount", BigInteger, nullable=False),
        *more,
        **options,
    )


def _key_of_sums(name: str, *columns: str) -> Index:
    return Index(name, *columns, unique=True, postgresql_nulls_not_distinct=True)


# Rewritten often, in place.
_REWRITTEN: Final = {"postgresql_with": {"fillfactor": 50}}
hourly_sums = _hourly(
    "hourly_sums",
    _key_of_sums("hourly_sums_key", "hour", "account", "livemode", "subject", "status", "currency"),
    **_REWRITTEN,
)
hourly_deltas = _hourly("hourly_deltas")
link_sums = _of_links(
    "link_sums", _key_of_sums("link_sums_key", "account", "livemode", "payment_link", "currency"), **_REWRITTEN
)
link_deltas = _of_links("link_deltas")

PROJECTIONS: Final = (
    balance_changes,
    balance_transactions,
    balances,
    charges,
    credit_note_lines,
    credit_notes,
    customers,
    disputes,
    invoice_payments,
    invoices,
    order_lines,
    orders,
    payment_intents,
    payment_links,
    portal_configurations,
    portal_sessions,
    refunds,
)
"""The tables that are a function of the inbox: what the digest covers and a rebuild rebuilds."""

SUMS: Final = (hourly_sums, hourly_deltas, link_sums, link_deltas)
"""The tables that PostgreSQL keeps by the rows of others."""
REBUILT: Final = (pending, mentions, outcomes, *PROJECTIONS, changes, anomalies)
"""A rebuild makes a second one of each of these tables, to fold the same inbox next to the live ones."""
MAIN_AMOUNTS: Final = ("amount_total", "total", "amount")
"""What a row is worth as a whole, by the first of these columns that it has."""


def worth_of(row: Mapping[str, Any]) -> Any:  # noqa: ANN401 - a value of a row
    """Return what *row* is worth, in minor units; None where it has no amount, or that is not known."""
    return next((row[name] for name in MAIN_AMOUNTS if row.get(name) is not None), None)
