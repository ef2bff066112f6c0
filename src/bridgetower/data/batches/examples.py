"""Images of prepared sets, decoded by batch, and the examples with entries about them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
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
    """Images and examples of splits of prepared sets, numbered consecutively over all sets.

    Args:
        config: Sets and how their images are read.
        splits: Splits of `config.folders`; `config.train_only` always gives `train`.
        processor: Makes pixels of images.
        schema: Schema of all sets.

    Raises:
        ValueError: No folder is configured, or a set has another schema.
    """

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
        self.config = config
        self.processor = processor
        self.schema = schema
        self.splits = (splits,) if isinstance(splits, str) else tuple(splits)
        self.sets = [PreparedSet(folder, self.splits, schema) for folder in config.folders]
        self.sets += [PreparedSet(folder, ("train",), schema) for folder in config.train_only]
        self._starts = [0, *accumulate(len(dataset.numbers) for dataset in self.sets)]
        self._image_starts = [0, *accumulate(dataset.num_images for dataset in self.sets)]
        first_images = []
        for dataset, start in zip(self.sets, self._image_starts, strict=False):
            is_text = dataset.groups < 0
            first_images.append(np.where(is_text, NO_IMAGE, dataset.groups + start))
        # The first image of each example.
        self.image_of = torch.from_numpy(np.concatenate(first_images)).long()
        # A wrong name of a transform is an error here, not in the first batch of a worker.
        if config.transform is not None:
            custom_transform(config.transform)
        # Reads features of images in place of pixels, see `frozen.py`.
        self.read_features: Callable[[Sequence[int]], Tensor] | None = None
        self.raw = False  # whether `views` leaves normalising to the GPU
        self._pixels: dict[int, Tensor] = {}
        self._examples: list[dict[str, Any]] = []

    def __len__(self) -> int:
        return self._image_starts[-1]

    @property
    def num_examples(self) -> int:
        return self._starts[-1]

    def digests(self) -> dict[str, str]:
        """Returns the digest of each set, by its folder and splits."""
        return {
            f"{dataset.folder} ({', '.join(dataset.splits)})": dataset.info.digest
            for dataset in self.sets
        }

    def sets_of(self, examples: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
        """Returns the index of the set of each example."""
        return torch.searchsorted(torch.tensor(self._starts[1:]), examples, right=True)

    def with_repeats(self, examples: Int[Tensor, " n"]) -> Int[Tensor, " m"]:
        """Returns the examples of an epoch, each as often as `config.repeats` has it for its set."""
        if not self.config.repeats:
            return examples
        repeats = torch.tensor(self.config.repeats)[self.sets_of(examples)]
        return torch.cat([examples[repeats > number] for number in range(int(repeats.max()))])

    def examples(self, numbers: Sequence[int]) -> list[dict[str, Any]]:
        """Returns examples, each with its `id`, the numbers of its `images` and its `entry`."""
        if self.config.cache and not self._examples:
            self._examples = list(self.scan())
        if self._examples:
            return [self._examples[number] for number in numbers]
        examples = self._gather(numbers, self._starts, PreparedSet.examples)
        sets = self.sets_of(torch.tensor(numbers, dtype=torch.long)).tolist()
        return [
            self._renumbered(index, example) for index, example in zip(sets, examples, strict=True)
        ]

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keeps all examples in memory meanwhile, because reading one takes milliseconds."""
        self._examples = self._examples or list(self.scan())
        yield
        if not self.config.cache:
            self._examples = []

    def scan(self) -> Iterator[dict[str, Any]]:
        """Yields all examples in order, as `examples` returns them."""
        for index, dataset in enumerate(self.sets):
            for example in dataset.scan():
                yield self._renumbered(index, example)

    def contents(self, images: Sequence[int]) -> list[bytes]:
        """Returns the encoded bytes of images."""
        numbers = self._image_numbers(images)
        return self._gather(numbers, self._image_starts, PreparedSet.images)

    def pixels(self, images: Sequence[int]) -> list[UInt8[Tensor, "3 h w"]]:
        """Returns images at the size of the model as in evaluation, with `config.cache` decoded once each."""
        pixels = self._pixels if self.config.cache else dict[int, Tensor]()
        missing = [image for image in dict.fromkeys(images) if image not in pixels]
        pixels.update(zip(missing, self._decoded(missing, self.processor.resize), strict=True))
        return [pixels[image] for image in images]

    def views(
        self, images: Sequence[int], generator: torch.Generator
    ) -> Float[Tensor, "b 3 h w"] | UInt8[Tensor, "b 3 h w"]:
        """Returns images as in training, after the random changes of the config."""
        if self.config.has_views:
            decode = partial(
                random_view, config=self.config, processor=self.processor, generator=generator
            )
            views = self._decoded(images, decode)
        else:
            views = self.pixels(images)
        pixels = augment(torch.stack(views), self.config.augmentation, generator)
        if self.config.transform is not None:
            pixels = transformed(pixels, self.config.transform, generator)
        return pixels if self.raw else self.processor.normalise(pixels)

    def pixel_values(self, images: Sequence[int]) -> Float[Tensor, "b 3 h w"]:
        return self.processor.normalise(torch.stack(self.pixels(images)))

    def fields(
        self, images: Sequence[int], generator: torch.Generator | None = None, suffix: str = ""
    ) -> dict[str, Any]:
        """Returns the field of a `Batch` with images: features if there are any, else pixels.

        Without a generator pixels are as in evaluation, and `on_device` normalises them.
        """
        if self.read_features is not None:
            return {f"image_states{suffix}": self.read_features(images)}
        if generator is None:
            return {f"pixel_values{suffix}": torch.stack(self.pixels(images))}
        return {f"pixel_values{suffix}": self.views(images, generator)}

    def batch(self, images: Sequence[int]) -> Batch:
        """Returns images alone, as in evaluation."""
        return Batch(**self.fields(images))

    def on_device(self, batch: AnyBatch, device: torch.device) -> AnyBatch:
        """Moves a batch, and normalises its raw pixels there."""
        moved: Any = batch.to(device)
        normalised = {
            name: self.processor.normalise(value)
            for name, value in vars(moved).items()
            if isinstance(value, Tensor) and value.dtype == torch.uint8
        }
        return replace(moved, **normalised)

    def _decoded(
        self, images: Sequence[int], decode: Callable[[bytes], Tensor]
    ) -> list[UInt8[Tensor, "3 h w"]]:
        contents = iter(self.contents([image for image in images if image != NO_IMAGE]))
        decoded = []
        for image in images:
            if image == NO_IMAGE:
                decoded.append(self.processor.resize(self.processor.blank_image()))
                continue
            try:
                decoded.append(decode(next(contents)))
            except ValueError as error:
                numbers = self._image_numbers([image])
                (title,) = self._gather(numbers, self._image_starts, PreparedSet.image_titles)
                raise ValueError(f"image {title}: {error}") from error
        return decoded

    def _image_numbers(self, images: Sequence[int]) -> Sequence[int]:
        return images

    def _gather(
        self,
        numbers: Sequence[int],
        starts: Sequence[int],
        read: Callable[[PreparedSet, list[int]], Sequence[Any]],
    ) -> list[Any]:
        """Reads the rows of each set at once. The numbers of a set begin at its start."""
        values: dict[int, Any] = {}
        unique_numbers = np.unique(np.asarray(numbers, np.int64))
        bounds = np.searchsorted(unique_numbers, starts)  # of each set among them
        for index, dataset in enumerate(self.sets):
            members = unique_numbers[bounds[index] : bounds[index + 1]]
            if len(members):
                rows = (members - starts[index]).tolist()
                values.update(zip(members.tolist(), read(dataset, rows), strict=True))
        return [values[number] for number in numbers]

    def _renumbered(self, index: int, example: dict[str, Any]) -> dict[str, Any]:
        start = self._image_starts[index]
        return {**example, "images": [start + image for image in example["images"]]}


class LabelEncoder(Protocol):
    """Makes tensors of labels, of the same shape for all entries with a label."""

    def known(self, entry: Mapping[str, Any]) -> bool: ...

    def tensor(self, entry: Mapping[str, Any]) -> Tensor: ...


class ClassEncoder:
    """Encodes labels as a class number, or with `multi_label` as a 0 or 1 for each class.

    Args:
        names: Names of the classes in the order of their numbers.
        multi_label: Whether any number of classes may hold.
    """

    def __init__(self, names: Sequence[str], *, multi_label: bool = False) -> None:
        self.multi_label = multi_label
        self._number_of = {name: number for number, name in enumerate(names)}

    def known(self, entry: Mapping[str, Any]) -> bool:
        return bool(entry["labelled"] if "labels" in entry else entry["label"])

    def tensor(self, entry: Mapping[str, Any]) -> Int[Tensor, ""] | Float[Tensor, " k"]:
        labels = entry["labels"] if "labels" in entry else [entry["label"]]
        for label in labels:
            if label not in self._number_of:
                raise ValueError(
                    f"has the label {label!r}; the model's head has the classes {', '.join(self._number_of)}: use a "
                    "set of these, or train a new head"
                )
        numbers = [self._number_of[label] for label in labels]
        if not self.multi_label:
            return torch.tensor(numbers[0])
        targets = torch.zeros(len(self._number_of))
        targets[numbers] = 1
        return targets


class NumberEncoder:
    """Encodes labels that are numbers."""

    def known(self, entry: Mapping[str, Any]) -> bool:
        return bool(entry["labelled"])

    def tensor(self, entry: Mapping[str, Any]) -> Float[Tensor, ""]:
        return torch.tensor(float(entry["labels"][0]))


class AnswerEncoder:
    """Encodes answers of annotators as a score of each answer of a vocabulary."""

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
    """Entries about images as batches with labels.

    Args:
        images: The examples and their images.
        encode: Makes tensors of their labels.
        keep: Selects entries; default: all.
        labelled: Whether an entry without a label is an error.
        unique: Whether entries with the same identifier are an error.

    Raises:
        ValueError: No example is left, or as above.
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
        assert images.schema.id is not None
        self.images = images
        self.encode = encode
        self.schema = images.schema
        self._keep = keep
        self._id = images.schema.id
        splits = ", ".join(images.splits)
        numbers = torch.arange(images.num_examples)
        if keep or labelled or unique:
            is_kept = torch.ones(images.num_examples, dtype=torch.bool)
            ids: set[Any] = set()
            for number, example in enumerate(images.scan()):
                entry = example["entry"]
                if keep is not None and not keep(entry):
                    is_kept[number] = False
                    continue
                ids.add(entry[self._id])
                if labelled and not encode.known(entry):
                    raise ValueError(
                        f"{self.schema.noun} {entry[self._id]} of split {splits} has no {self.schema.label_noun}; "
                        f"choose a split that has ({SPLIT_OPTIONS})"
                    )
            numbers = is_kept.nonzero()[:, 0]
            if unique and len(ids) < len(numbers):
                raise ValueError(
                    f"{len(numbers) - len(ids)} ids of {len(numbers)} come again; expected one example of each id"
                )
        self._numbers = images.with_repeats(numbers)
        if not len(self._numbers):
            folders = ", ".join(dataset.folder for dataset in images.sets)
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
        for row in self.images.scan():
            if self._keep is None or self._keep(row["entry"]):
                yield row

    @property
    def set_numbers(self) -> Int[Tensor, " n"]:
        return self.images.sets_of(self._numbers)

    def __getitem__(self, key: BatchKey) -> Batch:
        """Builds the batch of a key, with labels if all its entries have one."""
        generator = torch.Generator().manual_seed(key.seed)
        rows = self.images.examples(self._numbers[list(key.examples)].tolist())
        entries = [row["entry"] for row in rows]
        processor = self.images.processor
        texts = [self.schema.texts_of(entry) for entry in entries]
        tokens = processor.pad(processor.pair_ids(texts))
        image_fields: dict[str, Any] = {}
        for index, suffix in enumerate(("", "_2")[: self.schema.num_images]):
            numbers = [row["images"][index] if row["images"] else NO_IMAGE for row in rows]
            image_fields |= self.images.fields(numbers, generator, suffix)
        has_labels = all(self.encode.known(entry) for entry in entries)
        return Batch(
            ids=tuple(str(entry[self._id]) for entry in entries),
            seed=key.seed,
            input_ids=tokens.input_ids,
            attention_mask=tokens.attention_mask,
            labels=torch.stack([self.label(entry) for entry in entries]) if has_labels else None,
            **image_fields,
        )

    def label(self, entry: Mapping[str, Any]) -> Tensor:
        """Encodes the label of an entry, which an error names."""
        try:
            return self.encode.tensor(entry)
        except ValueError as error:
            raise ValueError(f"{self.schema.noun} {entry[self._id]} {error}") from error
