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


class LabelEncoder(Protocol):
    """How the label of an entry becomes a tensor."""

    def known(self, entry: Mapping[str, Any]) -> bool: ...

    def tensor(self, entry: Mapping[str, Any]) -> Tensor:
        """Returns the label of an entry that has one, of the same shape for all of them."""
        ...


class ClassEncoder:
    """Labels that name one class, or with `multi_label` any number of classes, in the order of their names."""

    def __init__(self, names: Sequence[str], *, multi_label: bool = False) -> None:
        self.multi_label, self._number_of = multi_label, {name: number for number, name in enumerate(names)}

    def known(self, entry: Mapping[str, Any]) -> bool:
        return bool(entry["labelled"] if "labels" in entry else entry["label"])

    def tensor(self, entry: Mapping[str, Any]) -> Int[Tensor, ""] | Float[Tensor, " k"]:
        """Returns the number of the class, or 1 for each class that holds and 0 for the others."""
        given = entry["labels"] if "labels" in entry else [entry["label"]]
        if unknown := [label for label in given if label not in self._number_of]:
            raise ValueError(
                f"has the label {unknown[0]!r}; the model's head has the classes {', '.join(self._number_of)}: use a "
                "set of these, or train a new head"
            )
        numbers = [self._number_of[label] for label in given]
        if not self.multi_label:
            return torch.tensor(numbers[0])
        marks = torch.zeros(len(self._number_of))
        marks[numbers] = 1
        return marks


class NumberEncoder:
    """Labels that are numbers."""

    def known(self, entry: Mapping[str, Any]) -> bool:
        return bool(entry["labelled"])

    def tensor(self, entry: Mapping[str, Any]) -> Float[Tensor, ""]:
        return torch.tensor(float(entry["labels"][0]))


class AnswerEncoder:
    """Answers of annotators as a score of each answer of a vocabulary."""

    def __init__(self, answers: Sequence[str]) -> None:
        self.answers = tuple(answers)
        self._number_of = {answer: number for number, answer in enumerate(answers)}

    def known(self, entry: Mapping[str, Any]) -> bool:
        return bool(entry["answers"])

    def answerable(self, entry: Mapping[str, Any]) -> bool:
        return bool(soft_targets(entry["answers"], self._number_of))

    def tensor(self, entry: Mapping[str, Any]) -> Float[Tensor, " k"]:
        """Returns the score of each answer, from 0 to 1."""
        scores = torch.zeros(len(self.answers))
        for answer, score in soft_targets(entry["answers"], self._number_of).items():
            scores[self._number_of[answer]] = score
        return scores


class EntryDataset(Dataset[Batch]):
    """Entries of prepared sets, one example each, with the image or images that they are about."""

    def __init__(
        self,
        images: PreparedImages,
        encode: LabelEncoder,
        *,
        keep: Callable[[Mapping[str, Any]], bool] | None = None,
        labelled: bool = False,
        unique: bool = False,
    ) -> None:
        assert images.schema.id is not None
        self.images, self.encode, self._keep, self._id = images, encode, keep, images.schema.id
        self.schema, splits = images.schema, ", ".join(images.splits)
        numbers = torch.arange(images.num_examples)
        if keep or labelled or unique:
            chosen, ids = array("q"), set[Any]()
            for number, example in enumerate(images.scan()):
                entry = example["entry"]
                if keep is None or keep(entry):
                    chosen.append(number)
                    if labelled and not encode.known(entry):
                        raise ValueError(
                            f"{self.schema.noun} {entry[self._id]} of split {splits} has no {self.schema.label_noun}; "
                            f"choose a split that has ({SPLIT_OPTIONS})"
                        )
                    if unique:
                        ids.add(entry[self._id])
            if unique and len(ids) < len(chosen):
                again = len(chosen) - len(ids)
                raise ValueError(f"{again} ids of {len(chosen)} come again; expected one example of each id")
            numbers = torch.tensor(chosen, dtype=torch.int64)
        self._numbers = images.repeated(numbers)
        if not len(self._numbers):
            folders = ", ".join(one.folder for one in images.sets)
            unfit = "" if keep is None else " is fit for this"
            raise ValueError(f"no example in split {splits} of {folders}{unfit}; choose another ({SPLIT_OPTIONS})")

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
        return self.images.sets_of(self._numbers)

    def __getitem__(self, key: BatchKey) -> Batch:
        """Builds the batch that `key` names; it has labels where all its entries have."""
        generator = torch.Generator().manual_seed(key.seed)
        rows = self.images.examples(self._numbers[list(key.examples)].tolist())
        entries = [row["entry"] for row in rows]
        schema, processor = self.schema, self.images.processor
        text = processor.pad(processor.pair_ids([schema.texts_of(entry) for entry in entries]))
        known = all(self.encode.known(entry) for entry in entries)
        images: dict[str, Any] = {}
        for place in range(schema.num_images):
            numbers = [row["images"][place] if row["images"] else NO_IMAGE for row in rows]
            images |= self.images.fields(numbers, generator, "_2" if place else "")
        return Batch(
            ids=tuple(str(entry[self._id]) for entry in entries),
            seed=key.seed,
            input_ids=text.input_ids,
            attention_mask=text.attention_mask,
            labels=torch.stack([self.label(entry) for entry in entries]) if known else None,
            **images,
        )

    def label(self, entry: Mapping[str, Any]) -> Tensor:
        try:
            return self.encode.tensor(entry)
        except ValueError as error:
            raise ValueError(f"{self.schema.noun} {entry[self._id]} {error}") from error
