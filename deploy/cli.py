"""The ``payfold`` command. Data goes to stdout, everything else to stderr."""

import hashlib
import os
import re
import secrets as random_secrets
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, TextIO

import msgspec
import typer
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from sqlalchemy import Connection, Engine, Select, Table, func, select
from sqlalchemy.exc import DBAPIError

from deploy import local, output
from deploy.output import Format, err
from deploy.services import ServicesError
from schemas import database, logs, migrate, tables
from schemas.errors import (
    ConfigurationError,
    ConflictError,
    DatabaseAway,
    MigrationsPendingError,
    NotFoundError,
    PayfoldError,
)
from schemas.settings import SCOPES, Settings

if TYPE_CHECKING:
    from worker.acting import Desk, Round
    from worker.operator import Found

FAILED: Final = 1
USAGE: Final = 2
MIGRATIONS_PENDING: Final = 4

app: Final = typer.Typer(
    name="payfold",
    help="Stripe's checkout events, folded into order tables that can be proven right.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
migrate_app: Final = typer.Typer(help="Bring the schema to this release.", invoke_without_command=True)
events_app: Final = typer.Typer(help="The inbox.", no_args_is_help=True)
orders_app: Final = typer.Typer(help="The order table.", no_args_is_help=True)
sessions_app: Final = typer.Typer(help="Open sessions at Stripe: find them, expire them.", no_args_is_help=True)
gaps_app: Final = typer.Typer(help="Events that never came.", no_args_is_help=True)
tokens_app: Final = typer.Typer(help="Bearer tokens of the API.", no_args_is_help=True)
_GROUPS: Final = {
    "migrate": migrate_app,
    "events": events_app,
    "orders": orders_app,
    "sessions": sessions_app,
    "gaps": gaps_app,
    "tokens": tokens_app,
}
for name, group in _GROUPS.items():
    app.add_typer(group, name=name)

FormatOption = Annotated[Format, typer.Option("--format", help="How rows are printed.")]
AccountOption = Annotated[str | None, typer.Option("--account", help="Only this Stripe account.")]
ModeOption = Annotated[bool | None, typer.Option("--live/--test", help="Only this mode.", show_default=False)]
_TIMES: Final = ["%Y-%m-%d", "%Y-%m-%dT%H:%M:%S", "%Y-%m-%dT%H:%M:%S%z"]
Since = Annotated[
    datetime | None,
    typer.Option(formats=_TIMES, metavar="TIME", help="Only events created from then on: 2026-01-31T12:00:00, UTC."),
]
Until = Annotated[
    datetime | None,
    typer.Option(formats=_TIMES, metavar="TIME", help="Only events created before then: 2026-02-01, UTC."),
]


def main() -> None:
    """Run the command and end the process: 0 ok, 1 failed, 2 usage or configuration, 4 migrations pending."""
    try:
        app()
    except ConfigurationError as error:
        _fail(error, USAGE)
    except MigrationsPendingError as error:
        _fail(error, MIGRATIONS_PENDING)
    except DatabaseAway as error:
        _fail(f"PostgreSQL does not answer, so check DATABASE_URL: {_first_line(error.__cause__)}", FAILED)
    except (DBAPIError, database.DriverError) as error:
        _fail(f"PostgreSQL refused this: {_refusal(error)}", FAILED)
    except (PayfoldError, ServicesError) as error:
        _fail(error, FAILED)


def _fail(words: object, code: int) -> None:
    err.print(str(words), style="red")
    sys.exit(code)


def _first_line(error: BaseException | None) -> str:
    cause = error.orig if isinstance(error, DBAPIError) else error
    return str(cause).partition("\n")[0]


def _refusal(error: DBAPIError | database.DriverError) -> str:
    # What it says of data may quote the data.
    return database.condition(error) if database.is_fault_of_data(error) else _first_line(error)


def _settings() -> Settings:
    settings = local.here(Settings.load())
    logs.configure(settings)
    return settings


@contextmanager
def _database(*, behind_is_fine: bool = False, connections_max: int = 5) -> Iterator[Engine]:
    """Yield an engine on the database, whose schema is this release's."""
    engine = database.engine(_settings().postgresql, connections_max=connections_max)
    try:
        if not behind_is_fine:
            with database.transaction(engine) as connection:
                if migrate.pending(connection):
                    raise MigrationsPendingError
        yield engine
    finally:
        engine.dispose()


# The schema and the settings.


@migrate_app.callback()
def migrate_default(context: typer.Context) -> None:
    """Bring the schema to this release; `status` only tells."""
    if context.invoked_subcommand is None:
        migrate_up()


@migrate_app.command("up")
def migrate_up() -> None:
    """Apply the migrations that are pending."""
    applied = migrate.upgrade(_settings().postgresql)
    err.print(f"Applied {', '.join(applied)}." if applied else "The schema is up to date.")


@migrate_app.command("status")
def migrate_status(form: FormatOption = Format.TABLE) -> None:
    """List the migrations that are pending; exit 4 if there are any."""
    with _database(behind_is_fine=True) as engine:
        with database.transaction(engine) as connection:
            pending = migrate.pending(connection)
        output.rows(
            [{"pending": revision} for revision in pending], ["pending"], form, empty="The schema is up to date."
        )
    if pending:
        raise typer.Exit(MIGRATIONS_PENDING)


@app.command()
def config(form: FormatOption = Format.TABLE) -> None:
    """Show the effective settings; secrets only say that they are set."""
    shown = local.here(Settings.load()).shown()
    about = {key.upper(): field.description for key, field in Settings.model_fields.items()}
    found = [{"setting": key, "value": value, "meaning": about[key]} for key, value in shown.items()]
    output.rows(found, ["setting", "value", "meaning"], form, empty="")


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


# Running.


@app.command()
def up() -> None:
    """Run everything on this machine, with embedded servers where no URL is given, until Ctrl-C."""
    settings = Settings.load()
    folder = settings.payfold_data_dir.absolute() / local.UP_FOLDER
    ended = None
    with local.stop_when_told():
        try:
            with local.running(settings, folder) as running:
                _introduce(running)
                ended = running.processes.wait()
        except KeyboardInterrupt:
            err.print("Stopped.")
    if ended:
        raise ConflictError(f"The {ended} process ended by itself, so the others were stopped.")


def _introduce(running: local.Running) -> None:
    told = {"webhook": f"{running.address}/webhooks/stripe", "API": f"{running.address}/docs"}
    if running.token is not None:
        told["bearer token"] = running.token
    told["signing secret"] = "as configured" if "STRIPE_WEBHOOK_SECRETS" in os.environ else running.secret
    err.print("\nPayfold runs here until Ctrl-C:\n", style="bold")
    for label, value in told.items():
        err.print(f"  {label:<16}{value}", soft_wrap=True)
    err.print()


@app.command()
def demo(
    orders: Annotated[int, typer.Option(min=1, max=1_000_000, help="How many orders the sandbox shop sells.")] = 1000,
    leave: Annotated[bool, typer.Option("--exit", help="End after the summary.")] = False,
    seed: Annotated[int | None, typer.Option(help="Repeats an earlier demo.")] = None,
) -> None:
    """Run everything beside a sandbox Stripe that sells, and prove the tables; exit 0 only if the proof holds."""
    from deploy import demo as show
    from deploy.sandbox_shop import open_shop

    settings = Settings.load()
    show.refuse_the_orders_of_others(settings)
    seed = random_secrets.randbelow(10**6) if seed is None else seed
    holds = False
    with local.stop_when_told():
        try:
            with local.temporary_folder(settings) as folder:
                os.environ.setdefault("PAYFOLD_LOG_LEVEL", "warning")
                err.print(f"A sandbox shop of seed {seed} sells {orders:,} orders.")
                with (
                    _shown_on_failure(folder / "processes.log") as log,
                    open_shop(seed, orders) as shop,
                    local.running(settings, folder, environment=shop.environment, output=log) as running,
                ):
                    err.print(f"Payfold runs at {running.address}, beside a sandbox Stripe.\n")
                    holds = show.run(running, shop, seed=seed, progress_to=err, summary_to=output.out)
                    if not leave:
                        _introduce(running)
                        running.processes.wait()
        except KeyboardInterrupt:
            err.print("Stopped.")
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

    settings = _settings()
    found: dict[str, Any] = {"database": "ok"}
    behind: list[str] = []
    stripe = ""
    try:
        with _database(behind_is_fine=True) as engine, database.transaction(engine) as connection:
            behind = migrate.pending(connection)
            found["migrations"] = f"{len(behind)} pending: run `payfold migrate up`" if behind else "ok"
            if not behind:
                found |= dict(connection.execute(_status_query(folds.FOLD_VERSION)).mappings().one())
                stripe = _stripe_status(connection)
    except DatabaseAway as error:
        found["database"] = f"away: {_first_line(error.__cause__)}"
    found["broker"] = _broker_status(settings)
    found["stripe"] = stripe or ("no job has run yet" if settings.api_keys else "not set: STRIPE_API_KEY")
    output.one(found, form)
    if behind:
        raise typer.Exit(MIGRATIONS_PENDING)
    if found["database"] != "ok":
        raise typer.Exit(FAILED)


def _status_query(fold_version: int) -> Select[Any]:
    inbox, pending, outcomes = tables.inbox, tables.pending, tables.outcomes
    waiting = select(inbox.c.received_at).join(pending, pending.c.seq == inbox.c.seq).order_by(pending.c.seq).limit(1)
    return select(
        select(func.count()).select_from(pending).scalar_subquery().label("pending"),
        waiting.scalar_subquery().label("oldest_pending_received_at"),
        select(func.count()).where(outcomes.c.state == "parked").scalar_subquery().label("parked"),
        select(func.count()).where(outcomes.c.fold_version < fold_version).scalar_subquery().label("to_fold_anew"),
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
    )


def _stripe_status(connection: Connection) -> str:
    """Say what the jobs at Stripe have come to: the refused first."""
    jobs, calls = tables.stripe_jobs, tables.stripe_calls
    now = datetime.now(UTC)
    stopped = connection.execute(
        select(jobs.c.job, jobs.c.account, jobs.c.stopped).where(jobs.c.stopped_until > now).order_by(jobs.c.job)
    ).all()
    if stopped:
        return "; ".join(
            f"STOPPED {row.job} of {row.account or 'the default account'}: {row.stopped}" for row in stopped
        )
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


# The inbox.

EventId = Annotated[str, typer.Argument(metavar="EVENT", help="Its id, as evt_1….")]
_EVENT_COLUMNS: Final = ("seq", "id", "type", "object_id", "created", "state", "reason")


@events_app.command("list")
def events_list(
    state: Annotated[str | None, typer.Option(help=f"Only those {', '.join(tables.STATES)}.")] = None,
    kind: Annotated[str | None, typer.Option("--type", help="Only this type.")] = None,
    object_id: Annotated[str | None, typer.Option("--object", help="Only those of this object.")] = None,
    account: AccountOption = None,
    livemode: ModeOption = None,
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="How many.")] = 50,
    form: FormatOption = Format.TABLE,
) -> None:
    """List events, last recorded first."""
    if state is not None and state not in tables.STATES:
        raise ConfigurationError(f"--state is one of {', '.join(tables.STATES)}.")
    given = {"state": state, "type": kind, "object_id": object_id, "account": account, "livemode": livemode}
    wanted = [tables.events.c[column] == value for column, value in given.items() if value is not None]
    columns = [tables.events.c[column] for column in (*_EVENT_COLUMNS, "account", "livemode", "source", "received_at")]
    query = select(*columns).where(*wanted).order_by(tables.events.c.seq.desc()).limit(limit)
    with _database() as engine, database.transaction(engine) as connection:
        found = connection.execute(query).mappings().all()
    shown = _EVENT_COLUMNS if form is Format.TABLE else [column.name for column in columns]
    output.rows([dict(row) for row in found], shown, form, empty="No such event.")


@events_app.command("show")
def events_show(
    event_id: EventId, account: AccountOption = None, livemode: ModeOption = None, form: FormatOption = Format.TABLE
) -> None:
    """Show one event with its payload, which holds personal data."""
    with _database() as engine:
        row = _one(engine, tables.events, event_id, account=account, livemode=livemode)
    output.one({**row, "payload": row["payload"].decode(errors="replace")}, form)


@events_app.command("retry")
def events_retry(event_id: EventId, account: AccountOption = None, livemode: ModeOption = None) -> None:
    """Fold an event again, now and in this process; exit 1 if it is parked again."""
    from worker import operator

    with _database() as engine:
        found = operator.retry(engine, event_id, now=datetime.now(UTC), account=account, livemode=livemode)
    _tell(found)
    if found.state == "parked":
        raise typer.Exit(FAILED)


@events_app.command("ignore")
def events_ignore(
    event_id: EventId,
    reason: Annotated[str, typer.Option(help="Why, for whoever looks later.")] = "",
    account: AccountOption = None,
    livemode: ModeOption = None,
) -> None:
    """Set a parked event aside, as an observation that replays like everything else."""
    from worker import operator

    with _database() as engine:
        now = datetime.now(UTC)
        _tell(operator.ignore(engine, event_id, reason=reason, now=now, account=account, livemode=livemode))


def _tell(found: "Found") -> None:
    err.print(f"{found.id} is {found.state}" + (f": {output.shown(found.reason)}" if found.reason else "."))


@events_app.command("export")
def events_export(
    to: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="A file, compressed as its ending says: events.zst, .gz, or plain."),
    ] = None,
    since: Since = None,
    until: Until = None,
) -> None:
    """Write the inbox as a log that `replay` reads, an event a line: to stdout, or better to a .zst file."""
    from worker.eventlog import writing
    from worker.replay import Filters, export

    filters = Filters(since=_utc(since), until=_utc(until))
    written = 0
    with _database() as engine, nullcontext(sys.stdout.buffer) if to is None else writing(to) as stream:
        for line in export(engine, filters=filters):
            stream.write(line)
            written += 1
        stream.flush()
    if to is not None:
        err.print(f"Wrote {written:,} events to {to}.")


def _utc(moment: datetime | None) -> datetime | None:
    return moment if moment is None or moment.tzinfo else moment.replace(tzinfo=UTC)


def _one(engine: Engine, table: Table, key: str, *, account: str | None, livemode: bool | None) -> dict[str, Any]:
    query = select(table).where(table.c.id == key).limit(2)
    if account is not None:
        query = query.where(table.c.account == account)
    if livemode is not None:
        query = query.where(table.c.livemode == livemode)
    with database.transaction(engine) as connection:
        found = connection.execute(query).mappings().all()
    if not found:
        raise NotFoundError(f"There is no {key} here.")
    if len(found) > 1:
        raise ConflictError(f"Several accounts or modes have {key}: say which (--account, --live, --test).")
    return dict(found[0])


# Logs and proof.

_COUNTS: Final = (
    "seen",
    "filtered",
    "new",
    "newer rendering",
    "duplicate",
    "folded",
    "ignored",
    "parked",
    "pending",
    "refused",
)


@app.command()
def replay(
    files: Annotated[list[str], typer.Argument(help="Logs: NDJSON, an array, list pages; .gz, .zst; - is stdin.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Write nothing; say what would be new.")] = False,
    since: Since = None,
    until: Until = None,
    kind: Annotated[str | None, typer.Option("--type", help="Only this type; * stands for anything.")] = None,
    account: Annotated[str, typer.Option(help="The account of events that name none.")] = "",
    form: FormatOption = Format.TABLE,
) -> None:
    """Record what the inbox lacks of the logs, then fold it; exit 1 if a line could not be read."""
    from worker import replay as logs_of_events

    for file in files:
        _require_readable(file)
    filters = logs_of_events.Filters(since=_utc(since), until=_utc(until), type=kind)
    columns = (SpinnerColumn(), TextColumn("{task.completed:,} events"), TimeElapsedColumn())
    with _database() as engine, Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
        task = bar.add_task("", total=None)
        counts = logs_of_events.replay(
            engine,
            files,
            filters=filters,
            account=account,
            now=datetime.now(UTC),
            dry_run=dry_run,
            refuse=lambda entry: bar.console.print(f"{entry.place}: {entry.fault}"),
            progress=lambda entries: bar.advance(task, entries),
        )
    output.one({count: counts[count] for count in _COUNTS}, form)
    if counts["refused"]:
        raise typer.Exit(FAILED)


def _require_readable(file: str) -> None:
    """Find out before anything is recorded; a pipe is as good as a file."""
    path = Path(file)
    if file == "-":
        return
    if not path.exists():
        raise ConfigurationError(f"There is no file {file}.")
    if path.is_dir():
        raise ConfigurationError(f"{file} is a folder: name the files in it, as {file}/*.")
    if not os.access(path, os.R_OK):
        raise ConfigurationError(f"{file} may not be read by this user.")


@app.command()
def digest(
    table: Annotated[str | None, typer.Option(help="Only this table.")] = None, form: FormatOption = Format.TABLE
) -> None:
    """Print one line per projection table and one for all: its name, its rows, and the hash of them."""
    from worker.digest import digests

    known = [each.name for each in tables.PROJECTIONS]
    if table is not None and table not in known:
        raise ConfigurationError(f"--table is one of {', '.join(known)}.")
    with _database() as engine:
        found = [each for each in digests(engine) if table in (None, each.table)]
    if form is Format.TABLE:
        for each in found:
            output.out.print(f"{each.table:<24}{each.rows:>12}  {each.sha256}")
    else:
        rows = [{"table": each.table, "rows": each.rows, "sha256": each.sha256} for each in found]
        output.rows(rows, ["table", "rows", "sha256"], form, empty="")


@orders_app.command("show")
def orders_show(
    order_id: Annotated[str, typer.Argument(metavar="ORDER", help="The id of its Checkout Session, as cs_live_1….")],
    account: AccountOption = None,
    livemode: ModeOption = None,
    form: FormatOption = Format.TABLE,
) -> None:
    """Show one order."""
    with _database() as engine:
        output.one(_one(engine, tables.orders, order_id, account=account, livemode=livemode), form)


# What is done at Stripe.


@sessions_app.command("expire")
def sessions_expire(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Expire nothing; say what would go, and why.")] = False,
    form: FormatOption = Format.TABLE,
) -> None:
    """Expire the open sessions that are stale, now; by our clock where no key serves them."""
    from worker import expiry

    with _desk(wants_key=False) as desk:
        if dry_run:
            found = expiry.listed(desk)
            output.rows(found, expiry.LISTED, form, empty="No open session is stale.")
            return
        _act(desk, expiry.run_once, form, "Expiring stale sessions")


@sessions_app.command("poll")
def sessions_poll(form: FormatOption = Format.TABLE) -> None:
    """Ask Stripe for its open sessions, now, and record those that are not known."""
    from worker import discovery

    with _desk() as desk:
        _act(desk, discovery.run_once, form, "Asking for open sessions")


@gaps_app.command("fill")
def gaps_fill(
    since: Annotated[
        datetime | None,
        typer.Option(formats=_TIMES, metavar="TIME", help="From then on, 30 days ago at most; else the checkpoint."),
    ] = None,
    form: FormatOption = Format.TABLE,
) -> None:
    """Ask Stripe for the events of the last while, now, and record those that never came."""
    from worker import gaps

    start = _utc(since)
    with _desk() as desk:
        _act(desk, lambda desk: gaps.run_once(desk, since=start), form, "Asking for events that never came")


@contextmanager
def _desk(*, wants_key: bool = True) -> Iterator["Desk"]:
    """Yield what the jobs at Stripe need, with a key."""
    from schemas import broker
    from schemas.stripe_api import StripeApi
    from worker.acting import THREADS, Desk

    settings = _settings()
    if wants_key and not settings.api_keys:
        raise ConfigurationError(
            "STRIPE_API_KEY: it is not set, so Stripe cannot be asked. Set it to a secret or restricted key. "
            "Example: STRIPE_API_KEY=sk_test_a"
        )
    # All processes draw calls from one budget, which Redis keeps.
    redis = broker.redis(settings) if settings.api_keys else None
    with _database(connections_max=THREADS + 1) as engine:
        yield Desk(engine, StripeApi(settings, redis), settings)


def _act(desk: "Desk", run_once: "Callable[[Desk], Round]", form: Format, words: str) -> None:
    """Do a job to its end, fold what it recorded, and say what came of it; exit 1 if Stripe did not let us."""
    from worker import projection

    recorded, counted, failed = 0, Counter[str](), list[str]()
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TextColumn("{task.completed:,}"), TimeElapsedColumn())
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
        task = bar.add_task(words, total=None)
        while True:
            found = run_once(desk)
            recorded += found.recorded
            counted.update(found.counted)
            failed += found.failed
            bar.advance(task, sum(found.counted.values()) or found.recorded)
            while projection.run_once(desk.engine, now=datetime.now(UTC)):
                pass
            if failed or not found.is_more:
                break
    output.one({"recorded": recorded, **counted}, form)
    for reason in failed:
        err.print(reason, style="red")
    if failed:
        raise typer.Exit(FAILED)


@app.command()
def emit(
    kind: Annotated[str, typer.Argument(metavar="TYPE", help="The event's type, as checkout.session.completed.")],
    override: Annotated[
        list[str] | None, typer.Option(help="KEY=VALUE of the object; the value as JSON or text.")
    ] = None,
    to: Annotated[str | None, typer.Option(help="Where to send it; the webhook here by default.")] = None,
) -> None:
    """Send a signed sample delivery; exit 1 unless it is accepted."""
    import httpx

    from deploy.sandbox import SandboxError
    from deploy.sandbox.samples import sample
    from deploy.sandbox.signing import sign

    settings = _settings()
    if not settings.signing_secrets:
        raise ConfigurationError(
            "STRIPE_WEBHOOK_SECRETS: it is not set, so nothing can be signed. Set it to the endpoint's signing secret, "
            "which `payfold up` prints. Example: STRIPE_WEBHOOK_SECRETS=whsec_a"
        )
    try:
        event = sample(kind, dict(_override(each) for each in override or []), now=int(time.time()))
    except SandboxError as error:
        raise ConfigurationError(str(error)) from None
    url = to or f"http://127.0.0.1:{settings.port}/webhooks/stripe"
    header = sign(event.body, settings.signing_secrets[0].secret.decode(), int(time.time()))
    try:
        answer = httpx.post(url, content=event.body, headers={"Stripe-Signature": header}, timeout=20)
    except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
        raise ConfigurationError(f"--to is no address to post to: {error} Example: http://127.0.0.1:8000") from None
    except httpx.HTTPError as error:
        raise ConflictError(
            f"{url} does not answer ({type(error).__name__}): does the web process run there?"
        ) from None
    output.one({"id": event.id, "type": event.type, "sent_to": url, "status": answer.status_code}, Format.TABLE)
    if not answer.is_success:
        err.print(answer.text)
        raise typer.Exit(FAILED)


def _override(given: str) -> tuple[str, Any]:
    key, equals, value = given.partition("=")
    if not equals or not key:
        raise ConfigurationError(f"--override wants KEY=VALUE, as amount_total=500; {given} is not that.")
    try:
        return key, msgspec.json.decode(value)
    except msgspec.DecodeError:
        return key, value
