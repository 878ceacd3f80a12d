"""Where an event came from and what it did: the signature that came with it, its object's row, and its changes."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Final

from fastapi import APIRouter, Depends, Request
from sqlalchemy import ColumnElement, Connection, Table, select, text

from api import reads
from api.addresses import Id
from api.explanations import EVENTS_MAX
from api.reads import ONE, Account, Livemode
from api.tokens import require
from schemas import answers, search, signature, tables
from schemas.errors import ConflictError, NotFoundError
from schemas.search import FoundOrder
from schemas.settings import SigningSecret
from worker import folds
from worker.folds.facts import Subject
from worker.proof import explain

CHANGES_MAX: Final = 100
_OF_ORDERS: Final = frozenset({"order", "charge", "refund", "dispute", "invoice", "credit_note", "payment_intent"})
"""Kinds of object whose events may change their orders."""

router: Final = APIRouter(prefix="/v1", dependencies=[Depends(require("read"))], route_class=reads.Route)


@router.get("/events/{event_id:id}/trace", tags=["events"], responses=ONE)
def trace_event(
    request: Request, event_id: Id, account: Account = None, livemode: Livemode = None
) -> answers.EventTrace:
    """Show which secret signed an event and when, what it set in the row of its object, and what it changed."""
    state = request.app.state
    event = reads.one(request, tables.events, event_id, account, livemode)
    with reads.reading(state.engine) as connection:
        orders = _orders(connection, event)
        changes = changes_of(connection, event, [order.id for order in orders])
        signed = _signature(connection, event, state.settings.signing_secrets)
    row = _row(request, event)
    return answers.EventTrace(
        account=event["account"],
        livemode=event["livemode"],
        id=event["id"],
        signature=signed,
        row=None if row is None else answers.EventRow.model_validate(row),
        orders=[answers.FoundOrder.model_validate(asdict(order)) for order in orders],
        changes=[answers.RecordedChange.model_validate(dict(change)) for change in changes],
    )


def _signature(
    connection: Connection, event: Mapping[str, Any], secrets: Sequence[SigningSecret]
) -> answers.EventSignature | None:
    """Return the signature that came with *event*, and which of *secrets* made it."""
    header, payload = event["signature"], event["payload"]
    if header is None:
        return None
    inbox = tables.inbox.c
    verified = connection.execute(select(inbox.verified).where(inbox.seq == event["seq"])).scalar_one()
    signer = None if payload is None else signature.signer_of(header, payload, secrets)
    place = None if signer is None else list(secrets).index(signer) + 1
    return answers.EventSignature(verified=verified, signed_at=signature.signed_at(header), secret=place)


def _row(request: Request, event: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return what the folded *event* set in the row of its object; None where it makes none, or has too many events."""
    made = folds.TABLES_OF_OBJECT.get(event["object_type"] or "")
    if made is None or event["object_id"] is None or event["state"] != "folded":
        return None
    engine = request.app.state.engine
    subject = Subject(made[0], event["account"], event["livemode"], event["object_id"])
    try:
        with reads.in_time():
            found = explain.explain(engine, subject, events_max=EVENTS_MAX, bounds=reads.bounds_of(engine))
    except (ConflictError, NotFoundError):
        return None
    lines = (line for line in found.timeline if line["event_id"] == event["id"])
    line = None if found.row is None else next(lines, None)
    return line and {"table": found.table, "id": found.id, "sets": line["sets"], "verdict": line["verdict"]}


def _orders(connection: Connection, event: Mapping[str, Any]) -> list[FoundOrder]:
    """Return the orders that the object of *event* belongs to."""
    if event["object_id"] is None:
        return []
    hits = search.find(connection, event["object_id"], account=event["account"], livemode=event["livemode"])
    named = (hit for hit in hits if hit.kind in _OF_ORDERS and hit.matched in ("id", "payment_intent"))
    return list({order.id: order for hit in named for order in hit.orders}.values())


def changes_of(connection: Connection, event: Mapping[str, Any], orders: Collection[str]) -> Sequence[Any]:
    """Return the changes that *event* made of its object, of *orders*, and of its customer's balances."""
    subjects = [*orders, *([] if event["object_id"] is None else [event["object_id"], *_balances(connection, event)])]
    world = {"account": event["account"], "livemode": event["livemode"]}
    wanted = {**world, "subjects": sorted(set(subjects)), "event": event["id"], "limit": CHANGES_MAX}
    return connection.execute(_CHANGES, wanted).mappings().all()


def _balances(connection: Connection, event: Mapping[str, Any]) -> list[str]:
    """Return the names of the balances of the customer that *event*, or its transaction, is about."""
    balances, ledger = tables.balances, tables.balance_transactions

    def of_world(table: Table) -> list[ColumnElement[bool]]:
        return [table.c.account == event["account"], table.c.livemode == event["livemode"]]

    owner = select(ledger.c.customer).where(*of_world(ledger), ledger.c.id == event["object_id"])
    customers = [event["object_id"], *connection.scalars(owner)]
    query = select(balances.c.customer, balances.c.currency)
    found = connection.execute(query.where(*of_world(balances), balances.c.customer.in_(customers)))
    return [tables.key_name(tuple(row)) for row in found]


_ONE_SHOT: Final = ", ".join(f"'{kind}'" for kind in tables.ONE_SHOT_KINDS)
_HASHES: Final = f"SELECT {tables.id_hash('id')} FROM unnest(CAST(:subjects AS text[])) AS k (id)"  # noqa: S608 - our own words
# A query for each partial index, written out so that PostgreSQL knows that the index has these changes.
_PARTS: Final = (
    f"kind IN ({_ONE_SHOT}) AND {tables.id_hash('subject_id')} = ANY (ARRAY({_HASHES}))",
    f"kind = '{tables.DISPUTE_CLOSED}'",
    "kind = 'order.corrected'",
    "kind = 'order.refund_changed'",
    "kind = 'balance.changed'",
)
_PART: Final = (
    "SELECT * FROM changes WHERE account = :account AND livemode = :livemode AND subject_id = ANY (:subjects)"
    " AND event_id = :event"
)
_FOUND: Final = " UNION ALL ".join(f"{_PART} AND {part}" for part in _PARTS)
_CHANGES: Final = text(f"SELECT * FROM ({_FOUND}) AS found ORDER BY seq LIMIT :limit")  # noqa: S608 - our own words
