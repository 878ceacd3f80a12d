"""Takes the pictures of the pages for the README: ``deploy/dev run python -m tests.pictures [FOLDER]``.

With a folder, it takes every page there, wide and light, and as narrow as a phone and dark.
"""

import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Final

from tests.browser import chromium
from tests.looking import logged_in, running

if TYPE_CHECKING:
    from playwright.sync_api import Browser

    from tests.looking import Payfold

SHOWN: Final = ("overview", "order", "parked")
FOLDER: Final = Path(__file__).parents[1] / "deploy" / "pictures"
SIZES: Final = {"wide": (1280, "light"), "phone": (400, "dark")}


def main(folder: Path | None) -> None:
    """Take the pictures of the README, or of all pages into *folder*."""
    with (
        tempfile.TemporaryDirectory() as data,
        chromium() as browser,
        running(Path(data)) as payfold,
    ):
        if folder is None:
            _small(browser, payfold)
            return
        for size, (width, scheme) in SIZES.items():
            with logged_in(browser, payfold, width, scheme) as page:
                for name, address in payfold.addresses().items():
                    page.goto(f"{payfold.address}{address}")
                    page.screenshot(path=folder / f"{name.replace(' ', '_')}_{size}.png", full_page=True)


def _small(browser: "Browser", payfold: "Payfold") -> None:
    FOLDER.mkdir(exist_ok=True)
    with logged_in(browser, payfold, 1_000, "light") as page:
        for name in SHOWN:
            page.goto(f"{payfold.address}{payfold.addresses()[name]}")
            page.screenshot(path=FOLDER / f"{name}.png", clip={"x": 0, "y": 0, "width": 1_000, "height": 750})


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
