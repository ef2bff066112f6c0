"""What the server says about its model and itself."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

from bridgetower.predictor import Predictor, load
from served import error_of, running


def test_the_one_model(client: httpx.Client, predictor: Predictor) -> None:
    listed = client.get("/v1/models").json()
    (model,) = listed["data"]
    assert listed["object"] == "list"
    assert model == client.get("/v1/models/tiny").json()
    assert model["id"] == "tiny"
    assert (model["object"], model["owned_by"]) == ("model", "bridgetower")
    assert model["fingerprint"] == predictor.fingerprint
    assert (model["image_size"], model["max_tokens"]) == (20, 24)
    assert model["uses"] == ["embeddings", "match", "fill-mask"]


def test_a_model_is_named_after_its_source(answering_checkpoint: Path) -> None:
    with running(load(answering_checkpoint, device="cpu")) as client:
        (model,) = client.get("/v1/models").json()["data"]
        assert model["id"] == str(answering_checkpoint)
        assert model["uses"] == ["answer"]
        assert client.get(f"/v1/models/{model['id'].removeprefix('/')}").status_code == 404
        assert client.get(f"/v1/models/{model['id']}").json() == model


def test_another_model(client: httpx.Client) -> None:
    assert error_of(client.get("/v1/models/gpt"), 404)["code"] == "model_not_found"


def test_health_and_readiness(client: httpx.Client) -> None:
    for path in ("/health", "/ready"):
        assert client.get(path).json() == {"status": "ok"}


def test_every_example_works(client: httpx.Client, post: Callable[..., Any]) -> None:
    description = client.get("/openapi.json").json()
    schemas = description["components"]["schemas"]
    tried = 0
    for path, operations in description["paths"].items():
        for operation in operations.values():
            if "requestBody" in operation:
                reference = operation["requestBody"]["content"]["application/json"]["schema"]["$ref"]
                for example in schemas[reference.rpartition("/")[2]]["examples"]:
                    if path != "/v1/answer":  # the small model has no head for it
                        post(path, **example)
                        tried += 1
    assert tried >= 7
