"""`init` and `endpoints` bring Stripe and Payfold together, with exactly the event types that the folds read."""

import os
import re
import resource
import shutil
import subprocess
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import typer
from stripe.params import WebhookEndpointCreateParams

from deploy import endpoints
from deploy.commands import init as command
from deploy.commands.endpoints import endpoints_create
from deploy.sandbox.account import Account
from deploy.sandbox.http_api import StripeApi as SandboxApi
from deploy.sandbox.server import Fault, Faults, serving
from schemas import envfile
from schemas.errors import ConfigurationError, ConflictError, KeyRefused, StripeAway
from schemas.observations import World
from schemas.settings import Settings
from tests.command import payfold, python
from worker.folds import API_VERSION, FOLDS, STRIPE_TYPES

KEY, LIVE_KEY = "sk_test_hunter2", "sk_live_hunter2"
URL = "https://shop.example.com/webhooks/stripe"
HERE = World("", livemode=False)


@dataclass(frozen=True)
class Stripe:
    """A sandbox Stripe on a port, with an account in test mode and one in live mode."""

    account: Account
    live: Account
    faults: Faults
    environment: dict[str, str]

    @property
    def settings(self) -> Settings:
        """The settings of this Stripe."""
        return Settings.load(self.environment)

    def listed(self, url: str | None = URL) -> list[endpoints.Endpoint]:
        """Return the endpoints in test mode as `endpoints check` finds them."""
        return endpoints.listed(endpoints.opened(self.settings), HERE, url=url)

    def advice(self) -> str:
        """Return the findings of `endpoints check` about them."""
        return "\n".join(endpoints.advice(self.listed()))


@pytest.fixture
def stripe() -> Iterator[Stripe]:
    """Return a Stripe without endpoints."""
    account, live, faults = Account(seed=1), Account(seed=2, livemode=True), Faults()
    with serving(SandboxApi({KEY: account, LIVE_KEY: live}), faults) as address:
        yield Stripe(account, live, faults, {"STRIPE_API_KEY": KEY, "STRIPE_API_BASE": address})


# ---- The event types ----


def test_event_types() -> None:
    """The list has every event type of Stripe's that a fold reads, once, and no type that an endpoint cannot choose."""
    assert set(STRIPE_TYPES) <= literals(WebhookEndpointCreateParams.__annotations__["enabled_events"])
    assert [kind for kind in FOLDS if kind not in STRIPE_TYPES and not kind.startswith("payfold.")] == []
    assert len(set(STRIPE_TYPES)) == len(STRIPE_TYPES)
    assert "checkout.session.completed" in STRIPE_TYPES
    assert API_VERSION in literals(WebhookEndpointCreateParams.__annotations__["api_version"])


def literals(annotation: object) -> set[object]:
    """Return the values that the SDK's own type of a parameter allows."""
    inner = typing.get_args(annotation)
    return set(inner) if typing.get_origin(annotation) is typing.Literal else literals(inner[0])


# ---- init ----


Init = Callable[..., str]


@pytest.fixture
def init(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Init:
    """Return a function that runs `init` with these settings and returns its output."""

    def run(**settings: str) -> str:
        for name, value in settings.items():
            monkeypatch.setenv(name, value)
        command.init()
        printed = capsys.readouterr()
        assert printed.err == ""
        return printed.out

    return run


def test_init(tmp_path: Path, init: Init) -> None:
    """`init` writes a private file that sets nothing yet; a second run does not change settings made since."""
    at, path = {"PAYFOLD_DATA_DIR": str(tmp_path / "data")}, tmp_path / "data" / ".env"

    first = init(**at)

    assert f"Wrote {path}, which only this user can read." in first
    assert path.stat().st_mode & 0o777 == 0o600
    assert [each.name for each in path.parent.iterdir()] == [".env"]
    assert envfile.completed(at) == at
    assert re.findall(r"^  ([a-z_.]+)$", first, re.MULTILINE) == list(STRIPE_TYPES)
    assert "  stripe listen --print-secret\n" in first
    listen = f"stripe listen --events {','.join(STRIPE_TYPES)} --forward-to http://127.0.0.1:8000/webhooks/stripe\n"
    assert listen in first

    text = path.read_text().replace("\nSTRIPE_WEBHOOK_SECRETS=\n", "\nSTRIPE_WEBHOOK_SECRETS=whsec_hunter2\n")
    path.write_text(text)
    again = init(**at)

    assert f"{path} is there already and stays as it is." in again
    assert path.read_text() == text
    assert "hunter2" not in again


def test_a_full_disk(tmp_path: Path, init: Init) -> None:
    """If the file cannot be written completely, no part of it is left."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(ConfigurationError, match="it cannot be written: File too large"):
            init(PAYFOLD_DATA_DIR=str(tmp_path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    assert list(tmp_path.iterdir()) == []
    assert f"Wrote {tmp_path / '.env'}" in init(PAYFOLD_DATA_DIR=str(tmp_path))


def test_every_example_in_the_file(tmp_path: Path, init: Init) -> None:
    """The file has every setting but its own folder's, and each example is a valid value."""
    at, path = {"PAYFOLD_DATA_DIR": str(tmp_path)}, tmp_path / ".env"
    init(**at)
    only_comments = re.sub(r"^[A-Z_]+=\n", "", path.read_text(), flags=re.MULTILINE)
    path.write_text(re.sub(r"^#([A-Z_]+=)", r"\1", only_comments, flags=re.MULTILINE))

    settings = Settings.load(envfile.completed(at))

    assert {*envfile.read(at), "PAYFOLD_DATA_DIR"} == {name.upper() for name in Settings.model_fields}
    assert settings.payfold_reconcile_at == "03:30"


def test_init_elsewhere(tmp_path: Path, init: Init) -> None:
    """--env-file names the file for `init` and for every reader; a file of another program is not changed."""
    path = tmp_path / "payfold.env"

    init(PAYFOLD_ENV_FILE=str(path))
    path.write_text(path.read_text() + "PORT=81\n")
    shown = payfold("--env-file", str(path), "config", "--format", "json")
    path.write_text("PORT=81\n")
    refused = payfold("--env-file", str(path), "init")

    sources = {row["setting"]: (row["value"], row["source"]) for row in shown.json}
    assert sources["PORT"] == ("81", str(path))
    assert sources["WEB_CONCURRENCY"] == ("1", "default")
    assert (refused.code, refused.out) == (2, "")
    assert "did not begin this file, so it is neither read nor changed" in refused.err
    assert path.read_text() == "PORT=81\n"


@pytest.mark.skipif(shutil.which("curl") is None, reason="runs curl")
def test_the_call_that_init_prints(stripe: Stripe, tmp_path: Path, init: Init) -> None:
    """The printed call creates an endpoint with exactly our event types, and `check` finds no fault."""
    printed = init(PAYFOLD_DATA_DIR=str(tmp_path), STRIPE_API_BASE=stripe.environment["STRIPE_API_BASE"])
    assert "STRIPE_API_KEY in the shell is one key by itself, without a label and without others." in printed
    call = printed[printed.index("  curl ") :].replace("https://your-host/webhooks/stripe", URL)

    subprocess.run(
        ["/bin/sh", "-c", call],
        env={"STRIPE_API_KEY": KEY, "PATH": os.environ["PATH"]},
        check=True,
        capture_output=True,
    )

    (found,) = stripe.listed()
    assert (found.serves, found.superfluous, found.api_version) == (True, (), API_VERSION)
    assert stripe.advice() == ""


# ---- endpoints ----


def test_create(stripe: Stripe) -> None:
    """`create` prints the secret in one line and stores it nowhere; `check` then finds no fault."""
    made = python("deploy", "endpoints", "create", "--url", URL, "--yes", settings=stripe.environment)
    checked = python("deploy", "endpoints", "check", "--format", "json", settings=stripe.environment)

    assert made.code == 0
    assert re.fullmatch(r"STRIPE_WEBHOOK_SECRETS=whsec_\w{32}\n", made.out)
    assert "whsec_" not in made.err
    assert Settings.load(dict([made.out.strip().split("=", 1)])).signing_secrets[0].account == ""
    (found,) = checked.json
    assert (checked.code, checked.err) == (0, "")
    assert (found["url"], found["missing"], found["superfluous"]) == (URL, [], [])
    assert "hunter2" not in made.err + made.out + checked.out


def test_create_for_a_label(stripe: Stripe) -> None:
    """The secret has the label of its key, so that events are recorded under the same account as before."""
    settings = Settings.load(stripe.environment | {"STRIPE_API_KEY": f"acct_1={KEY}"})

    made = endpoints.create(endpoints.opened(settings), World("acct_1", livemode=False), URL)

    assert made.entry == f"acct_1={made.secret}"
    assert made.secret not in repr(made)


def test_create_twice(stripe: Stripe) -> None:
    """An existing endpoint is reported, and no second one is created."""
    api = endpoints.opened(stripe.settings)
    made = endpoints.create(api, HERE, URL)

    with pytest.raises(ConflictError, match=f"{made.id} is there for {URL}"):
        endpoints.create(api, HERE, f"{URL}/")

    assert len(stripe.listed()) == 1


@pytest.mark.parametrize(
    ("fault", "error", "words"),
    [
        (Fault.DECLINED, ConflictError, "wants an https address"),
        (Fault.FAILED_AFTER, StripeAway, "Whether the endpoint was made is not known"),
        (Fault.RATE_LIMITED, StripeAway, "not known"),
    ],
)
def test_create_fails(stripe: Stripe, fault: Fault, error: type[Exception], words: str) -> None:
    """A refusal by Stripe, or a missing answer, is an error with a remedy."""
    stripe.faults.add(fault, "/v1/webhook_endpoints", method="POST", times=3)

    with pytest.raises(error, match=words):
        endpoints.create(endpoints.opened(stripe.settings), HERE, URL)


def test_a_key_that_is_refused(stripe: Stripe) -> None:
    """The error about a refused key does not contain the key."""
    settings = Settings.load(stripe.environment | {"STRIPE_API_KEY": "sk_test_other"})

    with pytest.raises(KeyRefused) as raised:
        endpoints.listed(endpoints.opened(settings), HERE, url=None)
    assert "sk_test" not in str(raised.value)


def test_check(stripe: Stripe) -> None:
    """`check` reports missing and superfluous types, and disabled and outdated endpoints."""
    others = [*STRIPE_TYPES[1:], "payout.paid"]
    old = stripe.account.create_webhook_endpoint(f"{URL}/", others, api_version="2020-08-27")["id"]
    elsewhere = stripe.account.create_webhook_endpoint("https://shop.example.com/other", ["*"])["id"]
    resting = stripe.account.create_webhook_endpoint(URL, ["*"], api_version=API_VERSION)["id"]
    stripe.account.disable_webhook_endpoint(resting)

    found = {each.id: each for each in stripe.listed()}

    assert set(found) == {old, resting}
    assert (found[old].missing, found[old].superfluous) == ((STRIPE_TYPES[0],), ("payout.paid",))
    assert (found[resting].missing, found[resting].serves, found[old].serves) == ((), False, False)
    assert {each.id for each in stripe.listed(url=None)} == {old, resting}
    assert elsewhere not in found
    advice = stripe.advice()
    assert f"{old} lacks {STRIPE_TYPES[0]}: choose these events for it" in advice
    assert f"{old} sends 1 event types that are recorded and not folded" in advice
    assert f"{old} sends objects as of 2020-08-27; the folds were written for {API_VERSION}" in advice
    assert f"{resting} is disabled, so Stripe sends it nothing" in advice


def test_several_endpoints_for_one_address(stripe: Stripe) -> None:
    """Two endpoints for one address deliver each event twice, which `check` reports."""
    for _ in range(2):
        stripe.account.create_webhook_endpoint(URL, STRIPE_TYPES, api_version=API_VERSION)

    assert (
        stripe.advice()
        == f"2 endpoints send to {URL}, so each event comes 2 times; it is folded once. Keep one of them."
    )


def test_check_of_each_key(stripe: Stripe) -> None:
    """`check` covers every mode with a key, and exits with 1 if a mode has no endpoint with all types."""
    stripe.live.create_webhook_endpoint(URL, ["*"], api_version=API_VERSION)
    both = stripe.environment | {"STRIPE_API_KEY": f"{KEY},{LIVE_KEY}"}

    checked = python("deploy", "endpoints", "check", "--url", URL, "--format", "ndjson", settings=both)

    assert checked.code == 1
    assert len(checked.out.splitlines()) == 1
    assert f"the default account (test) has none for {URL}: payfold endpoints create" in checked.err
    settings = Settings.load(both)
    assert endpoints.worlds(settings, account=None, livemode=True) == [World("", livemode=True)]


@pytest.mark.parametrize(
    ("url", "key", "livemode", "words"),
    [
        ("http://localhost:8000/webhooks/stripe", KEY, None, "For this machine use Stripe's CLI"),
        ("shop.example.com", KEY, None, "--url is no address. Example: --url https://"),
        (URL, f"{KEY},{LIVE_KEY}", None, "choose by --account, --live or --test"),
        (URL, "", None, "STRIPE_API_KEY: it is not set"),
        (URL, KEY, True, "No key in STRIPE_API_KEY is of that account and mode"),
    ],
)
def test_usage(
    monkeypatch: pytest.MonkeyPatch,
    url: str,
    key: str,
    livemode: bool | None,  # noqa: FBT001 - a parameter of the test
    words: str,
) -> None:
    """An impossible call is an error before Stripe is called."""
    monkeypatch.setenv("STRIPE_API_BASE", "http://127.0.0.1:1")
    monkeypatch.setenv("STRIPE_API_KEY", key)

    with pytest.raises(ConfigurationError) as raised:
        endpoints_create(url, account=None, livemode=livemode, yes=True)

    assert words in str(raised.value)
    assert "hunter2" not in str(raised.value)


def test_create_without_yes(stripe: Stripe, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without --yes no endpoint is created, and the exit code is 2."""
    for name, value in stripe.environment.items():
        monkeypatch.setenv(name, value)

    with pytest.raises(typer.Exit) as raised:
        endpoints_create(URL, account=None, livemode=None, yes=False)

    assert raised.value.exit_code == 2
    assert stripe.listed() == []
