"""What happened in a period, and how far the sessions of each payment link came."""

from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from typing import Annotated, Final

from fastapi import APIRouter, Depends, Query, Request
from fastapi.exceptions import RequestValidationError

from api import reads
from api.reads import Account, Filters, FilterText, Livemode, Moment
from api.tokens import require
from schemas import answers, summary
from schemas.answers import Page
from schemas.errors import ConfigurationError
from schemas.summary import LinkKey, Period, Summary

DAYS_MAX: Final = timedelta(days=400)

router: Final = APIRouter(prefix="/v1", dependencies=[Depends(require("read"))], route_class=reads.Route)

Since = Annotated[
    Moment | None,
    Query(description="the period's begin, as 2026-11-01T00:00:00Z; a day before its end, unless given"),
]
Until = Annotated[Moment | None, Query(description="the period's end; now, unless given")]


class FunnelFilters(Filters):
    """Filters of the funnel."""

    payment_link: FilterText = None


@router.get("/summary", tags=["summary"])
def summarize(
    request: Request, since: Since = None, until: Until = None, account: Account = None, livemode: Livemode = None
) -> answers.SummaryOfPeriod:
    """Count orders, refunds and disputes of a period, for each account and mode, with their money by currency.

    The period is rounded outward to whole hours. Orders and refunds count in the hour of their creation, a dispute in
    that of its deciding event.
    """
    period = _period(since, until)
    with reads.reading(request.app.state.engine) as connection:
        found = summary.read(connection, period, account=account, livemode=livemode)
    return answers.SummaryOfPeriod(since=period.since, until=period.until, data=[_shown(each) for each in found])


@router.get("/summary/days", tags=["summary"])
def summarize_days(
    request: Request, since: Since = None, until: Until = None, account: Account = None, livemode: Livemode = None
) -> answers.DaysOfPeriod:
    """Count the orders of each day of a period, by status and currency, with their money."""
    period = _period(since, until)
    if period.until - period.since > DAYS_MAX:
        fault = f"the period has more than {DAYS_MAX.days} days"
        raise RequestValidationError([{"type": "value_error", "loc": ("query", "since"), "msg": fault, "input": None}])
    with reads.reading(request.app.state.engine) as connection:
        found = summary.days(connection, period, account=account, livemode=livemode)
    data = [answers.SumOfDay.model_validate(asdict(each)) for each in found]
    return answers.DaysOfPeriod(since=period.since, until=period.until, data=data)


def _period(since: datetime | None, until: datetime | None) -> Period:
    try:
        return summary.period_of(since, until, now=datetime.now(UTC))
    except ConfigurationError as error:
        fault = {"type": "value_error", "loc": ("query", "since"), "msg": str(error), "input": None}
        raise RequestValidationError([fault]) from None


def _shown(found: Summary) -> answers.Summary:
    counts = [answers.CountOfStatus(status=status, count=count) for status, count in found.orders_by_status.items()]
    return answers.Summary.model_validate({**asdict(found), "orders_by_status": counts})


@router.get("/funnel", tags=["payment links"])
def show_funnel(request: Request, filters: Annotated[FunnelFilters, Query()]) -> Page[answers.LinkFunnel]:
    """Show how far the sessions of each payment link came, by currency, in the order of the links' ids."""
    given = filters.model_dump(include={"account", "livemode", "payment_link"})
    after = None if filters.cursor is None else _key_of(filters.cursor)
    with reads.reading(request.app.state.engine) as connection:
        page = summary.funnel(connection, **given, after=after, limit=filters.limit)
    shown = [answers.LinkFunnel.model_validate(asdict(row)) for row in page.rows]
    return Page[answers.LinkFunnel](data=shown, next_cursor=None if page.after is None else _cursor_of(page.after))


def _cursor_of(key: LinkKey) -> str:
    currency = "" if key.currency is None else f"={key.currency}"
    return reads.cursor_of(key.account, str(key.livemode).lower(), key.payment_link, currency)


def _key_of(cursor: str) -> LinkKey:
    account, mode, link, currency = reads.read_cursor(cursor, str, 4)
    return LinkKey(account, mode == "true", link, currency[1:] if currency else None)
