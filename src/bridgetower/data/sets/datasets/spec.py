"""A published set, the folder of its original files, and ViLT-style Arrow files, which owners of the originals have."""

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
Stems = Mapping[str, Sequence[str | tuple[str, ...]]]

_NUMBERED = re.compile(r"(.*_)\d+")
_OTHER_ANSWER = "(not among the answers)"  # no vocabulary has its normal form
_VOTES = {0.3: 1, 0.6: 2, 0.9: 3, 1.0: 4}  # annotators by the score that they make together


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
        found = next(
            (self.folder / place for place in places if (self.folder / place).is_file()), None
        )
        if found is None:
            raise FileNotFoundError(
                f"no file {' or '.join(places)} in {self.folder}; put it there, or leave out what needs it (splits)"
            )
        self.used.append(found)
        return found

    def image(self, *places: str) -> Image:
        """The image file at the first of several places where there is one; the first of all if there is none."""
        place = next((one for one in places if (self.folder / one).is_file()), places[0])
        return Image(name=place, location=str(self.folder / place))

    def items(self, path: Path, key: str | None = None) -> Iterator[Any]:
        """Reads the items of a list in a JSON file one by one: the whole, or what stands under a key."""
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
    """How many images (or pairs) and texts a split has, as far as it is published."""

    images: int | None
    texts: int | None
    source: str


def published(
    source: str, counts: Mapping[str, tuple[int | None, int | None]]
) -> dict[str, list[PublishedCount]]:
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
        equal = (
            each for each in known if each.images in (None, images) and each.texts in (None, texts)
        )
        return next(equal, known[0] if known else None)


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

    layout: str  # their names, as the help shows them
    # how images are given to splits, in words; empty if as in the published files
    split_rule: str = ""
    stems: Stems  # names of the files of each split, without their ending; of a tuple the first that is there
    more_stems: Stems = field(
        default_factory=dict
    )  # the same of splits that are prepared only by name
    annotators: int = 1  # who answered each question

    def paths(self, folder: Path, split: str) -> list[Path]:
        """Files of a split, whether they are there or not, and those that are numbered higher than the usual ones."""
        stems = {**self.stems, **self.more_stems}[split]
        choices = [
            [folder / f"{name}.arrow" for name in ([stem] if isinstance(stem, str) else stem)]
            for stem in stems
        ]
        paths = [next((path for path in among if path.is_file()), among[0]) for among in choices]
        if series := _NUMBERED.fullmatch(paths[-1].stem):
            there = (
                path.stem.removeprefix(series[1]) for path in folder.glob(f"{series[1]}*.arrow")
            )
            more = sorted(
                int(rest) for rest in there if rest.isdecimal() and int(rest) >= len(stems)
            )
            paths += [folder / f"{series[1]}{number}.arrow" for number in more]
        return paths

    def any_in(self, folder: Path) -> bool:
        return any(
            path.is_file()
            for split in (*self.stems, *self.more_stems)
            for path in self.paths(folder, split)
        )


def _questions(writer: SetWriter, name: str, row: Row, annotators: int) -> list[Question]:
    """Questions with answers that give the scores of the row."""
    questions: list[Question] = []
    for place, (question, number) in enumerate(
        zip(row["questions"], row["question_id"], strict=True)
    ):
        answers = list(row["answers"][place]) if row["answers"] else []
        if answers and annotators > 1:
            scores = row["answer_scores"][place]
            answers = [
                one
                for one, score in zip(answers, scores, strict=True)
                for _ in range(_VOTES[round(score, 1)])
            ]
            answers += [_OTHER_ANSWER] * (annotators - len(answers))
        questions.append(Question(question_id=number, question=question, answers=tuple(answers)))
    return questions


def _statements(writer: SetWriter, name: str, row: Row, annotators: int) -> list[Statement]:
    """Statements about an image, or two; several of them under the identifier of one are bad.

    For NLVR2 the official code writes a row per image pair, without the numbers of its sentences. What is made of its
    name here is no identifier of NLVR2, so that nothing is computed or submitted by sentences that are not known.
    """
    of_pairs, statements = writer.schema is NLVR2, list[Statement]()
    if of_pairs:
        texts, labels, expected = row["questions"], row["answers"], "the text True or False"
    else:
        texts, names = [text for _, text in row["sentences"]], dict(enumerate(SNLI_VE.labels))
        labels, expected = (
            [names.get(label, label) for label in row["labels"]],
            f"0 to {len(names) - 1}",
        )
    known = of_pairs and nlvr2_sentence(name) is not None
    if known and len(texts) > 1:
        writer.refuse(
            f"{name}: {len(texts)} statements, expected the one that the identifier names"
        )
        return []
    for place, (text, label) in enumerate(zip(texts, labels, strict=True)):
        identifier = name if known else f"{name}{'#' if of_pairs else '-'}{place}"
        if label in writer.schema.labels:
            statements.append(Statement(statement_id=identifier, text=text.strip(), label=label))
        else:
            writer.refuse(f"{identifier}: label {label!r}, expected {expected}")
    return statements


@dataclass(frozen=True, kw_only=True)
class Rows:
    """What the files hold of one schema."""

    protocol: str  # what they decide beside splits, in words
    columns: Sequence[str]  # beside the images and the name of a row, each a list
    entries: Callable[[SetWriter, str, Row, int], Sequence[Any]]
    images: Sequence[str] = ("image",)
    name: str | None = "image_id"  # column with the name of a row; None to number the rows


ROWS = {
    CAPTIONS.name: Rows(
        protocol="captions as the files have them, without spaces at their ends",
        columns=("caption",),
        entries=lambda writer, name, row, annotators: writer.filled_captions(name, row["caption"]),
    ),
    VQA.name: Rows(
        protocol="questions as the files have them, which lack those of train and validation without an answer of the "
        "vocabulary; the files keep scores instead of the annotators' answers: there are as many answers as give these "
        "scores",
        columns=("questions", "answers", "answer_labels", "answer_scores", "question_id"),
        entries=_questions,
    ),
    SNLI_VE.name: Rows(
        protocol="statements as the files have them, without spaces at their ends; numbered anew, like the images, as "
        "the files name neither",
        columns=("sentences", "labels"),
        entries=_statements,
        name=None,
    ),
    NLVR2.name: Rows(
        protocol="statements as the files have them, without spaces at their ends; their identifiers are NLVR2's only "
        "where the files have the number of the sentence",
        columns=("questions", "answers"),
        entries=_statements,
        images=("image_0", "image_1"),
        name="identifier",
    ),
}


def fill_from_arrow(
    files: ArrowFiles, originals: Originals, writer: SetWriter, config: ArrowConfig
) -> None:
    answers: dict[int, str] = {}  # of a VQA set, by the numbers of their classes
    for split in filter(originals.wants, (*files.stems, *files.more_stems)):
        paths = files.paths(originals.folder, split)
        missing = [path for path in paths if not path.is_file()]
        in_series = [
            path for path in missing if _NUMBERED.fullmatch(path.stem)
        ]  # as many as could be downloaded
        if missing and (len(missing) == len(paths) or in_series != missing):
            name, folder = missing[0].name, missing[0].parent
            raise FileNotFoundError(
                f"no file {name} in {folder}; put it there, or leave out {split} (splits)"
            )
        for path in missing:
            writer.refuse(f"no file {path.name} in {path.parent}")
        there = [path for path in paths if path not in missing]
        for path in counted(there, f"reading {split}", enabled=originals.progress):
            originals.large.append(path)
            _fill_from(path, files, writer, answers, split)
    # Without gaps in the numbers: else some classes have answers that no question has.
    if sorted(answers) == list(range(len(answers))):
        writer.files = partial(vocabulary_file, [answers[number] for number in sorted(answers)])
    else:
        writer.leave_out("answers.json", "some classes have no answer in these files")


def _fill_from(
    path: Path, files: ArrowFiles, writer: SetWriter, answers: dict[int, str], split: str
) -> None:
    table, rows = ColumnFile(str(path)), ROWS[writer.schema.name]
    names = [*rows.images, *rows.columns, *([rows.name] if rows.name else [])]
    if missing := [name for name in names if name not in table.schema.names]:
        raise ValueError(
            f"{path} has no column {', '.join(missing)}; it has {', '.join(table.schema.names)}"
        )
    for number, row in enumerate(
        row for batch in table.batches(names) for row in batch.to_pylist()
    ):
        name = str(row[rows.name]) if rows.name else f"{path.stem}-{number}"
        place = f"{path.name}, row {number}"
        contents = [row[column] for column in rows.images]
        if flat := [one for one in rows.columns if not isinstance(row[one], list)]:
            raise ValueError(
                f"{path} has {type(row[flat[0]]).__name__} in column {flat[0]}; expected lists"
            )
        if not all(isinstance(content, bytes) and content for content in contents):
            writer.refuse(f"{place}: no image of {name}")
        elif not writer.is_new(f"{split} {name}"):
            writer.refuse(f"{place}: {name} comes twice")
        else:
            for labels, words in zip(
                row.get("answer_labels", ()), row.get("answers", ()), strict=False
            ):
                answers.update(zip(labels, words, strict=True))
            if len(contents) == 1:
                image = name
                inner = [image if Path(image).suffix else f"{image}.jpg"]
            else:  # a row of NLVR2 may be one of several about an image pair
                image = name.rpartition("-")[0] if nlvr2_sentence(name) else name
                inner = [f"{image}-img{side}.png" for side in (0, 1)]
            images = [
                Image(name=f"{path.name}/{file}", location=str(path), content=content)
                for content, file in zip(contents, inner, strict=True)
            ]
            entries = rows.entries(writer, name, row, files.annotators)
            writer.add(images, entries, name=image, split=split, origin=place)
