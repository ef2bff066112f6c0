"""The server that one would write first: each request is handled from start to end before the next one.

It takes the two requests that benchmarks/serving.py sends, and runs as `python benchmarks/serving_plain.py MODEL`.
"""

import base64
import socket
import sys
import threading
from typing import Any

import uvicorn
from fastapi import FastAPI

from bridgetower.inference.predictor import Predictor, load

_one = threading.Lock()


def plain_app(model: Predictor) -> FastAPI:
    """Returns the application."""
    app = FastAPI()

    def opened(uri: str) -> bytes:
        return base64.b64decode(uri.partition(",")[2])

    @app.post("/v1/embeddings")
    def embeddings(body: dict[str, Any]) -> dict[str, Any]:
        with _one:
            if body.get("modality") == "image":
                return {"data": model.embed_images(opened(body["input"])).tolist()}
            return {"data": model.embed_texts(body["input"]).tolist()}

    @app.post("/v1/match")
    def match(body: dict[str, Any]) -> dict[str, Any]:
        with _one:
            return {"data": model.match(opened(body["images"]), body["texts"]).tolist()}

    return app


def main() -> None:
    """Serves until it is ended."""
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    app = plain_app(load(sys.argv[1]))
    print(
        f"serving it at http://127.0.0.1:{listener.getsockname()[1]}", file=sys.stderr, flush=True
    )
    uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False)).run(sockets=[listener])


if __name__ == "__main__":
    main()
