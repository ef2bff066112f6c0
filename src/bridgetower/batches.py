"""Inputs in any number: decoded, computed and matched batch by batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from bridgetower.data.fetch import is_url, read_bytes
from bridgetower.engines.engine import Engine
from bridgetower.inference import (
    Item,
    Kind,
    compute,
    encoded_images,
    encoded_texts,
    image_bytes,
    matched,
    score_pairs,
    split_rows,
)
from bridgetower.model.fusion import Encoded
from bridgetower.processor import ImageLike, Processor, loaded
from bridgetower.progress import count_bars, counted


def compute_inputs(
    engine: Engine,
    processor: Processor,
    kind: Kind,
    images: Sequence[ImageLike] | None,
    texts: Sequence[str] | None,
    images_2: Sequence[ImageLike] | None = None,
    *,
    top: int = 1,
    batch_size: int = 32,
    truncate: bool = False,
    num_workers: int = 0,
    progress: bool = False,
) -> list[Any]:
    """Computes something of images, of texts, or of every image, or every two, with its text."""
    check_batch_size(batch_size)
    count = len(images if images is not None else texts or ())
    ids = [None] * count if texts is None else [*map(tuple, processor.token_ids(texts, truncate=truncate))]
    order = list(range(count))
    if images is None:
        order.sort(key=lambda row: len(ids[row] or ()))  # so that batches hold little padding
    shown = [None if some is None else decoded(processor, some, batch_size, num_workers) for some in (images, images_2)]
    found: list[Any] = [None] * count
    batches = split_rows(range(count), batch_size)
    for batch in counted(batches, "batches", shown=progress and len(batches) > 1):
        rows = order[batch.start : batch.stop]
        first, second = ([None] * len(rows) if each is None else list(islice(each, len(rows))) for each in shown)
        items = [
            Item(kind=kind, image=image, image_2=image_2, ids=ids[row], top=top)
            for row, image, image_2 in zip(rows, first, second, strict=True)
        ]
        for row, outcome in zip(rows, compute(engine, processor, items), strict=True):
            found[row] = outcome
    return found


def decoded(
    processor: Processor, images: Sequence[ImageLike], batch_size: int, num_workers: int = 0
) -> Iterator[UInt8[Tensor, "3 h w"]]:
    """Yields resized images, which are decoded batch by batch; an object that a batch has several times, once."""
    batches = [images[start : start + batch_size] for start in range(0, len(images), batch_size)]
    different: list[dict[int, tuple[int, ImageLike]]] = [{} for _ in batches]
    for number, image in enumerate(images):
        different[number // batch_size].setdefault(id(image), (number, image))
    numbered = [list(each.values()) for each in different]
    opened = loaded(partial(_resized, processor), numbered, num_workers=num_workers)
    for batch, keys, pixels in zip(batches, different, opened, strict=True):
        found = dict(zip(keys, pixels, strict=True))
        yield from (found[id(image)] for image in batch)


def _resized(processor: Processor, numbered: tuple[int, ImageLike]) -> UInt8[Tensor, "3 h w"]:
    return processor.resize_numbered((numbered[0], fetched(numbered[1])))


def fetched(image: ImageLike) -> ImageLike:
    """Returns the bytes of an image at a URL; other images as they are."""
    return read_bytes(image) if isinstance(image, str) and is_url(image) else image


@torch.inference_mode()
def match_all(
    engine: Engine,
    processor: Processor,
    images: Sequence[ImageLike],
    texts: Sequence[str],
    *,
    room: int,
    batch_size: int = 32,
    truncate: bool = False,
    num_workers: int = 0,
    progress: bool = False,
) -> Float[Tensor, "i t"]:
    """Returns the log-odds of a match of every image with every text; each image is encoded once."""
    check_batch_size(batch_size)
    ids = processor.token_ids(texts, truncate=truncate)
    order = sorted(range(len(ids)), key=lambda text: len(ids[text]))  # so that batches hold little padding
    scores = torch.empty(len(images), len(ids))
    pixels = decoded(processor, images, batch_size, num_workers)

    def text_of(places: Sequence[int]) -> Encoded:
        return engine.cache_text(encoded_texts(engine, processor, [ids[order[place]] for place in places]))

    with count_bars(shown=progress) as bars:
        bar = bars.add_task("pairs", total=scores.numel())
        for block in split_rows(range(len(images)), max(1, room // image_bytes(engine.model))):
            image = Encoded.cat(
                [
                    engine.cache_image(encoded_images(engine, processor, list(islice(pixels, len(rows)))))
                    for rows in split_rows(block, batch_size)
                ]
            )
            pairs = torch.cartesian_prod(torch.arange(len(ids)), torch.arange(len(image))).flip(1)
            found = []
            for logits in score_pairs(engine, engine.model.itm_logits, image, text_of, pairs, batch_size=batch_size):
                found.append(matched(logits))
                bars.advance(bar, len(logits))
            scores[block.start : block.stop, order] = torch.cat(found).reshape(len(ids), len(image)).T
    return scores


def check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; expected at least 1")
