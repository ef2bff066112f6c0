"""Examples to vectors: images are decoded ahead, in processes; what cannot be used comes with its problem."""

from __future__ import annotations

import hashlib
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from bridgetower.data.example import Example
from bridgetower.data.reader import Columns, Part, read_part
from bridgetower.distributed import available_cores
from bridgetower.extras import require
from bridgetower.predictor import Predictor, load
from bridgetower.processor import Processor, Resized
from bridgetower.processor.loading import load_items
from bridgetower.search.config import Content, Quantize, SourceConfig

MIN_FOR_WORKERS = 500
"""Images from which on processes decode: starting these takes about as long as decoding so many."""

Model = Predictor | str | Path | Callable[[], Predictor]
"""A loaded model, what to load, or what returns one."""

Task = tuple[int, Part | Sequence[Example], Set[int]]
"""Number of a part of a source, the part or its examples, and numbers of the examples that are not needed."""

_NAMED = 10  # problems spelt out in an error
_OF_BYTES = re.compile(r"^the \d+ image bytes")
_STAYING = (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError)
_NONE = np.empty((0, 0), np.float32)


@dataclass(frozen=True, kw_only=True)
class Embedded:
    """An example with its vectors, or with the reason why it has none.

    Attributes:
        example: As it was read, without the bytes of its image.
        digest: SHA-256 of the image file; empty without one.
        size: Of the same, in bytes.
        width: Of the upright image, in pixels; 0 without one.
        height: Of the same.
        frame: The image file if it was made of a frame of a video.
        image_vector: Contrastive; None if it was not asked for.
        text_vectors: Contrastive, one per text; none if they were not asked for.
        pair_vectors: Joint, one per text, likewise.
        num_cut: Texts that were cut, as they were too long.
        problem: Why it cannot be used; empty if it can.
        may_pass: Whether the problem may be gone when the image is read again, as of a network.
    """

    example: Example
    digest: str = ""
    size: int = 0
    width: int = 0
    height: int = 0
    frame: bytes | None = field(default=None, repr=False)
    image_vector: Float[np.ndarray, " c"] | None = None
    text_vectors: Float[np.ndarray, "t c"] = field(default_factory=lambda: _NONE)
    pair_vectors: Float[np.ndarray, "t e"] = field(default_factory=lambda: _NONE)
    num_cut: int = 0
    problem: str = ""
    may_pass: bool = False


class Decoder:
    """Decodes the images of a batch, also in other processes."""

    def __init__(self, processor: Processor, *, images: bool) -> None:
        """Keeps what decodes, and whether images are needed at all."""
        self.processor, self._images = processor, images

    def __call__(self, batch: Sequence[Example]) -> tuple[list[Embedded], UInt8[Tensor, "n 3 h w"]]:
        """Returns examples without vectors, and in one block the pixels of those with an image."""
        found, pixels = [], []
        for example in batch:
            one, image = self._decoded(example)
            images = tuple(replace(image, content=None) for image in example.images)
            found.append(replace(one, example=replace(example, images=images)))
            pixels += [] if image is None else [image.pixels]
        return found, torch.stack(pixels) if pixels else torch.empty(0, dtype=torch.uint8)

    def _decoded(self, example: Example) -> tuple[Embedded, Resized | None]:
        if example.problem or not example.images or not self._images:
            return Embedded(example=example, problem=example.problem), None
        if len(example.images) > 1:
            problem = f"it has {len(example.images)} images; expected one: name its column as image_column"
            return Embedded(example=example, problem=problem), None
        (image,) = example.images
        try:
            content = image.read()
            resized = self.processor.prepare(content)
        except (ValueError, OSError) as error:
            problem = _OF_BYTES.sub("it", str(error))
            if isinstance(error, FileNotFoundError) and error.filename:
                problem = f"no image file at {image.place}"
            elif problem.startswith(image.place) and image.is_file:
                problem = f"it{problem.removeprefix(image.place)}"
            may_pass = isinstance(error, OSError) and not isinstance(error, _STAYING)
            return Embedded(example=example, problem=problem, may_pass=may_pass), None
        one = Embedded(
            example=example,
            digest=hashlib.sha256(content).hexdigest(),
            size=len(content),
            width=resized.width,
            height=resized.height,
            frame=content if image.moment else None,
        )
        return one, resized


class Embedder:
    """A model, and what it makes of each example.

    Attributes:
        predictor: The model.
        batch_size: Examples at once.
    """

    def __init__(
        self,
        predictor: Predictor,
        of: Content | None,
        *,
        truncate: bool,
        batch_size: int,
        with_texts: bool = False,
    ) -> None:
        """Checks the model; `of` None: an image, or texts without one; `with_texts` adds texts and pairs to images."""
        self.predictor, self._of, self._truncate = predictor, of, truncate
        self.batch_size, self._with_texts = batch_size, with_texts
        if of != "pairs":
            predictor.model.contrastive_head()

    def decoder(self) -> Decoder:
        """Returns what decodes the images of examples, as far as they are needed."""
        return Decoder(self.predictor.processor, images=self._of != "texts")

    def embed(self, decoded: Sequence[Embedded], pixels: UInt8[Tensor, "n 3 h w"]) -> list[Embedded]:
        """Gives vectors to what was decoded, or problems."""
        checked = [self._checked(one) for one in decoded]
        images: list[Resized | None] = [None] * len(checked)
        places = [place for place, one in enumerate(decoded) if one.width]
        for place, one in zip(places, pixels, strict=True):
            images[place] = Resized(pixels=one, width=decoded[place].width, height=decoded[place].height)
        wanted = [frozenset() if one.problem else self._wanted(one.example) for one in checked]
        texts = [one.example.texts for one in checked]
        model, size = self.predictor, self.batch_size
        shown = [image for image, parts in zip(images, wanted, strict=True) if image is not None and "images" in parts]
        vectors = iter(model.embed_images(shown, batch_size=size).numpy() if shown else ())
        said = [text for given, parts in zip(texts, wanted, strict=True) if "texts" in parts for text in given]
        of_texts = iter(model.embed_texts(said, batch_size=size, truncate=True).numpy() if said else ())
        pairs = [
            (image, text)
            for image, given, parts in zip(images, texts, wanted, strict=True)
            if image is not None and "pairs" in parts
            for text in given
        ]
        joint: Any = (
            model.embed_pairs(*map(list, zip(*pairs, strict=True)), batch_size=size, truncate=True) if pairs else []
        )
        of_pairs = iter(np.asarray(joint))
        return [
            replace(
                one,
                image_vector=next(vectors) if "images" in parts else None,
                text_vectors=np.stack([next(of_texts) for _ in given]) if "texts" in parts else _NONE,
                pair_vectors=np.stack([next(of_pairs) for _ in given]) if "pairs" in parts else _NONE,
            )
            for one, given, parts in zip(checked, texts, wanted, strict=True)
        ]

    def _wanted(self, example: Example) -> frozenset[str]:
        if self._of is None:
            return frozenset({"images"} if example.images else {"texts"})
        return frozenset({self._of, "texts", "pairs"} if self._with_texts and example.texts else {self._of})

    def _checked(self, one: Embedded) -> Embedded:
        """Returns an example with why it cannot be used, if so, and how many of its texts are cut."""
        wanted, texts = self._wanted(one.example), one.example.texts
        if one.problem:
            return one
        if not one.example.images and wanted & {"images", "pairs"}:
            return replace(one, problem="it has no image")
        if wanted & {"texts", "pairs"} and not texts:
            return replace(one, problem="it has no text")
        if not wanted & {"texts", "pairs"}:
            return one
        refused = [text for text in texts if self._refusal(text, truncate=False)]
        bad = [error for text in refused if (error := self._refusal(text, truncate=self._truncate))]
        return replace(one, problem=f"caption {bad[0]}") if bad else replace(one, num_cut=len(refused))

    def _refusal(self, text: str, *, truncate: bool) -> str:
        try:
            self.predictor.processor.token_ids([text], truncate=truncate)
        except ValueError as error:
            return str(error)
        return ""


def embedded(
    embedder: Embedder, examples: Iterable[Example], *, num_workers: int | None = 0
) -> Iterator[list[Embedded]]:
    """Embeds examples in order; batches ahead are decoded by so many processes, None: by one per core if that pays."""
    left = iter(examples)
    if num_workers is None:
        first = list(islice(left, MIN_FOR_WORKERS))
        num_workers = available_cores() if len(first) >= MIN_FOR_WORKERS else 0
        left = chain(first, left)
    batches = iter(lambda: list(islice(left, embedder.batch_size)), [])
    for decoded, pixels in load_items(embedder.decoder(), batches, num_workers=num_workers):
        yield embedder.embed(decoded, pixels)


def embedded_parts(
    embedder: Embedder, tasks: Iterable[Task], columns: Columns, num_workers: int | None
) -> Iterator[list[tuple[int, int, Embedded | None]]]:
    """Embeds parts, whose examples share batches, with their numbers; after a part comes -1 - its count with None."""
    marks: deque[tuple[int, int]] = deque()

    def examples() -> Iterator[Example]:
        for part, files, known in tasks:
            count = 0
            for example in read_part(files, columns) if isinstance(files, Part) else files:
                if count not in known:
                    marks.append((part, count))
                    yield example
                count += 1
            marks.append((part, -1 - count))

    for found in embedded(embedder, examples(), num_workers=num_workers):
        rows: list[tuple[int, int, Embedded | None]] = []
        for one in found:
            while marks[0][1] < 0:
                rows.append((*marks.popleft(), None))
            rows.append((*marks.popleft(), one))
        yield rows
    yield [(*mark, None) for mark in marks]


def quantized(vectors: np.ndarray, kind: Quantize | None) -> np.ndarray:
    """Returns [n, c] vectors in fewer bytes: int8 with 127 as largest number of each, binary as signs, 8 in a byte."""
    if kind is None:
        return vectors
    if kind == "float16":
        return vectors.astype(np.float16)
    if kind == "int8":
        largest = np.abs(vectors).max(axis=1, keepdims=True)
        return np.rint(vectors * (127 / np.where(largest > 0, largest, 127))).astype(np.int8)
    return np.packbits(vectors > 0, axis=1)


def loaded(model: Model) -> Predictor:
    """Returns a model, loaded if it is not yet."""
    if isinstance(model, str | Path):
        return load(model)
    return model if isinstance(model, Predictor) else model()


def check_ray(config: SourceConfig, model: Model) -> None:
    """Checks that workers of a cluster can load the model themselves, if there is to be a cluster."""
    if config.ray is not None:
        require("ray")
        if isinstance(model, Predictor):
            raise ValueError("on Ray every worker loads the model; give what to load, not a loaded model")


def check_bad(source: object, problems: Sequence[str], num_bad: int, max_errors: int, others: str) -> None:
    """Raises a ValueError if more examples than allowed could not be used."""
    if num_bad > max_errors:
        shown = problems[:_NAMED]
        more = f" and {num_bad - len(shown)} more" if num_bad > len(shown) else ""
        bad = f"{num_bad} bad item{'s' if num_bad > 1 else ''}, allowed are {max_errors}"
        raise ValueError(f"{source}: {bad} (max_errors=N allows more); {others}: {' | '.join(shown)}{more}")
