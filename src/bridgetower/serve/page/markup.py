"""What the page shows of results, as HTML; every function takes plain text, escapes it, and returns markup."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from PIL import Image

from bridgetower.analysis.attention import Explanation
from bridgetower.analysis.attention_picture import heat
from bridgetower.analysis.formats import number, percent
from bridgetower.analysis.markup import bar, picture

_TILE = 176  # pixels of a heat map


@dataclass(frozen=True, kw_only=True)
class Card:
    """A picture that was found.

    Attributes:
        path: As the index has it.
        cosine: Of the query's vector and the picture's.
        probability: That text and picture match, if that was asked.
        captions: That the picture came with.
        thumbnail: The picture made small; None if it cannot be opened.
    """

    path: str
    cosine: float
    probability: float | None
    captions: Sequence[str]
    thumbnail: Image.Image | None


def problem(message: str) -> str:
    """Returns what tells that something could not be done."""
    return f'<p class="bt-problem" role="alert">{escape(message)}</p>'


def note(message: str) -> str:
    """Returns a remark."""
    return f'<p class="bt-note">{escape(message)}</p>'


def ranking(caption: str, rows: Sequence[tuple[str, float]]) -> str:
    """Returns a table of names and probabilities with a bar for each.

    Args:
        caption: What the names are.
        rows: In their order.
    """
    body = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td class="bt-number">{percent(value)}</td><td>{bar(value)}</td></tr>'
        for name, value in rows
    )
    return f'<table class="bt-ranking"><caption>{escape(caption)}</caption><tbody>{body}</tbody></table>'


def cards(found: Sequence[Card]) -> str:
    """Returns pictures that were found, the best first."""
    if not found:
        return note("No picture meets the condition.")
    return f'<ol class="bt-cards">{"".join(map(_card, found))}</ol>'


def maps(explanation: Explanation) -> str:
    """Returns the heat maps: a section per layer, a tile per word.

    Each layer has one scale, as in `analysis.attention_picture.draw_explanation`.
    """
    view = explanation.view.resize((_TILE, _TILE), Image.Resampling.LANCZOS)
    sections = []
    for layer, of_layer in enumerate(explanation.maps):
        peak = float(of_layer.max())
        tiles = "".join(
            _tile(heat(view, of_word / peak), word, float(share), layer + 1)
            for word, of_word, share in zip(explanation.words, of_layer, explanation.prefix_shares[layer], strict=True)
        )
        title = f"Layer {layer + 1} <small>brightest: {percent(peak)} of a word's attention on one patch</small>"
        sections.append(f'<section><h3>{title}</h3><div class="bt-tiles">{tiles}</div></section>')
    matches = "" if explanation.probability is None else f"Matches with {percent(explanation.probability)}. "
    about = note(
        f"{matches}Each map is a word's cross-attention over the picture, the mean over the heads, and sums to 1 over "
        "the patches. Under it stands what went to the class token instead. It tells where a word looks, not what "
        "decides about the match."
    )
    return about + "".join(sections)


def _card(card: Card) -> str:
    shown = '<span class="bt-missing">cannot be opened where the index has it</span>'
    if card.thumbnail is not None:
        shown = picture(_jpeg(card.thumbnail), card.captions[0] if card.captions else card.path)
    match = "" if card.probability is None else f"<dt>match</dt><dd>{percent(card.probability)}</dd>"
    captions = f'<p class="bt-caption">{escape(card.captions[0])}</p>' if card.captions else ""
    return (
        f'<li><figure><div class="bt-frame">{shown}</div><figcaption>'
        f'<p class="bt-path">{escape(card.path)}</p>{captions}'
        f"<dl>{match}<dt>cosine</dt><dd>{number(card.cosine, digits=3)}</dd></dl></figcaption></figure></li>"
    )


def _tile(tile: Image.Image, word: str, share: float, layer: int) -> str:
    shown = picture(_jpeg(tile), f"where “{word}” looks in layer {layer}")
    return (
        f"<figure>{shown}<figcaption><strong>{escape(word)}</strong> <span>class token {percent(share)}</span>"
        "</figcaption></figure>"
    )


def _jpeg(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.convert("RGB").save(stream, "JPEG", quality=88)
    return stream.getvalue()
