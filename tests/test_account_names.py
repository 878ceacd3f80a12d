"""Every way into the inbox records an account under its newest name, and a rename leaves one world."""

import random
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from sqlalchemy import Engine

from deploy.sandbox.account import Account
from deploy.sandbox.history import tangle
from deploy.sandbox.rendering import render
from schemas import accounts, database, observations, tables
from schemas.errors import ConfigurationError, ConflictError, NotFoundError
from schemas.inbox import Recorded
from schemas.own_events import SESSION_REGISTERED
from schemas.progress import do_nothing
from schemas.settings import Settings
from tests import histories, ledger
from tests.command import Ran, payfold
from tests.stage import stage
from tests.waiting import until
from worker.logs import archive, export, renamed_rows, renaming, replay, selection
from worker.logs.dry_run import plan
from worker.proof import against_logs, shadow
from worker.proof.rebuild import rebuilt
from worker.proof.rebuild import record as record_in
from worker.proof.swap import prove, swap
from worker.stripe_jobs import expiry, gaps

LATER: Final = datetime(2099, 1, 1, tzinfo=UTC)
NOW: Final = datetime(2026, 11, 22, 12, tzinfo=UTC)
NAMED: Final = "INSERT INTO account_names (old, new, renamed_at, finished_at) VALUES (:old, :new, now(), now())"


def body(event_id: str, *, api_version: str = "2026-10-28.endive", **more: object) -> bytes:
    """Return an event that no fold reads."""
    about = {"object": "coupon", "id": f"of_{event_id}"}
    event = {"id": event_id, "type": "coupon.created", "created": 1_790_000_000, "api_version": api_version}
    return msgspec.json.encode(event | {"data": {"object": about}} | more)


def recorded(engine: Engine) -> list[tuple[str, str, str]]:
    """Return account, id and version of every recorded event."""
    found = ledger.rows(engine, "SELECT account, id, api_version FROM inbox ORDER BY id, account")
    return [(row["account"], row["id"], row["api_version"]) for row in found]


def test_recording_under_the_new_name(engine: Engine) -> None:
    """An event that arrives under an old name is recorded under the new one, and each delivery has its own receipt."""
    ledger.execute(engine, NAMED, old="", new="acct_1")
    under_old, under_other = ledger.delivery(body("evt_1")), ledger.delivery(body("evt_1"), account="acct_2")

    receipts = ledger.record(engine, [under_old, under_other])

    assert [each.recorded for each in receipts] == [Recorded.NEW, Recorded.NEW]
    assert [row[:2] for row in recorded(engine)] == [("acct_1", "evt_1"), ("acct_2", "evt_1")]
    assert [each.recorded for each in ledger.record(engine, [under_old])] == [Recorded.DUPLICATE]


def test_one_event_under_two_names_in_one_statement(engine: Engine) -> None:
    """Two deliveries of one event under an old and a new name are recorded once; the second is a copy."""
    ledger.execute(engine, NAMED, old="", new="acct_1")
    older = ledger.delivery(body("evt_1", api_version="2024-06-20"), account="acct_1")
    newer = ledger.delivery(body("evt_1"))

    receipts = ledger.record(engine, [older, newer])

    ledger.fold(engine)

    assert [each.recorded for each in receipts] == [Recorded.NEW, Recorded.COPY]
    assert recorded(engine) == [("acct_1", "evt_1", "2026-10-28.endive")]
    assert ledger.rows(engine, "SELECT account, api_version FROM renderings") == [
        {"account": "acct_1", "api_version": "2024-06-20"}
    ]


def test_the_account_that_the_context_names(engine: Engine) -> None:
    """A snapshot event of an organization's destination belongs to the account in its context, as a thin event does."""
    ledger.record(engine, [ledger.delivery(body("evt_1", context="org_1/acct_7"), account="label")])

    assert recorded(engine) == [("acct_7", "evt_1", "2026-10-28.endive")]


# ---- Renaming ----


def sold(seed: int = 3) -> Account:
    """Return an account with sales, payments, refunds and credit notes."""
    return tangle(seed, money=True)


def changed(event: bytes, **envelope: object) -> bytes:
    """Return *event* with the fields of *envelope* replaced."""
    return msgspec.json.encode(msgspec.json.decode(event) | envelope)


def world(engine: Engine) -> set[str]:
    """Return the accounts in the rows of all tables."""
    named = [table for table in tables.metadata.sorted_tables if "account" in table.c]
    union = " UNION ".join(f"SELECT account FROM {table.name}" for table in named)  # noqa: S608 - our own names
    return {row["account"] for row in ledger.rows(engine, union)}


def feed(engine: Engine) -> set[int]:
    """Return the numbers of the changes in the feed."""
    return {row["seq"] for row in ledger.rows(engine, "SELECT seq FROM changes WHERE withheld IS NULL")}


def announced(engine: Engine) -> list[tuple[str, str]]:
    """Return subject and kind of the one-shot changes in the feed, in order."""
    found = ledger.rows(engine, "SELECT subject_id, kind FROM changes WHERE withheld IS NULL ORDER BY subject_id, kind")
    return [(row["subject_id"], row["kind"]) for row in found if row["kind"] in tables.ONE_SHOT_KINDS]


def recorded_in(engine: Engine, bodies: list[bytes], account: str) -> str:
    """Record and fold *bodies* in an empty database as events of *account*, and return the digest."""
    ledger.clear(engine)
    ledger.execute(engine, "DELETE FROM account_names")
    take_in(engine, bodies, account=account)
    return ledger.digest_of(engine)


def take_in(engine: Engine, bodies: list[bytes], *, account: str = "") -> None:
    """Record *bodies* at once, and fold them."""
    ledger.record(engine, [ledger.delivery(each, account=account) for each in bodies])
    ledger.fold(engine)


def test_a_history_in_two_halves(engine: Engine) -> None:
    """Objects with events under both names become one, exactly as if there had been one name."""
    bodies = [event.body for event in sold().events]
    ledger.take_in(engine, *bodies[::2])
    ledger.take_in(engine, *bodies[1::2], account="acct_1")

    before = feed(engine)

    done = renaming.rename(engine, "", "acct_1", now=NOW)

    assert (done.events, done.joined) == (len(bodies[::2]), 0)
    assert world(engine) == {"acct_1"}
    assert feed(engine) <= before
    assert done.withheld == len(ledger.rows(engine, "SELECT FROM changes WHERE withheld = 'rename'")) > 0
    assert len(set(announced(engine))) == len(announced(engine))
    with rebuilt(engine) as made:
        assert prove(made).holds
    digest = ledger.digest_of(engine)
    assert digest == recorded_in(engine, bodies, "acct_1")


def test_events_that_both_names_have(engine: Engine) -> None:
    """An event under both names becomes one in its newest rendering, and changes of both are announced once."""
    events = sold().events
    older = [render(event, "2024-06-20").body for event in events]
    newer = [event.body for event in events]
    take_in(engine, older)
    take_in(engine, newer[: len(newer) // 2], account="acct_1")
    assert len(set(announced(engine))) < len(announced(engine))

    done = renaming.rename(engine, "", "acct_1", now=NOW)

    assert done.joined == len(newer) // 2
    assert world(engine) == {"acct_1"}
    assert len(set(announced(engine))) == len(announced(engine))
    digest = ledger.digest_of(engine)
    assert digest == recorded_in(engine, [*older, *newer[: len(newer) // 2]], "acct_1")


def test_a_pending_event_is_announced(engine: Engine) -> None:
    """An event pending at the rename is announced when folded; changes from folding again are withheld."""
    account = Account(seed=1)
    session = account.open_session(amount=500)
    account.complete(session)
    registered = observations.observe(
        SESSION_REGISTERED,
        account.session(session) | {"status": "open", "payment_status": "unpaid"},
        account="",
        livemode=False,
        created=account.now - 60,
        now=NOW,
    )
    ledger.record(engine, [registered])
    ledger.fold(engine)
    ledger.record(engine, [ledger.delivery(account.events[-1].body, account="acct_1")])

    renaming.rename(engine, "", "acct_1", now=NOW)
    assert announced(engine) == [(session, "order.opened")]
    ledger.fold(engine)

    assert announced(engine) == [(session, "order.opened"), (session, "order.paid")]


def test_other_accounts_and_both_modes(engine: Engine) -> None:
    """Test and live mode are both renamed and stay apart; an account that Stripe's events name does not change."""
    live = [changed(event.body, livemode=True) for event in sold().events]
    other = [changed(event.body, account="acct_9") for event in sold(5).events]
    bodies = [*live, *other, *(event.body for event in sold().events)]
    take_in(engine, bodies)

    renaming.rename(engine, "", "acct_1", now=NOW)

    counted = "SELECT account, livemode, count(*) AS events FROM inbox GROUP BY 1, 2 ORDER BY 1, 2"
    assert [tuple(row.values()) for row in ledger.rows(engine, counted)] == [
        ("acct_1", False, len(live)),
        ("acct_1", True, len(live)),
        ("acct_9", False, len(other)),
    ]
    digest = ledger.digest_of(engine)
    assert digest == recorded_in(engine, bodies, "acct_1")


def test_in_steps_and_killed_between(engine: Engine) -> None:
    """A killed rename withholds the changes of its unfinished part, and the same command completes it."""
    bodies = [event.body for event in sold().events]
    take_in(engine, bodies[::2])
    take_in(engine, bodies[1:-2:2], account="acct_1")

    def die(_step: str, done: int, _total: int) -> None:
        if done > 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        renaming.rename(engine, "", "acct_1", now=NOW, progress=die, objects_at_once=1)
    ledger.record(engine, [ledger.delivery(bodies[-1])])
    assert ledger.fold(engine) == 0
    ledger.record(engine, [ledger.delivery(body("evt_other"), account="acct_9")])
    assert ledger.fold(engine) == 1
    ledger.execute(engine, "DELETE FROM inbox WHERE account = 'acct_9'")
    assert world(engine) == {"", "acct_1"}
    with pytest.raises(ConflictError, match="is not finished"), rebuilt(engine):
        pass

    renaming.rename(engine, "", "acct_1", now=NOW, objects_at_once=1)
    ledger.fold(engine)

    assert world(engine) == {"acct_1"}
    digest = ledger.digest_of(engine)
    known = [*bodies[::2], *bodies[1:-2:2], bodies[-1]]
    assert digest == recorded_in(engine, known, "acct_1")


def test_a_rename_since_a_rebuild_began(engine: Engine) -> None:
    """A rebuild that began before a rename is neither compared nor swapped in: its rows have the old name."""
    take_in(engine, [event.body for event in sold().events])

    with rebuilt(engine) as made:
        renaming.rename(engine, "", "acct_1", now=NOW)

        for use in (prove, swap):
            with pytest.raises(ConflictError, match="An account was renamed since this began"):
                use(made)
    assert world(engine) == {"acct_1"}


def test_chains_and_ways_back(engine: Engine) -> None:
    """Names lead to the newest one over any number of renames, also back again; others are refused with a reason."""
    ledger.take_in(engine, body("evt_1"))

    def rename(old: str, new: str) -> None:
        renaming.rename(engine, old, new, now=NOW)

    rename("", "acct_1")
    rename("acct_1", "acct_2")
    assert names(engine) == {"": "acct_2", "acct_1": "acct_2"}
    rename("acct_2", "")
    assert names(engine) == {"acct_1": "", "acct_2": ""}
    assert world(engine) == {""}
    for old, new, words in (
        ("acct_1", "acct_3", "acct_1 is called '' by now"),
        ("", "", "same name"),
        ("acct_9", "acct_3", "Nothing is recorded under acct_9"),
    ):
        with pytest.raises((ConfigurationError, ConflictError, NotFoundError), match=words):
            rename(old, new)
    ledger.record(engine, [ledger.delivery(body("evt_2"), account="acct_9")])
    with pytest.raises(ConflictError, match="acct_1 is an old name of ''"):
        rename("acct_9", "acct_1")


def names(engine: Engine) -> dict[str, str]:
    """Return the present names by the old ones."""
    return {row["old"]: row["new"] for row in ledger.rows(engine, "SELECT old, new FROM account_names")}


def test_every_table_is_renamed() -> None:
    """A rename covers every table with an account column."""
    assert {table.name for table in renamed_rows.MOVED} == {
        table.name for table in tables.metadata.sorted_tables if "account" in table.c
    }


def test_two_accounts_never_meet(engine: Engine) -> None:
    """Two accounts that Stripe's own events name cannot be merged."""
    for account in ("acct_1", "acct_2"):
        ledger.record(engine, [ledger.delivery(body(f"evt_{account}", account=account))])

    with pytest.raises(ConflictError, match="two accounts, which never meet"):
        renaming.rename(engine, "acct_1", "acct_2", now=NOW)


def test_recording_during_a_rename(engine: Engine) -> None:
    """No event stays or arrives under the old name, even if many are recorded during the rename."""
    known = [event.body for event in sold().events]
    take_in(engine, known)
    stop, recorded = threading.Event(), [0, 0]

    def keep_recording(lane: int) -> None:
        while not stop.is_set():
            news = [body(f"evt_{lane}_{recorded[lane]}_{at}") for at in range(5)]
            # Known events are delivered again, perhaps one that is being relabelled at this moment.
            again = known[recorded[lane] % len(known)]
            ledger.record(engine, [ledger.delivery(each) for each in (*news, again)])
            recorded[lane] += 1

    with ThreadPoolExecutor(2) as pool:
        lanes = [pool.submit(keep_recording, lane) for lane in range(2)]
        try:
            until(lambda: min(recorded) >= 3)
            renaming.rename(engine, "", "acct_1", now=NOW, objects_at_once=3)
            renaming.rename(engine, "acct_1", "acct_2", now=NOW)
            after = list(recorded)
            until(lambda: all(now > then for now, then in zip(recorded, after, strict=True)))
        finally:
            stop.set()
        for each in lanes:
            each.result()

    assert world(engine) == {"acct_2"}
    of_ours = ledger.rows(engine, "SELECT count(*) AS events FROM inbox WHERE type = 'coupon.created'")
    assert of_ours == [{"events": 5 * sum(recorded)}]


# ---- Configurations that would split an account ----


def faults(engine: Engine, secrets: str, keys: str = "") -> list[tuple[str, str]]:
    """Return code and command of the faults by which this configuration splits an account."""
    given_settings = Settings.load({"STRIPE_WEBHOOK_SECRETS": secrets, "STRIPE_API_KEY": keys})
    with database.transaction(engine) as connection, database.cursor(connection) as cursor:
        return [(fault.code, fault.command) for fault in accounts.faults(cursor, given_settings)]


def test_a_fault_is_logged_at_the_start(engine: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    """Web and worker log once, as an error, the label that splits an account and the command that mends it."""
    ledger.record(engine, [ledger.delivery(body("evt_1"))])
    written = [""]

    def is_logged() -> bool:
        written[0] += "".join(capsys.readouterr())
        return "accounts.split" in written[0]

    accounts.log_faults(engine, Settings.load({"STRIPE_WEBHOOK_SECRETS": "a=whsec_1"}))
    until(is_logged)

    (line,) = [each for each in written[0].splitlines() if "accounts.split" in each]
    assert "payfold accounts rename '' a --yes" in line
    assert "error" in line


SPLITS: Final[list[tuple[list[str], str, str, list[tuple[str, str]]]]] = [
    # A label is added.
    ([""], "a=whsec_1", "", [("label_splits", "payfold accounts rename '' a --yes")]),
    # The label is changed, and removed.
    (["a"], "b=whsec_1", "", [("label_splits", "payfold accounts rename a b --yes")]),
    (["a"], "whsec_1", "", [("label_splits", "payfold accounts rename a '' --yes")]),
    # A single label without events is the new name; among several only the operator knows the new one.
    (["", "b"], "a=whsec_1,b=whsec_2", "", [("label_splits", "payfold accounts rename '' a --yes")]),
    (["", "a", "b"], "a=whsec_1,b=whsec_2", "", [("label_splits", "payfold accounts rename '' NEW --yes")]),
    # Two endpoints of two accounts, and an endpoint without events.
    (["", "b"], "whsec_1,b=whsec_2", "", []),
    (["a"], "a=whsec_1,b=whsec_2", "", []),
    # An account that events name is no label, and without a secret no delivery is accepted.
    (["", "their own"], "whsec_1", "", []),
    (["", "a"], "", "", []),
    # A key without the label of the secret, and a label of the key alone.
    (["a"], "a=whsec_1", "sk_test_1", [("key_label_splits", "payfold accounts rename '' a --yes")]),
    ([""], "whsec_1", "a=sk_test_1", [("key_label_splits", "payfold accounts rename '' a --yes")]),
    (["", "their own"], "whsec_1", "acct_9=sk_test_1", []),
    (["a"], "a=whsec_1", "a=sk_test_1", []),
]


def test_labels_that_split_an_account(engine: Engine) -> None:
    """A label that is added, changed or removed is a fault, reported with the command that mends it."""
    for named, secrets, keys, expected in SPLITS:
        ledger.execute(engine, "DELETE FROM inbox")
        for number, account in enumerate(named):
            own = {"account": "acct_9"} if account == "their own" else {}
            ledger.record(engine, [ledger.delivery(body(f"evt_{number}", **own), account=account)])

        assert faults(engine, secrets, keys) == expected, (named, secrets, keys)


def test_the_label_that_a_key_had(engine: Engine) -> None:
    """Events that only jobs read are under the label of a key; if no key has it any more, that is a fault too."""
    ledger.record(engine, [ledger.delivery(body("obs_1"), account="a", source="observation")])
    ledger.record(engine, [ledger.delivery(body("evt_1")), ledger.delivery(body("evt_2"), account="b")])
    ledger.record(engine, [ledger.delivery(body("obs_2"), account="acct_9", source="observation")])

    assert faults(engine, "whsec_1,b=whsec_2", "sk_test_1,a=sk_test_2") == []
    lost = [("label_splits", "payfold accounts rename a NEW --yes")]
    assert faults(engine, "whsec_1,b=whsec_2", "sk_test_1") == lost
    assert faults(engine, "whsec_1,b=whsec_2") == lost


def test_no_fault_once_renamed(engine: Engine) -> None:
    """After the rename there is no fault, with the label, without it, or with an unlabelled key."""
    ledger.record(engine, [ledger.delivery(body("evt_1"))])
    renaming.rename(engine, "", "a", now=NOW)

    assert faults(engine, "a=whsec_1", "sk_test_1") == []
    assert faults(engine, "whsec_1") == []
    assert faults(engine, "b=whsec_1") == [("label_splits", "payfold accounts rename a b --yes")]


@settings(max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32), chance=st.randoms())
def test_labels_that_come_and_go(engine: Engine, seed: int, chance: random.Random) -> None:
    """After labels are added, changed and removed in mid-history, and the advised renames are run, there is one world.

    It equals the world of the same events under the last name from the start, and no change is announced twice.
    """
    ledger.clear(engine)
    ledger.execute(engine, "DELETE FROM account_names")
    bodies = histories.bodies_of(seed)
    # Some events come in an older rendering too, which changes nothing at any position.
    bodies += [changed(each, api_version="2020-01-01") for each in chance.sample(bodies, min(3, len(bodies)))]
    bodies += [changed(event.body, account="acct_9") for event in tangle(seed + 1).events[:5]]
    chance.shuffle(bodies)
    label = ""
    for batch in ledger.batches([ledger.delivery(each) for each in bodies], iter(lambda: chance.randint(1, 9), 0)):
        label = chance.choice((label, label, "", "a", "b"))
        ledger.record(engine, [replace(each, account=each.envelope.account or label) for each in batch])
        if chance.random() < 0.5:
            ledger.fold(engine, limit=chance.choice((1, 3, 500)))
        if chance.random() < 0.4:
            heed(engine, label, chance)
    ledger.fold(engine, limit=chance.choice((1, 3, 500)))
    heed(engine, label, chance)
    ledger.fold(engine)

    known = {row["account"] for row in ledger.rows(engine, "SELECT DISTINCT account FROM inbox")} - {"acct_9"}
    assert len(known) <= 1
    assert world(engine) <= {*known, "acct_9"}
    assert len(set(announced(engine))) == len(announced(engine))
    assert [row for row in ledger.rows(engine, PAID) if row["times"] != 1] == []
    found = ledger.digest_of(engine)
    assert found == recorded_in(engine, bodies, *known)


PAID: Final = """
SELECT id, (SELECT count(*) FROM changes AS c WHERE c.subject_id = o.id AND c.kind = 'order.paid') AS times
FROM orders AS o WHERE status = 'paid'
"""


def heed(engine: Engine, label: str, chance: random.Random) -> None:
    """Run the advised commands for one secret with this *label*, until there is no more advice."""
    while found := faults(engine, f"{label}=whsec_1" if label else "whsec_1"):
        _, _, _, old, new, _ = found[0][1].split(" ")
        renaming.rename(
            engine, *(each.strip("'") for each in (old, new)), now=NOW, objects_at_once=chance.choice((1, 500))
        )


def test_the_commands(engine: Engine, database_url: str) -> None:
    """Release and status fail and name the command, which asks for --yes; after it both succeed."""
    take_in(engine, [event.body for event in sold().events])

    def run(*arguments: str) -> Ran:
        return payfold(*arguments, DATABASE_URL=database_url, STRIPE_WEBHOOK_SECRETS="acct_1=whsec_1")

    released = run("migrate", "up")
    status = run("status", "--format", "json")
    asked = run("accounts", "rename", "''", "acct_1", "--format", "json")
    assert (released.code, status.code, asked.code) == (1, 1, 2)
    assert "payfold accounts rename '' acct_1 --yes" in released.err
    assert [fault["code"] for fault in status.json["faults"]] == ["label_splits"]
    assert asked.json["events"] == len(sold().events)

    assert run("accounts", "rename", "", "acct_1", "--yes").code == 0
    (listed,) = run("accounts", "list", "--format", "json").json
    assert (listed["account"], listed["livemode"], listed["events"]) == ("acct_1", False, len(sold().events))
    assert (listed["labelled_by"], listed["renamed_from"]) == (["secret"], [""])
    assert faults(engine, "acct_1=whsec_1") == []


# ---- Data under an old name ----


def test_an_old_log_after_the_rename(engine: Engine, tmp_path: Path) -> None:
    """Events of an old log under the old name are recognised as known, and its filter accepts both names."""
    bodies = [event.body for event in sold().events]
    take_in(engine, bodies[:-1])
    log = tmp_path / "old.ndjson"
    log.write_bytes(b"".join(export.export(engine, filters=selection.ALL_EVENTS)) + bodies[-1] + b"\n")
    renaming.rename(engine, "", "acct_1", now=NOW)

    for account in ("", "acct_1"):
        reading = selection.Reading([str(log)], NOW, selection.LogFilters(account=account))
        counts = plan(engine, reading).counts
        assert (counts["duplicate"], counts["new"], counts["filtered"]) == (len(bodies) - 1, 1, 0)
    counts = replay.replay(engine, selection.Reading([str(log)], NOW)).counts

    assert (counts["duplicate"], counts["new"]) == (len(bodies) - 1, 1)
    assert world(engine) == {"acct_1"}
    assert reconciled_with(engine, log) == {
        "events": len(bodies),
        "missing_here": 0,
        "missing_there": 0,
        "different": 0,
    }


def reconciled_with(engine: Engine, log: Path) -> dict[str, int]:
    """Return the differences between the inbox and *log*."""
    with shadow.shadow(engine, has_inbox=True) as made:
        record_in(made, [str(log)], account="", now=NOW, refuse=do_nothing)
        return against_logs.compare(made, on_difference=do_nothing)


def test_archived_payloads(engine: Engine, tmp_path: Path) -> None:
    """Rows of archived events are relabelled; objects under both names need the archive, and are refused without it."""
    bodies = [event.body for event in sold().events]
    take_in(engine, bodies[::2])
    for part in archive.plan(engine, before=LATER):
        archive.archive(engine, part, before=LATER, folder=tmp_path)
    digest = ledger.digest_of(engine)
    assert ledger.rows(engine, "SELECT count(*) AS kept FROM payloads") == [{"kept": 0}]

    renaming.rename(engine, "", "acct_0", now=NOW)
    renaming.rename(engine, "acct_0", "", now=NOW)
    assert ledger.digest_of(engine) == digest

    take_in(engine, bodies[1::2], account="acct_1")
    with pytest.raises(ConflictError, match="`payfold accounts rename '' acct_1 --archive DIR"):
        renaming.rename(engine, "", "acct_1", now=NOW)
    assert world(engine) == {"", "acct_1"}
    renaming.rename(engine, "acct_1", "acct_2", now=NOW)
    renaming.rename(engine, "", "acct_2", now=NOW, archive=tmp_path)

    assert world(engine) == {"acct_2"}
    digest = ledger.digest_of(engine)
    assert digest == recorded_in(engine, bodies, "acct_2")


def test_jobs_at_stripe_go_on(database_url: str, redis_url: str) -> None:
    """A job continues from its state under the old name, with the key of that label, and calls no other account."""
    with stage(database_url, redis_url) as at:
        at.account.complete(at.account.open_session())
        at.account.advance(120)
        gaps.run_once(at.context(), since=at.now - timedelta(days=1))
        gaps.run_once(at.context())
        (before,) = at.rows("SELECT account, reached_at, found FROM stripe_jobs")
        renaming.rename(at.engine, "", "acct_1", now=at.now)
        at.account.complete(at.account.open_session())
        at.account.advance(120)
        at.api.calls.clear()

        gaps.run_once(at.context())
        expiry.run_once(at.context())

        jobs = at.rows("SELECT account, reached_at, found FROM stripe_jobs WHERE job = 'fill_gaps'")
        assert [job["account"] for job in jobs] == ["acct_1"]
        assert jobs[0]["reached_at"] > before["reached_at"]
        assert jobs[0]["found"] > before["found"] > 0
        assert world(at.engine) == {"acct_1"}
        assert {made.stripe_account for made in at.api.calls} == {None}
        first = min(int(made.params["created"]["gte"]) for made in at.api.calls if "created" in made.params)
        assert first == int((before["reached_at"] - gaps.OVERLAP).timestamp())
