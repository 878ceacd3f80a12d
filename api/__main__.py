"""The web process: ``python -m api``."""

import sys

import uvicorn

from api import app
from schemas.errors import ConfigurationError
from schemas.settings import Settings

STOP_SECONDS_MAX = 25
"""A dyno is killed 30 seconds after it is asked to stop."""


def main() -> None:
    """Serve until told to stop; a setting that cannot be used ends the process with 2."""
    try:
        settings = Settings.load()
        app.create(settings)
        _ = settings.postgresql, settings.broker
    except ConfigurationError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(2)
    uvicorn.run(
        "api.app:create",
        factory=True,
        host=settings.payfold_host,
        port=settings.port,
        workers=settings.web_concurrency,
        log_config=None,
        access_log=False,
        server_header=False,
        date_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=STOP_SECONDS_MAX,
    )


if __name__ == "__main__":
    main()
