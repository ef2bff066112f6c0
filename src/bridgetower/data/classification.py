"""The classes of a user's own table: `classes.json` beside the rows."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from bridgetower.files import read_json, write_json
from bridgetower.model.plain import from_plain

FILE = "classes.json"


@dataclass(frozen=True, kw_only=True)
class Classes:
    """What a row can be.

    Attributes:
        names: Of the classes, in the order of their numbers.
        multi_label: Whether several may hold at once.
    """

    names: tuple[str, ...]
    multi_label: bool


def write_classes(folder: Path, classes: Classes) -> None:
    """Writes the classes of a prepared set."""
    write_json(folder / FILE, asdict(classes))


def read_classes(folder: str | Path) -> Classes:
    """Reads the classes of a prepared set.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It holds something else.
    """
    path = Path(folder) / FILE
    if not path.is_file():
        raise FileNotFoundError(f"no {FILE} in {folder}; give a set that `bridgetower prepare classification` wrote")
    return from_plain(Classes, read_json(path), str(path))
