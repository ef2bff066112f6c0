"""Attention maps and Grad-CAM of each word of a text over an image, by fusion layer, and drawings of them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from threading import get_ident
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from bridgetower.arguments import checked
from bridgetower.checkpoints.reranking import Match, match_text
from bridgetower.inference.items import Pixels, fetched, log_odds, matched
from bridgetower.inference.predictor import Predictor
from bridgetower.model.hidden_states import hidden_states
from bridgetower.processor import ImageLike, Processor, Resized

WORDS_IN_A_BAND = 8
_VIEW_SIDE = 480  # pixels, at least
# Sizes of a drawing in inches.
_TILE = 1.55  # side of a map
_HEADER = 2.2  # height of the image and the text above the maps
_LABEL_WIDTH = 1.2  # of the text left of the maps
_BAND_GAP = 0.45
_ROW_HEIGHT = _TILE + 0.25
_COLUMN_WIDTH = _TILE + 0.1

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
    processor = predictor.processor
    image = fetched(image)
    (ids,) = processor.token_ids([text], truncate=truncate)
    explanation = attention_of(predictor, processor.resize(image), ids, method)
    return replace(explanation, text=text, view=view_of(processor, image))


def attention_of(
    predictor: Predictor, image: Pixels, ids: Sequence[int], method: Method = "attention"
) -> Explanation:
    """Explains a resized image and a tokenized text, without the view of the image."""
    model = predictor.model
    processor = predictor.processor
    is_gradcam = method == "gradcam"
    words, positions = words_of(processor, ids)
    if is_gradcam:
        model.head("itm")  # raises if the model has none
        words.insert(0, processor.decode(ids[:1], skip_special_tokens=False))
        positions.insert(0, [0])

    # The gradient of a zero that is added to a context is the gradient of the context.
    zeros: list[Tensor] = []
    values: list[Tensor] = []  # of each layer [1, heads, P, e]
    caller = get_ident()

    def add_zero(attention: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        if get_ident() != caller:  # another thread uses the model meanwhile
            return None
        values.append(attention.split_heads(inputs[2].detach()))
        zeros.append(torch.zeros_like(output, requires_grad=True))
        return output + zeros[-1]

    parameter = next(model.parameters())
    pixel_values = processor.normalise(image[None]).to(parameter.device, parameter.dtype)
    input_ids = processor.pad([ids]).input_ids.to(parameter.device)
    all_layers = range(1, model.config.fusion.num_layers + 1)
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(not is_gradcam))
        stack.enter_context(torch.set_grad_enabled(is_gradcam))
        if is_gradcam:
            layers: Any = model.fusion.text_layers
            for layer in layers:
                stack.enter_context(layer.cross_attention.attention.register_forward_hook(add_zero))
        states = hidden_states(
            model, pixel_values, input_ids, layers={"fusion": all_layers}, attentions=True
        )
        cross_attention = states.attentions["text to image"]
        weights = torch.stack(list(cross_attention.values())).detach()  # [K, 1, heads, L, P]
        match: Match = {}
        if model.itm_head is not None:
            logits = model.itm_logits(states.pooled)
            (match,) = predictor.reranking.matches(matched(logits.detach()))
        if is_gradcam:
            # A context is weights · values, from which the gradient of the weights follows.
            gradients = torch.stack(torch.autograd.grad(log_odds(logits).sum(), zeros))
            by_head = gradients.unflatten(-1, (weights.shape[2], -1)).transpose(2, 3)
            weights *= (by_head @ torch.stack(values).mT).clamp(min=0)

    # The mean over the heads, and over the tokens of each word [K, W, P].
    by_token = weights[:, 0].float().cpu().mean(dim=1)
    by_word = torch.stack([by_token[:, tokens].mean(dim=1) for tokens in positions], dim=1)

    # Maps are of the patches alone.
    vision = model.config.vision
    prefix, patches = by_word.tensor_split([vision.num_prefix_tokens], dim=-1)
    tiny = torch.finfo(torch.float32).tiny
    shares = prefix.sum(dim=-1) / by_word.sum(dim=-1).clamp(min=tiny)
    if not is_gradcam:
        patches = patches / patches.sum(dim=-1, keepdim=True)
    maps = patches.unflatten(-1, (pixel_values.shape[-2] // vision.patch_size, -1))
    return Explanation(words=tuple(words), maps=maps, prefix_shares=shares, method=method, **match)


def words_of(processor: Processor, ids: Sequence[int]) -> tuple[list[str], list[list[int]]]:
    """Groups tokens to words. Returns the words, and the positions of the tokens of each."""
    groups: list[list[int]] = []
    for position, token in enumerate(ids):
        if token in processor.special_ids:
            continue
        follows_token = ids[position - 1] not in processor.special_ids
        if follows_token and processor.continues_word[token]:
            groups[-1].append(position)
        else:
            groups.append([position])
    words = []
    positions = []
    for group in groups:
        word = processor.decode([ids[position] for position in group]).strip()
        if word:
            words.append(word)
            positions.append(group)
    if not words:
        raise ValueError("the text has no word; give one with a word at least")
    return words, positions


def view_of(processor: Processor, image: ImageLike) -> Image.Image:
    """Returns the square of an image that the model gets, in a resolution for display."""
    config = processor.config
    side = -(-_VIEW_SIDE // config.image_size) * config.image_size
    pixels = None
    # The sizes of hf are rounded, so that a larger view could show another region.
    if config.profile != "hf" and not isinstance(image, Resized):
        larger = processor.with_image_size(side)
        with suppress(ValueError):  # the longer side of an image may be too long at that size only
            pixels = larger.resize(image)
    if pixels is None:
        pixels = processor.resize(image)
    square = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    return square.resize((side, side), Image.Resampling.BICUBIC)


def draw_explanation(explanation: Explanation) -> Image.Image:
    """Draws the maps: words from left to right, in bands of at most eight, layers from top to bottom.

    Each layer has one scale: bright is the patch that gets the largest share of any word's attention in that layer. The
    share that went to the class token instead stands under each map.
    """
    from matplotlib.figure import Figure

    from bridgetower.drawing import FAINT, INK, PLAIN, drawn, shortened_line

    num_layers, num_words = explanation.maps.shape[:2]
    num_bands = -(-num_words // WORDS_IN_A_BAND)
    num_columns = -(-num_words // num_bands)
    band_height = num_layers * _ROW_HEIGHT + _BAND_GAP
    width = max(_LABEL_WIDTH + num_columns * _COLUMN_WIDTH + 0.2, 7.0)
    height = _HEADER + num_bands * band_height
    figure = Figure(figsize=(width, height))

    def show(image: Image.Image, x: float, top: float) -> Any:
        box = (x / width, 1 - (top + _TILE) / height, _TILE / width, _TILE / height)
        axes = figure.add_axes(box)
        axes.axis("off")
        axes.imshow(image)
        return axes

    # The header has the image, the text and how well they match.
    assert explanation.view is not None, "it comes from `explain`"
    view = explanation.view.convert("RGB").resize((168, 168))
    show(view, 0.2, 0.2)
    title = f"“{shortened_line(explanation.text, round(7 * (width - 2)))}”"
    match = match_text(explanation.probability, explanation.score)
    lines = (
        (title, 0.4, 15, INK),
        (f"match: {match}" if match else "", 0.7, 11, INK),
        (_LEGENDS[explanation.method], 1.6, 9, FAINT),
    )
    x = (_TILE + 0.4) / width
    for line, top, size, colour in lines:
        figure.text(x, 1 - top / height, line, fontsize=size, color=colour, **PLAIN)

    # Each map has the share of the class token below, the first ones a word above or a layer to the left.
    for word_index, word in enumerate(explanation.words):
        band, column = divmod(word_index, num_columns)
        x = _LABEL_WIDTH + column * _COLUMN_WIDTH
        for layer, maps in enumerate(explanation.maps):
            peak = float(maps.max())
            top = _HEADER + band * band_height + layer * _ROW_HEIGHT
            axes = show(heat(view, maps[word_index] / (peak or 1)), x, top)
            share = f"class token {100 * float(explanation.prefix_shares[layer, word_index]):.0f} %"
            below: Any = {"ha": "center", "va": "top", "fontsize": 7, "color": FAINT}
            axes.text(0.5, -0.02, share, **below, transform=axes.transAxes)
            if layer == 0:
                axes.set_title(shortened_line(word, 16), fontsize=11, pad=4, **PLAIN)
            if column == 0:
                is_share = explanation.method == "attention"
                largest = f"{100 * peak:.1f} %" if is_share else f"{peak:.2g}"
                label = f"layer {layer + 1}\nup to {largest}"
                beside: Any = {"ha": "right", "va": "center", "fontsize": 9}
                axes.text(-0.08, 0.5, label, **beside, transform=axes.transAxes)
    return drawn(figure)


def heat(view: Image.Image, values: Float[Tensor, "r c"]) -> Image.Image:
    """Lays a map over an image, which is dark where the map is 0 and glows where it is 1."""
    import matplotlib

    grid = Image.fromarray(values.clamp(0, 1).numpy().astype(np.float32))
    smooth = np.asarray(grid.resize(view.size, Image.Resampling.BICUBIC)).clip(0, 1)[..., None]
    pixels = np.asarray(view, dtype=np.float32) / 255
    grey = np.asarray(view.convert("L"), dtype=np.float32)[..., None] / 255
    dark = 0.35 * (0.6 * grey + 0.4 * pixels)
    opacity = 0.85 * smooth**0.7
    colours = matplotlib.colormaps["inferno"](smooth[..., 0])[..., :3]
    mixed = (1 - opacity) * dark + opacity * colours
    return Image.fromarray((255 * mixed.clip(0, 1)).round().astype(np.uint8))
