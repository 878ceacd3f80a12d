"""What the tables say, as JSON."""

import base64
import binascii
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, Final

import msgspec
import psycopg
from fastapi import APIRouter, Depends, Path, Query, Request
from fastapi.exceptions import RequestValidationError
from pydantic import AwareDatetime
from sqlalchemy import ColumnElement, Connection, Engine, Table, and_, func, literal_column, select, text, tuple_
from sqlalchemy import exc as sqlalchemy_errors
from starlette.exceptions import HTTPException

from api.tokens import require
from schemas import answers, tables
from schemas.answers import Page
from schemas.database import transaction
from schemas.errors import DatabaseAway, NotFoundError
from schemas.events import CREATED_MAX

ROWS_MAX: Final = 100
ROWS_DEFAULT: Final = 20
READ_SECONDS_MAX: Final = 5
# PostgreSQL's texts hold any character but this one.
_NO_NUL: Final = r"^[^\x00]*$"

router: Final = APIRouter(prefix="/v1", dependencies=[Depends(require("read"))])

Limit = Annotated[int, Query(ge=1, le=ROWS_MAX, description="rows on a page")]
Cursor = Annotated[str | None, Query(max_length=1024, description="`next_cursor` of the page before")]
Account = Annotated[str | None, Query(max_length=255, pattern=_NO_NUL, description="only rows of this account")]
Livemode = Annotated[bool | None, Query(description="only live rows, or only test rows")]
Text = Annotated[str | None, Query(max_length=255, pattern=_NO_NUL)]
Moment = Annotated[AwareDatetime | None, Query(description="a time with its offset, as 2026-11-01T00:00:00Z")]
Id = Annotated[str, Path(max_length=255, pattern=_NO_NUL)]


@contextmanager
def reading(engine: Engine) -> Iterator[Connection]:
    """Open a transaction that ends soon, whatever another session holds.

    Raises:
        DatabaseAway: PostgreSQL does not answer, or not in time.
    """
    try:
        with transaction(engine) as connection:
            # For this transaction only, so that a pooler may stand between.
            connection.execute(text(f"SET LOCAL statement_timeout = '{READ_SECONDS_MAX}s'"))
            yield connection
    except sqlalchemy_errors.TimeoutError as error:
        raise DatabaseAway from error
    except sqlalchemy_errors.DBAPIError as error:
        if isinstance(error.orig, psycopg.errors.QueryCanceled):
            raise DatabaseAway from error
        raise


@router.get("/orders", tags=["orders"])
def list_orders(  # noqa: PLR0913 - one parameter a filter
    request: Request,
    *,
    limit: Limit = ROWS_DEFAULT,
    cursor: Cursor = None,
    account: Account = None,
    livemode: Livemode = None,
    status: Text = None,
    customer: Text = None,
    customer_email: Text = None,
    payment_link: Text = None,
    client_reference_id: Text = None,
    created_from: Moment = None,
    created_before: Moment = None,
) -> Page[answers.Order]:
    """List orders, newest first."""
    orders = tables.orders
    given = {
        "account": account,
        "livemode": livemode,
        "status": status,
        "customer": customer,
        "customer_email": customer_email,
        "payment_link": payment_link,
        "client_reference_id": client_reference_id,
    }
    wanted = [orders.c[name] == value for name, value in given.items() if value is not None]
    if created_from is not None:
        wanted.append(orders.c.created >= created_from)
    if created_before is not None:
        wanted.append(orders.c.created < created_before)
    rows, following = _page_of(request, orders, wanted, limit, cursor)
    return Page(data=[answers.Order.model_validate(row) for row in rows], next_cursor=following)


@router.get("/orders/{order_id}", tags=["orders"])
def show_order(request: Request, order_id: Id, account: Account = None, livemode: Livemode = None) -> answers.Order:
    """Show one order."""
    return answers.Order.model_validate(_one(request, tables.orders, order_id, account, livemode))


@router.get("/payment-links", tags=["payment links"])
def list_payment_links(
    request: Request,
    *,
    limit: Limit = ROWS_DEFAULT,
    cursor: Cursor = None,
    account: Account = None,
    livemode: Livemode = None,
    active: bool | None = None,
) -> Page[answers.PaymentLink]:
    """List payment links, newest first; those whose creation was not seen come last."""
    links = tables.payment_links
    given = {"account": account, "livemode": livemode, "active": active}
    wanted = [links.c[name] == value for name, value in given.items() if value is not None]
    rows, following = _page_of(request, links, wanted, limit, cursor)
    return Page(data=[answers.PaymentLink.model_validate(row) for row in rows], next_cursor=following)


@router.get("/payment-links/{link_id}", tags=["payment links"])
def show_payment_link(
    request: Request, link_id: Id, account: Account = None, livemode: Livemode = None
) -> answers.PaymentLink:
    """Show one payment link."""
    return answers.PaymentLink.model_validate(_one(request, tables.payment_links, link_id, account, livemode))


_ENVELOPE: Final = [column for column in tables.events.c if column.name not in ("payload", "signature")]


@router.get("/events", tags=["events"])
def list_events(
    request: Request,
    *,
    limit: Limit = ROWS_DEFAULT,
    cursor: Cursor = None,
    account: Account = None,
    livemode: Livemode = None,
    state: Text = None,
    type: Text = None,  # noqa: A002 - Stripe's name for it
    object_id: Text = None,
) -> Page[answers.Event]:
    """List the inbox, last recorded first, without payloads."""
    events = tables.events
    given = {"account": account, "livemode": livemode, "state": state, "type": type, "object_id": object_id}
    wanted = [events.c[name] == value for name, value in given.items() if value is not None]
    if cursor is not None:
        wanted.append(events.c.seq < _read_cursor(cursor, int, 1)[0])
    query = select(*_ENVELOPE).where(*wanted).order_by(events.c.seq.desc()).limit(limit + 1)
    with reading(request.app.state.engine) as connection:
        rows = connection.execute(query).mappings().all()
    following = _cursor(rows[limit - 1]["seq"]) if len(rows) > limit else None
    return Page(data=[answers.Event.model_validate(row) for row in rows[:limit]], next_cursor=following)


@router.get("/events/{event_id}", tags=["events"], dependencies=[Depends(require("admin"))])
def show_event(
    request: Request, event_id: Id, account: Account = None, livemode: Livemode = None
) -> answers.EventWithPayload:
    """Show one event with its payload, which holds personal data and so wants the scope admin."""
    row = dict(_one(request, tables.events, event_id, account, livemode))
    return answers.EventWithPayload.model_validate({**row, "payload": row["payload"].decode(errors="replace")})


def _one(request: Request, table: Table, key: str, account: str | None, livemode: bool | None) -> Any:  # noqa: ANN401, FBT001 - a row's mapping
    wanted = [table.c.id == key]
    if account is not None:
        wanted.append(table.c.account == account)
    if livemode is not None:
        wanted.append(table.c.livemode == livemode)
    with reading(request.app.state.engine) as connection:
        rows = connection.execute(select(table).where(*wanted).limit(2)).mappings().all()
    if not rows:
        raise NotFoundError("There is no such row here.")
    if len(rows) > 1:
        raise HTTPException(409, "Several accounts or modes know this id: add account= or livemode= to the address.")
    return rows[0]


def _page_of(
    request: Request, table: Table, wanted: list[ColumnElement[bool]], limit: int, cursor: str | None
) -> tuple[Sequence[Any], str | None]:
    """Return up to *limit* rows after *cursor*, newest first, and the cursor that follows them."""
    newest: ColumnElement[Any] = literal_column(tables.NEWEST)
    order = (newest, table.c.id, table.c.account, table.c.livemode)
    if cursor is not None:
        at, *key = _read_cursor(cursor, str, 4)
        wanted = [*wanted, tuple_(*order) < tuple_(func.to_timestamp(_seconds(at)), *key[:2], key[2] == "true")]
    query = (
        select(table, func.extract("epoch", newest).label("newest"))
        .where(and_(*wanted) if wanted else text("true"))
        .order_by(*(column.desc() for column in order))
        .limit(limit + 1)
    )
    with reading(request.app.state.engine) as connection:
        rows = connection.execute(query).mappings().all()
    if len(rows) <= limit:
        return rows, None
    last = rows[limit - 1]
    return rows[:limit], _cursor(str(last["newest"]), last["id"], last["account"], str(last["livemode"]).lower())


def _cursor(*parts: object) -> str:
    return base64.urlsafe_b64encode(msgspec.json.encode(parts)).decode()


def _read_cursor(cursor: str, kind: type[Any], length: int) -> list[Any]:
    try:
        parts = msgspec.json.decode(base64.urlsafe_b64decode(cursor.encode()), type=list[Any])
        if len(parts) == length and all(type(part) is kind and "\0" not in str(part) for part in parts):
            return parts
    except (binascii.Error, msgspec.DecodeError, UnicodeError):
        pass
    raise _no_cursor()


def _seconds(at: str) -> float:
    """Return the time of a cursor, in Unix seconds; those that do not say when they were created have -Infinity."""
    try:
        seconds = float(at)
    except ValueError:
        raise _no_cursor() from None
    if seconds != -math.inf and not 0 <= seconds <= CREATED_MAX:
        raise _no_cursor()
    return seconds


def _no_cursor() -> RequestValidationError:
    fault = {"type": "value_error", "loc": ("query", "cursor"), "msg": "it is no cursor of this list", "input": None}
    return RequestValidationError([fault])
