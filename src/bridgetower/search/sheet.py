"""A contact sheet: the hits of a search in one image."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

from bridgetower.checkpoints import match_text
from bridgetower.drawing import FAINT, INK, PLAIN, SERIES, drawn, shortened_line
from bridgetower.processor import ImageLike, open_reduced
from bridgetower.search.indexed import Hit

COLUMNS = 5
"""Images in a row."""

# Lengths in inches.
_TILE = 2.2  # side of an image
_GAP = 0.2
_LINES = 0.55  # height of the two lines below an image
_MARGIN = 0.3
_QUERY = 0.9  # side of the image of a query
_TITLE = 0.5  # height of the two lines of a title

# The lines below an image are no longer than it.
_NAME_LETTERS = 24
_SCORES_SIZE = 7.5  # points


def contact_sheet(
    hits: Sequence[Hit | None],
    content: Callable[[Hit], bytes],
    *,
    text: str | None = None,
    image: ImageLike | None = None,
    title: tuple[str, str] | None = None,
) -> Image.Image:
    """Draws hits in rows, best first, with names and scores.

    Args:
        hits: Of a search; None leaves a place empty.
        content: Returns the file of a hit, or raises an error.
        text: Of the query.
        image: Of the query.
        title: Two lines to write above the hits; default: the query and the number of hits.
    """
    num_rows = math.ceil(len(hits) / COLUMNS)
    num_columns = max(3, min(COLUMNS, len(hits)))
    column_width = _TILE + _GAP
    row_height = _TILE + _LINES + _GAP
    head = 2 * _MARGIN
    head += _TITLE if image is None else _QUERY
    width = 2 * _MARGIN + num_columns * column_width - _GAP
    height = head + num_rows * row_height + _MARGIN
    figure = Figure(figsize=(width, height))

    # Positions are in inches from the upper left corner.
    def draw(read_image: Callable[[], ImageLike], x: float, y: float, side: float) -> None:
        bottom = height - y - side
        box = (x / width, bottom / height, side / width, side / height)
        axes = figure.add_axes(box)
        axes.axis("off")
        num_pixels = round(110 * side)
        try:
            pixels, _ = open_reduced(read_image(), num_pixels, background=(255, 255, 255))
            axes.imshow(pixels)
        except (ValueError, OSError):
            axes.text(0.5, 0.5, "cannot be opened", ha="center", color=FAINT)

    def write(line: str, x: float, y: float, size: float, colour: str = INK) -> None:
        bottom = height - y
        figure.text(x / width, bottom / height, line, fontsize=size, color=colour, **PLAIN)

    # The query, or a title.
    indent = _MARGIN
    if image is not None:
        draw(lambda: image, _MARGIN, _MARGIN, _QUERY)
        indent += _QUERY + _GAP
    if title is None:
        max_letters = round(6 * (width - indent))
        title = _title(hits, text, max_letters)
    first_line, second_line = title
    write(first_line, indent, _MARGIN + 0.25, 16)
    write(second_line, indent, _MARGIN + 0.5, 10, FAINT)

    # The hits.
    for index, hit in enumerate(hits):
        if hit is None:
            continue
        row, column = divmod(index, COLUMNS)
        x = _MARGIN + column * column_width
        y = head + row * row_height
        draw(partial(content, hit), x, y, _TILE)
        bottom = y + _TILE
        caption = f"{index + 1} · {Path(hit.path).name}"
        write(shortened_line(caption, _NAME_LETTERS), x, bottom + 0.22, 10)
        scores = f"cosine {hit.cosine:.3f}"
        colour = FAINT
        if match := match_text(hit.probability, hit.score):
            scores = f"match {match} · {scores}"
            colour = SERIES[0]
        if hit.weak:
            scores += " · weak"
        write(scores, x, bottom + 0.42, _SCORES_SIZE, colour)
    return drawn(figure)


def _title(hits: Sequence[Hit | None], text: str | None, max_letters: int) -> tuple[str, str]:
    """Returns the query, and how many hits it has."""
    query = "images like this one"
    if text is not None:
        query = f"“{shortened_line(text, max_letters)}”"
    drawn_hits = [hit for hit in hits if hit is not None]
    if not drawn_hits:
        return query, "nothing was found"
    noun = "hit" if len(drawn_hits) == 1 else "hits"
    summary = f"{len(drawn_hits)} {noun}, best first"
    if all(hit.weak for hit in drawn_hits):
        summary += "; all weak: unrelated texts find images that are just as near"
    return query, summary
