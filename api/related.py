"""What else moved the money of an order: its invoice, its credit notes, its disputes, and its effects on a balance."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from fastapi import APIRouter, Depends, Request
from sqlalchemy import ColumnElement, Connection, Table, and_, any_, literal, or_, select
from sqlalchemy import Text as SqlText
from sqlalchemy.dialects.postgresql import ARRAY

from api import reads
from api.addresses import Id
from api.reads import ONE, Account, Livemode
from api.tokens import SeesPersonalData, require
from schemas import answers, tables

ROWS_MAX: Final = 100
"""Of each kind: the newest."""

router: Final = APIRouter(prefix="/v1", dependencies=[Depends(require("read"))], route_class=reads.Route)


@router.get("/orders/{order_id:id}/related", tags=["orders"], responses=ONE)
def show_related(
    request: Request, order_id: Id, sees: SeesPersonalData, account: Account = None, livemode: Livemode = None
) -> answers.Related:
    """Show the invoice, the credit notes, the disputes and the balance transactions of an order, newest first."""
    order = reads.one(request, tables.orders, order_id, account, livemode)
    with reads.reading(request.app.state.engine) as connection:
        found = {name: _rows(connection, table, wanted) for name, table, wanted in _parts(connection, order)}
    return answers.Related(
        invoice=next((answers.Invoice.of(row, personal=sees) for row in found["invoice"]), None),
        credit_notes=[answers.CreditNote.of(row, personal=sees) for row in found["credit_notes"]],
        disputes=[answers.Dispute.of(row, personal=sees) for row in found["disputes"]],
        balance_transactions=[
            answers.RelatedTransaction.of(row, personal=sees) for row in found["balance_transactions"]
        ],
    )


def _parts(connection: Connection, order: Mapping[str, Any]) -> Iterator[tuple[str, Table, ColumnElement[bool]]]:
    """Yield, by the names of the answer, the table and the condition of its rows."""
    yield "invoice", tables.invoices, _is(tables.invoices, order, "id", order["invoice"])
    yield "credit_notes", tables.credit_notes, _is(tables.credit_notes, order, "invoice", order["invoice"])
    disputes, intents = tables.disputes, _intents(connection, order)
    by_intent = disputes.c.payment_intent == any_(literal(intents, ARRAY(SqlText)))
    charges = tables.charges
    of_intents = select(charges.c.id).where(
        *_of_world(charges, order), charges.c.payment_intent == any_(literal(intents, ARRAY(SqlText)))
    )
    by_charge = disputes.c.charge.in_(of_intents)
    yield "disputes", disputes, and_(*_of_world(disputes, order), or_(by_intent, by_charge))
    ledger = tables.balance_transactions
    effects = and_(_is(ledger, order, "customer", order["customer"]), ledger.c.order_id == order["id"])
    yield "balance_transactions", ledger, effects


def _intents(connection: Connection, order: Mapping[str, Any]) -> list[str]:
    """Return the payment intents that paid *order*: its own, else those of its invoice's payments."""
    if order["payment_intent"] is not None:
        return [order["payment_intent"]]
    payments = tables.invoice_payments
    query = select(payments.c.payment_intent).where(
        _is(payments, order, "invoice", order["invoice"]), payments.c.payment_intent.is_not(None)
    )
    return list(connection.scalars(query.distinct().limit(ROWS_MAX)))


def _of_world(table: Table, order: Mapping[str, Any]) -> list[ColumnElement[bool]]:
    return [table.c.account == order["account"], table.c.livemode == order["livemode"]]


def _is(table: Table, order: Mapping[str, Any], name: str, value: object) -> ColumnElement[bool]:
    """Return the condition that a row of *table*, in the world of *order*, has *value*; null is found nowhere."""
    return and_(*_of_world(table, order), table.c[name] == literal(value, SqlText))


def _rows(connection: Connection, table: Table, wanted: ColumnElement[bool]) -> Sequence[Any]:
    query = select(table).where(wanted).order_by(table.c.as_of.desc(), table.c.id).limit(ROWS_MAX)
    return connection.execute(query).mappings().all()
