"""Each command prints data to stdout in the requested form and messages to stderr, and has a defined exit code."""

import fcntl
import hashlib
import http.server
import io
import os
import signal
import struct
import subprocess
import sys
import termios
import threading
import tomllib
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec
import pytest
from sqlalchemy import Engine, text

from deploy import output
from deploy.output import Format, money, shown
from deploy.sandbox.account import Account
from deploy.sandbox.samples import _STORIES, sample
from deploy.sandbox.signing import signature
from schemas import database
from schemas.settings import Scope, Settings
from schemas.version import version
from tests import ledger
from tests.command import ROOT, Ran, environment, payfold
from tests.waiting import until
from tests.web import event

SECRET = "whsec_of_the_tests"
EVENTS = 300


def taken(engine: Engine, *bodies: bytes) -> None:
    """Record and fold deliveries."""
    for body in bodies:
        ledger.record(engine, [ledger.delivery(body)])
    ledger.fold(engine)


@pytest.fixture
def order(engine: Engine) -> str:
    """Return the id of a paid order of 20.00 USD, presented in kronor, with control characters in its metadata."""
    account = Account(seed=1)
    account.open_session(amount=2_000, presentment=("sek", 22_000), metadata={"note": "[red]:smile: \x1b[2Jé"})
    (session,) = account.session_ids()
    account.complete(session)
    taken(engine, account.events[-1].body)
    return session


def in_another_zone(engine: Engine) -> None:
    """Configure the database to print times in the zone of Kathmandu."""
    with database.transaction(engine) as connection:
        name = connection.execute(text("SELECT current_database()")).scalar_one()
        connection.execute(text(f"ALTER DATABASE {name} SET timezone = 'Asia/Kathmandu'"))


# ---- The command itself ----


def test_version(tmp_path: Path) -> None:
    """The version is that of the running checkout, or of the installed package if there is no checkout."""
    here = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "another"\nversion = "7.0"\n')

    ran = payfold("--version")

    assert (ran.code, ran.out, ran.err) == (0, f"payfold {here}\n", "")
    assert version(tmp_path) == metadata.version("payfold")


@pytest.mark.parametrize(("typed", "found"), [("payfold ev", ["events"]), ("payfold events arch", ["archive"])])
def test_completion(typed: str, found: list[str]) -> None:
    """A shell with the installed completion gets the commands that begin with the typed text."""
    count = str(len(typed.split()) - 1)

    ran = payfold(_PAYFOLD_COMPLETE="complete_bash", COMP_WORDS=typed, COMP_CWORD=count)

    assert ran.out.split() == found


# ---- orders show ----


def test_order(engine: Engine, database_url: str, order: str) -> None:
    """`orders show` prints money as people write it, and times in UTC, in any time zone of PostgreSQL."""
    in_another_zone(engine)

    ran = payfold("orders", "show", order, DATABASE_URL=database_url)

    printed = {line.split()[0]: line.partition(" ")[2].strip() for line in ran.out.splitlines()}
    paid = datetime.fromtimestamp(Account(seed=1).now, UTC)
    assert (ran.code, ran.err) == (0, "")
    assert (printed["id"], printed["status"], printed["amount_total"]) == (order, "paid", "20.00 USD")
    assert printed["presentment_amount"] == "220.00 SEK"
    assert printed["paid_at"] == f"{paid:%Y-%m-%d %H:%M:%S}"
    assert printed["livemode"] == "no"
    assert printed["failed_at"] == "-"


def test_order_is_shown_as_it_is(database_url: str, order: str) -> None:
    """Text from a buyer or a shop is not interpreted as markup or emoji, and sends no control characters."""
    ran = payfold("orders", "show", order, DATABASE_URL=database_url)

    (line,) = (line for line in ran.out.splitlines() if line.startswith("metadata"))
    assert "[red]:smile: " in line
    assert "é" in line
    assert "\x1b" not in ran.out


@pytest.mark.parametrize("form", ["json", "ndjson"])
def test_order_as_json(engine: Engine, database_url: str, order: str, form: str) -> None:
    """As JSON, an order is one object in one line, with money in minor units and times in UTC."""
    in_another_zone(engine)

    ran = payfold("orders", "show", order, "--format", form, DATABASE_URL=database_url)

    assert ran.out.count("\n") == 1
    assert (ran.json["id"], ran.json["amount_total"], ran.json["currency"]) == (order, 2_000, "usd")
    assert ran.json["paid_at"].endswith(("Z", "+00:00"))
    assert ran.json["metadata"]["note"] == "[red]:smile: \x1b[2Jé"


def test_no_such_order(database_url: str) -> None:
    """An unknown order is reported with exit 1."""
    ran = payfold("orders", "show", "cs_none", DATABASE_URL=database_url)

    assert (ran.code, ran.out, ran.err) == (1, "", "There is no cs_none here.\n")


def test_order_of_two_accounts(engine: Engine, database_url: str, order: str) -> None:
    """An id that several accounts have is shown only if the account is given."""
    account = Account(seed=1)
    account.complete(account.open_session())
    ledger.record(engine, [ledger.delivery(account.events[-1].body, account="acct_1")])
    ledger.fold(engine)

    ambiguous = payfold("orders", "show", order, DATABASE_URL=database_url)
    named = payfold("orders", "show", order, "--account", "", "--test", "--format=json", DATABASE_URL=database_url)

    assert (ambiguous.code, ambiguous.out) == (1, "")
    assert "--account" in ambiguous.err
    assert (named.code, named.json["account"]) == (0, "")


# ---- events list and show ----


@pytest.fixture
def events(engine: Engine) -> Account:
    """Return an account with three events and a parked one in the inbox, in a database of another time zone."""
    account = Account(seed=4)
    link = account.create_payment_link()
    account.complete(account.open_session(payment_link=link))
    account.emit("topup.created", {"object": "topup", "id": "tu_1"})
    account.emit("payment_link.updated", account.payment_link(link) | {"active": "[/] maybe"})
    taken(engine, *(event.body for event in account.events))
    in_another_zone(engine)
    return account


def test_list(events: Account, database_url: str) -> None:
    """`events list` prints a line for each event, last recorded first, never broken without a terminal."""
    ran = payfold("events", "list", DATABASE_URL=database_url)

    heads, *lines = ran.out.splitlines()
    assert heads.split() == ["seq", "id", "type", "object_id", "created", "state", "cause", "reason"]
    assert [line.split()[1] for line in lines] == [event.id for event in reversed(events.events)]
    assert "no fold wants the type topup.created" in lines[1]
    created = datetime.fromtimestamp(events.events[0].created, UTC)
    assert f"{created:%Y-%m-%d %H:%M:%S}" in lines[-1]


@pytest.mark.parametrize("form", ["json", "ndjson"])
def test_list_as_json(events: Account, database_url: str, form: str) -> None:
    """As JSON, events have account, mode and source; NDJSON has one object a line."""
    ran = payfold("events", "list", "--format", form, "--limit", "2", DATABASE_URL=database_url)

    rows = ran.json if form == "json" else [msgspec.json.decode(line) for line in ran.out.splitlines()]
    assert [row["id"] for row in rows] == [event.id for event in events.events[:-3:-1]]
    assert [row["state"] for row in rows] == ["parked", "ignored"]
    assert datetime.fromisoformat(rows[0]["created"]) == datetime.fromtimestamp(events.events[-1].created, UTC)
    assert datetime.fromisoformat(rows[0]["created"]).utcoffset() == timedelta(0)
    assert (rows[0]["account"], rows[0]["livemode"], rows[0]["source"]) == ("", False, "webhook")


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        (("--state", "folded", "--account", ""), {0, 1}),
        (("--type", "topup.created", "--object", "tu_1", "--test"), {2}),
        (("--live",), set()),
    ],
    ids=str,
)
def test_list_of_some(events: Account, database_url: str, options: tuple[str, ...], wanted: set[int]) -> None:
    """Events are listed by state, type, object, account and mode."""
    ran = payfold("events", "list", *options, "--format", "json", DATABASE_URL=database_url)

    assert {row["id"] for row in ran.json} == {events.events[number].id for number in wanted}


def test_list_of_none(database_url: str) -> None:
    """Without any matching event, stdout is empty and stderr has a message."""
    ran = payfold("events", "list", DATABASE_URL=database_url)

    assert (ran.code, ran.out, ran.err) == (0, "", "No such event.\n")


@pytest.mark.parametrize(
    ("options", "word"),
    [(("--state", "lost"), "pending, folded, ignored, parked"), (("--limit", "0"), "limit"), (("--colour",), "colour")],
)
def test_list_refuses(database_url: str, options: tuple[str, ...], word: str) -> None:
    """An invalid option is reported with exit 2."""
    ran = payfold("events", "list", *options, DATABASE_URL=database_url)

    assert (ran.code, ran.out) == (2, "")
    assert word in ran.err


def test_show(events: Account, database_url: str) -> None:
    """`events show` shows an event with its payload as delivered."""
    event = events.events[-1]

    table = payfold("events", "show", event.id, DATABASE_URL=database_url)
    row = payfold("events", "show", event.id, "--format", "json", DATABASE_URL=database_url)

    assert (table.code, table.err, row.code, row.err) == (0, "", 0, "")
    assert '"active": "[/] maybe"' in table.out
    assert row.json["payload"] == event.body.decode()
    assert row.json["payload_sha256"] == hashlib.sha256(event.body).hexdigest()
    assert (row.json["state"], row.json["attempts"]) == ("parked", 1)


@pytest.mark.parametrize(
    ("event_id", "line"),
    [
        ("evt/../a?b#c%2F", "evt/../a?b#c%2F"),
        ("-1", "-1"),
        ("--yes", "--yes"),
        ("evt a  b", "evt a  b"),
        ("evt\x1b[2J\u202e\nevt_2", "evt\\x1b[2J\\u202e\\nevt_2"),
        ("[red]:smile:", "[red]:smile:"),
    ],
)
def test_an_odd_id(engine: Engine, database_url: str, event_id: str, line: str) -> None:
    """An event with any id can be listed, shown and ignored; control characters in it are printed as escapes."""
    link = {"id": "plink_1", "object": "payment_link", "active": "maybe"}
    event = {"id": event_id, "type": "payment_link.updated", "created": 1_800_000_000, "data": {"object": link}}
    taken(engine, msgspec.json.encode({**event, "object": "event", "livemode": False}))

    listed, as_json, ignored = (
        payfold("events", *arguments, DATABASE_URL=database_url)
        for arguments in (("list",), ("show", "--format", "json", "--", event_id), ("ignore", "--", event_id))
    )

    assert (listed.code, as_json.code, ignored.code) == (0, 0, 0)
    assert len(listed.out.splitlines()) == 2
    assert f" {line} " in listed.out
    assert (as_json.json["id"], as_json.json["state"]) == (event_id, "parked")
    assert ignored.err.startswith(f"{line} is ignored")


def test_closed_pipe(events: Account, database_url: str) -> None:
    """A reader that closes the pipe, as `head` does, causes no traceback."""
    command = [sys.executable, "-m", "deploy", "events", "export"]
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        command, stdout=write, stderr=subprocess.PIPE, env=environment({"DATABASE_URL": database_url}), check=False
    )
    os.close(write)

    assert b"Traceback" not in done.stderr


def state_of(process: subprocess.Popen[bytes]) -> str:
    """Return the letter of Linux for the state of *process*, as S while it sleeps, and T while it is stopped."""
    return Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0]


def is_blocked(process: subprocess.Popen[bytes]) -> bool:
    """Return whether *process* sleeps, and the pipe that it prints to is more than half full."""
    assert process.stdout is not None
    (held,) = struct.unpack("i", fcntl.ioctl(process.stdout, termios.FIONREAD, bytes(4)))
    return held > fcntl.fcntl(process.stdout, fcntl.F_GETPIPE_SZ) // 2 and state_of(process) == "S"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    "options", [("events", "export", "--plain"), ("events", "list", "--limit", str(EVENTS), "--format", "json")]
)
def test_a_long_text_is_printed_whole(
    engine: Engine, database_url: str, options: tuple[str, ...], unbuffered: str
) -> None:
    """A command that was stopped while it printed goes on with the next byte, also where Python is not to buffer."""
    # A pipe takes a part only of what is longer than a page.
    ledger.record(engine, [ledger.delivery(event(number, note="x" * 10_000)) for number in range(EVENTS)])
    command = [sys.executable, "-m", "deploy", *options]
    settings = environment({"DATABASE_URL": database_url, "PYTHONUNBUFFERED": unbuffered})
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=settings) as process:
        assert process.stdout is not None
        until(lambda: is_blocked(process))
        # Of what it was to write, the pipe took a part.
        process.send_signal(signal.SIGSTOP)
        until(lambda: state_of(process) == "T")
        process.send_signal(signal.SIGCONT)
        out = process.stdout.read()

    assert process.returncode == 0
    rows = [msgspec.json.decode(line) for line in out.splitlines()]
    assert len(rows if len(rows) > 1 else rows[0]) == EVENTS


# ---- status ----


def test_status(events: Account, database_url: str, redis_url: str) -> None:
    """`status` counts pending and parked events and shows the broker's state; without processes none is missing."""
    ran = payfold("status", "--format", "json", DATABASE_URL=database_url, REDIS_URL=redis_url)

    assert ran.code == 0
    assert (ran.json["database"], ran.json["migrations"], ran.json["silent"]) == ("ok", [], [])
    assert (ran.json["pending"], ran.json["parked"], ran.json["to_fold_anew"]) == (0, 1, 0)
    assert ran.json["parked_by_cause"] == [{"cause": "payload_unreadable", "count": 1}]
    assert ran.json["broker"] == {"state": "ok", "fold_waiting": 0, "stripe_waiting": 0}


@pytest.mark.parametrize("url", [None, "redis://127.0.0.1:1"])
def test_status_without_broker(database_url: str, url: str | None) -> None:
    """An unreachable broker is reported and is no failure, since recorded events wait."""
    given = {"DATABASE_URL": database_url} | ({"REDIS_URL": url} if url else {})
    ran = payfold("status", "--format", "json", **given)  # type: ignore[arg-type]  # settings only

    assert ran.code == 0
    assert ran.json["broker"] == {
        "state": "away" if url else "unset",
        "fold_waiting": None,
        "stripe_waiting": None,
    }


def test_status_without_database() -> None:
    """An unreachable database is reported without its password, with exit 1."""
    ran = payfold("status", DATABASE_URL="postgres://u:hunter2@127.0.0.1:1/d")

    assert ran.code == 1
    assert ran.out.split() == ["services", "database", "away", "broker", "unset:", "REDIS_URL"]
    assert ran.err.startswith("PostgreSQL does not answer, so check DATABASE_URL: ")
    assert "hunter2" not in ran.out + ran.err


@pytest.mark.parametrize("arguments", [("digest",), ("replay", "-")])
def test_no_database(arguments: tuple[str, ...]) -> None:
    """A command that needs a database reports that none is configured (exit 2) or that it does not answer (exit 1)."""
    unnamed, away = payfold(*arguments), payfold(*arguments, DATABASE_URL="postgres://u:hunter2@127.0.0.1:1/d")

    assert (unnamed.code, away.code, unnamed.out, away.out) == (2, 1, "", "")
    assert unnamed.err.startswith("DATABASE_URL is not set")
    assert away.err.startswith("PostgreSQL does not answer, so check DATABASE_URL: ")
    assert "hunter2" not in away.err
    assert "Traceback" not in unnamed.err + away.err


def test_not_allowed(engine: Engine, database_url: str) -> None:
    """A refusal by PostgreSQL is reported in PostgreSQL's words, in one line."""
    with database.transaction(engine) as connection:
        connection.execute(text("DROP TABLE orders CASCADE"))

    ran = payfold("orders", "show", "cs_1", DATABASE_URL=database_url)

    assert (ran.code, ran.out) == (1, "")
    assert ran.err == 'PostgreSQL refused this: relation "orders" does not exist\n'


# ---- tokens new ----


@pytest.mark.parametrize(
    ("options", "scopes"),
    [
        ((), {"read"}),
        (("--scope", "read+personal"), {"read", "personal"}),
        (("--scope", "personal", "--scope", "admin"), {"read", "register", "admin", "personal"}),
    ],
)
def test_token(options: tuple[str, ...], scopes: set[Scope]) -> None:
    """The printed entry of a new token is valid in the settings, and holds only the token's hash."""
    ran = payfold("tokens", "new", "shop", *options)

    printed = dict(line.split(maxsplit=1) for line in ran.out.splitlines())
    (token,) = Settings.load({"PAYFOLD_TOKENS": printed["PAYFOLD_TOKENS"]}).tokens
    assert (ran.code, ran.err) == (0, "")
    assert (token.name, set(token.scopes)) == ("shop", scopes)
    assert token.sha256 == hashlib.sha256(printed["token"].encode()).hexdigest()
    assert printed["token"] not in printed["PAYFOLD_TOKENS"]


def test_a_token_that_opens_nothing() -> None:
    """The scope personal alone opens no route, and a warning is printed for such a token."""
    ran = payfold("tokens", "new", "shop", "--scope", "personal")

    assert (ran.code, "read+personal" in ran.err) == (0, True)
    assert ":personal:" in ran.out


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("a b",), "NAME"),
        (("shop", "--scope", "write"), "--scope write"),
        (("shop", "--scope", "read,personal"), "read+personal"),
    ],
)
def test_no_such_token(arguments: tuple[str, ...], word: str) -> None:
    """An invalid name or scope is reported by its own name with exit 2."""
    ran = payfold("tokens", "new", *arguments)

    assert (ran.code, ran.out) == (2, "")
    assert word in ran.err


# ---- emit ----


class Endpoint(http.server.BaseHTTPRequestHandler):
    """An endpoint that keeps each post and answers with a configured status."""

    server: "EndpointServer"

    def do_POST(self) -> None:  # noqa: D102 - documented by the library
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.taken.append((body, self.headers["Stripe-Signature"]))
        self.send_response(self.server.status)
        self.end_headers()
        self.wfile.write(b"the endpoint's own words")

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002, D102 - as above
        pass


class EndpointServer(http.server.ThreadingHTTPServer):
    """The server of an endpoint: its port, and the posts so far."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Endpoint)
        self.taken: list[tuple[bytes, str]] = []
        self.status = 200


@pytest.fixture
def endpoint() -> Iterator[EndpointServer]:
    """Return an endpoint that accepts every post."""
    with EndpointServer() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def emit(endpoint: EndpointServer, kind: str, *options: str) -> tuple[Ran, dict[str, Any]]:
    """Emit to *endpoint* and return the command's result and the posted body."""
    url = f"http://127.0.0.1:{endpoint.server_port}/"
    ran = payfold("emit", kind, "--to", url, *options, STRIPE_WEBHOOK_SECRETS=f"{SECRET},whsec_other")
    return ran, msgspec.json.decode(endpoint.taken[-1][0])


@pytest.mark.parametrize("kind", _STORIES)
def test_sample(kind: str) -> None:
    """The sandbox has a sample of every type that it lists."""
    assert sample(kind, {}, now=1_800_000_000).type == kind


@pytest.mark.parametrize("kind", ["checkout.session.completed", "payment_link.updated"])
def test_emit(endpoint: EndpointServer, kind: str) -> None:
    """A sample is sent as Stripe would send it, signed with the first secret."""
    ran, event = emit(endpoint, kind)

    body, header = endpoint.taken[-1]
    moment, mac = (part.partition("=")[2] for part in header.split(","))
    assert (ran.code, ran.err) == (0, "")
    assert (event["type"], event["object"]) == (kind, "event")
    assert event["id"] in ran.out
    assert mac == signature(body, SECRET, int(moment))
    assert SECRET not in ran.out


def test_emit_with_overrides(endpoint: EndpointServer) -> None:
    """An override sets a key of the object by its path, to a JSON value if it is JSON, else to a text."""
    overrides = ("amount_total=500", "metadata.cart=a b", "customer=null", 'payment_intent="pi_1"', "total_details={}")
    _, event = emit(
        endpoint, "checkout.session.completed", *(word for each in overrides for word in ("--override", each))
    )

    about = event["data"]["object"]
    assert (about["amount_total"], about["metadata"], about["customer"]) == (500, {"cart": "a b"}, None)
    assert (about["payment_intent"], about["total_details"]) == ("pi_1", {})


def test_emit_refused(endpoint: EndpointServer) -> None:
    """A refusal by the endpoint is reported with its status and its text, and exit 1."""
    endpoint.status = 400

    ran, _ = emit(endpoint, "payment_link.created")

    assert ran.code == 1
    assert "400" in ran.out
    assert "the endpoint's own words" in ran.err


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("nothing.at_all",), 2, "knows no type nothing.at_all, but "),
        (("payment_link.created", "--override", "active"), 2, "KEY=VALUE"),
        (("payment_link.created", "--override", "=1"), 2, "KEY=VALUE"),
        (("payment_link.created", "--override", "url.x=1"), 2, "url of url.x is no object"),
        (("payment_link.created", "--to", "http://127.0.0.1:1/"), 1, "does not answer"),
        (("payment_link.created", "--to", "ftp://host/"), 2, "--to"),
        (("payment_link.created", "--to", "somewhere"), 2, "--to"),
        (("payment_link.created", "--to", "http://[::/"), 2, "--to"),
    ],
)
def test_emit_refuses(arguments: tuple[str, ...], code: int, words: str) -> None:
    """An event that cannot be sent is reported in one line, with a valid choice."""
    ran = payfold("emit", *arguments, STRIPE_WEBHOOK_SECRETS=SECRET)

    assert (ran.code, ran.out) == (code, "")
    assert words in ran.err
    assert len(ran.err.splitlines()) == 1


def test_emit_unsigned() -> None:
    """Without a secret `emit` fails and names the setting."""
    ran = payfold("emit", "payment_link.created")

    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith("STRIPE_WEBHOOK_SECRETS: ")


# ---- Forms of values ----


@pytest.mark.parametrize(
    ("amount", "currency", "written"),
    [
        (2_000, "usd", "20.00 USD"),
        (-5, "eur", "-0.05 EUR"),
        (0, "usd", "0.00 USD"),
        (84_000, "krw", "84,000 KRW"),
        (6_150, "kwd", "6.150 KWD"),
        (2**63 - 1, "usd", "92,233,720,368,547,758.07 USD"),
    ],
)
def test_money(amount: int, currency: str, written: str) -> None:
    """Money is written with as many decimals as its currency has, to the last unit."""
    assert money(amount, currency) == written


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (None, "-"),
        (True, "yes"),
        (7, "7"),
        ({"a": [1]}, '{"a":[1]}'),
        (datetime.fromisoformat("2026-01-31T12:00:00+05:45"), "2026-01-31 06:15:00"),
        ("a\x1b[2J\x07b\nc", "a\\x1b[2J\\x07b\nc"),
    ],
)
def test_shown(value: object, written: str) -> None:
    """A value of any content is printed on one line, in one form."""
    assert shown(value) == written


LONG = "cs_live_" + "a1" * 29


@pytest.mark.parametrize("width", [20, 40, 80, 200])
@pytest.mark.parametrize("is_terminal", [True, False])
def test_an_id_is_never_broken(width: int, is_terminal: bool) -> None:  # noqa: FBT001 - a parameter
    """No value is broken: on a narrow terminal, and only there, a row is printed as one line for each value."""
    file = io.StringIO()
    to = output._console(file=file, width=width, force_terminal=is_terminal, color_system=None)
    found = [{"seq": seq, "id": f"{LONG}{seq}", "reason": reason} for seq, reason in ((1, None), (22, "a b \u4f60 c"))]
    output.rows(found, ("seq", "id", "reason"), Format.TABLE, empty="", to=to)

    lines = file.getvalue().splitlines()
    if is_terminal and width < 90:
        assert lines == [
            "seq     1",
            f"id      {LONG}1",
            "reason  -",
            "",
            "seq     22",
            f"id      {LONG}22",
            "reason  a b \u4f60 c",
        ]
    else:
        assert [line.split() for line in lines] == [
            ["seq", "id", "reason"],
            ["1", f"{LONG}1", "-"],
            ["22", f"{LONG}22", "a", "b", "\u4f60", "c"],
        ]


def test_no_command_makes_a_table_of_its_own() -> None:
    """Only `output` makes tables, so that the properties of its tables hold for every command."""
    commands = [*(ROOT / "deploy" / "commands").glob("*.py"), ROOT / "deploy" / "cli.py"]

    assert not [path.name for path in commands if "rich.table" in path.read_text()]


def test_every_command_has_help() -> None:
    """Each command and each of its options has a help text."""
    from typer.main import get_command  # noqa: PLC0415

    from deploy.cli import app  # noqa: PLC0415

    def silent(command: Any, name: str) -> list[str]:  # noqa: ANN401 - of an untyped tree
        found = [] if command.help else [name]
        found += [
            f"{name} {option.name}"
            for option in command.params
            if option.param_type_name == "option" and not option.help
        ]
        return found + [one for key, each in getattr(command, "commands", {}).items() for one in silent(each, key)]

    assert silent(get_command(app), "payfold") == []
    assert output.Format("json") is output.Format.JSON
