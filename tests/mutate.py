"""Makes mutants of the folds, and counts how many of them the tests notice.

    deploy/dev run python -m tests.mutate [--seed N] [--sample K] [--minutes M] [--slots S] [--memory [--write]] [WORD…]

The tests of a mutant's file have to fail on it (see ``tests.mutants``): mutants of folds are tried first in memory,
where most need milliseconds, then in a copy of the tree with a database. ``--sample`` runs K mutants chosen by the
seed; words select the mutants that have all of them in their names. Mutants that behave exactly as the code does are
listed with the reason in ``tests.mutants_explained``, and are not run. ``--memory`` runs only mutants of folds, and
leaves out those that only tests with a database notice: they are listed in ``tests/mutants_beyond_memory.txt``, which
``--write`` makes again. Prints a table and each survivor with its line. Ends with 1 if any mutant survived.
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
from contextlib import ExitStack
from pathlib import Path
from queue import Empty, SimpleQueue
from tempfile import TemporaryDirectory
from typing import Any, Final

from deploy.local.services import embedded_services
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
    "portal": ("portal", "one_second"),
    "refund": ("refunds", "one_second", "refunded"),
    "explain": ("explain", "checkout_session"),
    "0001_spine": ("link_funnel",),
    "0010_true_rows": ("order_book", "refunded"),
}
"""By file: the ``tests/test_literals_*`` that run first, the likeliest to notice before the others."""
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
"""By file: the other tests, which run if those notice nothing."""
BEYOND_MEMORY: Final = ROOT / "tests" / "mutants_beyond_memory.txt"
FAVORED_MAX: Final = 12
SECONDS_MAX: Final = 400
_PARTS: Final = ("api", "deploy", "schemas", "tests", "worker", "pyproject.toml", "Procfile", "README.md")


def stages(file: str) -> list[list[str]]:
    """Return the test files for a mutant of *file*, in two stages: the likeliest to notice, then the rest."""
    first = literal_tests(file)
    return [first[:1], first[1:] + [f"tests/test_{each}.py" for each in THEN.get(Path(file).stem, ())]]


def literal_tests(file: str) -> list[str]:
    """Return the test files that are tried in memory for a mutant of *file*."""
    return [f"tests/test_literals_{each}.py" for each in (*TESTS[Path(file).stem], "subjects")]


class _Helper:
    """A process that answers each line with one line: see ``tests.mutate_slot`` and ``tests.mutate_pure``."""

    def __init__(self, module: str, tree: Path, environment: dict[str, str], *arguments: str) -> None:
        command, pipe = [sys.executable, "-m", module, *arguments], subprocess.PIPE
        self._process = subprocess.Popen(command, cwd=tree, env=environment, stdin=pipe, stdout=pipe, text=True)

    def ask(self, job: dict[str, object]) -> Any:  # noqa: ANN401 - any JSON
        """Return the answer to *job*."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(job), file=self._process.stdin, flush=True)
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


class Memory:
    """A process that runs tests on the mutants of folds without a database: see ``tests.mutate_pure``."""

    def __init__(self, mutants: Iterable[Mutant]) -> None:
        files = {test for each in mutants if each.is_of_fold for test in literal_tests(each.file)}
        self._helper = _Helper("tests.mutate_pure", ROOT, dict(os.environ), *sorted(files))

    def close(self) -> None:
        """End the process."""
        self._helper.close()

    def run(self, mutant: Mutant, favored: Sequence[str]) -> tuple[str, str]:
        """Run the tests that need no database on *mutant*; return noticed, with the test, or survived."""
        if not mutant.is_of_fold:
            return "survived", ""
        name, files = mutant.file[:-3].replace("/", "."), literal_tests(mutant.file)
        by = str(self._helper.ask({"module": name, "text": mutant.text(), "files": files, "favored": favored}))
        return "noticed" if by else "survived", by


class Slot:
    """A process that runs the tests on one mutant after the other, in a tree of its own."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self._tree = folder
        for part in _PARTS:
            copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy2
            copy(ROOT / part, folder / part)
        # Compiled once, the tests start in a fifth of the time.
        environment = {**environment, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": ""}
        self._helper = _Helper("tests.mutate_slot", folder, environment)

    def close(self) -> None:
        """End the process."""
        self._helper.close()

    def run(self, mutant: Mutant, favored: Sequence[str]) -> tuple[str, str]:
        """Return the verdict on *mutant* (noticed, survived or broken), and the test that noticed it."""
        path = self._tree / mutant.file
        original, stat = path.read_text(), path.stat()
        path.write_text(mutant.text())
        # Python identifies the source of compiled code by time and size, which two mutants may share.
        os.utime(path, (next(_times), next(_times)))
        try:
            job = {"favored": favored, "seconds": SECONDS_MAX, "migrates": mutant.file in VIEWS}
            found = ("survived", "")
            for tests in filter(None, stages(mutant.file)):
                verdict, by = self._helper.ask({**job, "tests": tests})
                found = (verdict, by)
                if found[0] != "survived":
                    break
            return found
        finally:
            path.write_text(original)
            os.utime(path, (stat.st_atime, stat.st_mtime))


_times: Final = iter(range(1_000_000_000, 2**31))


class Run:
    """The mutants that are run, and the verdict on each."""

    def __init__(self, mutants: Sequence[Mutant], *, deadline: float) -> None:
        self.found: dict[Mutant, str] = {each: "explained" for each in mutants if each.name in EXPLAINED}
        self._waiting: SimpleQueue[Mutant] = SimpleQueue()
        for each in mutants:
            if each not in self.found:
                self._waiting.put(each)
        self.left: SimpleQueue[Mutant] = SimpleQueue()
        self._deadline = deadline
        self._lock = threading.Lock()
        self._killers: dict[str, Counter[str]] = defaultdict(Counter)

    def remember(self, memory: Memory) -> None:
        """Try each mutant in memory, and leave the unnoticed ones for the database."""
        for mutant in self._each(self._waiting):
            if not self._try(memory.run, mutant, is_last=False):
                self.left.put(mutant)

    def work(self, slot: Slot) -> None:
        """Try the mutants that are left, one after the other."""
        for mutant in self._each(self.left):
            self._try(slot.run, mutant, is_last=True)

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

    def survivors(self, *, is_over: bool) -> list[Mutant]:
        """Return the mutants that no test noticed; if the run *is_over*, untried ones count as survivors too."""
        while is_over and not self.left.empty():
            self.found[self.left.get()] = "survived"
        return [each for each, verdict in self.found.items() if verdict == "survived"]

    def _favored(self, mutant: Mutant) -> list[str]:
        """Return the tests that noticed other mutants of this function, then of this file, the likeliest first."""
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
    """Return the change of *mutant* as a diff."""
    old, new = ((ROOT / mutant.file).read_text(), mutant.text())
    first = old.rindex("\n", 0, mutant.start) + 1
    ends = (old.index("\n", mutant.end), new.index("\n", mutant.start + len(mutant.wrong)))
    lines = [f"  - {line}" for line in old[first : ends[0]].splitlines()]
    lines += [f"  + {line}" for line in new[first : ends[1]].splitlines()]
    return "\n".join([f"  {mutant.file}:{mutant.line}", *lines])


def table_of(found: dict[Mutant, str]) -> Iterator[str]:
    """Yield a line for each file and each kind: the numbers of mutants made, noticed, explained, and survived."""
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


def chosen(words: Iterable[str], *, seed: int, memory: bool, again: bool) -> list[Mutant]:
    """Return the mutants to run, in an order decided by the *seed*: in *memory* those that can be noticed there."""
    mutants = [each for each in made() if all(word in each.name for word in words)]
    if memory:
        beyond = set() if again else set(BEYOND_MEMORY.read_text().splitlines())
        mutants = [each for each in mutants if each.is_of_fold and each.name not in beyond]
    random.Random(seed).shuffle(mutants)
    return mutants


def _in_threads(work: Callable[[Any], None], helpers: Sequence[Memory] | Sequence[Slot]) -> None:
    threads = [threading.Thread(target=work, args=(each,)) for each in helpers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for each in helpers:
        each.close()


def run_whole(result: Run, *, slots: int) -> None:
    """Run the tests with a database on the mutants of *result* that are left."""
    given = (os.environ.get("DATABASE_URL"), os.environ.get("REDIS_URL"))
    with ExitStack() as running:
        folder = Path(running.enter_context(TemporaryDirectory(prefix="payfold-mutants-")))
        services = running.enter_context(
            embedded_services(folder / "services", durable=False, database_url=given[0], redis_url=given[1])
        )
        template = running.enter_context(migrated(services.database_url))
        urls = {"DATABASE_URL": services.database_url, "REDIS_URL": services.redis_url, TEMPLATE_VARIABLE: template}
        trees = [folder / str(number) for number in range(slots)]
        for tree in trees:
            tree.mkdir()
        _in_threads(result.work, [Slot(tree, {**os.environ, **urls}) for tree in trees])


def main(arguments: Sequence[str]) -> int:
    """Run the mutants that *arguments* choose, print the verdicts, and return 1 if any mutant survived."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("words", nargs="*")
    parser.add_argument("--seed", type=int, default=secrets.randbelow(2**32))
    parser.add_argument("--sample", type=int)
    parser.add_argument("--minutes", type=float, default=100)
    parser.add_argument("--slots", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args(arguments)
    started, mutants = time.monotonic(), chosen(given.words, seed=given.seed, memory=given.memory, again=given.write)
    result = Run(mutants[: given.sample], deadline=time.monotonic() + given.minutes * 60)
    _in_threads(result.remember, [Memory(mutants[: given.sample]) for _ in range(given.slots)])
    if not given.memory:
        run_whole(result, slots=given.slots)
    survivors = result.survivors(is_over=given.memory)
    if given.write:
        BEYOND_MEMORY.write_text("".join(f"{name}\n" for name in sorted(each.name for each in survivors)))
    _report(result, survivors)
    minutes = (time.monotonic() - started) / 60
    print(f"{len(result.found)} mutants in {minutes:.1f} minutes; repeat with --seed {given.seed}")  # noqa: T201 - its output
    return min(len(survivors), 1)


def _report(result: Run, survivors: Sequence[Mutant]) -> None:
    print("\n".join(table_of(result.found)))  # noqa: T201 - its output
    for each in survivors:
        print(f"\nsurvived: {each.name}\n{diff_of(each)}")  # noqa: T201 - as above


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
