"""Clients of other servers get the numbers of the direct calls: OPEA, text-embeddings-inference, vLLM, Cohere."""

import cohere
import numpy as np
import pytest
from huggingface_hub import InferenceClient

from helpers.servers import API_KEY, PNGS, SERVED_TEXTS, URIS, error_of


@pytest.fixture(scope="module")
def scores(predictor):
    """Of every image with every text, and cosines of the texts."""
    vectors = predictor.embed_texts(SERVED_TEXTS)
    return predictor.match(PNGS, SERVED_TEXTS, all_pairs=True).numpy(), (
        vectors @ vectors.T
    ).numpy()


def test_opea(client, predictor):
    assert client.get("/v1/health_check").json()["message"]
    alone = client.post("/v1/encode", json={"text": SERVED_TEXTS[0]}).json()
    np.testing.assert_allclose(
        alone["embedding"], predictor.embed_texts(SERVED_TEXTS[0])[0], atol=1e-5
    )
    joint = client.post(
        "/v1/encode", json={"text": SERVED_TEXTS[1], "img_b64_str": URIS[0].partition(",")[2]}
    ).json()
    np.testing.assert_allclose(
        joint["embedding"], predictor.embed_pairs(PNGS[0], SERVED_TEXTS[1])[0], atol=1e-5
    )
    long = client.post("/v1/encode", json={"text": "red circle " * 200}).json()
    np.testing.assert_allclose(
        long["embedding"], predictor.embed_texts("red circle " * 200, truncate=True)[0], atol=1e-5
    )


def test_inference_client_of_the_hub(locked, predictor, scores):
    address = str(locked.client.base_url).rstrip("/")
    expected = predictor.embed_texts(SERVED_TEXTS)
    for path in ("", "/embed"):
        client = InferenceClient(address + path, token=API_KEY)
        np.testing.assert_allclose(
            client.feature_extraction(SERVED_TEXTS, truncate=True), expected, atol=1e-5
        )
    client = InferenceClient(f"{address}/similarity", token=API_KEY)
    similarities = client.sentence_similarity(SERVED_TEXTS[0], SERVED_TEXTS[1:])
    np.testing.assert_allclose(similarities, scores[1][0, 1:], atol=1e-5)


def test_text_embeddings_inference(client, scores):
    match, cosine = scores
    ranked = client.post(
        "/rerank", json={"query": SERVED_TEXTS[0], "texts": URIS, "return_text": True}
    ).json()
    assert [row["index"] for row in ranked] == list(np.argsort(-match[:, 0]))
    np.testing.assert_allclose(
        [row["score"] for row in ranked], sorted(match[:, 0], reverse=True), atol=1e-5
    )
    assert ranked[0]["text"] == URIS[ranked[0]["index"]]
    same = client.post(
        "/rerank", json={"query": SERVED_TEXTS[2], "texts": SERVED_TEXTS, "truncate": True}
    ).json()
    np.testing.assert_allclose(
        [row["score"] for row in same], sorted(cosine[2], reverse=True), atol=1e-5
    )
    assert set(same[0]) == {"index", "score"}
    texts = [f"{number} red squares" for number in range(32)]
    own_rows = client.post("/score", json={"queries": texts, "documents": texts}).json()["data"]
    assert max(row["score"] for row in own_rows) <= 1
    jina = client.post("/rerank", json={"query": SERVED_TEXTS[0], "documents": URIS}).json()
    assert [row["index"] for row in jina["results"]] == [row["index"] for row in ranked]
    assert len(client.post("/embed", json={"inputs": SERVED_TEXTS[0]}).json()) == 1


def test_vllm(client, scores):
    match, cosine = scores
    image = {"content": [{"type": "image_url", "image_url": {"url": uri}} for uri in URIS]}
    for body, expected in (
        ({"text_1": SERVED_TEXTS[0], "text_2": SERVED_TEXTS[1]}, [cosine[0, 1]]),
        ({"text_1": SERVED_TEXTS[0], "text_2": SERVED_TEXTS[1:]}, cosine[0, 1:]),
        ({"queries": SERVED_TEXTS, "documents": SERVED_TEXTS[::-1]}, np.diag(cosine[:, ::-1])),
        ({"data_1": SERVED_TEXTS[1], "data_2": image, "model": "tiny"}, match[:, 1]),
        ({"text_1": image, "text_2": SERVED_TEXTS}, np.diag(match)),
        (
            {
                "queries": SERVED_TEXTS[1],
                "documents": [{"content": [content_part]} for content_part in image["content"]],
            },
            match[:, 1],
        ),
    ):
        answer = client.post("/score", json=body).json()
        assert [row["index"] for row in answer["data"]] == list(range(len(expected)))
        np.testing.assert_allclose([row["score"] for row in answer["data"]], expected, atol=1e-5)
        assert answer["created"] > 1.7e9


def test_cohere(locked, scores):
    client = cohere.ClientV2(api_key=API_KEY, base_url=str(locked.client.base_url).rstrip("/"))
    answer = client.rerank(
        model="tiny", query=SERVED_TEXTS[0], documents=URIS, top_n=2, max_tokens_per_doc=4096
    )
    order = np.argsort(-scores[0][:, 0])[:2]
    assert [row.index for row in answer.results] == list(order)
    np.testing.assert_allclose(
        [row.relevance_score for row in answer.results], scores[0][order, 0], atol=1e-5
    )
    with pytest.raises(cohere.errors.NotFoundError, match="this server has 'tiny'"):
        client.rerank(model="other", query="a", documents=["b"])


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("/v1/encode", {"img_b64_str": URIS[0]}, "text"),
        (
            "/v1/encode",
            {"text": "a", "img_b64_str": "https://elsewhere.org/a.png"},
            "img_b64_str: an image",
        ),
        ("/embed", {"inputs": "a", "normalize": False}, "normalize"),
        ("/embed", {"inputs": "a", "dimensions": 4}, "dimensions"),
        ("/", {"inputs": []}, "at least 1 item"),
        ("/rerank", {"query": "a", "texts": ["b"], "raw_scores": True}, "raw_scores"),
        ("/rerank", {"query": "a", "texts": ["b", URIS[0]]}, "cannot be compared"),
        ("/similarity", {"inputs": {"source_sentence": "a"}}, "sentences"),
        ("/score", {"text_1": ["a", "b"], "text_2": ["a", "b", "c"]}, "2 and 3 given"),
        ("/score", {"text_1": {"content": [{"type": "audio"}]}, "text_2": "a"}, "audio"),
        (
            "/score",
            {"text_1": "a", "text_2": [{"content": [{"type": "text", "text": "b"}] * 2}]},
            "several parts",
        ),
    ],
)
def test_what_cannot_be_done_is_refused(client, path, body, message):
    assert message in error_of(client.post(path, json=body), 400)["message"]
