"""Draws cross-attention: a heat map over the image for every word and fusion layer."""

from __future__ import annotations

import matplotlib
import numpy as np
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from bridgetower.attention import Explanation
from bridgetower.checkpoints import described
from bridgetower.text_drawing import FAINT, PAPER, Pen

TILE = 168  # pixels
WORDS_IN_A_BAND = 8

_GAP = 8
_MARGIN = 32
_LABEL = 104  # pixels left of the tiles
_WORD = 30  # pixels above them
_SHARE = 20  # pixels under each row of tiles
_BAND_GAP = 28
_VIEW = 168
_HEAT = matplotlib.colormaps["inferno"]


def draw_explanation(explanation: Explanation) -> Image.Image:
    """Draws the maps: words from left to right, in bands of at most eight, layers from top to bottom.

    Each layer has one scale: bright is the patch that gets the largest share of any word's attention in that layer. The
    share that went to the class token instead stands under each map.
    """
    num_layers, num_words = explanation.maps.shape[:2]
    bands = -(-num_words // WORDS_IN_A_BAND)
    columns = -(-num_words // bands)
    head = 2 * _MARGIN + _VIEW
    band_height = _WORD + num_layers * (TILE + _SHARE + _GAP)
    width = max(2 * _MARGIN + _LABEL + columns * (TILE + _GAP) - _GAP, 760)
    canvas = Image.new("RGB", (width, head + bands * (band_height + _BAND_GAP) + _MARGIN - _BAND_GAP), PAPER)
    pen = Pen(canvas)
    _draw_head(canvas, pen, explanation)
    for band in range(bands):
        words = range(band * columns, min(num_words, (band + 1) * columns))
        _draw_band(canvas, pen, explanation, words, head + band * (band_height + _BAND_GAP))
    return canvas


def _draw_head(canvas: Image.Image, pen: Pen, explanation: Explanation) -> None:
    canvas.paste(explanation.view.resize((_VIEW, _VIEW), Image.Resampling.LANCZOS), (_MARGIN, _MARGIN))
    x, width = _MARGIN + _VIEW + 24, canvas.width - _MARGIN - _VIEW - 24 - _MARGIN
    pen.line(f"“{explanation.text}”", x, _MARGIN + 26, width=width, size=24, bold=True)
    if match := described(explanation.probability, explanation.score):
        pen.line(f"match: {match}", x, _MARGIN + 54, width=width, size=16)
    for number, line in enumerate(
        (
            "Cross-attention of each word over the image, mean over the heads.",
            "Every map sums to 1; bright is the largest share of a patch in its layer.",
            "Under each map: what went to the class token instead.",
        )
    ):
        pen.line(line, x, _MARGIN + 108 + 22 * number, width=width, size=14, ink=FAINT)


def _draw_band(canvas: Image.Image, pen: Pen, explanation: Explanation, words: range, top: int) -> None:
    view = explanation.view.resize((TILE, TILE), Image.Resampling.LANCZOS)
    left = _MARGIN + _LABEL
    for column, word in enumerate(words):
        middle = left + column * (TILE + _GAP) + TILE / 2
        pen.line(explanation.words[word], middle, top + 18, width=TILE, size=17, bold=True, anchor="ms")
    for layer, maps in enumerate(explanation.maps):
        y = top + _WORD + layer * (TILE + _SHARE + _GAP)
        peak = float(maps.max())
        pen.line(f"layer {layer + 1}", _MARGIN, y + TILE / 2 - 4, width=_LABEL - 12, bold=True)
        pen.line(f"up to {100 * peak:.1f} %", _MARGIN, y + TILE / 2 + 16, width=_LABEL - 12, size=13, ink=FAINT)
        for column, word in enumerate(words):
            x = left + column * (TILE + _GAP)
            canvas.paste(heat(view, maps[word] / peak), (x, y))
            share = f"class token {100 * float(explanation.prefix_shares[layer, word]):.0f} %"
            pen.line(share, x + TILE / 2, y + TILE + 15, width=TILE, size=12, ink=FAINT, anchor="ms")


def heat(view: Image.Image, values: Float[Tensor, "r c"]) -> Image.Image:
    """Lays a map over an image: where it is 0 the image is dark, where it is 1 it glows.

    Args:
        view: The image.
        values: From 0 to 1, one per patch; between the patches' middles they are interpolated.
    """
    grid = Image.fromarray(values.clamp(0, 1).numpy().astype(np.float32))
    smooth = np.asarray(grid.resize(view.size, Image.Resampling.BICUBIC)).clip(0, 1)[..., None]
    grey = np.asarray(view.convert("L"), dtype=np.float32)[..., None] / 255
    dark = 0.35 * (0.6 * grey + 0.4 * np.asarray(view, dtype=np.float32) / 255)
    opacity = 0.85 * smooth**0.7
    mixed = (1 - opacity) * dark + opacity * _HEAT(smooth[..., 0])[..., :3]
    return Image.fromarray((255 * mixed.clip(0, 1)).round().astype(np.uint8))
