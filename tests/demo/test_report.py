"""The page: complete, self-contained, escaped, well-formed, readable by everyone."""

import re
from html.parser import HTMLParser
from typing import Any

import made_up
import pytest

from bridgetower_demo.report import render_report
from bridgetower_demo.results import DemoResults

VOID = {"meta", "img", "br"}
SECTIONS = ("numbers", "searches", "answers", "method", "tables", "basis")
TEXTS = (
    "BridgeTower on shapes",
    "by chance 5.0\u00a0%",
    "from the words of the question alone 55\u00a0%",
    "for data, training of the model and evaluation",
    "on a processor",
    "✓ right image first of 50",
    "right image 37th of 50",
    "right text 2nd of 50",
    "✓ red",
    "✗ blue; right is red",
    "Recall on shapes, in percent",
    "random ranking",
    "overall (1\u202f000)",
    "the question alone",
    "10⁹ operations",
    "13.3",  # 0.5 + 0.25 + 12.5 and a little for the heads
    "BridgeTower: 4.25 ms",
    "python -m bridgetower_demo --seeds 3",
    "CC0",
    "optimizer.lr",
)


class ReportPage(HTMLParser):
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
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def sections(self) -> list[str]:
        return [section["id"] for section in self.all("section")]


def report_html(results: DemoResults | None = None, **changes: Any) -> str:
    searches = [
        made_up.search(direction, rank=rank)
        for direction in ("text_to_image", "image_to_text")
        for rank in (1, 2, 37)
    ]
    values: dict[str, Any] = {
        "searches": {"shapes": searches},
        "answers": [made_up.answer(), made_up.answer(reference="blue")],
    }
    return render_report(results or made_up.results(), **{**values, **changes})


def table_cells(html: str, caption: str) -> dict[str, list[str]]:
    """The cells of the last table of a caption, the one of both models, by the head of their row, without tags."""
    start = html.rindex(f"<caption>{caption}")
    rows = re.findall(
        r'<th scope="row">([^<]+)</th>(.*?)</tr>', html[start : html.index("</table>", start)]
    )
    return {
        head: [re.sub("<[^>]+>", "", cell) for cell in cells.split("</td><td>")]
        for head, cells in rows
    }


@pytest.fixture(scope="module")
def html():
    return report_html()


@pytest.fixture(scope="module")
def report_page(html):
    return ReportPage(html)


@pytest.fixture(scope="module")
def single_arm_page():
    """The page of BridgeTower without METER."""
    run = made_up.demo_run(test={"shapes": made_up.metrics(chance_text_to_image_r5=0.05)})
    return report_html(
        made_up.results(run, costs=(made_up.cost(),), answers=(made_up.demo_answers(),))
    )


def test_the_page_of_one_model_has_its_figures_first_and_no_word_of_another(single_arm_page):
    page = ReportPage(single_arm_page)
    assert tuple(page.sections) == SECTIONS
    assert [link["href"] for link in page.all("a")] == [f"#{name}" for name in SECTIONS]
    assert [text for text in TEXTS if text not in page.text] == []
    assert re.findall('<p class="figure">([^<]+)</p>', single_arm_page) == [
        "20 %",
        "75 %",
        "1 h 05 min",
    ]
    assert [
        word for word in ("METER", "RSUM", "ITC", "ITM", "held-out", "\u2212") if word in page.text
    ] == []


def test_the_other_model_comes_last_with_the_differences(html, report_page):
    assert tuple(report_page.sections) == (*SECTIONS, "meter")
    before, _, after = report_page.text.partition("BridgeTower against METER")[2].partition(
        "BridgeTower against METER"
    )
    assert "METER" not in before
    assert "BridgeTower is ahead of METER (+9.0" in after
    assert "62.5" in after


def test_figures_are_means_with_their_spread_and_differences_have_their_interval(html):
    assert '<td>131.0<span class="spread"> ± 1.0</span></td>' in html
    # a recall of 131 / 600, in percent
    assert '<td>21.8<span class="spread"> ± 0.2</span></td>' in html
    recall = table_cells(html, "Recall on shapes, in percent")["BridgeTower \u2212 METER, matching"]
    assert (recall[0], recall[-1]) == ("+1.5 (+1.1 to +1.9)", "+9.0 (+6.5 to +11.5)")
    answers = [made_up.demo_answers(seed=seed, right=0.75 + seed / 100) for seed in range(3)]
    answers += [made_up.demo_answers("meter", seed, right=0.7) for seed in range(3)]
    rows = table_cells(
        report_html(made_up.results(answers=tuple(answers))), "Questions answered right, in percent"
    )
    assert list(rows).index("BridgeTower \u2212 METER") == 2
    assert rows["BridgeTower \u2212 METER"] == ["+6.0 (+3.5 to +8.5)"] * 2
    one_seed = table_cells(html, "Questions answered right, in percent")
    assert one_seed["BridgeTower \u2212 METER"] == ["+12.5"] * 2


def test_without_matching_head():
    results = {
        n: value
        for n, value in made_up.metrics().items()
        if not n.startswith(("matching", "two_stage", "itm"))
    }
    page = ReportPage(
        report_html(
            made_up.results(
                *(
                    made_up.demo_run(arm, test={"shapes": results})
                    for arm in ("bridgetower", "meter")
                )
            )
        )
    )
    assert "Matching was not measured" in page.text
    assert "METER, contrastive" in page.text
    for text in ("weighs the matching score", "guessing is right in 50 %", "METER, two-stage"):
        assert text not in page.text


def test_nothing_is_loaded_and_tables_have_captions_and_heads(html, report_page):
    assert not {"script", "link", "iframe", "object", "base", "source"} & {
        tag for tag, _ in report_page.elements
    }
    for _, attributes in report_page.elements:
        for name in ("src", "href", "data", "poster", "action", "srcset", "xlink:href"):
            assert attributes.get(name, "#").startswith(("#", "data:image/")), attributes
    assert not [loading for loading in ("@import", "@font-face", "url(") if loading in html]
    assert len(report_page.all("table")) == len(report_page.all("caption")) == 8
    assert all(head.get("scope") for head in report_page.all("th"))


def test_every_text_is_escaped():
    bad = '<b onclick="alert(1)">&\'$title</script>'
    dataset = made_up.dataset(bad, split_rule=bad, sources={bad: bad}, licences={bad: bad})
    run = made_up.demo_run(test={bad: made_up.metrics()})
    settings = {bad: bad, "list": [bad]}
    of_results = {
        "tests": {bad: 50},
        "command": bad,
        "settings": settings,
        "versions": {bad: bad},
        "about": bad,
    }
    results = made_up.results(run, datasets=(dataset,), **of_results)
    searches = [
        made_up.search(direction, text=bad, answer=bad, rank=rank)
        for direction in ("text_to_image", "image_to_text")
        for rank in (1, 9)
    ]
    answers = [made_up.answer(bad, bad, bad), made_up.answer(bad, bad, "red")]
    html = report_html(results, searches={bad: searches}, answers=answers)
    page = ReportPage(html)
    assert bad not in html
    assert not any("onclick" in attributes for _, attributes in page.elements)
    assert page.text.count(bad) > 20
