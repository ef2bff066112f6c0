"""Reranking by matching and by cosine, equal to the direct calls."""

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor

from bridgetower.predictor import Predictor
from served import PNGS, TEXTS, URIS

PATH = "/v1/rerank"
BROKEN = "data:image/png;base64,iVBORw0KGgo="
Post = Callable[..., Any]


def check(answer: dict[str, Any], scores: Tensor, scored_by: str) -> None:
    """Every document once, the best first, with these scores."""
    results = answer["results"]
    assert answer["scored_by"] == scored_by
    assert [row["index"] for row in results] == scores.argsort(descending=True).tolist()
    expected = scores.sort(descending=True).values.tolist()
    assert [row["relevance_score"] for row in results] == pytest.approx(expected, abs=1e-5)


def test_images_for_a_text(post: Post, predictor: Predictor) -> None:
    expected = predictor.match(PNGS, TEXTS[:1], all_pairs=True)[:, 0]
    check(post(PATH, query=TEXTS[0], documents=[{"image": uri} for uri in URIS]), expected, "matching")
    check(post(PATH, query={"text": TEXTS[0]}, documents=URIS), expected, "matching")


def test_texts_for_an_image(post: Post, predictor: Predictor) -> None:
    expected = predictor.match(PNGS[:1], TEXTS, all_pairs=True)[0]
    check(post(PATH, query=URIS[0], documents=TEXTS), expected, "matching")
    check(post(PATH, query={"image": URIS[0]}, documents=[{"text": text} for text in TEXTS]), expected, "matching")


def test_texts_for_a_text(post: Post, predictor: Predictor) -> None:
    vectors = predictor.embed_texts(["a red bar", *TEXTS])
    check(post(PATH, query="a red bar", documents=TEXTS), vectors[1:] @ vectors[0], "cosine")


def test_images_for_an_image(post: Post, predictor: Predictor) -> None:
    vectors = predictor.embed_images(PNGS)
    answer = post(PATH, query=URIS[0], documents=URIS)
    check(answer, vectors @ vectors[0], "cosine")
    assert answer["results"][0] == {"index": 0, "relevance_score": pytest.approx(1)}


def test_the_first_few_with_their_documents(post: Post) -> None:
    answer = post(PATH, query=TEXTS[0], documents=TEXTS, top_n=2, return_documents=True)
    first, second = answer["results"]
    assert first == {"index": 0, "relevance_score": pytest.approx(1), "document": {"text": TEXTS[0]}}
    assert second["document"] == {"text": TEXTS[second["index"]]}
    assert len(post(PATH, query="a", documents=TEXTS, top_n=99)["results"]) == 3


def test_usage(post: Post, predictor: Predictor) -> None:
    tokens = sum(map(len, predictor.processor.token_ids(TEXTS)))
    assert post(PATH, query=TEXTS[0], documents=TEXTS[1:])["usage"]["total_tokens"] == tokens


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"query": "a", "documents": []}, "documents", "at least 1"),
        ({"query": "a", "documents": ["a", {"image": URIS[0]}]}, "documents", "whose scores cannot be compared"),
        ({"query": "a", "documents": [{}]}, "documents.0", "expected either text or image"),
        (
            {"query": "a", "documents": [{"text": "a", "image": URIS[0]}]},
            "documents.0",
            "expected either text or image",
        ),
        ({"query": "a", "documents": [7]}, "documents.0", "an object"),
        ({"query": "a", "documents": ["a"], "top_n": 0}, "top_n", "greater"),
        ({"documents": ["a"]}, "query", "required"),
        ({"query": "a", "documents": [{"image": "/etc/passwd"}]}, "documents", "expected a data URI"),
        ({"query": URIS[0], "documents": [URIS[0], BROKEN]}, "documents.1", "image"),
        ({"query": BROKEN, "documents": URIS}, "query", "image"),
        ({"query": "a", "documents": ["a", "red circle " * 50]}, "documents", "the limit is 24"),
        ({"query": "red circle " * 50, "documents": TEXTS}, "query", "the limit is 24"),
    ],
)
def test_what_is_wrong_is_named(refused: Post, body: dict[str, Any], param: str, words: str) -> None:
    error = refused(PATH, **body)
    assert error["param"].startswith(param)
    assert words in error["message"]


@pytest.mark.parametrize("path", ["/rerank", "/v2/rerank"])
def test_other_clients_paths_and_fields(post: Post, path: str) -> None:
    expected = post(PATH, query=TEXTS[0], documents=TEXTS)
    assert post(path, query=TEXTS[0], documents=TEXTS, max_tokens_per_doc=4096, model="tiny") == expected
