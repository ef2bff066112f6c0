"""Schemas of prepared sets: what a row holds. Writing, reading, checking and inspection follow from it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import TYPE_CHECKING, Any, get_args, get_origin, get_type_hints

from bridgetower.files import escaped

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True, kw_only=True)
class Schema:
    """What a row holds: one image or several, its identifier, and entries, such as captions or questions.

    Attributes:
        name: Stands in `dataset.json`.
        entries: Column of the entries.
        entry: Type of an entry: `str`, or a frozen dataclass with fields of `str`, `int`, `float`, `bool` or a tuple of
            them.
        noun: Names an entry in errors.
        texts: Fields with texts, in their order, each a `str` or a tuple of them; none where an entry is its text.
        id: Field that identifies an entry; None if nothing does.
        label: Field that `inspect` counts the values of.
        label_noun: Names a label in errors.
        labels: Values of it, in the order of the class numbers; empty if it may have any. An entry without a label has
            an empty one.
        stripped: Whether a text may not have spaces at its ends.
        image_columns: Columns of images.
        optional: Whether an image or a text may be missing, not both.
    """

    name: str
    entries: str
    entry: type[Any] = str
    noun: str
    texts: tuple[str, ...] = ()
    id: str | None = None
    label: str | None = None
    label_noun: str = "label"
    labels: tuple[str, ...] = ()
    stripped: bool = True
    image_columns: tuple[str, ...] = ("image",)
    optional: bool = False

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns that every set has."""
        return (*self.image_columns, "image_id", self.entries)

    def arrow_schema(self, further: Mapping[str, Any] | None = None) -> pa.Schema:
        """Returns the columns of a Parquet file, marked so that `datasets` decodes the images.

        Args:
            further: Type of each further column: `str`, `int`, `float`, `bool` or a tuple of one of them.

        Raises:
            ValueError: If a further column has the name of one that every set has.
        """
        import datasets

        further = further or {}
        clash = [name for name in self.columns if name in further]
        if clash:
            raise ValueError(f"further column {', '.join(clash)} has the name of a core column; rename it")
        images = {column: datasets.Image() for column in self.image_columns}
        core = {"image_id": _feature(str), self.entries: datasets.List(_feature(self.entry))}
        more = {column: _feature(kind) for column, kind in further.items()}
        return datasets.Features({**images, **core, **more}).arrow_schema

    def texts_of(self, entry: Any) -> list[str]:
        """Returns the texts of an entry, as a row holds it or as an object, in the order of the fields."""
        if isinstance(entry, str):
            return [entry]
        values = entry if isinstance(entry, Mapping) else vars(entry)
        found = (values[name] for name in self.texts)
        return [text for value in found for text in ([value] if isinstance(value, str) else value)]

    def problem_of(self, entry: Any) -> str | None:
        """Returns why an entry cannot be used; None if it can.

        It must be of the right type, have words, valid Unicode, and an identifier and a label if the schema has them.
        """
        if not isinstance(entry, self.entry):
            return f"{self.noun} is a {type(entry).__name__}, expected a {self.entry.__name__}"
        name = f"{self.noun} {getattr(entry, self.id)!r}" if self.id else self.noun
        texts = self.texts_of(entry)
        if not self.optional and not (texts and all(text.strip() for text in texts)):
            return f"{name} is empty" if len(texts) < 2 else f"{name} has an empty text"
        if self.stripped and any(text != text.strip() for text in texts):
            return f"{name} has spaces at its ends"
        if self.id and getattr(entry, self.id) == "":
            return f"{name} has no identifier"
        label = getattr(entry, self.label) if self.label else ""
        if self.labels and label not in ("", *self.labels):
            return f"{name} has the label {label!r}, expected one of {', '.join(self.labels)}"
        content = packed(entry)
        return None if escaped(content) == content else f"{name} is not valid Unicode"

    def unpacked(self, content: str) -> Any:
        """Returns the entry of which `content` is the packed form."""
        values = json.loads(content)
        if self.entry is str:
            return values
        return self.entry(
            **{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
        )


def packed(entry: Any) -> str:
    """Returns an entry as JSON."""
    return json.dumps(entry if isinstance(entry, str) else vars(entry), ensure_ascii=False)


def _feature(kind: Any) -> Any:
    """The `datasets` feature of a type."""
    import datasets

    if is_dataclass(kind):
        hints = get_type_hints(kind)
        return {item.name: _feature(hints[item.name]) for item in fields(kind)}
    if get_origin(kind) is tuple:
        return datasets.List(_feature(get_args(kind)[0]))
    return datasets.Value({str: "string", int: "int64", float: "float64", bool: "bool"}[kind])


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question about an image.

    Attributes:
        question_id: The official number.
        question: The text.
        question_type: Its first words, as the annotations have them; empty if unknown.
        answer_type: "yes/no", "number" or "other"; empty if unknown.
        answers: One of each annotator, as given; none in a test split.
    """

    question_id: int
    question: str
    question_type: str = ""
    answer_type: str = ""
    answers: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Statement:
    """A statement about one image or two.

    Attributes:
        statement_id: The official identifier.
        text: The text, stripped.
        label: Whether it holds, one of the labels of the schema; empty if unknown.
    """

    statement_id: str
    text: str
    label: str = ""


@dataclass(frozen=True, kw_only=True)
class LabelledEntry:
    """A row of a user's own table: a text, an image, or both, and their classes.

    Attributes:
        example_id: Unique within the set.
        text: The text, stripped; empty if there is none.
        labels: Names of its classes; none if no class holds, or if they are not known.
        labelled: Whether they are known.
    """

    example_id: str
    text: str = ""
    labels: tuple[str, ...] = ()
    labelled: bool = True


_STATEMENTS: Mapping[str, Any] = {
    "entries": "statements",
    "entry": Statement,
    "noun": "statement",
    "texts": ("text",),
    "id": "statement_id",
    "label": "label",
}

CAPTIONS = Schema(name="captions", entries="captions", noun="caption")
VQA = Schema(
    name="vqa",
    entries="questions",
    entry=Question,
    noun="question",
    texts=("question",),
    id="question_id",
    label="answer_type",
    label_noun="answers",
    stripped=False,
)
SNLI_VE = Schema(name="snli-ve", labels=("contradiction", "neutral", "entailment"), **_STATEMENTS)
NLVR2 = Schema(name="nlvr2", labels=("False", "True"), image_columns=("image", "image_2"), **_STATEMENTS)

CLASSIFICATION = Schema(
    name="classification",
    entries="examples",
    entry=LabelledEntry,
    noun="example",
    texts=("text",),
    id="example_id",
    label="labels",
    optional=True,
)

SCHEMAS: Mapping[str, Schema] = {schema.name: schema for schema in (CAPTIONS, VQA, SNLI_VE, NLVR2, CLASSIFICATION)}
"""The schemas that there are, by name. The labels are in the order of the official class numbers."""


def schema_named(name: str) -> Schema:
    """Returns a schema of `SCHEMAS`.

    Raises:
        ValueError: If there is none of the name.
    """
    if name not in SCHEMAS:
        known = ", ".join(SCHEMAS)
        raise ValueError(f"no schema called {name!r}; there are {known}: name your own, in inspect with --schema")
    return SCHEMAS[name]


def nlvr2_sentence(statement_id: str) -> str | None:
    """Names the sentence of an identifier of NLVR2, with which all its image pairs are one group.

    Args:
        statement_id: As NLVR2 publishes it: split, set, pair and sentence, such as dev-850-0-1.

    Returns:
        Split, set and sentence; None if it is no identifier of NLVR2.
    """
    parts = statement_id.split("-")
    return f"{parts[0]}-{parts[1]}-{parts[3]}" if len(parts) == 4 else None
