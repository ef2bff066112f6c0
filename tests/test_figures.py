"""The figures of README.md are there and small."""

import runpy
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"


def test_figures_are_small() -> None:
    readme = (DOCS.parent / "README.md").read_text(encoding="utf-8")
    names = runpy.run_path(str(DOCS / "figures.py"))["NAMES"]
    assert all(f"](docs/{name})" in readme for name in names)
    assert sum((DOCS / name).stat().st_size for name in names) <= 150_000
