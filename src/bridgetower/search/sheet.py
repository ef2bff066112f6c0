"""A contact sheet: the hits of a search as one image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

from bridgetower.checkpoints import described
from bridgetower.drawing import FAINT, INK, PLAIN, SERIES, drawn, shortened
from bridgetower.processor import ImageLike, open_reduced
from bridgetower.search.index import Hit

COLUMNS = 5  # of a row
_TILE, _GAP, _LINES, _MARGIN, _QUERY = 2.2, 0.2, 0.55, 0.3, 0.9  # inches


def contact_sheet(
    hits: Sequence[Hit | None],
    content: Callable[[Hit], bytes],
    *,
    text: str | None = None,
    image: ImageLike | None = None,
    title: tuple[str, str] | None = None,
) -> Image.Image:
    """Draws hits in rows, best first, with names and scores, under the query or a title; None leaves a place empty."""
    rows, columns = -(-len(hits) // COLUMNS), max(3, min(COLUMNS, len(hits)))
    head = 2 * _MARGIN + (_QUERY if image is not None else 0.5)
    width = 2 * _MARGIN + columns * (_TILE + _GAP) - _GAP
    height = head + rows * (_TILE + _LINES + _GAP) + _MARGIN
    figure = Figure(figsize=(width, height))

    def place(source: Callable[[], ImageLike], x: float, y: float, side: float) -> None:
        axes = figure.add_axes((x / width, 1 - (y + side) / height, side / width, side / height))
        axes.axis("off")
        try:
            axes.imshow(open_reduced(source(), round(110 * side), background=(255, 255, 255))[0])
        except (ValueError, OSError):
            axes.text(0.5, 0.5, "cannot be opened", ha="center", color=FAINT)

    def write(line: str, x: float, y: float, size: float, colour: str = INK) -> None:
        figure.text(x / width, 1 - y / height, line, fontsize=size, color=colour, **PLAIN)

    left = _MARGIN
    if image is not None:
        place(lambda: image, _MARGIN, _MARGIN, _QUERY)
        left += _QUERY + _GAP
    if title is None:
        query = (
            "images like this one"
            if text is None
            else f"“{shortened(text, round(6 * (width - left)))}”"
        )
        count = sum(hit is not None for hit in hits)
        found = (
            f"{count} hit{'s' if count > 1 else ''}, best first" if count else "nothing was found"
        )
        is_weak = count and all(hit.weak for hit in hits if hit is not None)
        title = query, f"{found}; all weak: unrelated texts come as near" if is_weak else found
    write(title[0], left, _MARGIN + 0.25, 16)
    write(title[1], left, _MARGIN + 0.5, 10, FAINT)
    for number, hit in enumerate(hits):
        if hit is None:
            continue
        row, column = divmod(number, COLUMNS)
        x, y = _MARGIN + column * (_TILE + _GAP), head + row * (_TILE + _LINES + _GAP)
        place(partial(content, hit), x, y, _TILE)
        match = described(hit.probability, hit.score)
        scores = f"match {match} · cosine {hit.cosine:.3f}" if match else f"cosine {hit.cosine:.3f}"
        scores += " · weak" if hit.weak else ""
        write(shortened(f"{number + 1} · {Path(hit.path).name}", 28), x, y + _TILE + 0.22, 10)
        write(scores, x, y + _TILE + 0.42, 9, SERIES[0] if match else FAINT)
    return drawn(figure)
