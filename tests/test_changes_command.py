"""`payfold changes`: the feed in a terminal, and the release of withheld changes."""

import signal
import threading
from collections.abc import Mapping
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest
from sqlalchemy import Engine, insert
from typer.testing import CliRunner, Result

from deploy.cli import app
from deploy.commands.changes import _next
from deploy.sandbox.history import shop_history
from schemas import database, feed, tables
from schemas.database import Bounds
from schemas.errors import ConfigurationError, CursorBeyond
from tests import ledger
from tests.command import payfold, started
from tests.faults import Proxy
from tests.waiting import until
from worker.folding import withheld
from worker.folding.withheld import WithheldChanges
from worker.logs import replay, selection

ALL = WithheldChanges(feed.ALL)
START = datetime(2026, 11, 20, tzinfo=UTC)


def append(engine: Engine, *changes: tuple[str, str, int, str | None], livemode: bool = False) -> None:
    """Append changes: kind, subject id, minute, and the reason to withhold the change or None."""
    rows = [
        {
            "account": "",
            "livemode": livemode,
            "subject": kind.partition(".")[0],
            "subject_id": subject_id,
            "kind": kind,
            "event_id": f"evt_{minute}",
            "source": "replay",
            "at": START + timedelta(minutes=minute),
            "before": None,
            "after": {"currency": "usd", "amount_total": 2_000, "amount": 500},
            "withheld": reason,
        }
        for kind, subject_id, minute, reason in changes
    ]
    with database.transaction(engine) as connection:
        connection.execute(insert(tables.changes), rows)


def shown(engine: Engine, after: int = 0) -> list[dict[str, Any]]:
    """Return the changes in the feed after a number."""
    with database.transaction(engine) as connection:
        return [dict(row) for row in feed.page(connection, after, 10_000).rows]


def briefly(changes: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Return the kind and the subject of each of *changes*."""
    return [(change["kind"], change["subject_id"]) for change in changes]


def counted(engine: Engine, wanted: WithheldChanges = ALL) -> dict[tuple[str, str], int]:
    """Return the numbers of withheld changes, by reason and kind."""
    with database.transaction(engine) as connection:
        return {(row["reason"], row["kind"]): row["changes"] for row in withheld.counts(connection, wanted)}


# ---- Release ----


@pytest.mark.parametrize("batch_max", [1, 2, withheld.RELEASE_BATCH_MAX])
def test_released_in_their_old_order(engine: Engine, batch_max: int) -> None:
    """Released changes are appended to the feed in their old order, with nothing but their numbers changed."""
    append(
        engine,
        ("order.opened", "cs_1", 1, "import"),
        ("order.paid", "cs_1", 2, "import"),
        ("order.paid", "cs_2", 3, None),
        ("payment_link.activated", "plink_1", 4, "fold_version"),
        ("order.paid", "cs_3", 0, "import"),
    )
    held = ledger.rows(engine, "SELECT * FROM changes WHERE withheld IS NOT NULL ORDER BY seq")
    (last,) = ledger.rows(engine, "SELECT max(seq) AS seq FROM changes")

    assert withheld.release(engine, ALL, batch_max=batch_max) == 4
    again = shown(engine, after=last["seq"])
    changed = ("seq", "withheld")
    assert [without(row, *changed) for row in again] == [without(row, *changed) for row in held]
    assert briefly(shown(engine))[0] == ("order.paid", "cs_2")
    assert counted(engine) == {}
    assert withheld.release(engine, ALL) == 0


def without(row: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """Return *row* but for *names*."""
    return {name: value for name, value in row.items() if name not in names}


def test_a_release_is_limited_by_its_filter(engine: Engine) -> None:
    """A release is limited by kind, time and world; other changes stay withheld and counted."""
    append(
        engine,
        ("order.paid", "cs_1", 1, "import"),
        ("order.paid", "cs_2", 5, "import"),
        ("order.paid", "cs_3", 5, "swap"),
        ("order.expired", "cs_4", 5, "import"),
    )
    append(engine, ("order.paid", "cs_5", 5, "import"), livemode=True)
    assert counted(engine) == {("import", "order.paid"): 3, ("import", "order.expired"): 1, ("swap", "order.paid"): 1}
    wanted = WithheldChanges(
        feed.selection(kind=frozenset(("order.paid",)), livemode=False), START + timedelta(minutes=5)
    )

    assert withheld.release(engine, wanted) == 2
    assert briefly(shown(engine)) == [("order.paid", "cs_2"), ("order.paid", "cs_3")]
    assert counted(engine) == {("import", "order.paid"): 2, ("import", "order.expired"): 1}


def test_an_overtaken_change_stays_withheld(engine: Engine) -> None:
    """An older state is not released after a newer one, but a payment is, even if it was refunded since."""
    append(
        engine,
        ("order.opened", "cs_1", 1, "import"),
        ("balance.changed", "cus_1", 1, "import"),
        ("order.paid", "cs_2", 1, "import"),
        ("order.refund_changed", "cs_2", 2, "import"),
        ("order.refund_changed", "cs_3", 2, "import"),
        ("payment_link.activated", "plink_1", 1, "import"),
        ("order.paid", "cs_1", 3, None),
        ("balance.changed", "cus_1", 4, None),
        ("order.refund_changed", "cs_2", 4, None),
        ("payment_link.deactivated", "plink_1", 4, None),
    )
    append(engine, ("order.refund_changed", "cs_3", 4, None), livemode=True)
    append(engine, ("balance.changed", "cus_2", 1, "import"), ("balance.changed", "cus_2", 4, None))
    in_euro = """UPDATE changes SET after = jsonb_set(after, '{currency}', '"eur"')"""
    ledger.execute(engine, f"{in_euro} WHERE subject_id = 'cus_2' AND withheld IS NULL")

    assert withheld.release(engine, ALL) == 3
    assert briefly(shown(engine)[-3:]) == [
        ("order.paid", "cs_2"),
        ("order.refund_changed", "cs_3"),
        ("balance.changed", "cus_2"),
    ]
    assert sum(counted(engine).values()) == 4


def test_a_reader_of_the_feed_meets_each_change_once(engine: Engine) -> None:
    """A reader that follows during folds and a release reads each change exactly once."""
    history = shop_history(seed=23, orders=60, money=True)
    half = len(history.events) // 2
    bodies = [event.body for event in history.events]
    ledger.record(engine, map(ledger.delivery, bodies[:half]))
    ledger.fold(engine)
    ledger.execute(engine, "UPDATE changes SET withheld = 'import'")
    before = briefly(ledger.rows(engine, "SELECT * FROM changes"))
    ledger.record(engine, map(ledger.delivery, bodies[half:]))
    read: list[dict[str, Any]] = []
    ended = threading.Event()

    def follow() -> None:
        after, is_last = 0, False
        while not is_last:
            is_last = ended.is_set()
            found = shown(engine, after)
            read.extend(found)
            after = found[-1]["seq"] if found else after

    reader = threading.Thread(target=follow)
    folding = threading.Thread(target=ledger.fold, args=(engine,), kwargs={"limit": 5})
    reader.start()
    folding.start()
    released = withheld.release(engine, ALL, batch_max=3)
    folding.join()
    released += withheld.release(engine, ALL, batch_max=3)
    ended.set()
    reader.join()

    assert released > 0
    numbers = [change["seq"] for change in read]
    assert numbers == sorted(set(numbers))
    assert [without(change, "before", "after") for change in read] == [
        without(change, "before", "after") for change in shown(engine)
    ]
    one_shots = [each for each in briefly(read) if each[0] in tables.ONE_SHOT_KINDS]
    assert len(one_shots) == len(set(one_shots))
    paid = ledger.rows(engine, "SELECT id FROM orders WHERE status = 'paid'")
    assert sorted(id_ for kind, id_ in briefly(read) if kind == "order.paid") == sorted(row["id"] for row in paid)
    assert len(before) == released + sum(counted(engine).values())


def test_an_imported_history_is_announced_late(engine: Engine, tmp_path: Path) -> None:
    """Changes withheld by an import are in the feed after a release, with their source, and are not announced again."""
    history = shop_history(seed=24, orders=10)
    log = tmp_path / "history.ndjson"
    log.write_bytes(b"\n".join(event.body for event in history.events))
    replay.replay(engine, selection.Reading([str(log)], ledger.NOW), withhold=True)
    assert shown(engine) == []

    withheld.release(engine, ALL)
    released = shown(engine)
    assert {change["source"] for change in released} == {"replay"}
    ledger.execute(engine, "INSERT INTO pending (seq, again) SELECT seq, true FROM inbox")
    ledger.fold(engine)
    assert shown(engine) == released


def corrected(engine: Engine, before: Mapping[str, Any], after: Mapping[str, Any], reason: str | None) -> None:
    """Append a correction of cs_1 from *before* to *after*, by an event of the first minute."""
    append(engine, ("order.corrected", "cs_1", 1, reason))
    ledger.execute(
        engine,
        "UPDATE changes SET before = CAST(:before AS jsonb), after = CAST(:after AS jsonb)"
        " WHERE seq = (SELECT max(seq) FROM changes)",
        before=msgspec.json.encode(before).decode(),
        after=msgspec.json.encode(after).decode(),
    )


def paid(engine: Engine, reason: str | None) -> dict[str, Any]:
    """Append the payment of cs_1 in the third minute, and return its status and amount."""
    append(engine, ("order.paid", "cs_1", 3, reason))
    last = {"status": "paid", "amount_total": 1_500}
    ledger.execute(
        engine,
        "UPDATE changes SET after = CAST(:after AS jsonb) WHERE kind = 'order.paid'",
        after=msgspec.json.encode({**last, "lines": None}).decode(),
    )
    return last


@pytest.mark.parametrize("batch_max", [1, withheld.RELEASE_BATCH_MAX])
def test_a_correction_is_released_after_its_payment(engine: Engine, batch_max: int) -> None:
    """A correction is released after its payment, although its event is older."""
    last = paid(engine, "import")
    corrected(engine, last, {**last, "status": "processing"}, "fold_version")

    assert withheld.release(engine, ALL, batch_max=batch_max) == 2
    assert briefly(shown(engine)) == [("order.paid", "cs_1"), ("order.corrected", "cs_1")]


def test_a_correction_behind_a_later_step_stays_withheld(engine: Engine) -> None:
    """A correction that is older than a later step stays withheld, since the last change must be the newest."""
    before = {"status": "processing", "amount_total": 15}
    corrected(engine, before, {**before, "amount_total": 1_500}, "fold_version")
    paid(engine, None)

    assert withheld.release(engine, ALL) == 0
    assert briefly(shown(engine)) == [("order.paid", "cs_1")]


@pytest.mark.parametrize(("status", "released"), [("processing", 0), ("paid", 1)])
def test_a_payment_that_was_corrected(engine: Engine, status: str, released: int) -> None:
    """A payment stays withheld if its status was corrected; it is released if only the amount was corrected."""
    last = paid(engine, "import")
    corrected(engine, last, {"status": status, "amount_total": 1_400}, None)

    assert withheld.release(engine, ALL) == released


# ---- The command ----


def here(monkeypatch: pytest.MonkeyPatch, database_url: str, *options: str) -> Result:
    """Run the command in this process, which takes a tenth of the time of a process of its own."""
    monkeypatch.setenv("DATABASE_URL", database_url)
    return CliRunner().invoke(app, ["changes", *options])


def test_follow(engine: Engine, database_url: str, tmp_path: Path) -> None:
    """`follow` prints present changes and each new one at once, and exits with 0 when it is interrupted."""
    append(engine, ("order.opened", "cs_1", 1, None), ("order.paid", "cs_1", 2, None))
    out, err = tmp_path / "out", tmp_path / "err"
    options = ("--kind", "order.paid", "--kind", "dispute.*", "--test", "--format", "ndjson")

    def lines() -> list[Any]:
        return [msgspec.json.decode(line) for line in out.read_bytes().splitlines()]

    with started("changes", "follow", *options, stdout=out, stderr=err, DATABASE_URL=database_url) as process:
        until(lambda: len(lines()) == 1, seconds=60)
        append(engine, ("order.paid", "cs_2", 3, None), ("order.expired", "cs_3", 4, None))
        append(engine, ("order.paid", "cs_4", 4, None), livemode=True)
        append(engine, ("dispute.opened", "dp_1", 5, None))
        until(lambda: len(lines()) == 3)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) == 0
    assert briefly(lines()) == [("order.paid", "cs_1"), ("order.paid", "cs_2"), ("dispute.opened", "dp_1")]
    assert lines()[0]["at"] == "2026-11-20T00:02:00Z"
    assert lines()[0]["after"]["amount_total"] == 2_000
    assert err.read_text() == ""


def test_follow_to_the_end(engine: Engine, database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`follow --no-wait` prints a line for each change, with its amount, and ends after the last one."""
    append(engine, ("order.paid", "cs_1", 2, None), ("credit_note.issued", "cn_1", 3, None))
    append(engine, ("payment_link.activated", "plink_1", 4, "import"))

    ran = here(monkeypatch, database_url, "follow", "--no-wait")
    assert (ran.exit_code, ran.stderr) == (0, "")
    assert ran.stdout.splitlines() == [
        "       1  2026-11-20 00:02:00  test  order.paid                cs_1  20.00 USD",
        "       2  2026-11-20 00:03:00  test  credit_note.issued        cn_1  5.00 USD",
    ]


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        (("follow", "--after", "9"), CursorBeyond, "The cursor 9 is beyond 0"),
        (("follow", "--kind", "order.payed"), ConfigurationError, "there is no order.payed. It is one of"),
        (("follow", "--subject", "charge"), ConfigurationError, "payment_link"),
        (("follow", "--format", "json"), ConfigurationError, "--no-wait"),
        (("withheld", "--yes"), ConfigurationError, "--release"),
    ],
)
def test_invalid_options(
    database_url: str, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], error: type[Exception], words: str
) -> None:
    """The error names the fault and a valid choice; a cursor is a failure, an option is bad usage."""
    ran = here(monkeypatch, database_url, *options)

    assert ran.stdout == ""
    assert isinstance(ran.exception, error)
    assert words in str(ran.exception)


def test_withheld(engine: Engine, database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`withheld` counts withheld changes; without --yes a release shows its effect, and changes nothing."""
    append(
        engine,
        ("order.opened", "cs_1", 1, "import"),
        ("order.paid", "cs_2", 2, "import"),
        ("order.paid", "cs_3", 3, "import"),
        ("order.paid", "cs_1", 4, None),
    )
    paid = {
        "reason": "import",
        "kind": "order.paid",
        "changes": 2,
        "first": "2026-11-20T00:02:00Z",
        "last": "2026-11-20T00:03:00Z",
    }

    ran = here(monkeypatch, database_url, "withheld", "--kind", "order.paid", "--format", "json")
    assert (ran.exit_code, msgspec.json.decode(ran.stdout)) == (0, [paid])
    refused = payfold("changes", "withheld", "--release", "--format", "json", DATABASE_URL=database_url)
    assert (refused.code, refused.json) == (2, [paid])
    assert "1 stay withheld" in refused.err
    assert "2 changes would be appended" in refused.err
    assert counted(engine) == {("import", "order.opened"): 1, ("import", "order.paid"): 2}

    ran = here(monkeypatch, database_url, "withheld", "--release", "--yes")
    assert ran.exit_code == 0
    assert "2 changes were appended" in ran.stderr
    assert briefly(shown(engine)) == [("order.paid", id_) for id_ in ("cs_1", "cs_2", "cs_3")]
    assert counted(engine) == {("import", "order.opened"): 1}


def test_joined_changes_are_released_by_time(engine: Engine) -> None:
    """Of two withheld changes of one order, the older one is not released after the newer one."""
    append(engine, ("order.paid", "cs_1", 5, "rename"), ("order.opened", "cs_1", 3, "rename"))

    assert withheld.release(engine, ALL) == 1
    assert briefly(shown(engine)) == [("order.paid", "cs_1")]
    assert counted(engine) == {("rename", "order.opened"): 1}


def test_a_silent_connection_is_left(engine: Engine, database_url: str) -> None:
    """A waiting reader continues over a new connection if its own has fallen silent."""
    append(engine, ("order.paid", "cs_1", 1, None))
    with closing(Proxy(database_url)) as proxy:
        reading = database.engine(proxy.url, connections_max=1)
        assert len(_next(reading, 0, feed.ALL, waits=True).rows) == 1
        assert proxy.fall_silent() == 1
        assert len(_next(reading, 0, feed.ALL, waits=True, bounds=Bounds(1, 1, 1)).rows) == 1
        reading.dispose()
