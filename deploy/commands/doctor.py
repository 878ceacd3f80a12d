"""`payfold doctor`: checks a deployment, and names the fix for each finding."""

import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated, Final

import typer
from rich.text import Text

from deploy import output
from deploy.commands.base import FAILED, MIGRATIONS_PENDING, USAGE, FormatOption
from deploy.local import discovery
from deploy.output import Format, err, out
from schemas import logs
from schemas.errors import ConfigurationError
from schemas.settings import Settings, unknown

if TYPE_CHECKING:
    from deploy.doctor.findings import Finding

app: Final = typer.Typer()
_COLUMNS: Final = ("check", "level", "found", "fix")
_STYLES: Final = {"ok": "green", "warning": "yellow", "fault": "bold red", "skipped": "dim"}
_PLURALS: Final = {"ok": "ok", "warning": "warnings", "fault": "faults", "skipped": "skipped"}
_WORST_FIRST: Final = ("fault", "warning", "ok", "skipped")
_WIDTH_MAX: Final = 120
"""In a wider terminal sentences are broken to this width."""
_LEVEL: Final = 9
"""The width of a level, and of the space after it."""
_GAP: Final = 2
_FIX: Final = f"{' ' * _LEVEL}fix: "
"""How the first line of a fix begins."""
_COMMAND: Final = "  "
"""How a line of a fix begins that is a command: it is to be copied, and so is never broken."""


@app.command()
def doctor(
    send: Annotated[
        bool, typer.Option("--send", help="Send a signed test delivery; it leaves one ignored event in the inbox.")
    ] = False,
    to: Annotated[
        str | None,
        typer.Option(
            metavar="URL", help="The webhook's public address; for --send the one on this machine by default."
        ),
    ] = None,
    livemode: Annotated[
        bool | None,
        typer.Option(
            "--live/--test",
            help="The mode of the test delivery; that of the events here, or of the key, by default.",
            show_default=False,
        ),
    ] = None,
    form: FormatOption = Format.TABLE,
) -> None:
    """Check this deployment, and name the fix for each finding; exit 1 if there is a fault.

    Exit 2 if the settings have one, 4 with migrations pending. Warnings change no exit code. Nothing is changed, and no
    secret is shown.
    """
    with err.status("Looking at the deployment …") if err.is_terminal else nullcontext():
        findings = list(_findings(to, is_sending=send, livemode=livemode))
    if form is Format.TABLE:
        _print(findings)
    else:
        output.rows([asdict(each) for each in findings], _COLUMNS, form, empty="")
    if code := _code(findings):
        raise typer.Exit(code)


def _findings(to: str | None, *, is_sending: bool, livemode: bool | None) -> "Iterator[Finding]":
    from deploy.doctor import configured, examination
    from deploy.doctor.delivery import address

    try:
        settings = discovery.here(Settings.load())
        logs.configure(settings)
        names = unknown()
    except ConfigurationError as error:
        yield from configured.unusable(str(error))
        return
    url = address(to, settings)
    yield from examination.of_names(names, settings)
    yield from examination.of_system(settings, url=None if to is None else url)
    if is_sending:
        yield examination.of_delivery(settings, url, livemode=livemode)


def _code(findings: "Sequence[Finding]") -> int:
    from deploy.doctor.configured import SETTINGS
    from deploy.doctor.engines import MIGRATIONS

    faulty = {each.check for each in findings if each.level == "fault"}
    if SETTINGS in faulty:
        return USAGE
    if MIGRATIONS in faulty:
        return MIGRATIONS_PENDING
    return FAILED if faulty else 0


# ---- The screen ----


def _print(findings: "Sequence[Finding]") -> None:
    """Print a line for each finding with its fix beneath it, and a line that counts them."""
    shown = list(_together(findings))
    width = max(len(each.check) for each in shown)
    for each in shown:
        _print_one(each, width)
    counts = Counter(each.level.value for each in findings)
    levels = [level for level in _WORST_FIRST if counts[level]]
    counted = ", ".join(_counted(level, counts[level]) for level in levels)
    out.print()
    out.print(Text(f"{len(findings)} findings: {counted}", _STYLES[levels[0]]))


def _together(findings: "Sequence[Finding]") -> "Iterator[Finding]":
    """Yield the findings, and those that were skipped for one reason as one, at the place of the first."""
    skipped: dict[str, list[Finding]] = {}
    for each in findings:
        if each.level == "skipped" and not each.fix:
            skipped.setdefault(each.found, []).append(each)
    for each in findings:
        alike = [each] if each.fix else skipped.get(each.found, [each])
        if alike[0] is each:
            others = ", ".join(other.check for other in alike[1:])
            yield replace(each, found=f"{each.found}; nor {others}") if others else each


def _counted(level: str, times: int) -> str:
    return f"{times} {level if times == 1 else _PLURALS[level]}"


def _print_one(finding: "Finding", width: int) -> None:
    level = finding.level.value
    indent = " " * (_LEVEL + width + _GAP)
    first, *rest = _broken(finding.found, len(indent))
    line = Text(f"{level:<{_LEVEL}}", _STYLES[level]).append(
        f"{finding.check:<{width + _GAP}}", "not bold not dim default"
    )
    out.print(line.append(first, "not bold not dim default"))
    for each in rest:
        out.print(f"{indent}{each}")
    start = _FIX
    for each in finding.fix.splitlines():
        _print_fix(each, start)
        start = " " * len(_FIX)


def _print_fix(line: str, start: str) -> None:
    if line.startswith(_COMMAND):
        out.print(Text(f"{start}{_COMMAND}{output.shown(line.strip())}", "bold"))
        return
    for each in _broken(line, len(start)):
        out.print(f"{start}{each}")
        start = " " * len(start)


def _broken(text: str, indent: int) -> list[str]:
    """Return the lines of *text*, broken between words where this is a terminal."""
    plain = output.in_one_line(text)
    if not out.is_terminal:
        return [plain]
    room = max(30, min(out.width, _WIDTH_MAX) - indent)
    return textwrap.wrap(plain, room, break_long_words=False, break_on_hyphens=False) or [""]
