"""Clients that people use: OpenAI's package, LangChain's embeddings, curl."""

import base64
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import openai
import predictionguard
import pytest

from helpers.servers import API_KEY, PNGS, SERVED_TEXTS, URIS, held_up_text_tower, wait_until


@pytest.fixture
def locked_address(locked):
    return str(locked.client.base_url.join("/v1"))


@pytest.fixture
def openai_client(locked_address):
    return openai.OpenAI(base_url=locked_address, api_key=API_KEY, max_retries=0)


class TestOpenai:
    def test_embeddings_and_models(self, openai_client, predictor):
        expected = predictor.embed_texts(SERVED_TEXTS)
        for options in ({}, {"encoding_format": "float"}):  # by itself the client asks for base64
            answer = openai_client.embeddings.create(model="tiny", input=SERVED_TEXTS, **options)
            np.testing.assert_allclose([row.embedding for row in answer.data], expected, atol=1e-5)
            assert answer.usage.prompt_tokens > 0
        answer = openai_client.embeddings.create(
            model="tiny", input=URIS[0], extra_body={"modality": "image"}
        )
        assert len(answer.data[0].embedding) == 8
        assert [model.id for model in openai_client.models.list()] == ["tiny"]
        assert openai_client.models.retrieve("tiny").owned_by == "bridgetower"

    def test_errors_have_their_classes(self, openai_client, locked_address):
        with pytest.raises(openai.BadRequestError, match="not trained for shortened vectors"):
            openai_client.embeddings.create(model="tiny", input="a", dimensions=4)
        with pytest.raises(openai.NotFoundError, match="this server has 'tiny'"):
            openai_client.embeddings.create(model="other", input="a")
        with pytest.raises(openai.AuthenticationError, match="API key is missing or wrong"):
            openai.OpenAI(base_url=locked_address, api_key="other").embeddings.create(
                model="tiny", input="a"
            )
        with pytest.raises(openai.NotFoundError, match="this server generates no text"):
            openai_client.chat.completions.create(
                model="tiny", messages=[{"role": "user", "content": "What is it?"}]
            )
        with pytest.raises(openai.APIStatusError, match="9 items, the limit is 8"):
            openai_client.embeddings.create(model="tiny", input=["a"] * 9)

    def test_it_comes_back_when_the_queue_was_full(self, locked, locked_address, predictor):
        patient = openai.OpenAI(base_url=locked_address, api_key=API_KEY, max_retries=5)
        refusals = locked.service.metrics.requests.labels("/v1/embeddings", "429")._value
        before = refusals.get()
        with held_up_text_tower(predictor) as gate, ThreadPoolExecutor(3) as pool:
            ask = partial(pool.submit, patient.embeddings.create, model="tiny")
            admitted = [ask(input=[text] * 8) for text in "ab"]
            wait_until(lambda: locked.service.scheduler.admitted == 4)  # half of the queue
            refused = ask(input=["c"] * 8)
            wait_until(lambda: refusals.get() > before)
            gate.set()
            assert [len(answer.result().data) for answer in (*admitted, refused)] == [8] * 3


class TestPredictionGuard:
    @pytest.fixture
    def guard_client(self, locked_address):
        return predictionguard.PredictionGuard(api_key=API_KEY, url=locked_address)

    def test_frames_with_transcripts_and_a_question(self, guard_client, predictor, tmp_path):
        (tmp_path / "frame.png").write_bytes(PNGS[1])
        images = [base64.b64encode(PNGS[0]).decode(), str(tmp_path / "frame.png"), URIS[2]]
        entries = [
            {"text": text, "image": image} for text, image in zip(SERVED_TEXTS, images, strict=True)
        ]
        answer = guard_client.embeddings.create(model="tiny", input=entries)
        vectors = np.array([row["embedding"] for row in answer["data"]])
        np.testing.assert_allclose(vectors, predictor.embed_pairs(PNGS, SERVED_TEXTS), atol=1e-5)

        question = guard_client.embeddings.create(model="tiny", input=[{"text": SERVED_TEXTS[0]}])[
            "data"
        ][0]["embedding"]
        np.testing.assert_allclose(question, predictor.embed_texts(SERVED_TEXTS[0])[0], atol=1e-5)
        assert (
            "embedding"
            in guard_client.embeddings.create(model="tiny", input=SERVED_TEXTS, truncate=True)[
                "data"
            ][2]
        )

    def test_errors_are_their_message(self, guard_client, locked_address):
        with pytest.raises(ValueError, match="check your access api_key"):
            predictionguard.PredictionGuard(api_key="other", url=locked_address)
        with pytest.raises(
            ValueError, match=r"^Could not generate embeddings\. model is 'other'; this server"
        ):
            guard_client.embeddings.create(model="other", input=SERVED_TEXTS)
        with pytest.raises(
            ValueError, match=r"^Could not generate embeddings\. .*9 items, the limit is 8"
        ):
            guard_client.embeddings.create(model="tiny", input=["a"] * 9)
        with pytest.raises(
            ValueError, match=r"^Could not make prediction\. this server generates no text"
        ):
            guard_client.chat.completions.create(
                model="tiny", messages=[{"role": "user", "content": "What is it?"}]
            )


def test_langchain(locked_address, predictor):
    langchain = pytest.importorskip("langchain_openai")
    embeddings = langchain.OpenAIEmbeddings(
        base_url=locked_address,
        api_key=API_KEY,
        model="tiny",
        check_embedding_ctx_length=False,
        chunk_size=2,
    )
    expected = predictor.embed_texts(SERVED_TEXTS).numpy()
    np.testing.assert_allclose(embeddings.embed_documents(SERVED_TEXTS), expected, atol=1e-5)
    np.testing.assert_allclose(embeddings.embed_query(SERVED_TEXTS[1]), expected[1], atol=1e-5)
