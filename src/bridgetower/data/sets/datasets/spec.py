"""Specification of a published set, its original files, and its ViLT-style Arrow files."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from bridgetower.data.config import NOT_CONTENT, PrepareConfig
from bridgetower.data.sets.answers import vocabulary_file
from bridgetower.data.sets.prepared_set import SetWriter
from bridgetower.data.sets.schema import (
    CAPTIONS,
    NLVR2,
    SNLI_VE,
    VQA,
    Question,
    Schema,
    Statement,
    nlvr2_sentence,
)
from bridgetower.data.sources.column_files import ColumnFile
from bridgetower.data.sources.example import Image
from bridgetower.data.sources.json_lists import LARGEST_ITEM, JsonLists
from bridgetower.files import json_object
from bridgetower.progress import counted, reading

Row = Mapping[str, Any]

_NUMBERED = re.compile(r"(.*_)\d+")
_OTHER_ANSWER = "(not among the answers)"  # no vocabulary has its normal form
_ANNOTATORS_BY_SCORE = {0.3: 1, 0.6: 2, 0.9: 3, 1.0: 4}


@dataclass(frozen=True, kw_only=True)
class Originals:
    """A folder of original files."""

    folder: Path
    splits: Sequence[str]  # to prepare
    progress: bool = False  # whether a bar shows how much of a file is read
    used: list[Path] = field(default_factory=list)  # files that decide the content of the set

    def wants(self, split: str) -> bool:
        return split in self.splits

    def annotation(self, *paths: str) -> Path:
        """Returns the first of several paths that is a file, and notes it as used.

        Raises:
            FileNotFoundError: None of them is a file; the set would lack something without it.
        """
        for path in paths:
            if (self.folder / path).is_file():
                self.used.append(self.folder / path)
                return self.folder / path
        raise FileNotFoundError(
            f"no file {' or '.join(paths)} in {self.folder}; put it there, or leave out what needs it (splits)"
        )

    def image(self, *paths: str) -> Image:
        """Returns the image at the first of several paths that is a file, else at the first path."""
        existing = [path for path in paths if (self.folder / path).is_file()]
        name = existing[0] if existing else paths[0]
        return Image(name=name, location=str(self.folder / name))

    def items(self, path: Path, key: str | None = None) -> Iterator[Any]:
        """Reads the items of a list in a JSON file one by one: of the whole file, or of the list under a key."""
        item = None
        with reading(path, enabled=self.progress) as file:
            for item in JsonLists(file, path).items(key):
                yield item
        if item is None:
            raise ValueError(f"{path} has no {key} list; check that it is the right file")

    def lines(self, path: Path) -> Iterator[Mapping[str, Any]]:
        """Reads a file with a JSON object per line."""
        with reading(path, enabled=self.progress) as file:
            for number, line in enumerate(iter(partial(file.readline, LARGEST_ITEM), b""), start=1):
                if line.strip():
                    yield json_object(line, f"{path}, line {number}")


class PublishedCount(NamedTuple):
    """Published numbers of images (or pairs) and of texts of a split, None where unpublished."""

    images: int | None
    texts: int | None
    source: str


def published(
    source: str, counts: Mapping[str, tuple[int | None, int | None]]
) -> dict[str, list[PublishedCount]]:
    """Returns the counts of each split that one source publishes: images, and texts."""
    return {split: [PublishedCount(*count, source)] for split, count in counts.items()}


@dataclass(frozen=True, kw_only=True)
class DatasetSpec:
    """A set that can be prepared from its original files."""

    name: str
    schema: Schema  # of its examples
    summary: str = ""  # help of its command: a line, and perhaps a paragraph
    layout: str = ""  # the original files, a line each, for the help
    example: str = ""  # a command line for the help, if it takes more than the source
    splits: Sequence[str] = ()  # that are prepared by default
    more_splits: Sequence[str] = ()  # that are prepared by name
    split_rule: str = ""  # how images are given to splits, in words
    protocol: str = ""  # what else was decided about the originals, in words
    licences: Mapping[str, str] = field(default_factory=dict)
    config: type[PrepareConfig] = PrepareConfig
    # counts of each split, the usual one first
    published: Mapping[str, Sequence[PublishedCount]] = field(default_factory=dict)
    # reads the annotations and fills the writer; None if only Arrow files can be read
    fill: Callable[[Originals, SetWriter, Any], None] | None = None
    arrow: ArrowFiles | None = None

    @property
    def all_splits(self) -> tuple[str, ...]:
        return (*self.splits, *self.more_splits)

    @property
    def help(self) -> str:
        files = "\n".join(f"  {line}" for line in self.layout.strip().splitlines())
        example = f"\n\nExample: {self.example}" if self.example else ""
        return f"{self.summary}\n\nSOURCE holds:\n{files}{example}"

    def published_count(self, split: str, images: int, texts: int) -> PublishedCount | None:
        """Returns the published count that equals the given one, else the usual one."""
        counts = self.published.get(split, ())
        for count in counts:
            if count.images in (None, images) and count.texts in (None, texts):
                return count
        return counts[0] if counts else None


@dataclass(frozen=True, kw_only=True)
class ArrowConfig(PrepareConfig):
    """How ViLT-style Arrow files are prepared.

    Attributes:
        max_errors: Missing or broken images, missing files of a numbered series and unusable entries that each set may
            leave out; they are named in `dataset.json`.
        sets: Sets to prepare; empty prepares all of which there is a file.
    """

    sets: tuple[str, ...] = field(default=(), metadata=NOT_CONTENT)


@dataclass(frozen=True, kw_only=True)
class ArrowFiles:
    """The Arrow files of a set."""

    layout: str  # their names, for the help
    split_rule: str = ""  # how images are given to splits, in words; empty: as published
    stems: Mapping[str, Sequence[str]]  # names of the files of each split, without their ending
    # the same for splits that are prepared only by name
    more_stems: Mapping[str, Sequence[str]] = field(default_factory=dict)
    endings: Sequence[str] = (".arrow",)  # the first one that exists is read
    annotators: int = 1  # people who answered each question

    def paths(self, folder: Path, split: str) -> list[Path]:
        """Returns the paths of a split, existing or not, and further files of a numbered series."""
        stems = self.stems[split] if split in self.stems else self.more_stems[split]
        paths = []
        for stem in stems:
            candidates = [folder / f"{stem}{ending}" for ending in self.endings]
            paths.append(next((path for path in candidates if path.is_file()), candidates[0]))
        series = _NUMBERED.fullmatch(paths[-1].stem)
        if series:
            prefix = series[1]
            numbers = (path.stem.removeprefix(prefix) for path in folder.glob(f"{prefix}*.arrow"))
            further = sorted(int(number) for number in numbers if number.isdecimal())
            paths += [
                folder / f"{prefix}{number}.arrow" for number in further if number >= len(stems)
            ]
        return paths

    def any_in(self, folder: Path) -> bool:
        """Returns whether a folder has a file of the set."""
        splits = (*self.stems, *self.more_stems)
        return any(path.is_file() for split in splits for path in self.paths(folder, split))


def arrow_questions(writer: SetWriter, name: str, row: Row, annotators: int) -> list[Question]:
    """Returns questions with as many answers as give the scores of the row."""
    questions = []
    for index, (text, number) in enumerate(zip(row["questions"], row["question_id"], strict=True)):
        answers = list(row["answers"][index]) if row["answers"] else []
        if answers and annotators > 1:
            scores = row["answer_scores"][index]
            votes = []
            for answer, score in zip(answers, scores, strict=True):
                votes += [answer] * _ANNOTATORS_BY_SCORE[round(score, 1)]
            answers = votes + [_OTHER_ANSWER] * (annotators - len(votes))
        questions.append(Question(question_id=number, question=text, answers=tuple(answers)))
    return questions


def image_statements(writer: SetWriter, name: str, row: Row, annotators: int) -> list[Statement]:
    """Returns statements about an image, numbered here because the files do not name them."""
    names = dict(enumerate(SNLI_VE.labels))
    return _labelled_statements(
        writer,
        identifiers=[f"{name}-{index}" for index in range(len(row["sentences"]))],
        texts=[text for _, text in row["sentences"]],
        labels=[names.get(number, number) for number in row["labels"]],
        expected=f"0 to {len(names) - 1}",
    )


def pair_statements(writer: SetWriter, name: str, row: Row, annotators: int) -> list[Statement]:
    """Returns statements about an image pair.

    The official code writes a row per pair, without the numbers of its sentences. Such statements get identifiers that
    NLVR2 does not have, so that no metric or submission mixes them up with others.
    """
    texts = row["questions"]
    has_sentence = nlvr2_sentence(name) is not None
    if has_sentence and len(texts) > 1:
        writer.refuse(
            f"{name}: {len(texts)} statements, expected the one that the identifier names"
        )
        return []
    return _labelled_statements(
        writer,
        identifiers=[name if has_sentence else f"{name}#{index}" for index in range(len(texts))],
        texts=texts,
        labels=row["answers"],
        expected="the text True or False",
    )


def _labelled_statements(
    writer: SetWriter,
    *,
    identifiers: Sequence[str],
    texts: Sequence[str],
    labels: Sequence[Any],
    expected: str,
) -> list[Statement]:
    statements = []
    for identifier, text, label in zip(identifiers, texts, labels, strict=True):
        if label in writer.schema.labels:
            statements.append(Statement(statement_id=identifier, text=text.strip(), label=label))
        else:
            writer.refuse(f"{identifier}: label {label!r}, expected {expected}")
    return statements


@dataclass(frozen=True, kw_only=True)
class ArrowRows:
    """Rows of the Arrow files of a schema."""

    protocol: str  # what the files decide beside splits, in words
    columns: Sequence[str]  # lists, beside the images and the name of a row
    entries: Callable[[SetWriter, str, Row, int], Sequence[Any]]
    images: Sequence[str] = ("image",)
    name: str | None = "image_id"  # column with the name of a row; None numbers the rows

    def read(self, path: Path) -> Iterator[Row]:
        """Yields the rows of a file.

        Raises:
            ValueError: A column is missing, or has something else than lists.
        """
        table = ColumnFile(str(path))
        columns = [*self.images, *self.columns, *filter(None, [self.name])]
        missing = [column for column in columns if column not in table.schema.names]
        if missing:
            raise ValueError(
                f"{path} has no column {', '.join(missing)}; it has {', '.join(table.schema.names)}"
            )
        for batch in table.batches(columns):
            for row in batch.to_pylist():
                for column in self.columns:
                    if not isinstance(row[column], list):
                        kind = type(row[column]).__name__
                        raise ValueError(f"{path} has {kind} in column {column}; expected lists")
                yield row


ARROW_ROWS = {
    CAPTIONS.name: ArrowRows(
        protocol="captions as the files have them, without spaces at their ends",
        columns=("caption",),
        entries=lambda writer, name, row, annotators: writer.filled_captions(name, row["caption"]),
    ),
    VQA.name: ArrowRows(
        protocol="questions as the files have them, which lack those of train and validation without an answer of the "
        "vocabulary; the files keep scores instead of the annotators' answers: there are as many answers as give these "
        "scores",
        columns=("questions", "answers", "answer_labels", "answer_scores", "question_id"),
        entries=arrow_questions,
    ),
    SNLI_VE.name: ArrowRows(
        protocol="statements as the files have them, without spaces at their ends; numbered anew, like the images, as "
        "the files name neither",
        columns=("sentences", "labels"),
        entries=image_statements,
        name=None,
    ),
    NLVR2.name: ArrowRows(
        protocol="statements as the files have them, without spaces at their ends; their identifiers are NLVR2's only "
        "where the files have the number of the sentence",
        columns=("questions", "answers"),
        entries=pair_statements,
        images=("image_0", "image_1"),
        name="identifier",
    ),
}


def fill_from_arrow(
    files: ArrowFiles, originals: Originals, writer: SetWriter, config: ArrowConfig
) -> None:
    """Fills the writer with the rows of all files of the splits.

    Raises:
        FileNotFoundError: A split has no file. Gaps in a numbered series only count as bad.
        ValueError: A file does not have the columns of its schema.
    """
    answers: dict[int, str] = {}  # of a VQA set, by the numbers of their classes
    for split in (*files.stems, *files.more_stems):
        if not originals.wants(split):
            continue
        paths = files.paths(originals.folder, split)
        existing = [path for path in paths if path.is_file()]
        for path in paths:
            if path in existing:
                continue
            if not existing or not _NUMBERED.fullmatch(path.stem):
                raise FileNotFoundError(
                    f"no file {path.name} in {path.parent}; put it there, or leave out {split} (splits)"
                )
            writer.refuse(f"no file {path.name} in {path.parent}")
        for path in counted(existing, f"reading {split}", enabled=originals.progress):
            originals.used.append(path)
            _fill_from_file(path, writer, split, files.annotators, answers)

    # A vocabulary without gaps: other numbers would belong to answers that no question has.
    if sorted(answers) == list(range(len(answers))):
        writer.files = partial(vocabulary_file, [answers[number] for number in sorted(answers)])
    else:
        writer.leave_out("answers.json", "some classes have no answer in these files")


def _fill_from_file(
    path: Path, writer: SetWriter, split: str, annotators: int, answers: dict[int, str]
) -> None:
    layout = ARROW_ROWS[writer.schema.name]
    for index, row in enumerate(layout.read(path)):
        # Name and images.
        name = str(row[layout.name]) if layout.name else f"{path.stem}-{index}"
        origin = f"{path.name}, row {index}"
        contents = [row[column] for column in layout.images]
        if not all(isinstance(content, bytes) and content for content in contents):
            writer.refuse(f"{origin}: no image of {name}")
            continue
        if not writer.is_new(f"{split} {name}"):
            writer.refuse(f"{origin}: {name} comes twice")
            continue
        if len(contents) == 1:
            example_name = name
            image_names = [name if Path(name).suffix else f"{name}.jpg"]
        else:  # NLVR2 may have several rows about an image pair
            example_name = name.rpartition("-")[0] if nlvr2_sentence(name) else name
            image_names = [f"{example_name}-img{side}.png" for side in (0, 1)]
        images = [
            Image(name=f"{path.name}/{image_name}", location=str(path), content=content)
            for image_name, content in zip(image_names, contents, strict=True)
        ]

        # Answers and entries.
        for numbers, texts in zip(
            row.get("answer_labels", ()), row.get("answers", ()), strict=False
        ):
            answers.update(zip(numbers, texts, strict=True))
        entries = layout.entries(writer, name, row, annotators)
        writer.add(images, entries, name=example_name, split=split, origin=origin)
