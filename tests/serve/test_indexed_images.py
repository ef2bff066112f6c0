"""Images of the index over HTTP: small or as they are, and nothing else of the machine."""

import hashlib
import io
import os
import shutil
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

from bridgetower.serve.inputs import Decoders
from helpers.servers import (
    URIS,
    build_searcher,
    changed_server,
    error_of,
    noise_png,
    start_server,
    wait_until,
)
from helpers.shapes import write_shape_pictures
from helpers.sources import serve_files as site_of

LARGE = 2400  # pixels; a file of 17 MB is more than the buffers of a connection take


@dataclass(frozen=True)
class ServedAlbum:
    root: Path
    client: httpx.Client
    ids: dict[str, str]

    def get(self, name, **query):
        return self.client.get(
            f"/v1/images/{self.ids[name]}", params={key: str(value) for key, value in query.items()}
        )

    def check_gone(self, name):
        for query in ({}, {"size": 64}):
            error = error_of(self.get(name, **query), 404)
            assert error["code"] == "no_image"
            assert "cannot be read as it was indexed" in error["message"]
            assert str(self.root.parent) not in str(error)


@contextmanager
def album_in(folder, server):
    root = folder / "photos"
    (root / "deep").mkdir(parents=True)
    for name, seed in (("a.png", 1), ("b.png", 2), ("deep/c.png", 3)):
        (root / name).write_bytes(noise_png(seed))
    shutil.copy(root / "a.png", root / "copy.png")
    noise = np.random.default_rng(0).integers(0, 256, (600, 900, 3), dtype=np.uint8)
    turned = Image.Exif()
    turned[0x0112] = 6  # it lies on its side
    Image.fromarray(noise).save(root / "wide.jpg", exif=turned)
    Image.new("RGBA", (40, 20), (255, 0, 0, 0)).save(root / "clear.png")
    Image.new("RGB", (1200, 1000)).save(root / "many.png")
    Image.fromarray(noise[:, :700]).save(root / "large.bmp")
    ids = {
        str(file.relative_to(root)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in root.rglob("*.*")
    }
    searcher = build_searcher(root, server.service.main.predictor)
    decoders = Decoders(max_pixels=10**6, memory=2**28)
    with changed_server(server, searcher, decoders=decoders, max_body=1) as client:
        yield ServedAlbum(root, client, ids)
    decoders.close()


@pytest.fixture(scope="module")
def served_album(server, tmp_path_factory):
    with album_in(tmp_path_factory.mktemp("album"), server) as album:
        yield album


def test_hits_and_the_index_tell_of_what_can_be_fetched(client, post, searcher):
    data = post("/v1/search", query="red bar", top=3)["data"]
    assert len(data) == 3
    for row in data:
        content = (searcher.index.root / row["path"]).read_bytes()
        assert row["id"] == hashlib.sha256(content).hexdigest()
        response = client.get(f"/v1/images/{row['id']}")
        assert (response.content, response.headers["content-type"]) == (content, "image/png")
    description = client.get("/v1/index").json()
    assert description["images"] == 45
    assert len({example["id"] for example in description["examples"]}) == 12
    captions = {example.path: list(example.captions) for example in searcher.index.examples(10**6)}
    assert all(
        example["captions"] == captions[example["path"]] and example["width"] == 24
        for example in description["examples"]
    )
    assert client.get("/v1/index").json() == description


def test_small_ones(served_album):
    for name, size, expected in (
        ("wide.jpg", 300, (200, 300)),
        ("wide.jpg", 1600, (600, 900)),
        ("a.png", 16, (13, 16)),
        ("clear.png", 64, (40, 20)),
    ):
        response = served_album.get(name, size=size)
        assert response.headers["content-type"] == "image/jpeg"
        with Image.open(io.BytesIO(response.content)) as image:
            assert (image.format, image.size) == ("JPEG", expected)
            assert not image.getexif()
            if name == "clear.png":
                # what this model sees behind transparent pixels
                assert image.getpixel((0, 0)) == (
                    254,
                    0,
                    0,
                )


def test_the_file_itself_is_sent_as_nothing_but_an_image(served_album):
    for name, kind in (("wide.jpg", "image/jpeg"), ("copy.png", "image/png")):
        response = served_album.get(name)
        assert response.content == (served_album.root / name).read_bytes()
        assert response.headers["content-type"] == kind
        assert response.headers["content-length"] == str(len(response.content))
    for query in ({}, {"size": 64}):
        headers = served_album.get("a.png", **query).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["content-security-policy"] == "default-src 'none'; sandbox"
        assert headers["cross-origin-resource-policy"] == "same-origin"
        assert headers["cache-control"].startswith("private")


def test_an_image_that_the_client_has_is_not_sent_again(served_album):
    tags = [served_album.get("a.png", **query).headers["etag"] for query in ({}, {"size": 64})]
    assert len(set(tags)) == 2
    path = str(served_album.get("a.png").url.path)
    for tag, status in (
        (tags[0], 304),
        (f'"x", {tags[0]}', 304),
        (f"W/{tags[0]}", 304),
        ("*", 304),
        (tags[1], 200),
        ('"x"', 200),
        ("", 200),
    ):
        response = served_album.client.get(path, headers={"If-None-Match": tag})
        assert response.status_code == status, tag
        assert response.headers["etag"] == tags[0]
    missing = "0" * 64
    for tag in ("*", f'"{missing}-file"'):
        error_of(
            served_album.client.get(f"/v1/images/{missing}", headers={"If-None-Match": tag}), 404
        )


NAMES = [
    "a.png",
    "photos/a.png",
    "/etc/passwd",
    "..%2f..%2fetc%2fpasswd",
    "%2e%2e/%2e%2e/etc/passwd",
    "/dev/zero",
]
NAMES += [
    "..",
    "%00",
    "' OR path = 'a.png",
    "0" * 63,
    "0" * 65,
    "A" * 64,
    "https:%2f%2fexample.org%2fa.png",
]


def test_names_odd_sizes_and_what_is_not_in_the_index(served_album):
    for name in (*NAMES, URIS[0][:60]):
        response = served_album.client.get(f"/v1/images/{name}")
        assert response.status_code in (400, 404), name
        error = error_of(response, response.status_code)
        assert error["type"] in ("invalid_request_error", "not_found_error")
    for size in (0, 15, 1601, 10**30, -1, "large", "1e3", "64.", "64.0", "+64", " 64"):
        assert error_of(served_album.get("a.png", size=size), 400)["param"] == "size"
    message = error_of(served_album.get("a.png", size="64.0"), 400)["message"]
    assert message == "size: '64.0' is given; expected a whole number of pixels, such as 300"
    (served_album.root / "new.png").write_bytes(noise_png(9))
    for digest in ("0" * 64, hashlib.sha256(noise_png(9)).hexdigest()):
        error = error_of(served_album.client.get(f"/v1/images/{digest}"), 404)
        assert error["message"] == "the index has no image with this id"


def test_limits_hold(served_album):
    many = error_of(served_album.get("many.png", size=64), 404)["message"]
    assert "1200000 pixels, the limit is 1000000" in many
    assert "open_image" not in many
    assert served_album.get("many.png").status_code == 200
    served_album.check_gone("large.bmp")


def test_what_took_the_place_of_a_file(server, tmp_path):
    """Another file, a link to one, a device, a pipe, a folder. A copy elsewhere in the index will do."""
    with album_in(tmp_path, server) as album:
        secret = tmp_path / "secret.png"
        file = album.root / "b.png"
        secret.write_bytes(noise_png(77))
        for make in (
            *(
                partial(file.write_bytes, content)
                for content in (noise_png(77), b"x" * len(noise_png(2)))
            ),
            lambda: None,
            *(
                partial(file.symlink_to, target)
                for target in (secret, "/dev/zero", file, album.root / "deep" / "c.png")
            ),
            partial(os.mkfifo, file),
            file.mkdir,
        ):
            file.unlink(missing_ok=True)
            make()
            album.check_gone("b.png")
        (album.root / "deep").rename(tmp_path / "elsewhere")
        (album.root / "deep").symlink_to(tmp_path / "elsewhere")
        album.check_gone("deep/c.png")
        content = (album.root / "a.png").read_bytes()
        (album.root / "a.png").unlink()
        assert album.get("a.png").content == content
        (album.root / "copy.png").unlink()
        album.check_gone("a.png")


def test_an_index_of_what_is_outside(server, predictor, tmp_path):
    """A table may name any file or URL. A search finds it, but nobody is sent it, and no URL is fetched."""
    write_shape_pictures(tmp_path)
    (tmp_path / "in").mkdir()
    with site_of(tmp_path) as url:
        lines = [
            "image,caption",
            "../00.png,one",
            f"{tmp_path / '01.png'},two",
            f"{url}/02.png,three",
        ]
        (tmp_path / "in" / "table.csv").write_text("\n".join(lines))
        with changed_server(
            server, build_searcher(tmp_path / "in" / "table.csv", predictor)
        ) as client:
            data = client.post("/v1/search", json={"query": "red", "rerank": 0}).json()["data"]
            assert len(data) == 3
            for path, name in [(row["path"], row["id"]) for row in data]:
                ServedAlbum(tmp_path / "in", client, {path: name}).check_gone(path)
            assert len(client.post("/v1/search", json={"query": "red"}).json()["data"]) == 2


def test_decoding_holds_up_nothing(server, monkeypatch):
    gate = threading.Event()
    at_work = threading.Semaphore(0)
    original = Decoders.open

    def slow(*arguments, **options):
        at_work.release()
        gate.wait(20)
        return original(*arguments, **options)

    monkeypatch.setattr(Decoders, "open", slow)
    digest = server.client.get("/v1/index").json()["examples"][0]["id"]
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(server.client.get, f"/v1/images/{digest}?size=64")
        assert at_work.acquire(timeout=20)
        assert server.client.get("/health").status_code == 200
        assert server.service.scheduler.admitted == server.service.costs["image"]
        gate.set()
        assert answer.result().status_code == 200
    wait_until(lambda: server.service.scheduler.admitted == 0)


@pytest.fixture(scope="module")
def large_album(tmp_path_factory, predictor):
    folder = tmp_path_factory.mktemp("large") / "photos"
    folder.mkdir()
    Image.new("RGB", (LARGE, LARGE), "red").save(folder / "large.bmp")
    content = (folder / "large.bmp").read_bytes()
    return (
        build_searcher(folder, predictor),
        content,
        f"/v1/images/{hashlib.sha256(content).hexdigest()}",
    )


def asked_for(running, path):
    connection = socket.create_connection(running.address, timeout=60)
    connection.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    assert connection.recv(100).startswith(b"HTTP/1.1 200")
    return connection


def length_of(connection):
    """How much of the answer comes before the server ends the connection, or all of it."""
    length = 0
    with suppress(ConnectionResetError):
        while block := connection.recv(2**20):
            length += len(block)
            if length >= 3 * LARGE**2:
                break
    return length


def test_slow_readers_give_way(predictor, large_album):
    """Eight times the largest body is held of answers. Whoever reads most slowly is cut off for the ninth."""
    searcher, content, path = large_album
    with start_server(predictor, searcher, max_body=17) as running, ExitStack() as slow:
        connections = [slow.enter_context(asked_for(running, path)) for _ in range(8)]
        assert running.client.get(path).content == content
        lengths = [length_of(connection) for connection in connections]
        assert min(lengths) < len(content)
        assert sum(length > len(content) for length in lengths) == 7


def test_a_reader_that_stalls_is_cut_off_in_the_end(predictor, large_album, caplog):
    searcher, content, path = large_album
    with (
        start_server(predictor, searcher, max_body=17, timeout=0.4) as running,
        asked_for(running, path) as connection,
    ):
        in_flight = running.service.metrics.in_flight._value
        assert in_flight.get() == 1
        wait_until(lambda: in_flight.get() == 0)
        assert length_of(connection) < len(content)
    assert "without completing" not in caplog.text
