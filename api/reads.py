"""The rows of the tables, as JSON."""

import base64
import binascii
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from inspect import iscoroutinefunction
from typing import Annotated, Any, ClassVar, Final, TypeVar, get_type_hints

import msgspec
import psycopg
from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import AfterValidator, AwareDatetime, BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints
from sqlalchemy import ColumnElement, Connection, Engine, RowMapping, Table, func, select, tuple_
from sqlalchemy import exc as sqlalchemy_errors
from starlette.exceptions import HTTPException

from api import problems
from api.addresses import NO_NUL, Id
from api.tokens import SeesPersonalData, require
from schemas import answers, lookup, tables
from schemas.answers import PERSONAL, Page
from schemas.database import Bounds, transaction
from schemas.errors import DatabaseAway, NotFoundError
from schemas.events import CREATED_MAX

ROWS_MAX: Final = 100
ROWS_DEFAULT: Final = 20
BALANCE_ROWS_MAX: Final = 100
ONE: Final = problems.declared(404, 409)
"""Further answers of a route that shows one row."""
READ: Final = Bounds(statement=5, lock=5, whole=8)
_BOUNDS: Final = "payfold_read_bounds"
_LATE: Final = (
    psycopg.errors.QueryCanceled,
    psycopg.errors.LockNotAvailable,
    # Two acts on the same rows.
    psycopg.errors.DeadlockDetected,
)


class Route(APIRoute):
    """A route that leaves unset fields out of its answer: personal data is not set for a token that may not see it."""

    def __init__(self, path: str, endpoint: Callable[..., Any], **more: Any) -> None:  # noqa: ANN401 - FastAPI's own
        # A ready answer would go out without the status and headers of its route, so FastAPI writes such an answer.
        is_plain = more.get("status_code") is None and Response not in get_type_hints(endpoint).values()
        if set(more.get("methods") or ()) == {"GET"} and is_plain and not iscoroutinefunction(endpoint):
            endpoint = _written(endpoint)
        super().__init__(path, endpoint, **{**more, "response_model_exclude_unset": True})


def _written(endpoint: Callable[..., Any]) -> Callable[..., Any]:
    """Return *endpoint* with its answer as JSON, written in the thread that made it.

    FastAPI would have another thread validate it once more, which takes longer than writing it.
    """
    made = get_type_hints(endpoint).get("return")

    @wraps(endpoint)
    def written(**values: Any) -> Any:  # noqa: ANN401 - FastAPI's own
        found = endpoint(**values)
        if not isinstance(found, BaseModel) or type(found) is not made:
            return found
        # As ``response_model_exclude_unset`` and FastAPI have it.
        return Response(found.model_dump_json(by_alias=True, exclude_unset=True), media_type="application/json")

    return written


router: Final = APIRouter(prefix="/v1", dependencies=[Depends(require("read"))], route_class=Route)

Cursor = Annotated[str | None, Query(max_length=1024, description="`next_cursor` of the page before")]
Account = Annotated[str | None, Query(max_length=255, pattern=NO_NUL, description="only rows of this account")]
Livemode = Annotated[bool | None, Query(description="only live rows, or only test rows")]
Text = Annotated[str | None, Query(max_length=255, pattern=NO_NUL)]
FilterText = Annotated[str | None, StringConstraints(max_length=255, pattern=NO_NUL)]
Row = TypeVar("Row", bound=answers.Answer)
_DATE: Final = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")


def only(values: tuple[str, ...]) -> AfterValidator:
    """Return a validator that refuses any value but *values*: they are all there are, so another would find nothing."""

    def check(value: str) -> str:
        if value not in values:
            raise ValueError(f"it is none of {', '.join(values)}")
        return value

    return AfterValidator(check)


def _dated(value: object) -> object:
    """Return *value*, but refuse a bare number, which pydantic takes for seconds, or milliseconds if large."""
    if isinstance(value, str) and not _DATE.match(value):
        raise ValueError("it is no time with its offset, as 2026-11-01T00:00:00Z")
    return value


Moment = Annotated[AwareDatetime, BeforeValidator(_dated)]
"""A time with its offset, as ISO 8601 writes it."""
FilterMoment = Moment | None


def bounded(engine: Engine, bounds: Bounds) -> Engine:
    """Return *engine*, for reads within *bounds*."""
    return engine.execution_options(**{_BOUNDS: bounds})


def bounds_of(engine: Engine) -> Bounds:
    """Return the bounds within which *engine* is read."""
    found: Bounds = engine.get_execution_options().get(_BOUNDS, READ)
    return found


@contextmanager
def reading(engine: Engine, *, by_keys: bool = False) -> Iterator[Connection]:
    """Open a transaction that is bounded in time, also behind another session's lock or a silent network.

    *by_keys* is whether all its queries find rows by their keys alone.

    Raises:
        DatabaseAway: PostgreSQL does not answer, or not in time.
    """
    with in_time(), transaction(engine, bounds_of(engine), by_keys=by_keys) as connection:
        yield connection


@contextmanager
def in_time() -> Iterator[None]:
    """Raise DatabaseAway where PostgreSQL ends a statement because its time is up."""
    try:
        yield
    except _LATE as error:
        raise DatabaseAway from error
    except sqlalchemy_errors.DBAPIError as error:
        if isinstance(error.orig, _LATE):
            raise DatabaseAway from error
        raise


class Filters(BaseModel):
    """The filters that every list takes. Any other filter of a list is the name of a column, with its value."""

    APART: ClassVar[frozenset[str]] = frozenset({"limit", "cursor", "created_from", "created_before"})
    """Parameters of which ``wanted`` makes no condition that a column has their value."""

    model_config = ConfigDict(extra="forbid")

    limit: int = Field(ROWS_DEFAULT, ge=1, le=ROWS_MAX, description="rows on a page")
    cursor: str | None = Field(None, max_length=1024, description="`next_cursor` of the page before")
    account: FilterText = Field(None, description="only rows of this account")
    livemode: bool | None = Field(None, description="only live rows, or only test rows")

    def wanted(self, table: Table) -> list[ColumnElement[bool]]:
        """Return the conditions on *table* that were asked for."""
        return lookup.where(table, self.model_dump(exclude=set(self.APART)))


class DatedFilters(Filters):
    """Filters of rows that have a creation time."""

    created_from: FilterMoment = Field(None, description="a time with its offset, as 2026-11-01T00:00:00Z")
    created_before: FilterMoment = None

    def wanted(self, table: Table) -> list[ColumnElement[bool]]:
        """Return the conditions on *table* that were asked for."""
        return super().wanted(table) + lookup.created_within(table, self.created_from, self.created_before)


class OrderFilters(DatedFilters):
    """Filters of orders. The status is for ``lookup.newest_orders``."""

    APART = DatedFilters.APART | {"status"}

    status: Annotated[answers.OrderStatus, only(tables.ORDER_STATUSES)] | None = None
    customer: FilterText = None
    customer_email: Annotated[FilterText, PERSONAL] = None
    payment_link: FilterText = None
    client_reference_id: FilterText = None
    invoice: FilterText = None

    def wanted(self, table: Table) -> list[ColumnElement[bool]]:
        """Return the conditions on *table* that were asked for."""
        found = super().wanted(table)
        if self.customer_email is not None:
            found.append(lookup.has_email(table.c.customer_email, self.customer_email))
        return found


class CustomerFilters(DatedFilters):
    """Filters of customers."""

    APART = DatedFilters.APART | {"email"}

    email: Annotated[FilterText, PERSONAL] = Field(None, description="in any case")
    delinquent: bool | None = None
    deleted: bool | None = None

    def wanted(self, table: Table) -> list[ColumnElement[bool]]:
        """Return the conditions on *table* that were asked for."""
        found = super().wanted(table)
        if self.email is not None:
            found.append(func.lower(table.c.email) == func.lower(self.email))
        return found


class PaymentLinkFilters(Filters):
    """Filters of payment links."""

    active: bool | None = None


class InvoiceFilters(DatedFilters):
    """Filters of invoices."""

    status: FilterText = None
    customer: FilterText = None
    subscription: FilterText = None
    deleted: bool = Field(default=False, description="drafts that were deleted, which are left out otherwise")


class CreditNoteFilters(DatedFilters):
    """Filters of credit notes."""

    status: FilterText = None
    customer: FilterText = None
    invoice: FilterText = None


class RefundFilters(DatedFilters):
    """Filters of refunds."""

    status: FilterText = None
    charge: FilterText = None
    payment_intent: FilterText = None


class PortalConfigurationFilters(DatedFilters):
    """Filters of portal configurations."""

    active: bool | None = None
    is_default: bool | None = None


class PortalSessionFilters(DatedFilters):
    """Filters of portal sessions."""

    customer: FilterText = None
    configuration: FilterText = None


@router.get("/orders", tags=["orders"])
def list_orders(
    request: Request, filters: Annotated[OrderFilters, Query()], sees: SeesPersonalData
) -> Page[answers.Order]:
    """List orders, newest first."""

    def find(connection: Connection, wanted: Sequence[ColumnElement[bool]], limit: int) -> Sequence[RowMapping]:
        return lookup.newest_orders(connection, wanted, status=filters.status, limit=limit)

    return _page(request, tables.orders, filters, answers.Order, sees=sees, find=find)


@router.get("/orders/{order_id:id}", tags=["orders"], responses=ONE)
def show_order(
    request: Request, order_id: Id, sees: SeesPersonalData, account: Account = None, livemode: Livemode = None
) -> answers.OrderWithLines:
    """Show one order with its lines."""
    with reading(request.app.state.engine, by_keys=True) as connection:
        order = row_of(connection, tables.order_book, order_id, account, livemode)
        lines = lookup.lines_of(connection, tables.order_lines, "order_id", order)
    shown = [answers.OrderLine.of(dict(line), personal=sees) for line in lines]
    return answers.OrderWithLines.of({**order, "lines": shown}, personal=sees)


@router.get("/payment-links", tags=["payment links"])
def list_payment_links(
    request: Request, filters: Annotated[PaymentLinkFilters, Query()], sees: SeesPersonalData
) -> Page[answers.PaymentLink]:
    """List payment links, newest first; those whose creation was not seen come last."""
    return _page(request, tables.payment_links, filters, answers.PaymentLink, sees=sees)


@router.get("/payment-links/{link_id:id}", tags=["payment links"], responses=ONE)
def show_payment_link(
    request: Request, link_id: Id, sees: SeesPersonalData, account: Account = None, livemode: Livemode = None
) -> answers.PaymentLink:
    """Show one payment link."""
    return answers.PaymentLink.of(one(request, tables.payment_links, link_id, account, livemode), personal=sees)


@router.get("/invoices", tags=["invoices"])
def list_invoices(
    request: Request, filters: Annotated[InvoiceFilters, Query()], sees: SeesPersonalData
) -> Page[answers.Invoice]:
    """List invoices, newest first."""
    return _page(request, tables.invoices, filters, answers.Invoice, sees=sees)


@router.get("/credit-notes", tags=["credit notes"])
def list_credit_notes(
    request: Request, filters: Annotated[CreditNoteFilters, Query()], sees: SeesPersonalData
) -> Page[answers.CreditNote]:
    """List credit notes, newest first."""
    return _page(request, tables.credit_notes, filters, answers.CreditNote, sees=sees)


@router.get("/credit-notes/{note_id:id}", tags=["credit notes"], responses=ONE)
def show_credit_note(
    request: Request, note_id: Id, sees: SeesPersonalData, account: Account = None, livemode: Livemode = None
) -> answers.CreditNoteWithLines:
    """Show one credit note with its lines."""
    with reading(request.app.state.engine, by_keys=True) as connection:
        note = row_of(connection, tables.credit_notes, note_id, account, livemode)
        lines = lookup.lines_of(connection, tables.credit_note_lines, "credit_note", note)
    shown = [answers.CreditNoteLine.of(dict(line), personal=sees) for line in lines]
    return answers.CreditNoteWithLines.of({**note, "lines": shown}, personal=sees)


@router.get("/refunds", tags=["refunds"])
def list_refunds(
    request: Request, filters: Annotated[RefundFilters, Query()], sees: SeesPersonalData
) -> Page[answers.Refund]:
    """List refunds, newest first."""
    return _page(request, tables.refunds, filters, answers.Refund, sees=sees)


@router.get("/portal/configurations", tags=["portal"])
def list_portal_configurations(
    request: Request, filters: Annotated[PortalConfigurationFilters, Query()], sees: SeesPersonalData
) -> Page[answers.PortalConfiguration]:
    """List portal configurations, newest first."""
    return _page(request, tables.portal_configurations, filters, answers.PortalConfiguration, sees=sees)


@router.get("/portal/sessions", tags=["portal"])
def list_portal_sessions(
    request: Request, filters: Annotated[PortalSessionFilters, Query()], sees: SeesPersonalData
) -> Page[answers.PortalSession]:
    """List portal sessions, newest first."""
    return _page(request, tables.portal_sessions, filters, answers.PortalSession, sees=sees)


@router.get("/customers", tags=["customers"])
def list_customers(
    request: Request, filters: Annotated[CustomerFilters, Query()], sees: SeesPersonalData
) -> Page[answers.Customer]:
    """List customers, newest first; those whose creation was not seen come last."""
    return _page(request, tables.customers, filters, answers.Customer, sees=sees)


@router.get("/customers/{customer_id:id}/balance", tags=["customers"], responses=problems.declared(404))
def show_balance(
    request: Request, customer_id: Id, sees: SeesPersonalData, account: Account = None, livemode: Livemode = None
) -> answers.CustomerBalance:
    """Show a customer's balance in each currency, with its latest changes and whether its ledger has no gap."""
    with reading(request.app.state.engine) as connection:

        def of(table: Table, *order: ColumnElement[Any]) -> Sequence[Any]:
            wanted = lookup.where(table, {"customer": customer_id, "account": account, "livemode": livemode})
            query = select(table).where(*wanted).order_by(*order).limit(BALANCE_ROWS_MAX)
            return connection.execute(query).mappings().all()

        balances = of(tables.balances, tables.balances.c.currency)
        changes = of(tables.balance_changes, tables.balance_changes.c.as_of.desc(), tables.balance_changes.c.id)
        ledger = tables.balance_transactions
        transactions = of(ledger, ledger.c.created.desc(), ledger.c.as_of.desc(), ledger.c.id)
        broken = _broken_chains(connection, customer_id)
    if not balances:
        raise NotFoundError("No balance of this customer is known here.")
    found = []
    for row in balances:
        world = (row["account"], row["livemode"], row["currency"])
        listed = [each for each in transactions if _world(each) == world]
        found.append(
            answers.Balance(
                **row,
                changes=[answers.BalanceChange.model_validate(each) for each in changes if _world(each) == world],
                transactions=[answers.BalanceTransaction.of(each, personal=sees) for each in listed],
                chain_is_unbroken=((*world[:2], tables.key_name((customer_id, row["currency"]))) not in broken)
                if listed
                else None,
            )
        )
    return answers.CustomerBalance(customer=customer_id, balances=found)


@router.get("/customers/{customer_id:id}", tags=["customers"], responses=ONE)
def show_customer(
    request: Request, customer_id: Id, sees: SeesPersonalData, account: Account = None, livemode: Livemode = None
) -> answers.Customer:
    """Show one customer."""
    return answers.Customer.of(one(request, tables.customers, customer_id, account, livemode), personal=sees)


def _world(row: Any) -> tuple[str, bool, str]:  # noqa: ANN401 - a row's mapping
    return (row["account"], row["livemode"], row["currency"])


def _broken_chains(connection: Connection, customer: str) -> set[tuple[str, bool, str]]:
    """Return the balances with a gap in their ledger, each by its world and its name."""
    anomalies = tables.anomalies
    query = select(anomalies.c.account, anomalies.c.livemode, anomalies.c.subject_id).where(
        anomalies.c.kind == "broken_chain", anomalies.c.resolved_at.is_(None), anomalies.c.object_id == customer
    )
    return {(account, livemode, name) for account, livemode, name in connection.execute(query)}


class AnomalyFilters(Filters):
    """Filters of anomalies."""

    APART = Filters.APART | {"resolved"}

    kind: Annotated[answers.AnomalyKind, only(tables.ANOMALY_KINDS)] | None = None
    subject: Annotated[answers.AnomalySubject, only(tables.ANOMALY_SUBJECTS)] | None = None
    subject_id: FilterText = None
    resolved: bool | None = Field(None, description="only those that are over, or only those in force")

    def wanted(self, table: Table) -> list[ColumnElement[bool]]:
        """Return the conditions on *table* that were asked for."""
        found = super().wanted(table)
        if self.resolved is not None:
            found.append(table.c.resolved_at.is_not(None) if self.resolved else table.c.resolved_at.is_(None))
        return found


@router.get("/anomalies", tags=["anomalies"])
def list_anomalies(
    request: Request, filters: Annotated[AnomalyFilters, Query()], sees: SeesPersonalData
) -> Page[answers.Anomaly]:
    """List anomalies, last seen first."""
    return _page(request, tables.anomalies, filters, answers.Anomaly, sees=sees, newest=tables.anomalies.c.seen_at)


def one(request: Request, table: Table, key: str, account: str | None, livemode: bool | None) -> Any:  # noqa: ANN401, FBT001 - a row's mapping, and a part of the address
    """Return the row of *table* with the id *key*, in the world that was asked for."""
    with reading(request.app.state.engine, by_keys=True) as connection:
        return row_of(connection, table, key, account, livemode)


def row_of(connection: Connection, table: Table, key: str, account: str | None, livemode: bool | None) -> Any:  # noqa: ANN401, FBT001 - as above
    """Return the row of *table*, or of a view, with the id *key*, in the world that was asked for."""
    rows = lookup.by_id(connection, table, key, account=account, livemode=livemode)
    if not rows:
        raise NotFoundError("There is no such row here.")
    if len(rows) > 1:
        raise HTTPException(409, "Several accounts or modes know this id: add account= or livemode= to the address.")
    return rows[0]


def _page(
    request: Request,
    table: Table,
    filters: Filters,
    answer: type[Row],
    *,
    sees: bool,
    newest: ColumnElement[Any] = lookup.NEWEST,
    find: Callable[[Connection, Sequence[ColumnElement[bool]], int], Sequence[RowMapping]] | None = None,
) -> Page[Row]:
    """Return the page of *table* that *filters* ask for, newest first, with the cursor of the next page.

    *find* returns the newest rows that are as wanted, at most so many; without it they are read from *table* itself.
    *sees* is whether the token may see personal data.
    """
    _check_scope(filters, sees=sees)
    wanted = filters.wanted(table)
    if filters.cursor is not None:
        at, *key = read_cursor(filters.cursor, str, 4)
        place = tuple_(func.to_timestamp(_seconds(at)), *key[:2], key[2] == "true")
        wanted.append(tuple_(*lookup.order_of(table, newest)) < place)
    limit = filters.limit + 1
    with reading(request.app.state.engine) as connection:
        if find is not None:
            rows = find(connection, wanted, limit)
        else:
            rows = connection.execute(lookup.newest(table, wanted, limit=limit, by=newest)).mappings().all()
    data = rows[: filters.limit]
    following = _key_of(data[-1]) if len(rows) > filters.limit else None
    return Page[answer](data=[answer.of(dict(row), personal=sees) for row in data], next_cursor=following)  # type: ignore[valid-type]  # a class that is a value


def _check_scope(filters: Filters, *, sees: bool) -> None:
    """Refuse a filter by personal data without the scope: asking whether a value exists reveals it."""
    asked = filters.model_fields_set & answers.personal_fields(type(filters))
    if asked and not sees:
        raise HTTPException(403, f"Rows are found by {', '.join(sorted(asked))} with a token of the scope personal.")


def _key_of(row: Any) -> str:  # noqa: ANN401 - a row's mapping
    return cursor_of(str(row["newest"]), row["id"], row["account"], str(row["livemode"]).lower())


def cursor_of(*parts: object) -> str:
    """Return the cursor of the page that begins behind *parts*."""
    return base64.urlsafe_b64encode(msgspec.json.encode(parts)).decode()


def read_cursor(cursor: str, kind: type[Any], length: int) -> list[Any]:
    """Return the parts of *cursor*, which are *length* values of a *kind*.

    Raises:
        RequestValidationError: it is no cursor of this list.
    """
    try:
        parts = msgspec.json.decode(base64.urlsafe_b64decode(cursor.encode()), type=list[Any])
        if len(parts) == length and all(type(part) is kind and _is_storable(part) for part in parts):
            return parts
    except (binascii.Error, msgspec.DecodeError, UnicodeError):
        pass
    raise no_cursor()


def _is_storable(part: object) -> bool:
    """Return whether PostgreSQL can compare with *part*, a text or a number."""
    return abs(part) < 2**63 if isinstance(part, int) else "\0" not in str(part)


def _seconds(at: str) -> float:
    """Return the time of a cursor, in Unix seconds: -Infinity for an object without a creation time."""
    try:
        seconds = float(at)
    except ValueError:
        raise no_cursor() from None
    if seconds != -math.inf and not 0 <= seconds <= CREATED_MAX:
        raise no_cursor()
    return seconds


def no_cursor() -> RequestValidationError:
    """Return the error that the cursor is not of this list."""
    fault = {"type": "value_error", "loc": ("query", "cursor"), "msg": "it is no cursor of this list", "input": None}
    return RequestValidationError([fault])
