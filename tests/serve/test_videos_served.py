"""Moments over HTTP: hits with times and links, frames, and pieces of the videos of the index and of nothing else."""

import os
import shutil
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import httpx
import pytest

from helpers.servers import BEARER, build_searcher, changed_server, error_of, noise_png
from helpers.sources import SUBTITLE_TEXTS, SUBTITLES, write_clip


@dataclass(frozen=True)
class Talks:
    root: Path
    client: httpx.Client

    def hits(self):
        answer = self.client.post("/v1/search", json={"query": "a red square", "top": 20})
        return {hit["path"]: hit for hit in answer.json()["data"]}

    def get(self, name, **headers):
        (link,) = [hit["link"] for path, hit in self.hits().items() if path == name]
        return self.client.get(link.partition("#")[0], headers=headers)


TALK = "talk.mp4#t=0.500,2.500"
LECTURE = "sub/lecture.webm#t=0.000,12.000"


@contextmanager
def talks_in(folder, server, **limits):
    root = folder / "talks"
    predictor = server.service.main.predictor
    (root / "sub").mkdir(parents=True)
    write_clip(root / "talk.mp4")
    (root / "talk.srt").write_text(SUBTITLES, encoding="utf-8")
    shutil.copy(root / "talk.mp4", root / "copy.mp4")
    shutil.copy(root / "talk.srt", root / "copy.srt")
    write_clip(root / "sub" / "lecture.webm", codec="libvpx-vp9", fps=1)
    (root / "sub" / "lecture.srt").write_text("1\n00:00:00,000 --> 00:00:12,000\nAll colours\n")
    (root / "a.png").write_bytes(noise_png(1))
    with changed_server(server, build_searcher(root, predictor), **limits) as client:
        yield Talks(root, client)


@pytest.fixture(scope="module")
def served_talks(server, tmp_path_factory):
    with talks_in(tmp_path_factory.mktemp("talks"), server) as talks:
        yield talks


def test_hits_have_times_a_transcript_and_a_link(served_talks):
    hits = served_talks.hits()
    assert len(hits) == 8
    hit = hits[TALK]
    assert (hit["start"], hit["end"], hit["transcript"]) == (0.5, 2.5, SUBTITLE_TEXTS[0])
    assert hit["link"] == f"/v1/videos/{hit['id']}#t=0.500,2.500"
    assert not {"start", "end", "transcript", "link"} & hits["a.png"].keys()
    # also of the copy, whose frames look the same
    assert len({hit["id"] for hit in hits.values()}) == 8
    for size in ({}, {"size": 64}):
        picture = served_talks.client.get(f"/v1/images/{hit['id']}", params=size)
        assert (picture.status_code, picture.headers["content-type"]) == (200, "image/jpeg")
    where = {"start": {"gte": 3}, "end": {"lt": 6}}
    frames = served_talks.client.post("/v1/search", json={"query": "a", "where": where}).json()[
        "data"
    ]
    assert {hit["path"] for hit in frames} == {"talk.mp4#t=3.500,5.000", "copy.mp4#t=3.500,5.000"}


def test_a_video_is_sent_whole_or_in_pieces(served_talks, monkeypatch):
    for name, file, kind in (
        (TALK, "talk.mp4", "video/mp4"),
        (LECTURE, "sub/lecture.webm", "video/webm"),
    ):
        content = (served_talks.root / file).read_bytes()
        whole = served_talks.get(name)
        assert (whole.status_code, whole.content) == (200, content)
        assert whole.headers["content-type"] == kind
        assert whole.headers["accept-ranges"] == "bytes"
        assert whole.headers["content-length"] == str(len(content))
        assert whole.headers["content-security-policy"] == "default-src 'none'; sandbox"
    size = (served_talks.root / "talk.mp4").stat().st_size
    content = (served_talks.root / "talk.mp4").read_bytes()
    for byte_range, start, end in (
        ("bytes=0-", 0, size),
        ("bytes=0-1", 0, 2),
        ("bytes=5-9", 5, 10),
        (f"bytes={size - 1}-", size - 1, size),
        ("bytes=-7", size - 7, size),
        (f"bytes=-{10**12}", 0, size),
        (f"bytes=3-{10**12}", 3, size),
    ):
        piece = served_talks.get(TALK, range=byte_range)
        assert (piece.status_code, piece.content) == (206, content[start:end])
        assert piece.headers["content-range"] == f"bytes {start}-{end - 1}/{size}"
    monkeypatch.setattr("bridgetower.serve.search.PIECE", 100)
    piece = served_talks.get(TALK, range="bytes=50-")
    assert (piece.content, piece.headers["content-range"]) == (
        content[50:150],
        f"bytes 50-149/{size}",
    )


def test_odd_ranges(served_talks):
    link = served_talks.hits()[TALK]["link"].partition("#")[0]
    whole = served_talks.get(TALK)
    tag = whole.headers["etag"]
    size = len(whole.content)
    for condition, status in ((tag, 206), ('"other"', 200)):
        assert (
            served_talks.get(TALK, **{"range": "bytes=0-1", "if-range": condition}).status_code
            == status
        )
    for condition in ("bytes=-0", "bytes=999999999-", "Bytes=999999999-9999999999"):
        response = served_talks.get(TALK, range=condition)
        assert "expected one like bytes=0-999 within" in error_of(response, 416)["message"]
        assert response.headers["content-range"] == f"bytes */{size}"
    for condition in (  # no range, or several, which are ignored
        *(
            "bytes=",
            "bytes=-",
            "bytes=9-5",
            "bytes=a-b",
            "0-5",
            "items=0-5",
            "bytes=" + "9" * 5000 + "-",
        ),
        *("bytes=\xb2-\xb3", "bytes=0-1,5-6", "bytes=" + "0-," * 2000),
    ):
        response = served_talks.client.get(link, headers=[(b"range", condition.encode("latin-1"))])
        assert (response.status_code, response.content) == (200, whole.content)


def test_nothing_but_moments_of_the_index(served_talks, caplog):
    for name in (
        "talk.mp4",
        "..%2f..%2fetc%2fpasswd",
        "/etc/passwd",
        "0" * 63,
        "' OR path = 'talk.mp4",
        "%00",
    ):
        assert served_talks.client.get(f"/v1/videos/{name}").status_code in (400, 404)
    for name in ("0" * 64, served_talks.hits()["a.png"]["id"]):
        error = error_of(served_talks.client.get(f"/v1/videos/{name}"), 404)
        assert error["code"] == "no_video"
        assert str(served_talks.root) not in str(error)
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_no_file_that_has_taken_its_place(server, tmp_path):
    """Another content, another time, a link to a file of the same size and time, a pipe, a folder, nothing."""
    with talks_in(tmp_path, server) as talks:
        path = talks.root / "talk.mp4"
        secret = tmp_path / "secret"
        time = path.stat().st_mtime_ns
        content = path.read_bytes()
        link = talks.hits()[TALK]["link"].partition("#")[0]
        path.unlink()
        secret.write_bytes(content)
        os.utime(secret, ns=(0, time))

        def write(content, time=time):
            path.write_bytes(content)
            os.utime(path, ns=(0, time))

        for make in (
            partial(write, bytes(len(content)), time + 10**8),
            partial(write, content, time + 10**9),
            partial(path.symlink_to, secret),
            partial(os.mkfifo, path),
            lambda: None,
            path.mkdir,
        ):
            path.unlink(missing_ok=True)
            make()
            for headers in ({}, {"range": "bytes=0-5"}):
                error = error_of(talks.client.get(link, headers=headers), 404)
                assert error["code"] == "no_video"
                assert str(tmp_path) not in error["message"]
        path.rmdir()
        write(content)
        assert talks.client.get(link).content == content


def test_a_link_plays_without_the_key(locked, tmp_path):
    with talks_in(tmp_path, locked) as talks:
        client = talks.client
        headers = BEARER
        body = {"query": "a red square", "where": {"path": {"like": "talk.mp4%"}}}
        hit = client.post("/v1/search", json=body, headers=headers).json()["data"][0]
        link = hit["link"].partition("#")[0]
        piece = client.get(link, headers={"Range": "bytes=0-99"})
        assert (piece.status_code, piece.content) == (
            206,
            (talks.root / "talk.mp4").read_bytes()[:100],
        )
        error_of(client.get(link.partition("?")[0]), 401)
        for path in (link, f"/v1/images/{hit['id']}", f"/v1/images/{hit['id']}?size=64"):
            whole = client.get(path, headers=headers)
            again = client.get(path, headers={**headers, "If-None-Match": whole.headers["etag"]})
            assert (whole.status_code, again.status_code, again.content) == (200, 304, b"")
            assert (
                client.get(path, headers={**headers, "If-None-Match": '"other"'}).status_code == 200
            )
        assert client.head(link).headers["content-length"] == str(
            (talks.root / "talk.mp4").stat().st_size
        )
