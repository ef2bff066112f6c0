"""A published set, and the folder of its original files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from bridgetower.data.config import PrepareConfig
from bridgetower.data.datasets.arrow import ArrowFiles
from bridgetower.data.example import Image
from bridgetower.data.fetch import LARGEST_ITEM, JsonLists
from bridgetower.data.prepared_set import SetWriter
from bridgetower.data.schema import Schema
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
        found = next((self.folder / place for place in places if (self.folder / place).is_file()), None)
        if found is None:
            raise FileNotFoundError(
                f"no file {' or '.join(places)} in {self.folder}; put it there, or leave out what needs it (splits)"
            )
        self.used.append(found)
        return found

    def image(self, *places: str) -> Image:
        """The image file at the first of several places where there is one; the first of all if there is none."""
        place = next((one for one in places if (self.folder / one).is_file()), places[0])
        return Image(name=place, place=str(self.folder / place))

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


class PublishedCount(NamedTuple):
    """How many images (or pairs) and texts a split has, as far as it is published."""

    images: int | None
    texts: int | None
    source: str


def published(source: str, counts: Mapping[str, tuple[int | None, int | None]]) -> dict[str, list[PublishedCount]]:
    """Images and texts of each split that one source publishes."""
    return {name: [PublishedCount(*count, source)] for name, count in counts.items()}


@dataclass(frozen=True, kw_only=True)
class DatasetSpec:
    """A set that can be prepared from its original files."""

    name: str  # what it is called
    schema: Schema  # what its rows hold
    summary: str = ""  # help of its command: a line, and perhaps a paragraph
    layout: str = ""  # the original files, a line each, as the help shows them
    example: str = ""  # a command line for the help, if it takes more than the source
    splits: Sequence[str] = ()  # the splits that are prepared by default
    more_splits: Sequence[str] = ()  # further ones that it has
    split_rule: str = ""  # how images are given to them, in words
    protocol: str = ""  # what else was decided about the originals, in words
    licences: Mapping[str, str] = field(default_factory=dict)  # licence of each part
    config: type[PrepareConfig] = PrepareConfig  # type of the settings
    # published counts of each split; of several the first is the usual one
    published: Mapping[str, Sequence[PublishedCount]] = field(default_factory=dict)
    # reads the annotations and fills the writer; None if only Arrow files can be read
    fill: Callable[[Originals, SetWriter, Any], None] | None = None
    arrow: ArrowFiles | None = None  # the set as ViLT-style Arrow files

    @property
    def help(self) -> str:
        files = "\n".join(f"  {line}" for line in self.layout.strip().splitlines())
        example = f"\n\nExample: {self.example}" if self.example else ""
        return f"{self.summary}\n\nSOURCE holds:\n{files}{example}"

    def published_count(self, split: str, images: int, texts: int) -> PublishedCount | None:
        """What is published of a split: the counts that it has if they are among those published, else the first."""
        known = self.published.get(split, ())
        equal = (each for each in known if each.images in (None, images) and each.texts in (None, texts))
        return next(equal, known[0] if known else None)
