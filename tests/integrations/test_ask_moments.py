"""What a language model is sent about moments of videos, checked by a server in its place."""

import base64
import importlib.util
import io
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from bridgetower.inference.predictor import load
from bridgetower.search.build import build_index
from bridgetower.search.searcher import Searcher
from helpers.servers import running_client
from helpers.sources import CLIP_SIZE, SUBTITLE_TEXTS, SUBTITLES, write_clip

EXAMPLE = Path(__file__).parents[2] / "examples" / "ask_moments.py"


class Stub(BaseHTTPRequestHandler):
    """Takes chat completions as OpenAI's API does, and keeps what was sent."""

    requests: list[tuple[str, str | None, dict[str, Any]]]
    status: int = 200
    error: Any = None

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.requests.append((self.path, self.headers["Authorization"], body))
        message = {"role": "assistant", "content": "Green, see [1]."}
        reply = {"object": "chat.completion", "choices": [{"index": 0, "message": message}]}
        answer = json.dumps(reply if self.error is None else {"error": self.error}).encode()
        self.send_response(self.status)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *arguments: object) -> None:
        """Prints nothing."""


@pytest.fixture
def llm():
    Stub.requests = []
    Stub.status = 200
    Stub.error = None
    with HTTPServer(("127.0.0.1", 0), Stub) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/v1"
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def moments_client(tiny_checkpoint, tmp_path_factory):
    """Of a server with an index of a talk."""
    folder = tmp_path_factory.mktemp("talks")
    predictor = load(tiny_checkpoint, device="cpu")
    write_clip(folder / "talk.mp4")
    (folder / "talk.srt").write_text(SUBTITLES, encoding="utf-8")
    build_index(folder / "talk.mp4", folder / "talks.lance", predictor)
    with running_client(predictor, Searcher(folder / "talks.lance", predictor)) as client:
        yield client


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("ask_moments", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_errors_are_told(example, moments_client, llm):
    server = str(moments_client.base_url).rstrip("/")
    for status, error, message in (
        (
            401,
            {"message": "no such key", "type": "authentication_error"},
            "completions: no such key, status 401",
        ),
        (400, "no such model", "completions: no such model, status 400"),
        (500, ["odd"], "completions: Internal Server Error, status 500"),
        (200, {"message": "overloaded", "code": 529}, "/v1: overloaded"),
    ):
        Stub.status = status
        Stub.error = error
        with pytest.raises(SystemExit, match=message):
            example.main(
                ["a red square", "What?", "--server", server, "--llm", llm, "--model", "a-model"]
            )
    with pytest.raises(SystemExit, match=r"http://127\.0\.0\.1:9/v1/search cannot be reached: "):
        example.main(
            [
                "a",
                "b",
                "--server",
                "http://127.0.0.1:9",
                "--llm",
                "http://127.0.0.1:9",
                "--model",
                "a",
            ]
        )


def test_frames_and_transcripts_of_the_moments_found(
    example, moments_client, llm, capsys, monkeypatch
):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-the-llm")
    monkeypatch.delenv("BRIDGETOWER_API_KEY", raising=False)
    server = str(moments_client.base_url).rstrip("/")
    options = ("--server", server, "--llm", llm, "--model", "a-model", "--top", "2")
    example.main(["a red square", "What follows?", *options])
    hits = moments_client.post("/v1/search", json={"query": "a red square", "top": 2}).json()[
        "data"
    ]
    ((path, key, body),) = Stub.requests
    assert (path, key, body["model"]) == ("/v1/chat/completions", "Bearer sk-of-the-llm", "a-model")
    system, user = body["messages"]
    assert (system["role"], user["role"]) == ("system", "user")
    assert [item["type"] for item in user["content"]] == ["text", "image_url"] * 2 + ["text"]
    assert user["content"][-1]["text"] == "What follows?"
    for number, hit in enumerate(hits):
        text_part, image_part = user["content"][2 * number : 2 * number + 2]
        assert (
            text_part["text"]
            == f"[{number + 1}] talk.mp4, {hit['start']:.1f} to {hit['end']:.1f} s: {hit['transcript']!r}"
        )
        assert hit["transcript"] in SUBTITLE_TEXTS
        kind, _, content = image_part["image_url"]["url"].partition(",")
        assert kind == "data:image/jpeg;base64"
        assert Image.open(io.BytesIO(base64.b64decode(content))).size == CLIP_SIZE
    printed = capsys.readouterr().out.splitlines()
    assert printed == [
        "Green, see [1].",
        *(f"[{n}] {server}{hit['link']}" for n, hit in enumerate(hits, start=1)),
    ]
