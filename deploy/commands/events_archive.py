"""``payfold events archive``: old payloads out of the database, into logs that last."""

import os
import re
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from deploy import output
from deploy.commands.bars import bars, shown_on
from deploy.commands.base import (
    TIMES,
    USAGE,
    FormatOption,
    opened_database,
    utc,
)
from deploy.output import Format, err
from schemas.errors import ConfigurationError

if TYPE_CHECKING:
    from worker.logs.archive import Part


def events_archive(
    before: Annotated[
        datetime, typer.Option(formats=TIMES, metavar="DATE", help="Payloads of events created before then, UTC.")
    ],
    to: Annotated[Path, typer.Option("--to", metavar="DIR", help="A folder that lasts, for the logs.")],
    yes: Annotated[bool, typer.Option("--yes", help="Do it; without it, only show what would be done.")] = False,
    form: FormatOption = Format.TABLE,
) -> None:
    """Move old payloads into logs: written, read back, compared, and only then dropped; exit 2 if --yes is missing."""
    from worker.logs import archive as archives

    _require_lasting(to)
    moment = utc(before) or before
    with opened_database() as engine, bars() as bar, archives.alone(to):
        parts = archives.plan(engine, before=moment)
        if not parts:
            output.rows([], _PART_COLUMNS, form, empty="There is nothing to archive.")
            return
        if yes:
            archives.clear_drafts(to)
        archives.require_room(parts, to)
        if not yes:
            shown = [{**asdict(part), "megabytes": round(part.bytes / 1e6, 1)} for part in parts]
            output.rows(shown, _PART_COLUMNS, form, empty="")
            err.print(f"{_summed(parts)} would be archived; nothing has been. Add --yes to do it.")
            raise typer.Exit(USAGE)
        show, done = shown_on(bar), list[dict[str, Any]]()
        for number, part in enumerate(parts):
            show("Archiving", number, len(parts))
            found = archives.archive(engine, part, before=moment, folder=to)
            done.append(
                {"partition": part.partition, "file": str(found.path), "dropped": found.dropped, "stayed": found.stayed}
            )
            if found.gone:
                bar.console.print(
                    f"{part.partition}: another run archived {found.gone:,} of these events first; both logs have them."
                )
            if found.stayed:
                bar.console.print(
                    f"{part.partition}: {found.stayed:,} events changed meanwhile, so their payloads stay."
                )
    output.rows(done, ("partition", "file", "dropped", "stayed"), form, empty="")


_PART_COLUMNS: Final = ("partition", "first", "last", "events", "megabytes")


def _summed(parts: "Sequence[Part]") -> str:
    events, size = sum(part.events for part in parts), sum(part.bytes for part in parts)
    return f"{events:,} events with {size / 1e6:,.1f} MB of payloads, from {len(parts)} partitions,"


_INSTEAD: Final = "Name a folder on a disk that stays and is backed up, or a mounted volume."


def _require_lasting(folder: Path) -> None:
    """Find out before anything is written whether a log in *folder* can be written, and would still be there tomorrow.

    Raises:
        ConfigurationError: it would not.
    """
    if "DYNO" in os.environ:
        raise ConfigurationError(
            "--to: a dyno loses its disk when it restarts, and with it the archive. Run this on a machine that keeps"
            " its disk: DATABASE_URL=$(heroku config:get DATABASE_URL) payfold events archive …"
        )
    if not folder.is_dir():
        raise ConfigurationError(f"--to: there is no folder {folder}. {_INSTEAD}")
    place = folder.resolve()
    if place.is_relative_to(Path(tempfile.gettempdir()).resolve()):
        raise ConfigurationError(f"--to: {folder} is among the temporary files, which a machine clears. {_INSTEAD}")
    kind = _file_system(place)
    if kind in ("tmpfs", "ramfs"):
        raise ConfigurationError(f"--to: {folder} is in memory ({kind}), and gone with the power. {_INSTEAD}")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigurationError(f"--to: {folder} cannot be written to: {error.strerror}. {_INSTEAD}") from None


_MOUNTS: Final = Path("/proc/mounts")


def _file_system(place: Path) -> str | None:
    """Return the kind of file system that *place* is on, None where the operating system does not report it.

    Source: https://man7.org/linux/man-pages/man5/fstab.5.html, for the order of the fields and the escapes in them.
    """
    if not _MOUNTS.exists():
        return None
    found: dict[Path, str] = {}
    for line in _MOUNTS.read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        _, mounted, kind, *_ = line.split(" ")
        found[Path(re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), mounted))] = kind
    return next((found[each] for each in (place, *place.parents) if each in found), None)
