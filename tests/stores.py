"""A real S3 server on this machine, behind a proxy that drops connections, cuts answers and refuses to serve."""

import http.client
import logging
import os
import random
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from unittest.mock import patch

import pytest

SETTINGS = {
    "AWS_ACCESS_KEY_ID": "key",
    "AWS_SECRET_ACCESS_KEY": "secret",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_MAX_ATTEMPTS": "1",  # the tries of boto itself, which would hide ours
}
FAULTS = ("refused", "dropped", "cut")


@dataclass
class Store:
    """The server, as programs see it."""

    fault: Callable[[str], str | None] = lambda path: None

    def reset(self) -> None:
        self.fault = lambda path: None

    def upload(self, folder: Path, place: str) -> str:
        """Copies the files of a folder to `bucket/…`; returns the URL."""
        import fsspec

        system = fsspec.filesystem("s3")
        for path in filter(Path.is_file, folder.rglob("*")):
            system.pipe_file(f"{place}/{path.relative_to(folder)}", path.read_bytes())
        return f"s3://{place}"

    def unreliable(self, share: float, seed: int = 0) -> None:
        source = random.Random(seed)
        self.fault = lambda path: source.choice(FAULTS) if source.random() < share else None


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
    store = Store()
    try:
        with ThreadingHTTPServer(
            ("127.0.0.1", 0), _handler(store, server.get_host_and_port())
        ) as proxy:
            Thread(target=proxy.serve_forever, daemon=True).start()
            with patch.dict(
                os.environ, SETTINGS, AWS_ENDPOINT_URL=f"http://127.0.0.1:{proxy.server_port}"
            ):
                forget()
                # all servers of a process share it
                fsspec.filesystem("s3").makedirs("bucket", exist_ok=True)
                yield store
            proxy.shutdown()
    finally:
        forget()
        server.stop()


def _handler(store, address):
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
