"""How far an audit has come, and what it found on the way, kept in a file so that an interrupted one can go on.

Note [An audit goes on where it was]
    An audit of a large account takes hours of calls. What it found is kept page by page: the differences and tallies,
    and behind which object the next page begins. Ctrl-C, Stripe away and a spent budget end the audit; the same
    command asks only for the rest, and again for pages on which something differed, which may be right by now. A file
    without a step of the last day is thrown away, since the tables are not those of today. An audit that ends within
    seconds writes no file.
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
"""What was found is written so often, and when the audit ends early."""

_log = structlog.get_logger()


class Step(Struct, omit_defaults=True):
    """What a page of the list of one *kind*, in the world of *account* and *livemode*, came to.

    *tally* is what this step adds to that of the kind. The next page begins behind the object *after*. *ids* were on
    the page. Where the rows that were created since *above* have been looked at, *open* are those of them that no page
    listed. *starts* are the objects behind which the pages of a sample begin that are still to be asked for. Once all
    *is listed*, only the *open* rows are left to be asked for. What
    was listed before one that *is restart* is listed again.
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
    """The steps of one audit: those *taken* before it was interrupted, and those since, which are kept for the next.

    *seed* is the seed of the audit's samples, which stays the same when it goes on. The *file* at *path* is made once
    there is something to write; one that *is broken* cannot be written, or is another process's.
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
        """Write what is not written yet; where that cannot be done, the audit goes on, and cannot be continued."""
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
        """Let go of the file."""
        if self.file is not None:
            with suppress(OSError):
                self.file.close()
            self.file = None


def opened(folder: Path, arguments: object, *, seed: int, now: datetime) -> Walks:
    """Return the walks of the audit with *arguments*: those of an interrupted one of the last day, else new ones."""
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
        FileNotFoundError: it is not there, and not to be made.
        OSError: it cannot be opened, or another process has it.
    """
    if is_new:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | (os.O_CREAT if is_new else 0), 0o600)
    # Without a buffer, which would keep what a full disk did not take, and fail again when the file is closed.
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
    """Return what a file holds, without a last line that was not written whole."""
    text = file.readall()
    whole = text.rfind(b"\n") + 1
    file.truncate(whole)
    lines = text[:whole].splitlines()
    try:
        return msgspec.json.decode(lines[0], type=_Head), [msgspec.json.decode(each, type=Step) for each in lines[1:]]
    except (IndexError, msgspec.DecodeError):
        return None, []


def since_restart(steps: Sequence[Step]) -> Sequence[Step]:
    """Return those of *steps* that still count."""
    last = max((number for number, step in enumerate(steps, start=1) if step.is_restart), default=0)
    return steps[last:]


def found_in(step: Step) -> list[Difference]:
    """Return the differences of a *step* that was kept."""
    return [msgspec.convert(each, Difference) for each in step.differences]


def _plain(found: Difference) -> dict[str, Any]:
    return {
        name: value.astimezone(UTC) if isinstance(value, datetime) else value for name, value in asdict(found).items()
    }
