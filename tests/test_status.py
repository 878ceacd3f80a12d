"""`status` reports living processes, waiting events and received webhooks, with null for unknown values."""

import asyncio
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest
from redis.exceptions import ConnectionError as RedisConnectionError
from sqlalchemy import Engine

from api.status import StatusReader, TooSlow
from schemas import broker, heartbeats, status, watchdog
from schemas.broker import Ear
from schemas.database import transaction
from schemas.errors import DatabaseAway
from schemas.heartbeats import RUNNING, Beat, Heart
from schemas.settings import Settings
from schemas.status import Broker, Limits, Memory, Silent, Status
from schemas.turns import Turns
from schemas.watchdog import Watchdog
from tests import command, faults, ledger
from tests.test_supervision import Broken
from tests.waiting import WAITS_FOR_A_LOCK, until
from tests.web import serving, settings_of
from worker import __main__ as worker_process
from worker import app
from worker.folding.parallel import FoldProcess
from worker.process import Parts

AWAY = Broker(state="away")
WORKER = ("fold", ""), ("consumer", "fold"), ("consumer", "stripe")


def read(engine: Engine, limits: Limits = Limits(), **settings: str) -> Status:  # noqa: B008 - it is frozen
    """Return the status of a database."""
    with transaction(engine, status.READ) as connection:
        return status.read(connection, Settings.load(settings), broker=AWAY, fold_version=7, limits=limits)


def beat(
    engine: Engine, kind: str, name: str = "", *, age: float = 0, since: float = 3600, outcome: str | None = None
) -> None:
    """Write the heartbeat of a process that was seen *age* seconds ago, and first *since* seconds ago."""
    ledger.execute(
        engine,
        "INSERT INTO heartbeats (kind, name, instance, at, since, outcome) VALUES (:kind, :name, 'a-host:1',"
        " now() - make_interval(secs => :age), now() - make_interval(secs => :since), :outcome)"
        " ON CONFLICT (kind, name, instance) DO UPDATE SET at = excluded.at, outcome = excluded.outcome",
        kind=kind,
        name=name,
        age=age,
        since=since,
        outcome=outcome,
    )


def beat_all(engine: Engine, *, age: float = 0) -> None:
    """Write heartbeats of web, worker and clock from *age* seconds ago."""
    for kind, name in (("web", ""), ("clock", ""), *WORKER):
        beat(engine, kind, name, age=age)


def missed(engine: Engine, **settings: str) -> list[Silent]:
    """Return the silent loops, with their details."""
    found = read(engine, Limits(), **settings).silent
    assert found is not None
    return found


def silent(engine: Engine, **settings: str) -> list[tuple[str, str, str]]:
    """Return kind and name of each silent loop."""
    return [(each.process, each.kind, each.name) for each in missed(engine, **settings)]


# ---- Silent processes ----


def test_no_process_is_expected_where_nothing_runs(engine: Engine) -> None:
    """Without a web process and without a waiting webhook no process is missed; each kind is listed as unseen."""
    found = read(engine)

    assert (found.expected, found.silent) == ([], [])
    assert [(each.kind, each.name, each.age_seconds) for each in found.heartbeats or ()] == [
        ("web", "", None),
        ("clock", "", None),
        ("fold", "", None),
        ("consumer", "fold", None),
        ("consumer", "stripe", None),
    ]


def test_each_loop_is_judged(engine: Engine) -> None:
    """While a web process runs each loop of worker and clock is missed after 30 seconds of silence, and none before."""
    beat_all(engine, age=28)
    assert silent(engine) == []

    for kind, name in (("clock", ""), *WORKER):
        beat(engine, kind, name, age=31)
        assert silent(engine) == [("clock" if kind == "clock" else "worker", kind, name)]
        beat(engine, kind, name)


def test_a_process_that_never_beat_is_silent(engine: Engine) -> None:
    """A worker and a clock that never ran are missed once a web process has run for longer than they take to start."""
    beat(engine, "web", since=29)
    assert (read(engine).expected, silent(engine)) == (["worker", "clock"], [])
    ledger.execute(engine, "UPDATE heartbeats SET since = now() - interval '31 seconds'")

    assert [(each.process, each.at, each.age_seconds) for each in missed(engine)] == [
        ("clock", None, None),
        *[("worker", None, None)] * 3,
    ]


def test_a_start_after_a_pause_is_no_fault(engine: Engine) -> None:
    """A worker and a clock that were silent for days get their time to start from the start of the web process."""
    for kind, name in (("clock", ""), *WORKER):
        beat(engine, kind, name, age=86_400)
    beat(engine, "web", since=29)
    assert silent(engine) == []
    ledger.execute(engine, "UPDATE heartbeats SET since = now() - interval '31 seconds' WHERE kind = 'web'")
    assert len(silent(engine)) == 4


def test_without_a_web_process_no_process_is_missed(engine: Engine) -> None:
    """A minute after the last heartbeat of a web process no process is missed, unless a webhook waits."""
    beat_all(engine, age=61)
    assert silent(engine) == []

    receive(engine, "evt_1", timedelta(seconds=31), source="replay", pending=True)
    assert silent(engine) == []
    receive(engine, "evt_2", timedelta(seconds=29), pending=True)
    assert silent(engine) == []
    receive(engine, "evt_3", timedelta(seconds=31), pending=True)
    ledger.execute(engine, "DELETE FROM pending WHERE seq = (SELECT seq FROM inbox WHERE id = 'evt_2')")
    assert len(silent(engine)) == 4


def test_seldom_sweeps(engine: Engine) -> None:
    """With a sweep each minute, a fold slot is silent only after 4 sweeps and 10 seconds without a heartbeat."""
    beat_all(engine)
    beat(engine, "fold", age=249)
    assert silent(engine, PAYFOLD_SWEEP_SECONDS="60") == []
    beat(engine, "fold", age=251)
    assert silent(engine, PAYFOLD_SWEEP_SECONDS="60") == [("worker", "fold", "")]


def test_a_job_that_hangs_is_named(engine: Engine) -> None:
    """A silent slot is shown with its last job; the nightly reconcile may take 10 minutes for a step."""
    beat_all(engine)
    beat(engine, "consumer", "stripe", age=40)
    beat(engine, "job", "fetch", age=40, outcome=RUNNING)
    (hung,) = missed(engine)
    assert (hung.kind, hung.name, hung.job) == ("consumer", "stripe", "fetch")

    beat(engine, "job", "fetch", age=600, outcome="ok")
    beat(engine, "job", "reconcile", age=599, outcome=RUNNING)
    assert silent(engine) == []
    beat(engine, "job", "reconcile", age=601, outcome=RUNNING)
    assert silent(engine) == [("worker", "consumer", "stripe")]


def test_a_job_of_a_process_that_ended(engine: Engine) -> None:
    """The outcome of a job that was running when its process ended is unknown once another process runs."""
    beat(engine, "consumer", "stripe", since=3600)
    beat(engine, "job", "reconcile", age=1800, outcome=RUNNING)
    assert [each.outcome for each in read(engine).jobs or ()] == [RUNNING]
    ledger.execute(engine, "UPDATE heartbeats SET since = now() - interval '10 minutes' WHERE kind = 'consumer'")
    assert [each.outcome for each in read(engine).jobs or ()] == [None]


# ---- Heartbeats ----


def test_the_freshest_of_several_processes(engine: Engine) -> None:
    """The latest heartbeat of several processes counts, and the last outcome of each job."""
    for instance, age, outcome in (("a", 50, "ok"), ("b", 20, "StripeAway")):
        write(engine, beat_at(age, "job", "fetch", outcome), instance)

    job = (read(engine).jobs or [])[0]
    assert (job.job, job.outcome) == ("fetch", "StripeAway")
    assert 20 <= job.age_seconds < 30


def beat_at(age: float, kind: Any = "fold", name: str = "", outcome: str | None = None) -> Beat:  # noqa: ANN401 - a kind
    """Return a heartbeat of a loop from *age* seconds ago."""
    return Beat(kind, name, time.monotonic() - age, outcome)


def write(engine: Engine, seen: Beat, instance: str) -> None:
    """Write a heartbeat as the process *instance* does."""
    Heart(engine, lambda: [seen], instance=instance).write()


def test_rows_of_the_dead_are_pruned(engine: Engine) -> None:
    """A row older than a day is deleted, unless it is the last one of its loop."""
    for instance, age in (("old", 90_000), ("older", 200_000)):
        for kind in ("web", "fold"):
            write(engine, beat_at(age, kind), instance)
    write(engine, beat_at(80_000), "new")

    rows = ledger.rows(engine, "SELECT kind, instance FROM heartbeats ORDER BY kind, instance")
    assert [tuple(row.values()) for row in rows] == [("fold", "new"), ("web", "old")]


def test_a_heart_writes_only_news(engine: Engine) -> None:
    """A heartbeat is not written twice; the start time of a process is kept, except after a pause."""
    seen = [beat_at(100)]
    heart = Heart(engine, lambda: seen)
    assert (heart.write(), heart.write()) == (1, 0)
    for age, since in ((90, 100), (10, 10)):
        seen[:] = [beat_at(age)]
        assert heart.write() == 1
        (row,) = ledger.rows(engine, "SELECT extract(epoch FROM now() - since)::float AS since FROM heartbeats")
        assert since - 1 < row["since"] < since + 20


@contextmanager
def locked(engine: Engine, table: str) -> Iterator[None]:
    """Let another session lock a table."""
    with psycopg.connect(engine.url.set(drivername="postgresql").render_as_string(hide_password=False)) as connection:
        connection.execute(f"LOCK TABLE {table} IN ACCESS EXCLUSIVE MODE".encode())
        yield


def test_a_locked_table_costs_a_log_line(engine: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    """While another session locks the table a heart keeps trying, logs that once, and writes afterwards."""
    seen, tried = [beat_at(0)], threading.Semaphore(0)

    def beats() -> list[Beat]:
        tried.release()
        return seen

    heart = Heart(engine, beats, every=0.05)
    with locked(engine, "heartbeats"):
        heart.start()
        for _ in range(2):
            assert tried.acquire(timeout=20)
        assert read(engine).heartbeats is None
    until(lambda: ledger.rows(engine, "SELECT FROM heartbeats"))
    heart.stop()

    assert capsys.readouterr().err.count("heartbeat.not_written") == 1


# ---- Webhooks ----


def receive(
    engine: Engine, event: str, age: timedelta, *, source: str = "webhook", count: int = 1, pending: bool = False
) -> None:
    """Put *count* events into the inbox as of *age* ago."""
    ledger.execute(
        engine,
        "WITH made AS (INSERT INTO inbox (account, livemode, id, type, created, redacted, payload_sha256, source,"
        " received_at) SELECT '', false, CAST(:id AS text) || CASE WHEN number = 1 THEN '' ELSE '_' || number END,"
        " 'test.event', now(), '{}', '', :source, now() - CAST(:age AS interval) FROM generate_series(1, :count)"
        " AS number RETURNING seq) INSERT INTO pending (seq) SELECT seq FROM made WHERE :pending",
        id=event,
        age=age,
        source=source,
        count=count,
        pending=pending,
    )


def test_webhooks(engine: Engine) -> None:
    """Webhooks of the last hour are counted, and those of the same hour in four weeks; other sources are not."""
    week, minute = timedelta(weeks=1), timedelta(minutes=1)
    receive(engine, "first", 2 * week + 61 * minute)
    receive(engine, "three_weeks", 2 * week + 59 * minute, count=4)
    receive(engine, "outside", week + 61 * minute)
    receive(engine, "inside", week + minute, count=2)
    receive(engine, "now", 50 * minute, count=3)
    for source in ("replay", "gap", "observation"):
        receive(engine, source, minute, source=source)

    webhooks = read(engine).webhooks

    assert webhooks is not None
    assert (webhooks.last_hour, webhooks.same_hour_weeks_before) == (3, [2, 4, None, None])
    assert webhooks.age_seconds == pytest.approx(3000, abs=60)


def test_no_webhook_yet(engine: Engine) -> None:
    """Without a webhook there is no last one, and each hour since the first recorded event has none."""
    receive(engine, "evt_1", timedelta(weeks=5), source="replay")
    webhooks = read(engine).webhooks

    assert webhooks is not None
    assert (webhooks.last_received_at, webhooks.age_seconds, webhooks.last_hour) == (None, None, 0)
    assert webhooks.same_hour_weeks_before == [0] * 4


def test_the_last_webhook_is_kept(engine: Engine) -> None:
    """The last webhook is remembered, and read again only for a newer one or after a restored backup."""
    memory = Memory()

    def age() -> float | None:
        with transaction(engine, status.READ) as connection:
            found = status.read(connection, Settings.load({}), broker=AWAY, fold_version=7, memory=memory)
        assert found.webhooks is not None
        return found.webhooks.age_seconds

    receive(engine, "replayed", timedelta(seconds=1), source="replay", count=status.UNCOMMITTED_SEQS_MAX)
    assert age() is None
    receive(engine, "first", timedelta(minutes=9))
    receive(engine, "replayed_again", timedelta(seconds=1), source="replay", count=status.UNCOMMITTED_SEQS_MAX)
    assert [age() for _ in range(2)] == [pytest.approx(540, abs=60)] * 2
    assert memory.webhook_seq == status.UNCOMMITTED_SEQS_MAX + 1
    receive(engine, "second", timedelta(minutes=5))
    assert age() == pytest.approx(300, abs=60)
    ledger.execute(engine, "DELETE FROM inbox")
    assert (age(), memory.webhook_seq) == (None, 0)


COUNTED = """
INSERT INTO pending (seq, due_at) VALUES (1, NULL), (2, now() + interval '1 hour');
INSERT INTO payloads (seq, payload) VALUES (4, '');
INSERT INTO outcomes (seq, state, cause, attempts, folded_at, fold_version) VALUES
    (3, 'parked', 'fold_failed', 1, now(), 7), (4, 'parked', NULL, 1, now(), 6), (5, 'folded', NULL, 1, now(), 6);
INSERT INTO delivery_counts VALUES
    ('refused', 'signature_wrong', 9, '2026-01-02Z', '2026-01-03Z'), ('recorded', '', 4, now(), now());
INSERT INTO changes (account, livemode, subject, subject_id, kind, event_id, source, at, withheld)
    SELECT '', false, 'order', 'cs_' || n, 'order.paid', 'evt', 'webhook', now(), CASE WHEN n < 3 THEN 'import' END
    FROM generate_series(1, 3) AS n;
INSERT INTO reconciliations (started_at, finished_at, outcome, checks, drift, result)
    VALUES (now(), now() - interval '1 minute', 'drift', '{rules,rebuild}', 2, '{}')
"""


def test_counts(engine: Engine) -> None:
    """Pending, parked, refused, withheld and outdated events and anomalies in force are counted, each by its parts."""
    receive(engine, "evt", timedelta(minutes=2), count=5)
    for statement in COUNTED.strip().split(";\n"):
        ledger.execute(engine, statement)

    found = read(engine)

    assert (found.pending, found.pending_to_be_tried_again) == (2, 1)
    assert found.oldest_pending_age_seconds == pytest.approx(120, abs=30)
    assert (found.parked, {each.cause: each.count for each in found.parked_by_cause or ()}) == (
        2,
        {"fold_failed": 1, None: 1},
    )
    assert [(each.reason, each.count, each.since) for each in found.refused or ()] == [
        ("signature_wrong", 9, datetime.fromisoformat("2026-01-02T00:00:00Z"))
    ]
    assert (found.withheld, [(each.reason, each.count) for each in found.withheld_by_reason or ()]) == (
        2,
        [("import", 2)],
    )
    assert (found.fold_version, found.to_fold_anew, found.to_fold_anew_archived) == (7, 2, 1)
    assert (found.last_event_seq, found.last_change_seq, found.anomalies_in_force) == (5, 3, 0)
    assert found.reconciliation is not None
    assert (found.reconciliation.outcome, found.reconciliation.drift) == ("drift", 2)
    assert found.reconciliation.age_seconds == pytest.approx(60, abs=30)


def test_a_slow_value_is_null(engine: Engine) -> None:
    """The values of a table that another session locks are null, and all others are shown."""
    receive(engine, "evt_1", timedelta(minutes=1))
    with locked(engine, "outcomes"):
        found = read(engine)

    assert (found.parked, found.parked_by_cause, found.to_fold_anew) == (None, None, None)
    assert found.not_known == ["latency", "parked", "parked_by_cause", "to_fold_anew", "to_fold_anew_archived"]
    assert (found.pending, found.last_event_seq) == (0, 1)


def test_a_locked_inbox(engine: Engine) -> None:
    """While another session locks the inbox, the faults that split an account are unknown, and the rest is shown."""
    with locked(engine, "inbox"):
        found = read(engine, STRIPE_WEBHOOK_SECRETS="whsec_a")

    assert (found.database, found.faults, found.last_event_seq) == ("ok", None, None)
    assert (found.pending, found.refused) == (0, [])
    assert found.not_known == [
        *("expected", "faults", "last_event_received_at", "last_event_seq", "latency", "silent", "webhooks"),
    ]


def test_the_command_shows_unknown_values(engine: Engine, database_url: str, redis_url: str) -> None:
    """If silence cannot be judged the command exits 1, and claims neither silence nor health."""
    settings = {"DATABASE_URL": database_url, "REDIS_URL": redis_url}
    with locked(engine, "heartbeats, changes, inbox, reconciliations"):
        ran = command.python("deploy", "status", settings=settings)

    assert ran.code == 1
    assert "not known whether a process is silent" in ran.err
    shown = {line.split("  ")[1].strip(): line.split("  ")[-1].strip() for line in ran.out.splitlines() if "  " in line}
    names = ("silent", "last runs", "last event", "last change", "reconciled")
    assert {name: shown[name] for name in names} == dict.fromkeys(names, "not known")


def test_the_faults_end_with_the_read(engine: Engine) -> None:
    """Many short statements together do not exceed the time limit of the whole read."""
    ledger.execute(engine, "ALTER TABLE account_names RENAME TO names")
    ledger.execute(engine, "CREATE VIEW account_names AS SELECT names.* FROM pg_sleep(0.6) LEFT JOIN names ON true")
    with transaction(engine, status.READ) as connection:
        found = status.read(
            connection, Settings.load({}), broker=AWAY, fold_version=7, limits=Limits(), seconds_max=0.9
        )
    assert (found.pending, found.faults) == (0, None)


def test_faults_are_kept_for_a_while(engine: Engine) -> None:
    """A frequent reader looks for faults of accounts once in minutes; a single read finds the current ones."""
    memory = Memory()

    def codes(of: Memory | None = None) -> list[str]:
        with transaction(engine, status.READ) as connection:
            found = status.read(connection, Settings.load({}), broker=AWAY, fold_version=7, memory=of)
        assert found.faults is not None
        return [fault.code for fault in found.faults]

    assert codes(memory) == []
    ledger.execute(engine, "INSERT INTO account_names VALUES ('a', 'b', now(), NULL)")
    assert (codes(memory), codes()) == ([], ["rename_unfinished"])
    memory.faults_at -= status.FAULTS_SECONDS
    assert codes(memory) == ["rename_unfinished"]


def test_a_schema_that_is_behind(engine: Engine) -> None:
    """For a schema that is behind `status` shows only that, with the pending migrations."""
    ledger.execute(engine, "UPDATE alembic_version SET version_num = '0008'")

    found = read(engine)

    behind = [
        "0009",
        "0010",
        "0011",
        "0012",
        "0013",
        "0014",
        "0015",
        "0016",
        "0017",
        "0018",
        "0019",
        "0020",
        "0021",
        "0022",
        "0023",
        "0024",
        "0025",
        "0026",
    ]
    assert (found.database, found.migrations, found.pending, found.silent) == ("ok", behind, None, None)


def test_simultaneous_readers_share_one_read(engine: Engine, database_url: str, redis_url: str) -> None:
    """Requests during a read share the one read that follows; a request that waits too long gets only a timeout."""
    settings = settings_of(database_url, redis_url)

    async def ask() -> list[Status]:
        with broker.redis(settings) as redis, locked(engine, "pending"):
            reader, hasty = (StatusReader(settings, redis, answer_seconds_max=most) for most in (20, 0))
            first = asyncio.create_task(reader.now())
            await asyncio.to_thread(until, lambda: ledger.rows(engine, WAITS_FOR_A_LOCK))
            with pytest.raises(TooSlow):
                await hasty.now()
            found = await asyncio.gather(first, *[reader.now() for _ in range(20)])
            for each in (reader, hasty):
                each.stop()
        return found

    first, *others = asyncio.run(ask())

    assert (first.database, first.pending) == ("ok", None)
    assert len({id(each) for each in others}) == 1
    assert others[0] is not first


# ---- Turns of the worker's loops ----


def beats_of(turns: Turns) -> dict[str, str | None]:
    """Return the outcome of each job."""
    return {seen.name: seen.outcome for seen in turns.beats()}


def test_a_job_ends_with_its_outcome() -> None:
    """The outcome of each job is kept, and a changed outcome is written at once."""
    turns, changed, ends = Turns(), [], [DatabaseAway(), None, None, KeyError("a key"), None]
    turns.outcome_changed = lambda: changed.append(beats_of(turns)["fetch"])

    def work() -> int:
        fault = ends.pop()
        if isinstance(fault, Exception):
            raise fault
        return 1

    turns.add(broker.FETCH, work)
    assert list(turns.beats()) == []
    for _ in range(5):
        turns.by_message(broker.FETCH)

    assert changed == ["KeyError", "ok", "DatabaseAway"]
    assert beats_of(turns) == {"fetch": "DatabaseAway"}


def test_the_fault_that_ends_a_round_is_its_outcome() -> None:
    """The fault that ended a round is its job's outcome, even without an exception; the next run starts without it."""
    turns, outcomes = Turns(), ["StripeAway"]

    def work() -> int:
        for outcome in outcomes:
            turns.fail(outcome)
        return 0

    turns.add(broker.FILL_GAPS, work)
    turns.by_message(broker.FILL_GAPS)
    assert beats_of(turns) == {"fill_gaps": "StripeAway"}
    outcomes.clear()
    turns.by_timer(broker.FILL_GAPS)
    assert beats_of(turns) == {"fill_gaps": "ok"}


def test_a_long_job_beats_at_its_steps() -> None:
    """A job of more than 5 seconds is shown as running; its consumer counts as alive while the job makes progress."""
    turns, ear = Turns(), Ear()
    dog = Watchdog(turns, ear, Broken(None), deaf_seconds=30)  # type: ignore[arg-type]  # it is not asked here
    seen: list[tuple[float, list[Beat]]] = []

    def work() -> int:
        turns._began_at[broker.SWEEP] -= heartbeats.BEAT_SECONDS
        seen.append((turns.stepped_at, [*turns.beats(), *dog.beats(["fold"])]))
        turns.step()
        seen.append((turns.stepped_at, [*turns.beats(), *dog.beats(["fold"])]))
        return 0

    turns.add(broker.SWEEP, work)
    turns.by_message(broker.SWEEP)

    assert seen[0][0] < seen[1][0]
    for at, found in seen:
        assert found == [Beat("job", "sweep", at, RUNNING), Beat("consumer", "fold", at), Beat("fold", "", at)]
    assert beats_of(turns) == {"sweep": "ok"}


class Away:
    """A broker that does not answer."""

    def ping(self) -> bool:
        """Fail as its client does."""
        raise RedisConnectionError


def test_a_consumer_without_a_broker_is_not_silent() -> None:
    """A consumer beats once Redis has answered it, and also while Redis is away, which is no fault of the consumer."""
    dog = Watchdog(Turns(), Ear(), Away(), deaf_seconds=0)  # type: ignore[arg-type]  # a ping is all that is asked
    assert list(dog.beats(["fold", "stripe"])) == []
    dog.look()

    assert [(seen.kind, seen.name) for seen in dog.beats(["fold", "stripe"])] == [
        ("consumer", "fold"),
        ("consumer", "stripe"),
    ]


def test_a_job_by_timer_that_hangs_is_seen_without_a_broker() -> None:
    """While Redis is away a slot that runs a job by timer beats only as long as the job makes progress."""
    turns, seen = Turns(), []
    dog = Watchdog(turns, Ear(), Away(), deaf_seconds=0)  # type: ignore[arg-type]  # a ping is all that is asked

    def work() -> int:
        dog.look()
        seen.append((turns.stepped_at, [beat.seen_at for beat in dog.beats(["stripe"])]))
        return 0

    turns.add(broker.FETCH, work)
    turns.by_timer(broker.FETCH)

    ((stepped_at, found),) = seen
    assert found == [stepped_at]


def test_a_start_is_no_heartbeat(engine: Engine, database_url: str, redis_url: str) -> None:
    """A slot without a first answer from Redis writes no heartbeat, however often it is started."""
    settings, lane, turns = settings_of(database_url, redis_url), FoldProcess(database_url), Turns()
    made = Parts(app.create(settings, engine, lane, turns), settings, engine, lane, turns)
    seldom = watchdog.Limits(look=3600, beat=3600)
    heart = worker_process._look_after(made, seldom, (broker.FOLD_QUEUE, broker.STRIPE_QUEUE))
    heart.stop()

    assert heart.write() == 0
    assert ledger.rows(engine, "SELECT FROM heartbeats") == []
    made.app.close()


# ---- Processes ----

SECONDS_MAX = 30.0
LIMITS = Limits(silent=2.5)
SELDOM = dict.fromkeys((f"PAYFOLD_{job}_SECONDS" for job in ("EXPIRE", "POLL", "GAP")), "3600")


class Watch:
    """Watches a running installation, in which a row stands for the web process."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def silent(self) -> list[Silent]:
        """Return the silent loops now."""
        beat(self._engine, "web")
        return read(self._engine, LIMITS, PAYFOLD_SWEEP_SECONDS="1").silent or []

    def until_silent(self, *who: tuple[str, str]) -> None:
        """Return once exactly these loops are silent."""
        began = time.monotonic()
        until(
            lambda: sorted((each.kind, each.name) for each in self.silent()) == sorted(who),
            SECONDS_MAX,
            why_not=self.silent,
        )
        print(f"{time.monotonic() - began:.1f} s until silent: {who}")  # noqa: T201 - the figures of a run with -s

    def outcomes(self) -> dict[str, str | None]:
        """Return the last outcome of each job."""
        return {each.job: each.outcome for each in read(self._engine, LIMITS).jobs or ()}


@contextmanager
def stopped(*processes: int) -> Iterator[None]:
    """Stop processes by SIGSTOP."""
    for each in processes:
        os.kill(each, signal.SIGSTOP)
    try:
        yield
    finally:
        for each in processes:
            os.kill(each, signal.SIGCONT)


def begun(log: Path, process: str, settings: Mapping[str, str]) -> AbstractContextManager[faults.Started]:
    """Run a process that beats three times a second."""
    return faults.started(log, "tests.short_worker", process, "--beat", "0.3", **settings)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_hanging_processes_are_named(engine: Engine, database_url: str, redis_url: str, tmp_path: Path) -> None:
    """A slot, a job, the clock and the worker are named one by one while they hang or are dead, and only then."""
    watch = Watch(engine)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        at = listening.getsockname()
    key = {"STRIPE_API_KEY": "sk_test_a", "STRIPE_API_BASE": f"http://127.0.0.1:{at[1]}"}
    settings = faults.environment(database_url, redis_url, PAYFOLD_FETCH_SECONDS="1", **SELDOM, **key)
    with ExitStack() as stack:
        worker = stack.enter_context(begun(tmp_path / "worker", "worker", settings))
        clock = stack.enter_context(begun(tmp_path / "clock", "clock", settings))
        watch.until_silent()
        fold, stripe = worker.children()

        with stopped(fold):
            watch.until_silent(("fold", ""), ("consumer", "fold"))
        watch.until_silent()
        with stopped(stripe):
            watch.until_silent(("consumer", "stripe"))
        with stopped(clock.process.pid):
            watch.until_silent(("clock", ""))
            code, err = status_of(settings)
            assert code == 1
            assert "The clock is silent since" in err
        watch.until_silent()
        assert status_of(settings) == (0, "")

        with socket.create_server(at):
            faults.put(redis_url, broker.FILL_GAPS, broker.STRIPE_QUEUE)
            watch.until_silent(("consumer", "stripe"))
            until(lambda: [each.job for each in watch.silent()] == ["fill_gaps"])
        watch.until_silent()
        until(lambda: watch.outcomes()["fill_gaps"] == "StripeAway")

        worker.process.kill()
        watch.until_silent(*WORKER)
        stack.enter_context(begun(tmp_path / "again", "worker", settings))
        watch.until_silent()


def status_of(settings: Mapping[str, str]) -> tuple[int, str]:
    """Return exit and log of `status`, with a limit as short as the test's."""
    ran = command.python("deploy", "status", "--silent-after", str(LIMITS.silent), settings=settings)
    return ran.code, ran.err


def test_a_locked_table_does_not_slow_folding(
    engine: Engine, database_url: str, redis_url: str, tmp_path: Path
) -> None:
    """While another session locks the heartbeats a worker folds at its usual pace and does not end."""
    shop = faults.Shop(engine)
    settings = faults.environment(database_url, redis_url)
    with begun(tmp_path / "log", "worker", settings) as worker:
        until(lambda: ledger.rows(engine, "SELECT FROM heartbeats WHERE kind = 'fold'"), 60)
        with locked(engine, "heartbeats"):
            until(lambda: bool(worker.lines("heartbeat.not_written")), 60)
            for _ in range(3):
                shop.record()
                shop.until_folded()
        assert worker.stop() == 0
    assert worker.lines("job.failed") == worker.lines("job.postponed") == []


def test_the_clock_beats(engine: Engine, database_url: str, redis_url: str, tmp_path: Path) -> None:
    """The Procfile's clock notes each check of its timetable for its heartbeat and its watchdog."""
    with faults.started(tmp_path / "log", "worker.clock", **faults.environment(database_url, redis_url)) as process:
        until(lambda: ledger.rows(engine, "SELECT FROM heartbeats WHERE kind = 'clock'"), SECONDS_MAX)
        assert process.stop() == 0


def test_a_web_process_beats(engine: Engine, database_url: str, redis_url: str) -> None:
    """A web process beats as soon as its event loop runs."""
    with serving(settings_of(database_url, redis_url)):
        until(lambda: ledger.rows(engine, "SELECT FROM heartbeats WHERE kind = 'web'"))
    assert read(engine).expected == ["worker", "clock"]
