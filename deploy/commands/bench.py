"""``payfold bench``: Payfold's speed against this machine's limits and against the plain alternative."""

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from deploy import output
from deploy.commands.base import FAILED
from deploy.local import discovery, signals
from deploy.local.running import BENCH_PREFIX, temporary_folder
from deploy.output import Format, err
from schemas.errors import ConfigurationError, PayfoldError

if TYPE_CHECKING:
    from deploy.bench.figures import Announce

LOG_LINES_SHOWN: Final = 20

app: Final = typer.Typer()


@app.command()
def bench(
    quick: Annotated[bool, typer.Option("--quick", help="One run of each, in less than a minute.")] = False,
    full: Annotated[bool, typer.Option("--full", help="Growth too: an hour, and as much disk as it says.")] = False,
    events: Annotated[int | None, typer.Option(min=1_000, help="How far the inbox grows, with --full.")] = None,
    thin: Annotated[
        bool, typer.Option("--thin", help="Leave out the white space of the payloads, which saves disk, with --full.")
    ] = False,
    keep: Annotated[
        Path | None, typer.Option(help="A folder that keeps what is finished, so that the run can be taken up again.")
    ] = None,
    only: Annotated[str | None, typer.Option(metavar="NAME", help="One figure alone.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Exit 1 where a ratio is far below its target.")] = False,
) -> None:
    """Measure each figure next to the machine's limit and the plain way, on servers of its own; ratios count."""
    from deploy.bench import report, run, stand

    mode = _mode(quick=quick, full=full)
    if (events is not None or thin) and not full:
        raise ConfigurationError("--events and --thin are for --full; other runs have sizes of their own.")
    if only is not None and (only not in run.NAMES or (only == "growth" and not full)):
        raise ConfigurationError(f"--only is one of {', '.join(run.NAMES)}, the last with --full alone.")
    count = (events or run.FULL_EVENTS) if full else 0
    with signals.stop_on_signal(), ExitStack() as opened:
        try:
            folder = opened.enter_context(_folder(keep))
            if full:
                err.print(run.require_disk(folder, count, is_thin=thin))
            steps = (
                run.Steps.kept_in(folder / "steps.ndjson", mode=mode, count=count, is_thin=thin)
                if keep
                else run.Steps()
            )
            at = opened.enter_context(stand.site(folder))
            opened.callback(signals.end_in_peace)
            opened.enter_context(_log_shown_on_failure(folder / "processes.log"))
            whole = run.Bench(at, run.QUICK if quick else run.USUAL, steps, _progress(), only or "", thin)
            found = whole.full(count) if full else whole.usual()
            machine = stand.machine(at)
        except KeyboardInterrupt:
            err.print("Stopped.")
            raise typer.Exit(FAILED) from None
    if as_json:
        output.one(report.document(found, machine, mode, count), Format.JSON)
    else:
        report.show(found, machine, output.out)
    if check:
        _check(report.below_floor(found))


def _mode(*, quick: bool, full: bool) -> str:
    if quick and full:
        raise ConfigurationError("--quick and --full exclude each other.")
    return "quick" if quick else "full" if full else "usual"


def _check(faults: Sequence[str]) -> None:
    for fault in faults:
        err.print(fault, style="red")
    if faults:
        raise typer.Exit(FAILED)


@contextmanager
def _folder(keep: Path | None) -> Iterator[Path]:
    if keep is None:
        with temporary_folder(discovery.settings(), prefix=BENCH_PREFIX) as folder:
            yield folder
    else:
        keep.mkdir(mode=0o700, parents=True, exist_ok=True)
        yield keep.absolute()


def _progress() -> "Announce":
    started = time.monotonic()
    return lambda words: err.print(f"{time.monotonic() - started:6.1f} s  {words}")


@contextmanager
def _log_shown_on_failure(path: Path) -> Iterator[None]:
    """Show the last lines of the processes on a failure, since the folder may be gone afterwards."""
    try:
        yield
    except PayfoldError:
        err.print("\n".join(path.read_text().splitlines()[-LOG_LINES_SHOWN:]))
        raise
