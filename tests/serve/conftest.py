"""Servers around the small model, each started once, and what is asked of the usual one."""

import json

import pytest

from helpers.servers import API_KEY, build_searcher, error_of, start_server
from helpers.shapes import write_shape_pictures


@pytest.fixture(scope="session")
def anyio_backend():
    return "asyncio"


@pytest.fixture(scope="session")
def searcher(predictor, tmp_path_factory):
    return build_searcher(write_shape_pictures(tmp_path_factory.mktemp("indexed")), predictor)


@pytest.fixture(scope="session")
def server(predictor, searcher):
    with start_server(predictor, searcher, name="tiny", page=True) as running:
        yield running


@pytest.fixture(scope="session")
def locked(predictor, searcher):
    few = {"queue": 8, "max_items": 8, "forwarded_allow_ips": ("127.0.0.1",)}
    with start_server(
        predictor, searcher, name="tiny", page=True, api_key=API_KEY, access_log=True, **few
    ) as running:
        yield running


@pytest.fixture(scope="session")
def hasty(predictor, searcher):
    limits = {"timeout": 1.5, "max_body": 1, "max_items": 4, "queue": 8}
    with start_server(predictor, searcher, patience=1.0, **limits) as running:
        yield running


@pytest.fixture(scope="session")
def two_models(predictor, answering_predictor):
    with start_server(predictor, answering=answering_predictor, name="tiny") as running:
        yield running


@pytest.fixture(scope="session")
def answering_server(answering_predictor):
    with start_server(answering_predictor, max_items=5, queue=5) as running:
        yield running


@pytest.fixture(scope="session")
def client(server):
    return server.client


@pytest.fixture
def post(client):
    def call(path, **body):
        response = client.post(path, json=body)
        assert response.status_code == 200, response.text
        return response.json()

    return call


@pytest.fixture
def post_refused(client):
    def call(path, status=400, **body):
        content = json.dumps(body)  # half a surrogate pair is escaped
        return error_of(
            client.post(path, content=content, headers={"Content-Type": "application/json"}), status
        )

    return call
