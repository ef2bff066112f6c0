"""The figures count what happened."""

import re

import httpx

from bridgetower.predictor import Predictor
from served import TEXTS, running


def figures(client: httpx.Client) -> dict[str, float]:
    response = client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    lines = re.findall(r"^([^#\n].*) (\S+)$", response.text, re.MULTILINE)
    return {name: float(value) for name, value in lines}


def test_requests_batches_and_memory(predictor: Predictor) -> None:
    with running(predictor, name="tiny", max_batch=4) as client:
        before = figures(client)
        for body in ({"input": TEXTS * 2}, {"input": "a"}, {"input": 7}):
            client.post("/v1/embeddings", json=body)
        client.get("/v1/models/tiny")
        client.get("/nowhere/1")
        client.get("/nowhere/2")
        after = figures(client)
    gained = {name: value - before.get(name, 0) for name, value in after.items()}
    assert gained['bridgetower_requests_total{route="/v1/embeddings",status="200"}'] == 2
    assert gained['bridgetower_requests_total{route="/v1/embeddings",status="400"}'] == 1
    assert gained['bridgetower_requests_total{route="/v1/models/{name:path}",status="200"}'] == 1
    assert gained['bridgetower_requests_total{route="none",status="404"}'] == 2
    assert gained['bridgetower_request_seconds_count{route="/v1/embeddings"}'] == 3
    assert gained["bridgetower_batch_items_sum"] == 7
    assert gained["bridgetower_batch_items_count"] == 3
    for name in ("items_admitted", "items_queued", "items_computing"):
        assert after[f"bridgetower_{name}"] == 0
    assert after["bridgetower_requests_in_flight"] == 1  # this one
    assert gained["bridgetower_queue_seconds_count"] == 3
    assert after["process_resident_memory_bytes"] > 10**7
    assert after[f'bridgetower_model_info{{fingerprint="{predictor.fingerprint}",name="tiny"}}'] == 1
