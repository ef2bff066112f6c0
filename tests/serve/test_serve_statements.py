"""Judgements over HTTP, equal to the direct calls."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from bridgetower.inference import Choice
from bridgetower.predictor import Predictor, load
from served import PNGS, TEXTS, URIS, error_of, running


@pytest.fixture(scope="module")
def judging(answering_checkpoint: Path) -> Predictor:
    return load(answering_checkpoint, device="cpu")


@pytest.fixture(scope="module")
def judge(judging: Predictor) -> Iterator[httpx.Client]:
    with running(judging, name="judge") as client:
        yield client


def check(answer: dict[str, Any], expected: list[list[Choice]]) -> None:
    assert [row["index"] for row in answer["data"]] == list(range(len(expected)))
    for row, choices in zip(answer["data"], expected, strict=True):
        assert [judgement["label"] for judgement in row["judgements"]] == [choice.label for choice in choices]
        probabilities = [judgement["probability"] for judgement in row["judgements"]]
        assert probabilities == pytest.approx([choice.probability for choice in choices], abs=1e-5)


def test_entailment(judge: httpx.Client, judging: Predictor) -> None:
    answer = judge.post("/v1/entail", json={"images": URIS, "statements": TEXTS}).json()
    check(answer, judging.entail(PNGS, TEXTS))
    assert len(answer["data"][0]["judgements"]) == 3
    assert answer["usage"]["total_tokens"] == 3 * 5 + sum(map(len, judging.processor.token_ids(TEXTS)))


def test_two_images(judge: httpx.Client, judging: Predictor) -> None:
    body = {"images": URIS, "images_2": URIS[::-1], "statements": TEXTS}
    answer = judge.post("/v1/reason", json=body).json()
    check(answer, judging.reason(PNGS, PNGS[::-1], TEXTS))
    assert answer["usage"]["total_tokens"] == 6 * 5 + sum(map(len, judging.processor.token_ids(TEXTS)))
    swapped = judge.post("/v1/reason", json=body | {"images": URIS[::-1], "images_2": URIS}).json()
    assert swapped["data"] != answer["data"]


def test_refusals(judge: httpx.Client) -> None:
    def refused(path: str, **body: Any) -> dict[str, Any]:
        return error_of(judge.post(path, json=body), 400)

    assert "3 images and 2 texts" in refused("/v1/entail", images=URIS, statements=TEXTS[:2])["message"]
    error = refused("/v1/reason", images=URIS, images_2=URIS[:2], statements=TEXTS)
    assert (error["param"], "3 images and 2 images_2" in error["message"]) == ("images_2", True)
    assert refused("/v1/reason", images=URIS[0], images_2="/etc/passwd", statements="a")["param"] == "images_2"
    assert refused("/v1/entail", images=URIS[0], statements="red circle " * 30)["param"] == "statements"


def test_two_images_count_as_two(judging: Predictor) -> None:
    with running(judging, max_items=5, queue=5) as client:
        body = {"images": URIS, "images_2": URIS, "statements": TEXTS}
        error = error_of(client.post("/v1/reason", json=body), 413)
        assert error["message"] == "images: 6 items, the limit is 5; send several requests"


def test_a_model_without_the_head(refused: Callable[..., dict[str, Any]]) -> None:
    error = refused("/v1/entail", images=URIS[0], statements="a")
    assert (error["code"], "snli_ve" in error["message"]) == ("unsupported_by_model", True)
    error = refused("/v1/reason", images=URIS[0], images_2=URIS[0], statements="a")
    assert (error["code"], "nlvr2" in error["message"]) == ("unsupported_by_model", True)


def test_a_second_model_judges(predictor: Predictor, judging: Predictor) -> None:
    with running(predictor, answering=judging, name="tiny") as client:
        answer = client.post("/v1/entail", json={"images": URIS, "statements": TEXTS}).json()
        check(answer, judging.entail(PNGS, TEXTS))
        assert answer["model"] == judging.source
