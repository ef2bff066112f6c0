"""The page: complete, self-contained, escaped, well-formed, readable by everyone."""

import re
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from importlib.resources import files
from itertools import pairwise
from typing import Any

import made_up
import pytest

from bridgetower.analysis.comparison import Comparison, FinishedRun
from bridgetower.analysis.report import render_report
from bridgetower.analysis.results import DemoResults

VOID = {"meta", "img", "br"}
SECTIONS = ("searches", "answers", "masked-words", "comparison", "curves", "retrieval", "cost", "basis")


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

    def all(self, *tags: str) -> list[dict[str, str]]:
        return [attributes for tag, attributes in self.elements if tag in tags]


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


class TestContent:
    def test_every_section_is_there_and_linked(self, page: Page) -> None:
        assert tuple(section["id"] for section in page.all("section")) == SECTIONS
        assert [link["href"] for link in page.all("a")] == [f"#{name}" for name in SECTIONS]

    @pytest.mark.parametrize(
        "text",
        [
            "BridgeTower against METER on shapes",
            "BridgeTower is ahead of METER (+9.0",
            "Retrieval on shapes: recall in percent",
            "random ranking",
            "Matching accuracy in percent",
            "✓ right image first of 50",
            "right image 37th of 50",
            "right text 2nd of 50",
            "By BridgeTower, seed 0.",
            "25.0 %",
            "cos \u22120.12",
            "Does it look at the image?",
            "60 %",
            "0.05 %",
            "Questions answered right, in percent",
            "overall (1\u202f000)",
            "62.5",
            "the question alone",
            "✓ red",
            "✗ blue; right is red",
            "GFLOPs per pair",
            "13.3",  # 0.5 + 0.25 + 12.5 and a little for the heads
            "4.25",
            "bridgetower demo --seeds 3",
            "CC0",
            "optimizer.lr",
            "Time on a processor (whole demo 1 h 05 min)",
        ],
    )
    def test_text(self, page: Page, text: str) -> None:
        assert text in page.text

    def test_table_has_all_rows_and_columns(self, html: str) -> None:
        rows = rows_of(html, "Retrieval on shapes: recall in percent")
        stages = ("ITC alone", "matching alone", "two-stage")
        arms = ("BridgeTower", "METER", "BridgeTower \u2212 METER")
        names = [f"{arm}, {stage}" for arm in arms for stage in stages]
        assert list(rows) == [*names, "random ranking"]
        assert {len(cells) for cells in rows.values()} == {7}

    def test_differences_have_their_interval(self, html: str) -> None:
        recall = rows_of(html, "Retrieval on shapes: recall in percent")["BridgeTower \u2212 METER, matching alone"]
        assert (recall[0], recall[-1]) == ("+1.5 (+1.1 to +1.9)", "+9.0 (+6.5 to +11.5)")
        answers = [made_up.answers(seed=seed, right=0.75 + seed / 100) for seed in range(3)]
        answers += [made_up.answers("meter", seed, right=0.7) for seed in range(3)]
        several = rows_of(report(made_up.results(answers=tuple(answers))), "Questions answered right, in percent")
        assert list(several).index("BridgeTower \u2212 METER") == 2
        assert several["BridgeTower \u2212 METER"] == ["+6.0 (+3.5 to +8.5)"] * 2
        one_seed = rows_of(html, "Questions answered right, in percent")
        assert one_seed["BridgeTower \u2212 METER"] == ["+12.5"] * 2

    def test_figures_are_means_with_their_spread(self, html: str) -> None:
        assert '<td>131.0<span class="spread"> ± 1.0</span></td>' in html
        assert '<td>21.8<span class="spread"> ± 0.2</span></td>' in html  # a recall of 131 / 600, in percent
        assert '<td>+9.0<span class="spread"> (+6.5 to +11.5)</span></td>' in html

    def test_no_clear_difference_is_said(self) -> None:
        runs = [
            made_up.run(arm, seed, 100.0 + 20 * seed * (arm == "meter"))
            for arm in ("bridgetower", "meter")
            for seed in (0, 1)
        ]
        text = Page(report(made_up.results(*runs))).text
        assert "No clear difference between the two" in text
        assert "ahead" not in text

    def test_right_answers_are_marked(self, html: str) -> None:
        assert html.count('<li class="right">') == 4 + 2  # two searches with the answer in sight, two columns of words
        assert html.count('<li class="right beyond" value="37">') == 2

    def test_same_bytes(self, html: str) -> None:
        assert report() == html


class TestVariants:
    def test_one_seed(self) -> None:
        text = Page(report(made_up.results(made_up.run(), made_up.run("meter", rsum=110.0)))).text
        assert "with one seed it could be chance" in text
        assert "±" not in text
        assert "one seed: open" in text

    def test_one_arm(self) -> None:
        page = Page(report(made_up.results(made_up.run(), costs=(made_up.cost(),), answers=(made_up.answers(),))))
        assert "METER" not in page.text
        assert tuple(section["id"] for section in page.all("section")) == SECTIONS

    def test_without_masked_words(self) -> None:
        metrics = {name: value for name, value in made_up.metrics().items() if not name.startswith("mlm")}
        page = Page(report(made_up.results(made_up.run(test={"shapes": metrics})), masks=[]))
        assert "Masked words" not in page.text
        assert tuple(section["id"] for section in page.all("section")) == tuple(
            name for name in SECTIONS if name != "masked-words"
        )

    def test_towers_and_questions_are_named(self) -> None:
        text = Page(report(made_up.results(about="tiny flags", towers=("a tower, CC0",)))).text
        assert "Questions about tiny flags" in text
        assert "Pre-trained towers" in text
        assert "a tower, CC0" in text
        assert "Pre-trained towers" not in Page(report()).text

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
        assert [section["id"] for section in page.all("section")][4] == "deep-towers"
        rows = rows_of(html, "Score on validation questions, measured beforehand")
        assert rows["BridgeTower"] == ["2", "45.1 ± 0.1", "45.1 ± 0.1"]
        assert rows["BridgeTower \u2212 METER with LayerNorms"][1].startswith("+5.0 (")
        assert "Measured beforehand" in page.text
        assert "BridgeTower is ahead of METER (+4.0" in page.text
        assert "0.123" not in page.text  # of runs that shared their cores

    def test_without_questions(self) -> None:
        page = Page(report(made_up.results(answers=())))
        assert tuple(section["id"] for section in page.all("section")) == tuple(
            name for name in SECTIONS if name != "answers"
        )

    def test_without_matching_head(self) -> None:
        metrics = {
            name: value
            for name, value in made_up.metrics().items()
            if not name.startswith(("matching", "two_stage", "itm"))
        }
        runs = [made_up.run(arm, test={"shapes": metrics}) for arm in ("bridgetower", "meter")]
        page = Page(report(made_up.results(*runs)))
        assert "Matching was not measured" in page.text
        assert "the probability that it matches" not in page.text
        assert "guessing is right in 50 %" not in page.text
        assert "METER, ITC alone" in page.text
        assert "METER, two-stage" not in page.text

    def test_without_curves_examples_and_costs(self) -> None:
        page = Page(report(made_up.results(made_up.run(curve=()), costs=()), searches={}, masks=[], answers=[]))
        assert "The runs were not evaluated while they trained." in page.text
        assert all("svg" not in picture["src"] for picture in page.all("img"))


class TestSelfContained:
    def test_nothing_is_loaded(self, html: str, page: Page) -> None:
        assert not {"script", "link", "iframe", "object", "base", "source"} & {tag for tag, _ in page.elements}
        for _, attributes in page.elements:
            for name in ("src", "href", "data", "poster", "action", "srcset", "xlink:href"):
                assert attributes.get(name, "#").startswith(("#", "data:image/")), attributes
        assert "@import" not in html
        assert "@font-face" not in html
        assert "url(" not in html

    def test_no_address_stands_in_the_page(self, html: str) -> None:
        assert not re.findall(r"https?:|//[a-z]", html)


class TestEscaping:
    HOSTILE = '<b onclick="alert(1)">&\'$title</script>'

    def test_every_text_is_escaped(self) -> None:
        bad = self.HOSTILE
        dataset = made_up.dataset(bad, split_rule=bad, sources={bad: bad}, licences={bad: bad})
        run = made_up.run(test={bad: made_up.metrics()})
        results = made_up.results(
            run, datasets=(dataset,), command=bad, settings={bad: bad, "list": [bad]}, versions={bad: bad}
        )
        html = report(
            results,
            searches={
                bad: [
                    made_up.search(direction, text=bad, answer=bad, rank=rank)
                    for direction in ("text_to_image", "image_to_text")
                    for rank in (1, 9)
                ]
            },
            masks=[made_up.mask(bad, bad, bad)],
            answers=[made_up.answer(bad, bad, bad), made_up.answer(bad, bad, "red")],
            examples_from=bad,
        )
        page = Page(html)
        assert bad not in html
        assert not any("onclick" in attributes for _, attributes in page.elements)
        assert page.text.count(bad) > 20


def test_an_example_that_is_no_image() -> None:
    with pytest.raises(ValueError, match="an example cannot be read"):
        report(answers=[replace(made_up.answer(), image=b"text")])


class TestAccessibility:
    def test_language_and_width(self, page: Page) -> None:
        assert page.all("html") == [{"lang": "en"}]
        assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.all("meta")

    def test_headings_are_in_order(self, page: Page) -> None:
        levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch(r"h[1-6]", tag)]
        assert levels.count(1) == 1
        assert levels[0] == 1
        assert all(after <= before + 1 for before, after in pairwise(levels))

    def test_images_have_alternatives(self, page: Page) -> None:
        assert all(picture["alt"] for picture in page.all("img"))

    def test_tables_have_captions_and_heads(self, html: str, page: Page) -> None:
        tables = len(page.all("table"))
        assert tables == len(page.all("caption")) == 6
        assert all(head.get("scope") for head in page.all("th"))

    def test_ids_are_unique_and_labels_exist(self, page: Page) -> None:
        ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
        assert Counter(ids).most_common(1)[0][1] == 1
        assert {section["aria-labelledby"] for section in page.all("section")} <= set(ids)

    @pytest.mark.parametrize("theme", ["light", "dark"])
    def test_contrast(self, theme: str) -> None:
        colours = palette(theme)
        for ink in ("ink", "muted", "right", "bridgetower"):  # texts and links; WCAG 2.2 asks for 4.5
            for ground in ("page", "card"):
                assert contrast(colours[ink], colours[ground]) >= 4.5, (ink, ground)
        assert contrast(colours["right"], colours["right-ground"]) >= 4.5
        for line in ("bridgetower", "meter", "right"):  # lines and frames; 3
            assert contrast(colours[line], colours["card"]) >= 3


def palette(theme: str) -> dict[str, str]:
    """Colours of the style sheet; the first block is light, the second dark."""
    css = files("bridgetower.analysis").joinpath("templates/report.css").read_text(encoding="utf-8")
    blocks = re.findall(r":root \{(.*?)\}", css, flags=re.DOTALL)
    return dict(re.findall(r"--([a-z-]+): #([0-9a-f]{6})", blocks[theme == "dark"]))


def contrast(first: str, second: str) -> float:
    """Contrast ratio of WCAG 2.2."""
    darker, lighter = sorted(luminance(colour) for colour in (first, second))
    return (lighter + 0.05) / (darker + 0.05)


def luminance(colour: str) -> float:
    channels = (int(colour[start : start + 2], 16) / 255 for start in (0, 2, 4))
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
