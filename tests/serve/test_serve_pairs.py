"""Every route for images with texts is equal to the direct call, and what each refuses."""

import base64
import io
import resource
from concurrent.futures import ThreadPoolExecutor
from itertools import product

import numpy as np
import pytest
from PIL import Image

from bridgetower.inference.attention import explain
from helpers.servers import (
    PNGS,
    SERVED_TEXTS,
    URIS,
    changed_server,
    error_of,
    held_up_text_tower,
    wait_until,
)

MASKED = ["a <mask> on <mask>", "<mask> bar", "a <mask>"]
LONG = "red circle " * 30
ONE = {"images": URIS[0]}


DIRECT = {
    "match": (
        {"texts": SERVED_TEXTS},
        "score",
        lambda model: model.match(PNGS, SERVED_TEXTS).tolist(),
        1,
    ),
    "fill-mask": (
        {"texts": MASKED, "top": 4},
        "masks",
        lambda model: model.fill_mask(PNGS, MASKED, top=4),
        1,
    ),
    "answer": (
        {"questions": SERVED_TEXTS, "top": 3},
        "answers",
        lambda model: model.answer(PNGS, SERVED_TEXTS, top=3),
        1,
    ),
    "entail": (
        {"statements": SERVED_TEXTS},
        "judgements",
        lambda model: model.entail(PNGS, SERVED_TEXTS),
        1,
    ),
    "reason": (
        {"images_2": URIS[::-1], "statements": SERVED_TEXTS},
        "judgements",
        lambda model: model.reason(PNGS, PNGS[::-1], SERVED_TEXTS),
        2,
    ),
}
"""By route: fields beside the images, field of the result, the direct call, and images for each text."""


def compared(actual, expected):
    if isinstance(actual, list):
        assert len(actual) == len(expected)
        for item, other in zip(actual, expected, strict=True):
            compared(item, other)
    elif isinstance(actual, dict):
        probability = vars(expected)["probability"]
        assert actual == vars(expected) | {"probability": pytest.approx(probability, abs=1e-5)}
    else:
        assert actual == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("use", DIRECT)
def test_equal_to_the_direct_call(two_models, predictor, answering_predictor, use):
    body, field, call, num_images = DIRECT[use]
    model = predictor if use in ("match", "fill-mask") else answering_predictor
    answer = two_models.client.post(f"/v1/{use}", json={"images": URIS} | body).json()
    assert answer["model"] == ("tiny" if model is predictor else model.source)
    numbers = ("image", "text") if use == "match" else ("index",)
    assert [[row[name] for name in numbers] for row in answer["data"]] == [
        [row] * len(numbers) for row in range(3)
    ]
    compared([row[field] for row in answer["data"]], call(model))
    texts = next(
        value for name, value in body.items() if name in ("texts", "questions", "statements")
    )
    tokens = sum(map(len, model.processor.token_ids(texts)))
    assert answer["usage"]["total_tokens"] == num_images * len(PNGS) * 5 + tokens


def test_several_questions_about_one_image(two_models, answering_predictor):
    rows = two_models.client.post(
        "/v1/answer", json=ONE | {"questions": SERVED_TEXTS, "top": 3}
    ).json()["data"]
    compared(
        [row["answers"] for row in rows], answering_predictor.answer(PNGS[0], SERVED_TEXTS, top=3)
    )


HEADS = ("matching (ITM)", "masked-language (MLM)", "vqa", "snli_ve", "nlvr2")


@pytest.mark.parametrize(("use", "head"), list(zip(DIRECT, HEADS, strict=True)))
def test_a_model_without_the_head(client, answering_server, use, head):
    without = answering_server.client if use in ("match", "fill-mask") else client
    error = error_of(without.post(f"/v1/{use}", json={"images": URIS} | DIRECT[use][0]), 400)
    assert error["code"] == "unsupported_by_model"
    assert f"no {head} head" in error["message"]


@pytest.mark.parametrize(
    ("use", "body", "param", "words"),
    [
        *(
            ("answer", ONE | {"questions": "what?", "top": top}, "top", "")
            for top in (0, 101, "many", None)
        ),
        ("entail", {"images": URIS, "statements": SERVED_TEXTS[:2]}, None, "3 images and 2 texts"),
        ("entail", ONE | {"statements": LONG}, "statements", "the limit is 24"),
        (
            "reason",
            {"images": URIS, "images_2": URIS[:2], "statements": SERVED_TEXTS},
            "images_2",
            "3 images and 2 images_2",
        ),
        (
            "reason",
            ONE | {"images_2": "/etc/passwd", "statements": "a"},
            "images_2",
            "expected a data URI",
        ),
        ("match", ONE, "texts", "required"),
        ("match", ONE | {"texts": "a" * 20_001}, "texts.0", "at most 20000 characters"),
        (
            "match",
            {"images": [URIS[0], "x"], "texts": ["a", "b"]},
            "images.1",
            "expected a data URI",
        ),
        (
            "fill-mask",
            {"images": URIS[:2], "texts": ["a <mask>", "a bar"]},
            "texts",
            "no mask in text 1; put <mask>",
        ),
        (
            "fill-mask",
            ONE | {"texts": LONG + "<mask>", "truncate": True},
            "texts",
            "no mask in text 0",
        ),
        ("explain", {"image": URIS[0], "text": ""}, "text", "no word"),
        ("explain", {"image": URIS[0], "text": LONG}, "text", "the limit is 24"),
        ("explain", {"image": [URIS[0]], "text": "a"}, "image", "valid string"),
    ],
)
def test_what_is_wrong_is_named(two_models, use, body, param, words):
    error = error_of(two_models.client.post(f"/v1/{use}", json=body), 400)
    assert error["param"] == param
    assert words in error["message"]


def test_no_more_items_and_words_than_can_be_answered_with(server, answering_server):
    error = error_of(
        answering_server.client.post("/v1/reason", json={"images": URIS} | DIRECT["reason"][0]), 413
    )
    assert error["message"] == "images: 6 items, the limit is 5; send several requests"
    with changed_server(server, max_items=2) as client:
        body = {"images": URIS[:2], "texts": ["<mask> bar", "<mask>"], "top": 100}
        assert client.post("/v1/fill-mask", json=body).status_code == 200
        error = error_of(client.post("/v1/fill-mask", json=body | {"texts": MASKED[:2]}), 413)
    assert (
        error["message"]
        == "texts: 3 masks with 100 words each, the limit is 200 words; ask for fewer"
    )


def test_words_of_a_response_take_room_of_the_queue(server, predictor):
    costs = server.service.costs
    body = {"images": URIS[:2], "texts": ["<mask> on <mask>", "<mask>"], "top": 50}
    with held_up_text_tower(predictor) as gate, ThreadPoolExecutor(1) as pool:
        response = pool.submit(server.client.post, "/v1/fill-mask", json=body)
        wait_until(lambda: server.service.scheduler.admitted > 0)
        assert server.service.scheduler.admitted == 2 * costs["pair"] + 150 * costs["word"]
        gate.set()
        assert response.result().status_code == 200
    wait_until(lambda: server.service.scheduler.admitted == 0)


def test_all_pairs(post, predictor):
    answer = post("/v1/match", images=URIS, texts=SERVED_TEXTS[:2], all_pairs=True)
    assert [(row["image"], row["text"]) for row in answer["data"]] == [
        (i, t) for i in range(3) for t in range(2)
    ]
    expected = predictor.match(PNGS, SERVED_TEXTS[:2], all_pairs=True).flatten().tolist()
    assert [row["score"] for row in answer["data"]] == pytest.approx(expected, abs=1e-5)
    assert len({round(probability, 4) for probability in expected}) == 6
    tokens = sum(map(len, predictor.processor.token_ids(SERVED_TEXTS[:2])))
    assert answer["usage"]["total_tokens"] == 3 * 5 + tokens  # each is read once


def test_pairs_are_counted_before_any_is_built(client):
    """9 and 16 million pairs, of which a list would take a gigabyte."""
    for number in (3000, 4096):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        letters = ["a"] * number
        response = client.post(
            "/v1/match", json={"images": letters, "texts": letters, "all_pairs": True}
        )
        assert f"images: {number**2} items, the limit is 1024" in error_of(response, 413)["message"]
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 2**10  # KiB


def test_explain_maps_every_word(post, predictor):
    for (number, text), method in product(enumerate(SERVED_TEXTS), ("attention", "gradcam")):
        answer = post("/v1/explain", image=URIS[number], text=text, method=method)
        expected = explain(predictor, PNGS[number], text, method=method)
        assert answer["words"] == list(expected.words)
        assert np.array(answer["maps"]) == pytest.approx(expected.maps.numpy(), abs=1e-5)
        assert np.array(answer["prefix_shares"]) == pytest.approx(
            expected.prefix_shares.numpy(), abs=1e-5
        )
        assert answer["score"] == pytest.approx(expected.score, abs=1e-5)
        assert answer["usage"]["total_tokens"] == 5 + len(predictor.processor.token_ids([text])[0])
        assert "view" not in answer


def test_the_view_is_what_the_model_sees(post, predictor):
    answer = post("/v1/explain", image=URIS[0], text="a bar", view=True)
    head, _, content = answer["view"].partition(",")
    assert head == "data:image/jpeg;base64"
    with Image.open(io.BytesIO(base64.b64decode(content))) as view:
        expected = explain(predictor, PNGS[0], "a bar").view
        assert view.size == expected.size
        difference = np.abs(np.asarray(view, dtype=float) - np.asarray(expected, dtype=float))
        assert difference.mean() < 4


def test_each_way_to_name_an_image_that_is_refused(post_refused, tmp_path):
    """Paths, devices, other hosts, drawings and images with too many pixels: on every route that takes an image."""
    drawing = base64.b64encode(
        b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>'
    ).decode()
    many = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\xff\xff\0\0\xff\xff\x08\x02\0\0\0" + bytes(40)
    images = [
        "/etc/passwd",
        "/dev/zero",
        "file:///etc/passwd",
        "http://127.0.0.1/a.png",
        "https://example.org/a.png",
    ]
    images += [
        f"data:image/svg+xml;base64,{drawing}",
        "data:image/png;base64," + base64.b64encode(many).decode(),
    ]
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
            assert post_refused(path, **fields)["code"] == "invalid_image", (image[:40], path)
