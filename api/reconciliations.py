"""Reconciliations: those that ended with their reports, and asking for one, which a worker then does."""

from typing import Annotated, Any, Final, Literal

from celery import Celery
from fastapi import APIRouter, Depends, Path, Query, Request, Response
from fastapi.responses import HTMLResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException

from api import problems, reads
from api.report import page as report
from api.tokens import require
from schemas import answers, broker, reconciliations
from schemas.answers import Page
from schemas.database import cursor, transaction
from schemas.errors import ConflictError, NotFoundError
from schemas.reconciliations import REBUILD, RULES, STRIPE
from schemas.settings import Settings, Token

router: Final = APIRouter(prefix="/v1", tags=["reconciliations"])

Number = Annotated[int, Path(ge=1, lt=2**63, description="its number")]
_readers: Final = [Depends(require("read"))]


class ReconciliationFilters(BaseModel):
    """Filters of reconciliations. Each is of all accounts and modes together."""

    model_config = ConfigDict(extra="forbid")

    limit: int = Field(reads.ROWS_DEFAULT, ge=1, le=reads.ROWS_MAX, description="rows on a page")
    cursor: str | None = Field(None, max_length=1024, description="`next_cursor` of the page before")
    state: Literal["waiting", "running", "failed", "done"] | None = None
    outcome: Literal["ok", "drift", "incomplete"] | None = None


@router.get("/reconciliations", dependencies=_readers)
def list_reconciliations(
    request: Request, filters: Annotated[ReconciliationFilters, Query()]
) -> Page[answers.Reconciliation]:
    """List reconciliations, newest first: those that ended, and those that were asked for."""
    before = None if filters.cursor is None else reads.read_cursor(filters.cursor, int, 1)[0]
    query = reconciliations.listed(state=filters.state, outcome=filters.outcome, before=before, limit=filters.limit + 1)
    with reads.reading(request.app.state.engine) as connection:
        rows = connection.execute(query).mappings().all()
    following = reads.cursor_of(rows[filters.limit - 1]["id"]) if len(rows) > filters.limit else None
    return Page(data=[answers.Reconciliation(**row) for row in rows[: filters.limit]], next_cursor=following)


@router.get("/reconciliations/{number}", dependencies=_readers, responses=problems.declared(404))
def show_reconciliation(request: Request, number: Number) -> answers.ReconciliationWithResult:
    """Show one reconciliation, with its result once it has ended."""
    row = _row(request, number)
    result = None if row["result"] is None else reconciliations.whole(row["result"], row["details"])
    return answers.ReconciliationWithResult(**{**row, "result": result})


@router.get(
    "/reconciliations/{number}/report",
    dependencies=_readers,
    response_class=HTMLResponse,
    responses=problems.declared(404, 409, 410),
)
def show_report(request: Request, number: Number) -> HTMLResponse:
    """Return the report of a reconciliation: the page that `payfold reconcile --report` writes."""
    row = _row(request, number)
    if row["result"] is None:
        raise ConflictError(f"This reconciliation has no result: it is {row['state']}.")
    if row["details"] is None:
        raise HTTPException(410, "Of this reconciliation the sums alone are kept.")
    made = report.page(reconciliations.whole(row["result"], row["details"]))
    policy = f"{made.policy}; frame-ancestors 'none'"
    return HTMLResponse(made.html, headers={"Content-Security-Policy": policy})


@router.post("/reconciliations", status_code=202, responses=problems.declared(409))
def ask_for_reconciliation(
    request: Request,
    response: Response,
    token: Annotated[Token, Depends(require("admin"))],
    stripe: Annotated[bool, Query(description="ask Stripe too, within the budget of calls")] = False,  # noqa: FBT002 - a part of the address
) -> answers.Reconciliation:
    """Ask for a reconciliation, which a worker begins within a minute: money rules, a rebuild, and on request Stripe.

    Only one at a time waits or runs. It is asked for under the name of the token.
    """
    settings: Settings = request.app.state.settings
    if stripe and not settings.api_keys:
        raise ConflictError("STRIPE_API_KEY is not set here, so Stripe cannot be asked.")
    checks = [RULES, REBUILD, *([STRIPE] if stripe else [])]
    engine = request.app.state.engine
    with reads.in_time(), transaction(engine, reads.bounds_of(engine)) as connection, cursor(connection) as opened:
        number = reconciliations.ask(opened, checks, by=token.name)
    app: Celery = request.app.state.celery
    broker.send(app, broker.RECONCILE_ASKED, queue=broker.STRIPE_QUEUE)
    response.headers["Location"] = f"/v1/reconciliations/{number}"
    return answers.Reconciliation(**_row(request, number))


def _row(request: Request, number: int) -> Any:  # noqa: ANN401 - a row's mapping
    with reads.reading(request.app.state.engine) as connection:
        row = connection.execute(reconciliations.one(number)).mappings().one_or_none()
    if row is None:
        raise NotFoundError("There is no such reconciliation here.")
    return row
