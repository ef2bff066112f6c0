"""Every route for images with texts is equal to the direct call, and what each refuses."""

import base64
import io
import resource
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from bridgetower.attention import explain
from bridgetower.predictor import Predictor
from bridgetower.serve import schemas
from bridgetower.serve.schemas import usage
from served import PNGS, TEXTS, URIS, Running, changed, error_of

Post = Callable[..., Any]
MASKED = ["a <mask> on <mask>", "<mask> bar", "a <mask>"]


def _most_memory() -> int:
    """Bytes that this process, which the server runs in, has had in memory at most."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@pytest.fixture
def both(both: Running) -> httpx.Client:
    return both.client


DIRECT: dict[str, tuple[dict[str, Any], str, Callable[[Predictor], Any], int]] = {
    "match": ({"texts": TEXTS}, "score", lambda model: model.match(PNGS, TEXTS).tolist(), 1),
    "fill-mask": ({"texts": MASKED, "top": 4}, "masks", lambda model: model.fill_mask(PNGS, MASKED, top=4), 1),
    "answer": ({"questions": TEXTS, "top": 3}, "answers", lambda model: model.answer(PNGS, TEXTS, top=3), 1),
    "entail": ({"statements": TEXTS}, "judgements", lambda model: model.entail(PNGS, TEXTS), 1),
    "reason": (
        {"images_2": URIS[::-1], "statements": TEXTS},
        "judgements",
        lambda model: model.reason(PNGS, PNGS[::-1], TEXTS),
        2,
    ),
}
"""By route: fields beside the images, field of the result, the direct call, and images for each text."""


def compared(found: Any, expected: Any) -> None:
    """Compares a result of any kind with that of the direct call."""
    if isinstance(found, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            compared(one, other)
    elif isinstance(found, dict):
        probability = vars(expected)["probability"]
        assert found == vars(expected) | {"probability": pytest.approx(probability, abs=1e-5)}
    else:
        assert found == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("use", DIRECT)
def test_equal_to_the_direct_call(both: httpx.Client, predictor: Predictor, answering: Predictor, use: str) -> None:
    body, field, call, num_images = DIRECT[use]
    model = predictor if use in ("match", "fill-mask") else answering
    answer = both.post(f"/v1/{use}", json={"images": URIS} | body).json()
    assert answer["model"] == ("tiny" if model is predictor else model.source)
    numbers = ("image", "text") if use == "match" else ("index",)
    assert [[row[name] for name in numbers] for row in answer["data"]] == [[row] * len(numbers) for row in range(3)]
    compared([row[field] for row in answer["data"]], call(model))
    texts = next(value for name, value in body.items() if name in ("texts", "questions", "statements"))
    tokens = sum(map(len, model.processor.token_ids(texts)))
    assert answer["usage"]["total_tokens"] == num_images * len(PNGS) * 5 + tokens


@pytest.mark.parametrize(
    ("use", "missing"),
    [
        ("match", "no matching (ITM) head"),
        ("fill-mask", "no masked-language (MLM) head"),
        ("answer", "no vqa head"),
        ("entail", "no snli_ve head"),
        ("reason", "no nlvr2 head"),
    ],
)
def test_a_model_without_the_head(client: httpx.Client, alone: Running, use: str, missing: str) -> None:
    without = alone.client if use in ("match", "fill-mask") else client
    error = error_of(without.post(f"/v1/{use}", json={"images": URIS} | DIRECT[use][0]), 400)
    assert error["code"] == "unsupported_by_model"
    assert missing in error["message"]


@pytest.mark.parametrize("top", [0, 101, "many", None])
def test_top(both: httpx.Client, top: object) -> None:
    body = {"images": URIS[0], "questions": "what?", "top": top}
    assert error_of(both.post("/v1/answer", json=body), 400)["param"] == "top"


def test_refused_statements(both: httpx.Client, alone: Running) -> None:
    def refused(path: str, **body: Any) -> dict[str, Any]:
        return error_of(both.post(path, json=body), 400)

    assert "3 images and 2 texts" in refused("/v1/entail", images=URIS, statements=TEXTS[:2])["message"]
    error = refused("/v1/reason", images=URIS, images_2=URIS[:2], statements=TEXTS)
    assert (error["param"], "3 images and 2 images_2" in error["message"]) == ("images_2", True)
    assert refused("/v1/reason", images=URIS[0], images_2="/etc/passwd", statements="a")["param"] == "images_2"
    assert refused("/v1/entail", images=URIS[0], statements="red circle " * 30)["param"] == "statements"
    error = error_of(alone.client.post("/v1/reason", json={"images": URIS} | DIRECT["reason"][0]), 413)
    assert error["message"] == "images: 6 items, the limit is 5; send several requests"


class TestMatch:
    def test_all_pairs(self, post: Post, predictor: Predictor) -> None:
        answer = post("/v1/match", images=URIS, texts=TEXTS[:2], all_pairs=True)
        assert [(row["image"], row["text"]) for row in answer["data"]] == [(i, t) for i in range(3) for t in range(2)]
        expected = predictor.match(PNGS, TEXTS[:2], all_pairs=True).flatten().tolist()
        assert [row["score"] for row in answer["data"]] == pytest.approx(expected, abs=1e-5)
        assert len({round(probability, 4) for probability in expected}) == 6

    def test_refusals(self, refused: Post) -> None:
        assert "3 images and 2 texts" in refused("/v1/match", images=URIS, texts=TEXTS[:2])["message"]
        error = refused("/v1/match", 413, images=[URIS[0]] * 33, texts=["a"] * 32, all_pairs=True)
        assert "1056 items, the limit is 1024" in error["message"]
        assert refused("/v1/match", images=URIS[0])["param"] == "texts"
        assert "at most 20000 characters" in refused("/v1/match", images=URIS[0], texts="a" * 20_001)["message"]
        assert refused("/v1/match", images=[URIS[0], "x"], texts=["a", "b"])["param"] == "images.1"

    def test_pairs_are_counted_before_any_is_built(self, client: httpx.Client) -> None:
        """9 and 16 million pairs, of which a list would take a gigabyte."""
        for number in (3000, 4096):
            before = _most_memory()
            letters = ["a"] * number
            response = client.post("/v1/match", json={"images": letters, "texts": letters, "all_pairs": True})
            assert f"images: {number**2} items, the limit is 1024" in error_of(response, 413)["message"]
            assert _most_memory() - before < 100 * 2**20


class TestFillMask:
    def test_no_mask(self, refused: Post) -> None:
        error = refused("/v1/fill-mask", images=URIS[:2], texts=["a <mask>", "a bar"])
        assert error["message"] == "texts: no mask in text 1; put <mask> where a word is missing"
        cut = refused("/v1/fill-mask", images=URIS[0], texts="red circle on black " * 30 + "<mask>", truncate=True)
        assert "no mask in text 0" in cut["message"]

    def test_no_more_words_than_can_be_answered_with(self, server: Running) -> None:
        with changed(server, max_items=2) as client:
            body = {"images": URIS[:2], "texts": ["<mask> bar", "<mask>"]}
            assert client.post("/v1/fill-mask", json=body | {"top": 100}).status_code == 200
            error = error_of(client.post("/v1/fill-mask", json=body | {"texts": MASKED[:2], "top": 100}), 413)
        assert error["message"] == "texts: 3 masks with 100 words each, the limit is 200 words; ask for fewer"

    def test_long_answers_are_built_in_a_thread(
        self, client: httpx.Client, predictor: Predictor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        threads: list[str] = []

        def noted(tokens: int) -> dict[str, int]:
            threads.append(threading.current_thread().name)
            return usage(tokens)

        monkeypatch.setattr(schemas, "usage", noted)
        for number, top in ((1, 1), (12, 100)):
            body = {"images": URIS[:1] * number, "texts": ["<mask> bar"] * number, "top": top}
            data = client.post("/v1/fill-mask", json=body).json()["data"]
            expected = predictor.fill_mask(PNGS[0], "<mask> bar", top=top)[0]
            assert [[word["word"] for word in row["masks"][0]] for row in data] == [
                [word.word for word in expected]
            ] * number
        assert [name.startswith("asyncio") for name in threads] == [False, True]


def test_explain_maps_every_word(post: Post, predictor: Predictor) -> None:
    for number, text in enumerate(TEXTS):
        answer = post("/v1/explain", image=URIS[number], text=text)
        expected = explain(predictor, PNGS[number], text)
        assert answer["words"] == list(expected.words)
        assert np.array(answer["maps"]) == pytest.approx(expected.maps.numpy(), abs=1e-5)
        assert np.array(answer["prefix_shares"]) == pytest.approx(expected.prefix_shares.numpy(), abs=1e-5)
        assert answer["score"] == pytest.approx(expected.score, abs=1e-5)
        assert answer["usage"]["total_tokens"] == 5 + len(predictor.processor.token_ids([text])[0])
        assert "view" not in answer


def test_the_view_is_what_the_model_sees(post: Post, predictor: Predictor) -> None:
    answer = post("/v1/explain", image=URIS[0], text="a bar", view=True)
    head, _, content = answer["view"].partition(",")
    assert head == "data:image/jpeg;base64"
    with Image.open(io.BytesIO(base64.b64decode(content))) as view:
        expected = explain(predictor, PNGS[0], "a bar").view
        assert view.size == expected.size
        difference = np.abs(np.asarray(view, dtype=float) - np.asarray(expected, dtype=float))
        assert difference.mean() < 4


def test_explain_refusals(refused: Post) -> None:
    assert "no word" in refused("/v1/explain", image=URIS[0], text="")["message"]
    assert refused("/v1/explain", image="/etc/passwd", text="a")["param"] == "image"
    assert refused("/v1/explain", image=URIS[0], text="red circle " * 30)["param"] == "text"
    assert refused("/v1/explain", image=[URIS[0]], text="a")["param"] == "image"


def test_each_way_to_name_an_image_that_is_refused(refused: Post, tmp_path: Path) -> None:
    """Paths, devices, other hosts, drawings and images with too many pixels: on every route that takes an image."""
    drawing = base64.b64encode(b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>').decode()
    many = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\xff\xff\0\0\xff\xff\x08\x02\0\0\0" + bytes(40)
    images = ["/etc/passwd", "/dev/zero", "file:///etc/passwd", "http://127.0.0.1/a.png", "https://example.org/a.png"]
    images += [f"data:image/svg+xml;base64,{drawing}", "data:image/png;base64," + base64.b64encode(many).decode()]
    images += ["data:text/html;base64,PGI+", "data:image/png,%89PNG"]
    (tmp_path / "a.png").write_bytes(PNGS[0])
    for image in (*images, str(tmp_path / "a.png"), f"file://{tmp_path}/a.png", "data:,", ""):
        for path, fields in (
            ("/v1/explain", {"image": image, "text": "a"}),
            ("/v1/match", {"images": image, "texts": "a"}),
            ("/v1/fill-mask", {"images": image, "texts": "<mask>"}),
            ("/v1/search", {"image": image}),
            ("/v1/embeddings", {"input": image, "modality": "image"}),
        ):
            assert refused(path, **fields)["code"] == "invalid_image", (image[:40], path)
