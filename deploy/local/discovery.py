"""The settings of a command, completed by those of a Payfold that runs in the data folder."""

import os
from typing import Final, NamedTuple

from deploy.local import credentials, services
from schemas import envfile
from schemas.errors import ConfigurationError
from schemas.settings import Settings, unknown

UP_FOLDER: Final = "up"
DEMO_PREFIX: Final = "demo-"


def settings() -> Settings:
    """Return the settings of a command, which stops at a name that looks like a setting and is none.

    Raises:
        ConfigurationError: with the nearest right name.
    """
    found = Settings.load()
    refuse_unknown_names()
    return found


def refuse_unknown_names() -> None:
    """Raise ConfigurationError at a name that looks like a setting and is none, with the nearest right name."""
    if faults := unknown():
        raise ConfigurationError("\n".join(faults))


class Provided(NamedTuple):
    """A setting that is not configured and that a running `payfold up` or demo provides."""

    value: str
    source: str


def here(settings: Settings) -> Settings:
    """Return *settings*, completed with those of a Payfold that runs in the data folder: see ``provided``."""
    found = {name: each.value for name, each in provided(settings).items()}
    return Settings.load({**envfile.completed(os.environ), **found}) if found else settings


def provided(settings: Settings) -> dict[str, Provided]:
    """Return the unconfigured settings that a running `up` or demo provides: servers, secret, token, port.

    Where a database is configured, only one that runs on it counts.
    """
    folder = settings.payfold_data_dir
    for each in (folder / UP_FOLDER, *sorted(folder.glob(f"{DEMO_PREFIX}*"))):
        found = services.running_services(each)
        if found is None or (settings.database_url and settings.database_url.get_secret_value() != found.database_url):
            continue
        servers = {} if settings.database_url else {"DATABASE_URL": found.database_url, "REDIS_URL": found.redis_url}
        kept = credentials.kept(each).environment()
        own = str(each.absolute() / credentials.FILE)
        return {
            **{name: Provided(value, "embedded server") for name, value in servers.items()},
            **{name: Provided(value, own) for name, value in kept.items() if not is_configured(name)},
        }
    return {}


def is_configured(name: str) -> bool:
    """Return whether the setting *name* is in the environment or in the settings file."""
    return envfile.source_of(name, os.environ) is not None
