"""A folder of the files that the authors of a set publish, and how they are read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from bridgetower.data.example import Image
from bridgetower.data.fetch import LARGEST_ITEM, JsonLists, version_of
from bridgetower.files import json_object
from bridgetower.progress import reading


@dataclass(frozen=True, kw_only=True)
class Originals:
    """A folder of original files."""

    folder: Path  # the folder
    splits: Sequence[str]  # the splits that are wanted
    progress: bool = False  # whether to show how far a file is read
    used: list[Path] = field(default_factory=list)  # the annotation files that were found
    # files with images in them that were found, too large to be read for a digest
    large: list[Path] = field(default_factory=list)

    def wants(self, split: str) -> bool:
        return split in self.splits

    def annotation(self, *places: str) -> Path:
        """The file at the first of several places where there is one; without it the set would be another."""
        found = self.optional_annotation(*places)
        if found is None:
            raise FileNotFoundError(
                f"no file {' or '.join(places)} in {self.folder}; put it there, or leave out what needs it (splits)"
            )
        return found

    def optional_annotation(self, *places: str) -> Path | None:
        """Like `annotation`, but None if there is no such file."""
        found = next((self.folder / place for place in places if (self.folder / place).is_file()), None)
        if found:
            self.used.append(found)
        return found

    def image(self, *places: str) -> Image:
        """The image file at the first of several places where there is one; the first of all if there is none."""
        for place in places:
            path = str(self.folder / place)
            try:
                return Image(name=place, place=path, version=version_of(path))
            except OSError:
                continue
        return Image(name=places[0], place=str(self.folder / places[0]))

    def items(self, path: Path, key: str | None = None) -> Iterator[Any]:
        """Reads the items of a list in a JSON file one by one: the whole, or what stands under a key."""
        item = None
        with reading(path, shown=self.progress) as file:
            for item in JsonLists(file, path).items(key):
                yield item
        if item is None:
            raise ValueError(f"{path} has no {key} list; check that it is the right file")

    def lines(self, path: Path) -> Iterator[Mapping[str, Any]]:
        """Reads a file with a JSON object per line."""
        with reading(path, shown=self.progress) as file:
            for number, line in enumerate(iter(partial(file.readline, LARGEST_ITEM), b""), start=1):
                if line.strip():
                    yield json_object(line, f"{path}, line {number}")
