"""Drawings by matplotlib as images and files."""

from __future__ import annotations

import warnings
from io import BytesIO
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from PIL import Image

from bridgetower.files import replacing, require_parent

BLUE, FAINT = "#2563af", "#6b7280"
PLAIN: dict[str, Any] = {"parse_math": False}
"""Of texts from elsewhere, in which a dollar sign begins no formula."""


def png(figure: Figure) -> bytes:
    """Returns the file of a drawing; letters that the font lacks are boxes."""
    content = BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from font")
        figure.savefig(content, format="png", dpi=110)
    return content.getvalue()


def drawn(figure: Figure) -> Image.Image:
    return Image.open(BytesIO(png(figure))).convert("RGB")


def shortened(text: str, length: int) -> str:
    """Returns a text in one line, cut with an ellipsis to some letters."""
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"


def require_image_name(path: Path) -> None:
    """Checks before it is drawn that an image can be written there."""
    if path.suffix.lower() not in Image.registered_extensions():
        raise ValueError(f"{path} has no suffix of a kind of images; give a name such as image.png")
    require_parent(path)


def write_image(path: Path, image: Image.Image) -> None:
    with replacing(path) as temporary:
        image.save(temporary)
