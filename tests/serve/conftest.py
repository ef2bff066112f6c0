"""Servers around the small model, each started once, and what is asked of the usual one."""

import json

import pytest

from bridgetower.predictor import load
from bridgetower.search.build import build_index
from bridgetower.search.searcher import Searcher
from served import KEY, error_of, started
from shapes import write_pictures


@pytest.fixture(scope="session")
def anyio_backend():
    return "asyncio"


@pytest.fixture(scope="session")
def predictor(tiny_checkpoint):
    return load(tiny_checkpoint, device="cpu")


@pytest.fixture(scope="session")
def answering(answering_checkpoint):
    return load(answering_checkpoint, device="cpu")


@pytest.fixture(scope="session")
def searcher(predictor, tmp_path_factory):
    """An index of 45 images of shapes and their captions."""
    folder = tmp_path_factory.mktemp("indexed")
    build_index(write_pictures(folder), folder / "shapes.lance", predictor)
    return Searcher(folder / "shapes.lance", predictor)


@pytest.fixture(scope="session")
def server(predictor, searcher):
    """With the usual settings."""
    with started(predictor, searcher, name="tiny", page=True) as found:
        yield found


@pytest.fixture(scope="session")
def locked(predictor, searcher):
    """With a key, an access log, a proxy in front and few places."""
    few = {"queue": 8, "max_items": 8, "forwarded_allow_ips": ("127.0.0.1",)}
    with started(predictor, searcher, name="tiny", page=True, api_key=KEY, access_log=True, **few) as found:
        yield found


@pytest.fixture(scope="session")
def hasty(predictor, searcher):
    """Gives little: bodies of 1 MiB, 8 items, 1.5 seconds."""
    limits = {"timeout": 1.5, "max_body": 1, "max_items": 4, "queue": 8}
    with started(predictor, searcher, patience=1.0, **limits) as found:
        yield found


@pytest.fixture(scope="session")
def both(predictor, answering):
    """With two models and no index."""
    with started(predictor, answering=answering, name="tiny") as found:
        yield found


@pytest.fixture(scope="session")
def alone(answering):
    """With the second model alone, and five places."""
    with started(answering, max_items=5, queue=5) as found:
        yield found


@pytest.fixture(scope="session")
def client(server):
    return server.client


@pytest.fixture
def post(client):
    """Posts JSON and returns the answer to a good request."""

    def call(path, **body):
        response = client.post(path, json=body)
        assert response.status_code == 200, response.text
        return response.json()

    return call


@pytest.fixture
def refused(client):
    """Posts JSON and returns the error that comes back."""

    def call(path, status=400, **body):
        content = json.dumps(body)  # half a surrogate pair is escaped
        return error_of(client.post(path, content=content, headers={"Content-Type": "application/json"}), status)

    return call
