"""Everything on this machine, until Ctrl-C."""

import os
import shlex
from typing import Annotated, Final

import typer

from deploy.local import discovery, signals
from deploy.local.errors import PORT_MAX
from deploy.local.processes import Processes
from deploy.local.running import Running, running
from deploy.output import err
from schemas.errors import ConflictError
from schemas.settings import Settings
from schemas.slots import ENDS_MAX, ENDS_SECONDS, Ends

app: Final = typer.Typer()

PortOption = Annotated[
    int | None, typer.Option(min=1, max=PORT_MAX, help="Port of the web process; else PORT, else 8000.")
]


@app.command()
def up(port: PortOption = None) -> None:
    """Run everything on this machine, with embedded servers where no URL is given, until Ctrl-C.

    Its signing secret and token stay with its data: a restart has the same ones.
    """
    settings = settings_with(port)
    folder = settings.payfold_data_dir.absolute() / discovery.UP_FOLDER
    with signals.stop_on_signal():
        try:
            with running(settings, folder) as payfold:
                introduce(payfold)
                _keep_running(payfold.processes)
        except KeyboardInterrupt:
            err.print("Stopped.")


def settings_with(port: int | None) -> Settings:
    """Return the settings, with *port* for the web process if it is given."""
    if port is not None:
        os.environ["PORT"] = str(port)  # the processes are to have it, too
    return discovery.settings()


def _keep_running(processes: Processes) -> None:
    """Start each process again that ends by itself, until a stop is asked for.

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


def introduce(payfold: Running) -> None:
    """Print the addresses of the running parts, and the commands to type next."""
    shown = {"pages": f"{payfold.address}/", "webhook": f"{payfold.address}/webhooks/stripe"}
    shown["API"] = f"{payfold.address}/docs"
    shown["bearer token"] = "as configured" if payfold.token is None else payfold.token
    shown["signing secret"] = payfold.secret if payfold.is_secret_ours else "as configured"
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
