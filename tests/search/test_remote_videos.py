"""Videos at URLs: copied once with their subtitles, found by text, brought up to date; what cannot be read is named."""

import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from bridgetower.data import remote_videos
from bridgetower.predictor import Predictor
from bridgetower.search.build import build_index
from bridgetower.search.config import IndexConfig
from bridgetower.search.searcher import Searcher
from stores import Store
from videos import SAID, SRT, write_clip


class Handler(SimpleHTTPRequestHandler):
    """Serves a folder; keeps what was asked for, and refuses some files."""

    asked: list[tuple[str, str]]
    refused: set[str]

    def send_head(self) -> object:
        name = self.path.partition("?")[0].rpartition("/")[2]
        self.asked.append((self.command, name))
        if name in self.refused:
            self.send_error(403)
            return None
        return super().send_head()

    def log_message(self, *given: object) -> None:
        """Prints nothing."""


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clips") / "talk.mp4")


@pytest.fixture
def served(clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, str]]:
    """A folder with a talk and subtitles, and its URL; nothing is in the cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "served"
    folder.mkdir()
    (folder / "talk.mp4").write_bytes(clip.read_bytes())
    (folder / "talk.srt").write_text(SRT, encoding="utf-8")
    Handler.asked, Handler.refused = [], set()
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield folder, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()
    forgotten()


def reads(name: str) -> int:
    return Handler.asked.count(("GET", name))


def forgotten() -> None:
    """As in a new process."""
    while remote_videos._held:
        remote_videos._held.popitem()[1][0].close()


def test_moments_at_a_url(served: tuple[Path, str], predictor: Predictor, clip: Path, tmp_path: Path) -> None:
    folder, url = served
    report = build_index(f"{url}/talk.mp4", tmp_path / "talk.lance", predictor)
    assert (report.images, report.bad) == (3, ())
    assert (reads("talk.mp4"), reads("talk.srt")) == (1, 1)
    searcher = Searcher(tmp_path / "talk.lance", predictor)
    hit = searcher.search(SAID[1])[0]
    assert (hit.path, hit.file) == (f"{url}/talk.mp4#t=3.500,5.000", f"{url}/talk.mp4")
    assert (hit.start, hit.end, hit.captions) == (3.5, 5.0, (SAID[1],))
    (folder / "talk.mp4").unlink()
    assert searcher.index.content(hit, fetch=False)[:2] == b"\xff\xd8"  # the frame, a JPEG
    local = tmp_path / "local"
    local.mkdir()
    (local / "talk.mp4").write_bytes(clip.read_bytes())
    (local / "talk.srt").write_text(SRT, encoding="utf-8")
    build_index(local, tmp_path / "local.lance", predictor)
    expected = Searcher(tmp_path / "local.lance", predictor).search(SAID[1], against="images", rerank=0)
    found = searcher.search(SAID[1], against="images", rerank=0)
    assert [one.cosine for one in found] == pytest.approx([one.cosine for one in expected], abs=1e-5)


def test_only_what_has_changed_is_read_again(served: tuple[Path, str], predictor: Predictor, tmp_path: Path) -> None:
    folder, url = served
    index = partial(build_index, f"{url}/talk.mp4?key=1", tmp_path / "talk.lance", predictor)
    assert index().added == 3
    forgotten()
    again = index()
    assert (again.added, again.changed, again.removed) == (0, 0, 0)
    assert reads("talk.mp4") == 1
    forgotten()
    (folder / "talk.srt").write_text(SRT.replace("followed", "trailed"), encoding="utf-8")
    changed = index()
    assert (changed.added, changed.changed) == (0, 1)


def test_without_subtitles_there_are_scenes(served: tuple[Path, str], predictor: Predictor, tmp_path: Path) -> None:
    _, url = served
    Handler.refused = {"talk.vtt", "talk.srt"}  # as stores do that do not tell what they have
    assert build_index(f"{url}/talk.mp4", tmp_path / "talk.lance", predictor).images == 4


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.mp4", None, r"no file at http://127\.0\.0\.1:\d+/none\.mp4"),
        ("bad.mp4", b"no video", r"cannot be read \("),
        ("large.mp4", b"0" * 4097, r"has 4097 bytes; expected a video of at most 4096"),
        ("refused.mp4", b"0", r"no file at http://127\.0\.0\.1:\d+/refused\.mp4"),
    ],
)
def test_what_cannot_be_read_is_named(
    served: tuple[Path, str],
    predictor: Predictor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    content: bytes | None,
    message: str,
) -> None:
    folder, url = served
    monkeypatch.setattr(remote_videos, "LARGEST", 4096)
    Handler.refused = {"refused.mp4"}
    if content is not None:
        (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        build_index(f"{url}/{name}", tmp_path / "talk.lance", predictor)
    report = build_index(f"{url}/{name}", tmp_path / "talk.lance", predictor, IndexConfig(max_errors=1))
    assert (report.images, len(report.bad)) == (0, 1)


def test_a_folder_of_a_store(
    store: Store, clip: Path, predictor: Predictor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "talks"
    folder.mkdir()
    for name in ("one.mp4", "two.MP4"):
        (folder / name).write_bytes(clip.read_bytes())
    (folder / "one.srt").write_text(SRT, encoding="utf-8")
    report = build_index(store.upload(folder, "bucket/talks"), tmp_path / "talks.lance", predictor)
    assert (report.images, report.bad) == (3 + 4, ())
    hits = Searcher(tmp_path / "talks.lance", predictor).search(SAID[2], against="captions", rerank=0)
    assert hits[0].path == "s3://bucket/talks/one.mp4#t=6.000,9.500"
    forgotten()


def test_a_copy_is_held_until_others_are_asked_for(served: tuple[Path, str], clip: Path) -> None:
    folder, url = served
    for name in "abc":
        (folder / f"{name}.mp4").write_bytes(clip.read_bytes() + name.encode())
    first = remote_videos.copy_of(f"{url}/a.mp4")
    assert remote_videos.copy_of(f"{url}/a.mp4") == first
    assert reads("a.mp4") == 1
    remote_videos.copy_of(f"{url}/b.mp4")
    remote_videos.copy_of(f"{url}/c.mp4")
    assert len(remote_videos._held) == 2
    assert first.read_bytes() == clip.read_bytes() + b"a"  # still in the cache
