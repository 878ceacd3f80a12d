"""A rename while other work goes on: archives, imports, jobs at Stripe, those who record, and tries that fail."""

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
from worker.logs import archive, renaming, replay, writer
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
    """Rename *old* to *new*, and be killed when some objects are renamed."""

    def die(_step: str, done: int, _total: int) -> None:
        if done > 5:
            raise KeyboardInterrupt

    with suppress(KeyboardInterrupt):
        renaming.rename(engine, old, new, now=NOW, progress=die, objects_at_once=1)
    assert world(engine) == {old, new}


# ---- Archived payloads ----


def test_two_accounts_of_which_one_is_archived(engine: Engine, tmp_path: Path) -> None:
    """Without the payloads that name the accounts a rename wants the archive, and with it finds two accounts."""
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
    """Where the archive is lost, the operator's word that it is one account is enough; against payloads it is not."""
    for account in ("acct_1", "acct_2", "acct_3"):
        if account == "acct_3":
            archive_all(engine, tmp_path)
        ledger.take_in(engine, body(f"evt_{account}", account=account))

    renaming.rename(engine, "acct_1", "acct_2", now=NOW, is_one=True)

    assert world(engine) == {"acct_2", "acct_3"}
    ledger.take_in(engine, body("evt_4", account="acct_2"))
    with pytest.raises(ConflictError, match="two accounts, which never meet"):
        renaming.rename(engine, "acct_2", "acct_3", now=NOW, is_one=True)


def test_few_payloads_are_left(engine: Engine, tmp_path: Path) -> None:
    """The newest deliveries are read, however many before them are archived."""
    old = [body(f"evt_{number:04}", account="acct_1") for number in range(40)]
    take_in(engine, old)
    archive_all(engine, tmp_path)
    take_in(engine, [body("evt_1000", account="acct_1"), body("evt_2", account="acct_2")])

    with pytest.raises(ConflictError, match="two accounts, which never meet"):
        renaming.rename(engine, "acct_1", "acct_2", now=NOW)


def details(engine: Engine, secrets: str) -> list[tuple[str, str]]:
    """Return detail and command of what splits an account where these are configured."""
    given = Settings.load({"STRIPE_WEBHOOK_SECRETS": secrets})
    with database.transaction(engine) as connection, database.cursor(connection) as cursor:
        return [(fault.detail, fault.command) for fault in accounts.faults(cursor, given)]


def test_a_lost_label_of_archived_deliveries(engine: Engine, tmp_path: Path) -> None:
    """A label that is lost is reported though no delivery under it can be read any more."""
    ledger.take_in(engine, body("evt_1"), account="shop")
    archive_all(engine, tmp_path)

    ((_, command),) = details(engine, "b=whsec_1")

    assert command == "payfold accounts rename shop b --yes"


def test_what_may_be_a_lost_label(engine: Engine, tmp_path: Path) -> None:
    """A name as Stripe gives them may be a lost label, which is reported, unless accounts name themselves here."""
    ledger.take_in(engine, body("evt_1"), account="acct_1")
    archive_all(engine, tmp_path)

    ((detail, command),) = details(engine, "b=whsec_1")

    assert "not known" in detail
    assert command == "payfold accounts rename acct_1 b --yes"
    ledger.take_in(engine, body("evt_2", account="acct_2"))
    assert details(engine, "b=whsec_1") == []


def test_many_that_may_be_lost_labels(engine: Engine, tmp_path: Path) -> None:
    """Many names of which it is not known are one fault, and not one each."""
    for number in range(3):
        ledger.take_in(engine, body(f"evt_{number}"), account=f"acct_{number}")
    archive_all(engine, tmp_path)

    ((detail, command),) = details(engine, "b=whsec_1")

    assert "acct_0 and 2 more accounts" in detail
    assert command == "payfold accounts rename acct_0 b --yes"


def test_archiving_while_a_rename_is_unfinished(engine: Engine, tmp_path: Path) -> None:
    """Nothing is archived in the midst of a rename, and what was brought back for it is there when it goes on."""
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
    """Payloads that a rename lost in its midst come back out of logs that call the accounts by any of their names."""
    bodies = [event.body for event in sold().events]
    take_in(engine, bodies[::2], account="acct_0")
    take_in(engine, bodies[1::2], account="acct_1")
    log = tmp_path / f"payfold-events-1-{len(bodies)}.ndjson"
    log.write_bytes(b"".join(replay.export(engine, filters=replay.ALL_EVENTS)))
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
def test_changes_that_no_job_has_looked_at(engine: Engine, *, has_row: bool) -> None:
    """Changes of a name that no key served are looked at after the rename, though the other name's job was ahead."""
    take_in(engine, [event.body for event in sold(5).events], account="acct_9")
    take_in(engine, [event.body for event in sold().events])
    ((first, last),) = [tuple(row.values()) for row in ledger.rows(engine, OF_ACCOUNT, account="")]
    ledger.execute(engine, JOB, account="acct_1", seq=last)
    if has_row:
        ledger.execute(engine, JOB, account="", seq=None)

    renaming.rename(engine, "", "acct_1", now=NOW)

    assert ledger.rows(engine, REACHED) == [{"account": "acct_1", "reached_seq": first - 1}]


def test_what_the_new_name_has_not_looked_at(engine: Engine) -> None:
    """A job that has not begun under the new name is not taken to have come as far as under the old one."""
    take_in(engine, [event.body for event in sold().events])
    ledger.execute(engine, JOB, account="", seq=5)
    ledger.execute(engine, JOB, account="acct_1", seq=None)

    renaming.rename(engine, "", "acct_1", now=NOW)

    assert ledger.rows(engine, REACHED) == [{"account": "acct_1", "reached_seq": None}]


def test_a_round_that_meets_a_rename(engine: Engine) -> None:
    """No round begins under an old name, so none leases the new name's job and loses its end."""
    ledger.execute(engine, NAMED, old="", new="acct_1")

    with database.transaction(engine) as connection, database.cursor(connection) as cursor:
        assert queue.begin(cursor, World("", livemode=False), "fetch", now=NOW) is None
        assert queue.begin(cursor, World("acct_1", livemode=False), "fetch", now=NOW) is not None


def test_a_call_that_spans_a_rename(engine: Engine) -> None:
    """A call that was leased under the old name is done under the new one as well."""
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


def reading(engine: Engine, path: Path, statement: str) -> replay.Reading:
    """Return a reading of the log at *path*, as it is read an account is renamed by *statement*."""
    steps = iter([statement])

    def progress(_entries: int, _more: int) -> None:
        for step in steps:
            ledger.execute(engine, step, old="", new="acct_1")

    return replay.Reading([str(path)], NOW, progress=progress)


def test_a_rename_that_begins_in_a_silent_import(engine: Engine, tmp_path: Path) -> None:
    """A silent import that meets an unfinished rename ends with its command, and leaves nothing to announce."""
    log = tmp_path / "log.ndjson"
    log.write_bytes(b"".join(event.body + b"\n" for event in sold().events))

    with pytest.raises(ConflictError, match="is not finished"):
        replay.replay(engine, reading(engine, log, BEGUN), withhold=True)

    assert ledger.rows(engine, "SELECT seq FROM inbox") == []


def test_a_rename_within_a_silent_import(engine: Engine, tmp_path: Path) -> None:
    """What the log observed is known by the new name too, and is not announced."""
    account = Account(seed=1)
    log = tmp_path / "log.ndjson"
    log.write_bytes(observed(account, account.open_session(amount=500)))

    done = replay.replay(engine, reading(engine, log, NAMED), withhold=True)

    assert done.counts["new"] == 1
    assert world(engine) == {"acct_1"}
    assert done.withheld == {"order.opened": 1}
    assert feed(engine) == set()


def test_why_a_replay_leaves_events(engine: Engine) -> None:
    """A replay that leaves events pending shows whether a rename holds them back, or when they are tried again."""
    ledger.record(engine, [ledger.delivery(body("evt_1"))])

    assert "other workers" in replay.why_pending(engine)
    ledger.execute(engine, "UPDATE pending SET due_at = now() + interval '1 hour', reason = 'it is busy'")
    assert "tried again" in replay.why_pending(engine)
    ledger.execute(engine, BEGUN, old="", new="acct_1")
    assert "`payfold accounts rename '' acct_1 --yes`" in replay.why_pending(engine)


# ---- Those who record, and tries that fail ----


def test_recording_while_objects_are_renamed(engine: Engine) -> None:
    """However few the events are, deliveries are recorded while objects are folded again."""
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
    """Yield a database in which every second try to write a name, or to finish a rename, succeeds."""
    ledger.execute(engine, FAILING_ONCE)
    yield engine
    ledger.execute(engine, "DROP FUNCTION fail_once CASCADE; DROP SEQUENCE tries")


def test_a_try_that_fails(failing_once: Engine) -> None:
    """A transaction that PostgreSQL ends in a deadlock is done again, and what it counted is counted once."""
    engine = failing_once
    account = Account(seed=1, payments=True)
    account.complete(session := account.open_session(amount=500))
    orders = [event.body for event in account.events]
    intents = account.order_intents(session)
    assert intents
    account.refund(intents[0], 200)
    # The last step, which is to be done twice, withholds what the order comes to know of its refund.
    take_in(engine, orders)
    take_in(engine, [each.body for each in account.events if each.object_id.startswith("re_")], account="acct_1")

    done = renaming.rename(engine, "", "acct_1", now=NOW)

    assert done == renaming.Renamed(events=len(orders), joined=0, withheld=1)
    withheld = ledger.rows(engine, "SELECT kind, withheld FROM changes WHERE withheld IS NOT NULL")
    assert withheld == [{"kind": "order.refund_changed", "withheld": "rename"}]
    assert world(engine) == {"acct_1"}


# ---- Many accounts ----


class Counting:
    """A cursor that counts what it executes."""

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
    """What splits an account is found by as many statements for many accounts as for few, the lost label among them."""
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
