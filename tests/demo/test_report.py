"""The page: complete, self-contained, escaped, well-formed, readable by everyone."""

import re
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import made_up
import pytest

from bridgetower.reports.comparison import Comparison, FinishedRun
from bridgetower_demo.report import learning_curve, render_report
from bridgetower_demo.results import CurvePoint, DemoResults

VOID = {"meta", "img", "br"}
SECTIONS = ("searches", "answers", "masked-words", "comparison", "curves", "retrieval", "cost", "basis")
TEXTS = (
    "BridgeTower against METER on shapes",
    "BridgeTower is ahead of METER (+9.0",
    "Retrieval on shapes: recall in percent",
    "random ranking",
    "✓ right image first of 50",
    "right image 37th of 50",
    "right text 2nd of 50",
    "By BridgeTower, seed 0.",
    "25.0 %",
    "cos \u22120.12",
    "Does it look at the image?",
    "60 %",
    "0.05 %",
    "overall (1\u202f000)",
    "62.5",
    "the question alone",
    "✓ red",
    "✗ blue; right is red",
    "GFLOPs per pair",
    "13.3",  # 0.5 + 0.25 + 12.5 and a little for the heads
    "4.25",
    "python -m bridgetower_demo --seeds 3",
    "CC0",
    "optimizer.lr",
    "Time on a processor (whole demo 1 h 05 min)",
)


class Page(HTMLParser):
    """Elements with their attributes, the text, and a check that every tag is closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for found, attributes in self.elements if found == tag]

    @property
    def sections(self) -> list[str]:
        return [section["id"] for section in self.all("section")]


def report(results: DemoResults | None = None, **changes: Any) -> str:
    searches = [
        made_up.search(direction, rank=rank) for direction in ("text_to_image", "image_to_text") for rank in (1, 2, 37)
    ]
    values: dict[str, Any] = {
        "searches": {"shapes": searches},
        "masks": [made_up.mask()],
        "answers": [made_up.answer(), made_up.answer(given="blue")],
        "examples_from": "BridgeTower, seed 0",
    }
    return render_report(results or made_up.results(), **{**values, **changes})


def measured(*left_out: str) -> DemoResults:
    """Results of two arms without the metrics that start like this."""
    metrics = {name: value for name, value in made_up.metrics().items() if not name.startswith(left_out)}
    return made_up.results(*(made_up.run(arm, test={"shapes": metrics}) for arm in ("bridgetower", "meter")))


def rows_of(html: str, caption: str) -> dict[str, list[str]]:
    """The cells of a table by the head of their row, without tags."""
    start = html.index(f"<caption>{caption}")
    rows = re.findall(r'<th scope="row">([^<]+)</th>(.*?)</tr>', html[start : html.index("</table>", start)])
    return {head: [re.sub("<[^>]+>", "", cell) for cell in cells.split("</td><td>")] for head, cells in rows}


@pytest.fixture(scope="module")
def html() -> str:
    return report()


@pytest.fixture(scope="module")
def page(html: str) -> Page:
    return Page(html)


def test_every_section_is_there_and_linked_and_says_what_was_found(page: Page) -> None:
    assert tuple(page.sections) == SECTIONS
    assert [link["href"] for link in page.all("a")] == [f"#{name}" for name in SECTIONS]
    assert [text for text in TEXTS if text not in page.text] == []


def test_figures_are_means_with_their_spread_and_differences_have_their_interval(html: str) -> None:
    assert '<td>131.0<span class="spread"> ± 1.0</span></td>' in html
    assert '<td>21.8<span class="spread"> ± 0.2</span></td>' in html  # a recall of 131 / 600, in percent
    recall = rows_of(html, "Retrieval on shapes: recall in percent")["BridgeTower \u2212 METER, matching alone"]
    assert (recall[0], recall[-1]) == ("+1.5 (+1.1 to +1.9)", "+9.0 (+6.5 to +11.5)")
    answers = [made_up.answers(seed=seed, right=0.75 + seed / 100) for seed in range(3)]
    answers += [made_up.answers("meter", seed, right=0.7) for seed in range(3)]
    several = rows_of(report(made_up.results(answers=tuple(answers))), "Questions answered right, in percent")
    assert list(several).index("BridgeTower \u2212 METER") == 2
    assert several["BridgeTower \u2212 METER"] == ["+6.0 (+3.5 to +8.5)"] * 2
    one_seed = rows_of(html, "Questions answered right, in percent")
    assert one_seed["BridgeTower \u2212 METER"] == ["+12.5"] * 2


class TestVariants:
    def test_one_arm(self) -> None:
        page = Page(report(made_up.results(made_up.run(), costs=(made_up.cost(),), answers=(made_up.answers(),))))
        assert "METER" not in page.text
        assert tuple(page.sections) == SECTIONS

    def test_without_masked_words(self) -> None:
        page = Page(report(measured("mlm"), masks=[]))
        assert "Masked words" not in page.text
        assert page.sections == [name for name in SECTIONS if name != "masked-words"]

    def test_without_matching_head(self) -> None:
        page = Page(report(measured("matching", "two_stage", "itm")))
        assert "Matching was not measured" in page.text
        assert "METER, ITC alone" in page.text
        for text in ("the probability that it matches", "guessing is right in 50 %", "METER, two-stage"):
            assert text not in page.text

    def test_the_time_to_the_first_searches_is_said(self) -> None:
        text = Page(report(made_up.results(seconds_to_first_report=250.0))).text
        assert "(whole demo 1 h 05 min, first searches after 4 min)" in text

    def test_runs_that_were_measured_beforehand(self) -> None:
        runs = [
            FinishedRun(arm=arm, seed=seed, curve={10: (40.0 + gain + seed / 5) / 100}, seconds_per_step=0.123)
            for arm, gain in (("BridgeTower", 5.0), ("METER", 1.0), ("METER with LayerNorms", 0.0))
            for seed in range(2)
        ]
        html = report(beforehand=Comparison(metric="vqa_score", reach=None, runs=tuple(runs)))
        page = Page(html)
        assert page.sections[4] == "deep-towers"
        rows = rows_of(html, "Score on validation questions, measured beforehand")
        assert rows["BridgeTower"] == ["2", "45.1 ± 0.1", "45.1 ± 0.1"]
        assert rows["BridgeTower \u2212 METER with LayerNorms"][1].startswith("+5.0 (")
        assert "BridgeTower is ahead of METER (+4.0" in page.text
        assert "0.123" not in page.text  # of runs that shared their cores


def test_nothing_is_loaded_and_tables_have_captions_and_heads(html: str, page: Page) -> None:
    assert not {"script", "link", "iframe", "object", "base", "source"} & {tag for tag, _ in page.elements}
    for _, attributes in page.elements:
        for name in ("src", "href", "data", "poster", "action", "srcset", "xlink:href"):
            assert attributes.get(name, "#").startswith(("#", "data:image/")), attributes
    assert not [loading for loading in ("@import", "@font-face", "url(") if loading in html]
    assert len(page.all("table")) == len(page.all("caption")) == 6
    assert all(head.get("scope") for head in page.all("th"))


def test_every_text_is_escaped() -> None:
    bad = '<b onclick="alert(1)">&\'$title</script>'
    dataset = made_up.dataset(bad, split_rule=bad, sources={bad: bad}, licences={bad: bad})
    run = made_up.run(test={bad: made_up.metrics()})
    settings = {bad: bad, "list": [bad]}
    results = made_up.results(run, datasets=(dataset,), command=bad, settings=settings, versions={bad: bad})
    searches = [
        made_up.search(direction, text=bad, answer=bad, rank=rank)
        for direction in ("text_to_image", "image_to_text")
        for rank in (1, 9)
    ]
    answers = [made_up.answer(bad, bad, bad), made_up.answer(bad, bad, "red")]
    masks = [made_up.mask(bad, bad, bad)]
    html = report(results, searches={bad: searches}, masks=masks, answers=answers, examples_from=bad)
    page = Page(html)
    assert bad not in html
    assert not any("onclick" in attributes for _, attributes in page.elements)
    assert page.text.count(bad) > 20


def test_an_example_that_is_no_image() -> None:
    with pytest.raises(ValueError, match="an example cannot be read"):
        report(answers=[replace(made_up.answer(), image=b"text")])


def test_a_step_that_not_all_seeds_have_is_not_drawn() -> None:
    short, long = made_up.run(seed=1, curve=(CurvePoint(step=20, metrics={"rsum": 1.0}),)), made_up.run(rsum=120.0)
    only = made_up.run(curve=(CurvePoint(step=20, metrics={"rsum": 1.2}),))
    drawn = [learning_curve((first, short), "rsum", label="RSUM") for first in (long, only)]
    assert drawn[0] is not None
    assert drawn[0] == drawn[1]
    assert learning_curve((short,), "vqa_score", label="VQA") is None
