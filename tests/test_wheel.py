"""The wheel holds every file that the code reads, so that an installed Payfold equals the checkout."""

import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("api", "deploy", "schemas", "worker")
CHECKOUT_ONLY = {"deploy/dev", "deploy/requirements-dev.txt", "deploy/requirements-uv.txt"}
UV = ROOT / ".tools" / "bin" / "uv"


@pytest.fixture
def wheel(tmp_path: Path) -> Mapping[str, bytes]:
    """Return the files of a wheel made of this checkout, by their names."""
    uv = UV if UV.exists() else shutil.which("uv")
    if uv is None:
        pytest.skip("there is no uv here to build the wheel with")
    command = [str(uv), "build", "--quiet", "--wheel", "--out-dir", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True, timeout=60)
    (made,) = tmp_path.glob("payfold-*.whl")
    with ZipFile(made) as archive:
        return {name: archive.read(name) for name in archive.namelist() if not name.endswith("/")}


def test_every_file_is_in_the_wheel(wheel: Mapping[str, bytes]) -> None:
    """The wheel has every file of the packages: code, migrations, style sheet, Procfile and the rest."""
    here = {
        str(path.relative_to(ROOT)): path.read_bytes()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    there = {name: content for name, content in wheel.items() if ".dist-info/" not in name}

    assert here.keys() - there.keys() == CHECKOUT_ONLY
    assert there == {name: here[name] for name in there}
    assert there["deploy/Procfile"] == (ROOT / "Procfile").read_bytes()
