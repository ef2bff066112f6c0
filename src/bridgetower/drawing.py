"""Drawings by matplotlib as images and files."""

from __future__ import annotations

import warnings
from io import BytesIO
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from PIL import Image

from bridgetower.files import replacing, require_parent

INK = "#1f2330"
FAINT = "#6b7280"
# Colour-blind people can tell these apart.
SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_LINES = ("-", "--", "-.", ":", "-", "--")
LINE_STYLES = tuple(
    (ink, marker + line) for marker in "os^" for ink, line in zip(SERIES, _LINES, strict=True)
)
STYLE: Any = {
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "text.color": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.edgecolor": FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#d5dae1",
    "grid.linewidth": 0.7,
    "legend.frameon": False,
}
# Style of texts from elsewhere, in which a dollar sign begins no formula.
PLAIN: dict[str, Any] = {"parse_math": False}


def png(figure: Figure) -> bytes:
    """Returns a drawing as a PNG file, with boxes for letters that the font lacks."""
    content = BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from font")
        figure.savefig(content, format="png", dpi=110)
    return content.getvalue()


def drawn(figure: Figure) -> Image.Image:
    return Image.open(BytesIO(png(figure))).convert("RGB")


def shortened_line(text: str, length: int) -> str:
    """Returns a text in one line, cut with an ellipsis to some letters."""
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"


def require_image_name(path: Path) -> None:
    """Checks before it is drawn that an image can be written there."""
    kinds = Image.registered_extensions()  # it fills SAVE, too
    if kinds.get(path.suffix.lower()) not in Image.SAVE:
        raise ValueError(f"{path} has no suffix of a kind of images; give a name such as image.png")
    require_parent(path)


def write_image(path: Path, image: Image.Image) -> None:
    with replacing(path) as temporary:
        image.save(temporary)
