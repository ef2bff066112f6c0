"""The columns of a source, what each is taken for, and the task that they make."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

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
from bridgetower.data.sources.example import Example, FileGroup
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
    """Names of columns that are given, and marks between values of a cell; None looks for the usual names.

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
    num_lists: int = 0
    are_numbers: bool = True
    are_whole: bool = True

    def add(self, cell: object) -> None:
        """Counts a cell. NaN, as pandas writes it, is none."""
        text = "" if cell is None or cell != cell else str(cell).strip()
        if not text:
            return
        self.num_filled += 1
        self.num_lists += isinstance(cell, list)
        if text in self.counts or len(self.counts) < _MAX_VALUES:
            self.counts[text] += 1
        self.are_numbers = self.are_numbers and bool(re.fullmatch(r"[-+]?[\d.]+(e[-+]?\d+)?", text))
        self.are_whole = self.are_whole and bool(re.fullmatch(r"[-+]?\d+(\.0*)?", text))

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
    groups = file_groups(source)
    for group in groups:
        if survey.roles is None and group.kind == "table":
            survey.roles = _roles_of_table(group, reading)
        for example in read_group(group, reading):
            survey.rows += 1
            if example.problem:
                survey.problems.append(f"{example.origin}: {example.problem}")
                continue
            _count(survey, example)
            image_names.update(image.name for image in example.images)
    survey.images = len(image_names)
    if not survey.rows:
        raise ValueError(f"{source} has no rows; give one with images and texts or labels")
    if not survey.images:
        _refuse_without_images(source, groups, survey)
    return survey


def _count(survey: Survey, example: Example) -> None:
    survey.images_per_row = max(survey.images_per_row, len(example.images))
    survey.texts += bool(example.texts)
    survey.splits[example.split] += 1
    for name, cell in example.fields.items():
        survey.values.setdefault(name, ColumnValues()).add(cell)


def _first_row(group: FileGroup) -> Mapping[str, Any]:
    (file,) = group.files
    suffix = suffix_of(file.location).split(".")[1]
    rows = (cells for _, cells in ROW_READERS[f".{suffix}"](file) if not isinstance(cells, str))
    return next(rows, {})


def _roles_of_table(group: FileGroup, columns: Columns) -> ColumnRoles:
    return roles_of(group.files[0], _first_row(group), columns)


def _refuse_without_images(source: str, groups: Sequence[FileGroup], survey: Survey) -> None:
    tables = [group for group in groups if group.kind == "table"]
    if tables and not (survey.roles and survey.roles.images):
        required = RequiredColumn(headings=(IMAGES,))
        names = list(_first_row(tables[0]))
        raise ValueError(missing_column_message(tables[0].files[0], required, names, [required]))
    problem = f": {survey.problems[0]}" if survey.problems else ""
    raise ValueError(f"{source} has no row with an image{problem}")


def choose_task(source: str, survey: Survey, columns: FitColumns) -> Task:
    """Returns the task that the columns make, or the one that is given.

    Raises:
        ValueError: The columns make no task.
    """
    names = list(survey.values)
    labels = columns.label_column or _first_named(names, LABELS) or _first_named(names, NUMBERS)
    answers = columns.answer_column or _first_named(names, ANSWERS)
    questions = _first_named(names, QUESTIONS)
    statements = _first_named(names, STATEMENTS)
    has_texts = survey.texts > 0
    label_values = survey.values.get(labels, ColumnValues())
    if columns.label_column is None:
        # Folders of images with captions sort them, and need not be classes.
        are_folders = survey.roles is None and survey.texts > 0
        if are_folders or not label_values.num_filled:
            labels = ""

    kind = columns.task
    reason = "as --task says"
    if kind is None:
        kind, reason = _task_of(
            survey,
            labels=label_values if labels else None,
            label_name=labels,
            has_answers=bool(answers),
            has_questions=bool(questions or has_texts),
            has_statements=bool(statements or has_texts),
        )
    if kind is None:
        roles = survey.roles
        known = [*(roles.images if roles else ()), *names]
        raise ValueError(
            f"{source} has images and no captions, questions, labels or numbers; it has {', '.join(known)}: name the "
            "column with text_column, label_column or answer_column"
        )

    if kind == "classification" and len(label_values.counts) == 1 and labels:
        raise ValueError(
            f"{labels} has one label only ({next(iter(label_values.counts))}); expected at least two, or name another "
            "column with label_column"
        )

    # The columns, each in a line, and the settings that prepare needs.
    settings: dict[str, Any] = {}
    for name in ("image_column", "text_column"):
        if getattr(columns, name) is not None:
            settings[name] = getattr(columns, name)
    lines = _role_lines(survey, kind)
    used: set[str] = set()
    if kind == "vqa":
        used |= {questions, answers}
        settings |= _separated(
            "answer", answers, columns.answer_column, columns.answer_separator, survey
        )
        if questions and not columns.text_column:
            lines.append(f"{questions}: questions")
        lines.append(f"{answers}: answers, {_summary(survey, answers)}")
    elif kind != "pairs":
        used |= {labels, statements}
        if statements and not columns.text_column:
            lines.append(f"{statements}: statements")
        noun = "numbers" if kind == "regression" else "labels"
        lines.append(f"{labels or 'folders'}: {noun}, {_summary(survey, labels)}")
        if kind in ("classification", "regression"):
            settings |= _separated(
                "label", labels, columns.label_column, columns.label_separator, survey
            )
    unused = [name for name in names if name not in used and name not in ("id", "question_id")]
    if unused:
        lines.append(f"not used: {', '.join(unused)}")
    lines.append(f"task: {kind} ({reason}); --task chooses another one")
    return Task(kind=kind, lines=lines, settings=settings)


def _first_named(names: Sequence[str], headings: Headings) -> str:
    named = columns_named(names, headings.usual) or columns_named(names, headings.likely)
    return named[0] if named else ""


def _task_of(
    survey: Survey,
    *,
    labels: ColumnValues | None,
    label_name: str,
    has_answers: bool,
    has_questions: bool,
    has_statements: bool,
) -> tuple[str | None, str]:
    """Returns the kind of set for the columns, and the reason; None if they make none."""
    if has_answers and has_questions:
        return "vqa", "there are questions with answers"
    if labels is not None:
        if survey.images_per_row == 2 and has_statements:
            return "image-pairs", "there are pairs of images with statements and labels"
        values = {text.lower() for text in labels.counts}
        if has_statements and values and values <= set(SNLI_VE.labels):
            return "entailment", f"{label_name} has {', '.join(sorted(values))}"
        is_rating = columns_named([label_name], NUMBERS.names) and not columns_named(
            [label_name], LABELS.names
        )
        has_many = len(labels.counts) > _MAX_CLASSES_OF_NUMBERS or not labels.are_whole
        if labels.are_numbers and (is_rating or has_many):
            return "regression", f"{label_name} has numbers"
        return "classification", f"{label_name} has {len(labels.counts):,} labels"
    if survey.texts:
        return "pairs", "there are images with texts"
    return None, ""


def _role_lines(survey: Survey, kind: str) -> list[str]:
    """Returns a line for each column of images, texts, ids and splits."""
    roles = survey.roles
    lines = []
    if roles is None:
        lines.append(f"{survey.images:,} images, of which {survey.texts:,} have a text")
    else:
        for number, name in enumerate(roles.images, start=1):
            noun = "images" if len(roles.images) == 1 else f"images {number} of each pair"
            lines.append(f"{name}: {noun}, {survey.images:,} different")
        nouns = {"pairs": "captions", "vqa": "questions"}
        if roles.text:
            lines.append(f"{roles.text}: {nouns.get(kind, 'texts')}, in {survey.texts:,} rows")
        if roles.id:
            lines.append(f"{roles.id}: ids")
        if roles.split:
            counts = ", ".join(f"{split} {count:,}" for split, count in survey.splits.items())
            lines.append(f"{roles.split}: splits, {counts}")
    return lines


def _summary(survey: Survey, column: str) -> str:
    return survey.values[column].summary() if column in survey.values else "names of folders"


def _separated(
    noun: str, column: str, given_column: str | None, separator: str | None, survey: Survey
) -> dict[str, Any]:
    """Returns the settings of a column whose cells may have several values."""
    settings: dict[str, Any] = {}
    if given_column is not None:
        settings[f"{noun}_column"] = given_column
    if separator is None and column in survey.values:
        separator = survey.values[column].separator()
    if separator is not None:
        settings[f"{noun}_separator"] = separator
    return settings
