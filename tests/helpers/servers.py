"""Servers that tests talk to: the project's own, S3 with faults, and a browser for pages."""

from __future__ import annotations

import base64
import http.client
import io
import logging
import os
import random
import shutil
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from unittest.mock import patch

import httpx
import numpy as np
import pytest
from PIL import Image

from bridgetower.serve.config import ServeConfig
from bridgetower.serve.server import Server, take_port
from bridgetower.serve.service import Service

API_KEY = "sesame open"
BEARER = {"Authorization": f"Bearer {API_KEY}"}
PATIENCE = 120.0  # seconds after which something hangs
SERVED_TEXTS = ["red circle on black", "a bar", "a square that is blue on a grey ground"]


def noise_png(seed, width=24, height=30):
    """The file of an image of noise."""
    stream = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def data_uri(content):
    return "data:image/png;base64," + base64.b64encode(content).decode()


PNGS = [noise_png(seed) for seed in range(3)]
URIS = [data_uri(content) for content in PNGS]


def write_certificate(folder, name):
    """A certificate of a name that signs itself, beside its key."""
    file = folder / "site.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 1"
    files = ["-keyout", file.with_suffix(".key"), "-out", file]
    subject = ["-subj", f"/CN={name}", "-addext", f"subjectAltName=DNS:{name}"]
    subprocess.run([*command.split(), *files, *subject], check=True, capture_output=True)
    return file


@dataclass(frozen=True)
class RunningServer:
    client: httpx.Client
    service: Service
    server: Server
    thread: threading.Thread

    @property
    def address(self) -> tuple[str, int]:
        return self.client.base_url.host, self.client.base_url.port or 0


@contextmanager
def start_server(
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
                wait_until(lambda: server.started.is_set() or not thread.is_alive())
                yield RunningServer(client, service, server, thread)
        finally:
            if thread.is_alive():
                server.stop()
            thread.join()


def build_searcher(source, predictor, **settings):
    """Indexes a folder or a table, beside it."""
    from bridgetower.search.build import build_index
    from bridgetower.search.config import IndexConfig
    from bridgetower.search.searcher import Searcher

    index = source.parent / f"{source.name}.lance"
    build_index(source, index, predictor, IndexConfig(**settings))
    return Searcher(index, predictor)


@contextmanager
def running_client(predictor, searcher=None, **settings):
    """Serves a model on a free port and lends a client."""
    with start_server(predictor, searcher, **settings) as server:
        yield server.client


@contextmanager
def changed_server(server, searcher=None, *, decoders=None, **limits):
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
def held_up_text_tower(predictor):
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


def wait_until(condition):
    """Waits for something that another thread does."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


S3_SETTINGS = {
    "AWS_ACCESS_KEY_ID": "key",
    "AWS_SECRET_ACCESS_KEY": "secret",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_MAX_ATTEMPTS": "1",  # the tries of boto itself, which would hide ours
}
S3_FAULTS = ("refused", "dropped", "cut")


@dataclass
class S3Store:
    """The server, as programs see it."""

    fault: Callable[[str], str | None] = lambda path: None

    def reset(self) -> None:
        self.fault = lambda path: None

    def upload(self, folder: Path, uri: str) -> str:
        """Copies the files of a folder to `bucket/…`. Returns the URL."""
        import fsspec

        system = fsspec.filesystem("s3")
        for path in filter(Path.is_file, folder.rglob("*")):
            system.pipe_file(f"{uri}/{path.relative_to(folder)}", path.read_bytes())
        return f"s3://{uri}"

    def unreliable(self, share: float, seed: int = 0) -> None:
        source = random.Random(seed)
        self.fault = lambda path: source.choice(S3_FAULTS) if source.random() < share else None


@contextmanager
def s3_store():
    """Starts the server with a bucket, and makes programs of this process and its children use it."""
    server = pytest.importorskip("moto.server").ThreadedMotoServer(
        ip_address="127.0.0.1", port=0, verbose=False
    )
    pytest.importorskip("s3fs")
    import fsspec

    logging.getLogger("werkzeug").setLevel("ERROR")
    forget = fsspec.get_filesystem_class(
        "s3"
    ).clear_instance_cache  # of those that have the address of another server
    server.start()
    store = S3Store()
    try:
        with ThreadingHTTPServer(
            ("127.0.0.1", 0), _faulty_proxy(store, server.get_host_and_port())
        ) as proxy:
            Thread(target=proxy.serve_forever, daemon=True).start()
            with patch.dict(
                os.environ, S3_SETTINGS, AWS_ENDPOINT_URL=f"http://127.0.0.1:{proxy.server_port}"
            ):
                forget()
                # all servers of a process share it
                fsspec.filesystem("s3").makedirs("bucket", exist_ok=True)
                yield store
            proxy.shutdown()
    finally:
        forget()
        server.stop()


def _faulty_proxy(store, address):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            """Says nothing."""

        def forward(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            fault = store.fault(self.path) if self.command == "GET" else None
            if fault == "dropped":
                self.close_connection = True
                return
            if fault == "refused":
                self.send_response(503, "Slow Down")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            connection = http.client.HTTPConnection(*address)
            connection.request(self.command, self.path, body, dict(self.headers))
            self.answer(connection.getresponse(), cut=fault == "cut")
            connection.close()

        def answer(self, response: Any, *, cut: bool) -> None:
            content = response.read()
            self.send_response(response.status)
            for name, value in response.getheaders():
                if name.lower() not in (
                    "connection",
                    "transfer-encoding",
                    "content-length",
                    "date",
                    "server",
                ):
                    self.send_header(name, value)
            length = (
                response.getheader("Content-Length")
                if self.command == "HEAD"
                else str(len(content))
            )
            self.send_header("Content-Length", length or "0")
            self.end_headers()
            self.wfile.write(content[: len(content) // 2] if cut else content)
            self.close_connection = self.close_connection or cut

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = forward  # noqa: N815

    return Handler


CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
HOST_RULE = "--host-resolver-rules=MAP photos.example.org 127.0.0.1"


@pytest.fixture(scope="module")
def chromium():
    playwright = pytest.importorskip("playwright.sync_api")
    installed = next(filter(None, map(shutil.which, CHROMIUM_NAMES)), None)
    with playwright.sync_playwright() as driver:
        if installed is None and not Path(driver.chromium.executable_path).exists():
            pytest.skip(
                "NO CHROMIUM, THE PAGE IS NOT TESTED: apt-get install chromium, or playwright install chromium"
            )
        browser = driver.chromium.launch(executable_path=installed, args=[HOST_RULE])
        yield browser
        browser.close()


@pytest.fixture
def browsed(chromium, tmp_path):
    @contextmanager
    def opened(address, path="/", *, expected=None, **settings):
        context = chromium.new_context(**{"viewport": {"width": 1200, "height": 900}, **settings})
        page = context.new_page()
        page.set_default_timeout(60_000)
        urls = []
        wrong = []
        page.on("request", lambda request: urls.append(request.url))
        page.on(
            "console",
            lambda message: (
                wrong.append(message.text) if message.type in ("error", "warning") else None
            ),
        )
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.goto(address + path)
        try:
            yield page
        except BaseException:
            page.screenshot(path=tmp_path / "failure.png", full_page=True)
            raise
        finally:
            context.close()
        assert len(urls) > 4
        assert not [url for url in urls if not url.startswith((address, "data:", "blob:"))]
        assert not [text for text in wrong if expected is None or expected not in text]

    return opened
