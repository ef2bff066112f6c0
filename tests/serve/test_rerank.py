"""Reranking by matching and by cosine, equal to the direct calls."""

import pytest
import torch

from helpers.servers import PNGS, SERVED_TEXTS, URIS

PATH = "/v1/rerank"
BROKEN = "data:image/png;base64,iVBORw0KGgo="
IMAGES = [{"image": uri} for uri in URIS]
NAMED = [{"text": text} for text in SERVED_TEXTS]


def by_match(predictor):
    return predictor.match(PNGS, SERVED_TEXTS, all_pairs=True)


def by_cosine(predictor):
    texts = predictor.embed_texts(SERVED_TEXTS)
    images = predictor.embed_images(PNGS)
    return torch.stack([texts @ texts[0], images @ images[0]])


@pytest.mark.parametrize(
    ("query", "documents", "expected", "scored_by"),
    [
        (SERVED_TEXTS[0], IMAGES, lambda model: by_match(model)[:, 0], "matching"),
        ({"text": SERVED_TEXTS[0]}, URIS, lambda model: by_match(model)[:, 0], "matching"),
        (URIS[0], SERVED_TEXTS, lambda model: by_match(model)[0], "matching"),
        ({"image": URIS[0]}, NAMED, lambda model: by_match(model)[0], "matching"),
        (SERVED_TEXTS[0], SERVED_TEXTS, lambda model: by_cosine(model)[0], "cosine"),
        (URIS[0], URIS, lambda model: by_cosine(model)[1], "cosine"),
    ],
)
def test_every_document_once_the_best_first(post, predictor, query, documents, expected, scored_by):
    answer = post(PATH, query=query, documents=documents)
    scores = expected(predictor)
    assert answer["scored_by"] == scored_by
    results = answer["results"]
    assert results[0].keys() == {"index", "relevance_score"}
    best_first = scores.sort(descending=True)
    assert [row["index"] for row in results] == best_first.indices.tolist()
    relevance = [row["relevance_score"] for row in results]
    assert relevance == pytest.approx(best_first.values.tolist(), abs=1e-5)
    first, *lengths = map(len, predictor.processor.token_ids(SERVED_TEXTS))
    num_images = str([query, documents]).count("data:")
    tokens_by_images = {
        0: 2 * first + sum(lengths),
        1: first + sum(lengths),
        3: first,
        4: 0,
    }
    expected_tokens = 5 * num_images + tokens_by_images[num_images]
    assert answer["usage"]["total_tokens"] == expected_tokens


def test_the_first_few_with_their_documents(post):
    first, second = post(
        PATH, query=SERVED_TEXTS[0], documents=SERVED_TEXTS, top_n=2, return_documents=True
    )["results"]
    assert first == {
        "index": 0,
        "relevance_score": pytest.approx(1),
        "document": {"text": SERVED_TEXTS[0]},
    }
    assert second["document"] == {"text": SERVED_TEXTS[second["index"]]}
    assert len(post(PATH, query="a", documents=SERVED_TEXTS, top_n=99)["results"]) == 3


@pytest.mark.parametrize(
    ("query", "documents", "param", "words"),
    [
        ("a", [], "documents", "at least 1"),
        ("a", ["a", IMAGES[0]], "documents", "whose scores cannot be compared"),
        *(
            ("a", [document], "documents.0", "expected either text or image")
            for document in ({}, {"text": "a", "image": URIS[0]})
        ),
        ("a", [7], "documents.0", "an object"),
        (None, ["a"], "query", "expected a string, or an object"),
        ("a", [{"image": "/etc/passwd"}], "documents", "expected a data URI"),
        (URIS[0], [URIS[0], BROKEN], "documents.1", "image"),
        (BROKEN, URIS, "query", "image"),
        ("a", ["a", "red circle " * 50], "documents", "the limit is 24"),
        ("red circle " * 50, SERVED_TEXTS, "query", "the limit is 24"),
    ],
)
def test_what_is_wrong_is_named(post_refused, query, documents, param, words):
    error = post_refused(PATH, query=query, documents=documents)
    assert error["param"].startswith(param)
    assert words in error["message"]


@pytest.mark.parametrize("path", ["/rerank", "/v2/rerank"])
def test_other_clients_paths_and_fields(post, post_refused, path):
    expected = post(PATH, query=SERVED_TEXTS[0], documents=SERVED_TEXTS)
    assert (
        post(
            path,
            query=SERVED_TEXTS[0],
            documents=SERVED_TEXTS,
            max_tokens_per_doc=4096,
            model="tiny",
        )
        == expected
    )
    assert post_refused(path, query="a", documents=["a"], top_n=0)["param"] == "top_n"


def test_a_cosine_is_at_most_one(server, monkeypatch):
    """Rounding may exceed it. Here vectors are too long by a hundredth."""

    async def too_long(items):
        return [torch.tensor([sign * 1.01, 0.0]) for sign in (1, 1, -1)]

    monkeypatch.setattr(server.service.scheduler, "submit", too_long)
    answer = server.client.post(PATH, json={"query": "a", "documents": ["b", "c"]}).json()
    assert [row["relevance_score"] for row in answer["results"]] == [1.0, -1.0]
