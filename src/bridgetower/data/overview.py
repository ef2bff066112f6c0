"""A contact sheet of a prepared set: samples of every split with their texts."""

from __future__ import annotations

import random
import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from bridgetower.data.info import DatasetInfo, read_info
from bridgetower.data.kinds import TEXT_COLUMN, Kind, image_columns, text_of
from bridgetower.data.splits import read_split
from bridgetower.lettering import FAINT, GROUND, PAPER, Pen, write_picture
from bridgetower.processor import open_image

COLUMNS = 4
CARD = 320  # pixels, the width of a sample
_PICTURE = 220  # pixels, its height
_LINES = 9  # of text under a picture
_LETTERS = 42  # of a line, about as many as fit
_LINE = 18  # pixels
_BETWEEN = 8  # pixels between the pictures of a pair
_GAP = 24
_MARGIN = 32
_HEAD = 40  # pixels above the samples of a split

Line = tuple[str, bool]
"""A line of text, and whether it begins a text."""


def write_overview(folder: Path, path: Path, *, num_samples: int = 8, seed: int = 0) -> None:
    """Draws samples of every split with their texts into a picture file.

    Args:
        folder: Of a prepared set.
        path: File to write, such as sheet.png.
        num_samples: Pictures per split.
        seed: Of the choice.

    Raises:
        FileNotFoundError: If there is no complete set.
        ValueError: If the name has no suffix of a kind of pictures, or there is not one sample.
    """
    if num_samples < 1:
        raise ValueError(f"num_samples is {num_samples}; expected at least 1")
    info = read_info(folder)
    sections = [_Section.of(folder, split, info, num_samples, seed) for split in info.splits]
    columns = max(min(COLUMNS, len(section.samples)) for section in sections)
    width = 2 * _MARGIN + max(columns, 2) * (CARD + _GAP) - _GAP
    height = 2 * _MARGIN + _HEAD + sum(section.height for section in sections)
    sheet = Image.new("RGB", (width, height), PAPER)
    Pen(sheet).line(info.name, _MARGIN, _MARGIN + 24, width=width - 2 * _MARGIN, size=26, bold=True)
    top = _MARGIN + _HEAD
    for section in sections:
        section.draw(sheet, top)
        top += section.height
    write_picture(path, sheet)


@dataclass(frozen=True, kw_only=True)
class _Sample:
    """A row: the bytes of its pictures, its name, its texts in lines."""

    pictures: tuple[bytes, ...]
    name: str
    lines: tuple[Line, ...]

    def draw(self, sheet: Image.Image, x: int, y: int) -> None:
        count = len(self.pictures)
        width = (CARD - (count - 1) * _BETWEEN) // count
        for number, content in enumerate(self.pictures):
            ground = Image.new("RGB", (width, _PICTURE), GROUND)
            picture = open_image(content, background=GROUND)
            fitted = ImageOps.contain(picture, (width, _PICTURE), Image.Resampling.LANCZOS)
            ground.paste(fitted, ((width - fitted.width) // 2, (_PICTURE - fitted.height) // 2))
            sheet.paste(ground, (x + number * (width + _BETWEEN), y))
        pen, y = Pen(sheet), y + _PICTURE + _LINE
        pen.line(self.name, x, y, width=CARD, size=12, ink=FAINT)
        for number, (text, begins) in enumerate(self.lines, start=1):
            indent = 0 if begins else 12
            pen.line(text, x + indent, y + number * _LINE, width=CARD - indent, size=13)


@dataclass(frozen=True, kw_only=True)
class _Section:
    """Samples of a split in rows under a title."""

    title: str
    samples: tuple[_Sample, ...]

    @classmethod
    def of(cls, folder: Path, split: str, info: DatasetInfo, count: int, seed: int) -> _Section:
        rows = read_split(folder, split, kind=info.kind)
        numbers = sorted(random.Random(f"{seed}/{split}").sample(range(len(rows)), min(count, len(rows))))
        columns, counts = image_columns(info.kind), info.splits[split]
        what = "pictures" if len(columns) == 1 else "pairs of pictures"
        return cls(
            title=f"{split} · {counts.images:,} {what} · {counts.texts:,} {TEXT_COLUMN[info.kind]}",
            samples=tuple(
                _Sample(
                    pictures=tuple(row[column]["bytes"] for column in columns),
                    name=row["image_id"],
                    lines=tuple(_lines(row[TEXT_COLUMN[info.kind]], info.kind)),
                )
                for row in map(rows.row, numbers)
            ),
        )

    @property
    def rows(self) -> list[tuple[_Sample, ...]]:
        return [self.samples[start : start + COLUMNS] for start in range(0, len(self.samples), COLUMNS)]

    @property
    def height(self) -> int:
        return _HEAD + sum(map(_height, self.rows))

    def draw(self, sheet: Image.Image, top: int) -> None:
        Pen(sheet).line(self.title, _MARGIN, top + 26, width=sheet.width - 2 * _MARGIN, size=18, bold=True)
        top += _HEAD
        for row in self.rows:
            for column, sample in enumerate(row):
                sample.draw(sheet, _MARGIN + column * (CARD + _GAP), top)
            top += _height(row)


def _height(row: Sequence[_Sample]) -> int:
    return _PICTURE + (max(len(sample.lines) for sample in row) + 1) * _LINE + _GAP


def _lines(texts: Sequence[Any], kind: Kind) -> list[Line]:
    """As many texts as fit, each in lines, and how many more there are; the first is cut if it does not fit."""
    lines: list[Line] = []
    for number, text in enumerate(texts):
        wrapped = textwrap.wrap(_shown(text, kind), _LETTERS)
        rest = len(texts) - number - 1
        room = _LINES - len(lines) - (rest > 0)
        if len(wrapped) > room and number:
            return [*lines, (f"… and {rest + 1} more", True)]
        if len(wrapped) > room:
            wrapped = [*wrapped[: room - 1], f"{wrapped[room - 1]} …"]
        lines += _marked(wrapped)
    return lines


def _marked(wrapped: Sequence[str]) -> list[Line]:
    return [(line, place == 0) for place, line in enumerate(wrapped)]


def _shown(text: Any, kind: Kind) -> str:
    if kind == "captions":
        return f"• {text}"
    return f"• {text_of(text)} — {_answers(text['answers']) if kind == 'vqa' else text['label'] or 'unknown'}"


def _answers(answers: Sequence[str]) -> str:
    """What people said, the most frequent first."""
    counts = Counter(answers).most_common(3)
    return ", ".join(answer if count == 1 else f"{answer} ({count})" for answer, count in counts) or "unknown"
