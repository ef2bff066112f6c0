"""Custom sets from any source: one kind for each task, such as images with captions, or questions about images."""

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
    note_likely,
)
from bridgetower.data.sources.example import Example, check_bad
from bridgetower.data.sources.fetch import list_files, read_part_of_set
from bridgetower.data.sources.reader import read
from bridgetower.files import json_object
from bridgetower.plain import from_plain

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

_MEANT = {  # labels in other words, by schema
    "snli-ve": {str(number): label for number, label in enumerate(schemas.SNLI_VE.labels)},
    "nlvr2": {
        "true": "True",
        "1": "True",
        "yes": "True",
        "false": "False",
        "0": "False",
        "no": "False",
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
        seed: Seed of the split; the same image comes into the same split whatever else the source has.
    """

    image_column: str | None = None
    text_column: str | None = None
    test_fraction: float = 0.1
    validation_fraction: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        test, validation = self.test_fraction, self.validation_fraction
        if min(test, validation) < 0 or test + validation >= 1:
            raise ValueError(
                f"fractions for test and validation are {test} and {validation}; give >= 0, together below 1"
            )


@dataclass(frozen=True, kw_only=True)
class PairsConfig(CustomSetConfig):
    """How images with captions are read and split.

    Attributes:
        captions_from: What captions are; "folder": the name of the folder that an image is in.
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
    """What an example with labels can be, as `classes.json` holds it."""

    names: tuple[
        str, ...
    ]  # of the classes, in the order of their numbers; none if the labels are numbers
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
class Seen:
    """What the rows of a source have had so far, which decides on further files of the set."""

    rows: int = 0
    labels: set[str] = field(default_factory=set)
    several: dict[bool, str] = field(
        default_factory=dict
    )  # places of a row with a list of labels, and of one without
    ids: set[str] = field(default_factory=set)


@dataclass(frozen=True, kw_only=True)
class CustomSetSpec:
    """A kind of custom set."""

    name: str  # of its command
    schema: schemas.Schema  # of its examples
    summary: str  # help of its command: a line, and perhaps paragraphs
    config: type[CustomSetConfig] = CustomSetConfig  # type of the settings
    # makes entries of a row, or raises ValueError with what is wrong
    entries: Callable[[Example, Any, Seen], Sequence[Any]]
    num_images: int | None = 1  # images of a row; None: one or none
    texts: Headings | None = None  # what its texts are, beside captions; None: rows need no text
    # makes the content of further files of the set, also from the entries of its training split
    files: Callable[[Seen, Any, Iterator[Any]], Mapping[str, Any]] = lambda seen, config, training: {}


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
    """Writes a custom set to the folder `out`; a complete one of the same source is left as it is.

    An attempt that was killed is continued: images that were written are not read again.

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
    listing = sorted(f"{one.name} {one.version}" for one in list_files(str(source)))
    digest = hashlib.sha256("\n".join(listing).encode(errors="replace")).hexdigest()
    settings = {"kind": spec.name, "source": digest, **config.settings}
    if finished := finished_set(Path(out), settings, config.max_errors):
        return finished
    columns = Columns(
        image=config.image_column,
        text=config.text_column,
        captions_from=getattr(config, "captions_from", "text"),
        required=_required_columns(spec, config),
    )
    shares = {"test": config.test_fraction, "validation": config.validation_fraction}
    seen = Seen()
    with SetWriter(
        Path(out),
        spec.schema,
        config,
        shares=shares,
        seed=config.seed,
        by_content=True,
        progress=progress,
    ) as writer:
        for example in read(source, columns):
            seen.rows += 1
            images, origin = example.images, example.origin
            try:
                if example.problem:
                    raise ValueError(example.problem)
                if len(images) != (
                    min(1, len(images)) if spec.num_images is None else spec.num_images
                ):
                    raise ValueError(
                        f"it has {len(images)} images; expected {spec.num_images or 'one or none'}"
                    )
                entries = spec.entries(example, config, seen)
            except ValueError as error:
                writer.refuse(f"{origin}: {error}")
                continue
            writer.add(
                images,
                entries,
                name="" if images else example.id,
                split=example.split,
                origin=origin,
            )
        info = DatasetInfo(
            name=Path(str(source).rstrip("/")).stem,
            split_rule="as the source gives them, else by a hash of seed and image",
            settings=settings,
        )
        writer.files = lambda: spec.files(seen, config, writer.training_entries())
        return writer.finish(source, info)


def _required_columns(spec: CustomSetSpec, config: Any) -> tuple[RequiredColumn, ...]:
    """Returns the columns that tables of a kind of set must have."""
    images = RequiredColumn(headings=(IMAGES,))
    if spec.num_images is None:
        return (RequiredColumn(headings=(IMAGES, CAPTIONS), alternatives=(STATEMENTS,)),)
    if spec.texts is None or getattr(config, "captions_from", "text") == "folder":
        return (images,)
    return images, RequiredColumn(headings=(spec.texts,), alternatives=(CAPTIONS,))


def check_config(name: str, config: object, expected: type) -> None:
    """Refuses the settings of another set."""
    if type(config) is not expected:
        raise ValueError(f"{name} takes a {expected.__name__}, given is a {type(config).__name__}")


def finished_set(out: Path, settings: Mapping[str, Any], max_errors: int) -> DatasetInfo | None:
    """Returns what `out` holds if that is complete and was made in the same way; None if it has to be written."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; give a folder")
    if not (out / INFO_FILE).exists():
        return None
    info = read_info(out)
    different = [
        name
        for name in {**info.settings, **settings}
        if info.settings.get(name) != settings.get(name)
    ]
    if different:
        raise ValueError(
            f"{out} holds a set that differs in {', '.join(different)}; choose another folder, or remove it"
        )
    check_bad(out, info.some_left_out.get("cannot be used", ()), max_errors)
    return info


def _captions(example: Example, config: PairsConfig, seen: Seen) -> Sequence[str]:
    if not example.texts:
        raise ValueError("it has no caption")
    return list(dict.fromkeys(example.texts))


def _labelled(
    example: Example, config: LabelledConfig, seen: Seen, headings: Headings = LABELS
) -> Sequence[schemas.LabelledEntry]:
    """A blank cell is an unknown label; an empty list, or a blank cell with a separator, is no class."""
    cell, separator = _cell(example, config.label_column, headings), config.label_separator
    labels: tuple[str, ...] | None = None
    if (
        cell is not None
        and cell == cell
        and not (separator is None and isinstance(cell, str) and not cell.strip())
    ):
        parts = (
            cell if isinstance(cell, list) else str(cell).split(separator) if separator else [cell]
        )
        labels = tuple(dict.fromkeys(name for part in parts if (name := _text(part))))
    text = joined_text(example)
    if not text and not example.images:
        raise ValueError("it has neither image nor text")
    name = _id(example, seen)
    if labels is not None:
        seen.several.setdefault(separator is not None or isinstance(cell, list), example.origin)
        seen.labels.update(labels)
    return [
        schemas.LabelledEntry(
            example_id=name, text=text, labels=labels or (), labelled=labels is not None
        )
    ]


def _classes(seen: Seen, config: LabelledConfig, training: Iterator[Any]) -> Mapping[str, Any]:
    if len(seen.several) > 1:
        raise ValueError(
            f"{seen.several[True]} has a list of labels and {seen.several[False]} a single one; give a list in each row"
        )
    if len(seen.labels) < 2:
        found = f"{len(seen.labels)} classes ({', '.join(seen.labels)})"
        raise ValueError(
            f"there are {found}; expected at least two: name the column of labels (label_column)"
        )
    by_number = sorted(
        seen.labels, key=lambda one: (not one.isdecimal(), int(one) if one.isdecimal() else 0, one)
    )
    return {CLASSES_FILE: asdict(Classes(names=tuple(by_number), multi_label=True in seen.several))}


def _numbered(
    example: Example, config: LabelledConfig, seen: Seen
) -> Sequence[schemas.LabelledEntry]:
    (entry,) = _labelled(example, config, seen, NUMBERS)
    with suppress(ValueError):
        if not entry.labelled or (len(entry.labels) == 1 and isfinite(float(entry.labels[0]))):
            return [entry]
    raise ValueError(f"its label {', '.join(entry.labels)!r} is no number")


def _questions(example: Example, config: VqaSetConfig, seen: Seen) -> Sequence[schemas.Question]:
    text = _text_of(example, config, QUESTIONS)
    if not text:
        raise ValueError("it has no question")
    cell = _cell(example, config.answer_column, ANSWERS)
    parts = cell if isinstance(cell, list) else [cell]
    if config.answer_separator and isinstance(cell, str):
        parts = cell.split(config.answer_separator)
    answers = tuple(
        filter(
            None, (_text(part.get("answer") if isinstance(part, dict) else part) for part in parts)
        )
    )
    number = _text(example.fields.get("question_id")) or str(seen.rows)
    if not number.isdecimal() or number in seen.ids:
        raise ValueError(
            f"question_id {number!r} comes twice or is no whole number; leave the column out"
        )
    seen.ids.add(number)
    types = {name: _text(example.fields.get(name)) for name in ("question_type", "answer_type")}
    return [schemas.Question(question_id=int(number), question=text, answers=answers, **types)]


def _answers(seen: Seen, config: VqaSetConfig, training: Iterator[Any]) -> Mapping[str, Any]:
    questions = [dict.fromkeys(map(normalise_answer, entry["answers"])) for entry in training]
    counts = Counter(answer for answers in questions for answer in answers)
    vocabulary = [
        answer for answer, count in counts.items() if answer and count >= config.min_count
    ]
    if questions and len(vocabulary) < 2:
        raise ValueError(
            f"{len(vocabulary)} answers are given to at least {config.min_count} training questions; expected two"
        )
    return vocabulary_file(vocabulary)


def _statements(
    example: Example, config: CustomSetConfig, seen: Seen, schema: schemas.Schema
) -> Sequence[schemas.Statement]:
    label = _text(_cell(example, None, LABELS)).lower()
    label = _MEANT[schema.name].get(label, label)
    if label not in ("", *schema.labels):
        raise ValueError(f"its label is {label!r}; expected one of {', '.join(schema.labels)}")
    text = _text_of(example, config, STATEMENTS)
    if not text:
        raise ValueError("it has no statement")
    return [schemas.Statement(statement_id=_id(example, seen), text=text, label=label)]


def joined_text(example: Example) -> str:
    """Returns what an example with a label says, as a set of labels has it."""
    return " ".join(example.texts) or _text(_cell(example, None, STATEMENTS))


def _id(example: Example, seen: Seen) -> str:
    name = _text(example.fields.get("id")) or str(seen.rows)
    if name in seen.ids:
        raise ValueError(f"id {name!r} comes twice")
    seen.ids.add(name)
    return name


def _text_of(example: Example, config: CustomSetConfig, headings: Headings) -> str:
    found = "" if config.text_column else _text(_cell(example, None, headings))
    return found or " ".join(example.texts)


def _cell(example: Example, asked: str | None, headings: Headings) -> Any:
    """Returns what is in the column that is asked for, else in the first one of a usual or a likely name."""
    fields = example.fields
    if asked:
        if asked not in fields:
            raise ValueError(f"it has no column {asked}; it has {', '.join(fields)}")
        return fields[asked]
    if usual := columns_named(fields, headings.usual):
        return fields[usual[0]]
    if likely := columns_named(fields, headings.likely):
        note_likely("", likely[0], headings)
        return fields[likely[0]]
    return None


def _text(cell: object) -> str:
    return "" if cell is None or cell != cell else str(cell).strip()


def _spec(name: str, what: str, more: str, example: str, **others: Any) -> CustomSetSpec:
    splits = "Splits come from a column `split`, from folders or file names; else images are split by a hash."
    example = f"Example: bridgetower prepare {name} {example}.csv --out data/{example}"
    return CustomSetSpec(
        name=name, summary=f"{what}\n\n{f'{more} {splits}'.strip()}\n\n{example}", **others
    )


_WITH_LABELS: Mapping[str, Any] = {
    "schema": schemas.CLASSIFICATION,
    "config": LabelledConfig,
    "num_images": None,
}
_SPECS = (
    _spec(
        "pairs",
        "Images with captions.",
        "",
        "photos",
        schema=schemas.CAPTIONS,
        config=PairsConfig,
        entries=_captions,
        texts=CAPTIONS,
    ),
    _spec(
        "classification",
        "Images, texts or both with a label, or several.",
        "The names of the classes are in classes.json.",
        "memes",
        entries=_labelled,
        files=_classes,
        **_WITH_LABELS,
    ),
    _spec(
        "regression",
        "Images, texts or both with a number, such as a rating.",
        "",
        "ratings",
        entries=_numbered,
        files=lambda seen, config, training: {
            CLASSES_FILE: asdict(Classes(names=(), multi_label=False))
        },
        **_WITH_LABELS,
    ),
    _spec(
        "vqa",
        "Questions about images with one answer or several.",
        "The answers that a model can choose, those of the training split, are in answers.json.",
        "charts",
        schema=schemas.VQA,
        config=VqaSetConfig,
        entries=_questions,
        files=_answers,
        texts=QUESTIONS,
    ),
    _spec(
        "entailment",
        "Images with statements that they contradict, leave open or entail: labels contradiction, neutral and "
        "entailment, or 0, 1 and 2.",
        "",
        "claims",
        schema=schemas.SNLI_VE,
        entries=partial(_statements, schema=schemas.SNLI_VE),
        texts=STATEMENTS,
    ),
    _spec(
        "image-pairs",
        "Pairs of images with statements that are true or false of them: columns image_1 and image_2, or those of "
        "--image-column A,B.",
        "",
        "pairs",
        schema=schemas.NLVR2,
        entries=partial(_statements, schema=schemas.NLVR2),
        texts=STATEMENTS,
        num_images=2,
    ),
)

CUSTOM_SETS: Mapping[str, CustomSetSpec] = {one.name: one for one in _SPECS}
"""Every kind of custom set, by name."""
