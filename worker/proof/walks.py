"""Keeps the progress and the findings of an audit in a file, so that an interrupted audit can go on.

Note [An audit goes on where it was]
    An audit of a large account takes hours of calls. So it keeps its findings page by page: the differences, the
    tallies, and the object after which the next page begins. Ctrl-C, an outage of Stripe and a spent budget end the
    audit. The same command then asks only for the rest, and again for pages with differences, since the rows may be
    right by now. A file without a step of the last day is thrown away, since the tables have changed too much. An audit
    that ends within seconds writes no file.
"""

import fcntl
import hashlib
import os
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from io import FileIO
from pathlib import Path
from typing import Any, Final

import msgspec
import structlog
from msgspec import Struct

from worker.proof.difference import Difference

KEPT: Final = timedelta(hours=24)
WRITE_SECONDS: Final = 5.0
"""The steps are written this often, and when the audit ends early."""

_log = structlog.get_logger()


class Step(Struct, omit_defaults=True):
    """One step of an audit of a *kind*, in the world of *account* and *livemode*: usually one page of its list.

    This step adds *tally* to the counts of the kind. *ids* are the objects that it looked at. The next page begins
    after the object *after*. *starts* are the objects after which the remaining pages of a sample begin; None as long
    as the list is followed page by page.

    From time to time the tables are searched for rows that no page has listed so far. The step then has these rows in
    *open*, and in *above* the time from which the next search goes on to older rows. With *is_listed* no page is left
    to be listed, and only the objects of the *open* rows are asked for, one by one. With *is_done* these are done, too.
    With *is_restart* the steps before this one no longer count, and the list begins again at its top.
    """

    account: str
    livemode: bool
    kind: str
    tally: dict[str, int]
    differences: list[dict[str, Any]] = []
    after: str | None = None
    ids: list[str] = []
    above: datetime | None = None
    open: list[str] = []
    starts: list[str] | None = None
    is_listed: bool = False
    is_done: bool = False
    is_restart: bool = False
    is_known: bool = False
    at: datetime | None = None

    @property
    def place(self) -> tuple[str, bool, str]:
        """The world and the kind."""
        return (self.account, self.livemode, self.kind)


class _Head(Struct):
    begun: datetime
    seed: int


@dataclass(slots=True)
class Walks:
    """The steps of one audit: those *taken* before it was interrupted, and later ones, which are kept for the next run.

    *seed* is the seed of the audit's samples, which stays the same when the audit goes on. The *file* at *path* is made
    once there is something to write. It *is broken* if it cannot be written, or another process has it.
    """

    path: Path
    seed: int
    begun: datetime
    taken: dict[tuple[str, bool, str], list[Step]] = field(default_factory=dict)
    file: FileIO | None = None
    is_broken: bool = False
    _lines: list[bytes] = field(default_factory=list, repr=False)
    _written: float = field(default_factory=time.monotonic, repr=False)

    def add(self, step: Step, differences: Iterable[Difference], *, now: datetime) -> None:
        """Keep a *step* and the *differences* that it found *now*."""
        step.at = now
        step.differences = [_plain(each) for each in differences]
        self._lines.append(msgspec.json.encode(step) + b"\n")
        if time.monotonic() - self._written > WRITE_SECONDS:
            self.write()

    def write(self) -> None:
        """Write the new steps; if that fails, the audit goes on, but cannot be continued after an interruption."""
        if self.is_broken or not self._lines:
            return
        try:
            if self.file is None:
                self.file = _locked(self.path)
                self._lines.insert(0, msgspec.json.encode(_Head(self.begun, self.seed)) + b"\n")
            _write(self.file, b"".join(self._lines))
        except OSError as error:
            self.is_broken = True
            _log.warning("audit.not_kept", file=str(self.path), reason=error.strerror)
        self._lines, self._written = [], time.monotonic()

    @property
    def is_kept(self) -> bool:
        """Whether an interrupted audit can go on from the file."""
        return self.file is not None and not self.is_broken

    def end(self) -> None:
        """Forget the steps: the audit is done."""
        self._lines = []
        if self.file is not None:
            with suppress(OSError):
                self.path.unlink(missing_ok=True)
            self.close()

    def close(self) -> None:
        """Close the file, which also unlocks it."""
        if self.file is not None:
            with suppress(OSError):
                self.file.close()
            self.file = None


def opened(folder: Path, arguments: object, *, seed: int, now: datetime) -> Walks:
    """Return the walks of the audit with *arguments*: those interrupted within the last day, else new ones."""
    name = hashlib.sha256(msgspec.json.encode(arguments)).hexdigest()[:16]
    made = Walks(folder / f"audit-{name}.ndjson", seed, now)
    try:
        made.file = _locked(made.path, is_new=False)
    except FileNotFoundError:
        return made
    except OSError:
        made.is_broken = True
        return made
    head, steps = _read(made.file)
    moments = [each.at for each in steps if each.at is not None]
    if head is not None and now - max(moments, default=head.begun) < KEPT:
        made.begun, made.seed = head.begun, head.seed
        for step in steps:
            made.taken.setdefault(step.place, []).append(step)
    else:
        made.end()
    return made


def _locked(path: Path, *, is_new: bool = True) -> FileIO:
    """Open the file of an audit for this process alone.

    Raises:
        FileNotFoundError: it does not exist, and *is_new* does not allow to make it.
        OSError: it cannot be opened, or another process has it.
    """
    if is_new:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | (os.O_CREAT if is_new else 0), 0o600)
    # Without a buffer: it would keep the bytes that a full disk did not take, and fail again when the file is closed.
    file = FileIO(descriptor, "r+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise
    return file


def _write(file: FileIO, text: bytes) -> None:
    """Write all of *text*; raises OSError where the disk takes only a part."""
    rest = memoryview(text)
    while rest:
        rest = rest[file.write(rest) :]


def _read(file: FileIO) -> tuple[_Head | None, list[Step]]:
    """Return the contents of a file, without a last line that was not written to its end."""
    text = file.readall()
    whole = text.rfind(b"\n") + 1
    file.truncate(whole)
    lines = text[:whole].splitlines()
    try:
        return msgspec.json.decode(lines[0], type=_Head), [msgspec.json.decode(each, type=Step) for each in lines[1:]]
    except (IndexError, msgspec.DecodeError):
        return None, []


def since_restart(steps: Sequence[Step]) -> Sequence[Step]:
    """Return those of *steps* that still count: the ones after the last restart."""
    last = max((number for number, step in enumerate(steps, start=1) if step.is_restart), default=0)
    return steps[last:]


def found_in(step: Step) -> list[Difference]:
    """Return the differences of a kept *step*."""
    return [msgspec.convert(each, Difference) for each in step.differences]


def _plain(found: Difference) -> dict[str, Any]:
    return {
        name: value.astimezone(UTC) if isinstance(value, datetime) else value for name, value in asdict(found).items()
    }
