"""Every table and view at rest. The migrations make them; a test holds the two against each other.

Note [The inbox is append-only]
    An event's bytes are written once, into ``inbox``, and the wide row is not updated when the event is
    folded: what is waiting is a narrow row in ``pending`` that is deleted, what became of it a narrow row in
    ``outcomes``. ``events`` is the view over the three that people and commands read. The one exception is a
    second rendering of the same event by a newer API version, which takes the first one's place.
"""

from typing import Final

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
    PrimaryKeyConstraint,
    SmallInteger,
    Table,
    Text,
    false,
    text,
)
from sqlalchemy.dialects.postgresql import ARRAY, JSONB

metadata = MetaData()

SOURCES: Final = ("webhook", "replay", "gap", "observation")
OUTCOMES: Final = ("folded", "ignored", "parked")
STATES: Final = ("pending", *OUTCOMES)
ORDER_STATUSES: Final = ("open", "processing", "paid", "failed", "expired", "complete")


NEWEST: Final = "(COALESCE(created, '-infinity'::timestamp with time zone))"
"""By which lists are sorted; an object that does not say when it was created comes last."""


def _one_of(column: str, values: tuple[str, ...]) -> CheckConstraint:
    listed = ", ".join(f"'{value}'" for value in values)
    return CheckConstraint(f"{column} IN ({listed})", name=f"{column}_is_known")


def _moment(name: str, *, nullable: bool = True) -> Column[object]:
    return Column(name, DateTime(timezone=True), nullable=nullable)


def _world() -> list[Column[object]]:
    """Test and live, and two accounts, never meet: every key begins with both."""
    return [Column("account", Text, nullable=False), Column("livemode", Boolean, nullable=False)]


def _projection(name: str, *columns: Column[object] | CheckConstraint | Index) -> Table:
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
    )


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
    Column("payload", LargeBinary, nullable=False),
    Column("redacted", ARRAY(Text), nullable=False),
    Column("payload_sha256", LargeBinary, nullable=False),
    Column("signature", Text),
    Column("source", Text, nullable=False),
    _moment("received_at", nullable=False),
    _one_of("source", SOURCES),
    PrimaryKeyConstraint("account", "livemode", "id"),
    # Refolding an object reads all its events.
    Index("inbox_object", "account", "livemode", "object_id", postgresql_where=text("object_id IS NOT NULL")),
    # A claim asks of each event whether an operator has set it aside.
    Index(
        "inbox_set_aside",
        "account",
        "livemode",
        "object_id",
        postgresql_where=text("type = 'payfold.event.ignored'"),
    ),
)

pending = Table(
    "pending",
    metadata,
    Column("seq", BigInteger, primary_key=True, autoincrement=False),
    # True where an outcome was given before, so that nothing of it may be built upon.
    Column("again", Boolean, nullable=False, server_default=false()),
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
    _one_of("state", OUTCOMES),
    # The clock looks for outcomes of an older fold version.
    Index("outcomes_fold_version", "fold_version", "seq"),
    # An operator lists what is parked.
    Index("outcomes_parked", "seq", postgresql_where=text("state = 'parked'")),
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
    # Lists page by it, newest first.
    Index("orders_newest", text(f"{NEWEST} DESC"), text("id DESC")),
    Index(
        "orders_payment_link",
        "account",
        "livemode",
        "payment_link",
        postgresql_where=text("payment_link IS NOT NULL"),
    ),
    Index("orders_customer", "account", "livemode", "customer", postgresql_where=text("customer IS NOT NULL")),
)

payment_links = _projection(
    "payment_links",
    Column("active", Boolean),
    Column("url", Text),
    Column("currency", Text),
    Column("metadata", JSONB(none_as_null=True)),
    _moment("created"),
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
    _one_of("source", SOURCES),
)

ONE_SHOT_KINDS: Final = (
    "order.opened",
    "order.processing",
    "order.paid",
    "order.completed",
    "order.failed",
    "order.expired",
)
"""Kinds of change that a subject sees once at most; the unique index holds it."""

Index(
    "changes_one_shot",
    changes.c.account,
    changes.c.livemode,
    changes.c.subject,
    changes.c.subject_id,
    changes.c.kind,
    unique=True,
    postgresql_where=changes.c.kind.in_(ONE_SHOT_KINDS),
)

anomalies = Table(
    "anomalies",
    metadata,
    *_world(),
    Column("id", Text, nullable=False),
    Column("kind", Text, nullable=False),
    Column("subject", Text, nullable=False),
    Column("subject_id", Text, nullable=False),
    Column("detail", JSONB(none_as_null=True), nullable=False),
    Column("event_id", Text, nullable=False),
    _moment("as_of", nullable=False),
    _moment("seen_at", nullable=False),
    _moment("resolved_at"),
    PrimaryKeyConstraint("account", "livemode", "id"),
    # A batch asks what is in force for the objects that it folds.
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
    *(Column(column.name, column.type) for column in inbox.c if column.name != "payload_sha256"),
    Column("payload_sha256", Text),
    Column("state", Text),
    Column("reason", Text),
    Column("attempts", SmallInteger),
    _moment("folded_at"),
    Column("fold_version", Integer),
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

PROJECTIONS: Final = (orders, payment_links)
"""The tables that are a function of the inbox: what the digest covers and a rebuild rebuilds."""

REBUILT: Final = (pending, outcomes, *PROJECTIONS, changes, anomalies)
"""What a rebuild needs a second one of, to fold the same inbox beside the live tables."""
