"""Schemas of the examples of prepared sets. Writing, reading, checking and inspection follow them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from bridgetower.files import escaped


@dataclass(frozen=True, kw_only=True)
class Schema:
    """Type of the examples of a set: images with an entry, such as a caption or a question."""

    name: str  # stands in `dataset.json`
    entries: str  # names them in headings
    # `str`, or a frozen dataclass with fields of `str`, `int`, `float`, `bool` or a tuple of them
    entry: type[Any] = str
    noun: str  # names an entry in errors
    # fields with texts, each a `str` or a tuple of them; none where an entry is its text
    texts: tuple[str, ...] = ()
    id: str | None = None  # field that identifies an entry
    label: str | None = None  # field whose values `inspect` counts
    label_noun: str = "label"  # names a label in errors
    labels: tuple[str, ...] = ()  # allowed labels in the order of class numbers; empty: any
    stripped: bool = True  # whether spaces at the ends of texts are errors
    num_images: int = 1  # of an example
    optional: bool = False  # whether an image or a text may be missing, not both

    def texts_of(self, entry: Any) -> list[str]:
        """Returns the texts of an entry, which is an object or a dict from JSON, in the order of the fields."""
        if isinstance(entry, str):
            return [entry]
        values = entry if isinstance(entry, Mapping) else vars(entry)
        texts: list[str] = []
        for name in self.texts:
            value = values[name]
            texts += [value] if isinstance(value, str) else value
        return texts

    def problem_of(self, entry: Any) -> str | None:
        """Returns why an entry cannot be used, or None if it can."""
        if not isinstance(entry, self.entry):
            return f"{self.noun} is a {type(entry).__name__}, expected a {self.entry.__name__}"
        values = {} if isinstance(entry, str) else vars(entry)
        identifier = values.get(self.id)
        name = f"{self.noun} {identifier!r}" if self.id else self.noun

        # Texts.
        texts = self.texts_of(entry)
        stripped_texts = [text.strip() for text in texts]
        shortest = min(map(len, stripped_texts), default=0)
        if shortest == 0 and not self.optional:
            return f"{name} is empty" if len(texts) < 2 else f"{name} has an empty text"
        if self.stripped and texts != stripped_texts:
            return f"{name} has spaces at its ends"

        # Identifier, label, and that all of it can be stored.
        if identifier == "":
            return f"{name} has no identifier"
        label = values.get(self.label, "")
        if self.labels and label not in ("", *self.labels):
            return f"{name} has the label {label!r}, expected one of {', '.join(self.labels)}"
        content = json.dumps(values or entry, ensure_ascii=False)
        return None if escaped(content) == content else f"{name} is not valid Unicode"


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question about an image."""

    question_id: int  # the official number
    question: str
    question_type: str = ""  # its first words, as the annotations have them; empty if unknown
    answer_type: str = ""  # "yes/no", "number" or "other"; empty if unknown
    answers: tuple[str, ...] = ()  # one of each annotator, as given; none in a test split


@dataclass(frozen=True, kw_only=True)
class Statement:
    """A statement about one image or two."""

    statement_id: str  # the official identifier
    text: str
    label: str = ""  # one of the labels of the schema; empty if unknown


@dataclass(frozen=True, kw_only=True)
class LabelledEntry:
    """A row of a custom table: a text, an image, or both, and their classes."""

    example_id: str  # unique within the set
    text: str = ""  # empty if there is none
    labels: tuple[str, ...] = ()  # names of its classes; empty if none holds or they are unknown
    labelled: bool = True  # whether its classes are known


@dataclass(frozen=True, kw_only=True)
class Composition:
    """Captions that differ in little: caption n belongs to image n, further captions are wrong."""

    example_id: str  # unique within the set
    captions: tuple[str, ...]
    label: str = ""  # in what they differ; empty if unknown


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
NLVR2 = Schema(name="nlvr2", labels=("False", "True"), num_images=2, **_STATEMENTS)

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

COMPOSITIONALITY = replace(  # of one image or two
    CLASSIFICATION,
    name="compositionality",
    entry=Composition,
    texts=("captions",),
    label="label",
    optional=False,
)

SCHEMAS: Mapping[str, Schema] = {
    schema.name: schema
    for schema in (CAPTIONS, VQA, SNLI_VE, NLVR2, CLASSIFICATION, COMPOSITIONALITY)
}
"""All schemas by name. Their labels are in the order of the official class numbers."""


def schema_named(name: str) -> Schema:
    if name not in SCHEMAS:
        raise ValueError(
            f"no schema called {name!r}; there are {', '.join(SCHEMAS)}: name your own, in inspect with --schema"
        )
    return SCHEMAS[name]


def nlvr2_sentence(statement_id: str) -> str | None:
    """Names the sentence of an identifier of NLVR2, with which all its image pairs are one group."""
    fields = statement_id.split("-")
    return f"{fields[0]}-{fields[1]}-{fields[3]}" if len(fields) == 4 else None
