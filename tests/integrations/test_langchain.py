"""LangChain: embeddings equal to the predictor's, and a retriever that gives the hits of a search."""

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bridgetower.predictor import Predictor, load
from bridgetower.search.build import build_index
from bridgetower.search.searcher import Searcher
from shapes import write_pictures

pytest.importorskip("langchain_core")
from bridgetower.integrations.langchain import BridgeTowerEmbeddings, BridgeTowerRetriever

TEXTS = ["red circle on black", "a bar", "a square"]


@pytest.fixture(scope="module")
def predictor(comparable_checkpoint: Path) -> Predictor:
    return load(comparable_checkpoint, device="cpu")


@pytest.fixture(scope="module")
def index(predictor: Predictor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("indexed")
    build_index(write_pictures(folder), folder / "shapes.lance", predictor)
    return folder / "shapes.lance"


def close(found: Any, expected: Any) -> None:
    np.testing.assert_allclose(found, np.asarray(expected), atol=1e-5)


def test_embeddings(predictor: Predictor, images: list[str]) -> None:
    embeddings = BridgeTowerEmbeddings(predictor, batch_size=2)
    close(embeddings.embed_documents(TEXTS), predictor.embed_texts(TEXTS))
    close(embeddings.embed_query(TEXTS[0]), predictor.embed_texts(TEXTS[0])[0])
    close(embeddings.embed_image(images), predictor.embed_images(images))
    close(embeddings.embed_image_text_pairs(TEXTS, images), predictor.embed_pairs(images, TEXTS))
    close(asyncio.run(embeddings.aembed_documents(TEXTS)), predictor.embed_texts(TEXTS))
    assert embeddings.embed_documents([]) == embeddings.embed_image([]) == []
    assert isinstance(embeddings.embed_query("a")[0], float)


def test_options_and_errors(comparable_checkpoint: Path, images: list[str]) -> None:
    embeddings = BridgeTowerEmbeddings(comparable_checkpoint, device="cpu", truncate=True)
    assert len(embeddings.embed_query("red circle on black " * 30)) == 8
    with pytest.raises(ValueError, match="2 images and 3 texts"):
        embeddings.embed_image_text_pairs(TEXTS, images[:2])


class TestRetriever:
    def test_documents_are_hits(self, index: Path, predictor: Predictor) -> None:
        hits = Searcher(index, predictor).search("a red circle", top=5, rerank=8, where="path < '20'")
        retriever = BridgeTowerRetriever.of(index, predictor, k=5, rerank=8, where="path < '20'")
        documents = retriever.invoke("a red circle")
        assert [document.metadata["source"] for document in documents] == [str(hit.file) for hit in hits]
        for document, hit in zip(documents, hits, strict=True):
            assert document.id == hit.digest
            assert document.page_content == "\n".join(hit.captions)
            assert document.metadata["score"] == pytest.approx(hit.score)
            assert document.metadata["cosine"] == pytest.approx(hit.cosine)
            assert document.metadata["path"] < "20"

    def test_a_call_may_ask_for_others(self, index: Path) -> None:
        retriever = BridgeTowerRetriever.of(index, rerank=0)
        assert len(retriever.invoke("a bar")) == 4
        (document,) = asyncio.run(retriever.ainvoke("a bar", k=1, where="path = '07.png'"))
        assert (document.metadata["path"], document.metadata["score"]) == ("07.png", None)

    def test_errors_are_those_of_a_search(self, index: Path, predictor: Predictor) -> None:
        retriever = BridgeTowerRetriever.of(index, predictor)
        for query, options, words in (
            (" ", {}, "the text to search for is ' '"),
            ("a bar", {"where": "colour = 1"}, "where is 'colour = 1'"),
            ("a bar", {"k": 0}, "top is 0"),
        ):
            with pytest.raises(ValueError, match=words):
                retriever.invoke(query, **options)
