"""Inputs in any number: decoded, computed and matched batch by batch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice, repeat
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from bridgetower.engines.engine import Engine
from bridgetower.inference import Item, Kind, compute, image_bytes, matched, score_pairs, split_rows
from bridgetower.model.encodings import Encoded
from bridgetower.processor import ImageLike, Processor, loaded
from bridgetower.progress import count_bars, counted


def compute_items(
    engine: Engine, processor: Processor, items: Iterable[Item], count: int, *, batch_size: int, progress: bool = False
) -> list[Any]:
    """Computes items batch by batch; see `inference.compute`.

    Args:
        engine: Encodes and fuses.
        processor: Normalises and pads.
        items: Are made when their batch is computed.
        count: Their number.
        batch_size: Items at once.
        progress: Show a bar, if there is more than one batch.

    Raises:
        ValueError: `batch_size` is below 1.
    """
    check_batch_size(batch_size)
    starts, items = range(0, count, batch_size), iter(items)
    batches = counted(starts, "batches", shown=progress and len(starts) > 1)
    return [found for _ in batches for found in compute(engine, processor, list(islice(items, batch_size)))]


def compute_pairs(
    engine: Engine,
    processor: Processor,
    kind: Kind,
    images: Sequence[ImageLike],
    texts: Sequence[str],
    images_2: Sequence[ImageLike] | None = None,
    *,
    top: int = 1,
    batch_size: int = 32,
    truncate: bool = False,
    progress: bool = False,
) -> list[Any]:
    """Computes something of every image, or every two images, with its text; see `inference.compute`.

    Args:
        engine: Encodes and fuses.
        processor: Prepares images and texts.
        kind: What is computed.
        images, texts, images_2: Of the same number.
        top: Words per mask.
        batch_size: Pairs at once.
        truncate: Cut texts that are too long instead of refusing them.
        progress: Show a bar.

    Raises:
        ValueError: `batch_size` is below 1, a text is too long, or an image cannot be used; its number is named.
    """
    ids = processor.token_ids(texts, truncate=truncate)
    second: Iterable[Any] = repeat(None) if images_2 is None else decoded(processor, images_2, batch_size)
    inputs = zip(decoded(processor, images, batch_size), second, ids, strict=False)
    items = (Item(kind=kind, image=one, image_2=other, ids=tuple(tokens), top=top) for one, other, tokens in inputs)
    return compute_items(engine, processor, items, len(ids), batch_size=batch_size, progress=progress)


def decoded(
    processor: Processor, images: Sequence[ImageLike], batch_size: int, num_workers: int = 0
) -> Iterator[UInt8[Tensor, "3 h w"]]:
    """Yields resized images, which are decoded batch by batch; an object that a batch has several times, once.

    Args:
        processor: Resizes them.
        images: The images.
        batch_size: Images at once.
        num_workers: Processes that decode; 0 decodes in this one.

    Raises:
        ValueError: An image cannot be used; its number is named.
    """
    batches = [images[start : start + batch_size] for start in range(0, len(images), batch_size)]
    different: list[dict[int, tuple[int, ImageLike]]] = [{} for _ in batches]
    for number, image in enumerate(images):
        different[number // batch_size].setdefault(id(image), (number, image))
    numbered = [list(each.values()) for each in different]
    opened = loaded(processor.resize_numbered, numbered, num_workers=num_workers)
    for batch, keys, pixels in zip(batches, different, opened, strict=True):
        found = dict(zip(keys, pixels, strict=True))
        yield from (found[id(image)] for image in batch)


@torch.inference_mode()
def match_all(
    engine: Engine,
    processor: Processor,
    images: Sequence[ImageLike],
    ids: Sequence[Sequence[int]],
    *,
    batch_size: int,
    room: int,
    progress: bool = False,
) -> Float[Tensor, "i t"]:
    """Returns the log-odds of a match of every image with every text; each image is encoded once.

    Args:
        engine: Encodes and fuses; its model's matching head is read.
        processor: Prepares images and pads.
        images: At least one.
        ids: Token ids of the texts, which are encoded with every block of images.
        batch_size: Images or pairs at once.
        room: Bytes for the encodings of a block of images.
        progress: Show a bar.

    Raises:
        ValueError: The model has no matching head, `batch_size` is below 1, or an image cannot be used; its number is
            named.
    """
    check_batch_size(batch_size)
    order = sorted(range(len(ids)), key=lambda text: len(ids[text]))  # so that batches hold little padding
    scores = torch.empty(len(images), len(ids))

    def text_of(places: Sequence[int]) -> Encoded:
        text = processor.pad([ids[order[place]] for place in places])
        return engine.cache_text(engine.encode_text(text.input_ids, text.attention_mask))

    def image_of(rows: range) -> Encoded:
        pixel_values = processor.images(images[rows.start : rows.stop], first=rows.start)
        return engine.cache_image(engine.encode_image(pixel_values))

    with count_bars(shown=progress) as bars:
        bar = bars.add_task("pairs", total=scores.numel())
        for block in split_rows(range(len(images)), max(1, room // image_bytes(engine.model))):
            image = Encoded.cat([image_of(rows) for rows in split_rows(block, batch_size)])
            pairs = torch.cartesian_prod(torch.arange(len(ids)), torch.arange(len(image))).flip(1)
            found = []
            for logits in score_pairs(engine, engine.model.itm_logits, image, text_of, pairs, batch_size=batch_size):
                found.append(matched(logits))
                bars.advance(bar, len(logits))
            scores[block.start : block.stop, order] = torch.cat(found).reshape(len(ids), len(image)).T
    return scores


def check_batch_size(batch_size: int) -> None:
    """Raises ValueError if nothing fits into a batch."""
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; expected at least 1")
