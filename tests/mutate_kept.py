"""Runs tests on databases that they filled once: nothing is recorded or folded again, so a mutant costs its queries.

It is for mutants of what only reads: a view, or ``explain``. A test that takes events in and then reads can be run
again on its own database, with what records and folds left out. Which tests can is found by running them twice at the
start. Then jobs come from stdin, a line each, and the answer is the verdict and the test that notices. The arguments
are the test files.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import psycopg
import pytest
from sqlalchemy import Engine

from deploy.local.services import Services
from tests import ledger, web
from tests.databases import TEMPLATE_VARIABLE, copied
from tests.mutants import ROOT, VIEWS, statement_of
from tests.mutate_pure import ENDLESS, Tests, in_a_process_of_its_own, noticed_by, put

SECONDS_MAX: Final = 3
_NOTHING: Final[tuple[tuple[ModuleType, str, Callable[..., Any]], ...]] = (
    (ledger, "record", lambda *_, **__: []),
    (ledger, "fold", lambda *_, **__: 0),
    (ledger, "clear", lambda *_: None),
)


class Views:
    """The view that each database has instead of its own."""

    def __init__(self) -> None:
        self._statement = self._original = ""
        self._replaced: set[str] = set()

    @contextmanager
    def instead(self, statement: str, original: str) -> Iterator[None]:
        """Have *statement* make the view of each database that ``see`` names, and *original* at the end."""
        self._statement, self._original = statement, original
        try:
            yield
        finally:
            for url in self._replaced:
                _execute(url, original)

    def see(self, urls: Iterable[str]) -> None:
        """Replace the view in the databases *urls*, unless that was done.

        Raises:
            psycopg.ProgrammingError: the statement makes no view.
        """
        for url in set(urls) - self._replaced if self._statement else ():
            _execute(url, self._statement)
            self._replaced.add(url)


def _execute(url: str, statement: str) -> None:
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(statement.encode())


class Kept(Tests):
    """The tests that read what their databases keep."""

    def __init__(self, services: Services, kept: ExitStack) -> None:
        super().__init__()
        self.views = Views()
        self._services, self._kept = services, kept

    def copy(self) -> str:
        """Return the URL of an empty database that stays."""
        return self._kept.enter_context(copied(self._services.database_url, os.environ[TEMPLATE_VARIABLE]))

    def value_of(self, name: str, _request: Any) -> object:  # noqa: ANN401 - pytest's own, without types
        """Return the servers or a database that stays, if *name* is the fixture of one."""
        return self._services if name == "services" else self.copy() if name == "database_url" else None

    def run(self, name: str) -> bool:
        """Return whether the test *name* passes."""
        self.views.see(_urls(self.found[name][1].values()))
        return super().run(name)

    def keep_able(self) -> None:
        """Forget those tests that do not pass again, or take long."""
        for name in list(self.found):
            started = time.monotonic()
            if not self.run(name) or time.monotonic() - started > SECONDS_MAX:
                del self.found[name]
        for _, arguments in self.found.values():
            for engine in arguments.values():
                if isinstance(engine, Engine):
                    engine.dispose()


def _urls(values: Iterable[object]) -> Iterator[str]:
    for value in values:
        if isinstance(value, Engine):
            yield value.url.set(drivername="postgresql").render_as_string(hide_password=False)
        elif isinstance(value, str) and value.startswith("postgres"):
            yield value


def listen(files: Sequence[str], kept: ExitStack) -> Kept:
    """Return those tests of *files* that need no more than their databases keep."""
    found = Kept(Services(os.environ["DATABASE_URL"], os.environ["REDIS_URL"]), kept)

    @contextmanager
    def stays(_services: Services) -> Iterator[str]:
        yield found.copy()

    setattr(web, "migrated_database", stays)  # noqa: B010 - as the type checker wants it
    if files:  # without any, all tests there are would be run
        options = ["-q", "-n", "0", "-p", "no:cacheprovider", "--tb=no", "--assert=plain", "--disable-warnings"]
        pytest.main([*options, *files], plugins=[found])
    for module, name, nothing in _NOTHING:
        setattr(module, name, nothing)
    found.keep_able()
    return found


def verdict_of(tests: Kept, job: dict[str, Any]) -> tuple[str, str]:
    """Return what becomes of the mutant that *job* describes, and the test that notices."""
    statement = original = ""
    if job["file"] in VIEWS:
        statement = statement_of(job["file"], job["text"])
        original = statement_of(job["file"], (ROOT / job["file"]).read_text())
    else:
        put(import_module(Path(job["file"]).with_suffix("").as_posix().replace("/", ".")), job["text"])
    with tests.views.instead(statement, original):
        try:
            by = noticed_by(tests, job["files"], job["favored"])
        except psycopg.ProgrammingError:
            return "broken", ""
    return "noticed" if by else "survived", by


def _answer(tests: Kept, job: dict[str, Any]) -> str:
    return json.dumps(verdict_of(tests, job))


def _read(answer: str) -> tuple[str, str]:
    """Return the verdict in an *answer*; a mutant that ended its process survived, unless it went on without end."""
    if answer == ENDLESS:
        return "noticed", ENDLESS
    verdict, by = json.loads(answer) if answer else ("survived", "")
    return verdict, by


if __name__ == "__main__":
    answers = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    with ExitStack() as databases:
        able = listen(sys.argv[1:], databases)
        for line in sys.stdin:
            answer = in_a_process_of_its_own(partial(_answer, able, json.loads(line)))
            os.write(answers, json.dumps(_read(answer)).encode() + b"\n")
