"""Runs tests on a tree that changes between the runs: a process for each, forked from one that imported the rest.

Each line of stdin is a job: the test files, the tests to run first, and a timeout in seconds. Each line of stdout is
its verdict and the test that noticed. ``tests.mutate`` starts this process.
"""

import gc
import json
import os
import select
import signal
import sys
from contextlib import suppress
from importlib import import_module
from typing import Any, Final
from urllib.parse import urlsplit

import psycopg
import pytest

from tests.databases import TEMPLATE_VARIABLE, copied

_STAYS: Final = ("deploy.sandbox", "deploy.local")
_LOADED: Final = "ignore::pytest.PytestAssertRewriteWarning"
_CHANGES: Final = ("worker", "tests", "deploy", "schemas.migrations")


class Watch:
    """Puts the favored tests first, and keeps the name of the one that fails."""

    def __init__(self, favored: list[str]) -> None:
        self._place = {name: number for number, name in enumerate(favored)}
        self.noticed_by = ""

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Move the favored tests to the front."""
        items.sort(key=lambda item: self._place.get(item.nodeid, len(self._place)))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keep the name of the test if it failed."""
        if report.failed:
            self.noticed_by = report.nodeid


def preload() -> None:
    """Import the modules that the tests import; unload our modules that may change, and those that use them."""
    for name in ("tests.command", "tests.stripe_payments", "worker.proof.explain"):
        import_module(name)
    for name in list(sys.modules):
        if name.partition(".")[0] in _CHANGES and name not in ("__main__", "deploy") and not name.startswith(_STAYS):
            del sys.modules[name]
    gc.freeze()


def run(job: dict[str, Any]) -> tuple[str, str]:
    """Run the *job* in a process of its own, and return the verdict and the test that noticed."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _work(job, writing)
    os.close(writing)
    is_over = bool(select.select([reading], [], [], job["seconds"])[0])
    answer = os.read(reading, 65_536) if is_over else b""
    os.close(reading)
    if not is_over:
        # Code that runs without end is wrong, so a timeout counts as noticed.
        os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    verdict, by = json.loads(answer) if answer else ("broken" if is_over else "noticed", "")
    return verdict, by


def _work(job: dict[str, Any], writing: int) -> None:
    os.setsid()
    silence = os.open(os.environ.get("PAYFOLD_MUTANT_LOG", os.devnull), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    with suppress(Exception):
        answer = _replace_and_test(job) if job["view"] else _test(job)
        os.write(writing, json.dumps(answer).encode())
    os._exit(0)


def _replace_and_test(job: dict[str, Any]) -> tuple[str, str]:
    """Run the *job* on databases with its view."""
    with copied(os.environ["DATABASE_URL"], os.environ[TEMPLATE_VARIABLE], "payfold_template") as url:
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute(job["view"])
        os.environ[TEMPLATE_VARIABLE] = urlsplit(url).path[1:]
        return _test(job)


def _test(job: dict[str, Any]) -> tuple[str, str]:
    watch = Watch(job["favored"])
    options = ["-q", "-x", "-n", "0", "-p", "no:cacheprovider", "--hypothesis-seed=1", "-W", _LOADED]
    code = pytest.main([*options, *job["tests"]], plugins=[watch])
    return {0: "survived", 1: "noticed"}.get(int(code), "broken"), watch.noticed_by


if __name__ == "__main__":
    preload()
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), flush=True)  # noqa: T201 - its answer
