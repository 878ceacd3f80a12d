"""A rebuild equals the live tables, every edit of them is found and named, and a swap undoes it."""

import fcntl
import random
import resource
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import msgspec
import psutil
import pytest
from sqlalchemy import BigInteger, Engine, Table, text

from deploy.sandbox.account import Account
from deploy.sandbox.history import shop_history, tangle
from schemas import database, observations, tables
from schemas.own_events import EVENT_IGNORED
from schemas.progress import do_nothing
from tests import busy, histories, ledger
from tests.command import payfold
from worker.proof import difference, rebuild, shadow, swap
from worker.proof.difference import Difference
from worker.proof.digest import digests, digests_seen
from worker.proof.rebuild import Sizes, refolded
from worker.proof.shadow import Shadow

SHOP = shop_history(12, 300, money=True)
EDITS = 500
MANY_PROCESSES = Sizes(per_part=100, per_task=150, alone_max=0)
MANY_PARTS = Sizes(per_part=10, per_task=150, files_max=3)


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    """Return an engine on an empty database."""
    made = database.engine(database_url, connections_max=9)
    yield made
    made.dispose()


@pytest.fixture
def shop(engine: Engine) -> Engine:
    """Return an engine on the tables of a shop."""
    ledger.record(engine, [ledger.delivery(event.body) for event in SHOP.events])
    ledger.fold(engine)
    return engine


def run(engine: Engine, statement: str, **values: object) -> list[tuple[Any, ...]]:
    """Execute a statement and return its rows."""
    with database.transaction(engine) as connection:
        found = connection.execute(text(statement), values)
        return [tuple(row) for row in found] if found.returns_rows else []


def found_in(made: Shadow) -> list[Difference]:
    """Return every difference between the live tables and *made*."""
    differences: list[Difference] = []
    compared = swap.compare(made, on_difference=differences.append)
    assert bool(differences) == bool(compared.drift)
    return differences


def ignore(engine: Engine, event: str) -> None:
    """Record an operator's observation that ignores *event*."""
    about = {"object": "event", "id": event, "reason": "a test"}
    observation = observations.observe(
        EVENT_IGNORED, about, account="", livemode=False, created=int(ledger.NOW.timestamp()), now=ledger.NOW
    )
    ledger.record(engine, [observation])


# ---- The same ----


@pytest.mark.parametrize(
    "sizes", [Sizes(), MANY_PROCESSES, MANY_PARTS], ids=["one process", "many processes", "many parts"]
)
def test_a_rebuild_equals_the_live_tables(shop: Engine, sizes: Sizes) -> None:
    """With any division of the work every row, anomaly, outcome and mention is the same."""
    with shadow.shadow(shop) as made:
        rebuild.rebuild(made, sizes=sizes)

        assert digests(shop, schema=made.schema) == digests(shop)
        assert found_in(made) == []
        for name in ("mentions", "outcomes"):
            assert run(shop, f"SELECT * FROM {made.schema}.{name} EXCEPT SELECT * FROM public.{name}") == []  # noqa: S608
            assert run(shop, f"SELECT * FROM public.{name} EXCEPT SELECT * FROM {made.schema}.{name}") == []  # noqa: S608


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Let no file of this process and of those that it will fork grow beyond *size* bytes, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    limit_files((size, hard))
    try:
        yield
    finally:
        limit_files((soft, hard))


def limit_files(limits: tuple[int, int]) -> None:
    """Limit the files of this process, and of the server that forks for it once it has threads.

    That server lives as long as this process, and if it began within a limit it hands that one on.
    """
    this = psutil.Process()
    forking = [each for each in this.children() if any("forkserver" in part for part in each.cmdline())]
    for each in (this, *forking):
        resource.prlimit(each.pid, resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("sizes", [rebuild.USUAL, MANY_PROCESSES], ids=["one process", "many processes"])
def test_without_room_for_its_files(shop: Engine, sizes: Sizes) -> None:
    """Where the disk is full, a rebuild ends with what to do, and folds nothing step by step."""
    with shadow.shadow(shop) as made:
        with files_of_at_most(1024), pytest.raises(rebuild.NoRoomForFiles, match="TMPDIR"):
            rebuild.rebuild(made, sizes=sizes)

        assert run(shop, f"SELECT to_regclass('{made.schema}.orders')") == [(None,)]


def test_tangled_histories(engine: Engine, request: pytest.FixtureRequest) -> None:
    """Folding step by step in any order gives the same as folding at once, odd histories included."""
    first = random.Random(request.node.nodeid).randrange(10**6)
    print(f"seeds from {first}")  # noqa: T201 - repeats a failure
    for seed in range(first, first + 60):
        bodies = histories.bodies_of(seed)
        random.Random(seed).shuffle(bodies)
        ledger.record(engine, [ledger.delivery(body, account=f"acct_{seed}") for body in bodies])
        ledger.fold(engine, limit=random.Random(seed).randint(1, 40))

    with rebuild.rebuilt(engine) as made:
        assert digests(engine, schema=made.schema) == digests(engine)
        assert found_in(made) == []


def test_parked_and_ignored_events(shop: Engine) -> None:
    """A parked or ignored event is so in a rebuild too, and a pending one is left to the workers."""
    paid = next(event for event in SHOP.events if event.type == "checkout.session.completed")
    ignore(shop, paid.id)
    odd = Account(seed=1).emit("refund.created", {"object": "charge", "id": "ch_odd"})
    ledger.record(shop, [ledger.delivery(odd.body)])
    ledger.fold(shop)
    ledger.record(shop, [ledger.delivery(tangle(3).events[0].body, account="acct_pending")])

    with rebuild.rebuilt(shop) as made:
        assert found_in(made) == []
        assert run(shop, f"SELECT count(*) FROM {made.schema}.outcomes WHERE state = 'parked'") == [(1,)]  # noqa: S608
    assert run(shop, "SELECT count(*) FROM pending") == [(1,)]


def test_a_row_that_postgresql_refuses(engine: Engine) -> None:
    """A rebuild parks the event of a row that PostgreSQL refuses, as the live fold did, by folding step by step."""
    run(engine, "ALTER TABLE orders ADD CHECK (amount_total < 9000)")
    ledger.record(engine, [ledger.delivery(event.body) for event in SHOP.events[:400]])
    ledger.fold(engine)
    assert run(engine, "SELECT count(*) > 0 FROM events WHERE state = 'parked'") == [(True,)]

    with rebuild.rebuilt(engine) as made:
        assert digests(engine, schema=made.schema) == digests(engine)
        assert found_in(made) == []


def test_events_folded_during_a_rebuild(shop: Engine) -> None:
    """Events that workers fold during a rebuild and after it are no difference."""
    with rebuild.rebuilt(shop) as made:
        ledger.record(shop, [ledger.delivery(event.body, account="acct_2") for event in tangle(8, money=True).events])
        ledger.fold(shop)
        paid = next(event for event in SHOP.events if event.type == "checkout.session.completed")
        ignore(shop, paid.id)
        ledger.fold(shop)

        assert found_in(made) == []
        assert digests(shop, schema=made.schema) == digests(shop)


def test_a_comparison_delays_no_fold(shop: Engine) -> None:
    """Workers fold while the tables are compared, and their changes are no difference."""
    run(shop, "UPDATE orders SET amount_total = amount_total + 1 WHERE amount_total > 0")
    differences: list[Difference] = []
    others = tangle(9, money=True).events
    folding = threading.Thread(target=ledger.take_in, args=[shop, *(event.body for event in others)], daemon=True)

    def on_difference(difference: Difference) -> None:
        if not differences:
            folding.start()
            folding.join(timeout=60)
        differences.append(difference)

    with rebuild.rebuilt(shop) as made:
        swap.compare(made, on_difference=on_difference)

    assert not folding.is_alive(), "folding waited for the comparison"
    assert {each.column for each in differences} == {"amount_total"}
    assert run(shop, "SELECT count(*) FROM pending") == [(0,)]


def test_events_folded_after_the_pause(shop: Engine) -> None:
    """A comparison reads the tables as they were when folding paused, however much is folded afterwards."""
    with (
        rebuild.rebuilt(shop) as made,
        database.transaction(shop) as connection,
        database.cursor(connection) as reader,
    ):
        reader.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        swap.at_one_moment(reader, made)
        ledger.take_in(shop, *(event.body for event in tangle(9, money=True).events))

        assert difference.compare(reader, made, on_difference=do_nothing).drift == 0


def test_objects_of_every_shape(engine: Engine) -> None:
    """Divided so that every event is read alone, objects of one event and of many give the same rows as ever.

    A ledger's transaction also reports on its customer's balance, whose events are in other ranges.
    """
    account = Account(seed=5)
    account.complete(account.open_session())
    account.open_session()
    bodies = [event.body for event in (*account.events, *tangle(4, money=True).events)]
    bodies += [busy.customer("evt_1", 0, 0), busy.customer("evt_2", 1, -500, {"balance": 0})]
    bodies += [busy.transaction("cbtxn_1", -500, -500, 1, read_at=2)]
    ledger.record(engine, [ledger.delivery(body) for body in bodies])
    ledger.fold(engine)
    assert run(engine, "SELECT count(*) > 0 FROM mentions") == [(True,)]
    counts = "SELECT count(*) FROM inbox WHERE object_id IS NOT NULL GROUP BY object_id"
    assert run(engine, f"SELECT min(count), max(count) > 1 FROM ({counts}) AS c") == [(1, True)]  # noqa: S608

    with shadow.shadow(engine) as made:
        rebuild.rebuild(made, sizes=Sizes(per_part=7, per_task=1, alone_max=0, processes=2))

        assert digests(engine, schema=made.schema) == digests(engine)
        assert found_in(made) == []


def test_folders_of_killed_rebuilds(shop: Engine, database_url: str, tmp_path: Path) -> None:
    """A rebuild leaves no folder behind, and removes those of killed rebuilds, but not that of one that still runs."""
    killed, running = (tmp_path / f"{rebuild.FOLDER_PREFIX}{name}" for name in ("killed", "running"))
    for folder in (killed, running):
        folder.mkdir()
        (folder / "lock").touch()
        (folder / "1.facts").write_text("facts")
    with (running / "lock").open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert payfold("rebuild", DATABASE_URL=database_url, TMPDIR=str(tmp_path)).code == 0

    assert list(tmp_path.glob(f"{rebuild.FOLDER_PREFIX}*")) == [running]


# ---- Edits ----


class Edits:
    """Random edits of the live tables, each of another row, and the differences to be found."""

    def __init__(self, engine: Engine, seed: int) -> None:
        self._engine = engine
        self._random = random.Random(seed)
        self.expected: list[tuple[str, str, str, str | None]] = []
        self._rows: dict[str, list[dict[str, Any]]] = {}
        for table in tables.PROJECTIONS:
            rows = ledger.rows(engine, f"SELECT ctid::text AS place, * FROM {table.name}")  # noqa: S608 - our own name
            self._random.shuffle(rows)
            self._rows[table.name] = rows
        self._edits: list[Callable[[Table, dict[str, Any]], bool]] = [
            self._a_cent,
            self._a_status,
            self._a_missing_row,
            self._an_extra_row,
            self._a_currency,
        ]

    def make(self, count: int) -> None:
        """Make *count* edits."""
        while len(self.expected) < count:
            table = self._random.choice([each for each in tables.PROJECTIONS if self._rows[each.name]])
            row = self._rows[table.name].pop()
            for edit in self._random.sample(self._edits, len(self._edits)):
                if edit(table, row):
                    break

    def _a_cent(self, table: Table, row: dict[str, Any]) -> bool:
        return self._change(table, row, lambda column: isinstance(column.type, BigInteger), lambda value: value + 1)

    def _a_status(self, table: Table, row: dict[str, Any]) -> bool:
        return self._change(
            table, row, lambda column: column.name == "status", lambda value: "open" if value != "open" else "paid"
        )

    def _a_currency(self, table: Table, row: dict[str, Any]) -> bool:
        if table.name == "balances":
            return False  # part of the key: such an edit is a missing and an extra row
        return self._change(
            table, row, lambda column: column.name == "currency", lambda value: "eur" if value != "eur" else "usd"
        )

    def _change(
        self, table: Table, row: dict[str, Any], wanted: Callable[[Any], bool], other: Callable[[Any], Any]
    ) -> bool:
        columns = [each.name for each in table.columns if wanted(each) and row[each.name] is not None]
        if not columns:
            return False
        name = self._random.choice(columns)
        run(
            self._engine,
            f"UPDATE {table.name} SET {name} = :value WHERE ctid = CAST(:place AS tid)",  # noqa: S608 - our own names
            value=other(row[name]),
            place=row["place"],
        )
        self.expected.append((table.name, difference.identity(table, row), "different", name))
        return True

    def _a_missing_row(self, table: Table, row: dict[str, Any]) -> bool:
        run(self._engine, f"DELETE FROM {table.name} WHERE ctid = CAST(:place AS tid)", place=row["place"])  # noqa: S608
        self.expected.append((table.name, difference.identity(table, row), "missing", None))
        return True

    def _an_extra_row(self, table: Table, row: dict[str, Any]) -> bool:
        if table.name == "balances":
            return False
        names = ", ".join(column.name for column in table.columns)
        values = names.replace(" id,", f" '{row['id']}_2',").replace("id,", "id,")
        run(
            self._engine,
            f"INSERT INTO {table.name} ({names}) SELECT {values} FROM {table.name} WHERE ctid = CAST(:place AS tid)",  # noqa: S608
            place=row["place"],
        )
        self.expected.append((table.name, f"{row['id']}_2", "extra", None))
        return True


def test_money_is_summed_by_world(engine: Engine) -> None:
    """A surplus in one account or mode does not offset a lack in another, even of the same row id."""
    account = Account(seed=1)
    account.complete(account.open_session())
    worlds = [("", False), ("acct_2", False), ("", True)]
    for label, livemode in worlds:
        bodies = [msgspec.json.encode(event.payload() | {"livemode": livemode}) for event in account.events]
        ledger.take_in(engine, *bodies, account=label)
    for (label, livemode), wrong in zip(worlds, (5, -4, -1), strict=True):
        run(
            engine,
            "UPDATE orders SET amount_total = amount_total + :wrong WHERE (account, livemode) = (:label, :livemode)",
            wrong=wrong,
            label=label,
            livemode=livemode,
        )

    with rebuild.rebuilt(engine) as made:
        compared = swap.compare(made, on_difference=do_nothing)

    assert {key[:4]: amount for key, amount in compared.money.items()} == {
        ("", False, "orders", "amount_total"): 5,
        ("acct_2", False, "orders", "amount_total"): -4,
        ("", True, "orders", "amount_total"): -1,
    }


def test_every_edit_is_named(shop: Engine, request: pytest.FixtureRequest) -> None:
    """Each of five hundred random edits is found and named, a cent or a currency or a row, and nothing else is."""
    seed = random.Random(request.node.nodeid).randrange(10**6)
    print(f"seed {seed}")  # noqa: T201 - repeats a failure
    edits = Edits(shop, seed)
    edits.make(EDITS)

    with rebuild.rebuilt(shop) as made:
        named = [(each.table, each.id, each.kind, each.column) for each in found_in(made)]

    assert sorted(map(str, named)) == sorted(map(str, edits.expected))
    assert len(named) == EDITS


def test_money_is_summed_by_currency(shop: Engine) -> None:
    """Differences of money are summed for each currency; a row with a changed currency counts in both."""
    (one, held), (other, amount) = run(
        shop, "SELECT id, amount_total FROM orders WHERE currency = 'usd' AND amount_total > 0 ORDER BY id LIMIT 2"
    )
    run(shop, "UPDATE orders SET amount_total = amount_total - 7 WHERE id = :id", id=one)
    run(shop, "UPDATE orders SET currency = 'gbp' WHERE id = :id", id=other)

    differences: list[Difference] = []
    with rebuild.rebuilt(shop) as made:
        compared = swap.compare(made, on_difference=differences.append)

    assert held > 7
    assert compared.money["", False, "orders", "amount_total", "usd"] == -7 - amount
    assert compared.money["", False, "orders", "amount_total", "gbp"] == amount
    assert {(each.id, each.column, each.currency, each.amount) for each in differences} == {
        (one, "amount_total", "usd", -7),
        (other, "currency", None, None),
    }


# ---- Swaps ----


_OPTIONS: Final = """
SELECT relname, reloptions FROM pg_class
WHERE relnamespace = 'public'::regnamespace AND relkind = 'r' AND reloptions IS NOT NULL ORDER BY 1
"""


def test_a_swap_undoes_every_edit(shop: Engine) -> None:
    """A swap restores the tables' contents, and keeps their grants, views, indexes and options."""
    run(shop, "GRANT SELECT ON orders, order_book TO pg_monitor")
    run(shop, "CREATE VIEW of_the_shop AS SELECT id, amount_total FROM orders")
    before = digests(shop)
    indexes = run(shop, "SELECT indexname, indexdef FROM pg_indexes WHERE schemaname = 'public' ORDER BY 1")
    options = run(shop, _OPTIONS)
    assert ("charges", ["fillfactor=90"]) in options
    changes = run(shop, "SELECT count(*) FROM changes")
    Edits(shop, 5).make(200)
    run(shop, "UPDATE anomalies SET resolved_at = now()")
    assert digests(shop) != before

    with rebuild.rebuilt(shop) as made:
        found, appended = swap.swap(made)
        assert found.drift >= 200

    assert digests(shop) == before
    with rebuild.rebuilt(shop) as made:
        assert found_in(made) == []
    assert run(shop, "SELECT indexname, indexdef FROM pg_indexes WHERE schemaname = 'public' ORDER BY 1") == indexes
    assert run(shop, _OPTIONS) == options
    assert run(shop, "SELECT has_table_privilege('pg_monitor', 'orders', 'SELECT')") == [(True,)]
    assert run(shop, "SELECT sum(amount_total) FROM of_the_shop") == run(shop, "SELECT sum(amount_total) FROM orders")
    assert run(shop, "SELECT count(*) FROM changes") == [(changes[0][0] + appended,)]


def test_a_swap_announces_its_changes(shop: Engine) -> None:
    """A swap appends its changes, each one-shot kind once; only changes by never-folded events are not withheld."""
    paid = [id_ for (id_,) in run(shop, "SELECT id FROM orders WHERE status = 'paid' ORDER BY id LIMIT 2")]
    refunded = run(
        shop,
        "SELECT id, refunded_amount FROM order_book WHERE refunded_amount > 0 AND status = 'paid' ORDER BY id LIMIT 1",
    )
    run(shop, "DELETE FROM changes WHERE subject_id = :id", id=paid[0])
    run(shop, "UPDATE orders SET status = 'open', paid_at = NULL WHERE id = ANY (:ids)", ids=paid)
    run(shop, "DELETE FROM changes WHERE subject_id = :id AND kind = 'order.refund_changed'", id=refunded[0][0])
    run(
        shop,
        "UPDATE outcomes SET state = 'parked', cause = 'fold_failed' WHERE seq = (SELECT seq FROM events WHERE id ="
        " (SELECT event_id FROM orders WHERE id = :id))",
        id=paid[0],
    )
    (last,) = run(shop, "SELECT coalesce(max(seq), 0) FROM changes")[0]

    with rebuild.rebuilt(shop) as made:
        swap.swap(made)

    changes = ledger.rows(shop, "SELECT * FROM changes WHERE seq > :last ORDER BY seq", last=last)
    kinds = [(row["subject_id"], row["kind"]) for row in changes]
    assert (paid[0], "order.paid") in kinds
    assert (paid[1], "order.paid") not in kinds  # announced before
    assert (refunded[0][0], "order.refund_changed") in kinds
    assert {row["source"] for row in changes} <= {"webhook", "replay"}
    news = [(row["subject_id"], row["withheld"]) for row in changes if row["kind"] == "order.paid"]
    assert news == [(paid[0], None)]
    assert {row["withheld"] for row in changes if row["subject_id"] != paid[0]} == {"swap"}
    (again,) = (row for row in changes if row["kind"] == "order.refund_changed" and row["subject_id"] == refunded[0][0])
    assert again["after"]["refunded_amount"] == refunded[0][1]


@contextmanager
def going_on(*works: Callable[[], None]) -> Iterator[None]:
    """Repeat each of *works* in a thread of its own until the block ends, and fail if one of them fails."""
    is_over, faults = threading.Event(), list[BaseException]()

    def loop(work: Callable[[], None]) -> None:
        try:
            while not is_over.is_set():
                work()
        except BaseException as fault:  # noqa: BLE001 - raised again below
            faults.append(fault)

    threads = [threading.Thread(target=loop, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        is_over.set()
        for thread in threads:
            thread.join()
    assert faults == []


def test_a_swap_under_load(shop: Engine) -> None:
    """During deliveries, folds and reads a swap fails no read, shows no half state, and loses no event."""
    right = run(shop, "SELECT count(*), sum(amount_total), count(*) FROM orders")[0]
    run(shop, "UPDATE orders SET amount_total = amount_total + 1")
    wrong = run(shop, "SELECT count(*), sum(amount_total), count(*) FROM orders")[0]
    extra = [event for seed in range(20) for event in tangle(seed, money=True).events]
    known = len(extra)
    seen: list[tuple[Any, ...]] = []

    def read() -> None:
        seen.extend(
            run(
                shop,
                "SELECT count(*), sum(o.amount_total), count(b.id) FROM orders AS o"
                " LEFT JOIN order_book AS b USING (account, livemode, id) WHERE o.account = ''",
            )
        )

    def record() -> None:
        if extra:
            ledger.record(shop, [ledger.delivery(extra.pop().body, account="acct_2")])

    def fold() -> None:
        ledger.fold(shop, limit=5)

    with going_on(read, read, record, fold, fold):
        for _ in range(4):
            with rebuild.rebuilt(shop) as made:
                swap.swap(made)
    ledger.fold(shop)

    assert right != wrong
    assert set(seen) == {wrong, right}
    assert run(shop, "SELECT count(*) FROM events WHERE state = 'pending'") == [(0,)]
    assert run(shop, "SELECT count(*) FROM events WHERE account = 'acct_2'") == [(known - len(extra),)]
    assert len(extra) < known
    with rebuild.rebuilt(shop) as made:
        assert found_in(made) == []


# ---- The command ----


def test_the_command(shop: Engine, database_url: str) -> None:
    """The command lists the requested number of differences, counts all, hides personal data, and exits 3 on any."""
    run(shop, "UPDATE orders SET amount_total = amount_total + 1, customer_email = 'someone@example.com'")
    (orders,) = run(shop, "SELECT count(*) FROM orders")[0]

    ran = payfold("rebuild", "--limit", "2", "--format", "json", DATABASE_URL=database_url)
    table = payfold("rebuild", DATABASE_URL=database_url)
    whole = payfold("rebuild", "--limit", "5000", "--format", "json", DATABASE_URL=database_url)
    some = payfold("rebuild", "--limit", "1", DATABASE_URL=database_url)
    swapped = payfold("rebuild", "--swap", "--format", "json", DATABASE_URL=database_url)

    assert (ran.code, ran.json["drift"], len(ran.json["differences"])) == (3, orders, 2)
    assert ran.json["differences_found"] == len(whole.json["differences"]) > orders
    assert f"… and {ran.json['differences_found'] - 1:,} more" in some.err
    assert {each["column"] for each in ran.json["differences"]} == {"amount_total", "customer_email"}
    assert {(each["table"], each["column"]) for each in ran.json["money"]} == {("orders", "amount_total")}
    assert (table.code, "payfold rebuild --swap" in table.err) == (3, True)
    assert "someone@example.com" not in ran.out + table.out + table.err
    assert (swapped.code, swapped.json["swapped"], swapped.json["drift"]) == (0, True, orders)
    assert payfold("rebuild", DATABASE_URL=database_url).code == 0


@pytest.mark.parametrize("count", ["0", "65", "many"])
def test_the_command_refuses_a_number_of_processes(count: str) -> None:
    """Processes are from 1 to 64: any other number is a mistake in the command, and nothing begins."""
    ran = payfold("rebuild", "--processes", count, DATABASE_URL="postgresql://localhost:1/none")

    assert (ran.code, "--processes" in ran.err) == (2, True)


def test_the_command_counts_unfolded_events(shop: Engine, database_url: str, tmp_path: Path) -> None:
    """The command counts the events that are not folded, and so in no table, and names the command that lists them."""
    run(shop, "INSERT INTO pending (seq) SELECT seq FROM inbox LIMIT 3")
    run(shop, "DELETE FROM outcomes WHERE seq IN (SELECT seq FROM pending)")
    (tmp_path / "empty").touch()

    ran = payfold("rebuild", "--from", str(tmp_path / "empty"), "--format", "json", DATABASE_URL=database_url)
    table = payfold("rebuild", DATABASE_URL=database_url)

    assert (ran.json["pending"], ran.json["parked"]) == (3, 0)
    assert "3 pending events. `payfold events list --state pending`" in table.err


def test_a_proof_compares_one_moment(shop: Engine) -> None:
    """Events that are folded after the rebuild make no difference: a proof brings both sides up to one moment."""
    with refolded(shop, seed=5) as made:
        account = Account(seed=77)
        account.complete(account.open_session())
        ledger.record(shop, [ledger.delivery(event.body) for event in account.events])
        ledger.fold(shop)
        naive = digests(shop), digests(shop, schema=made.schema)

        proof = swap.prove(made)

    assert naive[0] != naive[1]
    assert (proof.holds, proof.differences) == (True, [])
    assert proof.live == naive[0]


def test_an_event_folded_between_two_digests_is_in_neither(shop: Engine) -> None:
    """Events that are recorded and folded between the two digests count in neither."""
    with refolded(shop, seed=5) as made:
        with database.transaction(shop) as connection, database.cursor(connection) as cursor:
            cursor.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
            swap.at_one_moment(cursor, made)
            live = digests_seen(cursor, schema=made.live)
            ledger.take_in(shop, *(event.body for event in shop_history(seed=78, orders=3).events))
            again = digests_seen(cursor, schema=made.schema)

        assert live == again
        assert live != digests(shop)


def test_a_proof_names_the_difference(shop: Engine) -> None:
    """For wrong live tables the proof names the table, the row and the column."""
    (order,) = run(shop, "SELECT id, amount_total FROM orders WHERE amount_total IS NOT NULL LIMIT 1")
    run(shop, f"UPDATE orders SET amount_total = amount_total + 1 WHERE id = '{order[0]}'")  # noqa: S608 - our own id

    with refolded(shop, seed=5) as made:
        proof = swap.prove(made)

    assert not proof.holds
    (found,) = proof.differences
    assert (found.table, found.id, found.column) == ("orders", order[0], "amount_total")
    assert (found.held, found.expected) == (order[1] + 1, order[1])
