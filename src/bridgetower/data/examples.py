"""Questions, statements and other entries of prepared sets as examples, each with its images, addressed by batch."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.data import Dataset

from bridgetower.data.answers import soft_targets
from bridgetower.data.batch import Batch, BatchKey
from bridgetower.data.prepared import NO_IMAGE, PreparedImages
from bridgetower.data.prepared_set import SPLIT_OPTIONS
from bridgetower.data.schema import Schema

_PIXELS = ("pixel_values", "pixel_values_2")


class LabelEncoder(Protocol):
    """How the label of an entry becomes a tensor."""

    def known(self, entry: Mapping[str, Any]) -> bool:
        """Whether the entry has a label."""
        ...

    def tensor(self, entry: Mapping[str, Any]) -> Tensor:
        """Returns the label of an entry that has one, of the same shape for all of them.

        Raises:
            ValueError: It is none that the model can be trained for; `EntryDataset` adds which entry it is.
        """
        ...


class ClassEncoder:
    """Labels that name one class."""

    def __init__(self, names: Sequence[str]) -> None:
        """Numbers the classes in the order of their names."""
        self._number_of = {name: number for number, name in enumerate(names)}

    def known(self, entry: Mapping[str, Any]) -> bool:
        """Whether the entry has a label."""
        return bool(entry["label"])

    def tensor(self, entry: Mapping[str, Any]) -> Int[Tensor, ""]:
        """Returns the number of the class."""
        return torch.tensor(_class_number(self._number_of, entry["label"]))


class LabelsEncoder:
    """Labels that name one class, or any number of classes."""

    def __init__(self, names: Sequence[str], *, multi_label: bool) -> None:
        """Numbers the classes in the order of their names.

        Args:
            names: Of the classes.
            multi_label: Whether several may hold at once.
        """
        self.multi_label = multi_label
        self._number_of = {name: number for number, name in enumerate(names)}

    def known(self, entry: Mapping[str, Any]) -> bool:
        """Whether the entry has labels, or none of the classes holds."""
        return bool(entry["labelled"])

    def tensor(self, entry: Mapping[str, Any]) -> Int[Tensor, ""] | Float[Tensor, " k"]:
        """Returns the number of the class, or 1 for each class that holds and 0 for the others."""
        numbers = [_class_number(self._number_of, name) for name in entry["labels"]]
        if not self.multi_label:
            return torch.tensor(numbers[0])
        marks = torch.zeros(len(self._number_of))
        marks[numbers] = 1
        return marks


def _class_number(number_of: Mapping[str, int], label: str) -> int:
    """Returns the number of the class that a label names.

    Raises:
        ValueError: There is no such class.
    """
    if label not in number_of:
        raise ValueError(
            f"has the label {label!r}; the model's head has the classes {', '.join(number_of)}: use a set of these, or "
            "train a new head"
        )
    return number_of[label]


class NumberEncoder:
    """Labels that are numbers."""

    def known(self, entry: Mapping[str, Any]) -> bool:
        """Whether the entry has a label."""
        return bool(entry["labelled"])

    def tensor(self, entry: Mapping[str, Any]) -> Float[Tensor, ""]:
        """Returns the number."""
        return torch.tensor(float(entry["labels"][0]))


class AnswerEncoder:
    """Answers of annotators as a score of each answer of a vocabulary."""

    def __init__(self, answers: Sequence[str]) -> None:
        """Numbers the normalised answers that can be chosen."""
        self.answers = tuple(answers)
        self._number_of = {answer: number for number, answer in enumerate(answers)}

    def known(self, entry: Mapping[str, Any]) -> bool:
        """Whether annotators answered."""
        return bool(entry["answers"])

    def answerable(self, entry: Mapping[str, Any]) -> bool:
        """Whether an annotator gave an answer of the vocabulary."""
        return bool(soft_targets(entry["answers"], self._number_of))

    def tensor(self, entry: Mapping[str, Any]) -> Float[Tensor, " k"]:
        """Returns the score of each answer, from 0 to 1."""
        scores = torch.zeros(len(self.answers))
        for answer, score in soft_targets(entry["answers"], self._number_of).items():
            scores[self._number_of[answer]] = score
        return scores


class EntryDataset(Dataset[Batch]):
    """Entries of prepared sets, one example each, with the image or images that they are about.

    Attributes:
        images: What the entries are about.
        encode: Makes labels of entries.
    """

    def __init__(
        self,
        images: PreparedImages,
        encode: LabelEncoder,
        *,
        keep: Callable[[Mapping[str, Any]], bool] | None = None,
        labelled: bool = False,
        unique: bool = False,
    ) -> None:
        """Finds the entries in one pass.

        Args:
            images: Of a schema whose entries have a text and an identifier.
            encode: Makes labels of entries.
            keep: Whether an entry is an example; None: every entry is.
            labelled: Every example must have a label.
            unique: No identifier may come twice.

        Raises:
            ValueError: There is no example, one without the label that it must have, or an identifier comes twice.
        """
        assert images.schema.id is not None
        self.images, self.encode, self._keep, self._id = images, encode, keep, images.schema.id
        if keep or labelled or unique:
            chosen, ids = array("q"), set[Any]()
            for number, example in enumerate(images.scan()):
                entry = example["entry"]
                if keep is None or keep(entry):
                    chosen.append(number)
                    if labelled and not encode.known(entry):
                        raise ValueError(
                            f"{self.schema.noun} {entry[self._id]} of split {', '.join(images.splits)} has no "
                            f"{self.schema.label_noun}; choose a split that has ({SPLIT_OPTIONS})"
                        )
                    if unique:
                        ids.add(entry[self._id])
            if unique and len(ids) < len(chosen):
                again = len(chosen) - len(ids)
                raise ValueError(f"{again} ids of {len(chosen)} come again; expected one example of each id")
            self._numbers = images.repeated(torch.tensor(chosen, dtype=torch.int64))
        else:
            self._numbers = images.repeated(torch.arange(images.num_examples))
        if not len(self._numbers):
            folders = ", ".join(one.folder for one in images.sets)
            unfit = "" if keep is None else " is fit for this"
            raise ValueError(
                f"no example in split {', '.join(images.splits)} of {folders}{unfit}; choose another ({SPLIT_OPTIONS})"
            )

    def __len__(self) -> int:
        return len(self._numbers)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yields every entry once, in the order of the examples of a set without repeats."""
        return (row["entry"] for row in self.rows())

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yields every example once with the numbers of its `images` and its `entry`, in that order."""
        return (row for row in self.images.scan() if self._keep is None or self._keep(row["entry"]))

    @property
    def set_numbers(self) -> Int[Tensor, " n"]:
        """The set of each example."""
        return self.images.sets_of(self._numbers)

    @property
    def schema(self) -> Schema:
        """What the entries hold."""
        return self.images.schema

    def __getitem__(self, key: BatchKey) -> Batch:
        """Builds the batch that `key` names; it has labels where all its entries have.

        Raises:
            ValueError: An image cannot be decoded, or a label is no class; its name is in the error.
        """
        generator = torch.Generator().manual_seed(key.seed)
        rows = self.images.examples(self._numbers[list(key.examples)].tolist())
        entries = [row["entry"] for row in rows]
        schema, processor = self.schema, self.images.processor
        text = processor.pad(processor.pair_ids([schema.texts_of(entry) for entry in entries]))
        known = all(self.encode.known(entry) for entry in entries)
        pixels: dict[str, Any] = {
            name: self.images.views([row["images"][place] if row["images"] else NO_IMAGE for row in rows], generator)
            for place, name in enumerate(_PIXELS[: schema.num_images])
        }
        return Batch(
            ids=tuple(str(entry[self._id]) for entry in entries),
            seed=key.seed,
            input_ids=text.input_ids,
            attention_mask=text.attention_mask,
            labels=torch.stack([self.label(entry) for entry in entries]) if known else None,
            **pixels,
        )

    def label(self, entry: Mapping[str, Any]) -> Tensor:
        """Returns the label of an entry that has one.

        Raises:
            ValueError: It is no class; the entry is named.
        """
        try:
            return self.encode.tensor(entry)
        except ValueError as error:
            raise ValueError(f"{self.schema.noun} {entry[self._id]} {error}") from error
