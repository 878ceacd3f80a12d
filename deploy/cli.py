"""The ``payfold`` command. Data goes to stdout, everything else to stderr.

Note [The collector rests]
    Nearly everything that a command loads stays until its end, and the end gives it all back. So the collector of
    cycles looks less often while modules are loaded, and not at all at the end, when Python would look through
    everything twice. That was a quarter of the time of a short command.
"""

import atexit
import gc
import io
import os
import sys
from pathlib import Path
from typing import Annotated, Final

import typer

from deploy import output
from deploy.commands.listed import Commands
from deploy.output import err
from schemas import envfile
from schemas.errors import ConfigurationError

app: Final = typer.Typer(
    name="payfold",
    cls=Commands,
    help="Stripe's checkout events, folded into order tables that can be proven right.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

_NEW_OBJECTS_MAX: Final = 10_000
"""So many new objects may there be before the collector of cycles looks at them; Python's own limit is 700."""


def _print_version(is_asked: bool) -> None:  # noqa: FBT001 - as typer calls it
    if is_asked:
        from schemas.version import version

        output.out.print(f"payfold {version()}")
        raise typer.Exit


@app.callback()
def _options(
    *,
    env_file: Annotated[
        Path | None, typer.Option("--env-file", metavar="FILE", help="Settings that `init` wrote; else .payfold/.env.")
    ] = None,
    _: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version, and end.")
    ] = False,
) -> None:
    """Take what is the same for every command."""
    if env_file is not None:
        os.environ[envfile.ENV_FILE] = str(env_file.absolute())  # the processes of `up` are to have it, too
    if warning := envfile.open_to_others(os.environ):
        err.print(output.shown(warning), style="yellow", soft_wrap=True, markup=False, highlight=False)


def main() -> None:
    """Run the command and end the process: 0 ok, 1 failed, 2 usage, 3 drift, 4 migrations pending."""
    gc.set_threshold(_NEW_OBJECTS_MAX)  # see Note [The collector rests]
    atexit.register(gc.freeze)
    try:
        _settle_streams()
        app(prog_name="payfold")
    except Exception as error:
        from deploy.commands import failures

        explained = failures.explained(error)
        if explained is None:
            raise
        _fail(*explained)


def _settle_streams() -> None:
    """Make printing write a whole text, or fail.

    If a stream was closed before the start, Python has None in its place, and writes into nothing. If Python does not
    buffer (PYTHONUNBUFFERED), it hands each text to the system once. A pipe takes only a part of a long text when a
    signal arrives, and so does a full disk.

    Raises:
        ConfigurationError: data would be lost.
    """
    if sys.stderr is None:
        sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115 - as long as the process
    if sys.stdout is None:
        raise ConfigurationError("Standard output is closed, and data goes there. Example: payfold status >/dev/null")
    if isinstance(sys.stdout, io.TextIOWrapper) and isinstance(sys.stdout.buffer, io.RawIOBase):
        encoding, errors = sys.stdout.encoding, sys.stdout.errors
        whole = io.BufferedWriter(sys.stdout.detach())
        sys.stdout = io.TextIOWrapper(whole, encoding=encoding, errors=errors, line_buffering=True)


def _fail(words: str, code: int) -> None:
    # A name in the message may come from a stranger.
    err.print(output.shown(words), style="red")
    sys.exit(code)
