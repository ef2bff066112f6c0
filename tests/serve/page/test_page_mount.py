"""The page under the routes of the API: what it lets through, what it keeps in, how it ends."""

import gc
import json
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from bridgetower.predictor import Predictor, load
from bridgetower.search.searcher import Searcher
from bridgetower.serve.page import gate
from served import PNGS, Running, error_of, started

gradio = pytest.importorskip("gradio")

CALLED: list[tuple[str, Any]] = []


def listen_for_calls(event: str, arguments: tuple[Any, ...]) -> None:
    """Notes what the process looks up and connects to."""
    if event in ("socket.getaddrinfo", "socket.connect"):
        CALLED.append((event, arguments[0] if event == "socket.getaddrinfo" else arguments[1]))


sys.addaudithook(listen_for_calls)


@pytest.fixture(scope="module")
def running(predictor: Predictor, searcher: Searcher) -> Iterator[Running]:
    with started(predictor, searcher, page=True, max_body=1) as found:
        yield found


@pytest.fixture
def client(running: Running) -> httpx.Client:
    return running.client


def config(client: httpx.Client) -> dict[str, Any]:
    found: dict[str, Any] = client.get("/config").json()
    return found


def upload(client: httpx.Client, content: bytes, name: str = "picture.png") -> httpx.Response:
    return client.post("/gradio_api/upload", files={"files": (name, content)})


def button(client: httpx.Client, name: str) -> int:
    """The number of the function that a button calls."""
    components = {part["id"]: part for part in config(client)["components"]}
    (number,) = [
        dependency["id"]
        for dependency in config(client)["dependencies"]
        if any(components[target]["props"].get("value") == name for target, _ in dependency["targets"])
    ]
    return int(number)


def ask(client: httpx.Client, name: str, values: list[Any]) -> dict[str, Any]:
    """Presses a button as a browser does; returns the last event."""
    number = button(client, name)
    session = {"session_hash": "abc"}
    response = client.post("/gradio_api/queue/join", json={"data": values, "fn_index": number, **session})
    response.raise_for_status()
    with client.stream("GET", "/gradio_api/queue/data", params=session) as stream:
        for line in stream.iter_lines():
            event = json.loads(line.removeprefix("data: ")) if line.startswith("data: ") else {}
            if event.get("msg") == "process_completed":
                return dict(event["output"], success=event["success"])
    raise AssertionError("no answer")


def file(path: str) -> dict[str, Any]:
    return {"path": path, "meta": {"_type": "gradio.FileData"}}


def test_the_api_stays_as_it_is(client: httpx.Client) -> None:
    assert client.get("/").headers["content-type"].startswith("text/html")
    assert client.get("/health").json() == {"status": "ok"}
    assert error_of(client.get("/v1/other"), 404)["message"] == "GET /v1/other: Not Found"
    error_of(client.get("/v1/embeddings"), 405)
    assert not [path for path in client.get("/openapi.json").json()["paths"] if "gradio" in path]


def test_a_button_asks_the_model(client: httpx.Client) -> None:
    path = upload(client, PNGS[0]).json()[0]
    answer = ask(client, "Match", [file(path), "red bar\na circle"])
    assert answer["success"]
    assert 'class="bt-ranking"' in answer["data"][0]


def test_questions_have_a_model_of_their_own(
    client: httpx.Client, predictor: Predictor, answering_checkpoint: Path
) -> None:
    assert "no vqa head" in json.dumps(config(client))
    answering = load(answering_checkpoint, device="cpu")
    with started(predictor, answering=answering, page=True) as found:
        assert f"Here {answering_checkpoint} answers." in json.dumps(config(found.client))
        path = upload(found.client, PNGS[0]).json()[0]
        answer = ask(found.client, "Ask", [file(path), "which colour?"])
        likeliest = answering.answer(PNGS[0], "which colour?", top=1)[0].label
        assert f'<tbody><tr><th scope="row">{likeliest}</th>' in answer["data"][0]


def test_the_model_is_asked_in_batches_of_all(running: Running) -> None:
    before = running.service.metrics.text()
    ask(running.client, "Search", ["red bar", None, 3, ""])
    counted = re.compile(rb"bridgetower_batch_items_sum (\S+)")
    first, second = (float(counted.findall(text)[0]) for text in (before, running.service.metrics.text()))
    assert second - first == 1 + 45  # the text, and the pictures that it was matched with


def test_results_that_nobody_fetches_are_forgotten(client: httpx.Client) -> None:
    number = button(client, "Match")
    for session in range(150):
        body = {"data": [None, "red bar"], "fn_index": number, "session_hash": f"left-{session}"}
        client.post("/gradio_api/queue/join", json=body).raise_for_status()
    assert "process_completed" in fetched(client, "left-149")
    results = client.get("/gradio_api/queue/data", params={"session_hash": "left-0"})
    assert "there are no results for this session" in error_of(results, 404)["message"]
    queues = [thing for thing in gc.get_objects() if type(thing) is gradio.queueing.Queue]
    assert max(len(queue.pending_messages_per_session) for queue in queues) == 128
    assert max(len(queue.pending_event_ids_session) for queue in queues) == 128


def fetched(client: httpx.Client, session: str) -> str:
    """What a browser gets that asks for the results of its session."""
    with client.stream("GET", "/gradio_api/queue/data", params={"session_hash": session}) as stream:
        return "".join(stream.iter_text())


@pytest.mark.parametrize("path", ["/etc/passwd", __file__, "../../../../etc/passwd", "pyproject.toml", "README.md"])
def test_files_of_the_machine_are_not_read(client: httpx.Client, searcher: Searcher, path: str) -> None:
    for place in (f"/gradio_api/file={path}", f"/file={path}", f"/gradio_api/file%3D{path}"):
        assert client.get(place).status_code in (403, 404)
    picture = next(searcher.index.root.glob("*.png"))
    assert client.get(f"/gradio_api/file={picture}").status_code == 403
    answer = ask(client, "Match", [file(path), "red bar"])
    assert not answer["success"]
    assert "root" not in json.dumps(answer)


def test_urls_are_not_fetched(client: httpx.Client) -> None:
    url = "https://pictures.example/a.png"
    CALLED.clear()
    for values in ([file(url), "red bar"], [None, file(url)], [None, [{"deep": file("http://pictures.example")}]]):
        body = {"data": values, "fn_index": button(client, "Match"), "session_hash": "abc"}
        error = error_of(client.post("/gradio_api/queue/join", json=body), 400)
        assert "not fetched from URLs" in error["message"]
    assert CALLED
    assert not [place for event, place in CALLED if "pictures.example" in str(place)]


def test_control_what_gradio_itself_would_do(client: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "names_url", lambda inputs: False)
    CALLED.clear()
    ask(client, "Match", [file("https://pictures.example/a.png"), "red bar"])
    assert [place for event, place in CALLED if "pictures.example" in str(place)]


def test_nobody_is_told_of_it(predictor: Predictor) -> None:
    CALLED.clear()
    with started(predictor, page=True) as found:
        found.client.get("/").raise_for_status()
        time.sleep(0.5)
    places = {str(place[0] if isinstance(place, tuple) else place) for _, place in CALLED}
    assert places <= {"127.0.0.1", "localhost"}


def test_the_browser_is_told_to_load_nothing_from_elsewhere(client: httpx.Client) -> None:
    for path in ("/", "/config", "/theme.css"):
        response = client.get(path)
        assert response.headers["content-security-policy"].startswith("default-src 'self' ")
        assert "fonts.googleapis" not in response.text
    assert "'none'" in client.get("/").headers["content-security-policy"]


def test_limits_hold_for_the_page_too(client: httpx.Client) -> None:
    assert upload(client, b"x" * 2**20).status_code == 413
    error = error_of(client.post("/gradio_api/queue/join", content=b"x" * (2**20 + 1)), 413)
    assert "larger than" in error["message"]


def test_damaged_pictures(client: httpx.Client) -> None:
    path = upload(client, b"no picture").json()[0]
    answer = ask(client, "Match", [file(path), "red bar"])
    assert "Traceback" not in json.dumps(answer)
    path = upload(client, PNGS[0][:100]).json()[0]
    answer = ask(client, "Match", [file(path), "red bar"])
    assert 'class="bt-problem"' in answer["data"][0]
    assert str(Path(path).parent) not in answer["data"][0]


def test_another_site_cannot_press_buttons(client: httpx.Client) -> None:
    headers = {"Origin": "https://evil.example"}
    error_of(client.post("/gradio_api/queue/join", json={}, headers=headers), 403)
    error_of(client.post("/gradio_api/upload", files={"files": b"x"}, headers=headers), 403)


def test_what_the_model_lacks(predictor: Predictor, answering_checkpoint: Path) -> None:
    with started(load(answering_checkpoint, device="cpu"), page=True) as found:
        shown = json.dumps(config(found.client)["components"])
    assert "This server has no index" in shown
    assert shown.count("Not with this model") == 2  # match and fill the mask


def test_no_page(predictor: Predictor) -> None:
    with started(predictor) as found:
        error_of(found.client.get("/"), 404)
