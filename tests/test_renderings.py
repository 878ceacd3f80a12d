"""Copies of one event: which of several contents is folded, and how a contradiction is noted."""

import hashlib
import random
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from itertools import permutations
from pathlib import Path
from typing import Any

import msgspec
import psycopg
import pytest
from sqlalchemy import Engine

from schemas import contents, database, inbox
from schemas.progress import do_nothing
from schemas.settings import SigningSecret
from tests import ledger
from tests.command import payfold
from tests.web import CLERK, SECRET, Web, serving, settings_of, signed
from worker.folding import projection, renderings
from worker.folding.claim import claim
from worker.logs import archive, replay
from worker.logs.dry_run import plan
from worker.logs.selection import Reading
from worker.logs.writer import OwnLine, write
from worker.proof import archived, rebuild, swap
from worker.proof.digest import digests
from worker.proof.rebuild import IN_ONE_PROCESS

CREATED = 1_760_000_000
VERSION = "2025-09-30.clover"


@pytest.fixture
def web(database_url: str, redis_url: str) -> Iterator[Web]:
    """Return a running web process."""
    with serving(settings_of(database_url, redis_url)) as running:
        yield running


def body(number: int = 1, *, account: str | None = None, version: str = VERSION, **fields: Any) -> bytes:  # noqa: ANN401 - JSON
    """Return the event of a paid order, with *fields* laid over its session."""
    session = {
        "id": f"cs_{number}",
        "object": "checkout.session",
        "mode": "payment",
        "status": "complete",
        "payment_status": "paid",
        "currency": "usd",
        "amount_total": 1500,
        "metadata": {},
    }
    event = {
        "id": f"evt_{number}",
        "object": "event",
        "type": "checkout.session.completed",
        "created": CREATED,
        "livemode": False,
        "api_version": version,
        "account": account,
        "pending_webhooks": 1,
        "data": {"object": session | fields},
    }
    return msgspec.json.encode(event)


def replayed(engine: Engine, folder: Path, *bodies: bytes, **more: Any) -> dict[str, int]:  # noqa: ANN401 - of Reading
    """Replay a log of *bodies*, and return its counts that are not zero."""
    path = folder / "log.ndjson"
    path.write_bytes(b"".join(each.replace(b"\n", b" ") + b"\n" for each in bodies))
    logs = Reading([str(path)], ledger.NOW, **more)
    foreseen = plan(engine, logs).counts
    counts = +replay.replay(engine, logs).counts
    assert +foreseen == counts
    return {name: count for name, count in counts.items() if name != "seen"}


def state(engine: Engine, event: str = "evt_1") -> dict[str, Any]:
    """Return the inbox's columns of an event."""
    (found,) = ledger.rows(
        engine,
        "SELECT state, source, api_version, type, signature IS NOT NULL AS signed FROM events WHERE id = :id",
        id=event,
    )
    return found


def total(engine: Engine, order: str = "cs_1") -> object:
    """Return the amount of an order; None if the order does not exist."""
    found = ledger.rows(engine, "SELECT amount_total FROM orders WHERE id = :id", id=order)
    return found[0]["amount_total"] if found else None


# ---- Equal contents ----


def test_equal_contents() -> None:
    """Spacing, key order, credentials, fields that a delivery adds, [] for {}, 1500.0: the content is the same."""
    event = msgspec.json.decode(body())
    session = event["data"]["object"]
    same = [
        msgspec.json.format(body(), indent=4),
        msgspec.json.encode(dict(reversed(event.items()))),
        msgspec.json.encode(event | {"pending_webhooks": 3, "request": {"id": "req_1"}}),
        msgspec.json.encode(event | {"data": {"object": session | {"metadata": [], "amount_total": 1500.0}}}),
        msgspec.json.encode(event | {"data": {"object": session | {"url": "https://pay.example.com/1"}}}),
        msgspec.json.encode(event | {"data": {"object": session, "previous_attributes": []}}),
    ]
    others = [
        body(amount_total="1500"),
        body(amount_total=None),
        body(version="2024-06-20"),
        msgspec.json.encode(event | {"type": "checkout.session.expired"}),
        msgspec.json.encode(event | {"data": {"object": session, "previous_attributes": {"status": "open"}}}),
        body()[:-1],
    ]

    assert {contents.hash_of(each) for each in same} == {contents.hash_of(body())}
    assert len({contents.hash_of(each) for each in [body(), *others]}) == len(others) + 1


# ---- Which copy is folded ----


SHOWN = """
SELECT type, api_version, created, object_type, object_id, redacted, source, state, cause, reason,
    signature IS NOT NULL AS signed, replace(convert_from(payload, 'UTF8'), account, '') AS payload
FROM events WHERE account = :account
"""
ROWS = "SELECT id, status, amount_total, event_id, as_of FROM orders WHERE account = :account ORDER BY id"
ANOMALIES = """
SELECT id, kind, subject, subject_id, detail FROM anomalies WHERE account = :account AND resolved_at IS NULL ORDER BY id
"""
KEPT = """
SELECT encode(content_sha256, 'hex') AS content, signature IS NOT NULL AS signed, type, source FROM renderings
WHERE account = :account ORDER BY content_sha256
"""


def test_every_order_of_arrival(web: Web, engine: Engine, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Copies with different contents give the same rows, anomalies and view, however they arrive and are folded.

    They arrive by signed deliveries and by replays, and some are folded before others arrive.
    """
    seed = int(request.config.getoption("hypothesis_seed"))
    chance = random.Random(seed)
    unsigned = [{"amount_total": 15}, {"amount_total": 1500}]
    delivered: list[dict[str, Any]] = [
        {"amount_total": 1500},
        {"amount_total": "a lot"},
        {"amount_total": 1600},
        {"amount_total": 1700},
        {"amount_total": 1800, "version": "2024-06-20"},
        {"amount_total": 1900, "id": "cs_2"},
    ]
    copies = [(copy, False) for copy in unsigned] + [(copy, True) for copy in delivered]
    ends = []
    for number in range(16):
        world = f"acct_{number}"
        chance.shuffle(copies)
        for fields, is_signed in copies:
            copy = body(account=world, **fields)
            if is_signed:
                assert web.deliver(copy).status_code == 200
            else:
                replay.replay(engine, Reading([_written(tmp_path, copy)], ledger.NOW))
            if chance.random() < 0.5:
                ledger.fold(engine)
        ledger.fold(engine)
        ends.append([ledger.rows(engine, query, account=world) for query in (SHOWN, ROWS, ANOMALIES, KEPT)])

    assert all(end == ends[0] for end in ends), f"seed {seed}"
    (event,), (order,), anomalies, kept = ends[0]
    assert (event["state"], event["signed"], event["source"], event["api_version"]) == (
        "folded", True, "webhook", VERSION,
    )  # fmt: skip
    # The copy with the greatest hash among the signed ones.
    best: dict[str, Any] = max(
        (fields for fields in delivered if fields["amount_total"] in (1500, 1600, 1700, 1900)),
        key=lambda fields: contents.hash_of(body(**fields)),
    )
    assert (order["id"], order["amount_total"]) == (best.get("id", "cs_1"), best["amount_total"])
    assert [each["kind"] for each in sorted(anomalies, key=lambda row: row["kind"])] == ["contents_differ", "id_reused"]
    assert len(kept) == 6
    with rebuild.rebuilt(engine) as made:
        assert swap.compare(made, on_difference=print).drift == 0
    with rebuild.refolded(engine, seed=seed) as made:
        assert swap.compare(made, on_difference=print).drift == 0


def _written(folder: Path, *bodies: bytes) -> str:
    path = folder / "one.ndjson"
    path.write_bytes(b"".join(each + b"\n" for each in bodies))
    return str(path)


def test_a_signed_delivery_replaces_a_parked_copy(web: Web, engine: Engine, tmp_path: Path) -> None:
    """The genuine event replaces an unreadable copy, by delivery or by replay, and the replay counts it."""
    broken = [body(number, amount_total="a lot") for number in (1, 2, 3)]
    assert replayed(engine, tmp_path, *broken) == {"new": 3, "parked": 3}

    assert web.deliver(body(1)).status_code == 200
    ledger.fold(engine)
    assert replayed(engine, tmp_path, *(body(number) for number in (1, 2))) == {
        "duplicate": 1, "mended": 1, "folded": 1,
    }  # fmt: skip

    assert [state(engine, f"evt_{number}")["state"] for number in (1, 2, 3)] == ["folded", "folded", "parked"]
    assert (state(engine)["signed"], state(engine, "evt_2")["signed"]) == (True, False)
    assert (total(engine), total(engine, "cs_2"), total(engine, "cs_3")) == (1500, 1500, None)
    # The event that folds at last is announced.
    feed = ledger.rows(engine, "SELECT subject_id, kind, withheld FROM changes ORDER BY subject_id")
    assert feed == [{"subject_id": f"cs_{each}", "kind": "order.paid", "withheld": None} for each in (1, 2)]


def test_reconciliation_repairs_parked_events(engine: Engine, database_url: str, tmp_path: Path) -> None:
    """A reconciliation with a log finds the events that are parked here and readable there, and repairs them."""
    path = tmp_path / "log.ndjson"
    path.write_bytes(b"".join(body(number) + b"\n" for number in (1, 2)))
    ledger.take_in(engine, body(1, amount_total="a lot"), body(2, amount_total=1500.0))

    arguments = ("reconcile", "--log", str(path), "--format", "json")
    found = payfold(*arguments, DATABASE_URL=database_url)
    repaired = payfold(*arguments, "--repair", DATABASE_URL=database_url)

    assert (found.code, found.json["logs"]["different"], found.json["logs"]["missing_here"]) == (3, 1, 0)
    assert (repaired.code, repaired.json["repaired"]["events_mended"]) == (0, 1)
    assert (total(engine), total(engine, "cs_2")) == (1500, 1500)


def test_the_signed_copy_decides(web: Web, engine: Engine, tmp_path: Path) -> None:
    """A verified delivery replaces an unsigned copy, and an anomaly notes the contradiction."""
    replayed(engine, tmp_path, body(amount_total=15))

    assert web.deliver(body()).status_code == 200
    ledger.fold(engine)

    assert (total(engine), state(engine)["signed"], state(engine)["source"]) == (1500, True, "webhook")
    (anomaly,) = ledger.rows(engine, "SELECT kind, subject, subject_id FROM anomalies WHERE resolved_at IS NULL")
    assert anomaly == {"kind": "contents_differ", "subject": "event", "subject_id": "evt_1"}
    # The other way round nothing changes, and nothing is announced.
    assert replayed(engine, tmp_path, body(amount_total=15), body(amount_total=16)) == {"duplicate": 2}
    assert total(engine) == 1500
    shown = web.get("/v1/events/evt_1", CLERK).json()
    amounts = [msgspec.json.decode(each["payload"])["data"]["object"]["amount_total"] for each in shown["renderings"]]
    assert sorted(amounts) == [15, 16]
    assert [each["signed"] for each in shown["renderings"]] == [False, False]


def test_the_same_bytes_signed(web: Web, engine: Engine, tmp_path: Path) -> None:
    """An event whose same bytes arrive signed later counts as signed, and is neither folded again nor copied."""
    replayed(engine, tmp_path, body())

    for _ in range(2):
        assert web.deliver(body()).status_code == 200
    assert web.deliver(msgspec.json.format(body(), indent=2)).status_code == 200
    ledger.fold(engine)

    assert (state(engine)["signed"], state(engine)["source"]) == (True, "webhook")
    assert ledger.rows(engine, "SELECT count(*) AS n FROM renderings") == [{"n": 0}]
    assert ledger.rows(engine, "SELECT attempts FROM events") == [{"attempts": 1}]
    assert ledger.anomalies(engine) == []


def test_several_events_under_one_id(web: Web, engine: Engine) -> None:
    """Three types under one id, as from the Dashboard's old test webhooks: each is kept and answered, one is folded."""
    fields = msgspec.json.decode(body())
    events = [
        msgspec.json.encode(fields | {"id": "evt_0", "type": kind, "data": {"object": object_}})
        for kind, object_ in (
            ("checkout.session.completed", fields["data"]["object"]),
            ("customer.created", {"id": "cus_1", "object": "customer"}),
            ("payment_link.created", {"id": "plink_1", "object": "payment_link", "active": True}),
        )
    ]

    assert [web.deliver(each).status_code for each in events] == [200, 200, 200]
    ledger.fold(engine)

    chosen = max(events, key=contents.hash_of)
    assert state(engine, "evt_0")["type"] == msgspec.json.decode(chosen)["type"]
    rows = [
        ledger.rows(engine, f"SELECT id FROM {table}")  # noqa: S608 - our own names
        for table in ("orders", "customers", "payment_links")
    ]
    assert sum(len(each) for each in rows) == 1
    (anomaly,) = ledger.rows(engine, "SELECT kind, subject_id, detail FROM anomalies WHERE resolved_at IS NULL")
    assert (anomaly["kind"], anomaly["subject_id"]) == ("id_reused", "evt_0")
    assert len(anomaly["detail"]["events"]) == 3
    assert len(web.get("/v1/events/evt_0").json()["renderings"]) == 2


def test_a_balance_that_only_a_replaced_copy_reported(engine: Engine) -> None:
    """A row that only a replaced copy had made is gone, as if that copy had never arrived."""
    fields = msgspec.json.decode(body())

    def customer(version: str, balance: int | None, name: str) -> bytes:
        kept = {"id": "cus_1", "object": "customer", "name": name, "currency": "eur"}
        object_ = kept if balance is None else kept | {"balance": balance}
        return msgspec.json.encode(
            fields | {"type": "customer.created", "api_version": version, "data": {"object": object_}}
        )

    ledger.take_in(engine, customer("2025-01-01", -500, "A"))
    assert ledger.rows(engine, "SELECT amount FROM balances") == [{"amount": -500}]

    ledger.take_in(engine, customer("2025-02-01", None, "B"))

    assert ledger.rows(engine, "SELECT amount FROM balances") == []
    assert ledger.rows(engine, "SELECT name FROM customers") == [{"name": "B"}]


# ---- The feed ----


def test_changes_by_another_unsigned_copy_are_withheld(web: Web, engine: Engine, tmp_path: Path) -> None:
    """Changes by another unsigned copy are withheld; changes by a signed delivery are announced."""
    link = msgspec.json.decode(body()) | {"type": "payment_link.updated"}

    def fields(number: int, version: str, *, active: bool) -> bytes:
        object_ = {"id": f"plink_{number}", "object": "payment_link", "active": active}
        return msgspec.json.encode(link | {"id": f"evt_{number}", "api_version": version, "data": {"object": object_}})

    replayed(engine, tmp_path, *(fields(number, "2025-01-01", active=True) for number in (1, 2)))
    assert replayed(engine, tmp_path, fields(1, "2025-02-01", active=False)) == {"newer": 1, "folded": 1}
    assert web.deliver(fields(2, "2025-02-01", active=False)).status_code == 200
    ledger.fold(engine)

    found = ledger.rows(
        engine, "SELECT subject_id, withheld FROM changes WHERE kind = 'payment_link.deactivated' ORDER BY subject_id"
    )
    assert found == [
        {"subject_id": "plink_1", "withheld": "rendering"},
        {"subject_id": "plink_2", "withheld": None},
    ]


# ---- Limits, logs and archives ----


def test_at_most_sixteen_others_are_kept(engine: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    """Of many contents those of highest rank are kept in any order of arrival; the log counts the dropped ones."""
    bodies = [body(amount_total=amount) for amount in range(20)]
    ends = []
    for chance in (random.Random(1), random.Random(2)):
        ledger.clear(engine)
        ledger.take_in(engine, *chance.sample(bodies, len(bodies)))
        kept = ledger.rows(engine, "SELECT content_sha256 FROM renderings ORDER BY 1")
        ends.append(([bytes(row["content_sha256"]) for row in kept], total(engine)))

    expected = sorted(map(contents.hash_of, bodies))
    assert ends[0] == ends[1]
    assert ends[0][0] == expected[3:19]
    assert "renderings.dropped" in "".join(capsys.readouterr())


def test_a_signature_in_a_log(engine: Engine, tmp_path: Path) -> None:
    """A log's signature counts only if a secret verifies it over an unredacted payload."""
    secret = SigningSecret("", SECRET.encode())
    path = tmp_path / "own.ndjson"

    def line(number: int, header: str | None, *, redacted: Sequence[str] = ()) -> bytes:
        fields = body(number)
        sha256 = hashlib.sha256(fields).hexdigest()
        return write(OwnLine(
            account="", source="webhook", received_at=ledger.NOW, signature=header, payload_sha256=sha256,
            redacted=list(redacted), payload=fields.decode(),
        ))  # fmt: skip

    one, four = (signed(body(number), age=10_000)["Stripe-Signature"] for number in (1, 4))
    path.write_bytes(line(1, one) + line(2, one) + line(3, "t=1,v1=ab") + line(4, four, redacted=["data.object.url"]))
    replay.replay(engine, Reading([str(path)], ledger.NOW, secrets=[secret]))

    # An unsigned copy with a greater hash replaces an unsigned one only.
    lesser = [
        next(each for each in (body(number, amount_total=amount) for amount in range(99)) if is_greater(each, number))
        for number in (1, 2, 3, 4)
    ]
    ledger.take_in(engine, *lesser)

    assert total(engine, "cs_1") == 1500
    assert 1500 not in [total(engine, f"cs_{number}") for number in (2, 3, 4)]


def is_greater(copy: bytes, number: int) -> bool:
    """Return whether *copy* is chosen over the usual one if neither is signed."""
    return contents.hash_of(copy) > contents.hash_of(body(number))


def test_an_export_has_the_folded_copies(
    web: Web, engine: Engine, tmp_path: Path, database_url: str, another_database_url: str
) -> None:
    """An export of the folded copies gives the same tables in an empty database; on request it has the others too."""
    replayed(engine, tmp_path, body(1, amount_total=15), body(2, amount_total="a lot"), body(3))
    for number in (1, 2):
        assert web.deliver(body(number)).status_code == 200
    ledger.fold(engine)
    chosen, every = tmp_path / "chosen.ndjson", tmp_path / "every.ndjson"

    assert payfold("events", "export", "-o", str(chosen), DATABASE_URL=database_url).code == 0
    assert payfold("events", "export", "--renderings", "-o", str(every), DATABASE_URL=database_url).code == 0

    assert [len(path.read_bytes().splitlines()) for path in (chosen, every)] == [3, 5]
    other = database.engine(another_database_url)
    replay.replay(other, Reading([str(chosen)], ledger.NOW))
    assert digests(engine) == digests(other)
    other.dispose()
    found = payfold("rebuild", "--from", str(chosen), DATABASE_URL=database_url)
    assert found.code == 0, found.out + found.err
    shown = payfold("events", "show", "evt_1", "--format", "json", DATABASE_URL=database_url)
    assert [each["signed"] for each in shown.json["renderings"]] == [False]
    assert "not folded" in payfold("events", "show", "evt_1", DATABASE_URL=database_url).out


def test_an_archived_event_is_compared_by_its_hash(engine: Engine, tmp_path: Path) -> None:
    """A copy of an archived event is compared with the archived one by the hash of its content."""
    ledger.take_in(engine, body(1), body(2))
    later = datetime(2100, 1, 1, tzinfo=UTC)
    for part in archive.plan(engine, before=later):
        archive.archive(engine, part, before=later, folder=tmp_path)
    assert ledger.rows(engine, "SELECT count(*) AS n FROM payloads") == [{"n": 0}]

    ledger.take_in(engine, msgspec.json.format(body(1), indent=2), body(2, amount_total=15))

    held = ledger.rows(engine, "SELECT id, count(*) AS n FROM renderings GROUP BY id")
    assert held == [{"id": "evt_2", "n": 1}]
    assert ledger.anomalies(engine) == ["contents_differ"]
    assert ledger.rows(engine, "SELECT state FROM events ORDER BY seq")[0] == {"state": "folded"}
    # If the other copy is chosen, the archived one is found again by its bytes.
    with archived.with_archived(engine, tmp_path, progress=do_nothing) as made:
        rebuild.rebuild(made, sizes=IN_ONE_PROCESS)
        assert swap.compare(made, on_difference=print).drift == 0


def test_copies_that_come_while_others_are_folded(engine: Engine, request: pytest.FixtureRequest) -> None:
    """Recorders and workers at once never deadlock, and leave no copy uncompared."""
    seed = int(request.config.getoption("hypothesis_seed"))
    copies = {number: [body(number, amount_total=amount) for amount in range(6)] for number in range(30)}

    def deliver(recorder: int) -> None:
        chance = random.Random(seed + recorder)
        bodies = [each for several in copies.values() for each in several]
        chance.shuffle(bodies)
        for at in range(0, len(bodies), 12):
            ledger.record(engine, [ledger.delivery(each) for each in bodies[at : at + 12]])

    def work() -> int:
        folded = 0
        while not all(future.done() for future in recording):
            folded += ledger.fold(engine, limit=7)
        return folded

    with ThreadPoolExecutor(5) as threads:
        recording = [threads.submit(deliver, number) for number in range(3)]
        folding = [threads.submit(work) for _ in range(2)]
        for future in recording:
            future.result()
        assert sum(future.result() for future in folding) > 0
    ledger.fold(engine)

    held = ledger.rows(engine, "SELECT id, amount_total FROM orders")
    expected = {
        f"cs_{number}": max(range(6), key=lambda amount: contents.hash_of(several[amount]))
        for number, several in copies.items()
    }
    assert {row["id"]: row["amount_total"] for row in held} == expected, f"seed {seed}"
    assert ledger.rows(engine, "SELECT DISTINCT state FROM events") == [{"state": "folded"}]
    kept = ledger.rows(engine, "SELECT count(*) AS n, count(content_sha256) AS compared FROM renderings")
    assert kept == [{"n": 150, "compared": 150}]


# ---- Failures ----


def nested(levels: int, **fields: Any) -> bytes:  # noqa: ANN401 - JSON
    """Return the usual event with a field that no fold reads: half of a surrogate pair, nested *levels* deep."""
    text = body(**fields, extra="X").decode()
    return text.replace('"X"', '{"a":' * levels + '"\\ud800"' + "}" * levels).encode()


def test_there_is_always_a_hash() -> None:
    """Nesting of any depth, half of a surrogate pair and endless numbers have a hash, at any depth of the stack."""

    def from_below(frames: int, payload: bytes) -> bytes:
        return contents.hash_of(payload) if not frames else from_below(frames - 1, payload)

    odd = [nested(levels) for levels in (10, 150, 190, 210, 400, 700, 5000)]
    odd += [body(amount_total="X").replace(b'"X"', digits) for digits in (b"9" * 5000, b"1e400", b"NaN")]

    assert len({contents.hash_of(each) for each in odd}) == len(odd)
    assert [from_below(200, each) for each in odd] == [contents.hash_of(each) for each in odd]


def test_copies_with_other_spacing_are_hashed_once_and_alike() -> None:
    """Sharing work between the hashes of several copies changes none of them, also for a copy compared by its bytes."""
    wide = [nested(levels).replace(b":", b" : ") for levels in (10, 210, 700)]
    copies = [body(), msgspec.json.format(body(), indent=4), *wide, *(nested(levels) for levels in (10, 210, 700))]
    copies += [body()[:-1], body()[:-1] + b" ", b"", b" ", b"\xff", b'{"a": "\xff"}', b'{"a":"\xff"}']
    for some in (copies, copies[::-1]):
        hashes = contents.Hashes()
        assert [hashes.of(each) for each in some] == [contents.hash_of(each) for each in some]


def test_a_copy_that_is_hard_to_compare_delays_no_other(engine: Engine, tmp_path: Path) -> None:
    """Copies that are nested too deeply are compared by their bytes; all others fold."""
    ledger.record(engine, [ledger.delivery(nested(700)), ledger.delivery(body(2))])
    ledger.record(engine, [ledger.delivery(nested(700, amount_total=1501))])

    ledger.fold(engine)

    assert total(engine) in (1500, 1501)
    assert (total(engine, "cs_2"), ledger.anomalies(engine)) == (1500, ["contents_differ"])
    assert replayed(engine, tmp_path, nested(600), body(3))["new"] == 1


def test_a_comparison_that_fails_is_tried_again(engine: Engine) -> None:
    """If the database refuses the result of one comparison, that event waits, and all others fold."""
    ledger.record(engine, [ledger.delivery(body(number)) for number in (1, 2, 3)])
    ledger.record(engine, [ledger.delivery(body(number, version="2099-01-01")) for number in (1, 2, 3)])
    ledger.execute(
        engine,
        """
        CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN RAISE EXCEPTION USING ERRCODE = '23514'; END $$;
        CREATE TRIGGER refuse BEFORE UPDATE ON inbox FOR EACH ROW WHEN (NEW.id = 'evt_2') EXECUTE FUNCTION refuse();
        """,
    )

    ledger.fold(engine)

    states = "SELECT id, state, cause, attempts FROM events ORDER BY id"
    assert [(row["id"], row["state"]) for row in ledger.rows(engine, states)] == [
        ("evt_1", "folded"), ("evt_2", "pending"), ("evt_3", "folded"),
    ]  # fmt: skip
    ledger.execute(engine, "DROP TRIGGER refuse ON inbox; UPDATE pending SET due_at = NULL")
    ledger.fold(engine)
    assert ledger.rows(engine, "SELECT DISTINCT state, api_version FROM events") == [
        {"state": "folded", "api_version": "2099-01-01"}
    ]


REFUSING = """
CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION USING ERRCODE = '{code}'; END $$;
CREATE TRIGGER refuse BEFORE INSERT OR UPDATE ON orders FOR EACH ROW WHEN (NEW.amount_total = 1500)
    EXECUTE FUNCTION refuse();
"""


def test_a_better_copy_that_is_tried_again(web: Web, engine: Engine, tmp_path: Path) -> None:
    """A replaced copy's rows stay until the better copy can be folded, and then are gone."""
    replayed(engine, tmp_path, body(amount_total=15), body(2))
    ledger.execute(engine, REFUSING.format(code="53200"))
    assert web.deliver(body()).status_code == 200

    ledger.fold(engine)

    assert (total(engine), state(engine)["state"]) == (15, "pending")
    ledger.execute(engine, "DROP TRIGGER refuse ON orders; UPDATE pending SET due_at = NULL")
    ledger.fold(engine)
    assert (total(engine), state(engine)["signed"]) == (1500, True)
    with rebuild.rebuilt(engine) as made:
        assert swap.compare(made, on_difference=print).drift == 0


def test_a_better_copy_that_cannot_be_folded(web: Web, engine: Engine, tmp_path: Path) -> None:
    """If PostgreSQL refuses the row of the better copy, the event is parked, and the other copy's rows are gone."""
    later = msgspec.json.encode(msgspec.json.decode(body(amount_total=16)) | {"id": "evt_0", "created": CREATED - 9})
    replayed(engine, tmp_path, later, body(amount_total=15))
    assert total(engine) == 15
    ledger.execute(engine, REFUSING.format(code="23514"))
    assert web.deliver(body()).status_code == 200

    ledger.fold(engine)

    assert (state(engine)["state"], total(engine)) == ("parked", 16)
    ledger.execute(engine, "DROP TRIGGER refuse ON orders")


def test_a_line_that_claims_a_signed_hash(web: Web, engine: Engine, tmp_path: Path) -> None:
    """A log line that claims the hash of a signed body never counts as that body, in any order of arrival."""
    url = "https://checkout.stripe.com/c/pay/1"
    ends = []
    for number, order in enumerate(permutations(("other", "forged", "genuine", "raw"))):
        world = f"acct_{number}"
        genuine, forged = body(account=world, url=url), body(account=world, amount_total=15)
        path = tmp_path / f"{number}.ndjson"
        path.write_bytes(
            write(OwnLine(
                account=world, source="webhook", received_at=ledger.NOW, signature="t=1,v1=00", redacted=["url"],
                payload_sha256=hashlib.sha256(genuine).hexdigest(), payload=forged.decode(),
            ))
        )  # fmt: skip
        for copy in order:
            if copy == "forged":
                replay.replay(engine, Reading([str(path)], ledger.NOW))
            elif copy == "genuine":
                assert web.deliver(genuine).status_code == 200
            else:
                given = genuine if copy == "raw" else body(account=world, amount_total=77)
                ledger.record(engine, [ledger.delivery(given, source="replay")])
            if number % 2:
                ledger.fold(engine)
        ledger.fold(engine)
        ends.append([ledger.rows(engine, query, account=world) for query in (SHOWN, ROWS)])
        kept = ledger.rows(
            engine, "SELECT payload, signature, verified FROM renderings WHERE account = :account", account=world
        )
        amounts = [msgspec.json.decode(bytes(row["payload"]))["data"]["object"]["amount_total"] for row in kept]
        assert (order, sorted(amounts)) == (order, [15, 77])

    assert {row["amount_total"] for _, (row,) in ends} == {1500}
    assert {event["signed"] for (event,), _ in ends} == {True}
    with rebuild.rebuilt(engine) as made:
        assert swap.compare(made, on_difference=print).drift == 0


def test_recording_never_waits_for_a_fold(engine: Engine, database_url: str) -> None:
    """Further copies of an event are recorded at once while a fold that compared the first has not committed."""
    ledger.take_in(engine, body())
    copies = [ledger.delivery(msgspec.json.format(body(), indent=2)), ledger.delivery(body(version="2020-01-01"))]
    ledger.record(engine, copies)
    again = msgspec.structs.replace(copies[0], signature="t=1,v1=00")
    with psycopg.connect(database_url) as folding, folding.cursor() as cursor:
        renderings.queue(cursor)
        claimed = claim(cursor, limit=9)
        projection.project(cursor, claimed, now=ledger.NOW)
        assert [each.event.id for each in claimed] == ["evt_1"]
        bounded = database.BATCH._replace(statement=5)
        with database.transaction(engine, bounded) as connection, database.cursor(connection) as recording:
            given = [*map(ledger.delivery, (body(7), body(amount_total=2))), *copies, again]
            receipts = inbox.record(recording, given)

    assert [each.recorded.value for each in receipts] == ["new", "copy", "duplicate", "duplicate", "copy"]
    ledger.fold(engine)
    assert state(engine)["signed"]
    assert ledger.rows(engine, "SELECT count(*) AS n FROM renderings WHERE content_sha256 IS NULL") == [{"n": 0}]


def test_many_copies_are_one_anomaly(engine: Engine) -> None:
    """An event with differing copies has one anomaly, which shows the copies that are kept."""
    for amount in range(20):
        ledger.take_in(engine, body(amount_total=amount))

    (anomaly,) = ledger.rows(engine, "SELECT kind, detail, resolved_at FROM anomalies")
    kept = sorted((contents.hash_of(body(amount_total=amount)) for amount in range(20)), reverse=True)[:17]
    assert (anomaly["kind"], anomaly["resolved_at"]) == ("contents_differ", None)
    assert anomaly["detail"]["contents"] == sorted(each[:8].hex() for each in kept)


def test_a_signature_of_another_account(engine: Engine, tmp_path: Path) -> None:
    """A log's signature counts only for the secret's account, under any of its names, or for the event's own."""
    keys = {label: f"whsec_{label or 'any'}" for label in ("shop", "later", "")}
    secrets = [SigningSecret(label, key.encode()) for label, key in keys.items()]
    ledger.execute(engine, "INSERT INTO account_names VALUES ('sooner', 'later', now(), now())")
    #         the line's account, the event's own, the label of the secret: whether it counts
    cases = [
        ("shop", None, "shop", True),
        ("other", None, "shop", False),
        ("", None, "shop", False),
        ("sooner", None, "later", True),
        ("acct_1", "acct_1", "shop", True),
        ("shop", "acct_1", "shop", False),
        ("shop", None, "", True),
    ]
    path = tmp_path / "own.ndjson"
    lines = []
    for number, (account, own, label, _) in enumerate(cases):
        payload = body(number, account=own)
        header = signed(payload, secret=keys[label])["Stripe-Signature"]
        lines.append(
            write(OwnLine(
                account=account, source="webhook", received_at=ledger.NOW, signature=header, redacted=[],
                payload_sha256=hashlib.sha256(payload).hexdigest(), payload=payload.decode(),
            ))
        )  # fmt: skip
    path.write_bytes(b"".join(lines))

    replay.replay(engine, Reading([str(path)], ledger.NOW, secrets=secrets))

    found = ledger.rows(engine, "SELECT verified FROM inbox ORDER BY seq")
    assert [row["verified"] for row in found] == [counts for *_, counts in cases]


def test_equal_contents_give_equal_rows(engine: Engine) -> None:
    """Two copies with equal contents give the same rows, whichever comes first."""
    link = "https://invoice.stripe.com/i/1"
    invoice = {"id": "in_1", "object": "invoice", "currency": "usd", "status": "paid", "hosted_invoice_url": link}
    portal = {"id": "bpc_1", "object": "billing_portal.configuration", "active": True}

    def event(id_: str, type_: str, object_: dict[str, Any], **data: Any) -> bytes:  # noqa: ANN401 - JSON
        fields = msgspec.json.decode(body()) | {"id": id_, "type": type_, "data": {"object": object_, **data}}
        return msgspec.json.encode(fields)

    def features(empty: object, number: float) -> dict[str, Any]:
        update = {"enabled": True, "allowed_updates": empty, "schedule_at_period_end": empty, "maximum": number}
        return portal | {"features": {"subscription_update": update, "products": [number, {"prices": empty}]}}

    paid = invoice | {"amount_paid": 20}
    url = {"hosted_invoice_url": link}
    unlike: list[list[object]] = [[{}, None], [[], None], [url, None], [{}, url]]
    alike = [
        [event("evt_1", "invoice.payment_succeeded", paid, previous_attributes=each) for each in given]
        for given in unlike
    ]
    alike.append([
        event("evt_2", "billing_portal.configuration.updated", features(empty, number))
        for empty, number in (([], 1500), ({}, 1500.0))
    ])  # fmt: skip
    first = [
        event("evt_0", "invoice.finalized", invoice | {"status": "open", "amount_paid": 0}),
        event("evt_5", "invoice.paid", invoice | {"amount_paid": 10}),
    ]
    for copies in alike:
        ends = []
        for order in (copies, copies[::-1]):
            ledger.clear(engine)
            ledger.take_in(engine, *first, *order)
            ends.append((ledger.digest_of(engine), ledger.anomalies(engine)))
        assert len({contents.hash_of(each) for each in copies}) == 1
        assert ends[0] == ends[1]

    (row,) = ledger.rows(engine, "SELECT features FROM portal_configurations")
    update = {"enabled": True, "allowed_updates": [], "schedule_at_period_end": {}, "maximum": 1500}
    assert row["features"] == {"subscription_update": update, "products": [1500, {"prices": []}]}
