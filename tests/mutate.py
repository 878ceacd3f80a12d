"""Makes mutants of what the folds mean, and counts how many the tests notice.

    deploy/dev run python -m tests.mutate [--seed N] [--sample K] [--minutes M] [--slots S] [WORD…]

Each mutant (see ``tests.mutants``) is put into a copy of the tree, and has to turn the tests of its file red. With a
sample, K of them chosen by the seed; with words, only those whose name holds all of them. What behaves as the code does is
listed in ``tests.mutants_explained``, with the reason, and is not run. Prints a table and each survivor with its line.
Ends with 1 if any mutant survived.
"""

import argparse
import json
import os
import random
import secrets
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from queue import Empty, SimpleQueue
from tempfile import TemporaryDirectory
from typing import Any, Final

from deploy.services import Services, embedded_services
from tests.databases import TEMPLATE_VARIABLE, migrated
from tests.mutants import ROOT, VIEWS, Mutant, made
from tests.mutants_explained import EXPLAINED

TESTS: Final[dict[str, tuple[str, ...]]] = {
    "balance": ("balance_transaction", "customer", "changes"),
    "charge": ("charges", "one_second", "payment", "order_payment", "refunded"),
    "checkout_session": ("checkout_session", "changes", "payment", "order_payment"),
    "credit_note": ("credit_note", "one_second", "changes"),
    "customer": ("customer", "one_second", "balance_transaction"),
    "dispute": ("disputes", "one_second", "changes"),
    "invoice": ("invoice", "one_second", "invoice_payment", "changes"),
    "payment": ("payment", "order_payment"),
    "payment_intent": ("payment_intents", "one_second", "payment"),
    "payment_link": ("payment_link", "one_second", "changes"),
    "portal": ("portal", "one_second",),
    "refund": ("refunds", "one_second", "refunded"),
    "explain": ("explain", "checkout_session"),
    "0001_spine": ("link_funnel",),
    "0010_true_rows": ("order_book", "refunded"),
}
"""By file: what of ``tests/test_literals_*`` is run first, the likeliest to notice before the others."""
THEN: Final[dict[str, tuple[str, ...]]] = {
    "balance": ("chain", "money"),
    "charge": ("settling",),
    "checkout_session": ("corrections", "orders", "lines"),
    "credit_note": ("parts_of_notes",),
    "customer": ("chain", "money"),
    "invoice": ("old_shapes", "order_book"),
    "payment": ("settling",),
    "explain": ("explain",),
    "0010_true_rows": ("order_book", "refunds_of_orders"),
}
"""By file: what other tests are run where those notice nothing."""
FAVORED_MAX: Final = 12
SECONDS_MAX: Final = 400
_PARTS: Final = ("api", "deploy", "schemas", "tests", "worker", "pyproject.toml", "Procfile", "README.md")


def stages(file: str) -> list[list[str]]:
    """Return the test files that are run for a mutant of *file*: first some, then the rest."""
    name = Path(file).stem
    first = [f"tests/test_literals_{each}.py" for each in TESTS[name]]
    return [first[:1], first[1:] + [f"tests/test_{each}.py" for each in THEN.get(name, ())]]


class _Helper:
    """A process that answers each line with one: see ``tests.mutate_slot`` and ``tests.mutate_pure``."""

    def __init__(self, module: str, tree: Path, environment: dict[str, str]) -> None:
        command, pipe = [sys.executable, "-m", module], subprocess.PIPE
        self._process = subprocess.Popen(command, cwd=tree, env=environment, stdin=pipe, stdout=pipe, text=True)

    def ask(self, job: dict[str, object]) -> Any:  # noqa: ANN401 - what JSON holds
        """Return the answer to *job*."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(job), file=self._process.stdin, flush=True)
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


class Slot:
    """A process that runs the tests on one mutant after the other, in a tree of its own."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self._tree = folder
        for part in _PARTS:
            copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy2
            copy(ROOT / part, folder / part)
        # Compiled once, the tests start in a fifth of the time.
        environment = {**environment, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": ""}
        self._whole = _Helper("tests.mutate_slot", folder, environment)
        self._pure = _Helper("tests.mutate_pure", folder, environment)

    def close(self) -> None:
        """End the processes."""
        self._whole.close()
        self._pure.close()

    def run_pure(self, mutant: Mutant, favored: Sequence[str]) -> tuple[str, str]:
        """Return what the tests find of *mutant* that need no database: noticed, with the test, or survived."""
        if not mutant.file.startswith("worker/folds/"):
            return "survived", ""
        files = [file for files in stages(mutant.file) for file in files]
        job = {"module": mutant.file[:-3].replace("/", "."), "text": mutant.text(), "files": files, "favored": favored}
        by = str(self._pure.ask(job))
        return "noticed" if by else "survived", by

    def run_whole(self, mutant: Mutant, favored: Sequence[str]) -> tuple[str, str]:
        """Return what became of *mutant* (noticed, survived or broken), and the test that noticed it."""
        path = self._tree / mutant.file
        original, stat = path.read_text(), path.stat()
        path.write_text(mutant.text())
        # Compiled code is taken for that of a source by its time and size, which two mutants may share.
        os.utime(path, (next(_times), next(_times)))
        try:
            job = {"favored": favored, "seconds": SECONDS_MAX, "migrates": mutant.file in VIEWS}
            found = ("survived", "")
            for tests in filter(None, stages(mutant.file)):
                verdict, by = self._whole.ask({**job, "tests": tests})
                found = (verdict, by)
                if found[0] != "survived":
                    break
            return found
        finally:
            path.write_text(original)
            os.utime(path, (stat.st_atime, stat.st_mtime))


_times: Final = iter(range(1_000_000_000, 2**31))


class Run:
    """The mutants that are run, and what became of each."""

    def __init__(self, mutants: Sequence[Mutant], *, deadline: float) -> None:
        self.found: dict[Mutant, str] = {each: "explained" for each in mutants if each.name in EXPLAINED}
        self._waiting: SimpleQueue[Mutant] = SimpleQueue()
        for each in mutants:
            if each not in self.found:
                self._waiting.put(each)
        self._left: SimpleQueue[Mutant] = SimpleQueue()
        self._deadline = deadline
        self._lock = threading.Lock()
        self._killers: dict[str, Counter[str]] = defaultdict(Counter)

    def work(self, slot: Slot) -> None:
        """Take one mutant after the other until none is left or the time is over: all in memory, then the rest."""
        for mutant in self._each(self._waiting):
            if not self._try(slot.run_pure, mutant, is_last=False):
                self._left.put(mutant)
        for mutant in self._each(self._left):
            self._try(slot.run_whole, mutant, is_last=True)

    def _each(self, waiting: SimpleQueue[Mutant]) -> Iterator[Mutant]:
        while time.monotonic() < self._deadline:
            try:
                yield waiting.get_nowait()
            except Empty:
                return

    def _try(self, run: Callable[[Mutant, Sequence[str]], tuple[str, str]], mutant: Mutant, *, is_last: bool) -> bool:
        started = time.monotonic()
        verdict, by = run(mutant, self._favored(mutant))
        is_known = is_last or verdict != "survived"
        if is_known:
            self._note(mutant, verdict, by, time.monotonic() - started)
        return is_known

    def _favored(self, mutant: Mutant) -> list[str]:
        """Return the tests that noticed other mutants of this function, then of this file, the most successful first."""
        with self._lock:
            near, far = (self._killers[key].most_common() for key in (f"{mutant.file} {mutant.scope}", mutant.file))
        return list(dict.fromkeys(test for test, _ in (*near, *far)))[:FAVORED_MAX]

    def _note(self, mutant: Mutant, verdict: str, by: str, seconds: float) -> None:
        with self._lock:
            self.found[mutant] = verdict
            if by:
                self._killers[mutant.file][by] += 1
                self._killers[f"{mutant.file} {mutant.scope}"][by] += 1
            print(f"{verdict:<9}{seconds:6.1f} s  {mutant.line:>4} {mutant.name}  {by}", flush=True)  # noqa: T201 - its output
            if verdict == "survived":
                print(diff_of(mutant), flush=True)  # noqa: T201 - as above


def diff_of(mutant: Mutant) -> str:
    """Return what *mutant* changes, as a reader would see it."""
    old, new = ((ROOT / mutant.file).read_text(), mutant.text())
    first = old.rindex("\n", 0, mutant.start) + 1
    ends = (old.index("\n", mutant.end), new.index("\n", mutant.start + len(mutant.wrong)))
    lines = [f"  - {line}" for line in old[first : ends[0]].splitlines()]
    lines += [f"  + {line}" for line in new[first : ends[1]].splitlines()]
    return "\n".join([f"  {mutant.file}:{mutant.line}", *lines])


def table_of(found: dict[Mutant, str]) -> Iterator[str]:
    """Yield a line for each file and each kind: how many were made, noticed, explained, and survived."""
    yield f"{'':<50}{'made':>7}{'noticed':>9}{'explained':>11}{'survived':>10}"
    counted = {each: verdict for each, verdict in found.items() if verdict != "broken"}
    names = [("all", list(counted))]
    for key in ("file", "kind"):
        groups: dict[str, list[Mutant]] = defaultdict(list)
        for each in counted:
            groups[getattr(each, key)].append(each)
        names += sorted(groups.items())
    for name, group in names:
        of = Counter(counted[each] for each in group)
        yield f"{name:<50}{len(group):>7}{of['noticed']:>9}{of['explained']:>11}{of['survived']:>10}"


def chosen(words: Iterable[str], *, seed: int, sample: int | None) -> list[Mutant]:
    """Return the mutants to be run, in an order that the *seed* decides."""
    mutants = [each for each in made() if all(word in each.name for word in words)]
    random.Random(seed).shuffle(mutants)
    return mutants[:sample]


def run(mutants: Sequence[Mutant], services: Services, *, minutes: float, slots: int) -> dict[Mutant, str]:
    """Run the tests on each of *mutants* that is not explained, and return what became of each."""
    result = Run(mutants, deadline=time.monotonic() + minutes * 60)
    urls = {"DATABASE_URL": services.database_url, "REDIS_URL": services.redis_url}
    with TemporaryDirectory(prefix="payfold-mutants-") as folder, migrated(services.database_url) as template:
        environment = {**os.environ, **urls, TEMPLATE_VARIABLE: template}
        running = []
        for number in range(slots):
            (Path(folder) / str(number)).mkdir()
            running.append(Slot(Path(folder) / str(number), environment))
        threads = [threading.Thread(target=result.work, args=(slot,)) for slot in running]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for slot in running:
            slot.close()
    return result.found


def main(arguments: Sequence[str]) -> int:
    """Run what *arguments* choose, print what became of it, and return 1 if any mutant survived."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("words", nargs="*")
    parser.add_argument("--seed", type=int, default=secrets.randbelow(2**32))
    parser.add_argument("--sample", type=int)
    parser.add_argument("--minutes", type=float, default=100)
    parser.add_argument("--slots", type=int, default=os.cpu_count() or 1)
    given = parser.parse_args(arguments)
    started, mutants = time.monotonic(), chosen(given.words, seed=given.seed, sample=given.sample)
    with TemporaryDirectory(prefix="payfold-mutants-") as folder, embedded_services(
        Path(folder) / "services",
        durable=False,
        database_url=os.environ.get("DATABASE_URL"),
        redis_url=os.environ.get("REDIS_URL"),
    ) as services:
        found = run(mutants, services, minutes=given.minutes, slots=given.slots)
    print("\n".join(table_of(found)))  # noqa: T201 - its output
    survivors = [each for each, verdict in found.items() if verdict == "survived"]
    for each in survivors:
        print(f"\nsurvived: {each.name}\n{diff_of(each)}")  # noqa: T201 - as above
    minutes = (time.monotonic() - started) / 60
    print(f"{len(found)} of {len(mutants)} mutants in {minutes:.1f} minutes; repeat with --seed {given.seed}")  # noqa: T201 - as above
    return min(len(survivors), 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
