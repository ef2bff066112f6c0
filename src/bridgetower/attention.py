"""Cross-attention of the words of a text over an image, in every fusion layer."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from bridgetower.checkpoints.reranking import Match
from bridgetower.inference import matched
from bridgetower.model.hidden_states import hidden_states
from bridgetower.predictor import Predictor
from bridgetower.processor import ImageLike, Processor, Resized

_VIEW_SIDE = 480  # pixels, at least


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """Cross-attention of each word of a text over an image, layer by layer.

    Attributes:
        words: Of the text; a word of several tokens is their mean.
        maps: Attention of each word over the patches, mean over the heads, renormalised so that each map sums to 1:
            [layers, words, rows, columns].
        prefix_shares: What went to the image's class token instead (and to a distillation token) before the maps were
            renormalised: [layers, words].
        probability: That image and text match; None without a calibration of the matching head.
        score: Of the matching head, from 0 to 1, where it has no calibration; else None.
        text: As given to `explain`.
        view: The part of the image that the model gets, in its proportions, as `explain` adds it.
    """

    words: tuple[str, ...]
    maps: Float[Tensor, "k w r c"] = field(repr=False)
    prefix_shares: Float[Tensor, "k w"] = field(repr=False)
    probability: float | None = None
    score: float | None = None
    text: str = ""
    view: Image.Image | None = field(default=None, repr=False)


def explain(predictor: Predictor, image: ImageLike, text: str, *, truncate: bool = False) -> Explanation:
    """Computes the cross-attention from the text stream to the image stream.

    The model runs in PyTorch, whatever the predictor's engine is. What a word attends to is not what decides about a
    match: the stream also has its self-attention and what earlier layers have mixed into each position.

    Args:
        predictor: The loaded model.
        image: The image.
        text: With at least one word.
        truncate: Cut a text that is too long instead of refusing it.

    Raises:
        ValueError: The text has no word or is too long, or the image cannot be used.
    """
    processor = predictor.processor
    (ids,) = processor.token_ids([text], truncate=truncate)
    found = attention_of(predictor, processor.resize(image), ids)
    return replace(found, text=text, view=view_of(processor, image))


@torch.inference_mode()
def attention_of(predictor: Predictor, image: UInt8[Tensor, "3 h w"], ids: Sequence[int]) -> Explanation:
    """Does the part of `explain` that needs the model, with an image as `Processor.resize` returns it."""
    model, processor = predictor.model, predictor.processor
    words, tokens = words_of(processor, ids)
    parameter = next(model.parameters())
    pixel_values = processor.normalise(image[None]).to(parameter.device, parameter.dtype)
    found = hidden_states(
        model,
        pixel_values,
        processor.pad([ids]).input_ids.to(parameter.device),
        layers={"fusion": range(1, model.config.fusion.num_layers + 1)},
        attentions=True,
    )
    weights = torch.stack(list(found.attentions["text to image"].values()))  # [K, 1, heads, L, P]
    heads = weights[:, 0].float().cpu().mean(dim=1)  # [K, L, P]
    attention = torch.stack([heads[:, places].mean(dim=1) for places in tokens], dim=1)  # [K, W, P]
    match: Match = {}
    if model.itm_head is not None:
        match = predictor.reranking.named(matched(model.itm_logits(found.pooled)))[0]
    prefix, patches = attention.tensor_split([model.config.vision.num_prefix_tokens], dim=-1)
    rows = pixel_values.shape[-2] // model.config.vision.patch_size
    maps = patches / patches.sum(dim=-1, keepdim=True)
    return Explanation(
        words=words,
        maps=maps.unflatten(-1, (rows, -1)),
        prefix_shares=prefix.sum(dim=-1),
        **match,
    )


def words_of(processor: Processor, ids: Sequence[int]) -> tuple[tuple[str, ...], list[list[int]]]:
    """Groups tokens to words; returns each word and the positions of its tokens."""
    positions: list[list[int]] = []
    for position, token in enumerate(ids):
        if token in processor.special_ids:
            continue
        if ids[position - 1] not in processor.special_ids and bool(processor.continues_word[token]):
            positions[-1].append(position)
        else:
            positions.append([position])
    named = [(processor.decode([ids[place] for place in places]).strip(), places) for places in positions]
    words = [(word, places) for word, places in named if word]
    if not words:
        raise ValueError("the text has no word; give one with a word at least")
    return tuple(word for word, _ in words), [places for _, places in words]


def view_of(processor: Processor, image: ImageLike) -> Image.Image:
    """The square of an image that the model gets, in a resolution for display."""
    config = processor.config
    factor = -(-_VIEW_SIDE // config.image_size)
    # The sizes of hf are rounded, so that a larger view could show another part.
    if config.profile != "hf" and not isinstance(image, Resized):
        larger = Processor(config.with_image_size(factor * config.image_size), processor.tokenizer)
        with suppress(ValueError):  # the longer side of an image may be too long at that size only
            return _to_image(larger.resize(image))
    pixels = _to_image(processor.resize(image))
    return pixels.resize((factor * config.image_size,) * 2, Image.Resampling.BICUBIC)


def _to_image(pixels: UInt8[Tensor, "3 h w"]) -> Image.Image:
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())
