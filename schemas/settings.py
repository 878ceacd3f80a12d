"""Settings from the environment, else from the file of ``schemas.envfile``, checked once at start.

A value that cannot be used stops the process with its name, its fault and an example, and never with the
value itself where it may hold a secret. A secret may come from a file: ``STRIPE_WEBHOOK_SECRETS_FILE`` names
a file that holds ``STRIPE_WEBHOOK_SECRETS``.
"""

import difflib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, field_validator

from schemas import envfile, files
from schemas.errors import ConfigurationError

Scope = Literal["read", "personal", "register", "admin"]
SCOPES: tuple[Scope, ...] = ("read", "personal", "register", "admin")
_INCLUDED: dict[Scope, tuple[Scope, ...]] = {"register": ("read",), "admin": ("register", "read")}

_SHA256 = re.compile(r"[0-9a-f]{64}")
LABEL = re.compile(r"[A-Za-z0-9_]{1,255}")
"""The form of an account's label."""
# No quote, comma or semicolon, and no second secret: a list with another separator than the comma is no one secret.
_SECRET = re.compile(r"whsec_(?:(?!whsec_)[!#-&(-+\--:<-~])+")
_HOST = re.compile(r"[A-Za-z0-9._:%-]+")
_API_KEY = re.compile(r"(?:sk|rk)_(?P<mode>live|test)_(?:(?![sr]k_(?:live|test)_)[!#-&(-+\--:<-~])+")

SESSION_MODES: tuple[str, ...] = ("payment", "subscription", "setup", "link")
"""Each has a time to live of its own: the modes of a Checkout Session, and any session of a payment link."""
SESSION_MINUTES_MAX = 24 * 60
"""Stripe itself expires a session after this."""
_TTL_DEFAULT = 60
FILE_BYTES_MAX = 64 * 1024
"""No setting is longer, so a longer file was named by mistake."""

_PREFIX = "PAYFOLD_"
_FOR_THE_REPOSITORY = re.compile(r"PAYFOLD_(?:ENV_FILE|CALLED_AS|DEPLOYED|TEST_\w+)")
"""Names that are no settings: the place of the settings, and variables of deploy/dev and of this repository's tests."""
_FOR_A_NEIGHBOUR = re.compile(
    r"PAYFOLD\w*_(?:SERVICE_HOST|SERVICE_PORT(?:_\w+)?|PORT_\d+_(?:TCP|UDP|SCTP)(?:_(?:PROTO|PORT|ADDR))?)"
)
"""Kubernetes sets these in every container where a service is called payfold or payfold-web, and ``…_PORT=tcp://…``."""


@dataclass(frozen=True, slots=True)
class SigningSecret:
    """An endpoint's signing secret; ``account`` labels deliveries that name no account themselves."""

    account: str
    secret: bytes

    def __repr__(self) -> str:
        return f"SigningSecret(account={self.account!r}, secret=hidden)"


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A secret key of Stripe's API and the rows that it serves.

    ``account`` labels them, as a signing secret's label does. ``acts_for`` is the connected account that calls
    name, where the key is another account's; None where the rows are of the key's own account.
    """

    account: str
    livemode: bool
    secret: str
    acts_for: str | None = None

    def __repr__(self) -> str:
        return f"ApiKey(account={self.account!r}, livemode={self.livemode}, secret=hidden, acts_for={self.acts_for!r})"


@dataclass(frozen=True, slots=True)
class Token:
    """A bearer token: its holder, its scopes with those that they include, and its SHA-256 in hexadecimal."""

    name: str
    scopes: frozenset[Scope]
    sha256: str

    def __repr__(self) -> str:
        return f"Token(name={self.name!r}, scopes={sorted(self.scopes)}, sha256=hidden)"


class Settings(BaseModel):
    """The settings from the environment. Names here are the variables' names in lower case."""

    model_config = ConfigDict(frozen=True, extra="ignore", hide_input_in_errors=True)

    database_url: SecretStr | None = Field(
        None, description="PostgreSQL 15 to 18", examples=["postgres://user:password@host:5432/name"]
    )
    redis_url: SecretStr | None = Field(
        None, description="Redis 7 or Valkey 8, or newer", examples=["rediss://:password@host:6379/0"]
    )
    redis_tls_verify: bool = Field(
        default=True,
        description="false where the certificate is self-signed, as on Heroku",
        examples=["false"],
    )
    port: int = Field(8000, ge=1, le=65535, description="port of the web process", examples=["8000"])
    web_concurrency: int = Field(1, ge=1, le=64, description="web processes on that port", examples=["2"])
    stripe_webhook_secrets: SecretStr = Field(
        SecretStr(""),
        description="signing secrets of the endpoints, comma separated, each with an optional account label",
        examples=["whsec_a,acct_1=whsec_b"],
    )
    stripe_api_key: SecretStr = Field(
        SecretStr(""),
        description="secret keys of Stripe's API, comma separated, each with an optional account label; without one"
        " nothing calls Stripe",
        examples=["sk_test_a,acct_1=sk_live_b"],
    )
    stripe_api_base: str = Field(
        "https://api.stripe.com", description="where Stripe's API answers", examples=["http://127.0.0.1:4010"]
    )
    payfold_tokens: SecretStr = Field(
        SecretStr(""),
        description="bearer tokens as name:scope:sha256, comma separated, made by `payfold tokens new`",
        examples=["shop:read:" + "0" * 64],
    )
    payfold_host: str = Field(
        "0.0.0.0",  # noqa: S104 - a dyno's router comes from outside
        description="address that the web process binds",
        examples=["127.0.0.1"],
    )
    payfold_data_dir: Path = Field(
        Path(envfile.DATA_DIR_DEFAULT),
        description="where `up` and `demo` keep embedded servers, and where .env is",
        examples=["/srv/payfold"],
    )
    payfold_log_format: Literal["json", "console"] = Field(
        "json", description="how logs are written", examples=["json"]
    )
    payfold_log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="the least severe line that is logged", examples=["info"]
    )
    payfold_portal_session_minutes: int = Field(
        60, ge=1, le=525_600, description="after which a billing portal session counts as over", examples=["60"]
    )
    payfold_stripe_calls_per_second: int | None = Field(
        None,
        ge=1,
        le=1000,
        description="calls to Stripe of all processes together; 20 in live mode and 5 in test mode unless set",
        examples=["20"],
    )
    payfold_session_ttl_minutes: str = Field(
        str(_TTL_DEFAULT),
        description="after which an open session is expired at Stripe: minutes or off, and the same for"
        f" {', '.join(SESSION_MODES)} where they differ; off for payment links unless set",
        examples=["60,setup=off,link=720"],
    )
    payfold_expiry_grace_minutes: int = Field(
        60,
        ge=0,
        le=10_080,
        description="after a session's own end, before our clock takes it for expired where Stripe cannot be asked",
        examples=["60"],
    )
    payfold_open_session_lines: Literal["off", "shop", "all"] = Field(
        "shop",
        description="of which sessions line items are kept while they are open: of none, of the shop's own, or of"
        " those of payment links, too",
        examples=["all"],
    )
    payfold_expire_seconds: int = Field(
        30, ge=1, le=3600, description="how often the clock looks for stale sessions", examples=["30"]
    )
    payfold_fetch_seconds: int = Field(
        10, ge=1, le=3600, description="how often the clock looks for what is to be read from Stripe", examples=["10"]
    )
    payfold_poll_seconds: int = Field(
        120, ge=1, le=3600, description="how often Stripe is asked for open sessions", examples=["120"]
    )
    payfold_gap_seconds: int = Field(
        600, ge=1, le=86_400, description="how often Stripe is asked for events that never came", examples=["600"]
    )
    payfold_reconcile_at: str | None = Field(
        None,
        pattern="^([01][0-9]|2[0-3]):[0-5][0-9]$",
        description="when the tables are reconciled each day, as HH:MM in UTC; never unless set",
        examples=["03:30"],
    )
    payfold_sweep_seconds: int = Field(
        5,
        ge=1,
        le=3600,
        description="how often the clock looks for events that the broker forgot",
        examples=["5"],
    )

    @field_validator("database_url")
    @classmethod
    def _names_postgresql(cls, value: SecretStr | None) -> SecretStr | None:
        return _url_of(value, {"postgres", "postgresql", "postgresql+psycopg"})

    @field_validator("redis_url")
    @classmethod
    def _names_redis(cls, value: SecretStr | None) -> SecretStr | None:
        return _with_numbered_database(_url_of(value, {"redis", "rediss"}))

    @field_validator("payfold_host")
    @classmethod
    def _names_host(cls, value: str) -> str:
        if not _HOST.fullmatch(value):
            raise ValueError("it is not an address or a host's name")
        return value

    @field_validator("stripe_webhook_secrets")
    @classmethod
    def _reads_secrets(cls, value: SecretStr) -> SecretStr:
        _signing_secrets(value.get_secret_value())
        return value

    @field_validator("stripe_api_key")
    @classmethod
    def _reads_keys(cls, value: SecretStr) -> SecretStr:
        _api_keys(value.get_secret_value())
        return value

    @field_validator("stripe_api_base")
    @classmethod
    def _names_stripe(cls, value: str) -> str:
        parts = urlsplit(value)
        if parts.scheme not in {"http", "https"} or not parts.hostname or parts.query or parts.username:
            raise ValueError("it is not an address that begins with http:// or https://")
        return value.rstrip("/")

    @field_validator("payfold_session_ttl_minutes")
    @classmethod
    def _reads_ttl(cls, value: str) -> str:
        _session_ttl(value)
        return value

    @field_validator("payfold_tokens")
    @classmethod
    def _reads_tokens(cls, value: SecretStr) -> SecretStr:
        _tokens(value.get_secret_value())
        return value

    @cached_property
    def signing_secrets(self) -> tuple[SigningSecret, ...]:
        """The endpoints' secrets, in the order in which they are tried."""
        return _signing_secrets(self.stripe_webhook_secrets.get_secret_value())

    @cached_property
    def api_keys(self) -> tuple[ApiKey, ...]:
        """Stripe's API keys, one for each account and mode."""
        return _api_keys(self.stripe_api_key.get_secret_value())

    @cached_property
    def session_ttl_minutes(self) -> dict[str, int | None]:
        """By session mode, and for payment links, after how many minutes an open session is stale; None for never."""
        return _session_ttl(self.payfold_session_ttl_minutes)

    def calls_per_second(self, *, livemode: bool) -> int:
        """Return how many calls to Stripe all processes may make together, for one account."""
        return self.payfold_stripe_calls_per_second or (20 if livemode else 5)

    @cached_property
    def tokens(self) -> tuple[Token, ...]:
        """The bearer tokens that open the read routes."""
        return _tokens(self.payfold_tokens.get_secret_value())

    @property
    def postgresql(self) -> str:
        """The database's address in SQLAlchemy's form.

        Raises:
            ConfigurationError: when none is set.
        """
        if self.database_url is None:
            raise ConfigurationError(
                "DATABASE_URL is not set and no embedded database is running here: set it "
                "(postgres://user:password@host:5432/name) or start one with `payfold up`."
            )
        scheme, rest = self.database_url.get_secret_value().split("://", 1)
        del scheme
        return f"postgresql+psycopg://{rest}"

    @property
    def libpq(self) -> str:
        """The database's address in libpq's form, for the driver without SQLAlchemy."""
        return self.postgresql.replace("postgresql+psycopg://", "postgresql://", 1)

    @property
    def broker(self) -> str:
        """The broker's address.

        Raises:
            ConfigurationError: when none is set.
        """
        if self.redis_url is None:
            raise ConfigurationError(
                "REDIS_URL is not set and no embedded broker is running here: set it "
                "(redis://:password@host:6379/0) or start one with `payfold up`."
            )
        return self.redis_url.get_secret_value()

    @classmethod
    def load(cls, environment: Mapping[str, str] | None = None) -> Self:
        """Read the settings, from ``*_FILE`` where the environment names one.

        A given *environment* is used alone; this process's own is completed by the ``.env`` file.

        Raises:
            ConfigurationError: with the name, the fault and an example of each bad value.
        """
        given = _with_files(
            envfile.completed(os.environ) if environment is None else environment, set(cls.model_fields)
        )
        try:
            return cls.model_validate(given)
        except ValidationError as error:
            raise ConfigurationError("\n".join(_faults(error, cls))) from None

    def shown(self) -> dict[str, str]:
        """Return each setting by its variable's name; of a secret only whether it is set."""
        return {name.upper(): _shown(getattr(self, name)) for name in type(self).model_fields}


def unknown(environment: Mapping[str, str] | None = None) -> list[str]:
    """Return a sentence for each name that looks like a setting and is none, with the setting that is nearest to it.

    Of the environment only names that begin with PAYFOLD_ are ours; in the ``.env`` file all are.
    """
    given = os.environ if environment is None else environment
    ours = {name.upper(): value for name, value in given.items() if name.upper().startswith(_PREFIX)}
    known = [name.upper() for name in Settings.model_fields]
    return [
        _nearest(name, known)
        for name, value in sorted({**ours, **envfile.read(given)}.items())
        if name.removesuffix("_FILE") not in known
        and not _FOR_THE_REPOSITORY.fullmatch(name)
        and not _FOR_A_NEIGHBOUR.fullmatch(name)
        and not (name.endswith("_PORT") and "://" in value)
    ]


def _nearest(name: str, known: Sequence[str]) -> str:
    # The prefix that they share would make all names look near.
    rests = {each.removeprefix(_PREFIX): each for each in known}
    near = difflib.get_close_matches(name.removeprefix(_PREFIX).removesuffix("_FILE"), rests, n=1, cutoff=0.5)
    hint = f"the nearest is {rests[near[0]]}." if near else "`payfold config` lists them."
    return f"{name}: there is no such setting; {hint}"


def _with_files(environment: Mapping[str, str], names: set[str]) -> dict[str, str]:
    lowered = {key.lower(): value for key, value in environment.items() if value != ""}
    given = {name: lowered[name] for name in names if name in lowered}
    for name in names - set(given):
        path = lowered.get(f"{name}_file")
        if path is None:
            continue
        try:
            given[name] = _text_of(Path(path))
        except (OSError, ValueError) as error:
            fault = error.strerror if isinstance(error, OSError) else str(error)
            example = f"Example: {name.upper()}_FILE=/run/secrets/{name}"
            raise ConfigurationError(
                f"{name.upper()}_FILE: the file that it names cannot be read: {fault}. {example}"
            ) from None
    return given


def _text_of(path: Path) -> str:
    if kind := files.irregular(path):
        raise ValueError(f"it is {kind}")
    with path.open("rb") as file:
        content = file.read(FILE_BYTES_MAX + 1)
    if len(content) > FILE_BYTES_MAX:
        raise ValueError(f"it is longer than {FILE_BYTES_MAX:,} bytes")
    try:
        return content.decode("utf-8-sig").strip()
    except UnicodeDecodeError:
        raise ValueError("it is not text") from None


def _faults(error: ValidationError, settings: type[Settings]) -> list[str]:
    faults = []
    for fault in error.errors(include_url=False, include_input=False, include_context=False):
        name = str(fault["loc"][0])
        examples: Any = settings.model_fields[name].examples or [""]
        message = fault["msg"].removeprefix("Value error, ")
        faults.append(f"{name.upper()}: {message}. Example: {name.upper()}={examples[0]}")
    return faults


def _shown(value: object) -> str:
    if isinstance(value, SecretStr):
        return "set, hidden" if value.get_secret_value() else "not set"
    return "not set" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _url_of(value: SecretStr | None, schemes: set[str]) -> SecretStr | None:
    if value is None:
        return None
    url = value.get_secret_value()
    if url.partition("://")[0] not in schemes or "://" not in url:
        raise ValueError(f"it is not an address that begins with {' or '.join(sorted(f'{s}://' for s in schemes))}")
    try:
        _ = urlsplit(url).port
    except ValueError:
        raise ValueError(
            "its port is no number, or its password holds a character that is written otherwise (/ is %2F, # is %23)"
        ) from None
    return value


def _with_numbered_database(value: SecretStr | None) -> SecretStr | None:
    path = urlsplit(value.get_secret_value()).path if value is not None else ""
    if path.strip("/") and not path.strip("/").isdecimal():
        raise ValueError("what follows the port is not the number of a database")
    return value


def _signing_secrets(text: str) -> tuple[SigningSecret, ...]:
    return tuple(_signing_secret(part.strip()) for part in text.split(",") if part.strip())


def _signing_secret(part: str) -> SigningSecret:
    # A secret may end with an equals sign itself.
    account, equals, secret = ("", "", part) if part.startswith("whsec_") else part.partition("=")
    if equals and not LABEL.fullmatch(account):
        raise ValueError("an account label may hold letters, digits and _ only")
    if not _SECRET.fullmatch(secret or account):
        raise ValueError(
            "each signing secret begins with whsec_ and goes on without a space or a quote, and commas separate them"
        )
    return SigningSecret(account=account, secret=secret.encode())


def _api_keys(text: str) -> tuple[ApiKey, ...]:
    keys: list[ApiKey] = []
    for part in filter(None, map(str.strip, text.split(","))):
        key = _api_key(part, keys)
        if any((known.account, known.livemode) == (key.account, key.livemode) for known in keys):
            raise ValueError("two keys serve the same account and mode: give each a label, as in acct_1=sk_live_b")
        keys.append(key)
    return tuple(keys)


def _api_key(part: str, before: Sequence[ApiKey]) -> ApiKey:
    account, equals, secret = ("", "", part) if part.startswith(("sk_", "rk_")) else part.partition("=")
    if equals and not LABEL.fullmatch(account):
        raise ValueError("an account label may hold letters, digits and _ only")
    read = _API_KEY.fullmatch(secret)
    if read is None:
        raise ValueError(
            "each key begins with sk_live_, sk_test_, rk_live_ or rk_test_ and goes on without a space or a quote, and"
            " commas separate them"
        )
    # A key that is given again, under another label, serves that account as one that is connected to its own.
    is_again = any(known.secret == secret for known in before)
    return ApiKey(account, read["mode"] == "live", secret, acts_for=account if is_again and account else None)


def _session_ttl(text: str) -> dict[str, int | None]:
    found: dict[str, int | None] = {**dict.fromkeys(SESSION_MODES, _TTL_DEFAULT), "link": None}
    for number, part in enumerate(filter(None, map(str.strip, text.split(",")))):
        mode, equals, minutes = part.partition("=")
        if equals and mode.strip() in SESSION_MODES:
            found[mode.strip()] = _minutes(minutes.strip())
        elif not equals and number == 0:
            found |= dict.fromkeys(("payment", "subscription", "setup"), _minutes(part))
        else:
            raise ValueError(
                f"it reads minutes or off, and then NAME=minutes or NAME=off for {', '.join(SESSION_MODES)}"
            )
    return found


def _minutes(text: str) -> int | None:
    if text == "off":
        return None
    if not text.isascii() or not text.isdecimal() or not 1 <= int(text) <= SESSION_MINUTES_MAX:
        raise ValueError(f"a time to live is off, or 1 to {SESSION_MINUTES_MAX} minutes")
    return int(text)


def _tokens(text: str) -> tuple[Token, ...]:
    tokens = tuple(_token(part.strip()) for part in text.split(",") if part.strip())
    if len({token.name for token in tokens}) != len(tokens):
        raise ValueError("each token wants a name of its own")
    return tokens


def _token(part: str) -> Token:
    name, _, rest = part.partition(":")
    scope, _, sha256 = rest.partition(":")
    given = scope.split("+")
    scopes: set[Scope] = {known for known in SCOPES if known in given}
    if len(scopes) != len(given) or not LABEL.fullmatch(name) or not _SHA256.fullmatch(sha256):
        raise ValueError(
            f"each token reads name:scope:sha256, with scopes of {', '.join(SCOPES)}, several joined by +,"
            " and 64 hexadecimal digits, and commas separate them"
        )
    included = {each for known in scopes for each in _INCLUDED.get(known, ())}
    return Token(name, frozenset(scopes | included), sha256)
