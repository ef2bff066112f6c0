"""LlamaIndex embeds texts and images with a model of this package, and finds images by a text."""

import asyncio
import io
import pickle
import threading
from pathlib import Path

import pytest

from helpers.models import assert_close

TEXTS = ["red circle on black", "a bar", "a square"]


@pytest.fixture(scope="module")
def embed_with():
    """Makes embeddings. The library takes seconds to import, which other processes of tests need not spend."""
    pytest.importorskip("llama_index.core")
    from bridgetower.integrations.llama_index import BridgeTowerEmbedding

    return BridgeTowerEmbedding


@pytest.fixture(scope="module")
def llama_embedding(embed_with, predictor):
    return embed_with(predictor, embed_batch_size=2)


def test_vectors_in_this_thread_and_in_others(llama_embedding, predictor, image_files, monkeypatch):
    texts = predictor.embed_texts(TEXTS)
    vectors = predictor.embed_images(image_files)
    assert_close(llama_embedding.get_text_embedding_batch(TEXTS), texts)
    assert_close(llama_embedding.get_query_embedding(TEXTS[1]), texts[1])
    assert_close(asyncio.run(llama_embedding.aget_query_embedding(TEXTS[1])), texts[1])
    assert_close(llama_embedding.get_image_embedding_batch(image_files), vectors)
    assert_close(
        llama_embedding.get_image_embedding(io.BytesIO(Path(image_files[1]).read_bytes())),
        vectors[1],
    )
    assert_close(asyncio.run(llama_embedding.aget_image_embedding(image_files[1])), vectors[1])
    assert llama_embedding.model_name == predictor.source
    calls = []

    def counted(embed):
        def call(inputs, **options):
            calls.append((len(inputs), threading.current_thread() is threading.main_thread()))
            return embed(inputs, **options)

        return call

    monkeypatch.setattr(predictor, "embed_texts", counted(predictor.embed_texts))
    monkeypatch.setattr(predictor, "embed_images", counted(predictor.embed_images))
    assert_close(asyncio.run(llama_embedding.aget_text_embedding_batch(TEXTS)), texts)
    assert_close(asyncio.run(llama_embedding.aget_image_embedding_batch(image_files)), vectors)
    assert sorted(calls) == [(1, False), (1, False), (2, False), (2, False)]


@pytest.mark.parametrize(
    "copied",
    [
        lambda model: pickle.loads(pickle.dumps(model)),
        lambda model: type(model).from_dict(model.to_dict()),
    ],
)
def test_copies(copied, embed_with, predictor):
    embedding = embed_with(
        predictor.source,
        truncate=True,
        embed_batch_size=3,
        options={"device": "cpu", "image_size": 40},
    )
    copy = copied(embedding)
    assert (copy.truncate, copy.embed_batch_size, copy.model_name) == (True, 3, predictor.source)
    assert copy._predictor.fingerprint == embedding._predictor.fingerprint != predictor.fingerprint
    long = "red circle on black " * 30
    assert_close(copy.get_text_embedding(long), embedding.get_text_embedding(long))
    with pytest.raises(ValueError, match="truncate"):
        embed_with(predictor).get_text_embedding(long)
    with pytest.raises(
        ValueError, match="no model is given; give the loaded model, or what to load"
    ):
        embed_with(truncate=True)


def test_an_index_of_images(llama_embedding, predictor, image_files):
    from llama_index.core.indices import MultiModalVectorStoreIndex
    from llama_index.core.schema import ImageNode

    nodes = [
        ImageNode(image_path=image, id_=image, metadata={"file_path": image})
        for image in image_files
    ]
    index = MultiModalVectorStoreIndex(
        nodes=nodes, embed_model=llama_embedding, image_embed_model=llama_embedding
    )
    hits = index.as_retriever(image_similarity_top_k=3).text_to_image_retrieve(TEXTS[0])
    cosines = predictor.embed_images(image_files) @ predictor.embed_texts(TEXTS[0])[0]
    assert {hit.node.id_: pytest.approx(hit.score, abs=1e-5) for hit in hits} == dict(
        zip(image_files, cosines.tolist(), strict=True)
    )
