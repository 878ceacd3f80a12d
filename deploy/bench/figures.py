"""The figures: how each is measured, and its target."""

import http.client
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import islice
from pathlib import Path
from statistics import quantiles
from typing import Any, Final, Self
from urllib.parse import quote

import msgspec
import psycopg
from celery import Celery

from deploy.bench import apart, events, limits, load
from deploy.bench.errors import BenchError
from deploy.bench.report import Figure, Run, Target
from deploy.bench.stand import PLAIN, READY_SECONDS_MAX, Site, Stand
from deploy.sandbox.account import START
from schemas import database, tables
from schemas.stripe_api import StripeApi
from worker.folding.claim import queue_outdated
from worker.stripe_jobs import expiry
from worker.stripe_jobs.rounds import JobContext

WARM_UP: Final = 300
"""Requests sent before any is measured."""
PLAIN_WARM_UP: Final = 100
BARE_TIMES: Final = 3
FOLD_WARM_UP: Final = 500
LATENCY_SHARE: Final = 0.5
DELIVERIES_A_SECOND: Final = 200
OBSERVE_SECONDS: Final = 0.002
OBSERVED_SECONDS_MAX: Final = 30.0
LIST_PATH: Final = "/v1/orders?status=paid&limit=50"
SEED: Final = 20_261

Announce = Callable[[str], None]
"""Shows what is being measured."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is measured for each figure, in events unless the name has another unit."""

    runs: int
    acks: int
    plain_acks: int
    latency_seconds: float
    fold: int
    plain_tasks: int
    delivered_seconds: float
    history: int
    replayed: int
    idle_seconds: float
    reads: int
    credit_notes: int


# Acknowledging.

ACKS: Final = Target(0.3, aim=0.35, floor=0.08)
PLAIN_ACKS: Final = Target(8)
LATENCY_P50: Final = Target(5, at_least=False)
LATENCY_P99: Final = Target(20, at_least=False)


def acks(site: Site, sizes: Sizes, announce: Announce) -> list[Figure]:
    """Measure deliveries acknowledged in a second, and then how long each takes at half of that rate."""
    bodies = events.history(SEED, payments=True)
    with site.stand() as stand:
        return acks_on(stand, sizes, announce, bodies)


def acks_on(
    stand: Stand, sizes: Sizes, announce: Announce, bodies: Iterator[bytes], *, alone: bool = False
) -> list[Figure]:
    """Measure as ``acks`` does on *stand*; *alone* leaves out the limit and the plain alternative."""
    has_plain = PLAIN.exists() and not alone
    others = [] if alone else ["bare", *(["plain-web", "plain-worker"] if has_plain else [])]
    stand.start("web", *others)
    runs, fault, latencies, client, size = [], "", list[list[load.Answered]](), "", 0
    warm = events.take(bodies, WARM_UP)
    stand.run("web", *others)
    _require_accepted(_saturate(stand, stand.port, warm))
    if not alone:
        _saturate(stand, stand.bare_port, warm)
    if has_plain:
        _saturate(stand, stand.plain_port, warm[:PLAIN_WARM_UP])
    for run in range(sizes.runs):
        announce(f"acks, run {run + 1} of {sizes.runs}")
        chosen = events.take(bodies, sizes.acks)
        size = sum(map(len, chosen)) // len(chosen)
        known = _inbox_rows(stand)
        ours = _saturate(stand, stand.port, chosen)
        kept = _inbox_rows(stand) - known
        if kept != ours.accepted or ours.refused:
            fault = f"{ours.accepted} were acknowledged and {ours.refused} were not, but {kept} are in the inbox"
        # The bare app is so quick that one pass is too short to measure.
        bare = None if alone else _saturate(stand, stand.bare_port, chosen * BARE_TIMES).rate
        plain = _saturate(stand, stand.plain_port, chosen[: sizes.plain_acks]).rate if has_plain else None
        stand.plain_redis.flushdb()  # its worker would be busy with these for long, at the cost of what comes next
        runs.append(Run(ours.rate, bare, plain, {"client": ours.client, "body_bytes": size}))
        client = ours.client
        announce(f"ack latency at half of that rate, run {run + 1} of {sizes.runs}")
        rate = ours.rate * LATENCY_SHARE
        latencies.append(_paced(stand, events.take(bodies, int(rate * sizes.latency_seconds)), rate))
    found = Figure(
        name="acks",
        title="durable, verified acks, worker stopped",
        unit="/s",
        runs=tuple(runs),
        limit_name="" if alone else "bare ASGI app",
        target=ACKS,
        plain_target=PLAIN_ACKS,
        note=f"{load.CONNECTIONS} connections, bodies of {size:,} bytes, sent by {_client(client)}; every 200 is a row",
        fault=fault,
    )
    bad = sum(each.status != http.client.OK for several in latencies for each in several)
    return [
        found,
        *_latencies(
            "latency",
            "ack latency at half that rate",
            [[each.answered - each.due for each in several] for several in latencies],
            (LATENCY_P50, LATENCY_P99),
            note="each from the time at which it was due, whatever the answers before it took",
            fault=f"{bad} deliveries were not acknowledged" if bad else "",
        ),
    ]


def _client(name: str) -> str:
    return "wrk" if name == "wrk" else "our own client"


def _latencies(
    name: str,
    title: str,
    runs: Sequence[Sequence[float]],
    targets: tuple[Target, Target],
    *,
    note: str = "",
    fault: str = "",
) -> list[Figure]:
    """Return the fiftieth and the ninety-ninth percentile of seconds, as figures in milliseconds."""
    cuts = [quantiles(run, n=100, method="inclusive") for run in runs if len(run) > 1]
    return [
        Figure(
            name=f"{name}_{label}",
            title=f"{title}, {label}",
            unit="ms",
            runs=tuple(Run(cut[at] * 1000) for cut in cuts),
            target=target,
            note=note if label == "p50" else "",
            fault=fault,
        )
        for label, at, target in (("p50", 49, targets[0]), ("p99", 98, targets[1]))
    ]


def _inbox_rows(stand: Stand) -> int:
    return int(stand.one("SELECT count(*) FROM inbox"))


def _saturate(stand: Stand, port: int, bodies: Sequence[bytes], *, connections: int = load.CONNECTIONS) -> load.Loaded:
    path = stand.folder / f"requests.{port}"
    events.write_requests(path, bodies, secret=stand.secret)
    try:
        return load.saturate(port, path, len(bodies), connections=connections)
    finally:
        path.unlink()


def _require_accepted(loaded: load.Loaded) -> None:
    """Raise BenchError where deliveries are refused before any is measured: refusals are quick, or very slow."""
    if loaded.refused:
        raise BenchError(
            f"The web process refuses {loaded.refused:,} of {loaded.refused + loaded.accepted:,} deliveries."
        )


def _paced(stand: Stand, bodies: Sequence[bytes], rate: float) -> list[load.Answered]:
    path = stand.folder / f"requests.{stand.port}"
    events.write_requests(path, bodies, secret=stand.secret)
    try:
        return load.paced(stand.port, path, rate)
    finally:
        path.unlink()


# Folding.

FOLD: Final = Target(0.45, aim=0.5, floor=0.12)
MIXED_COST_MAX: Final = 1.3
FOLD_MIXED: Final = Target(1 / MIXED_COST_MAX, floor=0.4)
"""A mixed event costs at most ``MIXED_COST_MAX`` times as much as one of a session."""
PLAIN_FOLD: Final = Target(20)


def fold(site: Site, sizes: Sizes, announce: Announce) -> list[Figure]:
    """Measure events folded in a second, from pending to tables and changes, through Celery, and as many mixed ones."""
    bodies, mixed_bodies = (events.history(SEED + 1, payments=payments) for payments in (False, True))
    runs, singles, mixed = [], [], []
    for run in range(sizes.runs):
        announce(f"fold rate, run {run + 1} of {sizes.runs}")
        with site.stand() as stand:
            stand.start("worker")
            chosen = events.take(bodies, sizes.fold)
            stand.run("worker")
            for each in (bodies, mixed_bodies):
                fold_rate(stand, events.take(each, FOLD_WARM_UP))
            ours = fold_rate(stand, chosen)
            mixed.append(Run(fold_rate(stand, events.take(mixed_bodies, sizes.fold)), ours))
            stand.run()
            merged, commits = limits.merge_seconds(stand.settings.libpq, chosen)
            plain = _plain_fold_rate(stand, chosen[: sizes.plain_tasks]) if PLAIN.exists() else None
        runs.append(Run(ours, len(chosen) / merged, plain))
        singles.append(Run(commits))
    return [
        Figure(
            name="fold",
            title="fold rate, pending to tables and changes",
            unit="/s",
            runs=tuple(runs),
            limit_name="decode and merge by COPY",
            target=FOLD,
            plain_target=PLAIN_FOLD,
            note="events of checkout sessions and payment links, one wake-up, one worker",
        ),
        Figure(
            name="fold_mixed",
            title="fold rate of mixed events",
            unit="/s",
            runs=tuple(mixed),
            limit_name="those of sessions alone",
            target=FOLD_MIXED,
            note="sessions, customers, invoices, payments, charges, refunds, credit notes, disputes and the portal",
        ),
        Figure(name="commit", title="a row per commit", unit="/s", runs=tuple(singles)),
    ]


def fold_rate(stand: Stand, bodies: Sequence[bytes]) -> float:
    """Record *bodies* while the worker idles, wake it once, and return how many it folds in a second."""
    count = events.record(stand.engine, bodies)
    return count / stand.seconds_to_fold()


def _plain_fold_rate(stand: Stand, bodies: Sequence[bytes]) -> float:
    """Queue a task for each of *bodies*, let the plain worker warm up on some, and return its tasks in a second."""
    broker_url = stand.environment["PLAIN_BROKER_URL"]
    redis = stand.plain_redis
    with Celery("plain-sender", broker=broker_url, set_as_current=False) as sender:
        for body in bodies:
            sender.send_task("plain.handle", args=[body.decode()])
        stand.run("plain-worker")
        warm_up, deadline = min(PLAIN_WARM_UP, len(bodies) // 4), time.monotonic() + READY_SECONDS_MAX
        started, at_start = 0.0, 0
        while (left := int(redis.llen("celery")) + int(redis.hlen("unacked"))) > 0:
            if not started and len(bodies) - left >= warm_up:
                started, at_start = time.monotonic(), left
            if time.monotonic() > deadline or not stand.runs("plain-worker"):
                raise BenchError("The plain alternative's worker does not end its tasks.")
            time.sleep(OBSERVE_SECONDS)
        return at_start / (time.monotonic() - started)


# From delivered to folded.

DELIVERED_P50: Final = Target(30, at_least=False)
DELIVERED_P99: Final = Target(200, at_least=False)


def delivered(site: Site, sizes: Sizes, announce: Announce) -> list[Figure]:
    """Measure how long after its delivery an event is folded, for all to see, and then what idling takes."""
    bodies = events.history(SEED + 2, payments=True)
    with site.stand() as stand:
        return [*delivered_on(stand, sizes, announce, bodies), *idle(stand, sizes, announce)]


def delivered_on(stand: Stand, sizes: Sizes, announce: Announce, bodies: Iterator[bytes]) -> list[Figure]:
    """Measure as ``delivered`` does, on *stand*."""
    stand.run("web", "worker")
    _require_accepted(_saturate(stand, stand.port, events.take(bodies, WARM_UP)))
    stand.seconds_to_fold()
    runs, missing = [], 0
    for run in range(sizes.runs):
        announce(f"delivered to folded at {DELIVERIES_A_SECOND} deliveries a second, run {run + 1} of {sizes.runs}")
        chosen = events.take(bodies, int(DELIVERIES_A_SECOND * sizes.delivered_seconds))
        with _Observer(stand, len(chosen)) as observer:
            sent = _paced(stand, chosen, DELIVERIES_A_SECOND)
        ids = [events.id_of(body) for body in chosen]
        known = [(observer.seen[each], at) for each, at in zip(ids, sent, strict=True) if each in observer.seen]
        missing += len(chosen) - len(known)
        runs.append([seen - at.sent for seen, at in known])
    fault = f"{missing} deliveries were not seen folded" if missing else ""
    title = f"delivered to folded, {DELIVERIES_A_SECOND} a second"
    note = f"from sending to being seen by a reader who looks every {OBSERVE_SECONDS * 1000:.0f} ms"
    return _latencies("delivered", title, runs, (DELIVERED_P50, DELIVERED_P99), note=note, fault=fault)


class _Observer:
    """Reads every two milliseconds which events are folded, on a connection of its own, until *count* are."""

    def __init__(self, stand: Stand, count: int) -> None:
        self.seen: dict[str, float] = {}
        self._libpq = stand.settings.libpq
        self._count = count
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._look, name="observer", daemon=True)
        self._reached = int(stand.one("SELECT coalesce(max(seq), 0) FROM outcomes"))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        # All events are sent and answered by now; those that are still to be folded get a little time.
        self._thread.join(0 if kind else OBSERVED_SECONDS_MAX)
        self._is_over.set()
        self._thread.join()

    def _look(self) -> None:
        with psycopg.connect(self._libpq, autocommit=True) as connection:
            while len(self.seen) < self._count and not self._is_over.wait(OBSERVE_SECONDS):
                rows = connection.execute(_FRESH, (self._reached,)).fetchall()
                now = time.monotonic()
                for seq, event in rows:
                    self.seen.setdefault(event, now)
                    self._reached = max(self._reached, seq)


# One worker folds in the order of seq, and one connection records.
_FRESH: Final = "SELECT o.seq, i.id FROM outcomes AS o JOIN inbox AS i USING (seq) WHERE o.seq > %s"

# Rebuilding and replaying.

REBUILD: Final = Target(0.5, aim=0.7, floor=0.15)
MEMORY: Final = Target(300, at_least=False)
REPLAY: Final = Target(0.6, floor=0.1)
MB: Final = 1_000_000


def load_history(stand: Stand, count: int) -> Figure:
    """Record mixed events and let the worker fold them; return at what rate it did."""
    stand.start("worker")
    bodies = events.take(events.history(SEED + 3, payments=True), count)
    stand.run("worker")
    rate = fold_rate(stand, bodies)
    stand.run()
    return Figure(name="fold_history", title=f"fold rate of {count:,} mixed events", unit="/s", runs=(Run(rate),))


def rebuild(stand: Stand, runs: int, announce: Announce) -> list[Figure]:
    """Measure events rebuilt in a second against decoding them and loading the same rows, and a rebuild's memory."""
    count = _inbox_rows(stand)
    rates, quick, memory = [], [], []
    folder = stand.folder / "rows"
    folder.mkdir(exist_ok=True)
    rows = limits.export_rows(stand.settings.libpq, folder)
    for run in range(runs):
        announce(f"rebuild of {count:,} events, run {run + 1} of {runs}")
        taken = apart.rebuilt(stand.environment)
        inside = taken.inside
        limit = apart.decoded_and_loaded(stand.environment, folder).inside.seconds
        detail: dict[str, float | str] = {"seconds": inside.seconds, "limit_seconds": limit, "rows": rows}
        rates.append(Run(count / inside.seconds, count / limit, detail=detail))
        fast = limits.quick_load_seconds(stand.engine, folder)
        quick.append(Run(count / inside.seconds, count / fast))
        if taken.pss_bytes is not None:
            peaks: dict[str, float | str] = {
                f"rss_of_process_{number}": size / MB for number, size in enumerate(taken.rss_bytes)
            }
            memory.append(Run(taken.pss_bytes / MB, detail=peaks))
    for path in folder.iterdir():
        path.unlink()
    return [
        Figure(
            name="rebuild",
            title=f"rebuild of {count:,} mixed events",
            unit="/s",
            runs=tuple(rates),
            limit_name="read, decode and load",
            target=REBUILD,
            note="the limit reads and decodes the same payloads and loads the same rows, on as many processes",
        ),
        Figure(
            name="rebuild_quick",
            title="the same, next to loading its rows alone",
            unit="/s",
            runs=tuple(quick),
            limit_name="COPY FREEZE, then indexes",
        ),
        Figure(
            name="rebuild_memory",
            title="its peak memory",
            unit="MB",
            runs=tuple(memory),
            target=MEMORY,
            note="proportional set size of the process and its children together; each one's peak RSS is in the JSON",
        ),
    ]


def replay(site: Site, sizes: Sizes, announce: Announce) -> list[Figure]:
    """Measure the replay of a log into an empty database, against the rebuild of the same events."""
    with site.stand() as stand:
        events.record(stand.engine, islice(events.history(SEED + 5, payments=True), sizes.replayed))
        return [replay_of(site, stand, sizes.runs, announce)]


def replay_of(site: Site, stand: Stand, runs_wanted: int, announce: Announce) -> Figure:
    """Measure as ``replay`` does, with the log of what is in the inbox of *stand*."""
    log, count = _exported(stand), _inbox_rows(stand)
    runs = []
    for run in range(runs_wanted):
        announce(f"replay of {count:,} events, run {run + 1} of {runs_wanted}")
        with site.stand() as empty:
            seconds = _seconds_to_replay(empty, log, count)
            rebuilt = apart.rebuilt(empty.environment)
        runs.append(Run(count / seconds, count / rebuilt.seconds, detail={"seconds": seconds}))
    size = log.stat().st_size
    log.unlink()
    return Figure(
        name="replay",
        title=f"replay of {count:,} mixed events from a .zst log, into an empty database",
        unit="/s",
        runs=tuple(runs),
        limit_name="rebuilding them",
        target=REPLAY,
        note=f"the log has {size / MB:,.1f} MB; both rates are of whole processes, their start included",
    )


def _exported(stand: Stand) -> Path:
    """Export the inbox of *stand*, and return the log."""
    log = stand.folder / "events.ndjson.zst"
    apart.payfold(stand.environment, "events", "export", "--output", str(log))
    return log


def _seconds_to_replay(stand: Stand, log: Path, count: int) -> float:
    """Replay *log*, which has *count* events that are new to *stand*, and return how long the whole command takes."""
    replayed = apart.payfold(stand.environment, "replay", str(log), "--format", "json")
    counts = msgspec.json.decode(replayed.out)
    if counts["new"] != count or counts["pending"]:
        raise BenchError(f"The replay recorded {counts['new']:,} of {count:,} events and folded not all of them.")
    return replayed.seconds


def replay_into(stand: Stand, bodies: Iterator[bytes], count: int) -> Figure:
    """Measure the replay of a log of *count* new events into what *stand* holds."""
    log = stand.folder / "fresh.ndjson.zst"
    events.write_log(log, islice(bodies, count))
    rate = count / _seconds_to_replay(stand, log, count)
    log.unlink()
    return Figure(name="replay", title="replay of a log of new events", unit="/s", runs=(Run(rate),))


# Credit notes alone, as another program is measured.

NOTES_AT_ONCE: Final = 20


def credit_notes(site: Site, sizes: Sizes, announce: Announce) -> list[Figure]:
    """Measure events of credit notes a second, from sending to folded: over HTTP, and by a replay of their log."""
    count, bodies = sizes.credit_notes, events.credit_notes(SEED + 6)
    delivered, replayed = [], []
    for run in range(sizes.runs):
        announce(f"{count:,} events of credit notes, run {run + 1} of {sizes.runs}")
        with site.stand() as stand:
            delivered.append(Run(_delivered_rate(stand, events.take(bodies, WARM_UP), events.take(bodies, count))))
            log, held = _exported(stand), _inbox_rows(stand)
        with site.stand() as empty:
            replayed.append(Run(held / _seconds_to_replay(empty, log, held)))
        log.unlink()
    http = f"{count:,} events of credit notes over HTTP, {NOTES_AT_ONCE} at once"
    return [
        Figure(
            name="credit_notes_http",
            title=http,
            unit="/s",
            runs=tuple(delivered),
            note="signed, recorded durably before each answer, and folded: until the last of them is in the tables",
        ),
        Figure(
            name="credit_notes_replay",
            title="the same by replaying their log",
            unit="/s",
            runs=tuple(replayed),
            note="the whole command, its start included",
        ),
    ]


def _delivered_rate(stand: Stand, warm_up: Sequence[bytes], bodies: Sequence[bytes]) -> float:
    """Send *bodies* after *warm_up*, and return how many are sent and folded in a second."""
    stand.run("web", "worker")
    _require_accepted(_saturate(stand, stand.port, warm_up))
    stand.seconds_to_fold()
    loaded = _saturate(stand, stand.port, bodies, connections=NOTES_AT_ONCE)
    seconds = loaded.seconds + stand.seconds_to_fold()
    _require_accepted(loaded)
    return len(bodies) / seconds


# Idling.

IDLE_PROCESSOR: Final = Target(2, at_least=False)
IDLE_MEMORY: Final = Target(350, at_least=False)
SETTLE_SECONDS: Final = 2.0
PROCESSES: Final = ("web", "worker", "clock")


def idle(stand: Stand, sizes: Sizes, announce: Announce) -> list[Figure]:
    """Measure the memory and processor time of idle processes, after they have worked."""
    announce("idle")
    runs: dict[str, tuple[Run, ...]] = {}
    if apart.IS_LINUX:
        stand.run(*PROCESSES)
        time.sleep(SETTLE_SECONDS)
        pids, servers = stand.pids(*PROCESSES), stand.server_pids()
        before = [apart.processor_seconds(several) for several in (pids, servers)]
        started = time.monotonic()
        time.sleep(sizes.idle_seconds)
        after = [apart.processor_seconds(several) for several in (pids, servers)]
        took = time.monotonic() - started
        ours, theirs = (100 * (late - early) / took for early, late in zip(before, after, strict=True))
        memory, of_servers = (apart.pss_bytes(several) / MB for several in (pids, servers))
        each: dict[str, float | str] = {name: apart.pss_bytes(stand.pids(name)) / MB for name in PROCESSES}
        runs = {
            "idle_processor": (Run(ours),),
            "idle_servers": (Run(theirs),),
            "idle_memory": (Run(memory, detail=each),),
            "idle_servers_memory": (Run(of_servers),),
        }
    return [
        Figure(name=name, title=title, unit=unit, runs=runs.get(name, ()), target=target)
        for name, title, unit, target in (
            ("idle_processor", "idle: web, worker and clock", "% of a core", IDLE_PROCESSOR),
            ("idle_memory", "idle: their memory (proportional set size)", "MB", IDLE_MEMORY),
            ("idle_servers", "idle: PostgreSQL and Valkey", "% of a core", None),
            ("idle_servers_memory", "idle: PostgreSQL's and Valkey's memory", "MB", None),
        )
    ]


# Reading.

READ_ONE: Final = Target(10, at_least=False)
READ_LIST: Final = Target(30, at_least=False)
SEARCH: Final = Target(50, at_least=False)


# About 5,000 from all over the table, since most of a long history is in no cache.
_SAMPLE: Final = """
FROM orders TABLESAMPLE BERNOULLI ((SELECT least(100, 100 * 5000.0 / greatest(count(*), 1)) FROM orders))
"""
_SAMPLED_IDS: Final = f"SELECT id {_SAMPLE}"
_SAMPLED_NAMES: Final = f"""
SELECT q {_SAMPLE}, unnest(ARRAY[id, payment_intent, upper(customer_email), client_reference_id]) AS q WHERE q <> ''
"""


def reads(stand: Stand, sizes: Sizes, announce: Announce) -> list[Figure]:
    """Measure how long one client waits for an order, for a filtered page of them, and for a search."""
    announce("reads")
    stand.run("web")
    # The server's own vacuum would do this within a minute of so many changes, but at a time of its own choosing.
    stand.analyze()
    count = _inbox_rows(stand)
    ids = stand.column(_SAMPLED_IDS)
    chance = random.Random(SEED)  # noqa: S311 - which orders are read is no secret
    paths = [f"/v1/orders/{quote(chance.choice(ids))}" for _ in range(sizes.reads)]
    names = stand.column(_SAMPLED_NAMES)
    searches = [f"/v1/search?q={quote(chance.choice(names))}" for _ in range(sizes.reads)]
    stand.seconds_to_read([*paths[:20], LIST_PATH, *searches[:20]])
    orders = [stand.seconds_to_read(paths) for _ in range(sizes.runs)]
    pages = [stand.seconds_to_read([LIST_PATH] * sizes.reads) for _ in range(sizes.runs)]
    searched = [stand.seconds_to_read(searches) for _ in range(sizes.runs)]
    found = [
        *_latencies(
            "search", f"/v1/search by id, intent, email or reference, {count:,} events", searched, (SEARCH,) * 2
        ),
        *_latencies("read_order", f"/v1/orders/{{id}}, {count:,} events", orders, (READ_ONE, READ_ONE)),
        *_latencies("read_list", f"{LIST_PATH}, {count:,} events", pages, (READ_LIST, READ_LIST)),
    ]
    return [figure for figure in found if figure.name.endswith("_p99")]


# A new entry may lie anywhere in these indexes. A server that has run for a while has them in memory, and one that just
# started has not.
ANYWHERE: Final = (
    # Nothing is asked of these two but what the index itself knows, so none of their rows is read.
    f"SELECT FROM changes WHERE kind IN {tables.ONE_SHOT_KINDS}",
    "SELECT FROM inbox WHERE object_id IS NOT NULL",
    # An expression is compared with the row itself, so this reads the table as well.
    "SELECT customer_email FROM orders WHERE customer_email IS NOT NULL ORDER BY lower(customer_email)",
    "SELECT id FROM orders ORDER BY account, livemode, id",
    "SELECT id FROM charges ORDER BY account, livemode, id",
    "SELECT amount_total FROM orders ORDER BY currency, amount_total",
    *(
        f"SELECT {column} FROM {table} WHERE {column} IS NOT NULL ORDER BY account, livemode, {column}"  # noqa: S608 - our own words
        for table, column in (("orders", "payment_intent"), ("charges", "payment_intent"))
    ),
)

BY_INDEX: Final = "SET enable_seqscan = off; SET enable_bitmapscan = off; SET enable_sort = off"


def warm(stand: Stand) -> None:
    """Read these indexes of *stand*."""
    with psycopg.connect(stand.settings.libpq) as connection:
        connection.execute(BY_INDEX)
        for statement in ANYWHERE:
            connection.execute(f"SELECT count(*) FROM ({statement} OFFSET 0) AS entries")  # noqa: S608 - our own words


# Passes of the clock.

EXPIRED_HOURS: Final = 1
QUICK_RUNS: Final = 50
"""A pass takes a millisecond or two, so that the quickest of a few is chance."""


def passes(stand: Stand) -> dict[str, float]:
    """Return the seconds that a pass of the sweep and of the expiry take where there is nothing to be done."""
    context = JobContext(stand.engine, StripeApi(stand.settings, stand.redis), stand.settings, now=_before_any_sale)
    return {"sweep": _quickest(lambda: _sweep(stand)), "expiry": _quickest(lambda: expiry.run_once(context))}


def _before_any_sale() -> datetime:
    """Return a time before all sales: no session is stale then, so that each pass finds what the first one found."""
    return datetime.fromtimestamp(START, UTC) - timedelta(hours=EXPIRED_HOURS)


def _sweep(stand: Stand) -> int:
    with database.transaction(stand.engine) as connection, database.cursor(connection) as cursor:
        return queue_outdated(cursor)


def _quickest(work: Callable[[], Any]) -> float:
    taken = []
    for _ in range(QUICK_RUNS):
        started = time.monotonic()
        work()
        taken.append(time.monotonic() - started)
    return min(taken)
