"""Runs literal tests on the folds alone: no database, so that a mutant of a fold costs a fraction of a second.

A test that takes events in and reads rows, changes or anomalies by a simple query can be answered from memory: by the
present folds and joins, driven batch by batch as the projection drives them. All tests are run once at the start to
find those; tests that need more (a view, another process) are left to the database. Then each line of stdin holds a
module and its mutated text, and each line of the answer the test that notices. The arguments are the test files.
"""

import gc
import json
import os
import re
import resource
import signal
import sqlite3
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from functools import cached_property, partial
from importlib import import_module
from types import FunctionType, ModuleType, SimpleNamespace
from typing import Any, Final, cast

import msgspec
import pytest
from hypothesis import Phase, settings
from msgspec import structs
from sqlalchemy import JSON, Boolean, DateTime, Table

from schemas import database, tables
from schemas.change_rows import ChangeRow, DecidingEvent
from schemas.inbox import Delivery
from tests import ledger, literals, web
from worker import folds
from worker.folding import changes, corrections, projection, settling
from worker.folding.claim import event_of_delivery
from worker.folds import credit_note, join, payment
from worker.folds.chain import Path
from worker.folds.facts import Event, Facts, Row, Subject
from worker.folds.join import Joined
from worker.folds.payment import Payment

EVENTS_MAX: Final = 6_000
CPU_SECONDS_MAX: Final = 40
TEST_CPU_SECONDS_MAX: Final = 3
_TABLES: Final = (*tables.PROJECTIONS, tables.changes, tables.anomalies)
_TYPES: Final = {column.name: column.type for table in _TABLES for column in table.columns}


class World:
    """The rows, changes and anomalies that the projection would make of batches of events."""

    def __init__(self) -> None:
        self.rows: dict[Subject, Joined] = {}
        self.changes: list[ChangeRow] = []
        self._events: dict[tuple[str, bool, str], Event] = {}
        self._facts: dict[Subject, list[Facts]] = defaultdict(list)
        self._own: dict[Subject, Joined] = {}
        self._led: dict[Subject, set[Subject]] = defaultdict(set)
        self._linked: dict[Subject, set[Subject]] = defaultdict(set)

    def take(self, batch: Iterable[Event]) -> None:
        """Fold a batch."""
        touched, fresh, news = dict[Subject, None](), {}, defaultdict[Subject, list[Facts]](list)
        for event in batch:
            key = (event.account, event.livemode, event.id)
            if key in self._events:
                continue
            self._events[key], fresh[key] = event, event.source
            for facts in folds.judge(event).facts:
                self._facts[facts.subject].append(facts)
                news[facts.subject].append(facts)
                touched[facts.subject] = None
        for subject in list(touched):
            leader = join.leader_of(folds.ROW_SPECS[subject.table], subject)
            if leader is not None:
                self._led[leader].add(subject)
        touched |= dict.fromkeys(led for subject in list(touched) for led in self._led[subject])
        for subject in touched:
            joined = self._joined(subject, news[subject])
            if joined is not None:
                self._own[subject] = joined
                for link in _links(subject, joined.row):
                    self._linked[link].add(subject)
        self._save(touched, fresh)

    def _joined(self, subject: Subject, news: list[Facts]) -> Joined | None:
        """Return the row *subject* with its *news*: laid over it if they are later, else folded from all its events."""
        shape, held = folds.ROW_SPECS[subject.table], self._own.get(subject)
        is_sure = held is not None and not any(each.kind == join.AMBIGUOUS_ORDER for each in held.anomalies)
        advanced = join.advance(shape, held.row, news) if held is not None and is_sure and news else None
        if held is None or advanced is None:
            return join.fold_all(shape, join.with_leader(shape, subject, self._facts))
        kept = [each for each in held.anomalies if each.kind in join.SEEN_IN_ALL and each not in advanced.anomalies]
        children = advanced.children if advanced.replace_all else (*held.children, *advanced.children)
        return structs.replace(advanced, anomalies=(*advanced.anomalies, *kept), children=children)

    def _save(self, touched: Mapping[Subject, None], fresh: dict[tuple[str, bool, str], str]) -> None:
        moved = {each for each in touched if each in self._own}
        for _ in range(2):  # a refund names a charge, which names the intent of an order
            moved |= {
                near for each in moved for link in _links(each, self._own[each].row) for near in self._linked[link]
            }
        saved = SimpleNamespace(fresh=fresh)
        for subject in sorted(moved):
            joined, held = self._settled(subject), self.rows.get(subject)
            if subject not in touched and joined == held:
                continue
            self.rows[subject] = joined
            known = joined.opening if held is None else held.row
            for change, by in changes._implied(subject, joined, known, saved):  # type: ignore[arg-type]  # what it reads
                self._append(subject, change.kind, change.before, change.after, by)

    def _append(
        self, subject: Subject, kind: str, before: Mapping[str, Any] | None, after: Mapping[str, Any], by: DecidingEvent
    ) -> None:
        name = folds.ROW_SPECS[subject.table].subject
        change: ChangeRow = {
            **by,
            "account": subject.account,
            "livemode": subject.livemode,
            "subject": name,
            "subject_id": subject.id,
            "kind": kind,
            "before": before,
            "after": dict(after),
            "withheld": None,
        }
        found = [change]
        if name == "order":
            own = [each for each in self.changes if each["subject_id"] == subject.id and each["subject"] == name]
            key = (subject.account, subject.livemode, subject.id)
            announced = {key: (own[-1]["after"], [each["kind"] for each in own])} if own else {}
            found = corrections._settled(change, announced)
        one_shots = {
            (each["subject_id"], each["kind"]) for each in self.changes if each["kind"] in tables.ONE_SHOT_KINDS
        }
        self.changes += [each for each in found if (each["subject_id"], each["kind"]) not in one_shots]

    def _settled(self, subject: Subject) -> Joined:
        own = self._own[subject]
        if subject not in settling.open_rows({subject: own}):
            return own
        if subject.table == "credit_notes":
            refund = self._own.get(structs.replace(subject, table="refunds", id=str(own.row["refund"])))
            return credit_note.with_refund(own, None if refund is None else refund.row)
        return payment.settle(own, self._payment(subject, own.row["payment_intent"]))

    def _payment(self, order: Subject, intent: object) -> Payment:
        def of(table: str) -> list[Row]:
            known = [(each, self._own[each]) for each in sorted(near) if each.table == table]
            return [{**joined.row, "source": joined.source, **self._mover(each, joined.row)} for each, joined in known]

        near = set(self._linked[structs.replace(order, table="payment_intents", id=str(intent))])
        near |= {other for each in near for link in _links(each, self._own[each].row) for other in self._linked[link]}
        charges = [each for each in of("charges") if each["payment_intent"] == intent]
        ids = {each["id"] for each in charges}
        refunds = [each for each in of("refunds") if each["payment_intent"] == intent or each["charge"] in ids]
        releases = [each for each in refunds if each["reason"] == payment.RELEASED]
        return Payment(charges, releases, next((each for each in of("payment_intents") if each["id"] == intent), None))

    def _mover(self, subject: Subject, row: Row) -> Row:
        at = row.get("captured_at") or row.get("released_at")
        if subject.table != "charges" or at is None:
            return {}
        ids = {facts.event_id for facts in self._facts[subject] if facts.created == at}
        own = [self._events[subject.account, subject.livemode, id_] for id_ in ids]
        order = sorted(own, key=lambda each: (each.type not in ("charge.captured", "charge.expired"), each.id))
        return {"event_id": order[0].id, "as_of": order[0].created, "source": order[0].source} if order else {}

    def found(self, table: str) -> list[Row]:
        """Return the rows of *table*."""
        own = [joined.row for subject, joined in self.rows.items() if subject.table == table]
        parents = [each for each in self.rows.items() if folds.ROW_SPECS[each[0].table].child == table]
        return own + [child for _, joined in parents for child in joined.children]

    @cached_property
    def memory(self) -> sqlite3.Connection:
        """The in-memory database that answers simple queries."""
        made = sqlite3.connect(":memory:")
        anomalies = [
            {
                "subject_id": subject.id,
                "kind": each.kind,
                "subject": folds.ROW_SPECS[subject.table].subject,
                "detail": each.detail,
            }
            for subject, joined in self.rows.items()
            for each in joined.anomalies
        ]
        numbered: list[dict[str, Any]] = [{**each, "seq": number} for number, each in enumerate(self.changes)]
        rows = {"changes": numbered, "anomalies": list({repr(each): each for each in anomalies}.values())}
        for table in _TABLES:
            _fill(made, table, rows[table.name] if table.name in rows else self.found(table.name))
        return made


def _links(subject: Subject, row: Row) -> Iterator[Subject]:
    """Yield the keys by which the *row* of a payment is found: its own, and the intent, charge and refund it names."""
    if subject.table in ("charges", "payment_intents", "refunds"):
        yield subject
    if subject.table in ("charges", "refunds", "orders", "credit_notes"):
        for column in ("payment_intent", "charge", "refund"):
            if row.get(column) is not None:
                yield structs.replace(subject, table=f"{column}s", id=str(row[column]))


def _fill(memory: sqlite3.Connection, table: Table, rows: list[dict[str, Any]]) -> None:
    names = [column.name for column in table.columns]
    memory.execute(f"CREATE TABLE {table.name} ({', '.join(names)})")
    marks = ", ".join("?" * len(names))
    insert = f"INSERT INTO {table.name} VALUES ({marks})"  # noqa: S608 - our own names
    memory.executemany(insert, [[_kept(row.get(each)) for each in names] for row in rows])


def _kept(value: Any) -> Any:  # noqa: ANN401 - a column's value
    if isinstance(value, datetime):
        return value.isoformat()
    return msgspec.json.encode(value).decode() if isinstance(value, (Mapping, list)) else value


def _read(name: str, value: Any) -> Any:  # noqa: ANN401 - as above
    type_ = _TYPES.get(name)
    if value is None or type_ is None:
        return json.loads(value) if str(value).startswith("[") else value
    if isinstance(type_, DateTime):
        return datetime.fromisoformat(value)
    if isinstance(type_, Boolean):
        return bool(value)
    return json.loads(value) if isinstance(type_, JSON) else value


_ARRAY: Final = re.compile(r"ARRAY\(\s*SELECT (\w+)", re.IGNORECASE)


class Listener:
    """Replaces the engine in a test, and keeps the events that the test took in."""

    made: Final[list["Listener"]] = []

    def __init__(self) -> None:
        self.made.append(self)
        self.forget()

    def forget(self) -> None:
        """Drop all events."""
        self.batches: list[list[Event]] = []
        self.waiting: list[Event] = []
        self.computed: tuple[int, World] = (0, World())

    @property
    def world(self) -> World:
        """The result of the events that were taken in."""
        done, world = self.computed
        for batch in self.batches[done:]:
            world.take(batch)
            world.__dict__.pop("memory", None)
        self.computed = (len(self.batches), world)
        return world

    def dispose(self) -> None:
        """Do nothing."""


def _record(listener: Listener, deliveries: Iterable[Delivery]) -> list[Any]:
    listener.waiting += map(event_of_delivery, deliveries)
    return []


def _fold(listener: Listener, *, limit: int = projection.FOLD_BATCH_MAX) -> int:
    waiting, listener.waiting = listener.waiting, []
    listener.batches += [waiting[start : start + limit] for start in range(0, len(waiting), limit)]
    return len(waiting)


def _rows(listener: Listener, statement: str, **values: object) -> list[dict[str, Any]]:
    cursor = listener.world.memory.execute(_ARRAY.sub(r"(SELECT json_group_array(\1)", statement), values)
    names = [each[0] for each in cursor.description]
    return [{name: _read(name, value) for name, value in zip(names, row, strict=True)} for row in cursor.fetchall()]


def _found(listener: Listener, table: Table) -> list[Row]:
    if table.name not in {each.name for each in tables.PROJECTIONS}:
        raise NotImplementedError
    return listener.world.found(table.name)


@contextmanager
def _nowhere(_services: object) -> Iterator[str]:
    yield ""


_STAND_INS: Final[tuple[tuple[ModuleType, str, Callable[..., Any]], ...]] = (
    (ledger, "record", _record),
    (ledger, "fold", _fold),
    (ledger, "rows", _rows),
    (literals, "_found", _found),
    (web, "migrated_database", _nowhere),
    (database, "engine", lambda _url: Listener()),
)


class Tests:
    """The tests that can be answered from memory: each with its name, its function, and its arguments."""

    def __init__(self) -> None:
        self.found: dict[str, tuple[Callable[..., object], dict[str, Any]]] = {}

    def pytest_sessionstart(self) -> None:
        """Have property tests stop at the first example that fails."""
        phases = (Phase.explicit, Phase.generate)
        settings.register_profile("mutants", parent=settings.get_profile("payfold"), phases=phases, database=None)
        settings.load_profile("mutants")

    @pytest.hookimpl(tryfirst=True)
    def pytest_fixture_setup(self, fixturedef: Any, request: Any) -> object:  # noqa: ANN401 - pytest's own, without types
        """Give a test what ``value_of`` has instead of a fixture."""
        value = self.value_of(fixturedef.argname, request)
        if value is not None:
            fixturedef.cached_result = (value, fixturedef.cache_key(request), None)
        return value

    def value_of(self, name: str, _request: Any) -> object:  # noqa: ANN401 - as above
        """Return a listener where a test asks for a database; None for any other fixture *name*."""
        if name in ("services", "template_database", "database_url"):
            return "none"
        return Listener() if name == "engine" else None

    @pytest.hookimpl(tryfirst=True)
    def pytest_pyfunc_call(self, pyfuncitem: pytest.Function) -> None:
        """Keep the test function instead of running it."""
        names = pyfuncitem._fixtureinfo.argnames
        self.found[pyfuncitem.nodeid] = (pyfuncitem.obj, {name: pyfuncitem.funcargs[name] for name in names})

    def run(self, name: str) -> bool:
        """Return whether the test *name* passes."""
        function, arguments = self.found[name]
        if isinstance(own := arguments.get("engine"), Listener):
            own.forget()
        try:
            function(**arguments)
        except (Exception, pytest.fail.Exception):  # noqa: BLE001 - any failure of the test
            return False
        return True


def listen(files: Iterable[str]) -> Tests:
    """Return the tests of *files* that the folds alone can answer."""
    for module, name, stand_in in _STAND_INS:
        setattr(module, name, stand_in)
    found = Tests()
    options = ["-q", "-n", "0", "-p", "no:cacheprovider", "--tb=no", "--assert=plain", "--disable-warnings"]
    if chosen := list(files):  # without any argument, pytest would run all tests
        pytest.main([*options, *chosen], plugins=[found])
    for each in list(found.found):
        arguments, began = found.found[each][1].values(), time.process_time()
        small = all(sum(map(len, one.batches)) <= EVENTS_MAX for one in arguments if isinstance(one, Listener))
        if not small or not found.run(each) or time.process_time() - began > TEST_CPU_SECONDS_MAX:
            del found.found[each]
    for listener in Listener.made:
        listener.computed = (0, World())
    gc.freeze()
    return found


def put(module: ModuleType, text: str) -> None:
    """Replace the functions, row specs and constants of *module*, wherever they are in use, by those of *text*."""
    fresh = ModuleType(module.__name__)
    exec(compile(text, str(module.__file__), "exec"), fresh.__dict__)  # noqa: S102 - its purpose
    for name, new in vars(fresh).items():
        old = vars(module).get(name)
        if isinstance(old, FunctionType) and old.__module__ == module.__name__:
            _become(old, new)
        elif isinstance(old, type) and old.__module__ == module.__name__:
            for own, method in _methods(old).items():
                _become(method, _methods(new)[own])
        elif name.endswith("TYPES") and isinstance(old, tuple):
            for kind in set(old) - set(new):
                cast("dict[str, Any]", folds.FOLDS).pop(kind, None)
        elif isinstance(old, join.RowSpec):
            old.__dict__.clear()
            old.__dict__.update(vars(new))
        elif isinstance(old, (str, int, tuple, Mapping, Path)) and not name.startswith("__"):
            setattr(module, name, new)


def _become(old: FunctionType, new: FunctionType) -> None:
    old.__code__, old.__defaults__, old.__kwdefaults__ = new.__code__, new.__defaults__, new.__kwdefaults__


def _methods(of: type) -> dict[str, FunctionType]:
    """Return the functions behind what the class *of* defines in its own text."""
    found = {
        name: getattr(value, "fget", None) or getattr(value, "func", None) or getattr(value, "__func__", value)
        for name, value in vars(of).items()
    }
    return {
        name: each
        for name, each in found.items()
        if isinstance(each, FunctionType) and each.__code__.co_filename.endswith(".py") and not each.__closure__
    }


def noticed_by(tests: Tests, files: list[str], favored: list[str]) -> str:
    """Return the first test of *files* that fails now, the *favored* ones first; '' for none."""
    place = {name: number for number, name in enumerate(favored)}
    wanted = [name for name in tests.found if name.partition("::")[0] in files]
    return next(
        (name for name in sorted(wanted, key=lambda name: place.get(name, len(place))) if not tests.run(name)), ""
    )


def run(tests: Tests, job: dict[str, Any]) -> str:
    """Put the mutant of *job* in place, and return the test that notices; '' for none."""
    put(import_module(job["module"]), job["text"])
    return noticed_by(tests, job["files"], job["favored"])


ENDLESS: Final = "a test that does not end"


def in_a_process_of_its_own(work: Callable[[], str]) -> str:
    """Return what *work* returns in a fork of this process; '' where it fails, ``ENDLESS`` where it goes on and on."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS_MAX, CPU_SECONDS_MAX + 1))
        found = ""
        try:
            found = work()
        finally:  # what cannot even be put in place, the database judges
            os.write(writing, found.encode())
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as answer:
        found = answer.read().decode()
    _, status = os.waitpid(child, 0)
    return ENDLESS if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU else found


if __name__ == "__main__":
    answers = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    able = listen(sys.argv[1:])
    for line in sys.stdin:
        asked = json.loads(line)
        os.write(answers, json.dumps(in_a_process_of_its_own(partial(run, able, asked))).encode() + b"\n")
