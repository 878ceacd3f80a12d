"""The schema, the settings, the tokens, and running it all."""

import hashlib
import os
import re
import secrets as random_secrets
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Final, TextIO

import typer
from sqlalchemy import Connection, ScalarSelect, Select, exists, func, select

from deploy import local, output
from deploy.commands.base import FAILED, MIGRATIONS_PENDING, FormatOption, first_line, opened_database, settings_here
from deploy.output import Format, err
from deploy.processes import Ended, Processes
from deploy.services import ServicesError
from schemas import database, envfile, migrate, tables
from schemas.errors import (
    ConfigurationError,
    ConflictError,
    DatabaseAway,
    PayfoldError,
)
from schemas.settings import SCOPES, Settings
from worker.slots import ENDS_MAX, ENDS_SECONDS, Ends

app: Final = typer.Typer()
migrate_app: Final = typer.Typer(help="Bring the schema to this release.", invoke_without_command=True)
tokens_app: Final = typer.Typer(help="Bearer tokens of the API.", no_args_is_help=True)


@migrate_app.callback()
def migrate_default(context: typer.Context) -> None:
    """Bring the schema to this release; `status` only tells."""
    if context.invoked_subcommand is None:
        migrate_up()


@migrate_app.command("up")
def migrate_up() -> None:
    """Apply the migrations that are pending."""
    applied = migrate.upgrade(settings_here().postgresql)
    err.print(f"Applied {', '.join(applied)}." if applied else "The schema is up to date.")


@migrate_app.command("status")
def migrate_status(form: FormatOption = Format.TABLE) -> None:
    """List the migrations that are pending; exit 4 if there are any."""
    with opened_database(behind_is_fine=True) as engine:
        with database.transaction(engine) as connection:
            pending = migrate.pending(connection)
        output.rows(
            [{"pending": revision} for revision in pending], ["pending"], form, empty="The schema is up to date."
        )
    if pending:
        raise typer.Exit(MIGRATIONS_PENDING)


@app.command()
def config(form: FormatOption = Format.TABLE) -> None:
    """Show the effective settings, and where each comes from; of a secret only that it is set."""
    settings = local.settings()
    laid = local.laid(settings)
    found = [
        {
            "setting": name.upper(),
            "value": value,
            "source": laid[name].source if name in laid else envfile.source_of(name, os.environ) or "default",
            "meaning": Settings.model_fields[name.lower()].description,
        }
        for name, value in local.here(settings).shown().items()
    ]
    output.rows(found, ["setting", "value", "source", "meaning"], form, empty="")


@tokens_app.command("new")
def tokens_new(
    name: Annotated[str, typer.Argument(help="Who holds it: letters, digits and _.")],
    scope: Annotated[str, typer.Option(help=f"What it may do: {', '.join(SCOPES)}.")] = "read",
) -> None:
    """Make a bearer token: show it once, and the entry for PAYFOLD_TOKENS, which holds only its hash."""
    if scope not in SCOPES:
        raise ConfigurationError(f"--scope is one of {', '.join(SCOPES)}.")
    if not re.fullmatch("[A-Za-z0-9_]{1,255}", name):
        raise ConfigurationError("NAME holds letters, digits and _ only. Example: payfold tokens new shop")
    token = f"pf_{random_secrets.token_urlsafe(24)}"
    entry = f"{name}:{scope}:{hashlib.sha256(token.encode()).hexdigest()}"
    Settings.load({"PAYFOLD_TOKENS": entry})
    output.one({"token": token, "PAYFOLD_TOKENS": entry}, Format.TABLE)


PortOption = Annotated[
    int | None, typer.Option(min=1, max=local.PORT_MAX, help="Port of the web process; else PORT, else 8000.")
]


@app.command()
def up(port: PortOption = None) -> None:
    """Run everything on this machine, with embedded servers where no URL is given, until Ctrl-C.

    Its signing secret and token stay with its data: a restart has the same ones.
    """
    settings = _settings_with(port)
    folder = settings.payfold_data_dir.absolute() / local.UP_FOLDER
    with local.stop_when_told():
        try:
            with local.running(settings, folder) as running:
                _introduce(running)
                _keep_running(running.processes)
        except KeyboardInterrupt:
            err.print("Stopped.")


def _settings_with(port: int | None) -> Settings:
    if port is not None:
        os.environ["PORT"] = str(port)  # the processes are to have it, too
    return local.settings()


def _keep_running(processes: Processes) -> None:
    """Start again what ends by itself, until a stop is asked for.

    Raises:
        ConflictError: one of them has ended too often.
    """
    ends = {name: Ends() for name in processes.names}
    while (ended := processes.wait()) is not None:
        if ends[ended.name].note() >= ENDS_MAX:
            minutes = round(ENDS_SECONDS / 60)
            raise ConflictError(f"{ended}\nIt ended {ENDS_MAX} times in {minutes} minutes, so the others were stopped.")
        err.print(f"{ended}\nIt is started again.", soft_wrap=True, markup=False, highlight=False)
        processes.start_one(ended.name)


def _introduce(running: local.Running) -> None:
    shown = {"webhook": f"{running.address}/webhooks/stripe", "API": f"{running.address}/docs"}
    shown["bearer token"] = "as configured" if running.token is None else running.token
    shown["signing secret"] = running.secret if running.is_secret_ours else "as configured"
    err.print("\nPayfold runs here until Ctrl-C:\n", style="bold")
    for label, value in shown.items():
        err.print(f"  {label:<16}{value}", soft_wrap=True)
    command = shlex.quote(os.environ.get(_CALLED_AS, "payfold"))
    err.print("\nNext, in another terminal: a first signed event, what became of it, and how to connect Stripe.\n")
    for arguments in ("emit checkout.session.completed", "events list", "init"):
        err.print(f"  {command} {arguments}", soft_wrap=True)
    err.print()


_CALLED_AS: Final = "PAYFOLD_CALLED_AS"
"""Set by deploy/dev, which stands in for the command in a checkout."""


@app.command()
def demo(
    orders: Annotated[int, typer.Option(min=1, max=1_000_000, help="How many orders the sandbox shop sells.")] = 1000,
    port: PortOption = None,
    leave: Annotated[bool, typer.Option("--exit", help="End after the summary.")] = False,
    seed: Annotated[int | None, typer.Option(help="Repeats an earlier demo.")] = None,
) -> None:
    """Run everything beside a sandbox Stripe that sells, and prove the tables; exit 0 only if the proof holds."""
    from deploy import demo as show
    from deploy.sandbox_shop import open_shop

    settings = _settings_with(port)
    show.refuse_the_orders_of_others(settings)
    seed = random_secrets.randbelow(10**6) if seed is None else seed
    holds = False
    ended: Ended | None = None
    with local.stop_when_told():
        try:
            with local.temporary_folder(settings) as folder:
                if envfile.source_of("PAYFOLD_LOG_LEVEL", os.environ) is None:
                    os.environ["PAYFOLD_LOG_LEVEL"] = "warning"
                err.print(f"A sandbox shop of seed {seed} sells {orders:,} orders.")
                with (
                    _shown_on_failure(folder / "processes.log") as log,
                    open_shop(seed, orders) as shop,
                    local.running(
                        settings, folder, environment=shop.environment, output=log, may_take_another_port=True
                    ) as running,
                ):
                    err.print(f"Payfold runs at {running.address}, beside a sandbox Stripe.\n")
                    try:
                        with running.processes.interrupting():
                            holds = show.run(running, shop, seed=seed, progress_to=err, summary_to=output.out)
                            if not leave:
                                _introduce(running)
                                local.wait_until_told()
                    finally:
                        ended = running.processes.ended
        except KeyboardInterrupt:
            err.print("Stopped.")
    if ended is not None:
        raise ConflictError(f"{ended}\nSo the demo was stopped.")
    if not holds:
        raise typer.Exit(FAILED)


@contextmanager
def _shown_on_failure(path: Path) -> Iterator[TextIO]:
    """Yield a file for what the processes say, which is only worth reading when something goes wrong."""
    with path.open("w") as log:
        try:
            yield log
        except (PayfoldError, ServicesError):
            err.print(path.read_text())
            raise


@app.command()
def status(form: FormatOption = Format.TABLE) -> None:
    """Show the health of the inbox and the tables on one screen."""
    from worker import folds

    settings = settings_here()
    found: dict[str, Any] = {"database": "ok"}
    behind: list[str] = []
    stripe = ""
    try:
        with opened_database(behind_is_fine=True) as engine, database.transaction(engine) as connection:
            behind = migrate.pending(connection)
            found["migrations"] = f"{len(behind)} pending: run `payfold migrate up`" if behind else "ok"
            if not behind:
                found |= dict(connection.execute(_status_query(folds.FOLD_VERSION)).mappings().one())
                found |= _archived_of(found, form)
                stripe = _stripe_status(connection)
    except DatabaseAway as error:
        found["database"] = f"away: {first_line(error.__cause__)}"
    found["broker"] = _broker_status(settings)
    found["stripe"] = stripe or ("no job has run yet" if settings.api_keys else "not set: STRIPE_API_KEY")
    output.one(found, form)
    if behind:
        raise typer.Exit(MIGRATIONS_PENDING)
    if found["database"] != "ok":
        raise typer.Exit(FAILED)


def _archived_of(found: dict[str, Any], form: Format) -> dict[str, Any]:
    """Return what is to be folded anew with what of it is archived, and so left to whoever has the archive."""
    anew, archived = found["to_fold_anew"], found["to_fold_anew_archived"]
    if form is not Format.TABLE or not archived:
        return {}
    told = f"{anew:,}, {archived:,} of them archived: payfold rebuild --archive DIR --swap"
    return {"to_fold_anew": told}


def _status_query(fold_version: int) -> Select[Any]:
    inbox, pending, outcomes, payloads = tables.inbox, tables.pending, tables.outcomes, tables.payloads
    at_hand = exists().where(payloads.c.seq == outcomes.c.seq)
    waiting = select(inbox.c.received_at).join(pending, pending.c.seq == inbox.c.seq).order_by(pending.c.seq).limit(1)
    return select(
        select(func.count()).select_from(pending).scalar_subquery().label("pending"),
        select(func.count()).where(pending.c.due_at > func.now()).scalar_subquery().label("pending_to_be_tried_again"),
        waiting.scalar_subquery().label("oldest_pending_received_at"),
        select(func.count()).where(outcomes.c.state == "parked").scalar_subquery().label("parked"),
        select(func.count()).where(outcomes.c.fold_version < fold_version).scalar_subquery().label("to_fold_anew"),
        select(func.count())
        .where(outcomes.c.fold_version < fold_version, ~at_hand)
        .scalar_subquery()
        .label("to_fold_anew_archived"),
        select(func.count())
        .where(tables.anomalies.c.resolved_at.is_(None))
        .scalar_subquery()
        .label("anomalies_in_force"),
        select(func.max(inbox.c.seq)).scalar_subquery().label("last_event_seq"),
        select(inbox.c.received_at)
        .order_by(inbox.c.seq.desc())
        .limit(1)
        .scalar_subquery()
        .label("last_event_received_at"),
        select(func.max(tables.changes.c.seq)).scalar_subquery().label("last_change_seq"),
        _last_reconciliation().label("reconciled"),
    )


def _last_reconciliation() -> ScalarSelect[Any]:
    runs = tables.reconciliations
    told = func.format(
        "%s: %s, %s differences",
        func.to_char(runs.c.finished_at.op("AT TIME ZONE")("UTC"), "YYYY-MM-DD HH24:MI"),
        runs.c.outcome,
        runs.c.drift,
    )
    return select(told).order_by(runs.c.id.desc()).limit(1).scalar_subquery()


def _stripe_status(connection: Connection) -> str:
    """Return what the jobs at Stripe have come to: first the refused and the failing."""
    jobs, calls = tables.stripe_jobs, tables.stripe_calls
    is_stopped = jobs.c.stopped_until > datetime.now(UTC)
    in_trouble = connection.execute(
        select(
            jobs.c.job, jobs.c.account, jobs.c.livemode, is_stopped, jobs.c.stopped, jobs.c.failure, jobs.c.failed_at
        )
        .where(is_stopped | jobs.c.failure.is_not(None))
        .order_by(is_stopped.desc().nulls_last(), jobs.c.job, jobs.c.account, jobs.c.livemode)
    ).all()
    if in_trouble:
        return "; ".join(_trouble(*row) for row in in_trouble)
    ran = connection.execute(select(func.max(jobs.c.done_at), func.sum(jobs.c.found))).one()
    if ran[0] is None:
        return ""
    waiting, given_up = connection.execute(
        select(
            func.count().filter(calls.c.given_up.is_(None)), func.count().filter(calls.c.given_up.is_not(None))
        ).select_from(calls)
    ).one()
    told = f"ok, last job at {output.shown(ran[0])}, {waiting} calls waiting, {given_up} given up"
    return f"{told}, {ran[1]} events fetched that never came"


def _trouble(
    job: str,
    account: str,
    livemode: bool,  # noqa: FBT001 - a row's columns
    is_stopped: bool | None,  # noqa: FBT001 - as above
    stopped: str,
    failure: str,
    failed_at: datetime,
) -> str:
    of = f"{job} of {account or 'the default account'} ({'live' if livemode else 'test'})"
    if is_stopped:
        return f"STOPPED {of}: {stopped}"
    return f"FAILING {of} since {output.shown(failed_at)}: {failure}"


def _broker_status(settings: Settings) -> str:
    from redis.exceptions import RedisError

    from schemas import broker

    if settings.redis_url is None:
        return "not set: REDIS_URL"
    try:
        waiting = broker.redis(settings).llen(broker.FOLD_QUEUE)
    except (RedisError, OSError):
        return "away: events are recorded, and folded once it is back"
    return f"ok, {waiting} messages waiting"
