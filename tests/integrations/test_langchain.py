"""LangChain: embeddings equal to the predictor's, and a vector store that gives the hits of a search."""

import asyncio
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

from bridgetower.inference.predictor import load
from bridgetower.search.build import build_index
from bridgetower.search.searcher import Searcher
from shapes import write_pictures
from tiny import close

pytest.importorskip("langchain_core")
from langchain_core.documents import Document
from langchain_core.embeddings import DeterministicFakeEmbedding

from bridgetower.integrations.langchain import BridgeTowerEmbeddings, BridgeTowerVectorStore

TEXTS = ["red circle on black", "a bar", "a green square"]
ABOUTS = [{"page": 1, "tags": ["a", "ü"]}, {"page": 2}, {"page": 3}]


@pytest.fixture(scope="module")
def predictor(comparable_checkpoint):
    return load(comparable_checkpoint, device="cpu")


@pytest.fixture(scope="module")
def index(predictor, tmp_path_factory):
    folder = tmp_path_factory.mktemp("indexed")
    build_index(write_pictures(folder), folder / "shapes.lance", predictor)
    return folder / "shapes.lance"


def test_embeddings(predictor, images):
    embeddings = BridgeTowerEmbeddings(predictor, batch_size=2)
    close(embeddings.embed_documents(TEXTS), predictor.embed_texts(TEXTS))
    close(embeddings.embed_query(TEXTS[0]), predictor.embed_texts(TEXTS[0])[0])
    close(embeddings.embed_image(images), predictor.embed_images(images))
    close(embeddings.embed_image_text_pairs(TEXTS, images), predictor.embed_pairs(images, TEXTS))
    close(asyncio.run(embeddings.aembed_documents(TEXTS)), predictor.embed_texts(TEXTS))
    assert embeddings.embed_documents([]) == embeddings.embed_image([]) == []
    assert isinstance(embeddings.embed_query("a")[0], float)


def test_options_and_errors(comparable_checkpoint, images):
    embeddings = BridgeTowerEmbeddings(comparable_checkpoint, device="cpu", truncate=True)
    assert len(embeddings.embed_query("red circle on black " * 30)) == 8
    with pytest.raises(ValueError, match="2 images and 3 texts"):
        embeddings.embed_image_text_pairs(TEXTS, images[:2])


@pytest.fixture(scope="module")
def embeddings(predictor):
    return BridgeTowerEmbeddings(predictor)


@pytest.fixture
def store(embeddings, tmp_path):
    return BridgeTowerVectorStore(tmp_path / "documents.lance", embeddings)


class TestTexts:
    def test_are_found_by_their_vectors(self, store, predictor):
        assert store.add_texts(TEXTS, ABOUTS, ids=["a", "b", "c"]) == ["a", "b", "c"]
        found = store.similarity_search_with_score("a bar", k=3)
        assert found[0] == (
            Document(id="b", page_content="a bar", metadata=ABOUTS[1]),
            pytest.approx(1, abs=1e-5),
        )
        cosines = predictor.embed_texts(TEXTS) @ predictor.embed_texts("a bar")[0]
        assert [score for _, score in found] == pytest.approx(
            cosines.sort(descending=True).values.tolist(), abs=1e-5
        )
        shown = [score for _, score in store.similarity_search_with_relevance_scores("a bar", k=3)]
        assert shown == pytest.approx([(1 + cosine) / 2 for _, cosine in found], abs=1e-5)
        vector = store.embeddings.embed_query("a bar")
        assert store.similarity_search_by_vector(vector, k=2) == [
            document for document, _ in found[:2]
        ]
        assert asyncio.run(store.asimilarity_search("a bar", k=1))[0].id == "b"

    def test_are_kept_in_the_index(self, store, embeddings):
        ids = store.add_texts(TEXTS[:2])
        assert len(set(ids)) == 2
        again = BridgeTowerVectorStore(store.searcher.index.uri, embeddings)
        assert [document.page_content for document in again.get_by_ids(ids[::-1])] == TEXTS[1::-1]
        assert again.add_texts([]) == []
        assert again.delete()
        assert len(again.searcher.index) == 0

    def test_from_texts_and_retrievers(self, embeddings, tmp_path):
        place = tmp_path / "new" / "texts.lance"
        place.parent.mkdir()
        store = BridgeTowerVectorStore.from_texts(
            TEXTS, embeddings, ABOUTS, ids=["a", "b", "c"], index=place
        )
        retriever = store.as_retriever(search_kwargs={"k": 2, "filter": {"page": 3}})
        assert [document.id for document in retriever.invoke("a bar")] == ["c"]

    def test_filters_and_conditions(self, store):
        others = [f"a bar {number}" for number in range(9)]
        store.add_texts(
            [*others, *TEXTS], [*[{}] * 9, *ABOUTS], ids=[*map(str, range(9)), "a", "b", "c"]
        )
        cases = [
            ({"filter": {"page": 2}}, ["b"]),
            ({"filter": {"tags": ["a", "ü"], "page": 1}}, ["a"]),
            ({"filter": {"colour": "red"}}, []),
            ({"filter": lambda document: "on" in document.page_content}, ["a"]),
            ({"where": "array_has(captions, 'a green square')"}, ["c"]),
            ({"where": "path IN ('a', 'b') AND width = 0"}, ["b", "a"]),
            ({"where": "path IN ('a', 'b')", "filter": {"page": 1}}, ["a"]),
        ]
        for settings, ids in cases:
            assert [found.id for found in store.similarity_search("a bar", k=2, **settings)] == ids

    def test_what_differs_is_found(self, store, predictor):
        texts = ["a bar", "a bar a", "a green square", "red circle on black"]
        store.add_texts(texts, ids=["0", "1", "2", "3"])
        vectors = predictor.embed_texts(texts)
        # the most different
        expected = [
            0,
            min(range(1, 4), key=lambda number: float(vectors[0] @ vectors[number])),
        ]
        found = store.max_marginal_relevance_search("a bar", k=2, fetch_k=4, lambda_mult=0.01)
        assert [document.id for document in found] == list(map(str, expected))
        nearest = store.max_marginal_relevance_search("a bar", k=2, lambda_mult=1)
        assert nearest == store.similarity_search("a bar", k=2)
        retriever = store.as_retriever(
            search_type="mmr", search_kwargs={"k": 1, "where": "path = '3'"}
        )
        assert [document.id for document in retriever.invoke("a bar")] == ["3"]
        assert store.max_marginal_relevance_search("a bar", where="path = 'x'") == []


class TestImages:
    def test_with_and_without_texts(self, store, index, predictor, tmp_path):
        files = [str(index.parent / f"{number:02}.png") for number in range(3)]
        store.add_images(files[:1], ids=["alone"])
        store.add_texts(TEXTS[:2], ABOUTS[:2], ids=["0", "1"], images=files[1:])
        store.add_texts(["a voice"], ids=["voice"])
        documents = store.get_by_ids(["alone", "0"])
        assert documents[0] == Document(id="alone", page_content="", metadata={"source": files[0]})
        assert documents[1] == Document(
            id="0", page_content=TEXTS[0], metadata={"source": files[1], **ABOUTS[0]}
        )
        found = store.similarity_search_with_score(TEXTS[0], k=9)
        vectors = dict(zip(("alone", "0", "1"), predictor.embed_images(files), strict=True))
        vectors["voice"] = predictor.embed_texts("a voice")[0]
        query = predictor.embed_texts(TEXTS[0])[0]
        expected = sorted(
            ((float(vector @ query), id_) for id_, vector in vectors.items()), reverse=True
        )
        assert [document.id for document, _ in found] == [id_ for _, id_ in expected]
        assert store.similarity_search(TEXTS[0], k=1, against="captions")[0].id == "0"
        searched = Searcher(tmp_path / "documents.lance", predictor)  # as `bridgetower search` does
        assert searched.index.content(
            next(hit for hit in searched.search("x", rerank=0) if hit.path == "0")
        )
        *matched, last = store.similarity_search(TEXTS[0], k=9, rerank=4)
        assert {document.id for document in matched} == {"alone", "0", "1"}
        assert last.id == "voice"

    def test_texts_alone_have_nothing_to_match(self, store, predictor):
        store.add_texts(TEXTS, ids=["a", "b", "c"])
        expected = store.similarity_search_with_score("a bar", k=3)
        assert store.similarity_search_with_score("a bar", k=3, rerank=4) == expected
        pytest.importorskip("uvicorn")
        from served import running

        with running(predictor, Searcher(store.searcher.index, predictor)) as client:
            hits = client.post("/v1/search", json={"query": "a bar", "rerank": 4}).json()["data"]
        assert [(hit["path"], hit["rank"]) for hit in hits] == [
            (one.id, n) for n, (one, _) in enumerate(expected, 1)
        ]

    def test_an_index_from_elsewhere(self, index, predictor):
        store, searcher = BridgeTowerVectorStore(index), Searcher(index, predictor)
        for settings in (
            {"rerank": 8, "where": "path < '20'"},
            {"rerank": None},
            {"rerank": 0, "against": "captions"},
        ):
            hits = searcher.search("a red circle", top=5, **settings)
            retriever = store.as_retriever(search_kwargs={"k": 5, **settings})
            documents = retriever.invoke("a red circle")
            assert [document.id for document in documents] == [hit.path for hit in hits]
            assert asyncio.run(retriever.ainvoke("a red circle")) == documents
            for document, hit in zip(documents, hits, strict=True):
                assert document.page_content == "\n".join(hit.captions)
                about = document.metadata
                assert (about["source"], about["digest"]) == (str(hit.file), hit.digest)
                assert (about["score"], about["cosine"]) == pytest.approx(
                    (hit.score, hit.cosine), abs=1e-6
                )
        (document,) = store.as_retriever().invoke("a bar", k=1, where="path = '07.png'")
        assert store.get_by_ids(["07.png"])[0].page_content == document.page_content
        for query, options, words in (
            (" ", {}, "the text to search for is ' '"),
            ("a bar", {"where": "colour = 1"}, "where is 'colour = 1'"),
            ("a bar", {"k": 0}, "top is 0"),
        ):
            with pytest.raises(ValueError, match=words):
                store.similarity_search(query, **options)


class TestErrors:
    def test_what_cannot_be_added(self, store):
        cases = [
            ({"texts": TEXTS, "metadatas": [{}]}, "3 documents and 1 metadatas"),
            ({"texts": TEXTS, "ids": ["a"]}, "3 documents and 1 ids"),
            ({"texts": TEXTS, "images": ["a.png"]}, "1 images and 3 texts"),
            ({"texts": ["a"], "images": ["none.png"]}, "none.png: .*; nothing was added"),
            ({"texts": ["a bar " * 90]}, "the limit is 24"),
            (
                {"texts": ["a"], "metadatas": [{"file": Path()}]},
                "cannot be kept .*; expected values of JSON",
            ),
        ]
        for given, message in cases:
            with pytest.raises(ValueError, match=message):
                store.add_texts(**given)
        assert len(store.searcher.index) == 0
        store.add_texts(TEXTS)
        for settings in ({"were": "width > 8"}, {"page": 2}):
            for search in (store.similarity_search, store.max_marginal_relevance_search):
                with pytest.raises(TypeError, match="unexpected keyword argument"):
                    search("a bar", **settings)
        with pytest.raises(TypeError, match="unexpected keyword argument"):
            store.add_texts(TEXTS, namespace="a")
        with pytest.raises(
            ValueError, match="expected metadata or a function; give a condition in SQL as where"
        ):
            store.similarity_search("a bar", filter="width > 8")

    def test_what_from_texts_needs(self, embeddings, tmp_path):
        with pytest.raises(ValueError, match="from_texts has no index"):
            BridgeTowerVectorStore.from_texts(TEXTS, embeddings)
        with pytest.raises(
            ValueError, match="DeterministicFakeEmbedding; expected BridgeTowerEmbeddings"
        ):
            BridgeTowerVectorStore.from_texts(
                TEXTS, DeterministicFakeEmbedding(size=8), index=tmp_path / "a.lance"
            )


class Missing:
    @pytest.mark.skip(reason="needs pip install --no-deps langchain-tests")
    def test_standard(self):
        """Stands for LangChain's own tests."""


def vector_store_tests():
    """Returns LangChain's tests of stores from their file; the package around it wants plugins that are not here."""
    package = find_spec("langchain_tests")
    if package is None or package.origin is None:
        return Missing
    place = Path(package.origin).parent / "integration_tests" / "vectorstores.py"
    found = spec_from_file_location("standard_tests", place)
    module = module_from_spec(found)
    found.loader.exec_module(module)
    return module.VectorStoreIntegrationTests


class TestStandard(vector_store_tests()):
    """Those without coroutines, which nothing runs here; ours are those of the base class, which call the others."""

    @pytest.fixture
    def vectorstore(self, comparable_checkpoint, tmp_path):
        return BridgeTowerVectorStore(
            tmp_path / "documents.lance",
            BridgeTowerEmbeddings(load(comparable_checkpoint, device="cpu")),
        )


for _name in [name for name in dir(TestStandard) if name.endswith("_async")]:
    setattr(TestStandard, _name, None)
