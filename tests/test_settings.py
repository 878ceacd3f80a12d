"""An invalid setting stops every process at start, with its name and without the secret."""

import dataclasses
import hashlib
import os
from pathlib import Path

import msgspec
import pytest
from typer.testing import CliRunner

from deploy.cli import app
from schemas import envfile
from schemas.errors import ConfigurationError
from schemas.settings import FILE_BYTES_MAX, Settings, SigningSecret
from tests.command import payfold, python

SHA256 = hashlib.sha256(b"token").hexdigest()

BAD_VALUES = [
    ("DATABASE_URL", "mysql://u:hunter2@host/db"),
    ("DATABASE_URL", "hunter2"),
    ("DATABASE_URL", "postgres:hunter2@host/db"),
    ("DATABASE_URL", "postgres://u:hunter2/x@host/db"),
    ("DATABASE_URL", "postgres://u:hunter2@host:port/db"),
    ("REDIS_URL", "http://:hunter2@host"),
    ("REDIS_URL", "redis://:hunter2@host:70000"),
    ("REDIS_URL", "redis://:hunter2@host/name"),
    ("REDIS_TLS_VERIFY", "perhaps"),
    ("PORT", "eight"),
    ("PORT", "0"),
    ("PORT", "65536"),
    ("WEB_CONCURRENCY", "0"),
    ("STRIPE_WEBHOOK_SECRETS", "hunter2"),
    ("STRIPE_WEBHOOK_SECRETS", "whsec_"),
    ("STRIPE_WEBHOOK_SECRETS", "whsec_a,hunter2"),
    ("STRIPE_WEBHOOK_SECRETS", "whsec_a whsec_hunter2"),
    ("STRIPE_WEBHOOK_SECRETS", "an account=whsec_hunter2"),
    ("STRIPE_WEBHOOK_SECRETS", "acct_1=hunter2"),
    ("STRIPE_WEBHOOK_SECRETS", "whsec_hünter2"),
    ("STRIPE_WEBHOOK_SECRETS", "whsec_a;whsec_hunter2"),
    ("STRIPE_WEBHOOK_SECRETS", "whsec_a;acct_1=whsec_hunter2"),
    ("STRIPE_WEBHOOK_SECRETS", "whsec_awhsec_hunter2"),
    ("STRIPE_WEBHOOK_SECRETS", "whsec_a|whsec_hunter2"),
    ("STRIPE_WEBHOOK_SECRETS", "whsec_a\nwhsec_hunter2"),
    ("STRIPE_WEBHOOK_SECRETS", 'whsec_hunter2"'),
    ("STRIPE_API_KEY", "hunter2"),
    ("STRIPE_API_KEY", "pk_test_hunter2"),
    ("STRIPE_API_KEY", "sk_test_hunter2 sk_live_b"),
    ("STRIPE_API_KEY", "an account=sk_test_hunter2"),
    ("STRIPE_API_KEY", "sk_test_a;sk_live_hunter2"),
    ("STRIPE_API_KEY", "sk_test_a;acct_1=sk_live_hunter2"),
    ("STRIPE_API_KEY", "sk_test_ask_live_hunter2"),
    ("STRIPE_API_KEY", "sk_test_a\nrk_live_hunter2"),
    ("STRIPE_API_KEY", "sk_test_a,rk_test_hunter2"),
    ("STRIPE_API_BASE", "api.stripe.com"),
    ("STRIPE_API_BASE", "https://u:hunter2@api.stripe.com"),
    ("PAYFOLD_STRIPE_CALLS_PER_SECOND", "0"),
    ("PAYFOLD_SESSION_TTL_MINUTES", "an hour"),
    ("PAYFOLD_SESSION_TTL_MINUTES", "0"),
    ("PAYFOLD_SESSION_TTL_MINUTES", "1441"),
    ("PAYFOLD_SESSION_TTL_MINUTES", "60,cart=5"),
    ("PAYFOLD_SESSION_TTL_MINUTES", "60,60"),
    ("PAYFOLD_OPEN_SESSION_LINES", "some"),
    ("PAYFOLD_TOKENS", "hunter2"),
    ("PAYFOLD_TOKENS", "shop:read:hunter2"),
    ("PAYFOLD_TOKENS", f"shop:write:{SHA256}"),
    ("PAYFOLD_TOKENS", f"a b:read:{SHA256}"),
    ("PAYFOLD_TOKENS", f"shop:read:{SHA256},shop:admin:{SHA256}"),
    ("PAYFOLD_TOKENS", f"shop:read:{SHA256};crm:admin:{SHA256}"),
    ("PAYFOLD_TOKENS", f"shop:read:{SHA256}\ncrm:admin:{SHA256}"),
    ("PAYFOLD_SESSION_TTL_MINUTES", "60;setup=off"),
    ("PAYFOLD_HOST", "two words"),
    ("PAYFOLD_LOG_FORMAT", "xml"),
    ("PAYFOLD_LOG_LEVEL", "loud"),
    ("PAYFOLD_SWEEP_SECONDS", "0"),
    ("PAYFOLD_SWEEP_SECONDS", "soon"),
]


def fault_of(**environment: str) -> str:
    """Return the message about an invalid environment."""
    with pytest.raises(ConfigurationError) as raised:
        Settings.load(environment)
    return str(raised.value)


@pytest.mark.parametrize(("name", "value"), BAD_VALUES)
def test_bad_value(name: str, value: str) -> None:
    """The message about a bad value has the variable's name and a valid example, and not the value."""
    message = fault_of(**{name: value})

    assert message.startswith(f"{name}: ")
    assert "hunter2" not in message
    assert SHA256 not in message
    _, _, example = message.partition(f". Example: {name}=")
    assert Settings.load({name: example})


def test_all_at_once() -> None:
    """All bad values are reported at once, a line each."""
    lines = fault_of(PORT="x", DATABASE_URL="x", PAYFOLD_LOG_LEVEL="x").splitlines()

    assert sorted(line.partition(":")[0] for line in lines) == ["DATABASE_URL", "PAYFOLD_LOG_LEVEL", "PORT"]


def test_secret_in_a_file(tmp_path: Path) -> None:
    """A setting may be in a file, with a line break at its end and an editor's byte order mark at its beginning."""
    (tmp_path / "secret").write_text("whsec_kept\n", encoding="utf-8-sig")

    settings = Settings.load({"STRIPE_WEBHOOK_SECRETS_FILE": str(tmp_path / "secret")})

    assert settings.signing_secrets == (SigningSecret("", b"whsec_kept"),)


def test_bad_secret_in_a_file(tmp_path: Path) -> None:
    """A bad value in a file is reported like a bad value of the variable."""
    (tmp_path / "secret").write_text("hunter2\n")

    message = fault_of(STRIPE_WEBHOOK_SECRETS_FILE=str(tmp_path / "secret"))

    assert message.startswith("STRIPE_WEBHOOK_SECRETS: ")
    assert "hunter2" not in message


@pytest.mark.parametrize("kind", ["missing", "folder", "bytes", "pipe", "device", "long"])
def test_unreadable_file(tmp_path: Path, kind: str) -> None:
    """An unreadable file is reported by the variable that names it."""
    path = tmp_path / "secret"
    if kind == "folder":
        path.mkdir()
    elif kind == "bytes":
        path.write_bytes(b"hunter2 \xff\xfe")
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path = Path("/dev/zero")
    elif kind == "long":
        path.write_text("hunter2" * FILE_BYTES_MAX)

    message = fault_of(DATABASE_URL_FILE=str(path))

    assert message.startswith("DATABASE_URL_FILE: the file that it names cannot be read: ")
    assert "Example: DATABASE_URL_FILE=/" in message
    assert "hunter2" not in message


def test_variable_before_file(tmp_path: Path) -> None:
    """A variable that is set beats its file, which is not opened."""
    assert Settings.load({"PORT": "81", "PORT_FILE": str(tmp_path / "missing")}).port == 81


def test_an_environment_that_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings from a given environment ignore this process's own environment, faults included."""
    monkeypatch.setenv("PORT", "81")
    monkeypatch.setenv("web_concurrency", "")
    monkeypatch.setenv("STRIPE_API_KEY", "sk_test_hunter2")

    settings = Settings.load({"PAYFOLD_LOG_LEVEL": "debug"})

    assert (settings.port, settings.web_concurrency, settings.api_keys) == (8000, 1, ())
    assert settings.payfold_log_level == "debug"


def test_empty_is_not_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An empty variable counts as not set, in a given environment and in this process's own."""
    monkeypatch.setenv("PAYFOLD_DATA_DIR", str(tmp_path))
    monkeypatch.setenv("PORT", "")

    assert Settings.load().port == 8000
    assert Settings.load({"DATABASE_URL": "", "PORT": "", "STRIPE_WEBHOOK_SECRETS": ""}) == Settings.load({})


def test_defaults() -> None:
    """Without an environment there is no server, no secret and no token, and the port is 8000."""
    settings = Settings.load({})

    assert (settings.database_url, settings.redis_url) == (None, None)
    assert (settings.signing_secrets, settings.tokens) == ((), ())
    assert (settings.port, settings.web_concurrency, settings.redis_tls_verify) == (8000, 1, True)


@pytest.mark.parametrize("scheme", ["postgres", "postgresql", "postgresql+psycopg"])
def test_spellings_of_postgresql(scheme: str) -> None:
    """Heroku's spelling of the database's URL is accepted."""
    settings = Settings.load({"DATABASE_URL": f"{scheme}://u:p@host:5432/name?sslmode=require"})

    assert settings.postgresql == "postgresql+psycopg://u:p@host:5432/name?sslmode=require"
    assert settings.libpq == "postgresql://u:p@host:5432/name?sslmode=require"


def test_labelled_secrets() -> None:
    """Signing secrets are tried in the order given, each with its account's label or none."""
    settings = Settings.load({"STRIPE_WEBHOOK_SECRETS": " whsec_a, acct_1=whsec_b,shop_2=whsec_c= ,"})

    secrets = [dataclasses.astuple(secret) for secret in settings.signing_secrets]
    assert secrets == [("", b"whsec_a"), ("acct_1", b"whsec_b"), ("shop_2", b"whsec_c=")]


def test_keys_serve_their_own_accounts() -> None:
    """A key's prefix gives its mode and its label the account; a key given twice also serves a connected account."""
    settings = Settings.load({"STRIPE_API_KEY": "rk_live_a, acct_1=sk_test_b , acct_9=sk_test_b,acct_1=sk_live_c"})

    assert [(key.account, key.livemode, key.secret, key.acts_for) for key in settings.api_keys] == [
        ("", True, "rk_live_a", None),
        ("acct_1", False, "sk_test_b", None),
        ("acct_9", False, "sk_test_b", "acct_9"),
        ("acct_1", True, "sk_live_c", None),
    ]


@pytest.mark.parametrize(
    ("text", "minutes"),
    [
        ("", {"payment": 60, "subscription": 60, "setup": 60, "link": None}),
        ("30", {"payment": 30, "subscription": 30, "setup": 30, "link": None}),
        ("off", {"payment": None, "subscription": None, "setup": None, "link": None}),
        ("90, setup=off, link=720", {"payment": 90, "subscription": 90, "setup": None, "link": 720}),
        ("subscription=1440", {"payment": 60, "subscription": 1440, "setup": 60, "link": None}),
    ],
)
def test_times_to_live(text: str, minutes: dict[str, int | None]) -> None:
    """One number holds for the shop's own sessions; named kinds may differ; payment links are off unless named."""
    assert Settings.load({"PAYFOLD_SESSION_TTL_MINUTES": text}).session_ttl_minutes == minutes


def test_the_budget_follows_the_mode() -> None:
    """Live mode allows more calls than test mode, unless one number is set for both."""
    usual, changed = Settings.load({}), Settings.load({"PAYFOLD_STRIPE_CALLS_PER_SECOND": "1000"})

    assert (usual.calls_per_second(livemode=True), usual.calls_per_second(livemode=False)) == (20, 5)
    assert (changed.calls_per_second(livemode=True), changed.calls_per_second(livemode=False)) == (1000, 1000)


def test_no_secret_in_a_representation() -> None:
    """The representation of settings shows no secret."""
    given = {"DATABASE_URL": "postgres://u:hunter2@h/d", "STRIPE_WEBHOOK_SECRETS": "whsec_hunter2"}
    settings = Settings.load({**given, "PAYFOLD_TOKENS": f"shop:read:{SHA256}"})

    printed = repr(settings) + repr(settings.signing_secrets) + repr(settings.tokens)
    assert "hunter2" not in printed
    assert SHA256 not in printed


@pytest.mark.parametrize("name", ["DATABASE_URL", "REDIS_URL"])
def test_missing_server(name: str) -> None:
    """The error for a missing server names its variable, with an example."""
    settings = Settings.load({})

    with pytest.raises(ConfigurationError, match=f"{name} is not set .*://.*@host"):
        _ = settings.postgresql if name == "DATABASE_URL" else settings.broker


@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        pytest.param("api", (), id="web"),
        pytest.param("worker", (), id="worker"),
        pytest.param("worker.clock", (), id="clock"),
        pytest.param("deploy", ("migrate", "up"), id="release"),
        pytest.param("deploy", ("config",), id="command"),
        pytest.param("deploy", ("up",), id="up"),
    ],
)
def test_process_stops(module: str, arguments: tuple[str, ...]) -> None:
    """With a bad value each process of the Procfile, and the command, exits 2 with one line on stderr."""
    servers = {"DATABASE_URL": "postgres://u:p@h/d", "REDIS_URL": "redis://h"}

    ran = python(module, *arguments, settings={**servers, "STRIPE_WEBHOOK_SECRETS": "hunter2"})

    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith("STRIPE_WEBHOOK_SECRETS: ")
    assert len(ran.err.splitlines()) == 1
    assert "hunter2" not in ran.err


@pytest.mark.parametrize("module", ["api", "worker", "worker.clock"])
def test_process_without_servers(module: str, tmp_path: Path) -> None:
    """A process without a server exits 2 and names the missing variable; an unknown name is reported one line before.

    It reads the .env file of its data folder, as every process does.
    """
    (tmp_path / ".env").write_text(f"{envfile.MARKER}\nPAYFOLD_TOKNS=hunter2\n")
    ran = python(module, settings={"PAYFOLD_DATA_DIR": str(tmp_path)})

    assert (ran.code, ran.out) == (2, "")
    line, missing = ran.err.splitlines()
    assert "_URL is not set" in missing
    logged = msgspec.json.decode(line)
    assert (logged["level"], logged["event"]) == ("error", "settings.unknown")
    assert logged["faults"] == ["PAYFOLD_TOKNS: there is no such setting; the nearest is PAYFOLD_TOKENS."]
    assert "hunter2" not in ran.err


def test_unknown_name_stops_a_new_token() -> None:
    """An unknown name stops the command that makes a token; a bad value does not, since a new token may repair it."""
    arguments = ["tokens", "new", "shop"]
    unknown = CliRunner().invoke(app, arguments, env={"PAYFOLD_TOKEN": "hunter2"})
    bad = CliRunner().invoke(app, arguments, env={"PAYFOLD_TOKENS": "hunter2"})

    assert str(unknown.exception) == "PAYFOLD_TOKEN: there is no such setting; the nearest is PAYFOLD_TOKENS."
    assert (bad.exit_code, "shop:read:" in bad.stdout) == (0, True)


def test_unknown_name_stops_the_release() -> None:
    """An unknown name stops the release phase, like every command, with the nearest known name."""
    ran = payfold("migrate", "up", DATABASE_URL="postgres://u:p@127.0.0.1:1/d", PAYFOLD_TOKNS="hunter2")

    assert (ran.code, ran.out) == (2, "")
    assert ran.err == "PAYFOLD_TOKNS: there is no such setting; the nearest is PAYFOLD_TOKENS.\n"


def test_config() -> None:
    """`config` shows each setting with its meaning and its source, and of a secret only that it is set."""
    ran = payfold(
        "config",
        "--format",
        "json",
        DATABASE_URL="postgres://u:hunter2@h/d",
        STRIPE_WEBHOOK_SECRETS="whsec_hunter2",
        PORT="81",
    )

    shown = {row["setting"]: row["value"] for row in ran.json}
    sources = {row["setting"]: row["source"] for row in ran.json}
    assert (ran.code, ran.err) == (0, "")
    assert "hunter2" not in ran.out
    assert list(shown) == [name.upper() for name in Settings.model_fields]
    assert (shown["DATABASE_URL"], shown["REDIS_URL"], shown["PORT"]) == ("set, hidden", "not set", "81")
    assert (sources["DATABASE_URL"], sources["REDIS_URL"], sources["PORT"]) == ("environment", "default", "environment")
    assert all(row["meaning"] for row in ran.json)
