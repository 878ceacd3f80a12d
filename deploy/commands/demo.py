"""Everything on this machine next to a sandbox Stripe that sells, with the proof."""

import os
import secrets as random_secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Final, TextIO

import typer

from deploy import output
from deploy.commands.base import FAILED
from deploy.commands.up import introduce, settings_with
from deploy.local import signals
from deploy.local.errors import PORT_MAX
from deploy.local.processes import Ended
from deploy.local.running import running, temporary_folder
from deploy.output import err
from schemas import envfile
from schemas.errors import ConflictError, PayfoldError

app: Final = typer.Typer()


@app.command()
def demo(
    orders: Annotated[int, typer.Option(min=1, max=1_000_000, help="How many orders the sandbox shop sells.")] = 1000,
    port: Annotated[
        int | None, typer.Option(min=1, max=PORT_MAX, help="Port of the web process; else PORT, else a free one.")
    ] = None,
    leave: Annotated[bool, typer.Option("--exit", help="End after the summary.")] = False,
    seed: Annotated[int | None, typer.Option(help="Repeats an earlier demo.")] = None,
) -> None:
    """Run everything with a sandbox Stripe that sells, and prove the tables; exit 0 only if the proof holds."""
    from deploy import demo as show
    from deploy.sandbox_shop import open_shop

    settings = settings_with(port)
    show.refuse_the_orders_of_others(settings)
    seed = random_secrets.randbelow(10**6) if seed is None else seed
    holds = False
    ended: Ended | None = None
    with signals.stop_on_signal():
        try:
            with temporary_folder(settings) as folder:
                if envfile.source_of("PAYFOLD_LOG_LEVEL", os.environ) is None:
                    os.environ["PAYFOLD_LOG_LEVEL"] = "warning"
                err.print(f"A sandbox shop of seed {seed} sells {orders:,} orders.")
                with (
                    _shown_on_failure(folder / "processes.log") as log,
                    open_shop(seed, orders) as shop,
                    running(
                        settings, folder, environment=shop.environment, output=log, may_take_another_port=True
                    ) as payfold,
                ):
                    err.print(f"Payfold runs at {payfold.address}, with a sandbox Stripe.\n")
                    try:
                        with payfold.processes.interrupting():
                            holds = show.run(payfold, shop, seed=seed, progress_to=err, summary_to=output.out)
                            if not leave:
                                introduce(payfold)
                                signals.wait_for_signal()
                    finally:
                        ended = payfold.processes.ended
        except KeyboardInterrupt:
            err.print("Stopped.")
    if ended is not None:
        raise ConflictError(f"{ended}\nSo the demo was stopped.")
    if not holds:
        raise typer.Exit(FAILED)


@contextmanager
def _shown_on_failure(path: Path) -> Iterator[TextIO]:
    """Yield a file for the output of the processes, and print the file only on a failure."""
    with path.open("w") as log:
        try:
            yield log
        except PayfoldError:
            err.print(path.read_text())
            raise
