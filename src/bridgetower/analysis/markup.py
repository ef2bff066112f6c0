"""Fragments of HTML; every function takes plain text, escapes it, and returns markup."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from PIL import Image


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of the page.

    Attributes:
        name: Its id on the page.
        title: Its heading, plain text.
        body: Markup.
    """

    name: str
    title: str
    body: str

    def render(self) -> str:
        """Returns the section with its heading."""
        heading = f"{self.name}-heading"
        return (
            f'<section id="{escape(self.name)}" aria-labelledby="{escape(heading)}">'
            f'<h2 id="{escape(heading)}">{escape(self.title)}</h2>{self.body}</section>'
        )

    def link(self) -> str:
        """Returns a link to the section."""
        return f'<a href="#{escape(self.name)}">{escape(self.title)}</a>'


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row of a table; a cell `12.3 ± 0.4` gets its spread set smaller.

    Attributes:
        header, cells: Plain text.
        style: Class of the row.
    """

    header: str
    cells: Sequence[str]
    style: str = ""

    def render(self) -> str:
        """Returns the row."""
        cells = "".join(f"<td>{_number(cell)}</td>" for cell in self.cells)
        return f'<tr class="{escape(self.style)}"><th scope="row">{escape(self.header)}</th>{cells}</tr>'


def table(caption: str, columns: Sequence[str], rows: Sequence[Row], *, groups: Sequence[tuple[str, int]] = ()) -> str:
    """Returns a table that scrolls sideways where it does not fit.

    Args:
        caption: Above the table.
        columns: Heads of all columns, that of the row heads included.
        rows: As many cells as columns beside the row heads.
        groups: Heads above the columns and how many columns each spans.
    """
    upper = "".join(f'<th scope="colgroup" colspan="{span}">{escape(title)}</th>' for title, span in groups)
    lower = "".join(f'<th scope="col">{escape(title)}</th>' for title in columns)
    head = (f"<tr>{upper}</tr>" if groups else "") + f"<tr>{lower}</tr>"
    body = "".join(row.render() for row in rows)
    return (
        f'<div class="scroll" role="region" aria-label="{escape(caption)}" tabindex="0"><table>'
        f"<caption>{escape(caption)}</caption><thead>{head}</thead><tbody>{body}</tbody></table></div>"
    )


def paragraph(text: str, style: str = "") -> str:
    """Returns a paragraph."""
    return f'<p class="{escape(style)}">{escape(text)}</p>' if style else f"<p>{escape(text)}</p>"


def picture(content: bytes, alt: str) -> str:
    """Returns an image that carries its file content in itself.

    Raises:
        ValueError: The content is no picture that Pillow knows.
    """
    try:
        kind = Image.open(io.BytesIO(content)).get_format_mimetype()
    except OSError as error:
        raise ValueError(
            f"picture of {alt!r} cannot be read ({error}); expected the content of a picture file"
        ) from error
    data = base64.b64encode(content).decode()
    return f'<img src="data:{kind};base64,{data}" alt="{escape(alt)}" title="{escape(alt)}">'


def bar(share: float, style: str = "") -> str:
    """Returns a horizontal bar, filled by `share` of its width; its value must stand beside it as text."""
    filled = 100 * min(max(share, 0.0), 1.0)
    return f'<span class="bar {escape(style)}" aria-hidden="true"><i style="width:{filled:.1f}%"></i></span>'


def definitions(pairs: Sequence[tuple[str, str]]) -> str:
    """Returns a list of names and values."""
    items = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in pairs)
    return f"<dl>{items}</dl>"


def heading(text: str, level: int) -> str:
    """Returns a heading."""
    return f"<h{level}>{escape(text)}</h{level}>"


def _number(cell: str) -> str:
    value, sign, spread = cell.partition(" ± ")
    return escape(value) + (f'<span class="spread"> ± {escape(spread)}</span>' if sign else "")
