"""The images of prepared sets, decoded by batch, and the entries about them as examples, addressed by batch."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import accumulate
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from torch.utils.data import Dataset

from bridgetower.data.batches.batch import Batch, BatchKey
from bridgetower.data.batches.views import augment, custom_transform, random_view, transformed
from bridgetower.data.config import DataConfig
from bridgetower.data.sets.answers import soft_targets
from bridgetower.data.sets.prepared_set import SPLIT_OPTIONS, PreparedSet
from bridgetower.data.sets.schema import CAPTIONS, Schema
from bridgetower.processor import Processor

AnyBatch = TypeVar("AnyBatch", bound=Batch)

NO_IMAGE = -1  # number of the image of an example that has only a text


class PreparedImages:
    """The images and examples of splits of several prepared sets, each numbered through all sets."""

    def __init__(
        self,
        config: DataConfig,
        splits: str | Sequence[str],
        processor: Processor,
        *,
        schema: Schema = CAPTIONS,
    ) -> None:
        if not config.folders:
            raise ValueError(
                "no data folder given; pass --data.folders DIR, made by `bridgetower prepare`"
            )
        self.config, self.processor, self.schema = config, processor, schema
        self.splits = (splits,) if isinstance(splits, str) else tuple(splits)
        self.sets = [PreparedSet(folder, self.splits, schema) for folder in config.folders]
        self.sets += [PreparedSet(folder, ("train",), schema) for folder in config.train_only]
        self._starts = [0, *accumulate(len(one.numbers) for one in self.sets)]
        self._image_starts = [0, *accumulate(one.num_images for one in self.sets)]
        groups = [
            np.where(one.groups < 0, NO_IMAGE, one.groups + start)
            for one, start in zip(self.sets, self._image_starts, strict=False)
        ]
        self.image_of = torch.from_numpy(
            np.concatenate(groups)
        ).long()  # the first image of each example
        if config.transform is not None:
            custom_transform(
                config.transform
            )  # a wrong name is an error here, not in the first batch of a worker
        # What batches have in the place of pixels: hidden states of images, or numbers inside a `FrozenDataset`.
        self.frozen: Callable[[Sequence[int]], Tensor] | None = None
        self.raw = False  # whether `views` leaves normalising to who has the pixels on a GPU
        self._cache: dict[int, Tensor] = {}
        self._examples: list[dict[str, Any]] = []

    def __len__(self) -> int:
        return self._image_starts[-1]

    @property
    def num_examples(self) -> int:
        return self._starts[-1]

    def digests(self) -> dict[str, str]:
        return {f"{one.folder} ({', '.join(one.splits)})": one.info.digest for one in self.sets}

    def sets_of(self, examples: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
        return torch.searchsorted(torch.tensor(self._starts[1:]), examples, right=True)

    def repeated(self, examples: Int[Tensor, " n"]) -> Int[Tensor, " m"]:
        """Returns the examples of an epoch: those of a set as often as the config says."""
        if not self.config.repeats:
            return examples
        times = torch.tensor(self.config.repeats)[self.sets_of(examples)]
        return torch.cat([examples[times > number] for number in range(int(times.max()))])

    def examples(self, numbers: Sequence[int]) -> list[dict[str, Any]]:
        """Returns examples, each with its `id`, the numbers of its `images` and its `entry`."""
        if self.config.cache:
            self._examples = self._examples or list(self.scan())
        if self._examples:
            return [self._examples[number] for number in numbers]
        found: dict[int, dict[str, Any]] = {}
        for one, wanted, own in self._shares(numbers, self._starts):
            rows = (self._renumbered(one, row) for row in self.sets[one].examples(own))
            found |= zip(wanted, rows, strict=True)
        return [found[number] for number in numbers]

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keeps all examples in memory meanwhile: read one by one, each takes milliseconds."""
        self._examples = self._examples or list(self.scan())
        yield
        if not self.config.cache:
            self._examples = []

    def scan(self) -> Iterator[dict[str, Any]]:
        for number, one in enumerate(self.sets):
            yield from (self._renumbered(number, row) for row in one.scan())

    def contents(self, images: Sequence[int]) -> list[bytes]:
        images, found = self._in_sets(images), dict[int, bytes]()
        for one, wanted, own in self._shares(images, self._image_starts):
            found |= zip(wanted, self.sets[one].images(own), strict=True)
        return [found[image] for image in images]

    def pixels(self, images: Sequence[int]) -> list[UInt8[Tensor, "3 h w"]]:
        wanted = [image for image in dict.fromkeys(images) if image not in self._cache]
        decoded = dict(zip(wanted, self._decoded(wanted, self.processor.resize), strict=True))
        if self.config.cache:
            self._cache |= decoded
        return [decoded[image] if image in decoded else self._cache[image] for image in images]

    def views(
        self, images: Sequence[int], generator: torch.Generator
    ) -> Float[Tensor, "b 3 h w"] | UInt8[Tensor, "b 3 h w"]:
        if self.config.has_views:
            views = self._decoded(
                images, lambda content: random_view(content, self.config, self.processor, generator)
            )
        else:
            views = self.pixels(images)
        pixels = augment(torch.stack(views), self.config.augmentation, generator)
        if self.config.transform is not None:
            pixels = transformed(pixels, self.config.transform, generator)
        return pixels if self.raw else self.processor.normalise(pixels)

    def pixel_values(self, images: Sequence[int]) -> Float[Tensor, "b 3 h w"]:
        return self.processor.normalise(torch.stack(self.pixels(images)))

    def fields(
        self, images: Sequence[int], generator: torch.Generator, suffix: str = ""
    ) -> dict[str, Any]:
        if self.frozen is not None:
            return {f"image_states{suffix}": self.frozen(images)}
        return {f"pixel_values{suffix}": self.views(images, generator)}

    def batch(self, images: Sequence[int]) -> Batch:
        """Returns images without augmentation, which `on_device` normalises."""
        if self.frozen is not None:
            return Batch(image_states=self.frozen(images))
        return Batch(pixel_values=torch.stack(self.pixels(images)))

    def on_device(self, batch: AnyBatch, device: torch.device) -> AnyBatch:
        moved: Any = batch.to(device)
        raw = {
            name: self.processor.normalise(value)
            for name, value in vars(moved).items()
            if isinstance(value, Tensor) and value.dtype == torch.uint8
        }
        return replace(moved, **raw) if raw else moved

    def _decoded(
        self, images: Sequence[int], decode: Callable[[bytes], Tensor]
    ) -> list[UInt8[Tensor, "3 h w"]]:
        there, found = [image for image in images if image >= 0], []
        contents = dict(zip(there, self.contents(there), strict=True))
        for image in images:
            try:
                resize, blank_image = self.processor.resize, self.processor.blank_image
                found.append(resize(blank_image()) if image < 0 else decode(contents[image]))
            except ValueError as error:
                ((number, _, own),) = self._shares(self._in_sets([image]), self._image_starts)
                (name,) = self.sets[number].image_names(own)
                raise ValueError(f"image {name} of {self.sets[number].folder}: {error}") from error
        return found

    def _in_sets(self, images: Sequence[int]) -> Sequence[int]:
        return images

    def _shares(
        self, numbers: Sequence[int], starts: Sequence[int]
    ) -> Iterator[tuple[int, list[int], list[int]]]:
        """Yields the sets that some examples or images are of, with those of each, and their numbers in it."""
        different = np.unique(np.asarray(numbers, np.int64))
        ends = np.searchsorted(different, starts)
        for number in range(len(self.sets)):
            if len(own := different[ends[number] : ends[number + 1]]):
                yield number, own.tolist(), (own - starts[number]).tolist()

    def _renumbered(self, number: int, row: dict[str, Any]) -> dict[str, Any]:
        return {**row, "images": [self._image_starts[number] + image for image in row["images"]]}


class LabelEncoder(Protocol):
    """How the label of an entry becomes a tensor, of the same shape for all that have one."""

    def known(self, entry: Mapping[str, Any]) -> bool: ...

    def tensor(self, entry: Mapping[str, Any]) -> Tensor: ...


class ClassEncoder:
    """Labels that name one class, or with `multi_label` any number of classes, in the order of their names."""

    def __init__(self, names: Sequence[str], *, multi_label: bool = False) -> None:
        self.multi_label, self._number_of = (
            multi_label,
            {name: number for number, name in enumerate(names)},
        )

    def known(self, entry: Mapping[str, Any]) -> bool:
        return bool(entry["labelled"] if "labels" in entry else entry["label"])

    def tensor(self, entry: Mapping[str, Any]) -> Int[Tensor, ""] | Float[Tensor, " k"]:
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
        scores = torch.zeros(len(self.answers))
        for answer, score in soft_targets(entry["answers"], self._number_of).items():
            scores[self._number_of[answer]] = score
        return scores


class EntryDataset(Dataset[Batch]):
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
                raise ValueError(
                    f"{again} ids of {len(chosen)} come again; expected one example of each id"
                )
            numbers = torch.tensor(chosen, dtype=torch.int64)
        self._numbers = images.repeated(numbers)
        if not len(self._numbers):
            folders = ", ".join(one.folder for one in images.sets)
            unfit = "" if keep is None else " is fit for this"
            raise ValueError(
                f"no example in split {splits} of {folders}{unfit}; choose another ({SPLIT_OPTIONS})"
            )

    def __len__(self) -> int:
        return len(self._numbers)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (row["entry"] for row in self.rows())

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yields every example once, in the order of a set without repeats."""
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
