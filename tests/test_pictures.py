"""The pictures of README.md are those of the present web UI and sheet, and small."""

import json
import runpy
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"


def test_pictures_are_current() -> None:
    current = runpy.run_path(str(DOCS / "pictures.py"))["current"]()
    recorded = json.loads((DOCS / "pictures.json").read_text(encoding="utf-8"))
    assert recorded == current, "run `bridgetower demo`, then `python docs/pictures.py`"


def test_pictures_are_small() -> None:
    readme = (DOCS.parent / "README.md").read_text(encoding="utf-8")
    recorded = json.loads((DOCS / "pictures.json").read_text(encoding="utf-8"))
    assert all(f"](docs/{name})" in readme for name in recorded)
    assert sum((DOCS / name).stat().st_size for name in recorded) <= 150_000
