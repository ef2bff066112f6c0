"""Examples of the report: searches as strips of pictures, hidden words beside two pictures, questions with answers."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from bridgetower.analysis.answer_examples import AnswerExample
from bridgetower.analysis.examples import Hit, SearchExample
from bridgetower.analysis.formats import number, ordinal, percent
from bridgetower.analysis.markup import bar, heading, paragraph, picture
from bridgetower.analysis.masked_examples import Guess, MaskExample
from bridgetower.predictor import FilledWord


def search_cards(dataset: str, examples: Sequence[SearchExample]) -> str:
    """Returns the searches of one data set, both directions under a heading each."""
    with_text = [example for example in examples if example.direction == "text_to_image"]
    with_picture = [example for example in examples if example.direction == "image_to_text"]
    parts = [
        heading(f"{title} on {dataset}", 3) + f'<div class="cards">{"".join(map(_search_card, chosen))}</div>'
        for title, chosen in (("Pictures for a text", with_text), ("Texts for a picture", with_picture))
        if chosen
    ]
    return "".join(parts)


def mask_cards(examples: Sequence[MaskExample]) -> str:
    """Returns the captions with a hidden word, the guesses beside the right and a wrong picture in two columns."""
    if not examples:
        return paragraph("No examples: these models have no masked-language head, or no caption has a word to hide.")
    return f'<div class="cards">{"".join(map(_mask_card, examples))}</div>'


def answer_cards(examples: Sequence[AnswerExample]) -> str:
    """Returns the questions with their pictures and what the model answers."""
    return f'<div class="cards">{"".join(map(_answer_card, examples))}</div>'


def _search_card(example: SearchExample) -> str:
    if example.direction == "text_to_image":
        query = f'<figcaption class="query">“{escape(example.text)}”</figcaption>'
        answers = f'<ol class="strip">{"".join(map(_picture_hit, example.hits))}{_picture_miss(example)}</ol>'
    else:
        shown = picture(example.picture, f"query: {example.text}")
        query = f'<figcaption class="query">{shown}<span class="hidden">{escape(example.text)}</span></figcaption>'
        answers = f'<ol class="texts">{"".join(map(_text_hit, example.hits))}{_text_miss(example)}</ol>'
    return f'<figure class="card {example.direction}">{query}{_place(example)}{answers}</figure>'


def _place(example: SearchExample) -> str:
    """Says where the right answer stood."""
    what = "picture" if example.direction == "text_to_image" else "text"
    if example.rank == 1:
        return f'<p class="place found">✓ right {what} first of {example.num_items}</p>'
    return f'<p class="place">right {what} {ordinal(example.rank)} of {example.num_items}</p>'


def _picture_hit(hit: Hit) -> str:
    return f'<li class="{_right(hit)}">{picture(hit.picture, _alt(hit))}{_scores(hit)}</li>'


def _picture_miss(example: SearchExample) -> str:
    """The right picture, where it is not among the hits."""
    if example.rank <= len(example.hits):
        return ""
    shown = picture(example.own.picture, _alt(example.own))
    return f'<li class="right beyond" value="{example.rank}">{shown}{_scores(example.own)}</li>'


def _text_hit(hit: Hit) -> str:
    mark = '<b class="mark" aria-label="right">✓</b> ' if hit.is_own else ""
    caption = escape(hit.caption)
    return (
        f'<li class="{_right(hit)}"><span class="caption" title="{caption}">{mark}{caption}</span>{_scores(hit)}</li>'
    )


def _text_miss(example: SearchExample) -> str:
    if example.rank <= len(example.hits):
        return ""
    return _text_hit(example.own).replace('<li class="right"', f'<li class="right beyond" value="{example.rank}"', 1)


def _right(hit: Hit) -> str:
    return "right" if hit.is_own else "other"


def _alt(hit: Hit) -> str:
    return f"{'right picture: ' if hit.is_own else ''}{hit.caption}"


def _scores(hit: Hit) -> str:
    cosine = f'<span class="cosine">cos {number(hit.cosine, digits=2)}</span>'
    if hit.probability is None:
        return f'<span class="scores">{cosine}</span>'
    return f'<span class="scores"><b>{percent(hit.probability)}</b> {cosine}</span>'


def _mask_card(example: MaskExample) -> str:
    sentence = (
        f'{escape(example.before)}<mark><span class="hidden">hidden word: </span>{escape(example.truth)}</mark>'
        f"{escape(example.after)}"
    )
    guesses = _guess("right picture", example.right, example.truth) + _guess(
        "wrong picture", example.wrong, example.truth
    )
    return f'<figure class="card mask"><figcaption class="query">{sentence}</figcaption>{guesses}</figure>'


def _guess(title: str, guess: Guess, truth: str) -> str:
    shown = picture(guess.picture, f"{title}: {guess.caption}")
    summary = (
        f'<p class="guess">{shown}<span>{escape(title)}<br><b>{escape(truth)}</b> '
        f"{percent(guess.truth_probability)}</span></p>"
    )
    rows = "".join(_candidate(word, truth) for word in guess.candidates)
    return f'<div>{summary}<ol class="bars">{rows}</ol></div>'


def _candidate(candidate: FilledWord, truth: str) -> str:
    style, mark = ("right", " ✓") if candidate.word == truth else ("other", "")
    shown = percent(candidate.probability)
    return (
        f'<li class="{style}"><span class="word">{escape(candidate.word)}{mark}</span>'
        f"{bar(candidate.probability)}<span>{shown}</span></li>"
    )


def _answer_card(example: AnswerExample) -> str:
    if example.is_right:
        said = f'<p class="place found">✓ {escape(example.given)}</p>'
    else:
        said = f'<p class="place">✗ {escape(example.given)}; right is <b>{escape(example.answer)}</b></p>'
    shown = picture(example.picture, "scene")
    return (
        f'<figure class="card answer">{shown}<div><figcaption class="query">{escape(example.question)}</figcaption>'
        f"{said}</div></figure>"
    )
