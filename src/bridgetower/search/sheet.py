"""A contact sheet: the hits of a search as one image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image, ImageOps

from bridgetower.checkpoints import described
from bridgetower.processor import ImageLike, open_reduced
from bridgetower.search.index import Hit, read_indexed
from bridgetower.text_drawing import BLUE, FAINT, GROUND, PAPER, Pen, write_image

COLUMNS = 5
TILE = 240  # pixels, the side of the square that an image is fitted into
_GAP = 20
_TEXT = 62  # pixels under a tile
_MARGIN = 32
_QUERY_SIDE = 96  # pixels


Content = Callable[[Hit], bytes]


def _content_of(hit: Hit) -> bytes:
    return read_indexed(hit.file, hit)


def contact_sheet(
    hits: Sequence[Hit], *, text: str | None = None, image: ImageLike | None = None, content: Content = _content_of
) -> Image.Image:
    """Draws the hits in rows, best first, each with its name and scores, under the query.

    Args:
        hits: From a search; an image that cannot be opened, or has changed since, leaves its place empty.
        text: That was searched for.
        image: That was searched for.
        content: Reads an image; that of an index also has frames of videos.

    Returns:
        An RGB image.
    """
    columns = max(1, min(COLUMNS, len(hits)))
    rows = -(-len(hits) // columns)
    head = _MARGIN + (_QUERY_SIDE if image is not None else 44) + _GAP
    width = 2 * _MARGIN + max(columns, 3) * (TILE + _GAP) - _GAP
    height = head + rows * (TILE + _TEXT + _GAP) + _MARGIN - _GAP
    sheet = Image.new("RGB", (width, height), PAPER)
    pen = Pen(sheet)
    _draw_query(sheet, pen, text, image, len(hits))
    for number, hit in enumerate(hits):
        row, column = divmod(number, columns)
        place = _MARGIN + column * (TILE + _GAP), head + row * (TILE + _TEXT + _GAP)
        _draw_hit(sheet, pen, place, number + 1, hit, content)
    return sheet


def write_sheet(
    path: Path,
    hits: Sequence[Hit],
    *,
    text: str | None = None,
    image: ImageLike | None = None,
    content: Content = _content_of,
) -> None:
    """Draws a contact sheet into a file, atomically.

    Raises:
        ValueError: The name has no suffix of a kind of images.
    """
    write_image(path, contact_sheet(hits, text=text, image=image, content=content))


def _draw_query(sheet: Image.Image, pen: Pen, text: str | None, image: ImageLike | None, num_hits: int) -> None:
    x = _MARGIN
    if image is not None:
        _draw_image(sheet, lambda: image, (x, _MARGIN), _QUERY_SIDE)
        x += _QUERY_SIDE + _GAP
    title = "images like this one" if text is None else f"“{text}”"
    pen.line(title, x, _MARGIN + 22, width=sheet.width - x - _MARGIN, size=24, bold=True)
    found = "nothing was found" if not num_hits else f"{num_hits} hit{'s' if num_hits > 1 else ''}, best first"
    pen.line(found, x, _MARGIN + 46, width=sheet.width - x - _MARGIN, ink=FAINT)


def _draw_hit(sheet: Image.Image, pen: Pen, place: tuple[int, int], number: int, hit: Hit, content: Content) -> None:
    x, y = place
    _draw_image(sheet, lambda: content(hit), place, TILE)
    share = hit.score if hit.probability is None else hit.probability
    if share is not None:
        pen.draw.rectangle((x, y + TILE, x + TILE, y + TILE + 4), fill=GROUND)
        pen.draw.rectangle((x, y + TILE, x + round(share * TILE), y + TILE + 4), fill=BLUE)
    pen.line(f"{number} · {Path(hit.path).name}", x, y + TILE + 26, width=TILE, bold=True)
    match = "" if share is None else f"match {described(hit.probability, hit.score)} · "
    cosine = f"{hit.cosine:.3f}".replace("-", "\N{MINUS SIGN}")
    pen.line(f"{match}cosine {cosine}", x, y + TILE + 48, width=TILE, size=13, ink=FAINT)


def _draw_image(sheet: Image.Image, source: Callable[[], ImageLike], place: tuple[int, int], side: int) -> None:
    ground = Image.new("RGB", (side, side), GROUND)
    try:
        opened, _ = open_reduced(source(), side, background=GROUND)
    except (ValueError, OSError):
        Pen(ground).line("cannot be opened", 12, side / 2, width=side - 24, ink=FAINT)
    else:
        fitted = ImageOps.contain(opened, (side, side), Image.Resampling.LANCZOS)
        ground.paste(fitted, ((side - fitted.width) // 2, (side - fitted.height) // 2))
    sheet.paste(ground, place)
