"""Makes mutants of the folds, and counts how many of them the tests notice.

    deploy/dev run python -m tests.mutate [--seed N] [--sample K] [--minutes M] [--slots S]
                                          [--memory [--write] | --beyond | --joins] [WORD…]

Each mutant (see ``tests.mutants``) has to turn the tests of its file red: those of a fold first in memory, where most
need milliseconds, those of what only reads on databases that are filled once, and what is left in a copy of the tree.
With a sample, K of them chosen by the seed; with words, only those whose name holds all of them. What behaves as the
code does is listed in ``tests.mutants_explained``, with the reason, and is not run. In ``--memory`` only mutants of
folds are run, without those that take a database to notice: see ``tests/mutants_beyond_memory.txt``, which ``--write``
makes again. With ``--beyond`` only what ``--memory`` leaves out, with ``--joins`` those of how every fold reads and
joins instead. Prints a table and each survivor with its line. Ends with 1 if any mutant survived.
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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from queue import Empty, SimpleQueue
from tempfile import TemporaryDirectory
from typing import Any, Final

from deploy.local.services import embedded_services
from tests.databases import TEMPLATE_VARIABLE, migrated
from tests.mutants import ROOT, VIEWS, Mutant, made, made_of_joins, statement_of
from tests.mutants_explained import EXPLAINED

TESTS: Final[dict[str, tuple[str, ...]]] = {
    "balance": ("rules", "balance_transaction", "customer", "changes"),
    "charge": ("rules", "charges", "one_second", "payment", "order_payment", "refunded"),
    "checkout_session": ("rules", "checkout_session", "changes", "payment", "order_payment"),
    "credit_note": ("rules", "credit_note", "one_second", "changes"),
    "customer": ("rules", "customer", "one_second", "balance_transaction"),
    "dispute": ("disputes", "one_second", "changes"),
    "invoice": ("rules", "invoice", "one_second", "invoice_payment", "changes"),
    "payment": ("rules", "payment", "order_payment"),
    "payment_intent": ("payment_intents", "one_second", "payment"),
    "payment_link": ("payment_link", "one_second", "changes"),
    "portal": ("rules", "portal", "one_second"),
    "refund": ("refunds", "one_second", "refunded"),
    "chain": ("rules", "balance_transaction", "one_second", "customer", "changes"),
    "join": ("rules", "balance_transaction", "one_second", "charges", "changes"),
    "reading": ("rules", "customer", "invoice", "portal", "checkout_session"),
    "mending": ("rules", "customer", "invoice", "portal", "checkout_session"),
    "explain": ("explanations", "explain", "checkout_session"),
    "0001_spine": ("link_funnel",),
    "0023_book_by_keys": ("order_book", "refunded"),
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
    "0023_book_by_keys": ("order_book", "refunds_of_orders"),
}
"""By file: what other tests are run where those notice nothing."""
OF_JOINS: Final[dict[str, tuple[str, ...]]] = {
    "chain": ("chain", "join"),
    "join": ("join", "moments", "chain"),
    "reading": ("odd_answers", "rewritten_copies", "old_shapes"),
    "mending": ("odd_answers", "rewritten_copies"),
}
"""By file that every fold uses: what other tests are tried in memory, after the literals."""
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
    name = Path(file).stem
    of_joins = [f"tests/test_{each}.py" for each in OF_JOINS.get(name, ())]
    return [f"tests/test_literals_{each}.py" for each in (*TESTS[name], "subjects")] + of_joins


class _Helper:
    """A process that answers each line with one line: see ``tests.mutate_slot`` and ``tests.mutate_pure``."""

    def __init__(self, module: str, tree: Path, environment: dict[str, str], *arguments: str) -> None:
        command, pipe = [sys.executable, "-m", module, *arguments], subprocess.PIPE
        self._process = subprocess.Popen(command, cwd=tree, env=environment, stdin=pipe, stdout=pipe, text=True)

    def ask(self, job: Mapping[str, object]) -> Any:  # noqa: ANN401 - what JSON holds
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

    def __init__(self, mutants: Iterable[Mutant], *, again: bool) -> None:
        self._again = again
        files = {test for each in mutants if each.is_of_fold for test in literal_tests(each.file)}
        self._helper = _Helper("tests.mutate_pure", ROOT, dict(os.environ), *sorted(files))

    def close(self) -> None:
        """End the process."""
        self._helper.close()

    def run(self, mutant: Mutant, favored: Sequence[str]) -> tuple[str, str]:
        """Return what the tests find of *mutant* that need no database: noticed, with the test, or survived."""
        if not mutant.is_of_fold or (not self._again and mutant.name in beyond_memory()):
            return "survived", ""
        name, files = mutant.file[:-3].replace("/", "."), literal_tests(mutant.file)
        by = str(self._helper.ask({"module": name, "text": mutant.text(), "files": files, "favored": favored}))
        return "noticed" if by else "survived", by


class Kept:
    """A process that runs tests on mutants of what only reads: see ``tests.mutate_kept``."""

    def __init__(self, mutants: Iterable[Mutant], environment: dict[str, str]) -> None:
        files = {test for each in mutants if not each.is_of_fold for test in literal_tests(each.file)}
        self._helper = _Helper("tests.mutate_kept", ROOT, environment, *sorted(files))

    def close(self) -> None:
        """End it, and drop its databases."""
        self._helper.close()

    def run(self, mutant: Mutant, favored: Sequence[str]) -> tuple[str, str]:
        """Return what became of *mutant* on databases that are full already, and the test that noticed it."""
        if mutant.is_of_fold:
            return "survived", ""
        job = {"file": mutant.file, "text": mutant.text(), "files": literal_tests(mutant.file), "favored": favored}
        verdict, by = self._helper.ask(job)
        return verdict, by


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
            view = statement_of(mutant.file, mutant.text()) if mutant.file in VIEWS else ""
            job = {"favored": favored, "seconds": SECONDS_MAX, "view": view}
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


Runner = Callable[[Mutant, Sequence[str]], tuple[str, str]]


class Run:
    """The mutants that are run, and the verdict on each."""

    def __init__(self, mutants: Sequence[Mutant], *, deadline: float) -> None:
        self.found: dict[Mutant, str] = {each: "explained" for each in mutants if each.name in EXPLAINED}
        self._waiting: SimpleQueue[Mutant] = SimpleQueue()
        for each in mutants:
            if each not in self.found:
                self._waiting.put(each)
        self.left: SimpleQueue[Mutant] = SimpleQueue()
        self._last: SimpleQueue[Mutant] = SimpleQueue()
        self._deadline = deadline
        self._lock = threading.Lock()
        self._killers: dict[str, Counter[str]] = defaultdict(Counter)

    def remember(self, memory: Memory) -> None:
        """Try each mutant in memory, and leave what is not noticed there."""
        self._pass_on(self._waiting, memory.run, self.left)

    def read(self, kept: Kept) -> None:
        """Try each of what is left on databases that are kept, and leave what is not noticed there for the last."""
        self._pass_on(self.left, kept.run, self._last)

    def work(self, slot: Slot) -> None:
        """Try one after the other of what is left."""
        for mutant in self._each(self._last):
            self._try(slot.run, mutant, is_last=True)

    def _pass_on(self, waiting: SimpleQueue[Mutant], run: Runner, left: SimpleQueue[Mutant]) -> None:
        for mutant in self._each(waiting):
            if not self._try(run, mutant, is_last=False):
                left.put(mutant)

    def _each(self, waiting: SimpleQueue[Mutant]) -> Iterator[Mutant]:
        while time.monotonic() < self._deadline:
            try:
                yield waiting.get_nowait()
            except Empty:
                return

    def _try(self, run: Runner, mutant: Mutant, *, is_last: bool) -> bool:
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


def chosen(words: Iterable[str], *, seed: int, memory: bool, beyond: bool, again: bool) -> list[Mutant]:
    """Return the mutants to be run, in an order that the *seed* decides.

    In *memory* they are those of folds that are noticed there, with *again* all of folds; *beyond* memory the others.
    """
    mutants = [each for each in made() if all(word in each.name for word in words)]
    if memory:
        mutants = [each for each in mutants if each.is_of_fold and (again or each.name not in beyond_memory())]
    if beyond:
        mutants = [each for each in mutants if not each.is_of_fold or each.name in beyond_memory()]
    random.Random(seed).shuffle(mutants)
    return mutants


@cache
def beyond_memory() -> frozenset[str]:
    """Return the names of the mutants of folds that take a database to notice."""
    return frozenset(BEYOND_MEMORY.read_text().splitlines())


def _in_threads(work: Callable[[Any], None], helpers: Sequence[Memory] | Sequence[Kept] | Sequence[Slot]) -> None:
    threads = [threading.Thread(target=work, args=(each,)) for each in helpers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for each in helpers:
        each.close()


def run_whole(result: Run, mutants: Sequence[Mutant], *, slots: int) -> None:
    """Run the tests with a database on what is left of *result*."""
    given = (os.environ.get("DATABASE_URL"), os.environ.get("REDIS_URL"))
    with ExitStack() as running:
        folder = Path(running.enter_context(TemporaryDirectory(prefix="payfold-mutants-")))
        services = running.enter_context(
            embedded_services(folder / "services", durable=False, database_url=given[0], redis_url=given[1])
        )
        template = running.enter_context(migrated(services.database_url))
        urls = {"DATABASE_URL": services.database_url, "REDIS_URL": services.redis_url, TEMPLATE_VARIABLE: template}
        environment = {**os.environ, **urls}
        _in_threads(result.read, [Kept(mutants, environment)])
        trees = [folder / str(number) for number in range(slots)]
        for tree in trees:
            tree.mkdir()
        _in_threads(result.work, [Slot(tree, environment) for tree in trees])


def main(arguments: Sequence[str]) -> int:
    """Run the mutants that *arguments* choose, print the verdicts, and return 1 if any mutant survived."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("words", nargs="*")
    parser.add_argument("--seed", type=int, default=secrets.randbelow(2**32))
    parser.add_argument("--sample", type=int)
    parser.add_argument("--minutes", type=float, default=100)
    parser.add_argument("--slots", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--beyond", action="store_true")
    parser.add_argument("--joins", action="store_true")
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args(arguments)
    started, mutants = time.monotonic(), _chosen(given)[: given.sample]
    result = Run(mutants, deadline=time.monotonic() + given.minutes * 60)
    _in_threads(result.remember, [Memory(mutants, again=given.write) for _ in range(given.slots)])
    if not given.memory:
        run_whole(result, mutants, slots=given.slots)
    survivors = result.survivors(is_over=given.memory)
    if given.write:
        BEYOND_MEMORY.write_text("".join(f"{name}\n" for name in sorted(each.name for each in survivors)))
    _report(result, survivors)
    if unjudged := len(mutants) - len(result.found):
        print(f"{unjudged} were not judged in time")  # noqa: T201 - its output
    minutes = (time.monotonic() - started) / 60
    print(f"{len(result.found)} mutants in {minutes:.1f} minutes; repeat with --seed {given.seed}")  # noqa: T201 - its output
    return min(len(survivors), 1)


def _chosen(given: argparse.Namespace) -> list[Mutant]:
    if given.joins:
        mutants = [each for each in made_of_joins() if all(word in each.name for word in given.words)]
        random.Random(given.seed).shuffle(mutants)
        return mutants
    return chosen(given.words, seed=given.seed, memory=given.memory, beyond=given.beyond, again=given.write)


def _report(result: Run, survivors: Sequence[Mutant]) -> None:
    print("\n".join(table_of(result.found)))  # noqa: T201 - its output
    for each in survivors:
        print(f"\nsurvived: {each.name}\n{diff_of(each)}")  # noqa: T201 - as above


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
