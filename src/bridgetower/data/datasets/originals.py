"""A folder of the files that the authors of a set publish, and how they are read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from bridgetower.data.images import ImageRef
from bridgetower.files import json_object
from bridgetower.progress import reading

_DEEPEST = 5_000  # brackets that may be open in a JSON file
_OPENING, _CLOSING = (np.frombuffer(brackets, np.uint8) for brackets in (b"[{", b"]}"))


@dataclass(frozen=True, kw_only=True)
class Originals:
    """A folder of original files.

    Attributes:
        folder: The folder.
        splits: The splits that are wanted.
        progress: Whether to show how far a file is read.
        used: The annotation files that were found.
        large: Files with images in them that were found, too large to be read for a digest.
    """

    folder: Path
    splits: Sequence[str]
    progress: bool = False
    used: list[Path] = field(default_factory=list)
    large: list[Path] = field(default_factory=list)

    def wants(self, split: str) -> bool:
        """Whether a split is to be prepared."""
        return split in self.splits

    def annotation(self, *places: str) -> Path:
        """The annotation file at the first of several places where there is one.

        Raises:
            FileNotFoundError: If there is none, however many errors are allowed: without it the set would be another.
        """
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

    def image(self, *places: str) -> ImageRef:
        """The image file at the first of several places where there is one; the first of all if there is none."""
        images = [ImageRef.of_file(self.folder, place) for place in places]
        return next((image for image in images if image.file_signature), images[0])

    def items(self, path: Path, prefix: str) -> Iterator[Any]:
        """Reads the items of a list in a JSON file one by one.

        Args:
            path: The file.
            prefix: Where the items are, as `ijson` names it, such as "images.item".

        Raises:
            ValueError: If the file is no JSON or there is no item.
        """
        import ijson

        item = None
        with reading(path, shown=self.progress) as file:
            try:
                for item in ijson.items(_Shallow(path, file), prefix, use_float=True):
                    yield item
            except ijson.JSONError as error:
                what = str(error).partition("\n")[0]  # the rest draws where in the file it is
                raise ValueError(f"{path} is not valid JSON ({what}); copy it again") from error
        if item is None:
            raise ValueError(f"{path} has no {prefix.removesuffix('.item')} list; check that it is the right file")

    def text_lines(self, path: Path) -> Iterator[str]:
        """Reads the lines of a text file.

        Raises:
            ValueError: If it is not UTF-8.
        """
        with reading(path, shown=self.progress) as file:
            try:
                yield from (line.decode() for line in file)
            except UnicodeDecodeError as error:
                raise ValueError(f"{path} is not UTF-8 ({error}); copy it again") from error

    def lines(self, path: Path) -> Iterator[Mapping[str, Any]]:
        """Reads a file with a JSON object per line.

        Raises:
            ValueError: If a line holds something else.
        """
        for number, line in enumerate(self.text_lines(path), start=1):
            if line.strip():
                yield json_object(line, f"{path}, line {number}")


class _Shallow:
    """A JSON file that is refused where it is nested deep, before its parser's memory grows with the square of that.

    Brackets within texts are counted too; where they are not closed, they make a file look a little deeper.
    """

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path, self._file, self._depth = path, file, 0

    def read(self, size: int = -1) -> bytes:
        """Reads bytes.

        Raises:
            ValueError: They open more brackets than is plausible.
        """
        content = self._file.read(size)
        opened = content.count(b"[") + content.count(b"{")
        if self._depth + opened > _DEEPEST:
            codes = np.frombuffer(content, np.uint8)
            steps = np.isin(codes, _OPENING).astype(np.int64) - np.isin(codes, _CLOSING)
            if self._depth + int(steps.cumsum().max()) > _DEEPEST:
                raise ValueError(f"{self._path} is nested too deep to be read; copy it again")
        self._depth = max(0, self._depth + opened - content.count(b"]") - content.count(b"}"))
        return content
