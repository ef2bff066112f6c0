"""An index of videos: moments with frames and transcripts, found by text, brought up to date, damaged files named."""

import io
import shutil
from typing import Any

import numpy as np
import pytest
import torch
from album import Album
from PIL import Image

from bridgetower.data.sources import reader
from bridgetower.search.build import build_index
from bridgetower.search.index import Index
from bridgetower.search.searcher import Searcher
from bridgetower.search.sheet import contact_sheet
from helpers.sources import (
    CLIP_SIZE,
    SUBTITLE_TEXTS,
    SUBTITLES,
    clip_image,
    serve_files,
    write_clip,
)


@pytest.fixture(scope="module")
def talk_clip(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clips") / "talk.mp4")


@pytest.fixture
def talks(talk_clip, tmp_path):
    """A talk with subtitles, and a folder with a lecture without any."""
    folder = tmp_path / "talks"
    (folder / "lectures").mkdir(parents=True)
    shutil.copy(talk_clip, folder / "talk.mp4")
    (folder / "talk.srt").write_text(SUBTITLES, encoding="utf-8")
    shutil.copy(talk_clip, folder / "lectures" / "one.mp4")
    return folder


@pytest.fixture
def talks_album(talks, predictor):
    return Album(talks, predictor)


def test_a_row_has_frame_times_transcript_and_vectors(talks, predictor, talks_album):
    assert talks_album.counts(talks / "talk.mp4", talks / "lectures") == (7, 7, 0, 0)
    searcher = Searcher(talks_album.out, predictor)
    hit, *other_hits = searcher.search(SUBTITLE_TEXTS[0], against="captions", rerank=0)
    assert (hit.path, hit.start, hit.end, hit.captions) == (
        "talk.mp4#t=0.500,2.500",
        0.5,
        2.5,
        (SUBTITLE_TEXTS[0],),
    )
    assert hit.cosine == pytest.approx(1, abs=1e-5)
    assert hit.file == talks / "talk.mp4"
    assert (hit.width, hit.height) == CLIP_SIZE
    assert len(other_hits) == 2  # the lecture has no captions
    frame = Image.open(io.BytesIO(searcher.index.content(hit)))
    assert np.abs(np.asarray(frame, dtype=int) - np.asarray(clip_image(1), dtype=int)).mean() < 6
    for against, vector in (
        ("images", predictor.embed_images(frame)[0]),
        ("pairs", predictor.embed_pairs(frame, SUBTITLE_TEXTS[0])[0]),
    ):
        (nearest,) = searcher.index.nearest(vector, 1, against=against)  # type: ignore[arg-type]
        assert (nearest.path, nearest.cosine) == (hit.path, pytest.approx(1, abs=1e-5))


def test_matching_and_sheets_take_the_frames_of_the_index(talks, predictor, talks_album):
    talks_album.build()
    shutil.rmtree(talks)  # nothing is read from it any more
    searcher = Searcher(talks_album.out, predictor)
    hits = searcher.search("a red square", against="images")
    assert len(hits) == 7
    frames = [searcher.index.content(hit) for hit in hits]
    expected = predictor.match(frames, ["a red square"] * 7)
    torch.testing.assert_close(
        torch.tensor([hit.score for hit in hits]), expected, atol=1e-5, rtol=0
    )
    hits = searcher.search("a", where="start >= 3 and end <= 6", rerank=0)
    assert {hit.path for hit in hits} == {
        "talk.mp4#t=3.500,5.000",
        "lectures/one.mp4#t=3.000,6.000",
    }
    sheet = contact_sheet(hits, searcher.index.content)
    # the frames are green
    assert (np.abs(np.asarray(sheet).astype(int) - (0, 254, 0)) < 3).all(axis=2).any()


def test_a_text_is_compared_with_what_is_said_where_all_moments_have_words(
    talks, predictor, talks_album
):
    talks_album.build(talks / "talk.mp4")
    searcher = Searcher(talks_album.out, predictor)
    frame = io.BytesIO(searcher.index.content(searcher.index.examples(1)[0])).getvalue()
    hits = searcher.search(SUBTITLE_TEXTS[1])
    assert (hits[0].captions, hits[0].cosine, hits[0].score) == (
        (SUBTITLE_TEXTS[1],),
        pytest.approx(1, abs=1e-5),
        None,
    )
    assert hits == searcher.search(SUBTITLE_TEXTS[1], against="captions")
    assert hits == searcher.search(SUBTITLE_TEXTS[1], against="captions", rerank=0)
    assert None not in {hit.score for hit in searcher.search(SUBTITLE_TEXTS[1], rerank=3)}
    image_hits = searcher.search(SUBTITLE_TEXTS[1], against="images")
    assert None not in {hit.score for hit in image_hits}
    assert searcher.search(image=frame) == searcher.search(image=frame, against="images")
    assert searcher.search(SUBTITLE_TEXTS[1], frame) == searcher.search(
        SUBTITLE_TEXTS[1], frame, against="images"
    )
    (talks / "talk.srt").write_text("1\n00:00:02,000 --> 00:00:04,000\nthe sea\n", encoding="utf-8")
    talks_album.build(talks / "talk.mp4", every=6.0)  # half of it is silent now
    assert len(Searcher(talks_album.out, predictor).search("the sea")) == 2


def test_moments_with_words_and_what_has_none_are_ranked_apart_and_take_turns(
    talks, predictor, talks_album
):
    Image.new("RGB", (30, 20), "blue").save(talks / "photo.png")
    (talks / "photo.txt").write_text(
        f"{SUBTITLE_TEXTS[1]}\n"
    )  # the caption of an image is not said
    assert talks_album.build().images == 8
    query = predictor.embed_texts(SUBTITLE_TEXTS[1])[0].numpy()
    rows = talks_album.rows()
    spoken = [path for path in rows if path.startswith("talk.mp4")]
    cosine = {path: float(np.max(np.stack(rows[path]["text_vectors"]) @ query)) for path in spoken}
    silent = [path for path in rows if path not in spoken]
    cosine |= {path: float(np.dot(rows[path]["image_vector"], query)) for path in silent}
    searcher = Searcher(talks_album.out, predictor)
    frames = [
        searcher.index.content(entry)
        for entry in searcher.index.examples(8)
        if entry.path in silent
    ]
    names = [entry.path for entry in searcher.index.examples(8) if entry.path in silent]
    log_odds = dict(
        zip(names, predictor.match(frames, [SUBTITLE_TEXTS[1]] * 5).logit().tolist(), strict=True)
    )

    def in_turn(images: dict[str, float]) -> list[str]:
        word_hits = sorted(spoken, key=lambda path: -cosine[path])
        image_hits = sorted(images, key=lambda path: -images[path])
        return [
            word_hits[0],
            image_hits[0],
            word_hits[1],
            image_hits[1],
            word_hits[2],
            *image_hits[2:],
        ]

    for rerank, images in (
        (0, {path: cosine[path] for path in silent}),
        (None, log_odds),
        (5, log_odds),
    ):
        hits = searcher.search(SUBTITLE_TEXTS[1], rerank=rerank)
        assert [hit.path for hit in hits] == in_turn(images)
        assert [hit.path for hit in hits if hit.against == "captions"] == in_turn(images)[:5:2]
        assert [hit.cosine for hit in hits] == pytest.approx(
            [cosine[hit.path] for hit in hits], abs=1e-5
        )
        expected = [cosine[hit.path] if hit.path in spoken else images[hit.path] for hit in hits]
        assert [hit.rank_score for hit in hits] == pytest.approx(expected, abs=1e-4)
        assert {hit.path for hit in hits if hit.score is not None} == set(
            () if rerank == 0 else silent
        )
        assert searcher.search(SUBTITLE_TEXTS[1], rerank=rerank, top=4) == hits[:4]
    matched = searcher.search(SUBTITLE_TEXTS[1], where="path LIKE 'talk%' OR width = 30", rerank=0)
    assert [hit.path for hit in matched] == [hits[0].path, "photo.png", hits[2].path, hits[4].path]
    with pytest.raises(ValueError, match=r"^where is 'wide': "):
        searcher.search(SUBTITLE_TEXTS[1], where="wide")
    assert {hit.against for hit in searcher.search(SUBTITLE_TEXTS[1], frames[0])} == {"images"}


def test_only_what_has_changed_is_embedded(talks, talks_album, interrupt):
    # two of an image of a lecture each
    interrupt(4, lambda: talks_album.build(batch_size=2, commit_seconds=0, num_workers=0))
    assert len(Index(talks_album.out)) == 4
    assert talks_album.counts() == (7, 3, 0, 0)
    assert talks_album.counts() == (7, 0, 0, 0)
    (talks / "talk.srt").write_text(SUBTITLES.replace("followed", "trailed"), encoding="utf-8")
    assert talks_album.counts() == (7, 0, 1, 0)
    (talks / "lectures" / "one.mp4").unlink()
    assert talks_album.build().removed == 4
    assert talks_album.build(every=6.0).images == 2


def test_moments_stay_where_videos_cannot_be_read(talks, talks_album, monkeypatch):
    Image.new("RGB", (8, 8)).save(talks / "a.png")
    Image.new("RGB", (9, 9)).save(talks / "b.png")
    before = talks_album.build()
    (talks / "b.png").unlink()
    monkeypatch.setattr(reader, "is_installed", lambda package: package != "av")
    with pytest.raises(
        ValueError, match=r"2 bad items.*'talk.mp4': the extra 'video' is missing: pip install"
    ):
        talks_album.build()
    assert talks_album.counts(max_errors=2) == (before.images - 1, 0, 0, 0)


def test_at_urls_and_in_stores(talks, predictor, talks_album, store, tmp_path):
    (talks / "lectures" / "one.mp4").rename(talks / "one.mp4")
    (talks / "lectures").rmdir()
    talks_album.build()
    expected = Searcher(talks_album.out, predictor).search(
        SUBTITLE_TEXTS[1], against="images", rerank=0
    )
    with serve_files(talks) as url:
        report = build_index(f"{url}/talk.mp4", tmp_path / "url.lance", predictor)
        assert (report.images, report.bad) == (3, ())
        again = build_index(f"{url}/talk.mp4", tmp_path / "url.lance", predictor)
        assert (again.added, again.changed, again.removed) == (0, 0, 0)
        searcher = Searcher(tmp_path / "url.lance", predictor)
        hit = searcher.search(SUBTITLE_TEXTS[1])[0]
        assert (hit.path, hit.file) == ("talk.mp4#t=3.500,5.000", f"{url}/talk.mp4")
        with pytest.raises(ValueError, match=r"no file at http.*/none\.mp4"):
            build_index(f"{url}/none.mp4", tmp_path / "none.lance", predictor)
    assert searcher.index.content(hit, fetch=False)[:2] == b"\xff\xd8"  # the frame, a JPEG
    report = build_index(store.upload(talks, "bucket/talks"), tmp_path / "store.lance", predictor)
    assert (report.images, report.bad) == (7, ())
    hits = Searcher(tmp_path / "store.lance", predictor).search(
        SUBTITLE_TEXTS[1], against="images", rerank=0
    )
    assert [(hit.path, pytest.approx(hit.cosine, abs=1e-5)) for hit in expected] == [
        (hit.path, hit.cosine) for hit in hits
    ]
    assert hits[0].file == f"s3://bucket/talks/{hits[0].path.partition('#')[0]}"


def test_a_damaged_video_is_named_and_what_can_be_read_is_kept(talks, talks_album):
    path = write_clip(talks / "broken.mp4", size=(320, 240), keyframes=5)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    (talks / "empty.mp4").write_bytes(b"")
    message = r"2 bad items.*'broken.mp4': it ends after .* s; copy it again \| 'empty.mp4'"
    with pytest.raises(ValueError, match=message):
        talks_album.build()
    assert any(path.startswith("broken.mp4#t=0.000,") for path in Index(talks_album.out).paths())


def test_refuses(talks, predictor, tmp_path):
    cases: list[tuple[list[Any], str]] = [
        ([], "nothing to index; name a folder"),
        ([talks / "talk.mp4", talks], "talk.mp4 is given twice, as it is in"),
        (
            [talks / "talk.mp4", "https://host/a.tar"],
            "a.tar is a URL, of which an index can only have one source",
        ),
    ]
    for sources, message in cases:
        with pytest.raises(ValueError, match=message):
            build_index(sources, tmp_path / "a.lance", predictor)


class TestFrames:
    """The frames of moments come from the index, all at once, and only as they were indexed."""

    @pytest.fixture
    def searcher(self, talks_album, predictor):
        talks_album.build()
        return Searcher(talks_album.out, predictor)

    def test_are_read_in_one_query(self, searcher, monkeypatch):
        expected = searcher.search("red", rerank=7, against="images")
        queries: list[str] = []
        search = type(searcher.index._table).search

        def counting(table: Any, *arguments: Any, **options: Any) -> Any:
            queries.append("a query")
            return search(table, *arguments, **options)

        monkeypatch.setattr(type(searcher.index._table), "search", counting)
        assert searcher.search("red", rerank=7, against="images") == expected
        assert len(queries) == 2  # the nearest, and their frames

    def test_another_frame_is_refused(self, searcher):
        hits = searcher.search("red", rerank=0, against="images")
        frame = searcher.index.content(hits[0])
        assert searcher.index.content(hits[0], max_bytes=len(frame)) == frame
        with pytest.raises(
            ValueError, match=rf"has {len(frame)} bytes, the limit is {len(frame) - 1}"
        ):
            searcher.index.content(hits[0], max_bytes=len(frame) - 1)
        path = hits[0].path.replace("'", "''")
        searcher.index._table.update(where=f"path = '{path}'", values={"frame": b"another"})
        with pytest.raises(
            ValueError, match="the moment has changed since it was indexed; search again"
        ):
            searcher.index.content(hits[0])
        assert len(searcher.search("red", rerank=7, against="images")) == 6
