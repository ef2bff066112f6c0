"""OpenAI's embeddings: texts, images and both together, equal to the direct calls; what cannot be done is refused."""

import base64
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from torch import Tensor

from bridgetower.predictor import Predictor
from bridgetower.serve import model_routes, schemas
from served import PNGS, TEXTS, URIS, Running, error_of

PATH = "/v1/embeddings"
Post = Callable[..., Any]


def vectors(answer: dict[str, Any]) -> Tensor:
    assert [row["index"] for row in answer["data"]] == list(range(len(answer["data"])))
    return torch.tensor([row["embedding"] for row in answer["data"]])


def message(*parts: str) -> list[dict[str, Any]]:
    content = [
        {"type": "image_url", "image_url": {"url": part}}
        if part.startswith("data:")
        else {"type": "text", "text": part}
        for part in parts
    ]
    return [{"role": "user", "content": content}]


def close(ours: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)


class TestTexts:
    def test_a_list_and_a_string(self, post: Post, predictor: Predictor) -> None:
        answer = post(PATH, input=TEXTS, model="tiny")
        close(vectors(answer), predictor.embed_texts(TEXTS))
        assert (answer["object"], answer["model"]) == ("list", "tiny")
        close(vectors(post(PATH, input=TEXTS[0])), predictor.embed_texts(TEXTS[0]))

    def test_usage_is_what_the_tower_reads(self, post: Post, predictor: Predictor) -> None:
        tokens = sum(map(len, predictor.processor.token_ids(TEXTS)))
        assert post(PATH, input=TEXTS)["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}

    def test_base64_is_little_endian_float32(self, post: Post, predictor: Predictor) -> None:
        answer = post(PATH, input=TEXTS, encoding_format="base64")
        rows = [np.frombuffer(base64.b64decode(row["embedding"]), "<f4") for row in answer["data"]]
        close(torch.from_numpy(np.stack(rows)), predictor.embed_texts(TEXTS))

    def test_long_texts_are_cut_only_if_told(self, post: Post, refused: Post, predictor: Predictor) -> None:
        long = "red circle on black " * 30
        error = refused(PATH, input=["a", long])
        assert "text 1, 'red circle" in error["message"]
        assert 'send "truncate": true to cut it' in error["message"]
        assert error["param"] == "input"
        close(vectors(post(PATH, input=long, truncate=True)), predictor.embed_texts(long, truncate=True))


class TestImages:
    def test_data_uris(self, post: Post, predictor: Predictor) -> None:
        answer = post(PATH, input=URIS, modality="image")
        close(vectors(answer), predictor.embed_images(PNGS))
        vision = predictor.model.config.vision
        assert answer["usage"]["prompt_tokens"] == 3 * ((vision.image_size // vision.patch_size) ** 2 + 1)

    def test_damaged_images_are_numbered(self, refused: Post) -> None:
        for damaged, words in {
            URIS[0][:-400]: "cut off or damaged",
            URIS[0][:60]: "cannot be read as an image|damaged|padding",
            "data:image/png;base64,????": "base64 of an image is damaged",
            "data:image/png;base64,": "empty",
            "data:image/png;base64,bm8gcGljdHVyZQ==": "cannot be read as an image",
        }.items():
            error = refused(PATH, input=[URIS[1], damaged], modality="image")
            assert error["param"] == "input.1"
            assert any(word in error["message"] for word in words.split("|")), error


class TestObjects:
    def test_each_gets_its_vector_in_the_order_given(self, post: Post, predictor: Predictor) -> None:
        bare = URIS[1].partition(",")[2]
        pair, image, text = {"text": TEXTS[0], "image": URIS[0]}, {"image": bare}, {"text": TEXTS[1]}
        images, texts = predictor.embed_images(PNGS), predictor.embed_texts(TEXTS)
        pairs = predictor.embed_pairs([PNGS[0], PNGS[1]], TEXTS[:2])
        answer = post(PATH, input=[text, pair, image, TEXTS[2], text | image, {"text": ""}])
        empty = predictor.embed_texts("")[0]
        expected = [texts[1], pairs[0], images[1], texts[2], pairs[1], empty]
        for number, (row, vector) in enumerate(zip(answer["data"], expected, strict=True)):
            assert row["index"] == number
            close(torch.tensor(row["embedding"]), vector)
        close(vectors(post(PATH, input=pair, encoding_format="float")), pairs[:1])
        close(vectors(post(PATH, input=[bare, image], modality="image")), images[[1, 1]])

    def test_usage_counts_what_is_there(self, post: Post, predictor: Predictor) -> None:
        def tokens(*given: object) -> int:
            return int(post(PATH, input=list(given))["usage"]["total_tokens"])

        pair, image, text = {"text": TEXTS[0], "image": URIS[0]}, {"image": URIS[0]}, TEXTS[0]
        assert tokens(pair, image, text) == 2 * tokens(pair) == 2 * (tokens(image) + tokens(text))


class TestMessages:
    def test_picture_and_text_together(self, post: Post, predictor: Predictor) -> None:
        answer = post(PATH, messages=message(URIS[0], TEXTS[1]))
        close(vectors(answer), predictor.embed_pairs(PNGS[0], TEXTS[1]))
        images, texts = (
            post(PATH, **body)["usage"] for body in ({"input": URIS[0], "modality": "image"}, {"input": TEXTS[1]})
        )
        assert answer["usage"]["total_tokens"] == images["total_tokens"] + texts["total_tokens"]

    def test_one_alone(self, post: Post, predictor: Predictor) -> None:
        close(vectors(post(PATH, messages=message(URIS[0]))), predictor.embed_images(PNGS[0]))
        close(vectors(post(PATH, messages=message(TEXTS[0]))), predictor.embed_texts(TEXTS[0]))
        text = [{"role": "user", "content": TEXTS[0]}]
        close(vectors(post(PATH, messages=text)), predictor.embed_texts(TEXTS[0]))

    def test_more_than_one_of_each(self, refused: Post) -> None:
        for parts in ((URIS[0], URIS[1]), ("a", "b", URIS[0])):
            assert "at most one of each" in refused(PATH, messages=message(*parts))["message"]
        assert "at most 1" in refused(PATH, messages=message("a") * 2)["message"]


class TestRefusals:
    @pytest.mark.parametrize(
        ("body", "param", "words"),
        [
            ({}, None, "expected either input or messages"),
            ({"input": "a", "messages": message("a")}, None, "expected either input or messages"),
            ({"input": []}, "input", "at least 1"),
            ({"input": [[1, 2]]}, "input", "token ids, which are another tokenizer's"),
            ({"input": [1, 2]}, "input", "check_embedding_ctx_length=False"),
            ({"input": 1}, "input", "valid array"),
            ({"input": {"a": 1}}, "input.0.a", "Extra inputs are not permitted"),
            ({"input": ["a", None]}, "input.1", "expected a string, or an object with text, image or both"),
            ({"input": ["a", {}]}, "input.1", "expected text, image or both"),
            ({"input": [{"text": None}]}, "input.0", "expected text, image or both"),
            ({"input": [{"text": 1}]}, "input.0.text", "valid string"),
            ({"input": [{"text": "a", "image": "/etc/passwd"}]}, "input", "expected a data URI"),
            ({"input": ["a", {"image": "http://127.0.0.1/a.png"}]}, "input.1", "expected a data URI"),
            ({"input": ["a", {"text": "a", "image": "A" * 40}]}, "input.1", "cannot be read as an image"),
            ({"input": ["a", {"text": "a", "image": "A" * 41}]}, "input.1", "base64 of an image is damaged"),
            ({"input": ["a", {"text": "b " * 99, "image": URIS[0]}]}, "input", "text 1, 'b b b"),
            ({"input": "a", "truncation_direction": "Left"}, "truncation_direction", "should be 'right'"),
            ({"input": "a", "dimensions": 8}, "dimensions", "not trained for shortened vectors"),
            ({"input": "a", "encoding_format": "hex"}, "encoding_format", "'float' or 'base64'"),
            ({"input": "a", "modality": "audio"}, "modality", "'text' or 'image'"),
            ({"input": "a", "inputs": "a"}, "inputs", "Extra inputs are not permitted"),
            ({"input": "a \ud800 b"}, None, "not valid JSON"),
        ],
    )
    def test_names_the_field(self, refused: Post, body: dict[str, Any], param: str | None, words: str) -> None:
        error = refused(PATH, **body)
        assert words in error["message"]
        assert (error["param"] or "").startswith(param or "")
        assert error["type"] == "invalid_request_error"

    def test_another_model(self, refused: Post) -> None:
        error = refused(PATH, 404, input="a", model="text-embedding-3-small")
        assert error["message"] == "model is 'text-embedding-3-small'; this server has 'tiny'"
        assert (error["code"], error["param"]) == ("model_not_found", "model")

    def test_too_many_items(self, refused: Post) -> None:
        for entry in ("a", {"text": "a", "image": URIS[0]}):
            assert "1025 items, the limit is 1024" in refused(PATH, 413, input=[entry] * 1025)["message"]
        assert "at most 4096" in refused(PATH, 413, input=[{"text": "a"}] * 4097)["message"]

    def test_a_model_without_contrastive_head(self, alone: Running) -> None:
        error = error_of(alone.client.post(PATH, json={"input": "a"}), 400)
        answer = alone.client.post(PATH, json={"input": {"text": "a", "image": URIS[0]}}).json()
        assert "no contrastive (ITC) head" in error["message"]
        assert error["code"] == "unsupported_by_model"
        assert len(vectors(answer)) == 1


def test_many_clients_at_once_get_their_own(client: httpx.Client, predictor: Predictor) -> None:
    bodies = [{"input": TEXTS[n % 3]} if n % 2 else {"input": URIS[n % 3], "modality": "image"} for n in range(48)]
    expected = [
        predictor.embed_texts(TEXTS[n % 3]) if n % 2 else predictor.embed_images(PNGS[n % 3]) for n in range(48)
    ]
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda body: client.post(PATH, json=body).json(), bodies))
    for answer, wanted in zip(answers, expected, strict=True):
        close(vectors(answer), wanted)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/embeddings", {"input": TEXTS * 60}),
        (
            "/v1/rerank",
            {"query": "a", "documents": ["red " * 300, "a"], "truncate": True, "return_documents": True},
        ),
    ],
)
def test_long_responses_are_built_outside_of_the_event_loop(
    post: Post, monkeypatch: pytest.MonkeyPatch, path: str, body: dict[str, Any]
) -> None:
    threads: list[str] = []
    usage = schemas.usage

    def seen(tokens: int) -> dict[str, int]:
        threads.append(threading.current_thread().name)
        return usage(tokens)

    for module in (schemas, model_routes):
        monkeypatch.setattr(module, "usage", seen)
    post(path, **body)
    assert [name.partition("_")[0] for name in threads] == ["asyncio"]
    post(path, **body | ({"input": "a"} if "input" in body else {"return_documents": False}))
    assert not threads[-1].startswith("asyncio")


def test_fields_of_jina(post: Callable[..., Any]) -> None:
    plain = post(PATH, input=TEXTS)["data"]
    assert post(PATH, input=TEXTS, task="text-matching", normalized=False, embedding_type="float")["data"] == plain
    packed = post(PATH, input=TEXTS, embedding_type="base64")["data"]
    assert packed == post(PATH, input=TEXTS, encoding_format="base64")["data"]
