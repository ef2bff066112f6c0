"""Matching, answering and filling over HTTP, equal to the direct calls."""

import resource
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from bridgetower.predictor import Predictor, load
from bridgetower.serve.pairs import Filled
from bridgetower.serve.schemas import Listed
from served import PNGS, TEXTS, URIS, error_of, running

Post = Callable[..., Any]
MASKED = ["a <mask> on <mask>", "<mask> bar"]


def _most_memory() -> int:
    """Bytes that this process, which the server runs in, has had in memory at most."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@pytest.fixture(scope="module")
def answering(answering_checkpoint: Path) -> Predictor:
    return load(answering_checkpoint, device="cpu")


@pytest.fixture(scope="module")
def answers(answering: Predictor) -> Iterator[httpx.Client]:
    with running(answering, name="answers") as client:
        yield client


class TestMatch:
    def test_one_to_one(self, post: Post, predictor: Predictor) -> None:
        answer = post("/v1/match", images=URIS, texts=TEXTS)
        assert [(row["image"], row["text"]) for row in answer["data"]] == [(0, 0), (1, 1), (2, 2)]
        expected = predictor.match(PNGS, TEXTS).tolist()
        assert [row["probability"] for row in answer["data"]] == pytest.approx(expected, abs=1e-5)
        assert answer["usage"]["total_tokens"] == 3 * 5 + sum(map(len, predictor.processor.token_ids(TEXTS)))

    def test_all_pairs(self, post: Post, predictor: Predictor) -> None:
        answer = post("/v1/match", images=URIS, texts=TEXTS[:2], all_pairs=True)
        assert [(row["image"], row["text"]) for row in answer["data"]] == [(i, t) for i in range(3) for t in range(2)]
        expected = predictor.match(PNGS, TEXTS[:2], all_pairs=True).flatten().tolist()
        assert [row["probability"] for row in answer["data"]] == pytest.approx(expected, abs=1e-5)
        assert len({round(probability, 4) for probability in expected}) == 6

    def test_refusals(self, refused: Post) -> None:
        assert "3 images and 2 texts" in refused("/v1/match", images=URIS, texts=TEXTS[:2])["message"]
        error = refused("/v1/match", 413, images=[URIS[0]] * 33, texts=["a"] * 32, all_pairs=True)
        assert "1056 items, the limit is 1024" in error["message"]
        assert refused("/v1/match", images=URIS[0])["param"] == "texts"
        assert "at most 20000 characters" in refused("/v1/match", images=URIS[0], texts="a" * 20_001)["message"]
        assert refused("/v1/match", images=[URIS[0], "x"], texts=["a", "b"])["param"] == "images.1"

    def test_pairs_are_counted_before_any_is_built(self, client: httpx.Client) -> None:
        """9 and 16 million pairs, of which a list would take a gigabyte."""
        for number in (3000, 4096):
            before = _most_memory()
            letters = ["a"] * number
            response = client.post("/v1/match", json={"images": letters, "texts": letters, "all_pairs": True})
            assert f"images: {number**2} items, the limit is 1024" in error_of(response, 413)["message"]
            assert _most_memory() - before < 100 * 2**20

    def test_a_model_without_the_head(self, answers: httpx.Client) -> None:
        error = error_of(answers.post("/v1/match", json={"images": URIS[0], "texts": "a"}), 400)
        assert "no matching (ITM) head" in error["message"]


class TestAnswer:
    def test_likeliest_first(self, answers: httpx.Client, answering: Predictor) -> None:
        body = {"images": URIS, "questions": TEXTS, "top": 3}
        data = answers.post("/v1/answer", json=body).json()["data"]
        expected = answering.answer(PNGS, TEXTS, top=3)
        assert [row["index"] for row in data] == [0, 1, 2]
        for row, choices in zip(data, expected, strict=True):
            assert [answer["label"] for answer in row["answers"]] == [choice.label for choice in choices]
            probabilities = [answer["probability"] for answer in row["answers"]]
            assert probabilities == pytest.approx([choice.probability for choice in choices], abs=1e-5)

    def test_a_model_without_the_head(self, refused: Post) -> None:
        error = refused("/v1/answer", images=URIS[0], questions="what?")
        assert error["code"] == "unsupported_by_model"
        assert "vqa" in error["message"]

    @pytest.mark.parametrize("top", [0, 101, "many", None])
    def test_top(self, answers: httpx.Client, top: object) -> None:
        body = {"images": URIS[0], "questions": "what?", "top": top}
        assert error_of(answers.post("/v1/answer", json=body), 400)["param"] == "top"


class TestFillMask:
    def test_words_per_mask(self, post: Post, predictor: Predictor) -> None:
        data = post("/v1/fill-mask", images=URIS[:2], texts=MASKED, top=4)["data"]
        for row, masks in zip(data, predictor.fill_mask(PNGS[:2], MASKED, top=4), strict=True):
            for words, expected in zip(row["masks"], masks, strict=True):
                assert [word["word"] for word in words] == [word.word for word in expected]
                probabilities = [word["probability"] for word in words]
                assert probabilities == pytest.approx([word.probability for word in expected], abs=1e-5)

    def test_no_mask(self, refused: Post) -> None:
        error = refused("/v1/fill-mask", images=URIS[:2], texts=["a <mask>", "a bar"])
        assert error["message"] == "texts: no mask in text 1; put <mask> where a word is missing"
        cut = refused("/v1/fill-mask", images=URIS[0], texts="red circle on black " * 30 + "<mask>", truncate=True)
        assert "no mask in text 0" in cut["message"]

    def test_no_more_words_than_can_be_answered_with(self, predictor: Predictor) -> None:
        with running(predictor, max_items=2, queue=2) as client:
            body = {"images": URIS[:2], "texts": ["<mask> bar", "<mask>"]}
            assert client.post("/v1/fill-mask", json=body | {"top": 100}).status_code == 200
            error = error_of(client.post("/v1/fill-mask", json=body | {"texts": MASKED, "top": 100}), 413)
        assert error["message"] == "texts: 3 masks with 100 words each, the limit is 200 words; ask for fewer"

    def test_long_answers_are_built_in_a_thread(
        self, client: httpx.Client, predictor: Predictor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        threads: list[str] = []
        dump = Listed[Filled].model_dump_json

        def noted(*given: Any, **settings: Any) -> str:
            threads.append(threading.current_thread().name)
            return dump(*given, **settings)

        monkeypatch.setattr(Listed[Filled], "model_dump_json", noted)
        for number, top in ((1, 1), (12, 100)):
            body = {"images": URIS[:1] * number, "texts": ["<mask> bar"] * number, "top": top}
            data = client.post("/v1/fill-mask", json=body).json()["data"]
            expected = predictor.fill_mask(PNGS[0], "<mask> bar", top=top)[0]
            assert [[word["word"] for word in row["masks"][0]] for row in data] == [
                [word.word for word in expected]
            ] * number
        assert [name.startswith("asyncio") for name in threads] == [False, True]

    def test_a_model_without_the_head(self, answers: httpx.Client) -> None:
        error = error_of(answers.post("/v1/fill-mask", json={"images": URIS[0], "texts": "<mask>"}), 400)
        assert "no masked-language (MLM) head" in error["message"]
