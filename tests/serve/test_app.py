"""The description of the API."""

import httpx

from bridgetower.predictor import Predictor
from bridgetower.serve.app import build_app
from bridgetower.serve.config import ServeConfig
from bridgetower.serve.service import Service


def test_the_description_has_this_server_s_errors(client: httpx.Client) -> None:
    content = client.get("/openapi.json").json()
    assert set(content["paths"]) == {
        *("/v1/embeddings", "/v1/rerank", "/v1/match", "/v1/answer", "/v1/fill-mask", "/v1/search"),
        *("/v1/models", "/v1/models/{name}", "/health", "/ready", "/metrics"),
    }
    responses = content["paths"]["/v1/match"]["post"]["responses"]
    assert set(responses) == {"200", "400", "401", "404", "408", "413", "429", "503"}
    assert responses["429"]["content"]["application/json"]["schema"]["$ref"].endswith("/Error")
    assert "HTTPValidationError" not in content["components"]["schemas"]


def test_nothing_is_loaded_from_elsewhere(client: httpx.Client) -> None:
    assert {client.get(path).status_code for path in ("/docs", "/redoc", "/docs/oauth2-redirect")} == {404}


def test_two_applications_are_apart(predictor: Predictor) -> None:
    first, second = (build_app(Service(predictor, ServeConfig(name=name))) for name in ("one", "two"))
    assert (first.state.service.name, second.state.service.name) == ("one", "two")
