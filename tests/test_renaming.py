"""A rename during other work: archives, imports, jobs at Stripe, recording, and transactions that fail."""

from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import pytest
from sqlalchemy import Engine

from deploy.sandbox.account import Account
from schemas import accounts, database, inbox, observations
from schemas.budget import Lane
from schemas.errors import ConflictError
from schemas.observations import World
from schemas.own_events import SESSION_REGISTERED
from schemas.settings import Settings
from tests import ledger
from tests.test_account_names import body, feed, recorded_in, sold, take_in, world
from worker.logs import archive, export, renaming, replay, selection, writer
from worker.stripe_jobs import queue

LATER: Final = datetime(2099, 1, 1, tzinfo=UTC)
NOW: Final = datetime(2026, 11, 22, 12, tzinfo=UTC)
BEGUN: Final = "INSERT INTO account_names (old, new, renamed_at) VALUES (:old, :new, now())"
NAMED: Final = "INSERT INTO account_names (old, new, renamed_at, finished_at) VALUES (:old, :new, now(), now())"


def archive_all(engine: Engine, folder: Path) -> None:
    """Move every payload into logs in *folder*."""
    for part in archive.plan(engine, before=LATER):
        archive.archive(engine, part, before=LATER, folder=folder)


def killed_in_the_midst(engine: Engine, old: str, new: str) -> None:
    """Rename *old* to *new*, and die when some objects are renamed."""

    def die(_step: str, done: int, _total: int) -> None:
        if done > 5:
            raise KeyboardInterrupt

    with suppress(KeyboardInterrupt):
        renaming.rename(engine, old, new, now=NOW, progress=die, objects_at_once=1)
    assert world(engine) == {old, new}


# ---- Archived payloads ----


def test_two_accounts_of_which_one_is_archived(engine: Engine, tmp_path: Path) -> None:
    """A rename without the payloads that name the accounts requires the archive, and with it finds two accounts."""
    ledger.take_in(engine, body("evt_1", account="acct_1"))
    archive_all(engine, tmp_path)
    ledger.take_in(engine, body("evt_2", account="acct_2"))

    for old, new in (("acct_1", "acct_2"), ("acct_2", "acct_1")):
        with pytest.raises(ConflictError, match="--archive DIR"):
            renaming.rename(engine, old, new, now=NOW)
        with pytest.raises(ConflictError, match="--archive DIR"):
            renaming.plan(engine, old, new)
    with pytest.raises(ConflictError, match="two accounts, which never meet"):
        renaming.rename(engine, "acct_1", "acct_2", now=NOW, archive=tmp_path)
    assert world(engine) == {"acct_1", "acct_2"}


def test_accounts_that_an_operator_vouches_for(engine: Engine, tmp_path: Path) -> None:
    """An operator's assurance that it is one account replaces a lost archive, but does not overrule payloads."""
    for account in ("acct_1", "acct_2", "acct_3"):
        if account == "acct_3":
            archive_all(engine, tmp_path)
        ledger.take_in(engine, body(f"evt_{account}", account=account))

    renaming.rename(engine, "acct_1", "acct_2", now=NOW, is_one=True)

    assert world(engine) == {"acct_2", "acct_3"}
    ledger.take_in(engine, body("evt_4", account="acct_2"))
    with pytest.raises(ConflictError, match="two accounts, which never meet"):
        renaming.rename(engine, "acct_2", "acct_3", now=NOW, is_one=True)


def test_few_payloads_that_are_not_archived(engine: Engine, tmp_path: Path) -> None:
    """The newest deliveries are read, however many earlier ones are archived."""
    old = [body(f"evt_{number:04}", account="acct_1") for number in range(40)]
    take_in(engine, old)
    archive_all(engine, tmp_path)
    take_in(engine, [body("evt_1000", account="acct_1"), body("evt_2", account="acct_2")])

    with pytest.raises(ConflictError, match="two accounts, which never meet"):
        renaming.rename(engine, "acct_1", "acct_2", now=NOW)


def details(engine: Engine, secrets: str) -> list[tuple[str, str]]:
    """Return detail and command of each fault that splits an account, with *secrets* configured."""
    given = Settings.load({"STRIPE_WEBHOOK_SECRETS": secrets})
    with database.transaction(engine) as connection, database.cursor(connection) as cursor:
        return [(fault.detail, fault.command) for fault in accounts.faults(cursor, given)]


def test_a_lost_label_of_archived_deliveries(engine: Engine, tmp_path: Path) -> None:
    """A lost label is reported although no delivery under it can be read any more."""
    ledger.take_in(engine, body("evt_1"), account="shop")
    archive_all(engine, tmp_path)

    ((_, command),) = details(engine, "b=whsec_1")

    assert command == "payfold accounts rename shop b --yes"


def test_a_possible_lost_label(engine: Engine, tmp_path: Path) -> None:
    """An account name of Stripe's form may be a lost label, which is reported unless deliveries name their account."""
    ledger.take_in(engine, body("evt_1"), account="acct_1")
    archive_all(engine, tmp_path)

    ((detail, command),) = details(engine, "b=whsec_1")

    assert "not known" in detail
    assert command == "payfold accounts rename acct_1 b --yes"
    ledger.take_in(engine, body("evt_2", account="acct_2"))
    assert details(engine, "b=whsec_1") == []


def test_many_possible_lost_labels(engine: Engine, tmp_path: Path) -> None:
    """Many possible lost labels are one fault, and not one each."""
    for number in range(3):
        ledger.take_in(engine, body(f"evt_{number}"), account=f"acct_{number}")
    archive_all(engine, tmp_path)

    ((detail, command),) = details(engine, "b=whsec_1")

    assert "acct_0 and 2 more accounts" in detail
    assert command == "payfold accounts rename acct_0 b --yes"


def test_archiving_while_a_rename_is_unfinished(engine: Engine, tmp_path: Path) -> None:
    """During an unfinished rename nothing is archived, and the payloads restored for it stay until it goes on."""
    bodies = [event.body for event in sold().events]
    take_in(engine, bodies[::2])
    take_in(engine, bodies[1::2], account="acct_1")
    parts = archive.plan(engine, before=LATER)
    killed_in_the_midst(engine, "", "acct_1")

    with pytest.raises(ConflictError, match="is not finished"):
        archive.plan(engine, before=LATER)
    for part in parts:
        with pytest.raises(ConflictError, match="is not finished"):
            archive.archive(engine, part, before=LATER, folder=tmp_path)
    renaming.rename(engine, "", "acct_1", now=NOW)

    digest = ledger.digest_of(engine)
    assert digest == recorded_in(engine, bodies, "acct_1")


def test_archived_in_the_midst_of_a_rename(engine: Engine, tmp_path: Path) -> None:
    """Payloads that are lost during a rename are restored from logs under any of the account's names."""
    bodies = [event.body for event in sold().events]
    take_in(engine, bodies[::2], account="acct_0")
    take_in(engine, bodies[1::2], account="acct_1")
    log = tmp_path / f"payfold-events-1-{len(bodies)}.ndjson"
    log.write_bytes(b"".join(export.export(engine, filters=selection.ALL_EVENTS)))
    renaming.rename(engine, "acct_0", "", now=NOW)
    killed_in_the_midst(engine, "", "acct_1")
    ledger.execute(engine, "DELETE FROM payloads")

    with pytest.raises(ConflictError, match=r"The rename is begun.*--archive DIR --yes` ends it"):
        renaming.rename(engine, "", "acct_1", now=NOW)
    renaming.rename(engine, "", "acct_1", now=NOW, archive=tmp_path)

    assert world(engine) == {"acct_1"}
    digest = ledger.digest_of(engine)
    assert digest == recorded_in(engine, bodies, "acct_1")


# ---- Jobs at Stripe ----

JOB: Final = "INSERT INTO stripe_jobs (account, livemode, job, reached_seq) VALUES (:account, false, 'fetch', :seq)"
REACHED: Final = "SELECT account, reached_seq FROM stripe_jobs ORDER BY account"
OF_ACCOUNT: Final = "SELECT min(seq) AS first, max(seq) AS last FROM changes WHERE account = :account"


@pytest.mark.parametrize("has_row", [False, True])
def test_changes_that_no_job_has_read(engine: Engine, *, has_row: bool) -> None:
    """Changes under a name without a key are read after the rename, although the other name's job was ahead."""
    take_in(engine, [event.body for event in sold(5).events], account="acct_9")
    take_in(engine, [event.body for event in sold().events])
    ((first, last),) = [tuple(row.values()) for row in ledger.rows(engine, OF_ACCOUNT, account="")]
    ledger.execute(engine, JOB, account="acct_1", seq=last)
    if has_row:
        ledger.execute(engine, JOB, account="", seq=None)

    renaming.rename(engine, "", "acct_1", now=NOW)

    assert ledger.rows(engine, REACHED) == [{"account": "acct_1", "reached_seq": first - 1}]


def test_a_job_that_has_not_begun_under_the_new_name(engine: Engine) -> None:
    """A job that has not begun under the new name does not inherit the old name's progress."""
    take_in(engine, [event.body for event in sold().events])
    ledger.execute(engine, JOB, account="", seq=5)
    ledger.execute(engine, JOB, account="acct_1", seq=None)

    renaming.rename(engine, "", "acct_1", now=NOW)

    assert ledger.rows(engine, REACHED) == [{"account": "acct_1", "reached_seq": None}]


def test_a_round_that_meets_a_rename(engine: Engine) -> None:
    """No round begins under an old name, so that none leases a job that it cannot finish."""
    ledger.execute(engine, NAMED, old="", new="acct_1")

    with database.transaction(engine) as connection, database.cursor(connection) as cursor:
        assert queue.begin(cursor, World("", livemode=False), "fetch", now=NOW) is None
        assert queue.begin(cursor, World("acct_1", livemode=False), "fetch", now=NOW) is not None


def test_a_call_that_spans_a_rename(engine: Engine) -> None:
    """A call leased under the old name is finished under the new name too."""
    wanted = queue.CallRequest("object", "re_1", "refund", Lane.REFETCH)
    old = World("", livemode=False)
    with database.transaction(engine) as connection, database.cursor(connection) as cursor:
        queue.want(cursor, old, [wanted], now=NOW)
        (leased,) = queue.lease(cursor, old, ["object"], limit=1, now=NOW)
    renaming.rename(engine, "", "acct_1", now=NOW)

    with database.transaction(engine) as connection, database.cursor(connection) as cursor:
        queue.done(cursor, leased)

    assert ledger.rows(engine, "SELECT account FROM stripe_calls") == []


# ---- Imports ----


def observed(account: Account, session: str) -> bytes:
    """Return the line of a log for an observation of *session* that names no account."""
    seen = observations.observe(
        SESSION_REGISTERED,
        account.session(session) | {"status": "open", "payment_status": "unpaid"},
        account="",
        livemode=False,
        created=account.now - 60,
        now=NOW,
    )
    redacted, payload = list(seen.envelope.redacted), seen.envelope.payload
    return writer.line_of("", "observation", NOW, None, seen.sha256.hex(), redacted, payload)


def reading(engine: Engine, path: Path, statement: str) -> selection.Reading:
    """Return a reading of the log at *path* during which *statement* renames an account."""
    steps = iter([statement])

    def progress(_entries: int, _more: int) -> None:
        for step in steps:
            ledger.execute(engine, step, old="", new="acct_1")

    return selection.Reading([str(path)], NOW, progress=progress)


def test_a_rename_that_begins_in_a_silent_import(engine: Engine, tmp_path: Path) -> None:
    """A silent import that meets an unfinished rename ends with the command to run, and leaves nothing to announce."""
    log = tmp_path / "log.ndjson"
    log.write_bytes(b"".join(event.body + b"\n" for event in sold().events))

    with pytest.raises(ConflictError, match="is not finished"):
        replay.replay(engine, reading(engine, log, BEGUN), withhold=True)

    assert ledger.rows(engine, "SELECT seq FROM inbox") == []


def test_a_rename_within_a_silent_import(engine: Engine, tmp_path: Path) -> None:
    """The log's observations are folded under the new name too, and are not announced."""
    account = Account(seed=1)
    log = tmp_path / "log.ndjson"
    log.write_bytes(observed(account, account.open_session(amount=500)))

    done = replay.replay(engine, reading(engine, log, NAMED), withhold=True)

    assert done.counts["new"] == 1
    assert world(engine) == {"acct_1"}
    assert done.withheld == {"order.opened": 1}
    assert feed(engine) == set()


def test_why_a_replay_leaves_events(engine: Engine) -> None:
    """A replay that leaves events pending reports whether a rename delays them, or when they are tried again."""
    ledger.record(engine, [ledger.delivery(body("evt_1"))])

    assert "other workers" in replay.why_pending(engine)
    ledger.execute(engine, "UPDATE pending SET due_at = now() + interval '1 hour', reason = 'it is busy'")
    assert "tried again" in replay.why_pending(engine)
    ledger.execute(engine, BEGUN, old="", new="acct_1")
    assert "`payfold accounts rename '' acct_1 --yes`" in replay.why_pending(engine)


# ---- Recording, and transactions that fail ----


def test_recording_while_objects_are_renamed(engine: Engine) -> None:
    """Deliveries are recorded while objects are folded again, however few events there are."""
    bodies = [event.body for event in sold().events]
    take_in(engine, bodies[::2])
    take_in(engine, bodies[1::2], account="acct_1")
    news = iter([body("evt_new")])

    def record(_step: str, _done: int, _total: int) -> None:
        for each in news:
            with database.transaction(engine) as connection, database.cursor(connection) as cursor:
                cursor.execute("SET LOCAL lock_timeout = '200ms'")
                inbox.record(cursor, [ledger.delivery(each)])

    renaming.rename(engine, "", "acct_1", now=NOW, progress=record)

    assert world(engine) == {"acct_1"}
    assert ledger.rows(engine, "SELECT account FROM inbox WHERE id = 'evt_new'") == [{"account": "acct_1"}]


FAILING_ONCE: Final = """
CREATE SEQUENCE tries;
CREATE FUNCTION fail_once() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    IF nextval('tries') % 2 = 1 THEN RAISE EXCEPTION 'by the test' USING ERRCODE = 'deadlock_detected'; END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER fail_once BEFORE INSERT OR UPDATE ON account_names FOR EACH ROW EXECUTE FUNCTION fail_once()
"""


@pytest.fixture
def failing_once(engine: Engine) -> Iterator[Engine]:
    """Yield a database in which only every second attempt to write a name, or to finish a rename, succeeds."""
    ledger.execute(engine, FAILING_ONCE)
    yield engine
    ledger.execute(engine, "DROP FUNCTION fail_once CASCADE; DROP SEQUENCE tries")


def test_a_failed_transaction_is_repeated(failing_once: Engine) -> None:
    """A transaction that PostgreSQL ends in a deadlock is repeated, and its work is counted once."""
    engine = failing_once
    account = Account(seed=1, payments=True)
    account.complete(session := account.open_session(amount=500))
    orders = [event.body for event in account.events]
    intents = account.order_intents(session)
    assert intents
    account.refund(intents[0], 200)
    # The last step, which runs twice, withholds the order's change by its refund.
    take_in(engine, orders)
    take_in(engine, [each.body for each in account.events if each.object_id.startswith("re_")], account="acct_1")

    done = renaming.rename(engine, "", "acct_1", now=NOW)

    assert done == renaming.Renamed(events=len(orders), joined=0, withheld=1)
    withheld = ledger.rows(engine, "SELECT kind, withheld FROM changes WHERE withheld IS NOT NULL")
    assert withheld == [{"kind": "order.refund_changed", "withheld": "rename"}]
    assert world(engine) == {"acct_1"}


# ---- Many accounts ----


class Counting:
    """A cursor that counts the statements that it executes."""

    def __init__(self, cursor: database.Cursor) -> None:
        self._cursor = cursor
        self.executed = 0

    def execute(self, *given: object, **more: object) -> object:
        """Execute a statement."""
        self.executed += 1
        return self._cursor.execute(*given, **more)  # type: ignore[call-overload]  # as they came

    def __getattr__(self, name: str) -> object:
        return getattr(self._cursor, name)


def test_many_connected_accounts(engine: Engine) -> None:
    """Faults that split an account, a lost label too, take as many statements for many accounts as for few."""
    given = Settings.load({"STRIPE_WEBHOOK_SECRETS": "b=whsec_1"})
    executed = set()
    for number in (3, 300):
        take_in(engine, [body(f"evt_{each}", account=f"acct_{each:020}") for each in range(number)])
        take_in(engine, [body("evt_lost")], account="shop")
        with database.transaction(engine) as connection, database.cursor(connection) as cursor:
            counting = Counting(cursor)
            found = accounts.faults(counting, given)  # type: ignore[arg-type]  # it does what a cursor does
            executed.add(counting.executed)
        assert [fault.command for fault in found] == ["payfold accounts rename shop b --yes"]

    assert len(executed) == 1
