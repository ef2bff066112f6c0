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
    """Returns the templates of this package and of others, with the filters of pages."""
    loaders = [PackageLoader(package) for package in ("bridgetower.reports", *packages)]
    templates = Environment(
        autoescape=True,
        loader=ChoiceLoader(loaders),
        lstrip_blocks=True,
        trim_blocks=True,
        undefined=StrictUndefined,
    )
    templates.filters |= {
        "count": count,
        "number": number,
        "percent": percent,
        "data_uri": data_uri,
    }
    return templates


class Row(NamedTuple):
    """A row of a table."""

    header: str
    cells: Sequence[str]
    style: str = ""


class ReportTable(NamedTuple):
    """A table of plain text."""

    caption: str = ""
    columns: Sequence[str] = ()
    rows: Sequence[Row] = ()
    groups: Sequence[tuple[str, int]] = ()  # titles over several columns, and over how many
    missing: str = ""  # text in place of a table that is empty


def thumbnail(content: bytes, background: Colour | None = None) -> bytes:
    """Returns a small copy of an image in a format that every browser shows."""
    image = open_image(content, background=background)
    image.thumbnail((320, 320))
    stream = io.BytesIO()
    image.save(stream, "WEBP")
    return stream.getvalue()


def data_uri(content: bytes) -> str:
    """Returns a URI that carries an image file."""
    try:
        kind = media_type(content)
    except ValueError as error:
        raise ValueError(
            f"an example cannot be read ({error}); expected the content of an image file"
        ) from error
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
