"""Where words look in an image, and by Grad-CAM what decides the match, by fusion layer: computed, and drawn."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from threading import get_ident
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from bridgetower.arguments import checked
from bridgetower.checkpoints.reranking import Match, described
from bridgetower.inference.items import fetched, matched
from bridgetower.inference.predictor import Predictor
from bridgetower.model.hidden_states import hidden_states
from bridgetower.processor import ImageLike, Processor, Resized

_VIEW_SIDE = 480  # pixels, at least
WORDS_IN_A_BAND = 8

# inches: a map, the text above, that on the left, a gap
_TILE, _HEAD, _LABEL, _BAND = (
    1.55,
    2.2,
    1.2,
    0.45,
)
Method = Literal["attention", "gradcam"]
_LEGENDS: dict[Method, str] = {
    "attention": """Cross-attention of each word over the image, mean over the heads.
Every map sums to 1; bright is the largest share of a patch in its layer.
Under each map: what went to the class token instead.""",
    "gradcam": """Grad-CAM: how much each word's attention to a patch raises the log-odds of a match.
Bright is the largest value of its layer. Of the last layer only the class token is read.
Under each map: the share of the image's class token, which has no place.""",
}


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """Cross-attention of each word of a text over an image, or its Grad-CAM, layer by layer.

    Attributes:
        words: Of the text; a word of several tokens is their mean. Before them, with `gradcam`, the text's class token.
        maps: Mean over the heads [layers, words, rows, columns]. Of `attention`: renormalised over the patches so that
            each map sums to 1. Of `gradcam`: attention times the positive part of the gradient of the log-odds of a
            match with respect to it, not renormalised.
        prefix_shares: What went to the image's class token instead (and to a distillation token): [layers, words].
        probability: That image and text match; None without a calibration of the matching head.
        score: Of the matching head, from 0 to 1, where it has no calibration; else None.
        text, method: As given to `explain`.
        view: The part of the image that the model gets, in its proportions, as `explain` adds it.
    """

    words: tuple[str, ...]
    maps: Float[Tensor, "k w r c"] = field(repr=False)
    prefix_shares: Float[Tensor, "k w"] = field(repr=False)
    probability: float | None = None
    score: float | None = None
    text: str = ""
    method: Method = "attention"
    view: Image.Image | None = field(default=None, repr=False)


@checked
def explain(
    predictor: Predictor,
    image: ImageLike,
    text: str,
    *,
    method: Method = "attention",
    truncate: bool = False,
) -> Explanation:
    """Computes where each word of a text looks in an image, or what of it decides the match.

    The model runs in PyTorch, whatever the predictor's engine is. What a word attends to is not what decides about a
    match; `gradcam` weighs it by the gradient of the matching head, as ALBEF draws it for one layer.

    Args:
        predictor: The loaded model.
        image: The image.
        text: With at least one word.
        method: "attention", the cross-attention from the text stream to the image stream, or "gradcam", which needs a
            matching head.
        truncate: Cut a text that is too long instead of refusing it.

    Raises:
        ValueError: The text has no word or is too long, the image cannot be used, or there is no matching head.
    """
    processor, image = predictor.processor, fetched(image)
    (ids,) = processor.token_ids([text], truncate=truncate)
    found = attention_of(predictor, processor.resize(image), ids, method)
    return replace(found, text=text, view=view_of(processor, image))


def attention_of(
    predictor: Predictor,
    image: UInt8[Tensor, "3 h w"],
    ids: Sequence[int],
    method: Method = "attention",
) -> Explanation:
    """Does the part of `explain` that needs the model, with an image as `Processor.resize` returns it."""
    model, processor, gradcam = predictor.model, predictor.processor, method == "gradcam"
    words, tokens = words_of(processor, ids)
    if gradcam:
        model.head("itm")  # says what is missing
        words, tokens = (
            (processor.decode(ids[:1], skip_special_tokens=False), *words),
            [[0], *tokens],
        )
    parameter, caller = next(model.parameters()), get_ident()
    pixel_values = processor.normalise(image[None]).to(parameter.device, parameter.dtype)
    contexts: list[
        tuple[Tensor, Tensor]
    ] = []  # of each layer: a zero that is added to the context, and the values

    def add_zero(attention: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        if get_ident() != caller:  # another thread that uses the model meanwhile
            return None
        values = attention.split_heads(inputs[2].detach())
        contexts.append((zero := torch.zeros_like(output, requires_grad=True), values))
        return output + zero

    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(not gradcam))
        stack.enter_context(torch.set_grad_enabled(gradcam))
        layers: Any = model.fusion.text_layers if gradcam else ()
        for layer in layers:
            stack.enter_context(layer.cross_attention.attention.register_forward_hook(add_zero))
        found = hidden_states(
            model,
            pixel_values,
            processor.pad([ids]).input_ids.to(parameter.device),
            layers={"fusion": range(1, model.config.fusion.num_layers + 1)},
            attentions=True,
        )
        weights = torch.stack(
            list(found.attentions["text to image"].values())
        ).detach()  # [K, 1, heads, L, P]
        logits = None if model.itm_head is None else model.itm_logits(found.pooled)
        match: Match = (
            {} if logits is None else predictor.reranking.named(matched(logits.detach()))[0]
        )
        if gradcam and logits is not None:
            gradients = torch.autograd.grad(
                (logits[:, 1] - logits[:, 0]).sum(), [zero for zero, _ in contexts]
            )
            heads = weights.shape[2]
            for layer_weights, gradient, (_, values) in zip(
                weights, gradients, contexts, strict=True
            ):
                # The context is weights · values, so this is its gradient with respect to the weights.
                by_head = gradient.unflatten(-1, (heads, -1)).transpose(1, 2)
                layer_weights *= (by_head @ values.mT).clamp(min=0)
    mean = weights[:, 0].float().cpu().mean(dim=1)  # [K, L, P]
    attention = torch.stack([mean[:, places].mean(dim=1) for places in tokens], dim=1)  # [K, W, P]
    prefix, patches = attention.tensor_split([model.config.vision.num_prefix_tokens], dim=-1)
    rows = pixel_values.shape[-2] // model.config.vision.patch_size
    shares = prefix.sum(dim=-1) / attention.sum(dim=-1).clamp(min=torch.finfo(torch.float32).tiny)
    maps = patches if gradcam else patches / patches.sum(dim=-1, keepdim=True)
    maps = maps.unflatten(-1, (rows, -1))
    return Explanation(words=words, maps=maps, prefix_shares=shares, method=method, **match)


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
    named = [
        (processor.decode([ids[place] for place in places]).strip(), places) for places in positions
    ]
    words = [(word, places) for word, places in named if word]
    if not words:
        raise ValueError("the text has no word; give one with a word at least")
    return tuple(word for word, _ in words), [places for _, places in words]


def view_of(processor: Processor, image: ImageLike) -> Image.Image:
    """The square of an image that the model gets, in a resolution for display."""
    config = processor.config
    side = -(-_VIEW_SIDE // config.image_size) * config.image_size
    pixels = None
    # The sizes of hf are rounded, so that a larger view could show another part.
    if config.profile != "hf" and not isinstance(image, Resized):
        larger = processor.with_image_size(side)
        with suppress(ValueError):  # the longer side of an image may be too long at that size only
            pixels = larger.resize(image)
    pixels = processor.resize(image) if pixels is None else pixels
    return Image.fromarray(pixels.permute(1, 2, 0).numpy()).resize(
        (side, side), Image.Resampling.BICUBIC
    )


def draw_explanation(explanation: Explanation) -> Image.Image:
    """Draws the maps: words from left to right, in bands of at most eight, layers from top to bottom.

    Each layer has one scale: bright is the patch that gets the largest share of any word's attention in that layer. The
    share that went to the class token instead stands under each map.
    """
    from matplotlib.figure import Figure

    from bridgetower.drawing import FAINT, INK, PLAIN, drawn, shortened

    num_layers, num_words = explanation.maps.shape[:2]
    bands = -(-num_words // WORDS_IN_A_BAND)
    columns = -(-num_words // bands)
    width = max(_LABEL + columns * (_TILE + 0.1) + 0.2, 7.0)
    height = _HEAD + bands * (num_layers * (_TILE + 0.25) + _BAND)
    assert explanation.view is not None, "it comes from `explain`"
    figure, view = (
        Figure(figsize=(width, height)),
        explanation.view.convert("RGB").resize((168, 168)),
    )

    def box(x: float, y: float, side: float) -> tuple[float, float, float, float]:
        return x / width, 1 - (y + side) / height, side / width, side / height

    axes = figure.add_axes(box(0.2, 0.2, _TILE))
    axes.axis("off")
    axes.imshow(view)
    title = f"“{shortened(explanation.text, round(7 * (width - 2)))}”"
    match = described(explanation.probability, explanation.score)
    lines = (
        (title, 0.4, 15, INK),
        (f"match: {match}" if match else "", 0.7, 11, INK),
        (_LEGENDS[explanation.method], 1.6, 9, FAINT),
    )
    for line, place, size, colour in lines:
        figure.text(
            (_TILE + 0.4) / width, 1 - place / height, line, fontsize=size, color=colour, **PLAIN
        )
    for word, name in enumerate(explanation.words):
        band, column = divmod(word, columns)
        for layer, maps in enumerate(explanation.maps):
            top = _HEAD + band * (num_layers * (_TILE + 0.25) + _BAND) + layer * (_TILE + 0.25)
            axes, peak = (
                figure.add_axes(box(_LABEL + column * (_TILE + 0.1), top, _TILE)),
                float(maps.max()),
            )
            axes.axis("off")
            axes.imshow(heat(view, maps[word] / (peak or 1)))
            share = f"class token {100 * float(explanation.prefix_shares[layer, word]):.0f} %"
            axes.text(
                0.5,
                -0.02,
                share,
                ha="center",
                va="top",
                fontsize=7,
                color=FAINT,
                transform=axes.transAxes,
            )
            if layer == 0:
                axes.set_title(shortened(name, 16), fontsize=11, pad=4, **PLAIN)
            if column == 0:
                largest = (
                    f"{100 * peak:.1f} %" if explanation.method == "attention" else f"{peak:.2g}"
                )
                label = f"layer {layer + 1}\nup to {largest}"
                axes.text(
                    -0.08, 0.5, label, ha="right", va="center", fontsize=9, transform=axes.transAxes
                )
    return drawn(figure)


def heat(view: Image.Image, values: Float[Tensor, "r c"]) -> Image.Image:
    """Lays a map of values from 0 to 1 over an image: where it is 0 the image is dark, where it is 1 it glows."""
    import matplotlib

    grid = Image.fromarray(values.clamp(0, 1).numpy().astype(np.float32))
    smooth = np.asarray(grid.resize(view.size, Image.Resampling.BICUBIC)).clip(0, 1)[..., None]
    grey = np.asarray(view.convert("L"), dtype=np.float32)[..., None] / 255
    dark = 0.35 * (0.6 * grey + 0.4 * np.asarray(view, dtype=np.float32) / 255)
    opacity = 0.85 * smooth**0.7
    mixed = (1 - opacity) * dark + opacity * matplotlib.colormaps["inferno"](smooth[..., 0])[
        ..., :3
    ]
    return Image.fromarray((255 * mixed.clip(0, 1)).round().astype(np.uint8))
