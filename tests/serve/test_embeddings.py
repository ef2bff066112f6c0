"""OpenAI's embeddings of texts, images and pairs equal the direct calls. Other requests are refused."""

import base64
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from bridgetower.serve import schemas
from helpers.servers import PNGS, SERVED_TEXTS, URIS, error_of

PATH = "/v1/embeddings"
PAIR = {"text": "a", "image": URIS[0]}


def check_vectors(answer, expected):
    assert [row["index"] for row in answer["data"]] == list(range(len(expected)))
    rows = [row["embedding"] for row in answer["data"]]
    if isinstance(rows[0], str):
        rows = [np.frombuffer(base64.b64decode(row), "<f4").tolist() for row in rows]
    torch.testing.assert_close(torch.tensor(rows), expected, atol=1e-5, rtol=0)


def message(*contents):
    content = [
        {"type": "image_url", "image_url": {"url": content}}
        if content in URIS
        else {"type": "text", "text": content}
        for content in contents
    ]
    return [{"role": "user", "content": content}]


def test_texts_and_images(post, predictor):
    texts = predictor.embed_texts(SERVED_TEXTS)
    images = predictor.embed_images(PNGS)
    answer = post(PATH, input=SERVED_TEXTS, model="tiny")
    assert (answer["object"], answer["model"]) == ("list", "tiny")
    check_vectors(answer, texts)
    check_vectors(post(PATH, input=SERVED_TEXTS[0]), texts[:1])
    check_vectors(post(PATH, input=URIS, modality="image"), images)
    for packed in (
        {"encoding_format": "base64"},
        {"embedding_type": "base64", "task": "any", "normalized": False},
    ):
        answer = post(PATH, input=SERVED_TEXTS, **packed)
        assert isinstance(answer["data"][0]["embedding"], str)
        check_vectors(answer, texts)
    for form, offset in (("ubinary", 0), ("binary", 128)):  # as Jina's, and quantize_embeddings
        rows = [
            row["embedding"] for row in post(PATH, input=SERVED_TEXTS, embedding_type=form)["data"]
        ]
        signs = np.unpackbits((np.array(rows) + offset).astype(np.uint8), axis=1)[
            :, : texts.shape[1]
        ]
        np.testing.assert_array_equal(signs, texts.numpy() > 0)


def test_long_texts_are_cut_only_if_told(post, post_refused, predictor):
    long = "red circle on black " * 30
    error = post_refused(PATH, input=["a", long])
    assert "text 1, 'red circle" in error["message"]
    assert 'send "truncate": true to cut it' in error["message"]
    assert error["param"] == "input"
    check_vectors(post(PATH, input=long, truncate=True), predictor.embed_texts(long, truncate=True))


def test_objects_get_a_vector_each_in_the_order_given(post, predictor):
    bare = URIS[1].partition(",")[2]
    pair = {"text": SERVED_TEXTS[0], "image": URIS[0]}
    image = {"image": bare}
    text = {"text": SERVED_TEXTS[1]}
    images = predictor.embed_images(PNGS)
    texts = predictor.embed_texts([*SERVED_TEXTS, ""])
    pairs = predictor.embed_pairs([PNGS[0], PNGS[1]], SERVED_TEXTS[:2])
    answer = post(PATH, input=[text, pair, image, SERVED_TEXTS[2], text | image, {"text": ""}])
    expected = [texts[1], pairs[0], images[1], texts[2], pairs[1], texts[3]]
    for number, (row, vector) in enumerate(zip(answer["data"], expected, strict=True)):
        assert row["index"] == number
        torch.testing.assert_close(torch.tensor(row["embedding"]), vector, atol=1e-5, rtol=0)
    check_vectors(post(PATH, input=pair, encoding_format="float"), pairs[:1])
    check_vectors(post(PATH, input=[bare, image], modality="image"), images[[1, 1]])


def test_messages(post, post_refused, predictor):
    check_vectors(
        post(PATH, messages=message(URIS[0], SERVED_TEXTS[1])),
        predictor.embed_pairs(PNGS[0], SERVED_TEXTS[1]),
    )
    check_vectors(post(PATH, messages=message(URIS[0])), predictor.embed_images(PNGS[0]))
    for content in (message(SERVED_TEXTS[0]), [{"role": "user", "content": SERVED_TEXTS[0]}]):
        check_vectors(post(PATH, messages=content), predictor.embed_texts(SERVED_TEXTS[0]))
    for contents in ((URIS[0], URIS[1]), ("a", "b", URIS[0])):
        assert "at most one of each" in post_refused(PATH, messages=message(*contents))["message"]
    assert "at most 1" in post_refused(PATH, messages=message("a") * 2)["message"]


def test_usage_is_what_the_towers_read(post, predictor):
    vision = predictor.model.config.vision
    image = (vision.image_size // vision.patch_size) ** 2 + 1
    text = len(predictor.processor.token_ids(SERVED_TEXTS)[0])
    for inputs, expected in (
        ({"input": SERVED_TEXTS[0]}, text),
        ({"input": URIS, "modality": "image"}, 3 * image),
        (
            {
                "input": [
                    {"text": SERVED_TEXTS[0], "image": URIS[0]},
                    {"image": URIS[0]},
                    SERVED_TEXTS[0],
                ]
            },
            2 * (image + text),
        ),
        ({"messages": message(URIS[0], SERVED_TEXTS[0])}, image + text),
    ):
        assert post(PATH, **inputs)["usage"] == {
            "prompt_tokens": expected,
            "total_tokens": expected,
        }


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        *(
            (body, None, "expected either input or messages")
            for body in ({}, {"input": "a", "messages": message("a")})
        ),
        ({"input": []}, "input", "at least 1"),
        ({"input": [[1, 2]]}, "input", "token ids, which are another tokenizer's"),
        ({"input": [1, 2]}, "input", "check_embedding_ctx_length=False"),
        ({"input": 1}, "input", "valid array"),
        ({"input": {"a": 1}}, "input.0.a", "Extra inputs are not permitted"),
        (
            {"input": ["a", None]},
            "input.1",
            "expected a string, or an object with text, image or both",
        ),
        *(
            ({"input": ["a", item]}, "input.1", "expected text, image or both")
            for item in ({}, {"text": None})
        ),
        ({"input": [{"text": 1}]}, "input.0.text", "valid string"),
        ({"input": ["a", {"image": "http://127.0.0.1/a.png"}]}, "input.1", "expected a data URI"),
        (
            {"input": [URIS[1], URIS[0][:-400]], "modality": "image"},
            "input.1",
            "cut off or damaged",
        ),
        ({"input": ["a", {"image": "data:image/png;base64,"}]}, "input.1", "empty"),
        (
            {"input": ["a", {"text": "a", "image": "A" * 40}]},
            "input.1",
            "cannot be read as an image",
        ),
        (
            {"input": ["a", {"text": "a", "image": "A" * 41}]},
            "input.1",
            "base64 of an image is damaged",
        ),
        ({"input": ["a", {"text": "b " * 99, "image": URIS[0]}]}, "input", "text 1, 'b b b"),
        (
            {"input": "a", "truncation_direction": "Left"},
            "truncation_direction",
            "should be 'right'",
        ),
        ({"input": "a", "dimensions": 8}, "dimensions", "not trained for shortened vectors"),
        ({"input": "a", "encoding_format": "hex"}, "encoding_format", "'float' or 'base64'"),
        ({"input": "a", "modality": "audio"}, "modality", "'text' or 'image'"),
        ({"input": "a", "inputs": "a"}, "inputs", "Extra inputs are not permitted"),
        ({"input": "a \ud800 b"}, None, "not valid JSON"),
    ],
)
def test_refusals_name_the_field(post_refused, body, param, words):
    error = post_refused(PATH, **body)
    assert words in error["message"]
    assert (error["param"] or "").startswith(param or "")
    assert error["type"] == "invalid_request_error"


def test_another_model_too_many_items_and_a_head_that_is_not_there(post_refused, answering_server):
    error = post_refused(PATH, 404, input="a", model="text-embedding-3-small")
    assert error["message"] == "model is 'text-embedding-3-small'; this server has 'tiny'"
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    for entry in ("a", PAIR):
        assert (
            "1025 items, the limit is 1024"
            in post_refused(PATH, 413, input=[entry] * 1025)["message"]
        )
    error = error_of(answering_server.client.post(PATH, json={"input": "a"}), 400)
    assert "no contrastive (ITC) head" in error["message"]
    assert error["code"] == "unsupported_by_model"
    assert len(answering_server.client.post(PATH, json={"input": PAIR}).json()["data"]) == 1


def test_many_clients_at_once_get_their_own(client, predictor):
    texts = predictor.embed_texts(SERVED_TEXTS)
    images = predictor.embed_images(PNGS)
    bodies = [
        {"input": SERVED_TEXTS[n % 3]} if n % 2 else {"input": URIS[n % 3], "modality": "image"}
        for n in range(48)
    ]
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda body: client.post(PATH, json=body).json(), bodies))
    for n, answer in enumerate(answers):
        check_vectors(answer, (texts if n % 2 else images)[n % 3 : n % 3 + 1])


@pytest.mark.parametrize(
    ("path", "body", "less"),
    [
        (PATH, {"input": SERVED_TEXTS * 60}, {"input": "a"}),
        (
            "/v1/rerank",
            {"query": "a", "documents": ["red", "a"] * 60},
            {"documents": ["a"]},
        ),
        (
            "/v1/fill-mask",
            {"images": URIS[:1] * 12, "texts": ["<mask> bar"] * 12, "top": 100},
            {"images": URIS[:1], "texts": ["<mask> bar"]},
        ),
    ],
)
def test_long_responses_are_built_outside_of_the_event_loop(post, monkeypatch, path, body, less):
    threads = []
    to_json = schemas.to_json

    def written(value):
        threads.append(threading.current_thread().name.startswith("writers"))
        return to_json(value)

    monkeypatch.setattr(schemas, "to_json", written)
    post(path, **body | less)
    assert not any(threads)
    post(path, **body)
    assert any(threads)
