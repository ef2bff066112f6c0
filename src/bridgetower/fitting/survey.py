"""The columns of a source, what each is taken for, and the task that they make."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from bridgetower.data.sets.custom import (
    ANSWERS,
    CUSTOM_SETS,
    LABELS,
    NUMBERS,
    QUESTIONS,
    STATEMENTS,
)
from bridgetower.data.sets.schema import SNLI_VE
from bridgetower.data.sources.columns import (
    IMAGES,
    ColumnRoles,
    Columns,
    Headings,
    RequiredColumn,
    columns_named,
    missing_column_message,
    roles_of,
)
from bridgetower.data.sources.fetch import suffix_of
from bridgetower.data.sources.reader import file_groups, read_group
from bridgetower.data.sources.tables import ROW_READERS

SEPARATORS = (";", "|")
"""Marks between the labels or answers of a cell that are recognised without an option."""

_MAX_VALUES = 1000  # different values that are counted of a column
_MAX_CLASSES_OF_NUMBERS = (
    10  # whole numbers with more different values are ratings, with fewer classes
)
_SEPARATED_SHARE = 0.2  # of the cells have a separator, if it separates


@dataclass(frozen=True, kw_only=True)
class FitColumns:
    """Columns and a task that the user names. None looks for the usual names.

    Attributes:
        task: Kind of set, a name of `CUSTOM_SETS`; None: by the columns.
        image_column: Column of images, or two of pairs with a comma between their names.
        text_column: Column of captions, questions or statements.
        label_column: Column of labels or numbers.
        label_separator: What stands between the labels of a cell.
        answer_column: Column of answers.
        answer_separator: What stands between the answers of a cell.
    """

    task: str | None = None
    image_column: str | None = None
    text_column: str | None = None
    label_column: str | None = None
    label_separator: str | None = None
    answer_column: str | None = None
    answer_separator: str | None = None

    def __post_init__(self) -> None:
        if self.task is not None and self.task not in CUSTOM_SETS:
            raise ValueError(f"task is {self.task!r}; expected one of {', '.join(CUSTOM_SETS)}")


@dataclass(kw_only=True)
class ColumnValues:
    """The values of a column."""

    counts: Counter[str] = field(default_factory=Counter)  # of at most `_MAX_VALUES` different ones
    num_filled: int = 0
    are_numbers: bool = True
    are_whole: bool = True

    def add(self, cell: object) -> None:
        """Counts a cell. NaN, as pandas writes it, is none."""
        text = "" if cell is None or cell != cell else str(cell).strip()
        if not text:
            return
        self.num_filled += 1
        if text in self.counts or len(self.counts) < _MAX_VALUES:
            self.counts[text] += 1
        self.are_numbers = self.are_numbers and bool(re.fullmatch(r"[-+]?[\d.]+(e[-+]?\d+)?", text))
        self.are_whole = self.are_whole and bool(re.fullmatch(r"[-+]?\d+(\.0*)?", text))

    def are_ratings(self, heading: str) -> bool:
        """Whether the values are numbers to predict, by their heading or as there are too many for classes."""
        is_rating = not columns_named([heading], LABELS.names)
        has_many = len(self.counts) > _MAX_CLASSES_OF_NUMBERS or not self.are_whole
        return self.are_numbers and (is_rating or has_many)

    def check_labels(self, name: str) -> None:
        """Refuses labels or numbers of which nothing can be learnt."""
        advice = "give label_column another column"
        if len(self.counts) == 1:
            raise ValueError(
                f"{name} has one value only ({next(iter(self.counts))}); expected at least two: {advice}"
            )
        if not self.are_numbers and max(self.counts.values()) == 1:
            raise ValueError(
                f"{name} has another label in each of {self.num_filled:,} rows; expected labels that several images "
                f"have: {advice}, or, if these are captions, set text_column to {name}"
            )

    def separator(self) -> str | None:
        """Returns the mark that many cells have between their values."""
        for mark in SEPARATORS:
            num_separated = sum(count for text, count in self.counts.items() if mark in text)
            if num_separated >= _SEPARATED_SHARE * max(1, self.counts.total()):
                return mark
        return None

    def summary(self) -> str:
        """Returns how many values there are, and the most frequent ones."""
        if self.are_numbers and len(self.counts) > _MAX_CLASSES_OF_NUMBERS:
            numbers = [float(text) for text in self.counts]
            return f"numbers from {min(numbers):g} to {max(numbers):g}"
        if len(self.counts) >= _MAX_VALUES:
            return f"at least {_MAX_VALUES:,} values"
        frequent = ", ".join(f"{text} {count:,}" for text, count in self.counts.most_common(4))
        dots = " …" if len(self.counts) > 4 else ""
        return f"{len(self.counts):,} values: {frequent}{dots}"


@dataclass(kw_only=True)
class Survey:
    """The rows of a source, counted without reading its images.

    Attributes:
        rows: Number of rows.
        images: Number of different images.
        images_per_row: Most images of a row.
        texts: Rows with a text.
        splits: Rows by the split that the source gives.
        roles: Columns of images, text, id and split of the first table; None without a table.
        values: Values of the other columns.
        problems: Problems of rows that cannot be used, as far as reading the images does not find more.
    """

    rows: int = 0
    images: int = 0
    images_per_row: int = 0
    texts: int = 0
    splits: Counter[str] = field(default_factory=Counter)
    roles: ColumnRoles | None = None
    values: dict[str, ColumnValues] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Task:
    """A task, and the columns that it is learnt from.

    Attributes:
        kind: Kind of set, a name of `CUSTOM_SETS`.
        lines: Lines that say what each column is taken for, and why the task was chosen.
        settings: Settings of the config of the set that differ from its defaults.
    """

    kind: str
    lines: Sequence[str]
    settings: Mapping[str, Any]


def survey_source(source: str, columns: FitColumns) -> Survey:
    """Counts the rows of a source and the values of their columns.

    Raises:
        OSError: There is no such source.
        ValueError: Nothing in it can be read, or it has no image.
    """
    reading = Columns(image=columns.image_column, text=columns.text_column)
    survey = Survey()
    image_names: set[str] = set()
    first_row: Mapping[str, Any] = {}
    table = None
    for group in file_groups(source):
        if table is None and group.kind == "table":
            (table,) = group.files
            read_rows = ROW_READERS[f".{suffix_of(table.location).split('.')[1]}"]
            rows = (cells for _, cells in read_rows(table) if not isinstance(cells, str))
            first_row = next(rows, {})
            survey.roles = roles_of(table, first_row, reading)
        for example in read_group(group, reading):
            survey.rows += 1
            if example.problem:
                survey.problems.append(f"{example.origin}: {example.problem}")
                continue
            survey.images_per_row = max(survey.images_per_row, len(example.images))
            survey.texts += bool(example.texts)
            survey.splits[example.split] += 1
            for name, cell in example.fields.items():
                survey.values.setdefault(name, ColumnValues()).add(cell)
            image_names.update(image.name for image in example.images)
    survey.images = len(image_names)

    if not survey.rows:
        raise ValueError(f"{source} has no rows; give one with images and texts or labels")
    if not survey.images:
        if table is not None and survey.roles is not None and not survey.roles.images:
            required = RequiredColumn(headings=(IMAGES,))
            message = missing_column_message(table, required, list(first_row), [required])
            raise ValueError(message)
        problem = f": {survey.problems[0]}" if survey.problems else ""
        raise ValueError(f"{source} has no row with an image{problem}")
    return survey


class TaskColumns(NamedTuple):
    """The columns of a source that a task may be learnt from, empty where there is none."""

    label: str
    answer: str
    question: str
    statement: str

    @classmethod
    def of(cls, survey: Survey, columns: FitColumns) -> TaskColumns:
        """Finds the columns that the user names, else those with usual names."""
        label = (
            columns.label_column or _first_named(survey, LABELS) or _first_named(survey, NUMBERS)
        )
        if columns.label_column is None:
            # Folders of images with captions sort them, and need not be classes.
            are_folders = survey.roles is None and survey.texts > 0
            is_empty = label not in survey.values or not survey.values[label].num_filled
            if are_folders or is_empty:
                label = ""
        return cls(
            label=label,
            answer=columns.answer_column or _first_named(survey, ANSWERS),
            question=_first_named(survey, QUESTIONS),
            statement=_first_named(survey, STATEMENTS),
        )


def _first_named(survey: Survey, headings: Headings) -> str:
    for names in (headings.usual, headings.likely):
        if named := columns_named(survey.values, names):
            return named[0]
    return ""


def choose_task(source: str, survey: Survey, columns: FitColumns) -> Task:
    """Returns the task that the columns make, or the one that the user names.

    Raises:
        ValueError: The columns make no task, or all labels are the same.
    """
    task_columns = TaskColumns.of(survey, columns)
    label = task_columns.label
    kind = columns.task
    reason = "as --task says"
    if kind is None:
        kind, reason = _kind_of(survey, task_columns)
    if kind is None:
        names = [*(survey.roles.images if survey.roles else ()), *survey.values]
        raise ValueError(
            f"{source} has images and no captions, questions, labels or numbers; it has {', '.join(names)}: "
            "give text_column, give label_column or give answer_column its name"
        )
    if kind in ("classification", "regression") and label in survey.values:
        survey.values[label].check_labels(label)

    lines = _lines_of_roles(survey, kind)
    lines += _lines_of_columns(
        survey, kind, task_columns, is_text_named=columns.text_column is not None
    )
    lines.append(f"task: {kind} ({reason}); --task chooses another one")
    # `prepare` needs to know named columns, and marks between the values of a cell.
    names = ["image_column", "text_column"]
    separated = {"vqa": "answer", "classification": "label", "regression": "label"}.get(kind)
    if separated is not None:
        names += [f"{separated}_column", f"{separated}_separator"]
    settings = {name: getattr(columns, name) for name in names}
    if separated is not None and settings[f"{separated}_separator"] is None:
        values = survey.values.get(getattr(task_columns, separated), ColumnValues())
        settings[f"{separated}_separator"] = values.separator()
    settings = {name: value for name, value in settings.items() if value is not None}
    return Task(kind=kind, lines=lines, settings=settings)


def _kind_of(survey: Survey, columns: TaskColumns) -> tuple[str | None, str]:
    """Returns the kind of set that the columns make, and the reason. The kind is None if they make none."""
    has_texts = survey.texts > 0
    if columns.answer and (columns.question or has_texts):
        return "vqa", "there are questions with answers"
    if not columns.label:
        return ("pairs", "there are images with texts") if has_texts else (None, "")
    labels = survey.values.get(columns.label, ColumnValues())
    has_statements = bool(columns.statement or has_texts)
    if survey.images_per_row == 2 and has_statements:
        return "image-pairs", "there are pairs of images with statements and labels"
    values = {text.lower() for text in labels.counts}
    if has_statements and values and values <= set(SNLI_VE.labels):
        return "entailment", f"{columns.label} has {', '.join(sorted(values))}"
    if labels.are_ratings(columns.label):
        return "regression", f"{columns.label} has numbers"
    return "classification", f"{columns.label} has {len(labels.counts):,} labels"


def _lines_of_roles(survey: Survey, kind: str) -> list[str]:
    """Returns a line for each column of images, texts, ids and splits."""
    roles = survey.roles
    if roles is None:
        return [f"{survey.images:,} images, of which {survey.texts:,} have a text"]
    lines = []
    for number, name in enumerate(roles.images, start=1):
        noun = "images" if len(roles.images) == 1 else f"images {number} of each pair"
        lines.append(f"{name}: {noun}, {survey.images:,} different")
    if roles.text:
        noun = {"pairs": "captions", "vqa": "questions"}.get(kind, "texts")
        lines.append(f"{roles.text}: {noun}, in {survey.texts:,} rows")
    if roles.id:
        lines.append(f"{roles.id}: ids")
    if roles.split:
        counts = ", ".join(f"{split} {count:,}" for split, count in survey.splits.items())
        lines.append(f"{roles.split}: splits, {counts}")
    return lines


def _lines_of_columns(
    survey: Survey, kind: str, columns: TaskColumns, *, is_text_named: bool
) -> list[str]:
    """Returns a line for each column that the kind of set reads, and one for all others."""
    nouns: dict[str, str] = {}
    if kind == "vqa":
        nouns = {columns.question: "questions", columns.answer: "answers"}
    elif kind != "pairs":
        nouns = {columns.statement: "statements"}
        nouns[columns.label or "folders"] = "numbers" if kind == "regression" else "labels"
    if is_text_named:
        nouns = {
            name: noun for name, noun in nouns.items() if noun in ("answers", "labels", "numbers")
        }
    lines = []
    for name, noun in nouns.items():
        if name:
            values = survey.values.get(name)
            lines.append(f"{name}: {noun}{f', {values.summary()}' if values else ''}")
    unused = [name for name in survey.values if name not in (*nouns, "id", "question_id")]
    if unused:
        lines.append(f"not used: {', '.join(unused)}")
    return lines
