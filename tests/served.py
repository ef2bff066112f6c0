"""Images and texts for a server, the server itself in a thread, and its errors taken apart."""

from __future__ import annotations

import base64
import io
import subprocess
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, replace

import httpx
import numpy as np
import pytest
from PIL import Image

from bridgetower.serve.config import ServeConfig
from bridgetower.serve.server import Server, take_port
from bridgetower.serve.service import Service

KEY = "sesame open"
BEARER = {"Authorization": f"Bearer {KEY}"}
PATIENCE = 120.0  # seconds after which something hangs
TEXTS = ["red circle on black", "a bar", "a square that is blue on a grey ground"]


def png(seed, width=24, height=30):
    """The file of an image of noise."""
    stream = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def uri(content):
    return "data:image/png;base64," + base64.b64encode(content).decode()


PNGS = [png(seed) for seed in range(3)]
URIS = [uri(content) for content in PNGS]


def certified(folder, name):
    """A certificate of a name that signs itself, beside its key."""
    file = folder / "site.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 1"
    files = ["-keyout", file.with_suffix(".key"), "-out", file]
    subject = ["-subj", f"/CN={name}", "-addext", f"subjectAltName=DNS:{name}"]
    subprocess.run([*command.split(), *files, *subject], check=True, capture_output=True)
    return file


@dataclass(frozen=True)
class Running:
    client: httpx.Client
    service: Service
    server: Server
    thread: threading.Thread

    @property
    def address(self) -> tuple[str, int]:
        return self.client.base_url.host, self.client.base_url.port or 0


@contextmanager
def started(
    predictor, searcher=None, *, answering=None, connections=1000, patience=10.0, **settings
):
    """Serves a model on a free port, without the page unless it is asked for."""
    config = ServeConfig(port=0, **{"page": False, **settings})
    with take_port(config) as listener:
        service = Service(predictor, config, searcher, answering)
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
        server = Server(service, listener, connections=connections, patience=patience)
        thread = threading.Thread(target=server.run)
        thread.start()
        try:
            with httpx.Client(base_url=address, timeout=PATIENCE) as client:
                until(lambda: server.started.is_set() or not thread.is_alive())
                yield Running(client, service, server, thread)
        finally:
            if thread.is_alive():
                server.stop()
            thread.join()


def indexed(source, predictor, **settings):
    """Indexes a folder or a table, beside it."""
    from bridgetower.search.build import build_index
    from bridgetower.search.config import IndexConfig
    from bridgetower.search.searcher import Searcher

    index = source.parent / f"{source.name}.lance"
    build_index(source, index, predictor, IndexConfig(**settings))
    return Searcher(index, predictor)


@contextmanager
def running(predictor, searcher=None, **settings):
    """Serves a model on a free port and lends a client."""
    with started(predictor, searcher, **settings) as found:
        yield found.client


@contextmanager
def changed(server, searcher=None, *, decoders=None, **limits):
    """Lends the client of a server that has another index, decoders or limits meanwhile: no other need be started."""
    service = server.service
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(service, "config", replace(service.config, **limits))
        patch.setattr(service, "searcher", searcher or service.searcher)
        patch.setattr(service.main, "decoders", decoders or service.main.decoders)
        yield server.client


def error_of(response, status):
    """The error in a response, which must have OpenAI's form and one line."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    (content,) = response.json().items()
    assert content[0] == "error"
    assert content[1].keys() == {"message", "type", "param", "code"}
    assert "\n" not in content[1]["message"]
    assert "Traceback" not in response.text
    return dict(content[1])


@contextmanager
def held_up(predictor):
    """Lets the text tower wait until the event that is lent is set."""
    gate = threading.Event()
    hook = predictor.model.text.word_embedding.register_forward_pre_hook(
        lambda *_: gate.wait(PATIENCE) and None
    )
    try:
        yield gate
    finally:
        gate.set()
        hook.remove()


def until(condition):
    """Waits for something that another thread does."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)
