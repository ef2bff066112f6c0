"""A published set, the files of its authors, and ViLT-style Arrow files, what owners of the official set-up have."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from bridgetower.data.answers import vocabulary_file
from bridgetower.data.config import NOT_CONTENT, PrepareConfig
from bridgetower.data.datasets.originals import Originals
from bridgetower.data.example import ColumnFile, Image
from bridgetower.data.prepared_set import SetWriter
from bridgetower.data.schema import Question, Schema
from bridgetower.progress import counted


@dataclass(frozen=True, kw_only=True)
class PublishedCount:
    """How large a split is.

    Attributes:
        images: Images, or pairs of images; None if it is not published.
        texts: Captions, questions or statements; None if it is not published.
        source: Where it is published.
    """

    images: int | None = None
    texts: int | None = None
    source: str


@dataclass(frozen=True, kw_only=True)
class DatasetSpec:
    """A set that can be prepared from its original files.

    Attributes:
        name: What it is called.
        schema: What its rows hold.
        summary: Help of its command: a line, and perhaps a paragraph.
        layout: The original files, a line each, as the help shows them.
        example: A command line for the help, if it takes more than the source.
        splits: The splits that are prepared by default.
        more_splits: Further ones that it has.
        split_rule: How images are given to them, in words.
        protocol: What else was decided about the originals, in words.
        licences: Licence of each part.
        config: Type of the settings.
        published: Published counts of each split; of several the first is the usual one.
        fill: Reads the annotations and fills the writer; None if only Arrow files can be read.
        arrow: The set as ViLT-style Arrow files.
    """

    name: str
    schema: Schema
    summary: str = ""
    layout: str = ""
    example: str = ""
    splits: Sequence[str] = ()
    more_splits: Sequence[str] = ()
    split_rule: str = ""
    protocol: str = ""
    licences: Mapping[str, str] = field(default_factory=dict)
    config: type[PrepareConfig] = PrepareConfig
    published: Mapping[str, Sequence[PublishedCount]] = field(default_factory=dict)
    fill: Callable[[Originals, SetWriter, Any], None] | None = None
    arrow: ArrowFiles | None = None

    @property
    def help(self) -> str:
        """The help of the command."""
        files = "\n".join(f"  {line}" for line in self.layout.strip().splitlines())
        example = f"\n\nExample: {self.example}" if self.example else ""
        return f"{self.summary}\n\nSOURCE holds:\n{files}{example}"

    def published_count(self, split: str, images: int, texts: int) -> PublishedCount | None:
        """What is published of a split: the counts that it has if they are among those published, else the first.

        Args:
            split: Name.
            images: What the split has.
            texts: Likewise.
        """
        known = self.published.get(split, ())
        equal = (each for each in known if each.images in (None, images) and each.texts in (None, texts))
        return next(equal, known[0] if known else None)


Row = Mapping[str, Any]
Stem = str | tuple[str, ...]
Stems = Mapping[str, Sequence[Stem]]

STATEMENTS = "statements as the files have them, without spaces at their ends"

_CAPTIONS = "captions as the files have them, without spaces at their ends"
_QUESTIONS = (
    "questions as the files have them, which lack those of train and validation without an answer of the vocabulary; "
    "the files keep scores instead of the annotators' answers: there are as many answers as give these scores"
)
_NUMBERED = re.compile(r"(.*_)\d+")
_OTHER_ANSWER = "(not among the answers)"  # no vocabulary has its normal form
_VOTES = {0.3: 1, 0.6: 2, 0.9: 3, 1.0: 4}
"""Annotators by the score that they make together."""


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
class Reading:
    """What reading the rows of a set fills.

    Attributes:
        writer: Images and entries.
        answers: Answers of a VQA set by the numbers of their classes.
    """

    writer: SetWriter
    answers: dict[int, str] = field(default_factory=dict)


def _captions(reading: Reading, name: str, row: Row) -> list[str]:
    return reading.writer.filled_captions(name, row["caption"])


@dataclass(frozen=True, kw_only=True)
class ArrowFiles:
    """The Arrow files of a set, of captions unless other columns and entries are given.

    Attributes:
        layout: Their names, as the help shows them.
        split_rule: How images are given to splits, in words; empty if as in the published files.
        protocol: What else the files decide, in words.
        stems: Names of the files of each split, without their ending; of a tuple the first that is there.
        more_stems: The same of splits that are prepared only by name.
        columns: Columns beside the images.
        images: Columns of images.
        image_id: Column with the name of a row; None to number the rows.
        image_of: Name of the image or pair that a row of a name is about.
        entries: Makes the entries of a row with a name.
    """

    layout: str
    split_rule: str = ""
    protocol: str = _CAPTIONS
    stems: Stems
    more_stems: Stems = field(default_factory=dict)
    columns: Sequence[str] = ("caption", "image_id")
    images: Sequence[str] = ("image",)
    image_id: str | None = "image_id"
    image_of: Callable[[str], str] = str
    entries: Callable[[Reading, str, Row], Sequence[Any]] = _captions

    @property
    def all_stems(self) -> Stems:
        """Names of the files of every split."""
        return {**self.stems, **self.more_stems}

    def paths(self, folder: Path, split: str) -> list[Path]:
        """Files of a split, whether they are there or not."""
        stems = self.all_stems[split]
        return [_first_there(folder, stem) for stem in (*stems, *_further(folder, stems))]

    def any_in(self, folder: Path) -> bool:
        """Whether a folder has any of the files."""
        return any(path.is_file() for split in self.all_stems for path in self.paths(folder, split))

    def spec(self, dataset: DatasetSpec) -> DatasetSpec:
        """Returns the set as one that is prepared from these files."""
        return replace(
            dataset,
            splits=tuple(self.stems),
            more_splits=tuple(self.more_stems),
            split_rule=self.split_rule or dataset.split_rule,
            protocol=self.protocol,
            licences={"images and texts": f"as those of {dataset.name}"},
            config=ArrowConfig,
            fill=partial(_fill, self),
        )


def asked(
    *, layout: str, split_rule: str, stems: Stems, annotators: int, more_stems: Stems | None = None
) -> ArrowFiles:
    """Files of a set with questions, each answered by so many people."""
    return ArrowFiles(
        layout=layout,
        split_rule=split_rule,
        protocol=_QUESTIONS,
        stems=stems,
        more_stems=more_stems or {},
        columns=("questions", "answers", "answer_labels", "answer_scores", "image_id", "question_id"),
        entries=partial(_questions, annotators=annotators),
    )


def numbered(prefix: str, count: int) -> tuple[str, ...]:
    """Names of a series of files."""
    return tuple(f"{prefix}_{number}" for number in range(count))


def _questions(reading: Reading, name: str, row: Row, *, annotators: int) -> list[Question]:
    """Questions with answers that give the scores of the row."""
    questions: list[Question] = []
    for place, (question, number) in enumerate(zip(row["questions"], row["question_id"], strict=True)):
        answers: list[str] = []
        if row["answers"]:
            labels, words = row["answer_labels"][place], row["answers"][place]
            reading.answers.update(zip(labels, words, strict=True))
            answers = _annotations(words, row["answer_scores"][place], annotators)
        questions.append(Question(question_id=number, question=question, answers=tuple(answers)))
    return questions


def _annotations(answers: Sequence[str], scores: Sequence[float], annotators: int) -> list[str]:
    """The annotators' answers that give these scores, as far as they are known."""
    if annotators == 1:
        return list(answers)
    known = [answer for answer, score in zip(answers, scores, strict=True) for _ in range(_VOTES[round(score, 1)])]
    return known + [_OTHER_ANSWER] * (annotators - len(known))


def _first_there(folder: Path, stem: Stem) -> Path:
    paths = [folder / f"{each}.arrow" for each in ((stem,) if isinstance(stem, str) else stem)]
    return next((path for path in paths if path.is_file()), paths[0])


def _further(folder: Path, stems: Sequence[Stem]) -> list[str]:
    """Names of files that are numbered higher than the usual ones."""
    found = _NUMBERED.fullmatch(stems[-1]) if isinstance(stems[-1], str) else None
    if not found:
        return []
    there = (path.stem.removeprefix(found[1]) for path in folder.glob(f"{found[1]}*.arrow"))
    numbers = sorted(int(rest) for rest in there if rest.isdecimal())
    return [f"{found[1]}{number}" for number in numbers if number >= len(stems)]


def _fill(files: ArrowFiles, originals: Originals, writer: SetWriter, config: ArrowConfig) -> None:
    reading = Reading(writer=writer)
    for split in filter(originals.wants, files.all_stems):
        paths = _existing(files.paths(originals.folder, split), split, writer)
        for path in counted(paths, f"reading {split}", shown=originals.progress):
            originals.large.append(path)
            _fill_from(files, reading, path, split)
    # Without gaps in the numbers: else some classes have answers that no question has.
    if sorted(reading.answers) == list(range(len(reading.answers))):
        writer.files = vocabulary_file([reading.answers[number] for number in sorted(reading.answers)])
    else:
        writer.leave_out("answers.json", "some classes have no answer in these files")


def _existing(paths: Sequence[Path], split: str, writer: SetWriter) -> list[Path]:
    """Of the files of a split those that are there; only numbered ones may be missing, and are bad.

    Raises:
        FileNotFoundError: If another one is missing, or all.
    """
    missing = [path for path in paths if not path.is_file()]
    in_series = [path for path in missing if _NUMBERED.fullmatch(path.stem)]  # as many as could be downloaded
    if missing and (len(missing) == len(paths) or in_series != missing):
        place = missing[0]
        raise FileNotFoundError(f"no file {place.name} in {place.parent}; put it there, or leave out {split} (splits)")
    for path in missing:
        writer.refuse(f"no file {path.name} in {path.parent}")
    return [path for path in paths if path not in missing]


def _fill_from(files: ArrowFiles, reading: Reading, path: Path, split: str) -> None:
    table = ColumnFile(str(path))
    missing = [name for name in (*files.images, *files.columns) if name not in table.schema.names]
    if missing:
        raise ValueError(f"{path} has no column {', '.join(missing)}; it has {', '.join(table.schema.names)}")
    number = 0
    for group in range(len(table.sizes)):
        for row in table.group(group).select([*files.images, *files.columns]).to_pylist():
            name = str(row[files.image_id]) if files.image_id else f"{path.stem}-{number}"
            place = f"{path.name}, row {number}"
            contents = [row[column] for column in files.images]
            flat = [one for one in files.columns if one != files.image_id and not isinstance(row[one], list)]
            if flat:
                raise ValueError(f"{path} has {type(row[flat[0]]).__name__} in column {flat[0]}; expected lists")
            if not all(isinstance(content, bytes) and content for content in contents):
                reading.writer.refuse(f"{place}: no image of {name}")
            elif not reading.writer.is_new(f"{split} {name}"):
                reading.writer.refuse(f"{place}: {name} comes twice")
            else:
                images = [
                    Image(name=f"{path.name}/{file}", place=str(path), content=content)
                    for content, file in zip(contents, _file_names(files.image_of(name), len(contents)), strict=True)
                ]
                entries = files.entries(reading, name, row)
                reading.writer.add(images, entries, name=files.image_of(name), split=split, place=place)
            number += 1


def _file_names(name: str, count: int) -> list[str]:
    if count > 1:  # NLVR2
        return [f"{name}-img{side}.png" for side in range(count)]
    return [name if Path(name).suffix else f"{name}.jpg"]
