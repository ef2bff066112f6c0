"""LangChain: embeddings equal to the predictor's, and a retriever that gives the hits of a search."""

import asyncio
import json

import pytest

from bridgetower.search.build import build_index
from bridgetower.search.searcher import Searcher
from helpers.models import assert_close
from helpers.shapes import write_shape_pictures

pytest.importorskip("langchain_core")
from langchain_core.documents import Document
from langchain_core.vectorstores import InMemoryVectorStore

from bridgetower.integrations.langchain import BridgeTowerEmbeddings, BridgeTowerRetriever

TEXTS = ["red circle on black", "a bar", "a green square"]


@pytest.fixture(scope="module")
def shapes_index(comparable_predictor, tmp_path_factory):
    folder = tmp_path_factory.mktemp("indexed")
    build_index(write_shape_pictures(folder), folder / "shapes.lance", comparable_predictor)
    return folder / "shapes.lance"


def test_embeddings(comparable_predictor, image_files):
    embeddings = BridgeTowerEmbeddings(comparable_predictor, batch_size=2)
    assert_close(embeddings.embed_documents(TEXTS), comparable_predictor.embed_texts(TEXTS))
    assert_close(embeddings.embed_query(TEXTS[0]), comparable_predictor.embed_texts(TEXTS[0])[0])
    assert_close(
        embeddings.embed_image(image_files), comparable_predictor.embed_images(image_files)
    )
    assert_close(
        embeddings.embed_image_text_pairs(TEXTS, image_files),
        comparable_predictor.embed_pairs(image_files, TEXTS),
    )
    assert_close(
        asyncio.run(embeddings.aembed_documents(TEXTS)), comparable_predictor.embed_texts(TEXTS)
    )
    assert embeddings.embed_documents([]) == embeddings.embed_image([]) == []
    assert isinstance(embeddings.embed_query("a")[0], float)


def test_options_and_errors(comparable_checkpoint, image_files):
    embeddings = BridgeTowerEmbeddings(comparable_checkpoint, device="cpu", truncate=True)
    assert len(embeddings.embed_query("red circle on black " * 30)) == 8
    with pytest.raises(ValueError, match="2 images and 3 texts"):
        embeddings.embed_image_text_pairs(TEXTS, image_files[:2])


def test_embeddings_in_a_store(comparable_predictor):
    store = InMemoryVectorStore(BridgeTowerEmbeddings(comparable_predictor))
    store.add_texts(TEXTS, [{"page": number} for number in range(3)], ids=["a", "b", "c"])
    document, cosine = store.similarity_search_with_score("a bar", k=1)[0]
    assert document == Document(id="b", page_content="a bar", metadata={"page": 1})
    assert cosine == pytest.approx(1, abs=1e-5)


class TestRetriever:
    @pytest.mark.parametrize(
        "settings",
        [
            {"rerank": 8, "where": "path < '20'"},
            {"rerank": None},
            {"rerank": 0, "against": "captions"},
        ],
    )
    def test_documents_are_the_hits_of_a_search(self, settings, shapes_index, comparable_predictor):
        searcher = Searcher(shapes_index, comparable_predictor)
        hits = searcher.search("a red circle", top=5, **settings)
        retriever = BridgeTowerRetriever(
            searcher=searcher, search_kwargs={"top": 5, "where": "path = 'x'"}
        )
        settings = {"where": None, **settings}
        documents = retriever.invoke("a red circle", **settings)
        assert [document.id for document in documents] == [hit.path for hit in hits]
        assert asyncio.run(retriever.ainvoke("a red circle", **settings)) == documents
        for document, hit in zip(documents, hits, strict=True):
            assert document.page_content == "\n".join(hit.captions)
            metadata = document.metadata
            assert (metadata["source"], metadata["digest"]) == (str(hit.file), hit.digest)
            assert (metadata["score"], metadata["cosine"]) == pytest.approx(
                (hit.score, hit.cosine), abs=1e-6
            )
            assert json.loads(document.model_dump_json())["metadata"]["path"] == hit.path

    @pytest.mark.parametrize(
        ("query", "options", "message"),
        [
            (" ", {}, "the text to search for is ' '"),
            ("a bar", {"where": "colour = 1"}, "where is 'colour = 1'"),
            ("a bar", {"top": 0}, "top is 0"),
        ],
    )
    def test_refusals(self, query, options, message, shapes_index, comparable_predictor):
        retriever = BridgeTowerRetriever(searcher=Searcher(shapes_index, comparable_predictor))
        with pytest.raises(ValueError, match=message):
            retriever.invoke(query, **options)
        with pytest.raises(TypeError, match="unexpected keyword argument"):
            retriever.invoke("a bar", were="width > 8")
