"""A server with the usual settings around the small model, and what is asked of it."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    import httpx

    from bridgetower.predictor import Predictor
    from bridgetower.search.searcher import Searcher


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def predictor(tiny_checkpoint: Path) -> "Predictor":
    from bridgetower.predictor import load

    return load(tiny_checkpoint, device="cpu")


@pytest.fixture(scope="session")
def searcher(predictor: "Predictor", tmp_path_factory: pytest.TempPathFactory) -> "Searcher":
    """An index of 45 images of shapes and their captions."""
    from bridgetower.search.build import build_index
    from bridgetower.search.searcher import Searcher
    from shapes import write_pictures

    folder = tmp_path_factory.mktemp("indexed")
    build_index(write_pictures(folder), folder / "shapes.lance", predictor)
    return Searcher(folder / "shapes.lance", predictor)


@pytest.fixture(scope="session")
def client(predictor: "Predictor", searcher: "Searcher") -> Iterator["httpx.Client"]:
    """Of a server with the usual settings."""
    from served import running

    with running(predictor, searcher, name="tiny") as client:
        yield client


@pytest.fixture
def post(client: "httpx.Client") -> Callable[..., Any]:
    """Posts JSON and returns the answer to a good request."""

    def call(path: str, **body: Any) -> Any:
        response = client.post(path, json=body)
        assert response.status_code == 200, response.text
        return response.json()

    return call


@pytest.fixture
def refused(client: "httpx.Client") -> Callable[..., dict[str, Any]]:
    """Posts JSON and returns the error that comes back."""
    from served import error_of

    def call(path: str, status: int = 400, **body: Any) -> dict[str, Any]:
        content = json.dumps(body)  # half a surrogate pair is escaped
        return error_of(client.post(path, content=content, headers={"Content-Type": "application/json"}), status)

    return call
