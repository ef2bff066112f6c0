"""Wheel and sdist as an index would get them. Nightly each is installed into an environment of its own."""

import email
import json
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import bridgetower

for package in ("hatchling", "hatch_fancy_pypi_readme", "twine"):
    pytest.importorskip(package)

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src"
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def command(*arguments):
    """Runs a command, which must succeed. Returns what it prints."""
    done = subprocess.run(arguments, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, f"{arguments} failed:\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dist")
    command(sys.executable, "-m", "hatchling", "build", "--directory", folder)
    (wheel,) = folder.glob("*.whl")
    (sdist,) = folder.glob("*.tar.gz")
    return {"wheel": wheel, "sdist": sdist}


@pytest.fixture(scope="module")
def metadata(distributions):
    with zipfile.ZipFile(distributions["wheel"]) as wheel:
        (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
        return email.message_from_bytes(wheel.read(name))


@pytest.fixture
def environment(tmp_path):
    """Installs a file alone into a new environment, which sees the packages of this one. Returns its programs."""

    def installed(file):
        venv.create(tmp_path / "environment", symlinks=True)
        python = tmp_path / "environment" / "bin" / "python"
        folder = command(
            python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"
        ).strip()
        # Their .pth files are not read, so that the editable installation of this package is not seen.
        Path(folder, "packages.pth").write_text(sysconfig.get_path("purelib"))
        options = ("--quiet", "--no-deps", "--no-index", "--no-build-isolation")
        command(sys.executable, "-m", "pip", "--python", python, "install", *options, file)
        return python.parent

    return installed


def test_the_wheel_has_every_file_of_the_package(distributions):
    files = {
        str(path.relative_to(SOURCE))
        for path in (SOURCE / "bridgetower").rglob("*")
        if path.is_file()
    }
    with zipfile.ZipFile(distributions["wheel"]) as wheel:
        packaged = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert packaged == {name for name in files if "__pycache__" not in name}
    assert "bridgetower/py.typed" in packaged


def test_the_sdist_has_what_it_is_built_from_and_no_tests(distributions):
    with tarfile.open(distributions["sdist"]) as sdist:
        tops = {name.split("/")[1] for name in sdist.getnames()}
    assert {
        "CHANGELOG.md",
        "CITATION.cff",
        "LICENSE",
        "README.md",
        "docs",
        "pyproject.toml",
        "src",
    } <= tops
    assert "tests" not in tops


def test_an_index_accepts_both(distributions):
    command(sys.executable, "-m", "twine", "check", "--strict", *distributions.values())


def test_metadata(metadata):
    assert metadata["Version"] == bridgetower.__version__
    text = str(metadata.get_payload())
    assert text.startswith("# bridgetower")
    assert "![" not in text
    targets = re.findall(r"\]\(([^)]*)\)", text)
    assert targets
    assert not [target for target in targets if not target.startswith(("https://", "#"))]


@pytest.mark.nightly
@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_works_where_it_is_installed(distributions, environment, kind, tiny_checkpoint):
    programs = environment(distributions[kind])
    path = command(
        programs / "python", "-c", "import bridgetower; print(bridgetower.__file__)"
    ).strip()
    assert Path(path).is_relative_to(programs.parent)
    assert "usage: bridgetower" in command(programs / "bridgetower", "--help")
    assert "complete -o default" in command(programs / "bridgetower", "--completion", "bash")
    vectors = command(
        programs / "bridgetower", "embed", tiny_checkpoint, "--texts", "a bar", "a circle"
    )
    assert len([json.loads(line) for line in vectors.splitlines()]) == 2
