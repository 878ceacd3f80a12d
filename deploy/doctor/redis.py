"""What is read from Redis: its version, its memory and what it does when that is full."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from redis import Redis as Client
from redis.exceptions import RedisError

from deploy.doctor.findings import NOT_IN_TIME, Unread, attempt
from schemas import broker
from schemas.settings import Settings

VALKEY: Final = "Valkey"
REDIS: Final = "Redis"
UNSET: Final = Unread("REDIS_URL is not set")


@dataclass(frozen=True, slots=True)
class Engine:
    """The server's name and version, and how long an answer takes."""

    name: str
    version: str
    milliseconds: float

    @property
    def major(self) -> int:
        """The first number of the version, 0 where it has none."""
        digits = self.version.partition(".")[0]
        return int(digits) if digits.isdecimal() else 0


@dataclass(frozen=True, slots=True)
class Memory:
    """What happens when memory is full; *bytes_max* is 0 where there is no limit."""

    policy: str
    bytes_max: int
    bytes_used: int


@dataclass(slots=True)
class Redis:
    """All of it, each value as it is read: see Note [A part that hangs is left behind]."""

    engine: Engine | Unread = NOT_IN_TIME
    memory: Memory | Unread = NOT_IN_TIME


def fill(settings: Settings, found: Redis) -> None:
    """Read everything into *found*."""
    if settings.redis_url is None:
        found.engine = found.memory = UNSET
        return
    client = broker.redis(settings)
    try:
        found.engine = _engine_or_why(client)
        if isinstance(found.engine, Unread):
            found.memory = Unread("Redis cannot be reached")
        else:
            found.memory = attempt(lambda: _memory(client))
    finally:
        client.close()


def _engine_or_why(client: Client) -> Engine | Unread:
    try:
        return _engine(client)
    except (RedisError, OSError) as error:
        return Unread(_without_address(error))


def _without_address(error: Exception) -> str:
    # Redis's own words name a user or a command, and no password.
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def _engine(client: Client) -> Engine:
    began = time.monotonic()
    client.ping()
    milliseconds = (time.monotonic() - began) * 1000
    try:
        info: Mapping[str, Any] = client.info("server")
    except RedisError:
        return Engine(REDIS, "", milliseconds)
    if "valkey_version" in info:
        return Engine(VALKEY, str(info["valkey_version"]), milliseconds)
    return Engine(REDIS, str(info.get("redis_version", "")), milliseconds)


def _memory(client: Client) -> Memory | Unread:
    """Return the policy as INFO has it, which hosts allow that forbid CONFIG; else as CONFIG has it."""
    try:
        info: Mapping[str, Any] = client.info("memory")
    except RedisError:
        info = {}
    policy = info.get("maxmemory_policy") or _configured(client)
    if isinstance(policy, Unread):
        return policy
    return Memory(str(policy), int(info.get("maxmemory", 0)), int(info.get("used_memory", 0)))


def _configured(client: Client) -> str | Unread:
    try:
        found: Mapping[Any, Any] = client.config_get("maxmemory-policy")
    except RedisError as error:
        return Unread(f"Redis lets this user run neither INFO nor CONFIG GET ({type(error).__name__})")
    policy = found.get("maxmemory-policy")
    return policy or Unread("Redis names no maxmemory-policy")
