"""The ``payfold`` command. Data goes to stdout, everything else to stderr."""

import hashlib
import os
import secrets as random_secrets
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Final

import msgspec
import typer
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from sqlalchemy import Engine, func, select

from deploy import local, output
from deploy.output import Format, err
from deploy.services import ServicesError
from schemas import database, logs, migrate, tables
from schemas.errors import ConfigurationError, ConflictError, MigrationsPendingError, NotFoundError, PayfoldError
from schemas.settings import SCOPES, Settings

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
tokens_app: Final = typer.Typer(help="Bearer tokens of the API.", no_args_is_help=True)
for name, group in {"migrate": migrate_app, "events": events_app, "orders": orders_app, "tokens": tokens_app}.items():
    app.add_typer(group, name=name)

FormatOption = Annotated[Format, typer.Option("--format", help="How rows are printed.")]
AccountOption = Annotated[str | None, typer.Option("--account", help="Only this Stripe account.")]
Since = Annotated[
    datetime | None,
    typer.Option(formats=["%Y-%m-%d", "%Y-%m-%dT%H:%M:%S"], help="Only events created from then on, in UTC."),
]
Until = Annotated[
    datetime | None,
    typer.Option(formats=["%Y-%m-%d", "%Y-%m-%dT%H:%M:%S"], help="Only events created before then, in UTC."),
]


def main() -> None:
    """Run the command and end the process: 0 ok, 1 failed, 2 usage or configuration, 4 migrations pending."""
    try:
        app()
    except ConfigurationError as error:
        _fail(error, USAGE)
    except MigrationsPendingError as error:
        _fail(error, MIGRATIONS_PENDING)
    except (PayfoldError, ServicesError) as error:
        _fail(error, FAILED)


def _fail(error: Exception, code: int) -> None:
    err.print(str(error), style="red", markup=False)
    sys.exit(code)


def _settings() -> Settings:
    settings = local.here(Settings.load())
    logs.configure(settings)
    return settings


@contextmanager
def _database(*, behind_is_fine: bool = False) -> Iterator[Engine]:
    """Yield an engine on the database, whose schema is this release's."""
    engine = database.engine(_settings().postgresql)
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
    with local.running(settings, folder) as running:
        _introduce(running)
        ended = _until_interrupted(running)
    if ended:
        raise ConflictError(f"The {ended} process ended by itself, so the others were stopped.")


def _introduce(running: local.Running) -> None:
    told = {"webhook": f"{running.address}/webhooks/stripe", "API": f"{running.address}/docs"}
    if running.token is not None:
        told["bearer token"] = running.token
    told["signing secret"] = "as configured" if "STRIPE_WEBHOOK_SECRETS" in os.environ else running.secret
    err.print("\nPayfold runs here until Ctrl-C:\n", style="bold")
    for label, value in told.items():
        err.print(f"  {label:<16}{value}", markup=False, soft_wrap=True)
    err.print()


def _until_interrupted(running: local.Running) -> str | None:
    try:
        return running.processes.wait()
    except KeyboardInterrupt:
        err.print("Stopping.")
        return None


@app.command()
def demo(
    orders: Annotated[int, typer.Option(min=1, max=1_000_000, help="How many orders the sandbox shop sells.")] = 1000,
    leave: Annotated[bool, typer.Option("--exit", help="End after the summary.")] = False,
    seed: Annotated[int | None, typer.Option(help="Repeats an earlier demo.")] = None,
) -> None:
    """Run everything beside a sandbox Stripe that sells, and prove the tables; exit 0 only if the proof holds."""
    from deploy import demo as show

    settings = Settings.load()
    seed = random_secrets.randbelow(10**6) if seed is None else seed
    with local.temporary_folder(settings) as folder, (folder / "processes.log").open("w") as log:
        os.environ.setdefault("PAYFOLD_LOG_LEVEL", "warning")
        try:
            with local.running(settings, folder, output=log) as running:
                err.print(f"Payfold runs at {running.address}, with a sandbox Stripe of seed {seed}.\n")
                holds = show.run(running, orders=orders, seed=seed, progress_to=err, summary_to=output.out)
                if not leave:
                    _introduce(running)
                    _until_interrupted(running)
        except PayfoldError:
            err.print((folder / "processes.log").read_text(), markup=False, soft_wrap=True)
            raise
    if not holds:
        raise typer.Exit(FAILED)


@app.command()
def status(form: FormatOption = Format.TABLE) -> None:
    """Show the health of the inbox and the tables on one screen."""
    from worker import folds

    settings = _settings()
    with _database(behind_is_fine=True) as engine, database.transaction(engine) as connection:
        behind = migrate.pending(connection)
        found: dict[str, Any] = {"database": "ok", "migrations": "pending" if behind else "ok"}
        if not behind:
            row = connection.execute(_status_query(folds.FOLD_VERSION)).mappings().one()
            found |= dict(row)
    found["broker"] = _broker_status(settings)
    output.one(found, form)
    if behind:
        raise typer.Exit(MIGRATIONS_PENDING)


def _status_query(fold_version: int) -> Any:  # noqa: ANN401 - a select of many columns
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


def _broker_status(settings: Settings) -> str:
    from redis.exceptions import RedisError

    from schemas import broker

    if settings.redis_url is None:
        return "REDIS_URL is not set"
    try:
        waiting = broker.redis(settings).llen(broker.FOLD_QUEUE)
    except (RedisError, OSError):
        return "away: events are recorded, and folded once it is back"
    return f"ok, {waiting} messages waiting"


# The inbox.

_EVENT_COLUMNS: Final = ("seq", "id", "type", "object_id", "created", "state", "reason")


@events_app.command("list")
def events_list(
    state: Annotated[str | None, typer.Option(help=f"Only those {', '.join(tables.STATES)}.")] = None,
    kind: Annotated[str | None, typer.Option("--type", help="Only this type.")] = None,
    object_id: Annotated[str | None, typer.Option("--object", help="Only those of this object.")] = None,
    account: AccountOption = None,
    limit: Annotated[int, typer.Option(min=1, max=10_000)] = 50,
    form: FormatOption = Format.TABLE,
) -> None:
    """List events, last recorded first."""
    if state is not None and state not in tables.STATES:
        raise ConfigurationError(f"--state is one of {', '.join(tables.STATES)}.")
    given = {"state": state, "type": kind, "object_id": object_id, "account": account}
    wanted = [tables.events.c[column] == value for column, value in given.items() if value is not None]
    columns = [tables.events.c[column] for column in (*_EVENT_COLUMNS, "account", "livemode", "source", "received_at")]
    query = select(*columns).where(*wanted).order_by(tables.events.c.seq.desc()).limit(limit)
    with _database() as engine, database.transaction(engine) as connection:
        found = connection.execute(query).mappings().all()
    shown = _EVENT_COLUMNS if form is Format.TABLE else [column.name for column in columns]
    output.rows([dict(row) for row in found], shown, form, empty="No such event.")


@events_app.command("show")
def events_show(event_id: str, account: AccountOption = None, form: FormatOption = Format.TABLE) -> None:
    """Show one event with its payload, which holds personal data."""
    with _database() as engine:
        row = _one(engine, tables.events, event_id, account)
    output.one({**row, "payload": row["payload"].decode(errors="replace")}, form)


@events_app.command("retry")
def events_retry(event_id: str, account: AccountOption = None) -> None:
    """Fold an event again, now and in this process; exit 1 if it is parked again."""
    from worker import operator

    with _database() as engine:
        found = operator.retry(engine, event_id, now=datetime.now(UTC), account=account)
        row = _one(engine, tables.events, event_id, found.account)
    err.print(f"{event_id} is {row['state']}" + (f": {row['reason']}" if row["reason"] else "."), markup=False)
    if row["state"] == "parked":
        raise typer.Exit(FAILED)


@events_app.command("ignore")
def events_ignore(
    event_id: str,
    reason: Annotated[str, typer.Option(help="Why, for whoever looks later.")] = "",
    account: AccountOption = None,
) -> None:
    """Set a parked event aside, as an observation that replays like everything else."""
    from worker import operator

    with _database() as engine:
        found = operator.ignore(engine, event_id, reason=reason, now=datetime.now(UTC), account=account)
    err.print(f"{event_id} is {found.state}.", markup=False)


@events_app.command("export")
def events_export(since: Since = None, until: Until = None) -> None:
    """Write the inbox to stdout as a log that `replay` reads: NDJSON, an event a line."""
    from worker.replay import Filters, export

    with _database() as engine:
        for line in export(engine, filters=Filters(since=_utc(since), until=_utc(until))):
            sys.stdout.buffer.write(line)
    sys.stdout.buffer.flush()


def _utc(moment: datetime | None) -> datetime | None:
    return None if moment is None else moment.replace(tzinfo=UTC)


def _one(engine: Engine, table: Any, key: str, account: str | None) -> dict[str, Any]:  # noqa: ANN401 - a table or a view
    query = select(table).where(table.c.id == key).limit(2)
    if account is not None:
        query = query.where(table.c.account == account)
    with database.transaction(engine) as connection:
        found = connection.execute(query).mappings().all()
    if not found:
        raise NotFoundError(f"There is no {key} here.")
    if len(found) > 1:
        raise ConflictError(f"Several accounts or modes have {key}: say which with --account.")
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

    missing = [file for file in files if file != "-" and not Path(file).is_file()]
    if missing:
        raise ConfigurationError(f"There is no file {missing[0]}.")
    filters = logs_of_events.Filters(since=_utc(since), until=_utc(until), type=kind)
    columns = (SpinnerColumn(), TextColumn("{task.completed:,} events"), TimeElapsedColumn())
    with _database() as engine, Progress(*columns, console=err, transient=True) as bar:
        task = bar.add_task("", total=None)
        report = logs_of_events.replay(
            engine,
            files,
            filters=filters,
            account=account,
            now=datetime.now(UTC),
            dry_run=dry_run,
            progress=lambda entries: bar.advance(task, entries),
        )
    for entry in report.refused:
        err.print(f"{entry.place}: {entry.fault}", markup=False, soft_wrap=True)
    output.one({count: report.counts[count] for count in _COUNTS}, form)
    if report.refused:
        raise typer.Exit(FAILED)


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
def orders_show(order_id: str, account: AccountOption = None, form: FormatOption = Format.TABLE) -> None:
    """Show one order."""
    with _database() as engine:
        output.one(_one(engine, tables.orders, order_id, account), form)


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

    from deploy.sandbox.samples import sample
    from deploy.sandbox.signing import sign

    settings = _settings()
    if not settings.signing_secrets:
        raise ConfigurationError("STRIPE_WEBHOOK_SECRETS: it is not set, so nothing can be signed. Example: whsec_a")
    event = sample(kind, dict(_override(each) for each in override or []), now=int(time.time()))
    url = to or f"http://127.0.0.1:{settings.port}/webhooks/stripe"
    header = sign(event.body, settings.signing_secrets[0].secret.decode(), int(time.time()))
    try:
        answer = httpx.post(url, content=event.body, headers={"Stripe-Signature": header}, timeout=20)
    except httpx.HTTPError as error:
        raise ConflictError(f"{url} does not answer: {type(error).__name__}.") from None
    output.one({"id": event.id, "type": event.type, "sent_to": url, "status": answer.status_code}, Format.TABLE)
    if not answer.is_success:
        err.print(answer.text, markup=False)
        raise typer.Exit(FAILED)


def _override(given: str) -> tuple[str, Any]:
    key, equals, value = given.partition("=")
    if not equals or not key:
        raise ConfigurationError(f"--override wants KEY=VALUE, as amount_total=500; {given} is not that.")
    try:
        return key, msgspec.json.decode(value)
    except msgspec.DecodeError:
        return key, value
