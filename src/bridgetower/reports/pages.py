"""Templates of self-contained HTML pages, and the tables in them."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import NamedTuple

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

from bridgetower.processor import media_type, open_image
from bridgetower.processor.images import Colour
from bridgetower.reports.numbers import count, number, percent


def page_templates(*packages: str) -> Environment:
    """Returns the templates of pages with their filters, those of other packages too."""
    loader = ChoiceLoader([PackageLoader(package) for package in ("bridgetower.reports", *packages)])
    templates = Environment(
        autoescape=True, loader=loader, lstrip_blocks=True, trim_blocks=True, undefined=StrictUndefined
    )
    templates.filters |= {"count": count, "number": number, "percent": percent, "data_uri": _data_uri}
    return templates


class Row(NamedTuple):
    """A row of a table, with its head."""

    header: str
    cells: Sequence[str]
    style: str = ""


class Table(NamedTuple):
    """A table of plain text, or what to write where there is none; `groups` are heads over several columns."""

    caption: str = ""
    columns: Sequence[str] = ()
    rows: Sequence[Row] = ()
    groups: Sequence[tuple[str, int]] = ()
    missing: str = ""


def small(content: bytes, background: Colour | None = None) -> bytes:
    """Returns a copy of an image for a page, as every browser shows it."""
    image, stream = open_image(content, background=background), io.BytesIO()
    image.thumbnail((320, 320))
    image.save(stream, "WEBP")
    return stream.getvalue()


def _data_uri(content: bytes) -> str:
    """An image file as a URI that carries its content."""
    try:
        kind = media_type(content)
    except ValueError as error:
        raise ValueError(f"an example cannot be read ({error}); expected the content of an image file") from error
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
