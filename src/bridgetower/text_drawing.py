"""Images made of images and lines of text: one set of colours, one font."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import matplotlib
from PIL import Image, ImageDraw, ImageFont

from bridgetower.files import replacing

Colour = tuple[int, int, int]

PAPER: Colour = (255, 255, 255)
GROUND: Colour = (243, 244, 246)
INK: Colour = (24, 26, 31)
FAINT: Colour = (107, 114, 128)
BLUE: Colour = (37, 99, 175)


class Pen:
    """Writes and draws on a image.

    Attributes:
        draw: For shapes.
    """

    def __init__(self, image: Image.Image) -> None:
        self.draw = ImageDraw.Draw(image)

    def line(
        self,
        text: str,
        x: float,
        y: float,
        *,
        width: float,
        size: int = 15,
        bold: bool = False,
        ink: Colour = INK,
        anchor: str = "ls",
    ) -> None:
        """Writes a line of text, cut with an ellipsis to some width.

        Args:
            text: Line breaks become spaces.
            x: Where it is anchored, in pixels.
            y: Likewise.
            width: In pixels, at most.
            size: Of the font, in pixels.
            bold: Weight of the font.
            ink: Colour.
            anchor: PIL's name of the point of the text that is at (x, y); `ls` is the left end of the baseline.
        """
        font = _font(size, bold)
        shown = " ".join(text.split())
        while font.getlength(shown) > width and len(shown) > 1:
            shown = shown[:-2].rstrip() + "…"
        self.draw.text((x, y), shown, font=font, fill=ink, anchor=anchor)


def write_image(path: Path, image: Image.Image) -> None:
    """Writes a image atomically, in the format that its name says.

    Raises:
        ValueError: The name has no suffix of a kind of images.
    """
    if Path(path).suffix.lower() not in Image.registered_extensions():
        raise ValueError(f"{path} has no suffix of a kind of images; give a name such as image.png")
    with replacing(path) as temporary:
        image.save(temporary)


@cache
def _font(size: int, bold: bool) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which has most alphabets; it comes with matplotlib."""
    name = f"DejaVuSans{'-Bold' if bold else ''}.ttf"
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name, size)
