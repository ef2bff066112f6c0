"""Files do not import each other in circles, also not inside functions; the figures of README.md are small."""

import ast
import runpy
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src"


def imports(files):
    """Returns the modules that each module imports when it or a function of it runs."""

    def imported(node):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            return set()
        if isinstance(node, ast.ImportFrom) and node.module:
            return {full if (full := f"{node.module}.{name.name}") in files else node.module for name in node.names}
        return {name for child in ast.iter_child_nodes(node) for name in imported(child)}

    return {name: (imported(ast.parse(text)) & files.keys()) - {name} for name, text in files.items()}


def test_no_circles():
    names = {".".join(path.relative_to(SOURCE).with_suffix("").parts): path for path in SOURCE.rglob("*.py")}
    files = {name.removesuffix(".__init__"): path.read_text(encoding="utf-8") for name, path in names.items()}
    found = imports(files)
    assert "bridgetower.model.bridgetower" in found["bridgetower.predictor"] | found["bridgetower.inference"]
    TopologicalSorter(found).prepare()


def test_a_circle_inside_functions_is_found():
    files = {"a": "from b import f\n", "b": "def f():\n    from a import g\n"}
    with pytest.raises(CycleError):
        TopologicalSorter(imports(files)).prepare()


def test_figures_are_small():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    names = runpy.run_path(str(ROOT / "docs" / "figures.py"))["NAMES"]
    assert all(f"](docs/{name})" in readme for name in names)
    assert sum((ROOT / "docs" / name).stat().st_size for name in names) <= 150_000
