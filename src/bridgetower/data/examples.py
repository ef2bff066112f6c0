"""Questions, statements and other entries of prepared sets as examples, each with its images, addressed by batch."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.data import Dataset

from bridgetower.data.answers import soft_targets
from bridgetower.data.batch import Batch, BatchDataset, BatchKey
from bridgetower.data.folder import SPLIT_OPTIONS
from bridgetower.data.prepared import PreparedImages
from bridgetower.data.schema import Schema

_PIXELS = ("pixel_values", "pixel_values_2")


class LabelEncoder(Protocol):
    """How the label of an entry becomes a tensor."""

    def known(self, entry: Mapping[str, Any]) -> bool:
        """Whether the entry has a label."""
        ...

    def tensor(self, entry: Mapping[str, Any]) -> Tensor:
        """Returns the label of an entry that has one, of the same shape for all of them."""
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
    """Returns the number of the class that a label names."""
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

    Only the places of the entries are kept in memory: the 440 thousand questions of VQAv2 with ten answers each would
    take half a gigabyte in every process that decodes.

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
        """Finds the entries.

        Args:
            images: Of a schema whose entries have a text and an identifier.
            encode: Makes labels of entries.
            keep: Whether an entry is an example; None: every entry is.
            labelled: Every example must have a label.
            unique: No identifier may come twice.
        """
        assert images.schema.id is not None
        self.images, self.encode, self._keep, self._id = images, encode, keep, images.schema.id
        self._places = self._find(labelled=labelled, unique=unique)
        if not len(self._places):
            folders = ", ".join(str(folder) for folder, _ in images.sources)
            unfit = "" if keep is None else " is fit for this"
            raise ValueError(
                f"no example in split {', '.join(images.splits)} of {folders}{unfit}; choose another ({SPLIT_OPTIONS})"
            )

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yields every entry once, in the order of the examples of a set without repeats."""
        return (entry for entries in self.images.entries() for entry in entries if self._kept(entry))

    @property
    def image_numbers(self) -> Int[Tensor, " n"]:
        """The image of each example, or its pair of images."""
        return self._places[:, 0].long()

    @property
    def schema(self) -> Schema:
        """What the entries hold."""
        return self.images.schema

    def __getitem__(self, key: BatchKey) -> Batch:
        """Builds the batch that `key` names; it has labels where all its entries have."""
        generator = torch.Generator().manual_seed(key.seed)
        places = self._places[list(key.examples)].tolist()
        images = [image for image, _ in places]
        entries = [self.images.entries_of(image)[number] for image, number in places]
        schema, processor = self.schema, self.images.processor
        text = processor.pad(processor.pair_ids([schema.texts_of(entry) for entry in entries]))
        known = all(self.encode.known(entry) for entry in entries)
        pixels: dict[str, Any] = {
            name: self.images.views(images, generator, column)
            for name, column in zip(_PIXELS, schema.image_columns, strict=False)
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
        """Returns the label of an entry that has one."""
        try:
            return self.encode.tensor(entry)
        except ValueError as error:
            raise ValueError(f"{self.schema.noun} {entry[self._id]} {error}") from error

    def _kept(self, entry: dict[str, Any]) -> bool:
        return self._keep is None or self._keep(entry)

    def _find(self, *, labelled: bool, unique: bool) -> Int[Tensor, "n 2"]:
        """Returns the image and the number there of the entry of each example, in one pass over the files."""
        counts, kept, ids = array("q"), array("q"), set[Any]()
        for entries in self.images.entries():
            chosen = [number for number, entry in enumerate(entries) if self._kept(entry)]
            counts.append(len(chosen))
            kept.extend(chosen)
            if labelled:
                self._check_labels(entries[number] for number in chosen)
            if unique:
                ids.update(entries[number][self._id] for number in chosen)
        if unique and len(ids) < len(kept):
            raise ValueError(f"{len(kept) - len(ids)} ids of {len(kept)} come again; expected one example of each id")
        lengths, numbers = (torch.tensor(values, dtype=torch.int64) for values in (counts, kept))
        places = self.images.places(lengths)
        images, number_there = places.long().unbind(1)
        places[:, 1] = numbers[(lengths.cumsum(0) - lengths)[images] + number_there]
        return places

    def _check_labels(self, entries: Iterable[Mapping[str, Any]]) -> None:
        unknown = next((entry for entry in entries if not self.encode.known(entry)), None)
        if unknown:
            raise ValueError(
                f"{self.schema.noun} {unknown[self._id]} of split {', '.join(self.images.splits)} has no "
                f"{self.schema.label_noun}; choose a split that has ({SPLIT_OPTIONS})"
            )


class WithOtherImages(Dataset[Batch]):
    """Each example with the image, or both images, of the example half a set away.

    What is right on them does not come from the image.
    """

    def __init__(self, examples: BatchDataset) -> None:
        """Wraps a set.

        Args:
            examples: Questions or statements.
        """
        if len(examples) < 2:
            raise ValueError(f"{len(examples)} example has no other image; expected at least 2 examples")
        self._examples, self._shift = examples, len(examples) // 2

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, key: BatchKey) -> Batch:
        """Builds the batch that `key` names, with other images."""
        others = tuple((example + self._shift) % len(self) for example in key.examples)
        shown = self._examples[replace(key, examples=others)]
        return replace(self._examples[key], **{name: getattr(shown, name) for name in _PIXELS})
