"""What the server says about its model and itself."""

import asyncio

import pytest

import bridgetower
from bridgetower.inference.predictor import load
from bridgetower.serve.app import info
from bridgetower.serve.config import ServeConfig
from bridgetower.serve.service import Service
from helpers.servers import URIS, error_of

NO_HEAD = (
    "/v1/answer",
    "/v1/entail",
    "/v1/reason",
    "/v1/classify",
    "/v1/predict",
)  # in the small model


def test_one_model(client, predictor):
    listed = client.get("/v1/models").json()
    (model,) = listed["data"]
    assert listed["object"] == "list"
    assert client.get("/v1/models/tiny").json() == model
    assert model.pop("created") > 1.7e9
    uses = ["embeddings", "match", "fill-mask", "explain"]
    fields = {"id": "tiny", "object": "model"}
    fields |= {"owned_by": "bridgetower", "fingerprint": predictor.fingerprint, "image_size": 20}
    assert model == fields | {"max_tokens": 24, "mask_token": "<mask>", "uses": uses, "heads": []}
    assert error_of(client.get("/v1/models/gpt"), 404)["code"] == "model_not_found"
    for path in ("/health", "/ready"):
        assert client.get(path).json() == {"status": "ok"}


def test_a_model_is_named_after_its_source(answering_server, answering_predictor):
    (model,) = answering_server.client.get("/v1/models").json()["data"]
    assert (model["id"], model["uses"]) == (
        answering_predictor.source,
        ["explain", "answer", "entail", "reason"],
    )
    assert (
        answering_server.client.get(f"/v1/models/{model['id'].removeprefix('/')}").status_code
        == 404
    )
    assert answering_server.client.get(f"/v1/models/{model['id']}").json() == model


def test_two_models(two_models, answering_predictor):
    client = two_models.client
    name = answering_predictor.source
    first, second = client.get("/v1/models").json()["data"]
    assert (first["id"], first["uses"]) == ("tiny", ["embeddings", "match", "fill-mask", "explain"])
    assert (second["id"], second["uses"]) == (name, ["answer", "entail", "reason"])
    assert second["fingerprint"] == answering_predictor.fingerprint != first["fingerprint"]
    assert [
        client.get(f"/v1/models/{name_of_model}").json() for name_of_model in ("tiny", name)
    ] == [first, second]
    question = {"images": URIS[0], "questions": "which colour?", "top": 2}
    assert client.post("/v1/answer", json=question | {"model": name}).json()["model"] == name
    message = error_of(client.post("/v1/answer", json=question | {"model": "tiny"}), 404)["message"]
    assert message == f"model is 'tiny'; this server has '{name}' for this"
    error_of(client.post("/v1/embeddings", json={"input": "a", "model": name}), 404)


def test_every_example_works(client, post):
    description = client.get("/openapi.json").json()
    schemas = description["components"]["schemas"]
    tried = 0
    for path, operations in description["paths"].items():
        if path in NO_HEAD or "requestBody" not in operations.get("post", {}):
            continue
        reference = operations["post"]["requestBody"]["content"]["application/json"]["schema"][
            "$ref"
        ]
        for example in schemas[reference.rpartition("/")[2]]["examples"]:
            post(path, **example)
            tried += 1
    assert tried >= 8


def test_info_has_the_fields_of_text_embeddings_inference(tiny_checkpoint):
    model = load(tiny_checkpoint, device="cpu", precision="bf16")
    config = ServeConfig(name="tiny", max_batch=4, max_items=8, queue=100)
    description = asyncio.run(info(Service(model, config)))
    fields = {
        "model_id": "tiny",
        "model_sha": model.fingerprint,
        "model_dtype": "bfloat16",
        "auto_truncate": False,
    }
    fields |= {"model_type": {"embedding": {"pooling": "cls"}}, "version": bridgetower.__version__}
    limits = {
        "max_concurrent_requests": 100,
        "max_input_length": 24,
        "max_batch_tokens": 96,
        "max_batch_requests": 4,
    }
    assert description == fields | limits | {"max_client_batch_size": 8, "tokenization_workers": 1}


def test_labels_of_many_images_have_a_limit(client):
    labels = [f"label {number}" for number in range(500)]
    body = {"images": [URIS[0]] * 500, "labels": labels, "templates": ["{}"]}
    details = error_of(client.post("/v1/classify", json=body), 413)
    assert (
        details["message"]
        == "labels: 500 images with 500 labels each, the limit is 102400; send top"
    )
    rows = client.post("/v1/classify", json={**body, "images": [URIS[0]] * 50}).json()["data"]
    assert [row["index"] for row in rows] == list(range(50))
    assert all(
        sum(choice["probability"] for choice in row["classes"]) == pytest.approx(1, abs=1e-4)
        for row in rows
    )
    assert [len(row["classes"]) for row in rows] == [500] * 50
