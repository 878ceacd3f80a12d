"""The schema, the settings, the tokens, and running it all."""

import hashlib
import os
import re
import secrets as random_secrets
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Final, TextIO

import typer

from deploy import local, output
from deploy.commands import accounts
from deploy.commands.base import FAILED, MIGRATIONS_PENDING, FormatOption, opened_database, settings_here
from deploy.output import Format, err
from deploy.processes import Ended, Processes
from deploy.services import ServicesError
from schemas import database, envfile, migrate
from schemas.accounts import faults_here
from schemas.errors import ConfigurationError, ConflictError, PayfoldError
from schemas.settings import SCOPES, Settings
from schemas.slots import ENDS_MAX, ENDS_SECONDS, Ends

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
    """Apply the migrations that are pending; exit 1 where a label would split an account."""
    settings = settings_here()
    applied = migrate.upgrade(settings.postgresql)
    err.print(f"Applied {', '.join(applied)}." if applied else "The schema is up to date.")
    if accounts.show(faults_here(settings)):
        raise typer.Exit(FAILED)


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
    scope: Annotated[
        list[str] | None,
        typer.Option(help=f"What it may do: {', '.join(SCOPES)}; several joined by +, or given again; read if absent."),
    ] = None,
) -> None:
    """Make a bearer token: show it once, and the entry for PAYFOLD_TOKENS, which holds only its hash."""
    local.refuse_unknown_names()  # and no bad value, since it may be the one that this command is to mend
    given = [each for text in scope or ["read"] for each in text.split("+")]
    if unknown := [each for each in given if each not in SCOPES]:
        raise ConfigurationError(
            f"--scope {unknown[0]}: there is no such scope. It is one of {', '.join(SCOPES)}, or several joined by +."
            " Example: payfold tokens new shop --scope read+personal"
        )
    if not re.fullmatch("[A-Za-z0-9_]{1,255}", name):
        raise ConfigurationError("NAME holds letters, digits and _ only. Example: payfold tokens new shop")
    token = f"pf_{random_secrets.token_urlsafe(24)}"
    entry = f"{name}:{'+'.join(each for each in SCOPES if each in given)}:{hashlib.sha256(token.encode()).hexdigest()}"
    Settings.load({"PAYFOLD_TOKENS": entry})
    if set(given) == {"personal"}:
        err.print("personal opens no route by itself: join it to another scope, as in --scope read+personal.")
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
    port: Annotated[
        int | None, typer.Option(min=1, max=local.PORT_MAX, help="Port of the web process; else PORT, else a free one.")
    ] = None,
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
