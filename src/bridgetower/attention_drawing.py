"""Draws cross-attention: a heat map over the image for every word and fusion layer."""

from __future__ import annotations

import matplotlib
import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from bridgetower.attention import Explanation
from bridgetower.checkpoints import described
from bridgetower.drawing import FAINT, PLAIN, drawn, shortened

WORDS_IN_A_BAND = 8

_TILE, _HEAD, _LABEL, _BAND = 1.55, 2.2, 1.2, 0.45  # inches: a map, the text above, that on the left, a gap
_LEGEND = """Cross-attention of each word over the image, mean over the heads.
Every map sums to 1; bright is the largest share of a patch in its layer.
Under each map: what went to the class token instead."""


def draw_explanation(explanation: Explanation) -> Image.Image:
    """Draws the maps: words from left to right, in bands of at most eight, layers from top to bottom.

    Each layer has one scale: bright is the patch that gets the largest share of any word's attention in that layer. The
    share that went to the class token instead stands under each map.
    """
    num_layers, num_words = explanation.maps.shape[:2]
    bands = -(-num_words // WORDS_IN_A_BAND)
    columns = -(-num_words // bands)
    width = max(_LABEL + columns * (_TILE + 0.1) + 0.2, 7.0)
    height = _HEAD + bands * (num_layers * (_TILE + 0.25) + _BAND)
    assert explanation.view is not None, "it comes from `explain`"
    figure, view = Figure(figsize=(width, height)), explanation.view.convert("RGB").resize((168, 168))

    def box(x: float, y: float, side: float) -> tuple[float, float, float, float]:
        return x / width, 1 - (y + side) / height, side / width, side / height

    axes = figure.add_axes(box(0.2, 0.2, _TILE))
    axes.axis("off")
    axes.imshow(view)
    title = f"“{shortened(explanation.text, round(7 * (width - 2)))}”"
    match = described(explanation.probability, explanation.score)
    lines = (title, 0.4, 15, "black"), (f"match: {match}" if match else "", 0.7, 11, "black"), (_LEGEND, 1.6, 9, FAINT)
    for line, place, size, colour in lines:
        figure.text((_TILE + 0.4) / width, 1 - place / height, line, fontsize=size, color=colour, **PLAIN)
    for word, name in enumerate(explanation.words):
        band, column = divmod(word, columns)
        for layer, maps in enumerate(explanation.maps):
            top = _HEAD + band * (num_layers * (_TILE + 0.25) + _BAND) + layer * (_TILE + 0.25)
            axes, peak = figure.add_axes(box(_LABEL + column * (_TILE + 0.1), top, _TILE)), float(maps.max())
            axes.axis("off")
            axes.imshow(heat(view, maps[word] / peak))
            share = f"class token {100 * float(explanation.prefix_shares[layer, word]):.0f} %"
            axes.text(0.5, -0.02, share, ha="center", va="top", fontsize=7, color=FAINT, transform=axes.transAxes)
            if layer == 0:
                axes.set_title(shortened(name, 16), fontsize=11, pad=4, **PLAIN)
            if column == 0:
                label = f"layer {layer + 1}\nup to {100 * peak:.1f} %"
                axes.text(-0.08, 0.5, label, ha="right", va="center", fontsize=9, transform=axes.transAxes)
    return drawn(figure)


def heat(view: Image.Image, values: Float[Tensor, "r c"]) -> Image.Image:
    """Lays a map of values from 0 to 1 over an image: where it is 0 the image is dark, where it is 1 it glows."""
    grid = Image.fromarray(values.clamp(0, 1).numpy().astype(np.float32))
    smooth = np.asarray(grid.resize(view.size, Image.Resampling.BICUBIC)).clip(0, 1)[..., None]
    grey = np.asarray(view.convert("L"), dtype=np.float32)[..., None] / 255
    dark = 0.35 * (0.6 * grey + 0.4 * np.asarray(view, dtype=np.float32) / 255)
    opacity = 0.85 * smooth**0.7
    mixed = (1 - opacity) * dark + opacity * matplotlib.colormaps["inferno"](smooth[..., 0])[..., :3]
    return Image.fromarray((255 * mixed.clip(0, 1)).round().astype(np.uint8))
