"""Blocks of a source to vectors: images are decoded ahead, in processes; what cannot be used is named."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from bridgetower.bulk.config import Part
from bridgetower.data.items import Block, SourceItem
from bridgetower.data.remote import is_permanent
from bridgetower.distributed import available_cores
from bridgetower.files import sha256_of
from bridgetower.predictor import Predictor
from bridgetower.processor import Processor, Resized, load_items

MIN_FOR_WORKERS = 500  # images; starting processes takes about as long as decoding these


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """The result of decoding the image of an item.

    Attributes:
        item: As listed.
        digest: SHA-256 of the image file; empty without one, or if it could not be read.
        size: Of the same, in bytes.
        frame: The file itself if it was made of a frame of a video.
        image: What was decoded, unless there is a problem.
        problem: Why it cannot be used.
        may_pass: Whether the problem may be gone when the image is read again, as of a network.
    """

    item: SourceItem
    digest: str = ""
    size: int = 0
    frame: bytes | None = None
    image: Resized | None = None
    problem: str | None = None
    may_pass: bool = False


class Decoder:
    """Decodes the images of items, each on its own."""

    def __init__(self, processor: Processor, *, images: bool = True) -> None:
        """Keeps what decodes.

        Args:
            processor: The model's.
            images: Whether images are needed at all.
        """
        self.processor, self._images = processor, images

    def __getitem__(self, item: SourceItem) -> Decoded:
        """Reads an image; one that cannot be used comes back with the reason."""
        ref = item.image
        if item.problem:
            return Decoded(item=item, problem=item.problem)
        if ref is None or not self._images:
            return Decoded(item=item)
        try:
            if ref.is_file:
                image = self.processor.prepare(ref.path)  # first: it reads no file that is too long
                return Decoded(item=item, digest=sha256_of(ref.path), size=ref.path.stat().st_size, image=image)
            content = ref.read()
            digest = hashlib.sha256(content).hexdigest()
            image, frame = self.processor.prepare(content), content if ref.moment else None
            return Decoded(item=item, digest=digest, size=len(content), frame=frame, image=image)
        except (ValueError, OSError) as error:
            message, name = str(error), str(ref.path)
            problem = f"it{message.removeprefix(name)}" if message.startswith(name) else message
            may_pass = isinstance(error, OSError) and not is_permanent(error)
            return Decoded(item=item, problem=problem, may_pass=may_pass)


@dataclass(frozen=True, kw_only=True)
class DecodedBatch:
    """Some items with the pixels of those that were decoded in one tensor, which is quicker to hand over.

    Attributes:
        decoded: Without their images.
        sizes: Of each upright image, width and height; None where nothing was decoded.
        pixels: Of those with a size, in order.
    """

    decoded: Sequence[Decoded]
    sizes: Sequence[tuple[int, int] | None]
    pixels: UInt8[Tensor, "b 3 h w"]

    @staticmethod
    def of(decoded: Sequence[Decoded]) -> DecodedBatch:
        """Packs images."""
        images = [one.image for one in decoded]
        present = [image.pixels for image in images if image is not None]
        return DecodedBatch(
            decoded=[replace(one, image=None) for one in decoded],
            sizes=[None if image is None else (image.width, image.height) for image in images],
            pixels=torch.stack(present) if present else torch.empty(0, 3, 0, 0, dtype=torch.uint8),
        )

    def unpacked(self) -> list[Decoded]:
        """Returns the items as they were packed."""
        pixels = iter(self.pixels)
        return [
            one if size is None else replace(one, image=Resized(pixels=next(pixels), width=size[0], height=size[1]))
            for one, size in zip(self.decoded, self.sizes, strict=True)
        ]


@dataclass(frozen=True, kw_only=True)
class Problem:
    """An item that cannot be used.

    Attributes:
        id: Of the item.
        place: Where the source has it.
        problem: The reason.
        may_pass: Whether it may be gone when the item is read again.
    """

    id: str
    place: str
    problem: str
    may_pass: bool = False

    def __str__(self) -> str:
        return f"{self.id!r}: {self.problem}"


@dataclass(frozen=True, kw_only=True)
class Embedded:
    """An item with its vectors.

    Attributes:
        item: As listed.
        digest: SHA-256 of the image file; empty without one.
        size: Of the same, in bytes.
        width: Of the upright image, in pixels; 0 without one.
        height: Of the same.
        frame: The image file if it was made of a frame of a video.
        image_vector: Contrastive; None if it was not asked for.
        text_vectors: Contrastive, one per text; none if they were not asked for.
        pair_vectors: Joint, one per text, likewise.
    """

    item: SourceItem
    digest: str
    size: int
    width: int
    height: int
    frame: bytes | None = field(repr=False)
    image_vector: Float[np.ndarray, " c"] | None
    text_vectors: Float[np.ndarray, "t c"]
    pair_vectors: Float[np.ndarray, "t e"]


@dataclass(frozen=True, kw_only=True)
class EmbeddedBlock:
    """A block with its vectors.

    Attributes:
        name: Of the block.
        last: Whether it is the last one of its unit.
        rows: What was embedded, in order.
        problems: What was not.
        num_cut: Texts that were cut.
    """

    name: str
    last: bool
    rows: Sequence[Embedded] = field(repr=False)
    problems: Sequence[Problem]
    num_cut: int


class Embedder:
    """A model, and what it makes of each item.

    Attributes:
        predictor: The model.
        processor: Decodes.
    """

    def __init__(
        self,
        predictor: Predictor,
        parts: frozenset[Part] | None,
        *,
        truncate: bool,
        batch_size: int,
        with_texts: bool = False,
    ) -> None:
        """Checks the model.

        Args:
            predictor: The model.
            parts: What every item must have; None: an image, or texts without one.
            truncate: Cut texts that are too long; otherwise their item is a problem.
            batch_size: Items at once.
            with_texts: Texts, and their pairs with the image, where there are some, besides `parts`.

        Raises:
            ValueError: The model has no contrastive head, which vectors of images and texts need.
        """
        self.predictor, self._parts, self._truncate = predictor, parts, truncate
        self.batch_size, self._with_texts = batch_size, with_texts
        if parts != frozenset({"pairs"}):
            predictor.model.contrastive_head()

    def decoder(self) -> Decoder:
        """Returns what decodes the images of items, as far as they are needed."""
        return Decoder(self.predictor.processor, images=self._parts != frozenset({"texts"}))

    def embed(self, decoded: Sequence[Decoded]) -> tuple[list[Embedded], list[Problem], int]:
        """Embeds a batch: what has vectors, what has none, and how many texts were cut."""
        good, problems, num_cut = [], [], 0
        for one in decoded:
            problem, cut = self._checked(one)
            num_cut += cut
            if problem:
                bad = Problem(id=one.item.id, place=one.item.place, problem=problem, may_pass=one.may_pass)
                problems.append(bad)
            else:
                good.append(one)
        return self._vectors(good), problems, num_cut

    def _wanted(self, item: SourceItem) -> frozenset[Part]:
        if self._parts is None:
            return frozenset({"texts"}) if item.image is None else frozenset({"images"})
        return self._parts | {"texts", "pairs"} if self._with_texts and item.texts else self._parts

    def _checked(self, one: Decoded) -> tuple[str | None, int]:
        """Returns why an item cannot be used, if so, and how many of its texts are cut."""
        wanted = self._wanted(one.item)
        if one.problem:
            return one.problem, 0
        if one.item.image is None and wanted & {"images", "pairs"}:
            return "it has no image", 0
        if not wanted & {"texts", "pairs"}:
            return None, 0
        if not one.item.texts:
            return "it has no text", 0
        refused = [text for text in one.item.texts if self._refusal(text, truncate=False)]
        bad = [error for text in refused if (error := self._refusal(text, truncate=self._truncate))]
        return (f"caption {bad[0]}", 0) if bad else (None, len(refused))

    def _refusal(self, text: str, *, truncate: bool) -> str | None:
        try:
            self.predictor.processor.token_ids([text], truncate=truncate)
        except ValueError as error:
            return str(error)
        return None

    def _vectors(self, good: Sequence[Decoded]) -> list[Embedded]:
        model, size, none = self.predictor, self.batch_size, torch.empty(0, 0)
        wanted = [self._wanted(one.item) for one in good]
        shown = [one for one, parts in zip(good, wanted, strict=True) if "images" in parts]
        images = iter(model.embed_images(_images(shown), batch_size=size) if shown else none)
        found: dict[Part, Iterator[Tensor]] = {}
        for part in ("texts", "pairs"):
            owners = [one for one, parts in zip(good, wanted, strict=True) if part in parts]
            texts = [text for one in owners for text in one.item.texts]
            if part == "texts":
                vectors = model.embed_texts(texts, batch_size=size, truncate=True) if texts else none
            else:
                pictures = _images([one for one in owners for _ in one.item.texts])
                vectors = model.embed_pairs(pictures, texts, batch_size=size, truncate=True) if texts else none
            found[part] = iter(vectors.split([len(one.item.texts) for one in owners]))
        return [
            Embedded(
                item=one.item,
                digest=one.digest,
                size=one.size,
                width=one.image.width if one.image else 0,
                height=one.image.height if one.image else 0,
                frame=one.frame,
                image_vector=next(images).numpy() if "images" in parts else None,
                text_vectors=(next(found["texts"]) if "texts" in parts else none).numpy(),
                pair_vectors=(next(found["pairs"]) if "pairs" in parts else none).numpy(),
            )
            for one, parts in zip(good, wanted, strict=True)
        ]


def _images(decoded: Iterable[Decoded]) -> list[Resized]:
    return [one.image for one in decoded if one.image is not None]


def num_decoders(asked: int | None, total: int) -> int:
    """Returns the number of processes that decode.

    Args:
        asked: The option; None: one per core where that pays off.
        total: Images.
    """
    if asked is not None:
        return asked
    return available_cores() if total >= MIN_FOR_WORKERS else 0


def embedded_blocks(
    embedder: Embedder,
    blocks: Iterable[Block],
    *,
    num_workers: int = 0,
    advance: Callable[[int], object] = lambda count: None,
) -> Iterator[EmbeddedBlock]:
    """Embeds blocks in order; a few batches ahead are read and decoded.

    The processes are started afresh and not forked: the libraries of an index run threads, which a fork loses.

    Args:
        embedder: The model.
        blocks: Of a source.
        num_workers: Processes that decode; 0 decodes in this one.
        advance: Called with the number of items that were done.
    """
    begun: deque[Block] = deque()

    def batches() -> Iterator[Sequence[SourceItem]]:
        for block in blocks:
            begun.append(block)
            for start in range(0, len(block.items), embedder.batch_size):
                yield block.items[start : start + embedder.batch_size]

    decode = partial(_decoded_batch, embedder.decoder())
    loader = load_items(decode, batches(), num_workers=num_workers)
    gathered = _Gathered()
    for batch in loader:
        while not begun[0].items:
            yield _Gathered().block(begun.popleft())
        decoded = batch.unpacked()
        gathered.add(*embedder.embed(decoded))
        advance(len(decoded))
        gathered.count += len(decoded)
        if gathered.count == len(begun[0].items):
            yield gathered.block(begun.popleft())
            gathered = _Gathered()
    yield from (_Gathered().block(block) for block in begun)


def _decoded_batch(decoder: Decoder, items: Sequence[SourceItem]) -> DecodedBatch:
    return DecodedBatch.of([decoder[item] for item in items])


class _Gathered:
    """What was made of a block so far."""

    def __init__(self) -> None:
        self.rows: list[Embedded] = []
        self.problems: list[Problem] = []
        self.num_cut = self.count = 0

    def add(self, rows: Sequence[Embedded], problems: Sequence[Problem], num_cut: int) -> None:
        self.rows += rows
        self.problems += problems
        self.num_cut += num_cut

    def block(self, block: Block) -> EmbeddedBlock:
        """Returns what was made of a block, which is not read any more."""
        block.release()
        return EmbeddedBlock(
            name=block.name, last=block.last, rows=self.rows, problems=self.problems, num_cut=self.num_cut
        )
