"""The page in a real Chromium: every tab used, in both themes, in a narrow window, by keyboard, and offline."""

import html
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bridgetower.analysis.attention import explain
from bridgetower.analysis.formats import number, percent
from bridgetower.model.config import HeadsConfig
from bridgetower.predictor import Predictor, load
from bridgetower.search.build import build_index
from bridgetower.search.searcher import Searcher
from served import Running, started
from shapes import COLOURS, MODEL, write_pictures, write_tiny_checkpoint

pytest.importorskip("gradio")
playwright = pytest.importorskip("playwright.sync_api")

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
LOOKS = {"light": ("light", 1200), "dark": ("dark", 1200), "narrow": ("light", 400), "narrow-dark": ("dark", 400)}
TEXT = "red circle on black"


@pytest.fixture(scope="module")
def searcher(tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Searcher:
    """The small model with every head that the page asks, and an index of pictures of shapes."""
    folder = tmp_path_factory.mktemp("page")
    model = replace(MODEL, heads=HeadsConfig(itc="tower", itc_size=8, vqa=len(COLOURS)))
    checkpoint = write_tiny_checkpoint(tiny_dataset, folder / "model", model, {"vqa": COLOURS})
    predictor = load(checkpoint, device="cpu")
    build_index(write_pictures(folder), folder / "shapes.lance", predictor)
    return Searcher(folder / "shapes.lance", predictor)


@pytest.fixture(scope="module")
def predictor(searcher: Searcher) -> Predictor:
    return searcher.predictor


@pytest.fixture(scope="module")
def picture(searcher: Searcher) -> Path:
    return searcher.index.root / "00.png"


@pytest.fixture(scope="module")
def server(searcher: Searcher) -> Iterator[Running]:
    with started(searcher.predictor, searcher, name="shapes", page=True) as found:
        yield found


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """A browser: one of the system, or Playwright's own."""
    installed = next(filter(None, map(shutil.which, NAMES)), None)
    with playwright.sync_playwright() as driver:
        if installed is None and not Path(driver.chromium.executable_path).exists():
            pytest.skip("NO CHROMIUM, THE PAGE IS NOT TESTED: apt-get install chromium, or playwright install chromium")
        browser = driver.chromium.launch(executable_path=installed)
        yield browser
        browser.close()


@pytest.fixture
def opened(chromium: Any, server: Running, tmp_path: Path) -> Callable[..., Any]:
    """Opens the page; when it is left, a screenshot is kept and nothing may have gone wrong or left this machine."""

    @contextmanager
    def page_in(look: str) -> Iterator[Any]:
        scheme, width = LOOKS[look]
        context = chromium.new_context(color_scheme=scheme, viewport={"width": width, "height": 900})
        page = context.new_page()
        asked: list[str] = []
        wrong: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        address = str(server.client.base_url)
        page.goto(address)
        page.get_by_role("button", name="Search", exact=True).wait_for()
        yield page
        page.screenshot(path=tmp_path / f"{look}.png", full_page=True)
        context.close()
        assert len(asked) > 10
        assert not [url for url in asked if not url.startswith((address, "data:", "blob:"))]
        assert not wrong

    return page_in


def open_tab(page: Any, name: str) -> Any:
    """Goes to a tab, in a narrow window through the menu of those that found no room; returns its panel."""
    tab = page.get_by_role("tab", name=name, exact=True)
    if tab.is_visible():
        tab.click()
    else:
        page.locator(".overflow-menu > button").click()
        page.locator(".overflow-dropdown").get_by_text(name, exact=True).click()
    return page.get_by_role("tabpanel").locator("visible=true")


def use(panel: Any, picture: Path, label: str, text: str, button: str) -> Any:
    """Fills in a tab and presses its button; returns what is shown."""
    panel.locator("input[type=file]").set_input_files(picture)
    panel.locator("img").first.wait_for()
    panel.get_by_label(label).fill(text)
    panel.get_by_role("button", name=button, exact=True).click()
    shown = panel.locator(".bt-result").last
    shown.locator(".bt-ranking, .bt-tiles, .bt-cards, .bt-problem").first.wait_for()
    return shown


def rows(shown: Any) -> list[tuple[str, str]]:
    found = re.findall(r'<th scope="row">(.*?)</th><td class="bt-number">(.*?)</td>', shown.inner_html())
    return [(html.unescape(name), html.unescape(value).replace("\xa0", " ")) for name, value in found]


@pytest.mark.parametrize("look", LOOKS)
def test_every_tab(
    opened: Any, searcher: Searcher, predictor: Predictor, picture: Path, look: str, tmp_path: Path
) -> None:
    with opened(look) as page:
        check_search(page, searcher)
        check_no_scrolling_sideways(page)
        page.screenshot(path=tmp_path / "search.png", full_page=True)
        shown = use(open_tab(page, "Ask"), picture, "Question", "which colour?", "Ask")
        answers = predictor.answer(picture, "which colour?", top=5)
        assert rows(shown) == [(answer.label, percent(answer.probability)) for answer in answers]
        page.screenshot(path=tmp_path / "ask.png", full_page=True)
        shown = use(open_tab(page, "Match"), picture, "Texts, one per line", f"{TEXT}\na bar", "Match")
        scores = dict(zip((TEXT, "a bar"), predictor.match(picture, [TEXT, "a bar"], all_pairs=True)[0], strict=True))
        expected = sorted(scores.items(), key=lambda row: -row[1])
        assert rows(shown) == [(text, percent(float(score))) for text, score in expected]
        check_no_scrolling_sideways(page)
        shown = use(open_tab(page, "Fill the mask"), picture, "Text with <mask>", "red <mask> on black", "Fill")
        (words,) = predictor.fill_mask(picture, "red <mask> on black", top=5)
        assert rows(shown) == [(word.word, percent(word.probability)) for word in words]
        check_heat_maps(page, predictor, picture)
        check_no_scrolling_sideways(page)
        check_theme(page, look)


def check_search(page: Any, searcher: Searcher) -> None:
    """Text and condition find what the searcher finds, with thumbnails and both scores."""
    panel = page.get_by_role("tabpanel").locator("visible=true")
    panel.get_by_text("Options").click()
    panel.get_by_label("Where").fill("path < '20.png'")
    panel.get_by_label("What should be seen").fill(TEXT)
    panel.get_by_label("What should be seen").press("Enter")
    cards = panel.locator(".bt-cards li")
    cards.first.wait_for()
    hits = searcher.search(TEXT, top=12, where="path < '20.png'")
    assert [card.locator(".bt-path").inner_text() for card in cards.all()] == [hit.path for hit in hits]
    for card, hit in zip(cards.all(), hits, strict=True):
        scores = [score.inner_text() for score in card.locator("dd").all()]
        assert scores == [percent(hit.probability or 0), number(hit.cosine, digits=3)]
        assert card.locator("img").evaluate("image => image.naturalWidth") == 24


def check_heat_maps(page: Any, predictor: Predictor, picture: Path) -> None:
    """There is a map for every word in every layer."""
    shown = use(open_tab(page, "See why"), picture, "Text", TEXT, "Show where each word looks")
    expected = explain(predictor, picture, TEXT)
    layers = shown.locator("section")
    assert layers.count() == len(expected.maps)
    for layer in layers.all():
        assert [word.inner_text() for word in layer.locator("strong").all()] == list(expected.words)
        assert {image.evaluate("image => image.naturalWidth") for image in layer.locator("img").all()} == {176}
    assert f"Matches with {percent(expected.probability or 0)}" in shown.inner_text()


def check_no_scrolling_sideways(page: Any) -> None:
    width, window = page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
    assert width <= window


def check_theme(page: Any, look: str) -> None:
    """Text stands out from its ground, which is dark in the dark theme."""
    colours = "element => [getComputedStyle(element).color, getComputedStyle(document.body).backgroundColor]"
    for place in (".bt-note", ".bt-tiles strong", ".bt-tiles span", ".bt-head h1", ".bt-head p"):
        ink, ground = map(luminance, page.locator(place).locator("visible=true").first.evaluate(colours))
        assert (ground < 0.2) == ("dark" in look)
        assert (max(ink, ground) + 0.05) / (min(ink, ground) + 0.05) >= 4.5, place  # WCAG, level AA


def luminance(colour: str) -> float:
    """Relative luminance of `rgb(…)`, as WCAG defines it."""
    parts = [float(part) / 255 for part in re.findall(r"[\d.]+", colour)[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(share * part for share, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_by_keyboard(opened: Any, predictor: Predictor, picture: Path) -> None:
    with opened("light") as page:

        def tab_to(description: str, matches: str) -> None:
            for _ in range(40):
                page.keyboard.press("Tab")
                if page.evaluate(f"(() => {{ const it = document.activeElement; return {matches} }})()"):
                    return
            pytest.fail(f"no way to {description}")

        page.get_by_role("tab", name="Search", exact=True).focus()
        tab_to("the tab", "it.role == 'tab' && it.innerText.trim() == 'Match'")
        page.keyboard.press("Enter")
        page.get_by_label("Texts, one per line").wait_for()
        tab_to("the upload", "it.tagName == 'BUTTON' && it.innerText.includes('Click to Upload')")
        with page.expect_file_chooser() as chooser:
            page.keyboard.press("Enter")
        chooser.value.set_files(picture)
        page.get_by_role("tabpanel").locator("visible=true").locator("img").first.wait_for()
        tab_to("the texts", "it.tagName == 'TEXTAREA'")
        page.keyboard.type("a bar")
        tab_to("the button", "it.tagName == 'BUTTON' && it.innerText.trim() == 'Match'")
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
        page.keyboard.press("Enter")
        shown = page.get_by_role("tabpanel").locator("visible=true").locator(".bt-result").last
        shown.locator(".bt-ranking").wait_for()
        assert rows(shown) == [("a bar", percent(float(predictor.match(picture, "a bar"))))]


def test_what_cannot_be_done_is_told(opened: Any, picture: Path) -> None:
    with opened("light") as page:
        panel = page.get_by_role("tabpanel").locator("visible=true")
        panel.get_by_role("button", name="Search", exact=True).click()
        assert "nothing to search for" in panel.get_by_role("alert").inner_text()
        shown = use(open_tab(page, "Fill the mask"), picture, "Text with <mask>", "a bar", "Fill")
        assert "put <mask> where a word is missing" in shown.get_by_role("alert").inner_text()


def test_an_open_page_does_not_hold_up_the_end(chromium: Any, searcher: Searcher) -> None:
    with started(searcher.predictor, searcher, page=True) as found:
        page = chromium.new_page()
        page.goto(str(found.client.base_url))
        page.get_by_label("What should be seen").fill(TEXT)
        page.get_by_role("button", name="Search", exact=True).click()
        page.locator(".bt-cards").wait_for()
        began = time.monotonic()
        found.server.should_exit = True
        found.thread.join(30)
        assert time.monotonic() - began < 5
        page.close()
