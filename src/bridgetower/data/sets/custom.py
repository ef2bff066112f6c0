"""Custom sets from any source, with a kind of set for each task, such as images with captions."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from math import isfinite
from pathlib import Path
from typing import Any

from bridgetower.data.config import WritingConfig
from bridgetower.data.sets import schema as schemas
from bridgetower.data.sets.answers import normalise_answer, vocabulary_file
from bridgetower.data.sets.prepared_set import INFO_FILE, DatasetInfo, SetWriter, read_info
from bridgetower.data.sources.columns import (
    CAPTIONS,
    IMAGES,
    CaptionsFrom,
    Columns,
    Headings,
    RequiredColumn,
    columns_named,
    listed_names,
    note_likely,
)
from bridgetower.data.sources.example import Example, check_bad
from bridgetower.data.sources.fetch import list_files, read_part_of_set
from bridgetower.data.sources.reader import read
from bridgetower.files import json_object
from bridgetower.plain import check_numbers, from_plain

CLASSES_FILE = "classes.json"
STATEMENTS = Headings(
    noun="statements",
    option="text_column",
    usual=("statement", "hypothesis", "sentence2", "title", "description"),
)
LABELS = Headings(
    noun="labels",
    option="label_column",
    usual=("label", "labels", "class", "category", "categories", "tags", "gold_label"),
    likely=("label_name", "class_name", "category_name", "class_label", "tag"),
)
NUMBERS = replace(
    LABELS, noun="numbers", usual=(*LABELS.usual, "score", "rating"), likely=("stars", "value")
)
QUESTIONS = Headings(
    noun="questions",
    option="text_column",
    usual=("question", "questions", "query"),
    likely=("question_text",),
)
ANSWERS = Headings(
    noun="answers",
    option="answer_column",
    usual=("answer", "answers", "multiple_choice_answer"),
    likely=("answer_text", "correct_answer"),
)

# Other words for labels, by schema.
_LABEL_SYNONYMS = {
    "snli-ve": {str(number): label for number, label in enumerate(schemas.SNLI_VE.labels)},
    "nlvr2": {
        **dict.fromkeys(("true", "1", "yes"), "True"),
        **dict.fromkeys(("false", "0", "no"), "False"),
    },
}


@dataclass(frozen=True, kw_only=True)
class CustomSetConfig(WritingConfig):
    """How a source is read and split.

    Attributes:
        image_column: Column with paths, URLs or image bytes; two names with a comma between them for pairs of images;
            default: one of the usual names.
        text_column: Column with the text or a list of texts; default: one of the usual names.
        test_fraction: Share of the images for test, where the source gives no splits.
        validation_fraction: Share of the images for validation, likewise.
        folds: Number of folds for a cross-validation, called fold-1, fold-2 and so on, in place of the splits; 0: none.
        seed: Seed of the split; the same image comes into the same split whatever else the source has.
    """

    image_column: str | None = None
    text_column: str | None = None
    test_fraction: float = 0.1
    validation_fraction: float = 0.1
    folds: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_numbers(self, folds=(0, 20))
        if self.folds == 1:
            raise ValueError("folds is 1; expected 0, or 2 to 20")
        fractions = self.test_fraction, self.validation_fraction
        if min(fractions) < 0 or sum(fractions) >= 1:
            raise ValueError(
                f"fractions for test and validation are {fractions[0]} and {fractions[1]}; "
                "give >= 0, together below 1"
            )


@dataclass(frozen=True, kw_only=True)
class PairsConfig(CustomSetConfig):
    """How images with captions are read and split.

    Attributes:
        captions_from: "text" takes captions from the text column, "folder" the name of the folder of each image.
    """

    captions_from: CaptionsFrom = "text"


@dataclass(frozen=True, kw_only=True)
class LabelledConfig(CustomSetConfig):
    """How images, texts and labels are read and split.

    Attributes:
        label_column: Column with a label or, where several may hold, a list of them; default: one of the usual names,
            and of images in a folder each takes the name of the folder that it is in.
        label_separator: What stands between the labels of a cell, such as ";"; None: a cell is one label.
    """

    label_column: str | None = None
    label_separator: str | None = None


@dataclass(frozen=True, kw_only=True)
class VqaSetConfig(CustomSetConfig):
    """How questions about images are read and split.

    Attributes:
        answer_column: Column with an answer, or a list with one of each person who was asked; default: one of the
            usual names.
        answer_separator: What stands between the answers of a cell, such as ";"; default: a cell is one answer.
        min_count: Questions of the training split that an answer must be given to, to be one that the model can choose.
    """

    answer_column: str | None = None
    answer_separator: str | None = None
    min_count: int = 1


@dataclass(frozen=True, kw_only=True)
class Classes:
    """Classes of a prepared set, saved as `classes.json`."""

    names: tuple[str, ...]  # in the order of the class numbers; empty if the labels are numbers
    multi_label: bool  # whether several may hold at once

    @property
    def numbers(self) -> bool:
        """Whether the labels are numbers."""
        return not self.names


def read_classes(folder: str | Path) -> Classes:
    """Reads the classes of a prepared set."""
    advice = "a set that `bridgetower prepare classification` wrote"
    path, content = read_part_of_set(folder, CLASSES_FILE, advice)
    return from_plain(Classes, json_object(content, path), path)


@dataclass(kw_only=True)
class SourceSummary:
    """Rows of a source up to now, from which further files of the set are made."""

    rows: int = 0
    ids: set[str] = field(default_factory=set)
    labels: set[str] = field(default_factory=set)
    # origin of a row with a list of labels (True), and of one with a single label (False)
    origin_by_is_list: dict[bool, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class CustomSetSpec:
    """A kind of custom set."""

    name: str  # of its command
    schema: schemas.Schema  # of its examples
    summary: str  # help of its command: a line, and perhaps paragraphs
    config: type[CustomSetConfig] = CustomSetConfig
    # Returns the entries of a row, or raises a ValueError about the row.
    entries: Callable[[Example, Any, SourceSummary], Sequence[Any]]
    num_images: int | None = 1  # of a row; None: one or none
    texts: Headings | None = None  # columns with its texts, beside captions; None needs no text
    labels: Headings | None = None  # columns with what is learnt; None needs none
    # Returns the content of further files by name, from the summary, the config and the training entries.
    files: Callable[[SourceSummary, Any, Iterator[Any]], Mapping[str, Any]] = lambda *_: {}

    def required_columns(self, config: Any) -> tuple[RequiredColumn, ...]:
        """Returns the columns that tables of this kind must have."""
        images = RequiredColumn(headings=(IMAGES,))
        if self.num_images is None:
            return (RequiredColumn(headings=(IMAGES, CAPTIONS), alternatives=(STATEMENTS,)),)
        if self.texts is None or getattr(config, "captions_from", "text") == "folder":
            return (images,)
        return images, RequiredColumn(headings=(self.texts,), alternatives=(CAPTIONS,))


SOURCE_HELP = (
    "A folder of images, a table (CSV, TSV, JSON, JSON lines, Parquet, Arrow), tar shards, a datasets repository or "
    "save_to_disk folder, or the URL of one of these."
)


def prepare_custom(
    kind: str | CustomSetSpec,
    source: str | Path,
    out: Path,
    config: Any = None,
    *,
    progress: bool = True,
) -> DatasetInfo:
    """Writes a custom set to a folder, unless the folder has the complete set of the same source.

    A killed attempt continues: images that were written are not read again.

    Args:
        kind: Name of one of `CUSTOM_SETS`, or a custom kind.
        source: As `bridgetower.data.sources.reader.read` takes it.
        out: Folder of the set.
        config: How the source is read and split.
        progress: Show a bar, or log a line each 20 seconds where standard error is no terminal.

    Raises:
        FileNotFoundError: The source is missing.
        ValueError: The kind is unknown, the source cannot be read or too much of it is bad, or `out` holds another set.
    """
    if isinstance(kind, str) and kind not in CUSTOM_SETS:
        raise ValueError(f"no kind of set called {kind!r}; there are {', '.join(CUSTOM_SETS)}")
    spec = CUSTOM_SETS[kind] if isinstance(kind, str) else kind
    config = config or spec.config()
    check_config(spec.name, config, spec.config)

    # A finished set of the same files and settings stays as it is.
    files = sorted(f"{file.name} {file.version}" for file in list_files(str(source)))
    digest = hashlib.sha256("\n".join(files).encode(errors="replace")).hexdigest()
    settings = {"kind": spec.name, "source": digest, **config.settings}
    finished = finished_set(Path(out), settings, config.max_errors)
    if finished:
        return finished

    # Each row of the source is an example, or refused.
    columns = Columns(
        image=config.image_column,
        text=config.text_column,
        captions_from=getattr(config, "captions_from", "text"),
        required=spec.required_columns(config),
    )
    summary = SourceSummary()
    allowed = (0, 1) if spec.num_images is None else (spec.num_images,)
    with SetWriter(
        Path(out),
        spec.schema,
        config,
        shares={"test": config.test_fraction, "validation": config.validation_fraction},
        folds=config.folds,
        seed=config.seed,
        by_content=True,
        progress=progress,
    ) as writer:
        for example in read(source, columns):
            summary.rows += 1
            images = example.images
            try:
                if example.problem:
                    raise ValueError(example.problem)
                if len(images) not in allowed:
                    raise ValueError(
                        f"it has {len(images)} images; expected {spec.num_images or 'one or none'}"
                    )
                entries = spec.entries(example, config, summary)
            except ValueError as error:
                writer.refuse(f"{example.origin}: {error}")
                continue
            name = "" if images else example.id
            writer.add(images, entries, name=name, split=example.split, origin=example.origin)
        info = DatasetInfo(
            name=Path(str(source).rstrip("/")).stem,
            split_rule="as the source gives them, else by a hash of seed and image",
            settings=settings,
        )

        def further_files() -> Mapping[str, Any]:
            if spec.labels and not any(summary.labels) and any(writer.training_entries()):
                raise ValueError(
                    f"no row of {source} has {spec.labels.noun}; beside images and texts, its columns "
                    f"are {listed_names(example.fields)}; {spec.labels.advice}"
                )
            return spec.files(summary, config, writer.training_entries())

        writer.files = further_files
        return writer.finish(source, info)


def check_config(name: str, config: object, expected: type) -> None:
    """Refuses the settings of another set."""
    if type(config) is not expected:
        raise ValueError(f"{name} takes a {expected.__name__}, given is a {type(config).__name__}")


def finished_set(out: Path, settings: Mapping[str, Any], max_errors: int) -> DatasetInfo | None:
    """Returns the description of a complete set of the same settings, or None if it has to be written."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; give a folder")
    if not (out / INFO_FILE).exists():
        return None
    info = read_info(out)
    names = {**info.settings, **settings}
    different = [name for name in names if info.settings.get(name) != settings.get(name)]
    if different:
        raise ValueError(
            f"{out} holds a set that differs in {', '.join(different)}; choose another folder, or remove it"
        )
    check_bad(out, info.some_left_out.get("cannot be used", ()), max_errors)
    return info


def caption_entries(example: Example, config: PairsConfig, summary: SourceSummary) -> Sequence[str]:
    """Returns the different captions of an example."""
    if not example.texts:
        raise ValueError("it has no caption")
    return list(dict.fromkeys(example.texts))


def _labelled_entries(
    example: Example, config: LabelledConfig, summary: SourceSummary, headings: Headings = LABELS
) -> Sequence[schemas.LabelledEntry]:
    """Returns an entry. A blank cell is an unknown label, or with a separator no class, as an empty list."""
    cell = _find_cell(example, config.label_column, headings)
    separator = config.label_separator
    text = joined_text(example)
    if not text and not example.images:
        raise ValueError("it has neither image nor text")
    example_id = _unique_id(example, summary)
    is_blank_text = isinstance(cell, str) and not cell.strip()
    if cell is None or cell != cell or (is_blank_text and separator is None):
        return [schemas.LabelledEntry(example_id=example_id, text=text, labelled=False)]
    names = map(_stripped_text, _cell_values(cell, separator))
    labels = tuple(dict.fromkeys(filter(None, names)))
    summary.labels.update(labels)
    is_list = separator is not None or isinstance(cell, list)
    summary.origin_by_is_list.setdefault(is_list, example.origin)
    return [schemas.LabelledEntry(example_id=example_id, text=text, labels=labels)]


def classes_file(
    summary: SourceSummary, config: LabelledConfig, training: Iterator[Any]
) -> Mapping[str, Any]:
    """Returns the content of `classes.json`."""
    origins = summary.origin_by_is_list
    if len(origins) > 1:
        raise ValueError(
            f"{origins[True]} has a list of labels and {origins[False]} a single one; give a list in each row"
        )
    if len(summary.labels) < 2:
        raise ValueError(
            f"the classes are ({', '.join(summary.labels)}); "
            "expected at least two: give label_column another column"
        )
    numbers = sorted(filter(str.isdecimal, summary.labels), key=lambda name: (int(name), name))
    names = sorted(name for name in summary.labels if not name.isdecimal())
    classes = Classes(names=(*numbers, *names), multi_label=True in origins)
    return {CLASSES_FILE: asdict(classes)}


def number_entries(
    example: Example, config: LabelledConfig, summary: SourceSummary
) -> Sequence[schemas.LabelledEntry]:
    """Returns the entry of an example whose label is a number."""
    (entry,) = _labelled_entries(example, config, summary, NUMBERS)
    with suppress(ValueError):
        if not entry.labelled or (len(entry.labels) == 1 and isfinite(float(entry.labels[0]))):
            return [entry]
    raise ValueError(f"its label {', '.join(entry.labels)!r} is no number")


def question_entries(
    example: Example, config: VqaSetConfig, summary: SourceSummary
) -> Sequence[schemas.Question]:
    """Returns the questions of an example."""
    text = _entry_text(example, config, QUESTIONS)
    if not text:
        raise ValueError("it has no question")
    cell = _find_cell(example, config.answer_column, ANSWERS)
    answers = []
    for value in _cell_values(cell, config.answer_separator):
        answer = value.get("answer") if isinstance(value, dict) else value
        answers.append(_stripped_text(answer))
    summary.labels.update(answers)
    number = _stripped_text(example.fields.get("question_id")) or str(summary.rows)
    if not number.isdecimal() or number in summary.ids:
        raise ValueError(
            f"question_id {number!r} comes twice or is no whole number; leave the column out"
        )
    summary.ids.add(number)
    return [
        schemas.Question(
            question_id=int(number),
            question=text,
            question_type=_stripped_text(example.fields.get("question_type")),
            answer_type=_stripped_text(example.fields.get("answer_type")),
            answers=tuple(filter(None, answers)),
        )
    ]


def answers_file(
    summary: SourceSummary, config: VqaSetConfig, training: Iterator[Any]
) -> Mapping[str, Any]:
    """Returns the content of `answers.json`."""
    num_questions = Counter[str]()  # of each answer
    has_questions = False
    for entry in training:
        has_questions = True
        answers = map(normalise_answer, entry["answers"])
        num_questions.update(dict.fromkeys(answers, 1))
    vocabulary = [
        answer for answer, count in num_questions.items() if answer and count >= config.min_count
    ]
    if has_questions and len(vocabulary) < 2:
        raise ValueError(
            f"{len(vocabulary)} answers are given to at least {config.min_count} training questions; expected two"
        )
    return vocabulary_file(vocabulary)


def _statement_entries(
    example: Example, config: CustomSetConfig, summary: SourceSummary, schema: schemas.Schema
) -> Sequence[schemas.Statement]:
    label = _stripped_text(_find_cell(example, None, LABELS)).lower()
    label = _LABEL_SYNONYMS[schema.name].get(label, label)
    text = _entry_text(example, config, STATEMENTS)
    return [schemas.Statement(statement_id=_unique_id(example, summary), text=text, label=label)]


def joined_text(example: Example) -> str:
    """Returns the text of a labelled example as one string."""
    return " ".join(example.texts) or _stripped_text(_find_cell(example, None, STATEMENTS))


def _unique_id(example: Example, summary: SourceSummary) -> str:
    name = _stripped_text(example.fields.get("id")) or str(summary.rows)
    if name in summary.ids:
        raise ValueError(f"id {name!r} comes twice")
    summary.ids.add(name)
    return name


def _entry_text(example: Example, config: CustomSetConfig, headings: Headings) -> str:
    """Returns the text of a usual column unless a column was named, else the joined captions."""
    text = "" if config.text_column else _stripped_text(_find_cell(example, None, headings))
    return text or " ".join(example.texts)


def _find_cell(example: Example, column: str | None, headings: Headings) -> Any:
    """Returns the cell of a column, by default the first one with a usual or a likely name."""
    fields = example.fields
    if column:
        if column not in fields:
            raise ValueError(f"it has no column {column}; it has {', '.join(fields)}")
        return fields[column]
    if usual := columns_named(fields, headings.usual):
        return fields[usual[0]]
    if likely := columns_named(fields, headings.likely):
        note_likely("", likely[0], headings)
        return fields[likely[0]]
    return None


def _cell_values(cell: Any, separator: str | None) -> list[Any]:
    """Returns the values of a cell: a list, texts between separators, or the cell itself."""
    if isinstance(cell, list):
        return cell
    return _stripped_text(cell).split(separator) if separator else [cell]


def _stripped_text(cell: object) -> str:
    return "" if cell is None or cell != cell else str(cell).strip()


def _spec(
    name: str, title: str, *, example: str, details: str = "", **fields: Any
) -> CustomSetSpec:
    splits = "Splits come from a column `split`, from folders or file names; else images are split by a hash."
    details = f"{details} {splits}".strip()
    command = f"bridgetower prepare {name} {example}.csv --out data/{example}"
    summary = f"{title}\n\n{details}\n\nExample: {command}"
    return CustomSetSpec(name=name, summary=summary, **fields)


_WITH_LABELS: Mapping[str, Any] = {
    "schema": schemas.CLASSIFICATION,
    "config": LabelledConfig,
    "num_images": None,
}
_SPECS = (
    _spec(
        "pairs",
        "Images with captions.",
        example="photos",
        schema=schemas.CAPTIONS,
        config=PairsConfig,
        entries=caption_entries,
        texts=CAPTIONS,
    ),
    _spec(
        "classification",
        "Images, texts or both with a label, or several.",
        details="The names of the classes are in classes.json.",
        example="memes",
        entries=_labelled_entries,
        labels=LABELS,
        files=classes_file,
        **_WITH_LABELS,
    ),
    _spec(
        "regression",
        "Images, texts or both with a number, such as a rating.",
        example="ratings",
        entries=number_entries,
        labels=NUMBERS,
        files=lambda *_: {CLASSES_FILE: asdict(Classes(names=(), multi_label=False))},
        **_WITH_LABELS,
    ),
    _spec(
        "vqa",
        "Questions about images with one answer or several.",
        details="The answers that a model can choose, those of the training split, are in answers.json.",
        example="charts",
        schema=schemas.VQA,
        config=VqaSetConfig,
        entries=question_entries,
        files=answers_file,
        texts=QUESTIONS,
        labels=ANSWERS,
    ),
    _spec(
        "entailment",
        "Images with statements that they contradict, leave open or entail: labels contradiction, neutral and "
        "entailment, or 0, 1 and 2.",
        example="claims",
        schema=schemas.SNLI_VE,
        entries=partial(_statement_entries, schema=schemas.SNLI_VE),
        texts=STATEMENTS,
    ),
    _spec(
        "image-pairs",
        "Pairs of images with statements that are true or false of them: columns image_1 and image_2, or those of "
        "--image-column A,B.",
        example="pairs",
        schema=schemas.NLVR2,
        entries=partial(_statement_entries, schema=schemas.NLVR2),
        texts=STATEMENTS,
        num_images=2,
    ),
)

CUSTOM_SETS: Mapping[str, CustomSetSpec] = {spec.name: spec for spec in _SPECS}
"""All kinds of custom sets, by name."""
