"""Results as HTML: everything is escaped, nothing is left out."""

import re

import torch
from PIL import Image

from bridgetower.analysis.attention import Explanation
from bridgetower.serve.page import markup

ODD = "<script>alert('x')</script> & \"more\""


def test_texts_are_escaped() -> None:
    card = markup.Card(path=ODD, cosine=0.5, probability=0.5, captions=[ODD], thumbnail=Image.new("RGB", (9, 9)))
    shown = [
        markup.problem(ODD),
        markup.note(ODD),
        markup.ranking(ODD, [(ODD, 0.5)]),
        markup.cards([card]),
        markup.maps(explanation((ODD, "red"))),
    ]
    for html in shown:
        assert "&lt;script&gt;" in html
        assert "<script" not in html
        assert '"more"' not in html


def test_ranking() -> None:
    html = markup.ranking("Words", [("red", 0.75), ("blue", 0.0004)])
    assert re.findall(r"<th scope=\"row\">(\w+)</th><td class=\"bt-number\">([^<]+)</td>", html) == [
        ("red", "75 %"),
        ("blue", "0.04 %"),
    ]
    assert "width:75.0%" in html


def test_cards() -> None:
    found = [
        markup.Card(
            path="a.png", cosine=-0.25, probability=0.5, captions=["first", "second"], thumbnail=Image.new("L", (4, 2))
        ),
        markup.Card(path="b.png", cosine=0.125, probability=None, captions=[], thumbnail=None),
    ]
    first, second = markup.cards(found).split("</li>")[:2]
    assert 'src="data:image/jpeg;base64,' in first
    assert 'alt="first"' in first
    assert "<dt>match</dt><dd>50 %</dd><dt>cosine</dt><dd>\u22120.250</dd>" in first
    assert "cannot be opened" in second
    assert "<dl><dt>cosine</dt><dd>0.125</dd></dl>" in second
    assert "No picture meets the condition" in markup.cards([])


def test_maps_of_every_word_and_layer() -> None:
    html = markup.maps(explanation(("red", "bar")))
    assert re.findall(r"<h3>Layer (\d)", html) == ["1", "2", "3"]
    assert re.findall(r"<strong>(\w+)</strong> <span>class token (\d+) %", html) == [("red", "20"), ("bar", "30")] * 3
    assert html.count("<img ") == 6
    assert "Matches with 25 %" in html
    assert "Matches" not in markup.maps(explanation(("red", "bar"), probability=None))


def explanation(words: tuple[str, str], probability: float | None = 0.25) -> Explanation:
    """Maps of three layers and two words over four patches."""
    return Explanation(
        text=" ".join(words),
        words=words,
        maps=torch.tensor([0.1, 0.2, 0.3, 0.4]).view(1, 1, 2, 2).expand(3, 2, 2, 2),
        prefix_shares=torch.tensor([[0.2, 0.3]] * 3),
        probability=probability,
        view=Image.new("RGB", (480, 480), "blue"),
    )
