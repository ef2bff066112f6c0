"""The page in a real Chromium: all that it can do, in both themes, in a narrow window, by keyboard and with a key."""

import base64
import random
import re
import shutil
from dataclasses import replace

import pytest
from PIL import Image

from bridgetower.checkpoints import Calibration, Gain, Reranking
from bridgetower.inference.attention import explain
from bridgetower.inference.predictor import load
from bridgetower.model.config import HeadsConfig
from bridgetower.reports.numbers import number, percent
from bridgetower.search.index import Index, Unrelated
from bridgetower.search.searcher import Searcher
from helpers.servers import PNGS, build_searcher, held_up_text_tower, start_server
from helpers.shapes import SHAPE_COLOURS, SHAPES_MODEL, write_shape_pictures, write_tiny_checkpoint
from helpers.sources import CLIP_SIZE, SUBTITLES, write_clip

LOOKS = {"light": ("light", 1200), "narrow-dark": ("dark", 400)}
TEXT = "red circle on black"
DECIDES = "What decides the match"
HOSTILE = "<img src=x onerror=\"document.title='owned'\">"
EXPECTED_FAILURE = "Failed to load resource: the server responded with a status of 4"

COUNT_VIDEOS = """() => {
  const {createObjectURL, revokeObjectURL} = URL;
  window.videos = 0;
  window.heldVideos = new Set();
  URL.createObjectURL = content => {
    const url = createObjectURL.call(URL, content);
    if (content.type.startsWith("video/")) { window.videos += 1; window.heldVideos.add(url); }
    return url;
  };
  URL.revokeObjectURL = url => { window.heldVideos.delete(url); revokeObjectURL.call(URL, url); };
}"""

DROP = """([content, name, kind, event]) => {
  const bytes = Uint8Array.from(atob(content), letter => letter.charCodeAt(0));
  const data = new DataTransfer();
  data.items.add(new File([bytes], name, {type: kind}));
  const options = {bubbles: true, cancelable: true};
  document.body.dispatchEvent(event === "paste"
    ? new ClipboardEvent(event, {...options, clipboardData: data})
    : new DragEvent(event, {...options, dataTransfer: data}));
}"""


@pytest.fixture(scope="module")
def page_searcher(tiny_dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    heads = HeadsConfig(
        itc="tower", itc_size=8, vqa=len(SHAPE_COLOURS), snli_ve=True, nlvr2=True, classification=2
    )
    model = replace(
        SHAPES_MODEL, heads=heads, fusion=replace(SHAPES_MODEL.fusion, num_token_types=3)
    )
    names = {"vqa": SHAPE_COLOURS, "classification": ("shape", "bar")}
    predictor = load(
        write_tiny_checkpoint(tiny_dataset, folder / "model", model, names), device="cpu"
    )
    return build_searcher(write_shape_pictures(folder), predictor)


@pytest.fixture(scope="module")
def page_predictor(page_searcher):
    return page_searcher.predictor


@pytest.fixture(scope="module")
def first_image(page_searcher):
    return page_searcher.index.root / "00.png"


@pytest.fixture(scope="module")
def page_server(page_searcher):
    with start_server(page_searcher.predictor, page_searcher, name="shapes", page=True) as server:
        yield server


@pytest.fixture
def open_page(browsed, page_server):
    def page_in(look="light", link="", running=page_server):
        scheme, width = LOOKS[look]
        settings = {"color_scheme": scheme, "viewport": {"width": width, "height": 900}}
        return browsed(
            str(running.client.base_url), f"/{link}", expected=EXPECTED_FAILURE, **settings
        )

    return page_in


def type_search(page, text):
    page.get_by_label("Describe the image").fill(text)
    page.get_by_label("Describe the image").press("Enter")


def settled(page, section="search"):
    state = page.locator(f"#{section}-state")
    state.locator("p.note:not(.busy):not(:empty), .problem").first.wait_for()
    return str(state.inner_text())


def card_paths(page):
    return list(page.locator("#hits .path").evaluate_all("all => all.map(path => path.title)"))


def until(holds, page):
    """Waits for something on the page. `wait_for_function` would need what its policy forbids."""
    for _ in range(3000):  # a minute, as long as the driver waits elsewhere
        if holds():
            return
        page.wait_for_timeout(20)
    pytest.fail("the page did not get there within a minute")


def check_hits(page, hits):
    """The gallery has these hits with their ranks and images. Right after a click it still has the hits of before."""
    until(lambda: card_paths(page) == [hit.path for hit in hits], page)
    until(lambda: page.locator("#hits img").count() == len(hits), page)
    cards = page.locator("#hits li").evaluate_all("""cards => cards.map(card => [
      card.querySelector(".rank").lastChild.data, card.querySelector("img").naturalWidth
    ])""")
    assert cards == [[str(rank), hit.width] for rank, hit in enumerate(hits, start=1)]


def result_rows(page):
    table_rows = page.locator("#result tr").all()
    return [
        (row.locator("th").inner_text(), row.locator(".number").inner_text().replace("\xa0", " "))
        for row in table_rows
    ]


def use(page, name, label, text, button):
    page.get_by_role("radio", name=name, exact=True).check(force=True)
    page.get_by_label(label, exact=True).fill(text)
    page.get_by_role("button", name=button, exact=True).click()
    assert settled(page, "playground").startswith("Answered by shapes.")
    return result_rows(page)


def shown_choices(choices):
    return [(choice.label, percent(choice.probability)) for choice in choices]


def test_probabilities_only_with_a_calibration_and_matching_as_validation_found(
    open_page, page_searcher, page_predictor, monkeypatch
):
    calibration = Calibration(
        slope=0.5, intercept=-2.0, pairs=9, matching=1, ece_before=0.4, ece_after=0.1
    )
    gain = Gain(difference=0.0, low=-0.01, high=0.01, texts=9)
    monkeypatch.setattr(page_predictor, "reranking", Reranking(calibration=calibration, gain=gain))
    nearest = page_searcher.search(TEXT, top=1)[0]
    expected = page_searcher.search(TEXT, top=24, rerank=64)
    with open_page(link=f"#search?q={TEXT}") as page:
        assert "nearest first" in settled(page)
        dialog = page.get_by_role("dialog")
        page.locator(".card").first.click()
        assert dialog.locator("dt").all_inner_texts() == [
            f"Cosine\n{number(nearest.cosine, digits=3)}"
        ]
        page.keyboard.press("Escape")
        page.get_by_text("Options").click()
        page.get_by_label("Rerank").select_option("the 64 nearest images")
        page.get_by_role("button", name="Search", exact=True).click()
        until(lambda: "best first" in settled(page), page)
        check_hits(page, expected)
        page.locator(".card").first.click()
        assert percent(expected[0].probability or 0) in dialog.locator(
            "dt"
        ).first.inner_text().replace("\xa0", " ")
        page.keyboard.press("Escape")
        assert "rerank=64" in page.url


@pytest.mark.parametrize("look", LOOKS)
def test_all_that_it_does(open_page, page_searcher, page_predictor, first_image, look):
    with open_page(look) as page:
        page.get_by_text("45 images can be searched").wait_for()
        check_theme(page, look, ("#search-intro", ".how li", ".chips button"))
        check_no_scrolling_sideways(page)
        page.get_by_text("Options").click()
        page.get_by_label("Only where").fill('{"path": {"lt": "20.png"}}')
        type_search(page, TEXT)
        assert settled(page).startswith("20 images, best first")
        check_hits(page, page_searcher.search(TEXT, top=24, where="path < '20.png'"))
        check_no_scrolling_sideways(page)
        check_theme(page, look, (".card .path", "#search-state p"))
        page.get_by_role("link", name="Playground", exact=True).click()
        page.locator("#first-image input[type=file]").set_input_files(first_image)
        if look == "light":
            check_uses(page, page_predictor, first_image)
        check_heat_maps(page, page_predictor, first_image)
        check_no_scrolling_sideways(page)
        check_theme(page, look, ("#maps .note", "#maps small", ".tiles .told", "#use-help"))


def check_uses(page, predictor, image):
    answers = use(page, "Ask", "Question", "which colour?", "Ask")
    assert answers == shown_choices(predictor.answer(image, "which colour?", top=5))
    matched = use(page, "Match", "Texts, one per line", f"{TEXT}\na bar\n", "Match")
    scores = zip(
        (TEXT, "a bar"),
        predictor.match(image, [TEXT, "a bar"], all_pairs=True)[0].tolist(),
        strict=True,
    )
    assert matched == [
        (text, f"score {number(score, digits=3)}")
        for text, score in sorted(scores, key=lambda row: -row[1])
    ]
    filled = use(
        page,
        "Fill in",
        "Text with <mask> where a word is missing",
        "red <mask> on black",
        "Fill in",
    )
    (words,) = predictor.fill_mask(image, "red <mask> on black", top=5)
    assert filled == [(word.word, percent(word.probability)) for word in words]
    labelled = use(page, "Label", "Labels, one per line", f"{TEXT}\na bar", "Label")
    assert labelled == shown_choices(predictor.classify(image, labels=[TEXT, "a bar"]))
    classified = use(page, "Classify", "Text beside the image, if there is one", "", "Classify")
    assert classified == shown_choices(predictor.classify(image))
    checked = use(page, "Check", "Statement", "it is red", "Check")
    assert checked == shown_choices(predictor.entail(image, "it is red"))
    page.get_by_role("radio", name="Compare two", exact=True).check(force=True)
    page.locator("#second-image input[type=file]").set_input_files(image.with_name("01.png"))
    compared = use(page, "Compare two", "Statement about both images", "both are red", "Judge")
    assert compared == shown_choices(
        predictor.reason(image, image.with_name("01.png"), "both are red")
    )


def check_heat_maps(page, predictor, image):
    """Of Grad-CAM, the last layer has a map of the class token alone: those of the words are equal."""
    for method, label, description in (
        ("attention", "Attention", "attention"),
        ("gradcam", DECIDES, "Grad-CAM"),
    ):
        use(page, label, "Text", TEXT, "Show")
        expected = explain(predictor, image, TEXT, method=method)
        assert f"match with score {expected.score:.3f}" in page.locator(
            "#maps"
        ).inner_text().replace("\xa0", " ")
        drawn = set()
        for layer in range(len(expected.maps)):
            page.get_by_role("slider").fill(str(layer + 1))
            for index, word in enumerate(expected.words):
                page.locator(".words").get_by_role("button", name=word, exact=True).nth(0).click()
                name = f"{description} of “{word}” in layer {layer + 1}"
                drawn.add(
                    page.get_by_role("img", name=name, exact=True).evaluate(
                        "canvas => canvas.toDataURL()"
                    )
                )
                tile = page.locator(".tiles li").nth(index).inner_text().replace("\xa0", " ")
                assert percent(float(expected.prefix_shares[layer, index])) in tile
        different = len({image.numpy().tobytes() for image in expected.maps.flatten(0, 1)})
        assert len(drawn) == different > len(expected.words)


def check_no_scrolling_sideways(page):
    width, window = page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
    assert width <= window


def check_theme(page, look, selectors):
    """Text stands out from its ground, which is dark in the dark theme."""
    ground_of = """element => {
      const clear = colour => colour === "rgba(0, 0, 0, 0)";
      let ground = element;
      while (clear(getComputedStyle(ground).backgroundColor)) ground = ground.parentElement;
      return [getComputedStyle(element).color, getComputedStyle(ground).backgroundColor];
    }"""
    for selector in selectors:
        ink, ground = map(
            luminance, page.locator(selector).locator("visible=true").first.evaluate(ground_of)
        )
        assert (ground < 0.2) == ("dark" in look), selector
        assert (max(ink, ground) + 0.05) / (min(ink, ground) + 0.05) >= 4.5, (
            selector
        )  # WCAG, level AA


def luminance(colour):
    """Relative luminance of `rgb(…)`, as WCAG defines it."""
    channels = [float(channel) / 255 for channel in re.findall(r"[\d.]+", colour)[:3]]
    linear = [
        channel / 12.92 if channel <= 0.04045 else ((channel + 0.055) / 1.055) ** 2.4
        for channel in channels
    ]
    return sum(
        share * channel for share, channel in zip((0.2126, 0.7152, 0.0722), linear, strict=True)
    )


def test_a_moment_plays_from_its_start_or_is_shown_as_its_frame(
    open_page, page_predictor, tmp_path
):
    """With a key, which an address of a video cannot carry."""
    (tmp_path / "talks").mkdir()
    write_clip(tmp_path / "talks" / "talk.webm", codec="libvpx-vp9", keyframes=5)
    (tmp_path / "talks" / "talk.srt").write_text(SUBTITLES, encoding="utf-8")
    write_clip(tmp_path / "talks" / "old.avi", codec="mpeg4")
    searcher = build_searcher(tmp_path / "talks", page_predictor)
    with (
        start_server(page_predictor, searcher, page=True, api_key="secret") as running,
        open_page(running=running) as page,
    ):
        page.get_by_label("API key").fill("secret")
        page.get_by_label("API key").press("Enter")
        page.get_by_text("images can be searched").wait_for()
        page.evaluate(COUNT_VIDEOS)
        type_search(page, "a red square")
        settled(page)
        page.locator(".card", has_text="talk.webm, 0:03\u20130:05").click()
        dialog = page.get_by_role("dialog")
        video = dialog.locator("video")
        until(lambda: video.evaluate("video => video.readyState") >= 2, page)
        assert video.evaluate("video => video.currentTime") == pytest.approx(3.5, abs=0.3)
        assert video.evaluate("video => video.videoWidth") == CLIP_SIZE[0]
        page.keyboard.press("Escape")
        dialog.wait_for(state="hidden")
        # the event of closing comes a little later
        until(lambda: page.locator("video").count() == 0, page)
        # it is played from its address, not downloaded
        assert page.evaluate("[videos, heldVideos.size]") == [
            0,
            0,
        ]
        page.locator(".card", has_text="old.avi").first.click()
        dialog.locator("img").wait_for()  # no browser plays it


def test_an_image_of_the_index_that_is_too_large_is_sent_smaller(
    open_page, page_predictor, tmp_path
):
    (tmp_path / "scans").mkdir()
    noise = Image.frombytes("RGB", (560, 540), random.Random(0).randbytes(3 * 560 * 540))
    noise.save(tmp_path / "scans" / "scan.png")
    assert 2**20 / 4 * 3 < (tmp_path / "scans" / "scan.png").stat().st_size < 2**20
    searcher = build_searcher(tmp_path / "scans", page_predictor)
    with (
        start_server(page_predictor, searcher, page=True, max_body=1) as running,
        open_page(running=running) as page,
    ):
        type_search(page, "noise")
        settled(page)
        page.locator(".card").click()
        page.get_by_role("link", name="Find similar").click()
        until(lambda: "nearest first" in settled(page), page)
        assert card_paths(page) == ["scan.png"]


def test_examples_of_the_index_can_be_clicked(open_page, page_searcher):
    with open_page() as page:
        text = page.locator("#queries button").first.inner_text()
        page.locator("#queries button").first.click()
        settled(page)
        check_hits(page, page_searcher.search(text, top=24))
        page.get_by_role("link", name="Search", exact=True).click()
        example = page.locator("#examples button").nth(3)
        example.wait_for()
        path = example.get_attribute("title")
        example.click()
        assert settled(page).startswith("24 images, nearest first")
        check_hits(page, page_searcher.search(image=page_searcher.index.root / path, top=24))
        page.get_by_role("link", name="Playground", exact=True).click()
        page.locator("#bench-examples button").first.click()
        assert use(page, "Ask", "Question", "which colour?", "Ask")


def test_an_image_is_dropped_or_pasted(open_page, page_searcher, page_predictor):
    drops = [
        (content, [base64.b64encode(content).decode(), "mine.png", "image/png", event])
        for content, event in zip(PNGS, ("drop", "paste"), strict=False)
    ]
    with open_page() as page:
        page.locator("#queries button").first.wait_for()
        for content, dropped in drops:
            page.evaluate(DROP, dropped)
            check_hits(page, page_searcher.search(image=content, top=24))
            assert "Your own image is not part of the link." in settled(page)
        page.get_by_role("link", name="Playground", exact=True).click()
        until(lambda: page.title() == "Playground · BridgeTower", page)
        for content, dropped in drops:
            page.evaluate(DROP, dropped)
            assert use(page, "Ask", "Question", "which?", "Ask") == shown_choices(
                page_predictor.answer(content, "which?", top=5)
            )


def test_dialog_by_keyboard(open_page, page_searcher):
    hits = page_searcher.search(TEXT, top=24)
    with open_page() as page:
        page.locator("#queries button").first.wait_for()

        def tab_to(description, matches):
            for _ in range(80):
                page.keyboard.press("Tab")
                if page.evaluate(
                    f"(() => {{ const it = document.activeElement; return {matches} }})()"
                ):
                    return
            pytest.fail(f"no way to {description}")

        tab_to("the query", "it.id === 'query'")
        page.keyboard.type(TEXT)
        page.keyboard.press("Enter")
        settled(page)
        tab_to("the first hit", "it.className === 'card'")
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
        page.keyboard.press("ArrowRight")
        page.keyboard.press("Enter")
        dialog = page.get_by_role("dialog")
        check_dialog(dialog, hits, 1)
        page.keyboard.press("ArrowRight")
        check_dialog(dialog, hits, 2)
        page.keyboard.press("ArrowLeft")
        page.keyboard.press("ArrowLeft")
        check_dialog(dialog, hits, 0)
        assert hits[0].digest in page.url
        page.keyboard.press("Escape")
        dialog.wait_for(state="hidden")
        focused = "document.activeElement.querySelector('.path')?.title"
        # the browser first restores the focus of before
        until(lambda: page.evaluate(focused) == hits[0].path, page)
        assert "open=" not in page.url
        tab_to("the views", "it.id === 'to-playground'")
        page.keyboard.press("Enter")
        tab_to("the uses", "it.type === 'radio'")
        page.keyboard.press("ArrowRight")
        assert page.get_by_role("radio", name="Match", exact=True).is_checked()
        tab_to("the text", "it.id === 'text'")
        page.keyboard.type("a bar")
        tab_to("an image of the index", "it.matches('#bench-examples button')")
        page.keyboard.press("Enter")
        assert settled(page, "playground").startswith("Answered by shapes.")


def check_dialog(dialog, hits, index):
    hit = hits[index]
    dialog.get_by_text(f"{index + 1} of {len(hits)}", exact=True).wait_for()
    assert dialog.get_by_role("heading").first.inner_text() == hit.path
    text = dialog.inner_text().replace("\xa0", " ")
    assert f"score {hit.score:.3f}" in text
    assert number(hit.cosine, digits=3) in text
    assert dialog.locator("#viewer-captions li").all_inner_texts() == list(hit.captions)
    dialog.locator("#viewer-image img").wait_for()
    assert dialog.locator("#viewer-image img").get_attribute("alt") == hit.captions[0]


def test_damaged_links_are_told_in_words(open_page):
    with open_page() as page:
        for link, words in (
            *(
                (f"#search?q={text}", "The link is damaged")
                for text in ("%E0%A4%A", "100%", "a" * 300_000)
            ),
            ("#playground?text=%zz", "The link is damaged"),
            ("#search?q=" + "a" * 30_000, "The server cannot use this"),
            ("#search?where=" + "(" * 1000 + "&q=a", "The condition cannot be read"),
        ):
            page.evaluate("link => { location.hash = link }", link)
            page.get_by_role("alert").filter(has_text=words).first.wait_for()
            page.evaluate("location.hash = '#search'")
            page.locator("#queries button").first.wait_for()
            until(lambda: page.get_by_role("alert").count() == 0, page)


def test_links_that_mean_nothing_show_the_page(open_page):
    examples = "#queries button, #bench-examples button"
    with open_page(link="#constructor") as page:
        for link in (
            *(
                "#toString?n=3",
                "#__proto__",
                "#playground?use=help",
                "#playground?use=__proto__",
                "#&&&===???",
                "#?#?#",
            ),
            *(
                "#search?n=99999999999999999999&against=constructor",
                "#playground?use[]=ask&image=x&image=y",
            ),
        ):
            page.locator(examples).locator("visible=true").first.wait_for()
            assert page.get_by_role("alert").count() == 0
            page.evaluate("link => { location.hash = link }", link)
            page.reload()
        page.locator(examples).locator("visible=true").first.wait_for()
        assert page.get_by_role("alert").count() == 0


def test_a_link_restores_a_result(open_page, page_searcher, page_predictor):
    hits = page_searcher.search(
        "red bar", top=12, where="path > '20.png'", image=page_searcher.index.root / "03.png"
    )
    like = page_searcher.search(image=page_searcher.index.root / "03.png", top=1)[0].digest
    where = "%7B%22path%22%3A+%7B%22gt%22%3A+%2220.png%22%7D%7D"  # {"path": {"gt": "20.png"}}
    link = f"#search?q=red+bar&like={like}&n=12&where={where}&open={hits[2].digest}"
    with open_page(link=link) as page:
        check_dialog(page.get_by_role("dialog"), hits, 2)
        page.keyboard.press("Escape")
        check_hits(page, hits)
        page.locator("#hits button").nth(2).click()
        page.get_by_role("link", name="Attention map").click()
        page.locator("#maps canvas").first.wait_for()
        address = page.url
        assert hits[2].digest in address
        page.go_back()
        check_dialog(page.get_by_role("dialog"), hits, 2)
        page.get_by_role("link", name="Find similar").click()
        settled(page)
        check_hits(page, page_searcher.search(image=hits[2].file, top=24))
    with open_page(link=address.partition("/#")[2].join(["#", ""])) as page:
        page.locator("#maps canvas").first.wait_for()
        assert page.locator(".words button").all_inner_texts() == ["red", "bar"]
    with open_page(link="#search?like=../../etc/passwd&open=x&n=7&against=nothing") as page:
        page.locator("#queries button").first.wait_for()  # nothing that a link cannot mean is asked


def test_a_newer_request_ends_the_older(open_page, page_searcher, page_predictor):
    with open_page() as page, held_up_text_tower(page_predictor) as gate:
        page.locator("#queries button").first.wait_for()
        type_search(page, "a bar")
        page.locator("#search-state .busy").wait_for()
        page.get_by_role("button", name="Cancel").click()
        assert "Cancelled." in settled(page)
        type_search(page, "a circle")
        page.locator("#search-state .busy").wait_for()
        type_search(page, "blue square")
        gate.set()
        assert settled(page).startswith("24 images")
        check_hits(page, page_searcher.search("blue square", top=24))
        assert "q=blue+square" in page.url


def test_what_cannot_be_done_is_told(open_page, first_image, tmp_path):
    (tmp_path / "none.png").write_bytes(b"no image")
    (tmp_path / "drawing.svg").write_text(
        '<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>'
    )

    def problem():
        return str(page.get_by_role("alert").locator("visible=true").inner_text())

    with open_page() as page:
        page.get_by_role("button", name="Search", exact=True).click()
        assert "Type what should be seen, or add an image." in problem()
        page.get_by_text("Options").click()
        page.get_by_label("Only where").fill('{"digest": {"eq": "a"}}')
        type_search(page, "a bar")
        page.get_by_text("'digest' is no column").wait_for()
        assert "The server cannot use this" in problem()
        page.get_by_label("Only where").fill('{"width": {"gt": 1000}}')
        type_search(page, "a bar")
        page.get_by_text("No image meets the condition").wait_for()
        page.get_by_role("link", name="Playground", exact=True).click()
        page.get_by_role("radio", name="Fill in", exact=True).check(force=True)
        page.get_by_role("button", name="Fill in", exact=True).click()
        assert "Give an image and a text" in problem()
        page.get_by_label("Text with <mask>").fill("a bar")
        for name, message in (
            ("none.png", "cannot be read as an image"),
            ("drawing.svg", "cannot be read as an image"),
            (first_image, "put <mask> where a word is missing"),
        ):
            page.locator("#first-image input[type=file]").set_input_files(tmp_path / name)
            page.get_by_role("button", name="Fill in", exact=True).click()
            page.get_by_text(message).wait_for()
            assert "truncate" not in problem()


@pytest.mark.parametrize(
    ("status", "code", "title", "again"),
    [
        (400, "invalid_value", "The server cannot use this", False),
        (404, "no_images", "The images cannot be opened", False),
        (404, "no_image", "There is no such thing here", False),
        (408, "request_timeout", "It took too long to send", True),
        (413, "request_too_large", "This is too large", False),
        (429, "queue_full", "The server is busy", True),
        (500, "internal_error", "The server failed", False),
        (503, "index_unavailable", "The index cannot be read", True),
        (503, "not_ready", "The server is not ready yet", True),
        (503, "timeout", "There was no answer in time", True),
        (503, None, "The server is not available", True),
        (504, None, "There was no answer in time", True),
        (None, None, "The server cannot be reached", True),
    ],
)
def test_an_error_is_titled_by_what_it_is(browsed, page_server, status, code, title, again):
    """Without a code a proxy answers. Without a status nothing does."""

    def answer(route):
        if status is None:
            route.abort()
        elif code is None:
            route.fulfill(status=status, body="<html>")
        else:
            route.fulfill(status=status, json={"error": {"message": "the reason", "code": code}})

    with browsed(str(page_server.client.base_url), expected="Failed to load resource") as page:
        page.locator("#queries button").first.wait_for()
        page.route("**/v1/search", answer)
        type_search(page, TEXT)
        alert = page.get_by_role("alert")
        assert alert.locator("strong").inner_text() == title
        assert ("the reason" in alert.inner_text()) == (code is not None)
        assert alert.get_by_role("button", name="Try again").count() == again
        page.unroute("**/v1/search")
        if again:
            alert.get_by_role("button", name="Try again").click()
            until(lambda: "24 images" in settled(page), page)


def test_weak_hits_are_marked(open_page, page_searcher, tmp_path):
    shutil.copytree(page_searcher.index.uri, tmp_path / "copy.lance")
    index = Index(tmp_path / "copy.lance", root=page_searcher.index.root)
    cosines = sorted(hit.cosine for hit in page_searcher.search(TEXT, rerank=0, top=24))
    index.set_unrelated(Unrelated(rows=45, images=cosines[9]))
    separate = Searcher(index, page_searcher.predictor)
    with (
        start_server(page_searcher.predictor, separate, page=True) as running,
        open_page(running=running) as page,
    ):

        def weak():
            return page.locator(".card").evaluate_all(
                "cards => cards.map(card => card.querySelector('.weak') !== null)"
            )

        type_search(page, TEXT)
        assert "weak" not in settled(page)
        assert weak() == [hit.weak for hit in separate.search(TEXT, top=24)]
        assert 0 < sum(weak()) < 24
        page.locator(".card:has(.weak)").first.click()
        dialog = page.get_by_role("dialog")
        assert (
            "one in twenty unrelated texts finds an image that is just as near"
            in dialog.inner_text()
        )
        page.keyboard.press("Escape")
        index.set_unrelated(Unrelated(rows=45, images=1.0))
        # the server looks once a second
        until(lambda: (separate.index.unrelated or index.unrelated).images == 1.0, page)
        type_search(page, "a bar")
        until(
            lambda: (
                "All are weak: unrelated texts find images that are just as near" in settled(page)
            ),
            page,
        )
        assert weak() == [True] * 24
        page.locator(".card").first.click()
        page.get_by_role("link", name="Find similar").click()
        until(lambda: "nearest first" in settled(page), page)
        assert weak() == [False] * 24


def test_typing_begins_a_query(open_page):
    with open_page() as page:
        page.locator("#queries button").first.wait_for()
        page.keyboard.type("red bar")
        assert page.get_by_label("Describe the image").input_value() == "red bar"


def test_texts_of_strangers_stay_texts(open_page, page_predictor, tmp_path):
    name = "<img src=x onerror=alert(1)>.png"
    shutil.copy(write_shape_pictures(tmp_path).parent / "00.png", tmp_path / name)
    (tmp_path / "hostile.csv").write_text(
        'image,caption\n"' + name + '","' + HOSTILE.replace('"', '""') + '"\n'
    )
    searcher = build_searcher(tmp_path / "hostile.csv", page_predictor, truncate=True)
    with (
        start_server(page_predictor, searcher, name=HOSTILE, page=True) as running,
        open_page(running=running) as page,
    ):
        page.locator("#queries button", has_text=HOSTILE).click()
        settled(page)
        type_search(page, "a bar")
        settled(page)
        page.locator("#hits button").click()
        dialog = page.get_by_role("dialog")
        assert dialog.locator("#viewer-captions li").all_inner_texts() == [HOSTILE]
        assert dialog.get_by_role("heading").first.inner_text() == name
        page.keyboard.press("Escape")
        page.get_by_role("link", name="Playground", exact=True).click()
        page.get_by_role("radio", name="Match", exact=True).check(force=True)
        page.locator("#bench-examples button").click()
        page.get_by_label("Texts, one per line").fill("<b>a</b>")
        page.get_by_role("button", name="Match", exact=True).click()
        settled(page, "playground")
        assert [text for text, _ in result_rows(page)] == ["<b>a</b>"]
        assert HOSTILE in page.locator("#about").inner_text()
        assert page.locator("img[onerror], b").count() == 0
        assert page.title() == "Playground · BridgeTower"


def test_the_policy_stops_what_markup_could_do(chromium, page_server):
    page = chromium.new_page()
    messages = []
    page.on("console", lambda message: messages.append(message.text))
    page.goto(str(page_server.client.base_url))
    page.locator("#queries button").first.wait_for()
    page.evaluate(
        "markup => document.body.insertAdjacentHTML('beforeend', markup)",
        HOSTILE + "<p style='color: red'>",
    )
    page.evaluate(
        "document.body.append(Object.assign(document.createElement('script'), {text: 'document.title = 1'}))"
    )
    until(lambda: page.evaluate("document.querySelector('img[src=x]').complete"), page)
    assert page.title() == "Search · BridgeTower"
    assert all(any(rule in text for text in messages) for rule in ("script-src", "style-src"))
    page.close()


def test_a_key_is_asked_for(open_page, page_searcher):
    secret = {"page": True, "api_key": "sesame open"}
    with (
        start_server(page_searcher.predictor, page_searcher, **secret) as running,
        open_page(running=running) as page,
    ):
        field = page.get_by_label("API key")
        field.fill("sesame")
        field.press("Enter")
        page.get_by_text("The server does not take this key.").wait_for()
        field.fill("sesame open")
        field.press("Enter")
        page.get_by_text("45 images can be searched").wait_for()
        type_search(page, TEXT)
        settled(page)
        check_hits(page, page_searcher.search(TEXT, top=24))
        page.reload()
        settled(page)
        check_hits(page, page_searcher.search(TEXT, top=24))
        assert page.evaluate("[sessionStorage.getItem('key'), localStorage.length]") == [
            "sesame open",
            0,
        ]
        page.get_by_role("button", name="Forget key").click()
        page.get_by_label("API key").wait_for()
        page.get_by_role("button", name="Cancel", exact=True).locator("visible=true").click()
        assert "the API key is missing or wrong" in page.get_by_role("alert").inner_text()


def test_the_theme_is_kept(open_page):
    with open_page() as page:
        page.locator("#queries button").first.wait_for()
        page.get_by_role("button", name="Dark theme").click()
        check_theme(page, "dark", ("#search-intro", ".how li"))
        page.reload()
        page.locator("#queries button").first.wait_for()
        check_theme(page, "dark", ("#search-intro", ".how li"))
        page.get_by_role("button", name="Light theme").click()
        check_theme(page, "light", ("#search-intro", ".how li"))


def test_what_the_server_lacks_is_not_offered(
    open_page, answering_checkpoint, tiny_checkpoint, tmp_path
):
    with (
        start_server(load(tiny_checkpoint, device="cpu"), page=True) as running,
        open_page(running=running) as page,
    ):
        page.get_by_role("heading", name="Ask about an image").wait_for()
        assert page.locator("#uses label").all_inner_texts() == [
            *("Match", "Fill in", "Label", "Attention"),
            DECIDES,
        ]
        assert not page.get_by_role("link", name="Search", exact=True).is_visible()
        assert not page.locator("#bench-examples-part").is_visible()
    answering = load(answering_checkpoint, device="cpu")
    with start_server(answering, page=True) as running, open_page(running=running) as page:
        page.get_by_role("heading", name="Ask about an image").wait_for()
        assert page.locator("#uses label").all_inner_texts() == [
            "Ask",
            "Check",
            "Compare two",
            "Attention",
        ]
        folder, name = answering_checkpoint.parts[-2:]  # and no more of the server's folders
        assert page.locator("#about").inner_text() == f"Model: {folder}/{name}"


def test_an_open_page_does_not_hold_up_the_end(chromium, page_searcher):
    with start_server(page_searcher.predictor, page_searcher, page=True) as server:
        page = chromium.new_page()
        page.goto(str(server.client.base_url))
        type_search(page, TEXT)
        settled(page)
        server.server.stop()
        server.thread.join(30)
        assert not server.thread.is_alive()
        page.close()
